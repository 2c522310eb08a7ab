"""A replica whose prompts and answers are computed side by side, over one KV pool.

Two loops act on their own: one forms batches of prompts, first come first served, the other computes a token of every
request that is being answered. A prompt takes its blocks and its seat when its first batch is formed, and keeps both
when it goes over to the other loop: its last batch yields the first token. Where a token finds no free block, the
request that came over last gives way and is computed again from the front of the queue; prompts never do. At one time
batches that end come first, then arrivals, then new batches; of these as of those answers come before prompts, as the
loop of the answers owns the pool.

Source: semi-PD (arXiv 2504.19867), in our own words; who gives way is vLLM's rule.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from apex_opt.simulator.outcome import BatchCounts
from apex_opt.simulator.phases import SCALE
from apex_opt.simulator.reference.shared import Replica
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.simulator.outcome import Step
    from apex_opt.simulator.phases import Phases
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace


@dataclass(slots=True, eq=False)
class _Request:
    """A request: its tokens, those computed since it was last admitted, and its blocks."""

    id: int
    prompt: int
    wanted: int
    computed: int = 0
    blocks: int = 0
    token_ns: list[int] = field(default_factory=list)

    @property
    def known(self) -> int:
        return self.prompt + len(self.token_ns)


@dataclass(slots=True, eq=False)
class _Loop:
    """A phase: its paces alone and beside the other, and the batch under way, as it would take the whole GPU."""

    alone: int
    together: int
    rows: list[tuple[_Request, int]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    started: int = 0
    since: int = 0
    left: int = 0
    factor: int = SCALE
    end: int = 0
    busy_ns: int = 0
    steps: list[Step] = field(default_factory=list)

    def start(self, now: int, left: int) -> None:
        """A batch that the whole GPU would compute in so long."""
        self.started = self.since = now
        self.left, self.factor = left, self.alone
        self.end = now + ceil_div(left * self.factor, SCALE)

    def at_pace(self, now: int, factor: int) -> None:
        """From now on the batch goes at another pace."""
        if self.rows and factor != self.factor:
            self.left -= (now - self.since) * SCALE // self.factor
            self.since, self.factor = now, factor
            self.end = now + ceil_div(self.left * factor, SCALE)

    def ended(self) -> list[tuple[_Request, int]]:
        """The rows of the batch under way, which is done."""
        rows, self.rows = self.rows, []
        self.steps.append((self.started, self.end, [(r.id, c, r.computed) for r, c in rows], self.lost))
        self.busy_ns += self.end - self.started
        self.lost = []
        return rows


class PhasesReplica(Replica):
    """Two loops over one pool of blocks."""

    def __init__(self, pool: EnginePool, phases: Phases, trace: Trace) -> None:
        settings = self.settings = pool.settings
        (self.law,) = pool.laws
        self.blocks = self.free = pool.blocks
        generated = trace.generated(settings.max_model_len)
        self.requests = [
            _Request(i, int(p), int(g)) for i, (p, g) in enumerate(zip(trace.prompt, generated, strict=True))
        ]
        self.coming = deque(zip(trace.arrival_ns.tolist(), self.requests, strict=True))
        self.waiting: deque[_Request] = deque()
        self.entered: deque[_Request] = deque()  # prompts that have blocks and are not computed to their end
        self.answered: list[_Request] = []
        (together,) = phases.together
        self.prompts, self.answers = (
            _Loop(alone, beside) for alone, beside in zip(phases.alone, together, strict=True)
        )
        self.counts = BatchCounts.empty(settings, len(self.law.windows))
        self.preemptions = self.most_blocks = 0

    @property
    def held(self) -> int:
        return self.blocks - self.free

    @property
    def token_ns(self) -> list[list[int]]:
        return [request.token_ns for request in self.requests]

    @property
    def steps(self) -> tuple[list[Step], list[Step]]:
        return self.prompts.steps, self.answers.steps

    @property
    def busy_ns(self) -> tuple[int, int]:
        return self.prompts.busy_ns, self.answers.busy_ns

    def serve(self) -> None:
        """Act at every end of a batch and every arrival until all is answered."""
        while True:
            times = [loop.end for loop in (self.prompts, self.answers) if loop.rows]
            if self.coming:
                times.append(self.coming[0][0])
            if not times:
                return
            self._act(min(times))

    def _act(self, now: int) -> None:
        if self.answers.rows and self.answers.end == now:
            for request, _ in self.answers.ended():
                self._token(request, now)
            self.answered = [request for request in self.answered if request.blocks]
        if self.prompts.rows and self.prompts.end == now:
            for request, _ in self.prompts.ended():
                if request.computed == request.known:
                    self.entered.remove(request)
                    self._token(request, now)
                    if request.blocks:
                        self.answered.append(request)
        while self.coming and self.coming[0][0] == now:
            self.waiting.append(self.coming.popleft()[1])
        if not self.answers.rows:
            self._answer(now)
        if not self.prompts.rows:
            self._prompt(now)
        both = bool(self.answers.rows and self.prompts.rows)
        for loop in (self.answers, self.prompts):
            loop.at_pace(now, loop.together if both else loop.alone)

    def _token(self, request: _Request, now: int) -> None:
        """A request has a token more; after its last one its blocks are free."""
        request.token_ns.append(now)
        if len(request.token_ns) == request.wanted:
            self._release(request)

    def _release(self, request: _Request) -> None:
        self.free += request.blocks
        request.blocks = 0

    def _take(self, request: _Request, tokens: int) -> bool:
        """Blocks for so many tokens, where they are free."""
        more = ceil_div(tokens, self.settings.block_size) - request.blocks
        if more > self.free:
            return False
        self.free -= more
        request.blocks += more
        self.most_blocks = max(self.most_blocks, self.blocks - self.free)
        return True

    def _answer(self, now: int) -> None:
        """A token of every request that is answered."""
        rows: list[tuple[_Request, int]] = []
        while len(rows) < len(self.answered):
            request = self.answered[len(rows)]
            if self._take(request, request.computed + 1):
                rows.append((request, 1))
                continue
            victim = self.answered.pop()
            self._release(victim)
            victim.computed = 0
            self.waiting.appendleft(victim)
            self.preemptions += 1
            self.answers.lost.append(victim.id)
        self._start(self.answers, rows, now)

    def _prompt(self, now: int) -> None:
        """Prompts in the order in which they came, as many as there are tokens, seats and blocks for."""
        left, rows = self.settings.max_num_batched_tokens, list[tuple[_Request, int]]()
        for request in self.entered:
            rows.append((request, min(left, request.known - request.computed)))
            left -= rows[-1][1]
        while self.waiting and left and len(self.entered) + len(self.answered) < self.settings.max_num_seqs:
            request = self.waiting[0]
            whole = self.settings.chunked_prefill or request.known <= left
            if not whole or not self._take(request, request.known):
                break
            self.entered.append(self.waiting.popleft())
            rows.append((request, min(left, request.known)))
            left -= rows[-1][1]
        self._start(self.prompts, rows, now)

    def _start(self, loop: _Loop, rows: list[tuple[_Request, int]], now: int) -> None:
        if not rows:
            return
        for request, c in rows:
            request.computed += c
        chunks = [(c, request.computed) for request, c in rows]
        loop.rows = rows
        loop.start(now, self.law.batch_ns(chunks))
        self.counts.add(chunks, windows=self.law.windows)
