"""Dense feed-forward network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apex_opt.ir.cells.base import WHOLE, Cut, Matrix, Piece, Unrouted
from apex_opt.ir.cells.operations import Elementwise, Product, norm
from apex_opt.ir.checks import check_counts, check_flags, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseFfn(Unrouted):
    """Feed-forward network: up (and gate) projection, activation, down projection.

    Parameters
    ----------
    hidden : int            width of the residual stream
    intermediate : int      columns between the projections
    gated : bool            a gate projection beside the up projection, as in SwiGLU
    bias : bool             a bias on every projection
    quantised : int         number format of the up (and gate) projection
    down_quantised : int    that of the down projection
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "up", "down_quantised": "down"}

    hidden: int
    intermediate: int
    gated: bool = True
    bias: bool = False
    quantised: int = 1
    down_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts("FFN", hidden=self.hidden, intermediate=self.intermediate)
        check_flags("FFN", gated=self.gated, bias=self.bias)
        check_forms("FFN", quantised=self.quantised, down_quantised=self.down_quantised)

    @property
    def dense(self) -> DenseFfn:
        """What every token passes through: all of it."""
        return self

    @property
    def token_columns(self) -> int:
        """All of them."""
        return self.intermediate

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: its columns; the bias of the down projection whole."""
        columns = ceil_div(self.intermediate, cut.columns)
        found = (
            Matrix("up", columns, self.hidden, self.quantised, "columns", times=1 + self.gated),
            Matrix("down", self.hidden, columns, self.down_quantised, "columns", inputs=True),
        )
        if self.bias:
            biases = Matrix("up bias", columns, 1, cut="columns", times=1 + self.gated)
            return *found, biases, Matrix("down bias", self.hidden, 1)
        return found

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Product | Elementwise, ...]:
        """Norm, up (and gate) projection, activation, down projection."""
        columns = ceil_div(self.intermediate, cut.columns)
        moved = 2.0 * (2 + self.gated) * columns
        return (
            norm(self.hidden),
            Product("ffn up", (1 + self.gated) * columns, self.hidden, quantised=self.quantised),
            Elementwise("activation", moved, "activation", columns, "activation"),
            Product("ffn down", self.hidden, columns, quantised=self.down_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """What the up (and gate) projection gives, and the activation."""
        return (2 + self.gated) * ceil_div(self.intermediate, cut.columns)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Columns between the projections."""
        return (Piece("columns", self.intermediate, ("tp", "ep")),)

    @property
    def kind(self) -> str:
        """A dense FFN."""
        return "dense FFN"

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, up, activation, down."""
        return 4, 4
