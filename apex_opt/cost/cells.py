"""Operations of one layer, and of what surrounds the layers, as work per table entry.

Every function returns a mapping from (operation, table) to `Work`; tables are the fields of `simulator.law.BatchLaw`.
Times are those of the busiest device of the stage.

Where attention has several copies (dp > 1), a sequence belongs to one of them: decoding sequences spread evenly, a
prompt is computed by its own copy while the others wait unless they have prompts too. The law therefore counts the
linear work of prompts by chunk and divides the sum by the copies that can be busy. An FFN copy that serves one
attention copy goes with it; one that serves several may get all prompts of a batch, and is taken to.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

import numpy as np

from apex_opt.cluster.tree import LEVELS
from apex_opt.cost.routing import fullest_group_factor
from apex_opt.cost.work import Work
from apex_opt.engines.rules import PLAIN, Held
from apex_opt.ir.cells import Cut
from apex_opt.ir.cells.operations import Attend, AttendLatent, Elementwise, Product, norm
from apex_opt.ir.formats import KV_BYTES, get_format
from apex_opt.plans.drafts import draft_of
from apex_opt.plans.memory import ffn_cut
from apex_opt.profiles.collectives import Collectives
from apex_opt.profiles.physics import causal_pairs, context_work, experts_work, gemm_work, latent_work, pair_flops
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Link
    from apex_opt.cost.work import Floats
    from apex_opt.ir.cells import AttentionCell, Ffn
    from apex_opt.ir.cells.operations import Experts, Linear
    from apex_opt.ir.model import Block, Model
    from apex_opt.plans.layout import Layout, Spread
    from apex_opt.plans.plan import Template
    from apex_opt.plans.speculation import Drafter
    from apex_opt.profiles import Profile

    Ints = NDArray[np.int64]

Parts = dict[tuple[str, str], Work]


class Place(Protocol):
    """Enters an operation into the tables by which batches it grows with: see `owned` and `crowded`."""

    def __call__(self, *, operation: str, work: Work) -> Parts: ...


class Exchange(NamedTuple):
    """A collective: by which batches it grows, its time by size, bytes per token of a copy, ranks, and the devices
    between them.

    So many `copies` share the tokens of a batch.
    """

    place: Place
    time_s: Callable[..., Floats]
    token_bytes: float
    ranks: int
    stride: int
    copies: int


_COUNTED_APART = frozenset({"rotary", "kv write"})  # kernels of a layer that an engine may fuse with others


class Exchanged(NamedTuple):
    """What all collectives of a batch take, and what a rank sends across domains of each kind, the widest first."""

    seconds: float
    sent: tuple[float, ...]


_KEPT = 64  # results of each kind, up to a few MB each: a few dozen are alike among the plans of a model
_LOGIT_PASSES = 3  # cast, penalties and temperature, soft-max and choice: reads or writes of fp32 logits. Assumed.


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Entries the tables are made for: every number of tokens and of sequences a batch can have.

    `padded[n]` is how many a batch of `n` decoding sequences is computed as, once padded to a captured graph. Where
    so many `drafts` may follow a token, `verified[t]` is that of a batch of `t` tokens of them.
    """

    tokens: Ints
    sequences: Ints
    padded: Ints
    drafts: int = 0
    verified: Ints | None = None

    @property
    def alone(self) -> tuple[str, Ints]:
        """The table of batches of decoding sequences alone that grows with their tokens, and how these are computed."""
        return ("decode_ns", self.padded) if self.verified is None else ("verify_ns", self.verified)


def owned(tables: Tables, operation: str, copies: int, split: int, work: Work) -> Parts:
    """An operation on the copy that owns a sequence, `split` groups of devices sharing the tokens of one copy.

    Sequences that decode beside prompts are counted apart, at the rate of a full batch: the weights are read already.

    Parameters
    ----------
    work : by tokens of one group
    """
    table, alone = tables.alone
    spread = work.at(_ceil(alone, copies * split))
    shared = work if split == 1 else work.at(_ceil(tables.tokens, split))
    if copies == 1:
        return {(operation, "mixed_ns"): shared, (operation, table): spread}
    rows = _ceil(tables.sequences, copies * split).astype(np.float64)
    beside = work.at(tables.tokens[-1:]) * (rows / tables.tokens[-1])
    return {(operation, "chunk_ns"): shared, (operation, "decode_ns"): spread, (operation, "attend_ns"): beside}


def crowded(tables: Tables, operation: str, copies: int, work: Work) -> Parts:
    """An operation on copies that serve several attention copies each: one of them may get every prompt of a batch.

    Arithmetic and traffic are those of an even share, which is what all copies together do.

    Parameters
    ----------
    tables : Tables    what the tables of the law are over
    operation : str    whose work it is
    copies : int       of the FFN
    work : Work        of one that gets all tokens
    """
    even = work.at(_ceil(tables.tokens, copies))
    return {
        (operation, "mixed_ns"): replace(even, seconds=work.seconds),
        (operation, "decode_ns"): work.at(_ceil(tables.padded, copies)),
    }


def sharing(tables: Tables, attention_dp: int, ffn_dp: int) -> Place:
    """How the copies of the FFN share the tokens of the attention copies.

    Parameters
    ----------
    tables : Tables       what the tables of the law are over
    attention_dp : int    copies of attention
    ffn_dp : int          copies of the FFN
    """
    if ffn_dp % attention_dp == 0:
        return partial(owned, tables, copies=attention_dp, split=ffn_dp // attention_dp)
    if ffn_dp > 1 and attention_dp % ffn_dp == 0:
        return partial(crowded, tables, copies=ffn_dp)
    return partial(owned, tables, copies=1, split=ffn_dp)  # every device gets all tokens first: see `reshards`


def evenly(operation: str, work: Work) -> Parts:
    """An operation on the tokens of all ranks, whose tables go by the mean tokens of a rank."""
    return {(operation, "together mixed"): work, (operation, "together decode"): work}


def nowhere(operation: str, work: Work) -> Parts:
    """An operation that another part of the costs counts."""
    return {}


def merged(*parts: Parts) -> Parts:
    """Sum of several mappings."""
    total: Parts = {}
    for part in parts:
        for key, work in part.items():
            total[key] = total[key] + work if key in total else work
    return total


def by_table(parts: Parts) -> dict[str, Work]:
    """Sum over operations."""
    found: dict[str, Work] = {}
    for (_, table), work in parts.items():
        found[table] = found[table] + work if table in found else work
    return found


def times(parts: Parts, count: int) -> Parts:
    """Parts of `count` identical layers."""
    return {key: work * count for key, work in parts.items()}


class Operations:
    """Operations on one kind of GPU within one cluster; work is per number of tokens, for all entries of `tables`."""

    def __init__(
        self,
        tables: Tables,
        profile: Profile,
        collectives: Collectives,
        routing: str = "uniform",
        fused: tuple[str, ...] = (),
        held: Held = PLAIN,
        gap_s: float = 0.0,
    ) -> None:
        self.held = held
        self.gap_s = gap_s
        self.tables = tables
        # Of ranks that run in step: "own" counts what each does for itself, a number what is done with the tokens of
        # all ranks where they are dealt to so many copies; None counts all that a stage does.
        self.role: Literal["own"] | int | None = None
        self.routing = routing
        self.fused = frozenset(fused)
        self.called: dict[str, str] = {}  # collectives asked for so far, and where their times come from
        self.profile = profile
        self.collectives = collectives
        self.power = profile.power
        self.half = profile.gpu.half_dtype
        # Templates share most of their operations. Per object: all of them live as long as a problem.
        self.gemm = lru_cache(maxsize=_KEPT)(self._gemm)
        self.elementwise = lru_cache(maxsize=_KEPT)(self._elementwise)
        self.link = lru_cache(maxsize=_KEPT)(self._link)
        self.experts = lru_cache(maxsize=_KEPT)(self._experts)

    def _gemm(self, name: str, n: int, k: int) -> Work:
        """out[m, n] = in[m, k] x weights, in a number format."""
        kernel, m = self.profile.kernel(name), self.tables.tokens
        seconds = self.profile.gemm_time_s(name, m, n, k, fused="quantise" in self.fused)
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
        return count - len(self.fused & _COUNTED_APART) + len(self.exchanges(block, attention, ffn))

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

    def _link(self, time_s: Callable[..., Floats], bytes_per_token: float, ranks: int, spread: Spread) -> Work:
        """A collective of so many bytes per token, over what its ranks spread over."""
        over = self.collectives.over(spread.near, spread.far)
        name = f"{time_s.__name__.removesuffix('_s')}/{'inter' if spread.nodes > 1 else 'intra'}"
        self.called[name] = over.provenance[name]
        sizes = self.tables.tokens * float(bytes_per_token)
        return Work.waiting(self.power, time_s(over, sizes, ranks=ranks, nodes=spread.nodes))

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
            if isinstance(op, Attend | AttendLatent):
                parts.append(self._attend(op, dp, kv_format))
            else:
                parts.append(own(operation=op.name, work=self._op(op, weight_format)))
        return merged(*parts)

    def ffn(self, cell: Ffn, attention: Template, template: Template, weight_format: str) -> Parts:
        """One FFN cell on its copies; what is shared beside experts on copies of its own.

        Parameters
        ----------
        cell
        attention : Template    how attention is cut
        template : Template     how it is cut
        weight_format : str     of the weights
        """
        own = self._of_ffn(attention.dp, self._held_as(cell, attention, template).dp)
        # What is shared is spread over all devices of a copy, or lies as dense FFNs do.
        spread = self.held.spreads_tokens(attention.dp, template.ep)
        dense = attention if self.held.dense_per_copy else template
        shared = attention.devices if spread else dense.dp
        beside = self._of_ffn(attention.dp, shared)
        operations = cell.operations(ffn_cut(cell, attention, template, weight_format, self.held), 0)
        return merged(
            *((beside if op.shared else own)(operation=op.name, work=self._op(op, weight_format)) for op in operations)
        )

    def _of_attention(self, copies: int) -> Place:
        """How attention copies take the tokens of a batch."""
        if self.role is None:
            return partial(owned, self.tables, copies=copies, split=1)
        return partial(owned, self.tables, copies=1, split=1) if self.role == "own" else nowhere

    def _of_ffn(self, attention_dp: int, ffn_dp: int) -> Place:
        """How copies of the FFN take the tokens of the attention copies."""
        if self.role is None:
            return sharing(self.tables, attention_dp, ffn_dp)
        goes_along = ffn_dp % attention_dp == 0
        if self.role == "own":
            return partial(owned, self.tables, copies=1, split=ffn_dp // attention_dp) if goes_along else nowhere
        return evenly if not goes_along and ffn_dp == self.role else nowhere

    def as_own(self) -> Self:
        """What each rank does for itself; results are shared."""
        own = copy(self)
        own.role = "own"
        return own

    def _op(self, op: Linear, weight_format: str) -> Work:
        """A kernel other than attention, by tokens."""
        if isinstance(op, Elementwise):
            return self.elementwise(op)
        held = self.held_in(weight_format, op.quantised)
        return self.gemm(held, op.n, op.k) if isinstance(op, Product) else self.experts(held, op)

    def _attend(self, op: Attend | AttendLatent, dp: int, kv_format: str) -> Parts:
        """The attention kernel itself: decoding sequences by context, prompts by query-key pairs."""
        sequences, element = _ceil(self.tables.sequences, dp), KV_BYTES[kv_format]
        if isinstance(op, AttendLatent):
            decode = self.profile.latent_decode(op.heads, op.rank, op.rope, kv_format, sequences)
            prefill = self.profile.latent_prefill(op.heads, op.key, op.value, kv_format, self.tables.tokens)
            context = latent_work(op.heads, op.rank, op.rope, element)
            pair = pair_flops(op.heads, op.key, op.value)
            return self._attention_parts(decode, prefill, dp, context, pair)
        shape = op.heads, op.kv_heads, op.width
        decode = self.profile.decode_attention(*shape, kv_format, sequences, op.window)
        prefill = self.profile.prefill_attention(*shape, kv_format, self.tables.tokens, op.window)
        context, pair = context_work(*shape, element), pair_flops(op.heads, op.width, op.width)
        # Within a short window time does not grow with the context: then all of it is charged to the window.
        window = op.window if op.window is not None and not decode[1].any() else None
        return self._attention_parts(decode, prefill, dp, context, pair, window)

    def _attention_parts(
        self,
        decode: tuple[Floats, Floats],
        prefill: tuple[Floats, Floats],
        dp: int,
        context: tuple[float, float],
        pair: float,
        window: int | None = None,
    ) -> Parts:
        """Attention times as work.

        Parameters
        ----------
        decode, prefill : base and rate each, as `Profile` gives them for one copy
        context : FLOP and bytes per token of context
        pair : FLOP per query-key pair
        window : tokens that every sequence is charged with in the base; None charges by context and pair
        """
        power, half, tokens = self.power, self.half, self.tables.tokens
        (base, per_token), (decode_flops, token_bytes) = decode, context
        base[0] = base[1]  # a batch of prompts alone launches the kernel as well
        chunk, per_pair = prefill
        by_context = float(window is None)
        if self.tables.drafts:  # the context is read once for a token and its drafts, and multiplied with each
            decode_flops *= 1 + self.tables.drafts
            least = decode_flops / self.profile.gpu.peak_flops_per_s(half)
            per_token = np.where(per_token > 0, np.maximum(per_token, least), 0.0)
        held, seen = self.tables.sequences * ((window or 0) / dp), np.minimum(tokens, window or 0)
        pairs = causal_pairs(tokens, seen)
        launch = Work.of(power, base, held * decode_flops, held * token_bytes, half)
        read = Work.of(power, per_token / dp, by_context * decode_flops / dp, by_context * token_bytes / dp, half)
        return {
            ("decode attention", "decode_ns"): launch,
            ("decode attention", "attend_ns"): launch,
            ("decode attention", "context_rate"): read,
            ("prefill attention", "chunk_ns"): Work.of(power, chunk, pairs * pair, 0.0, half),
            ("prefill attention", "pair_rate"): Work.of(power, per_pair, by_context * pair, 0.0, half),
        }

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
        # The engine could pad the batch to a larger one: tables are not monotone where shapes are interpolated.
        seconds = np.minimum.accumulate(np.maximum(seconds, least_s)[::-1])[::-1]
        seconds = np.where(m > 0, seconds, 0.0)
        # All groups together do the work of an even share each.
        flops, moved = experts_work(m, *shape, weight_bytes=kernel.weight_bytes, matrices=op.matrices)
        return Work.of(self.power, seconds, flops, moved, kernel.peak)

    def _held_as(self, cell: Ffn, attention: Template, ffn: Template) -> Template:
        """How an FFN is cut: as experts are, or as the engine holds dense ones beside them."""
        return attention if not cell.experts and self.held.dense_per_copy else ffn

    def reshards(self, block: Block, attention: Template, ffn: Template, layout: Layout) -> Parts:
        """Collectives of a layer: those that turn the layout of each cell into the next one's.

        Parameters
        ----------
        block
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        layout
        """
        return merged(*(self._collective(*call[:-1], layout) for call in self.exchanges(block, attention, ffn)))

    def exchanges(self, block: Block, attention: Template, ffn: Template) -> tuple[Exchange, ...]:
        """Collectives of a layer in order.

        Partial sums are reduced within the shards of a copy. Where an attention copy feeds several FFN copies, each
        takes its slice for free and the results are gathered. Where an FFN copy serves several attention copies, their
        tokens are gathered, and the sums scattered back; experts in groups are reached by an all-to-all of the chosen
        tokens instead, gathered within a group whose experts are cut. Where the copies of one cell straddle those of
        the other, every device gets all tokens after each cell. Norms over the whole width of queries and keys sum
        up two squares per token over the shards.

        Parameters
        ----------
        block
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        """
        tables, calls, cell = self.tables, Collectives, block.ffn
        ffn = self._held_as(cell, attention, ffn)
        hidden = 2.0 * cell.hidden
        shards = ffn.tp * ffn.ep
        of_attention, of_ffn = self._of_attention(attention.dp), self._of_ffn(attention.dp, ffn.dp)
        of_all = self._of_ffn(attention.dp, 1) if self.role is not None else partial(owned, tables, copies=1, split=1)
        found: list[tuple[Any, ...]] = []
        if block.attention.reduced_bytes:
            found.append(
                (of_attention, calls.all_reduce_s, block.attention.reduced_bytes, attention.tp, 1, attention.dp)
            )
        found.append((of_attention, calls.all_reduce_s, hidden, attention.tp, 1, attention.dp))
        if ffn.dp % attention.dp == 0:
            found += [
                (of_ffn, calls.all_reduce_s, hidden, shards, 1, ffn.dp),
                (of_attention, calls.all_gather_s, hidden, ffn.dp // attention.dp, shards, attention.dp),
            ]
        elif attention.dp % ffn.dp:
            found += [
                (of_all, calls.all_gather_s, hidden, attention.dp, attention.tp, 1),
                (of_ffn, calls.all_reduce_s, hidden, shards, 1, ffn.dp),
                (of_all, calls.all_gather_s, hidden, ffn.dp, shards, 1),
            ]
        else:
            if ffn.ep > 1 and cell.experts:
                # The devices of a copy hold the same tokens, so each sends its part of them.
                chosen, arrived = (hidden * cell.experts_per_token / n for n in (attention.tp, ffn.ep))
                found += [
                    (of_attention, calls.all_to_all_s, chosen, ffn.ep, ffn.tp, attention.dp),
                    (of_ffn, calls.all_gather_s, arrived, ffn.tp, 1, ffn.dp),
                    (of_ffn, calls.reduce_scatter_s, arrived, ffn.tp, 1, ffn.dp),
                    (of_attention, calls.all_to_all_s, chosen, ffn.ep, ffn.tp, attention.dp),
                ]
            else:
                found += [
                    (of_ffn, calls.all_gather_s, hidden, attention.dp // ffn.dp, attention.tp, ffn.dp),
                    (of_ffn, calls.reduce_scatter_s, hidden, shards, 1, ffn.dp),
                ]
            found.append((of_attention, calls.all_gather_s, hidden, attention.tp, 1, attention.dp))
        return tuple(call for call in (Exchange(*call) for call in found) if call.ranks > 1)

    def _collective(
        self,
        place: Place,
        time_s: Callable[..., Floats],
        token_bytes: float,
        ranks: int,
        stride: int,
        layout: Layout,
    ) -> Parts:
        """A collective of so many bytes per token of a copy, over ranks that lie `stride` devices apart."""
        if ranks == 1:
            return {}
        work = self.link(time_s, token_bytes, ranks, layout.spread(ranks, stride))
        return place(operation="communication", work=work)

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
        rows = _ceil(np.minimum(tables.sequences * (1 + tables.drafts), tables.tokens[-1]), copies)
        parts: list[Parts] = []
        for operation, by_rows in operations:
            work = by_rows.at(rows)
            alone = {(operation, "verify_ns"): by_rows} if tables.drafts else {(operation, "decode_ns"): work}
            parts.append({(operation, "sequence_ns"): work, **alone})
        return merged(*parts)

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
        attention : Template      how attention is cut, in one copy
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
        layers: list[Parts] = []
        kernels = 0
        for run in draft.runs:
            cells = merged(
                self.attention(run.block.attention, attention, held, formats[1]),
                self.ffn(run.block.ffn, attention, ffn, held),
                self.reshards(run.block, attention, ffn, layout),
            )
            layers.append(times(cells, run.count))
            kernels += run.count * int(self.kernels(run.block, attention, ffn)[0])
            if rows := draft.projection(run.block.attention, attention.tp):
                layers.append(place(operation="qkv", work=self.gemm(self.half, rows, draft.hidden)))
        if draft.joined:
            layers.append(place(operation="qkv", work=self.gemm(self.half, draft.hidden, draft.joined)))
        found = {("drafts", table): work for table, work in by_table(merged(*layers)).items()}
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

    def transfer(self, model: Model, attention: Template, layout: Layout) -> Floats:
        """Seconds for the activations of a batch to reach the next stage: hidden state and residual, a shard each.

        Parameters
        ----------
        model
        attention : Template    how attention is cut
        layout
        """
        name, over, link = self.between_stages(layout)
        self.called[name] = over.provenance[name]
        return over.point_to_point_s(self.tables.tokens * _transferred_bytes(model, attention), link)

    def between_stages(self, layout: Layout) -> tuple[str, Collectives, Link | None]:
        """What a transfer between stages is called in the provenance, and its link among the collectives over it."""
        link, far = layout.stage_link
        if far:
            return "point_to_point/inter", self.collectives.over(None, link), link
        return "point_to_point/intra", self.collectives.over(link, None), link

    def exchanged(
        self, model: Model, attention: Template, ffn: Template, layout: Layout, schedulers: int = 1
    ) -> Exchanged:
        """What the collectives of one full batch take on its way through all stages, and what they send how far.

        Parameters
        ----------
        model
        attention : Template    how attention is cut
        ffn : Template          how the FFN is cut
        layout
        """
        tokens, sequences = (schedulers * int(table[-1]) for table in (self.tables.tokens, self.tables.sequences))
        seconds, sent = 0.0, dict.fromkeys(LEVELS, 0.0)
        calls = [
            (run.count, call.time_s, call.token_bytes * ceil_div(tokens, call.copies), call.ranks, call.stride)
            for run in model.runs
            for call in self.exchanges(run.block, attention, ffn)
        ]
        own = ceil_div(tokens, attention.dp), ceil_div(sequences, attention.dp)
        calls.append((1, Collectives.all_reduce_s, 2.0 * model.hidden * own[0], attention.tp, 1))
        calls.append((1, Collectives.all_gather_s, 2.0 * model.vocab * own[1], attention.tp, 1))
        for count, time_s, size, ranks, stride in calls:
            if crossed := layout.crossed(ranks, stride):
                spread = layout.spread(ranks, stride)
                over = self.collectives.over(spread.near, spread.far)
                seconds += count * float(time_s(over, size, ranks=ranks, nodes=spread.nodes))
                sent[crossed[-1].kind] += count * size
        _, over, link = self.between_stages(layout)
        if link is not None:
            size = tokens * _transferred_bytes(model, attention)
            between = layout.tiers[-1].chunk // attention.devices - 1
            seconds += between * float(over.point_to_point_s(size, link))
            sent[layout.tiers[-1].kind] += between * size
        return Exchanged(seconds, tuple(sent[kind] for kind in reversed(LEVELS)))


def _transferred_bytes(model: Model, attention: Template) -> float:
    """Bytes of a token that each device of a stage sends to the next one."""
    return 4.0 * model.hidden / attention.devices


def _ceil(values: Ints, parts: int) -> Ints:
    return -(-values // parts)
