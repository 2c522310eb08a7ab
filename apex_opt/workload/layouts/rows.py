"""Layouts with a row per request, recognised by the names of their columns.

A new one is one more entry of `LAYOUTS`. Names are compared without case and punctuation: `Request tokens` is
`request_tokens`. Files of no layout here are read too where one column each tells prompt and output, and at most one
the arrivals, in any of the names people use; the unit of the arrivals is then what the name says, or is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from apex_opt.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Names of columns and what they mean.

    Parameters
    ----------
    name : str
    prompt, output : str           columns of tokens
    arrival : str                  column of arrivals; "" where there is none
    unit : str                     of arrivals: "s", "ms", "us", "ns" or "date"; "" where nothing tells
    fixed : bool                   whether the column's own name tells the unit, so that no other can be meant
    marks : tuple of str           columns of which one tells this layout from those with the same others
    block : int                    prompt tokens of a hash id, where the layout says; else 0
    own : bool                     one of ours: a request without an answer is a fault, not one that failed
    session, parent : str          columns that name a conversation, and the request before in it
    delay : str                    column of the wait after the answer before, in `delay_unit`
    """

    name: str
    prompt: str
    output: str
    arrival: str = ""
    unit: str = ""
    fixed: bool = False
    marks: tuple[str, ...] = ()
    block: int = 0
    own: bool = False
    session: str = ""
    parent: str = ""
    delay: str = ""
    delay_unit: str = "ms"

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that a row needs."""
        return (*((self.arrival,) if self.arrival else ()), self.prompt, self.output)

    def fits(self, names: Collection[str]) -> bool:
        """Whether columns of these plain names are of this layout."""
        marked = not self.marks or any(plain(mark) in names for mark in self.marks)
        return marked and all(plain(column) in names for column in self.columns)


LAYOUTS: Final = (
    Layout(
        name="APEX",
        arrival="StartTimeOffset",
        unit="ns",
        prompt="ContextTokens",
        output="GeneratedTokens",
        own=True,
    ),
    Layout(name="Azure", arrival="TIMESTAMP", unit="date", prompt="ContextTokens", output="GeneratedTokens"),
    Layout(
        name="Mooncake",
        arrival="timestamp",
        unit="ms",
        prompt="input_length",
        output="output_length",
        block=512,
        session="session_id",
        delay="delay",
    ),
    Layout(
        name="Bailian",
        arrival="timestamp",
        unit="s",
        prompt="input_length",
        output="output_length",
        marks=("chat_id", "parent_chat_id"),
        block=16,
        session="chat_id",
        parent="parent_chat_id",
    ),
    Layout(name="plain", arrival="arrival_s", unit="s", fixed=True, prompt="prompt", output="output", own=True),
    Layout(
        name="BurstGPT",
        arrival="Timestamp",
        unit="s",
        prompt="Request tokens",
        output="Response tokens",
        session="Session ID",
    ),
    Layout(name="Splitwise", arrival="arrival_timestamp", unit="s", prompt="prompt_size", output="token_size"),
    Layout(
        name="Vidur",
        arrival="arrived_at",
        unit="s",
        prompt="num_prefill_tokens",
        output="num_decode_tokens",
    ),
    Layout(
        name="LLMServingSim",
        arrival="arrival_time_ns",
        unit="ns",
        fixed=True,
        prompt="input_toks",
        output="output_toks",
        session="session_id",
        delay="tool_duration_before_ns",
        delay_unit="ns",
    ),
    Layout(
        name="AIPerf records",
        arrival="request_start_ns",
        unit="ns",
        fixed=True,
        prompt="input_sequence_length",
        output="output_sequence_length",
        session="conversation_id",
    ),
)

_SHOWN_UNIT: Final = {"date": "date and time"}
ACCEPTED: Final = " | ".join(
    f"{x.arrival} ({_SHOWN_UNIT.get(x.unit, x.unit)}), {x.prompt}, {x.output}" for x in LAYOUTS if not x.marks
)
"""Columns of the layouts, for messages."""

_SIZES: Final = ("tokens", "toks", "token", "length", "len", "size", "token_count", "sequence_length", "token_length")
PROMPTS: Final = {"isl", "contexttokens", "prompt", "input", "prompt_tokens_count"} | {
    f"{count}{side}_{size}"
    for side in ("prompt", "input", "prefill", "context", "request", "query")
    for size in _SIZES
    for count in ("", "num_", "n_")
}
"""Names that people give to prompt tokens."""
OUTPUTS: Final = {"osl", "generatedtokens", "output", "token_size"} | {
    f"{count}{side}_{size}"
    for side in ("output", "decode", "completion", "generated", "generation", "response", "answer", "gen")
    for size in _SIZES
    for count in ("", "num_", "n_")
}
"""Names that people give to generated tokens."""
STATED: Final = {"max_new_tokens", "maxnewtokens", "max_tokens", "max_output_tokens", "max_completion_tokens"}
"""Names that people give to the most tokens that a client says it takes."""
DELAY: Final = "delay_ms"
"""The wait of a request after the answer before it in its session, in files of any layout."""
_SESSIONS: Final = ("session", "session_id", "conversation", "conversation_id")
_TIMES: Final = {
    "arrival",
    "arrival_time",
    "arrival_timestamp",
    "arrived_at",
    "created_at",
    "offset",
    "relative_time",
    "request_start",
    "request_start_time",
    "request_time",
    "send_time",
    "start",
    "start_time",
    "starttime",
    "starttimeoffset",
    "submit_time",
    "t",
    "time",
    "timestamp",
    "ts",
}
_UNIT_WORDS: Final = {
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), "s"),
    **dict.fromkeys(("ms", "msec", "msecs", "millis", "millisecond", "milliseconds"), "ms"),
    **dict.fromkeys(("us", "usec", "usecs", "micros", "microsecond", "microseconds"), "us"),
    **dict.fromkeys(("ns", "nsec", "nsecs", "nanos", "nanosecond", "nanoseconds"), "ns"),
}


def plain(name: str) -> str:
    """A column's name without case and punctuation."""
    return re.sub(r"[\W_]+", "_", name.strip().lower()).strip("_")


def layout_of(label: str, names: Iterable[str]) -> tuple[Layout, dict[str, str]]:
    """The layout of columns with these names, and what each column of the layout is called in the file.

    Raises
    ------
    InputError    no layout fits; columns that say the same twice
    """
    present = list(names)
    called: dict[str, str] = {}
    alike: dict[str, str] = {}
    for name in present:
        if called.setdefault(plain(name), name) != name:
            alike[plain(name)] = name
    fits = [layout for layout in LAYOUTS if layout.fits(called)]
    if len({layout.arrival.lower() for layout in fits}) > 1:
        times = " and ".join(dict.fromkeys(layout.arrival for layout in fits))
        raise InputError(f"{label}: arrivals are given twice, as {times}; keep one")
    found = max(fits, key=lambda layout: len(layout.marks)) if fits else _by_usual_names(label, called)
    if found is None:
        raise _unrecognised(label, present, called)
    session = next((name for name in _SESSIONS if name in called), "")
    if session and plain(found.session) not in called:
        found = replace(found, session=session)
    if DELAY in called:
        found = replace(found, delay=DELAY, delay_unit="ms")
    for column in map(plain, found.columns):
        if column in alike:
            raise InputError(f"{label}: columns {called[column]} and {alike[column]} read alike; keep one")
    if (stated := _only(label, called, STATED, "the most tokens of answers")) is not None:
        called["max_new_tokens"] = called[stated]
    return found, called


def _by_usual_names(label: str, called: Mapping[str, str]) -> Layout | None:
    """Columns of no layout whose names tell what they are."""
    prompt, output = _only(label, called, PROMPTS, "prompts"), _only(label, called, OUTPUTS, "outputs")
    if prompt is None or output is None:
        return None
    times = {name: unit for name in called if (unit := _unit_of(name)) is not None}
    if len(times) > 1:
        raise InputError(
            f"{label}: arrivals may be in {' or '.join(called[name] for name in times)}; keep one of these columns"
        )
    arrival, unit = next(iter(times.items()), ("", ""))
    same = [layout for layout in LAYOUTS if (plain(layout.prompt), plain(layout.output)) == (prompt, output)]
    return Layout(
        name="lengths" if not arrival else "",
        prompt=called[prompt],
        output=called[output],
        arrival=called.get(arrival, ""),
        unit=unit,
        fixed=bool(unit),
        block=same[0].block if same else 0,
        session="session_id" if "session_id" in called else "",
        delay="delay" if same and same[0].delay == "delay" and "delay" in called else "",
    )


def _only(label: str, called: Mapping[str, str], known: set[str], what: str) -> str | None:
    """The one column with a name among those known."""
    found = [name for name in called if name in known]
    if len(found) > 1:
        raise InputError(
            f"{label}: {what} may be in {' or '.join(called[name] for name in found)}; keep one of these columns"
        )
    return found[0] if found else None


def _unit_of(name: str) -> str | None:
    """The unit that a column of times tells by its name, "" where it is one without; None where it is none."""
    if name in _TIMES:
        return ""
    base, _, word = name.rpartition("_")
    return _UNIT_WORDS.get(word) if base in _TIMES else None


def _unrecognised(label: str, present: list[str], called: Mapping[str, str]) -> InputError:
    nearest = max(LAYOUTS, key=lambda layout: sum(plain(column) in called for column in layout.columns))
    missing = [name for name in nearest.columns if plain(name) not in called]
    found = " ".join(", ".join(present).split())
    found = found if len(found) <= 100 else found[:97] + "..."
    return InputError(f"{label}: missing {', '.join(missing)}; found {found or 'none'}; accepted columns: {ACCEPTED}")
