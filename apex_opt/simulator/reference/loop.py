"""A trace served by pools of engines: whoever is next in time acts."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling
from apex_opt.figures.stops import latencies_ns
from apex_opt.simulator.content import BlockContent
from apex_opt.simulator.law import clock_overflow, never_admitted
from apex_opt.simulator.outcome import BatchCounts, Outcome, PoolOutcome, SharedCounts
from apex_opt.simulator.reference.engine import Engine
from apex_opt.simulator.reference.group import Group
from apex_opt.simulator.reference.rescheduling import Llumnix
from apex_opt.simulator.reference.router import Pull, router_of
from apex_opt.simulator.reference.sequence import Sequence
from apex_opt.simulator.reference.sglang import ALIKE, SglangEngine
from apex_opt.simulator.reference.sglang_drafts import SpeculativeSglangScheduler
from apex_opt.simulator.reference.sglang_ranks import SglangRanks
from apex_opt.simulator.reference.together import Together
from apex_opt.simulator.reference.trtllm_ranks import TrtllmRanks
from apex_opt.simulator.tokens import TokenContent

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.figures.stops import Stop
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.simulator.reference.router import Replica, Router
    from apex_opt.simulator.rescheduling import Rescheduling
    from apex_opt.workload.trace import Trace


def run_deployment(
    pools: Seq[EnginePool],
    trace: Trace,
    shares: Seq[Share],
    *,
    log: bool = False,
    gaps: bool = False,
    stops: Seq[Stop] = (),
    content: TokenContent | None = None,
    rescheduling: Rescheduling | None = None,
) -> Outcome:
    """Serve a trace; see `apex_opt.simulator.api.run_deployment` for the parameters.

    Source: our own rules for several replicas, as engines leave it to a router in front of them.

    Parameters
    ----------
    pools, trace, shares
    log : bool                  whether every batch is told
    gaps : bool                 whether the times between tokens are told
    stops : sequence of Stop    limits at which a run ends early
    content : TokenContent or None    what tokens are, where that is not what the trace says
    rescheduling : Rescheduling or None    how requests move between replicas, which then are of one pool
    """
    closed = trace.concurrency is not None
    engines = [[_replica(pool, log=log, closed=closed) for _ in range(pool.replicas)] for pool in pools]
    every = [engine for its in engines for engine in its]
    sequences = sequences_of(pools[0].settings, trace, content)
    if any(pool.settings.kv_groups != pools[0].settings.kv_groups for pool in pools):  # then requests are assigned
        for pool, share in zip(pools, shares, strict=True):
            own = sequences_of(pool.settings, trace)
            for row in share.rows:
                sequences[row] = own[row]
    moved: tuple[tuple[int, int, int, int], ...] = ()
    if rescheduling is not None:
        replicas = [engine for engine in every if isinstance(engine, Engine)]
        high = frozenset() if trace.priority is None else frozenset(np.flatnonzero(trace.priority).tolist())
        llumnix = Llumnix(replicas, pools[0].blocks, rescheduling, high)
        llumnix.serve(deque(zip(trace.arrival_ns.tolist(), sequences, strict=True)))
        moved, shares = tuple(llumnix.moved), ()
    for share in shares:
        mine = [sequences[row] for row in share.rows]
        if share.clients is None:
            arrivals = deque(zip(trace.arrival_ns[share.rows].tolist(), mine, strict=True))
            if share.routing == "pull" and share.routed:
                _serve_pulling(every[share.first : share.last], arrivals)
            else:
                _serve(every[share.first : share.last], router_of(share, pools, trace), arrivals)
        else:
            _serve_clients(every[share.first : share.last], share.clients, mine, trace.pause_ns)
    outcome = replace(_outcome(pools, engines, sequences, gaps=log or gaps), moved=moved)
    # Limits only get closer as requests are answered: cut short is what would have passed one in the end.
    times = outcome.arrival_ns, outcome.first_token_ns, outcome.finish_ns
    generated = np.array([sequence.limit for sequence in sequences])
    stopped = any(stop.passed(latencies_ns(stop.metric, *times, generated)) for stop in stops)
    return replace(outcome, stopped=stopped)


def _replica(pool: EnginePool, *, log: bool, closed: bool) -> Replica:
    """One scheduler, or a group of them."""
    if pool.ranks is not None and isinstance(pool.settings.scheduler, TrtllmScheduling):
        return TrtllmRanks(pool, log=log)
    if pool.ranks is not None and isinstance(pool.settings.scheduler, SglangScheduling):
        return SglangRanks(pool, log=log)
    if pool.ranks is not None:
        return Group(pool, log=log, closed=closed)
    if not isinstance(pool.settings.scheduler, SglangScheduling):
        return Engine(pool, log=log)
    if pool.settings.speculation is not None:
        return SglangEngine(pool, log=log, scheduler=SpeculativeSglangScheduler)
    return SglangEngine(pool, log=log)


def tells_drafts(pools: Seq[EnginePool]) -> bool:
    """Whether a log tells what came of drafts, and over groups of layers on one stage how many blocks were free.

    That of ranks does not.
    """
    if any(pool.ranks is not None for pool in pools):
        return False
    return pools[0].settings.speculation is not None or (
        bool(pools[0].settings.kv_groups) and all(len(pool.laws) == 1 for pool in pools)
    )


def sequences_of(settings: EngineSettings, trace: Trace, content: TokenContent | None = None) -> list[Sequence]:
    """The requests before they are sent.

    Parameters
    ----------
    settings, trace
    content : TokenContent or None    what tokens are, for SGLang's tree, where that is not what the trace says
    """
    limits, stated = trace.generated(settings.max_model_len).tolist(), trace.stated(settings.max_model_len).tolist()
    lengths = zip(trace.prompt.tolist(), trace.output.tolist(), limits, stated, strict=True)
    sequences = [
        Sequence(id=i, prompt=p, output=o, limit=limit, stated=most) for i, (p, o, limit, most) in enumerate(lengths)
    ]
    if settings.prefix_caching and isinstance(settings.scheduler, SglangScheduling):
        content = content or TokenContent.of(trace, limits)
        for sequence in sequences:
            numbers = content.numbers(sequence.id, sequence.prompt, sequence.limit)
            sequence.keys = numbers[settings.block_size - 1 + settings.beyond_page :: settings.block_size]
            sequence.beginning = numbers[ALIKE - 1] if len(numbers) >= ALIKE else 0
    elif settings.prefix_caching:
        blocks = BlockContent.of(trace, settings.block_size, limits)
        sizes = {group.block_size: BlockContent.of(trace, group.block_size, limits) for group in settings.groups}
        for sequence in sequences:
            sequence.keys = blocks.keys(sequence.id)
            sequence.group_keys = [sizes[group.block_size].keys(sequence.id) for group in settings.groups]
    return sequences


def next_due(engines: Seq[Replica]) -> tuple[int, Replica] | None:
    """The engine whose turn starts first, and when; of equals the first."""
    turns = [(at_ns, place) for place, engine in enumerate(engines) if (at_ns := engine.next_ns()) is not None]
    if not turns:
        return None
    at_ns, place = min(turns)
    return at_ns, engines[place]


def _serve(engines: Seq[Replica], router: Router, arrivals: deque[tuple[int, Sequence]]) -> None:
    """Requests that come on their own; of events at one time arrivals are first, in order."""
    while True:
        due = next_due(engines)
        if arrivals and (due is None or arrivals[0][0] <= due[0]):
            at_ns, sequence = arrivals.popleft()
            router.choose(sequence, at_ns, engines).add(sequence, at_ns)
        elif due is not None:
            at_ns, engine = due
            engine.turn(at_ns)
        else:
            return


def _serve_pulling(engines: Seq[Replica], arrivals: deque[tuple[int, Sequence]]) -> None:
    """Requests that wait in one queue until a replica takes them; at one time it takes before anything else happens."""
    queue: deque[Sequence] = deque()
    while True:
        taken = Pull.taker(queue[0], engines) if queue else None
        due = next_due(engines)
        coming_ns = arrivals[0][0] if arrivals else None
        if taken is not None and (due is None or taken[0] <= due[0]) and (coming_ns is None or taken[0] <= coming_ns):
            sequence = queue.popleft()
            taken[1].add(sequence, sequence.arrival_ns)
        elif coming_ns is not None and (due is None or coming_ns <= due[0]):
            sequence = arrivals.popleft()[1]
            sequence.arrival_ns = coming_ns
            queue.append(sequence)
        elif due is not None:
            at_ns, engine = due
            while engine.next_ns() == at_ns:
                engine.turn(at_ns)
        else:
            return


def _serve_clients(engines: Seq[Replica], clients: int, sequences: Seq[Sequence], pause_ns: int) -> None:
    """Requests of a closed loop, each sent a pause after another is answered.

    Clients keep to their replica: client j to replica j mod R, and requests are dealt in turn.
    """
    for place, engine in enumerate(engines):
        backlog = deque(sequences[place :: len(engines)])
        for _ in range(place, clients, len(engines)):
            if backlog:
                engine.add(backlog.popleft(), 0)
        while (at_ns := engine.next_ns()) is not None:
            for answered in engine.turn(at_ns)[: len(backlog)]:
                assert answered.answered_ns is not None
                engine.add(backlog.popleft(), answered.answered_ns + pause_ns)


def pool_outcome(engines: Seq[Replica]) -> PoolOutcome:
    """What the replicas of one pool did."""
    return PoolOutcome(
        preemptions=sum(engine.preemptions for engine in engines),
        batches=sum(engine.batches for engine in engines),
        cached_tokens=sum(engine.cached for engine in engines),
        counts=sum((engine.counts for engine in engines[1:]), engines[0].counts),
        busy_ns=np.array([engine.busy_ns for engine in engines], np.int64),
        shared=_shared(engines),
    )


def _outcome(pools: Seq[EnginePool], engines: Seq[Seq[Replica]], sequences: Seq[Sequence], *, gaps: bool) -> Outcome:
    """Put the engines' results together, requests in their own order."""
    every = [engine for its in engines for engine in its]
    if any(engine.now >= 1 << 62 for engine in every):
        raise clock_overflow()
    if any(sequence.answered_ns is None for sequence in sequences):
        raise never_admitted()
    found = tuple(map(pool_outcome, engines))
    most = max(len(pool.laws) for pool in pools)
    steps = None if every[0].steps is None else [step for engine in every for step in engine.steps or ()]
    formed = [batch for engine in every if isinstance(engine, Engine) for batch in engine.formed]
    return Outcome(
        arrival_ns=np.array([s.arrival_ns for s in sequences], np.int64),
        first_token_ns=np.array([s.token_ns[0] for s in sequences], np.int64),
        finish_ns=np.array([s.answered_ns for s in sequences], np.int64),
        preemptions=sum(pool.preemptions for pool in found),
        cached_tokens=sum(pool.cached_tokens for pool in found),
        batches=sum(pool.batches for pool in found),
        busy_ns=np.array([engine.busy_ns + [0] * (most - len(engine.busy_ns)) for engine in every], np.int64),
        counts=found[0].counts if len(found) == 1 else BatchCounts.empty(pools[0].settings),
        steps=steps,
        steps_per_replica=None if steps is None else [len(engine.steps or ()) for engine in every],
        drafted=None
        if steps is None or not tells_drafts(pools)
        else [(batch.free, [(row.drafts, row.got) for row in batch.rows]) for batch in formed],
        used=[batch.used for batch in formed] if steps is not None and pools[0].settings.kv_groups else None,
        groups=() if steps is None else tuple(e.logged() for e in every if isinstance(e, Group | Together)),
        gaps_ns=np.array([b - a for s in sequences for a, b in pairwise(s.token_ns)], np.int64) if gaps else None,
        pools=found,
    )


def _shared(engines: Seq[Replica]) -> SharedCounts | None:
    """Counts of the forwards of several ranks, over replicas."""
    found = [engine.shared for engine in engines if engine.shared is not None]
    return sum(found[1:], found[0]) if found else None
