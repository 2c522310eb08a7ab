"""Data-parallel ranks of one engine: how they stand together, and what a forward of all of them takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.simulator.law import no_table
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.engines.overlap import Splitting
    from apex_opt.simulator.law import BatchLaw

    I64 = NDArray[np.int64]

EAGER, PIECEWISE, FULL = range(3)
"""Modes of a forward: no graph, graphs of the pieces between attention, graphs of all of it."""

VOTE: Final = 32
"""Forwards after which ranks agree on whether any of them has requests left.

Source: `DPEngineCoreProc` of vLLM 0.20.2.
"""

Rows = list[tuple[int, int]]
"""A batch as (tokens, tokens held once it is done) per sequence."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Padding:
    """What a rank would run its batch as on its own: the mode, and as how many tokens.

    Parameters
    ----------
    decode_mode, decode_rows : int64[max_num_seqs + 1]        of batches in which every sequence has one token; where
        drafts are verified int64[max_num_batched_tokens + 1], by tokens, of batches in which each has those of drafts
    mixed_mode, mixed_rows : int64[max_num_batched_tokens + 1] of other batches, by their tokens
    """

    decode_mode: I64
    decode_rows: I64
    mixed_mode: I64
    mixed_rows: I64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Halves:
    """What a forward of a stage takes in two halves, one of which computes while the other sends.

    Layer by layer that is the busier of computing and sending, of both halves; the first half has nothing to hide
    behind. Tables by tokens go by those of all ranks together, as `SharedLaw` has them.

    Parameters
    ----------
    law : BatchLaw                                       of what a rank computes by itself, of both halves together
    decode_ns, mixed_ns : int64[n]                       what all ranks compute together: where all of them only decode,
                                                         and else
    network_ns : int64[n]                                what they send
    decode_host_ns, mixed_host_ns : int64[n]             of the host, likewise
    alone_ns : int64[max_num_seqs + 1]                   what is not split, by the most sequences of a rank
    layers : int
    """

    law: BatchLaw
    decode_ns: I64
    mixed_ns: I64
    network_ns: I64
    decode_host_ns: I64
    mixed_host_ns: I64
    alone_ns: I64
    layers: int

    @classmethod
    def bare(cls, law: BatchLaw, shared: SharedLaw) -> Halves:
        """Halves that take what a law says, and nothing beside it, over tables as long as those of a shared law."""
        nothing, alone = np.zeros_like(shared.decode_ns), np.zeros_like(law.sequence_ns)
        return cls(
            law=law,
            decode_ns=nothing,
            mixed_ns=nothing,
            network_ns=nothing,
            decode_host_ns=nothing,
            mixed_host_ns=nothing,
            alone_ns=alone,
            layers=1,
        )

    def forward_ns(self, agreed: Agreed, entry: int, batches: Sequence[Rows]) -> int:
        """Time of a forward.

        Parameters
        ----------
        agreed : Agreed
        entry : int     of the tables by tokens
        batches : one of each rank
        """
        together = self.decode_ns if agreed.decoding else self.mixed_ns
        computes = max(self.law.batch_ns(rows) for rows in batches) + int(together[entry])
        sends = int(self.network_ns[entry])
        host = self.decode_host_ns if agreed.decoding else self.mixed_host_ns
        alone = int(host[entry]) + int(self.alone_ns[max(map(len, batches))])
        return alone + max(computes, sends) + min(computes, sends) // (2 * self.layers)

    def scaled(self, factor: int) -> Halves:
        """The same with every time multiplied by an integer."""
        tables = ("decode_ns", "mixed_ns", "network_ns", "decode_host_ns", "mixed_host_ns", "alone_ns")
        return replace(self, law=self.law.scaled(factor), **{name: getattr(self, name) * factor for name in tables})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedLaw:
    """What a forward of a stage takes beside each rank's own part.

    Parameters
    ----------
    padded_ns : int64[max_num_batched_tokens + 1]    of each rank, by its padded tokens
    decode_ns, mixed_ns, eager_ns : int64[n]
        of all ranks together, by the sum of their padded tokens divided by `per`, rounded up: where all of them only
        decode, else, and where these others run without a graph on top
    graph_ns : int64[3]                              by the mode
    per : int                                        tokens to an entry
    draft_ns : int64[n] or int64[0]
        of making drafts by all ranks together where any of them does, beyond a first pass over all tokens: by the sum
        of their sequences divided by `per`, rounded up; empty where none are made
    halves : Halves or None                          of forwards that are split; None: none are
    """

    padded_ns: I64
    decode_ns: I64
    mixed_ns: I64
    eager_ns: I64
    graph_ns: I64
    per: int = 1
    draft_ns: I64 = field(default_factory=no_table)
    halves: Halves | None = None

    def scaled(self, factor: int) -> SharedLaw:
        """The law with every time multiplied by an integer."""
        tables = ("padded_ns", "decode_ns", "mixed_ns", "eager_ns", "graph_ns", "draft_ns")
        halves = None if self.halves is None else self.halves.scaled(factor)
        return replace(self, halves=halves, **{name: getattr(self, name) * factor for name in tables})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ranks:
    """Ranks of one engine, each with a scheduler, a pool of KV blocks and limits of its own.

    Parameters
    ----------
    count : int                 ranks
    lockstep : bool             all run a forward together, with dummy batches where a rank has none of its own; else
                                each runs on its own behind one address
    front_ends : int            processes that take in requests, in turn
    balanced : bool             a front end sends a request to the rank with the least load it knows of; else in turn
    dummy_returns : str         when a rank that ran a dummy batch goes on: at its "start", as the source does, or "end"
    sync_ns : int               agreement on a forward, once all ranks have submitted theirs
    send_ns, control_ns : int   from a front end to a rank; every hop to or from the coordinator
    padding : Padding
    shared : one SharedLaw per pipeline stage; of ranks on their own, of a group of one
    splitting : Splitting or None    when a forward is split into two halves; None: never

    Raises
    ------
    UsageError    a value out of its range
    """

    count: int
    lockstep: bool = True
    front_ends: int = 1
    balanced: bool = True
    dummy_returns: Literal["start", "end"] = "start"
    sync_ns: int = 0
    send_ns: int = 0
    control_ns: int = 0
    padding: Padding
    shared: Sequence[SharedLaw]
    splitting: Splitting | None = None

    def __post_init__(self) -> None:
        if self.splitting is not None and (not self.in_step or any(law.halves is None for law in self.shared)):
            raise UsageError("ranks: forwards are split of ranks in step of which it is known what halves take")
        for name in ("count", "front_ends"):
            if getattr(self, name) < 1:
                raise UsageError(f"ranks: {name} {getattr(self, name)} is below 1")
        for name in ("sync_ns", "send_ns", "control_ns"):
            if getattr(self, name) < 0:
                raise UsageError(f"ranks: {name} must not be negative, it is {getattr(self, name)}")
        if self.dummy_returns not in ("start", "end"):
            raise UsageError(f"ranks: dummy_returns must be start or end, not {str(self.dummy_returns)[:60]}")

    @classmethod
    def bare(
        cls, count: int, *, max_num_seqs: int, max_num_batched_tokens: int, stages: int = 1, drafting: bool = False
    ) -> Ranks:
        """Ranks that share nothing but the forward, whose batches are neither padded nor run as graphs.

        Parameters
        ----------
        count : int
        max_num_seqs, max_num_batched_tokens : int    limits of each rank
        stages : int                                  of the pipeline
        drafting : bool                               whether drafts are verified
        """
        decode, mixed = (np.arange(most + 1, dtype=np.int64) for most in (max_num_seqs, max_num_batched_tokens))
        decode = mixed if drafting else decode
        together = np.zeros(count * max_num_batched_tokens + 1, np.int64)
        shared = SharedLaw(
            padded_ns=np.zeros_like(mixed),
            decode_ns=together,
            mixed_ns=together,
            eager_ns=together,
            graph_ns=np.zeros(3, np.int64),
        )
        padding = Padding(
            decode_mode=np.zeros_like(decode),
            decode_rows=decode,
            mixed_mode=np.zeros_like(mixed),
            mixed_rows=mixed,
        )
        return cls(count=count, padding=padding, shared=(shared,) * stages)

    def scaled(self, factor: int) -> Ranks:
        """The ranks with every time that they share, and that of every message, multiplied by an integer."""
        return replace(
            self,
            sync_ns=self.sync_ns * factor,
            send_ns=self.send_ns * factor,
            control_ns=self.control_ns * factor,
            shared=tuple(law.scaled(factor) for law in self.shared),
        )

    @property
    def in_step(self) -> bool:
        """Whether forwards are those of several ranks."""
        return self.lockstep and self.count > 1


class Agreed(NamedTuple):
    """What ranks agree on for a forward: the mode, their padded tokens, if all only decode, and if it is split."""

    mode: int
    padded: list[int]
    decoding: bool
    split: bool = False


DUMMY: Final[Rows] = [(1, 0)]
"""One sequence of one token, which reads no context."""


def alike_ns(law: BatchLaw, ranks: Ranks | None, stage: int, rows: Rows) -> int:
    """Time of a batch on a stage; of ranks that run in step, of a forward in which each has the same one.

    Parameters
    ----------
    law : BatchLaw           of the stage
    ranks : Ranks or None    of the replica
    stage : int
    rows : Rows              the batch
    """
    if ranks is None or not ranks.in_step:
        return law.batch_ns(rows)
    batches = [rows] * ranks.count
    agreed = agree(ranks.padding, batches, law.draft_tokens, ranks.splitting)
    return forward_ns(law, ranks.shared[stage], agreed, batches)


def splits(rule: Splitting, tokens: Sequence[int], padded: Sequence[int], decoding: Sequence[bool]) -> bool:
    """Whether ranks split a forward into two halves: all or none do.

    Parameters
    ----------
    rule : Splitting
    tokens : of each rank
    padded : the same with padding to captured sizes
    decoding : whether each sequence of a rank has one token
    """
    if not rule.pads:
        busy = [(count, alone) for count, alone in zip(tokens, decoding, strict=True) if count]
        tokens, decoding = [count for count, _ in busy], [alone for _, alone in busy]
        if len(set(decoding)) != 1:
            return False
    wanted = all(
        count >= (rule.decode_tokens if alone else rule.prompt_tokens)
        for count, alone in zip(tokens, decoding, strict=True)
    )
    return wanted and (not rule.pads or max(padded) // 2 < min(tokens))


def agree(padding: Padding, batches: Sequence[Rows], drafts: int = 0, splitting: Splitting | None = None) -> Agreed:
    """The least of the modes the ranks would choose, and their padding.

    With a graph every rank is padded to the largest, and so they are where the forward is split; else each keeps the
    padding it chose.
    Source: `coordinate_batch_across_dp` and `CudagraphDispatcher` of vLLM 0.20.2, in our own words.

    Parameters
    ----------
    padding
    batches : one of each rank
    drafts : int    that may follow a token
    splitting : Splitting or None    when a forward is split
    """
    modes, padded, alone = [], [], []
    for rows in batches:
        total = sum(tokens for tokens, _ in rows)
        if all(tokens <= 1 + drafts for tokens, _ in rows):
            entry = total if drafts else len(rows)
            modes.append(int(padding.decode_mode[entry]))
            padded.append(int(padding.decode_rows[entry]))
            alone.append(True)
        else:
            modes.append(int(padding.mixed_mode[total]))
            padded.append(int(padding.mixed_rows[total]))
            alone.append(False)
    mode, tokens = min(modes), [sum(count for count, _ in rows) for rows in batches]
    split = splitting is not None and splits(splitting, tokens, padded, alone)
    if mode != EAGER or (splitting is not None and splitting.pads and split):
        padded = [max(padded)] * len(padded)
    return Agreed(mode, padded, all(alone), split)


def forward_ns(
    law: BatchLaw, shared: SharedLaw, agreed: Agreed, batches: Sequence[Rows], makes: Sequence[bool] = ()
) -> int:
    """Time of a forward on one stage: the slowest rank's own part, and what all ranks take together.

    Parameters
    ----------
    law : BatchLaw       of a rank's own part
    shared : SharedLaw
    agreed : Agreed
    batches : one of each rank
    makes : of each rank, whether its batch makes drafts, where any are made; nothing: all do
    """
    entry = ceil_div(sum(agreed.padded), shared.per)
    if agreed.split:
        assert shared.halves is not None
        return int(shared.graph_ns[agreed.mode]) + shared.halves.forward_ns(agreed, entry, batches)
    makes = makes or [True] * len(batches)
    own = max(
        law.batch_ns(rows, yields=yields) + int(shared.padded_ns[padded])
        for rows, padded, yields in zip(batches, agreed.padded, makes, strict=True)
    )
    together = int((shared.decode_ns if agreed.decoding else shared.mixed_ns)[entry])
    if not agreed.decoding and agreed.mode == EAGER:
        together += int(shared.eager_ns[entry])
    if len(shared.draft_ns) and any(makes):
        together += int(shared.draft_ns[ceil_div(sum(map(len, batches)), shared.per)])
    return int(shared.graph_ns[agreed.mode]) + own + together
