"""From a question to the best plan and its certificate: enumerate, bound, simulate, prove."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import numpy as np

from apex_opt.cost import CostModel, PlanCost, Usage, account
from apex_opt.errors import CapacityError
from apex_opt.evaluate import FAMILIES, Instance, violations
from apex_opt.plan.layout import Layout
from apex_opt.plan.memory import StageMemory, kv_blocks, stage_memory
from apex_opt.search.advice import nearest_violation
from apex_opt.search.bounds import isolated
from apex_opt.simulator import simulate
from apex_opt.simulator.metrics import Metrics, measure
from apex_opt.simulator.stop import Stop
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.cluster.types import Cluster
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.ir.model import Model
    from apex_opt.plan.engine import EngineSettings
    from apex_opt.plan.plan import Plan
    from apex_opt.search.objective import Objective
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.outcome import Outcome, Routing
    from apex_opt.simulator.stop import Metric
    from apex_opt.workload.slo import Slo
    from apex_opt.workload.trace import Trace

    Progress = Callable[[str, int, int], None]

Status = Literal["optimal", "feasible", "infeasible"]
"""A search ends optimal or infeasible, or feasible where not all plans were seen; one given plan is feasible or
infeasible."""

ROUND: Final = 4
"""Plans simulated side by side before the incumbent is updated; fixed, so that results do not depend on the cores."""

_QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "max": 1.0}

_COUNTED: Final = ("divisibility", "format", "balance")


class Enumeration(Protocol):
    """Plans and whether they are all."""

    @property
    def plans(self) -> tuple[Plan, ...]: ...
    @property
    def complete(self) -> bool: ...


class Formulation(Protocol):
    """What the search asks of a plan-space program."""

    def count(self, instance: Instance, families: Sequence[str]) -> int: ...

    def enumerate(self, instance: Instance, families: Sequence[str] = ...) -> Enumeration: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Everything an answer depends on.

    Parameters
    ----------
    model, cluster, trace, settings, overhead
    objective : Objective
    slos : tuple of Slo              all must hold
    weight_formats, kv_formats       formats to choose from, paired
    max_devices : int                GPUs a plan may take
    routing : how requests are dealt to replicas
    """

    model: Model
    cluster: Cluster
    trace: Trace
    settings: EngineSettings
    overhead: EngineOverhead
    objective: Objective
    slos: tuple[Slo, ...]
    weight_formats: tuple[str, ...]
    kv_formats: tuple[str, ...]
    max_devices: int
    routing: Routing = "round_robin"

    def instance(self) -> Instance:
        """The constraints' view of the question."""
        # The last token of a request is never computed, so it needs no room in the cache.
        held = int(np.minimum(self.trace.prompt + self.trace.output, self.settings.max_model_len).max()) - 1
        limits = [slo.limit for slo in self.slos if slo.metric == "tpot"]
        decodes = bool((np.minimum(self.trace.output, self.settings.max_model_len - self.trace.prompt) > 1).any())
        return Instance(
            model=self.model,
            cluster=self.cluster,
            settings=self.settings,
            longest_tokens=max(held, 1),
            tpot_limit_ns=round(min(limits) * 1e9) if limits and decodes else None,
            weight_formats=self.weight_formats,
            kv_formats=self.kv_formats,
            max_devices=self.max_devices,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A simulated plan."""

    plan: Plan
    value: float
    metrics: Metrics
    usage: Usage
    memory: tuple[StageMemory, ...]
    bound: float | None
    preemptions: int
    batches: int

    @property
    def meets_slos(self) -> bool:
        return all(self.metrics.slo_met.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """Why no plan of the space is better.

    Parameters
    ----------
    space : int                      plans there are
    infeasible : mapping             plans that break a constraint family, charged to the first in order
    bounded : int                    plans that a lower bound ruled out (of the objective, or of an SLO)
    simulated : int                  plans whose batches were simulated, those cut short included
    cut_short : int                  simulations that ended early, when their own requests had proved that the plan is
                                     worse than those found or misses an SLO
    missed : int                     simulated plans that missed an SLO
    optimal : bool                   every plan is accounted for
    gap : float or None              how far the answer can be from the best, as a share of it; None without an answer
    """

    space: int
    infeasible: dict[str, int]
    bounded: int
    simulated: int
    cut_short: int
    missed: int
    optimal: bool
    gap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The best plan and the runners-up, or why there is none."""

    status: Status
    best: Candidate | None
    candidates: tuple[Candidate, ...]
    certificate: Certificate
    reason: str | None = None


class Evaluator:
    """Scores plans for one question; costs of cells are shared among them."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.costs = CostModel(question.model, question.cluster, question.settings, question.overhead)
        self._floors: dict[tuple[Plan, Layout, tuple[Slo, ...]], Metrics] = {}
        generated = np.minimum(question.trace.output, question.settings.max_model_len - question.trace.prompt)
        self._decoding = int((generated > 1).sum())  # requests that have a time per output token

    @property
    def provenance(self) -> dict[str, str]:
        """Where the figures come from, per operation."""
        found = self.costs.provenance
        moe, fp8 = self.question.model.is_moe, "fp8" in self.question.weight_formats
        skipped = {
            name for name in found if (name.startswith("moe") and not moe) or (name.endswith("_fp8") and not fp8)
        }
        if self.question.max_devices <= self.question.cluster.gpus_per_node:
            skipped |= {name for name in found if name.endswith("/inter")}
        return {name: text for name, text in found.items() if name not in skipped}

    def settings_for(self, plan: Plan) -> EngineSettings:
        """Engine settings of a plan: on several stages other sequences fill the pipeline, not a batch formed ahead."""
        settings = self.question.settings
        return settings if plan.stages == 1 else replace(settings, async_scheduling=False)

    def floor(self, plan: Plan) -> Metrics:
        """Metrics that no run of the plan can beat; the same for any number of replicas."""
        key = replace(plan, replicas=1), Layout.of(plan, self.question.cluster), self.question.slos
        if key not in self._floors:
            cost = self.costs.plan_cost(plan)
            self._floors[key] = self._measure(isolated(self.settings_for(plan), cost.laws, self.question.trace), cost)
        return self._floors[key]

    def bound(self, plan: Plan) -> tuple[float, bool]:
        """A lower bound on the plan's cost (the objective, signed), and whether the SLOs can still hold."""
        question = self.question
        metrics = self.floor(plan)
        idle_j = self.costs.profile.power.idle_w * plan.devices * metrics.makespan_s
        usage = Usage(energy_j=idle_j, idle_energy_j=idle_j, mfu=0.0, mbu=0.0, operations_s={})
        value = question.objective.value(metrics, usage)
        return question.objective.cost(value), all(metrics.slo_met.values())

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
        memory = stage_memory(question.model, question.cluster.gpu, plan, question.settings)
        stops = [] if worst == float("inf") else self._stops(plan, worst, cost.request_ns / NS_PER_S)
        outcome = self._run(plan, cost, memory, stops=stops)
        if outcome.stopped:
            return None
        metrics = self._measure(outcome, cost)
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

    def batches(self, plan: Plan) -> tuple[Outcome, tuple[BatchLaw, ...]]:
        """A run of the plan that keeps every batch, and the laws of its stages."""
        cost = self.costs.plan_cost(plan)
        memory = stage_memory(self.question.model, self.question.cluster.gpu, plan, self.question.settings)
        return self._run(plan, cost, memory, log=True), cost.laws

    def _run(
        self, plan: Plan, cost: PlanCost, memory: Sequence[StageMemory], stops: Sequence[Stop] = (), log: bool = False
    ) -> Outcome:
        settings, trace = self.settings_for(plan), self.question.trace
        return simulate(
            settings,
            kv_blocks(memory) * plan.attention.dp,
            cost.laws,
            trace,
            replicas=plan.replicas,
            routing=self.question.routing,
            log=log,
            stops=stops,
            floors=isolated(settings, cost.laws, trace) if stops else None,
        )

    def _stops(self, plan: Plan, worst: float, request_s: float) -> list[Stop]:
        """What proves that a plan misses an SLO, or that its objective is worse than a cost."""
        question = self.question
        stops = []
        for slo in question.slos:
            if slo.metric == "throughput":
                stops.append(self._slower_than(len(question.trace) / slo.limit))
            else:
                stops += self._latency_stop(slo.metric, slo.statistic, slo.limit, slo.fraction, request_s)
        name = question.objective.name
        if name == "makespan":
            stops.append(self._slower_than(worst))
        elif name == "throughput":
            stops.append(self._slower_than(len(question.trace) / -worst))
        elif name == "energy":
            stops.append(self._slower_than(worst / (self.costs.profile.power.idle_w * plan.devices)))
        else:
            metric, statistic = name.split("_")
            stops += self._latency_stop(metric, statistic, worst, None, request_s)
        return stops

    def _slower_than(self, makespan_s: float) -> Stop:
        return Stop.percentile_above("makespan", makespan_s, 1.0, len(self.question.trace))

    def _latency_stop(
        self, metric: str, statistic: str, limit_s: float, fraction: float | None, request_s: float
    ) -> list[Stop]:
        """A statistic of a latency above a limit; nothing where no request has this latency."""
        which: Metric = "ttft" if metric == "ttft" else "tpot" if metric == "tpot" else "e2e"
        requests = self._decoding if metric == "tpot" else len(self.question.trace)
        if not requests:
            return []
        inside_s = limit_s if metric == "tpot" else limit_s - request_s  # the simulator does not see the way in and out
        if statistic == "mean":
            return [Stop.mean_above(which, inside_s, requests)]
        if fraction is not None:
            return [Stop.attainment_below(which, inside_s, fraction, requests)]
        return [Stop.percentile_above(which, inside_s, _QUANTILES[statistic], requests)]

    def _measure(self, outcome: Outcome, cost: PlanCost) -> Metrics:
        question = self.question
        return measure(
            outcome,
            question.trace,
            max_model_len=question.settings.max_model_len,
            request_ns=cost.request_ns,
            slos=question.slos,
        )


def search(question: Question, formulation: Formulation, progress: Progress | None = None, top: int = 1) -> Answer:
    """The best plan for a question, with its certificate, and the next best.

    All feasible plans are enumerated, bounded and simulated best bound first, until the next bound is no better than
    the `top`-th best plan found. So the answer is the optimum of the space, unless the enumeration was cut short.

    Parameters
    ----------
    question : Question
    formulation : Formulation        the program that enumerates feasible plans
    progress : callable, optional    told (what, done, total) along the way
    top : int                        best plans to find, each exactly

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    tell = progress or _silent
    _check_lengths(question)
    instance = question.instance()
    tell("enumerating plans", 0, 0)
    counts, enumeration = _enumerate(instance, formulation)
    evaluator = Evaluator(question)
    queue: list[tuple[float, int, Plan]] = []
    bounded = 0
    # Plans of the same cut share their tables while these are still there.
    alike = sorted(enumerate(enumeration.plans), key=lambda item: _cut(item[1]))
    for done_already, (index, plan) in enumerate(alike):
        tell("bounding plans", done_already, len(alike))
        bound, possible = evaluator.bound(plan)
        bounded += not possible
        if possible:
            queue.append((bound, index, plan))
    queue.sort(key=lambda item: item[:2])
    done, cut_short = _simulate(queue, evaluator, tell, top)
    ranked = sorted((c for c in done if c.meets_slos), key=lambda c: _rank(question, c))
    best = ranked[0] if ranked else None
    left = len(queue) - len(done) - cut_short
    certificate = Certificate(
        space=counts.pop("space"),
        infeasible=counts,
        bounded=bounded + left,
        simulated=len(done) + cut_short,
        cut_short=cut_short,
        missed=sum(not c.meets_slos for c in done),
        optimal=enumeration.complete,
        gap=(0.0 if enumeration.complete else None) if best else None,
    )
    if best is None:
        closest = min(done, key=lambda c: _miss(question, c), default=None)
        reason = _why_not(question, instance, enumeration.plans, closest, evaluator)
        return Answer(status="infeasible", best=None, candidates=(), certificate=certificate, reason=reason)
    status: Status = "optimal" if enumeration.complete else "feasible"
    return Answer(status=status, best=ranked[0], candidates=tuple(ranked), certificate=certificate)


def judge(question: Question, plan: Plan, progress: Progress | None = None) -> Answer:
    """Score one given plan; infeasible where it cannot run, feasible otherwise, with the SLOs it misses.

    Raises
    ------
    CapacityError    a request that no plan of this model could serve
    """
    _check_lengths(question)
    broken = violations(question.instance(), plan)
    # Balance and bandwidth keep hopeless plans out of a search; a plan that is asked for is simulated all the same.
    fatal = [v for v in broken if v.family not in ("balance", "bandwidth")]
    nothing = Certificate(
        space=1,
        infeasible=dict.fromkeys(FAMILIES, 0),
        bounded=0,
        simulated=0,
        cut_short=0,
        missed=0,
        optimal=True,
        gap=None,
    )
    if fatal:
        infeasible = {**nothing.infeasible, fatal[0].family: 1}
        reason = f"{plan} cannot run: " + "; ".join(f"{v.family}: {v.text}" for v in fatal)
        return Answer(
            status="infeasible",
            best=None,
            candidates=(),
            certificate=replace(nothing, infeasible=infeasible),
            reason=reason,
        )
    tell = progress or _silent
    _tell_compiling(tell)
    tell("simulating the plan", 0, 1)
    evaluator = Evaluator(question)
    candidate = evaluator.simulate(plan, evaluator.bound(plan)[0])
    certificate = replace(nothing, simulated=1, missed=int(not candidate.meets_slos), gap=0.0)
    return Answer(status="feasible", best=candidate, candidates=(candidate,), certificate=certificate)


def _simulate(
    queue: Sequence[tuple[float, int, Plan]], evaluator: Evaluator, tell: Progress, top: int
) -> tuple[list[Candidate], int]:
    """Score plans best bound first, a round at a time, until no bound can beat the `top`-th best.

    Returns those with a score, and how many were cut short.
    """
    question = evaluator.question
    done: list[Candidate] = []
    cut_short = position = 0
    worst = float("inf")
    if queue:
        _tell_compiling(tell)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        while position < len(queue):
            batch = [item for item in queue[position : position + ROUND] if item[0] <= worst]
            if not batch:
                break
            position += len(batch)
            for candidate in pool.map(partial(_challenge, evaluator, worst), batch):
                if candidate is None:
                    cut_short += 1
                else:
                    done.append(candidate)
                tell("simulating plans", len(done) + cut_short, len(queue))
            good = sorted(question.objective.cost(c.value) for c in done if c.meets_slos)
            worst = good[top - 1] if len(good) >= top else float("inf")
    return done, cut_short


def _challenge(evaluator: Evaluator, worst: float, item: tuple[float, int, Plan]) -> Candidate | None:
    bound, _, plan = item
    return evaluator.challenge(plan, bound, worst)


def _cut(plan: Plan) -> tuple[Any, ...]:
    """Plans equal in this differ in their number of replicas only."""
    return plan.stage_devices, plan.attention, plan.ffn, plan.weight_format, plan.kv_format, plan.stages, plan.replicas


def _enumerate(instance: Instance, formulation: Formulation) -> tuple[dict[str, int], Enumeration]:
    """Feasible plans, and how many of the space each constraint family takes away in turn."""
    left = formulation.count(instance, ())
    counts = {"space": left}
    for index, family in enumerate(_COUNTED):
        after = formulation.count(instance, _COUNTED[: index + 1])
        counts[family] = left - after
        left = after
    feasible = formulation.enumerate(instance)
    held = feasible
    if instance.tpot_limit_ns is not None:
        held = formulation.enumerate(instance, [f for f in FAMILIES if f != "bandwidth"])
    counts["memory"] = left - len(held.plans)
    counts["bandwidth"] = len(held.plans) - len(feasible.plans)
    return counts, feasible


def _check_lengths(question: Question) -> None:
    """Refuse a prompt that fills the model's length by itself: no plan helps."""
    longest = int(question.trace.prompt.max())
    if longest >= question.settings.max_model_len:
        raise CapacityError(
            f"request {int(question.trace.prompt.argmax())}: a prompt of {longest} tokens leaves no room to answer "
            f"within max_model_len {question.settings.max_model_len}; {question.model.name} is made for "
            f"{question.model.max_position} tokens: raise max_model_len, or use another model or a trace with shorter "
            "prompts"
        )


def _rank(question: Question, candidate: Candidate) -> tuple[float, int, str]:
    """Better first: objective, then fewer GPUs, then the text form, so that ties fall the same way every time."""
    return question.objective.cost(candidate.value), candidate.plan.devices, str(candidate.plan)


def _miss(question: Question, candidate: Candidate) -> float:
    """How far a plan is from the goals it misses: the worst relative excess."""
    missed = (slo for slo in question.slos if not candidate.metrics.slo_met[slo.text])
    return max((-slo.margin(judged(candidate.metrics, slo)) for slo in missed), default=0.0)


def judged(metrics: Metrics, slo: Slo) -> float:
    """The figure of a run that a goal is compared with."""
    if slo.metric == "throughput":
        return metrics.requests_per_s
    if slo.statistic == "attain":
        return metrics.attainment[slo.text]
    return metrics.latency_s[slo.metric][slo.statistic]


def _why_not(
    question: Question,
    instance: Instance,
    plans: Sequence[Plan],
    closest: Candidate | None,
    evaluator: Evaluator,
) -> str:
    """One sentence on why there is no answer, with the numbers of the plan that comes closest."""
    if not plans:
        return nearest_violation(instance)
    if closest is None:
        # Every plan was ruled out by a bound; the one with the least bound shows by how much.
        first = min(plans, key=lambda plan: evaluator.bound(plan)[0])
        closest = evaluator.simulate(first)
    missed = [
        f"{slo.text} (it reaches {_figure(slo, judged(closest.metrics, slo))})"
        for slo in question.slos
        if not closest.metrics.slo_met[slo.text]
    ]
    return (
        f"no feasible plan meets the SLOs; the closest, {closest.plan}, misses {' and '.join(missed)}: "
        "relax these, offer more or faster GPUs, or lighten the trace"
    )


def _figure(slo: Slo, value: float) -> str:
    if slo.metric == "throughput":
        return f"{value:.3g} requests/s"
    return f"{value:.1%}" if slo.statistic == "attain" else f"{value * 1e3:.4g} ms"


def _tell_compiling(tell: Progress) -> None:
    """Say that the first simulation will take longer, where it will."""
    from apex_opt.simulator.pack import needs_compiling

    if needs_compiling():
        tell("compiling the simulator, once on this machine: 10 to 30 s", 0, 0)


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody."""
