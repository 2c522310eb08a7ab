"""What a cell lists of itself: its matrices, its cache, its kernels, and the pieces it can be cut into.

A cell is all there is to know of one kind of attention or FFN. What parameters it has, what a shard holds, how much
memory a token takes, what divides and what is computed follows from its lists, for the oracle and for the programs.

All counts are exact integers. "Covered" matrices are those that a number format may quantise; all others (norms,
biases, router, and covered ones that the checkpoint leaves out) stay 16 bit. The `quantised` of a matrix tells which of
the formats of the checkpoint it is in, counted from 1, or 0 where the checkpoint leaves it out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from apex_opt.ir.formats import get_format

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from apex_opt.ir.cells.operations import Op


class Cut(NamedTuple):
    """Into how many shards the pieces of a cell are dealt out.

    Parameters
    ----------
    heads : int             shards of attention: query heads with their KV heads, which are copied where they are fewer
    columns : int           shards of a dense FFN, or of the one shared beside experts: columns between its projections
    experts : int           groups of routed experts
    expert_columns : int    shards of every expert
    multiples : (int, int)  what width and columns of a shard of an expert are rounded up to multiples of, as stored
    """

    heads: int = 1
    columns: int = 1
    experts: int = 1
    expert_columns: int = 1
    multiples: tuple[int, int] = (1, 1)


WHOLE = Cut()
"""One shard, which is the cell."""


class Matrix(NamedTuple):
    """Equal matrices of one shard, or vectors, which have one column.

    Parameters
    ----------
    name : str
    rows, columns : int         outputs and inputs of each
    quantised : int or None     format in the checkpoint, 0 for 16 bit; None where no format covers it
    cut : str                   field of `Cut` that says over how many shards it is cut; "" where each holds it whole
    inputs : bool               its inputs are cut, not its outputs: shards leave sums that have to be added up
    times : int                 how many there are
    used : int or None          through how many of them a token passes; None is all
    """

    name: str
    rows: int
    columns: int
    quantised: int | None = None
    cut: Literal["heads", "columns", "expert_columns", ""] = ""
    inputs: bool = False
    times: int = 1
    used: int | None = None

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.rows * self.columns * self.times

    @property
    def used_weights(self) -> int:
        """Weights of those that a token passes through."""
        return self.rows * self.columns * (self.times if self.used is None else self.used)


class Kept(NamedTuple):
    """What one token keeps in the KV cache of one shard: elements of the cache's format, as long as it is seen."""

    elements: int
    window: int | None


class Piece(NamedTuple):
    """What a cell is cut into.

    Parameters
    ----------
    name : str              in the plural, for people
    size : int              how many
    by : tuple of str       degrees of the template whose product is the number of shards
    copied : bool           more shards than pieces, a whole multiple of them, hold copies
    """

    name: str
    size: int
    by: tuple[Literal["tp", "ep"], ...]
    copied: bool = False


class Cell(ABC):
    """The lists of a cell."""

    __slots__ = ()

    FORMS: ClassVar[Mapping[str, str]]
    """Fields that hold the `quantised` of matrices, and what those matrices are called in a family's modules."""

    @abstractmethod
    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """All weights of one shard."""

    @abstractmethod
    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Kernels of one shard in order, collectives left out, over a cache of so many bytes per element."""

    @abstractmethod
    def width(self, cut: Cut = WHOLE) -> int:
        """Elements per token that are alive at once inside one shard."""

    @property
    @abstractmethod
    def pieces(self) -> tuple[Piece, ...]:
        """What the cell is cut into; shards are equal where all of these divide."""

    @property
    @abstractmethod
    def launches(self) -> tuple[int, int]:
        """Kernels in captured graphs and as launched one by one, roughly, as counted in vLLM's models."""

    @property
    def parameters(self) -> int:
        """All weights of the cell."""
        return sum(matrix.weights for matrix in self.matrices())

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through."""
        return sum(matrix.used_weights for matrix in self.matrices())


def stored_bytes(weight_format: str, matrices: Iterable[Matrix], *, used: bool = False) -> int:
    """Bytes of matrices in a weight format: those of one of its parts are rounded up together.

    Parameters
    ----------
    weight_format : str         name of a format
    matrices : of `Matrix`
    used : bool                 only what one token passes through of covered matrices
    """
    wanted, weights_in, kept = get_format(weight_format), dict[str, int](), 0
    for matrix in matrices:
        weights = matrix.used_weights if used else matrix.weights
        if matrix.quantised:
            name = wanted.part(matrix.quantised).name
            weights_in[name] = weights_in.get(name, 0) + weights
        elif not used or matrix.quantised is not None:
            kept += weights
    return 2 * kept + sum(get_format(name).weight_bytes(weights) for name, weights in weights_in.items())
