"""The engine of one stage that verifies drafts, and that has blocks for several groups of layers: it walks what runs.

It is `reference.speculative.SpeculativeScheduler`, and with groups `reference.hybrid`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    by_sequences_nb,
    by_tokens_nb,
    chunk_ns_nb,
    column_nb,
    count_chunk_nb,
    count_seen_nb,
    law_nb,
    log_row_nb,
    log_step_nb,
    pace_nb,
)
from apex_opt.simulator.kernel.blocks import found_nb, recomputed_nb, register_nb, take_nb
from apex_opt.simulator.kernel.general import close_ranks_nb, evict_nb, leave_nb, placed_nb, room_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_groups import (
    begin_nb,
    log_used_nb,
    register_groups_nb,
    release_groups_nb,
    split_nb,
)
from apex_opt.simulator.kernel.policies import admits_nb, blocks_nb
from apex_opt.simulator.kernel.stages import preempted_nb, rest_nb
from apex_opt.simulator.kernel.state import (
    ACCEPTED_AT,
    ARRIVAL,
    ASYNCHRONOUS,
    ATTEND_NS,
    BATCH_BUDGET,
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
    CHUNKED,
    COMPUTED,
    COUNTS_AT,
    DECODE_NS,
    DEPTH,
    DONE,
    DRAFTS,
    ERROR,
    ERROR_STUCK,
    FIRST,
    FIRST_STAGE,
    FOLLOWING,
    FREE,
    GENERATED,
    HEAD,
    IN_FLIGHT,
    LIMIT,
    LIST_SIZE,
    LISTS,
    LOGGED,
    LOOKAHEAD,
    MAX_LENGTH,
    MAX_SEQS,
    MAX_TOKENS,
    MIXED_NS,
    MOST_ROWS,
    N_ATTEND,
    N_ATTEND_CONTEXT,
    N_DECODE,
    N_DECODE_CONTEXT,
    N_MIXED,
    N_SEQUENCES,
    NEVER,
    NONE,
    NOW,
    OUTPUT,
    PASSED,
    PLACE,
    PREEMPTIONS,
    PROMPT,
    PROPOSED,
    PROPOSED_AT,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    RATE_BITS,
    RECOMPUTES,
    REPLICA_SIZE,
    ROW_REQUEST,
    ROW_SIZE,
    ROWS,
    RUNNING,
    RUNNING_AT,
    RUNS,
    SEQUENCE_NS,
    SLOTS_AT,
    STACK,
    STAGE_BUSY,
    STAGE_FREE,
    STAGE_SIZE,
    THRESHOLD,
    UNDER,
    UNREPORTED,
    VLLM,
    WINDOWS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.kv_state import Groups
    from apex_opt.simulator.kernel.state import I64, Cache, Run

# A batch in flight: when it ends, its rows, where they stand in the log; of each 32 * request + 2 * drafts + yields.
_END, _ROWS, _LOGGED, _FIRST = range(4)


@inner
def speculative_nb(run: Run, cache: Cache | None, groups: Groups | None, replica: int, until: int) -> None:
    """Take every turn of a replica that starts before `until`."""
    r = at(run.replicas, replica * REPLICA_SIZE)
    arrival = column_nb(run, ARRIVAL)
    while True:
        head, again = r[HEAD], preempted_nb(run, r)
        idle = r[RUNNING] == 0 and again == NONE and (head == NONE or arrival[head] > r[NOW])
        if idle and r[QUEUED] == 0:
            if head == NONE or arrival[head] >= NEVER:
                break
            r[NOW] = arrival[head]
            idle = False
        if r[NOW] >= until:
            break
        if not idle or (r[QUEUED] > 0 and r[UNREPORTED] == 1):
            r[UNREPORTED] = 0
            batch = queued_nb(run, r, (r[QUEUE_HEAD] + r[QUEUED]) & 1)
            batch[_LOGGED] = run.control[ROWS]
            if groups is not None:
                begin_nb(groups, r)
            running_nb(run, cache, groups, r, batch)
            if r[BATCH_LOST] == 0:
                waiting_nb(run, cache, groups, r, batch)
            r[PREEMPTIONS] += r[BATCH_LOST]
            end = launch_nb(run, r)
            if groups is not None:
                log_used_nb(run, groups, r)
            log_step_nb(run, r, replica, r[NOW], end)
            if r[BATCH_ROWS] == 0 and r[QUEUED] == 0 and r[BATCH_LOST] == 0:
                r[ERROR] = ERROR_STUCK
                break
            batch[_END] = end
            batch[_ROWS] = r[BATCH_ROWS]
            r[QUEUED] += 1
            if r[BATCH_ROWS] > 0 and r[QUEUED] < r[DEPTH] and queued_nb(run, r, r[QUEUE_HEAD])[_END] > r[NOW]:
                continue
        came = head != NONE and arrival[head] <= r[NOW]
        take_in_nb(run, cache, groups, r, queued_nb(run, r, r[QUEUE_HEAD]))
        r[QUEUE_HEAD] = 1 - r[QUEUE_HEAD]
        r[QUEUED] -= 1
        rest_nb(run, r, came)
        if run.control[PASSED] == 1:
            break


@inner
def drafting_nb(run: Run, cache: Cache | None, replica: int, until: int) -> None:
    """`speculative_nb` where all layers keep all tokens."""
    speculative_nb(run, cache, None, replica, until)


@inner
def grouped_nb(run: Run, groups: Groups, replica: int, until: int) -> None:
    """`speculative_nb` over groups of layers, with drafts and without."""
    speculative_nb(run, None, groups, replica, until)


@inner
def form_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, own: I64) -> None:
    """Form the batch of a rank, and put it in the queue; what it takes of a rank's own time."""
    batch = queued_nb(run, r, (r[QUEUE_HEAD] + r[QUEUED]) & 1)
    batch[_LOGGED] = run.control[ROWS]
    if groups is not None:
        begin_nb(groups, r)
    running_nb(run, cache, groups, r, batch)
    if r[BATCH_LOST] == 0:
        waiting_nb(run, cache, groups, r, batch)
    r[PREEMPTIONS] += r[BATCH_LOST]
    batch[_ROWS] = r[BATCH_ROWS]
    if r[BATCH_ROWS] > 0:
        own[0] = drafted_ns_nb(run, r)
    r[QUEUED] += 1


@inner
def finish_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, end: int) -> None:
    """Take in the oldest batch of a rank, which ended then."""
    batch = queued_nb(run, r, r[QUEUE_HEAD])
    batch[_END] = end
    take_in_nb(run, cache, groups, r, batch)
    r[QUEUE_HEAD] = 1 - r[QUEUE_HEAD]
    r[QUEUED] -= 1


@inner
def queued_nb(run: Run, r: I64, place: int) -> I64:
    """One of the two batches that can be in flight."""
    return at(run.scratch, r[QUEUE_AT] + place * (_FIRST + r[MAX_SEQS]))


@inner
def running_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, batch: I64) -> None:
    """Form a batch of running sequences, in order; preempt from the tail where blocks run out."""
    prompt, output, generated = column_nb(run, PROMPT), column_nb(run, OUTPUT), column_nb(run, GENERATED)
    computed, in_flight, proposed = column_nb(run, COMPUTED), column_nb(run, IN_FLIGHT), column_nb(run, PROPOSED)
    blocks, running, law = column_nb(run, BLOCKS), at(run.scratch, r[RUNNING_AT]), law_nb(run, r, 0)
    bs, threshold, length, drafts, lookahead = r[BLOCK_SIZE], r[THRESHOLD], r[MAX_LENGTH], r[DRAFTS], r[LOOKAHEAD]
    asynchronous, logged = r[ASYNCHRONOUS], run.control[LOGGED]
    budget, rows, d, read, held, made, chunks_ns, index = r[MAX_TOKENS], 0, 0, 0, 0, 0, 0, 0
    r[BATCH_LOST] = 0
    while index < r[RUNNING] and budget > 0:
        i = running[index]
        index += 1
        coming, done = in_flight[i], computed[i]
        if coming > 0 and done + 2 - coming >= prompt[i] + output[i]:
            continue  # its last token may be on its way
        known = prompt[i] + generated[i]
        c = known + coming + proposed[i] - done
        if threshold > 0:
            c = min(c, threshold)
        c = min(min(c, length - 1 - done), budget)
        if groups is not None:
            c = split_nb(groups, r, prompt[i], known, done, c)
        if c <= 0:
            continue
        ahead = min(done + c + lookahead, length)
        if groups is not None:
            if not room_nb(run, groups, r, i, done, done + c, ahead):
                break
        elif ahead > blocks[i] * bs:
            need = blocks_nb(ahead, bs) - blocks[i]
            while need > r[FREE]:
                victim = evict_nb(run, cache, r)
                proposed[victim] = 0
                if victim == i:
                    need = NONE
                    break
            if need == NONE:
                break
            r[FREE] -= need
            if cache is not None:
                take_nb(cache, r, i, blocks[i], 0, blocks[i] + need)
            blocks[i] += need
        done += c
        computed[i] = done
        if cache is not None:
            filled = min(done, known)
            if filled >= (cache.registered[i] + 1) * bs:
                register_nb(cache, r, i, filled // bs)
        if groups is not None:
            register_groups_nb(groups, r, i, min(done, known))
        proposed[i] = 0
        beyond = done - known - coming
        row = i << 5
        if beyond >= 0:
            row += 2 * beyond + 1
            made = 1
            if asynchronous == 1:
                in_flight[i] = coming + 1 + beyond
                proposed[i] = drafts
        batch[_FIRST + rows] = row
        rows += 1
        budget -= c
        held += done
        if c <= 1 + drafts:
            d += 1
            read += done
        else:
            chunks_ns += chunk_ns_nb(law, r, c, done)
            count_chunk_nb(run, r, c, done)
        if logged == 1:
            log_row_nb(run, i, 16 * max(0, beyond), c, done)
    r[BATCH_ROWS], r[BATCH_DECODES], r[BATCH_READ], r[BATCH_HELD] = rows, d, read, held
    r[BATCH_TOKENS], r[BATCH_BUDGET] = r[MAX_TOKENS] - budget, budget
    r[BATCH_CHUNKS_NS], r[BATCH_MADE] = chunks_ns, made


@inner
def waiting_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, batch: I64) -> None:
    """Admit waiting sequences, in order, until one does not fit; they have no drafts and need no blocks ahead."""
    arrival, place, under = column_nb(run, ARRIVAL), column_nb(run, PLACE), column_nb(run, UNDER)
    prompt, generated = column_nb(run, PROMPT), column_nb(run, GENERATED)
    bs = r[BLOCK_SIZE]
    while r[BATCH_BUDGET] > 0 and r[RUNNING] < r[MAX_SEQS]:
        i = preempted_nb(run, r)
        if i == NONE:
            i = r[HEAD]
            if i == NONE or arrival[i] > r[NOW]:
                return
        known = prompt[i] + generated[i]
        if groups is not None:
            if not admitted_nb(run, groups, r, batch, i, known):
                return
            continue
        found, unused = 0, 0
        if cache is not None:
            found, unused = found_nb(cache, r, i, (known - 1) // bs)
            if found > 0 and r[RECOMPUTES] == 1:
                found -= 1
                unused -= recomputed_nb(cache, r, i, found)
        if blocks_nb(known, bs) - found + unused > r[FREE]:
            return
        c = admits_nb(VLLM, known - found * bs, r[BATCH_BUDGET], r[THRESHOLD], r[CHUNKED])
        if c == 0:
            return
        if r[STACK] == NONE:
            r[HEAD] = column_nb(run, FOLLOWING)[i]
            r[CACHED] += found * bs
        else:
            r[STACK] = under[i]
        held = found * bs + c
        total = blocks_nb(held, bs)
        r[FREE] -= total - found + unused
        if cache is not None:
            cache.slot[i] = cache.slots[r[SLOTS_AT] + r[RUNNING]]
            cache.registered[i] = found
            take_nb(cache, r, i, 0, found, total)
            register_nb(cache, r, i, held // bs)
        column_nb(run, BLOCKS)[i] = total
        column_nb(run, COMPUTED)[i] = held
        place[i] = RUNS
        run.scratch[r[RUNNING_AT] + r[RUNNING]] = i
        r[RUNNING] += 1
        enter_nb(run, r, batch, i, c, known)


@inner
def admitted_nb(run: Run, groups: Groups, r: I64, batch: I64, i: int, known: int) -> bool:
    """Admit a waiting request with blocks by group, where it fits; whether it does."""
    found, c = placed_nb(run, groups, r, i, known)
    if c == 0:
        return False
    if r[STACK] == NONE:
        r[HEAD] = column_nb(run, FOLLOWING)[i]
        r[CACHED] += found
    else:
        r[STACK] = column_nb(run, UNDER)[i]
    column_nb(run, COMPUTED)[i] = found + c
    column_nb(run, PLACE)[i] = RUNS
    run.scratch[r[RUNNING_AT] + r[RUNNING]] = i
    r[RUNNING] += 1
    enter_nb(run, r, batch, i, c, known)
    return True


@inner
def enter_nb(run: Run, r: I64, batch: I64, i: int, c: int, known: int) -> None:
    """Enter an admitted sequence into the batch."""
    in_flight, held = column_nb(run, IN_FLIGHT), column_nb(run, COMPUTED)[i]
    row = i << 5
    if held >= known + in_flight[i]:
        row += 1
        r[BATCH_MADE] = 1
        if r[ASYNCHRONOUS] == 1:
            in_flight[i] += 1
            column_nb(run, PROPOSED)[i] = r[DRAFTS]
    batch[_FIRST + r[BATCH_ROWS]] = row
    r[BATCH_ROWS] += 1
    r[BATCH_TOKENS] += c
    r[BATCH_BUDGET] -= c
    r[BATCH_HELD] += held
    if c <= 1 + r[DRAFTS]:
        r[BATCH_DECODES] += 1
        r[BATCH_READ] += held
    else:
        r[BATCH_CHUNKS_NS] += chunk_ns_nb(law_nb(run, r, 0), r, c, held)
        count_chunk_nb(run, r, c, held)
    if run.control[LOGGED] == 1:
        log_row_nb(run, i, 0, c, held)


@inner
def launch_nb(run: Run, r: I64) -> int:
    """Run and count the batch that was formed; when it ends."""
    if r[BATCH_ROWS] == 0:
        end: int = r[NOW]
        return end
    stage = at(run.stages, r[FIRST_STAGE] * STAGE_SIZE)
    duration = drafted_ns_nb(run, r)
    end = max(r[NOW], stage[STAGE_FREE]) + duration
    stage[STAGE_FREE] = end
    stage[STAGE_BUSY] += duration
    return end


@inner
def drafted_ns_nb(run: Run, r: I64) -> int:
    """Count the batch that was formed; what it takes."""
    law, counts = law_nb(run, r, 0), at(run.counts, r[COUNTS_AT])
    rows, d, tokens, read = r[BATCH_ROWS], r[BATCH_DECODES], r[BATCH_TOKENS], r[BATCH_READ]
    r[BATCHES] += 1
    # After the tables of every law and the copies of attention; and after those of all counts.
    drafting = at(by_tokens_nb(law, r, MIXED_NS, 9), 1)
    drafted = by_tokens_nb(counts, r, N_MIXED, 9)
    rate, full, _ = pace_nb(law, r, d, read)
    duration = (rate * read + full) >> RATE_BITS
    if r[WINDOWS] > 0:
        count_seen_nb(run, r, d, 1, read)
    if d == rows:
        duration += by_sequences_nb(law, r, DECODE_NS)[rows]
        by_sequences_nb(counts, r, N_DECODE)[rows] += 1
        by_sequences_nb(counts, r, N_DECODE_CONTEXT)[rows] += read
        if r[DRAFTS] > 0:
            duration += drafting[tokens]
            drafted[tokens] += 1
    else:
        duration += by_tokens_nb(law, r, MIXED_NS, MIXED_NS)[tokens]
        duration += by_sequences_nb(law, r, SEQUENCE_NS)[rows] + by_sequences_nb(law, r, ATTEND_NS)[d]
        duration += r[BATCH_CHUNKS_NS] // min(by_tokens_nb(law, r, MIXED_NS, 9)[0], rows - d)
        by_sequences_nb(counts, r, N_SEQUENCES)[rows] += 1
        by_sequences_nb(counts, r, N_ATTEND)[d] += 1
        by_sequences_nb(counts, r, N_ATTEND_CONTEXT)[d] += read
        by_tokens_nb(counts, r, N_MIXED, N_MIXED)[tokens] += 1
    if r[BATCH_MADE] == 1 and r[DRAFTS] > 0:
        draft, more = r[MAX_TOKENS] + 1 + rows, r[MAX_TOKENS] + r[MAX_SEQS] + 2 + rows
        duration += drafting[draft] + ((drafting[more] * r[BATCH_HELD]) >> RATE_BITS)
        drafted[draft] += 1
        drafted[more] += r[BATCH_HELD]
    return duration


@inner
def drafts_nb(r: I64, i: int, generated: int) -> int:
    """Where the lists of drafts have what comes of those of request i once it has generated so many tokens."""
    first: int = i % r[LISTS] * r[LIST_SIZE] if r[LISTS] > 1 else 0
    return first + generated


@inner
def take_in_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, batch: I64) -> None:
    """The oldest batch finishes: which drafts were right, and whoever got the last token."""
    limit, generated, in_flight = column_nb(run, LIMIT), column_nb(run, GENERATED), column_nb(run, IN_FLIGHT)
    computed, place, proposed = column_nb(run, COMPUTED), column_nb(run, PLACE), column_nb(run, PROPOSED)
    accepts, proposes = at(run.scratch, r[ACCEPTED_AT]), at(run.scratch, r[PROPOSED_AT])
    r[NOW] = max(r[NOW], batch[_END])
    now, bs, asynchronous, logged = r[NOW], r[BLOCK_SIZE], r[ASYNCHRONOUS], run.control[LOGGED]
    gone = 0
    for row in range(batch[_ROWS]):
        i = batch[_FIRST + row] >> 5
        if batch[_FIRST + row] & 1 == 0 or place[i] == DONE:
            continue
        drafts, p = (batch[_FIRST + row] & 31) >> 1, generated[i]
        accepted = min(drafts, accepts[drafts_nb(r, i, p)]) if drafts > 0 else 0
        if computed[i] > 0:  # else it was preempted since
            computed[i] -= drafts - accepted
        got = min(accepted + 1, limit[i] - p)
        if asynchronous == 1:
            in_flight[i] -= drafts - accepted + got
        if p == 0:
            column_nb(run, FIRST)[i] = now
        generated[i] = p + got
        if logged == 1 and batch[_LOGGED] + row < run.control[MOST_ROWS]:
            run.rows[(batch[_LOGGED] + row) * ROW_SIZE + ROW_REQUEST] += got
        if cache is not None and asynchronous == 1 and place[i] == RUNS:
            filled = computed[i] - in_flight[i]
            if filled >= (cache.registered[i] + 1) * bs:
                register_nb(cache, r, i, filled // bs)
        if groups is not None and asynchronous == 1 and place[i] == RUNS:
            register_groups_nb(groups, r, i, computed[i] - in_flight[i])
        if p + got == limit[i]:
            if place[i] == RUNS:
                gone += 1
                if groups is not None:
                    release_groups_nb(groups, r, i)
            leave_nb(run, cache, r, i)
        elif asynchronous == 0 and r[DRAFTS] > 0:
            proposed[i] = proposes[drafts_nb(r, i, p + got)]
    if gone > 0:
        close_ranks_nb(run, cache, r, gone)
