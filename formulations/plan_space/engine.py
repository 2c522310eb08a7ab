"""What an engine can run, tabulated: its facts read once more, apart from `apex_opt.plans.refusals`.

Every rule binds the stages, the FFN copies, or attention with a format, or the shards of the FFN with a format. Whole
copies, which attention and FFN have in common, are not in the space.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from apex_opt.engines.overlap import KERNELS_FROM, KERNELS_LINK, NANO
from apex_opt.ir.cells import Cut
from apex_opt.ir.formats import get_format

from .sizes import batch_limits, kinds, limits_shared

if TYPE_CHECKING:
    from apex_opt.oracle.instance import Instance


class Runs:
    """Whether the engine of an instance runs parts of a plan, formats by index; all where none is asked."""

    def __init__(self, instance: Instance) -> None:
        self.instance, self.rules = instance, instance.settings.runnable
        self._cells = [(block.attention, block.ffn) for block in kinds(instance)]
        self._format = cache(self._runs_format)
        self._shards = cache(self._holds_shard)
        self._heads = cache(self._divides_heads)

    @property
    def shares(self) -> bool:
        """Whether prompts and answers may be computed side by side as the plans have it, and the GPU can be divided so.

        On one stage with one copy of attention: that is for plans to keep to.
        """
        wanted, gpu = self.instance.shares, self.instance.cluster.gpu
        if wanted is None:
            return True
        if self.rules is not None and (not self.rules.multiplexes or not wanted.multiplexed):
            return False
        if not wanted.multiplexed:
            return True
        total, kind = gpu.multiprocessors or 0, int(gpu.capability or 0)
        if total == 0 or kind not in (7, 8, 9):
            return False
        least, multiple = {7: (2, 2), 8: (4, 2), 9: (8, 8)}[kind]
        parts = [part for part in range(least, total - least + 1) if part % multiple == 0]
        if wanted.prefill:
            return wanted.prefill in parts and wanted.decode == total - wanted.prefill
        return any(total <= 2 * part <= 2 * (total - 16) for part in parts)

    @property
    def overlap(self) -> bool:
        """Whether forwards may be split as the plans have it; which plans can be is for these to keep to."""
        if self.instance.overlap is None:
            return True
        if self.instance.overlap == NANO:
            return self.rules is None and self.instance.settings.scheduler.name == "vllm"
        families = None if self.rules is None else self.rules.overlaps
        known = families is None or self.instance.model.family in families
        if self.rules is not None:
            cluster = self.instance.cluster
            known &= (cluster.gpu.capability or 0.0) >= KERNELS_FROM and cluster.intra.kind == KERNELS_LINK
        return known and self.instance.settings.scheduler.name in ("vllm", "sglang")

    def splits(self, index: int) -> bool:
        """Whether the kernels that split forwards are sent by run experts of a weight format, by its index."""
        if self.rules is None or self.instance.overlap in (None, NANO):
            return True
        model, name = self.instance.model, self.instance.weight_formats[index]
        if model.scheme is not None and name == model.weight_format and model.scheme.method in self.rules.whole_methods:
            return False
        return set(name.split("+")) <= self.rules.split_formats

    def answers(self, copies: int, index: int) -> bool:
        """Whether split forwards of so many attention copies hold the sequences of a rank, by the index of limits."""
        if self.rules is None or not self.rules.split_seqs or self.instance.overlap in (None, NANO):
            return True
        seqs, _ = batch_limits(self.instance)[index]
        return max(1, seqs // limits_shared(self.instance, copies)) <= self.rules.split_seqs

    def stages(self, count: int) -> bool:
        """Whether the model may be cut into so many stages."""
        if self.rules is None or count == 1:
            return True
        model, whole = self.instance.model, self.rules.whole_models
        return model.family not in (whole | self.rules.whole_when_tied if model.tied_embeddings else whole)

    def ffn_copies(self, copies: int) -> bool:
        """Whether the FFN may have so many copies in a stage."""
        return self.rules is None or copies == 1 or self.rules.ffn_copies

    def attention(self, copies: int, tp: int, index: int) -> bool:
        """Whether attention may be cut so, in a format, and what is cut as attention is.

        Parameters
        ----------
        copies : int    copies of attention
        tp : int        shards
        index : int     of the weight format
        """
        if self.rules is None:
            return True
        model = self.instance.model
        widths = {block.attention.rotary_dim for block in model.blocks} | {0}
        if model.family in self.rules.misread_heads and model.stated_head_dim not in widths:
            return False
        if copies > 1:
            if not (self.instance.model.is_moe or self.rules.dense_attention_copies):
                return False
            if self.rules.one_gpu_copies and tp > 1:
                return False
            copied = self.rules.copied_attention
            if copied is not None and self.instance.model.family not in copied:
                return False
        dense = not self.rules.dense_per_copy or self._shards("columns", tp, index)
        return self._format(index) and self._heads(tp) and dense and self._shards("heads", tp, index)

    def ffn(self, tp: int, ep: int, index: int) -> bool:
        """Whether the FFN may be cut so, in a format.

        Parameters
        ----------
        tp : int       shards
        ep : int       groups of experts
        index : int    of the weight format
        """
        if self.rules is None:
            return True
        if tp > 1 and ep > 1 and not self.rules.experts_by_both:
            return False
        if ep > 1 and self.instance.model.family in self.rules.whole_experts:
            return False
        dense = self.rules.dense_per_copy or self._shards("columns", tp * ep, index)
        return dense and self._shards("expert_columns", tp, index)

    def _runs_format(self, index: int) -> bool:
        """Whether the GPU is one on which the engine has the formats of weights and cache, and their blocks."""
        rules, instance = self.rules, self.instance
        assert rules is not None
        if rules.cuda_only and not instance.cluster.gpu.cuda:
            return False
        weights, cache_format = instance.weight_formats[index], instance.kv_formats[index]
        if weights == "fp16" and instance.model.family in rules.no_half:
            return False
        parts = get_format(weights).mixed or (get_format(weights),)
        held = {trait for attention, _ in self._cells for trait in attention.traits} | {cache_format}
        spans = [rules.formats.get(part.name) for part in parts]
        spans += [span for kind, span in rules.attention.items() if kind in held]
        scheme = instance.model.scheme
        if scheme is not None and weights == instance.model.weight_format:
            spans.append(rules.methods.get(scheme.method, (0.0, 1e9)))
        has, tokens = instance.cluster.gpu.capability, instance.settings.block_size
        if None in spans or (has is not None and not all(span and span[0] <= has < span[1] for span in spans)):
            return False
        if rules.block_powers and tokens.bit_count() != 1:
            return False
        asked = rules.block_multiples
        return all(tokens % multiple == 0 for kind, multiple in asked.items() if kind in held)

    def _divides_heads(self, tp: int) -> bool:
        """Whether vocabulary, KV heads and image tower go over so many shards."""
        rules, model = self.rules, self.instance.model
        assert rules is not None
        rows = model.vocab + -model.vocab % rules.vocab_multiple
        if rules.vocab_multiple > 1 and rows % tp:
            return False
        if model.family in rules.whole_kv_heads and any(tp > cell.kv_heads for cell, _ in self._cells):
            return False
        if model.family in rules.sound_shards and model.sound_heads % tp:
            return False
        if not rules.tower_shards or model.tower_heads is None or model.family in rules.whole_towers:
            return True
        return model.tower_heads % tp == 0

    def _holds_shard(self, part: str, count: int, index: int) -> bool:
        """Whether each of so many shards of a part holds whole scales."""
        assert self.rules is not None
        if not self.rules.whole_scales:
            return True
        cut = {"heads": Cut(heads=count), "columns": Cut(columns=count)}.get(part, Cut(expert_columns=count))
        cells = (cells[part != "heads"] for cells in self._cells)
        for matrix in (matrix for cell in cells for matrix in cell.matrices(cut)):
            if matrix.cut != part or not matrix.quantised or (matrix.inputs and count == 1):
                continue
            outputs, inputs, of_experts = self._multiples(index, matrix.quantised)
            if matrix.inputs:
                undivided = matrix.columns % (of_experts if part == "expert_columns" else inputs)
            else:
                undivided = matrix.rows % outputs
            if undivided:
                return False
        return True

    def _multiples(self, index: int, form: int) -> tuple[int, int, int]:
        """Outputs, inputs, and inputs of experts that share a scale in one of the formats of a format."""
        assert self.rules is not None
        model, name = self.instance.model, self.instance.weight_formats[index]
        own = get_format(name).part(form)
        group, block = own.group, None
        if model.scheme is not None and name == model.weight_format:
            held = (model.scheme, *model.scheme.further)
            mine = held[min(form, len(held)) - 1]
            group, block = mine.group, mine.block
        if own.name in self.rules.padded_experts:
            return 1, 1, 1
        if block is not None:
            return block[0], block[1], block[1]
        if group is None:
            return 1, 1, 1
        least = self.rules.least_group or group
        halves = [group >> power for power in range(group.bit_length()) if group % (1 << power) == 0]
        return 1, group, min((size for size in halves if size >= least), default=group)
