"""Requests that move between replicas while they decode: the numbers of Llumnix's rules."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from apex_opt.errors import UsageError
from apex_opt.units import NS_PER_S

PERIOD_NS: Final = NS_PER_S
LAST_STAGE_BLOCKS: Final = 16
STAGES: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescheduling:
    """How requests are dealt by freeness, and moved from crowded replicas to free ones.

    Parameters
    ----------
    block_ns : int             time to copy one KV block to another replica
    stop_ns : int              time of the last stage beside its blocks, in which the request stands still
    period_ns : int            between two looks for pairs of replicas
    out_below : Fraction       freeness in blocks per request below which a replica sends requests away
    in_from : Fraction         freeness from which a replica takes some
    headroom : int             blocks that the requests of high priority on a replica are to have in reserve together
    high : frozenset of int    requests of high priority
    draining : frozenset of int    replicas that are to be emptied, and get no request

    Source: Sun et al., "Llumnix: Dynamic Scheduling for Large Language Model Serving", arXiv 2406.03243, and the
    defaults of its repository: a look each second, at most 3 stages, the last at 16 blocks. There a replica sends
    requests away below 3; with 0 it does so only when it is asked for more blocks than it has.
    """

    block_ns: int
    stop_ns: int = 0
    period_ns: int = PERIOD_NS
    out_below: Fraction = Fraction(0)
    in_from: Fraction = Fraction(3)
    headroom: int = 0
    high: frozenset[int] = frozenset()
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
