"""Shares of a GPU that follow the load: semi-PD's controller over two phases on one GPU.

At the end of every window the times to the first token and between tokens are held against their goals. Where both
hold or both fail nothing changes. Where one fails, its phase gets more, step by step, until a model says that its goal
holds; beyond a whole GPU the other phase gets less instead. The model is fitted to the windows so far: a queue with one
server for first tokens, a / (x - load) + b, and a / y + b for later ones; before there are two different shares to fit
it to, it is the published one, scaled to what was measured. A phase goes on at its new share from the end of its batch
on.

Source: semi-PD (arXiv 2504.19867), algorithm 1 and the fits of section 5, in our own words; its public code has no
controller. That windows in which nothing was measured change nothing is assumed.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.phases import Phases
from apex_opt.simulator.reference.phases import PhasesReplica

if TYPE_CHECKING:
    from apex_opt.simulator.phases import DynamicPhases
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace

_FIRST = 0.6809, 0.022
"""Time to the first token by 1 / (x - load), published for Llama3-8B on ShareGPT; normalised."""
_LATER = 0.6284, 0.3818
"""Time per output token by 1 / y, published there as well."""


class Model:
    """A time as a / u + b, by the windows so far.

    Parameters
    ----------
    published : (a, b)    in any unit: it is scaled to what is measured
    """

    def __init__(self, published: tuple[float, float]) -> None:
        self._published = published
        self._seen: list[tuple[float, float]] = []

    def learn(self, u: float, time: float) -> None:
        """Note what was measured in a window."""
        self._seen.append((1 / u, time))

    def at(self, u: float) -> float:
        """The time to be expected; infinite where a queue would grow without end, or nothing was measured yet."""
        if u <= 0 or not self._seen:
            return float("inf")
        inverse, times = np.array(self._seen).T
        if np.ptp(inverse) > 1e-12:
            b, a = np.polynomial.polynomial.polyfit(inverse, times, 1)
            if a > 0:
                return float(a / u + b)
        a, b = self._published
        # The last window counts: load changes, and the shape alone is published.
        return float(times[-1] * (a / u + b) / (a * inverse[-1] + b))


def steps_to(
    share: int, other: int, rules: DynamicPhases, expected: Model, goal_ns: int, load: float = 0.0
) -> tuple[int, int]:
    """The share of a phase that misses its goal, and that of the other, once raised.

    Parameters
    ----------
    share, other : int    per cent of the GPU that the phase and the other one have
    rules : DynamicPhases
    expected : Model      of the time that misses its goal, by parts of the GPU
    goal_ns : int
    load : float          part of the GPU that the work which comes takes
    """
    for _ in range(rules.most_steps):
        if share + rules.step <= 100:
            share += rules.step
        elif other - rules.step >= rules.step:
            other -= rules.step
        else:
            break
        # What both have beyond a GPU is divided in their ratio.
        part = share / max(share + other, 100)
        if expected.at(part - load) <= goal_ns:
            break
    return share, other


class DynamicReplica(PhasesReplica):
    """Two loops over one pool of blocks, whose shares are changed between windows."""

    def __init__(self, pool: EnginePool, rules: DynamicPhases, trace: Trace) -> None:
        super().__init__(pool, rules.start, trace)
        self.rules, self.shares = rules, (rules.start.prefill_share, rules.start.decode_share)
        self._arrival, self._length = trace.arrival_ns, trace.prompt
        self.window_end = self.coming[0][0] + rules.window_ns
        self.first, self.later = Model(_FIRST), Model(_LATER)
        self.switches: list[tuple[int, int, int]] = []
        self._wanted = [False, False]

    def serve(self) -> None:
        """Act at every end of a batch and every arrival, and look at every window, until all is answered."""
        while True:
            times = [loop.end for loop in (self.prompts, self.answers) if loop.rows]
            if self.coming:
                times.append(self.coming[0][0])
            if not times:
                return
            if self.window_end <= min(times):
                self._judge(self.window_end)
                self.window_end += self.rules.window_ns
                continue
            self._act(min(times))

    def _act(self, now: int) -> None:
        # A phase whose batch ends now, or that has none, goes over to its new share.
        for place, loop in enumerate((self.prompts, self.answers)):
            if self._wanted[place] and (not loop.rows or loop.end == now):
                self._wanted[place] = False
                phases = Phases(prefill_share=self.shares[0], decode_share=self.shares[1])
                loop.alone, loop.together = phases.alone[place], phases.together[0][place]
        super()._act(now)

    def _judge(self, now: int) -> None:
        """Hold the window that ends now against the goals, and change the shares where one alone is missed."""
        begin, rules = now - self.rules.window_ns, self.rules
        firsts = [
            request.token_ns[0] - int(self._arrival[request.id])
            for request in self.requests
            if request.token_ns and begin < request.token_ns[0] <= now
        ]
        laters = [
            after - before
            for request in self.requests
            for before, after in pairwise(request.token_ns)
            if begin < after <= now
        ]
        if not firsts or not laters:
            return
        ttft, tpot = (float(np.percentile(times, rules.percentile)) for times in (firsts, laters))
        x, y = self.shares
        total = max(x + y, 100)
        load = self._load(begin, now)
        if x / total > load:
            self.first.learn(x / total - load, ttft)
        self.later.learn(y / total, tpot)
        late, slow = ttft > rules.ttft_ns, tpot > rules.tpot_ns
        if late == slow:
            return
        if late:
            x, y = steps_to(x, y, rules, self.first, rules.ttft_ns, load)
        else:
            y, x = steps_to(y, x, rules, self.later, rules.tpot_ns)
        if (x, y) != self.shares:
            self.shares = x, y
            self.switches.append((now, x, y))
            self._wanted = [True, True]

    def _load(self, begin: int, now: int) -> float:
        """Part of the GPU that the prompts which came in a window take, were each computed on all of it."""
        came = self._length[(self._arrival > begin) & (self._arrival <= now)]
        return sum(map(self._whole_ns, came.tolist())) / self.rules.window_ns

    def _whole_ns(self, prompt: int) -> int:
        """What a prompt takes by itself on the whole GPU, in as large batches as there may be."""
        most = self.settings.max_num_batched_tokens
        ends = [*range(most, prompt, most), prompt]
        return sum(self.law.batch_ns([(end - begin, end)]) for begin, end in pairwise([0, *ends]))
