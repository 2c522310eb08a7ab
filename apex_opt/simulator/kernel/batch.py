"""One batch: its time, its place in counts and log, and the answers it brings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ATTEND_NS,
    BACKLOG,
    BATCH_DECODES,
    BATCH_LOST,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BATCHES,
    CHUNK_CONTEXT_RATE,
    CHUNK_NS,
    CONTEXT_RATE,
    COUNTS_AT,
    DECODE_NS,
    E2E,
    ENDED,
    FINISH,
    FIRST,
    FIRST_STAGE,
    FOLLOWING,
    FREE,
    HANDED,
    LAST_ENDED,
    LAST_ENDED_NS,
    LIMIT,
    LOGGED,
    LOST,
    MAX_SEQS,
    MAX_TOKENS,
    MIXED_NS,
    MOST_LOST,
    MOST_ROWS,
    MOST_STEPS,
    N_ATTEND,
    N_ATTEND_CONTEXT,
    N_CHUNK,
    N_CHUNK_CONTEXT,
    N_CHUNK_PAIRS,
    N_DECODE,
    N_DECODE_CONTEXT,
    N_MIXED,
    N_SEQUENCES,
    NEVER,
    NONE,
    ORIGIN,
    PAIR_RATE,
    PASSED,
    PAUSE_NS,
    RATE_BITS,
    ROW_COMPUTED,
    ROW_REQUEST,
    ROW_SIZE,
    ROW_TOKENS,
    ROWS,
    SENT,
    SEQUENCE_NS,
    SIZE,
    STAGE_LAW,
    STAGE_SIZE,
    STEP_END,
    STEP_FREE,
    STEP_LOST,
    STEP_REPLICA,
    STEP_ROWS,
    STEP_SIZE,
    STEP_START,
    STEPS,
    STOP_ADDS,
    STOP_LIMIT,
    STOP_METRIC,
    STOP_MOST,
    STOP_SIZE,
    STOP_USED,
    STOPS,
    TPOT,
    TTFT,
    WINDOW_PAIRS,
    WINDOWS,
    WINDOWS_OF_COUNTS,
    WINDOWS_OF_LAW,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def column_nb(run: Run, column: int) -> I64:
    """A column of the requests."""
    return at(run.requests, column * run.control[SIZE])


@inner
def law_nb(run: Run, r: I64, stage: int) -> I64:
    """The tables of a stage of a replica."""
    return at(run.laws, run.stages[(r[FIRST_STAGE] + stage) * STAGE_SIZE + STAGE_LAW])


@inner
def by_sequences_nb(tables: I64, r: I64, table: int) -> I64:
    """One of the tables of a law or of counts that go by sequences."""
    return at(tables, table * (r[MAX_SEQS] + 1))


@inner
def by_tokens_nb(tables: I64, r: I64, before: int, table: int) -> I64:
    """One of those that go by tokens, after so many by sequences."""
    return at(tables, before * (r[MAX_SEQS] + 1) + (table - before) * (r[MAX_TOKENS] + 1))


@inner
def seen_pairs_nb(stamp: int, length: int) -> int:
    """`law.Window.all_pairs` of the first tokens of a sequence."""
    if stamp < 0:
        chunks = int(length / -stamp)  # exact far beyond any context; whole numbers would take a second to compile
        rest = length + chunks * stamp
        return chunks * ((stamp * (stamp - 1)) >> 1) + ((rest * (rest + 1)) >> 1)
    rising = min(length, stamp)
    return ((rising * (rising + 1)) >> 1) + (length - rising) * stamp


@inner
def pace_nb(law: I64, r: I64, n: int, context: int) -> tuple[int, int, int]:
    """How decoding of n sequences grows with their context from here on.

    Returns
    -------
    rate, full, until    2**-20 ns per token of context; those of the windows that are full; the context up to which
                         both hold
    """
    rate, full, until = by_sequences_nb(law, r, CONTEXT_RATE)[n], 0, NEVER
    windows = at(law, r[WINDOWS_OF_LAW])
    for k in range(r[WINDOWS]):
        limit, seen = n * abs(windows[k]), windows[r[WINDOWS] + k * (r[MAX_SEQS] + 1) + n]
        if context >= limit:
            full += seen * limit
        else:
            rate += seen
            until = min(until, limit)
    return rate, full, until


@inner
def chunk_seen_nb(law: I64, r: I64, c: int, held: int) -> int:
    """What the pairs of a chunk within windows take."""
    windows, seen = at(law, r[WINDOWS_OF_LAW]), r[WINDOWS] * (r[MAX_SEQS] + 2)
    r[WINDOW_PAIRS] = 0
    for k in range(r[WINDOWS]):
        pairs = seen_pairs_nb(windows[k], held) - seen_pairs_nb(windows[k], held - c)
        r[WINDOW_PAIRS] += windows[seen + k * (r[MAX_TOKENS] + 1) + c] * pairs
    total: int = r[WINDOW_PAIRS]
    return total


@inner
def chunk_ns_nb(law: I64, r: I64, c: int, held: int) -> int:
    """What a chunk adds to the time of its batch."""
    pairs = c * held - c * (c - 1) // 2
    rate = by_tokens_nb(law, r, MIXED_NS, PAIR_RATE)[c]
    context_rate = by_tokens_nb(law, r, MIXED_NS, CHUNK_CONTEXT_RATE)[c]
    total = rate * pairs + context_rate * held
    if r[WINDOWS] > 0:
        total += chunk_seen_nb(law, r, c, held)
    time_ns: int = by_tokens_nb(law, r, MIXED_NS, CHUNK_NS)[c] + (total >> RATE_BITS)
    return time_ns


@inner
def batch_ns_nb(law: I64, r: I64, chunks_ns: int) -> int:
    """`law.BatchLaw.batch_ns` of the batch in the registers, given what its chunks take one after the other."""
    rows, d = r[BATCH_ROWS], r[BATCH_DECODES]
    rate, full = by_sequences_nb(law, r, CONTEXT_RATE)[d], 0
    if r[WINDOWS] > 0:
        rate, full, _ = pace_nb(law, r, d, r[BATCH_READ])
    time_ns: int = (rate * r[BATCH_READ] + full) >> RATE_BITS
    if d == rows:
        return time_ns + by_sequences_nb(law, r, DECODE_NS)[rows]
    time_ns += by_tokens_nb(law, r, MIXED_NS, MIXED_NS)[r[BATCH_TOKENS]]
    time_ns += by_sequences_nb(law, r, SEQUENCE_NS)[rows] + by_sequences_nb(law, r, ATTEND_NS)[d]
    copies = by_tokens_nb(law, r, MIXED_NS, 9)[0]
    return time_ns + chunks_ns // min(copies, rows - d)


@inner
def count_batch_nb(run: Run, r: I64) -> None:
    """Count the batch in the registers."""
    counts = at(run.counts, r[COUNTS_AT])
    rows, d, read = r[BATCH_ROWS], r[BATCH_DECODES], r[BATCH_READ]
    if d == rows:
        count_decoding_nb(run, r, d, 1, read)
        return
    r[BATCHES] += 1
    by_sequences_nb(counts, r, N_SEQUENCES)[rows] += 1
    by_sequences_nb(counts, r, N_ATTEND)[d] += 1
    by_sequences_nb(counts, r, N_ATTEND_CONTEXT)[d] += read
    if r[WINDOWS] > 0:
        count_seen_nb(run, r, d, 1, read)
    by_tokens_nb(counts, r, N_MIXED, N_MIXED)[r[BATCH_TOKENS]] += 1


@inner
def count_decoding_nb(run: Run, r: I64, n: int, batches: int, read: int) -> None:
    """Count so many batches of n decoding sequences, which read that much context together."""
    counts = at(run.counts, r[COUNTS_AT])
    r[BATCHES] += batches
    by_sequences_nb(counts, r, N_DECODE)[n] += batches
    by_sequences_nb(counts, r, N_DECODE_CONTEXT)[n] += read
    if r[WINDOWS] > 0:
        count_seen_nb(run, r, n, batches, read)


@inner
def count_seen_nb(run: Run, r: I64, n: int, batches: int, read: int) -> None:
    """Count what is seen through windows by n decoding sequences, which held so much in that many batches in a row."""
    if batches == 0 or n == 0:
        return
    windows, counts = at(law_nb(run, r, 0), r[WINDOWS_OF_LAW]), at(run.counts, r[COUNTS_AT] + r[WINDOWS_OF_COUNTS])
    before = (read - n * (batches * (batches + 1) // 2)) // batches
    for k in range(r[WINDOWS]):
        limit = n * abs(windows[k])
        rising = max(0, min(batches, (limit - before) // n))
        seen = rising * before + n * (rising * (rising + 1) // 2) + (batches - rising) * limit
        counts[k * (r[MAX_SEQS] + 1) + n] += seen


@inner
def count_chunk_nb(run: Run, r: I64, c: int, held: int) -> None:
    counts = at(run.counts, r[COUNTS_AT])
    by_tokens_nb(counts, r, N_MIXED, N_CHUNK)[c] += 1
    by_tokens_nb(counts, r, N_MIXED, N_CHUNK_PAIRS)[c] += c * held - c * (c - 1) // 2
    by_tokens_nb(counts, r, N_MIXED, N_CHUNK_CONTEXT)[c] += held
    if r[WINDOWS] > 0:
        count_chunk_seen_nb(run, r, c, held)


@inner
def count_chunk_seen_nb(run: Run, r: I64, c: int, held: int) -> None:
    """Count the pairs of a chunk within windows."""
    windows, seen = at(law_nb(run, r, 0), r[WINDOWS_OF_LAW]), at(run.counts, r[COUNTS_AT] + r[WINDOWS_OF_COUNTS])
    for k in range(r[WINDOWS]):
        pairs = seen_pairs_nb(windows[k], held) - seen_pairs_nb(windows[k], held - c)
        seen[r[WINDOWS] * (r[MAX_SEQS] + 1) + k * (r[MAX_TOKENS] + 1) + c] += pairs


@inner
def log_row_nb(run: Run, request: int, got: int, tokens: int, computed: int) -> None:
    """Log a row, which brings so many tokens, and 16 more for each draft in it."""
    place = run.control[ROWS]
    if place < run.control[MOST_ROWS]:
        row = at(run.rows, place * ROW_SIZE)
        row[ROW_REQUEST] = 256 * request + got
        row[ROW_TOKENS] = tokens
        row[ROW_COMPUTED] = computed
    run.control[ROWS] = place + 1


@inner
def log_lost_nb(run: Run, request: int) -> None:
    place = run.control[LOST]
    if place < run.control[MOST_LOST]:
        run.lost[place] = request
    run.control[LOST] = place + 1


@inner
def log_step_nb(run: Run, r: I64, replica: int, start: int, end: int) -> None:
    """Log the batch in the registers, if batches are logged; an empty one leaves no record."""
    if run.control[LOGGED] == 0:
        return
    if r[BATCH_ROWS] == 0:
        run.control[LOST] -= r[BATCH_LOST]
        return
    place = run.control[STEPS]
    if place < run.control[MOST_STEPS]:
        step = at(run.steps, place * STEP_SIZE)
        step[STEP_REPLICA] = replica
        step[STEP_START] = start
        step[STEP_END] = end
        step[STEP_ROWS] = r[BATCH_ROWS]
        step[STEP_LOST] = r[BATCH_LOST]
        step[STEP_FREE] = r[FREE]
    run.control[STEPS] = place + 1


@inner
def log_together_nb(run: Run, r: I64, replica: int, start: int, end: int, first: int) -> int:
    """`log_step_nb` of a scheduler that others formed batches beside, whose lost are logged from a place on.

    Where its batch is empty those of the others are moved up over its own.

    Returns
    -------
    int    where the lost of the next one are logged
    """
    gone = r[BATCH_LOST]
    if run.control[LOGGED] == 1 and r[BATCH_ROWS] == 0:
        for place in range(first, min(run.control[LOST], run.control[MOST_LOST]) - gone):
            run.lost[place] = run.lost[place + gone]
        gone = 0
    log_step_nb(run, r, replica, start, end)
    place_after: int = first + gone
    return place_after


@inner
def log_taken_nb(run: Run, replica: int, now: int) -> None:
    """Log that the oldest batch is taken in: as a step without rows, where that may be later than it ends."""
    if run.control[LOGGED] == 0:
        return
    place = run.control[STEPS]
    if place < run.control[MOST_STEPS]:
        step = at(run.steps, place * STEP_SIZE)
        step[STEP_REPLICA], step[STEP_END], step[STEP_ROWS] = replica, now, 0
    run.control[STEPS] = place + 1


@inner
def answer_nb(run: Run, r: I64, i: int, now: int) -> None:
    """Request i is answered: in a closed loop its client sends the next one; the run may be over."""
    column_nb(run, FINISH)[i] = now
    r[ENDED] += 1
    if now > r[LAST_ENDED_NS]:
        r[LAST_ENDED_NS] = now
        r[LAST_ENDED] = 0
    r[LAST_ENDED] += 1
    coming = r[BACKLOG]
    if coming != NONE:
        column_nb(run, ARRIVAL)[coming] = now + run.control[PAUSE_NS]
        r[BACKLOG] = column_nb(run, FOLLOWING)[coming]
        r[SENT] += 1
    if run.control[STOPS] > 0:
        stop_nb(run, i, now)


@inner
def stop_nb(run: Run, i: int, now: int) -> None:
    """Whether a limit is passed with the answer to request i; a prompt that is handed over passes none."""
    prompts = run.control[HANDED]
    if i < prompts:
        return
    # When a request came that is answered elsewhere than its prompt is computed stands where that has no floor.
    arrival = column_nb(run, ARRIVAL)[i] if prompts == 0 else run.floors[TTFT * run.control[SIZE] + i - prompts]
    first = column_nb(run, FIRST)[i]
    later = column_nb(run, LIMIT)[i] - 1
    for row in range(run.control[STOPS]):
        stop = at(run.stops, row * STOP_SIZE)
        metric = stop[STOP_METRIC]
        value = now - run.control[ORIGIN]
        if metric == TTFT:
            value = first - arrival
        elif metric == TPOT:
            value = (now - first) // later if later > 0 else 0
        elif metric == E2E:
            value = now - arrival
        floor = run.floors[metric * run.control[SIZE] + i]
        if stop[STOP_ADDS] == 1:
            stop[STOP_USED] += value - floor
            if stop[STOP_USED] > stop[STOP_LIMIT]:
                run.control[PASSED] = 1
        else:
            # Those whose floor is above the limit are counted from the start.
            if value > stop[STOP_LIMIT] and floor <= stop[STOP_LIMIT]:
                stop[STOP_USED] += 1
            if stop[STOP_USED] >= stop[STOP_MOST]:
                run.control[PASSED] = 1
