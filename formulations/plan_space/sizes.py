"""Bytes and widths of shards, counted from the tasks of the cells (head groups, columns, experts).

Counted independently of `apex_opt.plan.memory`, so that the oracle can find fault with either. All are whole bytes:
nothing is rounded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from apex_opt.ir.formats import FORMATS, KV_BYTES, get_format
from apex_opt.ir.model import Attention, DenseFfn, LatentAttention

if TYPE_CHECKING:
    from apex_opt.evaluate import Instance
    from apex_opt.ir.model import Block


def kinds(instance: Instance) -> dict[Block, int]:
    """Blocks that differ in what they take, each with its number of layers, in the order in which they first come."""
    layers: Counter[Block] = Counter()
    for run in instance.model.runs:
        layers[kind(run.block)] += run.count
    return layers


def kind(block: Block) -> Block:
    """A block without its window, which changes neither bytes nor shards."""
    cell = block.attention
    return replace(block, attention=replace(cell, window=None)) if isinstance(cell, Attention) else block


def shards(instance: Instance) -> list[tuple[int, int]]:
    """Degrees (tp, ep) that could occur together."""
    gpus = instance.max_devices
    experts = gpus if instance.model.is_moe else 1
    return [(t, e) for t in range(1, gpus + 1) for e in range(1, min(experts, gpus // t) + 1)]


def _heads(cell: Attention, tp: int) -> tuple[int, int]:
    """Widths of the query heads and of the KV heads in one attention shard."""
    return -(-cell.query_heads // tp) * cell.head_dim, -(-cell.kv_heads // tp) * cell.head_dim


def _packed(name: str, *matrices: tuple[int, int]) -> int:
    """Bytes of matrices, each given as which of the formats of a plan it is in, or 0 for 16 bit, and its weights."""
    named, parts = name.split("+"), Counter[str]()
    for quantised, weights in matrices:
        parts[named[quantised - 1 if quantised <= len(named) else -1] if quantised else "bf16"] += weights
    return sum(-(-weights * FORMATS[part].weight_bits // 8) for part, weights in parts.items())


def attention_bytes(block: Block, tp: int, name: str) -> int:
    """Weights of one attention shard: a column of Q and of O per query element, of K and V per KV element."""
    cell = block.attention
    if isinstance(cell, LatentAttention):
        return _latent_bytes(cell, tp, name)
    query, kv = _heads(cell, tp)
    norms = query + kv if cell.qk_norm_whole else 2 * cell.head_dim * cell.qk_norm
    small = norms + cell.hidden * cell.output_bias + (query + 2 * kv) * cell.qkv_bias
    small += -(-cell.query_heads // tp) * cell.sinks
    qkv, output = cell.hidden * (query + 2 * kv), cell.hidden * query
    return _packed(name, (cell.quantised, qkv), (cell.output_quantised, output)) + 2 * small


def _latent_bytes(cell: LatentAttention, tp: int, name: str) -> int:
    """Weights of one shard of latent attention: compressions and their norms whole, per head what expands them."""
    heads, latent, rope = -(-cell.query_heads // tp), cell.kv_lora_rank, cell.rope_head_dim
    query_in = cell.hidden if cell.q_lora_rank is None else cell.q_lora_rank
    compressed = 0 if cell.q_lora_rank is None else cell.q_lora_rank
    inner = cell.hidden * (compressed + latent + rope)
    inner += heads * (query_in * (cell.nope_head_dim + rope) + latent * (cell.nope_head_dim + cell.v_head_dim))
    output = heads * cell.v_head_dim * cell.hidden
    norms = 2 * (compressed + latent)
    return _packed(name, (cell.quantised, inner), (cell.output_quantised, output)) + norms


def attention_width(block: Block, tp: int) -> int:
    """Elements alive per token inside one attention shard."""
    cell = block.attention
    if isinstance(cell, LatentAttention):
        query = cell.nope_head_dim + cell.rope_head_dim
        per_head = query + query + cell.nope_head_dim + cell.v_head_dim
        compressed = 0 if cell.q_lora_rank is None else cell.q_lora_rank
        return -(-cell.query_heads // tp) * per_head + compressed + cell.kv_lora_rank + cell.rope_head_dim
    query, kv = _heads(cell, tp)
    return query + 2 * kv


def kv_bytes(block: Block, tp: int, name: str) -> int:
    cell = block.attention
    if isinstance(cell, LatentAttention):
        return (cell.kv_lora_rank + cell.rope_head_dim) * KV_BYTES[name]
    return 2 * _heads(cell, tp)[1] * KV_BYTES[name]


def dense_bytes(block: Block, shards: int, name: str, *, touched: bool) -> int:
    """Weights of one shard of what every token passes through: a dense FFN, or the one shared beside experts."""
    cell = block.ffn
    matrices = 3 if cell.gated else 2
    if isinstance(cell, DenseFfn):
        columns = -(-cell.intermediate // shards)
        bias = (columns * (matrices - 1) + cell.hidden) * cell.bias * (not touched)
        size = columns * cell.hidden
        return _packed(name, (cell.quantised, (matrices - 1) * size), (cell.down_quantised, size)) + 2 * bias
    shared = -(-cell.shared_intermediate // shards) * cell.hidden
    return _packed(name, (cell.shared_quantised, (matrices - 1) * shared), (cell.shared_down_quantised, shared))


def expert_bytes(instance: Instance, block: Block, tp: int, ep: int, name: str, *, touched: bool) -> int:
    """Weights of one shard of the experts and the router, or only those that a single token certainly touches."""
    cell = block.ffn
    if isinstance(cell, DenseFfn):
        return 0
    matrices = 3 if cell.gated else 2
    columns, hidden = -(-cell.expert_intermediate // tp), cell.hidden
    if touched:
        return _packed(name, (cell.quantised, matrices * -(-cell.experts_per_token // ep) * columns * hidden))
    for padded, by_hidden, by_columns in instance.held.padded:
        if padded == get_format(name).part(cell.quantised or 1).name:
            hidden, columns = hidden + -hidden % by_hidden, columns + -columns % by_columns
    experts = -(-cell.experts // ep)
    bias = experts * (columns * (matrices - 1) + hidden) * cell.bias
    routed = _packed(name, (cell.quantised, matrices * experts * columns * hidden))
    return routed + 2 * (bias + cell.router_parameters)


def attention_side(instance: Instance, block: Block, tp: int, name: str, *, whole: bool, touched: bool) -> int:
    """Weights that follow how attention is cut: its own, and where they lie in each copy those of dense FFNs.

    Parameters
    ----------
    whole : bool    `shared_whole` of the plan
    """
    shards = 1 if whole and not isinstance(block.ffn, DenseFfn) else tp
    dense = dense_bytes(block, shards, name, touched=touched) if instance.held.dense_per_copy else 0
    return attention_bytes(block, tp, name) + dense


def shared_whole(instance: Instance, copies: int, ep: int) -> bool:
    """Whether what is shared beside experts is whole on every device, by attention copies and groups of experts."""
    return instance.held.whole_shared and min(copies, ep) > 1


def ffn_side(instance: Instance, block: Block, tp: int, ep: int, name: str, *, touched: bool) -> int:
    """Weights that follow how the FFN is cut: those of experts, and else those of dense FFNs."""
    dense = 0 if instance.held.dense_per_copy else dense_bytes(block, tp * ep, name, touched=touched)
    return dense + expert_bytes(instance, block, tp, ep, name, touched=touched)


def ffn_width(block: Block, tp: int, ep: int) -> int:
    """Elements alive per token inside one FFN shard."""
    cell = block.ffn
    matrices = 3 if cell.gated else 2
    if isinstance(cell, DenseFfn):
        return matrices * -(-cell.intermediate // (tp * ep))
    return cell.experts_per_token * (cell.hidden + matrices * -(-cell.expert_intermediate // tp))


def vocab_bytes(instance: Instance, tp: int) -> int:
    return 2 * instance.model.hidden * -(-instance.model.vocab // tp)


def vocab_on(instance: Instance, *, first: bool, last: bool) -> int:
    """Matrices of vocabulary by hidden on a stage."""
    both = 1 if instance.model.tied_embeddings else 2
    return both if instance.held.vocab_everywhere or (first and last) else int(first) + int(last)


def batch_limits(instance: Instance) -> list[tuple[int, int]]:
    """Sequences and tokens of a batch to choose from, those of the settings where a choice names none."""
    own = instance.settings
    return [(seqs or own.max_num_seqs, tokens or own.max_num_batched_tokens) for seqs, tokens in instance.batch_limits]
