"""The engine of SGLang: its turns, and stretches of decoding that pass batch by batch without touching anybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import (
    batch_ns_nb,
    by_sequences_nb,
    by_tokens_nb,
    chunk_ns_nb,
    column_nb,
    count_batch_nb,
    count_seen_nb,
    law_nb,
    log_step_nb,
    log_taken_nb,
    pace_nb,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.sglang_prompts import prompts_nb
from apex_opt.simulator.kernel.sglang_state import (
    COMPUTED,
    ERROR_NODES,
    F_END,
    F_ENDERS,
    F_PROMPTS,
    F_ROWS,
    F_SIZE,
    F_STEP,
    G_BEGUN,
    G_CHUNKED,
    G_EVERY,
    G_FLIGHT_AT,
    G_FLIGHT_SIZE,
    G_IDLE,
    G_MIXES,
    G_NODES_A_TURN,
    G_PASSED,
    G_SIZE,
    G_SLOT_AT,
    G_SLOTS,
    G_SPARE_NODES,
    G_TURNS,
    G_WAIT_AT,
    G_WAIT_HEAD,
    G_WAIT_MASK,
    G_WAIT_TAIL,
    NOTHING,
    PLACE,
    PROMPTS,
    R_DECAY,
    R_LEAST,
    R_RATIO,
    R_SIZE,
    R_START,
    S_CHUNKED,
    S_CONTEXT,
    S_FULL,
    S_LAST,
    S_LEFT,
    S_NEXT_END,
    S_RESIDUE_AT,
    S_RUNNING,
    S_SIZE,
    S_STEPS,
    WAITS,
    Engine,
)
from apex_opt.simulator.kernel.sglang_steps import finish_nb, merge_nb, mix_nb, step_nb
from apex_opt.simulator.kernel.sglang_tree import cache_nb, empty_tree_nb
from apex_opt.simulator.kernel.stages import launching_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ASYNCHRONOUS,
    BATCH_DECODES,
    BATCH_LOST,
    BATCH_READ,
    BATCH_ROWS,
    BATCH_TOKENS,
    BATCHES,
    BLOCK_SIZE,
    COUNTS_AT,
    DECODE_NS,
    DEPTH,
    ENTERING_AT,
    ERROR,
    FIRST,
    FIRST_STAGE,
    FOLLOWING,
    FREE,
    GENERATED,
    HEAD,
    LAUNCH_NS,
    LIMIT,
    LOGGED,
    MAX_SEQS,
    MIXED_NS,
    N_DECODE,
    N_DECODE_CONTEXT,
    NEVER,
    NONE,
    NOW,
    PASSED,
    PROMPT,
    RATE_BITS,
    REPLICA_SIZE,
    STAGE_BUSY,
    STAGE_FREE,
    STAGE_SIZE,
    STAGES,
    TRANSFER_NS,
    WINDOWS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import Sglang, Tree
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def engine_nb(run: Run, own: Sglang, replica: int) -> Engine:
    """A replica."""
    return Engine(
        run,
        at(run.replicas, replica * REPLICA_SIZE),
        at(own.registers, replica * G_SIZE),
        at(own.ratio, replica * R_SIZE),
    )


@inner
def slot_nb(own: Sglang, g: I64, slot: int) -> I64:
    """The registers of a slot."""
    return at(own.registers, g[G_SLOT_AT] + slot * S_SIZE)


@inner
def flight_nb(e: Engine, turn: int) -> I64:
    """The batch that was formed in a turn."""
    g = e.g
    return at(e.run.scratch, g[G_FLIGHT_AT] + (turn % e.r[DEPTH]) * g[G_FLIGHT_SIZE])


@inner
def sglang_nb(run: Run, its: tuple[Sglang, Tree | None], replica: int, until: int) -> None:
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
        if g[G_SLOTS] == 1 and run.control[LOGGED] == 0:
            s = slot_nb(own, g, 0)
            wake = wake_nb(e, s, until)
            if wake > r[NOW]:
                stretch_nb(e, tree, s, wake)
                if r[NOW] >= until:
                    break
        if g[G_SPARE_NODES] < g[G_NODES_A_TURN]:
            r[ERROR] = ERROR_NODES
            break
        form_nb(e, own, tree, replica)
        if g[G_TURNS] >= r[DEPTH]:
            take_in_nb(e, own, tree, replica)
        if run.control[PASSED] == 1:
            break


@inner
def begin_nb(e: Engine, own: Sglang, tree: Tree | None) -> None:
    """A replica before anything came, in memory that another may have used."""
    g = e.g
    g[G_BEGUN], g[G_CHUNKED], g[G_IDLE] = 1, NONE, 1
    for turn in range(e.r[DEPTH]):
        f = flight_nb(e, turn)
        f[F_END], f[F_ROWS], f[F_PROMPTS], f[F_ENDERS], f[F_STEP] = 0, 0, 0, 0, 0
    for slot in range(g[G_SLOTS]):
        s = slot_nb(own, g, slot)
        s[S_NEXT_END], s[S_CHUNKED] = NEVER, NONE
        for phase in range(e.r[BLOCK_SIZE]):
            e.run.scratch[s[S_RESIDUE_AT] + phase] = 0
    empty_tree_nb(e, tree)


@inner
def wake_nb(e: Engine, s: I64, until: int) -> int:
    """When a stretch in which nothing happens but the passing of tokens ends at the latest; NONE: there is none."""
    r, g = e.r, e.g
    if g[G_IDLE] == 1 or g[G_CHUNKED] != NONE or s[S_RUNNING] == 0 or s[S_LAST] != NOTHING or s[S_LEFT] > 0:
        return NONE
    if r[ASYNCHRONOUS] == 1:
        f = flight_nb(e, g[G_TURNS] - 1)
        if f[F_STEP] == 0 or f[F_PROMPTS] > 0 or f[F_ENDERS] > 0:
            return NONE
    if s[S_FULL] == 1:
        if g[G_EVERY] == 1:
            return until
    elif g[G_WAIT_HEAD] != g[G_WAIT_TAIL]:
        return NONE
    return until if r[HEAD] == NONE else min(until, column_nb(e.run, ARRIVAL)[r[HEAD]])


@inner
def stretch_nb(e: Engine, tree: Tree | None, s: I64, wake: int) -> None:
    """Pass tokens batch by batch until somebody gets its last one, pages run out or `wake`."""
    run, r, g = e.run, e.r, e.g
    law, counts = law_nb(run, r, 0), at(run.counts, r[COUNTS_AT])
    residue = at(run.scratch, s[S_RESIDUE_AT])
    n, now, free, context, page = s[S_RUNNING], r[NOW], r[FREE], s[S_CONTEXT], r[BLOCK_SIZE]
    ratio, decay, least = e.ratio[R_RATIO], e.ratio[R_DECAY], e.ratio[R_LEAST]
    ahead = r[ASYNCHRONOUS] == 1
    f = flight_nb(e, g[G_TURNS] - 1)
    end = f[F_END] if ahead else now
    base_ns = by_sequences_nb(law, r, DECODE_NS)[n]
    rate, full, until = pace_nb(law, r, n, context)
    rise, paid = rate * n, rate * context + full
    spare = 0
    if tree is not None and page > 1:
        spare = n
    left, total, began = s[S_NEXT_END] - 1 - s[S_STEPS], 0, end
    most, phase = left, s[S_STEPS] % page
    while now < wake and left > 0:
        need = residue[phase]
        if need > free or spare > free:
            break
        free -= need
        left -= 1
        phase += 1
        if phase == page:
            phase = 0
        context += n
        total += context
        paid += rise
        if context > until:
            rate, full, until = pace_nb(law, r, n, context)
            rise, paid = rate * n, rate * context + full
        ratio = max(ratio - decay, least)
        now = end
        end += base_ns + (paid >> RATE_BITS)
        if not ahead:
            now = end
    passed = most - left
    if passed == 0:
        return
    by_sequences_nb(counts, r, N_DECODE)[n] += passed
    by_sequences_nb(counts, r, N_DECODE_CONTEXT)[n] += total
    if r[WINDOWS] > 0:
        count_seen_nb(run, r, n, passed, total)
    stage = at(run.stages, r[FIRST_STAGE] * STAGE_SIZE)
    stage[STAGE_BUSY] += end - began
    stage[STAGE_FREE] = end
    r[NOW], r[FREE], s[S_CONTEXT], e.ratio[R_RATIO] = now, free, context, ratio
    r[BATCHES] += passed
    s[S_STEPS] += passed
    g[G_TURNS] += passed
    g[G_PASSED] = (g[G_PASSED] + passed - 1) % g[G_EVERY] + 1
    f = flight_nb(e, g[G_TURNS] - 1)
    f[F_END], f[F_ROWS], f[F_PROMPTS], f[F_ENDERS], f[F_STEP] = end, n, 0, 0, 1


@inner
def form_nb(e: Engine, own: Sglang, tree: Tree | None, replica: int) -> None:
    """Form the batch of a turn, and run it."""
    arrive_nb(e)
    launch_nb(e, choose_nb(e, own, tree), replica)


@inner
def launch_nb(e: Engine, f: I64, replica: int) -> None:
    """Run the batch f, which was formed in this turn."""
    r, g = e.r, e.g
    f[F_END] = through_stages_nb(e, f)
    log_step_nb(e.run, r, replica, r[NOW], f[F_END])
    r[NOW] += launching_nb(r)
    g[G_TURNS] += 1
    pass_nb(g, f[F_PROMPTS])
    if r[BATCH_ROWS] > 0:
        g[G_IDLE] = 0


@inner
def choose_nb(e: Engine, own: Sglang, tree: Tree | None) -> I64:
    """Form the batch of a turn, of those who wait and run."""
    run, r, g = e.run, e.r, e.g
    s = slot_nb(own, g, g[G_TURNS] % g[G_SLOTS])
    i = g[G_CHUNKED]
    if tree is not None and i != NONE:
        computed = column_nb(run, COMPUTED)[i]
        cache_nb(e, tree, i, computed, computed)
    ahead = 1 if r[DEPTH] > g[G_SLOTS] else 0
    # Of the last turn of the slot; where that has been taken in this turn's batch takes its place.
    merge_nb(e, s, flight_nb(e, max(g[G_TURNS] - g[G_SLOTS], 0)), ahead)
    f = blank_nb(e)
    prompts_nb(e, tree, s, f)
    if f[F_PROMPTS] == 0:
        step_nb(e, tree, s, f)
    else:
        s[S_LAST], s[S_CHUNKED] = PROMPTS, g[G_CHUNKED]
        if g[G_MIXES] == 1 and s[S_RUNNING] > 0:
            mix_nb(e, tree, s, f)
    f[F_ROWS] = r[BATCH_ROWS]
    return f


@inner
def blank_nb(e: Engine) -> I64:
    """The batch of a turn, with nobody in it yet."""
    r, f = e.r, flight_nb(e, e.g[G_TURNS])
    f[F_PROMPTS], f[F_ENDERS], f[F_STEP] = 0, 0, 0
    r[BATCH_ROWS], r[BATCH_TOKENS], r[BATCH_DECODES], r[BATCH_READ], r[BATCH_LOST] = 0, 0, 0, 0, 0
    return f


@inner
def pass_nb(g: I64, prompts: int) -> None:
    """A turn passes, with so many rows of prompts."""
    g[G_PASSED] = g[G_EVERY] if prompts > 0 else min(g[G_PASSED] + 1, g[G_EVERY])


@inner
def looks_nb(g: I64) -> int:
    """Whether new requests are looked for in this turn."""
    if g[G_IDLE] == 0 and g[G_PASSED] < g[G_EVERY]:
        return 0
    g[G_PASSED] = 0
    return 1


@inner
def arrive_nb(e: Engine) -> None:
    """Those that have come wait, where it is time to look for them."""
    run, r, g = e.run, e.r, e.g
    if looks_nb(g) == 0:
        return
    arrival, following = column_nb(run, ARRIVAL), column_nb(run, FOLLOWING)
    head = r[HEAD]
    while head != NONE and arrival[head] <= r[NOW]:
        run.scratch[g[G_WAIT_AT] + (g[G_WAIT_TAIL] & g[G_WAIT_MASK])] = head
        g[G_WAIT_TAIL] += 1
        head = following[head]
    r[HEAD] = head


@inner
def through_stages_nb(e: Engine, f: I64) -> int:
    """Pass the batch through the stages; when it leaves the last one."""
    run, r = e.run, e.r
    end: int = r[NOW]
    if r[BATCH_ROWS] == 0:
        return end
    for number in range(r[STAGES]):
        law, stage = law_nb(run, r, number), at(run.stages, (r[FIRST_STAGE] + number) * STAGE_SIZE)
        duration = own_ns_nb(e, f, law)
        end = max(end, stage[STAGE_FREE]) + duration
        stage[STAGE_FREE] = end
        stage[STAGE_BUSY] += duration
        if number + 1 < r[STAGES]:
            end += by_tokens_nb(law, r, MIXED_NS, TRANSFER_NS)[r[BATCH_TOKENS]]
    count_batch_nb(run, r)
    return end


@inner
def own_ns_nb(e: Engine, f: I64, law: I64) -> int:
    """What the batch f takes on a stage."""
    rows, tokens, computed = at(f, F_SIZE), at(e.run.scratch, e.r[ENTERING_AT]), column_nb(e.run, COMPUTED)
    chunks_ns = 0
    for row in range(f[F_PROMPTS]):
        if tokens[row] > 1:
            chunks_ns += chunk_ns_nb(law, e.r, tokens[row], computed[rows[row] >> 1])
    return batch_ns_nb(law, e.r, chunks_ns)


@inner
def take_in_nb(e: Engine, own: Sglang, tree: Tree | None, replica: int) -> None:
    """Take in the oldest batch in flight, if the turn that formed it formed one."""
    turn = e.g[G_TURNS] - e.r[DEPTH]
    if ended_nb(e, own, turn, replica):
        receive_nb(e, tree, slot_nb(own, e.g, turn % e.g[G_SLOTS]), flight_nb(e, turn))


@inner
def ended_nb(e: Engine, own: Sglang, turn: int, replica: int) -> bool:
    """Whether a turn, of which it is time to take in the batch, formed one; the clock comes to its end."""
    r, g, f = e.r, e.g, flight_nb(e, turn)
    if f[F_ROWS] > 0:
        r[NOW] = max(r[NOW], f[F_END])
        if r[LAUNCH_NS] > 0:
            log_taken_nb(e.run, replica, r[NOW])
        return True
    idle = 1
    for later in range(turn + 1, g[G_TURNS]):
        if flight_nb(e, later)[F_ROWS] > 0:
            idle = 0
    g[G_IDLE] = idle
    if idle == 1 and nobody_nb(e, own):
        e.ratio[R_RATIO] = e.ratio[R_START]
    return False


@inner
def receive_nb(e: Engine, tree: Tree | None, s: I64, f: I64) -> None:
    """Take in the tokens of the batch f, which was formed by the slot s."""
    run, r = e.run, e.r
    place, generated = column_nb(run, PLACE), column_nb(run, GENERATED)
    rows, enders = at(f, F_SIZE), at(f, F_SIZE + r[MAX_SEQS])
    for row in range(f[F_PROMPTS]):
        i = rows[row] >> 1
        if rows[row] & 1 == 0 or place[i] == WAITS:
            continue
        if generated[i] == 0:
            column_nb(run, FIRST)[i] = r[NOW]
        generated[i] += 1
        if generated[i] == column_nb(run, LIMIT)[i]:
            finish_nb(e, tree, s, i)
        elif tree is not None:
            known = column_nb(run, PROMPT)[i] + generated[i] - 1
            cache_nb(e, tree, i, known, known)
    for ender in range(f[F_ENDERS]):
        i = enders[ender]
        if place[i] != WAITS:
            finish_nb(e, tree, s, i)


@inner
def nobody_nb(e: Engine, own: Sglang) -> bool:
    """Whether nobody is there at all."""
    g = e.g
    if g[G_WAIT_HEAD] != g[G_WAIT_TAIL] or g[G_CHUNKED] != NONE:
        return False
    for slot in range(g[G_SLOTS]):
        s = slot_nb(own, g, slot)
        if s[S_RUNNING] > s[S_LEFT] or s[S_LAST] != NOTHING:
            return False
    return True
