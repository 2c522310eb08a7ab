"""What may be in a batch of TensorRT-LLM: who has memory, then who has tokens, then whether prompts wait.

These are the rules of `reference.trtllm`, over the active requests, which stand in a list in the order in which they
came.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import column_nb, log_lost_nb
from apex_opt.simulator.kernel.blocks import memo_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.reuse import comes_nb, give_back_nb, new_content_nb, reusable_nb, store_nb
from apex_opt.simulator.kernel.state import (
    ASKING_SIZE,
    ASKS,
    BATCH_CHUNKS_NS,
    BATCH_DECODES,
    BATCH_HELD,
    BATCH_LOST,
    BATCH_MADE,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BLOCK_SIZE,
    BLOCKS,
    CAPACITY,
    CHOSEN,
    CHOSEN_AT,
    CHUNKED,
    CHUNKING,
    COMPUTED,
    DRAFTS,
    EQUALLY,
    FLYING,
    FORCED,
    FREE,
    GENERATED,
    GETS,
    IN_FLIGHT,
    LEFT,
    LIMIT,
    LOGGED,
    LOOKAHEAD,
    MAX_SEQS,
    MAX_TOKENS,
    MEMO_STAMP,
    NOTHING,
    ONE_BATCH,
    OWED,
    PROMPT,
    PROMPTS_AT,
    ROOM,
    RUNNING,
    RUNNING_AT,
    SNAPSHOTS,
    STAGES,
    STATED,
    UTILISE,
    WAIT_ITERS,
    WAIT_TOKENS,
    WAITED,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Cache, Run


@inner
def choose_nb(run: Run, cache: Cache | None, r: I64) -> tuple[int, int]:
    """Begin a batch: how many decode in it, and how many prompts may be computed."""
    r[BATCH_ROWS], r[BATCH_TOKENS], r[BATCH_DECODES], r[BATCH_READ], r[BATCH_LOST] = 0, 0, 0, 0, 0
    r[BATCH_HELD], r[BATCH_MADE], r[BATCH_CHUNKS_NS] = 0, 0, 0
    if cache is not None:
        coming_nb(run, cache, r)
    if r[CAPACITY] == UTILISE:
        fitting_nb(run, cache, r)
    else:
        reserving_nb(run, cache, r)
    return within_tokens_nb(run, cache, r)


@inner
def left_nb(run: Run, i: int) -> int:
    """Tokens of its prompt that are not computed, be they cached or not."""
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
def found_nb(run: Run, cache: Cache, r: I64, i: int) -> tuple[int, int, int]:
    """Blocks that request i, which has not begun, need not compute; those somebody has; tokens not computed then."""
    left = left_nb(run, i)
    found, used, _ = reusable_nb(cache, r, i, (left - 1) // r[BLOCK_SIZE])
    if r[CHUNKING] == FORCED and r[SNAPSHOTS] > 0:
        every = r[SNAPSHOTS] // r[BLOCK_SIZE]
        if found % every > 0:
            found, used, _ = reusable_nb(cache, r, i, found - found % every)
    return found, used, left - found * r[BLOCK_SIZE]


@inner
def coming_nb(run: Run, cache: Cache, r: I64) -> None:
    """Nobody computes what others wait for yet, but those in the middle of their prompts."""
    memo_nb(cache, r)[MEMO_STAMP] += 1
    running, computed = at(run.scratch, r[RUNNING_AT]), column_nb(run, COMPUTED)
    for index in range(r[RUNNING]):
        i = running[index]
        if computed[i] > 0 and not decodes_nb(run, i) and not ending_nb(run, i):
            better_later_nb(run, cache, r, i)


@inner
def better_later_nb(run: Run, cache: Cache, r: I64, i: int) -> bool:
    """Whether request i begins with a block that another computes now; if not, it is one who computes its first."""
    if r[CAPACITY] == ONE_BATCH:
        return False
    known: int = column_nb(run, PROMPT)[i] + column_nb(run, GENERATED)[i]
    found, _, last = reusable_nb(cache, r, i, (known - 1) // r[BLOCK_SIZE])
    new = new_content_nb(cache, r, i, found, last, known // r[BLOCK_SIZE])
    return new != NOTHING and comes_nb(cache, r, new)


@inner
def reserving_nb(run: Run, cache: Cache | None, r: I64) -> None:
    """Whoever has room to its end: all that decode, then prompts until one has not."""
    running, chosen = at(run.scratch, r[RUNNING_AT]), at(run.scratch, r[CHOSEN_AT])
    room, blocks = column_nb(run, ROOM), column_nb(run, BLOCKS)
    computed = column_nb(run, COMPUTED)
    available, n, prompts = r[FREE], 0, 0
    for index in range(r[RUNNING]):
        i = running[index]
        if ending_nb(run, i):
            continue
        if computed[i] > 0:
            available -= room[i] - blocks[i]
        if decodes_nb(run, i):
            chosen[n] = i
            n += 1
        else:
            prompts += 1
    if prompts > 0 and not (r[CAPACITY] == ONE_BATCH and n > 0):
        full = False
        for index in range(r[RUNNING]):
            i = running[index]
            if ending_nb(run, i) or decodes_nb(run, i):
                continue
            if computed[i] == 0:
                if full:
                    continue
                needed = room[i] - blocks[i]
                if cache is not None:
                    if better_later_nb(run, cache, r, i):
                        continue
                    _, used, _ = found_nb(run, cache, r, i)
                    needed -= used
                if needed > available:
                    full = True
                    continue
                available -= needed
            chosen[n] = i
            n += 1
    r[CHOSEN] = n


@inner
def fitting_nb(run: Run, cache: Cache | None, r: I64) -> None:
    """Whoever has room for its next step, in order; the last that started gives way."""
    running, listed = at(run.scratch, r[RUNNING_AT]), at(run.scratch, r[CHOSEN_AT])
    computed, flying = column_nb(run, COMPUTED), column_nb(run, FLYING)
    end = 0
    for index in range(r[RUNNING]):
        if not ending_nb(run, running[index]):
            listed[end] = running[index]
            end += 1
    free, n, place = r[FREE], 0, 0
    while place < end:
        i = listed[place]
        if cache is not None and computed[i] == 0 and better_later_nb(run, cache, r, i):
            place += 1
            continue
        needed = to_step_nb(run, r, i)
        if needed <= free:
            free -= needed
            listed[n] = i
            n += 1
            place += 1
            continue
        giver = end - 1
        while giver >= place and (computed[listed[giver]] == 0 or (r[STAGES] > 1 and flying[listed[giver]] > 0)):
            giver -= 1
        if giver < place:
            break
        end = giver
        victim = listed[giver]
        freed = back_nb(run, cache, r, victim)
        free += freed
        computed[victim], column_nb(run, OWED)[victim] = 0, 0
        r[BATCH_LOST] += 1
        if run.control[LOGGED] == 1:
            log_lost_nb(run, victim)
    r[CHOSEN] = n


@inner
def back_nb(run: Run, cache: Cache | None, r: I64, i: int) -> int:
    """Give back the blocks of request i, which hold what it has computed; how many of them are free now."""
    blocks = column_nb(run, BLOCKS)
    freed: int = blocks[i]
    if cache is not None and freed > 0:
        known = column_nb(run, PROMPT)[i] + column_nb(run, GENERATED)[i]
        store_nb(cache, r, i, min(known - 1, column_nb(run, COMPUTED)[i]) // r[BLOCK_SIZE])
        freed = give_back_nb(cache, r, i, freed)
    r[FREE] += freed
    blocks[i] = 0
    return freed


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
def within_tokens_nb(run: Run, cache: Cache | None, r: I64) -> tuple[int, int]:
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
        if cache is not None and column_nb(run, COMPUTED)[i] == 0:
            _, _, tokens = found_nb(run, cache, r, i)
        if tokens > budget and not chunked:
            break
        row = at(waiting, ASKING_SIZE * prompts)
        row[ASKS], row[GETS], row[LEFT] = i, tokens, tokens
        prompts += 1
        total += tokens
        if not chunked:
            budget -= tokens
    if chunked and r[CHUNKING] == FORCED:
        by_states_nb(run, r, waiting, prompts, budget)
    elif chunked and total > budget and r[CHUNKING] == EQUALLY:
        alike_nb(waiting, prompts, budget, r[BLOCK_SIZE])
    elif chunked and total > budget:
        for place in range(prompts):
            row = at(waiting, ASKING_SIZE * place)
            given = min(row[LEFT], budget)
            if given < row[LEFT]:
                given -= given % r[BLOCK_SIZE]
            budget -= given
            row[GETS] = given
    return decoding, prompts


@inner
def by_states_nb(run: Run, r: I64, waiting: I64, prompts: int, budget: int) -> None:
    """Each prompt no further than to the next states that are kept, counted as if nothing was cached."""
    for place in range(prompts):
        row = at(waiting, ASKING_SIZE * place)
        i = row[ASKS]
        computed, given = column_nb(run, COMPUTED)[i], left_nb(run, i)
        if r[SNAPSHOTS] > 0:
            given = min(given, r[SNAPSHOTS] - computed % r[SNAPSHOTS])
        if given > budget:
            given = budget - budget % r[BLOCK_SIZE]
        budget -= given
        row[GETS] = min(given, row[LEFT])


@inner
def alike_nb(waiting: I64, prompts: int, budget: int, unit: int) -> None:
    """Give each prompt a block in turn, or what is left of it, until no more fits."""
    for place in range(prompts):
        waiting[ASKING_SIZE * place + GETS] = 0
    given = 1
    while given > 0 and budget > 0:
        given = 0
        for place in range(prompts):
            row = at(waiting, ASKING_SIZE * place)
            more = min(unit, row[LEFT] - row[GETS])
            if 0 < more <= budget:
                row[GETS] += more
                budget -= more
                given += more


@inner
def held_back_nb(run: Run, r: I64, decoding: int, prompts: int) -> bool:
    """Whether prompts wait for more of them to come."""
    waiting = at(run.scratch, r[PROMPTS_AT])
    computed, tokens = 0, decoding * (1 + r[DRAFTS])
    for place in range(prompts):
        tokens += waiting[ASKING_SIZE * place + GETS]
        computed += waiting[ASKING_SIZE * place + GETS] > 0
    if decoding == 0 or computed == 0 or (r[WAIT_ITERS] == 0 and r[WAIT_TOKENS] == 0):
        return False
    if r[WAITED] < r[WAIT_ITERS] and tokens < r[WAIT_TOKENS]:
        r[WAITED] += 1
        return True
    r[WAITED] = 0
    return False
