"""A trace served by prefill and decode instances, as vLLM hands prompts over or as SGLang does."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.figures.stops import latencies_ns
from apex_opt.simulator.law import clock_overflow, never_admitted
from apex_opt.simulator.outcome import BatchCounts, DisaggregatedOutcome
from apex_opt.simulator.reference import handover as reading
from apex_opt.simulator.reference import pushing
from apex_opt.simulator.reference.loop import pool_outcome
from apex_opt.simulator.reference.sglang import SglangScheduler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.figures.stops import Stop
    from apex_opt.simulator.handover import Handover
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.reference.engine import Engine
    from apex_opt.simulator.reference.router import Router
    from apex_opt.workload.trace import Trace


def run(
    prefill: EnginePool,
    decode: EnginePool,
    handover: Handover,
    trace: Trace,
    routers: tuple[Router, Router],
    *,
    log: bool,
    gaps: bool,
    stops: Sequence[Stop] = (),
) -> DisaggregatedOutcome:
    """Serve a trace; see `apex_opt.simulator.api.run_disaggregated` for the parameters.

    Parameters
    ----------
    prefill, decode, handover, trace
    routers : before the instances of either side
    log : bool     whether every batch is told
    gaps : bool    whether the times between tokens are told
    stops : limits whose passing ends the run
    """
    pushed = isinstance(prefill.settings.scheduler, SglangScheduling)
    kind = pushing.Deployment if pushed else reading.Deployment
    deployment = kind(prefill, decode, handover, trace, routers, log=log)
    deployment.serve()
    if any(sequence.answered_ns is None for sequence in deployment.answers):
        raise never_admitted()
    instances = [*deployment.prefill, *deployment.decode]
    if any(instance.now >= 1 << 62 for instance in instances):
        raise clock_overflow()
    pools = (pool_outcome(deployment.prefill), pool_outcome(deployment.decode))
    steps = [step for instance in instances for step in instance.steps or ()] if log else None
    answers, reads = deployment.answers, np.array(deployment.reads, np.int64)
    tokens = [b - a for s in answers for a, b in pairwise(s.token_ns)]
    blocks = np.repeat([prefill.blocks, decode.blocks], [prefill.replicas, decode.replicas])
    found = DisaggregatedOutcome(
        arrival_ns=np.array(deployment.coming.came, np.int64),
        first_token_ns=np.array([s.token_ns[0] for s in answers], np.int64),
        finish_ns=np.array([s.answered_ns for s in answers], np.int64),
        preemptions=sum(pool.preemptions for pool in pools),
        cached_tokens=sum(pool.cached_tokens for pool in pools),
        batches=sum(pool.batches for pool in pools),
        busy_ns=np.concatenate([pool.busy_ns for pool in pools]),
        counts=BatchCounts.empty(prefill.settings),
        steps=steps,
        steps_per_replica=[len(instance.steps or ()) for instance in instances] if log else None,
        gaps_ns=np.array(tokens, np.int64) if log or gaps else None,
        pools=pools,
        prefill=np.array([deployment.sides[0].place_of[s.id] for s in answers], np.int64),
        decode=np.array([deployment.sides[1].place_of[s.id] for s in answers], np.int64),
        prefilled_ns=np.array([s.answered_ns for s in deployment.prompts], np.int64),
        forwarded_ns=np.array([s.arrival_ns for s in answers], np.int64),
        read_ns=reads[:, :2],
        read_blocks=reads[:, 2],
        held=blocks - [_free(instance) for instance in instances],
        preemptions_of=np.array([instance.preemptions for instance in instances], np.int64),
    )
    times = found.arrival_ns, found.first_token_ns, found.finish_ns
    generated = np.array([sequence.limit for sequence in answers])
    return replace(found, stopped=any(stop.passed(latencies_ns(stop.metric, *times, generated)) for stop in stops))


def _free(instance: Engine) -> int:
    """KV blocks of an instance that nobody holds."""
    scheduler = instance.scheduler
    return scheduler.free if isinstance(scheduler, SglangScheduler) else scheduler.blocks.free
