"""Attention and FFN whose weights some layers share, in front of a Mamba2 of their own, as in Zamba2."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Kept, Matrix, Piece
from apex_opt.ir.cells.dense import DenseFfn
from apex_opt.ir.cells.operations import Attend, Elementwise, Op, Product, norm
from apex_opt.ir.checks import check_counts, check_flags, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.cells.base import State
    from apex_opt.ir.cells.mamba import Mamba2


def _once(matrices: tuple[Matrix, ...], again: bool) -> tuple[Matrix, ...]:
    """Matrices that lie in an earlier layer where they are used again, and so add nothing."""
    return tuple(matrix._replace(times=0) for matrix in matrices) if again else matrices


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedAttention(AttentionCell):
    """Attention over a layer's input beside the embedding, a map of what it and the FFN give, and Mamba2 behind it.

    Source: tensor shapes as in `transformers`, `zamba2`; cut and kept as in vLLM, `models/zamba2.py`.

    Parameters
    ----------
    hidden : int                    width of the residual stream; attention reads twice as much
    heads, head_dim : int           of attention, each with keys and values of its own
    mamba : Mamba2                  that of the layer itself
    adapter : int                   width of what adapts the projections to the layer; 0: nothing does
    rotary : bool                   queries and keys are turned by position
    again : bool                    the shared weights lie in an earlier layer
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
    heads: int
    head_dim: int
    mamba: Mamba2
    adapter: int = 0
    rotary: bool = False
    again: bool = False
    quantised: int = 1
    output_quantised: int = 1
    state_quantised: int = 1
    state_output_quantised: int = 1
    _mamba: Mamba2 = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_counts("shared attention", hidden=self.hidden, heads=self.heads, head_dim=self.head_dim)
        check_counts("shared attention", minimum=0, adapter=self.adapter)
        check_flags("shared attention", rotary=self.rotary, again=self.again)
        check_forms(
            "shared attention",
            quantised=self.quantised,
            output_quantised=self.output_quantised,
            state_quantised=self.state_quantised,
            state_output_quantised=self.state_output_quantised,
        )
        if self.mamba.hidden != self.hidden:
            raise InputError(f"shared attention: Mamba2 has hidden {self.mamba.hidden}, not {self.hidden}")
        forms = {"quantised": self.state_quantised, "output_quantised": self.state_output_quantised}
        object.__setattr__(self, "_mamba", replace(self.mamba, **forms))  # type: ignore[arg-type]

    def _width(self, cut: Cut) -> int:
        """Elements of the heads of one shard."""
        return ceil_div(self.heads, cut.heads) * self.head_dim

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """What is shared, in the first layer that has it; the map, adapters and Mamba2 of the layer itself."""
        width, read = self._width(cut), 2 * self.hidden
        shared = (
            Matrix("queries, keys and values", width, read, self.quantised, "heads", times=3),
            Matrix("output", self.hidden, width, self.output_quantised, "heads", inputs=True),
            Matrix("shared norms", self.hidden, 1, times=3),
        )
        own = [Matrix("map", self.hidden, self.hidden, 0)]
        if self.adapter:
            own.append(Matrix("adapters", self.adapter, read, 0, times=3))
            own.append(Matrix("adapters out", width, self.adapter, 0, "heads", times=3))
        return *_once(shared, self.again), *own, *self._mamba.matrices(cut)

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept | State, ...]:
        """Keys and values of tokens, and the state of a sequence."""
        return Kept(2 * self._width(cut), None), *self._mamba.cache(cut)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Join, norm, projections, attention, output, map; then Mamba2."""
        width, read = self._width(cut), 2 * self.hidden
        found: list[Op] = [
            Elementwise("residuals", 2.0 * 2 * read),
            norm(read),
            Product("qkv", 3 * width, read, quantised=self.quantised),
        ]
        if self.adapter:
            found.append(Product("gates", 3 * self.adapter, read))
            found.append(Product("gates", 3 * width, self.adapter))
        if self.rotary:
            found.append(Elementwise("rotary", 4.0 * 2 * width, "plain", 0, "rotary"))
        found.append(Elementwise("kv write", 2.0 * width * (2 + kv_bytes), "plain", 0, "kv write"))
        heads = width // self.head_dim
        found.append(Attend(heads, heads, self.head_dim))
        found.append(Product("output", self.hidden, width, quantised=self.output_quantised))
        found.append(Product("output", self.hidden, self.hidden))
        return *found, *self._mamba.operations(cut, kv_bytes)

    def width(self, cut: Cut = WHOLE) -> int:
        """What attention reads, queries, keys and values, or what Mamba2 keeps alive."""
        return max(2 * self.hidden + 4 * self._width(cut), self._mamba.width(cut))

    @property
    def query_heads(self) -> int:
        """Heads of attention."""
        return self.heads

    @property
    def kv_heads(self) -> int:
        """As many."""
        return self.heads

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Heads of attention, and what Mamba2 is cut into."""
        return Piece("query heads", self.heads, ("tp",)), *self._mamba.pieces

    @property
    def launches(self) -> tuple[int, int]:
        """Join, norm, QKV, rotary, cache write, attention, output, map; adapters; those of Mamba2."""
        own = 7 + self.rotary + 2 * (self.adapter > 0)
        captured, launched = self._mamba.launches
        return own + captured, own + launched

    @property
    def reduced_bytes(self) -> float:
        """The output of attention, whose shards are added up besides those of Mamba2."""
        return 2.0 * self.hidden

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns."""
        return self.head_dim if self.rotary else 0

    @property
    def kind(self) -> str:
        """What it is, and whether its weights lie elsewhere."""
        return f"{'shared ' if self.again else ''}attention before Mamba2"


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFfn(DenseFfn):
    """A gated FFN whose weights some layers share, with adapters of the layer's own.

    Parameters
    ----------
    adapter : int   width of what adapts the first projection to the layer; 0: nothing does
    again : bool    the shared weights lie in an earlier layer
    """

    adapter: int = 0
    again: bool = False

    def __post_init__(self) -> None:
        DenseFfn.__post_init__(self)
        check_counts("shared FFN", minimum=0, adapter=self.adapter)
        check_flags("shared FFN", again=self.again)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """What is shared, in the first layer that has it, and the adapters."""
        found = _once(DenseFfn.matrices(self, cut), self.again)
        if not self.adapter:
            return found
        columns = ceil_div(self.intermediate, cut.columns)
        out = Matrix("adapter out", columns, self.adapter, 0, "columns", times=1 + self.gated)
        return *found, Matrix("adapter", self.adapter, self.hidden, 0), out

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Product | Elementwise, ...]:
        """With the products of the adapter before the activation."""
        first, up, *rest = DenseFfn.operations(self, cut, kv_bytes)
        assert isinstance(up, Product)
        adapter = (Product("gates", self.adapter, self.hidden), Product("gates", up.n, self.adapter))
        return first, up, *(adapter if self.adapter else ()), *rest

    @property
    def kind(self) -> str:
        """A dense FFN, and whether its weights lie elsewhere."""
        return "shared dense FFN" if self.again else "dense FFN"
