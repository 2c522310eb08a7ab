"""The engine of SGLang where drafts are verified: `reference.sglang_drafts`.

Requests on a running list get different numbers of tokens, so a step walks all of them. OFFSET is what the scheduler
knows of a request's tokens and S_STEPS stays 0, which is what prompts are admitted by; COMING is what the device has
beyond that. Its pages are in PAGES.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    answer_nb,
    chunk_ns_nb,
    column_nb,
    law_nb,
    log_lost_nb,
    log_row_nb,
    log_step_nb,
    log_taken_nb,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.sglang import arrive_nb, begin_nb, engine_nb, flight_nb, nobody_nb, pass_nb, slot_nb
from apex_opt.simulator.kernel.sglang_prompts import make_room_nb, prompts_nb
from apex_opt.simulator.kernel.sglang_state import (
    AHEAD,
    COMING,
    COMPUTED,
    DONE,
    ERROR_NODES,
    F_END,
    F_ENDERS,
    F_LOGGED,
    F_PROMPTS,
    F_ROWS,
    F_SIZE,
    F_STEP,
    G_BEGUN,
    G_CHUNKED,
    G_IDLE,
    G_NODES_A_TURN,
    G_SORT_AT,
    G_SPARE_NODES,
    G_TURNS,
    G_WAIT_AT,
    G_WAIT_MASK,
    G_WAIT_TAIL,
    LEAVES,
    NOTHING,
    OFFSET,
    PAGES,
    PLACE,
    PROMPTS,
    R_DECAY,
    R_LEAST,
    R_RATIO,
    R_START,
    RUNS,
    S_CHUNKED,
    S_COMING,
    S_FULL,
    S_LAST,
    S_LEFT,
    S_RUNNING,
    S_RUNNING_AT,
    STATED,
    WAITS,
)
from apex_opt.simulator.kernel.sglang_steps import order_by_made_nb, release_nb, unlog_nb
from apex_opt.simulator.kernel.sglang_tree import cache_nb
from apex_opt.simulator.kernel.speculative import drafts_nb, launch_nb
from apex_opt.simulator.kernel.stages import launching_nb
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
    BLOCK_SIZE,
    DEPTH,
    DRAFTS,
    ENTERING_AT,
    ERROR,
    FIRST,
    FREE,
    GENERATED,
    HEAD,
    LAUNCH_NS,
    LIMIT,
    LOGGED,
    LOOKAHEAD,
    MAX_SEQS,
    MOST_ROWS,
    NEVER,
    NONE,
    NOW,
    PASSED,
    PREEMPTIONS,
    PROMPT,
    PROPOSED_AT,
    ROW_REQUEST,
    ROW_SIZE,
    ROWS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import Engine, Sglang, Tree
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def sglang_drafts_nb(run: Run, its: tuple[Sglang, Tree | None], replica: int, until: int) -> None:
    """Take every turn of a replica that starts before `until`."""
    own, tree = its
    e = engine_nb(run, own, replica)
    r, g, arrival = e.r, e.g, column_nb(run, ARRIVAL)
    if g[G_BEGUN] == 0:
        begin_nb(e, own, tree)
    while r[ERROR] == 0:
        if g[G_IDLE] == 1:
            head = r[HEAD]
            if head == NONE or arrival[head] >= NEVER:
                break
            if arrival[head] > r[NOW]:
                r[NOW] = arrival[head]
        if r[NOW] >= until:
            break
        if g[G_SPARE_NODES] < g[G_NODES_A_TURN]:
            r[ERROR] = ERROR_NODES
            break
        arrive_nb(e)
        f = choose_nb(e, own, tree)
        f[F_END] = launch_nb(run, r)
        log_step_nb(run, r, replica, r[NOW], f[F_END])
        r[NOW] += launching_nb(r)
        g[G_TURNS] += 1
        pass_nb(g, f[F_PROMPTS])
        if r[BATCH_ROWS] > 0:
            g[G_IDLE] = 0
        if g[G_TURNS] >= r[DEPTH]:
            take_in_nb(e, own, tree, replica)
        if run.control[PASSED] == 1:
            break


@inner
def choose_nb(e: Engine, own: Sglang, tree: Tree | None) -> I64:
    """Form the batch of a turn, of those who wait or of those who run."""
    r, g, s = e.r, e.g, slot_nb(own, e.g, 0)
    i = g[G_CHUNKED]
    if tree is not None and i != NONE:
        computed = column_nb(e.run, COMPUTED)[i]
        cache_nb(e, tree, i, computed, computed)
    merge_nb(e, s, flight_nb(e, max(g[G_TURNS] - 1, 0)))
    f = flight_nb(e, g[G_TURNS])
    f[F_PROMPTS], f[F_ENDERS], f[F_STEP], f[F_LOGGED] = 0, 0, 0, e.run.control[ROWS]
    r[BATCH_ROWS], r[BATCH_TOKENS], r[BATCH_DECODES], r[BATCH_READ], r[BATCH_LOST] = 0, 0, 0, 0, 0
    r[BATCH_HELD], r[BATCH_CHUNKS_NS], r[BATCH_MADE] = 0, 0, 0
    prompts_nb(e, tree, s, f)
    if f[F_PROMPTS] == 0:
        step_nb(e, tree, s, f)
    else:
        s[S_LAST], s[S_CHUNKED] = PROMPTS, g[G_CHUNKED]
        weigh_nb(e, f)
    f[F_ROWS] = r[BATCH_ROWS]
    return f


@inner
def weigh_nb(e: Engine, f: I64) -> None:
    """What the prompts of the batch f take, and that a token comes of those which end."""
    run, r, rows, tokens = e.run, e.r, at(f, F_SIZE), at(e.run.scratch, e.r[ENTERING_AT])
    computed, coming, law = column_nb(run, COMPUTED), column_nb(run, COMING), law_nb(run, r, 0)
    for row in range(f[F_PROMPTS]):
        i = rows[row] >> 1
        r[BATCH_HELD] += computed[i]
        coming[i] += rows[row] & 1
        if tokens[row] > 1 + r[DRAFTS]:
            r[BATCH_CHUNKS_NS] += chunk_ns_nb(law, r, tokens[row], computed[i])


@inner
def merge_nb(e: Engine, s: I64, f: I64) -> None:
    """Those of the last batch, which was f, run on; who is done or in the middle of its chunks leaves."""
    run, g = e.run, e.g
    running, place = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, PLACE)
    offset, generated = column_nb(run, OFFSET), column_nb(run, GENERATED)
    n = s[S_RUNNING]
    if n == 0:
        s[S_FULL] = 0
    if s[S_LEFT] > 0:
        n = 0
        for j in range(s[S_RUNNING]):
            if place[running[j]] != DONE:
                running[n] = running[j]
                n += 1
        s[S_LEFT] = 0
        s[S_FULL] = 0
    if s[S_LAST] != NOTHING:
        rows, joined = at(f, F_SIZE), 0
        for row in range(f[F_PROMPTS]):
            i = rows[row] >> 1
            if place[i] == DONE or i == g[G_CHUNKED] or i == s[S_CHUNKED]:
                continue
            running[n + joined] = i
            place[i] = RUNS
            offset[i] = generated[i]
            joined += 1
        if joined < f[F_PROMPTS]:
            s[S_FULL] = 0
        n += joined
    if n == 0:
        s[S_FULL] = 0
    s[S_RUNNING] = n
    s[S_COMING] = n + e.r[MAX_SEQS]
    s[S_LAST], s[S_CHUNKED] = NOTHING, NONE


@inner
def step_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Give all running sequences a token and their drafts; some are retracted where there is no room for all."""
    ending = take_out_nb(e, s)
    if s[S_RUNNING] == 0:
        return
    if fits_nb(e, tree, s, s[S_RUNNING]):
        e.ratio[R_RATIO] = max(e.ratio[R_RATIO] - e.ratio[R_DECAY], e.ratio[R_LEAST])
    elif ending > 0:
        return  # their pages are free soon
    else:
        retract_nb(e, tree, s)
        if not fits_nb(e, tree, s, s[S_RUNNING]):
            return
    advance_nb(e, tree, s, f)


@inner
def take_out_nb(e: Engine, s: I64) -> int:
    """Strike those who get their last token by what is on its way, whatever that brings; how many they are."""
    run = e.run
    running, place, coming = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, PLACE), column_nb(run, COMING)
    generated, stated = column_nb(run, GENERATED), column_nb(run, STATED)
    n, kept = s[S_RUNNING], 0
    for j in range(n):
        i = running[j]
        if coming[i] > 0 and generated[i] + 1 >= stated[i]:
            place[i] = LEAVES
        else:
            running[kept] = i
            kept += 1
    s[S_RUNNING] = kept
    if kept < n:
        s[S_FULL] = 0
    return n - kept


@inner
def needed_nb(e: Engine, i: int) -> int:
    """Pages that the next step of a sequence takes."""
    total = blocks_nb(column_nb(e.run, COMPUTED)[i] + e.r[LOOKAHEAD], e.r[BLOCK_SIZE])
    return max(total - column_nb(e.run, PAGES)[i], 0)


@inner
def fits_nb(e: Engine, tree: Tree | None, s: I64, n: int) -> bool:
    """Whether the first n on the running list can have a step more, after dropping what is cached."""
    running, needed = at(e.run.scratch, s[S_RUNNING_AT]), 0
    for j in range(n):
        needed += needed_nb(e, running[j])
    make_room_nb(e, tree, needed * e.r[BLOCK_SIZE])
    fits: bool = needed <= e.r[FREE]
    return fits


@inner
def advance_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Enter all on the running list into the batch f."""
    run, r = e.run, e.r
    running, pages, coming = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, PAGES), column_nb(run, COMING)
    prompt, generated, limit = column_nb(run, PROMPT), column_nb(run, GENERATED), column_nb(run, LIMIT)
    accepts, proposes = at(run.scratch, r[ACCEPTED_AT]), at(run.scratch, r[PROPOSED_AT])
    n, drafts, rows = s[S_RUNNING], r[DRAFTS], at(f, F_SIZE + r[MAX_SEQS])
    if tree is not None and r[BLOCK_SIZE] > 1:
        needed = 0
        for j in range(n):
            needed += needed_nb(e, running[j])
        if needed > 0:
            make_room_nb(e, tree, (needed + n) * r[BLOCK_SIZE])
    held = 0
    for j in range(n):
        i = running[j]
        needed = needed_nb(e, i)
        r[FREE] -= needed
        pages[i] += needed
        there, right = generated[i] + coming[i], 0
        if there < limit[i]:
            right = accepts[drafts_nb(r, i, there)]
            if r[ASYNCHRONOUS] == 0:
                right = min(right, proposes[drafts_nb(r, i, there)])
            right = min(right, drafts)
        coming[i] += 1 + right
        rows[j] = 16 * i + 1 + right
        held += prompt[i] + there + drafts
        if run.control[LOGGED] == 1:
            log_row_nb(run, i, 16 * drafts, 1 + drafts, prompt[i] + there + drafts)
    f[F_STEP], f[F_ENDERS] = 1, n
    r[BATCH_ROWS], r[BATCH_DECODES], r[BATCH_TOKENS] = n, n, n * (1 + drafts)
    r[BATCH_READ], r[BATCH_HELD], r[BATCH_MADE] = held, held, 1


@inner
def retract_nb(e: Engine, tree: Tree | None, s: I64) -> None:
    """Take sequences out until the others have room: the fewest generated first, of these the longest prompt."""
    run, r, g, n = e.run, e.r, e.g, s[S_RUNNING]
    running, stated, generated = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, STATED), column_nb(run, GENERATED)
    coming = column_nb(run, COMING)
    order_by_made_nb(e, s)
    order, members = at(run.scratch, g[G_SORT_AT] + r[MAX_SEQS]), at(run.scratch, g[G_SORT_AT] + 2 * r[MAX_SEQS])
    for j in range(n):
        running[j] = members[order[j]]
    lost = 0
    while n > 1 and (lost == 0 or not fits_nb(e, tree, s, n)):
        n -= 1
        i = running[n]
        if run.control[LOGGED] == 1:
            log_lost_nb(run, i)
            if coming[i] > 0:
                unlog_nb(run, i)
        release_nb(e, tree, i, column_nb(run, PAGES)[i])
        column_nb(run, COMPUTED)[i] = 0
        column_nb(run, PAGES)[i] = 0
        column_nb(run, PLACE)[i] = WAITS
        coming[i] = 0
        run.scratch[g[G_WAIT_AT] + (g[G_WAIT_TAIL] & g[G_WAIT_MASK])] = i
        g[G_WAIT_TAIL] += 1
        lost += 1
        make_room_nb(e, tree, n * AHEAD)
    made, most = 0, 0
    for j in range(n):
        made += generated[running[j]]
        most += stated[running[j]]
    s[S_RUNNING] = n
    s[S_FULL] = 0
    r[BATCH_LOST] = lost
    r[PREEMPTIONS] += lost
    e.ratio[R_RATIO] = min(1.0, (made + AHEAD * n) / (most + 1))


@inner
def take_in_nb(e: Engine, own: Sglang, tree: Tree | None, replica: int) -> None:
    """Take in the oldest batch in flight, if the turn that formed it formed one."""
    r, g = e.r, e.g
    turn = g[G_TURNS] - r[DEPTH]
    f, s = flight_nb(e, turn), slot_nb(own, g, 0)
    if f[F_ROWS] > 0:
        r[NOW] = max(r[NOW], f[F_END])
        if r[LAUNCH_NS] > 0:
            log_taken_nb(e.run, replica, r[NOW])
        receive_nb(e, tree, s, f)
        return
    g[G_IDLE] = 0 if r[DEPTH] == 2 and flight_nb(e, turn + 1)[F_ROWS] > 0 else 1
    if g[G_IDLE] == 1 and nobody_nb(e, own):
        e.ratio[R_RATIO] = e.ratio[R_START]


@inner
def receive_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Take in the tokens of the batch f."""
    run, r = e.run, e.r
    place, generated, limit = column_nb(run, PLACE), column_nb(run, GENERATED), column_nb(run, LIMIT)
    computed, coming, prompt = column_nb(run, COMPUTED), column_nb(run, COMING), column_nb(run, PROMPT)
    offset, rows = column_nb(run, OFFSET), at(f, F_SIZE)
    for row in range(f[F_PROMPTS]):
        i = rows[row] >> 1
        if rows[row] & 1 == 0 or place[i] == WAITS:
            continue
        if generated[i] == 0:
            column_nb(run, FIRST)[i] = r[NOW]
        coming[i] -= 1
        generated[i] += 1
        offset[i] = generated[i]
        if generated[i] == limit[i]:
            finish_nb(e, tree, s, i)
        elif tree is not None:
            known = prompt[i] + generated[i] - 1
            cache_nb(e, tree, i, known, known)
    rows = at(f, F_SIZE + r[MAX_SEQS])
    for row in range(f[F_ENDERS]):
        i, comes = rows[row] >> 4, rows[row] & 15
        if place[i] == WAITS or place[i] == DONE:
            continue
        got = min(comes, limit[i] - generated[i])
        coming[i] -= comes
        generated[i] += got
        offset[i] = generated[i]
        computed[i] = min(computed[i] + comes, prompt[i] + limit[i])
        if run.control[LOGGED] == 1 and f[F_LOGGED] + row < run.control[MOST_ROWS]:
            run.rows[(f[F_LOGGED] + row) * ROW_SIZE + ROW_REQUEST] += got
        if generated[i] == limit[i]:
            finish_nb(e, tree, s, i)


@inner
def finish_nb(e: Engine, tree: Tree | None, s: I64, i: int) -> None:
    """Request i is answered."""
    place = column_nb(e.run, PLACE)
    if place[i] == RUNS:
        s[S_LEFT] += 1
    if tree is not None:
        cache_nb(e, tree, i, column_nb(e.run, COMPUTED)[i], column_nb(e.run, PROMPT)[i])
    release_nb(e, tree, i, column_nb(e.run, PAGES)[i])
    place[i] = DONE
    answer_nb(e.run, e.r, i, e.r[NOW])
