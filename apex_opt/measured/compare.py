"""Measured runs against their simulation: errors run by run, in total, and what could not be compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from math import nan
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import numpy as np

from apex_opt.cluster import load_cluster
from apex_opt.cluster.tree import Tree
from apex_opt.cost import CostModel, account, idle_w
from apex_opt.cost.engine import load_engine
from apex_opt.cost.handover import handover
from apex_opt.engines import load_kind
from apex_opt.errors import ApexError
from apex_opt.figures.measure import measure
from apex_opt.ir.formats import get_format
from apex_opt.measured.names import find_model
from apex_opt.measured.runs import METRICS, MeasuredRun, UnusableRun
from apex_opt.measured.steps import StepTimes, step_times
from apex_opt.oracle.checks import violations
from apex_opt.oracle.instance import Instance
from apex_opt.placement.pools import link_between
from apex_opt.plans.deployment import Deployment, Pool
from apex_opt.plans.engine import limited, schedulers
from apex_opt.plans.memory import kv_blocks, settings_of, stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.profiles import SHIPPED
from apex_opt.simulator import EnginePool, run_deployment, run_disaggregated
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from apex_opt.cluster.types import Cluster
    from apex_opt.cost import PlanCost, Usage
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.figures.metrics import Metrics
    from apex_opt.ir.model import Model
    from apex_opt.measured.runs import Answering, Run
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator import Outcome
    from apex_opt.workload.trace import Trace

T = TypeVar("T")

_KEPT: Final = 4
"""Cost models kept: each holds tables of some ten MB, and runs of one kind come together."""

_NOT_OF_A_RUN: Final = ("devices", "balance", "bandwidth")
"""Constraint families that say what a good plan is, not what an engine runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the simulation of one run gave.

    Parameters
    ----------
    plan : Plan or Deployment    the latter where prompts are handed over
    values : mapping             keys of `METRICS`, all of them that are defined
    operations_s : mapping       mean time per GPU in each operation, "idle" the rest
    sample : 4 numbers           per GPU, from time 0: seconds, FLOP in 16 bit, FLOP in fewer, bytes moved
    preemptions, batches : int
    steps : tuple of StepTimes   measured steps against the batch law, where the run has a log
    steps_left_out : int         steps of the log that could not be told
    """

    plan: Plan | Deployment
    values: Mapping[str, float]
    operations_s: Mapping[str, float]
    sample: tuple[float, float, float, float]
    preemptions: int
    batches: int
    steps: tuple[StepTimes, ...] = ()
    steps_left_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A run and its prediction, or why there is none.

    Parameters
    ----------
    run : MeasuredRun or UnusableRun
    prediction : Prediction or None
    reason, detail : str            why there is none: its sort, and the figures of this run
    model : str                     name of the model, or "" where it is none that we can describe
    """

    run: Run
    prediction: Prediction | None = None
    reason: str = ""
    detail: str = ""
    model: str = ""

    def errors_pct(self, *, all_of_them: bool) -> dict[str, float]:
        """Signed error of every metric measured and predicted; without those set aside unless `all_of_them`."""
        run, prediction = self.run, self.prediction
        if prediction is None or not isinstance(run, MeasuredRun):
            return {}
        return {
            metric: 100 * (prediction.values[metric] / value - 1)
            for metric, value in run.measured.items()
            if metric in prediction.values and (all_of_them or metric not in run.set_aside)
        }


class _Refused(Exception):
    """A run that cannot be simulated: the sort of reason, and the figures."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class Predictor:
    """Simulates measured runs; what they have in common is computed once.

    `overheads` stand in for engines of the shipped table. `provenance` gathers where the figures of all runs come from,
    per GPU and operation.
    """

    def __init__(self, overheads: Mapping[str, EngineOverhead] | None = None, profiles: str = SHIPPED) -> None:
        self.provenance: dict[str, str] = {}
        self._overheads = overheads or {}
        self._profiles = profiles
        self._costs = lru_cache(maxsize=_KEPT)(self._cost_model)
        self._known: dict[tuple[object, ...], Prediction] = {}

    def _cost_model(
        self, model: Model, cluster: Cluster, settings: EngineSettings, overhead: EngineOverhead
    ) -> CostModel:
        return CostModel(model, cluster, settings, overhead, profiles=self._profiles)

    def compare(self, runs: Sequence[Run], progress: Callable[[str, int, int], None]) -> tuple[Comparison, ...]:
        """Every run with its prediction, in the order given; those alike are simulated one after another."""
        found: dict[int, Comparison] = {}
        order = sorted(range(len(runs)), key=lambda i: _likeness(runs[i]))
        for done, i in enumerate(order):
            progress("simulating measured runs", done, len(runs))
            found[i] = self._one(runs[i])
        return tuple(found[i] for i in range(len(runs)))

    def _one(self, run: Run) -> Comparison:
        try:
            model = find_model(run.model)
        except ApexError as error:
            return Comparison(run=run, reason=f"model not described: {run.model}", detail=str(error))
        if isinstance(run, UnusableRun):
            return Comparison(run=run, reason=run.reason, detail=run.detail, model=model.name)
        # Tables list many a measurement more than once.
        same = (*_likeness(run), run.trace, run.kv_blocks, run.share_of, run.captured_tokens)
        try:
            if same not in self._known:
                self._known[same] = self._predict(run, model)
            return Comparison(run=run, prediction=self._known[same], model=model.name)
        except _Refused as refused:
            return Comparison(run=run, reason=refused.reason, detail=refused.detail, model=model.name)

    def _predict(self, run: MeasuredRun, model: Model) -> Prediction:
        """Simulate one run as it was served.

        Raises
        ------
        _Refused    anything of it that is not known or does not fit
        """
        cluster = _loaded("GPU not in the catalogue", lambda: load_cluster(run.cluster))
        overhead = self._overheads.get(run.engine) or _loaded("engine not described", lambda: load_engine(run.engine))
        if run.captured_tokens is not None:
            overhead = replace(overhead, captured_tokens=run.captured_tokens)
        served = _served(run.trace, overhead)
        own = self._started(run, model, cluster, overhead)
        if run.answering is not None:
            return self._handed_over(run, run.answering, own, served)
        plan, pool, costs, cost = own.plan, own.pool, own.costs, own.cost
        settings = pool.settings
        outcome = _loaded("request beyond the engine's limits", lambda: run_deployment([pool], served))
        request_ns = cost.request_ns + served.pause_ns
        metrics = measure(outcome.as_run(run.trace, settings.max_model_len, outside_ns=request_ns))
        usage = account(plan, cost, costs, outcome.counts, outcome.makespan_ns, outcome.pools[0].shared)
        steps: tuple[StepTimes, ...] = ()
        left_out = 0
        if run.iterations is not None and plan.stages == 1:
            steps, left_out = step_times(run.iterations, settings, cost.laws[0])
        # The measured window begins at time 0, with an idle engine.
        makespan_s = (outcome.makespan_ns + cost.request_ns) / NS_PER_S
        lead_s = int(outcome.arrival_ns.min()) / NS_PER_S
        lead_j = idle_w(costs, plan) * lead_s
        return Prediction(
            plan=plan,
            values=_values(run, metrics, usage.energy_j + lead_j, outcome),
            operations_s=usage.operations_s,
            sample=(lead_s + makespan_s, *_work(plan, usage, makespan_s, cluster)),
            preemptions=outcome.preemptions,
            batches=outcome.batches,
            steps=steps,
            steps_left_out=left_out,
        )

    def _started(self, run: MeasuredRun, model: Model, cluster: Cluster, overhead: EngineOverhead) -> _Started:
        """The engines of a run's plan, with what their batches take.

        Raises
        ------
        _Refused    as `_predict`
        """
        plan = _loaded("plan that cannot be read", lambda: parse_plan(run.plan, model))
        filled = _filled(run, model, cluster, plan)
        _check(run, filled, model, cluster, plan)
        # On several stages other sequences fill the pipeline, not a batch formed ahead.
        settings = settings_of(model, run.settings, plan)
        if plan.stages > 1:
            settings = replace(settings, async_scheduling=False)
        costs = _loaded("operations without figures", lambda: self._costs(model, cluster, run.settings, overhead))
        cost = _loaded("operations without figures", lambda: costs.plan_cost(plan))
        self.provenance |= {f"{cluster.gpu.name}, {name}": text for name, text in costs.provenance.items()}
        memory = stage_memory(model, cluster.gpu, plan, limited(filled, plan))
        blocks = kv_blocks(memory) * plan.attention.dp if run.kv_blocks is None else run.kv_blocks
        pool = EnginePool(
            settings=settings,
            blocks=blocks // schedulers(settings, plan),
            laws=cost.laws,
            replicas=plan.replicas,
            ranks=cost.ranks,
        )
        return _Started(plan, pool, costs, cost, memory[0].kv_block_bytes)

    def _handed_over(self, run: MeasuredRun, answering: Answering, first: _Started, served: Trace) -> Prediction:
        """Simulate instances that compute prompts and others that answer them.

        Raises
        ------
        _Refused    as `_predict`
        """
        costs = first.costs
        model, cluster = costs.model, costs.cluster
        times = _loaded("hand-over that is not modelled", lambda: load_kind(run.engine).handing_over())
        settings = answering.settings
        its = replace(run, plan=answering.plan, settings=settings, answering=None, kv_blocks=None)
        then = self._started(its, model, cluster, costs.overhead)
        link = link_between(Tree.of(cluster), first.plan.devices + then.plan.devices)
        sent = handover(times, model, first.plan, then.plan, then.block_bytes, link, joined=True)
        outcome = _loaded(
            "request beyond the engine's limits", lambda: run_disaggregated(first.pool, then.pool, sent, served)
        )
        outside_ns = first.cost.request_ns + served.pause_ns
        metrics = measure(outcome.as_run(run.trace, settings.max_model_len, outside_ns=outside_ns))
        pools = (Pool(plan=first.plan, role="prefill"), Pool(plan=then.plan, role="decode"))
        return Prediction(
            plan=Deployment(pools=pools),
            values=_values(run, metrics, nan, outcome),
            operations_s={},
            sample=(outcome.makespan_ns / NS_PER_S, 0.0, 0.0, 0.0),
            preemptions=outcome.preemptions,
            batches=outcome.batches,
        )


class _Started(NamedTuple):
    """The engines of a plan, and what their batches take; bytes of a KV block on a rank."""

    plan: Plan
    pool: EnginePool
    costs: CostModel
    cost: PlanCost
    block_bytes: int


def _served(trace: Trace, overhead: EngineOverhead) -> Trace:
    """A trace as it comes to the engine: in a closed loop over HTTP requests take a while on their way in."""
    if trace.concurrency is None:
        return trace
    return replace(trace, pause_ns=round(overhead.way_s(trace) * NS_PER_S))


def _work(plan: Plan, usage: Usage, makespan_s: float, cluster: Cluster) -> tuple[float, float, float]:
    """What a power model is fitted on beside time: arithmetic in 16 bit and in fewer, and traffic of one GPU."""
    gpu, form = cluster.gpu, get_format(plan.weight_format)
    # What the GPU expands to 16 bit it computes in 16 bit.
    activation = (form.computed(gpu.supports) or form).activation
    narrow = activation in ("fp8", "fp4", "int8")
    flops = usage.mfu * makespan_s * gpu.peak_flops_per_s(activation if narrow else gpu.half_dtype)
    moved = usage.mbu * makespan_s * gpu.memory_bytes_per_s
    return 0.0 if narrow else flops, flops if narrow else 0.0, moved


def _filled(run: MeasuredRun, model: Model, cluster: Cluster, plan: Plan) -> EngineSettings:
    """Settings of a run with the share of all memory that its engine fills, whatever its own share is of."""
    settings, gpu = run.settings, cluster.gpu
    if run.share_of == "all":
        return settings
    stages = stage_memory(model, gpu, plan, limited(settings, plan))
    share = settings.gpu_memory_utilization
    if run.share_of == "static":
        share += max(stage.workspace_bytes + stage.runtime_bytes for stage in stages) / gpu.memory_bytes
    else:
        beside = max(stage.beside_bytes for stage in stages) / gpu.memory_bytes
        share = beside + max(1 - beside, 0.0) * share
    return replace(settings, gpu_memory_utilization=min(share, 1.0))


def _check(run: MeasuredRun, settings: EngineSettings, model: Model, cluster: Cluster, plan: Plan) -> None:
    """Refuse a plan that cannot be simulated; where the engine said how many KV blocks it had, it did fit."""
    if plan.devices > cluster.size:
        raise _Refused("plan does not fit: devices", f"{plan} takes {plan.devices} of {cluster.size} GPUs")
    held = int(run.settings.room(run.trace).max())
    instance = Instance(
        model=model,
        cluster=cluster,
        settings=settings,
        longest_tokens=max(held, 1),
        weight_formats=(plan.weight_format,),
        kv_formats=(plan.kv_format,),
        max_devices=cluster.size,
    )
    passed = (*_NOT_OF_A_RUN, *(() if run.kv_blocks is None else ("memory",)))
    for violation in violations(instance, plan):
        if violation.family == "format":
            raise _Refused("format the GPU lacks", violation.text)
        if violation.family not in passed:
            raise _Refused(f"plan does not fit: {violation.family}", violation.text)


def _likeness(run: Run) -> tuple[str, ...]:
    """Runs that share tables stand together in this order."""
    if not isinstance(run, MeasuredRun):
        return ("",)
    return (run.engine, run.cluster, run.model, str(run.settings), run.plan, str(run.answering))


def _loaded(reason: str, load: Callable[[], T]) -> T:
    """What is loaded; a run that names something unknown is refused."""
    try:
        return load()
    except ApexError as error:
        raise _Refused(reason, str(error)) from None


def _values(run: MeasuredRun, metrics: Metrics, energy_j: float, outcome: Outcome) -> dict[str, float]:
    """Every metric of a simulated run that is defined."""
    gaps = int((run.trace.generated(run.settings.max_model_len) - 1).sum())
    spent_ns = int((outcome.finish_ns - outcome.first_token_ns).sum())
    latency = metrics.latency_s
    values = {
        "ttft_mean": latency["ttft"]["mean"],
        "ttft_p95": latency["ttft"]["p95"],
        "tpot_mean": latency["tpot"]["mean"],
        "tpot_p95": latency["tpot"]["p95"],
        "itl_mean": spent_ns / gaps / NS_PER_S if gaps else np.nan,
        "e2e_mean": latency["e2e"]["mean"],
        "throughput": metrics.value("throughput"),
        "energy": energy_j,
    }
    return {metric: value for metric, value in values.items() if np.isfinite(value)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Errors of one metric over runs, in percent of the measured value."""

    mean_ape_pct: float
    median_ape_pct: float
    bias_pct: float
    n: int


def summarise(comparisons: Iterable[Comparison], *, all_of_them: bool = False) -> dict[str, Summary]:
    """Mean and median absolute error and the mean signed one, metric by metric, every run weighing the same."""
    errors: dict[str, list[float]] = {}
    for comparison in comparisons:
        for metric, error in comparison.errors_pct(all_of_them=all_of_them).items():
            errors.setdefault(metric, []).append(error)
    return {
        metric: Summary(
            mean_ape_pct=float(np.abs(errors[metric]).mean()),
            median_ape_pct=float(np.median(np.abs(errors[metric]))),
            bias_pct=float(np.mean(errors[metric])),
            n=len(errors[metric]),
        )
        for metric in METRICS
        if metric in errors
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How many runs were predicted, of all and of those whose model we can describe; why the others were not.

    Those set `aside`, as they are not what they say, count as neither. A run may stand in several `rows` of its file.
    """

    predicted: int
    total: int
    rows: int
    supported: int
    aside: int
    reasons: Mapping[str, int]


def _aside(run: Run) -> bool:
    return isinstance(run, UnusableRun) and run.aside


def coverage(comparisons: Sequence[Comparison]) -> Coverage:
    """Count the runs."""
    return Coverage(
        predicted=sum(c.prediction is not None for c in comparisons),
        total=len(comparisons),
        rows=sum(c.run.rows for c in comparisons),
        supported=sum(bool(c.model) and not _aside(c.run) for c in comparisons),
        aside=sum(_aside(c.run) for c in comparisons),
        reasons=dict(Counter(c.reason for c in comparisons if c.prediction is None).most_common()),
    )
