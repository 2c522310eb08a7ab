"""Stages that hold unequal numbers of layers: the layer program asked about one cut of the plan space."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from apex_opt.evaluate import IMBALANCE
from apex_opt.plan.memory import RUNTIME_BYTES
from formulations.layers import Pipeline, split
from formulations.plan_space.sizes import (
    attention_bytes,
    attention_width,
    batch_limits,
    ffn_bytes,
    ffn_width,
    kind,
    kinds,
    kv_bytes,
    vocab_bytes,
)

if TYPE_CHECKING:
    from apex_opt.evaluate import Instance
    from apex_opt.plan.plan import Plan


def moved(instance: Instance, plan: Plan) -> tuple[int, ...] | None:
    """Layers of the stages of a cut with the lightest heaviest stage; None where they are even or nothing fits.

    A stage weighs the bytes that a full batch reads: its layers, and the LM head on the last. Activations differ from
    cut to cut, so they are brought in only where the split without them does not fit: most cuts share their split.
    """
    stages = plan.stages
    if stages == 1:
        return None
    blocks = list(kinds(instance))
    order = tuple(blocks.index(kind(run.block)) for run in instance.model.runs for _ in range(run.count))
    tp, ffn = plan.attention.tp, plan.ffn
    weight = tuple(
        attention_bytes(block, tp, plan.weight_format)
        + 4 * block.hidden
        + ffn_bytes(block, ffn.tp, ffn.ep, plan.weight_format, touched=False)
        for block in blocks
    )
    tokens = (instance.kv_blocks_needed + 1) * instance.settings.block_size
    held = tuple(
        read + tokens * kv_bytes(block, tp, plan.kv_format) for read, block in zip(weight, blocks, strict=True)
    )
    vocab = vocab_bytes(instance, tp)
    head = vocab + 2 * instance.model.hidden
    capacity = int(instance.cluster.gpu.memory_bytes * instance.settings.gpu_memory_utilization) - RUNTIME_BYTES
    middle = (capacity,) * (stages - 2)
    pipeline = Pipeline(
        kinds=order,
        weight=weight,
        held=held,
        extra=(*(0,) * (stages - 1), head),
        room=(capacity - vocab, *middle, capacity - head),
        most=IMBALANCE[0] * instance.model.layers // (IMBALANCE[1] * stages),
    )
    activations, logits = _activations(instance, plan)
    room = tuple(free - activations - logits * (k == stages - 1) for k, free in enumerate(pipeline.room))
    sums = [0, *accumulate(held[u] for u in order)]
    if sums[-1] > sum(room):
        return None
    found = split(pipeline)
    if found is not None:
        ends = pairwise([0, *accumulate(found)])
        if any(sums[j] - sums[i] > free for (i, j), free in zip(ends, room, strict=True)):
            found = split(replace(pipeline, room=room))
    return None if found is None or found == plan.layers else found


def _activations(instance: Instance, plan: Plan) -> tuple[int, int]:
    """Bytes of the largest batch on every stage, and of its logits on the last."""
    choice = instance.batch_limits.index((plan.max_num_seqs, plan.max_num_batched_tokens))
    seqs, tokens = batch_limits(instance)[choice]
    own, others = -(-tokens // plan.attention.dp), -(-tokens // plan.ffn.dp)
    widest = max(
        max(own * attention_width(block, plan.attention.tp), others * ffn_width(block, plan.ffn.tp, plan.ffn.ep))
        for block in kinds(instance)
    )
    hidden = instance.model.hidden
    return 4 * hidden * own + 2 * widest, 4 * instance.model.vocab * -(-seqs // plan.attention.dp)
