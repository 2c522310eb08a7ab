"""Multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Kept, Matrix, Piece
from apex_opt.ir.cells.indexer import Indexer, forms_with
from apex_opt.ir.cells.operations import AttendLatent, Elementwise, Op, Product, norm
from apex_opt.ir.checks import check_counts, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping


_SCALED, _SCALE_BYTES = 128, 4  # elements of a vector in 8 bits that share a scale in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention(AttentionCell):
    """Multi-head latent attention: keys and values of all heads are kept as one short vector per token.

    A token's latent vector (`kv_lora_rank`) and one rotary key (`rope_head_dim`) are all that the KV cache holds; every
    head expands them with its own matrix, or absorbs that matrix into its query and output. Heads can be cut over
    devices, the latent vector cannot: each device computes and keeps it whole.
    Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1; tensor shapes as in `transformers`.

    Parameters
    ----------
    hidden : int                width of the residual stream
    query_heads : int           heads, each with its own keys and values expanded from the latent vector
    q_lora_rank : int or None   width to which queries are compressed first; None projects them directly
    kv_lora_rank : int          elements of the latent vector
    nope_head_dim : int         elements of a query or key head without position
    rope_head_dim : int         rotary elements of a query head, and of the one key that all heads share
    v_head_dim : int            elements of a value head
    indexer : Indexer or None   what chooses the tokens that are seen; None is all of them, unless `topk` is given
    topk : int or None          tokens that are seen at most; those of a layer before where there is no indexer
    quantised : int             number format of the projections of query, key and value
    output_quantised : int      that of the output projection
    index_quantised : int       that of the indexer's projections
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "qkv", "output_quantised": "output", "index_quantised": "index"}

    hidden: int
    query_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    indexer: Indexer | None = None
    topk: int | None = None
    quantised: int = 1
    output_quantised: int = 1
    index_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "latent attention",
            hidden=self.hidden,
            query_heads=self.query_heads,
            q_lora_rank=1 if self.q_lora_rank is None else self.q_lora_rank,
            kv_lora_rank=self.kv_lora_rank,
            nope_head_dim=self.nope_head_dim,
            rope_head_dim=self.rope_head_dim,
            v_head_dim=self.v_head_dim,
            topk=1 if self.topk is None else self.topk,
        )
        check_forms(
            "latent attention",
            quantised=self.quantised,
            output_quantised=self.output_quantised,
            index_quantised=self.index_quantised,
        )
        if self.indexer is not None and self.indexer.topk != self.topk:
            raise InputError(f"latent attention: topk {self.topk} is not that of the indexer, {self.indexer.topk}")

    @property
    def qk_head_dim(self) -> int:
        """Elements of one query head, and of one expanded key head."""
        return self.nope_head_dim + self.rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Elements of one token in the KV cache: the latent vector and the rotary key."""
        return self.kv_lora_rank + self.rope_head_dim

    @property
    def kv_heads(self) -> int:
        """Heads held in the KV cache: the latent vector is one that all query heads share."""
        return 1

    @property
    def forms(self) -> Mapping[str, str]:
        """Without those of an indexer where there is none."""
        return forms_with(self.FORMS, self.indexer)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: compressions and their norms whole, what expands them by heads."""
        heads, compressed = ceil_div(self.query_heads, cut.heads), self.q_lora_rank or 0
        expanded = self.nope_head_dim + self.v_head_dim
        index = () if self.indexer is None else self.indexer.matrices(cut, self.index_quantised)
        return (
            Matrix("compressions", compressed + self.latent_dim, self.hidden, self.quantised),
            Matrix("queries", heads * self.qk_head_dim, compressed or self.hidden, self.quantised, "heads"),
            Matrix("keys", heads * expanded, self.kv_lora_rank, self.quantised, "heads"),  # and values
            Matrix("output", self.hidden, heads * self.v_head_dim, self.output_quantised, "heads", inputs=True),
            Matrix("norms", compressed + self.kv_lora_rank, 1),
            *index,
        )

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept, ...]:
        """The latent vector and the rotary key, whole on every shard; the keys of an indexer.

        Where a query sees only some, engines keep the key in 16 bit even if the vector is in 8, and scales beside it.
        """
        narrow = 0
        if self.topk is not None:
            narrow = self.rope_head_dim + _SCALE_BYTES * (self.kv_lora_rank // _SCALED)
        index = () if self.indexer is None else (self.indexer.cache(),)
        return (Kept(self.latent_dim, None, narrow_bytes=narrow), *index)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projections, rotary embedding, cache write, expansion, attention, output projection.

        Expanding keys and values of new tokens (prompts) and absorbing that matrix into query and output (decoding) are
        the same arithmetic on the same weights, so one product stands for both. Contexts expanded again by later chunks
        of a prompt are left out.
        """
        heads, form = ceil_div(self.query_heads, cut.heads), self.quantised
        queries, expanded = heads * self.qk_head_dim, heads * (self.nope_head_dim + self.v_head_dim)
        if self.q_lora_rank is None:
            projections: list[Op] = [Product("qkv", queries + self.latent_dim, self.hidden, quantised=form)]
        else:
            ranks = self.q_lora_rank + self.latent_dim
            projections = [
                Product("qkv", ranks, self.hidden, quantised=form),
                Elementwise("norm", 4.0 * ranks, "norm", self.q_lora_rank, "norm"),
                Product("qkv", queries, self.q_lora_rank, quantised=form),
            ]
        index = () if self.indexer is None else self.indexer.operations(cut, self.index_quantised)
        attend = AttendLatent(heads, self.kv_lora_rank, self.rope_head_dim, self.qk_head_dim, self.v_head_dim)
        if self.topk is not None:
            # Sparse kernels compute prompts, too, with the vector itself.
            moved = self.cache()[0].entry_bytes(kv_bytes)
            attend = attend._replace(
                key=self.latent_dim, value=self.kv_lora_rank, topk=self.topk, token_bytes=float(moved)
            )
        return (
            norm(self.hidden),
            *projections,
            Elementwise("rotary", 4.0 * (heads + 1) * self.rope_head_dim, "plain", 0, "rotary"),
            Elementwise("kv write", self.latent_dim * (2.0 + kv_bytes), "plain", 0, "kv write"),
            Product("latent", expanded, self.kv_lora_rank),  # engines keep the absorbed matrix in 16 bit
            *index,
            attend,
            Product("output", self.hidden, heads * self.v_head_dim, quantised=self.output_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """A prompt's keys and values are expanded, its keys once more with the rotary part joined on.

        Decoding absorbs the expansion and is wider a token, but of a few tokens; so are prompts that see only some.
        """
        expanded = 2 * self.qk_head_dim + self.nope_head_dim + self.v_head_dim
        if self.topk is not None:
            expanded = self.qk_head_dim + self.latent_dim + self.kv_lora_rank + self.v_head_dim
        beside = (self.q_lora_rank or 0) + self.latent_dim
        if self.indexer is not None:
            beside += self.indexer.elements(cut)
        return ceil_div(self.query_heads, cut.heads) * expanded + beside

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Query heads: the latent vector is copied whole, however many shards there are."""
        return (Piece("query heads", self.query_heads, ("tp",)),)

    @property
    def launches(self) -> tuple[int, int]:
        """As `Attention`, two more products and norms; outside graphs splits, expansions and copies of every part."""
        index = 0 if self.indexer is None else self.indexer.launches
        return 11 + index, 26 + index

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns."""
        return self.rope_head_dim

    @property
    def kind(self) -> str:
        """Latent attention, to all or some tokens; of the latter it chooses them itself or has a layer before do it."""
        if self.topk is None:
            return "latent attention"
        return f"latent attention to {self.topk:,} {'chosen' if self.indexer is not None else 'chosen before'}"

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of."""
        return frozenset({"latent"} if self.topk is None else {"latent", "sparse"})
