"""Mixture of experts that work in a space narrower than the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apex_opt.ir.cells.base import WHOLE, Cut, Matrix
from apex_opt.ir.cells.moe import MoeFfn
from apex_opt.ir.cells.operations import Experts, Product
from apex_opt.ir.cells.operations import norm as norm_of
from apex_opt.ir.checks import check_counts, check_flags, check_forms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.cells.operations import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentMoeFfn(MoeFfn):
    """Experts between two projections, which are whole on every shard; router and shared FFN see the hidden state.

    As in Nemotron-3 Super and Kimi-K3.

    Parameters
    ----------
    latent : int            width that experts work in
    latent_norm : bool      a norm of the latent vector before it is projected back
    latent_quantised : int  number format of both projections
    """

    FORMS: ClassVar[Mapping[str, str]] = {**MoeFfn.FORMS, "latent_quantised": "latent"}

    latent: int
    latent_norm: bool = False
    latent_quantised: int = 1

    def __post_init__(self) -> None:
        MoeFfn.__post_init__(self)
        check_counts("latent MoE", latent=self.latent)
        check_flags("latent MoE", latent_norm=self.latent_norm)
        check_forms("latent MoE", latent_quantised=self.latent_quantised)

    @property
    def expert_hidden(self) -> int:
        """Width that experts work in."""
        return self.latent

    def routed(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Those of experts of the latent width, and the two projections."""
        found = (
            *MoeFfn.routed(self, cut),
            Matrix("latent down", self.latent, self.hidden, self.latent_quantised),
            Matrix("latent up", self.hidden, self.latent, self.latent_quantised),
        )
        return (*found, Matrix("latent norm", self.latent, 1)) if self.latent_norm else found

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Linear, ...]:
        """The projections around the experts."""
        found: list[Linear] = []
        for op in MoeFfn.operations(self, cut, kv_bytes):
            if isinstance(op, Experts):
                found.append(Product("latent", self.latent, self.hidden, quantised=self.latent_quantised))
                found.append(op)
                found += [norm_of(self.latent)] * self.latent_norm
                found.append(Product("latent", self.hidden, self.latent, quantised=self.latent_quantised))
            else:
                found.append(op)
        return tuple(found)

    def width(self, cut: Cut = WHOLE) -> int:
        """The latent vector besides, before and after."""
        return MoeFfn.width(self, cut) + 2 * self.latent

    @property
    def launches(self) -> tuple[int, int]:
        """Two products, and a norm."""
        captured, launched = super(LatentMoeFfn, self).launches
        return captured + 2 + self.latent_norm, launched + 2 + self.latent_norm
