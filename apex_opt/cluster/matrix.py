"""The matrix that `nvidia-smi topo -m` prints, as people keep it: from terminals, chats, tickets and logs."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from itertools import combinations, takewhile
from typing import TYPE_CHECKING, Final

from apex_opt.errors import InputError, join_faults

if TYPE_CHECKING:
    from pathlib import Path

NEAR: Final = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""Ways over PCIe, nearest first: one switch, several, the host bridge, two of them in a NUMA node, between sockets."""

NVLINK: Final = re.compile(r"NV([1-9]\d?)")

_ESCAPES: Final = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # styles, and moves of the cursor
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles of windows
    r"|\x1b[()#][0-9A-Za-z]|\x1b[ -~]"
    r"|(?:\^\[|␛)\[[0-?]*[@-~]"  # an escape as it is shown
    r"|\[[0-9;]{0,11}[mKJH]"  # what is left where a paste has lost it
)
_UNSEEN: Final = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\u00ad\u200b-\u200f\u2060\ufeff]")
_WRITTEN_OUT: Final = {r"\n": "\n", r"\t": "\t", r"\r": "", r"\u001b": "\x1b", r"\x1b": "\x1b", r"\033": "\x1b"}
_QUOTED: Final = re.compile(r"^[\s>#*;]+")
_RULED: Final = str.maketrans(dict.fromkeys("|│¦\"'`,;", " "))
_SIDES: Final = re.compile(r"[\d,\-\s]*(?:N/A[\d,\-\s]*)*")
"""The columns after the entries alone: CPUs and NUMA nodes."""

_OLD: Final = {"SOC": "SYS"}
"""Names that older drivers have for the same."""
_ENTRY: Final = re.compile(r"NV[1-9]\d?|PIX|PXB|PHB|NODE|SYS|SOC|X")
_OTHER: Final = re.compile(r"\s+|\S+")
_LONGEST: Final = 65_536
"""Characters of the longest line that is one of a matrix."""
_MOST_FAULTS: Final = 50
_HEADS: Final = re.compile(
    r"GPU\d+|NIC\d+|mlx\d+_(?:bond_?)?\d+|CPU|NUMA|GPU|Affinity"
    r"|\S+?(?=GPU\d|NIC\d|mlx\d+_|CPU\s*Aff|NUMA\s*Aff|\s|$)"
)
_ENDS: Final = ("CPU", "NUMA", "GPU", "Affinity")
"""Words at which the columns of GPUs and NICs end."""
_MOST: Final = 2048
"""Columns of the largest matrix."""
_GPU: Final = re.compile(r"GPU\d+")
_FIRST: Final = re.compile(r"GPU0(?!\d)")
_FIRST_ROW: Final = re.compile(r"(?<![A-Za-z0-9_])GPU0[\s|│,\"']*(?:NV\d|PIX|PXB|PHB|NODE|SYS|SOC|X)(?![a-z])")
_LEGEND: Final = re.compile(r"\s*(NIC\s+)?Legend\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Matrix:
    """What one node's matrix says.

    Attributes
    ----------
    cells : dict of (row, column) to text       `NV` and a number, of `NEAR`, or X; of a NIC those of its row, where
                                                there is one
    sides : dict of GPU to text                 the CPUs that it is near to; empty where not told
    unread : tuple of str                       NICs without a row of their own
    """

    gpus: tuple[str, ...]
    nics: tuple[str, ...]
    cells: dict[tuple[str, str], str]
    sides: dict[str, str]
    unread: tuple[str, ...]


def read_matrix(path: Path, text: str) -> Matrix | None:
    """The matrix in a text, whatever stands around it; None where there is none.

    Raises
    ------
    InputError      a matrix with faults, all of them in one line
    """
    lines = _lines(text)
    first = next((at for at, (_, line) in enumerate(lines) if _FIRST_ROW.search(line)), None)
    if first is None:
        return None
    start = next((at for at in range(first - 1, -1, -1) if _FIRST.search(lines[at][1])), None)
    if start is None:
        where = f"source {path}: line {lines[first][0]}"
        raise InputError(f"{where}: the line above it, with GPU0, GPU1 and so on, is missing: copy it too")
    names = _names(path, lines[start][0], "".join(line for _, line in lines[start:first]))
    return _Rows(path, names).read(lines[first:])


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines with their numbers, without what terminals, chats and tables put around them; empty ones left out."""
    if text.count(r"\n") > text.count("\n"):
        for written, meant in _WRITTEN_OUT.items():
            text = text.replace(written, meant)
    text = _UNSEEN.sub("", _ESCAPES.sub("", html.unescape(text)))
    stripped = ((number, _QUOTED.sub("", line)) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in stripped if len(line) <= _LONGEST and line.strip(" \t`~-+|=:")]


def _names(path: Path, number: int, head: str) -> tuple[str, ...]:
    """GPUs and NICs that the columns are of, from the header."""
    words = _HEADS.findall(head[head.index("GPU0") :].translate(_RULED))
    names = tuple(takewhile(lambda word: word not in _ENDS, words))
    count = sum(1 for _ in takewhile(_GPU.fullmatch, names))
    if len(names) > _MOST:
        raise InputError(f"source {path}: line {number}: {len(names)} columns, above the limit of {_MOST}")
    if (
        names[:count] != tuple(f"GPU{index}" for index in range(count))
        or any(_GPU.fullmatch(name) for name in names[count:])
        or len(set(names)) < len(names)
    ):
        raise InputError(f"source {path}: line {number}: its columns are not GPU0, GPU1 and so on, then NICs")
    return names


class _Rows:
    """The rows below a header, as they are read.

    A row may be wrapped. Its entries are told apart without spaces, so that its lines are put together as they are, a
    word cut in two included.
    """

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path = path
        self._names = names
        self._faults: list[str] = []
        self._cells: dict[tuple[str, str], str] = {}
        self._sides = {name: "" for name in names if _GPU.fullmatch(name)}
        any_name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        # A log may put something before a row; a GPU's name may run into its first entry.
        self._row = re.compile(rf"(?<![\w.-])({any_name}|GPU\d+)[\s|│,\"']*(?=(?:{_ENTRY.pattern})(?![a-z]))")
        self._label = re.compile(rf"({any_name})(?=[\s|│,]|$)")

    def read(self, lines: list[tuple[int, str]]) -> Matrix:
        """All of them."""
        at, last = 0, ""
        while at < len(lines) and len(self._faults) < _MOST_FAULTS:
            number, line = lines[at]
            at += 1
            if _LEGEND.match(line):
                break
            row, rest = self._begun(line)
            if not row:
                if last in self._sides and not self._sides[last] and _SIDES.fullmatch(line):
                    self._sides[last] = _side(line)
                continue
            entries, after = self._entries(rest)
            # A terminal has room for some entries in a line.
            last_line = min(at + 1 + len(self._names) // 4, len(lines))
            while len(entries) < len(self._names) and at < last_line:
                if _LEGEND.match(lines[at][1]) or self._begun(lines[at][1])[0]:
                    break
                rest, at = rest + lines[at][1], at + 1
                entries, after = self._entries(rest)
            self._note(number, row, entries)
            if row in self._sides:
                self._sides[row] = _side(after)
            last = row
        return self._checked()

    def _begun(self, line: str) -> tuple[str, str]:
        """The name of the row that a line begins, and the rest of it; none where it begins none."""
        if found := self._row.search(line):
            return found[1], line[found.end() :]
        # What follows the name is no entry: to be told, unless the row is there.
        found = self._label.match(line)
        if found and (found[1], found[1]) not in self._cells:
            return found[1], line[found.end() :]
        return "", ""

    def _entries(self, text: str) -> tuple[list[str], str]:
        """As many entries as there are columns, or all there are, and what follows them."""
        found: list[str] = []
        text, at = text.translate(_RULED), 0
        while len(found) < len(self._names):
            match = _ENTRY.match(text, at) or _OTHER.match(text, at)
            if match is None:
                break
            at = match.end()
            if not match[0].isspace():
                found.append(_OLD.get(match[0], match[0]))
        return found, text[at:]

    def _note(self, number: int, row: str, entries: list[str]) -> None:
        """A row, and what is wrong with it."""
        if row not in self._names:
            self._faults.append(f"line {number}: a row of {row}, which has no column")
            return
        if (row, row) in self._cells:
            more = "; the matrix of another node goes into a file of its own" if row == "GPU0" else ""
            self._faults.append(f"line {number}: a second row of {row}{more}")
        if len(entries) < len(self._names):
            self._faults.append(f"line {number}: {row} has {len(entries)} entries for {len(self._names)} columns")
        for column, entry in zip(self._names, entries, strict=False):
            if entry != "X" if column == row else entry not in NEAR and not NVLINK.fullmatch(entry):
                known = "X" if column == row else f"NV and a number, {', '.join(NEAR)}"
                self._faults.append(f"line {number}: {row} to {column} is {entry[:20]!r}, known: {known}")
            self._cells[row, column] = entry

    def _checked(self) -> Matrix:
        """The matrix, whose halves must agree; rows of NICs may be missing, as those of GPUs tell of them too."""
        cells, gpus = self._cells, tuple(self._sides)
        nics = tuple(name for name in self._names if name not in self._sides)
        faults = self._faults + [f"no row of {gpu}" for gpu in gpus if (gpu, gpu) not in cells]
        if not faults:
            faults += [
                f"{a} to {b} is {cells[a, b]}, and back {cells[b, a]}"
                for a, b in combinations(self._names, 2)
                if cells.get((a, b), "") != cells.get((b, a), "") and (a, b) in cells and (b, a) in cells
            ]
            faults += [
                f"{mine} to {nic} is {cells[mine, nic]}, known: {', '.join(NEAR)}"
                for mine in gpus
                for nic in nics
                if cells[mine, nic] not in NEAR
            ]
        if faults:
            raise join_faults(f"source {self._path}", faults)
        unread = tuple(nic for nic in nics if (nic, nic) not in cells)
        return Matrix(gpus=gpus, nics=nics, cells=cells, sides=self._sides, unread=unread)


def _side(text: str) -> str:
    """The CPUs that a GPU is near to, where they are told."""
    words = text.split()
    return words[0] if words and words[0] != "N/A" else ""
