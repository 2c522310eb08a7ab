"""Operations of one layer, and of what surrounds the layers, as work per table entry.

Every function returns a mapping from (operation, table) to `Work`; tables are the fields of `simulator.law.BatchLaw`.
Times are those of the busiest device of the stage.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.cost.attention import attention_parts
from apex_opt.cost.exchanges import KEPT, Exchanges
from apex_opt.cost.routing import fullest_group_factor
from apex_opt.cost.states import state_parts
from apex_opt.cost.tables import OF_CHUNKS, by_table, merged, owned, rising, shares, times
from apex_opt.cost.work import Work
from apex_opt.engines.rules import PLAIN, Held
from apex_opt.ir.cells import WHOLE, Cut
from apex_opt.ir.cells.operations import Contextual, Elementwise, HyperConnect, Product, Stateful, norm
from apex_opt.ir.formats import KV_BYTES, get_format
from apex_opt.plans.drafts import draft_of
from apex_opt.plans.memory import ffn_cut
from apex_opt.profiles.collectives import Collectives
from apex_opt.profiles.physics import experts_work, gemm_work, hyper_work
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.cost.tables import Ints, Parts, Tables
    from apex_opt.ir.cells import AttentionCell, Ffn
    from apex_opt.ir.cells.operations import Experts, Linear, Op
    from apex_opt.ir.model import Block, Model
    from apex_opt.plans.drafts import Draft
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Template
    from apex_opt.plans.speculation import Drafter
    from apex_opt.profiles import Profile

_COUNTED_APART = frozenset({"rotary", "kv write"})  # kernels of a layer that an engine may fuse with others
_LOGIT_PASSES = 3  # cast, penalties and temperature, soft-max and choice: reads or writes of fp32 logits. Assumed.


class Operations(Exchanges):
    """Operations on one kind of GPU within one cluster; work is per number of tokens, for all entries of `tables`.

    `by_block` says that fp8 weights have a scale for each block; experts in fp8 compute `experts_flops_per_s` at most.
    """

    def __init__(
        self,
        tables: Tables,
        profile: Profile,
        collectives: Collectives,
        routing: str = "uniform",
        fused: tuple[str, ...] = (),
        held: Held = PLAIN,
        gap_s: float = 0.0,
        by_block: bool = False,
        experts_flops_per_s: float = inf,
    ) -> None:
        super().__init__(tables, profile, collectives, held)
        self.experts_flops_per_s = experts_flops_per_s
        self.gap_s = gap_s
        self.by_block = by_block
        self.routing = routing
        self.fused = frozenset(fused)
        self.half = profile.gpu.half_dtype
        self.gemm = lru_cache(maxsize=KEPT)(self._gemm)
        self.elementwise = lru_cache(maxsize=KEPT)(self._elementwise)
        self.experts = lru_cache(maxsize=KEPT)(self._experts)
        self.hyper = lru_cache(maxsize=KEPT)(self._hyper)

    def _gemm(self, name: str, n: int, k: int) -> Work:
        """out[m, n] = in[m, k] x weights, in a number format."""
        kernel, m = self.profile.kernel(name), self.tables.tokens
        seconds = self.profile.gemm_time_s(name, m, n, k, fused="quantise" in self.fused, by_block=self.by_block)
        flops, moved = gemm_work(m, n, k, kernel.input_bytes, kernel.weight_bytes)
        return Work.of(self.power, seconds, flops, moved, kernel.peak)

    def kernels(self, block: Block, attention: Template, ffn: Template) -> NDArray[np.int64]:
        """Kernels of one layer, collectives included: in captured graphs, and launched one by one.

        Parameters
        ----------
        block
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        """
        count: Ints = np.array(block.attention.launches) + np.array(block.ffn.launches)
        count += len(block.own_operations) - block.shares_norm
        apart = {op.fused_as for op in block.attention.operations(WHOLE, 2) if isinstance(op, Elementwise)}
        count -= len(self.fused & _COUNTED_APART & apart)
        if "experts" in self.fused:
            count[1] -= max(block.ffn.called_together - 1, 0)
        return count + len(self.exchanges(block, attention, ffn))

    def held_in(self, weight_format: str, quantised: int) -> str:
        """The format a matrix is computed in: 16 bit where the checkpoint leaves it out of every narrower one."""
        if not quantised:
            return self.half
        form = get_format(weight_format).part(quantised)
        # What the GPU cannot compute in, it does not serve: see the oracle.
        return (form.computed(self.profile.gpu.supports) or form).name

    def _elementwise(self, op: Elementwise) -> Work:
        """A kernel that only reads and writes memory; its traffic alone where the engine fuses the operation."""
        moved = self.tables.tokens * op.row_bytes
        seconds = self.profile.memory_time_s(moved, op.kind, op.width, launched=op.fused_as not in self.fused)
        return Work.of(self.power, seconds, 0.0, moved, self.half)

    def attention(self, cell: AttentionCell, template: Template, weight_format: str, kv_format: str) -> Parts:
        """One attention cell on the copies that own the sequences.

        Parameters
        ----------
        cell
        template : Template    how it is cut
        weight_format : str    of the weights
        kv_format : str        of the cache
        """
        own, dp = self._of_attention(template.dp), 1 if self.role == "own" else template.dp
        parts: list[Parts] = []
        for op in cell.operations(Cut(heads=template.tp), KV_BYTES[kv_format]):
            if isinstance(op, Contextual):
                parts.append(attention_parts(self.profile, self.tables, op, dp, kv_format))
                if self.tables.apart:
                    parts[-1] = {key: work for key, work in parts[-1].items() if key[1] not in OF_CHUNKS}
            elif isinstance(op, Stateful):
                parts.append(state_parts(self.profile, self.tables, op, dp))
            else:
                parts.append(own(operation=op.name, work=self._op(op, weight_format)))
        return merged(*parts)

    def beside(self, block: Block, attention: Template) -> Parts:
        """What a layer computes outside its cells, on the copies that own the sequences.

        Parameters
        ----------
        block
        attention : Template    how attention is cut
        """
        own = self._of_attention(attention.dp)
        return merged(*(own(operation=op.name, work=self._op(op, self.half)) for op in block.own_operations))

    def ffn(
        self, cell: Ffn, attention: Template, template: Template, weight_format: str, shares_norm: bool = False
    ) -> Parts:
        """One FFN cell on its copies; what is shared beside experts on copies of its own.

        Parameters
        ----------
        cell
        attention : Template    how attention is cut
        template : Template     how it is cut
        weight_format : str     of the weights
        shares_norm : bool      its norm is attention's
        """
        own = self._of_ffn(attention.dp, self._held_as(cell, attention, template).dp)
        # What is shared is spread over all devices of a copy, or lies as dense FFNs do.
        spread = self.held.spreads_tokens(attention.dp, template.ep)
        dense = attention if self.held.dense_per_copy else template
        shared = attention.devices if spread else dense.dp
        beside = self._of_ffn(attention.dp, shared)
        operations = cell.operations(ffn_cut(cell, attention, template, weight_format, self.held), 0)[shares_norm:]
        return merged(
            *((beside if op.shared else own)(operation=op.name, work=self._op(op, weight_format)) for op in operations)
        )

    def _op(self, op: Linear, weight_format: str) -> Work:
        """A kernel other than attention, by tokens."""
        if isinstance(op, Elementwise):
            return self.elementwise(op)
        if isinstance(op, HyperConnect):
            return self.hyper(op)
        held = self.held_in(weight_format, op.quantised)
        return self.gemm(held, op.n, op.k) if isinstance(op, Product) else self.experts(held, op)

    def over(self, tokens: Ints) -> Operations:
        """The same operations over other numbers of tokens, of which nothing else is made."""
        tables, fused = replace(self.tables, tokens=tokens), tuple(self.fused)
        own = Operations(
            tables,
            self.profile,
            self.collectives,
            self.routing,
            fused,
            self.held,
            self.gap_s,
            self.by_block,
            self.experts_flops_per_s,
        )
        own.called = self.called
        return own

    def of_input(self, op: Op, weight_format: str) -> Work:
        """A kernel of an encoder, by the tokens of one input."""
        if isinstance(op, Contextual):
            return by_table(attention_parts(self.profile, self.tables, op, 1, self.half))["chunk_ns"]
        if isinstance(op, Stateful):
            return by_table(state_parts(self.profile, self.tables, op, 1))["chunk_ns"]
        return self._op(op, weight_format)

    def _hyper(self, op: HyperConnect) -> Work:
        """Residual streams mixed before and after a cell."""
        flops, moved = hyper_work(self.tables.tokens, op.hidden, op.streams)
        seconds = self.profile.hyper_time_s(op.hidden, op.streams, self.tables.tokens)
        return Work.of(self.power, seconds, flops, moved, self.half)

    def _experts(self, name: str, op: Experts) -> Work:
        """Fused experts of the fullest group."""
        kernel, m, topk = self.profile.kernel(name), self.tables.tokens, op.topk
        held = ceil_div(op.experts, op.groups)
        shape, share = (op.hidden, op.columns, op.experts, held, topk), topk / op.experts
        # A token sends a group no more assignments than the group has experts, and some group its share of them.
        fullest = min(topk, held) / (share * held)
        weights = ceil_div(topk, op.groups) * op.matrices * op.hidden * op.columns
        least_s = weights * kernel.weight_bytes / self.profile.gpu.memory_bytes_per_s
        load = m.astype(np.float64)
        if self.routing == "uniform":
            load = load * np.minimum(fullest_group_factor(m * topk, op.groups), fullest)
        seconds = self.profile.moe_time_s(name, load, *shape, self.routing, op.matrices)
        if name == "fp8":
            computed = 2.0 * load * share * held * op.matrices * op.hidden * op.columns
            seconds = np.maximum(seconds, computed / self.experts_flops_per_s)
        seconds = rising(np.maximum(seconds, least_s))
        seconds = np.where(m > 0, seconds, 0.0)
        # All groups together do the work of an even share each.
        flops, moved = experts_work(m, *shape, weight_bytes=kernel.weight_bytes, matrices=op.matrices)
        return Work.of(self.power, seconds, flops, moved, kernel.peak)

    def embedding(self, model: Model, attention: Template, layout: Layout) -> Parts:
        """Rows of the embedding, and their sum over the vocabulary shards.

        Parameters
        ----------
        model
        attention : Template    how attention is cut
        layout
        """
        place = self._of_attention(attention.dp)
        return merged(
            place(operation="embedding", work=self.elementwise(Elementwise("embedding", 4.0 * model.hidden))),
            self._collective(place, Collectives.all_reduce_s, 2.0 * model.hidden, attention.tp, 1, layout),
        )

    def head(self, model: Model, attention: Template, layout: Layout) -> Parts:
        """Final norm, LM head on the sampled rows, gathering of the logits and the sampler, per sequence.

        Parameters
        ----------
        model
        attention : Template    how attention is cut
        layout
        """
        vocab = ceil_div(model.vocab, attention.tp)
        operations = [
            ("lm head", self.elementwise(norm(model.hidden))),
            ("lm head", self.gemm(self.half, vocab, model.hidden)),
            ("sampler", self.elementwise(Elementwise("sampler", 4.0 * model.vocab * _LOGIT_PASSES))),
        ]
        if attention.tp > 1:
            spread = layout.spread(attention.tp)
            gather = self.link(Collectives.all_gather_s, 2.0 * model.vocab, attention.tp, spread)
            operations.append(("communication", gather))
        tables, copies = self.tables, 1 if self.role == "own" else attention.dp
        rows = shares(np.minimum(tables.sequences * (1 + tables.drafts), tables.tokens[-1]), copies)
        parts: list[Parts] = []
        for operation, by_rows in operations:
            work = by_rows.at(rows)
            alone = {(operation, "verify_ns"): by_rows} if tables.drafts else {(operation, "decode_ns"): work}
            parts.append({(operation, "sequence_ns"): work, **alone})
        return merged(*parts)

    def drafting(self, model: Model, drafter: Drafter, attention: Template, ffn: Template, *, passes: int) -> int:
        """Kernels launched one by one to make drafts beside a prompt: layers, norm, head and choice of every pass.

        Parameters
        ----------
        model
        drafter : Drafter       how drafts are made
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        passes : int            that run from no captured graph
        """
        draft = draft_of(model, drafter)
        if draft is None:
            return 0
        layers = sum(run.count * int(self.kernels(run.block, attention, ffn)[1]) for run in draft.runs)
        return passes * (layers + 3 + (attention.tp > 1))

    def drafts(
        self,
        model: Model,
        drafter: Drafter,
        attention: Template,
        ffn: Template,
        formats: tuple[str, str],
        layout: Layout,
    ) -> Parts:
        """What makes drafts: a pass over all tokens of a batch, then where a row yields one for each further draft.

        Parameters
        ----------
        model
        drafter : Drafter         how drafts are made
        attention : Template      how attention is cut
        ffn : Template            how the FFN is cut
        formats : (str, str)      of the weights and of the cache of the plan
        layout

        Source
        ------
        `v1/spec_decode/eagle.py` of vLLM 0.20.2: the first pass takes what the model has just computed, each later one
        a token of every sequence. That these run from captured graphs is assumed.
        """
        draft = draft_of(model, drafter)
        if draft is None:
            return {}
        held, place = draft.weight_format or formats[0], partial(owned, self.tables, copies=1, split=1)
        if isinstance(self.role, int):
            return self._drafts_of_all(draft, drafter, attention, ffn, held, layout)
        layers: list[Parts] = []
        kernels = 0
        for run in draft.runs:
            cells = merged(
                self.attention(run.block.attention, attention, held, formats[1]),
                self.beside(run.block, attention),
                self.ffn(run.block.ffn, attention, ffn, held, run.block.shares_norm),
                self.reshards(run.block, attention, ffn, layout),
            )
            layers.append(times(cells, run.count))
            kernels += run.count * int(self.kernels(run.block, attention, ffn)[0])
            if rows := draft.projection(run.block.attention, attention.tp):
                layers.append(place(operation="qkv", work=self.gemm(self.half, rows, draft.hidden)))
        if draft.joined:
            layers.append(place(operation="qkv", work=self.gemm(self.half, draft.hidden, draft.joined)))
        found: Parts = {}
        for table, work in by_table(merged(*layers)).items():
            # What drafts see through a window is charged as if it had no end: a rate of their own is all they have.
            whole = table.partition("/")[0].replace("seen_rate", "context_rate").removeprefix("seen_")
            found = merged(found, {("drafts", whole): work})
        vocab = ceil_div(draft.vocab, attention.tp)
        head = self.elementwise(norm(draft.hidden)) + self.gemm(self.half, vocab, draft.hidden)
        head = head + self.elementwise(Elementwise("sampler", 4.0 * draft.vocab))
        if attention.tp > 1:
            head = head + self.link(
                Collectives.all_gather_s, 2.0 * draft.vocab, attention.tp, layout.spread(attention.tp)
            )
        sequences, more = self.tables.sequences, drafter.draft_tokens - 1
        again = found["drafts", "verify_ns"].at(sequences) + found["drafts", "decode_ns"]
        gaps = np.where(sequences > 0, (more * kernels + 3 * drafter.draft_tokens) * self.gap_s, 0.0)
        made = head.at(sequences) * drafter.draft_tokens + again * more + Work.waiting(self.power, gaps)
        rate = found["drafts", "context_rate"] * more
        return {**found, ("drafts", "draft_ns"): made, ("drafts", "draft_rate"): rate}

    def _drafts_of_all(
        self, draft: Draft, drafter: Drafter, attention: Template, ffn: Template, held: str, layout: Layout
    ) -> Parts:
        """What all ranks do together to make drafts: by the mean tokens of a rank, then by its mean sequences.

        Parameters
        ----------
        draft, drafter, attention, ffn, layout : as for `drafts`
        held : str    format of the weights
        """
        layers = [
            times(
                merged(
                    self.ffn(run.block.ffn, attention, ffn, held, run.block.shares_norm),
                    self.reshards(run.block, attention, ffn, layout),
                ),
                run.count,
            )
            for run in draft.runs
        ]
        found: Parts = {("drafts", table): work for table, work in by_table(merged(*layers)).items()}
        if not found:
            return {}
        again = found["drafts", "together decode"].at(self.tables.sequences)
        return {**found, ("drafts", "together draft"): again * (drafter.draft_tokens - 1)}
