"""C6, memory: what each device of each stage holds, by the layers on it. Coefficients are whole bytes of `sizes.py`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from apex_opt.plans.memory import RUNTIME_BYTES, at_once, buffer_bytes, processes

from .blocks import Pools
from .sizes import (
    attention_side,
    attention_width,
    batch_limits,
    before_bytes,
    draft_attention_side,
    draft_blocks,
    draft_ffn_side,
    ffn_side,
    ffn_width,
    kind,
    kinds,
    limits_shared,
    shards,
    shared_whole,
    stages_of,
    vocab_bytes,
    vocab_on,
)
from .tables import greatest, tabulated

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.ir.model import Block
    from apex_opt.oracle.instance import Instance

    from .variables import Variables


def stage_fits_memory(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C6: weights, workspace, runtime and the KV cache of the longest request fit every device of every stage."""
    degrees = range(1, instance.max_devices + 1)
    formats = list(enumerate(instance.weight_formats))
    pools = Pools(instance)
    # How much is kept of windows depends on the tokens of a batch as well.
    limits = [(i, tokens) for i, (_, tokens) in enumerate(batch_limits(instance) if pools.windowed else [(0, 0)])]
    by_limits = [v.limits] if pools.windowed else []
    vocab_size = instance.model.vocab
    rows = [1 + (drafter.draft_tokens if drafter else 0) for drafter in instance.drafters]
    per_layer = []
    whole = shared_lies_whole(model, instance, v)
    for u, block in enumerate(kinds(instance)):
        attention = tabulated(
            model,
            f"attention_bytes_{u}",
            [v.drafts, *by_limits, whole, v.attention_tp, v.formats],
            (
                (
                    i,
                    *([n] if by_limits else []),
                    w,
                    t,
                    f,
                    attention_side(instance, block, t, name, whole=bool(w), touched=False)
                    + 2 * block.own_parameters
                    + pools.layer_bytes(block, drafter, batched, t, instance.kv_formats[f]),
                )
                for i, drafter in enumerate(instance.drafters)
                for n, batched in limits
                for w in (0, 1)
                for t in degrees
                for f, name in formats
            ),
        )
        ffn = tabulated(
            model,
            f"ffn_bytes_{u}",
            [v.ffn_tp, v.ffn_ep, v.formats],
            (
                (t, e, f, ffn_side(instance, block, t, e, name, touched=False))
                for t, e in shards(instance)
                for f, name in formats
            ),
        )
        states = _states(model, instance, v, pools, block)
        layer = model.new_int_var(
            0, sum(greatest(model, part) for part in (attention, ffn, *states)), f"layer_bytes_{u}"
        )
        model.add(layer == attention + ffn + sum(states))
        per_layer.append(layer)
    shared = _shared_pools(instance, pools)
    for number, places in enumerate(shared):
        per_layer.append(
            tabulated(
                model,
                f"shared_bytes_{number}",
                [v.drafts, *by_limits, v.attention_tp, v.formats],
                (
                    (i, *([n] if by_limits else []), t, f, pools.shared_bytes(drafter, batched, t, kv, places))
                    for i, drafter in enumerate(instance.drafters)
                    for n, batched in limits
                    for t in degrees
                    for f, kv in enumerate(instance.kv_formats)
                ),
            )
        )
    vocab = tabulated(model, "vocab_bytes", [v.attention_tp], ((t, vocab_bytes(instance, t)) for t in degrees))
    logits = tabulated(
        model,
        "logit_bytes",
        [v.drafts, v.limits, v.attention_dp],
        (
            (j, i, d, 4 * vocab_size * -(-min(seqs * rows[j], most) // limits_shared(instance, d)))
            for j, drafter in enumerate(instance.drafters)
            for i, (seqs, most) in enumerate(batch_limits(instance, drafter))
            for d in degrees
        ),
    )
    drafting = _drafting(model, instance, v, whole, pools)
    capacity = int(instance.cluster.gpu.memory_bytes * instance.settings.gpu_memory_utilization)
    capacity -= processes(instance.shares) * RUNTIME_BYTES + buffer_bytes(instance.overlap)
    capacity -= instance.held.table_bytes
    before: cp_model.IntVar | int = before_bytes(instance, 1)
    if instance.model.encoder is not None:
        before = tabulated(model, "before", [v.attention_tp], ((t, before_bytes(instance, t)) for t in degrees))
    after = 2 * instance.model.after_parameters
    copies, first, middle, last = (
        vocab_on(instance, first=f, last=z) * vocab
        for f, z in ((True, True), (True, False), (False, False), (False, True))
    )
    alone = model.new_bool_var("one_stage")
    model.add(v.stages == 1).only_enforce_if(alone)
    model.add(v.stages > 1).only_enforce_if(alone.negated())
    critical = _critical_stages(instance, shared)
    held = {
        place: [_layers_held(model, instance, v, per_layer, f"{place}{i}", rows) for i, rows in enumerate(options)]
        for place, options in critical.items()
    }
    bounds = []
    batches = at_once(instance.shares)
    for workspace in (batches * one for one in _workspaces(model, instance, v)):
        for layers in held["first"]:
            lone = model.add(layers + copies + before + after + workspace + batches * logits + drafting <= capacity)
            front = model.add(layers + first + before + workspace <= capacity)
            bounds += [lone.only_enforce_if(alone), front.only_enforce_if(alone.negated())]
        for layers in held["last"]:
            back = model.add(layers + last + after + workspace + batches * logits <= capacity)
            bounds.append(back.only_enforce_if(alone.negated()))
        bounds += [model.add(layers + middle + workspace <= capacity) for layers in held["middle"]]
    return bounds


def shared_lies_whole(model: cp_model.CpModel, instance: Instance, v: Variables) -> cp_model.IntVar:
    """Whether what is shared beside experts is whole on every device."""
    if not instance.held.whole_shared:
        return model.new_constant(0)
    degrees = range(1, instance.max_devices + 1)
    several = [
        tabulated(model, f"several_{name}", [degree], ((n, int(n > 1)) for n in degrees))
        for name, degree in (("copies", v.attention_dp), ("groups", v.ffn_ep))
    ]
    return tabulated(
        model,
        "shared_whole",
        several,
        ((a, b, int(shared_whole(instance, 1 + a, 1 + b))) for a in (0, 1) for b in (0, 1)),
    )


def _states(
    model: cp_model.CpModel, instance: Instance, v: Variables, pools: Pools, block: Block
) -> list[cp_model.IntVar]:
    """Bytes of the states of a layer that lie apart from the blocks, if any: of all sequences that can run.

    Parameters
    ----------
    model, instance, v
    pools : Pools
    block : Block    of the layer
    """
    if not pools.apart:
        return []
    degrees = range(1, instance.max_devices + 1)
    table = tabulated(
        model,
        "states_bytes",
        [v.drafts, v.limits, v.stages, v.attention_dp, v.attention_tp],
        (
            (i, n, s, d, t, pools.seats(seqs, d, s) * pools.states_bytes(block, drafter, t))
            for i, drafter in enumerate(instance.drafters)
            for n, (seqs, _) in enumerate(batch_limits(instance, drafter))
            for s in stages_of(instance)
            for d in range(1, len(degrees) // s + 1)
            for t in range(1, len(degrees) // (s * d) + 1)
        ),
    )
    return [table]


def _shared_pools(instance: Instance, pools: Pools) -> list[tuple[tuple[int, ...], ...]]:
    """The ways there are to put layers into several groups: the layers of each."""
    if not pools.varied:
        return []
    found = (
        pools.of(drafter, t, kv)
        for drafter in instance.drafters
        for t in range(1, instance.max_devices + 1)
        for kv in instance.kv_formats
    )
    return list(dict.fromkeys(pool.places for pool in found if pool is not None and len(pool.groups) > 1))


def _drafting(
    model: cp_model.CpModel, instance: Instance, v: Variables, whole: cp_model.IntVar, pools: Pools
) -> cp_model.LinearExpr:
    """Bytes of what makes drafts, which only lies where there is one stage: by attention shards and by FFN shards.

    Parameters
    ----------
    model, instance, v
    whole : IntVar    whether what is shared beside experts is whole on every device
    pools : Pools
    """
    if not any(instance.drafters):
        return cp_model.LinearExpr.sum([])
    formats, degrees = list(enumerate(instance.weight_formats)), range(1, instance.max_devices + 1)
    drafted = list(enumerate(instance.drafters))
    heads = tabulated(
        model,
        "draft_attention_bytes",
        [v.drafts, whole, v.attention_tp, v.formats],
        (
            (i, w, t, f, draft_attention_side(instance, d, t, name, whole=bool(w)))
            for i, d in drafted
            for w in (0, 1)
            for t in degrees
            for f, name in formats
        ),
    )
    cache = tabulated(
        model,
        "draft_cache_bytes",
        [v.drafts, v.limits, v.attention_tp, v.formats],
        (
            (i, n, t, f, sum(pools.layer_bytes(block, d, batched, t, kv) for block in draft_blocks(instance, d)))
            for i, d in drafted
            for n, (_, batched) in enumerate(batch_limits(instance))
            for t in degrees
            for f, kv in enumerate(instance.kv_formats)
        ),
    )
    columns = tabulated(
        model,
        "draft_ffn_bytes",
        [v.drafts, v.ffn_tp, v.ffn_ep, v.formats],
        (
            (i, t, e, f, draft_ffn_side(instance, d, t, e, name))
            for i, d in drafted
            for t, e in shards(instance)
            for f, name in formats
        ),
    )
    return heads + cache + columns


def _workspaces(model: cp_model.CpModel, instance: Instance, v: Variables) -> Iterable[cp_model.LinearExpr]:
    """Activations of the attention and of the FFN cell beside two hidden states: each must fit, hence the larger."""
    degrees = range(1, instance.max_devices + 1)
    batches = [(i, tokens) for i, (_, tokens) in enumerate(batch_limits(instance))]
    blocks = list(kinds(instance))
    widest = {t: max(attention_width(block, t) for block in blocks) for t in degrees}
    hidden = tabulated(
        model,
        "hidden_bytes",
        [v.limits, v.attention_dp],
        (
            (i, d, 4 * instance.model.hidden * -(-tokens // limits_shared(instance, d)))
            for i, tokens in batches
            for d in degrees
        ),
    )
    heads = tabulated(
        model,
        "attention_workspace",
        [v.limits, v.attention_dp, v.attention_tp],
        (
            (i, d, t, 2 * -(-tokens // limits_shared(instance, d)) * widest[t])
            for i, tokens in batches
            for d in degrees
            for t in range(1, instance.max_devices // d + 1)
        ),
    )
    ffn = tabulated(
        model,
        "ffn_workspace",
        [v.limits, v.ffn_dp, v.ffn_tp, v.ffn_ep],
        (
            (i, d, t, e, 2 * -(-tokens // d) * max(ffn_width(b, t, e) for b in blocks))
            for i, tokens in batches
            for t, e in shards(instance)
            for d in range(1, instance.max_devices // (t * e) + 1)
        ),
    )
    return hidden + heads, hidden + ffn


def _critical_stages(
    instance: Instance, shared: Iterable[tuple[tuple[int, ...], ...]]
) -> dict[str, list[dict[int, tuple[int, ...]]]]:
    """Layers of each kind held by the stages that can be the fullest, by number of stages, and of the fullest group.

    The latter for each way to put layers into groups that share their blocks, the layers of what makes drafts with
    those of the one stage.

    First and last are told apart for the embedding and the LM head. A middle stage matters only where it holds more
    of some kind than the first one does, which needs layers that differ; there, all maximal ones are kept.
    """
    before = _layers_before(instance)
    first: dict[int, tuple[int, ...]] = {}
    last: dict[int, tuple[int, ...]] = {}
    middles: dict[int, list[tuple[int, ...]]] = {}
    total = instance.model.layers
    for stages in range(1, min(instance.max_devices, total) + 1):
        base, more = divmod(total, stages)
        ends = [0]
        for stage in range(stages):
            ends.append(ends[-1] + base + (stage < more))
        held = [
            (
                *(b - a for a, b in zip(before[lo], before[hi], strict=True)),
                *(max(_within(its, lo, hi if stages > 1 else None) for its in places) for places in shared),
            )
            for lo, hi in itertools.pairwise(ends)
        ]
        first[stages], last[stages] = held[0], held[-1]
        inner = {h for h in held[1:-1] if not _below(h, held[0])}
        middles[stages] = [h for h in inner if not any(_below(h, o) for o in inner if o != h)]
    width = max(map(len, middles.values()))
    nothing = (0,) * len(first[1])
    middle = [
        {s: (options[i] if i < len(options) else nothing) for s, options in middles.items()} for i in range(width)
    ]
    return {"first": [first], "last": [last], "middle": middle}


def _within(places: tuple[int, ...], first: int, last: int | None) -> int:
    """How many layers of a group a stage holds."""
    return sum(first <= place and (last is None or place < last) for place in places)


def _layers_before(instance: Instance) -> list[tuple[int, ...]]:
    """How many layers of each kind come before each layer, and at the end."""
    order = {block: u for u, block in enumerate(kinds(instance))}
    counts = [0] * len(order)
    result = [tuple(counts)]
    for run in instance.model.runs:
        u = order[kind(run.block)]
        for _ in range(run.count):
            counts[u] += 1
            result.append(tuple(counts))
    return result


def _below(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))


def _layers_held(
    model: cp_model.CpModel,
    instance: Instance,
    v: Variables,
    per_layer: list[cp_model.IntVar],
    name: str,
    rows: dict[int, tuple[int, ...]],
) -> cp_model.LinearExpr:
    """Bytes of the layers on one stage: their number, which follows from the stages, times the bytes of one."""
    total = []
    for u, layer in enumerate(per_layer):
        counts = tabulated(model, f"{name}_layers_{u}", [v.stages], ((s, held[u]) for s, held in rows.items()))
        most = greatest(model, counts) * greatest(model, layer)
        product = model.new_int_var(0, most, f"{name}_bytes_{u}")
        model.add_multiplication_equality(product, [counts, layer])
        total.append(product)
    return cp_model.LinearExpr.sum(total)
