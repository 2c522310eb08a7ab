"""Requests that move between replicas while they decode: the numbers of Llumnix's rules, and how they are given."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.units import NS_PER_MS, NS_PER_S

PERIOD_NS: Final = NS_PER_S
LAST_STAGE_BLOCKS: Final = 16
STAGES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescheduling:
    """How requests are dealt by freeness, and moved from crowded replicas to free ones.

    Parameters
    ----------
    block_ns : int             time to copy one KV block to another replica; of plans it is that of their links
    stop_ns : int              time of the last stage beside its blocks, in which the request stands still
    period_ns : int            between two looks for pairs of replicas
    out_below : Fraction       freeness in blocks per request below which a replica sends requests away
    in_from : Fraction         freeness from which a replica takes some
    headroom : int             blocks that the requests of high priority on a replica are to have in reserve together
    draining : frozenset of int    replicas that are to be emptied, and get no request

    Source: Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", arXiv 2406.03243, and the
    defaults of its repository: a look each second, at most 3 stages, the last at 16 blocks. There a replica sends
    requests away below 3; with 0 it does so only when it is asked for more blocks than it has.
    """

    block_ns: int = 0
    stop_ns: int = 0
    period_ns: int = PERIOD_NS
    out_below: Fraction = Fraction(0)
    in_from: Fraction = Fraction(3)
    headroom: int = 0
    draining: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        for name in ("block_ns", "stop_ns", "headroom"):
            if getattr(self, name) < 0:
                raise UsageError(f"rescheduling: {name} {getattr(self, name)} is below 0")
        if self.period_ns < 1:
            raise UsageError(f"rescheduling: period_ns {self.period_ns} is below 1")
        if self.in_from < self.out_below:
            raise UsageError(
                f"rescheduling: replicas take requests from a freeness of {self.in_from} on and send them away below "
                f"{self.out_below}; a replica must not do both, so raise in_from"
            )


def parse_rescheduling(text: str) -> Rescheduling:
    """Rules by name, `llumnix`, with numbers of theirs after a colon, such as `llumnix:out_below=3,headroom=400`.

    Raises
    ------
    UnknownNameError, UsageError    rules or a number that there are not, or that cannot be
    """
    name, colon, given = text.strip().partition(":")
    if name != "llumnix":
        raise UnknownNameError("rescheduling", name[:60], ("llumnix",))
    found: dict[str, Any] = {}
    for part in given.split(",") if colon else ():
        key, _, value = (word.strip() for word in part.partition("="))
        if key not in NUMBERS:
            raise UnknownNameError("number of llumnix", key[:60], NUMBERS)
        if key in found:
            raise UsageError(f"--rescheduling: {key} is given twice")
        form, example = NUMBERS[key]
        if re.fullmatch(form, value, re.ASCII) is None:
            raise UsageError(f"--rescheduling: {part.strip()[:40]!r} cannot be read; such as {key}={example}")
        found[key] = value
    numbers: dict[str, Any] = {key: Fraction(found[key]) for key in ("out_below", "in_from") if key in found}
    if "period_ms" in found:
        numbers["period_ns"] = round(Fraction(found["period_ms"]) * NS_PER_MS)
        if not numbers["period_ns"]:
            raise UsageError("--rescheduling: period_ms must be above 0; such as period_ms=1000")
    if "headroom" in found:
        numbers["headroom"] = int(found["headroom"])
    if "draining" in found:
        numbers["draining"] = frozenset(map(int, found["draining"].split("+")))
    return Rescheduling(**numbers)


NUMBERS: Final = {
    "out_below": (r"-?\d{1,9}(\.\d{1,6})?", "3"),
    "in_from": (r"-?\d{1,9}(\.\d{1,6})?", "3"),
    "period_ms": (r"\d{1,9}(\.\d{1,6})?", "1000"),
    "headroom": (r"\d{1,9}", "400"),
    "draining": (r"\d{1,6}(\+\d{1,6})*", "0+2"),
}
"""Numbers that can be given, each with its form and an example."""
