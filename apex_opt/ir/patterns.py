"""Regular expressions of untrusted files, matched without backtracking.

A matcher maps the positions of a text at which something may begin to all those at which it may end; sets of positions
are the bits of one integer. However an expression nests, no path through it is tried twice, and every step is counted
against what a file may cost in all. What no set of positions can express is refused by name: references to what a group
matched, possessive and atomic groups, flags.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

MAX_STEPS: Final = 2_000_000
"""Steps of parsing and matching that one file may take: about a second."""
_PARSING: Final = 10
"""Steps that reading one character of a pattern counts as."""
MAX_DEPTH: Final = 40
MAX_REPEATS: Final = 1000

_WORD: Final = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES: Final = {"d": frozenset(string.digits), "w": _WORD, "s": frozenset(string.whitespace)}
_ESCAPES: Final = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


class PatternError(ValueError):
    """An expression that is none, is outside what is understood here, or takes too long; `entry` is where it stands."""

    entry = ""


@dataclass(slots=True)
class Effort:
    """Steps that are left to a file, and the texts matched so far."""

    left: int = MAX_STEPS
    texts: dict[str, Text] = field(default_factory=dict)

    def spend(self, steps: int = 1) -> None:
        """Take steps.

        Raises
        ------
        PatternError    none are left
        """
        self.left -= steps
        if self.left < 0:
            raise PatternError("matching the patterns of this file takes too long")

    def text(self, letters: str) -> Text:
        """A text to match."""
        found = self.texts.get(letters)
        if found is None:
            self.spend(len(letters))
            found = self.texts[letters] = Text(letters, self)
        return found


class Text:
    """A text to match: its length, and the positions of every letter it has."""

    def __init__(self, letters: str, effort: Effort) -> None:
        self.length, self.effort = len(letters), effort
        self.at: dict[str, int] = {}
        for position, letter in enumerate(letters):
            self.at[letter] = self.at.get(letter, 0) | 1 << position
        self._places: dict[_Letters, int] = {}

    @property
    def whole(self) -> int:
        """All positions, that behind the last letter included."""
        return (2 << self.length) - 1

    def places(self, wanted: _Letters) -> int:
        """Positions of letters that are wanted."""
        found = self._places.get(wanted)
        if found is None:
            self.effort.spend(len(self.at))
            found = sum(places for letter, places in self.at.items() if wanted.holds(letter))
            self._places[wanted] = found
        return found


@dataclass(frozen=True, slots=True)
class _Letters:
    """A set of characters: those listed and those within ranges, or all others."""

    listed: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, str], ...] = ()
    others: bool = False

    def holds(self, letter: str) -> bool:
        return (letter in self.listed or any(low <= letter <= high for low, high in self.ranges)) != self.others


Matcher = Callable[[Text, int], int]

_ANY: Final = _Letters(frozenset("\n"), others=True)
_IN_WORDS: Final = _Letters(_WORD)


def _one(letters: _Letters) -> Matcher:
    """One letter of a set."""
    if len(letters.listed) == 1 and not letters.ranges and not letters.others:
        (single,) = letters.listed

        def match_single(text: Text, starts: int) -> int:
            text.effort.spend()
            return (starts & text.at.get(single, 0)) << 1

        return match_single

    def match(text: Text, starts: int) -> int:
        text.effort.spend()
        return (starts & text.places(letters)) << 1

    return match


def _run(letters: _Letters) -> Matcher:
    """Any number of letters of a set, by doubling the length of the runs looked at."""

    def match(text: Text, starts: int) -> int:
        text.effort.spend(4)
        within, length = text.places(letters), 1
        while length <= text.length:
            starts |= (starts & within) << length
            within &= within >> length
            length *= 2
        return starts

    return match


def _chain(parts: list[Matcher]) -> Matcher:
    """One after another."""

    def match(text: Text, starts: int) -> int:
        for part in parts:
            if not starts:
                return 0
            starts = part(text, starts)
        return starts

    return parts[0] if len(parts) == 1 else match


def _either(ways: list[Matcher]) -> Matcher:
    def match(text: Text, starts: int) -> int:
        ends = 0
        for way in ways:
            ends |= way(text, starts)
        return ends

    return ways[0] if len(ways) == 1 else match


def _repeated(part: Matcher, least: int, most: int | None) -> Matcher:
    def match(text: Text, starts: int) -> int:
        for _ in range(least):
            if not starts:
                return 0
            text.effort.spend()
            starts = part(text, starts)
        reached, new, count = starts, starts, least
        while new and (most is None or count < most):
            text.effort.spend()
            new = part(text, new) & ~reached
            reached |= new
            count += 1
        return reached

    return match


def _where(holds: Callable[[Text, int], int]) -> Matcher:
    """Nothing, at those of the positions that are left over."""

    def match(text: Text, starts: int) -> int:
        text.effort.spend()
        return holds(text, starts)

    return match


def _ahead(part: Matcher, wanted: bool) -> Matcher:
    """Positions at which a part begins, or those at which it does not."""

    def match(text: Text, starts: int) -> int:
        found = 0
        for at in range(starts.bit_length()):
            if starts >> at & 1 and bool(part(text, 1 << at)) is wanted:
                found |= 1 << at
        return found

    return match


def _behind(part: Matcher, wanted: bool) -> Matcher:
    """Positions at which a part ends, or those at which it does not."""

    def match(text: Text, starts: int) -> int:
        ends = part(text, text.whole)
        return starts & (ends if wanted else ~ends)

    return match


def _edge_of_word(text: Text, starts: int) -> int:
    within = text.places(_IN_WORDS)
    return starts & (within ^ within << 1)


def expression(source: str, effort: Effort) -> Matcher:
    """Matcher of a regular expression in the syntax of Python's `re`.

    Raises
    ------
    PatternError    no expression, or one that is not understood here
    """
    return _Parser(source, effort).parse()


def glob(source: str, effort: Effort) -> Matcher:
    """Matcher of a name in which `*` stands for any text, `?` for any character and `[...]` for one of those inside."""
    return _Parser(source, effort).parse_glob()


class _Parser:
    """Reads one pattern from left to right."""

    def __init__(self, source: str, effort: Effort) -> None:
        self._source, self._effort = source, effort
        self._at = self._depth = 0

    def parse(self) -> Matcher:
        found = self._ways()
        if self._at < len(self._source):
            raise PatternError("unbalanced )")
        return found

    def parse_glob(self) -> Matcher:
        parts: list[Matcher] = []
        while letter := self._next():
            if letter == "*":
                parts.append(_run(_ANY))
            elif letter == "?":
                parts.append(_one(_ANY))
            elif letter == "[" and "]" in self._source[self._at + 1 :]:
                parts.append(_one(self._set("!")))
            else:
                parts.append(_one(_Letters(frozenset(letter))))
        return _chain(parts or [_where(lambda _, starts: starts)])

    def _next(self) -> str:
        """The next character, taken; empty at the end."""
        self._effort.spend(_PARSING)
        letter = self._source[self._at : self._at + 1]
        self._at += len(letter)
        return letter

    def _take(self, *wanted: str) -> str:
        """The first of some texts that stands here, taken; empty where none does."""
        for text in wanted:
            if self._source.startswith(text, self._at):
                self._at += len(text)
                return text
        return ""

    def _ways(self) -> Matcher:
        ways = [self._sequence()]
        while self._take("|"):
            ways.append(self._sequence())
        return _either(ways)

    def _sequence(self) -> Matcher:
        parts: list[Matcher] = []
        while self._at < len(self._source) and self._source[self._at] not in "|)":
            parts.append(self._part())
        return _chain(parts or [_where(lambda _, starts: starts)])

    def _part(self) -> Matcher:
        atom = self._atom()
        bounds = self._bounds()
        if bounds is None:
            return atom if not isinstance(atom, _Letters) else _one(atom)
        least, most = bounds
        if self._take("+"):
            raise PatternError("possessive repeats are not supported")
        self._take("?")  # What is matched first makes no difference to whether anything is.
        if self._bounds() is not None:
            raise PatternError("multiple repeat")
        if isinstance(atom, _Letters):
            if most is None:
                return _chain([*[_one(atom)] * least, _run(atom)])
            atom = _one(atom)
        return _repeated(atom, least, most)

    def _bounds(self) -> tuple[int, int | None] | None:
        """How often what stands before is repeated, where anything says so."""
        sign = self._take("*", "+", "?")
        if sign:
            return {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        if not self._source.startswith("{", self._at):
            return None
        end = self._source.find("}", self._at, self._at + 20)
        least, comma, most = self._source[self._at + 1 : max(end, 0)].partition(",")
        digits = all(not side or (side.isascii() and side.isdigit()) for side in (least, most))
        if end < 0 or not digits or not (least or most):
            return None  # A brace that stands for itself.
        self._at = end + 1
        low = int(least or 0)
        high = low if not comma else int(most) if most else None
        if max(low, high or 0) > MAX_REPEATS or (high is not None and high < low):
            raise PatternError(f"repeats must be from 0 to {MAX_REPEATS}, the fewer first")
        return low, high

    def _atom(self) -> Matcher | _Letters:
        letter = self._next()
        if letter == ".":
            return _ANY
        if letter == "^":
            return _where(lambda _, starts: starts & 1)
        if letter == "$":
            return _where(lambda text, starts: starts & 1 << text.length)
        if letter == "(":
            return self._group()
        if letter == "[":
            return self._set("^")
        if letter == "\\":
            return self._escape()
        if letter in "*+?":
            raise PatternError("nothing to repeat")
        return _Letters(frozenset(letter))

    def _group(self) -> Matcher:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise PatternError(f"groups lie more than {MAX_DEPTH} deep")
        kind = self._take("?:", "?=", "?!", "?<=", "?<!", "?P<")
        if kind == "?P<":
            name = self._source[self._at : self._source.find(">", self._at) + 1]
            self._at += len(name)
            if not name[:-1].isidentifier():
                raise PatternError("bad group name")
        elif not kind and self._source.startswith("?", self._at):
            raise PatternError(f"({self._source[self._at : self._at + 2]} is not supported")
        inside = self._ways()
        if not self._take(")"):
            raise PatternError("missing )")
        self._depth -= 1
        if kind in ("?=", "?!"):
            return _ahead(inside, kind == "?=")
        if kind in ("?<=", "?<!"):
            return _behind(inside, kind == "?<=")
        return inside

    def _escape(self) -> Matcher | _Letters:
        letter = self._next()
        if letter in ("A", "Z"):
            return _where((lambda _, s: s & 1) if letter == "A" else (lambda text, s: s & 1 << text.length))
        if letter in ("b", "B"):
            inside = letter == "b"
            return _where(lambda text, s: _edge_of_word(text, s) if inside else s & ~_edge_of_word(text, s))
        return self._escaped(letter)

    def _escaped(self, letter: str) -> _Letters:
        """What a backslash makes of a letter, in and outside of sets."""
        if letter.lower() in _CLASSES:
            return _Letters(_CLASSES[letter.lower()], others=letter.isupper())
        if letter in _ESCAPES:
            return _Letters(frozenset(_ESCAPES[letter]))
        if not letter or (letter.isascii() and letter.isalnum()):
            raise PatternError(f"\\{letter} is not supported")
        return _Letters(frozenset(letter))

    def _set(self, negation: str) -> _Letters:
        """Characters in brackets, of which the first is taken already."""
        others = bool(self._take(negation))
        listed: set[str] = set()
        ranges: list[tuple[str, str]] = []
        first = True
        while True:
            letter = self._next()
            if not letter:
                raise PatternError("missing ]")
            if letter == "]" and not first:
                return _Letters(frozenset(listed), tuple(ranges), others)
            first = False
            if letter == "\\" and negation == "^":
                letter = self._next()
                if letter in ("D", "W", "S"):
                    raise PatternError(f"\\{letter} within [...] is not supported")
                found = self._escaped(letter).listed
                if len(found) > 1:
                    listed |= found
                    continue
                (letter,) = found
            ahead = self._source[self._at : self._at + 2]
            if len(ahead) == 2 and ahead[0] == "-" and ahead[1] != "]":
                self._next()
                last = self._next()
                if last == "\\":
                    (last,) = self._escaped(self._next()).listed or ("",)
                if not last or last < letter:
                    raise PatternError("bad character range")
                ranges.append((letter, last))
            else:
                listed.add(letter)
