"""Pages, tables and figures for people: what every document is printed with."""

from __future__ import annotations

import os
import sys
import textwrap
from io import StringIO
from typing import TYPE_CHECKING, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from apex_opt.report.document import Document

_PIPE_WIDTH: Final = 120
_RULE: Final = SIMPLE_HEAD.head_row_horizontal


def page(draw: Callable[[Console], None]) -> str:
    """What is drawn, as text for the terminal that stdout is, or for a pipe: 120 columns wide, or as COLUMNS says."""
    terminal = sys.stdout.isatty()
    columns = os.environ.get("COLUMNS", "")
    width = Console().width if terminal or columns.isdecimal() else _PIPE_WIDTH
    text = StringIO()
    draw(
        Console(
            file=text,
            width=max(width, 40),
            force_terminal=terminal,
            color_system="auto" if terminal else None,
            highlight=False,
            markup=False,
            emoji=False,
        )
    )
    lines = "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
    return lines if (sys.stdout.encoding or "").lower().startswith("utf") else lines.replace(_RULE, "-")


def table(
    console: Console,
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: set[int] | None = None,
    kept: int | None = None,
) -> None:
    """One table. Where `kept` is given and the console too narrow, columns after so many are dropped, and named."""
    cells = list(rows)
    shown = len(heads)
    grid = _built(title, heads, cells, left or set())
    wide = console.options.update(max_width=10_000)
    while kept is not None and shown > kept and Measurement.get(console, wide, grid).maximum > console.width:
        shown -= 1
        grid = _built(title, heads[:shown], [row[:shown] for row in cells], left or set())
    console.print(grid)
    if shown < len(heads):
        console.print(Text(f"left out for lack of width: {', '.join(heads[shown:])}", "dim"))
    console.print()


def notes_lines(console: Console, document: Document) -> None:
    """What the reader has to know besides, a line each."""
    for note in document.get("notes", ()):
        lines = textwrap.wrap(f"note: {note}", console.width, subsequent_indent="  ", break_on_hyphens=False)
        console.print(Text("\n".join(lines), "yellow"))


def lies_table(console: Console, lies: Sequence[Document]) -> None:
    """What holds each kind of groups of a plan's ranks, and why nothing smaller does."""
    if rows := [(one["group"], str(one["ranks"]), one["inside"], one["reason"] or "") for one in lies]:
        table(console, "Where its groups lie", ("group", "GPUs", "within a", "why"), rows, left={0, 2, 3})


def provenance_table(console: Console, provenance: Mapping[str, str]) -> None:
    """Where the figures of an answer come from, a row each."""
    table(console, "Where the figures come from", ("", ""), provenance.items(), left={0, 1})


def _built(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], left: set[int]) -> Table:
    grid = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_header=any(heads),
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for index, head in enumerate(heads):
        grid.add_column(head, justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(Text, row))
    return grid


def seconds(value: float | None) -> str:
    """A duration with the unit that suits it."""
    if value is None:
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    return f"{value:.2f} s" if value < 1e4 else f"{value:,.0f} s"


def amount(value: float | None, unit: str) -> str:
    """A figure in seconds, joules or another unit, as people read it."""
    if value is None:
        return "-"
    if unit == "s":
        return seconds(value)
    return f"{value / 1e3:,.1f} kJ" if unit == "J" else f"{value:.3f} {unit}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def aim(objective: Document) -> str:
    """An objective and what the plan reaches of it; where others come after it, how near to the best it had to be."""
    near = f" (at most {100 * objective['tolerance']:.4g}% from the best)" if objective["tolerance"] else ""
    return f"{objective['name']} = {amount(objective['value'], objective['unit'])}{near}"
