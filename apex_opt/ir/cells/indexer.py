"""What chooses the tokens that attention sees, where it does not see them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.errors import InputError
from apex_opt.ir.cells.base import Kept, Matrix
from apex_opt.ir.cells.operations import Elementwise, Product, Score
from apex_opt.ir.checks import check_counts, check_flags
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir.cells.base import Cut
    from apex_opt.ir.cells.operations import Op

_NAME = "indexer"  # what all its times are shown under


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """Small heads that score all of the context with keys of their own, of which the highest are attended to.

    A part of an attention cell. Its keys are kept apart from those of attention, in a format of their own, whole on
    every shard.
    Source: DeepSeek-AI, "DeepSeek-V3.2", 2025, section 2.1; vLLM, `models/deepseek_v2.py` and `models/minimax_m3`.

    Parameters
    ----------
    hidden : int            width of the residual stream
    inputs : int            elements that queries are projected from: `hidden`, or the rank they are compressed to
    heads, width : int      heads of queries, and elements of each and of the one key that they share
    topk : int              tokens, or entries that stand for several, attended to
    entry_bytes : int       of a key in its cache, scales included, whatever the format of attention's
    key_rows : int or None  outputs of the projection to keys; None is `width`
    small : int             weights of norms and the like
    weighted : bool         every token says by how much each head counts, so that all choose the same
    by_heads : bool         its query heads are cut and copied along with attention's KV heads
    keys_covered : bool     a number format may quantise the projection to keys
    ratio : int             tokens of the context that one entry stands for
    """

    hidden: int
    inputs: int
    heads: int
    width: int
    topk: int
    entry_bytes: int
    key_rows: int | None = None
    small: int = 0
    weighted: bool = True
    by_heads: bool = False
    keys_covered: bool = True
    ratio: int = 1

    def __post_init__(self) -> None:
        check_counts(
            "indexer",
            hidden=self.hidden,
            inputs=self.inputs,
            heads=self.heads,
            width=self.width,
            topk=self.topk,
            entry_bytes=self.entry_bytes,
            key_rows=1 if self.key_rows is None else self.key_rows,
            ratio=self.ratio,
        )
        check_counts("indexer", minimum=0, small=self.small)
        check_flags("indexer", weighted=self.weighted, by_heads=self.by_heads, keys_covered=self.keys_covered)
        if self.weighted and self.by_heads:
            raise InputError("indexer: heads that are weighted against each other cannot be cut; use one of the two")

    def _sizes(self, cut: Cut) -> tuple[int, int]:
        """Query heads of one shard, at least one, and outputs of the projection to keys."""
        heads = ceil_div(self.heads, cut.heads) if self.by_heads else self.heads
        return heads, self.key_rows or self.width

    def matrices(self, cut: Cut, quantised: int) -> tuple[Matrix, ...]:
        """Weights of one shard, projections in the format that `quantised` numbers."""
        heads, keys = self._sizes(cut)
        found = [
            Matrix("index queries", heads * self.width, self.inputs, quantised, "heads" if self.by_heads else ""),
            Matrix("index keys", keys, self.hidden, quantised if self.keys_covered else 0),
        ]
        if self.weighted:
            found.append(Matrix("index weights", self.heads, self.hidden, 0))
        if self.small:
            found.append(Matrix("index norms", self.small, 1))
        return tuple(found)

    def cache(self) -> Kept:
        """Its keys."""
        return Kept(0, None, other_bytes=self.entry_bytes, ratio=self.ratio)

    def operations(self, cut: Cut, quantised: int) -> tuple[Op, ...]:
        """Projections, what prepares and keeps the keys, scores and the choice."""
        heads, keys = self._sizes(cut)
        found: list[Op] = [
            Product(_NAME, heads * self.width, self.inputs, quantised=quantised),
            Product(_NAME, keys, self.hidden, quantised=quantised if self.keys_covered else 0),
        ]
        if self.weighted:
            found.append(Product(_NAME, self.heads, self.hidden))
        prepared = 4.0 * (heads * self.width + keys) + self.entry_bytes / self.ratio
        return *found, Elementwise(_NAME, prepared), Score(heads, self.width, self.topk, self.entry_bytes, self.ratio)

    def elements(self, cut: Cut) -> int:
        """Elements per token that are alive at once inside one shard."""
        heads, keys = self._sizes(cut)
        return heads * self.width + keys

    @property
    def launches(self) -> int:
        """Projections, norm and rotary embedding of queries and of keys, cache write, scores, choice."""
        return 7 + self.weighted


def forms_with(forms: Mapping[str, str], indexer: Indexer | None) -> Mapping[str, str]:
    """The `FORMS` of a cell with this indexer: without that of its projections where there is none."""
    return forms if indexer is not None else {field: part for field, part in forms.items() if part != "index"}
