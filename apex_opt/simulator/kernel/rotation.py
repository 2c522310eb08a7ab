"""Stretches of the general engine in which nothing happens but the passing of tokens.

As long as nobody arrives, ends or needs preemption, the sequences of the batch that was taken in last form the next
one: micro-batches take turns, as many as there are batches in flight and one more, each with the sequences it had. With
asynchronous scheduling all of them hold the same sequences, and there is one. So a turn needs of a micro-batch how many
sequences it has, the context they hold, how many of them need a block next, and when its batch ends; what changes for
each sequence is made up for when the stretch is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import by_sequences_nb, by_tokens_nb, column_nb, count_decoding_nb, law_nb, pace_nb
from apex_opt.simulator.kernel.blocks import found_nb, register_nb, take_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_counts import entered_nb, passed_nb, whole_nb
from apex_opt.simulator.kernel.kv_state import CHUNK, GROUP_SIZE, KIND, SEEN, STATE, TIMES, WINDOW
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.stages import queued_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ASYNCHRONOUS,
    BLOCK_SIZE,
    BLOCKS,
    COMPUTED,
    DECODE_NS,
    DEPTH,
    DUE_NEXT,
    ENTERING_AT,
    FIRST_STAGE,
    FREE,
    GENERATED,
    HEAD,
    IN_FLIGHT,
    LIMIT,
    MAX_SEQS,
    MICRO_AT,
    MICRO_CONTEXT,
    MICRO_DUE,
    MICRO_END,
    MICRO_FORMED,
    MICRO_LEFT,
    MICRO_PHASE,
    MICRO_READ,
    MICRO_ROWS,
    MICRO_TAKEN,
    MICRO_UNTIL,
    MICRO_WIDTH,
    MIXED_NS,
    NEVER,
    NONE,
    NOW,
    PACE_FULL,
    PACE_NS,
    PACE_RATE,
    PACE_SIZE,
    PACE_TRANSFER_NS,
    PLACE,
    PROMPT,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    RATE_BITS,
    RUNNING,
    RUNNING_AT,
    RUNS,
    SLEEP_NS,
    STACK,
    STAGE_BUSY,
    STAGE_FREE,
    STAGE_SIZE,
    STAGES,
    STALE,
    TRANSFER_NS,
    UNREPORTED,
    WANTED,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.kv_state import Groups
    from apex_opt.simulator.kernel.state import I64, Cache, Run


@inner
def rotate_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, until: int) -> None:
    """Take turns until somebody is about to get its last token, blocks run out, or somebody can be admitted."""
    wake = wake_nb(run, cache, groups, r, until)
    if wake == NONE or not micro_batches_nb(run, cache, groups, r):
        return
    asynchronous, slots, bs, now = r[ASYNCHRONOUS] == 1, r[QUEUED] + 1, r[BLOCK_SIZE], r[NOW]
    sleep_ns = r[SLEEP_NS]
    turns = slot = 0
    while now < wake:
        following = slot + 1 if slot + 1 < slots else 0
        formed, oldest = micro_nb(run, r, 0 if asynchronous else slot), micro_nb(run, r, following)
        taken = formed if asynchronous else oldest
        if taken[MICRO_TAKEN] >= taken[MICRO_LEFT]:
            break
        end = now
        if formed[MICRO_ROWS] > 0:
            if slots < r[DEPTH] and oldest[MICRO_END] > now:
                break  # one batch more would be in flight from now on
            if groups is not None:
                if not feed_by_group_nb(r, formed):
                    break
            elif not feed_nb(run, cache, r, at(formed, MICRO_DUE + formed[MICRO_PHASE])):
                break
            formed[MICRO_PHASE] = formed[MICRO_PHASE] + 1 if formed[MICRO_PHASE] + 1 < bs else 0
            end = through_nb(run, r, formed, now)
        micro_nb(run, r, slot)[MICRO_END] = end
        taken[MICRO_TAKEN] += 1
        now = max(now, oldest[MICRO_END])
        if formed[MICRO_ROWS] == 0:
            now += sleep_ns
        turns += 1
        slot = following
    if turns > 0:
        r[NOW] = max(r[NOW], now)
        r[UNREPORTED] = 0
        settle_nb(run, cache, groups, r, slot)


@inner
def paces_nb(run: Run, r: I64, micro: I64, context: int) -> None:
    """Look up how long each stage takes for a micro-batch, from a context on."""
    rows, pace = micro[MICRO_ROWS], at(micro, MICRO_DUE + r[BLOCK_SIZE])
    for s in range(r[STAGES]):
        law = law_nb(run, r, s)
        pace[PACE_NS] = by_sequences_nb(law, r, DECODE_NS)[rows]
        pace[PACE_RATE], pace[PACE_FULL], micro[MICRO_UNTIL] = pace_nb(law, r, rows, context)
        pace[PACE_TRANSFER_NS] = by_tokens_nb(law, r, MIXED_NS, TRANSFER_NS)[rows] if s + 1 < r[STAGES] else 0
        pace = at(pace, PACE_SIZE)


@inner
def through_nb(run: Run, r: I64, micro: I64, now: int) -> int:
    """Form a micro-batch and pass it through the stages; when it leaves the last one."""
    context = micro[MICRO_CONTEXT] + micro[MICRO_ROWS]
    micro[MICRO_FORMED] += 1
    micro[MICRO_CONTEXT] = context
    micro[MICRO_READ] += context
    if context > micro[MICRO_UNTIL]:
        paces_nb(run, r, micro, context)
    stage, pace, end = at(run.stages, r[FIRST_STAGE] * STAGE_SIZE), at(micro, MICRO_DUE + r[BLOCK_SIZE]), now
    for _ in range(r[STAGES]):
        duration = pace[PACE_NS] + ((pace[PACE_RATE] * context + pace[PACE_FULL]) >> RATE_BITS)
        end = max(end, stage[STAGE_FREE]) + duration
        stage[STAGE_FREE] = end
        stage[STAGE_BUSY] += duration
        end += pace[PACE_TRANSFER_NS]
        stage, pace = at(stage, STAGE_SIZE), at(pace, PACE_SIZE)
    return end


@inner
def wake_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, until: int) -> int:
    """When somebody can be admitted at the earliest, or a later turn is not asked for; NONE: at once."""
    i, arrival = r[STACK], column_nb(run, ARRIVAL)
    r[WANTED] = NEVER
    if r[RUNNING] >= r[MAX_SEQS]:
        return until
    if i == NONE:
        i = r[HEAD]
        if i == NONE:
            return until
        if arrival[i] > r[NOW]:
            return min(until, arrival[i])
    known = column_nb(run, PROMPT)[i] + column_nb(run, GENERATED)[i]
    if groups is not None:  # it waits until windows have given back enough
        r[WANTED] = whole_nb(groups, known)
        return until if r[WANTED] > r[FREE] else NONE
    # Whoever waits for blocks now waits on: in a stretch none become free, and nothing is computed that it could share.
    found, unused = 0, 0
    if cache is not None:
        found, unused = found_nb(cache, r, i, (known - 1) // r[BLOCK_SIZE])
    return until if blocks_nb(known, r[BLOCK_SIZE]) - found + unused > r[FREE] else NONE


@inner
def micro_nb(run: Run, r: I64, slot: int) -> I64:
    """A micro-batch; slot 0 is formed first, the others are in flight, the oldest first."""
    return at(run.scratch, r[MICRO_AT] + slot * r[MICRO_WIDTH])


@inner
def place_nb(r: I64, slot: int) -> int:
    """Place of a micro-batch in the queue; of slot 0 the one that was left last."""
    place: int = r[QUEUE_HEAD] + slot - 1
    if place < 0:
        return place + r[DEPTH]
    return place - r[DEPTH] if place >= r[DEPTH] else place


@inner
def micro_batches_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64) -> bool:
    """Find the micro-batches; whether these are all running sequences, and each has one token to compute each time."""
    if r[STALE] > 0 or r[RUNNING] == 0 or (r[QUEUED] == 0 and r[DEPTH] > 1):
        return False
    ends, in_flight = at(run.scratch, r[QUEUE_AT]), column_nb(run, IN_FLIGHT)
    for slot in range(r[QUEUED] + 1):
        micro = micro_nb(run, r, slot)
        for entry in range(MICRO_DUE + r[BLOCK_SIZE]):
            micro[entry] = 0 if cache is None or entry < MICRO_DUE else NONE
        if groups is not None:
            for phase in range(r[BLOCK_SIZE]):
                back_nb(r, micro)[phase] = 0
        micro[MICRO_LEFT] = NEVER
        micro[MICRO_END] = ends[place_nb(r, slot)]
    if r[ASYNCHRONOUS] == 0:
        return by_batch_nb(run, cache, groups, r)
    for slot in range(1, r[QUEUED] + 1):
        if ends[r[DEPTH] + place_nb(r, slot)] != r[RUNNING]:
            return False
    micro, running = micro_nb(run, r, 0), at(run.scratch, r[RUNNING_AT])
    for index in range(r[RUNNING] - 1, -1, -1):
        i = running[index]
        if in_flight[i] != r[QUEUED] or not add_nb(run, cache, groups, r, micro, i, r[QUEUED]):
            return False
    micro[MICRO_LEFT] -= r[QUEUED] - 1
    return True


@inner
def by_batch_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64) -> bool:
    """`micro_batches_nb` where a sequence that decodes is in one batch at a time."""
    place, sizes = column_nb(run, PLACE), at(run.scratch, r[QUEUE_AT] + r[DEPTH])
    total = 0
    for after in range(r[QUEUED] + 1):
        slot = after + 1 if after < r[QUEUED] else 0  # the oldest first, where we shall mostly give up
        micro, batch = micro_nb(run, r, slot), queued_nb(run, r, place_nb(r, slot))
        for row in range(sizes[place_nb(r, slot)] - 1, -1, -1):
            i = batch[row] >> 1
            if slot == 0 and place[i] != RUNS:
                continue  # it got its last token with this batch
            if (slot > 0 and batch[row] & 1 == 0) or not add_nb(run, cache, groups, r, micro, i, min(slot, 1)):
                return False
        if slot == 1 and micro[MICRO_LEFT] == 0:
            return False
        total += micro[MICRO_ROWS]
    return total == r[RUNNING]


@inner
def add_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, micro: I64, i: int, coming: int) -> bool:
    """Add a sequence to a micro-batch, those after it in running order being there; False if it does not just decode.

    `coming` of its tokens are on their way.
    """
    generated, computed = column_nb(run, GENERATED)[i], column_nb(run, COMPUTED)[i]
    if computed != column_nb(run, PROMPT)[i] + generated - 1 + coming:
        return False
    micro[MICRO_ROWS] += 1
    micro[MICRO_CONTEXT] += computed
    left = column_nb(run, LIMIT)[i] - generated - 1 if generated > 0 else 0  # no first token either
    micro[MICRO_LEFT] = min(micro[MICRO_LEFT], left)
    if groups is not None:
        return add_by_group_nb(run, groups, r, micro, i)
    due = at(micro, MICRO_DUE + column_nb(run, BLOCKS)[i] * r[BLOCK_SIZE] - computed)
    if cache is None:
        due[0] += 1
    else:
        column_nb(run, DUE_NEXT)[i] = due[0]
        due[0] = i
    return True


@inner
def back_nb(r: I64, micro: I64) -> I64:
    """Of a micro-batch over groups of layers, by phase, the blocks that windows give back."""
    return at(micro, r[MICRO_WIDTH] - r[BLOCK_SIZE])


@inner
def add_by_group_nb(run: Run, groups: Groups, r: I64, micro: I64, i: int) -> bool:
    """Count what a sequence takes and gives back by phase; False where its last row leaves more to be given back."""
    computed, size = column_nb(run, COMPUTED)[i], r[BLOCK_SIZE]
    kept = entered_nb(groups, computed) - passed_nb(groups, computed - 1)
    if column_nb(run, BLOCKS)[i] != kept:
        return False
    for g in range(groups.number):
        group = at(groups.rows, g * GROUP_SIZE)
        if group[KIND] != STATE:
            micro[MICRO_DUE + (-computed) % size] += group[TIMES]
        if group[KIND] == WINDOW:
            beyond = computed - group[SEEN] + 1
            if beyond > 0:
                back_nb(r, micro)[(-beyond) % size] += group[TIMES]
            else:  # until its first block leaves the window
                micro[MICRO_LEFT] = max(0, min(micro[MICRO_LEFT], size - beyond - 2))
        elif group[KIND] == CHUNK:  # until a new one begins
            micro[MICRO_LEFT] = max(0, min(micro[MICRO_LEFT], (-computed) % group[SEEN] - 2))
    return True


@inner
def feed_by_group_nb(r: I64, micro: I64) -> bool:
    """Hand out and take back the blocks that are due, if there are enough and nobody waits for them."""
    taken, back = micro[MICRO_DUE + micro[MICRO_PHASE]], back_nb(r, micro)[micro[MICRO_PHASE]]
    if taken > r[FREE] or r[FREE] - taken + back >= r[WANTED]:
        return False
    r[FREE] += back - taken
    return True


@inner
def feed_nb(run: Run, cache: Cache | None, r: I64, due: I64) -> bool:
    """Hand out the blocks that are due, if there are as many; with prefix caching it matters which ones."""
    if cache is None:
        if due[0] > r[FREE]:
            return False
        r[FREE] -= due[0]
        return True
    following, blocks = column_nb(run, DUE_NEXT), column_nb(run, BLOCKS)
    need, i = 0, due[0]
    while i != NONE:
        need += 1
        i = following[i]
    if need > r[FREE]:
        return False
    r[FREE] -= need
    i = due[0]
    while i != NONE:
        take_nb(cache, r, i, blocks[i], 0, blocks[i] + 1)
        blocks[i] += 1
        i = following[i]
    return True


@inner
def settle_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, first: int) -> None:
    """Make up for a stretch, after which the micro-batch in slot `first` is the next to be formed."""
    ends, sizes = at(run.scratch, r[QUEUE_AT]), at(run.scratch, r[QUEUE_AT] + r[DEPTH])
    rows, running, slots = at(run.scratch, r[ENTERING_AT]), at(run.scratch, r[RUNNING_AT]), r[QUEUED] + 1
    for slot in range(1 if r[ASYNCHRONOUS] == 1 else slots):
        micro = micro_nb(run, r, slot)
        count_decoding_nb(run, r, micro[MICRO_ROWS], micro[MICRO_FORMED], micro[MICRO_READ])
    if r[ASYNCHRONOUS] == 1:
        for row in range(r[RUNNING]):
            advance_nb(run, cache, groups, r, micro_nb(run, r, 0), running[row])
        for slot in range(slots):
            ends[place_nb(r, (slot - first + slots) % slots)] = micro_nb(run, r, slot)[MICRO_END]
        return
    count = 0
    for slot in range(slots):
        micro, batch = micro_nb(run, r, slot), queued_nb(run, r, place_nb(r, slot))
        for row in range(sizes[place_nb(r, slot)]):
            i = batch[row] >> 1
            if slot > 0 or column_nb(run, PLACE)[i] == RUNS:
                advance_nb(run, cache, groups, r, micro, i)
                rows[count] = i
                count += 1
    count = 0
    for slot in range(slots):
        micro, place = micro_nb(run, r, slot), place_nb(r, (slot - first + slots) % slots)
        batch, ends[place], sizes[place] = queued_nb(run, r, place), micro[MICRO_END], micro[MICRO_ROWS]
        for row in range(micro[MICRO_ROWS]):
            batch[row] = 2 * rows[count] + 1
            count += 1


@inner
def advance_nb(run: Run, cache: Cache | None, groups: Groups | None, r: I64, micro: I64, i: int) -> None:
    """What a stretch did to a sequence of a micro-batch."""
    computed, bs = column_nb(run, COMPUTED), r[BLOCK_SIZE]
    computed[i] += micro[MICRO_FORMED]
    column_nb(run, GENERATED)[i] += micro[MICRO_TAKEN]
    if groups is not None:
        if micro[MICRO_FORMED] > 0:
            column_nb(run, BLOCKS)[i] = entered_nb(groups, computed[i]) - passed_nb(groups, computed[i] - 1)
        return
    if cache is None:
        column_nb(run, BLOCKS)[i] = blocks_nb(computed[i], bs)
        return
    # Nobody else looks for what it computed, so it is as good to note it now.
    filled = computed[i] - (r[QUEUED] if r[ASYNCHRONOUS] == 1 else 0)
    if filled >= (cache.registered[i] + 1) * bs:
        register_nb(cache, r, i, filled // bs)
