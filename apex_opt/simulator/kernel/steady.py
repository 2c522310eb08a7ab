"""The engine of one stage without a prefill threshold, asynchronous or not.

In a stretch where nobody arrives, ends or needs preemption, every running sequence gains one token per batch. So
completions wait in a ring indexed by batch number (each slot an intrusive doubly linked list), the blocks the next
batch needs are a count by residue of the context modulo the block size, the context is one running sum, and a batch
costs a few table look-ups. At most one partial prefill exists and it is last in running order.

A turn forms batch k + 1 and takes in the oldest batch: that very batch, or with asynchronous scheduling batch k, which
was running meanwhile. A batch without sequences only matters as it keeps its place in the queue (HOLLOW). A sequence
joins the decoding ones when its prompt's last tokens are scheduled, and leaves them when the batch after its last one
is formed; it keeps its seat and blocks until its last batch is taken in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    answer_nb,
    batch_ns_nb,
    by_sequences_nb,
    chunk_ns_nb,
    column_nb,
    count_batch_nb,
    count_chunk_nb,
    count_seen_nb,
    law_nb,
    log_lost_nb,
    log_row_nb,
    log_step_nb,
    pace_nb,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_counts import (
    count_nb,
    decodes_nb,
    due_at_nb,
    due_nb,
    entered_nb,
    held_nb,
    on_nb,
    passed_nb,
    whole_nb,
)
from apex_opt.simulator.kernel.kv_state import SPAN_AT, SPAN_TOKENS
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ASYNCHRONOUS,
    BATCH_BUDGET,
    BATCH_CHUNKS_NS,
    BATCH_COMING,
    BATCH_DECODES,
    BATCH_LOST,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BATCHES,
    BLOCK_SIZE,
    CHUNKED,
    CONTEXT,
    CONTEXT_RATE,
    COUNTS_AT,
    DECODE_NS,
    DECODING,
    ENTERED,
    ENTERING_AT,
    ERROR,
    ERROR_STUCK,
    EVICTED,
    FIRST,
    FIRST_RUN,
    FIRST_STAGE,
    FLIGHT,
    FLIGHT_END,
    FOLLOWING,
    FREE,
    GENERATED,
    HEAD,
    HOLLOW,
    JOINED,
    LAST_RUN,
    LIMIT,
    LOGGED,
    LUMP,
    MAX_SEQS,
    MAX_TOKENS,
    N_DECODE,
    N_DECODE_CONTEXT,
    NEVER,
    NONE,
    NOW,
    OFFSET,
    PARTIAL,
    PARTIAL_BEFORE,
    PARTIAL_DONE,
    PASSED,
    PHASE,
    PREEMPTIONS,
    PROMPT,
    RATE_BITS,
    REPLICA_SIZE,
    RESIDUE_AT,
    RING_AT,
    RING_SIZE,
    RUN_AFTER,
    RUN_BEFORE,
    SEATED,
    SIDE,
    SLEEP_NS,
    SLOT_AFTER,
    SLOT_BEFORE,
    STACK,
    STAGE_BUSY,
    STAGE_SIZE,
    UNDER,
    WANTED,
    WINDOWS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.kv_state import Groups
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def steady_nb(run: Run, groups: Groups | None, replica: int, until: int) -> None:
    """Take every turn of a replica that starts before `until`."""
    r = at(run.replicas, replica * REPLICA_SIZE)
    arrival = column_nb(run, ARRIVAL)
    while True:
        if r[SEATED] == 0 and r[FLIGHT] == 0 and r[STACK] == NONE:
            head = r[HEAD]
            if head == NONE or arrival[head] >= NEVER:
                break
            if arrival[head] > r[NOW]:
                r[NOW] = arrival[head]
                r[HOLLOW] = 0
        if r[NOW] >= until:
            break
        # Where batches are logged each is formed by the rules.
        quiet = r[PARTIAL] == NONE and r[ENTERED] == 0 and run.control[LOGGED] == 0
        if quiet and r[DECODING] > 0 and (r[FLIGHT] == 1 or r[ASYNCHRONOUS] == 0):
            stretch_nb(run, groups, r, wake_nb(run, groups, r, until))
            if r[NOW] >= until:
                break

        k, end, head = r[BATCHES], r[FLIGHT_END], r[HEAD]
        came = head != NONE and arrival[head] <= r[NOW]
        give_way_nb(run, groups, r)
        admit_nb(run, groups, r)
        if r[BATCH_ROWS] == 0 and r[FLIGHT] == 0:
            r[ERROR] = ERROR_STUCK
            break
        if launch_nb(run, groups, r, replica):
            continue
        # The oldest batch is taken in: the one in flight, or the one just formed.
        if r[FLIGHT] == 0:
            k, end = r[BATCHES], r[FLIGHT_END]
            r[SIDE] = 1 - r[SIDE]
            r[ENTERED] = r[BATCH_COMING]
        take_in_nb(run, groups, r, k, end)
        if run.control[PASSED] == 1:
            break
        r[ENTERED] = 0
        if r[FLIGHT] == 1:
            if r[BATCH_ROWS] > 0:
                r[SIDE] = 1 - r[SIDE]
                r[ENTERED] = r[BATCH_COMING]
            else:
                r[FLIGHT] = 0
                r[HOLLOW] = 1
                if came or r[STACK] != NONE:  # those that were seated have got their last tokens
                    r[NOW] += r[SLEEP_NS]


@inner
def wake_nb(run: Run, groups: Groups | None, r: I64, until: int) -> int:
    """When a stretch in which nothing happens but the passing of tokens ends at the latest; NONE: there is none."""
    arrival = column_nb(run, ARRIVAL)
    n, stack, head = r[DECODING], r[STACK], r[HEAD]
    r[WANTED] = NEVER
    if stack != NONE or (head != NONE and arrival[head] <= r[NOW]):
        waits = stack if stack != NONE else head
        known = column_nb(run, PROMPT)[waits] + column_nb(run, GENERATED)[waits]
        blocked = r[SEATED] >= r[MAX_SEQS] or n >= r[MAX_TOKENS]
        if r[CHUNKED] == 0 and known > r[MAX_TOKENS] - n:
            blocked = True
        wanted = blocks_nb(known, r[BLOCK_SIZE]) if groups is None else whole_nb(groups, known)
        if not blocked and wanted > r[FREE]:
            blocked = True
            r[WANTED] = wanted
        return until if blocked else NONE
    if head != NONE and r[SEATED] < r[MAX_SEQS]:
        return min(until, arrival[head])
    return until


@inner
def stretch_nb(run: Run, groups: Groups | None, r: I64, wake: int) -> None:
    """Pass tokens batch by batch until somebody's last one, until blocks run out or until `wake`."""
    law, counts = law_nb(run, r, 0), at(run.counts, r[COUNTS_AT])
    ring, residue = at(run.scratch, r[RING_AT]), at(run.scratch, r[RESIDUE_AT])
    n, k, now, free, context, phase = r[DECODING], r[BATCHES], r[NOW], r[FREE], r[CONTEXT], r[PHASE]
    mask, bs = r[RING_SIZE] - 1, r[BLOCK_SIZE]
    asynchronous = r[ASYNCHRONOUS] == 1
    ahead = 0 if asynchronous else 1
    end = r[FLIGHT_END] if asynchronous else now
    base_ns = by_sequences_nb(law, r, DECODE_NS)[n]
    rate, full, last = by_sequences_nb(law, r, CONTEXT_RATE)[n], 0, NEVER
    if r[WINDOWS] > 0:
        last = -1
    first, began, total, wanted, lump = k, end, 0, r[WANTED], r[LUMP]
    if groups is not None:  # mostly all blocks have as many tokens, and looking up their counts takes most of the time
        alone, counted, size = groups.sizes == 1, residue, bs
        if alone:
            counted, size = at(residue, groups.spans[SPAN_AT]), groups.spans[SPAN_TOKENS]
            phase = counted[0]
    while now < wake and ring[(k + ahead) & mask] == NONE:
        if groups is None:
            need = residue[phase]
            if need > free:
                break
            free -= need
            phase += 1
            if phase == bs:
                phase = 0
        else:
            if alone:
                taken, back = due_at_nb(counted, size, phase, k & mask)
            else:
                taken, back = due_nb(run, groups, r, k)
            back += lump
            if taken > free or free - taken + back >= wanted:
                break
            free += back - taken
            lump = 0
            if alone:
                phase = phase + 1 if phase + 1 < size else 0
            else:
                on_nb(run, groups, r)
        if context > last:
            rate, full, last = pace_nb(law, r, n, context + n)
            last -= n
        k += 1
        context += n
        total += context
        now = end
        end += base_ns + ((rate * context + full) >> RATE_BITS)
        if not asynchronous:
            now = end
    by_sequences_nb(counts, r, N_DECODE)[n] += k - first
    by_sequences_nb(counts, r, N_DECODE_CONTEXT)[n] += total
    if r[WINDOWS] > 0:
        count_seen_nb(run, r, n, k - first, total)
    run.stages[r[FIRST_STAGE] * STAGE_SIZE + STAGE_BUSY] += end - began
    r[BATCHES], r[NOW], r[FREE], r[CONTEXT], r[PHASE], r[FLIGHT_END] = k, now, free, context, phase, end
    if groups is not None:
        r[LUMP] = lump
        if alone:
            counted[0] = phase


@inner
def give_way_nb(run: Run, groups: Groups | None, r: I64) -> None:
    """Begin a batch with the running sequences, after preempting from the tail until their next tokens have blocks."""
    if r[FLIGHT] == 1:
        leave_nb(run, groups, r)
    partial = r[PARTIAL]
    chunk = 0
    if partial != NONE:
        left = column_nb(run, PROMPT)[partial] + column_nb(run, GENERATED)[partial] - r[PARTIAL_DONE]
        chunk = min(left, r[MAX_TOKENS] - r[DECODING])
    r[BATCH_LOST] = 0
    if groups is None:
        hand_out_nb(run, r, chunk)
    else:
        hand_out_by_group_nb(run, groups, r, chunk)
    n = r[DECODING]
    r[PREEMPTIONS] += r[BATCH_LOST]
    r[CONTEXT] += n
    r[BATCH_ROWS], r[BATCH_TOKENS], r[BATCH_DECODES], r[BATCH_READ] = n, n, n, r[CONTEXT]
    r[BATCH_BUDGET], r[BATCH_CHUNKS_NS], r[BATCH_COMING] = r[MAX_TOKENS] - n, 0, 0
    if run.control[LOGGED] == 1:
        log_decoding_nb(run, r)
    if chunk > 0 and r[PARTIAL] != NONE:
        r[PARTIAL_BEFORE] = r[PARTIAL_DONE]
        r[PARTIAL_DONE] += chunk
        enter_nb(run, groups, r, partial, chunk, r[PARTIAL_DONE])


@inner
def hand_out_nb(run: Run, r: I64, chunk: int) -> None:
    """Hand out the blocks of decoding sequences and of the prompt in part, which computes so many tokens."""
    bs, need, chunk_blocks = r[BLOCK_SIZE], run.scratch[r[RESIDUE_AT] + r[PHASE]], 0
    if chunk > 0:
        chunk_blocks = blocks_nb(r[PARTIAL_DONE] + chunk, bs) - blocks_nb(r[PARTIAL_DONE], bs)
    # The tail goes first, until what those before it need is free: as one by one, in order, would have it.
    while need + chunk_blocks > r[FREE]:
        if r[PARTIAL] != NONE:
            chunk_blocks = 0
            drop_nb(run, r, blocks_nb(r[PARTIAL_DONE], bs))
        else:
            due = (column_nb(run, OFFSET)[r[LAST_RUN]] + r[BATCHES]) % bs == 0
            if evict_nb(run, None, r) and due:
                need -= 1
    r[FREE] -= need + chunk_blocks


@inner
def hand_out_by_group_nb(run: Run, groups: Groups, r: I64, chunk: int) -> None:
    """The same over groups of layers; each sequence gives back what left its windows before it takes more."""
    k, done, limit = r[BATCHES], r[PARTIAL_DONE], column_nb(run, LIMIT)
    joined, generated = column_nb(run, JOINED), column_nb(run, GENERATED)
    taken, back = due_nb(run, groups, r, k)
    back += r[LUMP]
    r[LUMP] = 0
    chunk_taken, chunk_back = 0, 0
    if chunk > 0:
        chunk_taken = entered_nb(groups, done + chunk) - entered_nb(groups, done)
        chunk_back = passed_nb(groups, done) - passed_nb(groups, r[PARTIAL_BEFORE])
    if taken + chunk_taken <= r[FREE]:
        r[FREE] += back + chunk_back - taken - chunk_taken
        return
    # One by one, in order: what is given back further on comes too late.
    i = r[FIRST_RUN]
    while i != NONE:
        if r[FLIGHT] == 0 or joined[i] + limit[i] - generated[i] - 1 != k:
            known = column_nb(run, OFFSET)[i] + k
            back = held_nb(run, groups, r, i, k) - entered_nb(groups, known) + passed_nb(groups, known)
            taken = entered_nb(groups, known + 1) - entered_nb(groups, known)
            r[FREE] += back
            while taken > r[FREE]:
                if r[PARTIAL] != NONE:
                    drop_nb(run, r, entered_nb(groups, done) - passed_nb(groups, r[PARTIAL_BEFORE]))
                    continue
                if r[LAST_RUN] == i:  # it has all back with those
                    r[FREE] -= back
                    evict_nb(run, groups, r)
                    return
                evict_nb(run, groups, r)
            r[FREE] -= taken
        i = column_nb(run, RUN_AFTER)[i]
    if chunk > 0 and r[PARTIAL] != NONE:
        if chunk_taken > r[FREE] + chunk_back:
            drop_nb(run, r, entered_nb(groups, done) - passed_nb(groups, r[PARTIAL_BEFORE]))
        else:
            r[FREE] += chunk_back - chunk_taken


@inner
def drop_nb(run: Run, r: I64, blocks: int) -> None:
    """Preempt the prompt in part, which has so many blocks."""
    victim = r[PARTIAL]
    r[FREE] += blocks
    r[PARTIAL] = NONE
    column_nb(run, UNDER)[victim] = r[STACK]
    r[STACK] = victim
    lose_nb(run, r, victim)


@inner
def lose_nb(run: Run, r: I64, victim: int) -> None:
    """A sequence was preempted."""
    r[SEATED] -= 1
    r[BATCH_LOST] += 1
    if run.control[LOGGED] == 1:
        log_lost_nb(run, victim)


@inner
def leave_nb(run: Run, groups: Groups | None, r: I64) -> None:
    """Sequences whose last token is on its way want nothing more."""
    ring, residue = at(run.scratch, r[RING_AT]), at(run.scratch, r[RESIDUE_AT])
    offset, slot_after = column_nb(run, OFFSET), column_nb(run, SLOT_AFTER)
    k = r[BATCHES]
    i = ring[k & (r[RING_SIZE] - 1)]
    while i != NONE:
        if groups is None:
            residue[(-offset[i]) % r[BLOCK_SIZE]] -= 1
        else:
            count_nb(run, groups, r, i, -1, k)
        r[CONTEXT] -= offset[i] + k
        r[DECODING] -= 1
        i = slot_after[i]


@inner
def evict_nb(run: Run, groups: Groups | None, r: I64) -> bool:
    """Preempt the last decoding sequence; whether it wanted a token of the next batch."""
    before, offset, generated = column_nb(run, RUN_BEFORE), column_nb(run, OFFSET), column_nb(run, GENERATED)
    slot_before, slot_after = column_nb(run, SLOT_BEFORE), column_nb(run, SLOT_AFTER)
    k, bs, victim = r[BATCHES], r[BLOCK_SIZE], r[LAST_RUN]
    done = offset[victim] + k
    r[FREE] += blocks_nb(done, bs) if groups is None else held_nb(run, groups, r, victim, k)
    lose_nb(run, r, victim)
    r[LAST_RUN] = before[victim]
    if r[LAST_RUN] == NONE:
        r[FIRST_RUN] = NONE
    else:
        column_nb(run, RUN_AFTER)[r[LAST_RUN]] = NONE
    joined = column_nb(run, JOINED)[victim]
    last_batch = joined + column_nb(run, LIMIT)[victim] - generated[victim] - 1
    if r[FLIGHT] == 1 and last_batch == k:
        before[victim] = EVICTED  # its last token arrives all the same
        return False
    if groups is None:
        run.scratch[r[RESIDUE_AT] + (-offset[victim]) % bs] -= 1
    else:
        count_nb(run, groups, r, victim, -1, k)
    r[CONTEXT] -= done
    r[DECODING] -= 1
    if slot_before[victim] == NONE:
        run.scratch[r[RING_AT] + (last_batch & (r[RING_SIZE] - 1))] = slot_after[victim]
    else:
        slot_after[slot_before[victim]] = slot_after[victim]
    if slot_after[victim] != NONE:
        slot_before[slot_after[victim]] = slot_before[victim]
    generated[victim] += k - joined + 1  # with the one on its way
    column_nb(run, UNDER)[victim] = r[STACK]
    r[STACK] = victim
    return True


@inner
def log_decoding_nb(run: Run, r: I64) -> None:
    offset, after, generated = column_nb(run, OFFSET), column_nb(run, RUN_AFTER), column_nb(run, GENERATED)
    joined, limit = column_nb(run, JOINED), column_nb(run, LIMIT)
    k = r[BATCHES]
    i = r[FIRST_RUN]
    while i != NONE:
        if r[FLIGHT] == 0 or joined[i] + limit[i] - generated[i] - 1 != k:
            log_row_nb(run, i, 1, 1, offset[i] + k + 1)
        i = after[i]


@inner
def enter_nb(run: Run, groups: Groups | None, r: I64, i: int, c: int, held: int) -> None:
    """Enter a prompt's tokens into the batch; with its last ones the sequence joins the decoding ones."""
    known = column_nb(run, PROMPT)[i] + column_nb(run, GENERATED)[i]
    r[BATCH_ROWS] += 1
    r[BATCH_TOKENS] += c
    r[BATCH_BUDGET] -= c
    if c == 1:
        r[BATCH_DECODES] += 1
        r[BATCH_READ] += held
    else:
        r[BATCH_CHUNKS_NS] += chunk_ns_nb(law_nb(run, r, 0), r, c, held)
        count_chunk_nb(run, r, c, held)
    if run.control[LOGGED] == 1:
        log_row_nb(run, i, 1 if held == known else 0, c, held)
    if held < known:
        r[PARTIAL] = i
        r[PARTIAL_DONE] = held
    else:
        r[PARTIAL] = NONE
        join_nb(run, groups, r, i, known, known - c)


@inner
def join_nb(run: Run, groups: Groups | None, r: I64, i: int, known: int, start: int) -> None:
    """All that sequence i knows is computed by this batch, from `start` on: from the next one on it decodes."""
    before, slot_before, slot_after = (
        column_nb(run, RUN_BEFORE),
        column_nb(run, SLOT_BEFORE),
        column_nb(run, SLOT_AFTER),
    )
    ring = at(run.scratch, r[RING_AT])
    k, generated = r[BATCHES], column_nb(run, GENERATED)[i]
    column_nb(run, JOINED)[i] = k + 1
    column_nb(run, OFFSET)[i] = known - (k + 1)
    if groups is None:
        run.scratch[r[RESIDUE_AT] + (k + 1 - known) % r[BLOCK_SIZE]] += 1
    else:
        decodes_nb(run, groups, r, i, start)
    r[CONTEXT] += known
    r[DECODING] += 1
    last = r[LAST_RUN]
    before[i] = last
    column_nb(run, RUN_AFTER)[i] = NONE
    if last == NONE:
        r[FIRST_RUN] = i
    else:
        column_nb(run, RUN_AFTER)[last] = i
    r[LAST_RUN] = i
    slot = (k + column_nb(run, LIMIT)[i] - generated) & (r[RING_SIZE] - 1)
    other = ring[slot]
    slot_before[i] = NONE
    slot_after[i] = other
    if other != NONE:
        slot_before[other] = i
    ring[slot] = i
    if generated == 0:
        run.scratch[r[ENTERING_AT] + (1 - r[SIDE]) * r[MAX_SEQS] + r[BATCH_COMING]] = i
        r[BATCH_COMING] += 1


@inner
def admit_nb(run: Run, groups: Groups | None, r: I64) -> None:
    """Admit waiting sequences, in order, where nobody had to give way."""
    if r[BATCH_LOST] > 0:
        return
    arrival, prompt, generated = column_nb(run, ARRIVAL), column_nb(run, PROMPT), column_nb(run, GENERATED)
    bs = r[BLOCK_SIZE]
    while r[BATCH_BUDGET] > 0 and r[SEATED] < r[MAX_SEQS]:
        i = r[STACK]
        if i == NONE:
            i = r[HEAD]
            if i == NONE or arrival[i] > r[NOW]:
                return
        c = prompt[i] + generated[i]
        if (blocks_nb(c, bs) if groups is None else whole_nb(groups, c)) > r[FREE]:
            return
        if c > r[BATCH_BUDGET]:
            if r[CHUNKED] == 0:
                return
            c = r[BATCH_BUDGET]
        if r[STACK] == NONE:
            r[HEAD] = column_nb(run, FOLLOWING)[i]
        else:
            r[STACK] = column_nb(run, UNDER)[i]
        r[FREE] -= blocks_nb(c, bs) if groups is None else entered_nb(groups, c)
        r[SEATED] += 1
        r[PARTIAL_BEFORE] = 0
        enter_nb(run, groups, r, i, c, c)


@inner
def launch_nb(run: Run, groups: Groups | None, r: I64, replica: int) -> bool:
    """Run the batch that was formed; whether another can be formed before one is taken in."""
    if r[BATCH_ROWS] == 0:
        log_step_nb(run, r, replica, 0, 0)
        return False
    duration = batch_ns_nb(law_nb(run, r, 0), r, r[BATCH_CHUNKS_NS])
    count_batch_nb(run, r)
    run.stages[r[FIRST_STAGE] * STAGE_SIZE + STAGE_BUSY] += duration
    r[FLIGHT_END] = (r[FLIGHT_END] if r[FLIGHT] == 1 else r[NOW]) + duration
    log_step_nb(run, r, replica, r[NOW], r[FLIGHT_END])
    formed_nb(run, groups, r)
    if r[FLIGHT] == 0 and r[ASYNCHRONOUS] == 1 and (duration > 0 or r[HOLLOW] == 1):
        r[FLIGHT] = 1
        r[HOLLOW] = 0
        r[SIDE] = 1 - r[SIDE]
        r[ENTERED] = r[BATCH_COMING]
        return True
    return False


@inner
def formed_nb(run: Run, groups: Groups | None, r: I64) -> None:
    """A batch was formed: others need blocks for the next one."""
    if groups is None:
        r[PHASE] += 1
        if r[PHASE] == r[BLOCK_SIZE]:
            r[PHASE] = 0
    else:
        on_nb(run, groups, r)


@inner
def take_in_nb(run: Run, groups: Groups | None, r: I64, k: int, end: int) -> None:
    """Take in batch k, which ends then: its first tokens, and whoever got the last one."""
    ring, residue = at(run.scratch, r[RING_AT]), at(run.scratch, r[RESIDUE_AT])
    before, after, offset = column_nb(run, RUN_BEFORE), column_nb(run, RUN_AFTER), column_nb(run, OFFSET)
    slot_after, first = column_nb(run, SLOT_AFTER), column_nb(run, FIRST)
    r[NOW] = max(r[NOW], end)
    now = r[NOW]
    entering = at(run.scratch, r[ENTERING_AT] + r[SIDE] * r[MAX_SEQS])
    for e in range(r[ENTERED]):
        first[entering[e]] = now
    slot = k & (r[RING_SIZE] - 1)
    i = ring[slot]
    ring[slot] = NONE
    while i != NONE:
        if before[i] != EVICTED:
            done = offset[i] + k
            r[FREE] += blocks_nb(done, r[BLOCK_SIZE]) if groups is None else held_nb(run, groups, r, i, k)
            r[SEATED] -= 1
            if before[i] == NONE:
                r[FIRST_RUN] = after[i]
            else:
                after[before[i]] = after[i]
            if after[i] == NONE:
                r[LAST_RUN] = before[i]
            else:
                before[after[i]] = before[i]
            if r[FLIGHT] == 0:
                if groups is None:
                    residue[(-offset[i]) % r[BLOCK_SIZE]] -= 1
                else:
                    count_nb(run, groups, r, i, -1, k)
                r[CONTEXT] -= done
                r[DECODING] -= 1
        answer_nb(run, r, i, now)
        i = slot_after[i]
