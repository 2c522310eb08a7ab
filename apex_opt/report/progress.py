"""Progress of long work, on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

_LINE_EVERY_S: Final = 10.0


class Progress:
    """A bar for the work in hand where stderr is a terminal; else a line when a kind begins and every ten seconds."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._what = ""
        self._said: dict[str, float] = {}
        self._begun: dict[str, tuple[float, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _begin(self) -> Bar:
        """The bar, once there is something to tell."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *times,
            console=Console(stderr=True),
            transient=True,
        )
        bar.start()
        return bar

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell that `done` of `total` steps of a kind of work are done; a total of 0 is one that is not known."""
        if self._bar is None:
            if not sys.stderr.isatty():
                self._line(what, done, total)
                return
            self._bar = self._begin()
        if self._task is not None and what == self._what:
            self._bar.update(self._task, completed=done, total=total or None)
        else:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._what = self._bar.add_task(what, total=total or None, completed=done), what

    def _line(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what not in self._said:
            print(f"{what} ...", file=sys.stderr, flush=True)
            self._begun[what] = now, done
        elif (done or total) and now - self._said[what] >= _LINE_EVERY_S:
            of = f" of {total:,}{self._left(what, done, total, now)}" if total else ""
            print(f"{what}: {done:,}{of}", file=sys.stderr, flush=True)
        else:
            return
        self._said[what] = now

    def _left(self, what: str, done: int, total: int, now: float) -> str:
        """The seconds left if all steps are taken, at the pace so far."""
        begun, before = self._begun[what]
        return f", {(now - begun) * (total - done) / (done - before):,.0f} s left at this pace" if done > before else ""
