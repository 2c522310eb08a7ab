"""Llumnix: requests are dealt by freeness, and move while they decode.

A move copies the full KV blocks of a request while it goes on decoding, then those that came to be full meanwhile, and
so on. Its last stage, in which the request stands still, copies what little is left. Blocks are held on both sides
until then.

Source: arXiv 2406.03243, sections 4.2 to 4.4, and its repository, in our own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from apex_opt.simulator.rescheduling import LAST_STAGE_BLOCKS, STAGES
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Sequence as Seq
    from collections.abc import Set as AbstractSet

    from apex_opt.simulator.reference.engine import Engine
    from apex_opt.simulator.reference.sequence import Sequence
    from apex_opt.simulator.rescheduling import Rescheduling

CROWDED: Final = Fraction(-(1 << 62))
"""The freeness of a replica that is being drained: as if a request of endless size ran there."""


def virtual_usage(blocks: int, *, high: bool = False, highs: int = 1, headroom: int = 0) -> Fraction:
    """Blocks that a request counts as.

    Parameters
    ----------
    blocks : int      that it holds, or asks for where it waits first in a queue
    high : bool       whether it is of high priority
    highs : int       running requests of high priority on its replica
    headroom : int    blocks that these are to have in reserve together
    """
    return Fraction(blocks) + (Fraction(headroom, highs) if high else 0)


def freeness(total: int, used: Fraction, requests: int) -> Fraction:
    """Blocks that are free for each request of a replica, below 0 where more are asked for than there are.

    Parameters
    ----------
    total : int        blocks of the replica
    used : Fraction    virtual usage of its requests
    requests : int     of the batch; a replica without any counts as with one
    """
    return (total - used) / max(1, requests)


@dataclass(slots=True, eq=False)
class Move:
    """A request on its way to another replica."""

    sequence: Sequence
    source: int
    target: int
    due_ns: int | None  # when what is being copied has arrived; None while batches that it is in have to end
    stages: int = 1
    copied: int = 0  # blocks copied, or being copied, which the target holds for it
    still: bool = False  # it is in no further batch of its source


class Llumnix:
    """Replicas between which requests move.

    Parameters
    ----------
    engines : sequence of Engine    of one scheduler each, whose blocks are counted
    blocks : int                    of each
    rules : Rescheduling
    high : set of int               requests of high priority
    """

    def __init__(
        self, engines: Seq[Engine], blocks: int, rules: Rescheduling, high: AbstractSet[int] = frozenset()
    ) -> None:
        self.engines, self.total, self.rules, self.high = engines, blocks, rules, high
        self.moves: list[Move] = []
        self.moved: list[tuple[int, int, int, int]] = []  # (request, source, target, when) of moves that succeeded
        self.aborted = 0

    def freeness(self, place: int) -> Fraction:
        """How free a replica is."""
        if place in self.rules.draining:
            return CROWDED
        scheduler = self.engines[place].scheduler
        highs = sum(sequence.id in self.high for sequence in scheduler.running)
        used = sum(
            (
                virtual_usage(s.blocks, high=s.id in self.high, highs=highs, headroom=self.rules.headroom)
                for s in scheduler.running
            ),
            Fraction(0),
        )
        used += sum(move.sequence.blocks for move in self.moves if move.still and move.source == place)
        used += sum(move.copied for move in self.moves if move.target == place)
        queue = [*scheduler.waiting, *self.engines[place].arrivals]
        if queue:  # only the first one counts: the others come after it whatever is done
            used += ceil_div(queue[0].known, scheduler.settings.block_size)
        return freeness(self.total, used, len(scheduler.running) + bool(queue))

    def dispatch(self) -> int:
        """The replica that is sent the next request: the freest, of equals the first."""
        return max(range(len(self.engines)), key=lambda place: (self.freeness(place), -place))

    def serve(self, arrivals: deque[tuple[int, Sequence]]) -> None:
        """Serve all requests; of events at one time arrivals are first, then moves, then looks for pairs."""
        look_ns = self.rules.period_ns
        while True:
            turns = [(at, place) for place, engine in enumerate(self.engines) if (at := engine.next_ns()) is not None]
            stages = [(move.due_ns, n) for n, move in enumerate(self.moves) if move.due_ns is not None]
            if not (turns or stages or arrivals):
                return
            turn, stage = min(turns, default=None), min(stages, default=None)
            next_ns = min(event[0] for event in (turn, stage, arrivals[0] if arrivals else None) if event is not None)
            if arrivals and arrivals[0][0] <= min(next_ns, look_ns):
                at_ns, sequence = arrivals.popleft()
                self.engines[self.dispatch()].add(sequence, at_ns)
            elif stage is not None and stage[0] <= min(next_ns, look_ns):
                self._arrived(self.moves[stage[1]], stage[0])
            elif look_ns <= next_ns:
                self._look(look_ns)
                # Between two events nothing changes, so that further looks before the next one are leapt over.
                leap = 0 if self.moves else (next_ns - look_ns) // self.rules.period_ns
                look_ns += self.rules.period_ns * max(1, leap)
            else:
                assert turn is not None
                self.engines[turn[1]].turn(turn[0])
                self._turned(turn[1])

    def _look(self, now_ns: int) -> None:
        """Pair the most crowded replicas with the freest, and let one request of each pair begin to move."""
        busy = {place for move in self.moves for place in (move.source, move.target)}
        found = sorted((self.freeness(place), place) for place in range(len(self.engines)) if place not in busy)
        sources = [place for free, place in found if free < self.rules.out_below]
        targets = [place for free, place in reversed(found) if free >= self.rules.in_from]
        for source, target in zip(sources, targets, strict=False):
            if (sequence := self._chosen(source)) is not None:
                move = Move(sequence, source, target, None)
                self.moves.append(move)
                self._copy(move, max(now_ns, self.engines[source].now))

    def _chosen(self, source: int) -> Sequence | None:
        """The request that moves first: decoding, of normal priority before high, the shortest, of equals the first."""
        found = [s for s in self.engines[source].scheduler.running if s.generated and not s.finished]
        return min(found, key=lambda s: (s.id in self.high, s.known, s.id), default=None)

    def _copy(self, move: Move, now_ns: int) -> None:
        """Begin the next stage: of the full blocks where the request goes on, of all where it stands still."""
        size = self.engines[move.source].scheduler.settings.block_size
        full = move.sequence.computed - move.sequence.in_flight
        blocks = (ceil_div(full, size) if move.still else full // size) - move.copied
        target = self.engines[move.target].scheduler.blocks
        if blocks > target.free:
            self._abort(move)
            return
        target.free -= blocks
        move.copied += blocks
        move.due_ns = now_ns + blocks * self.rules.block_ns + (self.rules.stop_ns if move.still else 0)

    def _arrived(self, move: Move, now_ns: int) -> None:
        """A stage is done: the next one, the last one, or the end."""
        source = self.engines[move.source]
        if move.still:
            self._resume(move, now_ns)
            return
        size = source.scheduler.settings.block_size
        left = ceil_div(move.sequence.computed, size) - move.copied
        if left <= LAST_STAGE_BLOCKS:
            move.still, move.due_ns = True, None
            source.scheduler.running.remove(move.sequence)
            source.scheduler.leaving.append(move.sequence)
            self._stop(move, now_ns)
        elif move.stages == STAGES:
            self._abort(move)
        else:
            move.stages += 1
            self._copy(move, max(now_ns, source.now))

    def _stop(self, move: Move, now_ns: int) -> None:
        """Begin the last stage, once the request is in no batch."""
        source = self.engines[move.source]
        if not any(row.sequence is move.sequence for _, batch in source.queue for row in batch.rows):
            self._copy(move, max(now_ns, source.now))

    def _turned(self, place: int) -> None:
        """A replica took its turn: requests on their way from it may have ended, lost their blocks or come to rest."""
        for move in [move for move in self.moves if move.source == place]:
            scheduler = self.engines[place].scheduler
            if move.sequence not in (scheduler.leaving if move.still else scheduler.running):
                self._abort(move)
            elif move.still and move.due_ns is None:
                self._stop(move, self.engines[place].now)

    def _resume(self, move: Move, now_ns: int) -> None:
        """The request goes on at its target."""
        source, target = self.engines[move.source], self.engines[move.target]
        if len(target.scheduler.running) >= target.scheduler.settings.max_num_seqs:
            self._abort(move)
            return
        source.scheduler.leaving.remove(move.sequence)
        source.scheduler.blocks.release(move.sequence)
        move.sequence.blocks = move.copied
        target.scheduler.running.append(move.sequence)
        target.now = max(target.now, now_ns)
        self.moves.remove(move)
        self.moved.append((move.sequence.id, move.source, move.target, now_ns))

    def _abort(self, move: Move) -> None:
        """The request stays where it is, and what the target held for it is free again."""
        scheduler = self.engines[move.source].scheduler
        self.engines[move.target].scheduler.blocks.free += move.copied
        if move.sequence in scheduler.leaving:
            scheduler.leaving.remove(move.sequence)
            scheduler.running.append(move.sequence)
        self.moves.remove(move)
        self.aborted += 1
