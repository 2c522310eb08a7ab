"""Bytes and widths of shards, summed over what the cells list.

The lists are shared with `apex_opt.plans.memory`, what is made of them is not, so that the oracle can find fault with
either. All are whole bytes: nothing is rounded.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING

from apex_opt.ir.cells import Cut
from apex_opt.ir.formats import FORMATS, get_format
from apex_opt.plans.drafts import draft_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from apex_opt.ir.cells import Matrix
    from apex_opt.ir.model import Block, Model
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.speculation import Drafter


def kinds(instance: Instance) -> Mapping[Block, int]:
    """Blocks that differ in what they take, each with its number of layers, in the order in which they first come."""
    return _kinds(instance.model)


@lru_cache(maxsize=16)
def _kinds(model: Model) -> Mapping[Block, int]:
    layers: Counter[Block] = Counter()
    for run in model.runs:
        layers[kind(run.block)] += run.count
    return MappingProxyType(layers)


def kind(block: Block) -> Block:
    """A block without its window, which changes neither bytes nor shards."""
    attention = block.attention.with_window(None)
    return block if attention is block.attention else replace(block, attention=attention)


def shards(instance: Instance) -> list[tuple[int, int]]:
    """Degrees (tp, ep) that could occur together."""
    gpus = instance.max_devices
    experts = gpus if instance.model.is_moe else 1
    return [(t, e) for t in range(1, gpus + 1) for e in range(1, min(experts, gpus // t) + 1)]


def _packed(name: str, matrices: Iterable[Matrix], *, touched: bool = False) -> int:
    """Bytes of matrices, or only of those covered by the format that a single token certainly touches."""
    named, parts = name.split("+"), Counter[str]()
    for matrix in matrices:
        count = matrix.times if not touched or matrix.used is None else matrix.used
        if touched and matrix.quantised is None:
            continue
        form = named[min(matrix.quantised, len(named)) - 1] if matrix.quantised else "bf16"
        parts[form] += matrix.rows * matrix.columns * count
    sizes = ((weights, FORMATS[part].weight_bits) for part, weights in parts.items())
    return sum(-(-weights * bits.numerator // (8 * bits.denominator)) for weights, bits in sizes)


def attention_bytes(block: Block, tp: int, name: str) -> int:
    """Weights of one attention shard.

    Parameters
    ----------
    block
    tp : int      shards
    name : str    of the weight format
    """
    return _packed(name, block.attention.matrices(Cut(heads=tp)))


def attention_width(block: Block, tp: int) -> int:
    """Elements alive per token inside one attention shard."""
    return block.attention.width(Cut(heads=tp))


def dense_bytes(block: Block, shards: int, name: str, *, touched: bool) -> int:
    """Weights of one shard of what every token passes through: a dense FFN, or the one shared beside experts.

    Parameters
    ----------
    block
    shards : int      that share it
    name : str        of the weight format
    touched : bool    whether only what one token reads is counted
    """
    dense = block.ffn.dense
    return 0 if dense is None else _packed(name, dense.matrices(Cut(columns=shards)), touched=touched)


def expert_bytes(instance: Instance, block: Block, tp: int, ep: int, name: str, *, touched: bool) -> int:
    """Weights of one shard of the experts and the router, or only those that a single token certainly touches.

    Parameters
    ----------
    instance, block
    tp : int          shards
    ep : int          groups of experts
    name : str        of the weight format
    touched : bool    whether only what one token reads is counted
    """
    cut, form = Cut(experts=ep, expert_columns=tp), get_format(name).part(block.ffn.quantised or 1).name
    for padded, *multiples in instance.held.padded:
        if padded == form and not touched:
            cut = cut._replace(multiples=(multiples[0], multiples[1]))
    if form in instance.held.gate_room:
        cut = cut._replace(gate_room=True)
    return _packed(name, block.ffn.routed(cut), touched=touched)


def attention_side(instance: Instance, block: Block, tp: int, name: str, *, whole: bool, touched: bool) -> int:
    """Weights that follow how attention is cut: its own, and where they lie in each copy those of dense FFNs.

    Parameters
    ----------
    whole : bool    `shared_whole` of the plan
    """
    shards = 1 if whole and block.is_moe else tp
    dense = dense_bytes(block, shards, name, touched=touched) if instance.held.dense_per_copy else 0
    return attention_bytes(block, tp, name) + dense


def shared_whole(instance: Instance, copies: int, ep: int) -> bool:
    """Whether what is shared beside experts is whole on every device, by attention copies and groups of experts.

    Parameters
    ----------
    instance
    copies : int    copies of attention
    ep : int        groups of experts
    """
    return instance.held.whole_shared and min(copies, ep) > 1


def ffn_side(instance: Instance, block: Block, tp: int, ep: int, name: str, *, touched: bool) -> int:
    """Weights that follow how the FFN is cut: those of experts, and else those of dense FFNs.

    Parameters
    ----------
    instance, block
    tp : int          shards
    ep : int          groups of experts
    name : str        of the weight format
    touched : bool    whether only what one token reads is counted
    """
    dense = 0 if instance.held.dense_per_copy else dense_bytes(block, tp * ep, name, touched=touched)
    return dense + expert_bytes(instance, block, tp, ep, name, touched=touched)


def ffn_width(block: Block, tp: int, ep: int) -> int:
    """Elements alive per token inside one FFN shard.

    Parameters
    ----------
    block
    tp : int    shards
    ep : int    groups of experts
    """
    return block.ffn.width(Cut(columns=tp * ep, experts=ep, expert_columns=tp))


def vocab_bytes(instance: Instance, tp: int) -> int:
    """What one device holds of the embedding, or of the LM head."""
    return head_bytes(instance, 1 if instance.held.whole_vocabulary else tp)


def head_bytes(instance: Instance, tp: int) -> int:
    """What one device reads of the LM head for a token, at least."""
    return 2 * instance.model.hidden * -(-instance.model.vocab // tp)


def before_bytes(instance: Instance, tp: int) -> int:
    """What the first stage has beside the embedding: positions, norms; tables and encoders are cut as heads are."""
    model, tower = instance.model, instance.model.encoder
    weights = sum(-(-part.rows * part.columns * part.times // (tp if part.cut else 1)) for part in model.before)
    if tower is not None:
        cut = Cut(heads=tp, columns=tp)
        for run in tower.runs:
            pieces = [*run.block.attention.matrices(cut), *run.block.ffn.matrices(cut), *run.block.own]
            weights += run.count * sum(matrix.rows * matrix.columns * matrix.times for matrix in pieces)
        weights += sum(matrix.rows * matrix.columns * matrix.times for matrix in tower.beside)
    return 2 * weights


def vocab_on(instance: Instance, *, first: bool, last: bool) -> int:
    """Matrices of vocabulary by hidden on a stage.

    Parameters
    ----------
    instance
    first : bool    whether it is the first stage
    last : bool     whether it is the last stage
    """
    embedding = first or instance.held.vocab_everywhere or instance.held.embedding_everywhere
    head = last or instance.held.vocab_everywhere
    return int(embedding or head) if instance.model.tied_embeddings else int(embedding) + int(head)


def batch_limits(instance: Instance, drafter: Drafter | None = None) -> list[tuple[int, int]]:
    """Sequences and tokens of a batch to choose from, those of the settings where a choice names none.

    Where SGLang verifies drafts it runs fewer sequences, unless a number was asked for.

    Parameters
    ----------
    instance
    drafter : Drafter or None    how drafts are made
    """
    own = instance.settings
    usual = own.max_num_seqs
    if drafter is not None and own.scheduler.name == "sglang":
        usual = min(usual, getattr(own.scheduler, "drafting_seats", 0) or usual)
    # What is multiplexed computes prompts whole.
    least = own.max_model_len if instance.shares is not None and instance.shares.multiplexed else 0
    return [(seqs or usual, max(tokens or own.max_num_batched_tokens, least)) for seqs, tokens in instance.batch_limits]


def limits_shared(instance: Instance, copies: int) -> int:
    """Of so many attention copies, those that share the limits of a batch: vLLM and TensorRT-LLM take them for each."""
    return 1 if instance.settings.scheduler.name in ("vllm", "trtllm") else copies


def draft_blocks(instance: Instance, drafter: Drafter | None) -> tuple[Block, ...]:
    """Layers of what makes drafts, one by one."""
    draft = draft_of(instance.model, drafter) if drafter else None
    return tuple(run.block for run in draft.runs for _ in range(run.count)) if draft else ()


def draft_attention_side(instance: Instance, drafter: Drafter | None, tp: int, name: str, *, whole: bool) -> int:
    """Weights of what makes drafts that follow how attention is cut: its attention, and what is beside its layers.

    Parameters
    ----------
    instance
    drafter : Drafter or None    how drafts are made
    tp : int                     shards
    name : str                   of the weight format
    whole : bool                 `shared_whole` of the plan
    """
    draft = draft_of(instance.model, drafter) if drafter else None
    if draft is None:
        return 0
    form = draft.weight_format or name
    total = 2 * draft.hidden * (draft.joined + draft.tables * -(-draft.vocab // tp))
    for block, count in Counter(draft_blocks(instance, drafter)).items():
        twice = 2 * draft.hidden * draft.projection(block.attention, tp)
        layer = attention_side(instance, block, tp, form, whole=whole, touched=False) + 2 * block.own_parameters + twice
        total += count * layer
    return total


def draft_ffn_side(instance: Instance, drafter: Drafter | None, tp: int, ep: int, name: str) -> int:
    """Bytes of what makes drafts that follow how the FFN is cut.

    Parameters
    ----------
    instance
    drafter : Drafter or None    how drafts are made
    tp : int                     shards
    ep : int                     groups of experts
    name : str                   of the weight format
    """
    draft = draft_of(instance.model, drafter) if drafter else None
    if draft is None:
        return 0
    form = draft.weight_format or name
    layers = Counter(draft_blocks(instance, drafter)).items()
    return sum(count * ffn_side(instance, block, tp, ep, form, touched=False) for block, count in layers)


def stages_of(instance: Instance) -> range:
    """Numbers of stages that there can be."""
    return range(1, min(instance.max_devices, instance.model.layers) + 1)
