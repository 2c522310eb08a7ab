"""A cell that a layer does without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apex_opt.ir.cells.base import WHOLE, Cut, Headless, Matrix, Piece, Unrouted
from apex_opt.ir.checks import check_counts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.cells.operations import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Skipped(Headless, Unrouted):
    """Nothing, in the place of attention or of an FFN: no matrices, no kernels, nothing to cut.

    Parameters
    ----------
    hidden : int    width of the residual stream, which passes by
    """

    FORMS: ClassVar[Mapping[str, str]] = {}
    skipped: ClassVar[bool] = True

    hidden: int

    def __post_init__(self) -> None:
        check_counts("skipped cell", hidden=self.hidden)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """None."""
        return ()

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Linear, ...]:
        """None."""
        return ()

    def width(self, cut: Cut = WHOLE) -> int:
        """Nothing is alive."""
        return 0

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """None: any number of shards is equal."""
        return ()

    @property
    def kind(self) -> str:
        """Nothing."""
        return "none"

    @property
    def launches(self) -> tuple[int, int]:
        """None."""
        return 0, 0

    @property
    def token_columns(self) -> int:
        """None."""
        return 0

    @property
    def quantised(self) -> int:
        """No format."""
        return 0

    @property
    def dense(self) -> None:
        """Nothing."""
        return None
