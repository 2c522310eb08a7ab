"""Progress of long work, on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID


class Progress:
    """A bar per kind of work where stderr is a terminal; a line when a kind of work begins where it is not."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._tasks: dict[str, TaskID | None] = {}

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            if what not in self._tasks:
                self._tasks[what] = None
                print(f"{what} ...", file=sys.stderr, flush=True)
            return
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total or None)
        task = self._tasks[what]
        if task is not None:
            self._bar.update(task, completed=done, total=total or None)
