"""What a plan puts into a GPU's memory, in exact bytes.

Weights are counted per device from the cells' shards; KV heads are copied where there are more shards than heads, a
latent KV cache and the projections to it lie whole on every shard. What layers keep of tokens and sequences is allotted
as the engine does it (`allotment`).
The workspace is what the largest batch needs at once, the runtime what context, libraries and communicators hold. Where
prompts and answers are computed side by side there is a workspace for either phase, and a runtime for either process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from apex_opt.engines.overlap import TWO
from apex_opt.engines.rules import PLAIN, Held
from apex_opt.errors import UsageError
from apex_opt.ir.cells import Cut, stored_bytes
from apex_opt.ir.formats import get_format
from apex_opt.ir.model import Run
from apex_opt.plans.allotment import allotted
from apex_opt.plans.drafts import draft_of
from apex_opt.plans.engine import limits_shared, of_each
from apex_opt.units import GIB, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.engines.overlap import Overlap
    from apex_opt.ir.cells import AttentionCell, Ffn
    from apex_opt.ir.model import Block, Model
    from apex_opt.plans.drafts import Draft
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan, Template
    from apex_opt.plans.shares import Shares

RUNTIME_BYTES: Final = GIB + GIB // 4
"""CUDA context, libraries, communicators. Assumed; with it the KV blocks that vLLM 0.20.2 chose for two models on one
H200 come out within 1%."""

_NO_LIMIT: Final = 1 << 40
"""Blocks of a stage whose layers keep nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """Bytes on each device of one stage.

    `kv_block_bytes` is one block of the layers held here, `kv_blocks` how many fit on one device beside the rest
    (0 where the rest alone does not fit). `states_bytes` are those of all sequences that can run, where they lie apart
    from the blocks.
    """

    weights_bytes: int
    workspace_bytes: int
    runtime_bytes: int
    usable_bytes: int
    kv_block_bytes: int
    kv_blocks: int
    states_bytes: int = 0

    @property
    def beside_bytes(self) -> int:
        """All but the blocks."""
        return self.weights_bytes + self.workspace_bytes + self.runtime_bytes + self.states_bytes


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


def ffn_cut(cell: Ffn, attention: Template, template: Template, weight_format: str, held: Held = PLAIN) -> Cut:
    """How one FFN cell is cut, and stored: experts over ep, their columns over tp, dense FFNs as the engine holds them.

    Parameters
    ----------
    cell : Ffn
    attention, template : Template      how attention and the FFN are cut
    weight_format : str                 name of a format
    held : Held                         how the engine holds the model
    """
    if not cell.experts:
        return Cut(columns=held.dense_shards(attention.tp, template.tp * template.ep))
    spread = held.spreads_tokens(attention.dp, template.ep)
    form = get_format(weight_format).part(cell.quantised or 1).name
    return Cut(
        columns=1 if spread else held.dense_shards(attention.tp, template.tp * template.ep),
        experts=template.ep,
        expert_columns=template.tp,
        multiples=held.multiples(form),
        gate_room=form in held.gate_room,
    )


@lru_cache(maxsize=1 << 12)
def attention_shard_bytes(cell: AttentionCell, tp: int, weight_format: str) -> int:
    """Weights of one attention shard: its query heads, at least one KV head, and biases, norms and sinks in 16 bit.

    Of latent attention, the projections to the latent vectors and their norms are whole.

    Parameters
    ----------
    cell
    tp : int               shards
    weight_format : str    of the weights
    """
    return stored_bytes(weight_format, cell.matrices(Cut(heads=tp)))


@lru_cache(maxsize=1 << 12)
def ffn_shard_bytes(cell: Ffn, cut: Cut, weight_format: str) -> int:
    """Weights of one FFN shard: experts, the router whole, what every token passes through; see `ffn_cut`.

    Parameters
    ----------
    cell
    cut : Cut              how the weights are cut
    weight_format : str    of the weights
    """
    dense = cell.dense.matrices(cut) if cell.dense else ()
    return stored_bytes(weight_format, cell.routed(cut)) + stored_bytes(weight_format, dense)


def block_shard_bytes(block: Block, plan: Plan, held: Held = PLAIN) -> int:
    """Weights of both cells of a layer on one device.

    Parameters
    ----------
    block, plan
    held : Held    how the engine holds the model
    """
    cut = ffn_cut(block.ffn, plan.attention, plan.ffn, plan.weight_format, held)
    attention = attention_shard_bytes(block.attention, plan.attention.tp, plan.weight_format)
    return attention + ffn_shard_bytes(block.ffn, cut, plan.weight_format)


def ffn_token_bytes(cell: Ffn, cut: Cut, weight_format: str) -> int:
    """Least projection weights of one FFN shard that a token passes through.

    Of the experts only those of one token count: of its k, some group of experts holds at least ceil(k / ep).

    Parameters
    ----------
    cell
    cut : Cut              how the weights are cut
    weight_format : str    of the weights
    """
    dense, routed = cell.dense.matrices(cut) if cell.dense else (), cell.routed(cut._replace(multiples=(1, 1)))
    return sum(stored_bytes(weight_format, part, used=True) for part in (dense, routed))


def settings_of(model: Model, settings: EngineSettings, plan: Plan) -> EngineSettings:
    """Settings of each scheduler of a replica, with the blocks that the layers of a plan share.

    Parameters
    ----------
    model, settings, plan

    Raises
    ------
    UsageError    limits that do not go with the other settings, or drafts of which nothing is known
    """
    settings = of_each(settings, plan)
    allotment = allotted(model, plan, settings)
    if not allotment.groups and allotment.block_size == settings.block_size:
        return settings
    return replace(settings, block_size=allotment.block_size, kv_groups=allotment.groups)


def workspace_bytes(model: Model, plan: Plan, settings: EngineSettings, last: bool) -> int:
    """Largest activations alive at once: two hidden states beside the wider cell, or the logits of the last stage.

    Where attention copies have limits each, an FFN copy holds what one of them sends at once.

    Parameters
    ----------
    model, plan
    settings : EngineSettings    with the limits that the plan sets, as `plans.engine.limited` has them
    last : bool    whether the LM head is there
    """
    sharing = limits_shared(settings, plan)
    tokens = ceil_div(settings.max_num_batched_tokens, sharing)
    ffn_tokens = ceil_div(settings.max_num_batched_tokens, plan.ffn.dp)
    of_attention, of_ffn = (
        Cut(heads=plan.attention.tp),
        Cut(columns=plan.ffn.tp * plan.ffn.ep, experts=plan.ffn.ep, expert_columns=plan.ffn.tp),
    )
    drafts = 1 + (plan.speculation.draft_tokens if plan.speculation else 0)
    rows = min(settings.max_num_seqs * drafts, settings.max_num_batched_tokens)  # a draft has logits of its own
    widest = max(
        max(tokens * block.attention.width(of_attention), ffn_tokens * block.ffn.width(of_ffn))
        for block in model.blocks
    )
    logits = 4 * ceil_div(rows, sharing) * model.vocab if last else 0
    return 2 * (tokens * 2 * model.hidden + widest) + logits


def at_once(shares: Shares | None) -> int:
    """Batches that are computed at one time on the same GPU."""
    return 1 if shares is None else 2


def processes(shares: Shares | None) -> int:
    """Processes on a GPU, each with a runtime of its own: two share it, SGLang's multiplexing is one.

    Source: semi-PD's workers share weights and KV cache by CUDA IPC; `srt/multiplex` of SGLang 0.5.23 has two streams.
    """
    return 1 if shares is None or shares.multiplexed else 2


def buffer_bytes(overlap: Overlap | None) -> int:
    """What holds tokens on their way to experts and back where forwards are split in two, on each GPU.

    Source: `DeepEPHTAll2AllManager` of vLLM 0.20.2, by default 1 GiB for NVLink and as much between nodes, here taken
    on one node as well; for SGLang assumed to be as much.
    """
    return 2 * GIB if overlap == TWO else 0


def stage_memory(model: Model, gpu: Gpu, plan: Plan, settings: EngineSettings) -> tuple[StageMemory, ...]:
    """Memory of one device of each stage.

    Embedding (first stage) and LM head (last stage) are cut over the attention shards and stay 16 bit, as do norms;
    a tied model on one stage holds the matrix once. Some engines hold both on every stage.

    Parameters
    ----------
    model
    gpu : Gpu    that it runs on
    plan
    settings : EngineSettings    with the limits that the plan sets, as `plans.engine.limited` has them
    """
    return _stage_memory(model, gpu, plan if plan.replicas == 1 else plan.times(1), settings)


@lru_cache(maxsize=1 << 13)
def _stage_memory(model: Model, gpu: Gpu, plan: Plan, settings: EngineSettings) -> tuple[StageMemory, ...]:
    """The same of one replica: what checks a plan and what bounds it ask alike."""
    held = Held.of(settings.runnable, model, gpu)
    allotment, seats = allotted(model, plan, settings), state_seats(plan, settings)
    usable = int(gpu.memory_bytes * settings.gpu_memory_utilization)
    parts = stage_runs(model, plan.layers)
    vocab_shard = 2 * ceil_div(model.vocab, 1 if held.whole_vocabulary else plan.attention.tp) * model.hidden
    found: dict[tuple[object, ...], StageMemory] = {}
    ends = list(accumulate(plan.layers, initial=0))
    if plan.stages == 1:
        ends[-1] = allotment.layers  # and of what makes drafts
    blocks = {id(run.block): run.block for runs in parts for run in runs}
    of_block = {key: block_shard_bytes(block, plan, held) + 2 * block.own_parameters for key, block in blocks.items()}
    # Stages of as many of the same blocks are alike; blocks are told apart by identity, which is quicker.
    alike = [
        (
            tuple((id(run.block), run.count) for run in runs),
            index == 0,
            index == len(parts) - 1,
            block_bytes,
            seats * state_bytes,
        )
        for index, (runs, block_bytes, state_bytes) in enumerate(zip(parts, *allotment.stages_bytes(ends), strict=True))
    ]
    activations = {last: at_once(plan.shares) * workspace_bytes(model, plan, settings, last) for last in (False, True)}
    for key, runs in zip(alike, parts, strict=True):
        if key in found:
            continue
        _, first, last, block_bytes, states = key
        weights = sum(run.count * of_block[id(run.block)] for run in runs)
        copies = vocab_copies(model, held, first, last)
        beside = first * model.before_bytes(plan.attention.tp) + last * 2 * model.after_parameters
        weights += copies * vocab_shard + beside + held.table_bytes
        workspace = activations[last]
        drafter = plan.speculation if plan.stages == 1 else None  # nothing makes drafts for a pipeline
        if drafter is not None and (draft := draft_of(model, drafter)) is not None:
            weights += draft_bytes(draft, plan, held)
        runtime = processes(plan.shares) * RUNTIME_BYTES + buffer_bytes(plan.overlap)
        left = usable - weights - workspace - runtime - states
        found[key] = StageMemory(
            weights_bytes=weights,
            workspace_bytes=workspace,
            runtime_bytes=runtime,
            usable_bytes=usable,
            kv_block_bytes=block_bytes,
            kv_blocks=max(0, left) // block_bytes if block_bytes else (_NO_LIMIT if left >= 0 else 0),
            states_bytes=states,
        )
    return tuple(found[key] for key in alike)


def draft_bytes(draft: Draft, plan: Plan, held: Held = PLAIN) -> int:
    """Weights of what makes drafts on one device.

    Parameters
    ----------
    draft, plan
    held : Held    how the engine holds the model
    """
    within = replace(plan, weight_format=draft.in_format(plan))
    layers = sum(run.count * block_shard_bytes(run.block, within, held) for run in draft.runs)
    return layers + draft.beside_bytes(plan.attention.tp)


def state_seats(plan: Plan, settings: EngineSettings) -> int:
    """Sequences of which each device has states, where these lie apart from the blocks."""
    return ceil_div(settings.seats(plan.stages), limits_shared(settings, plan))


def vocab_copies(model: Model, held: Held, first: bool, last: bool) -> int:
    """Matrices of vocabulary by hidden on a stage: the embedding, the LM head, both or neither.

    Parameters
    ----------
    model
    held : Held     how the engine holds the model
    first : bool    whether the stage holds the embedding
    last : bool     whether the stage holds the LM head
    """
    if held.vocab_everywhere or (first and last) or (held.embedding_everywhere and last):
        return 1 if model.tied_embeddings else 2
    return 1 if held.embedding_everywhere else first + last


def kv_blocks(memory: Sequence[StageMemory]) -> int:
    """Blocks a sequence can use on one attention copy: the stage with the least, one block kept back by the engine."""
    return max(0, min(stage.kv_blocks for stage in memory) - 1)


def most_blocks(memory: Sequence[StageMemory], block_bytes: int) -> int:
    """Blocks as `kv_blocks`, at most, of any split of the layers: as if what is left of all stages lay together.

    Stages have as many places of the largest group together as there are in all of the model, or more.

    Parameters
    ----------
    memory : StageMemory of each stage of some split
    block_bytes : int    of a block, were all layers on one stage
    """
    left = sum(stage.usable_bytes - stage.beside_bytes for stage in memory)
    return max(0, left // max(block_bytes, 1))


def least_blocks(
    model: Model, plan: Plan, memory: Sequence[StageMemory], settings: EngineSettings, held: Held = PLAIN
) -> int:
    """Blocks as `kv_blocks`, of any split of the layers whose heaviest stage weighs no more than that of an even one.

    A stage then holds the weights of the heaviest one and the embedding at most, and so many layers as the lightest of
    these make up.

    Parameters
    ----------
    memory : StageMemory of each stage of the plan, with even stages
    settings : EngineSettings
    held : Held           how the engine holds the model
    """
    vocab = 2 * ceil_div(model.vocab, plan.attention.tp) * model.hidden
    heaviest = max(stage.weights_bytes - vocab * (index == 0) for index, stage in enumerate(memory))
    lightest = min(block_shard_bytes(block, plan, held) for block in model.blocks)
    layers = min(heaviest // max(lightest, 1), model.layers)
    allotment = allotted(model, plan, settings)
    block_bytes, state_bytes = allotment.most_bytes(layers)
    left = min(stage.usable_bytes - stage.runtime_bytes - stage.workspace_bytes for stage in memory) - heaviest - vocab
    left -= state_seats(plan, settings) * state_bytes
    return max(0, max(0, left) // max(block_bytes, 1) - 1)
