"""How many plans satisfy the families that bind few variables at a time: a sum of products over stage sizes."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Final

from apex_opt.engines.overlap import NANO
from apex_opt.plans.routing import count_repeated

from .blocks import Pools
from .constraints import (
    balanced,
    columns_divide,
    computes,
    copies_draft,
    draft_columns,
    draft_heads,
    heads_divide,
)
from .engine import Runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.speculation import Drafter

COUNTED: Final = ("divisibility", "format", "engine", "balance")
"""Families whose plans are counted: each binds attention, the FFN or the stages alone, or with the format."""


def count(instance: Instance, families: Sequence[str]) -> int:
    """Plans under C1, C2 and any of `COUNTED` (C3 to C5).

    For a stage of g devices, a format and a way to make drafts the choices of attention, of the FFN, of stages with
    replicas and of limits are independent, but for the common factors of copies. Several stages are two plans, with
    layers split evenly and with layers moved.
    """
    gpus = instance.max_devices
    runs = Runs(instance)
    stages = [
        s
        for s in range(1, min(gpus, instance.model.layers) + 1)
        if ("balance" not in families or balanced(instance, s)) and ("engine" not in families or runs.stages(s))
    ]
    # The engine makes drafts on one stage, with one attention copy.
    drafters = Counter(drafter if "engine" in families else None for drafter in instance.drafters)
    # Without rules of an engine all formats are cut alike.
    ruled = "engine" in families and (instance.settings.runnable is not None or Pools(instance).varied)
    formats = Counter(
        index if ruled else None
        for index, name in enumerate(instance.weight_formats)
        if "format" not in families or computes(instance, name)
    )
    shared = "engine" in families and instance.shares is not None
    if shared and not runs.shares:
        return 0
    overlaps = "engine" in families and instance.overlap is not None
    if overlaps and not runs.overlap:
        return 0
    split = overlaps and instance.overlap != NANO
    one_copy = shared or (overlaps and not split)
    total = 0
    for drafter, ways in drafters.items():
        if overlaps and drafter is not None:
            continue
        some = stages if drafter is None and not (shared or overlaps) else [s for s in stages if s == 1]
        replicas = [count_repeated(n, instance.routings) for n in range(gpus + 1)]
        pipelines = [0] + [sum(replicas[gpus // (s * g)] * (1 + (s > 1)) for s in some) for g in range(1, gpus + 1)]
        for index, n in formats.items():
            if split and index is not None and not runs.splits(index):
                continue
            for limits in range(len(instance.batch_limits)) if split else (None,):
                some_cells = _cells(
                    instance, families, index, drafter, pipelines, one_copy=one_copy, split=split, limits=limits
                )
                total += ways * n * some_cells * (len(instance.batch_limits) if limits is None else 1)
    return total


def _cells(
    instance: Instance,
    families: Sequence[str],
    index: int | None,
    drafter: Drafter | None,
    pipelines: Sequence[int],
    *,
    one_copy: bool,
    split: bool,
    limits: int | None = None,
) -> int:
    """Plans of one format, with the engine's rules for it unless that is None: `pipelines` is by devices of a stage.

    Where forwards are `split` there are several copies of attention, every device has experts of its own, and `limits`
    is which of the limits of a batch it is of.
    """
    gpus, runs, divide = instance.max_devices, Runs(instance), "divisibility" in families
    degrees = range(1, gpus + 1)
    pools = Pools(instance)
    heads = [
        t
        for t in degrees
        if (not divide or heads_divide(instance, t)) and draft_heads(instance, drafter, t)
        if index is None or not pools.varied or pools.of(drafter, t, instance.kv_formats[index]) is not None
    ]
    experts = gpus if instance.model.is_moe else 1
    shards = Counter(
        t * e
        for t in degrees
        for e in range(1, min(experts, gpus // t) + 1)
        if not split or (t == 1 and e > 1)
        if (not divide or columns_divide(instance, t, e)) and (index is None or runs.ffn(t, e, index))
        if draft_columns(instance, drafter, t, e)
    )
    total = 0
    for devices in degrees:
        copies = [
            devices // t
            for t in heads
            if devices % t == 0 and (index is None or runs.attention(devices // t, t, index))
            if devices == t or (not one_copy and (drafter is None or copies_draft(instance, drafter)))
            if devices > t or not split
            if limits is None or runs.answers(devices // t, limits)
        ]
        cells = sum(
            ways * sum(math.gcd(copy, devices // shard) == 1 for copy in copies)
            for shard, ways in shards.items()
            if devices % shard == 0 and (index is None or runs.ffn_copies(devices // shard))
            if devices == shard or not split
        )
        total += cells * pipelines[devices]
    return total
