"""Linear attention by the gated delta rule: Gated DeltaNet, and KDA, whose decay differs by channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Matrix, Piece, State
from apex_opt.ir.cells.operations import Convolve, Elementwise, Op, Product, Recur, norm
from apex_opt.ir.checks import check_counts, check_flags, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

_FORMS: Final = {"quantised": "state in", "gate_quantised": "state gates", "output_quantised": "state out"}


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedDelta(AttentionCell):
    """Gated DeltaNet: a short convolution over queries, keys and values, then one state of key by value per head.

    Source: Yang et al., "Gated Delta Networks", 2024; tensor shapes as in `transformers`, cut and kept as in vLLM.

    Parameters
    ----------
    hidden : int                    width of the residual stream
    key_heads, value_heads : int    heads of queries and keys; of values and of their gate, a multiple of the former
    key_dim, value_dim : int        elements of one
    kernel : int                    tokens that the convolution sees
    state_bytes : int               of an element of the state; the convolution's is 16 bit
    quantised : int                 number format of the projection of queries, keys, values and their gate
    gate_quantised : int            that of the projection of decay and learning rate
    output_quantised : int          that of the output projection
    """

    FORMS: ClassVar[Mapping[str, str]] = _FORMS

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel: int
    state_bytes: int = 2
    quantised: int = 1
    gate_quantised: int = 1
    output_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "gated delta net",
            hidden=self.hidden,
            key_heads=self.key_heads,
            value_heads=self.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            kernel=self.kernel,
            state_bytes=self.state_bytes,
        )
        check_forms(
            "gated delta net",
            quantised=self.quantised,
            gate_quantised=self.gate_quantised,
            output_quantised=self.output_quantised,
        )

    def _widths(self, cut: Cut) -> tuple[int, int, int]:
        """Value heads of one shard, and elements of its keys and values."""
        keys, values = ceil_div(self.key_heads, cut.heads), ceil_div(self.value_heads, cut.heads)
        return values, keys * self.key_dim, values * self.value_dim

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: those of its heads, the norm whole."""
        heads, key, value = self._widths(cut)
        return (
            Matrix("queries, keys, values and gate", 2 * key + 2 * value, self.hidden, self.quantised, "heads"),
            Matrix("decay and rate", 2 * heads, self.hidden, self.gate_quantised, "heads"),
            Matrix("convolution", 2 * key + value, self.kernel, cut="heads"),
            Matrix("decay bias", 2 * heads, 1, cut="heads"),
            Matrix("gated norm", self.value_dim, 1),
            Matrix("output", self.hidden, value, self.output_quantised, "heads", inputs=True),
        )

    def cache(self, cut: Cut = WHOLE) -> tuple[State, ...]:
        """The last inputs of the convolution, and a matrix per value head."""
        heads, key, value = self._widths(cut)
        row = 2 * (2 * key + value)
        return (State((self.kernel - 1) * row + heads * self.key_dim * self.value_dim * self.state_bytes, row),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projections, convolution, recurrence, gated norm, output projection."""
        heads, key, value = self._widths(cut)
        groups = key // self.key_dim
        return (
            norm(self.hidden),
            Product("qkv", 2 * key + 2 * value, self.hidden, quantised=self.quantised),
            Product("gates", 2 * heads, self.hidden, quantised=self.gate_quantised),
            Convolve(2 * key + value, self.kernel),
            Recur("gated_delta", heads, self.key_dim, self.value_dim, groups, self.state_bytes),
            Elementwise("norm", 6.0 * value, "norm", self.value_dim),
            Product("output", self.hidden, value, quantised=self.output_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """What the projections give, what the convolution gives, and the output."""
        heads, key, value = self._widths(cut)
        return 2 * (2 * key + value) + 2 * value + 2 * heads

    @property
    def query_heads(self) -> int:
        """Heads of values, each with a state."""
        return self.value_heads

    @property
    def kv_heads(self) -> int:
        """Heads of queries and keys."""
        return self.key_heads

    @property
    def kind(self) -> str:
        """Gated DeltaNet."""
        return "gated delta net"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Key heads and value heads, neither of which is copied."""
        return (
            Piece("linear key heads", self.key_heads, ("tp",)),
            Piece("linear value heads", self.value_heads, ("tp",)),
        )

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, two projections, order, convolution, gating, recurrence, norm, output; seven kernels of chunks more."""
        return 9, 17


@dataclass(frozen=True, slots=True, kw_only=True)
class KimiDelta(AttentionCell):
    """KDA: the gated delta rule with a decay for each channel, which a matrix of low rank tells.

    Source: Kimi Team, "Kimi Linear", 2025; tensor shapes as of its checkpoints, cut and kept as in vLLM.

    Parameters
    ----------
    hidden : int            width of the residual stream
    heads, head_dim : int   heads, which queries, keys and values all have, and elements of one; the rank too
    kernel : int            tokens that the convolution sees
    full_gate : bool        the gate of the output has one matrix in place of two of low rank, as in Kimi-K3
    quantised : int         number format of the projections of query, key and value
    gate_quantised : int    that of the projections of decay, learning rate and gate
    output_quantised : int  that of the output projection
    """

    FORMS: ClassVar[Mapping[str, str]] = _FORMS

    hidden: int
    heads: int
    head_dim: int
    kernel: int
    full_gate: bool = False
    quantised: int = 1
    gate_quantised: int = 1
    output_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts("KDA", hidden=self.hidden, heads=self.heads, head_dim=self.head_dim, kernel=self.kernel)
        check_flags("KDA", full_gate=self.full_gate)
        check_forms(
            "KDA",
            quantised=self.quantised,
            gate_quantised=self.gate_quantised,
            output_quantised=self.output_quantised,
        )

    def _widths(self, cut: Cut) -> tuple[int, int]:
        """Heads of one shard, and their elements."""
        heads = ceil_div(self.heads, cut.heads)
        return heads, heads * self.head_dim

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: those of its heads, what compresses whole."""
        (heads, width), form, rank = self._widths(cut), self.gate_quantised, self.head_dim
        compressed = 1 if self.full_gate else 2
        found = [
            Matrix("queries, keys and values", width, self.hidden, self.quantised, "heads", times=3),
            Matrix("rate", heads, self.hidden, form, "heads"),
            Matrix("compressions", rank, self.hidden, form, times=compressed),
            Matrix("expansions", width, rank, form, "heads", times=compressed),
            Matrix("convolution", 3 * width, self.kernel, cut="heads"),
            Matrix("decay bias", heads + width, 1, cut="heads"),
            Matrix("gated norm", self.head_dim, 1),
            Matrix("output", self.hidden, width, self.output_quantised, "heads", inputs=True),
        ]
        if self.full_gate:
            found.append(Matrix("gate", width, self.hidden, form, "heads"))
        return tuple(found)

    def cache(self, cut: Cut = WHOLE) -> tuple[State, ...]:
        """The last inputs of the convolution in 16 bit, and a matrix per head in 32."""
        heads, width = self._widths(cut)
        row = 2 * 3 * width
        return (State((self.kernel - 1) * row + 4 * heads * self.head_dim**2, row),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projections, convolution, recurrence, gated norm, output projection."""
        (heads, width), form, rank = self._widths(cut), self.gate_quantised, self.head_dim
        compressed = 1 if self.full_gate else 2
        gate = [Product("gates", width, self.hidden, quantised=form)] if self.full_gate else []
        return (
            norm(self.hidden),
            Product("qkv", 3 * width, self.hidden, quantised=self.quantised),
            Product("gates", heads + compressed * rank, self.hidden, quantised=form),
            *[Product("gates", width, rank, quantised=form)] * compressed,
            *gate,
            Convolve(3 * width, self.kernel),
            Recur("kda", heads, self.head_dim, self.head_dim, heads),
            Elementwise("norm", 6.0 * width, "norm", self.head_dim),
            Product("output", self.hidden, width, quantised=self.output_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """Queries, keys and values before and after the convolution, decay, gate and output."""
        heads, width = self._widths(cut)
        return 9 * width + heads + 2 * self.head_dim

    @property
    def query_heads(self) -> int:
        """Heads, each with a state."""
        return self.heads

    @property
    def kv_heads(self) -> int:
        """As many."""
        return self.heads

    @property
    def kind(self) -> str:
        """Kimi Delta Attention."""
        return "KDA"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Heads."""
        return (Piece("linear heads", self.heads, ("tp",)),)

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, projections, three convolutions, gate, recurrence, norm, output; the kernels of chunks more."""
        return 13, 21
