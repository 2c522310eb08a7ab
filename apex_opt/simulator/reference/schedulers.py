"""What is in a batch: one class per scheduler.

Source of the rules: `Scheduler.schedule`, `_preempt_request`, `update_from_output` and `AsyncScheduler` of vLLM 0.20.2,
in our own words; where a scheduler departs from them its class names its own.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from apex_opt.simulator.reference.blocks import BlockManager, PrefixCachingManager
from apex_opt.simulator.reference.sequence import Batch, Row

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.reference.sequence import Sequence


class Scheduler:
    """Forms batches out of running and waiting sequences over the KV blocks: running ones first, then waiting ones.

    What policies differ in are hooks: `wanted`, `split`, `ahead`, `allocate`, `found`, `admitted`, `room`, `reserved`,
    `fetched_ns`, `place`, `opens`, `launch`, `receive`, `learn`, `drafts`, `complete` and `give_back`. Here they are
    those of vLLM V1.
    """

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        self.settings = settings
        kind = PrefixCachingManager if settings.prefix_caching else BlockManager
        self.blocks = kind(blocks, settings.block_size)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.leaving: list[Sequence] = []  # on their way to another replica, in no further batch
        self.cached = 0  # prompt tokens found when their request was first admitted
        self.unreported = False  # somebody ended since the last batch was formed; the workers learn of it with the next

    # Hooks.

    def wanted(self, sequence: Sequence) -> int:
        """Tokens a running sequence has ready to compute, under the per-request limits."""
        raise NotImplementedError

    def ahead(self, held: int) -> int:
        """Tokens whose blocks a running sequence needs for a row after which it holds so many."""
        return held

    def found(self, sequence: Sequence) -> list[int]:
        """Blocks that a waiting sequence need not compute."""
        return self.blocks.found(sequence)

    def admitted(self, tokens: int, budget: int) -> int:
        """Tokens that a waiting sequence computes first, of so many it has to compute; 0 where it has to wait."""
        raise NotImplementedError

    def room(self, sequence: Sequence) -> int:
        """Tokens that must fit for a waiting sequence to be admitted."""
        raise NotImplementedError

    def fetched_ns(self, start_ns: int, arrivals: deque[Sequence]) -> int:
        """When a turn that starts then has taken requests in that arrive, in order: at once."""
        return start_ns

    def reserved(self, sequence: Sequence) -> int:
        """Tokens whose blocks an admitted sequence gets at once, where these are more than it computes first."""
        return 0

    def split(self, sequence: Sequence, computed: int, tokens: int) -> int:
        """Tokens of a row that has room for so many.

        Parameters
        ----------
        sequence : Sequence    the request
        computed : int         its tokens computed before the row
        tokens : int           there is room for
        """
        return tokens

    def allocate(self, sequence: Sequence, tokens: int) -> bool:
        """Hand a running sequence the blocks for so many more tokens; False where too few are free."""
        ahead = self.ahead(sequence.computed + tokens)
        if self.blocks.needed(sequence, ahead) > self.blocks.free:
            return False
        self.blocks.take(sequence, ahead)
        return True

    def place(self, sequence: Sequence, budget: int) -> int:
        """Hand a waiting sequence what is found and the blocks for the tokens it computes first, which are returned.

        0 where it has to wait.
        """
        found = self.found(sequence)
        cached = len(found) * self.settings.block_size
        tokens = self.admitted(sequence.known - cached, budget)
        if tokens == 0 or self.blocks.needed(sequence, self.room(sequence), found) > self.blocks.free:
            return 0
        sequence.computed = cached
        self.blocks.take(sequence, max(cached + tokens, self.reserved(sequence)), found)
        return tokens

    def opens(self) -> bool:
        """Whether waiting sequences are admitted to a batch in which nobody had to give way."""
        return True

    def launch(self, row: Row) -> None:
        """A row is scheduled."""
        if row.yields and self.settings.async_scheduling:
            row.sequence.in_flight += 1

    def receive(self, row: Row) -> int:
        """What a row that yields brings its sequence: how many tokens."""
        if self.settings.async_scheduling:
            row.sequence.in_flight -= 1
        return 1

    def learn(self, sequence: Sequence) -> None:
        """Tokens of a sequence are known: those that were unknown when they were scheduled give blocks content."""
        if self.settings.async_scheduling:
            self.blocks.register(sequence, sequence.computed - sequence.in_flight)

    def drafts(self, batch: Batch) -> bool:
        """Whether a batch makes drafts, where any are made."""
        return any(row.yields for row in batch.rows)

    def complete(self, sequence: Sequence) -> list[Sequence]:
        """A sequence has all its tokens; who is answered."""
        self.leave(sequence)
        return [sequence]

    def give_back(self, sequence: Sequence) -> None:
        """The blocks of a sequence that is answered are free again."""
        self.blocks.release(sequence)

    # What schedulers share.

    @property
    def unfinished(self) -> bool:
        """Whether there is a request that is not answered."""
        return bool(self.running or self.waiting)

    @property
    def nobodys(self) -> int:
        """KV blocks that no request holds."""
        return self.blocks.free

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting)

    def schedule(self) -> Batch:
        """Form one batch: running sequences first, then waiting ones, within the token budget."""
        self.unreported = False
        batch = Batch(self.settings.max_num_batched_tokens)
        self.schedule_running(batch)
        if not batch.preempted and self.opens():
            self.schedule_waiting(batch)
        batch.free = self.blocks.free
        return batch

    def schedule_running(self, batch: Batch) -> None:
        """Give every running sequence the tokens it wants; preempt from the tail where blocks run out."""
        index = 0
        while index < len(self.running) and batch.budget > 0:
            sequence = self.running[index]
            index += 1
            tokens = self.split(sequence, sequence.computed, min(self.wanted(sequence), batch.budget))
            if tokens <= 0:
                continue
            while not self.allocate(sequence, tokens):
                victim = self.running.pop()
                self.preempt(victim)
                batch.preempted.append(victim.id)
                if victim is sequence:
                    return
            self.enter(batch, sequence, tokens)

    def schedule_waiting(self, batch: Batch) -> None:
        """Admit waiting sequences in order until one does not fit."""
        while self.waiting and self.seats(batch) and self.admit(batch, self.waiting[0]):
            pass

    def seats(self, batch: Batch) -> bool:
        """Whether a further sequence can be admitted to a batch."""
        return batch.budget > 0 and len(self.running) + len(self.leaving) < self.settings.max_num_seqs

    def admit(self, batch: Batch, sequence: Sequence) -> bool:
        """Admit the first waiting sequence, if it fits."""
        tokens = self.place(sequence, batch.budget)
        if tokens == 0:
            return False
        self.waiting.popleft()
        self.running.append(sequence)
        if not sequence.admitted:
            self.cached += sequence.computed
            sequence.admitted = True
        self.enter(batch, sequence, tokens)
        return True

    def enter(self, batch: Batch, sequence: Sequence, tokens: int) -> None:
        """Enter a sequence, which has the blocks for it, into the batch.

        Parameters
        ----------
        batch : Batch          that is being formed
        sequence : Sequence    the request
        tokens : int           that it computes in the batch
        """
        sequence.computed += tokens
        self.blocks.register(sequence, min(sequence.computed, sequence.known))
        beyond = sequence.computed - sequence.known - sequence.in_flight
        row = Row(sequence, tokens, sequence.computed, yields=beyond >= 0, drafts=max(0, beyond))
        self.launch(row)
        batch.rows.append(row)
        batch.budget -= tokens

    def preempt(self, sequence: Sequence) -> None:
        """Take all blocks away; the sequence waits in front and will compute everything again."""
        self.blocks.release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)

    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        """Take in the tokens of a batch that finishes now; return who is answered."""
        answered: list[Sequence] = []
        for row in batch.rows:
            sequence = row.sequence
            if not row.yields or sequence.finished:
                continue
            row.got = self.receive(row)
            sequence.generated += row.got
            sequence.token_ns += [now_ns] * row.got
            self.learn(sequence)
            if sequence.generated == sequence.limit:
                answered += self.complete(sequence)
        return answered

    def leave(self, sequence: Sequence) -> None:
        """A sequence is answered: it gives back its blocks, from wherever it is."""
        sequence.finished = True
        self.give_back(sequence)
        next(its for its in (self.running, self.waiting, self.leaving) if sequence in its).remove(sequence)
        self.unreported = True


class VllmScheduler(Scheduler):
    """Iteration by iteration, prompts in chunks, preemption from the tail where blocks run out (vLLM V1)."""

    def wanted(self, sequence: Sequence) -> int:
        settings = self.settings
        coming = sequence.in_flight
        if coming > 0 and sequence.computed + 2 - coming >= sequence.prompt + sequence.output:
            return 0  # its last token is already on the way
        tokens = sequence.known + coming + sequence.proposed - sequence.computed
        if threshold := self.settings.scheduler.prompt_threshold:
            tokens = min(tokens, threshold)
        return min(tokens, settings.max_model_len - 1 - sequence.computed)

    def admitted(self, tokens: int, budget: int) -> int:
        if threshold := self.settings.scheduler.prompt_threshold:
            tokens = min(tokens, threshold)
        if tokens > budget:
            return budget if self.settings.chunked_prefill else 0
        return tokens

    def room(self, sequence: Sequence) -> int:
        """All that it knows, also where it will compute a part of that first."""
        return sequence.known


class OrcaScheduler(Scheduler):
    """Whole prompts; blocks for prompt and output are reserved at admission, so that nobody is ever preempted.

    Source: Yu et al., "Orca: A Distributed Serving System for Transformer-Based Generative Models", OSDI 2022,
    algorithm 1, with the token budget of the batch as a further limit.
    """

    def wanted(self, sequence: Sequence) -> int:
        """One token, where it is not on its way already."""
        return int(sequence.computed < min(sequence.known + sequence.in_flight, self.room(sequence)))

    def admitted(self, tokens: int, budget: int) -> int:
        return tokens if tokens <= budget else 0

    def room(self, sequence: Sequence) -> int:
        return sequence.prompt + sequence.limit - 1  # the last token is never computed

    def reserved(self, sequence: Sequence) -> int:
        return self.room(sequence)


class StaticScheduler(OrcaScheduler):
    """Request-level batching: formed when nothing runs, answered together when the longest request is done.

    A sequence with all its tokens goes on computing one token over the same context until then.
    Source: the baseline of the Orca paper, section 2.
    """

    def opens(self) -> bool:
        return not self.running

    def schedule_running(self, batch: Batch) -> None:
        for sequence in self.running:
            if sequence.generated < sequence.limit:
                self.enter(batch, sequence, 1)
            else:
                batch.rows.append(Row(sequence, 1, sequence.computed, False))
                batch.budget -= 1

    def complete(self, sequence: Sequence) -> list[Sequence]:
        together = list(self.running)
        if any(other.generated < other.limit for other in together):
            return []
        for other in together:
            self.leave(other)
        return together


SCHEDULERS: Final[Mapping[str, type[Scheduler]]] = {
    "vllm": VllmScheduler,
    "sglang": VllmScheduler,
    "orca": OrcaScheduler,
    "static": StaticScheduler,
}
