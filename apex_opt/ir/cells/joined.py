"""Attention and Mamba2 side by side, which read the same hidden state and whose outputs are added up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Self

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut
from apex_opt.ir.cells.operations import Elementwise
from apex_opt.ir.checks import check_counts, check_forms

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.cells.attention import Attention
    from apex_opt.ir.cells.base import Kept, Matrix, Piece, State
    from apex_opt.ir.cells.mamba import Mamba2
    from apex_opt.ir.cells.operations import Op


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedAttention(AttentionCell):
    """Attention and Mamba2 behind one norm, as in Falcon-H1: a token keeps keys and values, a sequence a state besides.

    Parameters
    ----------
    hidden : int                    width of the residual stream
    attention : Attention           the one
    mamba : Mamba2                  the other
    quantised : int                 number format of the projections of query, key and value
    output_quantised : int          that of attention's output projection
    state_quantised : int           that of Mamba2's first projection
    state_output_quantised : int    that of its output projection
    """

    FORMS: ClassVar[Mapping[str, str]] = {
        "quantised": "qkv",
        "output_quantised": "output",
        "state_quantised": "state in",
        "state_output_quantised": "state out",
    }

    hidden: int
    attention: Attention
    mamba: Mamba2
    quantised: int = 1
    output_quantised: int = 1
    state_quantised: int = 1
    state_output_quantised: int = 1
    _parts: tuple[Attention, Mamba2] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_counts("joined attention", hidden=self.hidden)
        check_forms(
            "joined attention",
            quantised=self.quantised,
            output_quantised=self.output_quantised,
            state_quantised=self.state_quantised,
            state_output_quantised=self.state_output_quantised,
        )
        for part in (self.attention, self.mamba):
            if part.hidden != self.hidden:
                raise InputError(f"joined attention: {part.kind} has hidden {part.hidden}, not {self.hidden}")
        attention = replace(self.attention, quantised=self.quantised, output_quantised=self.output_quantised)
        mamba = replace(self.mamba, quantised=self.state_quantised, output_quantised=self.state_output_quantised)
        object.__setattr__(self, "_parts", (attention, mamba))

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Those of both."""
        return tuple(matrix for part in self._parts for matrix in part.matrices(cut))

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept | State, ...]:
        """Keys and values of tokens, and the state of a sequence."""
        return tuple(kept for part in self._parts for kept in part.cache(cut))

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """One norm, the kernels of both after theirs, and the sum of their outputs."""
        attention, mamba = (part.operations(cut, kv_bytes) for part in self._parts)
        return *attention, *mamba[1:], Elementwise("residuals", 6.0 * self.hidden)

    def width(self, cut: Cut = WHOLE) -> int:
        """What the wider one keeps alive, and the output of the other."""
        return max(part.width(cut) for part in self._parts) + self.hidden

    @property
    def query_heads(self) -> int:
        """Query heads of attention."""
        return self.attention.query_heads

    @property
    def kv_heads(self) -> int:
        """KV heads of attention."""
        return self.attention.kv_heads

    @property
    def window(self) -> int | None:
        """Tokens of context a query sees."""
        return self.attention.window

    def with_window(self, window: int | None) -> Self:
        """The cell with another window of its attention."""
        return self if window == self.window else replace(self, attention=self.attention.with_window(window))

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Those of both."""
        return tuple(piece for part in self._parts for piece in part.pieces)

    @property
    def launches(self) -> tuple[int, int]:
        """Those of both, of which one norm is the other's, and their sum."""
        captured, launched = zip(*(part.launches for part in self._parts), strict=True)
        return sum(captured), sum(launched)

    @property
    def reduced_bytes(self) -> float:
        """The output of Mamba2, whose shards are added up besides those of attention."""
        return 2.0 * self.hidden

    @property
    def rotary_dim(self) -> int:
        """Elements of a head of attention that rotary embedding turns."""
        return self.attention.rotary_dim

    @property
    def kind(self) -> str:
        """Both."""
        return f"{self.attention.kind} beside {self.mamba.kind}"

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of attention."""
        return self.attention.traits
