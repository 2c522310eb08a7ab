"""SGLang's scheduler: prompts before decoding, room by what requests say they may generate, and a prefix tree.

Source of the rules: `Scheduler.get_next_batch_to_run`, `SchedulePolicy`, `PrefillAdder`, `ScheduleBatch` and
`event_loop_overlap` of SGLang 0.5.23, in our own words; recorded batches settle them on one stage. Several stages were
not recorded: each of as many batches in flight has a running list and a share of the seats of its own, over one
queue, one pool and one tree, as `event_loop_pp` has them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.simulator.reference.engine import Engine
from apex_opt.simulator.reference.schedulers import Scheduler
from apex_opt.simulator.reference.sequence import Batch, Row
from apex_opt.simulator.reference.tree import PrefixTree
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.reference.sequence import Sequence

CLIP: Final = 4096
"""Tokens to come of a request that room is kept for at most."""
AHEAD: Final = 20
"""Steps that those who stay after a retraction are to have room for."""
SORTED_UP_TO: Final = 128
"""Waiting requests up to which they are put in order by their cached prefix, and whose prefixes are kept fresh."""
REFRESHED_EVERY: Final = 32
"""Passes in order of arrival from one refreshing of the cached prefixes to the next."""
ALIKE: Final = 32
"""Tokens that two waiting requests begin alike with for the second to wait for what the first will have cached."""


@dataclass(slots=True)
class Slot:
    """What goes on from batch to batch: of one stage there is one, of a pipeline one for each batch in flight."""

    running: list[Sequence] = field(default_factory=list)
    last: list[Sequence] = field(default_factory=list)  # of its last batch, where that had prompts
    chunked: Sequence | None = None  # the one of them that was in the middle of its chunks
    full: bool = False  # nobody is admitted


@dataclass(slots=True)
class Pass:
    """Budgets of one forming of a batch of prompts, in tokens."""

    page: int
    chunk: int | None  # None: prompts are not cut
    inputs: int
    taken: float  # of the room, with what is kept for those who run and were chosen
    taken_now: int
    rows: list[tuple[Sequence, int]] = field(default_factory=list)
    cut: Sequence | None = None
    futures: list[tuple[int, int]] | None = None  # tokens left and tokens held, see `Scheduler._simulated`

    def charge(self, tokens: int, kept: int) -> None:
        """Somebody gets so many tokens, and room for so many later ones."""
        whole = ceil_div(tokens, self.page) * self.page
        self.taken += whole + self.page + kept
        self.taken_now += whole + self.page
        self.inputs -= whole
        if self.chunk is not None:
            self.chunk -= whole

    def choose(self, sequence: Sequence, want: int, most: int) -> None:
        """Take a sequence with so many tokens of what it wants; with all of them room is kept for its output.

        Parameters
        ----------
        sequence : Sequence    the request
        want : int             tokens it has to compute
        most : int             tokens it gets
        """
        tokens = min(want, most)
        self.rows.append((sequence, tokens))
        if tokens < want:
            self.cut = sequence
        self.charge(tokens, min(sequence.stated, CLIP) if tokens == want else 0)

    @property
    def spent(self) -> bool:
        """Whether tokens of the batch are used up."""
        return self.inputs <= 0 or (self.chunk is not None and self.chunk <= 0)


class SglangScheduler(Scheduler):
    """Forms batches: one of prompts where there can be one, else a step of all that run."""

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        own = settings.scheduler
        assert isinstance(own, SglangScheduling)
        self.own, self.page = own, settings.block_size
        self.free = blocks
        # Where prompts are not cut this is the one limit of a batch.
        limit = own.max_prefill_tokens
        self.inputs = limit if settings.chunked_prefill else min(limit, settings.max_num_batched_tokens)
        self.tree = PrefixTree() if settings.prefix_caching else None
        self.free_seats = settings.max_num_seqs
        self.turns = 0
        self.spread(1)
        self.chunked: Sequence | None = None
        self.mixes = own.mixed_chunk and settings.chunked_prefill
        self.start, self.least, self.decay = own.ratios
        self.ratio = self.start
        self.passes = 0

    def spread(self, stages: int) -> None:
        """Share the seats out to so many stages."""
        self.slots = [Slot() for _ in range(stages)]
        self.most_running = max(1, self.settings.max_num_seqs // stages)

    # What requests hold.

    def left(self) -> int:
        """Tokens of pages that are free or would be."""
        return self.nobodys * self.page

    @property
    def nobodys(self) -> int:
        return self.free + (self.tree.evictable if self.tree is not None else 0)

    def make_room(self, tokens: int) -> None:
        """Drop what is cached until there are free pages of so many tokens, or nothing more to drop."""
        missing = ceil_div(tokens, self.page) - self.free
        if self.tree is not None and missing > 0:
            self.free += self.tree.drop(missing)

    def known_pages(self, tokens: int) -> int:
        """Pages whose content so many tokens tell."""
        return tokens // self.page

    def take(self, sequence: Sequence, tokens: int) -> None:
        """Hand out the pages of a sequence's next tokens."""
        sequence.computed += tokens
        needed = ceil_div(sequence.computed, self.page) - sequence.blocks
        self.free -= needed
        sequence.blocks += needed

    def cache(self, sequence: Sequence, tokens: int, border: int) -> None:
        """Put the whole pages of a sequence's first tokens into the tree, which it holds from then on.

        Parameters
        ----------
        sequence : Sequence    the request
        tokens : int           that are computed
        border : int           tokens after whose whole pages a node ends
        """
        if self.tree is None:
            return
        pages = self.known_pages(tokens)
        node, known = self.tree.insert(sequence.keys[:pages], self.known_pages(border))
        copies = known - sequence.held  # computed by others meanwhile: theirs are used
        self.free += copies
        self.tree.hold(node)
        if sequence.node is not None:
            self.tree.let_go(sequence.node)
        sequence.node, sequence.held = node, pages

    def release(self, sequence: Sequence) -> None:
        """A sequence gives up its seat and its pages; what is in the tree stays there."""
        self.free += sequence.blocks - sequence.held
        if self.tree is not None and sequence.node is not None:
            self.tree.let_go(sequence.node)
        sequence.blocks = sequence.held = 0
        sequence.node = None
        sequence.seated = False
        self.free_seats += 1

    # One batch.

    @property
    def idle(self) -> bool:
        """Whether there is nobody at all."""
        return not self.waiting and self.chunked is None and not any(slot.running for slot in self.slots)

    def rest(self) -> None:
        """There is nothing to run and nothing in flight."""
        if self.idle:
            self.ratio = self.start

    def schedule(self) -> Batch:
        """Form one batch, of the slot whose turn it is."""
        slot = self.slots[self.turns % len(self.slots)]
        self.turns += 1
        batch = Batch(0)
        if self.chunked is not None:
            self.cache(self.chunked, self.chunked.computed, self.chunked.computed)
        self._merge(slot)
        if not slot.running:
            slot.full = False
        self._prompts(slot, batch)
        if batch.rows:
            slot.last, slot.chunked = [row.sequence for row in batch.rows], self.chunked
        else:
            self._step(slot, batch)
        batch.free = self.free
        return batch

    def _merge(self, slot: Slot) -> None:
        """Those of the last batch run on; who is done or in the middle of its chunks leaves."""
        if not slot.running:
            slot.full = False
        staying = [s for s in slot.last if not s.finished and s is not self.chunked and s is not slot.chunked]
        left = len(staying) < len(slot.last)
        running = [s for s in slot.running if not s.finished]
        if left or len(running) < len(slot.running):
            slot.full = False
        slot.running = running + staying
        slot.last, slot.chunked = [], None

    def _prompts(self, slot: Slot, batch: Batch) -> None:
        """Form a batch of prompts, with the running sequences where chunks are mixed."""
        if self.chunked is None:
            if not self.waiting or slot.full:
                return
            if min(self.most_running - len(slot.running), self.free_seats) <= 0:
                slot.full = True
                return
        self._order()
        forming = self._budgets(slot)
        if self.chunked is not None and not self._go_on(forming, self.chunked):
            return
        for sequence in tuple(self.waiting):
            if not self._admit(slot, forming, sequence):
                break
        if not forming.rows:
            return
        if forming.cut is not None:
            self.chunked = forming.cut
        chosen = {sequence.id for sequence, _ in forming.rows}
        self.waiting = deque(sequence for sequence in self.waiting if sequence.id not in chosen)
        spare = len(forming.rows) * self.page if self.page > 1 else 0
        self.make_room(sum(tokens for _, tokens in forming.rows) + spare)
        for sequence, tokens in forming.rows:
            if not sequence.seated:
                sequence.seated = True
                self.free_seats -= 1
            self._enter(batch, sequence, tokens, prompt=True)
        if self.mixes and slot.running:
            self._mix(slot, batch)

    def _budgets(self, slot: Slot) -> Pass:
        """What there is for a batch of prompts."""
        settings, own = self.settings, self.own
        mixed = len(slot.running) if self.mixes else 0
        weight = 1.0 if own.ignore_eos else self.ratio
        kept = 0.0
        for sequence in slot.running:
            kept += min(sequence.stated - sequence.generated, CLIP) * weight
        return Pass(
            page=self.page,
            chunk=settings.max_num_batched_tokens - mixed if settings.chunked_prefill else None,
            inputs=self.inputs - mixed,
            taken=mixed + kept,
            taken_now=mixed,
        )

    def _go_on(self, forming: Pass, sequence: Sequence) -> bool:
        """The one in the middle of its chunks gets the next; not where others took its room meanwhile.

        They can where chunks are mixed or there are several stages. SGLang would end then; here the prompt waits.
        """
        assert forming.chunk is not None
        most = min(forming.chunk, int(self.left() - forming.taken))
        want, most = sequence.known - sequence.computed, most if most > 0 else forming.chunk
        pages = ceil_div(sequence.computed + min(want, most), self.page) - sequence.blocks
        if pages * self.page > self.left():
            return False
        forming.choose(sequence, want, most)
        self.chunked, forming.cut = forming.cut, None
        return True

    def _admit(self, slot: Slot, forming: Pass, sequence: Sequence) -> bool:
        """Whether a waiting sequence is chosen, and others may be after it."""
        if self._has_room(forming) and forming.spent:
            return False
        seated = sum(other.seated for other, _ in forming.rows)
        if len(forming.rows) >= min(self.most_running - len(slot.running), self.free_seats + seated):
            slot.full = True
            return False
        pages = 0
        if self.tree is not None:
            sequence.node, pages = self.tree.match(sequence.keys[: self.known_pages(sequence.known - 1)])
            self.tree.hold(sequence.node)
        refused = self._refused(slot, forming, sequence, sequence.known - pages * self.page)
        if refused is None:
            sequence.held = sequence.blocks = pages
            sequence.computed = pages * self.page
            if not sequence.admitted:
                sequence.admitted = True
                self.cached += sequence.computed
            refused = "" if self._has_room(forming) else "memory"
        elif self.tree is not None and sequence.node is not None:
            self.tree.let_go(sequence.node)
            sequence.node = None
        if refused == "memory":
            slot.full = bool(forming.rows or slot.running)
        return not refused and not forming.spent

    def _has_room(self, forming: Pass) -> bool:
        room = self.left()
        return room - forming.taken > 0 and room - forming.taken_now > 0

    def _refused(self, slot: Slot, forming: Pass, sequence: Sequence, want: int) -> str | None:
        """Choose a waiting sequence that has so many tokens to compute; or why not: "memory" or "tokens"."""
        whole, chunk = ceil_div(want, self.page) * self.page, forming.chunk
        if self.own.ignore_eos and self.tree is None:
            if not self._simulated(slot, forming, sequence, whole):
                return "memory"
            if chunk is not None and chunk <= 0 and want > chunk:
                return "tokens"
            forming.choose(sequence, want, want if chunk is None else chunk)
            return None
        if want + min(sequence.stated - sequence.generated, CLIP) + self.page >= self.left() - forming.taken:
            return "memory"
        if chunk is None or whole <= chunk:
            if chunk is None and forming.rows and whole >= forming.inputs:
                return "tokens"
            forming.choose(sequence, want, want)
            return None
        if chunk < self.page:
            return "tokens"
        forming.choose(sequence, want, chunk // self.page * self.page)
        return None

    def _simulated(self, slot: Slot, forming: Pass, sequence: Sequence, whole: int) -> bool:
        """Whether all could run to their end, which they do not reach before they said, in order of what is left.

        Parameters
        ----------
        slot : Slot
        forming : Pass
        sequence : Sequence    the one to be chosen
        whole : int            tokens of the pages it takes first
        """
        room = self.left()
        if whole + self.page > min(room - forming.taken_now, room - forming.taken):
            return False
        mine = (sequence.stated - sequence.generated, sequence.known)
        if forming.futures is None:
            others = [*slot.running, *(chosen for chosen, _ in forming.rows)]
            forming.futures = [mine, *((s.stated - s.generated, s.known) for s in others)]
            forming.futures.sort(key=lambda future: future[0])
        else:
            places = (i for i, (left, _) in enumerate(forming.futures) if mine[0] <= left)
            forming.futures.insert(next(places, len(forming.futures) - 1), mine)
        there = room - forming.taken_now - whole - self.page
        for index, (left, held) in enumerate(forming.futures):
            together = len(forming.futures) - index
            if there - left * together <= together:
                return False
            there += held
        return True

    def _order(self) -> None:
        """Put the queue in order, and keep prefixes in the cache that will be needed."""
        tree = self.tree
        if tree is None:
            return
        if self.own.schedule_policy == "fcfs" or len(self.waiting) > SORTED_UP_TO:
            if self.passes % REFRESHED_EVERY == 0:
                for sequence in reversed(list(self.waiting)[:SORTED_UP_TO]):
                    tree.match(sequence.keys[: self.known_pages(sequence.known)])
            self.passes += 1
            return
        beginnings: set[int] = set()
        ranks: dict[int, float] = {}
        for sequence in self.waiting:
            found = tree.match(sequence.keys[: self.known_pages(sequence.known)])[1] * self.page
            ranks[sequence.id] = -min(found, sequence.known - 1)
            if found <= ALIKE <= sequence.known:
                if sequence.beginning in beginnings:
                    ranks[sequence.id] = 1
                beginnings.add(sequence.beginning)
        self.waiting = deque(sorted(self.waiting, key=lambda sequence: ranks[sequence.id]))

    def _mix(self, slot: Slot, batch: Batch) -> None:
        """Give the running sequences a token each beside the prompts, if there is room for all."""
        staying = [sequence for sequence in slot.running if not _ends(sequence)]
        if len(staying) < len(slot.running):
            slot.full = False
        slot.running = staying
        if staying and self._fit(staying):
            slot.running = []
            self.advance(staying, batch)

    def _step(self, slot: Slot, batch: Batch) -> None:
        """Give all running sequences a token; some are retracted where there is no room for all."""
        staying = [sequence for sequence in slot.running if not _ends(sequence)]
        ending = len(staying) < len(slot.running)
        slot.running = staying
        if ending:
            slot.full = False
        if not staying:
            return
        if self._fit(staying):
            self.ratio = max(self.ratio - self.decay, self.least)
        elif ending:
            return  # their pages are free soon
        else:
            self._retract(slot, batch)
            if not slot.running or not self._fit(slot.running):
                return
        self.advance(slot.running, batch)

    def needed(self, sequence: Sequence) -> int:
        """Pages that the next step of a sequence takes."""
        return int(sequence.computed % self.page == 0)

    def _fit(self, sequences: Seq[Sequence]) -> bool:
        """Whether each can have a token more, after dropping what is cached."""
        needed = sum(map(self.needed, sequences))
        self.make_room(needed * self.page)
        return needed <= self.free

    def advance(self, sequences: Seq[Sequence], batch: Batch) -> None:
        """Enter sequences that decode into a batch."""
        if self.page > 1:
            self.make_room(len(sequences) * self.page)
        for sequence in sequences:
            self._enter(batch, sequence, 1, prompt=False)

    def _retract(self, slot: Slot, batch: Batch) -> None:
        """Take sequences out until the others have room: the fewest generated first, of these the longest prompt.

        One stays, as it has room alone; of several slots another may have that room.
        """
        least = 1 if len(self.slots) == 1 else 0
        staying = sorted(slot.running, key=lambda sequence: (-sequence.generated, sequence.prompt))
        while len(staying) > least and (not batch.preempted or not self._fit(staying)):
            sequence = staying.pop()
            self.release(sequence)
            sequence.computed = sequence.in_flight = 0
            if sequence.coming is not None:
                sequence.coming.yields = False
                sequence.coming = None
            self.waiting.append(sequence)
            batch.preempted.append(sequence.id)
            self.make_room(len(staying) * AHEAD)
        slot.running, slot.full = staying, False
        generated, stated = sum(s.generated for s in staying), sum(s.stated for s in staying)
        self.ratio = min(1.0, (generated + AHEAD * len(staying)) / (stated + 1))

    def _enter(self, batch: Batch, sequence: Sequence, tokens: int, *, prompt: bool) -> None:
        """Enter a sequence into the batch.

        Parameters
        ----------
        batch : Batch          that is being formed
        sequence : Sequence    the request
        tokens : int           that it computes in the batch
        prompt : bool          whether they are known from the start, or from before a retraction
        """
        self.take(sequence, tokens)
        yields = sequence.computed >= sequence.known + sequence.in_flight
        row = Row(sequence, tokens, sequence.computed, yields, prompt=prompt)
        batch.rows.append(row)
        if yields:
            sequence.in_flight += 1
            sequence.coming = row

    def receive(self, row: Row) -> int:
        row.sequence.in_flight -= 1
        return 1

    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        """Take in the tokens of a batch that finishes now; return who is answered."""
        answered: list[Sequence] = []
        for row in batch.rows:
            sequence = row.sequence
            if not row.yields or sequence.finished:
                continue
            if sequence.coming is row:
                sequence.coming = None
            row.got = self.receive(row)
            sequence.generated += row.got
            sequence.token_ns += [now_ns] * row.got
            if sequence.generated == sequence.limit:
                self.cache(sequence, sequence.computed, sequence.prompt)
                self.release(sequence)
                sequence.finished = True
                answered.append(sequence)
            elif row.prompt:
                self.cache(sequence, row.computed_after, row.computed_after)
        return answered


def _ends(sequence: Sequence) -> bool:
    """Whether the last token a request may have is on its way; drafts may be wrong, so that one is sure of a row."""
    return sequence.generated + (sequence.coming is not None) >= sequence.stated


class SglangEngine(Engine):
    """SGLang's loops: the next batch is scheduled, then the oldest of those in flight is taken in, if there is one.

    As many turns as batches may be in flight lie between forming a batch and taking it in, those in which none could
    be formed among them. New requests are looked for every `scheduler_recv_interval` turns, at once after prompts; an
    idle loop turns so fast that it sees them when they come. Source: `SchedulerRecvSkipper` of SGLang 0.5.23, read.
    """

    scheduler: SglangScheduler

    def __init__(self, pool: EnginePool, *, log: bool, scheduler: type[Scheduler] = SglangScheduler) -> None:
        super().__init__(pool, log=log, scheduler=scheduler)
        self.scheduler.spread(len(pool.laws))
        self.idle = True
        own = pool.settings.scheduler
        assert isinstance(own, SglangScheduling)
        self.every = own.scheduler_recv_interval
        self.passed = 0  # turns since the last look; `every` after one with prompts

    def next_ns(self) -> int | None:
        if not self.idle:
            return self.now
        return max(self.now, self.arrivals[0].arrival_ns) if self.arrivals else None

    def receive(self, now_ns: int) -> None:
        if self.looks():
            super().receive(now_ns)
        self.now = now_ns

    def looks(self) -> bool:
        """Whether new requests are looked for in this turn."""
        if not self.idle and self.passed < self.every:
            return False
        self.passed = 0
        return True

    def turn(self, now_ns: int) -> list[Sequence]:
        self.receive(now_ns)
        batch = self.launch()
        self.passed = self.every if any(row.prompt for row in batch.rows) else self.passed + 1
        answered: list[Sequence] = []
        if len(self.queue) == self.depth:
            finish_ns, oldest = self.queue.popleft()
            if oldest.rows:
                self.now = max(self.now, finish_ns)
                answered = self.scheduler.update(oldest, self.now)
                for sequence in answered:
                    sequence.answered_ns = self.now
            else:
                self.idle = not any(later.rows for _, later in self.queue)
        if batch.rows:
            self.idle = False
        elif self.idle:
            self.scheduler.rest()
        return answered
