"""How many plans satisfy the families that bind few variables at a time: a sum of products over stage sizes."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from formulations.plan_space.constraints import balanced, columns_divide, computes, heads_divide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.evaluate import Instance


def count(instance: Instance, families: Sequence[str]) -> int:
    """Plans with even stages under C1, C2 and any of "divisibility" (C3), "format" (C4) and "balance" (C5).

    For a stage of g devices the choices of cells, of stages with replicas, of format and of limits are independent.
    """
    gpus = instance.max_devices
    divide, balance = "divisibility" in families, "balance" in families
    heads = [t for t in range(1, gpus + 1) if not divide or heads_divide(instance, t)]
    experts = gpus if instance.model.is_moe else 1
    shards = Counter(
        t * e
        for t in range(1, gpus + 1)
        for e in range(1, min(experts, gpus // t) + 1)
        if not divide or columns_divide(instance, t, e)
    )
    stages = [s for s in range(1, min(gpus, instance.model.layers) + 1) if not balance or balanced(instance, s)]
    formats = sum("format" not in families or computes(instance, name) for name in instance.weight_formats)
    total = 0
    for devices in range(1, gpus + 1):
        copies = [devices // t for t in heads if devices % t == 0]
        cells = sum(
            ways * sum(math.gcd(copy, devices // shard) == 1 for copy in copies)
            for shard, ways in shards.items()
            if devices % shard == 0
        )
        total += cells * sum(gpus // (s * devices) for s in stages)
    return total * formats * len(instance.batch_limits)
