"""Decoding as SGLang does it: who joins and leaves the running list, a step of all on it, and retraction.

All on a running list get their tokens together, so that a step touches nobody: a sequence has as many tokens as the
list has made steps, and some more that were its own before (OFFSET).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import answer_nb, column_nb, log_lost_nb, log_row_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.sglang_prompts import make_room_nb, sort_nb
from apex_opt.simulator.kernel.sglang_state import (
    AHEAD,
    COMPUTED,
    DONE,
    F_ENDERS,
    F_PROMPTS,
    F_SIZE,
    F_STEP,
    G_CHUNKED,
    G_SEATS,
    G_SLOTS,
    G_SORT_AT,
    G_WAIT_AT,
    G_WAIT_MASK,
    G_WAIT_TAIL,
    HELD,
    LEAVES,
    MIXED,
    NODE,
    NOTHING,
    OFFSET,
    PLACE,
    R_DECAY,
    R_LEAST,
    R_RATIO,
    ROOT,
    RUNS,
    S_CAME,
    S_CHUNKED,
    S_COMING,
    S_CONTEXT,
    S_DUE,
    S_FULL,
    S_LAST,
    S_LEFT,
    S_NEXT_END,
    S_RESIDUE_AT,
    S_RUNNING,
    S_RUNNING_AT,
    S_STEPS,
    STATED,
    WAITS,
)
from apex_opt.simulator.kernel.sglang_tree import cache_nb, let_go_nb
from apex_opt.simulator.kernel.state import (
    BATCH_DECODES,
    BATCH_LOST,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BLOCK_SIZE,
    FREE,
    GENERATED,
    LIMIT,
    LOGGED,
    MAX_SEQS,
    MOST_ROWS,
    NEVER,
    NONE,
    NOW,
    PREEMPTIONS,
    PROMPT,
    ROW_REQUEST,
    ROW_SIZE,
    ROWS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import Engine, Tree
    from apex_opt.simulator.kernel.state import I64, Run

_MOST = (1 << 24) - 1  # more tokens than a prompt or an answer can have


@inner
def merge_nb(e: Engine, s: I64, f: I64, ahead: int) -> None:
    """Those of the last batch, which was f, run on; who is done or in the middle of its chunks leaves.

    With `ahead` that batch is in flight.
    """
    run, g = e.run, e.g
    running, place = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, PLACE)
    last = s[S_LAST]
    if s[S_RUNNING] == 0 or last == MIXED:
        s[S_FULL] = 0
    if s[S_LEFT] > 0:
        close_ranks_nb(e, s)
        s[S_LEFT] = 0
        s[S_FULL] = 0
    old = s[S_RUNNING]
    s[S_COMING], s[S_CAME] = old + e.r[MAX_SEQS], NEVER
    if last != NOTHING:
        rows, joined = at(f, F_SIZE), 0
        for row in range(f[F_PROMPTS]):
            i = rows[row] >> 1
            if place[i] == DONE or i == g[G_CHUNKED] or i == s[S_CHUNKED]:
                continue
            running[old + joined] = i
            joined += 1
            join_nb(e, s, i, ahead)
        if joined < f[F_PROMPTS]:
            s[S_FULL] = 0
        s[S_RUNNING] = old + joined
        if last == MIXED and joined > 0:
            turn_nb(e, running, old, joined)
    if ahead == 1 and f[F_STEP] == 1:
        s[S_COMING] = 0
    elif ahead == 1 and last != NOTHING:
        s[S_COMING] = old
    if s[S_RUNNING] == 0:
        s[S_FULL] = 0
    s[S_LAST], s[S_CHUNKED] = NOTHING, NONE


@inner
def turn_nb(e: Engine, running: I64, old: int, joined: int) -> None:
    """Those who joined stand before the others."""
    others = at(e.run.scratch, e.g[G_SORT_AT])
    for j in range(old):
        others[j] = running[j]
    for j in range(joined):
        running[j] = running[old + j]
    for j in range(old):
        running[joined + j] = others[j]


@inner
def join_nb(e: Engine, s: I64, i: int, ahead: int) -> None:
    """All that request i knows is computed: from now on it decodes."""
    run, page = e.run, e.r[BLOCK_SIZE]
    tokens = column_nb(run, GENERATED)[i] + ahead
    offset = tokens - s[S_STEPS]
    column_nb(run, OFFSET)[i] = offset
    column_nb(run, PLACE)[i] = RUNS
    held = column_nb(run, PROMPT)[i] + tokens - 1
    s[S_CONTEXT] += held
    run.scratch[s[S_RESIDUE_AT] + (s[S_STEPS] - held) % page] += 1
    end = column_nb(run, LIMIT)[i] - offset
    if end > s[S_STEPS]:
        s[S_NEXT_END] = min(s[S_NEXT_END], end)
    if tokens >= column_nb(run, STATED)[i]:
        s[S_DUE] = 1


@inner
def held_nb(e: Engine, s: I64, i: int) -> int:
    """Tokens that a sequence on a running list has computed."""
    held: int = column_nb(e.run, PROMPT)[i] + column_nb(e.run, OFFSET)[i] + s[S_STEPS] - 1
    return held


@inner
def strike_nb(e: Engine, s: I64, held: int) -> None:
    """One that holds so many tokens is on the running list no more."""
    s[S_CONTEXT] -= held
    e.run.scratch[s[S_RESIDUE_AT] + (s[S_STEPS] - held) % e.r[BLOCK_SIZE]] -= 1


@inner
def close_ranks_nb(e: Engine, s: I64) -> None:
    """Strike those that are done."""
    running, place = at(e.run.scratch, s[S_RUNNING_AT]), column_nb(e.run, PLACE)
    kept = 0
    for j in range(s[S_RUNNING]):
        i = running[j]
        if place[i] == DONE:
            strike_nb(e, s, held_nb(e, s, i))
        else:
            running[kept] = i
            kept += 1
    s[S_RUNNING] = kept


@inner
def take_out_nb(e: Engine, s: I64) -> int:
    """Strike those whose last token is on its way, as they may have no more; how many they are."""
    if s[S_DUE] == 0:
        return 0
    s[S_DUE] = 0
    run = e.run
    running, place = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, PLACE)
    stated, offset = column_nb(run, STATED), column_nb(run, OFFSET)
    n, kept, coming, came = s[S_RUNNING], 0, s[S_COMING], s[S_CAME]
    for j in range(n):
        i = running[j]
        if offset[i] + s[S_STEPS] >= stated[i]:
            held = held_nb(e, s, i)
            strike_nb(e, s, held)
            column_nb(run, COMPUTED)[i] = held
            place[i] = LEAVES
            if j < coming:
                s[S_COMING] -= 1
            if j < came:
                s[S_CAME] -= 1
        else:
            running[kept] = i
            kept += 1
    s[S_RUNNING] = kept
    if kept < n:
        s[S_FULL] = 0
    return n - kept


@inner
def fits_nb(e: Engine, tree: Tree | None, s: I64) -> bool:
    """Whether all on the running list can have a token more, after dropping what is cached."""
    need = e.run.scratch[s[S_RESIDUE_AT] + s[S_STEPS] % e.r[BLOCK_SIZE]]
    if tree is not None and need > e.r[FREE]:
        make_room_nb(e, tree, need * e.r[BLOCK_SIZE])
    fits: bool = need <= e.r[FREE]
    return fits


@inner
def mix_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Give the running sequences a token each beside the prompts, if there is room for all."""
    take_out_nb(e, s)
    if s[S_RUNNING] > 0 and fits_nb(e, tree, s):
        advance_nb(e, tree, s, f)
        s[S_LAST] = MIXED


@inner
def step_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Give all running sequences a token; some are retracted where there is no room for all."""
    ending = take_out_nb(e, s)
    if s[S_RUNNING] == 0:
        return
    if fits_nb(e, tree, s):
        e.ratio[R_RATIO] = max(e.ratio[R_RATIO] - e.ratio[R_DECAY], e.ratio[R_LEAST])
    elif ending > 0:
        return  # their pages are free soon
    else:
        retract_nb(e, tree, s)
        if s[S_RUNNING] == 0 or not fits_nb(e, tree, s):
            return
    advance_nb(e, tree, s, f)


@inner
def advance_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Enter all on the running list into the batch f."""
    run, r = e.run, e.r
    n = s[S_RUNNING]
    if r[BLOCK_SIZE] > 1:
        make_room_nb(e, tree, n * r[BLOCK_SIZE])
    r[FREE] -= run.scratch[s[S_RESIDUE_AT] + s[S_STEPS] % r[BLOCK_SIZE]]
    s[S_STEPS] += 1
    s[S_CONTEXT] += n
    f[F_STEP] = 1
    r[BATCH_ROWS] += n
    r[BATCH_TOKENS] += n
    r[BATCH_DECODES] += n
    r[BATCH_READ] += s[S_CONTEXT]
    if run.control[LOGGED] == 1:
        for j in range(n):
            i = at(run.scratch, s[S_RUNNING_AT])[j]
            log_row_nb(run, i, 1, 1, held_nb(e, s, i))
    if s[S_STEPS] >= s[S_NEXT_END]:
        enders_nb(e, s, f)


@inner
def enders_nb(e: Engine, s: I64, f: I64) -> None:
    """Note who gets its last token by this step, and when the next one does."""
    running, limit, offset = at(e.run.scratch, s[S_RUNNING_AT]), column_nb(e.run, LIMIT), column_nb(e.run, OFFSET)
    enders = at(f, F_SIZE + e.r[MAX_SEQS])
    n, soonest, steps = 0, NEVER, s[S_STEPS]
    for j in range(s[S_RUNNING]):
        i = running[j]
        end = limit[i] - offset[i]
        if end == steps:
            enders[n] = i
            n += 1
        elif end > steps:
            soonest = min(soonest, end)
    f[F_ENDERS] = n
    s[S_NEXT_END] = soonest
    if n > 0:
        s[S_DUE] = 1


@inner
def order_by_made_nb(e: Engine, s: I64) -> None:
    """Put those on the running list in the order in which they are kept: the most generated, the shortest prompt.

    After the keys come the places of them in the list, and the list.
    """
    run, r, g = e.run, e.r, e.g
    running, prompt, offset = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, PROMPT), column_nb(run, OFFSET)
    keys, order = at(run.scratch, g[G_SORT_AT]), at(run.scratch, g[G_SORT_AT] + r[MAX_SEQS])
    members = at(run.scratch, g[G_SORT_AT] + 2 * r[MAX_SEQS])
    for j in range(s[S_RUNNING]):
        i = running[j]
        made = offset[i] + s[S_STEPS] - (1 if s[S_COMING] <= j < s[S_CAME] else 0)
        keys[j] = (_MOST - made) << 24 | prompt[i]
        members[j] = i
        order[j] = j
    sort_nb(e, s[S_RUNNING])


@inner
def retract_nb(e: Engine, tree: Tree | None, s: I64) -> None:
    """Take sequences out until the others have room: the fewest generated first, of these the longest prompt."""
    run, r, g = e.run, e.r, e.g
    running, stated = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, STATED)
    offset, n = column_nb(run, OFFSET), s[S_RUNNING]
    order_by_made_nb(e, s)
    keys, order = at(run.scratch, g[G_SORT_AT]), at(run.scratch, g[G_SORT_AT] + r[MAX_SEQS])
    members = at(run.scratch, g[G_SORT_AT] + 2 * r[MAX_SEQS])
    lost, least = 0, 1 if g[G_SLOTS] == 1 else 0
    while n > least and (lost == 0 or not fits_nb(e, tree, s)):
        n -= 1
        i = members[order[n]]
        made = _MOST - (keys[n] >> 24)
        if run.control[LOGGED] == 1:
            log_lost_nb(run, i)
            if made < offset[i] + s[S_STEPS]:
                unlog_nb(run, i)
        held = held_nb(e, s, i)
        strike_nb(e, s, held)
        column_nb(run, GENERATED)[i] = made
        release_nb(e, tree, i, blocks_nb(held, r[BLOCK_SIZE]))
        column_nb(run, COMPUTED)[i] = 0
        column_nb(run, PLACE)[i] = WAITS
        run.scratch[g[G_WAIT_AT] + (g[G_WAIT_TAIL] & g[G_WAIT_MASK])] = i
        g[G_WAIT_TAIL] += 1
        lost += 1
        s[S_RUNNING] = n
        make_room_nb(e, tree, n * AHEAD)
    generated, most = 0, 0
    for j in range(n):
        running[j] = members[order[j]]
        generated += _MOST - (keys[j] >> 24)
        most += stated[running[j]]
    s[S_FULL] = 0
    r[BATCH_LOST] = lost
    r[PREEMPTIONS] += lost
    e.ratio[R_RATIO] = min(1.0, (generated + AHEAD * n) / (most + 1))


@inner
def unlog_nb(run: Run, i: int) -> None:
    """The token of request i that is on its way is lost."""
    for place in range(min(run.control[ROWS], run.control[MOST_ROWS]) - 1, -1, -1):
        row = at(run.rows, place * ROW_SIZE)
        if row[ROW_REQUEST] >> 8 == i:
            row[ROW_REQUEST] -= row[ROW_REQUEST] & 15
            return


@inner
def release_nb(e: Engine, tree: Tree | None, i: int, pages: int) -> None:
    """Request i gives up its seat and its pages; what is in the tree stays there."""
    cached = column_nb(e.run, HELD)
    e.r[FREE] += pages - cached[i]
    cached[i] = 0
    if tree is not None:
        let_go_nb(e, tree, column_nb(e.run, NODE)[i])
        column_nb(e.run, NODE)[i] = ROOT
    e.g[G_SEATS] += 1


@inner
def finish_nb(e: Engine, tree: Tree | None, s: I64, i: int) -> None:
    """Request i is answered."""
    place = column_nb(e.run, PLACE)
    if place[i] == RUNS:
        held = held_nb(e, s, i)
        s[S_LEFT] += 1
    else:
        held = column_nb(e.run, COMPUTED)[i]
    if tree is not None:
        cache_nb(e, tree, i, held, column_nb(e.run, PROMPT)[i])
    release_nb(e, tree, i, blocks_nb(held, e.r[BLOCK_SIZE]))
    place[i] = DONE
    answer_nb(e.run, e.r, i, e.r[NOW])
