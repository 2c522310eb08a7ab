"""One replica: when batches are formed, and when they finish."""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from typing import TYPE_CHECKING

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.simulator.outcome import BatchCounts
from apex_opt.simulator.reference.hybrid import GroupedScheduler, GroupedSpeculativeScheduler
from apex_opt.simulator.reference.schedulers import SCHEDULERS
from apex_opt.simulator.reference.speculative import SpeculativeScheduler
from apex_opt.simulator.reference.trtllm import TrtllmScheduler

if TYPE_CHECKING:
    from apex_opt.simulator.outcome import SharedCounts, Step
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.reference.schedulers import Scheduler
    from apex_opt.simulator.reference.sequence import Batch, Sequence


def scheduler_of(pool: EnginePool) -> Scheduler:
    """The scheduler of a replica, by its policy, drafts and groups of layers."""
    settings, drafts = pool.settings, pool.settings.speculation is not None
    if settings.kv_groups:
        grouped = GroupedSpeculativeScheduler if drafts else GroupedScheduler
        return grouped(settings, pool.blocks)
    if isinstance(settings.scheduler, TrtllmScheduling):
        return TrtllmScheduler(settings, pool.blocks, len(pool.laws))
    return (SpeculativeScheduler if drafts else SCHEDULERS[settings.scheduler.name])(settings, pool.blocks)


class Engine:
    """A scheduler, and a pipeline of stages with up to `depth` batches in flight.

    A stage runs one batch at a time, in order. Whoever deals requests asks an engine when its next turn starts
    (`next_ns`), lets it take that (`turn`), sends requests (`add`) and counts those unanswered (`outstanding`).

    Source: the engine core's `step_with_batch_queue` of vLLM 0.20.2.
    """

    def __init__(self, pool: EnginePool, *, log: bool, scheduler: type[Scheduler] | None = None) -> None:
        self.scheduler = scheduler(pool.settings, pool.blocks) if scheduler else scheduler_of(pool)
        self.draft_tokens = pool.settings.speculation.draft_tokens if pool.settings.speculation else 0
        self.laws, self.pool_blocks = pool.laws, pool.blocks
        self.seats = pool.settings.max_num_seqs * pool.schedulers
        self.launches = pool.settings.scheduler.launches
        self._sleep_ns = pool.settings.scheduler.idle_sleep_ns
        self.depth = pool.settings.depth(len(pool.laws))
        self.now = 0
        self.stage_free = [0] * len(pool.laws)
        self.queue: deque[tuple[int, Batch]] = deque()
        self.arrivals: deque[Sequence] = deque()
        self.sent: list[Sequence] = []
        self.preemptions = 0
        self.batches = 0
        self.shared: SharedCounts | None = None
        self.busy_ns = [0] * len(pool.laws)
        self.windows = pool.laws[0].windows
        self.counts = BatchCounts.empty(pool.settings, len(self.windows))
        self.steps: list[Step] | None = [] if log else None
        self.formed: list[Batch] = []

    def add(self, sequence: Sequence, at_ns: int) -> None:
        """Send a request; arrivals must come in order of time."""
        sequence.arrival_ns = at_ns
        self.arrivals.append(sequence)
        self.sent.append(sequence)

    def outstanding(self, at_ns: int) -> int:
        """Requests sent and not answered by `at_ns`, once the engine has taken all turns before it."""
        return sum(s.answered_ns is None or s.answered_ns > at_ns for s in self.sent)

    @property
    def unanswered(self) -> int:
        """Requests sent and not answered, as the engine has them."""
        return sum(s.answered_ns is None for s in self.sent)

    @property
    def waiting(self) -> int:
        """Requests sent that do not run, or no longer."""
        return len(self.arrivals) + self.scheduler.queued

    @property
    def free(self) -> Fraction:
        """Share of the KV blocks that no request holds."""
        return Fraction(self.scheduler.nobodys, self.pool_blocks)

    @property
    def cached(self) -> int:
        """Prompt tokens found when their request was first admitted."""
        return self.scheduler.cached

    def next_ns(self) -> int | None:
        """When the next turn starts; None where nothing is left to do."""
        if self.scheduler.unfinished:
            return self.scheduler.fetched_ns(self.now, self.arrivals)
        if self.queue and not (self.arrivals and self.arrivals[0].arrival_ns <= self.now):
            return self.now
        if not self.arrivals:
            return None
        return self.scheduler.fetched_ns(max(self.now, self.arrivals[0].arrival_ns), self.arrivals)

    def turn(self, now_ns: int) -> list[Sequence]:
        """Form a batch and, unless there is room for another in flight, take in the oldest; return who is answered."""
        self.receive(now_ns)
        executed = False
        if self.scheduler.unfinished or (self.scheduler.unreported and self.queue):
            executed = bool(self.launch().rows)
            if executed and self.may_form_another():
                return []
        return self.take_in(executed=executed)

    def receive(self, now_ns: int) -> None:
        """Let the clock come to `now_ns`, and the requests that have arrived by then wait."""
        self.now = now_ns
        while self.arrivals and self.arrivals[0].arrival_ns <= now_ns:
            self.scheduler.waiting.append(self.arrivals.popleft())

    def launch(self) -> Batch:
        """Form a batch, even an empty one, and run it behind those in flight."""
        batch = self.scheduler.schedule()
        self.preemptions += len(batch.preempted)
        self.queue.append((self._run(batch), batch))
        self.now += self.launching_ns(batch)
        return batch

    def launching_ns(self, batch: Batch) -> int:
        """How long the loop launches a batch and sees nothing else."""
        if not self.launches:
            return 0
        return self.laws[0].launching_ns([(row.tokens, row.computed_after) for row in batch.rows])

    def may_form_another(self) -> bool:
        """Whether there is room for a further batch in flight while the oldest runs.

        A loop that launches batches itself takes the oldest in after it has launched the next one, whenever that ended.
        """
        return len(self.queue) < self.depth and (self.launches or self.queue[0][0] > self.now)

    def take_in(self, *, executed: bool) -> list[Sequence]:
        """Wait for the oldest batch and take in its tokens; return who is answered.

        After a turn that has `executed` nothing the loop sleeps while there are requests.
        """
        finish_ns, batch = self.queue.popleft()
        self.now = max(self.now, finish_ns)
        answered = self.scheduler.update(batch, self.now)
        for sequence in answered:
            sequence.answered_ns = self.now
        if not executed and self.scheduler.unfinished:
            self.now += self._sleep_ns
        return answered

    def _run(self, batch: Batch) -> int:
        """Pass a batch through the stages; return when it leaves the last one."""
        if not batch.rows:
            return self.now
        chunks = [(row.tokens, row.computed_after) for row in batch.rows]
        tokens, yields = sum(c for c, _ in chunks), self.scheduler.drafts(batch)
        end = self.now
        for stage, law in enumerate(self.laws):
            duration = law.batch_ns(chunks, yields=yields)
            end = max(end, self.stage_free[stage]) + duration
            self.stage_free[stage] = end
            self.busy_ns[stage] += duration
            if stage + 1 < len(self.laws):
                end += int(law.transfer_ns[tokens])
        self.batches += 1
        self.counts.add(chunks, draft_tokens=self.draft_tokens, yields=yields, windows=self.windows)
        if self.steps is not None:
            rows = [(row.sequence.id, row.tokens, row.computed_after) for row in batch.rows]
            self.steps.append((self.now, end, rows, sorted(batch.preempted)))
            self.formed.append(batch)
        return end
