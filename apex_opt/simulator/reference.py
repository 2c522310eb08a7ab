"""The engine's batching, in plain Python: the specification that the compiled kernel must equal.

The rules are those of vLLM V1 (`Scheduler`, `AsyncScheduler` and the engine core's batch queue, read in the PyPI
package vllm 0.20.2) and are settled by batches recorded from that scheduler. All times are integer nanoseconds.

Three pieces: `Scheduler` decides what is in a batch, `Engine` decides when batches are formed and when they finish,
`simulate` deals requests to the engines of all replicas.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.content import BlockContent
from apex_opt.simulator.law import clock_overflow
from apex_opt.simulator.outcome import BatchCounts, Outcome
from apex_opt.simulator.pool import BlockPool, PrefixCachingPool
from apex_opt.simulator.stop import latencies_ns

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from numpy.typing import NDArray

    from apex_opt.plan.engine import EngineSettings
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.outcome import Routing
    from apex_opt.simulator.stop import Stop
    from apex_opt.workload.trace import Trace


@dataclass(slots=True, eq=False)
class Sequence:
    """One request on its way through the engine."""

    id: int
    prompt: int
    output: int
    limit: int  # tokens it will generate: its output, or fewer where the model's length ends it
    computed: int = 0
    generated: int = 0
    in_flight: int = 0  # tokens to come from batches that have not finished
    blocks: int = 0
    finished: bool = False
    admitted: bool = False  # it has been in a batch, though it may have been preempted since
    keys: list[int] = field(default_factory=list)  # content of its full blocks, prefix included; for prefix caching
    table: list[int] = field(default_factory=list)  # the blocks themselves
    registered: int = 0  # blocks whose content can be found by others
    token_ns: list[int] = field(default_factory=list)  # when each of its tokens came

    @property
    def known(self) -> int:
        """Tokens that exist: the prompt and what has been generated."""
        return self.prompt + self.generated


@dataclass(slots=True)
class Row:
    """One sequence's share of a batch."""

    sequence: Sequence
    tokens: int
    computed_after: int
    yields: bool


@dataclass(slots=True)
class Batch:
    rows: list[Row] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)


class Scheduler:
    """Forms batches out of running and waiting sequences over a pool of KV blocks."""

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        self.settings = settings
        kind = PrefixCachingPool if settings.prefix_caching else BlockPool
        self.pool = kind(blocks, settings.block_size)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.cached = 0  # prompt tokens found when their request was first admitted
        self.unreported = False  # somebody ended since the last batch was formed; the workers learn of it with the next

    def schedule(self) -> Batch:
        """Form one batch: running sequences first, then waiting ones, within the token budget."""
        self.unreported = False
        batch = Batch()
        budget = self._schedule_running(batch, self.settings.max_num_batched_tokens)
        if not batch.preempted:
            self._schedule_waiting(batch, budget)
        return batch

    def _schedule_running(self, batch: Batch, budget: int) -> int:
        """Give every running sequence the tokens it wants; preempt from the tail where blocks run out."""
        index = 0
        while index < len(self.running) and budget > 0:
            sequence = self.running[index]
            tokens = min(self._wanted(sequence), budget)
            if tokens <= 0:
                index += 1
                continue
            while self.pool.needed(sequence, sequence.computed + tokens) > self.pool.free:
                victim = self.running.pop()
                self._preempt(victim)
                batch.preempted.append(victim.id)
                if victim is sequence:
                    return budget
            self._enter(batch, sequence, tokens, ())
            budget -= tokens
            index += 1
        return budget

    def _wanted(self, sequence: Sequence) -> int:
        """Tokens a running sequence has ready to compute, under the per-request limits."""
        settings = self.settings
        coming = sequence.in_flight
        if coming > 0 and sequence.computed + 2 - coming >= sequence.prompt + sequence.output:
            return 0  # its last token is already on the way
        tokens = sequence.known + coming - sequence.computed
        if settings.long_prefill_token_threshold:
            tokens = min(tokens, settings.long_prefill_token_threshold)
        return min(tokens, settings.max_model_len - 1 - sequence.computed)

    def _schedule_waiting(self, batch: Batch, budget: int) -> None:
        """Admit waiting sequences in order until one does not fit."""
        settings = self.settings
        while self.waiting and budget > 0 and len(self.running) < settings.max_num_seqs:
            sequence = self.waiting[0]
            found = self.pool.found(sequence)
            computed = len(found) * settings.block_size
            tokens = sequence.known - computed
            if settings.long_prefill_token_threshold:
                tokens = min(tokens, settings.long_prefill_token_threshold)
            if tokens > budget:
                if not settings.chunked_prefill:
                    return
                tokens = budget
            if self.pool.needed(sequence, sequence.known, found) > self.pool.free:
                return
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.computed = computed
            if not sequence.admitted:
                self.cached += computed
                sequence.admitted = True
            self._enter(batch, sequence, tokens, found)
            budget -= tokens

    def _enter(self, batch: Batch, sequence: Sequence, tokens: int, found: Seq[int]) -> None:
        """Enter a sequence into the batch and hand it the blocks its tokens need beyond those found."""
        sequence.computed += tokens
        self.pool.take(sequence, sequence.computed, found)
        self.pool.register(sequence, min(sequence.computed, sequence.known))
        yields = sequence.computed >= sequence.known + sequence.in_flight
        if yields and self.settings.async_scheduling:
            sequence.in_flight += 1
        batch.rows.append(Row(sequence, tokens, sequence.computed, yields))

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks away; the sequence waits in front and will compute everything again."""
        self.pool.release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)

    def update(self, batch: Batch, now_ns: int) -> tuple[list[int], list[int]]:
        """Take in the tokens of a batch that finishes now; return who got a first token and who ended."""
        first: list[int] = []
        ended: list[int] = []
        for row in batch.rows:
            sequence = row.sequence
            if not row.yields or sequence.finished:
                continue
            if self.settings.async_scheduling:
                sequence.in_flight -= 1
            if sequence.generated == 0:
                first.append(sequence.id)
            sequence.generated += 1
            sequence.token_ns.append(now_ns)
            if self.settings.async_scheduling and sequence.table:
                # Tokens were unknown when they were scheduled; now their blocks have content.
                self.pool.register(sequence, sequence.computed - sequence.in_flight)
            if sequence.generated == sequence.limit:
                ended += self._complete(sequence)
        return first, ended

    def _complete(self, sequence: Sequence) -> list[int]:
        """A sequence has all its tokens; return who is answered."""
        self._leave(sequence)
        return [sequence.id]

    def _leave(self, sequence: Sequence) -> None:
        sequence.finished = True
        self.pool.release(sequence)
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.unreported = True


class OrcaScheduler(Scheduler):
    """Whole prompts; blocks for prompt and output are reserved at admission, so that nobody is ever preempted.

    Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022,
    algorithm 1, with the token budget of the batch as a further limit.
    """

    def _schedule_waiting(self, batch: Batch, budget: int) -> None:
        while self.waiting and len(self.running) < self.settings.max_num_seqs:
            sequence = self.waiting[0]
            held = sequence.prompt + sequence.limit - 1  # the last token is never computed
            if sequence.known > budget or self.pool.needed(sequence, held) > self.pool.free:
                return
            self.waiting.popleft()
            self.running.append(sequence)
            self.pool.take(sequence, held)
            self._enter(batch, sequence, sequence.known, ())
            budget -= sequence.known

    def _wanted(self, sequence: Sequence) -> int:
        """One token, where it is not on its way already."""
        return int(sequence.computed < min(sequence.known + sequence.in_flight, sequence.prompt + sequence.limit - 1))


class StaticScheduler(OrcaScheduler):
    """Request-level batching: formed when nothing runs, answered together when the longest request is done.

    A sequence with all its tokens goes on computing one token over the same context until then.
    Source: the baseline of the Orca paper, section 2.
    """

    def _schedule_waiting(self, batch: Batch, budget: int) -> None:
        if not self.running:
            super()._schedule_waiting(batch, budget)

    def _schedule_running(self, batch: Batch, budget: int) -> int:
        for sequence in self.running:
            self._enter(batch, sequence, 1, ())
        return budget - len(self.running)

    def _enter(self, batch: Batch, sequence: Sequence, tokens: int, found: Seq[int]) -> None:
        if sequence.generated < sequence.limit:
            super()._enter(batch, sequence, tokens, found)
        else:
            batch.rows.append(Row(sequence, 1, sequence.computed, False))

    def _complete(self, sequence: Sequence) -> list[int]:
        together = list(self.running)
        if any(other.generated < other.limit for other in together):
            return []
        for other in together:
            self._leave(other)
        return [other.id for other in together]


SCHEDULERS = {"vllm": Scheduler, "orca": OrcaScheduler, "static": StaticScheduler}


class Engine:
    """One replica: a scheduler, and a pipeline of stages with up to `depth` batches in flight.

    `depth` is the number of stages; on one stage 2 where the next batch is scheduled while the last one runs, else 1.
    Static batching has nothing to schedule while a batch runs, so there it is 1.
    A stage runs one batch at a time in order.
    """

    def __init__(self, settings: EngineSettings, blocks: int, laws: Seq[BatchLaw], log: bool) -> None:
        self.scheduler = SCHEDULERS[settings.policy](settings, blocks)
        self.settings = settings
        self.laws = laws
        self.depth = len(laws) if len(laws) > 1 else (2 if settings.async_scheduling else 1)
        if settings.policy == "static":
            self.depth = 1
        self.now = 0
        self.stage_free = [0] * len(laws)
        self.queue: deque[tuple[int, Batch]] = deque()
        self.arrivals: deque[tuple[int, Sequence]] = deque()
        self.backlog: deque[Sequence] = deque()  # closed loop: sent one by one, each when another is answered
        self.arrival_ns: dict[int, int] = {}
        self.first_token_ns: dict[int, int] = {}
        self.finish_ns: dict[int, int] = {}
        self.preemptions = 0
        self.batches = 0
        self.busy_ns = [0] * len(laws)
        self.counts = BatchCounts.empty(settings)
        self.steps: list[tuple[int, int, list[tuple[int, int, int]], list[int]]] | None = [] if log else None

    def add(self, arrival_ns: int, sequence: Sequence) -> None:
        """Send a request; arrivals must come in order of time."""
        self.arrival_ns[sequence.id] = arrival_ns
        self.arrivals.append((arrival_ns, sequence))

    def outstanding(self, at_ns: int) -> int:
        """Requests sent and not answered by `at_ns`, once the engine has advanced to it."""
        return len(self.arrival_ns) - sum(finish <= at_ns for finish in self.finish_ns.values())

    def advance(self, until_ns: int | None = None) -> None:
        """Take every turn that starts before `until_ns` (None: all)."""
        scheduler = self.scheduler
        while self.arrivals or scheduler.running or scheduler.waiting or self.queue:
            idle = not (scheduler.running or scheduler.waiting)
            if idle and not self.queue:
                self.now = max(self.now, self.arrivals[0][0])
            if until_ns is not None and self.now >= until_ns:
                break
            while self.arrivals and self.arrivals[0][0] <= self.now:
                scheduler.waiting.append(self.arrivals.popleft()[1])
            if scheduler.running or scheduler.waiting or (scheduler.unreported and self.queue):
                batch = scheduler.schedule()
                self.preemptions += len(batch.preempted)
                self.queue.append((self._run(batch), batch))
                if batch.rows and len(self.queue) < self.depth and self.queue[0][0] > self.now:
                    continue
            finish_ns, batch = self.queue.popleft()
            self.now = max(self.now, finish_ns)
            first, done = scheduler.update(batch, self.now)
            self.first_token_ns.update(dict.fromkeys(first, self.now))
            self.finish_ns.update(dict.fromkeys(done, self.now))
            for _ in done[: len(self.backlog)]:
                self.add(self.now, self.backlog.popleft())

    def _run(self, batch: Batch) -> int:
        """Pass a batch through the stages; return when it leaves the last one."""
        if not batch.rows:
            return self.now
        chunks = [(row.tokens, row.computed_after) for row in batch.rows]
        tokens = sum(c for c, _ in chunks)
        end = self.now
        for stage, law in enumerate(self.laws):
            duration = law.batch_ns(chunks)
            end = max(end, self.stage_free[stage]) + duration
            self.stage_free[stage] = end
            self.busy_ns[stage] += duration
            if stage + 1 < len(self.laws):
                end += int(law.transfer_ns[tokens])
        self.batches += 1
        self.counts.add(chunks)
        if self.steps is not None:
            rows = [(row.sequence.id, row.tokens, row.computed_after) for row in batch.rows]
            self.steps.append((self.now, end, rows, sorted(batch.preempted)))
        return end


def simulate(
    settings: EngineSettings,
    blocks: int,
    laws: Seq[BatchLaw],
    trace: Trace,
    *,
    replicas: int = 1,
    routing: Routing = "round_robin",
    log: bool = False,
    gaps: bool = False,
    stops: Seq[Stop] = (),
) -> Outcome:
    """Run a trace on identical replicas; see `apex_opt.simulator.api.simulate` for the parameters."""
    engines = [Engine(settings, blocks, laws, log) for _ in range(replicas)]
    sequences = [
        Sequence(id=i, prompt=p, output=o, limit=min(o, settings.max_model_len - p))
        for i, (p, o) in enumerate(zip(trace.prompt.tolist(), trace.output.tolist(), strict=True))
    ]
    if settings.prefix_caching:
        content = BlockContent.of(trace, settings.block_size, [s.limit for s in sequences])
        for sequence in sequences:
            sequence.keys = content.keys(sequence.id)
    if trace.concurrency is not None:
        # Clients stay with their replica: client j on replica j mod R; requests are dealt out in turn.
        active = min(replicas, trace.concurrency)
        for sequence in sequences:
            engines[sequence.id % active].backlog.append(sequence)
        for client in range(min(trace.concurrency, len(sequences))):
            engine = engines[client % active]
            engine.add(0, engine.backlog.popleft())
    else:
        for arrival_ns, sequence in zip(trace.arrival_ns.tolist(), sequences, strict=True):
            if routing == "round_robin":
                engine = engines[sequence.id % replicas]
            else:
                for engine in engines:
                    engine.advance(arrival_ns)
                engine = min(engines, key=lambda e: e.outstanding(arrival_ns))
            engine.add(arrival_ns, sequence)
    for engine in engines:
        engine.advance()
    outcome = _outcome(engines, len(sequences))
    # Limits only get closer as requests are answered: cut short is what would have passed one in the end.
    times = outcome.arrival_ns, outcome.first_token_ns, outcome.finish_ns
    generated = np.array([sequence.limit for sequence in sequences])
    stopped = any(stop.passed(latencies_ns(stop.metric, *times, generated)) for stop in stops)
    between = [b - a for s in sequences for a, b in pairwise(s.token_ns)]
    return replace(outcome, stopped=stopped, gaps_ns=np.array(between, np.int64) if log or gaps else None)


def _outcome(engines: Seq[Engine], requests: int) -> Outcome:
    """Put the replicas' results together, requests in their own order."""

    if any(engine.now >= 1 << 62 for engine in engines):
        raise clock_overflow()

    def column(name: str) -> NDArray[np.int64]:
        values = np.zeros(requests, np.int64)
        for engine in engines:
            times: dict[int, int] = getattr(engine, name)
            values[list(times.keys())] = list(times.values())
        return values

    steps = None if engines[0].steps is None else [step for engine in engines for step in engine.steps or ()]
    return Outcome(
        arrival_ns=column("arrival_ns"),
        first_token_ns=column("first_token_ns"),
        finish_ns=column("finish_ns"),
        preemptions=sum(e.preemptions for e in engines),
        cached_tokens=sum(e.scheduler.cached for e in engines),
        batches=sum(e.batches for e in engines),
        busy_ns=np.array([e.busy_ns for e in engines], np.int64),
        counts=sum((e.counts for e in engines[1:]), engines[0].counts),
        steps=steps,
        steps_per_replica=None if steps is None else [len(engine.steps or ()) for engine in engines],
    )
