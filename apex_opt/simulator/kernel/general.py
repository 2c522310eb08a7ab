"""The engine of pipelines, thresholds, prefix caching and other policies: it walks the running sequences each batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    answer_nb,
    column_nb,
    count_chunk_nb,
    log_lost_nb,
    log_row_nb,
    log_step_nb,
    log_taken_nb,
)
from apex_opt.simulator.kernel.blocks import found_nb, register_nb, release_nb, take_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_counts import counts_alike_nb, entered_nb, passed_nb, whole_nb
from apex_opt.simulator.kernel.kv_groups import (
    begin_nb,
    find_nb,
    just_kept_nb,
    lacking_nb,
    log_used_nb,
    open_nb,
    register_groups_nb,
    release_groups_nb,
    shed_nb,
    split_nb,
    take_groups_nb,
)
from apex_opt.simulator.kernel.policies import admits_nb, blocks_nb, reserved_nb, wanted_nb
from apex_opt.simulator.kernel.rotation import rotate_nb
from apex_opt.simulator.kernel.stages import newest_nb, preempted_nb, queued_nb, rest_nb, through_stages_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ASYNCHRONOUS,
    BATCH_BUDGET,
    BATCH_DECODES,
    BATCH_LOST,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BLOCK_SIZE,
    BLOCKS,
    CACHED,
    CHUNKED,
    COMPLETE,
    COMPUTED,
    DEPTH,
    DONE,
    DRAFTS,
    ENTERING_AT,
    ERROR,
    ERROR_STUCK,
    FIRST,
    FOLLOWING,
    FREE,
    GENERATED,
    HEAD,
    HOLDS,
    IN_FLIGHT,
    LIMIT,
    LOGGED,
    MAX_LENGTH,
    MAX_SEQS,
    MAX_TOKENS,
    NEVER,
    NONE,
    NOW,
    OUTPUT,
    PASSED,
    PLACE,
    POLICY,
    PREEMPTIONS,
    PROMPT,
    PROPOSED,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    REPLICA_SIZE,
    RESOURCES,
    RUNNING,
    RUNNING_AT,
    RUNS,
    SLEEP_NS,
    SLOTS_AT,
    STACK,
    STAGES,
    STALE,
    STATIC,
    THRESHOLD,
    UNDER,
    UNREPORTED,
    VLLM,
    WAITS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.kv_state import Groups
    from apex_opt.simulator.kernel.state import I64, Cache, Run


@inner
def general_nb(run: Run, cache: Cache | None, groups: Groups | None, replica: int, until: int) -> None:
    """Take every turn of a replica that starts before `until`."""
    r = at(run.replicas, replica * REPLICA_SIZE)
    queue_end = at(run.scratch, r[QUEUE_AT])
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
        # Where batches are logged each is formed by the rules.
        quiet = r[RUNNING] > 0 and r[POLICY] == VLLM and run.control[LOGGED] == 0 and r[RESOURCES] == 0
        if groups is not None:
            quiet = quiet and counts_alike_nb(groups, r)
        if quiet:
            rotate_nb(run, cache, groups, r, until)
            if r[NOW] >= until:
                break
        if not idle or (r[QUEUED] > 0 and r[UNREPORTED] == 1):
            r[UNREPORTED] = 0
            if groups is not None:
                begin_nb(groups, r)
            running_nb(run, cache, groups, r)
            if r[BATCH_LOST] == 0 and (r[POLICY] != STATIC or r[RUNNING] == 0):
                waiting_nb(run, cache, groups, r)
            r[PREEMPTIONS] += r[BATCH_LOST]
            end = through_stages_nb(run, r)
            if groups is not None:
                log_used_nb(run, groups, r)
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
        came = head != NONE and arrival[head] <= r[NOW]
        rows = queue_end[r[DEPTH] + r[QUEUE_HEAD]]
        take_in_nb(run, cache, groups, r)
        if rows > 0 and r[STAGES] > 1 and r[SLEEP_NS] > 0:  # it may have ended while the engine slept
            log_taken_nb(run, replica, r[NOW])
        rest_nb(run, r, came)
        if run.control[PASSED] == 1:
            break


@inner
def plain_nb(run: Run, cache: Cache | None, replica: int, until: int) -> None:
    """`general_nb` where all layers keep all tokens."""
    general_nb(run, cache, None, replica, until)


@inner
def by_groups_nb(run: Run, groups: Groups, replica: int, until: int) -> None:
    """`general_nb` over groups of layers."""
    general_nb(run, None, groups, replica, until)


@inner
def running_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64) -> None:
    """Form a batch of running sequences, in order; preempt from the tail where blocks run out."""
    prompt, output, limit = column_nb(run, PROMPT), column_nb(run, OUTPUT), column_nb(run, LIMIT)
    generated, computed, in_flight = column_nb(run, GENERATED), column_nb(run, COMPUTED), column_nb(run, IN_FLIGHT)
    blocks, running = column_nb(run, BLOCKS), at(run.scratch, r[RUNNING_AT])
    batch, batch_tokens = queued_nb(run, r, newest_nb(r)), at(run.scratch, r[ENTERING_AT])
    bs, policy, threshold, length = r[BLOCK_SIZE], r[POLICY], r[THRESHOLD], r[MAX_LENGTH]
    asynchronous, logged = r[ASYNCHRONOUS], run.control[LOGGED]
    budget, rows, d, read, index = r[MAX_TOKENS], 0, 0, 0, 0
    r[BATCH_LOST] = 0
    while index < r[RUNNING] and budget > 0:
        i = running[index]
        index += 1
        coming = in_flight[i]
        known = prompt[i] + generated[i]
        if policy == STATIC and generated[i] == limit[i]:  # done, but its batch is not
            c, yields = 1, 0
        else:
            c = wanted_nb(policy, known, coming, computed[i], prompt[i], output[i], limit[i], threshold, length)
            c = min(c, budget)
            if groups is not None:
                c = split_nb(groups, r, prompt[i], known, computed[i], c)
            if c <= 0:
                continue
            if groups is not None:
                if not room_nb(run, groups, r, i, computed[i], computed[i] + c, computed[i] + c):
                    break
            else:
                need = 0
                if computed[i] + c > blocks[i] * bs:  # as dividing takes longer than all else here
                    need = blocks_nb(computed[i] + c, bs) - blocks[i]
                while need > r[FREE]:
                    if evict_nb(run, cache, r) == i:
                        need = NONE
                        break
                if need == NONE:
                    break
                r[FREE] -= need
                if cache is not None and need > 0:
                    take_nb(cache, r, i, blocks[i], 0, blocks[i] + need)
                blocks[i] += need
            computed[i] += c
            if groups is not None:
                register_groups_nb(groups, r, i, min(computed[i], known))
            if cache is not None:
                filled = min(computed[i], known)
                if filled >= (cache.registered[i] + 1) * bs:
                    register_nb(cache, r, i, filled // bs)
            yields = 1 if computed[i] >= known + coming else 0
            if asynchronous == 1:
                in_flight[i] += yields
        batch[rows] = 2 * i + yields
        batch_tokens[rows] = c
        rows += 1
        budget -= c
        if c == 1:
            d += 1
            read += computed[i]
        else:
            count_chunk_nb(run, r, c, computed[i])
        if logged == 1:
            log_row_nb(run, i, yields, c, computed[i])
    r[BATCH_ROWS], r[BATCH_DECODES], r[BATCH_READ] = rows, d, read
    r[BATCH_TOKENS], r[BATCH_BUDGET] = r[MAX_TOKENS] - budget, budget


@inner
def evict_nb(run: Run, cache: Cache | None, r: I64) -> int:
    """Preempt the last running sequence, and tell which."""
    blocks = column_nb(run, BLOCKS)
    r[RUNNING] -= 1
    victim = run.scratch[r[RUNNING_AT] + r[RUNNING]]
    if cache is None:
        r[FREE] += blocks[victim]
    else:
        r[FREE] += release_nb(cache, r, victim, blocks[victim])
        cache.slots[r[SLOTS_AT] + r[RUNNING]] = cache.slot[victim]
    blocks[victim] = 0
    column_nb(run, COMPUTED)[victim] = 0
    column_nb(run, PLACE)[victim] = WAITS
    column_nb(run, UNDER)[victim] = r[STACK]
    r[STACK] = victim
    r[BATCH_LOST] += 1
    r[STALE] = r[QUEUED]
    if run.control[LOGGED] == 1:
        log_lost_nb(run, victim)
    return victim


@inner
def room_nb(run: Run, groups: Groups, r: I64, i: int, computed: int, tokens: int, ahead: int) -> bool:
    """Give a running request its blocks by group, preempting from the tail; whether it was not preempted itself."""
    slot, blocks, need = groups.slot[i], column_nb(run, BLOCKS), 0
    if groups.counting == 1:
        kept = entered_nb(groups, computed) - passed_nb(groups, computed)
        r[FREE] += blocks[i] - kept
        blocks[i] = kept
        need = entered_nb(groups, tokens) - entered_nb(groups, computed)
    else:
        shed_nb(groups, r, slot, computed)
    while (need if groups.counting == 1 else lacking_nb(groups, r, slot, tokens, ahead, 0, 0)) > r[FREE]:
        victim = run.scratch[r[RUNNING_AT] + r[RUNNING] - 1]
        if groups.counting == 0:
            release_groups_nb(groups, r, victim)
        evict_nb(run, None, r)
        if r[DRAFTS] > 0:
            column_nb(run, PROPOSED)[victim] = 0
        if victim == i:
            return False
    if groups.counting == 1:
        r[FREE] -= need
        blocks[i] += need
    else:
        take_groups_nb(groups, r, slot, tokens, ahead, 0)
    return True


@inner
def placed_nb(run: Run, groups: Groups, r: I64, i: int, known: int) -> tuple[int, int]:
    """Give a waiting request what is found and blocks for what it computes first; tokens of both, none if it waits."""
    prompt = column_nb(run, PROMPT)
    if groups.counting == 1:
        c = admits_nb(VLLM, known, r[BATCH_BUDGET], r[THRESHOLD], r[CHUNKED])
        if c == 0 or whole_nb(groups, known) > r[FREE]:
            return 0, 0
        column_nb(run, BLOCKS)[i] = entered_nb(groups, c)
        r[FREE] -= entered_nb(groups, c)
        return 0, c
    slot = open_nb(groups, r)
    found = find_nb(groups, r, i, known)
    c = admits_nb(VLLM, known - found, r[BATCH_BUDGET], r[THRESHOLD], r[CHUNKED])
    c = split_nb(groups, r, prompt[i], known, found, c)
    held = found + c
    if c == 0 or just_kept_nb(groups, r) or lacking_nb(groups, r, slot, known, known, 1, 1) > r[FREE]:
        return 0, 0
    if lacking_nb(groups, r, slot, held, held, 0, 1) > r[FREE]:
        return 0, 0
    groups.slot[i] = slot
    take_groups_nb(groups, r, slot, held, held, 1)
    register_groups_nb(groups, r, i, min(held, known))
    return found, c


@inner
def waiting_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64) -> None:
    """Admit waiting sequences, in order, until one does not fit."""
    arrival, place, under = column_nb(run, ARRIVAL), column_nb(run, PLACE), column_nb(run, UNDER)
    prompt, limit, generated = column_nb(run, PROMPT), column_nb(run, LIMIT), column_nb(run, GENERATED)
    bs, policy = r[BLOCK_SIZE], r[POLICY]
    while r[BATCH_BUDGET] > 0 and r[RUNNING] < r[MAX_SEQS]:
        i = preempted_nb(run, r)
        if i == NONE:
            i = r[HEAD]
            if i == NONE or arrival[i] > r[NOW]:
                return
        known = prompt[i] + generated[i]
        if groups is not None:
            tokens, c = placed_nb(run, groups, r, i, known)
            if c == 0:
                return
        else:
            found, unused = 0, 0
            if cache is not None:
                found, unused = found_nb(cache, r, i, (known - 1) // bs)
            reserved = reserved_nb(policy, known, prompt[i], limit[i])
            if blocks_nb(reserved, bs) - found + unused > r[FREE]:
                return
            tokens = found * bs
            c = admits_nb(policy, known - tokens, r[BATCH_BUDGET], r[THRESHOLD], r[CHUNKED])
            if c == 0:
                return
            total = blocks_nb(tokens + c if policy == VLLM else reserved, bs)
            r[FREE] -= total - found + unused
            if cache is not None:
                cache.slot[i] = cache.slots[r[SLOTS_AT] + r[RUNNING]]
                cache.registered[i] = found
                take_nb(cache, r, i, 0, found, total)
                register_nb(cache, r, i, (tokens + c) // bs)
            column_nb(run, BLOCKS)[i] = total
        if r[STACK] == NONE:
            r[HEAD] = column_nb(run, FOLLOWING)[i]
            r[CACHED] += tokens
        else:
            r[STACK] = under[i]
        column_nb(run, COMPUTED)[i] = tokens + c
        place[i] = RUNS
        run.scratch[r[RUNNING_AT] + r[RUNNING]] = i
        r[RUNNING] += 1
        enter_nb(run, r, i, c, known)


@inner
def enter_nb(run: Run, r: I64, i: int, c: int, known: int) -> None:
    """Enter an admitted sequence into the batch."""
    in_flight, held = column_nb(run, IN_FLIGHT), column_nb(run, COMPUTED)[i]
    yields = 1 if held >= known + in_flight[i] else 0
    if r[ASYNCHRONOUS] == 1:
        in_flight[i] += yields
    queued_nb(run, r, newest_nb(r))[r[BATCH_ROWS]] = 2 * i + yields
    run.scratch[r[ENTERING_AT] + r[BATCH_ROWS]] = c
    r[BATCH_ROWS] += 1
    r[BATCH_TOKENS] += c
    r[BATCH_BUDGET] -= c
    if c == 1:
        r[BATCH_DECODES] += 1
        r[BATCH_READ] += held
    else:
        count_chunk_nb(run, r, c, held)
    if run.control[LOGGED] == 1:
        log_row_nb(run, i, yields, c, held)


@inner
def take_in_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64) -> None:
    """The oldest batch finishes: its tokens, and whoever got the last one."""
    limit, generated, in_flight = column_nb(run, LIMIT), column_nb(run, GENERATED), column_nb(run, IN_FLIGHT)
    computed, place = column_nb(run, COMPUTED), column_nb(run, PLACE)
    oldest = r[QUEUE_HEAD]
    batch, end = queued_nb(run, r, oldest), run.scratch[r[QUEUE_AT] + oldest]
    r[NOW] = max(r[NOW], end)
    now, bs, asynchronous, static = r[NOW], r[BLOCK_SIZE], r[ASYNCHRONOUS], r[POLICY] == STATIC
    gone = 0
    for row in range(run.scratch[r[QUEUE_AT] + r[DEPTH] + oldest]):
        i = batch[row] >> 1
        if batch[row] & 1 == 0 or place[i] == DONE:
            continue
        in_flight[i] -= asynchronous
        if generated[i] == 0:
            column_nb(run, FIRST)[i] = now
        generated[i] += 1
        if cache is not None and asynchronous == 1 and place[i] == RUNS:
            filled = computed[i] - in_flight[i]
            if filled >= (cache.registered[i] + 1) * bs:
                register_nb(cache, r, i, filled // bs)
        if groups is not None and asynchronous == 1 and place[i] == RUNS:
            register_groups_nb(groups, r, i, computed[i] - in_flight[i])
        if generated[i] == limit[i]:
            if static:
                r[COMPLETE] += 1
            else:
                if place[i] == RUNS:
                    gone += 1
                    if groups is not None and groups.counting == 0:
                        release_groups_nb(groups, r, i)
                leave_nb(run, cache, r, i)
    if static and r[COMPLETE] == r[RUNNING]:
        gone = r[RUNNING]
        for index in range(gone):
            leave_nb(run, cache, r, run.scratch[r[RUNNING_AT] + index])
        r[COMPLETE] = 0
    if gone > 0:
        close_ranks_nb(run, cache, r, gone)
    r[QUEUE_HEAD] = oldest + 1 if oldest + 1 < r[DEPTH] else 0
    r[QUEUED] -= 1
    r[STALE] = max(r[STALE] - 1, 0)


@inner
def leave_nb(run: Run, cache: Cache | None, r: I64, i: int) -> None:
    """Request i is answered and gives its blocks back, unless they are held."""
    blocks = column_nb(run, BLOCKS)
    if r[HOLDS] == 0:
        if cache is None:
            r[FREE] += blocks[i]
        else:
            r[FREE] += release_nb(cache, r, i, blocks[i])
        blocks[i] = 0
    column_nb(run, PLACE)[i] = DONE
    r[UNREPORTED] = 1  # the workers learn of it with the next batch, even an empty one
    answer_nb(run, r, i, r[NOW])


@inner
def close_ranks_nb(run: Run, cache: Cache | None, r: I64, gone: int) -> None:
    """Strike those that are done, so many, from the running sequences."""
    place, running = column_nb(run, PLACE), at(run.scratch, r[RUNNING_AT])
    n, kept = r[RUNNING], 0
    for index in range(n):
        i = running[index]
        if place[i] == RUNS:
            running[kept] = i
            kept += 1
        elif cache is not None and r[HOLDS] == 0:
            gone -= 1
            cache.slots[r[SLOTS_AT] + n - 1 - gone] = cache.slot[i]
    r[RUNNING] = kept
    if r[HOLDS] == 1:
        r[SLOTS_AT] += n - kept
