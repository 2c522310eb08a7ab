"""Plans that come nearest to feasible, and the first that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.oracle.checks import FAMILIES, decode_bytes, needed_bytes, overlap_faults, violations
from apex_opt.oracle.space import space
from apex_opt.plans.engine import limited
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.refusals import refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from apex_opt.oracle.checks import Violation
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.plan import Plan


def nearest_violation(instance: Instance) -> str:
    """Why no plan is feasible: what the plan that comes nearest still breaks, in numbers."""
    plan, broken = nearest(instance)
    return (
        f"no plan for {instance.model.name} on {instance.max_devices} x {instance.cluster.gpu.name} is feasible. "
        f"The nearest, {plan}, breaks {' and '.join(f'{v.family}: {v.text}' for v in broken)}; solve.py explain tells "
        "what would help"
    )


def nearest(instance: Instance, kept: Collection[str] = ()) -> tuple[Plan, tuple[Violation, ...]]:
    """The plan that comes nearest to feasible, where none is, and what it breaks: nothing of the families `kept`.

    Nearest is the plan that breaks the fewest families, of these the latest in order, and the fewest rules of its
    engine, over the most GPUs, with the least to hold in memory where that is broken, else with the least to read from
    it for a token.
    """
    rules, model, gpu = instance.settings.runnable, instance.model, instance.cluster.gpu

    def order(item: tuple[Plan, tuple[Violation, ...]]) -> tuple[int, int, int, int, int, int, str]:
        plan, broken = item
        families = {v.family for v in broken}
        latest = min(FAMILIES.index(family) for family in families)
        refused = held = 0
        if rules is not None and "engine" in families:
            refused = sum(1 for _ in refusals(rules, model, instance.cluster, plan, limited(instance.settings, plan)))
            refused += sum(1 for _ in overlap_faults(instance, plan))
        if "memory" in families:
            stages = stage_memory(model, gpu, plan, limited(instance.settings, plan))
            held = max(needed_bytes(instance.blocks_needed(plan), stage) for stage in stages)
        return len(broken), -latest, refused, -plan.devices, held, decode_bytes(model, plan, instance.held), str(plan)

    found = ((plan, violations(instance, plan)) for plan in _single(instance))
    return min((item for item in found if not {v.family for v in item[1]} & set(kept)), key=order)


def feasible(instance: Instance, wanted: Callable[[Plan], bool] = lambda plan: True) -> Plan | None:
    """A feasible plan of those wanted, if there is one: with the fewest stages, and of these over the fewest GPUs."""
    return next((plan for plan in _single(instance) if wanted(plan) and not violations(instance, plan)), None)


def _single(instance: Instance) -> Iterator[Plan]:
    """Plans of one replica: further replicas change no constraint but the number of GPUs."""
    return (plan for plan in space(instance) if plan.replicas == 1)
