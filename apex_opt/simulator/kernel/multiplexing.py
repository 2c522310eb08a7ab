"""SGLang's multiplexing: `reference.multiplexing` for one replica, whose batches nobody asks to be told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import batch_ns_nb, column_nb, count_batch_nb, law_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.multiplexing_state import (
    AGAIN,
    BLOCKS,
    BUSY_NS,
    CHANGED,
    DECODE_PACE,
    DIVISIONS,
    DIVISOR,
    GAPS_AT,
    LAST_NS,
    LAYERS,
    MOST_BLOCKS,
    PREFILL_PACE,
    SCALE,
    SLICE,
    SLICED,
    SLICED_TOKENS,
    STREAM_NS,
    UNDER_WAY,
    WHOLE_NS,
)
from apex_opt.simulator.kernel.sglang import arrive_nb, begin_nb, blank_nb, engine_nb, flight_nb, own_ns_nb, slot_nb
from apex_opt.simulator.kernel.sglang_prompts import prompts_nb
from apex_opt.simulator.kernel.sglang_state import (
    DONE,
    F_ENDERS,
    F_PROMPTS,
    F_SIZE,
    G_TURNS,
    G_WAIT_HEAD,
    G_WAIT_TAIL,
    NOTHING,
    OFFSET,
    PLACE,
    R_RATIO,
    R_START,
    S_COMING,
    S_FULL,
    S_LAST,
    S_LEFT,
    S_RUNNING,
    S_RUNNING_AT,
    S_STEPS,
)
from apex_opt.simulator.kernel.sglang_steps import close_ranks_nb, finish_nb, join_nb, step_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    BATCH_ROWS,
    BATCH_TOKENS,
    ERROR,
    ERROR_STUCK,
    FIRST,
    FIRST_STAGE,
    FREE,
    GENERATED,
    HEAD,
    LIMIT,
    MAX_SEQS,
    NEVER,
    NONE,
    NOW,
    SIZE,
    STAGE_BUSY,
    STAGE_SIZE,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.multiplexing_state import Multiplexed
    from apex_opt.simulator.kernel.sglang_state import Engine, Sglang, Tree
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def multiplexing_nb(run: Run, its: tuple[Sglang, Tree | None], beside: Multiplexed, replica: int) -> None:
    """Take turns until all that is a replica's is answered."""
    own, _ = its
    e, m = engine_nb(run, own, replica), beside.facts
    r, g = e.r, e.g
    begin_nb(e, own, None)
    s = slot_nb(own, g, 0)
    s[S_COMING] = NEVER  # a step is taken in before the next turn
    while r[ERROR] == 0 and r[NOW] < NEVER:
        arrive_nb(e)
        if m[UNDER_WAY] == 0:
            form_nb(e, m, s)
        before = s[S_RUNNING] > 0
        f = step_of_nb(e, s)
        m[MOST_BLOCKS] = max(m[MOST_BLOCKS], m[BLOCKS] - r[FREE])
        running = s[S_RUNNING] > 0
        if m[CHANGED] == 1 or (before and not running):
            r[NOW] = max(r[NOW], m[STREAM_NS])
            divide_nb(beside, s)
            m[CHANGED] = 0
        if not running and m[UNDER_WAY] == 0:
            waits = g[G_WAIT_HEAD] != g[G_WAIT_TAIL]
            if waits and m[AGAIN] == 1:
                r[ERROR] = ERROR_STUCK
            elif waits:
                m[AGAIN] = 1  # those who just left had held it up
            elif r[HEAD] == NONE:
                return
            else:
                m[AGAIN] = 0
                e.ratio[R_RATIO] = e.ratio[R_START]
                r[NOW] = max(r[NOW], column_nb(run, ARRIVAL)[r[HEAD]])
            continue
        m[AGAIN] = 0
        slice_nb(e, m)
        wait_nb(e, beside, s, f)


@inner
def form_nb(e: Engine, m: I64, s: I64) -> None:
    """Form a batch of prompts, where there can be one."""
    r = e.r
    e.g[G_TURNS] = 0
    f = blank_nb(e)
    prompts_nb(e, None, s, f)
    s[S_LAST] = NOTHING
    if f[F_PROMPTS] == 0:
        return
    m[WHOLE_NS] = own_ns_nb(e, f, law_nb(e.run, r, 0))
    count_batch_nb(e.run, r)
    m[SLICE] = max(1, SLICED_TOKENS // r[BATCH_TOKENS])
    m[UNDER_WAY], m[SLICED], m[CHANGED] = 1, 0, 1


@inner
def step_of_nb(e: Engine, s: I64) -> I64:
    """Form a step of all who run, which may come out empty."""
    if s[S_LEFT] > 0:
        close_ranks_nb(e, s)
        s[S_LEFT], s[S_FULL] = 0, 0
    if s[S_RUNNING] == 0:
        s[S_FULL] = 0
    e.g[G_TURNS] = 1
    f = blank_nb(e)
    step_nb(e, None, s, f)
    return f


@inner
def divide_nb(beside: Multiplexed, s: I64) -> None:
    """Divide the GPU by who is at work."""
    m, running = beside.facts, s[S_RUNNING]
    m[PREFILL_PACE], m[DECODE_PACE] = SCALE, SCALE
    if m[UNDER_WAY] == 1 and running > 0:
        place = max(1, min(m[DIVISIONS], running * m[DIVISIONS] // DIVISOR)) - 1
        m[PREFILL_PACE], m[DECODE_PACE] = beside.paces[2 * place], beside.paces[2 * place + 1]


@inner
def slice_nb(e: Engine, m: I64) -> None:
    """Start the next slice of the prompts, behind those before it."""
    layers = m[LAYERS]
    if m[UNDER_WAY] == 0 or m[SLICED] == layers:
        return
    last = min(m[SLICED] + m[SLICE], layers)
    whole = m[WHOLE_NS] * last // layers - m[WHOLE_NS] * m[SLICED] // layers
    begin = max(e.r[NOW], m[STREAM_NS])
    m[STREAM_NS] = begin + (whole * m[PREFILL_PACE] + SCALE - 1) // SCALE
    m[BUSY_NS] += m[STREAM_NS] - begin
    m[SLICED] = last


@inner
def wait_nb(e: Engine, beside: Multiplexed, s: I64, f: I64) -> None:
    """Wait for the step f, and take in what is done."""
    run, r, m = e.run, e.r, beside.facts
    slicing = m[UNDER_WAY] == 1 and m[SLICED] < m[LAYERS]
    if r[BATCH_ROWS] > 0:
        took = (batch_ns_nb(law_nb(run, r, 0), r, 0) * m[DECODE_PACE] + SCALE - 1) // SCALE
        count_batch_nb(run, r)
        r[NOW] += took
        run.stages[r[FIRST_STAGE] * STAGE_SIZE + STAGE_BUSY] += took
        running = at(run.scratch, s[S_RUNNING_AT])
        for place in range(s[S_RUNNING]):
            token_nb(e, beside, running[place], column_nb(run, OFFSET)[running[place]] + s[S_STEPS])
        enders = at(f, F_SIZE + r[MAX_SEQS])
        for ender in range(f[F_ENDERS]):
            finish_nb(e, None, s, enders[ender])
    elif m[UNDER_WAY] == 1 and not slicing:
        r[NOW] = max(r[NOW], m[STREAM_NS])  # it asks over and over
    if m[UNDER_WAY] == 0 or slicing or m[STREAM_NS] > r[NOW]:
        return
    m[UNDER_WAY], m[CHANGED] = 0, 1
    join_prompts_nb(e, beside, s, flight_nb(e, 0))


@inner
def join_prompts_nb(e: Engine, beside: Multiplexed, s: I64, f: I64) -> None:
    """Those whose prompts are done run on; who is answered by that leaves with the next step."""
    run, rows, generated, place = e.run, at(f, F_SIZE), column_nb(e.run, GENERATED), column_nb(e.run, PLACE)
    for row in range(f[F_PROMPTS]):
        i = rows[row] >> 1
        generated[i] += 1
        token_nb(e, beside, i, generated[i])
        done = generated[i] == column_nb(run, LIMIT)[i]
        if done:
            finish_nb(e, None, s, i)
        at(run.scratch, s[S_RUNNING_AT])[s[S_RUNNING]] = i
        s[S_RUNNING] += 1
        join_nb(e, s, i, 0)
        if done:
            place[i] = DONE
            s[S_LEFT] += 1


@inner
def token_nb(e: Engine, beside: Multiplexed, i: int, number: int) -> None:
    """Request i has its token of that number."""
    size = e.run.control[SIZE]
    last = at(beside.tokens, LAST_NS * size)
    if number == 1:
        column_nb(e.run, FIRST)[i] = e.r[NOW]
    else:
        beside.gaps[at(beside.tokens, GAPS_AT * size)[i] + number - 2] = e.r[NOW] - last[i]
    last[i] = e.r[NOW]
