"""The plans of one type of GPU: how one replica can be cut, how many replicas find room, and what is infeasible."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, Protocol

from apex_opt.errors import CapacityError
from apex_opt.oracle.checks import FAMILIES, OF_CUTS
from apex_opt.plans.plan import repeated
from apex_opt.plans.routing import count_repeated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.routing import Routing
    from apex_opt.plans.shares import Shares
    from apex_opt.search.problem import Problem

    Progress = Callable[[str, int, int], None]


class Enumeration(Protocol):
    """Plans of one replica, those whose layers are yet to be moved, and whether they are all."""

    @property
    def plans(self) -> tuple[Plan, ...]: ...
    @property
    def movable(self) -> tuple[Plan, ...]: ...
    @property
    def complete(self) -> bool: ...


class Formulation(Protocol):
    """What the search asks of a plan-space program."""

    def count(self, instance: Instance, families: Sequence[str]) -> int: ...

    def enumerate(self, instance: Instance, families: Sequence[str] = ...) -> Enumeration: ...

    def moved(self, instance: Instance, plan: Plan) -> Plan | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The space of a problem with one type of GPU.

    Parameters
    ----------
    size : int                    plans there are, with every number of replicas, router, clock and share
    infeasible : mapping          plans that break a constraint family, charged to the first in order
    cuts : tuple of Plan          feasible plans of one replica, at every clock and with all shares
    movable : tuple of Plan       feasible plans of one replica whose layers are yet to be moved, with even stages
    complete : bool               whether these are all
    most_devices : int            GPUs there are
    routings : tuple of str       routers to choose from; none where there is no choice
    """

    size: int
    infeasible: dict[str, int]
    cuts: tuple[Plan, ...]
    movable: tuple[Plan, ...]
    complete: bool
    most_devices: int
    routings: tuple[Routing, ...] = ()

    def repeated(self, cut: Plan) -> list[tuple[Plan, range]]:
        """Numbers of replicas that find room, with each router."""
        return repeated(cut, self.most_devices // cut.devices, self.routings)

    @property
    def feasible(self) -> int:
        """Feasible plans."""
        return _room((*self.cuts, *self.movable), self.most_devices, self.routings)


def list_space(problem: Problem, formulation: Formulation, tell: Progress) -> Space:
    """Enumerate how a replica can be cut, and count what is infeasible.

    Parameters
    ----------
    problem, formulation
    tell : Progress    told (what, done, total) along the way
    """
    tell("enumerating plans", 0, 0)
    spaces = [_alike(problem, formulation, instance, shares) for instance, shares in problem.instances()]
    families = list(spaces[0].infeasible)
    return Space(
        size=sum(space.size for space in spaces),
        infeasible={family: sum(space.infeasible[family] for space in spaces) for family in families},
        cuts=tuple(plan for space in spaces for plan in space.cuts),
        movable=tuple(plan for space in spaces for plan in space.movable),
        complete=all(space.complete for space in spaces),
        most_devices=problem.max_devices,
        routings=problem.routings,
    )


def _alike(problem: Problem, formulation: Formulation, instance: Instance, shares: tuple[Shares | None, ...]) -> Space:
    """The space of the plans that share their GPUs alike.

    Parameters
    ----------
    problem, formulation
    instance : Instance    of these plans
    shares : that they can have, whichever of which they are feasible with
    """
    left = size = formulation.count(instance, ())
    counts = {}
    for index, family in enumerate(OF_CUTS):
        after = formulation.count(instance, OF_CUTS[: index + 1])
        counts[family] = left - after
        left = after
    feasible = held = formulation.enumerate(instance)
    if instance.tpot_limit_ns is not None:
        held = formulation.enumerate(instance, [f for f in FAMILIES if f != "bandwidth"])
    listed, fast = (
        _room((*found.plans, *found.movable), problem.max_devices, problem.routings) for found in (held, feasible)
    )
    counts["memory"], counts["bandwidth"] = left - listed, listed - fast
    choices = list(product(problem.offer.clocks, shares))  # no constraint binds the clock
    cuts, movable = (
        tuple(
            plan if (clock, part) == (None, plan.shares) else replace(plan, clock_mhz=clock, shares=part)
            for clock, part in choices
            for plan in some
        )
        for some in (feasible.plans, feasible.movable)
    )
    return Space(
        size=size * len(choices),
        infeasible={name: count * len(choices) for name, count in counts.items()},
        cuts=cuts,
        movable=movable,
        complete=feasible.complete,
        most_devices=problem.max_devices,
        routings=problem.routings,
    )


def _room(cuts: Sequence[Plan], devices: int, routings: Sequence[Routing]) -> int:
    """Plans there are of some cuts, with every number of replicas that finds room and every router."""
    return sum(count_repeated(devices // cut.devices, routings) for cut in cuts)


MOVED: Final = 16
"""Plans whose layers are moved before the time is looked at: those of small spaces are moved whatever the limit."""


class Moves:
    """Layers moved, once for all plans that cut the model alike."""

    def __init__(self, problem: Problem, formulation: Formulation) -> None:
        self._instance, self._formulation = problem.instance(), formulation
        self._found: dict[tuple[Any, ...], Plan | None] = {}

    def __call__(self, plan: Plan) -> Plan | None:
        """A movable plan with its layers moved; None where its stages stay even, and so it is a plan already."""
        cut = replace(plan, replicas=1, clock_mhz=None)
        key = cut.cut, cut.stages
        if key not in self._found:
            self._found[key] = self._formulation.moved(self._instance, cut)
        moved = self._found[key]
        return None if moved is None else replace(plan, layers=moved.layers)


class TimeIsUp(Exception):
    """The time limit was reached before all that was asked for was made."""


def every_plan(space: Space, moves: Moves, tell: Progress, deadline: float = inf) -> Iterator[Plan]:
    """All feasible plans, with the layers of the movable ones moved.

    Parameters
    ----------
    space
    moves : Moves           moves layers
    tell : Progress         told (what, done, total) along the way
    deadline : float        point in time after which no further round of layers is moved

    Raises
    ------
    TimeIsUp                layers of some plans are left to be moved
    """
    for index, cut in enumerate((*space.cuts, *space.movable)):
        if index >= len(space.cuts):
            tell("moving layers", index - len(space.cuts), len(space.movable))
            if (index - len(space.cuts)) % MOVED == MOVED - 1 and monotonic() > deadline:
                raise TimeIsUp
        plan = cut if index < len(space.cuts) else moves(cut)
        if plan is not None:
            yield from (routed.times(count) for routed, counts in space.repeated(plan) for count in counts)


def check_lengths(problem: Problem) -> None:
    """Refuse a prompt that fills the model's length by itself: no plan helps.

    Raises
    ------
    CapacityError
    """
    trace, model = problem.trace, problem.model
    longest = int(trace.prompt.max())
    if longest >= problem.settings.max_model_len:
        raise CapacityError(
            f"request {int(trace.prompt.argmax())}: a prompt of {longest} tokens leaves no room to answer within "
            f"max_model_len {problem.settings.max_model_len}; {model.name} is made for {model.max_position} tokens: "
            "raise max_model_len, or use another model or a trace with shorter prompts"
        )
