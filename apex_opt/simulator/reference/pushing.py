"""SGLang's prefill and decode instances: blocks before prompts, chunks that are sent on, and who learns of it when.

A request goes to both instances at once. The decode instance keeps blocks for its prompt and something to come, and
tells the prefill instance, which does not start on it before; so it is the decode pool's memory that throttles prompts.
Chunks are sent while later ones are computed. The token that the prefill instance yields is the first of the answer;
it is seen when the decode instance admits the request, which then goes on with the second. Who gives way on a decode
instance keeps what it had computed, in the host's memory.

Source: `srt/disaggregation/prefill.py` and `decode.py` of SGLang 0.5, in our own words: read, not recorded. What takes
no time here: the handshake of two instances, the router, and blocks on their way to the host and back.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Final

from apex_opt.engines.schedulers import RESERVED
from apex_opt.simulator.handover import prompts_only
from apex_opt.simulator.reference.loop import next_due, sequences_of
from apex_opt.simulator.reference.sglang import CLIP, SglangEngine, SglangScheduler
from apex_opt.simulator.reference.sides import Coming, Side
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.handover import Handover
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.reference.router import Router
    from apex_opt.simulator.reference.schedulers import Scheduler
    from apex_opt.simulator.reference.sequence import Batch, Sequence
    from apex_opt.simulator.reference.sglang import Slot
    from apex_opt.workload.trace import Trace

FEW_SEATS: Final = 32
"""Seats up to which twice as many requests more may have blocks before they are admitted."""


class PushingScheduler(SglangScheduler):
    """Computes prompts alone; pages of one that is computed are held, with its seat, until all of them are sent."""

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        self.computed: list[tuple[Sequence, int, bool]] = []  # pages to send after the last batch; whether the last
        self._sent: dict[int, int] = {}  # pages of prompts that are not computed whole

    def allow(self, sequence: Sequence) -> None:
        """The decode instance of a sequence has room for it."""
        self.waiting.append(sequence)

    def hear(self, sequence: Sequence) -> None:
        """All pages of a sequence are sent."""
        self.release(sequence)

    def _merge(self, slot: Slot) -> None:
        slot.last, slot.chunked, slot.full = [], None, False

    def _step(self, slot: Slot, batch: Batch) -> None:
        """Nobody is answered here."""

    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        """Take in a batch: whole pages of what it computed are sent, of a prompt that is done all."""
        done: list[Sequence] = []
        for row in batch.rows:
            sequence, before = row.sequence, self._sent.get(row.sequence.id, 0)
            if row.yields:
                sequence.in_flight -= 1
                sequence.coming = None
                sequence.generated = 1
                sequence.token_ns.append(now_ns)
                sequence.finished = True
                self.cache(sequence, sequence.prompt, sequence.prompt)
                done.append(sequence)
            pages = ceil_div(sequence.prompt, self.page) if row.yields else row.computed_after // self.page
            self._sent[sequence.id] = pages
            self.computed.append((sequence, pages - before, row.yields))
        return done


class ReceivingScheduler(SglangScheduler):
    """Keeps pages for prompts before these are computed, and admits requests whose prompts have come."""

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        self.tree = None  # what is handed over is not looked for in a cache
        self.expected: deque[Sequence] = deque()  # without pages
        self.sending: list[Sequence] = []  # whose pages are being filled
        self.gone: deque[Sequence] = deque()  # retracted, in the host's memory
        self.granted: list[Sequence] = []  # those that got pages in the last turn
        self.began: list[Sequence] = []  # those that began to be answered in the last turn
        self._come: set[Sequence] = set()
        seats = settings.max_num_seqs
        self._slots = 3 * seats if seats <= FEW_SEATS else seats

    @property
    def idle(self) -> bool:
        return not (self.expected or self.sending or self.gone) and super().idle

    @property
    def queued(self) -> int:
        return len(self.expected) + len(self.sending) + len(self.gone) + super().queued

    def hear(self, sequence: Sequence) -> None:
        """All pages of a sequence have come."""
        self._come.add(sequence)

    def begin(self, now_ns: int) -> None:
        """Give pages to those that have none, and let those begin that have come and find a seat."""
        (slot,) = self.slots
        slot.running = [sequence for sequence in slot.running if not sequence.finished]
        self.granted, self.began = [], []
        self._resume()
        if not self.gone:
            self._grant()
            self.waiting += [sequence for sequence in self.sending if sequence in self._come]
            self.sending = [sequence for sequence in self.sending if sequence not in self._come]
        while self.waiting and len(slot.running) < self.settings.max_num_seqs:
            sequence = self.waiting.popleft()
            if not sequence.token_ns:
                sequence.generated = 1
                sequence.token_ns.append(now_ns)
                self.began.append(sequence)
            if sequence.generated == sequence.limit:
                sequence.finished = True
                self.release(sequence)
            else:
                slot.running.append(sequence)

    def _resume(self) -> None:
        """Those that were retracted come back, with room for as much again."""
        while self.gone:
            sequence = self.gone[0]
            held = sequence.known - 1
            if self._active() >= self._slots or held + RESERVED > self.left() - RESERVED * self._active():
                return
            self._hold(self.gone.popleft(), held)
            self.waiting.append(sequence)

    def _grant(self) -> None:
        """In order of arrival, as long as there is room for one, and for the longest of those that run."""
        (slot,) = self.slots
        could = sum(sequence.known for sequence in slot.running)  # what giving way would free
        longest = max((min(s.stated, CLIP) + s.prompt - could for s in slot.running), default=0)
        while self.expected and self._active() < self._slots:
            sequence = self.expected[0]
            room = self.left() - max(RESERVED * self._active(), longest)
            if max(sequence.prompt + RESERVED, sequence.prompt + min(sequence.stated, CLIP) - could) > room:
                return
            self._hold(self.expected.popleft(), sequence.prompt)
            self.sending.append(sequence)
            self.granted.append(sequence)

    def _active(self) -> int:
        """Requests that have pages."""
        return sum(len(slot.running) for slot in self.slots) + len(self.sending) + len(self.waiting)

    def _hold(self, sequence: Sequence, tokens: int) -> None:
        """A sequence has pages for its first tokens, and a seat with the next."""
        self.take(sequence, tokens)
        self.free_seats -= 1

    def _prompts(self, slot: Slot, batch: Batch) -> None:
        """Nobody computes prompts here."""

    def _retract(self, slot: Slot, batch: Batch) -> None:
        before = len(self.waiting)
        super()._retract(slot, batch)
        self.gone += list(self.waiting)[before:]
        self.waiting = deque(list(self.waiting)[:before])


class Instance(SglangEngine):
    """An engine that also acts when something comes to be seen: a prompt that may start, or pages that are sent."""

    def __init__(self, pool: EnginePool, scheduler: type[Scheduler], *, log: bool) -> None:
        super().__init__(pool, log=log, scheduler=scheduler)
        self._later: list[tuple[int, int, Callable[[], None]]] = []  # with the number of each
        self._told = 0

    def see(self, at_ns: int, what: Callable[[], None]) -> None:
        """Something can be seen from a time on."""
        self._later.append((at_ns, self._told, what))
        self._told += 1

    def next_ns(self) -> int | None:
        if not self.idle:
            return self.now
        times = [at_ns for at_ns, _, _ in self._later]
        times += [sequence.arrival_ns for sequence in self.arrivals]
        return max(self.now, min(times)) if times else None

    def receive(self, now_ns: int) -> None:
        self.now = now_ns
        seen = sorted(one for one in self._later if one[0] <= now_ns)
        self._later = [one for one in self._later if one[0] > now_ns]
        for _, _, what in seen:
            what()
        looks = self.looks()
        while looks and self.arrivals and self.arrivals[0].arrival_ns <= now_ns:
            self.take(self.arrivals.popleft())

    def take(self, sequence: Sequence) -> None:
        """A request has come; before prompts that waits until it is heard that it may start."""


class PushingInstance(Instance):
    """Computes prompts once the decode instances have room for them."""

    scheduler: PushingScheduler

    def __init__(self, pool: EnginePool, *, log: bool) -> None:
        super().__init__(pool, PushingScheduler, log=log)
        self.every = 1  # a turn with prompts looks at once, one without takes no time


class ReceivingInstance(Instance):
    """Answers."""

    scheduler: ReceivingScheduler

    def __init__(self, pool: EnginePool, *, log: bool) -> None:
        super().__init__(pool, ReceivingScheduler, log=log)
        self._at_once: list[Sequence] = []  # answered when they began, in the last turn

    def take(self, sequence: Sequence) -> None:
        self.scheduler.expected.append(sequence)

    def turn(self, now_ns: int) -> list[Sequence]:
        answered = super().turn(now_ns)
        if self.scheduler.began:
            self.passed = self.every  # SGLang counts this as a batch of prompts
        if self._at_once:
            self.idle = False  # the loop goes round again, and finds what they gave back
        return [*self._at_once, *answered]

    def launch(self) -> Batch:
        self.scheduler.begin(self.now)
        self._at_once = [sequence for sequence in self.scheduler.began if sequence.finished]
        for sequence in self._at_once:
            sequence.answered_ns = self.now
        return super().launch()


class Deployment:
    """Prefill and decode instances to both of which a request goes at once, and the links between them."""

    def __init__(
        self,
        prefill: EnginePool,
        decode: EnginePool,
        handover: Handover,
        trace: Trace,
        routers: tuple[Router, Router],
        *,
        log: bool,
    ) -> None:
        self.handover = handover
        self.prompts = sequences_of(prefill.settings, prompts_only(trace))
        self.answers = sequences_of(decode.settings, trace)
        self.prefill = [PushingInstance(prefill, log=log) for _ in range(prefill.replicas)]
        self.decode = [ReceivingInstance(decode, log=log) for _ in range(decode.replicas)]
        self.sides: tuple[Side, Side] = Side(self.prefill, routers[0]), Side(self.decode, routers[1])
        self.reads = [(0, 0, 0)] * len(trace)  # of what is sent: its end less what it takes, its end, blocks
        self._link_free = [0] * len(self.prefill)
        self.coming = Coming(trace)

    def serve(self) -> None:
        """Of events at one time arrivals are first, then prefill instances, then decode instances."""
        instances = [*self.prefill, *self.decode]
        while True:
            due = next_due(instances)
            if (at := self.coming.by(due and due[0])) is not None:
                for side, sequences in zip(self.sides, (self.prompts, self.answers), strict=True):
                    side.send(sequences[len(self.coming.came) - 1], at, 0)
            elif due is not None:
                at_ns, instance = due
                answered = instance.turn(at_ns)
                if isinstance(instance, PushingInstance):
                    self.push(instance)
                elif isinstance(instance, ReceivingInstance):
                    self.grant(instance, at_ns)
                    for sequence in answered:
                        assert sequence.answered_ns is not None
                        self.coming.answered(sequence.answered_ns)
                if answered:
                    self.sides[isinstance(instance, ReceivingInstance)].pull(at_ns, 0)
            else:
                return

    def grant(self, instance: ReceivingInstance, now_ns: int) -> None:
        """Prompts that an instance has room for from now on may start."""
        for sequence in instance.scheduler.granted:
            prompt = self.prompts[sequence.id]
            source = self.prefill[self.sides[0].place_of[sequence.id]]
            source.see(now_ns + self.handover.notice_ns, partial(source.scheduler.allow, prompt))
        instance.scheduler.granted = []

    def push(self, instance: PushingInstance) -> None:
        """What the last batch of an instance computed is sent."""
        place = self.prefill.index(instance)
        for prompt, pages, last in instance.scheduler.computed:
            now = instance.now
            start = max(now, self._link_free[place]) if self.handover.in_turn else now
            takes = self.handover.read_ns + self.handover.block_ns * pages if pages else 0
            begun, ended, before = self.reads[prompt.id]
            end = start + takes
            self._link_free[place] = end
            self.reads[prompt.id] = end - (ended - begun) - takes, end, before + pages
            if last:
                target = self.decode[self.sides[1].place_of[prompt.id]]
                answer = self.answers[prompt.id]
                target.see(end + self.handover.notice_ns, partial(target.scheduler.hear, answer))
                instance.see(end, partial(instance.scheduler.hear, prompt))
        instance.scheduler.computed = []
