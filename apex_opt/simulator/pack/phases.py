"""The door to the kernel for replicas whose phases share a GPU: lays out what each has, and reads what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import phases_state as kn
from apex_opt.simulator.law import clock_overflow
from apex_opt.simulator.outcome import BatchCounts, PoolOutcome
from apex_opt.simulator.phases import SCALE, PhasedOutcome

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.simulator.phases import Phases
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]

assert kn.SCALE == SCALE
_BY_SEQUENCES = ("decode", "decode_context", "sequences", "attend", "attend_context")
_BY_TOKENS = ("mixed", "chunk", "chunk_pairs", "chunk_context")


def serves(pool: EnginePool) -> bool:
    """Whether the kernel has such laws: without windows, of one attention copy."""
    (law,) = pool.laws
    return not law.windows and law.copies == 1


def run(pool: EnginePool, phases: Phases, trace: Trace) -> PhasedOutcome:
    """Serve a trace; see `apex_opt.simulator.api.run_phases`.

    Parameters
    ----------
    pool, phases, trace
    """
    settings, n = pool.settings, len(trace)
    (law,), generated = pool.laws, trace.generated(settings.max_model_len)
    seats, tokens, count = settings.max_num_seqs, settings.max_num_batched_tokens, min(pool.replicas, n)
    by_sequences = law.decode_ns, law.sequence_ns, law.attend_ns, law.context_rate
    by_tokens = law.mixed_ns, law.chunk_ns, law.pair_rate, law.chunk_context_rate
    tables = np.concatenate((*by_sequences, *by_tokens))
    counts = np.zeros(len(_BY_SEQUENCES) * (seats + 1) + len(_BY_TOKENS) * (tokens + 1), np.int64)
    first, finish = np.empty(n, np.int64), np.empty(n, np.int64)
    starts = np.concatenate(([0], np.cumsum(generated - 1)))
    gaps = np.zeros(int(starts[-1]) + 1, np.int64)
    told = np.zeros((pool.replicas, kn.FACTS_SIZE), np.int64)
    loops = np.zeros((pool.replicas, 2, kn.LOOP_SIZE), np.int64)
    (together,) = phases.together
    loops[:, :, kn.ALONE], loops[:, :, kn.BESIDE] = phases.alone, together
    for place in range(count):
        rows, facts = np.arange(place, n, count), told[place]
        facts[[kn.REQUESTS, kn.BLOCKS, kn.FREE]] = len(rows), pool.blocks, pool.blocks
        facts[[kn.BLOCK_SIZE, kn.SEATS, kn.TOKENS]] = settings.block_size, seats, tokens
        facts[kn.CHUNKED] = settings.chunked_prefill
        requests = np.zeros((kn.COLUMNS, len(rows)), np.int64)
        columns = trace.arrival_ns, trace.prompt, generated, starts[:-1]
        requests[[kn.ARRIVAL, kn.PROMPT, kn.WANTED, kn.GAPS_AT]] = [column[rows] for column in columns]
        lists = [np.zeros(size, np.int64) for size in (len(rows) + 1, seats + 1, seats + 1, seats + 1)]
        entries.PHASES((facts, *loops[place], requests.reshape(-1), tables, counts, *lists, gaps))
        first[rows], finish[rows] = requests[kn.FIRST], requests[kn.LAST]
    if finish.max() >= 1 << 62:
        raise clock_overflow()
    did = PoolOutcome(
        preemptions=int(told[:, kn.PREEMPTIONS].sum()),
        batches=int(loops[:, :, kn.BATCHES].sum()),
        cached_tokens=0,
        counts=_counts(pool, counts),
        busy_ns=np.ascontiguousarray(loops[:, :, kn.BUSY]),
    )
    return PhasedOutcome(
        arrival_ns=trace.arrival_ns,
        first_token_ns=first,
        finish_ns=finish,
        preemptions=did.preemptions,
        batches=did.batches,
        busy_ns=did.busy_ns,
        counts=did.counts,
        gaps_ns=gaps[:-1],
        pools=(did,),
        prompts=[],
        answers=[],
        most_blocks=int(told[:, kn.MOST_BLOCKS].max()),
        held=int((told[:, kn.BLOCKS] - told[:, kn.FREE]).sum()),
    )


def _counts(pool: EnginePool, counts: I64) -> BatchCounts:
    """What the kernel counted."""
    settings, found = pool.settings, BatchCounts.empty(pool.settings)
    end = len(_BY_SEQUENCES) * (settings.max_num_seqs + 1)
    for names, part in ((_BY_SEQUENCES, counts[:end]), (_BY_TOKENS, counts[end:])):
        for name, row in zip(names, part.reshape(len(names), -1), strict=True):
            getattr(found, name)[:] = row
    return found
