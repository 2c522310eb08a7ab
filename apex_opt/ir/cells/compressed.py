"""Attention over a window and a compressed context, as in DeepSeek-V4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Kept, Matrix, Piece, State
from apex_opt.ir.cells.indexer import Indexer, forms_with
from apex_opt.ir.cells.operations import AttendLatent, Elementwise, Op, Product, norm
from apex_opt.ir.checks import check_counts, check_flags, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping


_SCALED: Final = 64  # elements of an entry that share a scale of one byte
_STATE_BYTES: Final = 4
_ALIGNED: Final = 576  # bytes that blocks are multiples of
_WINDOW_BLOCK, _OVERLAP_BLOCK, _BLOCK = 64, 4, 8  # tokens of a block of the window, and of both kinds of sums


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedAttention(AttentionCell):
    """Attention of many heads over one vector per token, which is key and value, of the last tokens; beyond them over
    vectors that stand for several tokens each.

    An entry of either cache is kept in 8 bits with its rotary part in 16, whatever the format of other caches. Between
    two entries the compressor keeps what it sums up in fp32. Outputs of groups of heads are compressed before they are
    projected. Heads are cut over devices along with their groups; the vector, the compressor and the indexer are whole.
    Source: DeepSeek-AI, "DeepSeek-V4", 2026, section 2.3; tensor shapes as in `transformers`, caches as in vLLM,
    `layers/deepseek_v4_attention.py` and `layers/deepseek_compressor.py`.

    Parameters
    ----------
    hidden : int                width of the residual stream
    query_heads : int           a multiple of `output_groups`
    head_dim : int              elements of a query head, of a key and of a value
    rope_head_dim : int         those of them that rotary embedding turns
    q_lora_rank : int           width to which queries are compressed first
    output_groups : int         groups of heads whose outputs are compressed together
    output_rank : int           width to which those of each are compressed
    local_window : int          tokens seen as they are, itself included
    ratio : int                 tokens that a compressed entry stands for; 0 where the window is all that is seen
    overlap : bool              an entry sums up the tokens of the one before as well
    indexer : Indexer or None   what chooses among the entries; without one all are seen
    quantised : int             number format of the projections of query and key
    output_quantised : int      that of the output projections
    index_quantised : int       that of the indexer's
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "qkv", "output_quantised": "output", "index_quantised": "index"}

    hidden: int
    query_heads: int
    head_dim: int
    rope_head_dim: int
    q_lora_rank: int
    output_groups: int
    output_rank: int
    local_window: int
    ratio: int = 0
    overlap: bool = False
    indexer: Indexer | None = None
    quantised: int = 1
    output_quantised: int = 1
    index_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "compressed attention",
            hidden=self.hidden,
            query_heads=self.query_heads,
            head_dim=self.head_dim,
            rope_head_dim=self.rope_head_dim,
            q_lora_rank=self.q_lora_rank,
            output_groups=self.output_groups,
            output_rank=self.output_rank,
            local_window=self.local_window,
        )
        check_counts("compressed attention", minimum=0, ratio=self.ratio)
        check_flags("compressed attention", overlap=self.overlap)
        check_forms(
            "compressed attention",
            quantised=self.quantised,
            output_quantised=self.output_quantised,
            index_quantised=self.index_quantised,
        )
        if self.query_heads % self.output_groups:
            raise InputError(
                f"compressed attention: query_heads {self.query_heads} is not a multiple of "
                f"output_groups {self.output_groups}"
            )
        if self.rope_head_dim > self.head_dim:
            raise InputError(
                f"compressed attention: rope_head_dim {self.rope_head_dim} is above head_dim {self.head_dim}"
            )
        if not self.ratio and (self.overlap or self.indexer is not None):
            raise InputError("compressed attention: overlap and indexer need a ratio above 0")
        if self.indexer is not None and self.indexer.ratio != self.ratio:
            raise InputError(
                f"compressed attention: ratio {self.ratio} is not that of the indexer, {self.indexer.ratio}"
            )

    @property
    def kv_heads(self) -> int:
        """Heads held in the KV cache: one that all query heads share."""
        return 1

    @property
    def entry_bytes(self) -> int:
        """Bytes of an entry of either cache: 8 bits an element with scales, padded by one; the rotary part in 16."""
        plain = self.head_dim - self.rope_head_dim
        return plain + 2 * self.rope_head_dim + plain // _SCALED + 1

    def _compressor(self, width: int) -> tuple[int, int]:
        """Outputs of a compressor to entries of so many elements, values and gates; and its weights besides."""
        summed = (1 + self.overlap) * width
        return 2 * summed, self.ratio * summed + width

    def _shard(self, cut: Cut) -> tuple[int, int, int]:
        """Heads of one shard, outputs of its groups, and inputs of each."""
        groups = ceil_div(self.output_groups, cut.heads)
        return (
            ceil_div(self.query_heads, cut.heads),
            groups * self.output_rank,
            self.query_heads // self.output_groups * self.head_dim,
        )

    @property
    def forms(self) -> Mapping[str, str]:
        """Without those of an indexer where there is none."""
        return forms_with(self.FORMS, self.indexer)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: compressions and the indexer whole, what belongs to heads by heads."""
        heads, grouped, of_group = self._shard(cut)
        found = [
            Matrix("compressions", self.q_lora_rank + self.head_dim, self.hidden, self.quantised),
            Matrix("queries", heads * self.head_dim, self.q_lora_rank, self.quantised, "heads"),
            Matrix("grouped output", grouped, of_group, self.output_quantised, "heads"),
            Matrix("output", self.hidden, grouped, self.output_quantised, "heads", inputs=True),
            Matrix("norms", self.q_lora_rank + self.head_dim, 1),
            Matrix("sinks", heads, 1, cut="heads"),
        ]
        if self.ratio:
            rows, besides = self._compressor(self.head_dim)
            found += [Matrix("compressor", rows, self.hidden, 0), Matrix("compressor positions and norm", besides, 1)]
        if self.indexer is not None:
            found += self.indexer.matrices(cut, self.index_quantised)
        return tuple(found)

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept | State, ...]:
        """Compressed entries and the indexer's; of a sequence the window and what is summed up for the next entries.

        The latter lie in blocks of their own, of which a sequence holds those that its last tokens lie in.
        """
        size = _held(self.local_window, _WINDOW_BLOCK, self.entry_bytes)
        if not self.ratio:
            return (State(size),)
        found, widths = [Kept(0, None, other_bytes=self.entry_bytes, ratio=self.ratio)], [self.head_dim]
        if self.indexer is not None:
            widths.append(self.indexer.width)
            found.append(self.indexer.cache())
        summed, block = (1 + self.overlap) * self.ratio, _OVERLAP_BLOCK if self.overlap else _BLOCK
        size += sum(_held(summed, block, _STATE_BYTES * self._compressor(width)[0]) for width in widths)
        return *found, State(size)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projections, rotary embedding, cache write, compression, choice, attention, output projections."""
        heads, grouped, of_group = self._shard(cut)
        ranks, width = self.q_lora_rank + self.head_dim, float(self.entry_bytes)
        found: list[Op] = [
            norm(self.hidden),
            Product("qkv", ranks, self.hidden, quantised=self.quantised),
            Elementwise("norm", 4.0 * ranks, "norm", self.q_lora_rank, "norm"),
            Product("qkv", heads * self.head_dim, self.q_lora_rank, quantised=self.quantised),
            Elementwise("rotary", 4.0 * (heads + 1) * self.head_dim, "norm", self.head_dim, "rotary"),
            Elementwise("kv write", 2.0 * self.head_dim + width, "plain", 0, "kv write"),
        ]
        if self.ratio:
            rows, _ = self._compressor(self.head_dim)
            found += [
                Product("compressor", rows, self.hidden),
                Elementwise("compressor", (2.0 + 2 * _STATE_BYTES) * rows + width / self.ratio),
            ]
        if self.indexer is not None:
            found += self.indexer.operations(cut, self.index_quantised)
        shape = heads, self.head_dim, 0, self.head_dim, self.head_dim
        found.append(AttendLatent(*shape, window=self.local_window, token_bytes=width))
        if self.ratio:
            topk = None if self.indexer is None else self.indexer.topk
            found.append(AttendLatent(*shape, topk=topk, ratio=self.ratio, token_bytes=width))
        return (
            *found,
            Elementwise("rotary", 4.0 * heads * self.head_dim, "plain", 0, "rotary"),
            Product("output", grouped, of_group, quantised=self.output_quantised),
            Product("output", self.hidden, grouped, quantised=self.output_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """Queries and what attention gives for them, in the width of the vector; compressions beside them."""
        heads, grouped, _ = self._shard(cut)
        beside = self._compressor(self.head_dim)[0] if self.ratio else 0
        if self.indexer is not None:
            beside += self.indexer.elements(cut)
        return 2 * heads * self.head_dim + grouped + self.q_lora_rank + self.head_dim + beside

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Query heads and their groups: the vector is copied whole, however many shards there are."""
        return Piece("query heads", self.query_heads, ("tp",)), Piece("output groups", self.output_groups, ("tp",))

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, compressions, their norms, queries, rotary embedding with the cache write, attention, rotary embedding
        turned back, two outputs; the compressor's product, sums and entry; the indexer's."""
        kernels = 9 + 3 * bool(self.ratio) + (self.indexer.launches + 2 if self.indexer is not None else 0)
        return kernels, kernels

    @property
    def kind(self) -> str:
        """Attention over a window, and to all or some entries beyond it."""
        if not self.ratio:
            return f"attention over {self.local_window:,}"
        chosen = "" if self.indexer is None else f"{self.indexer.topk:,} chosen "
        return f"attention over {self.local_window:,} and {chosen}entries of {self.ratio:,}"

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns."""
        return self.rope_head_dim

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of."""
        return frozenset({"latent", "own pool", "compressed"})


def _held(window: int, block: int, token_bytes: int) -> int:
    """Bytes of the most blocks that the last tokens of a sequence lie in.

    Parameters
    ----------
    window : int         tokens that are kept, the one at hand included
    block : int          tokens of a block
    token_bytes : int    of each
    """
    return (ceil_div(window - 1, block) + 1) * _ALIGNED * ceil_div(block * token_bytes, _ALIGNED)
