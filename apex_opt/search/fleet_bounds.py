"""Lower bounds on what fleets can reach: of all fleets over some pools at once, without simulating them.

Why they are admissible. How requests are dealt is known beforehand, so each has the floor of the part it goes to
(`bounds.isolated`); a floor found for the whole trace holds for a part with fewer requests and
clients. A part takes no less time than its own requests together take of it (`load`), and the run of a fleet lasts as
long as that of its slowest part. Its GPUs idle for all of that time. A gap between tokens takes one batch at least.
Before fleets are looked at one by one, each plan is paired with the best of everything that the plans of other pools
have, request by request: what is out of reach with that help is out of reach with any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from apex_opt.search.dealing import dealt
from apex_opt.search.evaluator import ROUNDING, lowered
from apex_opt.units import NS_PER_S, S_PER_H
from apex_opt.workload.slo import OF_REQUESTS, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from apex_opt.search.evaluator import Evaluator
    from apex_opt.search.fleet_parts import Part

    Floats = NDArray[np.float64]

Item = TypeVar("Item")

BLOCK: Final = 1 << 21
"""Requests of fleets that are looked at together: a few arrays of so many numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Floors:
    """What runs of some fleets cannot beat, an entry or a row for each.

    Parameters
    ----------
    first_ns, rest_ns, whole_ns : int64[fleets, n]    of each request, to its first token, from there on, in all
    load_s : float64[fleets]                          what the requests take together
    gaps, gap_ns : int64[fleets, parts]               gaps between tokens on each part, and the least of them
    joules, idle_w, limit_w : float64[fleets, parts]  above the idle draw, idle draw, most draw
    cost_per_h : float64[fleets]
    """

    first_ns: NDArray[np.int64]
    rest_ns: NDArray[np.int64]
    whole_ns: NDArray[np.int64]
    load_s: Floats
    gaps: NDArray[np.int64]
    gap_ns: NDArray[np.int64]
    joules: Floats
    idle_w: Floats
    limit_w: Floats
    cost_per_h: Floats


class _Requests:
    """What the bounds need to know of the question's requests."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.question, self.request_ns = evaluator.question, evaluator.costs.request_ns
        trace, settings = self.question.trace, self.question.settings
        generated = trace.generated(settings.max_model_len)
        prompts = np.zeros_like(trace.prompt) if settings.prefix_caching else trace.prompt  # a cache may hold any
        self.arrival_ns = trace.arrival_ns - trace.arrival_ns[0]
        self.steps = generated - 1
        self.output_tokens = int(generated.sum())
        self.held = self.steps * -(-trace.prompt // settings.block_size)
        self.computed = self.steps + prompts


class FleetBounds:
    """Lower bounds of fleets over pools, by the objectives and goals of the question that all pools are asked."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._requests = _Requests(evaluator)

    def of(self, fleets: Sequence[tuple[Part, ...]]) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
        """Of fleets over the same pools, few enough for memory.

        Returns
        -------
        float64[fleets, objectives]    lower bounds of the costs
        bool[fleets]                   whether the goals can still hold
        bool[fleets]                   whether each part has a request, and in a closed loop a client
        """
        requests = self._requests
        trace, shape = requests.question.trace, (len(fleets), len(fleets[0]))
        owner = dealt(np.array([[part.weight for part in fleet] for fleet in fleets]), len(trace))
        first, rest = (np.zeros(owner.shape, np.int64) for _ in range(2))
        load_s, joules = np.zeros(len(fleets)), np.zeros(shape)
        gaps, served = np.zeros(shape, np.int64), np.full(len(fleets), (trace.concurrency or shape[1]) >= shape[1])
        for index, parts in enumerate(zip(*fleets, strict=True)):
            mine = owner == index
            first = np.where(mine, _stacked(parts, "first_ns"), first)
            rest = np.where(mine, _stacked(parts, "rest_ns"), rest)
            gaps[:, index] = mine @ requests.steps
            for total_ns in (
                np.where(mine, _stacked(parts, "work_ns"), 0.0).sum(axis=1) / [part.plan.replicas for part in parts],
                (mine @ requests.held) * _stacked(parts, "held_ns"),
                gaps[:, index] * _stacked(parts, "step_ns"),
            ):
                load_s = np.maximum(load_s, total_ns / NS_PER_S)
            joules[:, index] = (mine @ requests.computed) * _stacked(parts, "token_j")
            served &= mine.any(axis=1)
        bounds, possible = self._judged(
            _Floors(
                first_ns=first,
                rest_ns=rest,
                whole_ns=first + rest,
                load_s=load_s,
                gaps=gaps,
                **{
                    name: np.stack([_stacked(fleet, of) for fleet in fleets])
                    for name, of in (("gap_ns", "batch_ns"), ("idle_w", "idle_w"), ("limit_w", "limit_w"))
                },
                joules=joules,
                cost_per_h=np.array([sum(part.cost_per_h for part in fleet) for fleet in fleets]),
            )
        )
        return bounds, possible, served

    def with_any(self, parts: Sequence[Part], others: Sequence[Part]) -> tuple[Floats, NDArray[np.bool_]]:
        """Of each part, what no fleet of it and some of the others can beat, whatever their shares: as `of`."""
        requests = self._requests
        first, rest = (np.minimum.reduce([getattr(part, of) for part in others]) for of in ("first_ns", "rest_ns"))
        whole = np.minimum.reduce([part.first_ns + part.rest_ns for part in others])
        least = {of: min(getattr(part, of) for part in others) for of in _OF_GPUS}
        spare_w = min(part.limit_w - part.idle_w for part in others)
        found = []
        for some in blocks(parts, len(requests.steps)):
            own = {of: _stacked(some, of) for of in _OF_GPUS}
            token_j, idle_w = np.minimum(own["token_j"], least["token_j"]), own["idle_w"] + least["idle_w"]
            own_first, own_rest = _stacked(some, "first_ns"), _stacked(some, "rest_ns")
            floors = _Floors(
                first_ns=np.minimum(own_first, first),
                rest_ns=np.minimum(own_rest, rest),
                whole_ns=np.minimum(own_first + own_rest, whole),
                load_s=np.zeros(len(some)),
                gaps=np.full((len(some), 1), requests.steps.sum()),
                gap_ns=np.minimum(own["batch_ns"], least["batch_ns"])[:, None],
                joules=(token_j * requests.computed.sum())[:, None],
                idle_w=idle_w[:, None],
                # Least where one of them draws all it may and the others idle.
                limit_w=(idle_w + np.minimum(_stacked(some, "limit_w") - own["idle_w"], spare_w))[:, None],
                # Added up in another order it may be less.
                cost_per_h=(own["cost_per_h"] + least["cost_per_h"]) * (1 - ROUNDING),
            )
            found.append(self._judged(floors))
        bounds, possible = zip(*found, strict=True)
        return np.concatenate(bounds), np.concatenate(possible)

    def _judged(self, floors: _Floors) -> tuple[Floats, NDArray[np.bool_]]:
        """Costs by the objectives, lowered by what rounding may have added, and whether the goals can hold."""
        question = self._requests.question
        seen = _Figures(self._requests, floors)
        costs = []
        for objective in question.objectives:
            value = seen.value(objective.metric, objective.statistic)
            cost = np.where(np.isnan(value), 0.0, -value if objective.maximise else value)
            costs.append(lowered(objective, cost))
        possible = np.ones(len(floors.load_s), bool)
        for slo in question.goals:
            if slo.metric in ("tpot", "itl") and not self._requests.steps.any():
                continue
            value = seen.value(slo.metric, slo.statistic, slo.limit)
            # A goal on the edge of what rounding moves is left to the run.
            possible &= (
                value * (1 - ROUNDING) <= slo.threshold if slo.at_most else (value * (1 + ROUNDING) >= slo.threshold)
            )
        return np.stack(costs, axis=1), possible


_OF_GPUS: Final = ("batch_ns", "token_j", "idle_w", "cost_per_h")


class _Figures:
    """Figures of many fleets, taken of floors, as `Metrics` has them of one run."""

    def __init__(self, requests: _Requests, floors: _Floors) -> None:
        self._requests, self._floors = requests, floors
        ends_ns = (requests.arrival_ns + floors.whole_ns).max(axis=1)
        outside_ns = requests.request_ns
        within_s = np.maximum((ends_ns + outside_ns) / NS_PER_S, 1 / NS_PER_S)
        self._makespan_s: Floats = np.maximum(within_s, floors.load_s + outside_ns / NS_PER_S)

    def value(self, metric: str, statistic: str, limit: float = 0.0) -> Floats:
        """A statistic of a latency in seconds, a figure in its unit, or ("attain") the share within a limit."""
        if metric in OF_REQUESTS:
            return _statistic(self._latency_s(metric), statistic, limit)
        if metric == "itl":
            return self._between_tokens(statistic, limit)
        floors, makespan_s, tokens = self._floors, self._makespan_s, self._requests.output_tokens
        if metric == "makespan":
            return makespan_s
        if metric == "throughput":
            return np.asarray(len(self._requests.steps) / makespan_s)
        if metric == "goodput":
            return np.asarray(self._good() / makespan_s)
        if metric == "cost":
            return floors.cost_per_h
        if metric == "cost_per_mtoken":
            return np.asarray(floors.cost_per_h * makespan_s / S_PER_H / tokens * 1e6)
        each = np.minimum(floors.joules + floors.idle_w * makespan_s[:, None], floors.limit_w * makespan_s[:, None])
        energy_j = each.sum(axis=1) * (1 - ROUNDING)
        return np.asarray(energy_j if metric == "energy" else energy_j / tokens)

    def _latency_s(self, metric: str) -> Floats:
        """Of every request; TPOT of those with one."""
        floors, requests = self._floors, self._requests
        if metric == "tpot":
            several = requests.steps > 0
            return np.asarray(floors.rest_ns[:, several] / requests.steps[several] / NS_PER_S)
        ns = floors.first_ns if metric == "ttft" else floors.whole_ns
        return np.asarray((ns + requests.request_ns) / NS_PER_S)

    def _good(self) -> NDArray[np.int64]:
        """Requests whose floors are within all limits."""
        several = self._requests.steps > 0
        good = np.ones(self._floors.first_ns.shape, bool)
        for slo in self._requests.question.per_request:
            columns = several if slo.metric == "tpot" else slice(None)
            good[:, columns] &= self._latency_s(slo.metric) <= slo.limit
        return np.asarray(good.sum(axis=1))

    def _between_tokens(self, statistic: str, limit: float) -> Floats:
        """Of the gaps between tokens: their mean is known, else each is as long as one batch of its part at least."""
        floors = self._floors
        total = floors.gaps.sum(axis=1)
        if not total.any():
            return np.full(len(total), np.nan)
        if statistic == "mean":
            return np.asarray(floors.rest_ns.sum(axis=1) / total / NS_PER_S)
        least_s = floors.gap_ns / NS_PER_S
        if statistic == "attain":
            return np.asarray((floors.gaps * (least_s <= limit)).sum(axis=1) / total)
        order = np.argsort(least_s, axis=1)
        ends = np.cumsum(np.take_along_axis(floors.gaps, order, axis=1), axis=1)
        rank = np.floor(percent(statistic) / 100 * (total - 1))
        place = (ends <= rank[:, None]).sum(axis=1)
        return np.take_along_axis(least_s, np.take_along_axis(order, place[:, None], axis=1), axis=1)[:, 0]


def _statistic(values: Floats, statistic: str, limit: float) -> Floats:
    """A statistic of each row; NaN of no values."""
    if not values.shape[1]:
        return np.full(len(values), np.nan)
    if statistic == "attain":
        return np.asarray((values <= limit).mean(axis=1))
    if statistic == "mean":
        return np.asarray(values.mean(axis=1))
    return np.asarray(np.percentile(values, percent(statistic), axis=1))


def _stacked(parts: Sequence[Part], of: str) -> NDArray[Any]:
    """A field of each part, one after the other."""
    return np.stack([np.asarray(getattr(part, of)) for part in parts])


def blocks(items: Iterable[Item], requests: int) -> Iterator[list[Item]]:
    """So many items at a time as memory is meant for."""
    rest = iter(items)
    while block := list(islice(rest, max(1, BLOCK // requests))):
        yield block
