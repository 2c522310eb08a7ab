"""Runs by compiled code: which memory and which entries of the kernel an engine needs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.simulator import pack
from apex_opt.simulator.pack_router import RULES
from apex_opt.simulator.pack_sglang import SglangMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.figures.stops import Stop
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.simulator.tokens import TokenContent
    from apex_opt.workload.trace import Trace


def routes(pools: Sequence[EnginePool], shares: Sequence[Share]) -> bool:
    """Whether the kernel has the routers of all shares; the others are served by the reference."""
    beyond = {share.routing for share in shares if share.routed} - {"least_loaded"}
    return not beyond or (beyond <= RULES.keys() and pack.routes(pools, beyond))


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
    content : TokenContent or None    what tokens are, where that is not what the trace says
    """
    if not all(isinstance(pool.settings.scheduler, SglangScheduling) for pool in pools):
        return pack.run(pools, trace, shares, log=log, gaps=gaps, stops=stops, floors=floors)
    nodes = 1
    while True:
        build = partial(SglangMemory, pools, trace, shares, stops, floors, content=content, nodes=nodes)
        memory = pack.served(build, logged=log or gaps)
        if not memory.crowded:
            return memory.outcome(log=log, gaps=gaps)
        nodes *= 4
