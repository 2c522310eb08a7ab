"""Proofs: what became of a space, replays of it, and what clashes."""

from __future__ import annotations

from typing import Literal

from apex_opt.report.types.document import Number
from apex_opt.schema import Described


class LedgerPart(Described):
    """How every plan of the space was accounted for.

    Parameters
    ----------
    infeasible : plans that break a constraint family, charged to the first in order
    bounded : ruled out by a bound
    cut_short : simulated until they could no longer win
    missed : simulated and not within the goals
    optimal : whether no other plan of the space can be better than the best found; a space of one plan, that which
        `simulate` was given, has no other
    gap : share by which a plan that was not simulated could be better
    left : not looked at when the time was up
    repeated : others with their layers moved
    out_of_reach : of those bounded, those whose bound misses a goal
    least_bound, incumbent : the best bound among the others, and what it was held against
    before : those of objectives with a tolerance, in turn
    types : the types of GPU that it is of
    """

    types: tuple[str, ...] | None = None
    space: int
    infeasible: dict[str, int]
    bounded: int
    simulated: int
    cut_short: int
    missed: int
    optimal: bool
    gap: Number
    left: int
    repeated: int
    out_of_reach: int
    least_bound: Number
    incumbent: Number
    before: tuple[LedgerPart, ...]


class ReplayedPart(Described):
    """What the replay counts of a part."""

    shape: str
    types: tuple[str, ...]
    space: int
    infeasible: dict[str, int]
    repeated: int
    simulated: int


class Replay(Described):
    """The certificate replayed by other means.

    Parameters
    ----------
    meeting : plans within the goals
    disagreements : what the certificate claims and the replay does not bear out
    parts : part by part, where there are several types of GPU
    chosen : how the deployments were chosen that were simulated
    """

    space: int
    infeasible: dict[str, int]
    repeated: int
    simulated: int
    meeting: int
    disagreements: tuple[str, ...]
    holds: bool
    parts: tuple[ReplayedPart, ...] | None = None
    chosen: str | None = None


class Clash(Described):
    """Constraints that no plan satisfies together.

    Parameters
    ----------
    smallest : whether some plan satisfies any fewer of them
    """

    of: tuple[str, ...]
    proof: Literal["constraints", "bound", "simulation"]
    facts: tuple[str, ...]
    smallest: bool
    gpu: str | None = None
    serving: str | None = None


class Relaxation(Described):
    """A change that gives a plan.

    Parameters
    ----------
    best : whether the plan is shown to be the best with it
    """

    options: dict[str, str]
    text: str
    more_gpus: int
    plan: str
    gpus: int
    value: Number
    best: bool
    gpu: str | None = None
    serving: str | None = None
