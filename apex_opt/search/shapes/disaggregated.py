"""A pool that computes prompts and one that answers them, on the same type of GPU or on two."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from apex_opt.plans.deployment import ROLES, Pool
from apex_opt.search.bounds.handed import Handed
from apex_opt.search.ledger import LATE, Part
from apex_opt.search.nearest import nearest_violation
from apex_opt.search.option import options_of
from apex_opt.search.pairs import pairable
from apex_opt.search.shapes.together import Room, Together
from apex_opt.search.space import list_space

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.search.ledger import Costs
    from apex_opt.search.option import Option
    from apex_opt.search.problem import Problem
    from apex_opt.search.scorer import Scorer
    from apex_opt.search.space import Formulation, Progress, Space


class Sides:
    """The pools that a deployment can have on one type of GPU, those of either role.

    Parameters
    ----------
    scorer : Scorer
    formulation : Formulation    enumerates how a replica can be cut
    place : int                  number of the type of GPU
    tell : callable              told (what, done, total) along the way
    """

    def __init__(self, scorer: Scorer, formulation: Formulation, place: int, tell: Progress) -> None:
        problem = scorer.problem
        self._scorer, self._tell, self.pairs = scorer, tell, scorer.pairs
        self.name = problem.types[place]
        self.spaces: dict[str, Space] = {}
        self.pools: dict[str, list[Pool]] = {}
        for role in ROLES:
            space = self.spaces[role] = list_space(problem.side(role, place), formulation, tell)
            self.pools[role] = [
                Pool(plan=routed.times(count), gpu=self.name if problem.mixed else None, role=role)
                for cut in space.cuts
                if pairable(cut)
                for routed, counts in space.repeated(cut)
                for count in counts
            ]

    @cached_property
    def options(self) -> dict[str, list[Option]]:
        """The pools of either role with what pairs of them are bounded by."""
        return {
            role: options_of(self._scorer.facts_of(pools[0]), pools, self._tell) if pools else []
            for role, pools in self.pools.items()
        }


def most_gpus(problem: Problem, prefill: str, decode: str) -> int:
    """GPUs that two pools may take in all.

    Parameters
    ----------
    problem
    prefill, decode : names of their types of GPU
    """
    free = {offer.name: offer.free for offer in problem.offers}
    return min(problem.max_devices, sum(free[name] for name in {prefill, decode}))


def pools_part(
    problem: Problem, types: tuple[str, str], spaces: tuple[int, int], options: Sequence[Sequence[Option]]
) -> Part:
    """The part of a ledger of the pairs of a prefill and a decode pool on two types of GPU, which may be the same.

    Parameters
    ----------
    problem : Problem
    types : names of the types of GPU of the prefill and of the decode pool
    spaces : plans that there are of each
    options : of each, those that are feasible and can be paired
    """
    space, some = spaces[0] * spaces[1], len(options[0]) * len(options[1])
    fitting = Room(options).of(0, most_gpus(problem, *types))
    return Part(
        shape="pools",
        types=types,
        objective=problem.objective,
        space=space,
        infeasible={"part": space - some, "gpus": some - fitting, **dict.fromkeys(LATE["pools"], 0)},
    )


def no_pair(problem: Problem, sides: Sequence[Sides]) -> str:
    """Why no prefill and decode pool go together.

    Parameters
    ----------
    problem : Problem
    sides : of each type of GPU, its pools
    """
    smallest, pair = [], list[Pool]()
    for role in ROLES:
        some = [(pool.plan.devices, side.name, str(pool), pool) for side in sides for pool in side.pools[role]]
        if not some and any(side.spaces[role].feasible for side in sides):
            return f"no plan of a {role} pool fits on one stage with one attention copy, as prompts are handed over"
        if not some:
            return f"{role}: {nearest_violation(problem.side(role, 0).instance())}"
        least, name, _, pool = min(some, key=lambda one: one[:3])
        pair.append(pool)
        smallest.append(f"{least} {name}" if problem.mixed else f"{least}")
    faults = "; ".join(f"{fault.family}: {fault.text}" for fault in sides[0].pairs.faults(*pair))
    if faults and sum(pool.plan.devices for pool in pair) <= problem.max_devices:
        return f"none goes together; of the smallest two, {faults}"
    offered = f"{problem.max_devices} are offered"
    if problem.mixed:
        there = " and ".join(f"{offer.free} {offer.name}" for offer in problem.offers)
        offered = f"{there} are there and {offered}"
    return (
        f"the smallest take {smallest[0]} and {smallest[1]} GPUs, {offered}; offer more, larger ones or a narrower "
        "weight format"
    )


def part_of(problem: Problem, prefill: Sides, decode: Sides) -> Part:
    """The part of a ledger of the pairs of a prefill pool of one type of GPU and a decode pool of another or the same.

    Parameters
    ----------
    problem : Problem
    prefill, decode : Sides    of these types
    """
    spaces = prefill.spaces["prefill"], decode.spaces["decode"]
    options = prefill.options["prefill"], decode.options["decode"]
    part = pools_part(problem, (prefill.name, decode.name), (spaces[0].size, spaces[1].size), options)
    part.complete = all(space.complete for space in spaces)
    return part


def disaggregated(
    scorer: Scorer, prefill: Sides, decode: Sides, admits: Callable[[Costs, Part], bool], tell: Progress
) -> Together:
    """Deployments with a prefill pool on one type of GPU and a decode pool on another one or the same.

    Parameters
    ----------
    scorer : Scorer
    prefill, decode : Sides    of these types
    admits : callable          whether a deployment with a bound may matter
    tell : callable            told (what, done, total) along the way
    """
    problem, part = scorer.problem, part_of(scorer.problem, prefill, decode)
    options = [prefill.options["prefill"], decode.options["decode"]]
    compose = Handed(problem, scorer.outside_ns, scorer.pairs)
    return Together(problem, part, options, most_gpus(problem, *part.types), compose, admits, tell)
