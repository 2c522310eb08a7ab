"""Data-parallel ranks of one engine: a scheduler and a pool each, forwards in lockstep, waves and dummy batches.

Source: `DPEngineCoreProc` and `EngineCoreProc` of vLLM 0.20.2, in our own words; settled by recorded runs. Whoever is
due first acts: the coordinator, the front ends in order, arrivals, the ranks in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.law import no_table
from apex_opt.simulator.outcome import BatchCounts, GroupLog, SharedCounts
from apex_opt.simulator.ranks import DUMMY, EAGER, VOTE, agree, forward_ns
from apex_opt.simulator.reference.coordinator import (
    Coordinator,
    Counts,
    Ended,
    FrontEnd,
    Inbox,
    Known,
    Process,
    Request,
    Start,
    Wanted,
)
from apex_opt.simulator.reference.engine import scheduler_of
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from apex_opt.simulator.outcome import Step
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.ranks import Rows
    from apex_opt.simulator.reference.sequence import Batch, Sequence


@dataclass(slots=True)
class Forward:
    """One forward of the ranks that run in step: when they agreed on it, when it ran, and how."""

    agreed: int
    start: int
    end: int
    mode: int
    padded: int


class Forwards:
    """The forwards of ranks that run in step, or of one rank on its own.

    The n-th batch of a rank, dummies among them, is a part of the n-th forward, which runs once all have submitted it.
    """

    def __init__(self, pool: EnginePool, members: int) -> None:
        assert pool.ranks is not None
        self._ranks, self._laws, self._members = pool.ranks, pool.laws, members
        self._sync_ns = pool.ranks.sync_ns if members > 1 else 0
        self._free = [0] * len(pool.laws)
        self.busy_ns = [0] * len(pool.laws)
        self._number = [0] * pool.ranks.count  # of each rank's next part
        # (rank, when, rows, whether it makes drafts) by the forward
        self._submitted: dict[int, list[tuple[int, int, Rows, bool]]] = {}
        self.done: list[Forward] = []
        self.decode, self.mixed, self.eager = (np.zeros_like(pool.ranks.shared[0].decode_ns) for _ in range(3))
        self.draft = np.zeros_like(pool.ranks.shared[0].draft_ns)
        halved = self.decode if pool.ranks.splitting else no_table()
        self.split_decode, self.split_mixed = np.zeros_like(halved), np.zeros_like(halved)

    def submit(self, rank: int, now_ns: int, rows: Rows, *, makes: bool) -> int:
        """A rank submits its part of a forward; the number of that.

        Parameters
        ----------
        rank : int
        now_ns : int    when
        rows : Rows     its batch
        makes : bool    whether that makes drafts
        """
        number = self._number[rank]
        self._number[rank] += 1
        parts = self._submitted.setdefault(number, [])
        parts.append((rank, now_ns, rows, makes))
        if len(parts) == self._members:
            self._run(sorted(self._submitted.pop(number), key=lambda part: part[0]))
        return number

    def end(self, number: int) -> int | None:
        """When a forward ends, where that is known."""
        return self.done[number].end if number < len(self.done) else None

    def dummy_returns(self, number: int, depth: int) -> int | None:
        """When the call that ran a dummy batch in a forward returns, where that is known."""
        if number >= len(self.done) or self._ranks.dummy_returns == "end":
            return self.end(number)
        behind = self.done[number - depth].end if number >= depth else 0
        return max(self.done[number].agreed, behind)

    def _run(self, parts: list[tuple[int, int, Rows, bool]]) -> None:
        batches, makes = [rows for _, _, rows, _ in parts], [its for _, _, _, its in parts]
        agreed_ns = max(at_ns for _, at_ns, _, _ in parts) + self._sync_ns
        agreed = agree(self._ranks.padding, batches, self._laws[0].draft_tokens, self._ranks.splitting)
        start, end = max(agreed_ns, self._free[0]), agreed_ns
        for stage, (law, shared) in enumerate(zip(self._laws, self._ranks.shared, strict=True)):
            duration = forward_ns(law, shared, agreed, batches, makes)
            end = max(end, self._free[stage]) + duration
            self._free[stage] = end
            self.busy_ns[stage] += duration
            if stage + 1 < len(self._laws):
                end += int(law.transfer_ns[min(max(agreed.padded), len(law.transfer_ns) - 1)])
        padded = sum(agreed.padded)
        entry = ceil_div(padded, self._ranks.shared[0].per)
        (self.decode if agreed.decoding else self.mixed)[entry] += 1
        self.eager[entry] += not agreed.decoding and agreed.mode == EAGER and not agreed.split
        if agreed.split:
            (self.split_decode if agreed.decoding else self.split_mixed)[entry] += 1
        if len(self.draft) and any(makes):
            self.draft[ceil_div(sum(map(len, batches)), self._ranks.shared[0].per)] += 1
        self.done.append(Forward(agreed_ns, start, end, agreed.mode, padded))


class Rank(Process):
    """One scheduler with its pool, and the loop that runs its batches."""

    def __init__(self, group: Group, index: int, forwards: Forwards) -> None:
        pool = group.pool
        self.group, self.index, self.forwards = group, index, forwards
        self.scheduler = scheduler_of(pool)
        self.depth = pool.settings.depth(len(pool.laws))
        self.inbox = Inbox()
        self.idle = False
        self.preemptions = self.batches = self.dummies = 0
        self.windows = pool.laws[0].windows
        self.counts = BatchCounts.empty(pool.settings, len(self.windows))
        self.steps: list[tuple[int, int, list[tuple[int, int, int]], list[int]]] = []
        self._sleep_ns = pool.settings.scheduler.idle_sleep_ns
        self._queue: deque[tuple[int | None, Batch]] = deque()
        self._running = False  # whether the ranks are in a wave
        self._wave = self._step = 0
        self._told = (0, 0)
        super().__init__()

    @property
    def unfinished(self) -> bool:
        """Whether it has requests."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    def run(self) -> Iterator[Callable[[], int | None]]:
        group = self.group
        while True:
            while not (self._running or self.unfinished or self.scheduler.unreported or self._queue):
                if not self.inbox.ready(group.now):
                    self.idle = True
                    yield self.inbox.due
                    self.idle = False
                self._hear(self.inbox.take())
            while self.inbox.ready(group.now):
                self._hear(self.inbox.take())
            executed = yield from self._turn()
            if not executed and self.unfinished and self._sleep_ns:
                awake = group.now + self._sleep_ns
                yield lambda at=awake: at  # type: ignore[misc]
            if group.ranks.in_step:
                yield from self._in_step(executed)

    def _hear(self, message: Request | Start) -> None:
        """Take in a request, or that a wave starts."""
        if isinstance(message, Request):
            self.scheduler.waiting.append(message.sequence)
            if not self.group.ranks.in_step:
                return
            if message.wave > self._wave:
                self._wave = message.wave
            elif message.wave < self._wave and not self._running:
                self._running = True
                self.group.tell(Wanted(self.index, self._wave))
        elif message.excluded != self.index and message.wave >= self._wave:
            self._wave, self._running = message.wave, True

    def _turn(self) -> Generator[Callable[[], int | None], None, bool]:
        """Form a batch and, unless there is room for another in flight, take in the oldest; whether one was formed."""
        scheduler, group, executed = self.scheduler, self.group, False
        if self.unfinished or scheduler.unreported:
            batch = scheduler.schedule()
            self.preemptions += len(batch.preempted)
            executed = bool(batch.rows)
            self._queue.append((self._submit(batch) if executed else None, batch))
            if executed and len(self._queue) < self.depth and not self._ended(self._queue[0][0]):
                return executed
        elif not self._queue:
            return executed
        number, batch = self._queue.popleft()
        if number is not None:
            if not self._ended(number):
                yield lambda: self.forwards.end(number)
            answered = scheduler.update(batch, group.now)
            group.answer(answered)
            if answered and group.closed:  # clients send their next requests first
                now_ns = group.now
                yield lambda: now_ns
        return executed

    def _ended(self, number: int | None) -> bool:
        """Whether a batch is done; an empty one is at once."""
        end = self.group.now if number is None else self.forwards.end(number)
        return end is not None and end <= self.group.now

    def _submit(self, batch: Batch) -> int:
        """Hand a batch over to be run; the number of its forward."""
        rows = [(row.tokens, row.computed_after) for row in batch.rows]
        makes = self.scheduler.drafts(batch)
        number = self.forwards.submit(self.index, self.group.now, rows, makes=makes)
        self.batches += 1
        drafts = self.group.pool.laws[0].draft_tokens
        self.counts.add(rows, draft_tokens=drafts, yields=makes, windows=self.windows)
        if self.group.log:
            told = [(row.sequence.id, row.tokens, row.computed_after) for row in batch.rows]
            self.steps.append((self.group.now, number, told, sorted(batch.preempted)))
        return number

    def _in_step(self, executed: bool) -> Iterator[Callable[[], int | None]]:
        """Run a dummy batch where there is none of its own, and agree with the others on whether to go on."""
        group, unfinished = self.group, self.unfinished
        counts = len(self.scheduler.running), len(self.scheduler.waiting)
        if counts != self._told:
            self._told = counts
            group.tell(Counts(self.index, self._wave, self._step, counts[1], counts[0]))
        if not executed:
            if not unfinished and not self._running:
                return
            number = self.forwards.submit(self.index, group.now, DUMMY, makes=False)
            self.dummies += 1
            back = self.forwards.dummy_returns(number, self.depth)
            if back is None or back > group.now:
                yield lambda: self.forwards.dummy_returns(number, self.depth)
        self._step += 1
        self._running = True
        if self._step % VOTE == 0:
            vote = group.vote(unfinished)
            if vote.last_ns is None:
                yield lambda: vote.last_ns
            self._running = vote.any
            if not self._running:
                if self.index == 0:
                    group.waves_ended.append((group.now, self._wave))
                    group.tell(Ended(self._wave))
                self._wave += 1
                self._step = 0

    def logged(self) -> list[Step]:
        """Its batches, with the ends of their forwards."""
        done = self.forwards.done
        return [(at, done[number].end, rows, lost) for at, number, rows, lost in self.steps]


@dataclass(slots=True)
class Vote:
    """Whether any rank has requests left, once all have said so."""

    said: int = 0
    any: bool = False
    last_ns: int | None = None


class Group:
    """Ranks behind one address, as one replica: see `reference.engine.Engine` for how it is driven.

    In a `closed` loop clients send a request with each answer, at once.
    """

    def __init__(self, pool: EnginePool, *, log: bool, closed: bool) -> None:
        assert pool.ranks is not None
        self.pool, self.ranks, self.log, self.closed = pool, pool.ranks, log, closed
        self.now = 0
        count = pool.ranks.count
        self.seats = pool.settings.max_num_seqs * count
        self.sent: list[Sequence] = []
        self.publications: list[tuple[int, list[list[int]]]] = []
        self.waves_started: list[tuple[int, int, int | None]] = []
        self.waves_ended: list[tuple[int, int]] = []
        self.rank_of: dict[int, int] = {}
        self.forwards = [Forwards(pool, count)] if self.ranks.in_step else [Forwards(pool, 1) for _ in range(count)]
        self._vote = Vote()
        self._arrivals: deque[Sequence] = deque()
        self._answered: list[Sequence] = []
        self._unanswered = 0
        self._arrived = 0
        self._coordinator = Coordinator(self) if count > 1 else None
        self._fronts = [FrontEnd(self, index) for index in range(self.ranks.front_ends)]
        self.members = [Rank(self, index, self.forwards[0 if self.ranks.in_step else index]) for index in range(count)]
        self._actors: list[Process | FrontEnd | Group] = [
            *([self._coordinator] if self._coordinator else []),
            *self._fronts,
            self,
            *self.members,
        ]

    # How it is driven.

    def add(self, sequence: Sequence, at_ns: int) -> None:
        """Send a request; arrivals must come in order of time."""
        sequence.arrival_ns = at_ns
        self._arrivals.append(sequence)
        self.sent.append(sequence)
        self._unanswered += 1

    def outstanding(self, at_ns: int) -> int:
        """Requests sent and not answered by `at_ns`, once all turns before it are taken."""
        return sum(s.answered_ns is None or s.answered_ns > at_ns for s in self.sent)

    @property
    def unanswered(self) -> int:
        """Requests sent and not answered."""
        return self._unanswered

    @property
    def waiting(self) -> int:
        """Requests sent that do not run, or no longer."""
        return self._unanswered - sum(len(rank.scheduler.running) for rank in self.members)

    @property
    def free(self) -> Fraction:
        """Share of the KV blocks of all ranks that no request holds."""
        free = sum(rank.scheduler.nobodys for rank in self.members)
        return Fraction(free, len(self.members) * self.pool.blocks)

    def next_ns(self) -> int | None:
        """When somebody acts next; None where nothing is left to do."""
        return None if self._over() else self._next()[0]

    def _over(self) -> bool:
        """Whether nothing is left to do."""
        return self._unanswered == 0 and all(rank.idle and rank.inbox.due() is None for rank in self.members)

    def turn(self, now_ns: int) -> list[Sequence]:
        """Let all who are due then act, until somebody is answered; return who is."""
        self._answered = []
        at_ns, place = self._next()
        self.now = at_ns
        while at_ns == self.now and not self._answered:
            self._actors[place].act()
            if self._over():
                break
            at_ns, place = self._next()
        return self._answered

    def _next(self) -> tuple[int, int]:
        """When somebody acts next, and who."""
        soonest, place = None, 0
        for index, actor in enumerate(self._actors):
            at_ns = actor.due()
            if at_ns is not None and (soonest is None or at_ns < soonest):
                soonest, place = at_ns, index
                if at_ns <= self.now:
                    break
        assert soonest is not None
        return max(soonest, self.now), place

    # What came of it.

    @property
    def preemptions(self) -> int:
        """Of all ranks."""
        return sum(rank.preemptions for rank in self.members)

    @property
    def batches(self) -> int:
        """Of all ranks, dummies not among them."""
        return sum(rank.batches for rank in self.members)

    @property
    def cached(self) -> int:
        """Prompt tokens found when their request was first admitted."""
        return sum(rank.scheduler.cached for rank in self.members)

    @property
    def counts(self) -> BatchCounts:
        """Of all ranks, dummies not among them."""
        return sum((rank.counts for rank in self.members[1:]), self.members[0].counts)

    @property
    def shared(self) -> SharedCounts | None:
        """Of forwards in step."""
        if not self.ranks.in_step:
            return None
        (forwards,) = self.forwards
        return SharedCounts(
            decode=forwards.decode,
            split_decode=forwards.split_decode,
            split_mixed=forwards.split_mixed,
            mixed=forwards.mixed,
            eager=forwards.eager,
            dummies=sum(rank.dummies for rank in self.members),
            draft=forwards.draft,
        )

    @property
    def busy_ns(self) -> list[int]:
        """Of each stage; of ranks on their own the busiest of each."""
        return [max(times) for times in zip(*(forwards.busy_ns for forwards in self.forwards), strict=True)]

    @property
    def steps(self) -> list[Step] | None:
        """Batches, rank by rank."""
        return [step for rank in self.members for step in rank.logged()] if self.log else None

    def logged(self) -> GroupLog:
        """What else there is to tell."""
        return GroupLog(
            rank=self.rank_of,
            preemptions=[rank.preemptions for rank in self.members],
            batches=[rank.batches for rank in self.members],
            dummies=[rank.dummies for rank in self.members],
            forwards=[[(f.start, f.end, f.mode, f.padded) for f in forwards.done] for forwards in self.forwards],
            publications=self.publications,
            waves_started=self.waves_started,
            waves_ended=self.waves_ended,
        )

    # Arrivals.

    def due(self) -> int | None:
        """When the next request arrives."""
        return self._arrivals[0].arrival_ns if self._arrivals else None

    def act(self) -> None:
        """A request arrives at the front end whose turn it is."""
        place = None if self.ranks.balanced else self._arrived % self.ranks.count
        self._fronts[self._arrived % len(self._fronts)].arrive(self._arrivals.popleft(), place)
        self._arrived += 1

    # Messages.

    def send(self, sequence: Sequence, rank: int, wave: int) -> None:
        """Send a request to a rank.

        Parameters
        ----------
        sequence : Sequence    the request
        rank : int
        wave : int             that its front end knows
        """
        self.rank_of[sequence.id] = rank
        self.members[rank].inbox.put(self.now + self.ranks.send_ns, Request(sequence, wave))

    def first_request(self, rank: int, wave: int) -> None:
        """Tell the coordinator that a request was sent to ranks that do not run."""
        if self._coordinator:
            self._coordinator.from_front.put(self.now + self.ranks.control_ns, (rank, wave))

    def publish(self, known: Known) -> None:
        """Tell all front ends."""
        for front in self._fronts:
            front.news.put(self.now + self.ranks.control_ns, known)

    def start(self, start: Start) -> None:
        """Tell all ranks that a wave starts."""
        for rank in self.members:
            rank.inbox.put(self.now + self.ranks.control_ns, start)

    def tell(self, message: Counts | Ended | Wanted) -> None:
        """Tell the coordinator."""
        assert self._coordinator is not None
        self._coordinator.from_ranks.put(self.now + self.ranks.control_ns, message)

    def vote(self, unfinished: bool) -> Vote:
        """A rank says whether it has requests; what all say together."""
        vote = self._vote
        vote.said += 1
        vote.any |= unfinished
        if vote.said == self.ranks.count:
            vote.last_ns = self.now
            self._vote = Vote()
        return vote

    def answer(self, answered: list[Sequence]) -> None:
        """Requests got their last token."""
        for sequence in answered:
            sequence.answered_ns = self.now
        self._answered += answered
        self._unanswered -= len(answered)
