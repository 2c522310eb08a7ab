"""Lower bounds on what fleets can reach: of all fleets over some pools at once, without simulating them.

Why they are admissible. How requests are dealt is known beforehand, so each has the floor of the part it goes to
(`bounds.isolated`); a floor found for the whole trace holds for a part with fewer requests and
clients. A part takes no less time than its own requests together take of it (`load`), and the run of a fleet lasts as
long as that of its slowest part. Its GPUs idle for all of that time. A gap between tokens takes one batch at least.
Before fleets are looked at one by one, each plan is paired with the best of everything that the plans of other pools
have, request by request: what is out of reach with that help is out of reach with any of them.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from apex_opt.figures.measure import ROUNDING, can_hold, least_signed
from apex_opt.figures.run import Run
from apex_opt.search.dealing import dealt
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.run import Floats, Ints
    from apex_opt.search.evaluator import Evaluator
    from apex_opt.search.fleet_parts import Part

Item = TypeVar("Item")

BLOCK: Final = 1 << 21
"""Requests of fleets that are looked at together: a few arrays of so many numbers."""


class FleetBounds:
    """Lower bounds of fleets over pools, by the objectives and goals of the question that all pools are asked."""

    def __init__(self, evaluator: Evaluator) -> None:
        question = self._question = evaluator.question
        self._outside_ns = evaluator.costs.request_ns
        trace, settings = question.trace, question.settings
        self._tokens = trace.generated(settings.max_model_len)
        self._steps = self._tokens - 1
        self._held = self._steps * -(-trace.prompt // settings.block_size)
        self._computed = self._steps + (0 if settings.prefix_caching else trace.prompt)  # a cache may hold any prompt

    def of(self, fleets: Sequence[tuple[Part, ...]]) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
        """Of fleets over the same pools, few enough for memory.

        Returns
        -------
        float64[fleets, objectives]    lower bounds of the costs
        bool[fleets]                   whether the goals can still hold
        bool[fleets]                   whether each part has a request, and in a closed loop a client
        """
        trace, shape = self._question.trace, (len(fleets), len(fleets[0]))
        owner = dealt(np.array([[part.weight for part in fleet] for fleet in fleets]), len(trace))
        first, rest = (np.zeros(owner.shape, np.int64) for _ in range(2))
        load_s, joules = np.zeros(len(fleets)), np.zeros(shape)
        gaps, served = np.zeros(shape, np.int64), np.full(len(fleets), (trace.concurrency or shape[1]) >= shape[1])
        for index, parts in enumerate(zip(*fleets, strict=True)):
            mine = owner == index
            first = np.where(mine, _stacked(parts, "first_ns"), first)
            rest = np.where(mine, _stacked(parts, "rest_ns"), rest)
            gaps[:, index] = mine @ self._steps
            for total_ns in (
                np.where(mine, _stacked(parts, "work_ns"), 0.0).sum(axis=1) / [part.plan.replicas for part in parts],
                (mine @ self._held) * _stacked(parts, "held_ns"),
                gaps[:, index] * _stacked(parts, "step_ns"),
            ):
                load_s = np.maximum(load_s, total_ns / NS_PER_S)
            joules[:, index] = (mine @ self._computed) * _stacked(parts, "token_j")
            served &= mine.any(axis=1)
        gap_ns, idle_w, limit_w = (
            np.stack([_stacked(fleet, of) for fleet in fleets]) for of in ("batch_ns", "idle_w", "limit_w")
        )
        bounds, possible = self._judged(
            self._run(first, rest, first + rest, gap_ns, gaps, load_s),
            joules,
            idle_w,
            limit_w,
            np.array([sum(part.cost_per_h for part in fleet) for fleet in fleets]),
        )
        return bounds, possible, served

    def with_any(self, parts: Sequence[Part], others: Sequence[Part]) -> tuple[Floats, NDArray[np.bool_]]:
        """Of each part, what no fleet of it and some of the others can beat, whatever their shares: as `of`."""
        first, rest = (np.minimum.reduce([getattr(part, of) for part in others]) for of in ("first_ns", "rest_ns"))
        whole = np.minimum.reduce([part.first_ns + part.rest_ns for part in others])
        least = {of: min(getattr(part, of) for part in others) for of in _OF_GPUS}
        spare_w = min(part.limit_w - part.idle_w for part in others)
        found = []
        for some in blocks(parts, len(self._steps)):
            own = {of: _stacked(some, of) for of in _OF_GPUS}
            token_j, idle_w = np.minimum(own["token_j"], least["token_j"]), own["idle_w"] + least["idle_w"]
            own_first, own_rest = _stacked(some, "first_ns"), _stacked(some, "rest_ns")
            floors = self._run(
                np.minimum(own_first, first),
                np.minimum(own_rest, rest),
                np.minimum(own_first + own_rest, whole),
                np.minimum(own["batch_ns"], least["batch_ns"])[:, None],
                np.full((len(some), 1), self._steps.sum()),
            )
            # Least where one of them draws all it may and the others idle.
            limit_w = idle_w + np.minimum(_stacked(some, "limit_w") - own["idle_w"], spare_w)
            # Added up in another order it may be less.
            cost_per_h = (own["cost_per_h"] + least["cost_per_h"]) * (1 - ROUNDING)
            joules = token_j * self._computed.sum()
            found.append(self._judged(floors, joules[:, None], idle_w[:, None], limit_w[:, None], cost_per_h))
        bounds, possible = zip(*found, strict=True)
        return np.concatenate(bounds), np.concatenate(possible)

    def _run(self, first: Ints, rest: Ints, whole: Ints, gap_ns: Ints, gaps: Ints, load_s: Floats | float = 0.0) -> Run:
        """What runs of some fleets cannot beat, a row for each.

        Parameters
        ----------
        first, rest, whole : int64[fleets, n]    nanoseconds of each request
        gap_ns, gaps : int64[fleets, parts]      least time between two tokens on each part, and how many there are
        load_s : float64[fleets]                 what the requests take together
        """
        trace, total = self._question.trace, gaps.sum(axis=1)
        mean_s = {"mean": rest.sum(axis=1) / total / NS_PER_S} if total.any() else {}
        return Run.of(
            arrival_ns=trace.arrival_ns,
            first_ns=first,
            rest_ns=rest,
            whole_ns=whole,
            prompt=trace.prompt,
            tokens=self._tokens,
            outside_ns=self._outside_ns,
            work_s=load_s,
            gap_ns=gap_ns,
            gaps=gaps,
            limits=self._question.per_request,
            least={"gap": mean_s},
        )

    def _judged(
        self, floors: Run, joules: Floats, idle_w: Floats, limit_w: Floats, cost_per_h: Floats
    ) -> tuple[Floats, NDArray[np.bool_]]:
        """Costs by the objectives, and whether the goals can hold.

        Parameters
        ----------
        floors : Run                                      of the fleets
        joules, idle_w, limit_w : float64[fleets, parts]  above the idle draw, idle draw, most draw
        cost_per_h : float64[fleets]
        """
        makespan_s = floors.makespan_s[:, None]
        energy_j = np.minimum(joules + idle_w * makespan_s, limit_w * makespan_s).sum(axis=1) * (1 - ROUNDING)
        floors = floors.costing(energy_j, cost_per_h)
        costs = [least_signed(objective, floors) for objective in self._question.objectives]
        possible = np.ones(len(costs[0]), bool)
        for goal in self._question.goals:
            possible &= can_hold(goal, floors)
        return np.stack(costs, axis=1), possible


_OF_GPUS: Final = ("batch_ns", "token_j", "idle_w", "cost_per_h")


def _stacked(parts: Sequence[Part], of: str) -> NDArray[Any]:
    """A field of each part, one after the other."""
    return np.stack([np.asarray(getattr(part, of)) for part in parts])


def blocks(items: Iterable[Item], requests: int) -> Iterator[list[Item]]:
    """So many items at a time as memory is meant for."""
    rest = iter(items)
    while block := list(islice(rest, max(1, BLOCK // requests))):
        yield block
