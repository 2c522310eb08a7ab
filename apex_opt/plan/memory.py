"""What a plan puts into a GPU's memory, in exact bytes.

Weights are counted per device from the cells' shards; KV heads are copied where there are more shards than heads, a
latent KV cache and the projections to it lie whole on every shard. The cache is charged in full under a sliding window
too: an engine that frees what has left the window holds less.
The workspace is what the largest batch needs at once, the runtime what context, libraries and communicators hold.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from apex_opt.engines.rules import PLAIN, Held
from apex_opt.errors import UsageError
from apex_opt.ir.formats import KV_BYTES, get_format
from apex_opt.ir.model import Attention, DenseFfn, Run, stored_bytes
from apex_opt.units import GIB, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.ir.model import AttentionCell, Block, Ffn, Matrices, Model, MoeFfn
    from apex_opt.plan.engine import EngineSettings
    from apex_opt.plan.plan import Plan, Template

RUNTIME_BYTES: Final = GIB + GIB // 4
"""CUDA context, libraries, communicators. Assumed; with it the KV blocks that vLLM 0.20.2 chose for two models on one
H200 come out within 1%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on each device of one stage.

    `kv_block_bytes` is one block of the layers held here, `kv_blocks` how many fit on one device beside the rest
    (0 where the rest alone does not fit).
    """

    weights_bytes: int
    workspace_bytes: int
    runtime_bytes: int
    usable_bytes: int
    kv_block_bytes: int
    kv_blocks: int


@lru_cache(maxsize=1 << 10)
def stage_runs(model: Model, layers: tuple[int, ...]) -> tuple[tuple[Run, ...], ...]:
    """The model's runs cut at the stage boundaries: for each stage, its own runs in order.

    Raises
    ------
    UsageError    layers that do not add up to those of the model
    """
    if sum(layers) != model.layers:
        raise UsageError(f"pp: {list(layers)} are {sum(layers)} layers; {model.name} has {model.layers}")
    stages: list[tuple[Run, ...]] = []
    runs = deque(model.runs)
    for count in layers:
        mine: list[Run] = []
        while count > 0:
            run = runs.popleft()
            taken = min(count, run.count)
            mine.append(Run(block=run.block, count=taken))
            if taken < run.count:
                runs.appendleft(Run(block=run.block, count=run.count - taken))
            count -= taken
        stages.append(tuple(mine))
    return tuple(stages)


def attention_shard_bytes(cell: AttentionCell, tp: int, weight_format: str) -> int:
    """Weights of one attention shard: its query heads, at least one KV head, and biases, norms and sinks in 16 bit.

    Of latent attention, the projections to the latent vectors and their norms are whole.
    """
    heads = ceil_div(cell.query_heads, tp)
    if not isinstance(cell, Attention):
        inner = cell.down_parameters + heads * cell.head_parameters
        output = heads * cell.output_parameters
        matrices = (cell.quantised, inner), (cell.output_quantised, output)
        return stored_bytes(weight_format, cell.norm_parameters, matrices)
    query_dim = heads * cell.head_dim
    kv_dim = ceil_div(cell.kv_heads, tp) * cell.head_dim
    qkv, output = cell.hidden * (query_dim + 2 * kv_dim), query_dim * cell.hidden
    kept = cell.qkv_bias * (query_dim + 2 * kv_dim) + cell.output_bias * cell.hidden + cell.sinks * heads
    kept += query_dim + kv_dim if cell.qk_norm_whole else cell.norm_parameters
    return stored_bytes(weight_format, kept, ((cell.quantised, qkv), (cell.output_quantised, output)))


def ffn_shard_bytes(cell: Ffn, attention: Template, template: Template, weight_format: str, held: Held = PLAIN) -> int:
    """Weights of one FFN shard: experts over ep, their columns over tp, a dense FFN over both, the router whole.

    Dense FFNs, and sizes of experts, are as the engine holds them.
    """
    shards = held.dense_shards(attention.tp, template.tp * template.ep)
    if isinstance(cell, DenseFfn):
        columns = ceil_div(cell.intermediate, shards)
        bias = cell.bias * ((1 + cell.gated) * columns + cell.hidden)
        return stored_bytes(weight_format, bias, _dense(cell, columns))
    experts = ceil_div(cell.experts, template.ep)
    own = ceil_div(cell.expert_intermediate, template.tp)
    hidden, columns = held.experts(get_format(weight_format).part(cell.quantised or 1).name, cell.hidden, own)
    bias = cell.bias * experts * ((1 + cell.gated) * columns + hidden)
    routed = (cell.quantised, (2 + cell.gated) * hidden * experts * columns)
    spread = held.spreads_tokens(attention.dp, template.ep)
    shared = stored_bytes(weight_format, 0, _shared(cell, 1 if spread else shards))
    return shared + stored_bytes(weight_format, cell.router_parameters + bias, (routed,))


def _dense(cell: DenseFfn, columns: int) -> Matrices:
    """Matrices of so many columns of a dense FFN."""
    down = cell.hidden * columns
    return (cell.quantised, (1 + cell.gated) * down), (cell.down_quantised, down)


def _shared(cell: MoeFfn, shards: int) -> Matrices:
    """Matrices of one shard of the FFN that every token passes through."""
    down = cell.hidden * ceil_div(cell.shared_intermediate, shards)
    return (cell.shared_quantised, (1 + cell.gated) * down), (cell.shared_down_quantised, down)


def ffn_token_bytes(cell: Ffn, attention: Template, template: Template, weight_format: str, held: Held = PLAIN) -> int:
    """Least projection weights of one FFN shard that a token passes through.

    Of the experts only those of one token count: of its k, some group of experts holds at least ceil(k / ep).
    """
    shards = held.dense_shards(attention.tp, template.tp * template.ep)
    if isinstance(cell, DenseFfn):
        return stored_bytes(weight_format, 0, _dense(cell, ceil_div(cell.intermediate, shards)))
    columns = ceil_div(cell.experts_per_token, template.ep) * ceil_div(cell.expert_intermediate, template.tp)
    routed = (2 + cell.gated) * cell.hidden * columns
    spread = held.spreads_tokens(attention.dp, template.ep)
    shared = stored_bytes(weight_format, 0, _shared(cell, 1 if spread else shards))
    return shared + stored_bytes(weight_format, 0, ((cell.quantised, routed),))


def kv_bytes_per_token(cell: AttentionCell, tp: int, kv_format: str) -> int:
    """Keys and values, or the latent vector, of one token in one layer on one device."""
    if not isinstance(cell, Attention):
        return cell.latent_dim * KV_BYTES[kv_format]
    return 2 * ceil_div(cell.kv_heads, tp) * cell.head_dim * KV_BYTES[kv_format]


def workspace_bytes(model: Model, plan: Plan, settings: EngineSettings, last: bool) -> int:
    """Largest activations alive at once: two hidden states beside the wider cell, or the logits of the last stage."""
    tokens = ceil_div(settings.max_num_batched_tokens, plan.attention.dp)
    ffn_tokens = ceil_div(settings.max_num_batched_tokens, plan.ffn.dp)
    widest = max(
        max(tokens * _attention_width(run.block, plan.attention), ffn_tokens * _ffn_width(run.block, plan.ffn))
        for run in model.runs
    )
    logits = 4 * ceil_div(settings.max_num_seqs, plan.attention.dp) * model.vocab if last else 0
    return 2 * (tokens * 2 * model.hidden + widest) + logits


def _attention_width(block: Block, template: Template) -> int:
    cell = block.attention
    heads = ceil_div(cell.query_heads, template.tp)
    if not isinstance(cell, Attention):
        # A prompt's keys and values are expanded, its keys once more with the rotary part joined on. Decoding absorbs
        # the expansion and is wider a token, but of a few tokens.
        expanded = 2 * cell.qk_head_dim + cell.nope_head_dim + cell.v_head_dim
        return heads * expanded + (cell.q_lora_rank or 0) + cell.latent_dim
    return (heads + 2 * ceil_div(cell.kv_heads, template.tp)) * cell.head_dim


def _ffn_width(block: Block, template: Template) -> int:
    cell = block.ffn
    if isinstance(cell, DenseFfn):
        return (2 + cell.gated) * ceil_div(cell.intermediate, template.tp * template.ep)
    width = (2 + cell.gated) * ceil_div(cell.expert_intermediate, template.tp) + cell.hidden
    return cell.experts_per_token * width


def stage_memory(model: Model, gpu: Gpu, plan: Plan, settings: EngineSettings) -> tuple[StageMemory, ...]:
    """Memory of one device of each stage.

    Embedding (first stage) and LM head (last stage) are cut over the attention shards and stay 16 bit, as do norms;
    a tied model on one stage holds the matrix once. Some engines hold both on every stage.
    """
    held = Held.of(settings.runnable, model, gpu)
    usable = int(gpu.memory_bytes * settings.gpu_memory_utilization)
    parts = stage_runs(model, plan.layers)
    vocab_shard = 2 * ceil_div(model.vocab, plan.attention.tp) * model.hidden
    found: dict[tuple[object, ...], StageMemory] = {}
    # Stages of as many of the same blocks are alike; blocks are told apart by identity, which is quicker.
    alike = [
        (tuple((id(run.block), run.count) for run in runs), index == 0, index == len(parts) - 1)
        for index, runs in enumerate(parts)
    ]
    for key, runs in zip(alike, parts, strict=True):
        if key in found:
            continue
        _, first, last = key
        weights = sum(
            run.count
            * (
                attention_shard_bytes(run.block.attention, plan.attention.tp, plan.weight_format)
                + ffn_shard_bytes(run.block.ffn, plan.attention, plan.ffn, plan.weight_format, held)
                + 2 * run.block.norm_parameters
            )
            for run in runs
        )
        copies = vocab_copies(model, held, first, last)
        weights += copies * vocab_shard + last * 2 * model.hidden + held.table_bytes
        workspace = workspace_bytes(model, plan, settings, last)
        block_bytes = settings.block_size * sum(
            run.count * kv_bytes_per_token(run.block.attention, plan.attention.tp, plan.kv_format) for run in runs
        )
        left = usable - weights - workspace - RUNTIME_BYTES
        found[key] = StageMemory(
            weights_bytes=weights,
            workspace_bytes=workspace,
            runtime_bytes=RUNTIME_BYTES,
            usable_bytes=usable,
            kv_block_bytes=block_bytes,
            kv_blocks=max(0, left) // block_bytes,
        )
    return tuple(found[key] for key in alike)


def vocab_copies(model: Model, held: Held, first: bool, last: bool) -> int:
    """Matrices of vocabulary by hidden on a stage: the embedding, the LM head, both or neither."""
    if held.vocab_everywhere or (first and last):
        return 1 if model.tied_embeddings else 2
    return first + last


def kv_blocks(memory: Sequence[StageMemory]) -> int:
    """Blocks a sequence can use on one attention copy: the stage with the least, one block kept back by the engine."""
    return max(0, min(stage.kv_blocks for stage in memory) - 1)


def most_blocks(memory: Sequence[StageMemory]) -> int:
    """Blocks as `kv_blocks`, at most, of any split of the layers: as if what is left of all stages lay together.

    Parameters
    ----------
    memory : StageMemory of each stage of some split
    """
    left = sum(s.usable_bytes - s.runtime_bytes - s.workspace_bytes - s.weights_bytes for s in memory)
    return max(0, left // sum(stage.kv_block_bytes for stage in memory))


def least_blocks(model: Model, plan: Plan, memory: Sequence[StageMemory], block_size: int, held: Held = PLAIN) -> int:
    """Blocks as `kv_blocks`, of any split of the layers whose heaviest stage weighs no more than that of an even one.

    A stage then holds the weights of the heaviest one and the embedding at most, and so many layers as the lightest of
    these make up.

    Parameters
    ----------
    memory : StageMemory of each stage of the plan, with even stages
    block_size : int      tokens in a block
    held : Held           how the engine holds the model
    """
    vocab = 2 * ceil_div(model.vocab, plan.attention.tp) * model.hidden
    tp, blocks = plan.attention.tp, [run.block for run in model.runs]
    heaviest = max(stage.weights_bytes - vocab * (index == 0) for index, stage in enumerate(memory))
    lightest = min(
        attention_shard_bytes(block.attention, tp, plan.weight_format)
        + ffn_shard_bytes(block.ffn, plan.attention, plan.ffn, plan.weight_format, held)
        for block in blocks
    )
    layers = min(heaviest // lightest, model.layers)
    token = max(kv_bytes_per_token(block.attention, tp, plan.kv_format) for block in blocks)
    left = min(stage.usable_bytes - stage.runtime_bytes - stage.workspace_bytes for stage in memory) - heaviest - vocab
    return max(0, max(0, left) // (layers * token * block_size) - 1)
