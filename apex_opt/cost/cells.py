"""Operations of one layer, and of what surrounds the layers, as work per table entry.

Every function returns a mapping from (operation, table) to `Work`; tables are the fields of `simulator.law.BatchLaw`.
Times are those of the busiest device of the stage.

Where attention has several copies (dp > 1), a sequence belongs to one of them: decoding sequences spread evenly, a
prompt is computed by its own copy while the others wait unless they have prompts too. The law therefore counts the
linear work of prompts by chunk and divides the sum by the copies that can be busy. An FFN copy that serves one
attention copy goes with it; one that serves several may get all prompts of a batch, and is taken to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from apex_opt.cost.routing import fullest_group_factor
from apex_opt.cost.work import Work
from apex_opt.ir.formats import KV_BYTES, get_format
from apex_opt.ir.model import DenseFfn
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Link
    from apex_opt.cost.work import Floats
    from apex_opt.ir.model import Attention, Ffn, Model, MoeFfn
    from apex_opt.plan.layout import Layout
    from apex_opt.plan.plan import Template
    from apex_opt.profiles import Collectives, Profile

    Ints = NDArray[np.int64]

Parts = dict[tuple[str, str], Work]


class Place(Protocol):
    """Enters an operation into the tables by which batches it grows with: see `owned` and `crowded`."""

    def __call__(self, *, operation: str, cost: Callable[[Ints], Work]) -> Parts: ...


_LOGIT_PASSES = 3  # cast, penalties and temperature, soft-max and choice: reads or writes of fp32 logits. Assumed.


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Entries the tables are made for: every number of tokens and of sequences a batch can have.

    `padded[n]` is how many a batch of `n` decoding sequences is computed as, once padded to a captured graph.
    """

    tokens: Ints
    sequences: Ints
    padded: Ints


def linear(tables: Tables, operation: str, cost: Callable[[Ints], Work]) -> Parts:
    """An operation that depends on the tokens of the batch alone."""
    by_tokens = cost(tables.tokens)
    return {(operation, "mixed_ns"): by_tokens, (operation, "decode_ns"): by_tokens.at(tables.padded)}


def owned(tables: Tables, operation: str, copies: int, split: int, cost: Callable[[Ints], Work]) -> Parts:
    """An operation on the copy that owns a sequence, `split` groups of devices sharing the tokens of one copy.

    Sequences that decode beside prompts are counted apart, at the rate of a full batch: the weights are read already.
    """
    if copies == 1 and split == 1:
        return linear(tables, operation, cost)
    by_tokens = cost(tables.tokens)
    spread = by_tokens.at(_ceil(tables.padded, copies * split))
    shared = by_tokens.at(_ceil(tables.tokens, split))
    if copies == 1:
        return {(operation, "mixed_ns"): shared, (operation, "decode_ns"): spread}
    rows = _ceil(tables.sequences, copies * split).astype(np.float64)
    beside = by_tokens.at(tables.tokens[-1:]) * (rows / tables.tokens[-1])
    return {(operation, "chunk_ns"): shared, (operation, "decode_ns"): spread, (operation, "attend_ns"): beside}


def crowded(tables: Tables, operation: str, copies: int, cost: Callable[[Ints], Work]) -> Parts:
    """An operation on copies that serve several attention copies each: one of them may get every prompt of a batch.

    Arithmetic and traffic are those of an even share, which is what all copies together do.
    """
    by_tokens = cost(tables.tokens)
    even = by_tokens.at(_ceil(tables.tokens, copies))
    return {
        (operation, "mixed_ns"): replace(even, seconds=by_tokens.seconds),
        (operation, "decode_ns"): by_tokens.at(_ceil(tables.padded, copies)),
    }


def sharing(tables: Tables, attention_dp: int, ffn_dp: int) -> Place:
    """How the copies of the FFN share the tokens of the attention copies."""
    if ffn_dp % attention_dp == 0:
        return partial(owned, tables, copies=attention_dp, split=ffn_dp // attention_dp)
    if ffn_dp > 1 and attention_dp % ffn_dp == 0:
        return partial(crowded, tables, copies=ffn_dp)
    return partial(owned, tables, copies=1, split=ffn_dp)  # every device gets all tokens first: see `reshards`


def merged(*parts: Parts) -> Parts:
    """Sum of several mappings."""
    total: Parts = {}
    for part in parts:
        for key, work in part.items():
            total[key] = total[key] + work if key in total else work
    return total


def times(parts: Parts, count: int) -> Parts:
    """Parts of `count` identical layers."""
    return {key: work * count for key, work in parts.items()}


class Operations:
    """Operations on one kind of GPU within one cluster."""

    def __init__(self, tables: Tables, profile: Profile, collectives: Collectives) -> None:
        self.tables = tables
        self.profile = profile
        self.collectives = collectives
        self.power = profile.power
        self.half = profile.gpu.half_dtype

    def gemm(self, weight_format: str, n: int, k: int) -> Callable[[Ints], Work]:
        """out[m, n] = in[m, k] x weights, in a weight format."""
        bits = get_format(weight_format)
        stored = float(bits.weight_bits / 8)
        dtype = "fp8" if bits.activation == "fp8" else self.half
        element = 1.0 if dtype == "fp8" else 2.0

        def cost(m: Ints) -> Work:
            seconds = self.profile.gemm_time_s(
                dtype, m, n, k, weight_bytes_per_element=None if stored == element else stored
            )
            moved = np.where(m > 0, stored * n * k + m * (element * k + 2.0 * n), 0.0)
            return Work.of(self.power, seconds, 2.0 * m * n * k, moved, dtype)

        return cost

    def elementwise(self, bytes_per_token: float) -> Callable[[Ints], Work]:
        """A kernel that only reads and writes memory."""

        def cost(m: Ints) -> Work:
            moved = m * float(bytes_per_token)
            return Work.of(self.power, self.profile.memory_time_s(moved), 0.0, moved, self.half)

        return cost

    def link(self, time_s: Callable[..., Floats], bytes_per_token: float, **where: Any) -> Callable[[Ints], Work]:
        """A collective or transfer of so many bytes per token."""

        def cost(m: Ints) -> Work:
            return Work.waiting(self.power, time_s(m * float(bytes_per_token), **where))

        return cost

    def norm(self, hidden: int) -> Callable[[Ints], Work]:
        """Residual addition and norm: both read and written in 16 bit."""
        return self.elementwise(8.0 * hidden)

    def attention(self, cell: Attention, template: Template, weight_format: str, kv_format: str) -> Parts:
        """One attention cell: norm, QKV, rotary and cache write, attention, output projection."""
        tp, dp = template.tp, template.dp
        heads, kv_heads = ceil_div(cell.query_heads, tp), ceil_div(cell.kv_heads, tp)
        query, kv = heads * cell.head_dim, kv_heads * cell.head_dim

        def own(operation: str, cost: Callable[[Ints], Work]) -> Parts:
            return owned(self.tables, operation, dp, 1, cost)

        rotary = [own("rotary", self.elementwise(4.0 * (query + kv)))]
        if cell.qk_norm:
            rotary.append(own("norm", self.elementwise(4.0 * (query + kv))))
        return merged(
            own("norm", self.norm(cell.hidden)),
            own("qkv", self.gemm(weight_format, query + 2 * kv, cell.hidden)),
            *rotary,
            own("kv write", self.elementwise(2.0 * kv * (2 + KV_BYTES[kv_format]))),
            self._attend(cell.head_dim, heads, kv_heads, dp, KV_BYTES[kv_format]),
            own("output", self.gemm(weight_format, cell.hidden, query)),
        )

    def _attend(self, head_dim: int, heads: int, kv_heads: int, dp: int, kv_bytes: int) -> Parts:
        """The attention kernel itself: decoding sequences by context, prompts by query-key pairs."""
        tables, profile, power = self.tables, self.profile, self.power
        token_bytes = 2.0 * kv_heads * head_dim * kv_bytes
        token_flops = 4.0 * heads * head_dim
        base, per_token = profile.decode_attention(heads, kv_heads, head_dim, kv_bytes, _ceil(tables.sequences, dp))
        base[0] = base[1]  # a batch of prompts alone launches the kernel as well
        launch = Work.of(power, base, 0.0, 0.0, self.half)
        read = Work.of(power, per_token / dp, token_flops / dp, token_bytes / dp, self.half)
        chunk, pair, context = profile.prefill_attention(heads, head_dim, kv_heads, kv_bytes, tables.tokens)
        chunk = np.maximum(chunk - chunk[1], 0.0)  # the launch is counted once a batch, above
        return {
            ("decode attention", "decode_ns"): launch,
            ("decode attention", "attend_ns"): launch,
            ("decode attention", "context_rate"): read,
            ("prefill attention", "chunk_ns"): Work.of(power, chunk, 0.0, 0.0, self.half),
            ("prefill attention", "pair_rate"): Work.of(power, pair, token_flops, 0.0, self.half),
            ("prefill attention", "chunk_context_rate"): Work.of(power, context, 0.0, token_bytes, self.half),
        }

    def ffn(self, cell: Ffn, attention: Template, template: Template, weight_format: str) -> Parts:
        """One FFN cell: norm, projections and activation, or router and experts."""
        place = sharing(self.tables, attention.dp, template.dp)
        ranks = template.tp * template.ep

        def own(operation: str, cost: Callable[[Ints], Work]) -> Parts:
            return place(operation=operation, cost=cost)

        norm = own("norm", self.norm(cell.hidden))
        if isinstance(cell, DenseFfn):
            return merged(norm, self._dense(own, cell.hidden, cell.intermediate, cell.gated, ranks, weight_format))
        experts = own("experts", self._experts(cell, template, weight_format))
        router = own("router", self.gemm(self.half, cell.experts, cell.hidden))
        choose = own("router", self.elementwise(8.0 * cell.experts))
        shared: Parts = {}
        if cell.shared_intermediate:
            shared = self._dense(own, cell.hidden, cell.shared_intermediate, cell.gated, ranks, weight_format)
        return merged(norm, router, choose, experts, shared)

    def _dense(
        self,
        own: Callable[[str, Callable[[Ints], Work]], Parts],
        hidden: int,
        intermediate: int,
        gated: bool,
        ranks: int,
        weight_format: str,
    ) -> Parts:
        columns = ceil_div(intermediate, ranks)
        return merged(
            own("ffn up", self.gemm(weight_format, (1 + gated) * columns, hidden)),
            own("activation", self.elementwise(2.0 * (2 + gated) * columns)),
            own("ffn down", self.gemm(weight_format, hidden, columns)),
        )

    def _experts(self, cell: MoeFfn, template: Template, weight_format: str) -> Callable[[Ints], Work]:
        """Fused experts of the fullest expert group."""
        bits = get_format(weight_format)
        stored = float(bits.weight_bits / 8)
        dtype = "fp8" if bits.activation == "fp8" else self.half
        element = 1.0 if dtype == "fp8" else 2.0
        held = ceil_div(cell.experts, template.ep)
        columns = ceil_div(cell.expert_intermediate, template.tp)
        per_token = cell.experts_per_token / template.ep
        together = ceil_div(cell.experts_per_token, template.ep)  # experts of one token that some group must hold
        matrices = 2 + cell.gated

        def cost(m: Ints) -> Work:
            factor = fullest_group_factor(m * cell.experts_per_token, template.ep)
            # A token sends a group no more assignments than the group has experts.
            load = np.minimum(m * per_token * factor, m * float(min(cell.experts_per_token, held)))
            seconds = self.profile.moe_time_s(
                dtype,
                load / together,
                cell.hidden,
                columns,
                held,
                float(together),
                weight_bytes_per_element=None if stored == element else stored,
            )
            touched = held * (1.0 - (1.0 - min(per_token / held, 1.0)) ** m)
            weights = matrices * cell.hidden * columns
            moved = touched * weights * stored + m * per_token * (element + 2.0) * cell.hidden
            return Work.of(self.power, seconds, 2.0 * weights * per_token * m, moved, dtype)

        return cost

    def reshards(self, cell: Ffn, attention: Template, ffn: Template, layout: Layout) -> Parts:
        """Collectives after each cell, that turn its layout into the next one's.

        Partial sums are reduced within the shards of a copy. Where an attention copy feeds several FFN copies, each
        takes its slice for free and the results are gathered. Where an FFN copy serves several attention copies, their
        tokens are gathered, and the sums scattered back; experts in groups are reached by an all-to-all of the chosen
        tokens instead, gathered within a group whose experts are cut. Where the copies of one cell straddle those of
        the other, every device gets all tokens after each cell.
        """
        tables, calls = self.tables, self.collectives
        hidden = 2.0 * cell.hidden
        shards = ffn.tp * ffn.ep

        def call(place: Place, time_s: Callable[..., Floats], token_bytes: float, ranks: int, stride: int = 1) -> Parts:
            return self._collective(place, time_s, token_bytes, ranks, layout, stride)

        of_attention: Place = partial(owned, tables, copies=attention.dp, split=1)
        of_ffn = sharing(tables, attention.dp, ffn.dp)
        of_all: Place = partial(owned, tables, copies=1, split=1)
        parts = [call(of_attention, calls.all_reduce_s, hidden, attention.tp)]
        if ffn.dp % attention.dp == 0:
            parts += [
                call(of_ffn, calls.all_reduce_s, hidden, shards),
                call(of_attention, calls.all_gather_s, hidden, ffn.dp // attention.dp, shards),
            ]
        elif attention.dp % ffn.dp:
            parts += [
                call(of_all, calls.all_gather_s, hidden, attention.dp, attention.tp),
                call(of_ffn, calls.all_reduce_s, hidden, shards),
                call(of_all, calls.all_gather_s, hidden, ffn.dp, shards),
            ]
        else:
            if ffn.ep > 1 and not isinstance(cell, DenseFfn):
                # The devices of a copy hold the same tokens, so each sends its part of them.
                chosen, arrived = (hidden * cell.experts_per_token / n for n in (attention.tp, ffn.ep))
                parts += [
                    call(of_attention, calls.all_to_all_s, chosen, ffn.ep, ffn.tp),
                    call(of_ffn, calls.all_gather_s, arrived, ffn.tp),
                    call(of_ffn, calls.reduce_scatter_s, arrived, ffn.tp),
                    call(of_attention, calls.all_to_all_s, chosen, ffn.ep, ffn.tp),
                ]
            else:
                parts += [
                    call(of_ffn, calls.all_gather_s, hidden, attention.dp // ffn.dp, attention.tp),
                    call(of_ffn, calls.reduce_scatter_s, hidden, shards),
                ]
            parts.append(call(of_attention, calls.all_gather_s, hidden, attention.tp))
        return merged(*parts)

    def _collective(
        self,
        place: Place,
        time_s: Callable[..., Floats],
        token_bytes: float,
        ranks: int,
        layout: Layout,
        stride: int = 1,
    ) -> Parts:
        """A collective of so many bytes per token of a copy, over ranks that lie `stride` devices apart."""
        if ranks == 1:
            return {}
        where = {"ranks": ranks, "nodes": min(ranks, layout.nodes_spanned(ranks * stride))}
        return place(operation="communication", cost=self.link(time_s, token_bytes, **where))

    def embedding(self, model: Model, attention: Template, layout: Layout) -> Parts:
        """Rows of the embedding, and their sum over the vocabulary shards."""
        place: Place = partial(owned, self.tables, copies=attention.dp, split=1)
        return merged(
            place(operation="embedding", cost=self.elementwise(4.0 * model.hidden)),
            self._collective(place, self.collectives.all_reduce_s, 2.0 * model.hidden, attention.tp, layout),
        )

    def head(self, model: Model, attention: Template, layout: Layout) -> Parts:
        """Final norm, LM head on the sampled rows, gathering of the logits and the sampler, per sequence."""
        vocab = ceil_div(model.vocab, attention.tp)
        operations = [
            ("lm head", self.norm(model.hidden)),
            ("lm head", self.gemm(self.half, vocab, model.hidden)),
            ("sampler", self.elementwise(4.0 * model.vocab * _LOGIT_PASSES)),
        ]
        if attention.tp > 1:
            where = {"ranks": attention.tp, "nodes": layout.nodes_spanned(attention.tp)}
            operations.append(("communication", self.link(self.collectives.all_gather_s, 2.0 * model.vocab, **where)))
        rows = _ceil(self.tables.sequences, attention.dp)
        parts: list[Parts] = []
        for operation, cost in operations:
            work = cost(rows)
            parts.append({(operation, "sequence_ns"): work, (operation, "decode_ns"): work})
        return merged(*parts)

    def transfer(self, model: Model, attention: Template, link: Link) -> Floats:
        """Seconds for the activations of a batch to reach the next stage: hidden state and residual, a shard each."""
        share = 4.0 * model.hidden / attention.devices
        return self.collectives.point_to_point_s(self.tables.tokens * share, link)


def _ceil(values: Ints, parts: int) -> Ints:
    return -(-values // parts)
