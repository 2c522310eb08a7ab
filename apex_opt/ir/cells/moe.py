"""Mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, Cut, Ffn, Matrix, Piece
from apex_opt.ir.cells.dense import DenseFfn
from apex_opt.ir.cells.operations import Elementwise, Experts, Product, norm
from apex_opt.ir.checks import check_counts, check_flags, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.cells.operations import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeFfn(Ffn):
    """Mixture of experts: a router sends each token to a few gated FFNs, and perhaps to a shared one as well.

    Parameters
    ----------
    hidden : int                width of the residual stream
    expert_intermediate : int   columns between the projections of one expert
    experts : int               routed experts
    experts_per_token : int     routed experts that see one token, at most `experts`
    shared_intermediate : int   columns of the FFN every token passes through besides; 0 where there is none
    gated : bool                a gate projection beside the up projection of every expert
    shared_gate : bool          one output that scales the shared FFN per token, as in Qwen2-MoE
    bias : bool                 a bias on every projection of every routed expert, as in gpt-oss
    router_bias : bool          one more weight per routed expert that shifts its logit or its choice
    quantised : int             number format of the routed experts
    shared_quantised : int      that of the up (and gate) projection of the shared FFN
    shared_down_quantised : int     that of its down projection
    """

    FORMS: ClassVar[Mapping[str, str]] = {
        "quantised": "experts",
        "shared_quantised": "shared up",
        "shared_down_quantised": "shared down",
    }

    hidden: int
    expert_intermediate: int
    experts: int
    experts_per_token: int
    shared_intermediate: int = 0
    gated: bool = True
    shared_gate: bool = False
    bias: bool = False
    router_bias: bool = False
    quantised: int = 1
    shared_quantised: int = 1
    shared_down_quantised: int = 1
    dense: DenseFfn | None = field(init=False, repr=False, compare=False)
    """What every token passes through: the shared FFN, if any."""

    def __post_init__(self) -> None:
        check_counts(
            "MoE",
            hidden=self.hidden,
            expert_intermediate=self.expert_intermediate,
            experts=self.experts,
            experts_per_token=self.experts_per_token,
        )
        check_counts("MoE", minimum=0, shared_intermediate=self.shared_intermediate)
        check_flags(
            "MoE",
            gated=self.gated,
            shared_gate=self.shared_gate,
            bias=self.bias,
            router_bias=self.router_bias,
        )
        check_forms(
            "MoE",
            quantised=self.quantised,
            shared_quantised=self.shared_quantised,
            shared_down_quantised=self.shared_down_quantised,
        )
        if self.experts_per_token > self.experts:
            raise InputError(f"MoE: experts_per_token {self.experts_per_token} is above experts {self.experts}")
        if self.shared_gate and not self.shared_intermediate:
            raise InputError("MoE: shared_gate needs a shared_intermediate above 0")
        shared = None
        if self.shared_intermediate:
            shared = DenseFfn(
                hidden=self.hidden,
                intermediate=self.shared_intermediate,
                gated=self.gated,
                quantised=self.shared_quantised,
                down_quantised=self.shared_down_quantised,
            )
        object.__setattr__(self, "dense", shared)

    @property
    def expert_hidden(self) -> int:
        """Width that experts work in: that of the residual stream."""
        return self.hidden

    @property
    def token_columns(self) -> int:
        """Those of the chosen experts and of the shared FFN."""
        return self.experts_per_token * self.expert_intermediate + self.shared_intermediate

    def routed(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard but for the shared FFN: the columns of its experts, the router whole.

        Of the experts that one token passes through, some group holds at least an even share.
        """
        held, used = ceil_div(self.experts, cut.experts), ceil_div(self.experts_per_token, cut.experts)
        by_hidden, by_columns = cut.multiples
        columns = by_columns * ceil_div(ceil_div(self.expert_intermediate, cut.expert_columns), by_columns)
        hidden = by_hidden * ceil_div(self.expert_hidden, by_hidden)
        ups, form = 1 + self.gated, self.quantised
        stored = 2 if cut.gate_room else ups
        found = [
            Matrix("expert up", columns, hidden, form, "expert_columns", times=stored * held, used=ups * used),
            Matrix("expert down", hidden, columns, form, "expert_columns", inputs=True, times=held, used=used),
            Matrix("router", self.experts + self.shared_gate, self.hidden),
        ]
        if self.bias:
            up = Matrix("expert up bias", columns, 1, cut="expert_columns", times=ups * held, used=ups * used)
            found += [up, Matrix("expert down bias", hidden, 1, times=held, used=used)]
        if self.router_bias:
            found.append(Matrix("router bias", self.experts, 1))
        return tuple(found)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard."""
        shared = self.dense.matrices(cut) if self.dense else ()
        return *self.routed(cut), *(matrix._replace(name=f"shared {matrix.name}") for matrix in shared)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Linear, ...]:
        """Norm, router, choice, experts; the shared FFN, which needs no norm of its own."""
        shared = self.dense.operations(cut, kv_bytes)[1:] if self.dense else ()
        return (
            norm(self.hidden),
            Product("router", self.experts, self.hidden),
            Elementwise("router", 8.0 * self.experts),
            Experts(
                hidden=self.expert_hidden,
                columns=ceil_div(self.expert_intermediate, cut.expert_columns),
                experts=self.experts,
                groups=cut.experts,
                topk=self.experts_per_token,
                matrices=2 + self.gated,
                quantised=self.quantised,
            ),
            *(op._replace(shared=True) for op in shared),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """Per expert of a token what its up (and gate) projection gives, the activation and the output."""
        columns = ceil_div(self.expert_intermediate, cut.expert_columns)
        return self.experts_per_token * ((2 + self.gated) * columns + self.expert_hidden)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Experts, their columns, and those of the shared FFN."""
        return (
            Piece("experts", self.experts, ("ep",)),
            Piece("columns of an expert", self.expert_intermediate, ("tp",)),
            Piece("shared columns", self.shared_intermediate, ("tp", "ep")),
        )

    @property
    def kind(self) -> str:
        """How many experts a token chooses of how many, and what all tokens pass besides."""
        return f"{self.experts_per_token} of {self.experts} experts{' + shared' if self.shared_intermediate else ''}"

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, router, choice and the experts (sort, two products, activation, sum); outside graphs their scales and
        permutations too; then the shared FFN."""
        captured, launched = self.dense.launches if self.dense else (0, 0)
        return 8 + captured, 14 + launched

    @property
    def called_together(self) -> int:
        """All but norm, router and choice."""
        return 11
