"""A single matrix in the place of a cell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apex_opt.ir.cells.base import WHOLE, Cut, Headless, Matrix, Piece, Unrouted
from apex_opt.ir.cells.operations import Linear, Product, norm
from apex_opt.ir.checks import check_counts, check_forms

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced(Headless, Unrouted):
    """A linear map of the residual stream, whole on every shard, in place of attention or of an FFN.

    Parameters
    ----------
    hidden : int        width of the residual stream
    quantised : int     number format of the matrix
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "replaced"}

    hidden: int
    quantised: int = 1

    def __post_init__(self) -> None:
        check_counts("replaced cell", hidden=self.hidden)
        check_forms("replaced cell", quantised=self.quantised)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """The matrix."""
        return (Matrix("map", self.hidden, self.hidden, self.quantised),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Linear, ...]:
        """Norm and product."""
        return norm(self.hidden), Product("ffn up", self.hidden, self.hidden, quantised=self.quantised)

    def width(self, cut: Cut = WHOLE) -> int:
        """The output."""
        return self.hidden

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """None: it is not cut."""
        return ()

    @property
    def launches(self) -> tuple[int, int]:
        """Norm and product."""
        return 2, 2

    @property
    def kind(self) -> str:
        """A matrix."""
        return "linear map"

    @property
    def token_columns(self) -> int:
        """None, but drafts of such a layer need some: as many as it has outputs."""
        return self.hidden

    @property
    def dense(self) -> Replaced:
        """What every token passes through: all of it."""
        return self
