"""What a cell lists of itself: its matrices, its cache, its kernels, and the pieces it can be cut into.

A cell is all there is to know of one kind of attention or FFN. What parameters it has, what a shard holds, how much
memory a token takes, what divides and what is computed follows from its lists, for the oracle and for the programs.

All counts are exact integers. "Covered" matrices are those that a number format may quantise; all others (norms,
biases, router, and covered ones that the checkpoint leaves out) stay 16 bit. The `quantised` of a matrix tells which of
the formats of the checkpoint it is in, counted from 1, or 0 where the checkpoint leaves it out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from apex_opt.ir.formats import get_format
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from dataclasses import Field

    from apex_opt.ir.cells.operations import Linear, Op, Product


class Cut(NamedTuple):
    """Into how many shards the pieces of a cell are dealt out.

    Parameters
    ----------
    heads : int             shards of attention: query heads with their KV heads, which are copied where they are fewer
    columns : int           shards of a dense FFN, or of the one shared beside experts: columns between its projections
    experts : int           groups of routed experts
    expert_columns : int    shards of every expert
    multiples : (int, int)  what width and columns of a shard of an expert are rounded up to multiples of, as stored
    gate_room : bool        experts without a gate are stored with room for one
    """

    heads: int = 1
    columns: int = 1
    experts: int = 1
    expert_columns: int = 1
    multiples: tuple[int, int] = (1, 1)
    gate_room: bool = False


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
    """What one token keeps in the KV cache of one shard, as long as it is seen.

    Parameters
    ----------
    elements : int          in the format of the cache
    window : int or None    tokens that a query sees, itself included; None where it sees all
    chunked : bool          it sees its own chunk of `window` tokens, not the last ones
    other_bytes : int       kept besides, whatever the format of the cache
    narrow_bytes : int      kept besides where an element takes one byte: scales, and what stays in 16 bit
    ratio : int             tokens that one entry of all this stands for
    fixed_tokens : int      so many tokens are kept of every sequence, from its first one on, in place of its own; 0:
                            its own
    """

    elements: int
    window: int | None
    chunked: bool = False
    other_bytes: int = 0
    narrow_bytes: int = 0
    ratio: int = 1
    fixed_tokens: int = 0

    def entry_bytes(self, kv_bytes: int) -> int:
        """Bytes of one entry, in a cache of so many bytes per element."""
        return self.elements * kv_bytes + self.other_bytes + (self.narrow_bytes if kv_bytes == 1 else 0)

    def token_bytes(self, kv_bytes: int) -> int:
        """Bytes of one token, in a cache of so many bytes per element: its share of an entry, rounded up."""
        return ceil_div(self.entry_bytes(kv_bytes), self.ratio)

    def sequence_bytes(self, drafts: int = 0) -> int:
        """Bytes of one sequence whatever its length: none."""
        return 0


class State(NamedTuple):
    """What one sequence keeps in one shard, whatever its length.

    Parameters
    ----------
    size : int          bytes
    draft_size : int    more of them for every token that is drafted at once
    """

    size: int
    draft_size: int = 0

    @property
    def fixed_tokens(self) -> int:
        """Tokens kept of every sequence: none."""
        return 0

    def token_bytes(self, kv_bytes: int) -> int:
        """Bytes of one token: none."""
        return 0

    def sequence_bytes(self, drafts: int = 0) -> int:
        """Bytes of one sequence of which so many tokens are drafted at once."""
        return self.size + drafts * self.draft_size


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
    """The lists of a cell; `hidden` is the width of the residual stream."""

    __slots__ = ()

    if TYPE_CHECKING:
        # Every kind is a dataclass.
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

        @property
        def hidden(self) -> int: ...

    FORMS: ClassVar[Mapping[str, str]]
    """Fields that hold the `quantised` of matrices, and what those matrices are called in a family's modules."""

    skipped: ClassVar[bool] = False
    """Whether a layer does without the cell, which then lists nothing."""

    @property
    def forms(self) -> Mapping[str, str]:
        """Those of `FORMS` whose matrices this cell has."""
        return self.FORMS

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
    def called_together(self) -> int:
        """Kernels launched one by one of which an engine with one call for all experts launches but one."""
        return 0

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept | State, ...]:
        """What is kept of tokens and sequences in one shard: nothing, where a kind does not say otherwise."""
        return ()

    @property
    @abstractmethod
    def kind(self) -> str:
        """What kind of cell it is, in a word or two, with what tells it from others of a model."""

    @property
    def parameters(self) -> int:
        """All weights of the cell."""
        return sum(matrix.weights for matrix in self.matrices())

    @property
    def active_parameters(self) -> int:
        """Weights one token passes through."""
        return sum(matrix.used_weights for matrix in self.matrices())


class AttentionCell(Cell):
    """What stands in attention's place: it mixes tokens, and keeps something of them.

    `query_heads` and `kv_heads` are those that its shards divide; 0 where it has none.
    """

    __slots__ = ()

    if TYPE_CHECKING:
        # Fields of some kinds, properties of others; as properties of this class they would be defaults of the fields.
        @property
        def query_heads(self) -> int: ...
        @property
        def kv_heads(self) -> int: ...

    @property
    def window(self) -> int | None:
        """Tokens of context a query sees: the whole context."""
        return None

    def source_operations(self, cut: Cut) -> tuple[Product, ...]:
        """Kernels over the tokens of an encoder, once for a request: none."""
        return ()

    @property
    def reduced_bytes(self) -> float:
        """Bytes per token that the shards of a copy add up before attention: none."""
        return 0.0

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rotary embedding turns: none."""
        return 0

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of: nothing."""
        return frozenset()

    def with_window(self, window: int | None) -> Self:
        """The cell with another window, which changes neither weights nor shards; itself where it has none."""
        return self


class Headless(AttentionCell):
    """What stands in attention's place and has no heads that shards would divide."""

    __slots__ = ()

    @property
    def query_heads(self) -> int:
        """None."""
        return 0

    @property
    def kv_heads(self) -> int:
        """None."""
        return 0


class Ffn(Cell):
    """What stands in an FFN's place: it takes each token alone.

    `experts` are those of which a router chooses `experts_per_token`, both 0 without, and work in `expert_hidden`;
    `dense` is what every token passes through besides, if anything; `quantised` is the number format of its widest
    matrices.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def experts(self) -> int: ...
        @property
        def experts_per_token(self) -> int: ...
        @property
        def expert_hidden(self) -> int: ...
        @property
        def quantised(self) -> int: ...
        @property
        def dense(self) -> Ffn | None: ...

    @property
    @abstractmethod
    def token_columns(self) -> int:
        """Columns between its projections that one token passes through."""

    def routed(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard beside the dense part: none."""
        return ()

    @abstractmethod
    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Linear, ...]:
        """Kernels of one shard in order, collectives left out: all by the tokens of a batch alone."""


class Unrouted(Ffn):
    """What stands in an FFN's place and has no experts to choose from."""

    __slots__ = ()

    @property
    def experts(self) -> int:
        """Routed experts: none."""
        return 0

    @property
    def experts_per_token(self) -> int:
        """Routed experts that see one token: none."""
        return 0


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
