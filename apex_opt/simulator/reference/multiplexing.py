"""SGLang's multiplexing: a batch of prompts in slices of layers beside steps of those who are answered.

A turn of the loop forms a batch of prompts where none is under way, gives all who run a token, and starts a slice of
the prompts' layers beside that. It waits for the step alone: slices queue up behind each other, and the next is not
started before the next turn. Those whose prompts are done run on from the end of the step after which that is seen.
The GPU is divided anew, behind all that was started, when a batch of prompts is formed or is done, and when nobody is
left to answer.

Source: `event_loop_pdmux` of SGLang 0.5.23, in our own words; read, not recorded. Slices are taken to be as long as
their share of the layers, which is assumed: the embedding and the LM head are spread over all of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.simulator.law import never_admitted
from apex_opt.simulator.outcome import BatchCounts
from apex_opt.simulator.phases import SCALE
from apex_opt.simulator.reference.sequence import Batch, Sequence
from apex_opt.simulator.reference.sglang import SglangScheduler
from apex_opt.simulator.reference.shared import Replica
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.outcome import Step
    from apex_opt.simulator.phases import Multiplexing
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace


class MultiplexingScheduler(SglangScheduler):
    """SGLang's rules, by which prompts and steps are formed apart."""

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        (self.slot,) = self.slots

    def prompts(self) -> Batch:
        """Form a batch of prompts, which may come out empty."""
        batch = Batch(0)
        self._prompts(self.slot, batch)
        return batch

    def step(self) -> Batch:
        """Form a step of all who run, which may come out empty."""
        batch, slot = Batch(0), self.slot
        running = [sequence for sequence in slot.running if not sequence.finished]
        if len(running) < len(slot.running) or not running:
            slot.full = False
        slot.running = running
        self._step(slot, batch)
        return batch

    def join(self, batch: Batch) -> None:
        """Those whose prompts are done run on."""
        self.slot.running = self.slot.running + [row.sequence for row in batch.rows]


@dataclass(slots=True, eq=False)
class _Prompts:
    """A batch of prompts under way: its time on the whole GPU, and the layers whose slices were started."""

    batch: Batch
    whole_ns: int
    slice_layers: int
    started_ns: int
    layers: int = 0


class MultiplexingReplica(Replica):
    """The loop of one engine, its two streams and its scheduler."""

    def __init__(self, pool: EnginePool, rules: Multiplexing, trace: Trace) -> None:
        settings = pool.settings
        self.rules, (self.law,), self.blocks = rules, pool.laws, pool.blocks
        self.scheduler = MultiplexingScheduler(settings, pool.blocks)
        columns = (trace.prompt, trace.output, trace.generated(settings.max_model_len))
        lengths = zip(*(column.tolist() for column in (*columns, trace.stated(settings.max_model_len))), strict=True)
        self.sequences = [
            Sequence(id=i, prompt=p, output=o, limit=limit, stated=stated)
            for i, (p, o, limit, stated) in enumerate(lengths)
        ]
        self.coming = deque(zip(trace.arrival_ns.tolist(), self.sequences, strict=True))
        self.counts = BatchCounts.empty(settings, len(self.law.windows))
        self.paces = rules.alone
        self.prompts: _Prompts | None = None
        self.stream_ns = 0  # when all slices that were started are done
        self.preemptions = self.most_blocks = 0
        self._steps: tuple[list[Step], list[Step]] = ([], [])
        self._busy = [0, 0]

    @property
    def held(self) -> int:
        return self.blocks - self.scheduler.free

    @property
    def token_ns(self) -> list[list[int]]:
        return [sequence.token_ns for sequence in self.sequences]

    @property
    def steps(self) -> tuple[list[Step], list[Step]]:
        return self._steps

    @property
    def busy_ns(self) -> tuple[int, int]:
        return self._busy[0], self._busy[1]

    def serve(self) -> None:
        """Take turns until all is answered."""
        now, changed, again = 0, False, False
        while True:
            while self.coming and self.coming[0][0] <= now:
                self.scheduler.waiting.append(self.coming.popleft()[1])
            if self.prompts is None:
                changed = self._form(now) or changed
            before = bool(self.scheduler.slot.running)
            step = self.scheduler.step()
            self.preemptions += len(step.preempted)
            running = bool(self.scheduler.slot.running)
            self.most_blocks = max(self.most_blocks, self.held)
            if changed or (before and not running):
                now = max(now, self.stream_ns)
                self._divide()
                changed = False
            if not running and self.prompts is None:
                if self.scheduler.waiting and again:
                    raise never_admitted()
                again = bool(self.scheduler.waiting)
                if again:
                    continue  # those who just left had held it up
                if not self.coming:
                    return
                self.scheduler.rest()
                now = max(now, self.coming[0][0])
                continue
            again = False
            self._slice(now)
            now, changed = self._waited(now, step)

    def _form(self, now: int) -> bool:
        """Form a batch of prompts, where there can be one."""
        batch = self.scheduler.prompts()
        if not batch.rows:
            return False
        chunks = [(row.tokens, row.computed_after) for row in batch.rows]
        self.counts.add(chunks, windows=self.law.windows)
        layers = self.rules.slice_layers(sum(tokens for tokens, _ in chunks))
        self.prompts = _Prompts(batch, self.law.batch_ns(chunks), layers, now)
        return True

    def _divide(self) -> None:
        """Divide the GPU by who is at work."""
        running = len(self.scheduler.slot.running)
        both = self.prompts is not None and running > 0
        self.paces = self.rules.together[self.rules.division(running)] if both else self.rules.alone

    def _slice(self, now: int) -> None:
        """Start the next slice of the prompts, behind those before it."""
        prompts, layers = self.prompts, self.rules.layers
        if prompts is None or prompts.layers == layers:
            return
        last = min(prompts.layers + prompts.slice_layers, layers)
        whole = prompts.whole_ns * last // layers - prompts.whole_ns * prompts.layers // layers
        begin = max(now, self.stream_ns)
        if prompts.layers == 0:
            prompts.started_ns = begin
        self.stream_ns = begin + ceil_div(whole * self.paces.prefill, SCALE)
        self._busy[0] += self.stream_ns - begin
        prompts.layers = last

    def _waited(self, now: int, step: Batch) -> tuple[int, bool]:
        """Wait for the step and take in what is done: when that is, and whether prompts were."""
        prompts, slicing = self.prompts, self.prompts is not None and self.prompts.layers < self.rules.layers
        if step.rows:
            chunks = [(row.tokens, row.computed_after) for row in step.rows]
            self.counts.add(chunks, windows=self.law.windows)
            end = now + ceil_div(self.law.batch_ns(chunks) * self.paces.decode, SCALE)
            self._busy[1] += end - now
            self._tell(1, now, end, step)
            self.scheduler.update(step, end)
            now = end
        elif prompts is not None and not slicing:
            now = max(now, self.stream_ns)  # it asks over and over
        if prompts is None or slicing or self.stream_ns > now:
            return now, False
        self.scheduler.update(prompts.batch, now)
        self._tell(0, prompts.started_ns, self.stream_ns, prompts.batch)
        self.scheduler.join(prompts.batch)
        self.prompts = None
        return now, True

    def _tell(self, phase: int, start: int, end: int, batch: Batch) -> None:
        """Log a batch."""
        rows = [(row.sequence.id, row.tokens, row.computed_after) for row in batch.rows]
        self._steps[phase].append((start, end, rows, sorted(batch.preempted)))
