"""Bounds and scores of plans for one question."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from apex_opt.cost import CostModel, PlanCost, Usage, account
from apex_opt.plan.layout import Layout
from apex_opt.plan.memory import StageMemory, kv_blocks, stage_memory
from apex_opt.plan.plan import even_split
from apex_opt.search.answer import Candidate
from apex_opt.search.bounds import StageFloor, isolated
from apex_opt.simulator import simulate
from apex_opt.simulator.metrics import Metrics, measure
from apex_opt.simulator.stop import Stop
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from apex_opt.plan.plan import Plan
    from apex_opt.search.objective import Objective
    from apex_opt.search.question import Question
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.simulator.stop import Metric
    from apex_opt.workload.slo import Slo
    from apex_opt.workload.trace import Trace

_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}


class Evaluator:
    """Scores plans for one question; costs of cells are shared among them."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.costs = CostModel(
            question.model,
            question.cluster,
            question.settings,
            question.overhead,
            question.expert_routing,
            question.profiles,
        )
        self._floors: dict[tuple[Plan, Layout, tuple[Slo, ...]], Metrics] = {}
        generated = question.trace.generated(question.settings.max_model_len)
        self._decoding = int((generated > 1).sum())  # requests that have a time per output token

    def provenance(self, plans: Iterable[Plan]) -> dict[str, str]:
        """Where the figures behind the costs of plans come from, per operation."""
        for plan in plans:
            self.costs.plan_cost(plan)
        return self.costs.provenance

    def floor(self, plan: Plan) -> Metrics:
        """Metrics that no run of the plan can beat; the same for any number of replicas and split of the layers."""
        layers = even_split(self.question.model.layers, plan.stages)
        cut = replace(plan, replicas=1, layers=layers)
        key = cut, Layout.of(plan, self.question.cluster), self.question.slos
        if key not in self._floors:
            mean = StageFloor.mean(self.costs.least(plan), plan.stages, plan.attention.dp)
            alone = isolated(self.question.settings_for(plan), [mean] * plan.stages, self.question.trace)
            self._floors[key] = self._measure(alone)
        return self._floors[key]

    def bound(self, plan: Plan) -> tuple[float, bool]:
        """A lower bound on the plan's cost (the objective, signed), and whether the SLOs can still hold."""
        (bound,), possible = self.bounds(plan, (self.question.objective,))
        return bound, possible

    def bounds(self, plan: Plan, objectives: Sequence[Objective]) -> tuple[tuple[float, ...], bool]:
        """Lower bounds on the plan's costs by several objectives, and whether the SLOs can still hold."""
        metrics = self.floor(plan)
        power = self.costs.profile.power
        idle_j = power.idle_w * plan.devices * metrics.makespan_s
        energy_j = idle_j
        if any(objective.name == "energy" for objective in objectives):
            # The board's limit holds over a run, so its whole draw may be capped; the run is no shorter than its floor.
            most_j = power.limit_w * plan.devices * metrics.makespan_s
            energy_j = min(idle_j + self._least_joules(plan), most_j)
        usage = Usage(energy_j=energy_j, idle_energy_j=idle_j, mfu=0.0, mbu=0.0, operations_s={})
        costs = tuple(objective.cost(objective.value(metrics, usage)) for objective in objectives)
        return costs, all(metrics.slo_met.values())

    def _least_joules(self, plan: Plan) -> float:
        """Energy above the idle draw that no run of the plan can do without: every token is computed at least once."""
        least = self.costs.least(plan)
        joules = min(least.decode_joules, least.mixed_joules) * plan.stage_devices
        settings, trace = self.question.settings, self.question.trace
        return joules * _computed_tokens(trace, settings.max_model_len, settings.prefix_caching)

    def simulate(self, plan: Plan, bound: float | None = None) -> Candidate:
        """Score one plan exactly.

        Raises
        ------
        CapacityError    a request that the plan's KV cache cannot hold
        """
        candidate = self.challenge(plan, bound, float("inf"))
        assert candidate is not None  # nothing to cut it short
        return candidate

    def challenge(self, plan: Plan, bound: float | None, worst: float) -> Candidate | None:
        """Score one plan exactly, or find that it misses an SLO or costs more than `worst` (None).

        An infinite `worst` asks for the score whatever it is.

        Raises
        ------
        CapacityError    a request that the plan's KV cache cannot hold
        """
        question = self.question
        cost = self.costs.plan_cost(plan)
        memory = stage_memory(question.model, question.cluster.gpu, plan, question.settings_for(plan))
        stops = [] if worst == float("inf") else self._stops(plan, worst)
        outcome = self._run(plan, cost, memory, stops=stops)
        if outcome.stopped:
            return None
        metrics = self._measure(outcome)
        usage = account(plan, cost, self.costs, outcome)
        return Candidate(
            plan=plan,
            value=question.objective.value(metrics, usage),
            metrics=metrics,
            usage=usage,
            memory=memory,
            bound=bound,
            preemptions=outcome.preemptions,
            batches=outcome.batches,
        )

    def batches(self, plan: Plan) -> tuple[Outcome, PlanCost]:
        """A run of the plan that keeps every batch, and what it was run with."""
        cost = self.costs.plan_cost(plan)
        memory = stage_memory(self.question.model, self.question.cluster.gpu, plan, self.question.settings_for(plan))
        return self._run(plan, cost, memory, log=True), cost

    def _run(
        self, plan: Plan, cost: PlanCost, memory: Sequence[StageMemory], stops: Sequence[Stop] = (), log: bool = False
    ) -> Outcome:
        settings, trace = self.question.settings_for(plan), self.question.trace
        return simulate(
            settings,
            kv_blocks(memory) * plan.attention.dp,
            cost.laws,
            trace,
            replicas=plan.replicas,
            routing=self.question.routing,
            log=log,
            stops=stops,
            floors=isolated(settings, [StageFloor.of(law) for law in cost.laws], trace) if stops else None,
        )

    def _stops(self, plan: Plan, worst: float) -> list[Stop]:
        """What proves that a plan misses an SLO, or that its objective is worse than a cost."""
        question = self.question
        stops = []
        for slo in question.slos:
            if slo.metric == "throughput":
                stops.append(self._slower_than(len(question.trace) / slo.limit))
            else:
                stops += self._latency_stop(slo.metric, slo.statistic, slo.limit, slo.fraction)
        name = question.objective.name
        if name == "makespan":
            stops.append(self._slower_than(worst))
        elif name == "throughput":
            stops.append(self._slower_than(len(question.trace) / -worst))
        elif name == "energy":
            stops.append(self._slower_than(worst / (self.costs.profile.power.idle_w * plan.devices)))
        else:
            metric, statistic = name.split("_")
            stops += self._latency_stop(metric, statistic, worst, None)
        return stops

    def _slower_than(self, makespan_s: float) -> Stop:
        return Stop.percentile_above("makespan", makespan_s, 1.0, len(self.question.trace))

    def _latency_stop(self, metric: str, statistic: str, limit_s: float, fraction: float | None) -> list[Stop]:
        """A statistic of a latency above a limit; nothing where no request has this latency."""
        which: Metric = "ttft" if metric == "ttft" else "tpot" if metric == "tpot" else "e2e"
        requests = self._decoding if metric == "tpot" else len(self.question.trace)
        if not requests:
            return []
        # The simulator does not see the way in and out.
        inside_s = limit_s if metric == "tpot" else limit_s - self.costs.request_ns / NS_PER_S
        if statistic == "mean":
            return [Stop.mean_above(which, inside_s, requests)]
        if fraction is not None:
            return [Stop.attainment_below(which, inside_s, fraction, requests)]
        return [Stop.percentile_above(which, inside_s, _QUANTILES[statistic], requests)]

    def _measure(self, outcome: Outcome) -> Metrics:
        question = self.question
        return measure(
            outcome,
            question.trace,
            max_model_len=question.settings.max_model_len,
            request_ns=self.costs.request_ns,
            slos=question.slos,
        )


@lru_cache(maxsize=8)
def _computed_tokens(trace: Trace, max_model_len: int, prefix_caching: bool) -> int:
    """Tokens that any run computes: prompts unless a cache may hold them, answers but for their last token."""
    generated = trace.generated(max_model_len)
    return int((generated - 1).sum()) + (0 if prefix_caching else int(trace.prompt.sum()))
