"""Lightning attention: linear attention with a fixed decay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Matrix, Piece, State
from apex_opt.ir.cells.operations import Elementwise, Op, Product, Recur, norm
from apex_opt.ir.checks import check_counts, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

_CHUNK: Final = 256
"""Tokens of a prompt that vLLM's kernel computes at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LightningAttention(AttentionCell):
    """Lightning attention of MiniMax-Text-01: one state per head, a gated norm over the width of all heads.

    Source: MiniMax, "MiniMax-01", 2025; tensor shapes as in `transformers`, cut and kept as in vLLM.

    Parameters
    ----------
    hidden : int            width of the residual stream
    heads, head_dim : int   heads, which queries, keys and values all have, and elements of one
    state_bytes : int       of an element of the state
    quantised : int         number format of the projections of query, key, value and gate
    output_quantised : int  that of the output projection
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "state in", "output_quantised": "state out"}

    hidden: int
    heads: int
    head_dim: int
    state_bytes: int = 2
    quantised: int = 1
    output_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "lightning attention",
            hidden=self.hidden,
            heads=self.heads,
            head_dim=self.head_dim,
            state_bytes=self.state_bytes,
        )
        check_forms("lightning attention", quantised=self.quantised, output_quantised=self.output_quantised)

    def _widths(self, cut: Cut) -> tuple[int, int]:
        """Heads of one shard, and their elements."""
        heads = ceil_div(self.heads, cut.heads)
        return heads, heads * self.head_dim

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: those of its heads."""
        _, width = self._widths(cut)
        return (
            Matrix("queries, keys, values and gate", width, self.hidden, self.quantised, "heads", times=4),
            Matrix("norm", width, 1, cut="heads"),
            Matrix("output", self.hidden, width, self.output_quantised, "heads", inputs=True),
        )

    def cache(self, cut: Cut = WHOLE) -> tuple[State, ...]:
        """A matrix per head."""
        return (State(self._widths(cut)[0] * self.head_dim**2 * self.state_bytes),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projections, recurrence, norm, gate, output projection."""
        heads, width = self._widths(cut)
        return (
            norm(self.hidden),
            Product("qkv", 4 * width, self.hidden, quantised=self.quantised),
            Recur("lightning", heads, self.head_dim, self.head_dim, heads, self.state_bytes, _CHUNK),
            Elementwise("norm", 4.0 * width, "norm", width),
            Elementwise("gate", 6.0 * width),
            Product("output", self.hidden, width, quantised=self.output_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """Queries, keys, values, gate and output."""
        return 5 * self._widths(cut)[1]

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
        """Lightning attention."""
        return "lightning attention"

    @property
    def reduced_bytes(self) -> float:
        """The sum of squares of a token's output, for the norm over all heads."""
        return 4.0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Heads."""
        return (Piece("linear heads", self.heads, ("tp",)),)

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, QKV, activation, gate's projection, recurrence, norm, gate, output; outside graphs that of chunks."""
        return 8, 11
