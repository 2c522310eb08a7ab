"""What is known of plans before they run: costs, layouts, memory and what no run can beat, each worked out once."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from apex_opt.cost import CostModel, idle_w, limit_w
from apex_opt.cost.nano import RESOURCES
from apex_opt.cost.ranks import in_step
from apex_opt.engines.overlap import NANO
from apex_opt.figures.measure import can_hold, least_signed
from apex_opt.figures.run import Run
from apex_opt.plans.allotment import allotted
from apex_opt.plans.engine import limited, of_all, schedulers
from apex_opt.plans.memory import StageMemory, kv_blocks, least_blocks, most_blocks, stage_memory
from apex_opt.plans.shares import divisions
from apex_opt.search.bounds import StageFloor, fewest_to_fill, isolated, may_preempt, minds_preemption
from apex_opt.search.bounds.crowding import Batches, Crowd, Crowding, shared_ns
from apex_opt.search.bounds.gaps import least_gaps_ns
from apex_opt.search.bounds.load import Load, replicas_with_room
from apex_opt.search.bounds.phases import WHOLE, Side
from apex_opt.search.ledger import ROUNDING
from apex_opt.simulator.phases import SCALE, Multiplexing, Phases
from apex_opt.units import NS_PER_S, add_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from apex_opt.cost import PlanCost
    from apex_opt.cost.least import Least
    from apex_opt.figures import Goal, Objective
    from apex_opt.placement import Layouts
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan
    from apex_opt.search.ledger import Costs
    from apex_opt.search.problem import Problem
    from apex_opt.workload.trace import Trace

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

KEPT: Final = 256
"""Plans whose laws are kept: some hundreds of kB each."""


class Alike(NamedTuple):
    """A plan of one replica, and numbers of replicas with which it lies alike and has the same floors.

    `movable` says that its layers are yet to be moved.
    """

    plan: Plan
    replicas: tuple[int, ...]
    movable: bool


class Facts:
    """What is known of plans on the GPUs of one type, or of pipelines over two.

    Parameters
    ----------
    problem : Problem      with that type, or these two, on offer
    costs : optional       of the same problem on another trace: they do not depend on it
    """

    def __init__(self, problem: Problem, costs: CostModel | None = None) -> None:
        self.problem = problem
        self.costs = cost_model(problem) if costs is None else costs
        self._plan_cost = lru_cache(maxsize=KEPT)(self.costs.plan_cost)
        self._least: dict[tuple[Any, ...], Least] = {}
        self._means: dict[tuple[Any, ...], StageFloor] = {}
        self._alone: dict[tuple[Any, ...], Run] = {}
        self._loads: dict[tuple[Any, ...], tuple[float, Load | None]] = {}
        self._crowdings: dict[tuple[Any, ...], Crowding] = {}
        # Plans with even layers and with those to be moved come one after the other, and are as crowded.
        self._crowd = lru_cache(maxsize=8)(self._crowd_of)
        self._settings: dict[tuple[Any, ...], EngineSettings] = {}
        self._memory: dict[tuple[Any, ...], tuple[StageMemory, ...]] = {}
        self._sure: dict[tuple[Any, ...], int] = {}
        instance = problem.instance()
        self._asks_mean = any((part.figure.time, part.statistic) == ("whole", "mean") for part in problem.asked)
        self._needed, self._held = instance.blocks_needed, instance.held
        self.generated = problem.trace.generated(problem.settings.max_model_len)

    def plan_cost(self, plan: Plan) -> PlanCost:
        """What the batches of a plan cost, whatever its router."""
        return self._plan_cost(plan if plan.route is None else replace(plan, route=None))

    @property
    def layouts(self) -> Layouts:
        """Layouts of plans on one type of GPU."""
        return self.costs.layouts

    def provenance(self, plans: Iterable[Plan]) -> dict[str, str]:
        """Where the figures behind the costs of plans come from, per operation, and the price where there is a cost."""
        for plan in plans:
            self.costs.plan_cost(plan)
        if not self.problem.tells_cost or self.problem.mixed:
            return self.costs.provenance
        gpu = self.problem.cluster.gpu
        source = dict(gpu.sources).get("price_per_h", f"stated for {gpu.name}")
        return self.costs.provenance | {"price": f"${gpu.price_per_h:g} per GPU and hour; {source}"}

    def memory(self, plan: Plan) -> tuple[StageMemory, ...]:
        """Memory of a GPU of each stage; the same for any number of replicas."""
        key = plan.cut, plan.layers
        if key not in self._memory:
            problem, settings = self.problem, limited(self.problem.settings, plan)
            gpus = {offer.name: offer.cluster.gpu for offer in problem.offers}
            names = [name for name, stages in plan.on for _ in range(stages)] or [problem.offer.name] * plan.stages
            found = {name: stage_memory(problem.model, gpus[name], plan, settings) for name in set(names)}
            self._memory[key] = tuple(found[name][stage] for stage, name in enumerate(names))
        return self._memory[key]

    def settings_for(self, plan: Plan) -> EngineSettings:
        """Engine settings of each scheduler of a plan (`Problem.settings_for`)."""
        key = plan.cut, plan.stages == 1
        if key not in self._settings:
            self._settings[key] = self.problem.settings_for(plan)
        return self._settings[key]

    def blocks(self, plan: Plan) -> int:
        """KV blocks of a replica."""
        return kv_blocks(self.memory(plan)) * plan.attention.dp

    def own_blocks(self, plan: Plan) -> int:
        """KV blocks of each scheduler of a replica."""
        return self.blocks(plan) // schedulers(self.problem.settings, plan)

    def holds(self, plan: Plan) -> bool:
        """Whether the KV cache of a plan holds the longest request."""
        return kv_blocks(self.memory(plan)) >= self._needed(plan)

    def cost_per_h(self, plan: Plan) -> float | None:
        """$ per hour of a plan's GPUs, where their price is stated."""
        prices = {offer.name: offer.cluster.gpu.price_per_h for offer in self.problem.offers}
        if not plan.on:
            price = prices[self.problem.offer.name]
            return None if price is None else price * plan.devices
        parts = [(prices[name], stages) for name, stages in plan.on]
        stage = plan.replicas * plan.stage_devices
        return None if any(price is None for price, _ in parts) else add_up(p * n for p, n in parts if p) * stage

    def least_cost(self, plan: Plan) -> Least:
        """What a batch takes at least on all stages together, however the layers are split."""
        key = plan.cut, plan.stages, self.costs.layouts_of(plan)
        if key not in self._least:
            self._least[key] = self.costs.least(plan)
        return self._least[key]

    def token_j(self, plan: Plan) -> float:
        """Energy above the idle draw that a token takes at least."""
        least = self.least_cost(plan)
        alone = least.verify_joules if plan.speculation else least.decode_joules
        return min(alone, least.mixed_joules) * plan.stage_devices

    def least_joules(self, plan: Plan) -> float:
        """Energy above the idle draw that no run of the plan can do without: every token is computed at least once."""
        settings = self.problem.settings
        return self.token_j(plan) * computed_tokens(self.problem.trace, settings.max_model_len, settings.prefix_caching)

    def alike(self, plan: Plan, replicas: Sequence[int], *, movable: bool = False) -> Iterator[Alike]:
        """Numbers of replicas, grouped by what decides the floors: how they lie, whether sequences give way.

        Parameters
        ----------
        plan
        replicas : sequence of int    numbers of replicas
        movable : bool                whether layers are yet to be moved
        """
        for _, counts in self.costs.alike(plan, replicas):
            # The fewer requests a replica has, the fewer blocks they need: from some number on none gives way.
            asks = plan.stages > 1 or plan.shares is not None
            blocks = self._sure_blocks(plan, movable) if asks else 0
            calm = bisect_left(counts, True, key=lambda n: not asks or not self._gives_way(plan.times(n), blocks))
            for some in (counts[:calm], counts[calm:]):
                if some:
                    yield Alike(plan, tuple(some), movable)

    def floors(self, alike: Alike) -> Run:
        """What no run of a plan can beat, for each number of replicas; the same for every split of the layers.

        Energy: every token is computed, the GPUs idle for the makespan at least, and the board's limit holds over a
        run. The GPUs and their price are known.
        """
        problem, request_s = self.problem, self.costs.request_ns / NS_PER_S
        counts = np.array(alike.replicas, np.int64)
        # When requests come that wait for answers is not known.
        closed = problem.trace.concurrency is not None or problem.trace.delay_ns is not None
        plan = alike.plan.times(alike.replicas[0])
        run = self.alone(plan, movable=alike.movable)
        room, load = self._load(plan, alike)
        if load is not None and counts.min() < room * (1 + ROUNDING):
            makespan_s = np.maximum(run.makespan_s, load.total_s / counts + request_s)
            least = {} if closed else load.least_s(counts, request_s)
        else:
            makespan_s, least = np.repeat(run.makespan_s, len(counts)), {}
        if not closed and (crowding := self._crowding(plan, alike)) is not None:
            mean = crowding.mean_s(counts) + request_s
            whole = least.get("whole", {})
            least |= {"whole": whole | {"mean": np.maximum(whole["mean"], mean) if whole else mean}}
        run = run.loaded(makespan_s, least)
        if problem.asks_gpus:
            one = alike.plan
            idle, limit = (watts(self.costs, one) * counts for watts in (idle_w, limit_w))
            joules = np.minimum(self.least_joules(plan) + idle * run.makespan_s, limit * run.makespan_s)
            price = self.cost_per_h(one)
            prices = None if price is None else np.array([self.cost_per_h(one.times(int(n))) for n in counts])
            run = run.costing(joules * (1 - ROUNDING), prices)
        return run

    def bounds(self, plan: Plan) -> tuple[Costs, bool]:
        """What a plan cannot cost less than, and whether it can still meet the goals."""
        (alike,) = self.alike(plan.times(1), (plan.replicas,))
        bounds, possible = judged(self.floors(alike), self.problem.objectives, self.problem.goals)
        return tuple(bounds[0].tolist()), bool(possible[0])

    def alone(self, plan: Plan, *, movable: bool = False, calm: bool = False) -> Run:
        """What no run of a plan can beat, as if each request were the only one.

        Parameters
        ----------
        plan : Plan
        movable : bool    whether its layers may be moved
        calm : bool       no run that preempts nobody, at least
        """
        problem, layout = self.problem, self.costs.layouts_of(plan)
        overtaking = not calm and self._minds(plan) and self._gives_way(plan, self._sure_blocks(plan, movable))
        side = self.side(plan)  # whether anybody gives way depends on how many requests a replica has
        key = plan.cut, plan.stages, layout, overtaking, side
        if key not in self._alone:
            settings = self.settings_for(plan)
            floors = [self.mean(plan)] * plan.stages
            first, rest = isolated(settings, floors, problem.trace, overtaking=overtaking)
            first, rest = side.firsts(first), side.laters(rest)
            gaps = None
            if problem.asks_gaps:
                gaps = side.laters(least_gaps_ns(settings, floors, problem.trace, overtaking=overtaking))[None]
            self._alone[key] = Run.of(
                arrival_ns=problem.trace.arrival_ns,
                first_ns=first[None],
                rest_ns=rest[None],
                prompt=problem.trace.prompt,
                tokens=self.generated,
                outside_ns=self.costs.request_ns,
                gap_ns=gaps,
                limits=problem.per_request,
            )
        return self._alone[key]

    def mean(self, plan: Plan) -> StageFloor:
        """Mean floor of the stages of a plan, however its layers are split."""
        key = plan.cut, plan.stages, self.costs.layouts_of(plan)
        if key not in self._means:
            drafts = plan.speculation.draft_tokens if plan.speculation else 0
            copies = plan.attention.dp // schedulers(self.problem.settings, plan)
            floor = StageFloor.mean(self.least_cost(plan), plan.stages, copies, drafts)
            self._means[key] = self._busiest(plan, floor) if plan.overlap == NANO else floor
        return self._means[key]

    def _busiest(self, plan: Plan, whole: StageFloor) -> StageFloor:
        """The floor of a plan whose resources work at one time: that of the one by which requests take the longest.

        A batch takes no less than any of them asks, or what its operations take one after the other.

        Parameters
        ----------
        plan : Plan
        whole : StageFloor    of operations one after the other
        """
        settings, trace = self.settings_for(plan), self.problem.trace
        each = [StageFloor.mean(self.costs.least(plan, name), plan.stages, 1) for name in RESOURCES]
        return max(
            (StageFloor.of_any([whole, one]) for one in each),
            key=lambda floor: sum(int(part.sum()) for part in isolated(settings, [floor], trace)),
        )

    def phases(self, plan: Plan) -> Phases | Multiplexing | None:
        """How both phases share the GPUs of a plan; None where batches hold both."""
        shares = plan.shares
        if shares is None:
            return None
        if not shares.multiplexed:
            return Phases(prefill_share=shares.prefill, decode_share=shares.decode)
        return Multiplexing(divisions=divisions(shares, self.problem.cluster.gpu), layers=sum(plan.layers))

    def side(self, plan: Plan) -> Side:
        """How much slower than on whole GPUs everything is at least."""
        phases = self.phases(plan)
        if phases is None:
            return WHOLE
        return Side.of(phases, preempts=self._gives_way(plan, self.own_blocks(plan)))

    def _load(self, plan: Plan, alike: Alike) -> tuple[float, Load | None]:
        """Replicas from which the load adds nothing, and below these the load of one replica."""
        problem, layout = self.problem, self.costs.layouts_of(plan)
        overtaking = self._minds(plan) and self._gives_way(plan, self._sure_blocks(plan, alike.movable))
        side = self.side(plan)
        key = plan.cut, plan.layers, layout, overtaking, side
        if key not in self._loads:
            settings = self.settings_for(plan)
            allotment = allotted(problem.model, plan, settings)
            block_bytes = allotment.block_bytes(0, allotment.layers)
            blocks = most_blocks(self.memory(plan), block_bytes) * plan.attention.dp
            settings = of_all(settings, plan)
            engine = settings, self.mean(plan), plan.stages, problem.trace, blocks
            # Phases that share a GPU take longer than the sum of both on the whole of it by no more than either pace.
            room = replicas_with_room(*engine) * max(side.first, side.later) / SCALE
            load = None
            if min(alike.replicas) < room * (1 + ROUNDING):
                load = Load.of(*engine, problem.statistics, overtaking=overtaking, side=side)
            self._loads[key] = room, load
        return self._loads[key]

    def _crowding(self, plan: Plan, alike: Alike) -> Crowding | None:
        """What the batches of a plan add to the mean time of requests for being as large as they must; None: nothing.

        Parameters
        ----------
        plan : Plan      with one of the numbers of replicas
        alike : Alike
        """
        problem = self.problem
        if not self._asks_mean or any(part is not None for part in (plan.speculation, plan.shares, plan.overlap)):
            return None
        blocks = self._sure_blocks(plan, alike.movable) if plan.stages > 1 else 0
        overtaking = plan.stages > 1 and self._gives_way(plan, blocks)
        key = plan.cut, plan.stages, self.costs.layouts_of(plan), alike.replicas, overtaking, alike.movable
        if key not in self._crowdings:
            caps = None
            if overtaking:
                filling = fewest_to_fill(self.settings_for(plan), blocks, problem.trace)
                dealt = problem.routing_of(plan) == "round_robin" and problem.rescheduling is None
                caps = np.array([shared_ns(problem.trace, filling, n, dealt=dealt) for n in alike.replicas])
            self._crowdings[key] = Crowding.of(self._crowd(plan, alike.replicas), caps)
        return self._crowdings[key]

    def _crowd_of(self, plan: Plan, replicas: tuple[int, ...]) -> Crowd:
        """What requests take in crowded batches, if nobody is preempted in a pipeline."""
        count, alone = schedulers(self.problem.settings, plan), self.alone(plan, calm=True)
        return Crowd.of(
            self.settings_for(plan),
            Batches.of(self.least_cost(plan), plan.stages, count=count, in_step=count > 1 and in_step(plan)),
            self.mean(plan),
            plan.stages,
            self.problem.trace,
            (alone.first_ns[0], alone.rest_ns[0]),
            np.array(replicas, np.int64),
        )

    def _sure_blocks(self, plan: Plan, movable: bool) -> int:
        """KV blocks that a scheduler has at least, however the layers are moved, with any number of replicas."""
        key = plan.cut, plan.layers, movable
        if key not in self._sure:
            memory, problem = self.memory(plan), self.problem
            blocks = kv_blocks(memory)
            if movable and plan.on:
                blocks = 0  # how full a stage can be is known once the layers are split
            elif movable:
                # The split sought is no heavier than the even one, where that one fits.
                fits = blocks >= self._needed(plan)
                settings = self.settings_for(plan)
                blocks = least_blocks(problem.model, plan, memory, settings, self._held) if fits else 0
            self._sure[key] = blocks * plan.attention.dp // schedulers(problem.settings, plan)
        return self._sure[key]

    def _minds(self, plan: Plan) -> bool:
        """Whether what bounds say depends on who may be preempted."""
        return minds_preemption(self.settings_for(plan), plan.stages)

    def _gives_way(self, plan: Plan, blocks: int) -> bool:
        """Whether a sequence may be preempted while a batch with it is on its way through a pipeline."""
        problem = self.problem
        dealt = problem.routing_of(plan) == "round_robin" and problem.trace.concurrency is None
        most = -(-len(problem.trace) // plan.replicas) if dealt else None
        return may_preempt(self.settings_for(plan), blocks, problem.trace, most)


def judged(run: Run, objectives: Sequence[Objective], goals: Iterable[Goal]) -> tuple[Floats, NDArray[np.bool_]]:
    """What floors say by objectives and goals.

    Parameters
    ----------
    run : Run    what no run of some deployments can beat
    objectives, goals

    Returns
    -------
    float64[k, objectives]    lower bounds of the costs, signed such that less is better
    bool[k]                   whether the goals can still hold
    """
    size = len(run.makespan_s)
    bounds = np.empty((size, len(objectives)))
    for place, objective in enumerate(objectives):
        bounds[:, place] = least_signed(objective, run)
    possible = np.ones(size, bool)
    for goal in goals:
        possible &= can_hold(goal, run)
    return bounds, possible


def cost_model(problem: Problem) -> CostModel:
    """The costs of a problem's plans, whose stages may be on several types of GPU."""
    own, *others = problem.offers
    return CostModel(
        problem.model,
        own.cluster,
        problem.settings,
        problem.overhead,
        problem.expert_routing,
        problem.profiles,
        tree=own.tree,
        beside=[(offer.cluster, offer.tree) for offer in others],
        between=problem.between,
    )


@lru_cache(maxsize=8)
def computed_tokens(trace: Trace, max_model_len: int, prefix_caching: bool) -> int:
    """Tokens that any run computes: prompts unless a cache may hold them, answers but for their last token.

    Parameters
    ----------
    trace
    max_model_len : int      tokens that a request may have
    prefix_caching : bool    whether prompts may be found in the cache
    """
    generated = trace.generated(max_model_len)
    return int((generated - 1).sum()) + (0 if prefix_caching else int(trace.prompt.sum()))
