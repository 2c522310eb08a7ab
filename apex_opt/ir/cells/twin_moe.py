"""Mixture of experts beside another that only images pass through."""

from __future__ import annotations

from dataclasses import dataclass

from apex_opt.ir.cells.base import WHOLE, Cut, Matrix, Piece
from apex_opt.ir.cells.moe import MoeFfn
from apex_opt.ir.checks import check_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinMoeFfn(MoeFfn):
    """As many experts again with a router of their own, held and not used: text passes through the first alone.

    As in ERNIE 4.5 VL.

    Parameters
    ----------
    twin_intermediate : int    columns of such an expert
    """

    twin_intermediate: int

    def __post_init__(self) -> None:
        MoeFfn.__post_init__(self)
        check_counts("MoE", twin_intermediate=self.twin_intermediate)

    @property
    def _twin(self) -> MoeFfn:
        return MoeFfn(
            hidden=self.hidden,
            expert_intermediate=self.twin_intermediate,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            gated=self.gated,
            bias=self.bias,
            router_bias=self.router_bias,
            quantised=self.quantised,
        )

    def routed(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Those of both, of which a token passes through the first."""
        twins = (matrix._replace(name=f"image {matrix.name}", used=0) for matrix in self._twin.routed(cut))
        return *MoeFfn.routed(self, cut), *twins

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The columns of the other experts besides."""
        columns = Piece("columns of an expert of images", self.twin_intermediate, ("tp",))
        return *super(TwinMoeFfn, self).pieces, columns

    @property
    def kind(self) -> str:
        """That there are others."""
        return f"{super(TwinMoeFfn, self).kind} + {self.experts} of images"
