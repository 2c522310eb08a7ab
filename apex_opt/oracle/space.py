"""Every plan there is, by counting: the brute force that programs are tested against."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from apex_opt.plans.plan import Plan, Template, even_split, repeated
from apex_opt.plans.routing import count_repeated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.oracle.instance import Instance

from apex_opt.oracle.checks import FAMILIES, violations
from apex_opt.oracle.layers import moved


def space(instance: Instance) -> Iterator[Plan]:
    """Every plan there is, feasible or not, by counting: the brute force that programs are tested against.

    A plan takes at most `max_devices` GPUs and at most as many stages as the model has layers; a model without experts
    has no expert parallelism. Formats and limits of a batch are those of the instance. Copies that both cells of a
    stage have are replicas, so the copies of attention and of FFN have no common factor. Layers are split evenly;
    where that leaves the stages unequal and another split is better and fits (`moved`), that is a plan as well.
    """
    for cut in cuts(instance):
        layers = moved(instance, cut)
        for plan in (cut,) if layers in (None, cut.layers) else (cut, replace(cut, layers=layers)):
            for routed, counts in repeated(plan, instance.max_devices // cut.devices, instance.routings):
                yield from (routed.times(count) for count in counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The space of an instance, counted plan by plan.

    Parameters
    ----------
    space : int              plans there are; every cut into several stages is two, with layers even and moved
    infeasible : mapping     plans that break a constraint family, charged to the first in order
    repeated : int           feasible plans whose layers, moved, stay even, and which so are another plan
    plans : tuple of Plan    the other feasible ones
    """

    space: int
    infeasible: dict[str, int]
    repeated: int
    plans: tuple[Plan, ...]


def tally(instance: Instance) -> Tally:
    """Count the space and ask the oracle about each plan of it."""
    lost, size, same = dict.fromkeys(FAMILIES, 0), 0, 0
    plans: list[Plan] = []
    for cut in cuts(instance):
        most = instance.max_devices // cut.devices
        count = count_repeated(most, instance.routings)
        broken = [violation.family for violation in violations(instance, cut)]
        found = [(cut, broken)]
        if cut.stages > 1:
            # Where layers lie changes what a stage holds and nothing else.
            layers = moved(instance, cut)
            others = [family for family in broken if family != "memory"]
            if layers is None:
                found.append((cut, sorted({*others, "memory"}, key=FAMILIES.index)))
            elif others or layers != cut.layers:
                found.append((replace(cut, layers=layers), others))
            else:
                same += count
                size += count
        for plan, families in found:
            size += count
            if families:
                lost[families[0]] += count
            else:
                every = repeated(plan, most, instance.routings)
                plans += [routed.times(replicas) for routed, counts in every for replicas in counts]
    return Tally(space=size, infeasible=lost, repeated=same, plans=tuple(plans))


def cuts(instance: Instance) -> Iterator[Plan]:
    """Every way to cut one replica, with even stages."""
    model = instance.model
    for stages in range(1, min(instance.max_devices, model.layers) + 1):
        layers = even_split(model.layers, stages)
        for devices in range(1, instance.max_devices // stages + 1):
            for attention in _templates(devices, expert=False):
                for ffn in _templates(devices, expert=model.is_moe):
                    if math.gcd(attention.dp, ffn.dp) > 1:
                        continue
                    for weight_format, kv_format in zip(instance.weight_formats, instance.kv_formats, strict=True):
                        for (seqs, tokens), drafter in product(instance.batch_limits, instance.drafters):
                            yield Plan(
                                replicas=1,
                                layers=layers,
                                attention=attention,
                                ffn=ffn,
                                weight_format=weight_format,
                                kv_format=kv_format,
                                max_num_seqs=seqs,
                                max_num_batched_tokens=tokens,
                                speculation=drafter,
                                shares=instance.shares,
                                overlap=instance.overlap,
                            )


def _templates(devices: int, *, expert: bool) -> Iterator[Template]:
    """Every way to cut one cell over this many devices."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for dp in divisors:
        for tp in divisors:
            if devices % (dp * tp) == 0 and (expert or dp * tp == devices):
                yield Template(dp=dp, tp=tp, ep=devices // (dp * tp))
