"""Prefill and decode instances: blocks held until they are read, reads before admission, and who learns of it when.

Source: `Scheduler` with `NixlConnector` and the engine core's loop of vLLM 0.20.2, in our own words; runs recorded from
them settle it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from apex_opt.simulator.handover import prompts_only
from apex_opt.simulator.reference.engine import Engine
from apex_opt.simulator.reference.loop import next_due, sequences_of
from apex_opt.simulator.reference.schedulers import VllmScheduler
from apex_opt.simulator.reference.sides import Coming, Side

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.handover import Handover
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.reference.router import Router
    from apex_opt.simulator.reference.sequence import Batch, Sequence
    from apex_opt.workload.trace import Trace


class ConnectedScheduler(VllmScheduler):
    """A scheduler that is told of reads."""

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        self.ordered: list[tuple[Sequence, int]] = []  # reads that the last batch orders, with their blocks

    def hear(self, sequence: Sequence) -> None:
        """The read of a sequence has ended."""
        raise NotImplementedError


class PrefillScheduler(ConnectedScheduler):
    """Blocks of a prompt that is computed are held, without a seat, until its read has ended."""

    def give_back(self, sequence: Sequence) -> None:
        """Not yet: they are to be read."""

    def hear(self, sequence: Sequence) -> None:
        self.blocks.release(sequence)


class DecodeScheduler(ConnectedScheduler):
    """A prompt is read into blocks of its own before its request is admitted; reads hold blocks, but no seats.

    The prompt's last token is computed again, as the first token of the answer comes from it. A request that is
    preempted later has lost what was read, and computes everything itself.
    """

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        self.remote: list[Sequence] = []  # whose blocks are being read, in the order in which that was ordered
        self._read: set[Sequence] = set()  # those of them whose read is known to have ended
        self._handed: set[Sequence] = set()  # whose read has been ordered; it is once

    @property
    def unfinished(self) -> bool:
        return bool(self.remote) or super().unfinished

    @property
    def queued(self) -> int:
        """Those that wait, also for their reads."""
        return len(self.remote) + super().queued

    def schedule(self) -> Batch:
        self.ordered = []
        return super().schedule()

    def hear(self, sequence: Sequence) -> None:
        self._read.add(sequence)

    def schedule_waiting(self, batch: Batch) -> None:
        """Those whose read has ended first; those still being read are passed over."""
        for sequence in list(self.remote):
            if not self.seats(batch):
                return
            if sequence in self._read:
                self.start(batch, sequence)
        super().schedule_waiting(batch)

    def start(self, batch: Batch, sequence: Sequence) -> None:
        """Admit a sequence that has its blocks, which can be found from now on: it computes the last token it knows."""
        self.remote.remove(sequence)
        self._read.remove(sequence)
        self.running.append(sequence)
        sequence.computed = sequence.known - 1
        self.enter(batch, sequence, 1)

    def admit(self, batch: Batch, sequence: Sequence) -> bool:
        """Order the read of what is not found of a prompt, where there are blocks for all of it."""
        if sequence in self._handed:
            return super().admit(batch, sequence)
        found = self.blocks.found(sequence)
        if self.blocks.needed(sequence, sequence.prompt, found) > self.blocks.free:
            return False
        self.waiting.popleft()
        self.remote.append(sequence)
        self._handed.add(sequence)
        self.blocks.take(sequence, sequence.prompt, found)
        sequence.computed = sequence.prompt
        sequence.admitted = True
        self.cached += len(found) * self.settings.block_size
        self.ordered.append((sequence, sequence.blocks - len(found)))
        return True


class Instance(Engine):
    """An engine whose workers read blocks, or hear that blocks were read.

    They look when a batch is launched, even an empty one, and tell the scheduler when that batch is taken in. Waiting
    for a batch is a turn of its own, as others act while it runs.
    """

    scheduler: ConnectedScheduler

    def __init__(self, pool: EnginePool, scheduler: type[ConnectedScheduler], *, log: bool) -> None:
        super().__init__(pool, log=log, scheduler=scheduler)
        self.read: Callable[[Instance, Sequence, int], None] | None = None
        self._ends: list[tuple[int, Sequence]] = []  # ends of reads that the workers have not seen, and when they can
        self._seen: deque[list[Sequence]] = deque()  # what they saw at the launch of each batch in flight
        self._awaits = False  # the oldest batch
        self._executed = False
        self._received_ns = 0  # when requests were received last

    def receive(self, now_ns: int) -> None:
        super().receive(now_ns)
        self._received_ns = now_ns

    def add(self, sequence: Sequence, at_ns: int) -> None:
        """Send a request, which waits at once where it comes at the time of the last turn."""
        super().add(sequence, at_ns)
        while self.arrivals and self.arrivals[0].arrival_ns <= self._received_ns:
            self.scheduler.waiting.append(self.arrivals.popleft())

    def see(self, sequence: Sequence, at_ns: int) -> None:
        """The workers can see from `at_ns` on that a read has ended."""
        self._ends.append((at_ns, sequence))

    def next_ns(self) -> int | None:
        if self._awaits:
            return max(self.now, self.queue[0][0])
        return self.now if self.scheduler.unreported else super().next_ns()

    def turn(self, now_ns: int) -> list[Sequence]:
        """Form a batch, or take in the oldest once it is done; return who is answered."""
        if not self._awaits:
            self.receive(now_ns)
            self._executed = False
            if self.scheduler.unfinished or self.scheduler.unreported:
                self._executed = bool(self.launch().rows)
                if self._executed and self.may_form_another():
                    return []
            self._awaits = True
        if self.queue[0][0] > now_ns:
            return []
        self._awaits = False
        return self.take_in(executed=self._executed)

    def launch(self) -> Batch:
        batch = super().launch()
        for sequence, blocks in self.scheduler.ordered:
            assert self.read is not None
            self.read(self, sequence, blocks)
        self._seen.append([sequence for at_ns, sequence in self._ends if at_ns <= self.now])
        self._ends = [end for end in self._ends if end[0] > self.now]
        return batch

    def take_in(self, *, executed: bool) -> list[Sequence]:
        answered = super().take_in(executed=executed)
        for sequence in self._seen.popleft():
            self.scheduler.hear(sequence)
        return answered


class Deployment:
    """Prefill and decode instances, the proxy before them and the links between them."""

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
        self.prefill = [Instance(prefill, PrefillScheduler, log=log) for _ in range(prefill.replicas)]
        self.decode = [Instance(decode, DecodeScheduler, log=log) for _ in range(decode.replicas)]
        for instance in self.decode:
            instance.read = self.read
        self.sides = Side(self.prefill, routers[0]), Side(self.decode, routers[1])
        self.reads = [(0, 0, 0)] * len(trace)  # start, end and blocks of each
        self._link_free = [0] * len(self.prefill)
        self.coming = Coming(trace)

    def serve(self) -> None:
        """Of events at one time arrivals are first, then prefill instances, then decode instances."""
        first, then = self.sides
        instances = [*self.prefill, *self.decode]
        while True:
            due = next_due(instances)
            if (at := self.coming.by(due and due[0])) is not None:
                first.send(self.prompts[len(self.coming.came) - 1], at, 0)
            elif due is not None:
                at_ns, instance = due
                answered = instance.turn(at_ns)
                for sequence in answered if instance in self.prefill else ():
                    assert sequence.answered_ns is not None
                    then.send(self.answers[sequence.id], sequence.answered_ns, self.handover.proxy_ns)
                if answered and instance in self.prefill:
                    first.pull(at_ns, 0)
                elif answered:
                    then.pull(at_ns, self.handover.proxy_ns)
                    for _ in answered:
                        self.coming.answered(at_ns)
            else:
                return

    def read(self, instance: Instance, sequence: Sequence, blocks: int) -> None:
        """A decode instance starts to read a prompt.

        Parameters
        ----------
        instance : Instance    that reads
        sequence : Sequence    the request there
        blocks : int           to be read
        """
        source = self.sides[0].place_of[sequence.id]
        start = max(instance.now, self._link_free[source]) if self.handover.in_turn else instance.now
        end = start + self.handover.read_ns + self.handover.block_ns * blocks
        self._link_free[source] = end
        self.reads[sequence.id] = start, end, blocks
        instance.see(sequence, end)
        self.prefill[source].see(self.prompts[sequence.id], end + self.handover.notice_ns)
