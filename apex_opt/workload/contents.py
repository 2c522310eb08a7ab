"""What the prompts of a file say, as content ids: from `hash_ids`, as far as they fit the lengths of the prompts."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.workload.cells import cell_text, digits, is_blank
from apex_opt.workload.trace import Trace, gathered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.workload.columns import Ints

COLUMN: Final = "hash_ids"

_MOST_ID: Final = 1 << 62


@dataclass(slots=True, kw_only=True)
class Contents:
    """Content ids of the requests of a file, some at a time.

    Where they cannot be used the lengths still can, so a fault is kept for those who need the ids.

    Parameters
    ----------
    label : str       what messages call the file
    block : int       prompt tokens that an id stands for; 0 where nothing tells
    fault : str       why they cannot be used; "" where they can, or where there are none
    """

    label: str
    block: int
    fault: str = ""
    _ids: list[Ints] = field(default_factory=list)
    _counts: list[Ints] = field(default_factory=list)
    _lacking: bool = False

    def add(self, cells: Sequence[object], places: Sequence[str], prompt: Ints) -> None:
        """Ids of some more requests, where they stand in the file, and the tokens of their prompts.

        Parameters
        ----------
        cells : sequence of object    of the column that says what prompts contain
        places : sequence of str      of the rows, for messages
        prompt : Ints                 tokens of each prompt
        """
        if self.fault or not len(prompt):
            return
        lists: list[Any] = [_listed(cell) for cell in cells]
        lacking, having = not all(lists), any(lists)
        if (lacking and (having or self._ids)) or (having and self._lacking):
            self.fault = (
                f"{self.label}: some requests have {COLUMN} and others have none; {_WAY_OUT.format('them to all')}"
            )
        self._lacking = self._lacking or lacking
        if self._lacking:
            return
        if not self.block:
            self.fault = f"{self.label}: nothing tells how many tokens an id of {COLUMN} stands for; {_SIZE}"
            return
        counts = -(-prompt // self.block)
        fit = all(isinstance(ids, list) and len(ids) == due for ids, due in zip(lists, counts.tolist(), strict=True))
        # All at once, as there are many more ids than rows.
        found = digits(list(itertools.chain.from_iterable(lists))) if fit else None
        if found is None:
            rows = zip(places, lists, prompt.tolist(), strict=True)
            faults = ((place, self._fault_of(ids, tokens)) for place, ids, tokens in rows)
            wrong = next(((place, fault) for place, fault in faults if fault), None)
            if wrong is not None:
                self.fault = f"{self.label}: {wrong[0]}: {COLUMN} {wrong[1]}; {_SIZE}"
                return
            found = np.fromiter(map(int, itertools.chain.from_iterable(lists)), np.int64)
        self._ids.append(found)
        self._counts.append(counts)

    def told(self, trace: Trace, order: Ints) -> Trace:
        """The trace with what its prompts say; `order` has the places of its requests among those added."""
        if self.fault:
            return replace(trace, content_fault=self.fault)
        if not self._ids:
            return trace
        starts = np.concatenate(([0], np.cumsum(np.concatenate(self._counts))))
        ids, starts = gathered(np.concatenate(self._ids), starts, order)
        return replace(trace, content=ids, content_starts=starts, content_tokens=self.block)

    def _fault_of(self, ids: object, tokens: int) -> str:
        """What is wrong with the ids of a prompt; "" where nothing is."""
        due = -(-tokens // self.block)
        if not isinstance(ids, list):
            return "must be a list"
        if len(ids) != due:
            return f"are {len(ids)} for a prompt of {tokens} tokens, at {self.block} an id {due} are due"
        wrong = [item for item in ids if not _is_id(item)]
        return f"must be whole numbers from 0 to 2**62, got {cell_text(wrong[0])}" if wrong else ""


_WAY_OUT: Final = "give {}, or leave prefix caching off"
_SIZE: Final = _WAY_OUT.format("the tokens of an id as --trace_block")


def _listed(cell: object) -> object:
    """Ids as a list, from a cell of CSV too."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell, parse_int=str, parse_float=str, parse_constant=str)
        except (ValueError, RecursionError):
            return cell
    return None if is_blank(cell) else cell


def _is_id(item: object) -> bool:
    if not isinstance(item, str) or len(item) > 19 or not item.isdecimal() or not item.isascii():
        return False
    return len(item) < 19 or int(item) < _MOST_ID
