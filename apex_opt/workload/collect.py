"""A trace from the columns of a file: arrivals in one unit, lengths, contents, turns of conversations, and notes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError, UsageError
from apex_opt.units import NS_PER_S
from apex_opt.workload.cells import (
    ABSENT,
    NONE,
    UNITS,
    Faults,
    cell_text,
    is_blank,
    is_date,
    times_ns,
    token_counts,
)
from apex_opt.workload.columns import MAX_ARRIVAL_NS, MAX_TOKENS, Ints, range_fault
from apex_opt.workload.contents import COLUMN, Contents
from apex_opt.workload.layouts.rows import DELAY, STATED, plain
from apex_opt.workload.trace import PRIORITIES, RECORDED, UNKNOWN, Trace, make_trace, media_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from apex_opt.workload.layouts import Layout

_LATE_NS: Final = 10**8 * NS_PER_S
"""Three years: arrivals that begin later count from a year that people have, such as 1970."""

_STATED: Final = "max_new_tokens"
_IMAGES: Final = "image_tokens"
_AUDIO: Final = "audio_s"
_PRIORITY: Final = "priority"
_LONGEST_AUDIO_S: Final = 86_400

_MOST_NAMED: Final = 8
_LIKE_TIMES: Final = re.compile(r"time|stamp|arriv|date|start|sen[dt]|clock|offset|(?:^|_)(?:ts?|at|when)(?:_|$)")
"""What names of columns have in them that may be arrivals."""

_ROOTS: Final = ("-1", "", "null", "None")


@dataclass(slots=True, kw_only=True)
class Collector:
    """What the rows of a file add up to.

    Parameters
    ----------
    label : str                what messages call the file
    layout : Layout
    called : mapping           what a column of the layout is called in the file
    unit, block : what the user says of arrivals and hash ids
    faults : Faults
    """

    label: str
    layout: Layout
    called: Mapping[str, str]
    unit: str | None
    block: int | None
    faults: Faults
    rows: int = 0
    _clock: str = ""
    _noted: list[str] = field(default_factory=list)
    _arrival: list[Ints] = field(default_factory=list)
    _prompt: list[Ints] = field(default_factory=list)
    _output: list[Ints] = field(default_factory=list)
    _stated: list[Ints] = field(default_factory=list)
    _images: list[Ints] = field(default_factory=list)
    _audio_s: float = 0.0
    _priority: list[Ints] = field(default_factory=list)
    _delay: list[Ints] = field(default_factory=list)
    _session: list[Ints] = field(default_factory=list)
    _places: list[Ints] = field(default_factory=list)
    _sessions: dict[str, int] = field(default_factory=dict)
    _alone: int = 0
    _dropped: int = 0
    _contents: Contents = field(init=False)

    def __post_init__(self) -> None:
        self._contents = Contents(label=self.label, block=self.block or self.layout.block)

    def add(self, places: list[int], column: Callable[[str], list[Any]]) -> None:
        """Some more rows."""
        layout = self.layout
        needed = (layout.prompt, layout.output, *([layout.arrival] if layout.arrival and not self._waits else []))
        columns = {name: column(self._called(name)) for name in needed}
        keep: list[bool] | None = None
        if any(cell is ABSENT for cells in columns.values() for cell in cells):
            places, keep = self._without_missing(places, columns)

        def kept(name: str) -> list[Any]:
            cells = columns[name] if name in columns else column(self._called(name))
            return cells if keep is None else [cell for cell, stays in zip(cells, keep, strict=True) if stays]

        if not places:
            return
        output = token_counts(kept(layout.output), places, layout.output, self.faults)
        prompt = token_counts(kept(layout.prompt), places, layout.prompt, self.faults)
        images = np.zeros_like(prompt)
        if _IMAGES in self.called:
            images = self._counted(_IMAGES, kept(_IMAGES), places, images)
            prompt = prompt + images
        if _AUDIO in self.called:
            lengths = [self._seconds(cell, at) for cell, at in zip(kept(_AUDIO), places, strict=True)]
            self._audio_s = max(self._audio_s, *lengths)
        if _PRIORITY in self.called:
            levels = [self._level(cell, at) for cell, at in zip(kept(_PRIORITY), places, strict=True)]
            self._priority.append(np.array(levels, np.int64))
        answered = output != 0 if not layout.own else np.ones(len(places), bool)
        for values, name in ((prompt, layout.prompt), (output, layout.output)):
            for index in np.flatnonzero((values == 0) & answered):
                self.faults.add(places[index], range_fault(name, "0", 1, MAX_TOKENS))
        self._timed(places, kept, answered)
        self._dropped += int((~answered).sum())
        if COLUMN in self.called and not self.faults.found:
            ids = [cell for cell, stays in zip(kept(COLUMN), answered.tolist(), strict=True) if stays]
            at = [
                f"{self.faults.place} {place}" for place, stays in zip(places, answered.tolist(), strict=True) if stays
            ]
            self._contents.add(ids, at, prompt[answered])
        self._prompt.append(prompt[answered])
        self._output.append(output[answered])
        self._images.append(images[answered])
        if _STATED in self.called:
            stated = self._counted(_STATED, kept(_STATED), places, output)
            for index in np.flatnonzero((stated == 0) & answered):
                self.faults.add(places[index], range_fault(self._called(_STATED), "0", 1, MAX_TOKENS))
            self._stated.append(stated[answered])
        if _PRIORITY in self.called:
            self._priority[-1] = self._priority[-1][answered]
        self._places.append(np.array(places, np.int64)[answered])
        self.rows += int(answered.sum())

    def _counted(self, name: str, cells: list[Any], places: list[int], usual: Ints) -> Ints:
        """Tokens in a column that not every row has to fill, such as those that clients state; `usual` where blank."""
        least = 0 if name == _IMAGES else 1
        found = usual.copy()
        there = np.flatnonzero([not is_blank(cell) for cell in cells])
        if there.size:
            at = [places[index] for index in there]
            found[there] = token_counts([cells[i] for i in there], at, self._called(name), self.faults, least)
        return found

    def _seconds(self, cell: Any, place: int) -> float:
        """Length of a recording; 0 where there is none."""
        if is_blank(cell):
            return 0.0
        try:
            found = float(cell)
        except (TypeError, ValueError):
            found = -1.0
        if not 0 <= found <= _LONGEST_AUDIO_S:
            self.faults.add(place, f"{self._called(_AUDIO)} {cell!r:.40} is not 0 to {_LONGEST_AUDIO_S:,} seconds")
        return found

    def _level(self, cell: Any, place: int) -> int:
        """The place of a priority among `PRIORITIES`, which it may also be given by; normal where it is blank."""
        said = "" if is_blank(cell) else str(cell).strip().lower()
        for level, name in enumerate(PRIORITIES):
            if said in (name, str(level)):
                return level
        if said:
            self.faults.add(place, f"{self._called(_PRIORITY)} {cell!r:.40} is none of {', '.join(PRIORITIES)} (0, 1)")
        return 0

    @property
    def empty(self) -> str:
        """Why there is no request."""
        if self._dropped:
            return f"no request has an answer: {self.layout.output} is 0 in all {self._dropped:,} rows"
        return "columns but no requests; add at least one row"

    @property
    def _unread(self) -> tuple[str, ...]:
        """Columns from which nothing is read."""
        layout = self.layout
        known = (*layout.columns, layout.session, layout.parent, layout.delay, _IMAGES, _AUDIO, _PRIORITY, COLUMN)
        read = {*map(plain, known), *STATED}
        return tuple(name for key, name in self.called.items() if key not in read)

    @property
    def _waits(self) -> bool:
        """Whether a row may have a wait after the answer before in place of an arrival."""
        return bool(self.layout.delay) and plain(self.layout.delay) in self.called

    def _called(self, name: str) -> str:
        return self.called[plain(name)]

    def _without_missing(self, places: list[int], columns: Mapping[str, list[Any]]) -> tuple[list[int], list[bool]]:
        """Rows that have all they need; the others are faults."""
        keep = []
        for index, place in enumerate(places):
            missing = [name for name, cells in columns.items() if cells[index] is ABSENT]
            order = [name for name in (self.layout.arrival, self.layout.prompt, self.layout.output) if name in missing]
            if missing:
                self.faults.add(place, f"missing {', '.join(order)}")
            keep.append(not missing)
        return [place for place, stays in zip(places, keep, strict=True) if stays], keep

    def _timed(self, places: list[int], kept: Callable[[str], list[Any]], answered: np.ndarray[Any, Any]) -> None:
        """Arrivals and waits of some rows."""
        layout = self.layout
        if not layout.arrival and self.unit is not None:
            raise UsageError(
                f"--trace_unit: {self.label} has no column of arrivals; leave it out{or_named(self._unread)}"
            )
        session = layout.session
        if session and plain(session) in self.called:
            codes = self._conversations(kept)
            self._session.append(codes[answered])
        if layout.arrival:
            self._arrived(places, kept, answered)
        if self._waits:
            self._waited(places, kept, answered)

    def _arrived(self, places: list[int], kept: Callable[[str], list[Any]], answered: np.ndarray[Any, Any]) -> None:
        """Arrivals of some rows, as far as they are told."""
        layout = self.layout
        cells = kept(layout.arrival)
        blank = np.array([is_blank(cell) for cell in cells]) if self._waits else np.zeros(len(cells), bool)
        given = [cell for cell, none in zip(cells, blank.tolist(), strict=True) if not none]
        arrival = np.full(len(cells), NONE, np.int64)
        if given:
            there = np.flatnonzero(~blank)
            at = [places[index] for index in there] if blank.any() else places
            clock = self._clock = self._clock or self._unit(given)
            arrival[there] = times_ns(given, at, layout.arrival, clock, self.faults)
        self._arrival.append(arrival[answered])

    def _waited(self, places: list[int], kept: Callable[[str], list[Any]], answered: np.ndarray[Any, Any]) -> None:
        """Waits of some rows, as far as they are told."""
        layout = self.layout
        delays = kept(layout.delay)
        none = np.array([is_blank(cell) for cell in delays])
        delay = np.full(len(delays), NONE, np.int64)
        stated = np.flatnonzero(~none)
        if stated.size:
            delay[stated] = times_ns(
                [delays[i] for i in stated],
                [places[i] for i in stated],
                layout.delay,
                layout.delay_unit,
                self.faults,
            )
        self._delay.append(delay[answered])

    def _unit(self, given: Sequence[Any]) -> str:
        """The unit of the arrivals: what the layout says, what the cells are, or what the user says."""
        layout, known = self.layout, self.layout.unit
        if is_date(given[0]):
            known = "date"
        elif known == "date" and self.unit is not None:
            known = ""
        if self.unit is None:
            if known:
                return known
            raise UsageError(
                f"{self.label}: nothing tells the unit of column {layout.arrival} ({cell_text(given[0])}); give it as "
                f"--trace_unit={'|'.join(UNITS)}"
            )
        if known == "date":
            raise UsageError(f"--trace_unit: column {layout.arrival} of {self.label} has dates and times; leave it out")
        if known and known != self.unit:
            if layout.fixed:
                raise UsageError(
                    f"--trace_unit: column {layout.arrival} of {self.label} is in {known} by its name, not in "
                    f"{self.unit}; leave it out"
                )
            self._noted.append(
                f"arrivals are taken in {self.unit} as --trace_unit says; the {layout.name} layout has {known}"
            )
        return self.unit

    def _conversations(self, kept: Callable[[str], list[Any]]) -> Ints:
        """Numbers of the conversations that rows are of."""
        layout, numbers = self.layout, self._sessions
        cells = kept(layout.session)
        names = ["" if is_blank(cell) else str(cell) for cell in cells]
        parents = names
        if layout.parent and plain(layout.parent) in self.called:
            parents = [str(name) for name in kept(layout.parent)]
        codes = []
        for name, parent in zip(names, parents, strict=True):
            if not name:
                self._alone -= 1
                codes.append(self._alone)
                continue
            root = name if parent in _ROOTS or parent not in numbers else parent
            codes.append(numbers.setdefault(name, numbers.get(root, len(numbers))))
        return np.array(codes, np.int64)

    def trace(self, name: str, source: str, notes: Sequence[str]) -> Trace:
        """The trace, once all rows are in.

        Parameters
        ----------
        name : str                 of the trace
        source : str               where it comes from
        notes : sequence of str    what the reader has to know

        Raises
        ------
        InputError    arrivals further apart than a trace can hold, or turns that follow nothing
        """
        prompt, output = np.concatenate(self._prompt), np.concatenate(self._output)
        every = [*notes, *self._noted]
        if self._dropped:
            every.append(
                f"{self._dropped:,} of {self._dropped + self.rows:,} requests have no answer "
                f"(0 {self.layout.output}) and are dropped"
            )
        stated = np.concatenate(self._stated) if self._stated else None
        if stated is not None and (more := int((output > stated).sum())):
            every.append(
                f"{more:,} of {self.rows:,} requests have more output than their {self._called(_STATED)}, which is "
                "taken to be the output"
            )
            stated = np.maximum(stated, output)
        timed = bool(self._arrival) and not (np.concatenate(self._arrival) == NONE).all()
        delay = None
        arrival = np.zeros(self.rows, np.int64)
        if timed:
            arrival, delay = self._arrivals(every)
        if not timed and self._waits:
            self._check_waits()
            every.append(
                f"waits after the answer before ({self.layout.delay}) are left out of account, as the file does not "
                "say when conversations begin"
            )
        unread = () if timed else self._unread
        if any(_LIKE_TIMES.search(plain(column)) for column in unread):
            every.append(f"no column is known to tell arrivals; not read: {listed(unread)}")
        trace = make_trace(
            name=name,
            arrival_ns=arrival,
            prompt=prompt,
            output=output,
            max_new_tokens=stated,
            source=source,
            arrivals=RECORDED if timed else UNKNOWN,
            notes=tuple(every),
            media=media_of(prompt, np.concatenate(self._images), self._audio_s),
            session=np.concatenate(self._session) if self._session else None,
            priority=np.concatenate(self._priority) if self._priority else None,
            delay_ns=delay,
        )
        trace = replace(trace, unread=unread)
        if told := _shortened(trace):
            trace = replace(trace, notes=(*trace.notes, told))
        return self._contents.told(trace, np.argsort(arrival, kind="stable"))

    def _arrivals(self, notes: list[str]) -> tuple[Ints, Ints | None]:
        """Arrivals in nanoseconds, and waits; from the earliest where they are dates or count from another age."""
        arrival = np.concatenate(self._arrival)
        given = arrival != NONE
        first, last = int(arrival[given].min()), int(arrival[given].max())
        if self._clock == "date" or (first >= _LATE_NS and not self.layout.own):
            if self._clock != "date":
                notes.append(f"arrivals count from the earliest, which is {first / NS_PER_S:,.0f} s after 0")
            if last - first > MAX_ARRIVAL_NS:
                at = np.concatenate(self._places)[int(np.argmax(np.where(given, arrival, NONE)))]
                raise InputError(
                    f"{self.label}: {self.faults.place} {at}: {self.layout.arrival} is outside "
                    f"0..{MAX_ARRIVAL_NS:,} ns after the earliest row"
                )
            arrival = np.where(given, arrival - first, NONE)
        session = np.concatenate(self._session) if self._session else None
        idle = int((given & (np.concatenate(self._delay) > 0)).sum()) if self._delay else 0
        if idle:
            notes.append(
                f"{idle:,} of {given.size:,} have an arrival and a {self._called(self.layout.delay)}; they come "
                "at the arrival, and the wait is left out"
            )
        if given.all():
            if session is not None:
                self._turns(session, notes)
            return arrival, None
        waited = int((~given).sum())
        notes.append(
            f"{waited:,} of {given.size:,} requests wait for the answer before ({self._called(self.layout.delay)}); "
            "prompts are as long as the file says"
        )
        return self._after_waits(arrival, session)

    def _turns(self, session: Ints, notes: list[str]) -> None:
        later = session.size - len(np.unique(session))
        if later:
            notes.append(
                f"{later:,} of {session.size:,} requests are later turns of conversations: they "
                "arrive when the file says, whenever the answer before them comes"
            )

    def _check_waits(self) -> None:
        """Whether each turn that waits after an answer has one before it, in a file that tells no arrivals."""
        delay, places = np.concatenate(self._delay), np.concatenate(self._places)
        numbers = np.concatenate(self._session) if self._session else np.arange(delay.size)
        begun: set[int] = set()
        for number, place, wait in zip(numbers.tolist(), places.tolist(), delay.tolist(), strict=True):
            if wait != NONE and self.layout.delay == DELAY and number not in begun:
                self.faults.add(place, f"{self._called(DELAY)} of the first turn, which comes after no answer")
            begun.add(number)
        if self.faults.found:
            raise self.faults.error()

    def _after_waits(self, arrival: Ints, session: Ints | None) -> tuple[Ints, Ints]:
        """The earliest arrivals of turns that follow an answer, as if that came at once, and how long each waits."""
        delay, places = np.concatenate(self._delay), np.concatenate(self._places)
        before: dict[int, int] = {}
        times = arrival.tolist()
        numbers = range(len(times)) if session is None else session.tolist()
        for index, (number, time, wait) in enumerate(zip(numbers, times, delay.tolist(), strict=True)):
            if time == NONE:
                if number not in before or wait == NONE:
                    self.faults.add(
                        int(places[index]),
                        f"missing {self.layout.arrival}"
                        + (" of the first turn" if wait != NONE else f", and {self.layout.delay} after a turn before"),
                    )
                    continue
                times[index] = before[number] + wait
            before[number] = times[index]
        if self.faults.found:
            raise self.faults.error()
        if max(times) > MAX_ARRIVAL_NS:
            raise InputError(f"{self.label}: with all waits the last request arrives after 73 years")
        return np.array(times, np.int64), np.where(arrival == NONE, delay, -1)


def _shortened(trace: Trace) -> str:
    """That turns have less in their prompts than was said before; nothing where none have."""
    later = trace.before >= 0
    before = trace.before[later]
    short = int((trace.prompt[later] < trace.prompt[before] + trace.output[before]).sum())
    if not short:
        return ""
    return (
        f"{short:,} of {int(later.sum()):,} later turns have prompts shorter than the prompt and the answer before; "
        "prompts are served as the file says, so give them with all that was said before, if clients send that"
    )


def listed(names: Sequence[str]) -> str:
    """Names of columns for one line of a message, the first few where there are many."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(name[:40] for name in names[:_MOST_NAMED]) + more


def or_named(unread: Sequence[str]) -> str:
    """The other way out where arrivals may be in a column that is not known to have them; else nothing."""
    return f", or call the column that has them timestamp (not read: {listed(unread)})" if unread else ""
