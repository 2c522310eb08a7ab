"""Short convolutions behind gates, in place of attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apex_opt.ir.cells.base import WHOLE, Cut, Headless, Matrix, Piece, State
from apex_opt.ir.cells.operations import Convolve, Elementwise, Op, Product, norm
from apex_opt.ir.checks import check_counts, check_flags
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class ShortConvolution(Headless):
    """A convolution over the last tokens between two gates, as in LFM2.

    Source: tensor shapes as in `transformers`, cut and kept as in vLLM, whose `ShortConv` is told of no number format:
    its projections stay in 16 bit (SGLang 0.5.23 quantises them).

    Parameters
    ----------
    hidden : int            width of the residual stream, and channels
    kernel : int            tokens that the convolution sees
    bias : bool             a bias on the projections and on the convolution
    """

    FORMS: ClassVar[Mapping[str, str]] = {}

    hidden: int
    kernel: int
    bias: bool = False

    def __post_init__(self) -> None:
        check_counts("short convolution", hidden=self.hidden, kernel=self.kernel)
        check_flags("short convolution", bias=self.bias)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: those of its channels."""
        channels = ceil_div(self.hidden, cut.heads)
        found = [
            Matrix("input and gates", channels, self.hidden, 0, "heads", times=3),
            Matrix("convolution", channels, self.kernel + self.bias, cut="heads"),
            Matrix("output", self.hidden, channels, 0, "heads", inputs=True),
        ]
        if self.bias:
            found.append(Matrix("input bias", 3 * channels, 1, cut="heads"))
            found.append(Matrix("output bias", self.hidden, 1))
        return tuple(found)

    def cache(self, cut: Cut = WHOLE) -> tuple[State, ...]:
        """The last inputs of the convolution in 16 bit."""
        return (State(2 * (self.kernel - 1) * ceil_div(self.hidden, cut.heads)),)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Norm, projection, gate, convolution, gate, output projection."""
        channels = ceil_div(self.hidden, cut.heads)
        gate = Elementwise("gate", 6.0 * channels)
        return (
            norm(self.hidden),
            Product("qkv", 3 * channels, self.hidden),
            gate,
            Convolve(channels, self.kernel),
            gate,
            Product("output", self.hidden, channels),
        )

    def width(self, cut: Cut = WHOLE) -> int:
        """Input, gates, what is gated and what is convolved."""
        return 5 * ceil_div(self.hidden, cut.heads)

    @property
    def kind(self) -> str:
        """A short convolution."""
        return "short convolution"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Channels."""
        return (Piece("channels of the convolution", self.hidden, ("tp",)),)

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, projection, gate, convolution, gate, output."""
        return 6, 6
