"""From a plan to the batch law of each of its stages, on GPUs of one type or of several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

from apex_opt.cluster.tree import Tree
from apex_opt.cost.least import Least
from apex_opt.cost.ranks import RankCosts
from apex_opt.cost.stage import StageCosts
from apex_opt.cost.tables import merged, times
from apex_opt.engines.overlap import TWO
from apex_opt.placement.layouts import Layouts
from apex_opt.plans.engine import has_ranks, of_each
from apex_opt.plans.layout import Layout, Tier
from apex_opt.profiles import SHIPPED
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Cluster, Link
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.cost.exchanges import Exchanged
    from apex_opt.cost.stage import Pieces
    from apex_opt.cost.tables import Parts
    from apex_opt.ir.model import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.ranks import Ranks, SharedLaw


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlanCost:
    """Batch laws of a plan, and the operations they are made of.

    Parameters
    ----------
    laws : tuple of BatchLaw, one per stage
    pieces : tuple of Pieces, one per stage
    request_ns : int                            time of a request outside the engine, on its way in and out
    ranks : Ranks or None                       of each replica, where attention copies have schedulers of their own;
                                                the laws are then a rank's own part
    """

    laws: tuple[BatchLaw, ...]
    pieces: tuple[Pieces, ...]
    request_ns: int
    ranks: Ranks | None = None

    @property
    def parts(self) -> tuple[Parts, ...]:
        """Work per (operation, table) on the busiest device of each stage; summed when asked for."""
        return tuple(merged(*(times(piece.parts, count) for count, piece in stage)) for stage in self.pieces)


class CostModel:
    """Costs of plans for one model: every stage asks those of its own GPU, kept by GPU, clock and limits of a batch.

    Parameters
    ----------
    model, cluster, settings
    overhead : EngineOverhead    the engine's own time, and whose kernels it runs
    routing : str                how tokens fall on experts: "uniform" at random, or "skewed"
    profiles : str               measured tables, as `load_profile` takes them
    clock_mhz : int or None      clock of plans that do not name one
    tree : Tree or None          the GPUs that plans are placed on, by default all of the cluster
    beside : sequence of (Cluster, Tree or None)    GPUs of other types that stages may be on as well
    between : Link or None       from a node of one type to a node of another, at worst; only where there are others

    Raises
    ------
    InputError, UnknownNameError    profiles of the GPU that cannot be read
    UsageError                      a clock that the GPU does not have
    """

    def __init__(
        self,
        model: Model,
        cluster: Cluster,
        settings: EngineSettings,
        overhead: EngineOverhead,
        routing: str = "uniform",
        profiles: str = SHIPPED,
        clock_mhz: int | None = None,
        tree: Tree | None = None,
        beside: Sequence[tuple[Cluster, Tree | None]] = (),
        between: Link | None = None,
    ) -> None:
        self.model, self.cluster, self.settings, self.overhead = model, cluster, settings, overhead
        self._routing, self._profiles, self._clock_mhz, self._between = routing, profiles, clock_mhz, between
        pools = [(found, its or Tree.of(found)) for found, its in ((cluster, tree), *beside)]
        self._clusters = {found.gpu.name: found for found, _ in pools}
        self._layouts = {
            found.gpu.name: Layouts(its, partial(self.exchanged, gpu=found.gpu.name)) for found, its in pools
        }
        self._stages: dict[tuple[str, int | None, EngineSettings, EngineOverhead], StageCosts] = {}
        self._ranks: dict[StageCosts, RankCosts] = {}
        self._layers: dict[tuple[Any, ...], Least] = {}  # by cut and layout of a stage: any number of stages has them
        for name in self._clusters:
            self._of(name, clock_mhz, settings, overhead)

    def _of(self, gpu: str, clock_mhz: int | None, settings: EngineSettings, overhead: EngineOverhead) -> StageCosts:
        key = gpu, clock_mhz, settings, overhead
        if key not in self._stages:
            self._stages[key] = StageCosts(
                self.model, self._clusters[gpu], settings, overhead, self._routing, self._profiles, clock_mhz
            )
        return self._stages[key]

    def of(self, plan: Plan, gpu: str | None = None) -> StageCosts:
        """Costs of the stages of a plan on a type of GPU, by default the first, at its clock and within its limits.

        Raises
        ------
        UsageError    a clock that the GPU does not have
        """
        clock_mhz = self._clock_mhz if plan.clock_mhz is None else plan.clock_mhz
        splitting, overhead = self.settings.scheduler.splitting, self.overhead
        if plan.overlap == TWO and splitting is not None and not splitting.graphs:
            overhead = replace(overhead, captured_sizes=(), captured_tokens=0)
        return self._of(gpu or self.cluster.gpu.name, clock_mhz, of_each(self.settings, plan), overhead)

    def ranks_of(self, plan: Plan, gpu: str | None = None) -> RankCosts:
        """The same where the attention copies of the plan are ranks."""
        costs = self.of(plan, gpu)
        if costs not in self._ranks:
            self._ranks[costs] = RankCosts(costs)
        return self._ranks[costs]

    @property
    def request_ns(self) -> int:
        """Time of a request outside the engine, on its way in and out."""
        return round(self.overhead.request_s * NS_PER_S)

    @property
    def provenance_by_gpu(self) -> dict[str, dict[str, str]]:
        """By type of GPU, where the figures behind the costs asked for so far come from, per operation."""
        found: dict[str, dict[str, str]] = {gpu: {} for gpu in self._clusters}
        for (gpu, *_), stages in self._stages.items():
            found[gpu] |= stages.provenance
        engine = {f"engine ({self.overhead.name})": self.overhead.source}
        return {gpu: told | engine for gpu, told in found.items()}

    @property
    def provenance(self) -> dict[str, str]:
        """The same in one, operations of several types of GPU with the name of theirs."""
        told = self.provenance_by_gpu
        if len(told) == 1:
            return told[self.cluster.gpu.name]
        return {f"{operation}, {gpu}": text for gpu, found in told.items() for operation, text in found.items()}

    @property
    def layouts(self) -> Layouts:
        """Layouts of plans on the first type of GPU."""
        return self._layouts[self.cluster.gpu.name]

    def parts_of(self, plan: Plan) -> tuple[tuple[str, Plan, Layouts], ...]:
        """The stages of a plan by type of GPU, as a plan of their own on the layouts of that type."""
        if not plan.on:
            return ((self.cluster.gpu.name, plan, self.layouts),)
        return tuple((gpu, replace(plan, layers=(1,) * stages, on=()), self._layouts[gpu]) for gpu, stages in plan.on)

    def layouts_of(self, plan: Plan) -> tuple[Layout, ...]:
        """The best layout of the stages on each type of GPU, in their order.

        Raises
        ------
        CapacityError    more GPUs of a type than there are
        """
        return tuple(layouts.best(part) for _, part, layouts in self.parts_of(plan))

    def alike(self, plan: Plan, replicas: Sequence[int]) -> list[tuple[tuple[Layout, ...], list[int]]]:
        """Numbers of replicas of a plan by their best layouts.

        Raises
        ------
        CapacityError    more GPUs of a type than there are
        """
        if not plan.on:
            return [((layout,), counts) for layout, counts in self.layouts.alike(plan, replicas)]
        found: dict[tuple[Layout, ...], list[int]] = {}
        for count in replicas:
            found.setdefault(self.layouts_of(plan.times(count)), []).append(count)
        return list(found.items())

    def plan_cost(self, plan: Plan) -> PlanCost:
        """Laws and operations of every stage of a plan, at its clock and within its limits of a batch.

        Where the next stage is on another type of GPU, a stage sends what it has computed out of its node.

        Raises
        ------
        UsageError    a clock that the GPU does not have
        """
        built: list[tuple[BatchLaw, Pieces]] = []
        shared: list[SharedLaw] = []
        ranks = has_ranks(self.settings, plan)
        for (gpu, part, _), layout in zip(self.parts_of(plan), self.layouts_of(plan), strict=True):
            costs, first = self.of(plan, gpu), len(built)
            for index in range(first, first + part.stages):
                leaves = index == first + part.stages - 1 < plan.stages - 1
                over = self._bridge(plan, layout) if leaves else layout
                if ranks:
                    law, together, pieces = self.ranks_of(plan, gpu).stage(plan, index, over)
                    built.append((law, pieces))
                    shared.append(together)
                else:
                    built.append(costs.stage(plan, index, over))
        return PlanCost(
            ranks=self.ranks_of(plan).group(plan, shared) if ranks else None,
            laws=tuple(law for law, _ in built),
            pieces=tuple(pieces for _, pieces in built),
            request_ns=self.request_ns,
        )

    def _bridge(self, plan: Plan, layout: Layout) -> Layout:
        """The layout of a stage whose next one is on another type of GPU."""
        assert self._between is not None  # without a link no plan is on several types
        inside = tuple(tier for tier in layout.tiers if tier.chunk <= plan.stage_devices)
        out = Tier("cluster", plan.stages * plan.stage_devices, self._between, True)
        return Layout(stage_devices=plan.stage_devices, tiers=(*inside, out))

    def least(self, plan: Plan, resource: str | None = None) -> Least:
        """What a batch takes at least on all stages together, however the layers are split and whatever is where.

        Waits for launches are left out: how long they are depends on the split.

        Parameters
        ----------
        plan
        resource : str or None    of `nano.RESOURCES`: what is asked of it; None: all, one operation after the other

        Raises
        ------
        UsageError    a clock that the GPU does not have
        """
        types, layouts = self.parts_of(plan), tuple(layout.of_stage for layout in self.layouts_of(plan))
        every: list[StageCosts | RankCosts] = [
            self.ranks_of(plan, gpu) if has_ranks(self.settings, plan) else self.of(plan, gpu) for gpu, _, _ in types
        ]
        key = plan.cut, layouts, resource
        if key not in self._layers:
            asked = () if resource is None else (resource,)
            found = [costs.least_parts(plan, layout, *asked) for costs, layout in zip(every, layouts, strict=True)]
            # Pieces come in the same order on every type of GPU.
            parts = found[0] if len(found) == 1 else (_least_of(same) for same in zip(*found, strict=True))
            self._layers[key] = Least.sum_of(list(parts))
        stages = [costs.stage_least(plan) for costs in every]
        stage = stages[0] if len(stages) == 1 else Least.of_any(stages)
        return _sum_of_least(self._layers[key], plan.stages, stage, len(self.of(plan).tables.tokens))

    def on(self, plan: Plan) -> tuple[tuple[StageCosts, int], ...]:
        """The costs of whose GPUs a plan runs on, at their highest clock or the usual one, and how many of each."""
        types = plan.on or ((self.cluster.gpu.name, plan.stages),)
        each, usual = plan.replicas * plan.stage_devices, (self._clock_mhz, self.settings, self.overhead)
        return tuple((self._of(gpu, *usual), each * stages) for gpu, stages in types)

    def exchanged(self, plan: Plan, layout: Layout, gpu: str | None = None) -> Exchanged:
        """What the collectives of a full batch of a plan take in a layout, and what they send how far.

        Parameters
        ----------
        plan, layout
        gpu : str or None    type of GPU of the stage; None where there is one

        Raises
        ------
        UsageError    a clock that the GPU does not have
        """
        return self.of(plan, gpu).exchanged(plan, layout)


def _least_of(same: tuple[tuple[int, Least], ...]) -> tuple[int, Least]:
    """What one piece takes at least on any of several types of GPU, so many times."""
    return same[0][0], Least.of_any([part for _, part in same])


def _sum_of_least(layers: Least, stages: int, stage: Least, tokens: int) -> Least:
    """What a batch takes at least on all stages, on tables of so many entries by tokens.

    Parameters
    ----------
    layers : Least    of all layers
    stages : int
    stage : Least     what each stage adds
    tokens : int
    """
    total = Least.sum_of([(1, layers), (stages, stage)])
    if tokens <= 2:  # no batch has room for a prompt of two tokens
        without = tuple((window, context, inf) for window, context, _ in total.seen)
        return replace(total, mixed=inf, mixed_share=inf, pair=inf, again=inf, mixed_joules=inf, seen=without)
    return total
