"""Tables as lines of text that fit a width.

What does not fit as it is, is tried in this order: heads over several lines, columns left out that may be, text broken
between its words, and at last the rows one below the other. Figures are never broken.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

RULE: Final = "─"
_GAP: Final = 2
_NARROWEST: Final = 12
"""Characters of the narrowest column whose texts are broken."""

_EASY: Final = 44
"""Characters of a column of text to which other columns are not sacrificed."""

_LONGEST_WORD: Final = 24
"""Characters of a word that a column is made wide enough for; longer ones are broken."""

_BREAKS: Final = (",;/", ":)]}=_-.+")
"""Signs after which a word is broken, the best first."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Lines of the heads and of the rows, and the heads of the columns that are left out."""

    heads: list[str]
    rows: list[str]
    left_out: list[str]


def grid(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int,
    left: Collection[int] = (),
    kept: Collection[int] | None = None,
    *,
    turned: bool = False,
) -> Grid:
    """A table within a width.

    Parameters
    ----------
    heads, rows : texts, a row as long as the heads
    width : int        characters of a line
    left : columns of text, that begin on the left and may be broken; the others are figures
    kept : columns that are not left out; None: all. Of the others the last is the first to go
    turned : whether rows may become columns before anything is left out or told one below the other
    """
    rows = [[" ".join(cell.splitlines()) for cell in row] for row in rows]
    columns = [_Column.of([head, *(row[place] for row in rows)], place in left) for place, head in enumerate(heads)]
    shown = list(range(len(heads)))
    if turned and _total(columns) > width and len(rows) < len(heads):
        other = grid([heads[0], *(row[0] for row in rows)], list(zip(heads, *rows, strict=True))[1:], width, {0}, ())
        if other.heads and not other.left_out:
            return other
    while kept is not None and _total([columns[place] for place in shown]) > width:
        extra = [place for place in shown if place not in kept]
        if not extra:
            break
        shown.remove(extra[-1])
    widths = _widths([columns[place] for place in shown], width)
    if widths is None:
        return Grid([], [line for row in rows for line in _stacked(heads, row, width, left)], [])
    sides = [place in left for place in shown]
    cut = [heads[place] for place in range(len(heads)) if place not in shown and heads[place]]
    lines = [_lines([row[place] for place in shown], widths, sides) for row in rows]
    top = list(_lines([heads[place] for place in shown], widths, sides, bottom=True)) if any(heads) else []
    if top:
        top.append(RULE * (sum(widths) + _GAP * (len(widths) - 1)))
    return Grid(top, [line for some in lines for line in some], cut)


@dataclass(frozen=True, slots=True)
class _Column:
    """Characters that a column needs at the least, to be read with ease, and to have every cell in one line."""

    least: int
    easy: int
    whole: int

    @classmethod
    def of(cls, texts: Sequence[str], text: bool) -> _Column:
        whole = max(map(cell_len, texts))
        word = max((cell_len(word) for cell in (texts if text else texts[:1]) for word in cell.split()), default=0)
        if not text:
            figures = max(map(cell_len, texts[1:]), default=0)
            return cls(max(word, figures), max(word, figures), whole)
        least = min(whole, max(_NARROWEST, min(word, _LONGEST_WORD)))
        return cls(least, min(whole, max(least, _EASY)), whole)


def _total(columns: Sequence[_Column]) -> int:
    """Characters of columns that can be read with ease."""
    return sum(column.easy for column in columns) + _GAP * (len(columns) - 1)


def _widths(columns: Sequence[_Column], width: int) -> list[int] | None:
    """Characters of each column within a width, each as much more than it needs as the others; None: too few."""
    found = [column.least for column in columns]
    free = width - sum(found) - _GAP * (len(columns) - 1)
    if free < 0:
        return None
    for goals in ([column.easy for column in columns], [column.whole for column in columns]):
        wanting = sorted(range(len(columns)), key=lambda place: goals[place] - found[place])
        for index, place in enumerate(wanting):
            more = min(goals[place] - found[place], free // (len(wanting) - index))
            found[place] += more
            free -= more
    return found


def _lines(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool], *, bottom: bool = False) -> Iterator[str]:
    """Cells beside each other."""
    parts = [broken(cell, width) for cell, width in zip(cells, widths, strict=True)]
    if bottom:
        most = max(map(len, parts))
        parts = [[""] * (most - len(lines)) + lines for lines in parts]
    for line in zip_longest(*parts, fillvalue=""):
        padded = []
        for text, width, side in zip(line, widths, left, strict=True):
            pad = " " * (width - cell_len(text))
            padded.append(text + pad if side else pad + text)
        yield (" " * _GAP).join(padded).rstrip()


def _stacked(heads: Sequence[str], row: Sequence[str], width: int, left: Collection[int]) -> Iterator[str]:
    """A row as a line that names it, with its other cells below, each with its head."""
    first, named = 0, False
    while first < len(heads) and (heads[first] in ("", "#") or (first in left and not named)):
        named = named or heads[first] not in ("", "#")
        first += 1
    if first:
        name, *more = broken(" ".join(filter(None, row[:first])), width - 2)
        yield from (name, *(f"  {part}" for part in more))
    told = [f"{head}: {cell.strip()}" for head, cell in zip(heads[first:], row[first:], strict=True) if head and cell]
    line, indent = "", "  " if first else ""
    for index, text in enumerate(told):
        text += ";" if index + 1 < len(told) else ""
        if line and cell_len(f"{indent}{line} {text}") > width:
            yield indent + line
            line = ""
        line = f"{line} {text}" if line else text
        if cell_len(indent + line) > width:
            *whole, line = broken(line, width - len(indent))
            yield from (indent + part for part in whole)
    if line:
        yield indent + line


def broken(text: str, width: int) -> list[str]:
    """A text in lines of a width, broken between words where these are short enough, its indentation kept."""
    if cell_len(text) <= width:
        return [text]
    indent = " " * min(len(text) - len(text.lstrip()), width // 2)
    room, lines, line = width - len(indent), [], ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if cell_len(joined) <= room:
            line = joined
            continue
        if line:
            lines.append(line)
        while cell_len(word) > room:
            end = _end(word, room)
            lines.append(word[:end])
            word = word[end:]
        line = word
    return [indent + part for part in (*lines, line) if part]


def _end(word: str, room: int) -> int:
    """Where to break a word that does not fit: after the last of the best signs in it, else where the room ends."""
    end = len(word)
    while end > 1 and cell_len(word[:end]) > room:
        end -= 1
    for signs in _BREAKS:
        if places := [place for place in range(end // 3, end) if word[place] in signs]:
            return places[-1] + 1
    return end
