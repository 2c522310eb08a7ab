"""The engine of TensorRT-LLM: `reference.trtllm`, which names the rules and their source.

The active requests stand in a list in the order in which they came and are walked once a turn. In a stretch in which
nobody comes, ends or gives way, all that decode get a token in each batch: it is passed batch by batch, and what the
requests have is put right at its end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    answer_nb,
    by_sequences_nb,
    chunk_ns_nb,
    column_nb,
    count_chunk_nb,
    count_seen_nb,
    law_nb,
    log_row_nb,
    log_step_nb,
    log_taken_nb,
    pace_nb,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.reuse import claim_nb, store_nb, take_free_nb
from apex_opt.simulator.kernel.speculative import drafts_nb, launch_nb
from apex_opt.simulator.kernel.stages import launching_nb, newest_nb, queued_nb, through_stages_nb
from apex_opt.simulator.kernel.state import (
    ACCEPTED_AT,
    ADMITTED,
    ARRIVAL,
    ASKING_SIZE,
    ASKS,
    ASYNCHRONOUS,
    BATCH_CHUNKS_NS,
    BATCH_DECODES,
    BATCH_HELD,
    BATCH_LOST,
    BATCH_MADE,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BATCHES,
    BLOCK_SIZE,
    BLOCKS,
    CACHED,
    CAPACITY,
    CHOSEN_AT,
    COMING_CHUNKS,
    COMPUTED,
    COUNTS_AT,
    DECODE_NS,
    DEPTH,
    DONE,
    DRAFTS,
    ENTERING_AT,
    ERROR,
    ERROR_STUCK,
    FETCH_WAIT_NS,
    FETCHED,
    FIRST,
    FIRST_STAGE,
    FLYING,
    FOLLOWING,
    FREE,
    GENERATED,
    GETS,
    HEAD,
    IN_FLIGHT,
    LAUNCH_NS,
    LEFT,
    LIMIT,
    LOGGED,
    MAX_SEQS,
    MOST_ROWS,
    N_DECODE,
    N_DECODE_CONTEXT,
    NEVER,
    NONE,
    NOW,
    OWED,
    PASSED,
    PLACE,
    PREEMPTIONS,
    PROMPT,
    PROMPTS_AT,
    PROPOSED_AT,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    QUIET,
    RATE_BITS,
    REPLICA_SIZE,
    ROOM,
    ROW_REQUEST,
    ROW_SIZE,
    ROWS,
    RUNNING,
    RUNNING_AT,
    RUNS,
    STAGE_BUSY,
    STAGE_FREE,
    STAGE_SIZE,
    STAGES,
    STATED,
    UTILISE,
    WINDOWS,
)
from apex_opt.simulator.kernel.trtllm_choose import (
    back_nb,
    choose_nb,
    decodes_nb,
    found_nb,
    held_back_nb,
    held_nb,
    left_nb,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Cache, Run


@inner
def trtllm_nb(run: Run, cache: Cache | None, replica: int, until: int) -> None:
    """Take every turn of a replica that starts before `until`."""
    r = at(run.replicas, replica * REPLICA_SIZE)
    queue_end, arrival = at(run.scratch, r[QUEUE_AT]), column_nb(run, ARRIVAL)
    while True:
        head = r[HEAD]
        idle = r[RUNNING] == 0 and (head == NONE or arrival[head] > r[NOW])
        if idle and r[QUEUED] == 0:
            if head == NONE or arrival[head] >= NEVER:
                break
            r[NOW] = arrival[head]
            idle = False
        start = r[NOW] if idle else fetched_nb(arrival, column_nb(run, FOLLOWING), r, head, r[NOW])
        if start >= until:
            break
        # Where batches are logged each is formed by the rules.
        if r[QUIET] == 1 and r[QUEUED] == r[DEPTH] - 1 and run.control[LOGGED] == 0:
            stretch_nb(run, cache, r, until)
            if r[NOW] >= until:
                break
        if not idle:
            r[NOW] = max(r[NOW], start)  # batches may have been passed since
            fetch_nb(run, r)
            form_nb(run, cache, r)
            r[PREEMPTIONS] += r[BATCH_LOST]
            end = launch_nb(run, r) if r[DRAFTS] > 0 else through_stages_nb(run, r)
            log_step_nb(run, r, replica, r[NOW], end)
            if r[BATCH_ROWS] == 0 and r[QUEUED] == 0 and r[BATCH_LOST] == 0:
                r[ERROR] = ERROR_STUCK
                break
            newest = newest_nb(r)
            queue_end[newest] = end
            queue_end[r[DEPTH] + newest] = r[BATCH_ROWS]
            r[QUEUED] += 1
            r[NOW] += launching_nb(r)
            if r[BATCH_ROWS] > 0 and r[QUEUED] < r[DEPTH]:
                continue
        oldest = r[QUEUE_HEAD]
        late = r[FETCH_WAIT_NS] > 0 or r[LAUNCH_NS] > 0
        if late and queue_end[r[DEPTH] + oldest] > 0:  # it may be done before the turn is
            log_taken_nb(run, replica, max(r[NOW], queue_end[oldest]))
        take_in_nb(run, cache, r)
        if run.control[PASSED] == 1:
            break


@inner
def fetched_nb(arrival: I64, following: I64, r: I64, head: int, start: int) -> int:
    """When the wait of a turn for new requests is over: it ends with as many as a batch has seats."""
    if r[FETCH_WAIT_NS] == 0:
        return start
    end, i, count = start + r[FETCH_WAIT_NS], head, -r[FETCHED]
    while i != NONE and arrival[i] <= end:
        count += 1
        if count == r[MAX_SEQS]:
            return max(start, arrival[i])
        i = following[i]
    return end


@inner
def wait_on_nb(arrival: I64, following: I64, r: I64, head: int, now: int) -> None:
    """Count those that have come and are not active, where turns wait for new ones."""
    if r[FETCH_WAIT_NS] > 0:
        i, count = head, 0
        while i != NONE and arrival[i] <= now:
            count += 1
            i = following[i]
        r[FETCHED] = count


@inner
def fetch_nb(run: Run, r: I64) -> None:
    """Requests that have come are active, as many as may be."""
    arrival, following = column_nb(run, ARRIVAL), column_nb(run, FOLLOWING)
    most = r[MAX_SEQS] * r[STAGES]
    while r[RUNNING] < most and r[HEAD] != NONE and arrival[r[HEAD]] <= r[NOW]:
        i = r[HEAD]
        r[HEAD] = following[i]
        activate_nb(run, r, i)
    wait_on_nb(arrival, following, r, r[HEAD], r[NOW])


@inner
def activate_nb(run: Run, r: I64, i: int) -> None:
    """Request i is active."""
    tokens = column_nb(run, PROMPT)[i] + column_nb(run, STATED)[i]
    column_nb(run, PLACE)[i] = RUNS
    column_nb(run, ROOM)[i] = blocks_nb(tokens, r[BLOCK_SIZE])
    run.scratch[r[RUNNING_AT] + r[RUNNING]] = i
    r[RUNNING] += 1


@inner
def form_nb(run: Run, cache: Cache | None, r: I64) -> None:
    """Form a batch: of those with memory whoever has tokens, prompts last or, held back, not at all."""
    decoding, prompts = choose_nb(run, cache, r)
    computing = prompts if prompts > 0 and not held_back_nb(run, r, decoding, prompts) else 0
    enter_all_nb(run, cache, r, decoding, computing)
    alone = decoding > 0 and prompts == 0 and r[BATCH_LOST] == 0
    r[QUIET] = 1 if alone and r[STAGES] == 1 and r[DRAFTS] == 0 and r[FETCH_WAIT_NS] == 0 else 0


@inner
def logged_nb(r: I64, place: int) -> int:
    """Where it is told which row of the log is the first of a batch in the queue."""
    found: int = r[QUEUE_AT] + r[DEPTH] * (2 + r[MAX_SEQS]) + place
    return found


@inner
def enter_all_nb(run: Run, cache: Cache | None, r: I64, decoding: int, prompts: int) -> None:
    """Enter those that decode and the prompts that have tokens, which get their blocks before."""
    chosen, waiting = at(run.scratch, r[CHOSEN_AT]), at(run.scratch, r[PROMPTS_AT])
    if cache is not None:
        begin_nb(run, cache, r, waiting, prompts)
    for row in range(decoding):
        enter_nb(run, cache, r, chosen[row], 1 + r[DRAFTS])
    for whole in range(2):  # those that are cut come first
        for place in range(prompts):
            asks = at(waiting, ASKING_SIZE * place)
            if asks[GETS] > 0 and (1 if asks[GETS] == asks[LEFT] else 0) == whole:
                enter_nb(run, cache, r, asks[ASKS], asks[GETS])


@inner
def begin_nb(run: Run, cache: Cache, r: I64, waiting: I64, prompts: int) -> None:
    """Prompts are computed from now on, but for what is cached, which all of them claim before any takes free blocks.

    A request that has begun and computed nothing yet owes tokens.
    """
    owed, computed, blocks = column_nb(run, OWED), column_nb(run, COMPUTED), column_nb(run, BLOCKS)
    for whole in range(2):
        for place in range(prompts):
            asks = at(waiting, ASKING_SIZE * place)
            i = asks[ASKS]
            if asks[GETS] == 0 or computed[i] > 0 or (1 if asks[GETS] == asks[LEFT] else 0) != whole:
                continue
            found, _, _ = found_nb(run, cache, r, i)
            owed[i] = left_nb(run, i)
            r[FREE] -= claim_nb(cache, r, i, found)
            blocks[i], computed[i] = found, found * r[BLOCK_SIZE]
            if column_nb(run, ADMITTED)[i] == 0:
                column_nb(run, ADMITTED)[i] = 1
                r[CACHED] += computed[i]
    for whole in range(2):
        for place in range(prompts):
            asks = at(waiting, ASKING_SIZE * place)
            if asks[GETS] > 0 and (1 if asks[GETS] == asks[LEFT] else 0) == whole:
                hold_nb(run, cache, r, asks[ASKS], held_nb(run, r, asks[ASKS], owed[asks[ASKS]]))


@inner
def hold_nb(run: Run, cache: Cache | None, r: I64, i: int, tokens: int) -> None:
    """Give request i the blocks to hold so many tokens."""
    blocks = column_nb(run, BLOCKS)
    if tokens > blocks[i] * r[BLOCK_SIZE]:
        total = blocks_nb(tokens, r[BLOCK_SIZE])
        if cache is not None:
            take_free_nb(cache, r, i, blocks[i], total)
        r[FREE] -= total - blocks[i]
        blocks[i] = total


@inner
def enter_nb(run: Run, cache: Cache | None, r: I64, i: int, c: int) -> None:
    """Enter a sequence into the batch, with the blocks of its whole prompt or of its next tokens."""
    owed, computed = column_nb(run, OWED), column_nb(run, COMPUTED)
    if r[BATCH_ROWS] == 0:
        run.scratch[logged_nb(r, newest_nb(r))] = run.control[ROWS]
    decoded = decodes_nb(run, i)
    drafts = r[DRAFTS] if decoded else 0
    if owed[i] == 0:
        owed[i] = left_nb(run, i)
    if cache is not None:
        column_nb(run, COMING_CHUNKS)[i] += 0 if decoded else 1
    computed[i] += c
    hold_nb(run, cache, r, i, held_nb(run, r, i, max(owed[i], computed[i])))
    yields = 1 if owed[i] <= computed[i] else 0
    column_nb(run, IN_FLIGHT)[i] += yields
    column_nb(run, FLYING)[i] += 1
    row = 2 * i + yields
    queued_nb(run, r, newest_nb(r))[r[BATCH_ROWS]] = ~row if drafts > 0 else row
    run.scratch[r[ENTERING_AT] + r[BATCH_ROWS]] = c
    r[BATCH_ROWS] += 1
    r[BATCH_TOKENS] += c
    r[BATCH_HELD] += computed[i]
    if yields == 1:
        r[BATCH_MADE] = 1
    if c <= 1 + r[DRAFTS]:
        r[BATCH_DECODES] += 1
        r[BATCH_READ] += computed[i]
    else:
        count_chunk_nb(run, r, c, computed[i])
        if r[DRAFTS] > 0:
            r[BATCH_CHUNKS_NS] += chunk_ns_nb(law_nb(run, r, 0), r, c, computed[i])
    if run.control[LOGGED] == 1:
        log_row_nb(run, i, 16 * drafts, c, computed[i])


@inner
def take_in_nb(run: Run, cache: Cache | None, r: I64) -> None:
    """The oldest batch finishes: its tokens, which drafts were right, and whoever got the last one."""
    limit, generated, in_flight = column_nb(run, LIMIT), column_nb(run, GENERATED), column_nb(run, IN_FLIGHT)
    place, running = column_nb(run, PLACE), at(run.scratch, r[RUNNING_AT])
    oldest = r[QUEUE_HEAD]
    batch, end = queued_nb(run, r, oldest), run.scratch[r[QUEUE_AT] + oldest]
    r[NOW] = max(r[NOW], end)
    gone, logged = 0, run.scratch[logged_nb(r, oldest)]
    for place_in in range(run.scratch[r[QUEUE_AT] + r[DEPTH] + oldest]):
        row, drafts = batch[place_in], 0
        if row < 0:
            row, drafts = ~row, r[DRAFTS]
        i = row >> 1
        column_nb(run, FLYING)[i] -= 1
        if row & 1 == 0 or place[i] == DONE:
            continue
        in_flight[i] -= 1
        if generated[i] == 0:
            column_nb(run, FIRST)[i] = r[NOW]
        got = 1
        if drafts > 0:
            got = min(1 + right_nb(run, r, i, drafts), limit[i] - generated[i])
        generated[i] += got
        if run.control[LOGGED] == 1 and logged + place_in < run.control[MOST_ROWS]:
            run.rows[(logged + place_in) * ROW_SIZE + ROW_REQUEST] += got
        if generated[i] == limit[i]:
            gone += 1
            back_nb(run, cache, r, i)
            place[i] = DONE
            answer_nb(run, r, i, r[NOW])
    if gone > 0:
        r[QUIET] = 0
        n, kept = r[RUNNING], 0
        for index in range(n):
            if place[running[index]] == RUNS:
                running[kept] = running[index]
                kept += 1
        r[RUNNING] = kept
    if cache is not None:
        store_prompts_nb(run, cache, r, batch, run.scratch[r[QUEUE_AT] + r[DEPTH] + oldest])
    r[QUEUE_HEAD] = oldest + 1 if oldest + 1 < r[DEPTH] else 0
    r[QUEUED] -= 1


@inner
def store_prompts_nb(run: Run, cache: Cache, r: I64, batch: I64, rows: int) -> None:
    """Prompts of a batch that is taken in can be found, where no more of them is to be scheduled."""
    chunks, known = column_nb(run, COMING_CHUNKS), column_nb(run, PROMPT)
    for place_in in range(rows):
        row = ~batch[place_in] if batch[place_in] < 0 else batch[place_in]
        i = row >> 1
        if chunks[i] > 0:
            chunks[i] -= 1
            if decodes_nb(run, i) and column_nb(run, PLACE)[i] != DONE:
                stored = min(known[i] + column_nb(run, GENERATED)[i] - 1, column_nb(run, COMPUTED)[i])
                store_nb(cache, r, i, stored // r[BLOCK_SIZE])
                r[QUIET] = 0


@inner
def right_nb(run: Run, r: I64, i: int, drafts: int) -> int:
    """How many of so many drafts were right; what is wrong is taken back."""
    computed, place = column_nb(run, COMPUTED), drafts_nb(r, i, column_nb(run, GENERATED)[i])
    right = min(drafts, run.scratch[r[ACCEPTED_AT] + place])
    if r[ASYNCHRONOUS] == 0:
        right = min(right, run.scratch[r[PROPOSED_AT] + place])
    if computed[i] > 0:  # else it was paused since
        computed[i] -= drafts - right
    return right


@inner
def stretch_nb(run: Run, cache: Cache | None, r: I64, until: int) -> None:
    """Pass batches of all that decode, as far as nobody ends, comes or lacks a block."""
    running = at(run.scratch, r[RUNNING_AT])
    generated, computed, blocks = column_nb(run, GENERATED), column_nb(run, COMPUTED), column_nb(run, BLOCKS)
    limit, in_flight = column_nb(run, LIMIT), column_nb(run, IN_FLIGHT)
    wake, head, bs = until, r[HEAD], r[BLOCK_SIZE]
    if head != NONE and r[RUNNING] < r[MAX_SEQS]:
        wake = min(wake, column_nb(run, ARRIVAL)[head])
    steps, n, context = NEVER, 0, 0
    for index in range(r[RUNNING]):
        i = running[index]
        if decodes_nb(run, i):
            steps = min(steps, limit[i] - generated[i] - in_flight[i])
            n += 1
            context += computed[i]
    asynchronous = r[DEPTH] == 2
    if not asynchronous:
        steps -= 1
    if r[CAPACITY] == UTILISE:
        steps = with_blocks_nb(run, r, steps)
    law, counts = law_nb(run, r, 0), at(run.counts, r[COUNTS_AT])
    stage = at(run.stages, r[FIRST_STAGE] * STAGE_SIZE)
    base_ns = by_sequences_nb(law, r, DECODE_NS)[n]
    rate, full, until = pace_nb(law, r, n, context)
    rise, paid = rate * n, rate * context + full
    now = r[NOW]
    end = run.scratch[r[QUEUE_AT] + r[QUEUE_HEAD]] if asynchronous else now
    began, total, k = end, 0, 0
    while k < steps and now < wake:
        k += 1
        context += n
        total += context
        paid += rise
        if context > until:
            rate, full, until = pace_nb(law, r, n, context)
            rise, paid = rate * n, rate * context + full
        now = end
        end += base_ns + (paid >> RATE_BITS)
        if not asynchronous:
            now = end
    if k == 0:
        return
    by_sequences_nb(counts, r, N_DECODE)[n] += k
    by_sequences_nb(counts, r, N_DECODE_CONTEXT)[n] += total
    if r[WINDOWS] > 0:
        count_seen_nb(run, r, n, k, total)
    stage[STAGE_BUSY] += end - began
    stage[STAGE_FREE] = end
    if asynchronous:
        run.scratch[r[QUEUE_AT] + r[QUEUE_HEAD]] = end
    r[BATCHES] += k
    r[NOW] = max(r[NOW], now)
    if cache is not None:  # in the order in which they would be taken
        for step in range(1, k + 1):
            for index in range(r[RUNNING]):
                i = running[index]
                if computed[i] + step > blocks[i] * bs and decodes_nb(run, i):
                    hold_nb(run, cache, r, i, computed[i] + step)
    for index in range(r[RUNNING]):
        i = running[index]
        if decodes_nb(run, i):
            generated[i] += k
            computed[i] += k
            hold_nb(run, None, r, i, computed[i])


@inner
def with_blocks_nb(run: Run, r: I64, steps: int) -> int:
    """So many steps as there are blocks for, of so many."""
    running = at(run.scratch, r[RUNNING_AT])
    computed, blocks = column_nb(run, COMPUTED), column_nb(run, BLOCKS)
    while steps > 0:
        needed = 0
        for index in range(r[RUNNING]):
            i = running[index]
            if decodes_nb(run, i):
                needed += max(0, blocks_nb(computed[i] + steps, r[BLOCK_SIZE]) - blocks[i])
        if needed <= r[FREE]:
            break
        steps //= 2
    return steps
