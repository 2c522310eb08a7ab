"""Pages, tables and figures for people: what every document is printed with."""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
from io import StringIO
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.text import Text

from apex_opt.report.grid import RULE, grid
from apex_opt.report.sources import in_full
from apex_opt.units import GB

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from apex_opt.report.sources import Provenance
    from apex_opt.schema import Document

_WIDTH: Final = 120
_NARROWEST: Final = 40

NOUNS: Final = {"single": "plan", "mixed": "fleet", "pipeline": "pipeline", "pools": "pair"}
"""What a deployment is called, by the shape of its part."""


def page(draw: Callable[[Console], None]) -> str:
    """What is drawn, as text of `page_width` columns."""
    terminal = sys.stdout.isatty()
    text = StringIO()
    draw(
        Console(
            file=text,
            width=page_width(),
            force_terminal=terminal,
            color_system="auto" if terminal else None,
            highlight=False,
            markup=False,
            emoji=False,
        )
    )
    lines = "".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines())
    return lines if (sys.stdout.encoding or "").lower().startswith("utf") else lines.replace(RULE, "-")


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
    if title:
        console.print(Text(title, "bold"))
    found = grid(heads, list(rows), console.width, left, kept, turned=turned)
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
    if unit == "B":
        return f"{value / GB:,.1f} GB"
    return f"{value / 1e3:,.1f} kJ" if unit == "J" else f"{value:.3f} {unit}"


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
