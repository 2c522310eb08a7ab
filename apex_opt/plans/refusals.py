"""Why an engine cannot run a plan, in words with numbers: its facts read in plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Final

from apex_opt.engines.overlap import NANO, without_kernels
from apex_opt.engines.rules import Held
from apex_opt.ir.cells import Cut
from apex_opt.ir.formats import get_format
from apex_opt.plans.engine import limits_shared, of_each

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.cluster.types import Cluster, Gpu
    from apex_opt.engines.rules import EngineRules
    from apex_opt.ir.cells import Cell
    from apex_opt.ir.model import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan, Template

_NAMES: Final = {
    "latent": "latent attention",
    "sparse": "latent attention to chosen tokens",
    "compressed": "attention to compressed tokens",
    "sinks": "attention with sinks",
    "fp8": "a KV cache in fp8",
}
"""Kinds of attention and of caches that engines ask something for."""


def refusals(rules: EngineRules, model: Model, cluster: Cluster, plan: Plan, settings: EngineSettings) -> Iterator[str]:
    """Why the engine cannot run the plan; nothing where it can.

    Parameters
    ----------
    cluster : Cluster            what the plan is on; the compute capability of its GPUs counts, and what links them
    settings : EngineSettings    its KV blocks count
    """
    gpu = cluster.gpu
    # What no cut would mend comes first.
    yield from _formats(rules, model, gpu, plan)
    yield from _blocks(rules, model, plan, settings.block_size)
    yield from _shares(rules, plan)
    yield from _splits(rules, model, cluster, plan, settings)
    yield from _cells(rules, model, plan)
    yield from _drafts(rules, plan)
    yield from _heads(rules, model, plan.attention)
    if rules.whole_scales:
        scales = _Scales(rules, model, plan.weight_format)
        shards = Held.of(rules, model, gpu).dense_shards(plan.attention.tp, plan.ffn.tp * plan.ffn.ep)
        cut = Cut(heads=plan.attention.tp, columns=shards, experts=plan.ffn.ep, expert_columns=plan.ffn.tp)
        for block in model.blocks:
            for cell in block.cells:
                yield from scales.of_cell(cell, cut)


def _splits(rules: EngineRules, model: Model, cluster: Cluster, plan: Plan, settings: EngineSettings) -> Iterator[str]:
    """Forwards in two halves, by the kernels that engines send with."""
    if plan.overlap is None:
        return
    what = f"overlap={plan.overlap}"
    if plan.overlap == NANO:
        yield f"{what}: {rules.release} does not run operations that ask for different resources at one time"
        return
    if rules.overlaps is not None and model.family not in rules.overlaps:
        yield f"{what}: {rules.release} splits no forward of {model.family or 'such'} models"
    if (why := without_kernels(cluster)) is not None:
        yield f"{what}: {why}"
    seats, most = of_each(settings, plan).max_num_seqs, rules.split_seqs
    if 0 < most < seats:
        yield (
            f"{what}: {rules.release} answers at most {most} sequences of a rank in split forwards, the plan {seats}; "
            f"give --max_num_seqs={most * limits_shared(settings, plan)}"
        )
    wanted = get_format(plan.weight_format)
    some = ", ".join(sorted(rules.split_formats))
    for form in wanted.mixed or (wanted,):
        if form.name not in rules.split_formats:
            yield f"{what}: {rules.release} sends to experts in {some or 'no format'} there, not in {form.name}"
    published = model.scheme if plan.weight_format == model.weight_format else None
    if published is not None and published.method in rules.whole_methods:
        yield f"{what}: {rules.release} does not send to experts of {published.method} checkpoints there"


def _shares(rules: EngineRules, plan: Plan) -> Iterator[str]:
    """Prompts and answers side by side on the same GPUs."""
    if plan.shares is not None and not (rules.multiplexes and plan.shares.multiplexed):
        but = " but by its own multiplexing" if rules.multiplexes else ""
        yield f"share={plan.shares}: {rules.release} does not compute prompts and answers side by side{but}"


def _drafts(rules: EngineRules, plan: Plan) -> Iterator[str]:
    """Drafts of attention copies that share an FFN; whole copies are engines of their own."""
    drafter, copied, copies = plan.speculation, rules.copied_drafts, plan.attention.dp
    if drafter is not None and copied is not None and drafter.method not in copied and 1 < copies != plan.ffn.dp:
        yield (
            f"spec={drafter}: {rules.release} makes no such drafts over attention copies, the plan has {copies}; "
            f"{' and '.join(sorted(copied))} go with them"
        )


def _cells(rules: EngineRules, model: Model, plan: Plan) -> Iterator[str]:
    """Into how many stages the model may be cut, and how the two cells of a stage beside each other."""
    attention, ffn, release = plan.attention, plan.ffn, rules.release
    if plan.stages > 1 and model.family in rules.whole_models:
        yield f"pp{plan.stages}: {release} does not cut {model.family} models into stages"
    if plan.stages > 1 and model.tied_embeddings and model.family in rules.whole_when_tied:
        yield f"pp{plan.stages}: {release} does not cut {model.family} models whose LM head is the embedding"
    if ffn.ep > 1 and model.family in rules.whole_experts:
        yield f"ffn({ffn}): {release} does not deal the experts of {model.family} models over GPUs; cut them by tp"
    if attention.dp == ffn.dp > 1:
        if model.is_moe and not rules.moe_copies:
            yield f"ffn(dp{ffn.dp}): {release} cuts the experts over all attention copies of an engine"
        return
    if ffn.dp > 1 and not rules.ffn_copies:
        yield f"attn({attention}) ffn({ffn}): {release} has no copies of the FFN but those of whole engines"
    if attention.dp > 1 and not model.is_moe and not rules.dense_attention_copies:
        yield f"attn({attention}) ffn({ffn}): {release} has no attention copies before one dense FFN cut over all"
    if attention.dp > 1 and rules.copied_attention is not None and model.family not in rules.copied_attention:
        yield f"attn({attention}): {release} has no attention copies of {model.family or 'such'} models"
    if attention.dp > 1 and attention.tp > 1 and rules.one_gpu_copies:
        yield f"attn({attention}): {release} cuts attention over all GPUs of a stage, or has a copy on each"
    if ffn.ep > 1 and ffn.tp > 1 and not rules.experts_by_both:
        yield f"ffn({ffn}): {release} cuts experts either by ep or by tp, over all GPUs of a stage"


def _formats(rules: EngineRules, model: Model, gpu: Gpu, plan: Plan) -> Iterator[str]:
    """Number formats on a GPU."""
    if rules.cuda_only and not gpu.cuda:
        yield f"{gpu.name} does not run CUDA, which {rules.release} needs"
    published = model.scheme if plan.weight_format == model.weight_format else None
    wanted = get_format(plan.weight_format)
    names = [form.name for form in wanted.mixed or (wanted,)]
    ranges = [(name, rules.formats.get(name, (inf, inf))) for name in names]
    if published is not None and published.method in rules.methods:
        ranges.append((f"{published.method} checkpoints", rules.methods[published.method]))
    kinds = model.traits | {plan.kv_format}
    ranges += [(_NAMES[kind], span) for kind, span in rules.attention.items() if kind in kinds]
    if rules.misreads(model):
        yield (
            f"head_dim {model.stated_head_dim}: {rules.release} takes it for the width of the rotary key, for which it "
            "has no kernel; take the field out of config.json"
        )
    if wanted.name == "fp16" and model.family in rules.no_half:
        yield f"fp16: {rules.release} does not compute {model.family} models in it"
    for what, (least, below) in ranges:
        if least == inf:
            yield f"{what}: {rules.release} has no such format"
        elif gpu.capability is not None and not least <= gpu.capability < below:
            span = f"from {least} on" if below == inf else f"from {least} to below {below}"
            yield f"{what}: {rules.release} needs compute capability {span}, {gpu.name} has {gpu.capability}"


def _heads(rules: EngineRules, model: Model, attention: Template) -> Iterator[str]:
    """What attention shards must divide beside the heads themselves."""
    tp = attention.tp
    rows = -(-model.vocab // rules.vocab_multiple) * rules.vocab_multiple
    if rules.vocab_multiple > 1 and rows % tp:
        yield f"attention tp{tp} does not divide the {rows} rows of the padded vocabulary"
    if model.family in rules.whole_kv_heads:
        heads = min(block.attention.kv_heads for block in model.blocks)
        if tp > heads:
            yield f"attention tp{tp}: {rules.release} does not copy the {heads} KV heads of {model.family}"
    cut = rules.tower_shards and model.family not in rules.whole_towers
    if cut and model.tower_heads and model.tower_heads % tp:
        yield f"attention tp{tp} does not divide the {model.tower_heads} heads of the image tower"
    if model.family in rules.sound_shards and model.sound_heads % tp:
        yield f"attention tp{tp} does not divide the {model.sound_heads} heads of the sound tower"


def _blocks(rules: EngineRules, model: Model, plan: Plan, block_size: int) -> Iterator[str]:
    """Tokens in a KV block."""
    if rules.block_powers and block_size & (block_size - 1):
        yield f"block_size {block_size}: {rules.release} takes powers of two"
    kinds = model.traits | {plan.kv_format}
    for kind, multiple in rules.block_multiples.items():
        if kind in kinds and block_size % multiple:
            yield f"block_size {block_size}: {rules.release} takes multiples of {multiple} for {_NAMES[kind]}"


@dataclass(frozen=True, slots=True)
class _Scales:
    """What shards of quantised matrices must be multiples of."""

    rules: EngineRules
    model: Model
    weight_format: str

    def multiples(self, quantised: int) -> tuple[int, int, int]:
        """Outputs, inputs, and inputs of experts whose scales a shard must hold whole; of the `quantised`-th format.

        They are those of the checkpoint where the format is as published, else as is usual. Groups of experts may be
        smaller.
        """
        form, scheme = get_format(self.weight_format).part(quantised), self.model.scheme
        if form.name in self.rules.padded_experts:
            return 1, 1, 1
        group = form.group
        if scheme is not None and self.weight_format == self.model.weight_format:
            if (block := scheme.part(quantised).block) is not None:
                return block[0], block[1], block[1]
            group = scheme.part(quantised).group
        if group is None:
            return 1, 1, 1
        smallest = group
        while self.rules.least_group and smallest % 2 == 0 and smallest // 2 >= self.rules.least_group:
            smallest //= 2
        return 1, group, smallest

    def of_cell(self, cell: Cell, cut: Cut) -> Iterator[str]:
        """Covered matrices of one shard: outputs and inputs that are cut."""
        for whole, mine in zip(cell.matrices(), cell.matrices(cut), strict=True):
            if not mine.quantised or not mine.cut:
                continue
            shards = getattr(cut, mine.cut)
            size, of = (mine.columns, whole.columns) if mine.inputs else (mine.rows, whole.rows)
            if mine.cut == "heads":
                what = "inputs of the output projection" if mine.inputs else f"outputs of {mine.name}"
                text = f"attention tp{shards} leaves {size} {what} a shard"
            elif mine.cut == "columns":
                what = "shared FFN" if mine.name.startswith("shared") else "FFN"
                text = f"{shards} shards of the {what} have {size} of {of} columns each"
            else:
                text = f"FFN tp{shards} leaves {size} of {of} columns of an expert"
            outputs, inputs, of_experts = self.multiples(mine.quantised)
            if not mine.inputs:
                yield from self._asks(size, outputs, text)
            elif shards > 1:
                yield from self._asks(size, of_experts if mine.cut == "expert_columns" else inputs, text)

    def _asks(self, size: int, multiple: int, text: str) -> Iterator[str]:
        if size % multiple:
            yield f"{text}, no multiple of the {multiple} that share one scale, as {self.rules.release} needs"
