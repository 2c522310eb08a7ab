"""What a batch takes at least, in figures that add up over the layers of a pipeline however it is split."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from apex_opt.cost.tables import seen, windows_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.cost.tables import Parts
    from apex_opt.cost.work import Floats
    from apex_opt.simulator.law import Window


SIZES: Final = np.unique(np.concatenate((np.arange(1.0, 33.0), np.geomspace(32, 4096, 52)))).astype(np.int64)
"""Sizes of batches, in tokens, between which tables are not told apart."""


def _nothing() -> Floats:
    return np.zeros(len(SIZES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Least:
    """Least entries of the tables of a batch law, in seconds, and of energy above the idle draw, in joules.

    A batch is of the same size on every stage, and the least of a sum is no less than the sum of the least: so sums of
    these hold for every split of the layers into stages.

    Parameters
    ----------
    decode, mixed, chunk, sequence, attend : float    of any batch with sequences, with a prompt, of any chunk
    decode_share, mixed_share, chunk_share : float    per sequence or token of the batch
    context, pair, again : float                      per token of context, query-key pair, or both of one chunk
    decode_joules, mixed_joules : float               per sequence or token of the batch, on one device
    verify, verify_share, verify_joules : float       of batches that verify drafts: of any, and per token
    draft, draft_context : float                      of making drafts in any batch, and per token of context
    seen : of each window, per token of context within it, and per query-key pair of a prompt
    decode_by, mixed_by : float64[sizes]    as `decode` and `mixed`, of batches of so many (`SIZES`) or more; infinite
                                            where there are none
    """

    decode: float = 0.0
    mixed: float = 0.0
    chunk: float = 0.0
    sequence: float = 0.0
    attend: float = 0.0
    decode_share: float = 0.0
    mixed_share: float = 0.0
    chunk_share: float = 0.0
    context: float = 0.0
    pair: float = 0.0
    again: float = 0.0
    decode_joules: float = 0.0
    mixed_joules: float = 0.0
    verify: float = 0.0
    verify_share: float = 0.0
    verify_joules: float = 0.0
    draft: float = 0.0
    draft_context: float = 0.0
    seen: tuple[tuple[Window, float, float], ...] = ()
    decode_by: Floats = field(default_factory=_nothing, compare=False)
    mixed_by: Floats = field(default_factory=_nothing, compare=False)

    @classmethod
    def of_every(cls, decode: float, mixed: float) -> Self:
        """Of what every batch takes, whatever its size."""
        every = np.ones(len(SIZES))
        return cls(decode=decode, mixed=mixed, decode_by=decode * every, mixed_by=mixed * every)

    @classmethod
    def of(cls, parts: Parts, seconds: Mapping[str, Floats]) -> Self:
        """Of operations and their seconds per table; batches of prompts take two tokens or more."""
        pair = seconds.get("pair_rate", _NONE)
        again = pair + seconds["chunk_context_rate"] if "chunk_context_rate" in seconds else pair
        joules = {
            table: sum((work.joules for (_, of), work in parts.items() if of == table), start=np.zeros(1))
            for table in ("decode_ns", "mixed_ns", "verify_ns")
        }
        return cls(
            decode=_least(seconds.get("decode_ns", _NONE), 1),
            mixed=_least(seconds.get("mixed_ns", _NONE), 2),
            chunk=_least(seconds.get("chunk_ns", _NONE), 2),
            sequence=_least(seconds.get("sequence_ns", _NONE), 1),
            attend=_least(seconds.get("attend_ns", _NONE), 0),
            decode_share=_share(seconds.get("decode_ns", _NONE), 1),
            mixed_share=_share(seconds.get("mixed_ns", _NONE), 2),
            chunk_share=_share(seconds.get("chunk_ns", _NONE), 2),
            context=_least(seconds.get("context_rate", _NONE), 1),
            pair=_least(pair, 2),
            again=_least(again, 2),
            decode_joules=_share(joules["decode_ns"], 1),
            mixed_joules=_share(joules["mixed_ns"], 1),
            verify=_least(seconds.get("verify_ns", _NONE), 1),
            verify_share=_share(seconds.get("verify_ns", _NONE), 1),
            verify_joules=_share(joules["verify_ns"], 1),
            draft=_least(seconds.get("draft_ns", _NONE), 1),
            draft_context=_least(seconds.get("draft_rate", _NONE), 1),
            seen=tuple(
                (
                    window,
                    _least(seconds.get(seen("context_rate", window), _NONE), 1),
                    _least(seconds.get(seen("pair_rate", window), _NONE), 2),
                )
                for window in windows_in(seconds)
            ),
            decode_by=_by_size(seconds.get("decode_ns"), 1),
            mixed_by=_by_size(seconds.get("mixed_ns"), 2),
        )

    @classmethod
    def together(cls, parts: Parts, seconds: Mapping[str, Floats]) -> Self:
        """Of what ranks do together: their tables go by the mean tokens of a rank."""
        decode, mixed, draft = (seconds.get(f"together {kind}", _NONE) for kind in ("decode", "mixed", "draft"))
        joules = {
            kind: sum((work.joules for (_, of), work in parts.items() if of == f"together {kind}"), start=np.zeros(1))
            for kind in ("decode", "mixed")
        }
        return cls(
            decode=_least(decode, 1),
            mixed=_least(mixed, 2),
            decode_share=_share(decode, 1),
            mixed_share=_share(mixed, 2),
            decode_joules=_share(joules["decode"], 1),
            mixed_joules=_share(joules["mixed"], 2),
            verify_share=_share(decode, 1),
            verify_joules=_share(joules["decode"], 1),
            draft=_least(draft, 1),
            decode_by=_by_size(seconds.get("together decode"), 1),
            mixed_by=_by_size(seconds.get("together mixed"), 2),
        )

    def of_a_rank(self, count: int, *, drafting: bool = False) -> Self:
        """A rank's own part of a forward, as part of what so many ranks take.

        A forward takes as long as the slowest rank, and no less than their mean. A rank that only decodes may be in a
        forward in which others compute prompts.

        Parameters
        ----------
        count : int        ranks
        drafting : bool    whether drafts are verified
        """
        alone, joules = (self.verify_share, self.verify_joules) if drafting else (self.decode_share, self.decode_joules)
        return replace(
            self,
            decode_share=self.decode_share / count,
            mixed_share=min(alone, self.mixed_share) / count,
            chunk_share=0.0,
            context=self.context / count,
            pair=self.pair / count,
            again=self.again / count,
            seen=tuple((window, context / count, pair / count) for window, context, pair in self.seen),
            decode_joules=self.decode_joules / count,
            mixed_joules=min(joules, self.mixed_joules) / count,
            verify_share=self.verify_share / count,
            verify_joules=self.verify_joules / count,
            draft_context=self.draft_context / count,
            mixed_by=np.where(np.isinf(self.decode_by), self.mixed_by, np.minimum(self.decode_by, self.mixed_by)),
        )

    def by_mean(self, count: int) -> Self:
        """With shares of one token, where they are those of one token of each of so many ranks."""
        return replace(
            self,
            decode_share=self.decode_share / count,
            mixed_share=self.mixed_share / count,
            decode_joules=self.decode_joules / count,
            mixed_joules=self.mixed_joules / count,
            verify_share=self.verify_share / count,
            verify_joules=self.verify_joules / count,
        )

    @classmethod
    def sum_of(cls, parts: Sequence[tuple[int, Least]]) -> Least:
        """What all parts take, each so many times, added up in their order."""
        rates: dict[Window, tuple[float, float]] = {}
        rows, counts, numbers = [], [], dict[int, tuple[float, ...]]()
        for times, part in parts:
            counts.append(times)
            # Layers alike share one part, of which a sum over runs has many.
            if (row := numbers.get(id(part))) is None:
                row = numbers[id(part)] = _numbers(part)
            rows.append(row)
            for window, context, pair in part.seen:
                before = rates.get(window, (0.0, 0.0))
                rates[window] = before[0] + times * context, before[1] + times * pair
        sums = np.add.accumulate(np.array(counts, np.float64)[:, None] * np.array(rows))[-1]
        return cls(
            **dict(zip(_NUMBERS, sums.tolist(), strict=True)),
            seen=tuple((window, *rates[window]) for window in sorted(rates)),
            decode_by=np.array(counts) @ np.array([part.decode_by for _, part in parts]),
            mixed_by=np.array(counts) @ np.array([part.mixed_by for _, part in parts]),
        )

    @classmethod
    def of_any(cls, same: Sequence[Least]) -> Least:
        """The least of one piece on any of several types of GPU, whose windows are the same."""
        return cls(
            **{name: min(getattr(part, name) for part in same) for name in _NUMBERS},
            seen=tuple(
                (rows[0][0], min(row[1] for row in rows), min(row[2] for row in rows))
                for rows in zip(*(part.seen for part in same), strict=True)
            ),
            decode_by=np.minimum.reduce([part.decode_by for part in same]),
            mixed_by=np.minimum.reduce([part.mixed_by for part in same]),
        )


_NONE = np.zeros(1)
_NUMBERS = tuple(f.name for f in fields(Least) if f.name not in ("seen", "decode_by", "mixed_by"))
_numbers = attrgetter(*_NUMBERS)


def _least(table: Floats, first: int) -> float:
    """The least entry from one on; 0 where there is none."""
    return float(table[first:].min()) if len(table) > first else 0.0


def _share(table: Floats, first: int) -> float:
    """The least share of an entry that one sequence or token has."""
    return float((table[first:] / np.arange(first, len(table))).min()) if len(table) > first else 0.0


def _by_size(table: Floats | None, first: int) -> Floats:
    """The least entry from each of the sizes on, and from `first` on; no time where the table is not of this part."""
    if table is None:
        return _nothing()
    rising = np.append(np.minimum.accumulate(table[::-1])[::-1], np.inf)
    return np.asarray(rising[np.minimum(np.maximum(SIZES, first), len(table))])
