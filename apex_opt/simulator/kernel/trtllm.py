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
    log_lost_nb,
    log_row_nb,
    log_step_nb,
    log_taken_nb,
    pace_nb,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.speculative import drafts_nb, launch_nb
from apex_opt.simulator.kernel.stages import newest_nb, queued_nb, through_stages_nb
from apex_opt.simulator.kernel.state import (
    ACCEPTED_AT,
    ARRIVAL,
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
    CAPACITY,
    CHOSEN,
    CHOSEN_AT,
    CHUNKED,
    CHUNKING,
    COMPUTED,
    COUNTS_AT,
    DECODE_NS,
    DEPTH,
    DONE,
    DRAFTS,
    ENTERING_AT,
    EQUALLY,
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
    HEAD,
    IN_FLIGHT,
    LIMIT,
    LOGGED,
    LOOKAHEAD,
    MAX_SEQS,
    MAX_TOKENS,
    MOST_ROWS,
    N_DECODE,
    N_DECODE_CONTEXT,
    NEVER,
    NONE,
    NOW,
    ONE_BATCH,
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
    WAIT_ITERS,
    WAIT_TOKENS,
    WAITED,
    WINDOWS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def trtllm_nb(run: Run, cache: None, replica: int, until: int) -> None:
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
            stretch_nb(run, r, until)
            if r[NOW] >= until:
                break
        if not idle:
            r[NOW] = max(r[NOW], start)  # batches may have been passed since
            fetch_nb(run, r)
            form_nb(run, r)
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
            if r[BATCH_ROWS] > 0 and r[QUEUED] < r[DEPTH] and queue_end[r[QUEUE_HEAD]] > r[NOW]:
                continue
        oldest = r[QUEUE_HEAD]
        if r[FETCH_WAIT_NS] > 0 and queue_end[r[DEPTH] + oldest] > 0:  # it may be done before the turn is
            log_taken_nb(run, replica, max(r[NOW], queue_end[oldest]))
        take_in_nb(run, r)
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
def form_nb(run: Run, r: I64) -> None:
    """Form a batch: of those with memory whoever has tokens, prompts last or, held back, not at all."""
    decoding, prompts = choose_nb(run, r)
    decode_nb(run, r, decoding)
    alone = decoding > 0 and prompts == 0 and r[BATCH_LOST] == 0
    r[QUIET] = 1 if alone and r[STAGES] == 1 and r[DRAFTS] == 0 and r[FETCH_WAIT_NS] == 0 else 0
    if prompts > 0 and not held_back_nb(run, r, decoding, prompts):
        compute_nb(run, r, prompts)


@inner
def choose_nb(run: Run, r: I64) -> tuple[int, int]:
    """Begin a batch: how many decode in it, and how many prompts may be computed."""
    r[BATCH_ROWS], r[BATCH_TOKENS], r[BATCH_DECODES], r[BATCH_READ], r[BATCH_LOST] = 0, 0, 0, 0, 0
    r[BATCH_HELD], r[BATCH_MADE], r[BATCH_CHUNKS_NS] = 0, 0, 0
    if r[CAPACITY] == UTILISE:
        fitting_nb(run, r)
    else:
        reserving_nb(run, r)
    return within_tokens_nb(run, r)


@inner
def logged_nb(r: I64, place: int) -> int:
    """Where it is told which row of the log is the first of a batch in the queue."""
    found: int = r[QUEUE_AT] + r[DEPTH] * (2 + r[MAX_SEQS]) + place
    return found


@inner
def decode_nb(run: Run, r: I64, decoding: int) -> None:
    """Enter those that decode."""
    chosen = at(run.scratch, r[CHOSEN_AT])
    for row in range(decoding):
        enter_nb(run, r, chosen[row], 1 + r[DRAFTS])


@inner
def compute_nb(run: Run, r: I64, prompts: int) -> None:
    """Enter the prompts that have tokens."""
    waiting = at(run.scratch, r[PROMPTS_AT])
    for whole in range(2):  # those that are cut come first
        for place in range(prompts):
            i, tokens = waiting[2 * place], waiting[2 * place + 1]
            if tokens > 0 and (1 if tokens == left_nb(run, i) else 0) == whole:
                enter_nb(run, r, i, tokens)
                waiting[2 * place + 1] = 0


@inner
def left_nb(run: Run, i: int) -> int:
    """Tokens of its prompt that are not computed."""
    owed, computed = column_nb(run, OWED)[i], column_nb(run, COMPUTED)[i]
    if owed > 0:
        rest: int = owed - computed
        return rest
    known: int = column_nb(run, PROMPT)[i] + column_nb(run, GENERATED)[i]
    return known


@inner
def decodes_nb(run: Run, i: int) -> bool:
    """Whether all of its prompt is computed, or on its way."""
    owed = column_nb(run, OWED)[i]
    return owed > 0 and owed <= column_nb(run, COMPUTED)[i]


@inner
def ending_nb(run: Run, i: int) -> bool:
    """Whether its last token is on its way."""
    coming = column_nb(run, GENERATED)[i] + column_nb(run, IN_FLIGHT)[i]
    return coming >= column_nb(run, LIMIT)[i]


@inner
def reserving_nb(run: Run, r: I64) -> None:
    """Whoever has room to its end: all that decode, then prompts until one has not."""
    running, chosen = at(run.scratch, r[RUNNING_AT]), at(run.scratch, r[CHOSEN_AT])
    room, blocks = column_nb(run, ROOM), column_nb(run, BLOCKS)
    available, n, prompts = r[FREE], 0, 0
    for index in range(r[RUNNING]):
        i = running[index]
        if ending_nb(run, i):
            continue
        if decodes_nb(run, i):
            available -= room[i] - blocks[i]
            chosen[n] = i
            n += 1
        else:
            prompts += 1
    if prompts > 0 and not (r[CAPACITY] == ONE_BATCH and n > 0):
        for index in range(r[RUNNING]):
            i = running[index]
            if ending_nb(run, i) or decodes_nb(run, i):
                continue
            needed = room[i] - blocks[i]
            if needed > available:
                break
            available -= needed
            chosen[n] = i
            n += 1
    r[CHOSEN] = n


@inner
def fitting_nb(run: Run, r: I64) -> None:
    """Whoever has room for its next step, in order; the last that started gives way."""
    running, listed = at(run.scratch, r[RUNNING_AT]), at(run.scratch, r[CHOSEN_AT])
    blocks, computed, flying = column_nb(run, BLOCKS), column_nb(run, COMPUTED), column_nb(run, FLYING)
    end = 0
    for index in range(r[RUNNING]):
        if not ending_nb(run, running[index]):
            listed[end] = running[index]
            end += 1
    free, n = r[FREE], 0
    while n < end:
        needed = to_step_nb(run, r, listed[n])
        if needed <= free:
            free -= needed
            n += 1
            continue
        giver = end - 1
        while giver >= n and (computed[listed[giver]] == 0 or (r[STAGES] > 1 and flying[listed[giver]] > 0)):
            giver -= 1
        if giver < n:
            break
        end = giver
        victim = listed[giver]
        free += blocks[victim]
        r[FREE] += blocks[victim]
        blocks[victim], computed[victim], column_nb(run, OWED)[victim] = 0, 0, 0
        r[BATCH_LOST] += 1
        if run.control[LOGGED] == 1:
            log_lost_nb(run, victim)
    r[CHOSEN] = n


@inner
def to_step_nb(run: Run, r: I64, i: int) -> int:
    """Blocks that its next step takes, or on several stages its next two."""
    computed = column_nb(run, COMPUTED)[i]
    if r[STAGES] > 1 and column_nb(run, FLYING)[i] > 0:
        return 0
    if computed == 0:
        return blocks_nb(held_nb(run, r, i, left_nb(run, i)), r[BLOCK_SIZE])
    if not decodes_nb(run, i):
        return 0
    steps = 1 if r[STAGES] == 1 else 2
    held = held_nb(run, r, i, computed + steps * (1 + r[DRAFTS]))
    needed: int = blocks_nb(held, r[BLOCK_SIZE]) - column_nb(run, BLOCKS)[i]
    return needed


@inner
def held_nb(run: Run, r: I64, i: int, tokens: int) -> int:
    """Tokens whose blocks request i takes to hold so many."""
    most = column_nb(run, PROMPT)[i] + column_nb(run, STATED)[i]
    held: int = min(tokens + r[LOOKAHEAD], most)
    return held


@inner
def within_tokens_nb(run: Run, r: I64) -> tuple[int, int]:
    """How many of the chosen decode, which then stand first, and how many prompts are computed, which stand apart."""
    chosen, waiting = at(run.scratch, r[CHOSEN_AT]), at(run.scratch, r[PROMPTS_AT])
    flying, chunked = column_nb(run, FLYING), r[CHUNKED] == 1
    budget, decoding, prompts, total = r[MAX_TOKENS], 0, 0, 0
    for place in range(r[CHOSEN]):
        i = chosen[place]
        if r[STAGES] > 1 and flying[i] > 0:
            continue
        if decoding + prompts == r[MAX_SEQS]:
            break
        if decodes_nb(run, i):
            if budget < 1 + r[DRAFTS]:
                break
            chosen[decoding] = i
            decoding += 1
            budget -= 1 + r[DRAFTS]
            continue
        tokens = left_nb(run, i)
        if tokens > budget and not chunked:
            break
        waiting[2 * prompts], waiting[2 * prompts + 1] = i, tokens
        prompts += 1
        total += tokens
        if not chunked:
            budget -= tokens
    if chunked and total > budget and r[CHUNKING] == EQUALLY:
        alike_nb(run, waiting, prompts, budget, r[BLOCK_SIZE])
    elif chunked and total > budget:
        for place in range(prompts):
            tokens = waiting[2 * place + 1]
            given = min(tokens, budget)
            if given < tokens:
                given -= given % r[BLOCK_SIZE]
            budget -= given
            waiting[2 * place + 1] = given
    return decoding, prompts


@inner
def alike_nb(run: Run, waiting: I64, prompts: int, budget: int, unit: int) -> None:
    """Give each prompt a block in turn, or what is left of it, until no more fits."""
    for place in range(prompts):
        waiting[2 * place + 1] = 0
    given = 1
    while given > 0 and budget > 0:
        given = 0
        for place in range(prompts):
            more = min(unit, left_nb(run, waiting[2 * place]) - waiting[2 * place + 1])
            if 0 < more <= budget:
                waiting[2 * place + 1] += more
                budget -= more
                given += more


@inner
def held_back_nb(run: Run, r: I64, decoding: int, prompts: int) -> bool:
    """Whether prompts wait for more of them to come."""
    waiting = at(run.scratch, r[PROMPTS_AT])
    computed, tokens = 0, decoding * (1 + r[DRAFTS])
    for place in range(prompts):
        tokens += waiting[2 * place + 1]
        computed += waiting[2 * place + 1] > 0
    if decoding == 0 or computed == 0 or (r[WAIT_ITERS] == 0 and r[WAIT_TOKENS] == 0):
        return False
    if r[WAITED] < r[WAIT_ITERS] and tokens < r[WAIT_TOKENS]:
        r[WAITED] += 1
        return True
    r[WAITED] = 0
    return False


@inner
def enter_nb(run: Run, r: I64, i: int, c: int) -> None:
    """Enter a sequence into the batch, with the blocks of its whole prompt or of its next tokens."""
    owed, computed, blocks = column_nb(run, OWED), column_nb(run, COMPUTED), column_nb(run, BLOCKS)
    if r[BATCH_ROWS] == 0:
        run.scratch[logged_nb(r, newest_nb(r))] = run.control[ROWS]
    drafts = r[DRAFTS] if decodes_nb(run, i) else 0
    if computed[i] == 0:
        owed[i] = left_nb(run, i)
    computed[i] += c
    held = held_nb(run, r, i, max(owed[i], computed[i]))
    if held > blocks[i] * r[BLOCK_SIZE]:
        needed = blocks_nb(held, r[BLOCK_SIZE]) - blocks[i]
        r[FREE] -= needed
        blocks[i] += needed
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
def take_in_nb(run: Run, r: I64) -> None:
    """The oldest batch finishes: its tokens, which drafts were right, and whoever got the last one."""
    limit, generated, in_flight = column_nb(run, LIMIT), column_nb(run, GENERATED), column_nb(run, IN_FLIGHT)
    place, blocks, running = column_nb(run, PLACE), column_nb(run, BLOCKS), at(run.scratch, r[RUNNING_AT])
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
            r[FREE] += blocks[i]
            blocks[i] = 0
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
    r[QUEUE_HEAD] = oldest + 1 if oldest + 1 < r[DEPTH] else 0
    r[QUEUED] -= 1


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
def stretch_nb(run: Run, r: I64, until: int) -> None:
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
    for index in range(r[RUNNING]):
        i = running[index]
        if decodes_nb(run, i):
            generated[i] += k
            computed[i] += k
            if computed[i] > blocks[i] * bs:
                needed = blocks_nb(computed[i], bs) - blocks[i]
                blocks[i] += needed
                r[FREE] -= needed


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
