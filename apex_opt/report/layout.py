"""Pages, tables and figures for people: what every document is printed with."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, Any, Final, Self

from rich.console import Console
from rich.text import Text

from apex_opt.figures.units import beside
from apex_opt.report.grid import RULE, grid
from apex_opt.report.sources import in_full
from apex_opt.units import GB

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from apex_opt.report.sources import Provenance
    from apex_opt.schema import Document

_WIDTH: Final = 120
_NARROWEST: Final = 40

NOUNS: Final = {"single": "plan", "mixed": "fleet", "pipeline": "pipeline", "pools": "pair"}
"""What a deployment is called, by the shape of its part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A table of a page, with all its columns.

    Parameters
    ----------
    title : str         above it
    heads : of its columns
    rows : texts of its cells
    left : columns set to the left
    """

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """What a page says between its tables.

    Parameters
    ----------
    text : str
    title : bool     whether it stands above what follows
    copied : bool    whether it is to be copied as it is, as a command is
    """

    text: str
    title: bool = False
    copied: bool = False


class Page(str):
    """A page as text, and what it is made of."""

    __slots__ = ("blocks",)
    blocks: tuple[Grid | Words, ...]

    def __new__(cls, text: str, blocks: Iterable[Grid | Words] = ()) -> Self:
        """A page of these parts; of none it is one to be copied."""
        made = super().__new__(cls, text)
        made.blocks = tuple(blocks) or (Words(text=text, copied=True),)
        return made


class Sheet(Console):
    """A console that keeps what is put on it, for pages that are no text."""

    def __init__(self, text: StringIO) -> None:
        terminal = sys.stdout.isatty()
        super().__init__(
            file=text,
            width=page_width(),
            force_terminal=terminal,
            force_jupyter=False,
            color_system="auto" if terminal else None,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self.blocks: list[Grid | Words] = []
        self._in_table = False

    @contextlib.contextmanager
    def table(self, kept: Grid) -> Iterator[None]:
        """What is printed meanwhile is this table."""
        self.blocks.append(kept)
        self._in_table = True
        try:
            yield
        finally:
            self._in_table = False

    def print(self, *objects: Any, soft_wrap: bool | None = None, **how: Any) -> None:
        """Print, and keep what is no part of a table.

        Parameters
        ----------
        objects : texts
        soft_wrap : bool or None    whether lines are left as long as they are, to be copied
        how : whatever else a console takes
        """
        for each in () if self._in_table else objects:
            inner = getattr(each, "renderable", each)
            title = isinstance(inner, Text) and inner.style == "bold"
            self.blocks.append(Words(text=str(inner), title=title, copied=bool(soft_wrap)))
        super().print(*objects, soft_wrap=soft_wrap, **how)


def page(draw: Callable[[Console], None]) -> Page:
    """What is drawn, as text of `page_width` columns."""
    text = StringIO()
    sheet = Sheet(text)
    draw(sheet)
    lines = "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
    told = lines if (sys.stdout.encoding or "").lower().startswith("utf") else lines.replace(RULE, "-")
    return Page(told, sheet.blocks)


def page_width() -> int:
    """Columns of a page: as COLUMNS says, else those of the terminal, also behind a pipe, else 120; 40 at the least."""
    said = os.environ.get("COLUMNS", "")
    columns = int(said) if said.isdecimal() and len(said) < 10 else 0
    return max(columns or _terminal_width() or _WIDTH, _NARROWEST)


def _terminal_width() -> int:
    """Columns of the terminal that a page is read on; 0 where there is none, or it does not say."""
    for stream in (sys.stdout, sys.stderr, sys.stdin):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if columns := os.get_terminal_size(stream.fileno()).columns:
                return columns
    with contextlib.suppress(OSError, AttributeError), open("/dev/tty", "rb", buffering=0) as terminal:
        return os.get_terminal_size(terminal.fileno()).columns
    return 0


def table(
    console: Console,
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (),
    kept: Collection[int] | None = None,
    turned: bool = False,
) -> None:
    """One table as wide as the console, of the parameters of `grid`; columns that are left out are named below it.

    Parameters
    ----------
    console
    title : str                       above the table
    heads : sequence of str           of the columns
    rows : sequence                   texts of the cells
    left : sequence of int            columns set to the left
    kept : sequence of int or None    columns that stay where there is little room
    turned : bool                     whether rows are shown one below the other where there is no room
    """
    cells = [tuple(row) for row in rows]
    whole = Grid(title=title, heads=tuple(heads), rows=tuple(cells), left=frozenset(left))
    with console.table(whole) if isinstance(console, Sheet) else contextlib.nullcontext():
        if title:
            console.print(Text(title, "bold"))
        found = grid(heads, cells, console.width, left, kept, turned=turned)
        *heads, rule = found.heads or [""]
        for lines, style in ((heads, "bold"), ([rule] if rule else [], ""), (found.rows, "")):
            if lines:
                console.print(Text("\n".join(lines), style), soft_wrap=True)
        if found.left_out:
            console.print(Text(f"left out for lack of width: {', '.join(found.left_out)}", "dim"))
        console.print()


def notes_lines(console: Console, document: Document) -> None:
    """What the reader has to know besides, a line each."""
    of_load = (document.get("transient") or {}).get("said", ())
    for note in (*document.get("notes", ()), *of_load):
        lines = textwrap.wrap(f"note: {note}", console.width, subsequent_indent="  ", break_on_hyphens=False)
        console.print(Text("\n".join(lines), "yellow"))


def lies_table(console: Console, lies: Sequence[Document]) -> None:
    """What holds each kind of groups of a plan's ranks, and why nothing smaller does."""
    if rows := [(one["group"], str(one["ranks"]), one["inside"], one["reason"] or "") for one in lies]:
        table(console, "Where its groups lie", ("group", "GPUs", "within a", "why"), rows, left={0, 2, 3})


def provenance_table(console: Console, provenance: Provenance) -> None:
    """Where the figures of an answer come from, a row each or a row for each group."""
    table(console, "Where the figures come from", ("", ""), in_full(provenance).items(), left={0, 1})


def seconds(value: float | None, limit: float | None = None) -> str:
    """A duration with the unit that suits it; beside a limit with as many digits as tell it from that."""
    if value is None:
        return "-"
    if abs(value) < 1e-3:
        return f"{beside(lambda more: f'{value * 1e6:.{1 + more}f}', value, limit, 1e-6)} us"
    if abs(value) < 1:
        return f"{beside(lambda more: f'{value * 1e3:.{1 + more}f}', value, limit, 1e-3)} ms"
    if abs(value) < 1e4:
        return f"{beside(lambda more: f'{value:.{2 + more}f}', value, limit)} s"
    return f"{beside(lambda more: f'{value:,.{more}f}', value, limit)} s"


def amount(value: float | None, unit: str, limit: float | None = None) -> str:
    """A figure in seconds, joules or another unit, as people read it.

    Parameters
    ----------
    value : float or None    in that unit; None is a dash
    unit : str               s, B, J or another
    limit : float or None    beside which it is told, as `seconds` has it
    """
    if value is None:
        return "-"
    if unit == "s":
        return seconds(value, limit)
    if unit == "B":
        return f"{value / GB:,.1f} GB"
    if unit == "J":
        return f"{kilojoules(value, limit)} kJ"
    return f"{beside(lambda more: f'{value:.{3 + more}f}', value, limit)} {unit}"


def kilojoules(joules: float, limit: float | None = None) -> str:
    """An energy in kJ, of short runs in whole joules, so that what differs looks different."""
    places = 1 if joules >= 1e3 else 3
    return beside(lambda more: f"{joules / 1e3:,.{places + more}f}", joules, limit, 1e3)


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def aim(objective: Document) -> str:
    """An objective and what the plan reaches of it; where others come after it, how near to the best it had to be."""
    near = f" (at most {100 * objective['tolerance']:.4g}% from the best)" if objective["tolerance"] else ""
    return f"{objective['name']} = {amount(objective['value'], objective['unit'])}{near}"


def of_types(shape: str, types: Sequence[str]) -> str:
    """Which deployments a part of a certificate is of."""
    if shape == "pipeline":
        return f"stages on {' and on '.join(types)}"
    if shape == "pools":
        return f"prefill on {types[0]}, decode on {types[1]}"
    return f"{' and '.join(types)} {'together' if shape == 'mixed' else 'alone'}"
