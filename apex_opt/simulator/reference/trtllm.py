"""What is in a batch of TensorRT-LLM: who has memory, then who has tokens, then whether prompts wait.

Source of the rules: NVIDIA/TensorRT-LLM, read and not run: `tensorrt_llm/_torch/pyexecutor/py_executor.py` of the
1.1/1.2 line [A], `_torch/pyexecutor/scheduler/scheduler.py` at commit 002f3cc3 [B], `cpp/tensorrt_llm/batch_manager/
capacityScheduler.cpp` and `kvCacheManager.cpp` [C], in our own words. Nothing was recorded of it. `reference.reuse` has
which blocks hold what. Assumed:

- a request whose last token is on its way is not scheduled once more, as in [B]; a turn that schedules nothing then
  takes in the batch on its way, without which that token would never be told;
- with its first tokens a prompt takes the blocks of all of it;
- on several stages a request takes part in one batch at a time, and only requests in none are paused;
- a request that decodes has as many drafts in every batch as may follow a token (fewer are padded), which count as
  right until their batch is done; what it holds beyond its end takes no blocks;
- a prompt is charged for what it computes of it: not for whole blocks that are cached, but for the last token in any
  case, where [B] charges one token for a prompt all of whose blocks are cached, and chunks are counted from what is
  cached on;
- who is in the middle of a prompt goes on, also where one before it, which waited for what another computes, has no
  room: the sources would look at that one first, and at nobody behind it, for ever if nobody decodes;
- with MAX_UTILIZATION a prompt needs blocks for all of it, also for what is cached, as in the 1.2 line; who gives way
  keeps what it has computed findable;
- with FORCE_CHUNK states are found wherever the block is that ends with them, and take no blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.simulator.reference.reuse import ReusedBlocks
from apex_opt.simulator.reference.schedulers import Scheduler
from apex_opt.simulator.reference.sequence import Batch, Row
from apex_opt.simulator.reference.speculative import accepted, proposed
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections import deque

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.reference.sequence import Sequence


class TrtllmScheduler(Scheduler):
    """The active requests are `running`, in the order in which they came; those beyond the most of them wait.

    Parameters
    ----------
    settings : EngineSettings
    blocks : int    KV blocks
    stages : int    of the pipeline
    """

    def __init__(self, settings: EngineSettings, blocks: int, stages: int = 1) -> None:
        super().__init__(settings, blocks)
        assert isinstance(settings.scheduler, TrtllmScheduling)
        self.own = settings.scheduler
        self.stages = stages
        self.speculation = settings.speculation
        self.each = 1 + (settings.speculation.draft_tokens if settings.speculation else 0)  # tokens of who decodes
        self.reused = ReusedBlocks(blocks, settings.block_size) if settings.prefix_caching else None
        if self.reused is not None:
            self.blocks = self.reused
        self.forces = self.own.context_chunking_policy == "FORCE_CHUNK"
        self.waited = 0  # turns in which prompts were held back
        self.flying: set[int] = set()  # requests of the batches on their way

    def schedule(self) -> Batch:
        """Form one batch."""
        batch, decoding, prompts = self.choose()
        return self.form(batch, decoding, self.held_back(decoding, prompts))

    def choose(self) -> tuple[Batch, list[Sequence], list[tuple[Sequence, int]]]:
        """A batch with who gave way to it, who decodes in it, and the prompts that may be computed in it."""
        batch = Batch(self.settings.max_num_batched_tokens)
        while self.waiting and len(self.running) < self.settings.max_num_seqs * self.stages:
            self.running.append(self.waiting.popleft())
        listed = [sequence for sequence in self.running if not self.ending(sequence)]
        chosen = self.fitting(listed, batch) if self.own.may_preempt else self.reserving(listed)
        return batch, *self.within_tokens(chosen)

    def form(self, batch: Batch, decoding: list[Sequence], prompts: list[tuple[Sequence, int]]) -> Batch:
        """Fill a batch.

        Parameters
        ----------
        batch : Batch                            as `choose` gave it
        decoding : list of Sequence              a token each, with its drafts
        prompts : list of (Sequence, int)        by how many tokens
        """
        fresh = [sequence for sequence, _ in prompts if not self.started(sequence)]
        for sequence in fresh:
            self.begin(sequence)
        for sequence in fresh:
            self.blocks.take(sequence, self.held(sequence, sequence.context))
        for sequence in decoding:
            self.enter(batch, sequence, self.each)
        for sequence, tokens in prompts:
            self.enter(batch, sequence, tokens)
        batch.free = self.blocks.free
        return batch

    def fetched_ns(self, start_ns: int, arrivals: deque[Sequence]) -> int:
        """When as many have come as a batch has seats, or after the longest wait."""
        most = self.settings.max_num_seqs
        end_ns = start_ns + self.own.fetch_wait_ns
        if len(arrivals) >= most:
            end_ns = min(end_ns, arrivals[most - 1].arrival_ns)
        return max(start_ns, end_ns)

    # What is known of a request.

    def ending(self, sequence: Sequence) -> bool:
        """Whether its last token is on its way."""
        return sequence.generated + sequence.in_flight >= sequence.limit

    def decodes(self, sequence: Sequence) -> bool:
        """Whether all of its prompt is computed, or on its way."""
        return 0 < sequence.context <= sequence.computed

    def started(self, sequence: Sequence) -> bool:
        """Whether it has blocks to give."""
        return sequence.computed > 0

    def is_free(self, sequence: Sequence) -> bool:
        """Whether it can take part in a batch: on several stages only once it is in none."""
        return self.stages == 1 or sequence.id not in self.flying

    def found(self, sequence: Sequence) -> list[int]:
        """Blocks that a sequence which has not begun need not compute: up to where states are kept as well."""
        if self.reused is None or self.started(sequence):
            return []
        found = self.reused.found(sequence)
        if self.forces and self.own.snapshot_interval:
            found = found[: len(found) - len(found) % (self.own.snapshot_interval // self.settings.block_size)]
        return found

    # Capacity: who has memory.

    def reserving(self, listed: list[Sequence]) -> list[Sequence]:
        """GUARANTEED_NO_EVICT and STATIC_BATCH: whoever has room to its end, of prompts until one has not."""
        decoding = [sequence for sequence in listed if self.decodes(sequence)]
        available = self.blocks.free - sum(self.to_end(sequence) for sequence in listed if self.started(sequence))
        if self.own.capacity_policy == "STATIC_BATCH" and decoding:
            return decoding
        chosen, coming, full = decoding, self.coming(listed), False
        for sequence in listed:
            if self.decodes(sequence):
                continue
            if not self.started(sequence):
                if full or self.better_later(sequence, coming):
                    continue
                needed = self.to_end(sequence)
                full = needed > available
                if full:
                    continue
                available -= needed
            chosen = [*chosen, sequence]
        return chosen

    def to_end(self, sequence: Sequence) -> int:
        """Free blocks that it still takes if it generates all that it says it may."""
        needed = ceil_div(sequence.prompt + sequence.stated, self.settings.block_size) - sequence.blocks
        return needed - self.reused.used(self.found(sequence)) if self.reused else needed

    def coming(self, listed: list[Sequence]) -> set[int]:
        """The first whole block of each that is in the middle of its prompt which is not cached yet."""
        if self.reused is None or self.own.capacity_policy == "STATIC_BATCH":
            return set()
        partly = [sequence for sequence in listed if self.started(sequence) and not self.decodes(sequence)]
        return {new for sequence in partly if (new := self.reused.new_content(sequence)) is not None}

    def better_later(self, sequence: Sequence, coming: set[int]) -> bool:
        """Whether a prompt that has not begun waits for a block that another one computes now, to find it cached.

        If not, the first block that it computes itself is one that others wait for.
        """
        if self.reused is None or self.own.capacity_policy == "STATIC_BATCH" or self.started(sequence):
            return False
        new = self.reused.new_content(sequence)
        if new in coming:
            return True
        if new is not None:
            coming.add(new)
        return False

    def held(self, sequence: Sequence, tokens: int) -> int:
        """Tokens whose blocks it takes to hold so many: the drafter keeps those of all drafts but one as well."""
        ahead = max(0, self.speculation.ahead - 1) if self.speculation else 0
        return min(tokens + ahead, sequence.prompt + sequence.stated)

    def fitting(self, listed: list[Sequence], batch: Batch) -> list[Sequence]:
        """MAX_UTILIZATION: whoever has room for its next step, in order; the last that started gives way.

        A prompt for which somebody gave way waits for the next turn, where blocks are reused: it is looked at again,
        and found to begin with what it computes itself.
        """
        chosen: list[Sequence] = []
        coming = self.coming(listed)
        free, place, end = self.blocks.free, 0, len(listed)
        while place < end:
            sequence = listed[place]
            if self.better_later(sequence, coming):
                place += 1
                continue
            needed = self.to_step(sequence)
            if needed <= free:
                free -= needed
                chosen.append(sequence)
                place += 1
                continue
            givers = [later for later in range(place, end) if self.gives(listed[later])]
            if not givers:
                break
            end = givers[-1]
            before = self.blocks.free
            self.pause(listed[end])
            free += self.blocks.free - before
            batch.preempted.append(listed[end].id)
        return chosen

    def to_step(self, sequence: Sequence) -> int:
        """Blocks that its next step takes, or on several stages its next two."""
        if not self.is_free(sequence):
            return 0
        if not self.started(sequence):
            return ceil_div(self.held(sequence, sequence.known), self.settings.block_size)
        if not self.decodes(sequence):
            return 0
        steps = 1 if self.stages == 1 else 2
        held = self.held(sequence, sequence.computed + steps * self.each)
        return ceil_div(held, self.settings.block_size) - sequence.blocks

    def gives(self, sequence: Sequence) -> bool:
        """Whether it can be paused."""
        return self.started(sequence) and self.is_free(sequence)

    def pause(self, sequence: Sequence) -> None:
        """It loses its blocks, keeps its place and what it generated, and computes all of that again."""
        self.give_back(sequence)
        sequence.computed = sequence.context = 0

    # The micro-batch: who has tokens.

    def within_tokens(self, chosen: list[Sequence]) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """Of those with memory, in order, who decodes and which prompts are computed, by how many tokens."""
        budget, seats = self.settings.max_num_batched_tokens, self.settings.max_num_seqs
        decoding: list[Sequence] = []
        prompts: list[tuple[Sequence, int]] = []
        for sequence in filter(self.is_free, chosen):
            if len(decoding) + len(prompts) == seats:
                break
            decodes = self.decodes(sequence)
            tokens = self.each if decodes else self.left(sequence)
            if tokens > budget and (decodes or not self.settings.chunked_prefill):
                break
            if decodes:
                decoding.append(sequence)
                budget -= tokens
            else:
                prompts.append((sequence, tokens))
                budget -= 0 if self.settings.chunked_prefill else tokens
        if self.settings.chunked_prefill:
            prompts = self.cut(prompts, budget)
        return decoding, prompts

    def left(self, sequence: Sequence) -> int:
        """Tokens of its prompt that are neither computed nor cached."""
        if self.started(sequence):
            return sequence.context - sequence.computed
        return sequence.known - len(self.found(sequence)) * self.settings.block_size

    def cut(self, prompts: list[tuple[Sequence, int]], budget: int) -> list[tuple[Sequence, int]]:
        """Each by what the policy gives it of the batch's tokens; those that end come last."""
        left = [tokens for _, tokens in prompts]
        if self.forces:
            shares = self.by_states([sequence for sequence, _ in prompts], left, budget)
        elif sum(left) <= budget:
            return prompts
        elif self.own.context_chunking_policy == "EQUAL_PROGRESS":
            shares = self.alike(left, budget)
        else:
            shares = self.one_by_one(left, budget)
        ending, going_on = [], []
        for (sequence, tokens), given in zip(prompts, shares, strict=True):
            if given == tokens:
                ending.append((sequence, given))
            elif given:
                going_on.append((sequence, given))
        return [*going_on, *ending]

    def one_by_one(self, left: list[int], budget: int) -> list[int]:
        """First come first served: each what is left, in whole blocks where it is cut."""
        shares = []
        for tokens in left:
            given = min(tokens, budget)
            if given < tokens:
                given -= given % self.settings.block_size
            budget -= given
            shares.append(given)
        return shares

    def alike(self, left: list[int], budget: int) -> list[int]:
        """Equal progress: a block for each in turn, or what is left of its prompt, where that still fits."""
        shares = [0] * len(left)
        given = True
        while given and budget > 0:
            given = False
            for place, tokens in enumerate(left):
                more = min(self.settings.block_size, tokens - shares[place])
                if 0 < more <= budget:
                    shares[place] += more
                    budget -= more
                    given = True
        return shares

    def by_states(self, prompts: list[Sequence], left: list[int], budget: int) -> list[int]:
        """FORCE_CHUNK: each no further than to the next states that are kept, counted as if nothing was cached.

        Parameters
        ----------
        prompts : list of Sequence
        left : list of int            tokens of each that are neither computed nor cached
        budget : int                  tokens of the batch
        """
        shares, every = [], self.own.snapshot_interval if self.reused is not None else 0
        for sequence, most in zip(prompts, left, strict=True):
            known = sequence.context or sequence.known
            given = (min(known, (sequence.computed // every + 1) * every) if every else known) - sequence.computed
            if given > budget:
                given = budget - budget % self.settings.block_size
            budget -= given
            shares.append(min(given, most))
        return shares

    def held_back(self, decoding: list[Sequence], prompts: list[tuple[Sequence, int]]) -> list[tuple[Sequence, int]]:
        """The prompts, or none where they wait for more of them to come, so that fewer batches are slowed down."""
        own = self.own
        if not (decoding and prompts and (own.batch_wait_timeout_iters > 0 or own.batch_wait_max_tokens_ratio > 0)):
            return prompts
        tokens = self.each * len(decoding) + sum(tokens for _, tokens in prompts)
        enough = own.wait_tokens(self.settings.max_num_batched_tokens)
        if self.waited < own.batch_wait_timeout_iters and tokens < enough:
            self.waited += 1
            return []
        self.waited = 0
        return prompts

    # What becomes of a row.

    def begin(self, sequence: Sequence) -> None:
        """A prompt is computed from now on, but for what is cached."""
        found = self.found(sequence)
        if self.reused is not None:
            self.reused.claim(sequence, found)
        sequence.context, sequence.computed = sequence.known, len(found) * self.settings.block_size
        if not sequence.admitted:
            self.cached += sequence.computed
            sequence.admitted = True

    def enter(self, batch: Batch, sequence: Sequence, tokens: int) -> None:
        decoded = self.decodes(sequence)
        sequence.computed += tokens
        self.blocks.take(sequence, self.held(sequence, max(sequence.context, sequence.computed)))
        row = Row(sequence, tokens, sequence.computed, self.decodes(sequence), prompt=not decoded)
        row.drafts = tokens - 1 if decoded else 0
        sequence.in_flight += row.yields
        self.flying.add(sequence.id)
        batch.rows.append(row)
        batch.budget -= tokens

    def receive(self, row: Row) -> int:
        """The drafts up to the first wrong one, and the token that comes after these."""
        sequence, right = row.sequence, 0
        sequence.in_flight -= 1  # a batch brings a token at least
        if self.speculation and row.drafts:
            right = accepted(self.speculation, row)
            if not self.settings.async_scheduling:
                right = min(right, proposed(self.speculation, sequence))
            if sequence.computed > 0:  # else it was paused since
                sequence.computed -= row.drafts - right
        return min(right + 1, sequence.limit - sequence.generated)

    def learn(self, sequence: Sequence) -> None:
        """What it generates is stored when it ends or gives way."""

    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        self.flying -= {row.sequence.id for row in batch.rows}
        answered = super().update(batch, now_ns)
        for sequence in (row.sequence for row in batch.rows if row.prompt):
            if self.decodes(sequence) and not sequence.finished:
                self.blocks.register(sequence, self.stored(sequence))
        return answered

    def stored(self, sequence: Sequence) -> int:
        """Tokens that others can find: the last one is not computed."""
        return min(sequence.known - 1, sequence.computed)

    def give_back(self, sequence: Sequence) -> None:
        self.blocks.register(sequence, self.stored(sequence))
        super().give_back(sequence)

    def leave(self, sequence: Sequence) -> None:
        super().leave(sequence)
        self.unreported = False  # nobody has to be told
