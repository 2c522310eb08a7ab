"""Costs of pipelines whose stages are on GPUs of several types."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

from apex_opt.cost.least import Least
from apex_opt.cost.model import CostModel, PlanCost, sum_of_least
from apex_opt.plan.layout import Layout, Tier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.cluster.types import Link
    from apex_opt.plan.plan import Plan


class JointLayouts:
    """Layouts of plans by type of GPU, each type's stages placed on its own GPUs."""

    def __init__(self, models: Mapping[str, CostModel]) -> None:
        self._models = models

    def best(self, plan: Plan) -> tuple[Layout, ...]:
        """The best layout of the stages on each type of GPU, in their order.

        Raises
        ------
        CapacityError    more GPUs of a type than there are
        """
        parts = ((self._models[name], replace(plan, layers=(1,) * stages, on=())) for name, stages in plan.on)
        return tuple(model.layouts.best(part) for model, part in parts)

    def alike(self, plan: Plan, replicas: Sequence[int]) -> list[tuple[tuple[Layout, ...], list[int]]]:
        """Numbers of replicas of a plan by their best layouts."""
        found: dict[tuple[Layout, ...], list[int]] = {}
        for count in replicas:
            found.setdefault(self.best(plan.times(count)), []).append(count)
        return list(found.items())


class JointCosts:
    """Costs of plans whose stages are on several types of GPU; as `CostModel` of one.

    Parameters
    ----------
    models : CostModel by the name of the type, the same but for their GPUs
    between : Link      from a node of one type to a node of another, at worst
    """

    def __init__(self, models: Mapping[str, CostModel], between: Link) -> None:
        self.models, self.between = models, between
        self.layouts = JointLayouts(models)

    @property
    def request_ns(self) -> int:
        """Time of a request outside the engine, on its way in and out."""
        return next(iter(self.models.values())).request_ns

    @property
    def provenance(self) -> dict[str, str]:
        """Where the figures behind the costs asked for so far come from, per operation and type of GPU."""
        parts = ((name, model.provenance) for name, model in self.models.items())
        return {f"{operation}, {name}": text for name, found in parts for operation, text in found.items()}

    def plan_cost(self, plan: Plan) -> PlanCost:
        """Laws and operations of every stage of a plan.

        The last stage on a type of GPU sends what it has computed out of its node.
        """
        built, index = [], 0
        for (name, stages), layout in zip(plan.on, self.layouts.best(plan), strict=True):
            inside = tuple(tier for tier in layout.tiers if tier.chunk <= plan.stage_devices)
            out = Tier("cluster", plan.stages * plan.stage_devices, self.between, True)
            bridge = Layout(stage_devices=plan.stage_devices, tiers=(*inside, out))
            for stage in range(stages):
                own = bridge if stage == stages - 1 and index < plan.stages - 1 else layout
                built.append(self.models[name].stage(plan, index, own))
                index += 1
        return PlanCost(
            laws=tuple(law for law, _ in built),
            pieces=tuple(pieces for _, pieces in built),
            request_ns=self.request_ns,
        )

    def least(self, plan: Plan) -> Least:
        """What a batch takes at least on all stages together, however the layers are split and whatever is where."""
        layouts = self.layouts.best(plan)
        models = [self.models[name] for name, _ in plan.on]
        every = [list(model.least_parts(plan, layout)) for model, layout in zip(models, layouts, strict=True)]
        parts = []
        for same in zip(*every, strict=True):
            least = {f.name: min(getattr(part, f.name) for _, part in same) for f in fields(Least)}
            parts.append((same[0][0], Least(**least)))
        return sum_of_least(parts, len(models[0].tables.tokens))

    def on(self, plan: Plan) -> tuple[tuple[CostModel, int], ...]:
        """Whose GPUs a plan runs on, and how many of each."""
        return tuple((self.models[name], plan.replicas * stages * plan.stage_devices) for name, stages in plan.on)
