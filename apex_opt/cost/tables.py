"""Tables that the work of a batch is entered into, and the batches that an operation grows with.

Where attention has several copies (dp > 1), a sequence belongs to one of them: decoding sequences spread evenly, a
prompt is computed by its own copy while the others wait unless they have prompts too. The law therefore counts the
linear work of prompts by chunk and divides the sum by the copies that can be busy. An FFN copy that serves one
attention copy goes with it; one that serves several may get all prompts of a batch, and is taken to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from apex_opt.cost.work import Work
from apex_opt.simulator.law import Window

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.cost.work import Floats

Ints = NDArray[np.int64]
Parts = dict[tuple[str, str], Work]
"""Work per (operation, table); tables are the fields of `simulator.law.BatchLaw`."""


HIDDEN: Final = "hidden"
"""In place of an operation, the time of sending that computing hides; it is below zero."""
OF_CHUNKS: Final = ("chunk_ns", "pair_rate", "chunk_context_rate")
"""Tables of prompts, by their chunks."""


class Place(Protocol):
    """Enters an operation into the tables by which batches it grows with: see `owned` and `crowded`."""

    def __call__(self, *, operation: str, work: Work) -> Parts: ...


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Entries the tables are made for: every number of tokens and of sequences a batch can have.

    `padded[n]` is how many a batch of `n` decoding sequences is computed as, once padded to a captured graph. Where
    so many `drafts` may follow a token, `verified[t]` is that of a batch of `t` tokens of them. Where prompts lie
    `apart`, in an encoder, the decoder computes one token of each sequence.
    """

    tokens: Ints
    sequences: Ints
    padded: Ints
    drafts: int = 0
    verified: Ints | None = None
    apart: bool = False

    @property
    def alone(self) -> tuple[str, Ints]:
        """The table of batches of decoding sequences alone that grows with their tokens, and how these are computed."""
        return ("decode_ns", self.padded) if self.verified is None else ("verify_ns", self.verified)


def owned(tables: Tables, operation: str, copies: int, split: int, work: Work) -> Parts:
    """An operation on the copy that owns a sequence, `split` groups of devices sharing the tokens of one copy.

    Sequences that decode beside prompts are counted apart, at the rate of a full batch: the weights are read already.

    Parameters
    ----------
    work : by tokens of one group
    """
    table, alone = tables.alone
    spread = work.at(shares(alone, copies * split))
    if tables.apart:
        return {
            (operation, "sequence_ns"): work.at(shares(tables.sequences, copies * split)),
            (operation, table): spread,
        }
    shared = work if split == 1 else work.at(shares(tables.tokens, split))
    if copies == 1:
        return {(operation, "mixed_ns"): shared, (operation, table): spread}
    rows = shares(tables.sequences, copies * split).astype(np.float64)
    beside = work.at(tables.tokens[-1:]) * (rows / tables.tokens[-1])
    return {(operation, "chunk_ns"): shared, (operation, "decode_ns"): spread, (operation, "attend_ns"): beside}


def crowded(tables: Tables, operation: str, copies: int, work: Work) -> Parts:
    """An operation on copies that serve several attention copies each: one of them may get every prompt of a batch.

    Arithmetic and traffic are those of an even share, which is what all copies together do.

    Parameters
    ----------
    tables : Tables    what the tables of the law are over
    operation : str    whose work it is
    copies : int       of the FFN
    work : Work        of one that gets all tokens
    """
    even = work.at(shares(tables.tokens, copies))
    return {
        (operation, "mixed_ns"): replace(even, seconds=work.seconds),
        (operation, "decode_ns"): work.at(shares(tables.padded, copies)),
    }


def sharing(tables: Tables, attention_dp: int, ffn_dp: int) -> Place:
    """How the copies of the FFN share the tokens of the attention copies.

    Parameters
    ----------
    tables : Tables       what the tables of the law are over
    attention_dp : int    copies of attention
    ffn_dp : int          copies of the FFN
    """
    if ffn_dp % attention_dp == 0:
        return partial(owned, tables, copies=attention_dp, split=ffn_dp // attention_dp)
    if ffn_dp > 1 and attention_dp % ffn_dp == 0:
        return partial(crowded, tables, copies=ffn_dp)
    return partial(owned, tables, copies=1, split=ffn_dp)  # every device gets all tokens first: see `reshards`


def evenly(operation: str, work: Work) -> Parts:
    """An operation on the tokens of all ranks, whose tables go by the mean tokens of a rank."""
    return {(operation, "together mixed"): work, (operation, "together decode"): work}


def nowhere(operation: str, work: Work) -> Parts:
    """An operation that another part of the costs counts."""
    return {}


def merged(*parts: Parts) -> Parts:
    """Sum of several mappings."""
    total: Parts = {}
    for part in parts:
        for key, work in part.items():
            total[key] = total[key] + work if key in total else work
    return total


def by_table(parts: Parts) -> dict[str, Work]:
    """Sum over operations."""
    found: dict[str, Work] = {}
    for (_, table), work in parts.items():
        found[table] = found[table] + work if table in found else work
    return found


def times(parts: Parts, count: int) -> Parts:
    """Parts of `count` identical layers."""
    return {key: work * count for key, work in parts.items()}


def seen(table: str, window: Window | None) -> str:
    """The table of what queries see through a window, for one of all their context.

    `context_rate` and `pair_rate` are those of queries that see all; of those that see less `seen_rate` and
    `seen_pair_rate` are, which a law has for each of its windows.
    """
    return table if window is None else f"seen_{table.removeprefix('context_')}/{window.stamp}"


def window_of(table: str) -> Window | None:
    """The window that `seen` put into the name of a table, if any."""
    _, found, stamp = table.partition("/")
    return Window.of(int(stamp)) if found else None


def windows_in(tables: Iterable[str]) -> tuple[Window, ...]:
    """Windows in the names of tables, in order."""
    return tuple(sorted({window for table in tables for window in [window_of(table)] if window is not None}))


def rising(seconds: Floats) -> Floats:
    """Times none of which is above that of a larger size, as the engine could pad: tables are not monotone."""
    return np.minimum.accumulate(seconds[::-1])[::-1]


def shares(values: Ints, parts: int) -> Ints:
    """The largest of so many parts that values are dealt to."""
    return -(-values // parts)
