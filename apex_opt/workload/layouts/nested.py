"""Objects that hold a request deeper down, or several: made flat, so that a row layout reads them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError
from apex_opt.workload.layouts.rows import OUTPUTS, PROMPTS, plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Row = dict[str, Any]

_TALKS: Final = ("conversations", "conversation", "messages", "turns")
_TEXTS: Final = PROMPTS | OUTPUTS | {"text", "text_input", "texts", "instruction", "question", "query", "response"}
_WORD: Final = re.compile(r"[^\W\d_]{2}")
_NO_NUMBERS: Final = ("nan", "inf", "-inf", "+inf", "infinity", "-infinity", "none", "null", "true", "false")
_COUNTS: Final = ("tokens", "num_tokens", "n_tokens", "token_count", "token_len", "length_tokens")
_SAYS: Final = ("human", "user")
_ANSWERS: Final = ("gpt", "assistant", "chatgpt", "bard", "bing", "model")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nesting:
    """How objects of one kind become rows.

    Parameters
    ----------
    name : str
    rows : function    rows of an object; None where it is dropped
    note : str         what is assumed for all of them
    dropped : str      why some are dropped, after their number
    """

    name: str
    rows: Callable[[Mapping[str, Any]], list[Row] | None]
    note: str = ""
    dropped: str = ""


def nesting_of(label: str, entry: Mapping[str, Any]) -> Nesting | None:
    """What the first object of a file is, where it is not a row by itself.

    Raises
    ------
    InputError    conversations without counts of tokens
    """
    if isinstance(entry.get("metadata"), dict) and "metrics" in entry:
        return _RECORDS
    if isinstance(entry.get("sub_requests"), list):
        return _AGENTS
    if isinstance(entry.get("usage"), dict):
        return _USAGE
    talk = next((name for name in _TALKS if isinstance(entry.get(name), list)), None)
    numbers = {plain(name) for name, value in entry.items() if _number(value)}
    if numbers & PROMPTS and numbers & OUTPUTS:
        return None
    said = talk is None and any(plain(name) in _TEXTS and _is_text(value) for name, value in entry.items())
    if said or (talk is not None and not any(_count(turn) is not None for turn in entry[talk])):
        what = "texts" if said else "conversations as text"
        raise InputError(
            f"{label}: {what}, which take a tokenizer to count; give the counts instead: an object per "
            'request with "prompt" and "output" tokens, or "tokens" in every message'
        )
    if talk is None:
        return None
    return Nesting(
        name="conversations",
        rows=lambda item: _first_exchange(item.get(talk)),
        note="of each conversation the first question and its answer are a request, as vllm bench serve does; later "
        "turns are left out",
        dropped="conversations have no question with an answer after it, or no counts of their tokens,",
    )


def _number(value: object) -> bool:
    """Whether a value as the file has it is a number, numbers being kept as text."""
    return isinstance(value, str) and value.strip().replace(".", "", 1).isdecimal()


def _is_text(value: object) -> bool:
    """Whether a value is words rather than a number, however written."""
    return isinstance(value, str) and _WORD.search(value) is not None and value.strip().lower() not in _NO_NUMBERS


def _count(turn: object) -> str | None:
    if not isinstance(turn, dict):
        return None
    return next((turn[name] for name in _COUNTS if _number(turn.get(name))), None)


def _first_exchange(turns: object) -> list[Row] | None:
    """The first question that is answered."""
    if not isinstance(turns, list):
        return None
    for before, after in pairwise(turns):
        if not (isinstance(before, dict) and isinstance(after, dict)):
            continue
        speakers = [str(turn.get("from", turn.get("role", ""))).lower() for turn in (before, after)]
        if speakers[0] in _SAYS and speakers[1] in _ANSWERS:
            prompt, output = _count(before), _count(after)
            return None if prompt is None or output is None else [{"prompt": prompt, "output": output}]
    return None


def _dict(value: object) -> Row:
    return value if isinstance(value, dict) else {}


def _agent(entry: Mapping[str, Any]) -> list[Row]:
    """LLMServingSim's session: calls that follow each other, each after the tool that the one before called."""
    wait, rows = None, []
    calls = entry.get("sub_requests")
    if not isinstance(calls, list):
        return [dict(entry)]
    for index, call in enumerate(calls):
        row = dict(call) if isinstance(call, dict) else {}
        row["session_id"] = entry.get("session_id")
        row["arrival_time_ns"] = None if index else entry.get("arrival_time_ns")
        row["tool_duration_before_ns"] = wait
        wait = row.get("tool_duration_ns")
        rows.append(row)
    return rows


def _record(entry: Mapping[str, Any]) -> list[Row] | None:
    """AIPerf's record of one request of a measured run; None where it failed or was a warm-up."""
    metadata, metrics = entry.get("metadata"), entry.get("metrics")
    if not isinstance(metadata, dict) or not isinstance(metrics, dict) or entry.get("error"):
        return None
    if metadata.get("benchmark_phase", "profiling") != "profiling" or metadata.get("was_cancelled") is True:
        return None
    values = {name: value.get("value") for name, value in metrics.items() if isinstance(value, dict)}
    output = values.get("output_sequence_length", values.get("output_token_count"))
    return [
        {
            "request_start_ns": metadata.get("request_start_ns"),
            "input_sequence_length": values.get("input_sequence_length"),
            "output_sequence_length": output,
            "conversation_id": metadata.get("x_correlation_id", metadata.get("conversation_id")),
        }
    ]


_RECORDS: Final = Nesting(
    name="AIPerf records",
    rows=_record,
    note="arrivals are when the measured run sent its requests; where clients waited for answers, a closed loop would "
    "send them as fast as the plan answers",
    dropped="records are of failed, cancelled or warm-up requests",
)
_USAGE: Final = Nesting(name="logged answers", rows=lambda entry: [{**entry, **_dict(entry.get("usage"))}])
_AGENTS: Final = Nesting(name="LLMServingSim sessions", rows=_agent)
