"""One function per constraint family. Numbers (C1, ...) refer to the statement in `program.py`.

A function returns the constraints that bind; what else it adds only tabulates, and has a solution for every plan. So a
family is switched off by enforcing what it returned on a literal that is false.

Coefficients are counted here from the tasks of the cells (head groups, columns, experts), independently of
`apex_opt.plan.memory`, so that the oracle can find fault with either. All are whole bytes: nothing is rounded.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from apex_opt.evaluate import IMBALANCE
from apex_opt.ir.formats import FORMATS, KV_BYTES
from apex_opt.ir.model import Attention, DenseFfn, LatentAttention
from apex_opt.plan.memory import RUNTIME_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from apex_opt.evaluate import Instance
    from apex_opt.ir.model import Block
    from formulations.plan_space.variables import Variables

    Family = Callable[[cp_model.CpModel, Instance, Variables], list[cp_model.Constraint]]

_ARITHMETIC = {"bf16": "bf16", "fp16": "fp16", "fp8": "fp8", "nvfp4": "fp4"}
"""What the GPU must multiply in; the other formats are expanded to whichever 16-bit type it has."""


def cells_share_devices(model: cp_model.CpModel, instance: Instance, v: Variables) -> None:
    """C1, C2: both cells are cut over the devices of a stage, and all stages of all replicas fit the cluster."""
    gpus = instance.max_devices
    model.add_allowed_assignments(
        [v.replicas, v.stages, v.devices],
        [
            (r, s, g)
            for s in range(1, min(gpus, instance.model.layers) + 1)
            for g in range(1, gpus // s + 1)
            for r in range(1, gpus // (s * g) + 1)
        ],
    )
    pairs = [(dp, tp) for dp in range(1, gpus + 1) for tp in range(1, gpus // dp + 1)]
    model.add_allowed_assignments([v.attention_dp, v.attention_tp, v.devices], [(d, t, d * t) for d, t in pairs])
    experts = gpus if instance.model.is_moe else 1
    model.add_allowed_assignments(
        [v.ffn_dp, v.ffn_tp, v.ffn_ep, v.devices],
        [(d, t, e, d * t * e) for d, t in pairs for e in range(1, min(experts, gpus // (d * t)) + 1)],
    )


def tasks_divide(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C3: equal shards. Heads, columns and experts divide; KV heads divide or are copied a whole number of times."""
    degrees = range(1, instance.max_devices + 1)
    return [
        _holds(model, "heads_divide", [v.attention_tp], ((t, heads_divide(instance, t)) for t in degrees)),
        _holds(
            model,
            "columns_divide",
            [v.ffn_tp, v.ffn_ep],
            ((t, e, columns_divide(instance, t, e)) for t, e in _shards(instance)),
        ),
    ]


def heads_divide(instance: Instance, tp: int) -> bool:
    """Whether attention shards are equal in every block."""
    cells = [block.attention for block in _kinds(instance)]
    return all(
        c.query_heads % tp == 0 and (isinstance(c, LatentAttention) or c.kv_heads % tp == 0 or tp % c.kv_heads == 0)
        for c in cells
    )


def columns_divide(instance: Instance, tp: int, ep: int) -> bool:
    """Whether FFN shards are equal in every block."""
    for block in _kinds(instance):
        ffn = block.ffn
        if isinstance(ffn, DenseFfn):
            if ffn.intermediate % (tp * ep):
                return False
        elif ffn.experts % ep or ffn.expert_intermediate % tp or ffn.shared_intermediate % (tp * ep):
            return False
    return True


def computes(instance: Instance, weight_format: str) -> bool:
    """Whether the GPU multiplies in the format, or expands it to one in which it does."""
    return weight_format not in _ARITHMETIC or instance.cluster.gpu.supports(_ARITHMETIC[weight_format])


def balanced(instance: Instance, stages: int) -> bool:
    """Whether the largest of so many stages holds at most 3/2 of the mean layers."""
    layers = instance.model.layers
    return stages * -(-layers // stages) * IMBALANCE[1] <= IMBALANCE[0] * layers


def hardware_computes_format(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C4: the GPU multiplies in the format, or expands it to one in which it does."""
    names = instance.weight_formats
    return [_holds(model, "computes", [v.formats], ((i, computes(instance, name)) for i, name in enumerate(names)))]


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
    head = _table(model, "head", [v.attention_tp], ((t, _vocab_bytes(instance, t)) for t in degrees))
    total: list[cp_model.LinearExpr] = [head]
    for u, (block, count) in enumerate(_kinds(instance).items()):
        attention = _table(
            model,
            f"attention_read_{u}",
            [v.attention_tp, v.formats],
            (
                (t, f, _attention_bytes(block, t, name))
                for t in degrees
                for f, name in enumerate(instance.weight_formats)
            ),
        )
        ffn = _table(
            model,
            f"ffn_read_{u}",
            [v.ffn_tp, v.ffn_ep, v.formats],
            (
                (t, e, f, _ffn_bytes(block, t, e, name, touched=True))
                for t, e in _shards(instance)
                for f, name in enumerate(instance.weight_formats)
            ),
        )
        total += [count * attention, count * ffn]
    return [model.add(cp_model.LinearExpr.sum(total) <= limit)]


def stage_fits_memory(model: cp_model.CpModel, instance: Instance, v: Variables) -> list[cp_model.Constraint]:
    """C6: weights, workspace, runtime and the KV cache of the longest request fit every device of every stage."""
    degrees = range(1, instance.max_devices + 1)
    formats = list(enumerate(instance.weight_formats))
    tokens = instance.kv_blocks_needed + 1  # one block is never handed out
    tokens *= instance.settings.block_size
    per_layer = []
    for u, block in enumerate(_kinds(instance)):
        attention = _table(
            model,
            f"attention_bytes_{u}",
            [v.attention_tp, v.formats],
            (
                (
                    t,
                    f,
                    _attention_bytes(block, t, name)
                    + 4 * block.hidden  # two norms of 16-bit weights
                    + tokens * _kv_bytes(block, t, instance.kv_formats[f]),
                )
                for t in degrees
                for f, name in formats
            ),
        )
        ffn = _table(
            model,
            f"ffn_bytes_{u}",
            [v.ffn_tp, v.ffn_ep, v.formats],
            (
                (t, e, f, _ffn_bytes(block, t, e, name, touched=False))
                for t, e in _shards(instance)
                for f, name in formats
            ),
        )
        layer = model.new_int_var(0, 1 << 50, f"layer_bytes_{u}")
        model.add(layer == attention + ffn)
        per_layer.append(layer)
    vocab = _table(model, "vocab_bytes", [v.attention_tp], ((t, _vocab_bytes(instance, t)) for t in degrees))
    logits = _table(
        model,
        "logit_bytes",
        [v.attention_dp],
        ((d, 4 * instance.model.vocab * -(-instance.settings.max_num_seqs // d)) for d in degrees),
    )
    capacity = int(instance.cluster.gpu.memory_bytes * instance.settings.gpu_memory_utilization) - RUNTIME_BYTES
    norm = 2 * instance.model.hidden
    copies = 1 if instance.model.tied_embeddings else 2
    alone = model.new_bool_var("one_stage")
    model.add(v.stages == 1).only_enforce_if(alone)
    model.add(v.stages > 1).only_enforce_if(alone.negated())
    kinds = _critical_stages(instance)
    held = {
        place: [_layers_held(model, instance, v, per_layer, f"{place}{i}", rows) for i, rows in enumerate(options)]
        for place, options in kinds.items()
    }
    bounds = []
    for workspace in _workspaces(model, instance, v):
        for layers in held["first"]:
            lone = model.add(layers + copies * vocab + norm + workspace + logits <= capacity)
            front = model.add(layers + vocab + workspace <= capacity)
            bounds += [lone.only_enforce_if(alone), front.only_enforce_if(alone.negated())]
        for layers in held["last"]:
            back = model.add(layers + vocab + norm + workspace + logits <= capacity)
            bounds.append(back.only_enforce_if(alone.negated()))
        bounds += [model.add(layers + workspace <= capacity) for layers in held["middle"]]
    return bounds


def _workspaces(model: cp_model.CpModel, instance: Instance, v: Variables) -> Iterable[cp_model.LinearExpr]:
    """Activations of the attention and of the FFN cell beside two hidden states: each must fit, hence the larger."""
    degrees = range(1, instance.max_devices + 1)
    batch = instance.settings.max_num_batched_tokens
    blocks = list(_kinds(instance))
    hidden = _table(
        model, "hidden_bytes", [v.attention_dp], ((d, 4 * instance.model.hidden * -(-batch // d)) for d in degrees)
    )
    heads = _table(
        model,
        "attention_workspace",
        [v.attention_dp, v.attention_tp],
        (
            (d, t, 2 * -(-batch // d) * max(_attention_width(b, t) for b in blocks))
            for d in degrees
            for t in range(1, instance.max_devices // d + 1)
        ),
    )
    ffn = _table(
        model,
        "ffn_workspace",
        [v.ffn_dp, v.ffn_tp, v.ffn_ep],
        (
            (d, t, e, 2 * -(-batch // d) * max(_ffn_width(b, t, e) for b in blocks))
            for t, e in _shards(instance)
            for d in range(1, instance.max_devices // (t * e) + 1)
        ),
    )
    return hidden + heads, hidden + ffn


def _critical_stages(instance: Instance) -> dict[str, list[dict[int, tuple[int, ...]]]]:
    """Layers of each kind held by the stages that can be the fullest, by number of stages.

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
            tuple(b - a for a, b in zip(before[lo], before[hi], strict=True)) for lo, hi in itertools.pairwise(ends)
        ]
        first[stages], last[stages] = held[0], held[-1]
        inner = {h for h in held[1:-1] if not _below(h, held[0])}
        middles[stages] = [h for h in inner if not any(_below(h, o) for o in inner if o != h)]
    width = max(map(len, middles.values()))
    nothing = before[0]
    middle = [
        {s: (options[i] if i < len(options) else nothing) for s, options in middles.items()} for i in range(width)
    ]
    return {"first": [first], "last": [last], "middle": middle}


def _layers_before(instance: Instance) -> list[tuple[int, ...]]:
    """How many layers of each kind come before each layer, and at the end."""
    kinds = {block: u for u, block in enumerate(_kinds(instance))}
    counts = [0] * len(kinds)
    result = [tuple(counts)]
    for run in instance.model.runs:
        u = kinds[_kind(run.block)]
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
        product = model.new_int_var(0, 1 << 56, f"{name}_bytes_{u}")
        model.add_multiplication_equality(product, [counts, layer])
        total.append(product)
    return cp_model.LinearExpr.sum(total)


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


def _kinds(instance: Instance) -> dict[Block, int]:
    """Blocks that differ in what they take, each with its number of layers, in the order in which they first come."""
    layers: Counter[Block] = Counter()
    for run in instance.model.runs:
        layers[_kind(run.block)] += run.count
    return layers


def _kind(block: Block) -> Block:
    """A block without its window, which changes neither bytes nor shards."""
    cell = block.attention
    return replace(block, attention=replace(cell, window=None)) if isinstance(cell, Attention) else block


def _shards(instance: Instance) -> list[tuple[int, int]]:
    """Degrees (tp, ep) that could occur together."""
    gpus = instance.max_devices
    experts = gpus if instance.model.is_moe else 1
    return [(t, e) for t in range(1, gpus + 1) for e in range(1, min(experts, gpus // t) + 1)]


def _heads(cell: Attention, tp: int) -> tuple[int, int]:
    """Widths of the query heads and of the KV heads in one attention shard."""
    return -(-cell.query_heads // tp) * cell.head_dim, -(-cell.kv_heads // tp) * cell.head_dim


def _packed(weights: int, name: str, quantised: bool) -> int:
    if not quantised:
        return 2 * weights
    bits = FORMATS[name].weight_bits
    return -(-weights * bits.numerator // (8 * bits.denominator))


def _attention_bytes(block: Block, tp: int, name: str) -> int:
    """Weights of one attention shard: a column of Q and of O per query element, of K and V per KV element."""
    cell = block.attention
    if isinstance(cell, LatentAttention):
        return _latent_bytes(cell, tp, name)
    query, kv = _heads(cell, tp)
    norms = query + kv if cell.qk_norm_whole else 2 * cell.head_dim * cell.qk_norm
    small = norms + cell.hidden * cell.output_bias + (query + 2 * kv) * cell.qkv_bias
    small += -(-cell.query_heads // tp) * cell.sinks
    return _packed(2 * cell.hidden * (query + kv), name, cell.quantised) + 2 * small


def _latent_bytes(cell: LatentAttention, tp: int, name: str) -> int:
    """Weights of one shard of latent attention: compressions and their norms whole, per head what expands them."""
    heads, latent, rope = -(-cell.query_heads // tp), cell.kv_lora_rank, cell.rope_head_dim
    query_in = cell.hidden if cell.q_lora_rank is None else cell.q_lora_rank
    compressed = 0 if cell.q_lora_rank is None else cell.q_lora_rank
    inner = cell.hidden * (compressed + latent + rope)
    inner += heads * (query_in * (cell.nope_head_dim + rope) + latent * (cell.nope_head_dim + cell.v_head_dim))
    output = heads * cell.v_head_dim * cell.hidden
    norms = 2 * (compressed + latent)
    if cell.quantised and cell.output_quantised:
        return _packed(inner + output, name, True) + norms
    return _packed(inner, name, cell.quantised) + _packed(output, name, cell.output_quantised) + norms


def _attention_width(block: Block, tp: int) -> int:
    """Elements alive per token inside one attention shard."""
    cell = block.attention
    if isinstance(cell, LatentAttention):
        query = cell.nope_head_dim + cell.rope_head_dim
        per_head = query + query + cell.nope_head_dim + cell.v_head_dim
        compressed = 0 if cell.q_lora_rank is None else cell.q_lora_rank
        return -(-cell.query_heads // tp) * per_head + compressed + cell.kv_lora_rank + cell.rope_head_dim
    query, kv = _heads(cell, tp)
    return query + 2 * kv


def _kv_bytes(block: Block, tp: int, name: str) -> int:
    cell = block.attention
    if isinstance(cell, LatentAttention):
        return (cell.kv_lora_rank + cell.rope_head_dim) * KV_BYTES[name]
    return 2 * _heads(cell, tp)[1] * KV_BYTES[name]


def _ffn_bytes(block: Block, tp: int, ep: int, name: str, *, touched: bool) -> int:
    """Weights of one FFN shard, or only those that a single token certainly touches."""
    cell = block.ffn
    matrices = 3 if cell.gated else 2
    if isinstance(cell, DenseFfn):
        columns = -(-cell.intermediate // (tp * ep))
        bias = (columns * (matrices - 1) + cell.hidden) * cell.bias * (not touched)
        return _packed(matrices * columns * cell.hidden, name, cell.quantised) + 2 * bias
    experts = -(-(cell.experts_per_token if touched else cell.experts) // ep)
    columns = -(-cell.expert_intermediate // tp)
    routed = matrices * experts * columns * cell.hidden
    shared = matrices * -(-cell.shared_intermediate // (tp * ep)) * cell.hidden
    if cell.quantised == cell.shared_quantised:
        packed = _packed(routed + shared, name, cell.quantised)
    else:
        packed = _packed(routed, name, cell.quantised) + _packed(shared, name, cell.shared_quantised)
    if touched:
        return packed
    bias = experts * (columns * (matrices - 1) + cell.hidden) * cell.bias
    return packed + 2 * (bias + cell.router_parameters)


def _ffn_width(block: Block, tp: int, ep: int) -> int:
    """Elements alive per token inside one FFN shard."""
    cell = block.ffn
    matrices = 3 if cell.gated else 2
    if isinstance(cell, DenseFfn):
        return matrices * -(-cell.intermediate // (tp * ep))
    return cell.experts_per_token * (cell.hidden + matrices * -(-cell.expert_intermediate // tp))


def _vocab_bytes(instance: Instance, tp: int) -> int:
    return 2 * instance.model.hidden * -(-instance.model.vocab // tp)


FAMILIES: dict[str, Family] = {
    "divisibility": tasks_divide,
    "format": hardware_computes_format,
    "memory": stage_fits_memory,
    "bandwidth": weights_read_within_tpot,
    "balance": stages_balance,
}
"""By the names of `apex_opt.evaluate.FAMILIES`; each can be built alone."""
