"""Replicas that compute both phases side by side: each request goes to one of them in turn, and their runs are one."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

from apex_opt.simulator.law import clock_overflow
from apex_opt.simulator.outcome import PoolOutcome
from apex_opt.simulator.phases import PhasedOutcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.simulator.outcome import BatchCounts, Step
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace


class Replica(Protocol):
    """A replica with the requests that it gets, which tells what it did once it has served them.

    `token_ns` is of each request, in order; `steps` and `busy_ns` are of prompts and of answers.
    """

    counts: BatchCounts
    preemptions: int
    most_blocks: int

    @property
    def held(self) -> int: ...
    @property
    def token_ns(self) -> list[list[int]]: ...
    @property
    def steps(self) -> tuple[list[Step], list[Step]]: ...
    @property
    def busy_ns(self) -> tuple[int, int]: ...

    def serve(self) -> None: ...


def serve(pool: EnginePool, trace: Trace, replica: Callable[[Trace], Replica]) -> PhasedOutcome:
    """Serve a trace; see `apex_opt.simulator.api.run_phases`.

    Parameters
    ----------
    pool, trace
    replica : callable    a replica for the requests that it gets
    """
    count = min(pool.replicas, len(trace))
    rows = [np.arange(place, len(trace), count) for place in range(count)]
    found = [replica(trace.picked(mine)) for mine in rows]
    token_ns: list[list[int]] = [[] for _ in range(len(trace))]
    for one, mine in zip(found, rows, strict=True):
        one.serve()
        for number, times in zip(mine.tolist(), one.token_ns, strict=True):
            token_ns[number] = times
    if max(times[-1] for times in token_ns) >= 1 << 62:
        raise clock_overflow()

    def told(phase: int) -> list[Step]:
        """The batches of a phase, with requests by their own numbers."""
        return [
            (start, end, [(int(mine[i]), c, held) for i, c, held in batch], [int(mine[i]) for i in lost])
            for one, mine in zip(found, rows, strict=True)
            for start, end, batch, lost in one.steps[phase]
        ]

    prompts, answers = told(0), told(1)
    busy = [one.busy_ns for one in found] + [(0, 0)] * (pool.replicas - count)
    did = PoolOutcome(
        preemptions=sum(one.preemptions for one in found),
        batches=len(prompts) + len(answers),
        cached_tokens=0,
        counts=sum((one.counts for one in found[1:]), found[0].counts),
        busy_ns=np.array(busy, np.int64),
    )
    return PhasedOutcome(
        arrival_ns=trace.arrival_ns,
        first_token_ns=np.array([times[0] for times in token_ns], np.int64),
        finish_ns=np.array([times[-1] for times in token_ns], np.int64),
        preemptions=did.preemptions,
        batches=did.batches,
        busy_ns=did.busy_ns,
        counts=did.counts,
        gaps_ns=np.array([b - a for times in token_ns for a, b in pairwise(times)], np.int64),
        steps=[step for one in found for step in sorted((*one.steps[0], *one.steps[1]), key=lambda step: step[:2])],
        steps_per_replica=[sum(map(len, one.steps)) for one in found] + [0] * (pool.replicas - count),
        pools=(did,),
        prompts=prompts,
        answers=answers,
        most_blocks=max(one.most_blocks for one in found),
        held=sum(one.held for one in found),
        switches=[(place, *switch) for place, one in enumerate(found) for switch in getattr(one, "switches", ())],
    )
