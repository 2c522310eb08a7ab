"""One search over the fleets of several pools: bounded, simulated best bound first, and each accounted for."""

from __future__ import annotations

import os
from bisect import insort
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from math import inf, prod
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from apex_opt.search.answer import Certificate
from apex_opt.search.fleet import Fleet, FleetEvaluator
from apex_opt.search.fleet_bounds import FleetBounds, blocks
from apex_opt.search.fleet_parts import parts_of
from apex_opt.search.search import ROUND, list_plans, settled, tell_compiling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Answer
    from apex_opt.search.evaluator import Evaluator
    from apex_opt.search.fleet_parts import Part
    from apex_opt.search.question import Question
    from apex_opt.search.search import Formulation, Progress

    Costs = tuple[float, ...]


class _Queued(NamedTuple):
    """A fleet to simulate: its bounds, its place among equals, the space it is of, and its parts."""

    bound: Costs
    place: int
    space: FleetSpace
    parts: tuple[Part, ...]


@dataclass(slots=True, kw_only=True, eq=False)
class FleetSpace:
    """Fleets over some pools, and what became of them.

    Parameters
    ----------
    pools : places of the pools
    size : int                 fleets there are, any plan of each pool with any of the others
    infeasible : mapping       as in `FleetAnswer`
    repeated : int             fleets with a part that is another with its layers moved
    out_of_reach, beaten : int    ruled out by bounds of goals, of objectives
    least : Costs or None      least bound of those beaten
    waiting : list of (Costs, int)    bounds of those to simulate that are not yet, and of how many fleets each is one
    complete : bool            whether all feasible plans of the pools are known
    """

    pools: tuple[int, ...]
    size: int
    infeasible: dict[str, int]
    repeated: int
    complete: bool
    out_of_reach: int = 0
    beaten: int = 0
    least: Costs | None = None
    simulated: int = 0
    cut_short: int = 0
    missed: int = 0
    waiting: list[tuple[Costs, int]]

    def beat(self, bound: Costs, fleets: int = 1) -> None:
        """Rule out fleets whose bounds are no better than this."""
        self.beaten += fleets
        self.least = bound if self.least is None else min(self.least, bound)

    def left(self, last: Costs | None) -> list[tuple[Costs, int]]:
        """Those waiting that may still be among the best, with `last` the costs of the last of the fleets to show."""
        return [(bound, fleets) for bound, fleets in self.waiting if last is None or bound <= last]

    def certificate(self, question: Question, last: Costs | None) -> Certificate:
        """Once the search has ended, with `last` the costs of the last of the fleets to show."""
        left = sum(fleets for _, fleets in self.left(last))
        for bound, fleets in self.waiting:
            if last is not None and bound > last:
                self.beat(bound, fleets)
        proved = self.complete and not left
        objective = question.objective
        return Certificate(
            space=self.size,
            infeasible=self.infeasible,
            bounded=self.out_of_reach + self.beaten,
            out_of_reach=self.out_of_reach,
            least_bound=None if self.least is None else objective.signed(self.least[0]),
            incumbent=None if self.least is None or last is None else objective.signed(last[0]),
            repeated=self.repeated,
            simulated=self.simulated,
            cut_short=self.cut_short,
            missed=self.missed,
            left=left,
            optimal=proved,
            gap=0.0 if proved else None,
        )


class FleetRun:
    """One search over the fleets of several pools, for objectives without tolerance."""

    def __init__(
        self,
        pools: Sequence[Question],
        evaluators: Sequence[Evaluator],
        top: int,
        deadline: float,
        most_gpus: int | None,
        tell: Progress,
        found: Sequence[Costs],
    ) -> None:
        self._pools, self._evaluators, self._top, self._tell = pools, evaluators, top, tell
        self._deadline = deadline
        self._most_gpus = sum(pool.max_devices for pool in pools) if most_gpus is None else most_gpus
        self._alone = found
        self._good = sorted(found)
        self._scorer = FleetEvaluator(evaluators)
        self._scouts: dict[tuple[Plan | int, ...], Fleet] = {}
        self._queue: list[_Queued] = []
        self.spaces: list[FleetSpace] = []
        self.done: list[Fleet] = []

    @property
    def _worst(self) -> Costs:
        """Costs that a fleet has to reach to be shown."""
        question = self._pools[0]
        known = sorted([*self._alone, *(question.costs(fleet.metrics) for fleet in self._scouts.values())])
        return min(some[self._top - 1] if len(some) >= self._top else (inf,) for some in (known, self._good))

    def queue(self, formulation: Formulation, answers: Sequence[Answer]) -> None:
        """Bound every fleet, and queue those that may be among the best."""
        bounds, listed, parts = FleetBounds(self._evaluators[0]), [], []
        for pool, evaluator in zip(self._pools, self._evaluators, strict=True):
            found = list_plans(pool, formulation, self._tell)
            plans, _ = settled(pool, formulation, found, self._tell)
            listed.append((len(found.plans) + len(found.movable), found.complete))
            parts.append(parts_of(evaluator, plans, self._tell))
        self._scout(bounds, parts, answers)
        helped = self._with_help(bounds, parts)
        for places in self._choices:
            spaces = prod(answers[place].certificate.space for place in places)
            feasible = prod(listed[place][0] for place in places)
            chosen = [parts[place] for place in places]
            different = prod(map(len, chosen))
            fitting = _within(_devices(chosen, map(range, map(len, chosen))), self._most_gpus)
            space = FleetSpace(
                pools=places,
                size=spaces,
                infeasible={"part": spaces - feasible, "gpus": different - fitting, "share": 0},
                repeated=feasible - different,
                complete=all(listed[place][1] for place in places),
                waiting=[],
            )
            self.spaces.append(space)
            if fitting:
                self._bound(bounds, space, chosen, [helped[place] for place in places])
        self._queue.sort(key=lambda item: (item.bound, item.place))

    def _scout(self, bounds: FleetBounds, parts: Sequence[Sequence[Part]], answers: Sequence[Answer]) -> None:
        """Simulate fleets of the best plans of each pool: the better those known, the more the bounds rule out.

        Where a pool has no answer of its own, its plans with the most weight are taken.
        """
        chosen = []
        for some, answer in zip(parts, answers, strict=True):
            places = {part.plan: place for place, part in enumerate(some)}
            best = [some[places[candidate.plan]] for candidate in answer.candidates[:ROUND]]
            chosen.append(best or sorted(some, key=lambda part: -part.weight)[:ROUND])
        for pools in self._choices:
            fleets = [
                fleet
                for fleet in product(*(chosen[place] for place in pools))
                if sum(part.plan.devices for part in fleet) <= self._most_gpus
            ]
            if not fleets or monotonic() > self._deadline:
                continue
            costs, possible, served = bounds.of(fleets)
            for place in np.flatnonzero(possible & served).tolist():
                self._tell("simulating fleets", place, len(fleets))
                fleet = fleets[place]
                found = self._scorer.challenge(pools, fleet, tuple(costs[place].tolist()), self._aims)
                if found is not None and found.meets_slos:
                    self._scouts[_key(pools, fleet)] = found

    @property
    def _choices(self) -> Iterator[tuple[int, ...]]:
        """Places of the pools of each kind of fleet over several."""
        for size in range(2, len(self._pools) + 1):
            yield from combinations(range(len(self._pools)), size)

    @property
    def _aims(self) -> Costs:
        """Costs beyond which a run may end; without fleets to beat it still ends once it misses a goal."""
        worst = self._worst
        return self._evaluators[0].any_cost if worst[0] == inf else worst

    def _with_help(self, bounds: FleetBounds, parts: Sequence[Sequence[Part]]) -> list[dict[int, Costs]]:
        """Bounds of all fleets that a plan of each pool is in; of those plans that can meet the goals."""
        found: list[dict[int, Costs]] = []
        for index, mine in enumerate(parts):
            others = [part for place, some in enumerate(parts) if place != index for part in some]
            found.append({})
            if mine and others:
                costs, possible = bounds.with_any(mine, others)
                found[-1] = {place: tuple(costs[place].tolist()) for place in np.flatnonzero(possible).tolist()}
        return found

    def _bound(
        self,
        bounds: FleetBounds,
        space: FleetSpace,
        parts: Sequence[Sequence[Part]],
        helped: Sequence[dict[int, Costs]],
    ) -> None:
        """Rule out fleets by the bounds of their parts, then by their own; queue the others."""
        worst, requests = self._worst, len(self._pools[0].trace)
        fitting = _within(_devices(parts, map(range, map(len, parts))), self._most_gpus)
        reached = _within(_devices(parts, helped), self._most_gpus)
        space.out_of_reach += fitting - reached
        kept = [[place for place, bound in some.items() if bound <= worst] for some in helped]
        near = _within(_devices(parts, kept), self._most_gpus)
        if beaten := reached - near:
            space.beat(min(bound for some in helped for bound in some.values() if bound > worst), beaten)
        chosen = (
            fleet
            for fleet in product(*([some[i] for i in places] for some, places in zip(parts, kept, strict=True)))
            if sum(part.plan.devices for part in fleet) <= self._most_gpus
        )
        done = 0
        for block in blocks(chosen, requests):
            self._tell("bounding fleets", done, near)
            if monotonic() > self._deadline:
                # No fleet that is left is better than what the best of its parts can reach with any help.
                least = max(min(some[i] for i in places) for some, places in zip(helped, kept, strict=True))
                space.waiting.append((least, near - done))
                break
            done += len(block)
            costs, possible, served = bounds.of(block)
            for fleet, bound, can, has in zip(block, costs.tolist(), possible.tolist(), served.tolist(), strict=True):
                if not has:
                    space.infeasible["share"] += 1
                elif not can:
                    space.out_of_reach += 1
                elif tuple(bound) > worst:
                    space.beat(tuple(bound))
                else:
                    self._queue.append(_Queued(tuple(bound), len(self._queue), space, fleet))

    def simulate(self) -> None:
        """Score fleets best bound first, a round at a time, until no bound is good enough or time is up."""
        question = self._pools[0]
        position, compiled = 0, set[int]()
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            while position < len(self._queue) and monotonic() <= self._deadline:
                worst = self._worst
                items = [item for item in self._queue[position : position + ROUND] if item.bound <= worst]
                if not items:
                    break
                position += len(items)
                self._tell("simulating fleets", position, len(self._queue))
                for pool, part in (pair for item in items for pair in zip(item.space.pools, item.parts, strict=True)):
                    if part.plan.stages not in compiled:
                        compiled.add(part.plan.stages)
                        tell_compiling(self._tell, self._evaluators[pool], [part.plan])
                runs = threads.map(partial(self._challenged, self._aims), items)
                for item, fleet in zip(items, runs, strict=True):
                    item.space.simulated += 1
                    if fleet is None:
                        item.space.cut_short += 1
                    elif fleet.meets_slos:
                        self.done.append(fleet)
                        insort(self._good, question.costs(fleet.metrics))
                    else:
                        item.space.missed += 1
        for item in self._queue[position:]:
            item.space.waiting.append((item.bound, 1))
        # Where time was up before their turn, those known beforehand may be the best all the same.
        known = {fleet.text for fleet in self.done}
        self.done += [fleet for fleet in self._scouts.values() if fleet.text not in known]

    def _challenged(self, worst: Costs, item: _Queued) -> Fleet | None:
        known = self._scouts.get(_key(item.space.pools, item.parts))
        return known or self._scorer.challenge(item.space.pools, item.parts, item.bound, worst)


def _key(pools: Sequence[int], parts: Sequence[Part]) -> tuple[Plan | int, ...]:
    """What tells a fleet from others."""
    return (*pools, *(part.plan for part in parts))


def _devices(parts: Iterable[Sequence[Part]], places: Iterable[Iterable[int]]) -> Iterator[list[int]]:
    """GPUs of some parts of each pool."""
    for some, those in zip(parts, places, strict=True):
        yield [some[place].plan.devices for place in those]


def _within(devices: Iterable[Sequence[int]], most: int) -> int:
    """Fleets of one plan of each pool, given by their GPUs, that take so many in all at most."""
    totals = Counter({0: 1})
    for some in devices:
        sums: Counter[int] = Counter()
        for (one, times), (other, often) in product(totals.items(), Counter(some).items()):
            if one + other <= most:
                sums[one + other] += times * often
        totals = sums
    return totals.total()
