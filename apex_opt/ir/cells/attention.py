"""Grouped-query attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Self

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Kept, Matrix, Piece
from apex_opt.ir.cells.operations import Attend, Elementwise, Op, Product, norm
from apex_opt.ir.checks import check_counts, check_flags, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

_SQUARES_BYTES: Final = 8.0  # fp32 sums of squares of a query and a key


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(AttentionCell):
    """Grouped-query attention: QKV projection, attention over the context, output projection.

    Parameters
    ----------
    hidden : int            width of the residual stream
    query_heads : int       a multiple of `kv_heads`
    kv_heads : int          heads held in the KV cache
    head_dim : int          elements per head; query_heads * head_dim need not equal hidden
    qkv_bias, output_bias : bool    a bias on the projection
    qk_norm : bool          one RMS norm each on query and key heads, shared by all heads
    qk_norm_whole : bool    those norms span the whole width of all heads instead, as in MiniMax-M2
    sinks : bool            one learned logit per query head beside the context, as in gpt-oss
    window : int or None    tokens of context a query sees; None is the whole context
    quantised : int         number format of the projections of query, key and value
    output_quantised : int  that of the output projection
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "qkv", "output_quantised": "output"}

    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    sinks: bool = False
    window: int | None = None
    quantised: int = 1
    output_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "attention",
            hidden=self.hidden,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            window=1 if self.window is None else self.window,
        )
        check_flags(
            "attention",
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm=self.qk_norm,
            qk_norm_whole=self.qk_norm_whole,
            sinks=self.sinks,
        )
        check_forms("attention", quantised=self.quantised, output_quantised=self.output_quantised)
        if self.qk_norm_whole and not self.qk_norm:
            raise InputError("attention: qk_norm_whole needs qk_norm")
        if self.query_heads % self.kv_heads:
            raise InputError(f"attention: query_heads {self.query_heads} is not a multiple of kv_heads {self.kv_heads}")

    def _widths(self, cut: Cut) -> tuple[int, int]:
        """Elements of the query heads of one shard, and of its key heads, at least one."""
        return ceil_div(self.query_heads, cut.heads) * self.head_dim, ceil_div(self.kv_heads, cut.heads) * self.head_dim

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: its query heads and at least one KV head."""
        query, key = self._widths(cut)
        found = [
            Matrix("queries", query, self.hidden, self.quantised, "heads"),
            Matrix("keys", key, self.hidden, self.quantised, "heads", times=2),  # and values
            Matrix("output", self.hidden, query, self.output_quantised, "heads", inputs=True),
        ]
        if self.qkv_bias:
            found.append(Matrix("qkv bias", query + 2 * key, 1, cut="heads"))
        if self.output_bias:
            found.append(Matrix("output bias", self.hidden, 1))
        if self.qk_norm_whole:
            found.append(Matrix("qk norm", query + key, 1, cut="heads"))
        elif self.qk_norm:
            found.append(Matrix("qk norm", 2 * self.head_dim, 1))
        if self.sinks:
            found.append(Matrix("sinks", query // self.head_dim, 1, cut="heads"))
        return tuple(found)

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept, ...]:
        """Keys and values of the KV heads of one shard."""
        return (Kept(2 * self._widths(cut)[1], self.window),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projections, rotary embedding, norms of queries and keys, cache write, attention, output projection."""
        query, key = self._widths(cut)
        heads, kv_heads = query // self.head_dim, key // self.head_dim
        found: list[Op] = [
            norm(self.hidden),
            Product("qkv", query + 2 * key, self.hidden, quantised=self.quantised),
            Elementwise("rotary", 4.0 * (query + key), "plain", 0, "rotary"),
        ]
        if self.qk_norm:
            width = query if self.qk_norm_whole else self.head_dim
            found.append(Elementwise("norm", 4.0 * (query + key), "norm", width, "qk norm"))
        return (
            *found,
            Elementwise("kv write", 2.0 * key * (2 + kv_bytes), "plain", 0, "kv write"),
            Attend(heads, kv_heads, self.head_dim, self.window),
            Product("output", self.hidden, query, quantised=self.output_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """Queries, keys and values."""
        query, key = self._widths(cut)
        return query + 2 * key

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Query heads and KV heads."""
        return Piece("query heads", self.query_heads, ("tp",)), Piece("KV heads", self.kv_heads, ("tp",), copied=True)

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, QKV, rotary, cache write, attention of prompts and of decoding sequences, output."""
        return 7, 7

    @property
    def reduced_bytes(self) -> float:
        """Bytes per token that the shards of a copy add up before attention."""
        return _SQUARES_BYTES if self.qk_norm_whole else 0.0

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns: all, at most."""
        return self.head_dim

    @property
    def kind(self) -> str:
        """Attention over the context, or over a window of it."""
        return "attention" if self.window is None else f"attention over {self.window:,}"

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of."""
        return frozenset({"sinks"} if self.sinks else ())

    def with_window(self, window: int | None) -> Self:
        """The cell with another window, which changes neither weights nor shards."""
        return self if window == self.window else replace(self, window=window)
