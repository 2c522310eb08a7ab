"""Runs a trace through the kernel, again where it turns out that its memory had too little room."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.simulator.pack.memory import Memory
from apex_opt.simulator.pack.sglang import SglangMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.figures.stops import Stop
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.simulator.pack.memory import Room
    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.simulator.tokens import TokenContent
    from apex_opt.workload.trace import Trace

M = TypeVar("M", bound=Memory)


def run(
    pools: Sequence[EnginePool],
    trace: Trace,
    shares: Sequence[Share],
    *,
    log: bool = False,
    gaps: bool = False,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
    content: TokenContent | None = None,
) -> Outcome:
    """Run a trace through the kernel; see `apex_opt.simulator.api.run_deployment` for the parameters.

    Parameters
    ----------
    pools, trace, shares
    log : bool                  whether every batch is told
    gaps : bool                 whether the times between tokens are told
    stops : sequence of Stop    limits at which a run ends early
    floors : Outcome or None    what no request can beat
    content : TokenContent or None    what tokens are to SGLang, where that is not what the trace says
    """
    build: Callable[..., Memory] = partial(Memory, pools, trace, shares, stops, floors, published=log)
    if all(isinstance(pool.settings.scheduler, SglangScheduling) for pool in pools):
        build = partial(SglangMemory, pools, trace, shares, stops, floors, content=content)
    return served(build, logged=log or gaps).outcome(log=log, gaps=gaps)


def served(build: Callable[..., M], *, logged: bool) -> M:
    """The memory of a finished run; of one that is logged with room for all its batches.

    Parameters
    ----------
    build : makes it, given `room` and `spare` as of `Memory`
    logged : bool    whether there is a log: a first run, without room for any batch, counts them
    """
    room: Room | None = (0,) * 6 if logged else None
    spare = 1
    while True:
        memory = build(room=room, spare=spare)
        memory.serve()
        if memory.crowded:
            spare *= 4
        elif room is None or memory.stopped or all(map(int.__le__, memory.used, room)):
            return memory
        else:
            room = memory.used
