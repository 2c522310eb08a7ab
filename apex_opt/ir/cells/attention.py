"""Grouped-query attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final, Self

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Kept, Matrix, Piece
from apex_opt.ir.cells.indexer import Indexer, forms_with
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
    qk_norm_each : bool     every head has a norm of its own instead, as in Command R+
    sinks : bool            one learned logit per query head beside the context, as in gpt-oss
    window : int or None    tokens of context a query sees; None is the whole context
    chunked : bool          it sees its own chunk of `window` tokens instead of the last ones, as in Llama 4
    value_dim : int or None     elements of a value head; None is `head_dim`
    rotary : bool           queries and keys are turned by position
    gated : bool            one more output per query head scales what attention gives for it, as in Step-3.5
    keys_as_values : bool   values are the keys before their norm, with no projection of their own, as in Gemma 4
    borrowed : bool         keys and values are those of a layer before, which keeps them, as in Gemma 3n
    query_rank : int        elements that queries are compressed to before their own projection, as in Step-3; 0: none
    indexer : Indexer or None   what chooses the tokens that are seen; None is all of them
    quantised : int         number format of the projections of query, key and value
    output_quantised : int  that of the output projection
    index_quantised : int   that of the indexer's projections
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "qkv", "output_quantised": "output", "index_quantised": "index"}

    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    qk_norm_each: bool = False
    sinks: bool = False
    window: int | None = None
    chunked: bool = False
    value_dim: int | None = None
    rotary: bool = True
    gated: bool = False
    keys_as_values: bool = False
    borrowed: bool = False
    query_rank: int = 0
    indexer: Indexer | None = None
    quantised: int = 1
    output_quantised: int = 1
    index_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "attention",
            hidden=self.hidden,
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            window=1 if self.window is None else self.window,
            value_dim=1 if self.value_dim is None else self.value_dim,
        )
        check_counts("attention", minimum=0, query_rank=self.query_rank)
        check_flags(
            "attention",
            qkv_bias=self.qkv_bias,
            output_bias=self.output_bias,
            qk_norm=self.qk_norm,
            qk_norm_whole=self.qk_norm_whole,
            qk_norm_each=self.qk_norm_each,
            sinks=self.sinks,
            chunked=self.chunked,
            rotary=self.rotary,
            gated=self.gated,
            keys_as_values=self.keys_as_values,
            borrowed=self.borrowed,
        )
        check_forms(
            "attention",
            quantised=self.quantised,
            output_quantised=self.output_quantised,
            index_quantised=self.index_quantised,
        )
        if (self.qk_norm_whole or self.qk_norm_each) and not self.qk_norm:
            raise InputError("attention: qk_norm_whole and qk_norm_each need qk_norm")
        if self.chunked and self.window is None:
            raise InputError("attention: chunked needs a window, which is the length of a chunk")
        if self.keys_as_values and self.value_dim not in (None, self.head_dim):
            raise InputError(f"attention: keys_as_values needs value_dim {self.head_dim}, not {self.value_dim}")
        if self.query_heads % self.kv_heads:
            raise InputError(f"attention: query_heads {self.query_heads} is not a multiple of kv_heads {self.kv_heads}")

    def _widths(self, cut: Cut) -> tuple[int, int, int]:
        """Elements of the query heads of one shard, and of its key and value heads, at least one of each."""
        kv_heads, value_dim = ceil_div(self.kv_heads, cut.heads), self.value_dim or self.head_dim
        return ceil_div(self.query_heads, cut.heads) * self.head_dim, kv_heads * self.head_dim, kv_heads * value_dim

    def _projected(self, cut: Cut) -> tuple[int, int]:
        """Outputs of one shard that are projected to keys, and to values."""
        _, key, value = self._widths(cut)
        return (0, 0) if self.borrowed else (key, 0 if self.keys_as_values else value)

    @property
    def forms(self) -> Mapping[str, str]:
        """Without those of an indexer where there is none."""
        return forms_with(self.FORMS, self.indexer)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: its query heads and at least one KV head."""
        query = self._widths(cut)[0]
        heads, (keys, values) = query // self.head_dim, self._projected(cut)
        found = [Matrix("queries", query, self.query_rank or self.hidden, self.quantised, "heads")]
        if self.query_rank:
            found.append(Matrix("query compression", self.query_rank, self.hidden, self.quantised))
            found.append(Matrix("query norm", self.query_rank, 1))
        if keys == values != 0:
            found.append(Matrix("keys", keys, self.hidden, self.quantised, "heads", times=2))  # and values
        elif keys:
            found.append(Matrix("keys", keys, self.hidden, self.quantised, "heads"))
            found += [Matrix("values", values, self.hidden, self.quantised, "heads")] * bool(values)
        inputs = heads * (self.value_dim or self.head_dim)
        found.append(Matrix("output", self.hidden, inputs, self.output_quantised, "heads", inputs=True))
        if self.gated:
            # One output a head: no block of 128 that shares a scale fits these, so engines keep them in 16 bit.
            found.append(Matrix("gate", heads, self.hidden, 0, "heads"))
        if self.qkv_bias:
            found.append(Matrix("qkv bias", query + keys + values, 1, cut="heads"))
        if self.output_bias:
            found.append(Matrix("output bias", self.hidden, 1))
        if self.qk_norm_whole or self.qk_norm_each:
            found.append(Matrix("qk norm", query + keys, 1, cut="heads"))
        elif self.qk_norm:
            found.append(Matrix("qk norm", (1 + bool(keys)) * self.head_dim, 1))
        if self.sinks:
            found.append(Matrix("sinks", heads, 1, cut="heads"))
        if self.indexer is not None:
            found += self.indexer.matrices(cut, self.index_quantised)
        return tuple(found)

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept, ...]:
        """Keys and values of the KV heads of one shard, and the keys of an indexer."""
        _, key, value = self._widths(cut)
        own = () if self.borrowed else (Kept(key + value, self.window, self.chunked),)
        return own if self.indexer is None else (*own, self.indexer.cache())

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projections, rotary embedding, norms of queries and keys, cache write, attention, output projection."""
        query, key, value = self._widths(cut)
        heads, kv_heads, (keys, values) = query // self.head_dim, key // self.head_dim, self._projected(cut)
        rows = (self.query_rank or query) + keys + values
        found: list[Op] = [norm(self.hidden), Product("qkv", rows, self.hidden, quantised=self.quantised)]
        if self.query_rank:
            found.append(Elementwise("norm", 4.0 * self.query_rank, "norm", self.query_rank))
            found.append(Product("qkv", query, self.query_rank, quantised=self.quantised))
        if self.gated:
            found.append(Product("gate", heads, self.hidden))
        if self.rotary:
            found.append(Elementwise("rotary", 4.0 * (query + keys), "plain", 0, "rotary"))
        if self.qk_norm:
            width = query if self.qk_norm_whole else self.head_dim
            found.append(Elementwise("norm", 4.0 * (query + keys), "norm", width, "qk norm"))
        if not self.borrowed:
            found.append(Elementwise("kv write", 1.0 * (key + value) * (2 + kv_bytes), "plain", 0, "kv write"))
        topk = None
        if self.indexer is not None:
            found += self.indexer.operations(cut, self.index_quantised)
            topk = self.indexer.topk
        seen = Attend(heads, kv_heads, self.head_dim, self.window, self.value_dim, self.chunked, topk)
        inputs = heads * (self.value_dim or self.head_dim)
        found.append(seen)
        if self.gated:
            found.append(Elementwise("gate", 4.0 * inputs))
        return *found, Product("output", self.hidden, inputs, quantised=self.output_quantised)

    def width(self, cut: Cut = WHOLE) -> int:
        """Queries, keys and values."""
        index = 0 if self.indexer is None else self.indexer.elements(cut)
        return sum(self._widths(cut)) + index

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Query heads and KV heads."""
        return Piece("query heads", self.query_heads, ("tp",)), Piece("KV heads", self.kv_heads, ("tp",), copied=True)

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, QKV, rotary, cache write, attention of prompts and of decoding sequences, output; gate, indexer."""
        kernels = 5 + self.rotary + (not self.borrowed) + self.gated + 2 * (self.query_rank > 0)
        kernels += 0 if self.indexer is None else self.indexer.launches
        return kernels, kernels

    @property
    def reduced_bytes(self) -> float:
        """Bytes per token that the shards of a copy add up before attention."""
        return _SQUARES_BYTES if self.qk_norm_whole else 0.0

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns: all, at most."""
        return self.head_dim if self.rotary else 0

    @property
    def kind(self) -> str:
        """Attention over the context, or over a window or a chunk of it, or to what an indexer chooses."""
        borrowed = "borrowing " if self.borrowed else ""
        if self.indexer is not None:
            return f"{borrowed}attention to {self.indexer.topk:,} chosen"
        if self.window is None:
            return f"{borrowed}attention"
        return f"{borrowed}attention over {'chunks of ' if self.chunked else ''}{self.window:,}"

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of."""
        return frozenset({"sinks"} if self.sinks else ())

    def with_window(self, window: int | None) -> Self:
        """The cell with another window, which changes neither weights nor shards."""
        if window == self.window:
            return self
        return replace(self, window=window, chunked=self.chunked and window is not None)
