"""Attention whose output passes a gate of its own width, projected from the hidden state."""

from __future__ import annotations

from apex_opt.ir.cells.attention import Attention
from apex_opt.ir.cells.base import WHOLE, Cut, Matrix
from apex_opt.ir.cells.latent import LatentAttention
from apex_opt.ir.cells.operations import Elementwise, Op, Product


def _behind_gate(operations: tuple[Op, ...], gate: tuple[Op, ...], width: int) -> tuple[Op, ...]:
    """Kernels of attention with the gate before the output projection, which is the last of them."""
    return *operations[:-1], *gate, Elementwise("gate", 6.0 * width), operations[-1]


class GatedAttention(Attention):
    """Grouped-query attention with a gate, which the projection of queries gives too, as in Qwen3-Next."""

    __slots__ = ()

    def _gate(self, cut: Cut) -> Matrix:
        query = next(matrix for matrix in super().matrices(cut) if matrix.name == "queries")
        return query._replace(name="gate")

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Those of grouped-query attention, and the gate's, which is as large as that of the queries."""
        return *super().matrices(cut), self._gate(cut)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """A wider first product, and the gate before the output projection."""
        width = self._gate(cut).rows
        found = (
            op._replace(n=op.n + width) if isinstance(op, Product) and op.name == "qkv" else op
            for op in super().operations(cut, kv_bytes)
        )
        return _behind_gate(tuple(found), (), width)

    def width(self, cut: Cut = WHOLE) -> int:
        """The gate besides."""
        return super().width(cut) + self._gate(cut).rows

    @property
    def kind(self) -> str:
        """As without the gate."""
        return "gated attention"

    @property
    def launches(self) -> tuple[int, int]:
        """One more."""
        captured, launched = super().launches
        return captured + 1, launched + 1


class GatedLatentAttention(LatentAttention):
    """Latent attention with a gate from a projection of its own, as in Kimi-K3."""

    __slots__ = ()

    def _gate(self, cut: Cut) -> Matrix:
        output = next(matrix for matrix in super().matrices(cut) if matrix.name == "output")
        return Matrix("gate", output.columns, self.hidden, self.quantised, "heads")

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Those of latent attention, and the gate's."""
        return *super().matrices(cut), self._gate(cut)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """The gate before the output projection."""
        gate = self._gate(cut)
        product = Product("gates", gate.rows, self.hidden, quantised=self.quantised)
        return _behind_gate(super().operations(cut, kv_bytes), (product,), gate.rows)

    def width(self, cut: Cut = WHOLE) -> int:
        """The gate besides."""
        return super().width(cut) + self._gate(cut).rows

    @property
    def kind(self) -> str:
        """As without the gate."""
        return "gated latent attention"

    @property
    def launches(self) -> tuple[int, int]:
        """Two more."""
        captured, launched = super().launches
        return captured + 2, launched + 2
