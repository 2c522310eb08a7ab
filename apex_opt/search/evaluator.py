"""Bounds and scores of plans for one question."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cost import CostModel, JointCosts, PlanCost, account, idle_w, limit_w
from apex_opt.figures.measure import ROUNDING, can_hold, least_signed, measure
from apex_opt.figures.stops import Facts, early_stops
from apex_opt.plan.memory import StageMemory, kv_blocks, least_blocks, most_blocks, stage_memory
from apex_opt.search.answer import Candidate
from apex_opt.search.bounds import StageFloor, isolated, may_preempt
from apex_opt.search.gaps import least_gaps_ns
from apex_opt.search.load import Load, replicas_with_room
from apex_opt.simulator import simulate
from apex_opt.simulator.transient import Transient
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.cost.least import Least
    from apex_opt.figures import Objective
    from apex_opt.figures.run import Run
    from apex_opt.figures.stops import Stop
    from apex_opt.placement import Layouts
    from apex_opt.plan.engine import EngineSettings
    from apex_opt.plan.layout import Layout
    from apex_opt.plan.plan import Plan
    from apex_opt.search.question import Question
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.workload.trace import Trace

    Costs = tuple[float, ...]
    AnyLayout = Layout | tuple[Layout, ...]

_ANY_COST: Final = 1e300


class Evaluator:
    """Scores plans for one question; costs of cells are shared among them.

    The times between tokens are only looked at where the question asks for them, or `gaps` says so: it takes a log.
    """

    def __init__(self, question: Question, *, gaps: bool = False) -> None:
        self._gaps = gaps
        self.question = question
        self.costs = _costs(question)
        self._floors: dict[tuple[Any, ...], Run] = {}
        self._leasts: dict[tuple[Any, ...], Least] = {}
        self._means: dict[tuple[Any, ...], StageFloor] = {}
        self._blocks: dict[tuple[Any, ...], tuple[int, EngineSettings]] = {}
        self._room: dict[tuple[Any, ...], tuple[float, Callable[..., Load]]] = {}
        self._loads: dict[tuple[Any, ...], tuple[Load, float]] = {}
        self._memories: dict[tuple[Any, ...], tuple[StageMemory, ...]] = {}
        self._needed, self._held = question.instance().kv_blocks_needed, question.instance().held
        generated = question.trace.generated(question.settings.max_model_len)
        self._decoding = int((generated > 1).sum())  # requests that have a time per output token
        self._generated = int(generated.sum())

    @property
    def layouts(self) -> Layouts:
        """Layouts of plans on one type of GPU."""
        assert isinstance(self.costs, CostModel)  # joint pipelines are laid out type by type
        return self.costs.layouts

    def provenance(self, plans: Iterable[Plan]) -> dict[str, str]:
        """Where the figures behind the costs of plans come from, per operation, and the price where there is a cost."""
        for plan in plans:
            self.costs.plan_cost(plan)
        if not self.question.tells_cost:
            return self.costs.provenance
        gpu = self.question.cluster.gpu
        source = dict(gpu.sources).get("price_per_h", f"stated for {gpu.name}")
        return self.costs.provenance | {"price": f"${gpu.price_per_h:g} per GPU and hour; {source}"}

    def floor(self, plan: Plan, movable: bool = False) -> Run:
        """What no run of the plan can beat; the same for any number of replicas and split of the layers."""
        return self._alone(plan, self.costs.layouts.best(plan), self._overtaking(plan, movable))

    def _alone(self, plan: Plan, layout: AnyLayout, overtaking: bool) -> Run:
        """What requests take that are each alone."""
        question = self.question
        key = plan.cut, plan.stages, layout, overtaking, question.per_request, self._tells_gaps
        if key not in self._floors:
            settings = question.settings_for(plan)
            floors = [self._mean(plan, layout)] * plan.stages
            alone = isolated(settings, floors, question.trace, overtaking=overtaking)
            if self._tells_gaps:
                gaps_ns = least_gaps_ns(settings, floors, question.trace, overtaking=overtaking)
                alone = replace(alone, gaps_ns=gaps_ns)
            self._floors[key] = self.as_run(alone)
        return self._floors[key]

    def _mean(self, plan: Plan, layout: AnyLayout) -> StageFloor:
        """Mean floor of the stages of a plan."""
        key = plan.cut, plan.stages, layout
        if key not in self._means:
            self._means[key] = StageFloor.mean(self._least_cost(plan, layout), plan.stages, plan.attention.dp)
        return self._means[key]

    def _least_cost(self, plan: Plan, layout: AnyLayout) -> Least:
        """What a batch takes at least; the same for any number of replicas that lie alike."""
        key = plan.cut, plan.stages, layout
        if key not in self._leasts:
            self._leasts[key] = self.costs.least(plan)
        return self._leasts[key]

    def bound(self, plan: Plan) -> tuple[float, bool]:
        """A lower bound on the plan's cost (the objective, signed), and whether the goals can still hold."""
        (bound,), possible = self.bounds(plan, (self.question.objective,))
        return bound, possible

    def _least(self, plan: Plan, movable: bool) -> Run:
        """What no run of the plan can beat: of each request alone, and of all together."""
        question, layout = self.question, self.costs.layouts.best(plan)
        overtaking = self._overtaking(plan, movable)
        alone = self._alone(plan, layout, overtaking)
        cut = plan.cut, plan.layers, layout
        if cut not in self._room:
            blocks = most_blocks(self._memory(plan)) * plan.attention.dp
            engine = question.settings_for(plan), self._mean(plan, layout), plan.stages, question.trace, blocks
            self._room[cut] = replicas_with_room(*engine), partial(Load.of, *engine)
        room, load_of = self._room[cut]
        if plan.replicas >= room * (1 + ROUNDING):
            return alone
        statistics = question.statistics
        key = *cut, overtaking, statistics
        if key not in self._loads:
            load = load_of(statistics, overtaking=overtaking)
            self._loads[key] = load, load.enough(alone)
        load, enough = self._loads[key]
        if plan.replicas > enough * (1 + ROUNDING):
            return alone
        closed = question.trace.concurrency is not None
        return load.added(alone, plan.replicas, closed)

    def _overtaking(self, plan: Plan, movable: bool = False) -> bool:
        """Whether a sequence may be preempted while a batch with it is on its way through a pipeline."""
        if plan.stages == 1:
            return False
        key, question = (plan.cut, plan.layers, movable), self.question
        if key not in self._blocks:
            memory = self._memory(plan)
            blocks = kv_blocks(memory)
            if movable and plan.on:
                blocks = 0  # how full a stage can be is known once the layers are split
            elif movable:
                # The split sought is no heavier than the even one, where that one fits.
                fits = blocks >= self._needed
                blocks = (
                    least_blocks(question.model, plan, memory, question.settings.block_size, self._held) if fits else 0
                )
            self._blocks[key] = blocks * plan.attention.dp, question.settings_for(plan)
        blocks, settings = self._blocks[key]
        dealt = question.routing == "round_robin" and question.trace.concurrency is None
        most = -(-len(question.trace) // plan.replicas) if dealt else None
        return may_preempt(settings, blocks, question.trace, most)

    def bounds(self, plan: Plan, objectives: Sequence[Objective], movable: bool = False) -> tuple[Costs, bool]:
        """Lower bounds on the plan's costs by several objectives, and whether the goals can still hold.

        They hold for every split of the layers; of one that is yet to be found (`movable`) they are as loose as it may
        need.

        Why they are admissible, beyond what `bounds` and `gaps` say of times and the makespan. Every token is computed,
        the GPUs idle for the makespan at least, and the board's limit holds over a run. The GPUs and their price are
        known. So no run has less of anything that figures say they rise or fall with.
        """
        costs = self.costs
        floors = self._least(plan, movable)
        idle_j, most_j = idle_w(costs, plan) * floors.makespan_s, limit_w(costs, plan) * floors.makespan_s
        cost_per_h = self.question.cost_per_h(plan)
        floors = floors.costing(
            joules=np.minimum(idle_j + self._least_joules(plan), most_j) * (1 - ROUNDING),
            cost_per_h=None if cost_per_h is None else np.array([cost_per_h]),
        )
        possible = all(can_hold(goal, floors)[0] for goal in self.question.goals)
        return tuple(float(least_signed(objective, floors)[0]) for objective in objectives), possible

    def _least_joules(self, plan: Plan) -> float:
        """Energy above the idle draw that no run of the plan can do without: every token is computed at least once."""
        least = self._least_cost(plan, self.costs.layouts.best(plan))
        joules = min(least.decode_joules, least.mixed_joules) * plan.stage_devices
        settings, trace = self.question.settings, self.question.trace
        return joules * _computed_tokens(trace, settings.max_model_len, settings.prefix_caching)

    def simulate(self, plan: Plan, bound: float | None = None) -> Candidate:
        """Score one plan exactly.

        Raises
        ------
        CapacityError    a request that the plan's KV cache cannot hold
        """
        candidate = self.challenge(plan, bound, (float("inf"),))
        assert candidate is not None  # nothing to cut it short
        return candidate

    def challenge(self, plan: Plan, bound: float | None, worst: Costs) -> Candidate | None:
        """Score one plan exactly, or find that it misses an SLO or costs more than `worst` (None).

        Costs are compared objective by objective. An infinite one asks for the score whatever it is.

        Raises
        ------
        CapacityError    a request that the plan's KV cache cannot hold
        """
        outcome = self.run(plan, worst)
        return None if outcome is None else self.scored(plan, outcome, bound)

    def run(self, plan: Plan, worst: Costs) -> Outcome | None:
        """Serve the trace by a plan; None where it misses an SLO or costs more than `worst`, as for `challenge`."""
        stops = [] if worst[0] == float("inf") else self._stops(plan, worst)
        cost, memory = self.costs.plan_cost(plan), self._memory(plan)
        outcome = self._run(plan, cost, memory, stops=stops, gaps=self._tells_gaps)
        return None if outcome.stopped else outcome

    def scored(self, plan: Plan, outcome: Outcome, bound: float | None = None) -> Candidate:
        """The figures of a run of the question's trace."""
        question = self.question
        usage = account(plan, self.costs.plan_cost(plan), self.costs, outcome)
        run = self.as_run(outcome, joules=usage.energy_j, cost_per_h=question.cost_per_h(plan))
        metrics = measure(run, question.goals, percentiles=question.percentiles, cached_tokens=outcome.cached_tokens)
        return Candidate(
            plan=plan,
            value=question.objective.value(metrics),
            metrics=metrics,
            transient=Transient.of(outcome, self.costs.request_ns, closed=question.trace.concurrency is not None),
            usage=usage,
            memory=self._memory(plan),
            bound=bound,
            preemptions=outcome.preemptions,
            batches=outcome.batches,
        )

    def holds(self, plan: Plan) -> bool:
        """Whether the KV cache of a plan holds the longest request."""
        return kv_blocks(self._memory(plan)) >= self._needed

    @property
    def any_cost(self) -> Costs:
        """Costs that no plan passes, finite: runs then end once they miss a goal, and for no other reason."""
        return tuple(-1 / _ANY_COST if part.maximise else _ANY_COST for part in self.question.objectives)

    def batches(self, plan: Plan) -> tuple[Outcome, PlanCost]:
        """A run of the plan that keeps every batch, and what it was run with."""
        cost = self.costs.plan_cost(plan)
        return self._run(plan, cost, self._memory(plan), log=True), cost

    @property
    def _tells_gaps(self) -> bool:
        return self._gaps or self.question.asks_gaps

    def _memory(self, plan: Plan) -> tuple[StageMemory, ...]:
        key = plan.cut, plan.layers
        if key not in self._memories:
            question, settings = self.question, self.question.settings_for(plan)
            if not plan.on:
                self._memories[key] = stage_memory(question.model, question.cluster.gpu, plan, settings)
            else:
                gpus = {pool.cluster.gpu.name: pool.cluster.gpu for pool in question.pools}
                names = [name for name, stages in plan.on for _ in range(stages)]
                found = {name: stage_memory(question.model, gpus[name], plan, settings) for name in set(names)}
                self._memories[key] = tuple(found[name][stage] for stage, name in enumerate(names))
        return self._memories[key]

    def _run(
        self,
        plan: Plan,
        cost: PlanCost,
        memory: Sequence[StageMemory],
        stops: Sequence[Stop] = (),
        log: bool = False,
        gaps: bool = False,
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
            gaps=gaps,
            stops=stops,
            floors=isolated(
                settings, [StageFloor.of(law) for law in cost.laws], trace, overtaking=self._overtaking(plan)
            )
            if stops
            else None,
        )

    def _stops(self, plan: Plan, worst: Costs) -> list[Stop]:
        """What proves that a plan misses an SLO, or that its objectives are worse than some costs."""
        question = self.question
        facts = Facts(
            requests=len(question.trace),
            decoding=self._decoding,
            output_tokens=self._generated,
            request_s=self.costs.request_ns / NS_PER_S,
            least_j=self._least_joules(plan) * (1 - ROUNDING),
            idle_w=idle_w(self.costs, plan),
            limit_w=limit_w(self.costs, plan),
            cost_per_h=question.cost_per_h(plan),
        )
        stops = []
        for goal in question.goals:
            stops += early_stops(goal.metric, goal.statistic, goal.limit, facts, goal.fraction)
        if worst == self.any_cost:
            return stops
        bounds, _ = self.bounds(plan, question.objectives)
        for objective, cost, bound in zip(question.objectives, worst, bounds, strict=True):
            stops += early_stops(objective.metric, objective.statistic, objective.signed(cost), facts)
            if bound < cost:
                break  # better by this one, it may be worse by the next
        return stops

    def as_run(self, outcome: Outcome, **known: float | None) -> Run:
        """A run, or what no run can beat, of the question's trace."""
        question = self.question
        return outcome.as_run(
            question.trace,
            question.settings.max_model_len,
            outside_ns=self.costs.request_ns,
            limits=question.per_request,
            **known,
        )


def _costs(question: Question) -> CostModel | JointCosts:
    """The costs of a question's plans, whose stages may be on several types of GPU."""
    models = {
        pool.cluster.gpu.name: CostModel(
            pool.model,
            pool.cluster,
            pool.settings,
            pool.overhead,
            pool.expert_routing,
            pool.profiles,
            tree=pool.tree,
        )
        for pool in question.pools
    }
    if question.between is None:
        return models[question.cluster.gpu.name]
    return JointCosts(models, question.between)


@lru_cache(maxsize=8)
def _computed_tokens(trace: Trace, max_model_len: int, prefix_caching: bool) -> int:
    """Tokens that any run computes: prompts unless a cache may hold them, answers but for their last token."""
    generated = trace.generated(max_model_len)
    return int((generated - 1).sum()) + (0 if prefix_caching else int(trace.prompt.sum()))
