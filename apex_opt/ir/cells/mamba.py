"""State-space layers: Mamba2, whose heads share a decay, and Mamba1, whose channels each have their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import WHOLE, AttentionCell, Cut, Headless, Matrix, Piece, State
from apex_opt.ir.cells.operations import Convolve, Elementwise, Op, Product, Recur, norm
from apex_opt.ir.checks import check_counts, check_flags, check_forms
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba2(AttentionCell):
    """Mamba2: one projection to input, gate, B, C and time step; a short convolution; a state per head.

    Source: Dao and Gu, "Transformers are SSMs", 2024; tensor shapes as in `transformers`, cut and kept as in vLLM,
    whose shards copy the only group of B and C.

    Parameters
    ----------
    hidden : int            width of the residual stream
    heads, head_dim : int   heads of the input, and elements of one
    groups : int            of heads that share B and C
    state : int             elements of B and of C in a group
    kernel : int            tokens that the convolution sees
    chunk : int             tokens of a prompt that are computed at once
    bias, conv_bias : bool  a bias on both projections; on the convolution
    gated_norm : bool       a norm of what the gate lets through; else the gate alone, as in most of Falcon-H1
    state_bytes : int       of an element of the state; the convolution's is 16 bit
    quantised : int         number format of the first projection
    output_quantised : int  that of the output projection
    """

    FORMS: ClassVar[Mapping[str, str]] = {"quantised": "state in", "output_quantised": "state out"}

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    chunk: int = 256
    bias: bool = False
    conv_bias: bool = True
    gated_norm: bool = True
    state_bytes: int = 2
    quantised: int = 1
    output_quantised: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "Mamba2",
            hidden=self.hidden,
            heads=self.heads,
            head_dim=self.head_dim,
            groups=self.groups,
            state=self.state,
            kernel=self.kernel,
            chunk=self.chunk,
            state_bytes=self.state_bytes,
        )
        check_flags("Mamba2", bias=self.bias, conv_bias=self.conv_bias, gated_norm=self.gated_norm)
        check_forms("Mamba2", quantised=self.quantised, output_quantised=self.output_quantised)
        if self.heads % self.groups:
            raise InputError(f"Mamba2: heads {self.heads} is not a multiple of groups {self.groups}")

    def _widths(self, cut: Cut) -> tuple[int, int, int, int]:
        """Heads of one shard, its groups, elements of its input and channels of its convolution."""
        heads, groups = ceil_div(self.heads, cut.heads), ceil_div(self.groups, cut.heads)
        inner = heads * self.head_dim
        return heads, groups, inner, inner + 2 * groups * self.state

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: those of its heads, and at least one group."""
        heads, _, inner, channels = self._widths(cut)
        found = [
            Matrix("input", inner + channels + heads, self.hidden, self.quantised, "heads"),
            Matrix("convolution", channels, self.kernel + self.conv_bias, cut="heads"),
            Matrix("decay, skip and time step", 3 * heads, 1, cut="heads"),
            Matrix("output", self.hidden, inner, self.output_quantised, "heads", inputs=True),
        ]
        if self.gated_norm:
            found.append(Matrix("gated norm", inner, 1, cut="heads"))
        if self.bias:
            found.append(Matrix("input bias", inner + channels + heads, 1, cut="heads"))
            found.append(Matrix("output bias", self.hidden, 1))
        return tuple(found)

    def cache(self, cut: Cut = WHOLE) -> tuple[State, ...]:
        """The last inputs of the convolution, and a matrix per head."""
        heads, _, _, channels = self._widths(cut)
        row = 2 * channels
        return (State((self.kernel - 1) * row + heads * self.head_dim * self.state * self.state_bytes, row),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projection, convolution, recurrence, gated norm, output projection."""
        heads, groups, inner, channels = self._widths(cut)
        return (
            norm(self.hidden),
            Product("qkv", inner + channels + heads, self.hidden, quantised=self.quantised),
            Convolve(channels, self.kernel),
            Recur("mamba2", heads, self.state, self.head_dim, groups, self.state_bytes, self.chunk),
            Elementwise("norm", 6.0 * inner, "norm", inner) if self.gated_norm else Elementwise("gate", 6.0 * inner),
            Product("output", self.hidden, inner, quantised=self.output_quantised),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """What the projection and the convolution give, and the output."""
        heads, _, inner, channels = self._widths(cut)
        return 2 * inner + 2 * channels + heads

    @property
    def query_heads(self) -> int:
        """Heads, each with a state."""
        return self.heads

    @property
    def kv_heads(self) -> int:
        """Groups of B and C."""
        return self.groups

    @property
    def kind(self) -> str:
        """Mamba2."""
        return "Mamba2"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Heads, and groups, of which only a single one is copied."""
        groups = Piece("groups of SSM heads", self.groups, ("tp",), copied=self.groups == 1)
        return Piece("SSM heads", self.heads, ("tp",)), groups

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, projection, convolution, recurrence, norm, output; outside graphs the five kernels of chunks."""
        return 7, 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba1(Headless):
    """Mamba: every channel has a state and a decay of its own, B, C and the time step come from the convolved input.

    Source: Gu and Dao, "Mamba", 2023; tensor shapes as in `transformers`, cut and kept as in vLLM, whose `MambaMixer`
    is told of no number format: its projections stay in 16 bit.

    Parameters
    ----------
    hidden : int            width of the residual stream
    inner : int             channels
    state : int             elements of the state of a channel
    rank : int              elements that time steps are compressed to
    kernel : int            tokens that the convolution sees
    bias, conv_bias : bool  a bias on the first and last projection; on the convolution
    norms : bool            norms of time step, B and C, as in Jamba
    state_bytes : int       of an element of the state; the convolution's is 16 bit
    """

    FORMS: ClassVar[Mapping[str, str]] = {}

    hidden: int
    inner: int
    state: int
    rank: int
    kernel: int
    bias: bool = False
    conv_bias: bool = True
    norms: bool = False
    state_bytes: int = 2

    def __post_init__(self) -> None:
        check_counts(
            "Mamba",
            hidden=self.hidden,
            inner=self.inner,
            state=self.state,
            rank=self.rank,
            kernel=self.kernel,
            state_bytes=self.state_bytes,
        )
        check_flags("Mamba", bias=self.bias, conv_bias=self.conv_bias, norms=self.norms)

    @property
    def _small(self) -> int:
        """Elements of time step, B and C."""
        return self.rank + 2 * self.state

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: those of its channels, norms whole."""
        inner = ceil_div(self.inner, cut.heads)
        found = [
            Matrix("input and gate", inner, self.hidden, 0, "heads", times=2),
            Matrix("convolution", inner, self.kernel + self.conv_bias, cut="heads"),
            # Engines hold these two in 16 bit whatever the rest is in.
            Matrix("time step, B and C", self._small, inner, 0, "heads", inputs=True),
            Matrix("time steps", inner, self.rank, 0, "heads"),
            Matrix("time step bias, decay and skip", inner, 2 + self.state, cut="heads"),
            Matrix("output", self.hidden, inner, 0, "heads", inputs=True),
        ]
        if self.norms:
            found.append(Matrix("norms", self._small, 1))
        if self.bias:
            found.append(Matrix("input bias", 2 * inner, 1, cut="heads"))
            found.append(Matrix("output bias", self.hidden, 1))
        return tuple(found)

    def cache(self, cut: Cut = WHOLE) -> tuple[State, ...]:
        """The last inputs of the convolution, and the states of the channels."""
        inner = ceil_div(self.inner, cut.heads)
        return (State(inner * (2 * (self.kernel - 1) + self.state * self.state_bytes)),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projection, convolution, time step, B and C, recurrence, output projection."""
        inner = ceil_div(self.inner, cut.heads)
        norms = [Elementwise("norm", 4.0 * self._small, "norm", self._small)] if self.norms else []
        return (
            norm(self.hidden),
            Product("qkv", 2 * inner, self.hidden),
            Convolve(inner, self.kernel),
            Product("gates", self._small, inner),
            *norms,
            Product("gates", inner, self.rank),
            Recur("mamba1", inner, self.state, 1, 1, self.state_bytes),
            Product("output", self.hidden, inner),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """Input and gate, the convolved input, time steps and output."""
        return 5 * ceil_div(self.inner, cut.heads) + self._small

    @property
    def kind(self) -> str:
        """Mamba."""
        return "Mamba"

    @property
    def reduced_bytes(self) -> float:
        """Time step, B and C, which every shard makes of its channels."""
        return 2.0 * self._small

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Channels."""
        return (Piece("SSM channels", self.inner, ("tp",)),)

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, projections, convolution, scan, output; norms."""
        return 7 + 3 * self.norms, 7 + 3 * self.norms
