"""The only door to the compiled kernel: checks ranges, casts to declared column arrays, calls, unpacks."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.plan.engine import POLICIES
from apex_opt.simulator import kernel as kn
from apex_opt.simulator.content import BlockContent
from apex_opt.simulator.gaps import gaps_ns
from apex_opt.simulator.kernel_cache import is_ready
from apex_opt.simulator.law import RATE_BITS, BatchLaw, clock_overflow
from apex_opt.simulator.outcome import BatchCounts, Outcome
from apex_opt.simulator.stop import METRICS, latencies_ns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.plan.engine import EngineSettings
    from apex_opt.simulator.outcome import Routing, Step
    from apex_opt.simulator.stop import Stop
    from apex_opt.workload.trace import Trace

assert kn.RATE_BITS == RATE_BITS


def run(
    settings: EngineSettings,
    blocks: int,
    laws: Sequence[BatchLaw],
    trace: Trace,
    *,
    replicas: int = 1,
    routing: Routing = "round_robin",
    log: bool = False,
    gaps: bool = False,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
) -> Outcome:
    """Run a trace through the kernel; see `apex_opt.simulator.api.simulate` for the parameters."""
    packed_laws = pack_laws(laws)
    capacity = (0, 0, 0)
    while True:
        outcome, batches = _run_once(
            settings, blocks, packed_laws, trace, replicas, routing, capacity if log or gaps else None, stops, floors
        )
        needed = int(batches.at[0]), int(batches.at[1]), int(batches.at[2])
        if not log and (not gaps or outcome.stopped):
            return outcome
        if all(n <= c for n, c in zip(needed, capacity, strict=True)):
            break
        capacity = needed
    outcome = replace(outcome, gaps_ns=_gaps(batches, trace.generated(settings.max_model_len)))
    if not log:
        return outcome
    return replace(outcome, steps=_steps(batches), steps_per_replica=_steps_per_replica(batches, len(outcome.busy_ns)))


def needs_compiling(settings: EngineSettings, stages: int) -> bool:
    """Whether a run of this kind will compile its engine first: nothing on disk is of the source as it is."""
    engine = kn.advance_queued_nb if _is_general(settings, stages) else kn.advance_single_nb
    return not is_ready(engine)


def _is_general(settings: EngineSettings, stages: int) -> bool:
    """Whether a run needs the engine that walks the running sequences."""
    return (
        stages > 1 or settings.long_prefill_token_threshold > 0 or settings.prefix_caching or settings.policy != "vllm"
    )


def pack_laws(laws: Sequence[BatchLaw]) -> kn.Laws:
    """The stages' tables, a row per stage."""
    columns = {f.name: _column([getattr(law, f.name) for law in laws]) for f in fields(BatchLaw) if f.name != "copies"}
    return kn.Laws(**columns, copies=_column([np.array([law.copies], np.int64) for law in laws]))


def _column(rows: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.ascontiguousarray(np.stack(rows), dtype=np.int64)


def _run_once(
    settings: EngineSettings,
    blocks: int,
    laws: kn.Laws,
    trace: Trace,
    replicas: int,
    routing: Routing,
    capacity: tuple[int, int, int] | None,
    stops: Sequence[Stop],
    floors: Outcome | None,
) -> tuple[Outcome, kn.Log]:
    stages = laws.decode_ns.shape[0]
    depth = stages if stages > 1 else (2 if settings.async_scheduling else 1)
    if settings.policy == "static":
        depth = 1
    limits = kn.Limits(
        settings.max_num_seqs,
        settings.max_num_batched_tokens,
        settings.max_model_len,
        int(settings.chunked_prefill),
        settings.long_prefill_token_threshold,
        settings.block_size,
        int(settings.async_scheduling),
        depth,
        stages,
        POLICIES.index(settings.policy),
    )
    n = len(trace.prompt)
    requests = kn.Requests(
        arrival=np.array(trace.arrival_ns, np.int64),
        prompt=np.array(trace.prompt, np.int64),
        output=np.array(trace.output, np.int64),
        limit=trace.generated(settings.max_model_len).astype(np.int64),
        following=np.full(n, kn.NONE, np.int64),
        first=np.zeros(n, np.int64),
        finish=np.zeros(n, np.int64),
    )
    closed = trace.concurrency is not None
    deal = routing == "round_robin" or closed or replicas == 1
    lanes = 1 if deal else replicas
    queued = _is_general(settings, stages)
    work = _work(
        limits, requests, replicas, lanes, blocks, 1 if queued else 1 << int(requests.limit.max()).bit_length()
    )
    packed_stops = _stops(stops, floors, requests, trace)
    cache = _cache(settings, trace, requests, lanes, blocks)
    counts_arrays = BatchCounts.empty(settings)
    counts = kn.Counts(**{f.name: getattr(counts_arrays, f.name) for f in fields(BatchCounts)})
    sizes = capacity or (0, 0, 0)
    log = kn.Log(
        int(capacity is not None),
        np.zeros(3, np.int64),
        np.zeros((sizes[0], 5), np.int64),
        np.zeros((sizes[1], 3), np.int64),
        np.zeros(sizes[2], np.int64),
    )
    if deal:
        active = min(replicas, trace.concurrency) if trace.concurrency is not None else replicas
        if n > active:
            requests.following[:-active] = np.arange(active, n)
        if trace.concurrency is not None:
            requests.arrival[:] = np.where(np.arange(n) < trace.concurrency, 0, kn.NEVER)
        replicas = min(active, n)
    kn.simulate_nb(
        1 if queued else None,
        int(not deal),
        replicas,
        trace.concurrency or 0,
        limits,
        laws,
        requests,
        work,
        cache,
        packed_stops,
        counts,
        log,
    )
    state = work.state
    assert not state[:, kn.ERROR].any(), "a turn with work scheduled nothing"
    if not packed_stops.passed[0] and int(state[:, kn.ENDED].sum()) < n:
        raise clock_overflow()
    outcome = Outcome(
        arrival_ns=requests.arrival,
        first_token_ns=requests.first,
        finish_ns=requests.finish,
        preemptions=int(state[:, kn.PREEMPTIONS].sum()),
        cached_tokens=int(state[:, kn.CACHED].sum()),
        batches=int(state[:, kn.BATCHES].sum()),
        busy_ns=work.busy,
        counts=counts_arrays,
        stopped=bool(packed_stops.passed[0]),
    )
    return outcome, log


def _work(limits: kn.Limits, requests: kn.Requests, replicas: int, together: int, blocks: int, ring: int) -> kn.Work:
    """Scratch memory; replicas that run one after the other share the first row of the large arrays."""
    n = len(requests.arrival)
    state = np.zeros((replicas, kn.STATE_SIZE), np.int64)
    state[:, [kn.FIRST_RUN, kn.LAST_RUN, kn.PARTIAL, kn.STACK, kn.NEXT, kn.TAIL, kn.BACKLOG]] = kn.NONE
    state[:, kn.FREE] = blocks
    return kn.Work(
        generated=np.zeros(n, np.int64),
        joined=np.zeros(n, np.int64),
        offset=np.zeros(n, np.int64),
        run_before=np.zeros(n, np.int64),
        run_after=np.zeros(n, np.int64),
        slot_before=np.zeros(n, np.int64),
        slot_after=np.zeros(n, np.int64),
        under=np.zeros(n, np.int64),
        computed=np.zeros(n, np.int64),
        in_flight=np.zeros(n, np.int64),
        blocks=np.zeros(n, np.int64),
        place=np.zeros(n, np.int64),
        state=state,
        ring=np.full((together, ring), kn.NONE, np.int64),
        residue=np.zeros((together, limits.block_size), np.int64),
        running=np.zeros((together, limits.max_num_seqs), np.int64),
        queue_end=np.zeros((together, limits.depth), np.int64),
        queue_size=np.zeros((together, limits.depth), np.int64),
        queue_rows=np.zeros((together, limits.depth, limits.max_num_seqs), np.int64),
        stage_free=np.zeros((replicas, limits.stages), np.int64),
        busy=np.zeros((replicas, limits.stages), np.int64),
        entering=np.zeros((together, 2, limits.max_num_seqs), np.int64),
    )


def _stops(stops: Sequence[Stop], floors: Outcome | None, requests: kn.Requests, trace: Trace) -> kn.Stops:
    """Limits as columns; what is left for sums once every request has its floor."""
    least = np.zeros((len(METRICS), len(requests.arrival) if stops else 0), np.int64)
    if stops and floors is not None:
        times = floors.arrival_ns, floors.first_token_ns, floors.finish_ns
        for row, metric in enumerate(METRICS):
            least[row] = latencies_ns(metric, *times, requests.limit)
    limits = [
        stop.limit_ns - (int(least[METRICS.index(stop.metric)].sum()) if stop.kind == "sum" else 0) for stop in stops
    ]
    return kn.Stops(
        metric=np.array([METRICS.index(stop.metric) for stop in stops], np.int64),
        adds=np.array([stop.kind == "sum" for stop in stops], np.int64),
        limit=np.array(limits, np.int64),
        most=np.array([stop.most for stop in stops], np.int64),
        used=np.zeros(len(stops), np.int64),
        floors=least,
        origin=0 if trace.concurrency is not None else int(trace.arrival_ns[0]),
        passed=np.zeros(1, np.int64),
    )


def _cache(settings: EngineSettings, trace: Trace, requests: kn.Requests, lanes: int, blocks: int) -> kn.Cache:
    """Scratch memory of prefix caching; next to nothing where it is off."""
    on = settings.prefix_caching
    n, seats, pool = (len(requests.arrival), settings.max_num_seqs, blocks) if on else (0, 0, 0)
    content = _content(trace, settings.block_size, settings.max_model_len) if on else None
    longest = int((requests.prompt + requests.limit).max()) // settings.block_size + 1 if on else 0
    keys = content.total if content else 0
    if max(keys, pool) >= 1 << 31:
        raise UsageError(f"prefix caching: {max(keys, pool):,} blocks of content are too many; use a shorter trace")
    nothing = np.zeros(0, np.int64)
    return kn.Cache(
        on=int(on),
        piece_blocks=content.piece_blocks if content else 1,
        pieces=content.pieces if content else nothing,
        starts=np.array(content.starts) if content else nothing,
        own=np.ascontiguousarray(content.own) if content else nothing,
        shared_blocks=content.shared_blocks if content else nothing,
        slot=np.zeros(n, np.int64),
        registered=np.zeros(n, np.int64),
        slots=np.zeros((lanes, seats), np.int64),
        # Half the bytes, as these are large and read all over.
        table=np.zeros((lanes, seats, min(longest, pool)), np.int32),
        block=np.zeros((lanes, pool + 1, 8), np.int32),
        holder=np.zeros((lanes, keys, 2), np.int32),
        memo=np.zeros((lanes, 4), np.int64),
    )


@lru_cache(maxsize=4)
def _content(trace: Trace, block_size: int, max_model_len: int) -> BlockContent:
    """What the blocks of a trace hold, the same for every plan; the kernel only reads it."""
    return BlockContent.of(trace, block_size, trace.generated(max_model_len), _number_pieces)


def _number_pieces(starts: NDArray[np.int64], content: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """`content.number_pieces`, compiled."""
    pieces, previous = np.zeros(len(content), np.int64), np.zeros(len(content), np.int64)
    slots = np.full(2 << len(content).bit_length(), kn.NONE, np.int64)
    return pieces, int(kn.number_pieces_nb(np.array(starts), np.array(content), pieces, previous, slots))


def _gaps(log: kn.Log, generated: NDArray[np.int64]) -> NDArray[np.int64]:
    """Times between tokens: a token comes when the batch that yields it ends."""
    yields = (log.rows[:, 0] & 1).astype(bool)
    end_ns = np.repeat(log.steps[:, 2], log.steps[:, 3])
    return gaps_ns(log.rows[yields, 0] >> 1, end_ns[yields], generated)


def _steps_per_replica(log: kn.Log, replicas: int) -> list[int]:
    return [int(count) for count in np.bincount(log.steps[:, 0], minlength=replicas)]


def _steps(log: kn.Log) -> list[Step]:
    """The log as lists, replica by replica."""
    rows, preempted = log.rows.tolist(), log.preempted.tolist()
    steps: list[tuple[int, Step]] = []
    row = gone = 0
    for replica, start, end, size, lost in log.steps.tolist():
        chunk = [(i >> 1, tokens, computed) for i, tokens, computed in rows[row : row + size]]
        steps.append((replica, (start, end, chunk, sorted(preempted[gone : gone + lost]))))
        row += size
        gone += lost
    return [step for _, step in sorted(steps, key=lambda s: s[0])]
