"""One function per constraint family. Numbers (C1, ...) refer to the statement in `program.py`.

A function returns the constraints that bind; what else it adds only tabulates, and has a solution for every plan. So a
family is switched off by enforcing what it returned on a literal that is false.

Coefficients are those of `sizes.py`: whole bytes, nothing is rounded.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from apex_opt.evaluate import IMBALANCE
from apex_opt.plans.memory import RUNTIME_BYTES, at_once, buffer_bytes, processes

from .blocks import Pools
from .engine import Runs
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
    vocab_bytes,
    vocab_on,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from apex_opt.evaluate import Instance
    from apex_opt.ir.cells import Piece
    from apex_opt.ir.model import Block
    from apex_opt.plans.speculation import Drafter

    from .variables import Variables

    Family = Callable[[cp_model.CpModel, Instance, Variables], list[cp_model.Constraint]]

_ARITHMETIC = {"bf16": "bf16", "fp16": "fp16", "w8a8": "int8"}
"""What the GPU must multiply in; others are expanded to whichever 16-bit type it has, where it has not their own."""


def cells_share_devices(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """C1, C2: both cells are cut over the devices of a stage, no copies are common, and all stages fit the cluster."""
    gpus = instance.max_devices
    model.add_allowed_assignments(
        [v.stages, v.devices],
        [(s, g) for s in range(1, min(gpus, instance.model.layers) + 1) for g in range(1, gpus // s + 1)],
    )
    pairs = [(dp, tp) for dp in range(1, gpus + 1) for tp in range(1, gpus // dp + 1)]
    model.add_allowed_assignments([v.attention_dp, v.attention_tp, v.devices], [(d, t, d * t) for d, t in pairs])
    experts = gpus if instance.model.is_moe else 1
    model.add_allowed_assignments(
        [v.ffn_dp, v.ffn_tp, v.ffn_ep, v.devices],
        [(d, t, e, d * t * e) for d, t in pairs for e in range(1, min(experts, gpus // (d * t)) + 1)],
    )
    # Without common factors both divide the devices together.
    model.add_allowed_assignments([v.attention_dp, v.ffn_dp], [(a, f) for a, f in pairs if math.gcd(a, f) == 1])


def tasks_divide(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C3: equal shards. Heads, columns and experts divide; KV heads divide or are copied a whole number of times."""
    degrees = range(1, instance.max_devices + 1)
    return [
        _holds(model, "heads_divide", [v.attention_tp], ((t, heads_divide(instance, t)) for t in degrees)),
        _holds(
            model,
            "columns_divide",
            [v.ffn_tp, v.ffn_ep],
            ((t, e, columns_divide(instance, t, e)) for t, e in shards(instance)),
        ),
    ]


def heads_divide(instance: Instance, tp: int) -> bool:
    """Whether attention shards are equal in every block."""
    return all(_divides(piece, tp) for block in kinds(instance) for piece in block.attention.pieces)


def stages_of(instance: Instance) -> range:
    """Numbers of stages that there can be."""
    return range(1, min(instance.max_devices, instance.model.layers) + 1)


def copies_draft(instance: Instance, drafter: Drafter) -> bool:
    """Whether attention copies may make these drafts."""
    rules = instance.settings.runnable
    copied = None if rules is None else rules.copied_drafts
    known = copied is None or drafter.method in copied
    return known and instance.settings.scheduler.name in ("vllm", "sglang", "trtllm")


def draft_heads(instance: Instance, drafter: Drafter | None, tp: int) -> bool:
    """Whether attention of what makes drafts is cut into equal shards.

    Parameters
    ----------
    instance
    drafter : Drafter or None    how drafts are made
    tp : int                     shards
    """
    blocks = draft_blocks(instance, drafter)
    return all(_divides(piece, tp) for block in blocks for piece in block.attention.pieces)


def draft_columns(instance: Instance, drafter: Drafter | None, tp: int, ep: int) -> bool:
    """Whether the FFN of what makes drafts is.

    Parameters
    ----------
    instance
    drafter : Drafter or None    how drafts are made
    tp : int                     shards
    ep : int                     groups of experts
    """
    by = {("tp",): tp, ("ep",): ep, ("tp", "ep"): tp * ep}
    blocks = draft_blocks(instance, drafter)
    return all(_divides(piece, by[piece.by]) for block in blocks for piece in block.ffn.pieces)


def columns_divide(instance: Instance, tp: int, ep: int) -> bool:
    """Whether FFN shards are equal in every block.

    Parameters
    ----------
    instance
    tp : int    shards
    ep : int    groups of experts
    """
    shards = {("tp",): tp, ("ep",): ep, ("tp", "ep"): tp * ep}
    return all(_divides(piece, shards[piece.by]) for block in kinds(instance) for piece in block.ffn.pieces)


def _divides(piece: Piece, shards: int) -> bool:
    return piece.size % shards == 0 or (piece.copied and shards % piece.size == 0)


def computes(instance: Instance, weight_format: str) -> bool:
    """Whether the GPU multiplies in the format, or in all of a mixed one, or expands it to one in which it does."""
    needed = (_ARITHMETIC[part] for part in weight_format.split("+") if part in _ARITHMETIC)
    return all(instance.cluster.gpu.supports(dtype) for dtype in needed)


def balanced(instance: Instance, stages: int) -> bool:
    """Whether the largest of so many stages holds at most 3/2 of the mean layers."""
    layers = instance.model.layers
    return stages * -(-layers // stages) * IMBALANCE[1] <= IMBALANCE[0] * layers


def hardware_computes_format(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C4: the GPU multiplies in the format, or expands it to one in which it does."""
    names = instance.weight_formats
    return [_holds(model, "computes", [v.formats], ((i, computes(instance, name)) for i, name in enumerate(names)))]


def engine_runs(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C4: the engine that is to run the plan can, and drafts can be made."""
    runs, degrees, formats = Runs(instance), range(1, instance.max_devices + 1), range(len(instance.weight_formats))
    pairs = [(d, t) for d in degrees for t in range(1, instance.max_devices // d + 1)]
    cut = shards(instance)
    drafted, pools = [(i, drafter) for i, drafter in enumerate(instance.drafters)], Pools(instance)
    drafts = (
        [
            _holds(
                model,
                "one_stage_drafts",
                [v.drafts, v.stages],
                ((i, s, d is None or s == 1) for i, d in drafted for s in stages_of(instance)),
            ),
            _holds(
                model,
                "one_copy_drafts",
                [v.drafts, v.attention_dp],
                ((i, n, d is None or n == 1 or copies_draft(instance, d)) for i, d in drafted for n in degrees),
            ),
            _holds(
                model,
                "draft_heads",
                [v.drafts, v.attention_tp],
                ((i, t, draft_heads(instance, d, t)) for i, d in drafted for t in degrees),
            ),
            _holds(
                model,
                "draft_columns",
                [v.drafts, v.ffn_tp, v.ffn_ep],
                ((i, t, e, draft_columns(instance, d, t, e)) for i, d in drafted for t, e in cut),
            ),
        ]
        if any(instance.drafters)
        else []
    )
    if pools.varied:
        drafts.append(
            _holds(
                model,
                "one_pool",
                [v.drafts, v.attention_tp, v.formats],
                (
                    (i, t, f, pools.of(d, t, kv) is not None)
                    for i, d in drafted
                    for t in degrees
                    for f, kv in enumerate(instance.kv_formats)
                ),
            )
        )
    if instance.shares is not None:
        side_by_side = [
            _holds(model, "one_stage_shared", [v.stages], ((s, runs.shares and s == 1) for s in stages_of(instance))),
            _holds(model, "one_copy_shared", [v.attention_dp], ((n, runs.shares and n == 1) for n in degrees)),
        ]
        drafts += side_by_side
    if instance.overlap is not None:
        groups = [(d, t, e) for t, e in cut for d in range(1, instance.max_devices // (t * e) + 1)]
        drafts += [
            _holds(model, "one_stage_split", [v.stages], ((s, runs.overlap and s == 1) for s in stages_of(instance))),
            _holds(model, "copies_split", [v.attention_dp], ((n, n > 1) for n in degrees)),
            _holds(model, "formats_split", [v.formats], ((f, runs.splits(f)) for f in formats)),
            _holds(model, "no_drafts_split", [v.drafts], ((i, d is None) for i, d in drafted)),
            _holds(
                model,
                "experts_split",
                [v.ffn_dp, v.ffn_tp, v.ffn_ep],
                ((d, t, e, d == t == 1 and e > 1) for d, t, e in groups),
            ),
        ]
    if instance.settings.runnable is None:
        return drafts
    return [
        *drafts,
        _holds(model, "engine_stages", [v.stages], ((s, runs.stages(s)) for s in stages_of(instance))),
        _holds(model, "engine_copies", [v.ffn_dp], ((d, runs.ffn_copies(d)) for d in degrees)),
        _holds(
            model,
            "engine_attention",
            [v.attention_dp, v.attention_tp, v.formats],
            ((d, t, f, runs.attention(d, t, f)) for d, t in pairs for f in formats),
        ),
        _holds(
            model,
            "engine_ffn",
            [v.ffn_tp, v.ffn_ep, v.formats],
            ((t, e, f, runs.ffn(t, e, f)) for t, e in cut for f in formats),
        ),
    ]


def stages_balance(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C5: the largest stage holds at most 3/2 of the mean layers."""
    counts = range(1, min(instance.max_devices, instance.model.layers) + 1)
    return [_holds(model, "balanced", [v.stages], ((s, balanced(instance, s)) for s in counts))]


def weights_read_within_tpot(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C7: the weights one token passes through can be read within the tightest limit on time per output token."""
    limit = instance.decode_bytes_limit
    if limit is None:
        return []
    degrees = range(1, instance.max_devices + 1)
    head = _table(model, "head", [v.attention_tp], ((t, vocab_bytes(instance, t)) for t in degrees))
    total: list[cp_model.LinearExpr] = [head]
    whole = _shared_whole(model, instance, v)
    for u, (block, count) in enumerate(kinds(instance).items()):
        attention = _table(
            model,
            f"attention_read_{u}",
            [whole, v.attention_tp, v.formats],
            (
                (w, t, f, attention_side(instance, block, t, name, whole=bool(w), touched=True))
                for w in (0, 1)
                for t in degrees
                for f, name in enumerate(instance.weight_formats)
            ),
        )
        ffn = _table(
            model,
            f"ffn_read_{u}",
            [v.ffn_tp, v.ffn_ep, v.formats],
            (
                (t, e, f, ffn_side(instance, block, t, e, name, touched=True))
                for t, e in shards(instance)
                for f, name in enumerate(instance.weight_formats)
            ),
        )
        total += [count * attention, count * ffn]
    # As many tokens may come of one pass as there are drafts, and one more.
    passes = _table(
        model,
        "tokens_of_a_pass",
        [v.drafts],
        ((i, 1 + (d.draft_tokens if d else 0)) for i, d in enumerate(instance.drafters)),
    )
    return [model.add(cp_model.LinearExpr.sum(total) <= limit * passes)]


def _shared_whole(model: cp_model.CpModel, instance: Instance, v: Variables) -> cp_model.IntVar:
    """Whether what is shared beside experts is whole on every device."""
    if not instance.held.whole_shared:
        return model.new_constant(0)
    degrees = range(1, instance.max_devices + 1)
    several = [
        _table(model, f"several_{name}", [degree], ((n, int(n > 1)) for n in degrees))
        for name, degree in (("copies", v.attention_dp), ("groups", v.ffn_ep))
    ]
    return _table(
        model,
        "shared_whole",
        several,
        ((a, b, int(shared_whole(instance, 1 + a, 1 + b))) for a in (0, 1) for b in (0, 1)),
    )


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
    whole = _shared_whole(model, instance, v)
    for u, block in enumerate(kinds(instance)):
        attention = _table(
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
        ffn = _table(
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
        layer = model.new_int_var(0, sum(_most(model, part) for part in (attention, ffn, *states)), f"layer_bytes_{u}")
        model.add(layer == attention + ffn + sum(states))
        per_layer.append(layer)
    shared = _shared_pools(instance, pools)
    for number, places in enumerate(shared):
        per_layer.append(
            _table(
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
    vocab = _table(model, "vocab_bytes", [v.attention_tp], ((t, vocab_bytes(instance, t)) for t in degrees))
    logits = _table(
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
        before = _table(model, "before", [v.attention_tp], ((t, before_bytes(instance, t)) for t in degrees))
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
    table = _table(
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
    heads = _table(
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
    cache = _table(
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
    columns = _table(
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
    hidden = _table(
        model,
        "hidden_bytes",
        [v.limits, v.attention_dp],
        (
            (i, d, 4 * instance.model.hidden * -(-tokens // limits_shared(instance, d)))
            for i, tokens in batches
            for d in degrees
        ),
    )
    heads = _table(
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
    ffn = _table(
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
        counts = _table(model, f"{name}_layers_{u}", [v.stages], ((s, held[u]) for s, held in rows.items()))
        most = _most(model, counts) * _most(model, layer)
        product = model.new_int_var(0, most, f"{name}_bytes_{u}")
        model.add_multiplication_equality(product, [counts, layer])
        total.append(product)
    return cp_model.LinearExpr.sum(total)


def _most(model: cp_model.CpModel, variable: cp_model.IntVar) -> int:
    """The greatest value of a variable's domain."""
    return int(max(model.proto.variables[variable.index].domain))


def _table(
    model: cp_model.CpModel, name: str, keys: list[cp_model.IntVar], rows: Iterable[tuple[int, ...]]
) -> cp_model.IntVar:
    """A variable that is a tabulated function of others; the last column is its value."""
    table = list(rows)
    values = sorted({row[-1] for row in table})
    result = model.new_int_var(values[0], values[-1], name)
    model.add_allowed_assignments([*keys, result], table)
    return result


def _holds(
    model: cp_model.CpModel, name: str, keys: list[cp_model.IntVar], rows: Iterable[tuple[int, ...]]
) -> cp_model.Constraint:
    """A tabulated condition: the last column says whether it holds. Unlike a table, a sum can be enforced anywhere."""
    return model.add(_table(model, name, keys, rows) == 1)


FAMILIES: dict[str, Family] = {
    "divisibility": tasks_divide,
    "format": hardware_computes_format,
    "engine": engine_runs,
    "memory": stage_fits_memory,
    "bandwidth": weights_read_within_tpot,
    "balance": stages_balance,
}
"""By the names of `apex_opt.evaluate.FAMILIES`; each can be built alone."""
