"""Fleets: replicas on GPUs of several types side by side, each type with a plan of its own.

A pool is the GPUs of one type, with a question of its own. A fleet is simulated exactly: requests are dealt to its
parts (`dealing`), each part serves its own, and the runs are put together and measured as one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import inf
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cost import account
from apex_opt.figures.measure import ROUNDING, measure
from apex_opt.figures.stops import Facts, Stop, early_stops, latencies_ns
from apex_opt.plan.memory import kv_blocks
from apex_opt.search.dealing import clients_of, dealt, merged
from apex_opt.simulator import simulate
from apex_opt.simulator.outcome import BatchCounts, Outcome
from apex_opt.simulator.transient import Transient
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.cost import Usage
    from apex_opt.figures.measure import Metrics
    from apex_opt.plan.memory import StageMemory
    from apex_opt.plan.plan import Plan
    from apex_opt.search.evaluator import Evaluator
    from apex_opt.search.fleet_parts import Part
    from apex_opt.workload.trace import Trace

    Costs = tuple[float, ...]

KEPT: Final = 256
"""Plans of a pool whose laws are kept: some hundreds of kB each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPart:
    """What one type of GPU does in a fleet.

    Parameters
    ----------
    pool : int          its place among the questions; of a pipeline over several types that of the first
    gpu : str           the type, or those of its stages in turn
    requests : int      requests it serves
    usage : Usage       over its GPUs, for as long as the fleet runs
    """

    pool: int
    gpu: str
    plan: Plan
    requests: int
    usage: Usage
    memory: tuple[StageMemory, ...]
    preemptions: int
    batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """A simulated fleet: a plan on each of some types of GPU, or on one of them alone."""

    parts: tuple[FleetPart, ...]
    value: float
    metrics: Metrics
    transient: Transient
    bound: float | None

    @property
    def devices(self) -> int:
        return sum(part.plan.devices for part in self.parts)

    @property
    def text(self) -> str:
        """A plan for each type of GPU."""
        return " + ".join(f"{part.gpu}: {part.plan}" for part in self.parts)

    @property
    def meets_slos(self) -> bool:
        return all(self.metrics.slo_met.values())


class FleetEvaluator:
    """Scores fleets over the pools of some evaluators."""

    def __init__(self, evaluators: Sequence[Evaluator]) -> None:
        self._evaluators = evaluators
        self._question = evaluators[0].question  # the pools' questions differ in their GPUs alone
        self._generated = self._question.trace.generated(self._question.settings.max_model_len)
        self._costs = [lru_cache(maxsize=KEPT)(evaluator.costs.plan_cost) for evaluator in evaluators]

    def simulate(self, pools: Sequence[int], parts: Sequence[Part]) -> Fleet:
        """Score one fleet exactly: a part of each of some pools, each with a request and in closed loops a client."""
        fleet = self.challenge(pools, parts, (), (inf,))
        assert fleet is not None  # nothing to cut it short
        return fleet

    def challenge(self, pools: Sequence[int], parts: Sequence[Part], bounds: Costs, worst: Costs) -> Fleet | None:
        """Score one fleet exactly, or find that it misses an SLO or costs more than `worst` (None).

        The parts run one after the other. What the one that runs may take before a limit of the fleet is passed is what
        those before it have left over, less the floors of those after it.
        """
        question, trace = self._question, self._question.trace
        weights = [part.weight for part in parts]
        owner = dealt(np.array([weights]), len(trace))[0]
        rows = [np.flatnonzero(owner == index) for index in range(len(parts))]
        clients = None if trace.concurrency is None else clients_of(weights, trace.concurrency)
        stops = [] if worst[0] == inf else self._stops(parts, rows, bounds, worst)
        known = _Known(trace, self._generated, parts, rows)
        runs: list[tuple[NDArray[np.int64], Outcome]] = []
        for index, (pool, part, mine) in enumerate(zip(pools, parts, rows, strict=True)):
            left = known.left(stops, mine)
            if left is None:
                return None
            own, plan = self._evaluators[pool].question, part.plan
            settings, picked = own.settings_for(plan), trace.picked(mine, clients[index] if clients else None)
            run = simulate(
                settings,
                kv_blocks(part.memory) * plan.attention.dp,
                self._costs[pool](plan).laws,
                picked,
                replicas=plan.replicas,
                routing=own.routing,
                gaps=question.asks_gaps,
                stops=left,
                floors=known.floors(mine, BatchCounts.empty(settings)) if left else None,
            )
            if run.stopped:
                return None
            known.seen(mine, run)
            runs.append((mine, run))
        return self._measured(pools, parts, runs, bounds[0] if bounds else None)

    def _measured(
        self,
        pools: Sequence[int],
        parts: Sequence[Part],
        runs: Sequence[tuple[NDArray[np.int64], Outcome]],
        bound: float | None,
    ) -> Fleet:
        """The figures of a fleet's runs: its GPUs idle from its first request to its last token."""
        question, found = self._question, []
        whole = merged(question.settings, question.trace, runs)
        for pool, part, (mine, run) in zip(pools, parts, runs, strict=True):
            costs = self._evaluators[pool].costs
            usage = account(part.plan, self._costs[pool](part.plan), costs, replace(whole, counts=run.counts))
            found.append(
                FleetPart(
                    pool=pool,
                    gpu=self._evaluators[pool].question.cluster.gpu.name,
                    plan=part.plan,
                    requests=len(mine),
                    usage=usage,
                    memory=part.memory,
                    preemptions=run.preemptions,
                    batches=run.batches,
                )
            )
        cost_per_h = sum(part.cost_per_h for part in parts)
        request_ns = self._evaluators[0].costs.request_ns
        served = whole.as_run(
            question.trace,
            question.settings.max_model_len,
            outside_ns=request_ns,
            limits=question.per_request,
            joules=sum(part.usage.energy_j for part in found),
            cost_per_h=None if cost_per_h != cost_per_h else cost_per_h,
        )
        metrics = measure(served, question.goals, percentiles=question.percentiles, cached_tokens=whole.cached_tokens)
        return Fleet(
            parts=tuple(found),
            value=question.objective.value(metrics),
            metrics=metrics,
            transient=Transient.of(whole, request_ns, closed=question.trace.concurrency is not None),
            bound=bound,
        )

    def _stops(
        self, parts: Sequence[Part], rows: Sequence[NDArray[np.int64]], bounds: Costs, worst: Costs
    ) -> list[Stop]:
        """What proves that a fleet misses an SLO, or that its objectives are worse than some costs."""
        question, generated = self._question, self._generated
        computed = generated - 1 + (0 if question.settings.prefix_caching else question.trace.prompt)
        cost_per_h = sum(part.cost_per_h for part in parts)
        facts = Facts(
            requests=len(generated),
            decoding=int((generated > 1).sum()),
            output_tokens=int(generated.sum()),
            request_s=self._evaluators[0].costs.request_ns / NS_PER_S,
            least_j=sum(part.token_j * int(computed[mine].sum()) for part, mine in zip(parts, rows, strict=True))
            * (1 - ROUNDING),
            idle_w=sum(part.idle_w for part in parts),
            # Least where one of them draws all it may and the others idle.
            limit_w=sum(part.idle_w for part in parts) + min(part.limit_w - part.idle_w for part in parts),
            cost_per_h=None if cost_per_h != cost_per_h else cost_per_h,
        )
        stops = []
        for goal in question.goals:
            stops += early_stops(goal.metric, goal.statistic, goal.limit, facts, goal.fraction)
        for objective, cost, bound in zip(question.objectives, worst, bounds, strict=True):
            stops += early_stops(objective.metric, objective.statistic, objective.signed(cost), facts)
            if bound < cost:
                break  # better by this one, it may be worse by the next
        return stops


class _Known:
    """When the requests of a fleet are answered: as simulated where that is known, else as early as could be."""

    def __init__(
        self,
        trace: Trace,
        generated: NDArray[np.int64],
        parts: Sequence[Part],
        rows: Sequence[NDArray[np.int64]],
    ) -> None:
        self._trace, self._generated = trace, generated
        self._arrival = trace.arrival_ns.copy()
        self._first, self._finish = np.empty_like(self._arrival), np.empty_like(self._arrival)
        for part, mine in zip(parts, rows, strict=True):
            self._first[mine] = self._arrival[mine] + part.first_ns[mine]
            self._finish[mine] = self._first[mine] + part.rest_ns[mine]

    def floors(self, mine: NDArray[np.int64], counts: BatchCounts) -> Outcome:
        """Times of some requests in the form of a run."""
        return Outcome(
            arrival_ns=self._arrival[mine],
            first_token_ns=self._first[mine],
            finish_ns=self._finish[mine],
            preemptions=0,
            batches=0,
            busy_ns=np.zeros((1, 1), np.int64),
            counts=counts,
        )

    def seen(self, mine: NDArray[np.int64], run: Outcome) -> None:
        """Take the times of a run of some requests."""
        self._arrival[mine], self._first[mine], self._finish[mine] = run.arrival_ns, run.first_token_ns, run.finish_ns

    def left(self, stops: Sequence[Stop], mine: NDArray[np.int64]) -> list[Stop] | None:
        """What limits of all requests leave for some of them; None where one is passed already."""
        found = []
        for stop in stops:
            values = latencies_ns(stop.metric, self._arrival, self._first, self._finish, self._generated)
            if stop.passed(values):
                return None
            others, limit_ns, most = np.delete(values, mine), stop.limit_ns, stop.most
            if stop.kind == "sum":
                limit_ns -= int(others.sum())
            else:
                most -= int((others > limit_ns).sum())
            if stop.metric == "makespan":
                # The run of the part begins with its own first request.
                limit_ns = max(0, limit_ns - int(self._trace.arrival_ns[mine[0]] - self._trace.arrival_ns[0]))
            found.append(replace(stop, limit_ns=limit_ns, most=most))
        return found
