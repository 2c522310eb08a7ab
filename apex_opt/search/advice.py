"""Why no plan is feasible, and which single change would make one so."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.evaluate import FAMILIES, decode_bytes, space, violations
from apex_opt.ir.formats import FORMATS
from apex_opt.plan.plan import default_kv_format

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from apex_opt.evaluate import Instance, Violation
    from apex_opt.plan.plan import Plan

MOST_GPUS: Final = 64
"""How far more GPUs are tried: doubling up to here takes about a second."""


def nearest_violation(instance: Instance) -> str:
    """Why no plan is feasible: what the plan that comes nearest still breaks, in numbers, and what would help."""
    plan, broken = nearest(instance)
    return (
        f"no plan for {instance.model.name} on {instance.max_devices} x {instance.cluster.gpu.name} is feasible. "
        f"The nearest, {plan}, breaks {' and '.join(f'{v.family}: {v.text}' for v in broken)}. {ways_out(instance)}"
    )


def nearest(instance: Instance, kept: Collection[str] = ()) -> tuple[Plan, tuple[Violation, ...]]:
    """The plan that comes nearest to feasible, where none is, and what it breaks: nothing of the families `kept`.

    Nearest is the plan that breaks the fewest families, of these the latest in order, over the most GPUs, with the
    least to read from memory for a token.
    """

    def order(item: tuple[Plan, tuple[Violation, ...]]) -> tuple[int, int, int, int, str]:
        plan, broken = item
        latest = min(FAMILIES.index(v.family) for v in broken)
        return len(broken), -latest, -plan.devices, decode_bytes(instance.model, plan), str(plan)

    found = ((plan, violations(instance, plan)) for plan in _single(instance))
    return min((item for item in found if not {v.family for v in item[1]} & set(kept)), key=order)


def ways_out(instance: Instance) -> str:
    """Single changes to an instance without feasible plans that give it one: format, KV format, number of GPUs."""
    ways = []
    for weights in other_formats(instance):
        kv = instance.model.kv_format or default_kv_format(weights)
        if plan := feasible(replace(instance, weight_formats=(weights,), kv_formats=(kv,))):
            ways.append(f"--weights={weights} ({plan})")
    if "fp8" not in instance.kv_formats:
        smaller = replace(instance, kv_formats=("fp8",) * len(instance.weight_formats))
        if plan := feasible(smaller):
            ways.append(f"--kv=fp8 ({plan})")
    gpus = 2 * instance.max_devices
    while gpus <= MOST_GPUS:
        # The constraints ask how many GPUs there are, not how they are wired.
        cluster = replace(instance.cluster, nodes=1, gpus_per_node=max(gpus, instance.cluster.size))
        if plan := feasible(replace(instance, cluster=cluster, max_devices=gpus)):
            ways.append(f"{gpus} such GPUs ({plan})")
            break
        gpus *= 2
    if ways:
        return f"Feasible would be: {'; '.join(ways)}."
    more = f", nor would any number of GPUs up to {MOST_GPUS}" if 2 * instance.max_devices <= MOST_GPUS else ""
    slo = "relax the SLO, " if instance.tpot_limit_ns is not None else ""
    return (
        f"No other number format alone would do{more}: {slo}lower --max_model_len, shorten the trace or use other GPUs."
    )


def other_formats(instance: Instance) -> tuple[str, ...]:
    """Formats worth proposing: those of other bits or other arithmetic than asked for, of variants the smallest."""
    gpu = instance.cluster.gpu
    smallest: dict[tuple[int, str], str] = {}
    for entry in sorted(FORMATS.values(), key=lambda entry: -entry.weight_bits):
        dtype = entry.hardware_dtype or gpu.half_dtype
        if gpu.supports(dtype) and (entry.weight_bits < 16 or dtype == gpu.half_dtype):
            smallest[int(entry.weight_bits), dtype] = entry.name
    return tuple(name for name in FORMATS if name in smallest.values() and name not in instance.weight_formats)


def _single(instance: Instance) -> Iterator[Plan]:
    """Plans of one replica: further replicas change no constraint but the number of GPUs."""
    return (plan for plan in space(instance) if plan.replicas == 1)


def feasible(instance: Instance) -> Plan | None:
    """Some feasible plan over few GPUs, if there is one."""
    return next((plan for plan in _single(instance) if not violations(instance, plan)), None)
