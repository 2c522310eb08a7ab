"""What a simulation returns: times per request, and counts from which every additive quantity follows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.figures.run import Run
from apex_opt.simulator.law import no_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.goals import Goal
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.law import Window
    from apex_opt.workload.trace import Trace

Step = tuple[int, int, list[tuple[int, int, int]], list[int]]
"""(scheduled at, finished at, [(request, tokens, computed after)], preempted requests)."""
Drafted = tuple[int, list[tuple[int, int]]]
"""(KV blocks free once a batch is scheduled, [(drafts, tokens that the request got)] of its rows)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchCounts:
    """How often each term of a `BatchLaw` was used.

    Time by operation, energy, FLOPs and bytes are sums over batches of the same table entries, so these counts times
    any table give the exact total without running the simulation again.

    Parameters
    ----------
    decode, decode_context : int64[max_num_seqs + 1]
        batches of `n` decoding sequences and nothing else; the context they read, summed
    sequences, attend, attend_context : int64[max_num_seqs + 1]
        batches with a prefill chunk, by all their sequences and by their decoding ones; the context of the latter
    mixed : int64[max_num_batched_tokens + 1]
        batches with a prefill chunk, by tokens
    chunk, chunk_pairs, chunk_context : int64[max_num_batched_tokens + 1]
        prefill chunks by tokens; their query-key pairs and context, summed
    verify, draft, draft_context : int64[max_num_batched_tokens + 1], int64[max_num_seqs + 1] two times
        where drafts are made, else empty: batches of decoding sequences alone by tokens; batches that make drafts by
        sequences, and all that these hold, summed
    seen_context, seen_pairs : int64[windows, max_num_seqs + 1], int64[windows, max_num_batched_tokens + 1]
        of each window of the laws what decoding sequences see of their context as the law counts it, and the pairs of
        chunks within it, summed
    """

    decode: NDArray[np.int64]
    decode_context: NDArray[np.int64]
    sequences: NDArray[np.int64]
    attend: NDArray[np.int64]
    attend_context: NDArray[np.int64]
    mixed: NDArray[np.int64]
    chunk: NDArray[np.int64]
    chunk_pairs: NDArray[np.int64]
    chunk_context: NDArray[np.int64]
    verify: NDArray[np.int64]
    draft: NDArray[np.int64]
    draft_context: NDArray[np.int64]
    seen_context: NDArray[np.int64]
    seen_pairs: NDArray[np.int64]

    @classmethod
    def empty(cls, settings: EngineSettings, windows: int = 0) -> BatchCounts:
        """Counts of no batch at all, under laws with so many windows."""
        by_tokens = {"mixed", "chunk", "chunk_pairs", "chunk_context", "verify", "seen_pairs"}
        unused = () if settings.speculation else ("verify", "draft", "draft_context")
        sizes = (settings.max_num_batched_tokens + 1, settings.max_num_seqs + 1)

        def shape(name: str) -> tuple[int, ...]:
            entries = 0 if name in unused else sizes[name not in by_tokens]
            return (windows, entries) if name.startswith("seen_") else (entries,)

        return cls(**{f.name: np.zeros(shape(f.name), np.int64) for f in fields(cls)})

    def add(
        self,
        chunks: Sequence[tuple[int, int]],
        *,
        draft_tokens: int = 0,
        yields: bool = True,
        windows: Sequence[Window] = (),
    ) -> None:
        """Count one batch.

        Parameters
        ----------
        chunks : of each sequence, its tokens and those that it holds once the batch is done
        draft_tokens : int    drafts that may follow a token
        yields : bool         whether a row yields
        windows : sequence of Window    of the laws
        """
        decoding = [held for c, held in chunks if c <= 1 + draft_tokens]
        n, d = len(chunks), len(decoding)
        for row, window in enumerate(windows):
            self.seen_context[row, d] += min(sum(decoding), d * window.tokens)
            for c, held in chunks:
                if c > 1 + draft_tokens:
                    self.seen_pairs[row, c] += window.pairs(c, held)
        if draft_tokens and yields:
            self.draft[n] += 1
            self.draft_context[n] += sum(held for _, held in chunks)
        if d == n:
            self.decode[n] += 1
            self.decode_context[n] += sum(decoding)
            if draft_tokens:
                self.verify[sum(c for c, _ in chunks)] += 1
            return
        self.sequences[n] += 1
        self.attend[d] += 1
        self.attend_context[d] += sum(decoding)
        self.mixed[sum(c for c, _ in chunks)] += 1
        for c, held in chunks:
            if c > 1 + draft_tokens:
                self.chunk[c] += 1
                self.chunk_pairs[c] += c * held - c * (c - 1) // 2
                self.chunk_context[c] += held

    def __add__(self, other: BatchCounts) -> BatchCounts:
        return BatchCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def equals(self, other: BatchCounts) -> bool:
        """Whether every count is the same."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))

    @property
    def tokens(self) -> int:
        """Tokens computed, those computed again after a preemption included."""
        alone = self.verify if len(self.verify) else self.decode
        return int(alone @ np.arange(len(alone)) + self.mixed @ np.arange(len(self.mixed)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SharedCounts:
    """How often each entry of a `ranks.SharedLaw` was used, and how many batches of ranks were dummies.

    Parameters
    ----------
    decode, mixed, eager : int64[n]    forwards by all their padded tokens, as the law has them
    dummies : int
    draft : int64[n]                   forwards that make drafts by all their sequences; empty where none are made
    split_decode, split_mixed : int64[n]    those of `decode` and `mixed` that were split into two halves; empty where
                                       none can be
    """

    decode: NDArray[np.int64]
    mixed: NDArray[np.int64]
    eager: NDArray[np.int64]
    dummies: int
    draft: NDArray[np.int64]
    split_decode: NDArray[np.int64] = field(default_factory=no_table)
    split_mixed: NDArray[np.int64] = field(default_factory=no_table)

    def __add__(self, other: SharedCounts) -> SharedCounts:
        return SharedCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def equals(self, other: SharedCounts) -> bool:
        """Whether every count is the same."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLog:
    """What the ranks of one replica did beside their batches, all times in nanoseconds.

    Parameters
    ----------
    rank : mapping of request to the rank that served it
    preemptions, batches, dummies : list of int, of each rank
    forwards : (start, end, mode, padded tokens of all ranks) of each forward; of ranks on their own a list for each
    publications : (time, [waiting, running] of each rank) of every publication of loads
    waves_started : (time, wave, rank that starts by itself or None) as the coordinator tells the ranks
    waves_ended : (time, wave) as the first rank finds it
    """

    rank: dict[int, int]
    preemptions: list[int]
    batches: list[int]
    dummies: list[int]
    forwards: list[list[tuple[int, int, int, int]]]
    publications: list[tuple[int, list[list[int]]]]
    waves_started: list[tuple[int, int, int | None]]
    waves_ended: list[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolOutcome:
    """What one pool of replicas did in a run.

    Parameters
    ----------
    preemptions, batches, cached_tokens : int
    counts : BatchCounts                 over its schedulers
    busy_ns : int64[replicas, stages]    time each stage spent on batches
    shared : SharedCounts or None        of replicas with ranks that run in step
    """

    preemptions: int
    batches: int
    cached_tokens: int
    counts: BatchCounts
    busy_ns: NDArray[np.int64]
    shared: SharedCounts | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """One simulated run.

    Parameters
    ----------
    arrival_ns, first_token_ns, finish_ns : int64[requests]
        arrival is as given, or the moment a closed-loop client sent the request
    preemptions, batches : int
    cached_tokens : int                  prompt tokens found in the cache when their request was first admitted
    busy_ns : int64[replicas, stages]    time each stage spent on batches; of pools with fewer stages 0 in the others
    counts : BatchCounts                 over all replicas; empty of several pools, as theirs stand for different times
    steps : list of Step or None         every batch, replica by replica and rank by rank, where asked for
    steps_per_replica : list of int or None    how many of them are whose
    groups : GroupLog of each replica with ranks, where batches are asked for
    drafted : list of Drafted or None    what came of the drafts of every batch, where asked for and drafts are made
    used : list of tuples of int or None    blocks in use of each group of layers after each batch, where there are some
    gaps_ns : int64[gaps] or None        times between consecutive tokens, request by request, where asked for
    stopped : bool                       cut short by a `Stop`: times and counts are then incomplete
    pools : PoolOutcome of each pool
    moved : (request, replica, replica, time) of each that went from one replica on to another
    """

    arrival_ns: NDArray[np.int64]
    first_token_ns: NDArray[np.int64]
    finish_ns: NDArray[np.int64]
    preemptions: int
    batches: int
    busy_ns: NDArray[np.int64]
    counts: BatchCounts
    cached_tokens: int = 0
    steps: list[Step] | None = None
    steps_per_replica: list[int] | None = None
    groups: tuple[GroupLog, ...] = ()
    used: list[tuple[int, ...]] | None = None
    drafted: list[Drafted] | None = None
    gaps_ns: NDArray[np.int64] | None = None
    stopped: bool = False
    pools: tuple[PoolOutcome, ...] = ()
    moved: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def makespan_ns(self) -> int:
        """From the first arrival to the last token."""
        return int(self.finish_ns.max() - self.arrival_ns.min())

    def as_run(
        self,
        trace: Trace,
        max_model_len: int,
        *,
        outside_ns: int = 0,
        limits: Sequence[Goal] = (),
        joules: float | None = None,
        cost_per_h: float | None = None,
    ) -> Run:
        """The run, or what no run can beat in the form of one, as figures are taken of.

        Parameters
        ----------
        trace : what was asked of it
        max_model_len : int     requests end there, so fewer tokens may have been generated than asked
        outside_ns : int        time of a request outside the engine
        limits : goals whose limits a request must keep to in order to be good
        joules, cost_per_h : energy of the run, and $ per hour of its GPUs, where known

        Returns
        -------
        Run    one run
        """
        return Run.of(
            arrival_ns=self.arrival_ns,
            first_ns=(self.first_token_ns - self.arrival_ns)[None],
            rest_ns=(self.finish_ns - self.first_token_ns)[None],
            prompt=trace.prompt,
            tokens=trace.generated(max_model_len),
            outside_ns=outside_ns,
            gap_ns=None if self.gaps_ns is None else self.gaps_ns[None],
            limits=tuple(limits),
            joules=None if joules is None else np.array([joules]),
            cost_per_h=None if cost_per_h is None else np.array([cost_per_h]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DisaggregatedOutcome(Outcome):
    """A run of prefill and decode instances: replicas are the prefill instances, then the decode instances.

    The first token of a request is the decode instance's, as that of the prefill instance is thrown away.

    Parameters
    ----------
    prefill, decode : int64[requests]             which instance of its pool a request went to
    prefilled_ns, forwarded_ns : int64[requests]  when its prompt was computed, and when the decode instance got it
    read_ns : int64[requests, 2]                  when its read started and ended
    read_blocks : int64[requests]                 the blocks that travelled
    held : int64[replicas]                        blocks not given back in the end: an instance that has nothing to do
                                                  does not hear that what it holds was read
    preemptions_of : int64[replicas]
    """

    prefill: NDArray[np.int64]
    decode: NDArray[np.int64]
    prefilled_ns: NDArray[np.int64]
    forwarded_ns: NDArray[np.int64]
    read_ns: NDArray[np.int64]
    read_blocks: NDArray[np.int64]
    held: NDArray[np.int64]
    preemptions_of: NDArray[np.int64]
