"""SGLang's prefill and decode instances: `reference.pushing`, event for event.

A prompt and its answer are two requests, the second so many places behind the first as there are requests. A prompt
comes to its instance when it may start. Beside each decode instance stand, in a line, those that it has pages for and
whose prompts have not come; beside each prefill instance those whose pages are being sent. Who is retracted waits in
the queue of prompts, which a decode instance has no other use for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import answer_nb, column_nb
from apex_opt.simulator.kernel.handover import append_nb, end_nb, instance_nb, passage_nb, strike_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.router import send_nb
from apex_opt.simulator.kernel.sglang import (
    begin_nb,
    blank_nb,
    ended_nb,
    engine_nb,
    flight_nb,
    form_nb,
    launch_nb,
    looks_nb,
    receive_nb,
    slot_nb,
    stretch_nb,
)
from apex_opt.simulator.kernel.sglang_prompts import waiting_nb
from apex_opt.simulator.kernel.sglang_state import (
    CLIP,
    COMPUTED,
    DONE,
    ERROR_NODES,
    F_ENDERS,
    F_PROMPTS,
    F_ROWS,
    F_SIZE,
    F_STEP,
    G_EVERY,
    G_IDLE,
    G_NODES_A_TURN,
    G_PASSED,
    G_SPARE_NODES,
    G_TURNS,
    G_WAIT_HEAD,
    G_WAIT_TAIL,
    NOTHING,
    PLACE,
    S_CAME,
    S_CHUNKED,
    S_COMING,
    S_CONTEXT,
    S_LAST,
    S_LEFT,
    S_RUNNING,
    S_RUNNING_AT,
    STATED,
)
from apex_opt.simulator.kernel.sglang_steps import join_nb, merge_nb, release_nb, step_nb
from apex_opt.simulator.kernel.sglang_tree import cache_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ASYNCHRONOUS,
    BATCH_ROWS,
    BLOCK_NS,
    BLOCK_SIZE,
    CAME,
    CLIENT_NS,
    DECODE_OF,
    DECODES,
    DEPTH,
    DUE,
    END_AT,
    ENDED,
    ENDS,
    ERROR,
    FEW_SEATS,
    FIRST,
    FIRST_END,
    FIRST_WAITING,
    FOLLOWING,
    FREE,
    FRESH,
    GENERATED,
    HEAD,
    HEARD,
    IN_TURN,
    KNOWN_TO_COME,
    LAST_WAITING,
    LIMIT,
    LINK_FREE,
    LOGGED,
    MAX_SEQS,
    NEVER,
    NEXT_END,
    NONE,
    NOTICE_NS,
    NOW,
    PASSED,
    PREFILL_OF,
    PREFILLS,
    PROMPT,
    READ_BLOCKS,
    READ_END,
    READ_NS,
    READ_START,
    READY,
    REPLICA_SIZE,
    REQUESTS,
    RESERVED,
    SEEN,
    SOONEST,
    STOPS,
    WAITING_SEATS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import Engine, Sglang, Tree
    from apex_opt.simulator.kernel.state import I64, Links, Run


@inner
def pushing_nb(run: Run, its: tuple[Sglang, Tree | None], links: Links) -> None:
    """Whoever is due first acts, of equals a prefill instance before a decode instance; requests come before that."""
    (own, tree), facts = its, links.facts
    prefills, count = facts[PREFILLS], facts[PREFILLS] + facts[DECODES]
    for instance in range(count):
        if instance < prefills:
            begin_nb(engine_nb(run, own, instance), own, tree)
            engine_nb(run, own, instance).g[G_EVERY] = 1
        else:
            begin_nb(engine_nb(run, own, instance), own, None)
        instance_nb(links, instance)[DUE] = NEVER
    coming = 0
    while run.control[PASSED] == 0:
        first, soonest = NONE, NEVER
        for instance in range(count):
            due = instance_nb(links, instance)[DUE]
            if due < soonest:
                first, soonest = instance, due
        until = column_nb(run, ARRIVAL)[coming] if coming < facts[KNOWN_TO_COME] else NEVER
        if coming < facts[KNOWN_TO_COME] and until <= soonest:
            come_nb(run, own, links, coming, until)
            coming += 1
        elif first == NONE:
            return
        elif first < prefills:
            compute_nb(run, own, tree, links, first)
            due_nb(run, own, links, first)
            if run.replicas[first * REPLICA_SIZE + ERROR] > 0:
                return
        else:
            # Others, too, may answer and let clients send requests.
            others = prefills if facts[KNOWN_TO_COME] == facts[REQUESTS] else count
            for instance in range(others):
                if instance != first:
                    until = min(until, instance_nb(links, instance)[DUE])
            answer_turn_nb(run, own, links, first, until, coming)
            due_nb(run, own, links, first)


@inner
def come_nb(run: Run, own: Sglang, links: Links, request: int, now: int) -> None:
    """A request comes; its answer waits for pages on a decode instance."""
    facts = links.facts
    answer = request + facts[REQUESTS]
    instance = facts[PREFILLS] + passage_nb(links, DECODE_OF)[request]
    x = instance_nb(links, instance)
    passage_nb(links, CAME)[request] = now
    column_nb(run, ARRIVAL)[answer] = now
    if run.control[STOPS] > 0:
        run.floors[request] = now  # where `stop_nb` looks for it
    send_nb(run, at(run.replicas, instance * REPLICA_SIZE), answer)
    if x[FRESH] == NONE:
        x[FRESH] = answer
    due_nb(run, own, links, instance)
    source = passage_nb(links, PREFILL_OF)[request]
    y = instance_nb(links, source)
    if y[FRESH] == NONE:
        y[FRESH] = answer  # which makes an idle prefill instance look at those that wait, if at nothing else
        due_nb(run, own, links, source)


@inner
def due_nb(run: Run, own: Sglang, links: Links, instance: int) -> None:
    """Note when an instance acts next."""
    e, x = engine_nb(run, own, instance), instance_nb(links, instance)
    due = e.r[NOW]
    if e.g[G_IDLE] == 1:
        soonest = x[SOONEST]
        if x[FRESH] != NONE:
            soonest = min(soonest, column_nb(run, ARRIVAL)[x[FRESH]])
        if instance < links.facts[PREFILLS] and e.r[HEAD] != NONE:
            soonest = min(soonest, column_nb(run, ARRIVAL)[e.r[HEAD]])
        due = max(due, soonest)
    x[DUE] = due


# Prefill instances.


@inner
def compute_nb(run: Run, own: Sglang, tree: Tree | None, links: Links, instance: int) -> None:
    """A turn of a prefill instance: what was sent is given back, a batch is formed and the oldest taken in."""
    e, x = engine_nb(run, own, instance), instance_nb(links, instance)
    r, g = e.r, e.g
    r[NOW] = x[DUE]
    x[FRESH] = NONE
    give_back_nb(e, tree, links, x)
    if g[G_SPARE_NODES] < g[G_NODES_A_TURN]:
        r[ERROR] = ERROR_NODES
        return
    form_nb(e, own, tree, instance)
    s, f = slot_nb(own, g, 0), flight_nb(e, g[G_TURNS] - 1)
    s[S_LAST], s[S_CHUNKED] = NOTHING, NONE  # nobody is answered here
    rows, after, computed = at(f, F_SIZE), at(f, F_SIZE + r[MAX_SEQS]), column_nb(run, COMPUTED)
    for row in range(f[F_PROMPTS]):
        after[row] = computed[rows[row] >> 1]
    turn = g[G_TURNS] - r[DEPTH]
    if turn >= 0 and ended_nb(e, own, turn, instance):
        push_nb(e, own, tree, links, x, flight_nb(e, turn))


@inner
def give_back_nb(e: Engine, tree: Tree | None, links: Links, x: I64) -> None:
    """Prompts of which all pages are sent give them up."""
    if x[SOONEST] > e.r[NOW]:
        return
    following, ends = end_nb(links, NEXT_END), end_nb(links, END_AT)
    soonest, before, i = NEVER, NONE, x[FIRST_END]
    while i != NONE:
        after = following[i]
        if ends[i] <= e.r[NOW]:
            strike_nb(links, x, before, i)
            release_nb(e, tree, i, blocks_nb(column_nb(e.run, PROMPT)[i], e.r[BLOCK_SIZE]))
        else:
            soonest = min(soonest, ends[i])
            before = i
        i = after
    x[SOONEST] = soonest


@inner
def push_nb(e: Engine, own: Sglang, tree: Tree | None, links: Links, x: I64, f: I64) -> None:
    """Take in the batch f: whole pages of what it computed are sent, of a prompt that is done all."""
    run, r, facts = e.run, e.r, links.facts
    rows, computed = at(f, F_SIZE), at(f, F_SIZE + r[MAX_SEQS])
    starts, ends, sent = passage_nb(links, READ_START), passage_nb(links, READ_END), passage_nb(links, READ_BLOCKS)
    for row in range(f[F_PROMPTS]):
        i, done, pages = rows[row] >> 1, rows[row] & 1 == 1, computed[row] // r[BLOCK_SIZE]
        if done:
            prompt = column_nb(run, PROMPT)[i]
            pages = blocks_nb(prompt, r[BLOCK_SIZE])
            if tree is not None:
                cache_nb(e, tree, i, prompt, prompt)
            answer_nb(run, r, i, r[NOW])
        end = max(r[NOW], x[LINK_FREE]) if facts[IN_TURN] == 1 else r[NOW]
        before = ends[i] - starts[i]
        if pages > sent[i]:
            takes = facts[READ_NS] + facts[BLOCK_NS] * (pages - sent[i])
            end += takes
            before += takes
        x[LINK_FREE] = end
        starts[i], ends[i], sent[i] = end - before, end, pages
        if done:
            instance = facts[PREFILLS] + passage_nb(links, DECODE_OF)[i]
            y = instance_nb(links, instance)
            end_nb(links, END_AT)[i + facts[REQUESTS]] = end + facts[NOTICE_NS]
            y[SOONEST] = min(y[SOONEST], end + facts[NOTICE_NS])
            due_nb(run, own, links, instance)
            append_nb(links, x, i, end)


# Decode instances.


@inner
def answer_turn_nb(run: Run, own: Sglang, links: Links, instance: int, until: int, coming: int) -> None:
    """A turn of a decode instance, or batches in which nothing happens but the passing of tokens."""
    e, x = engine_nb(run, own, instance), instance_nb(links, instance)
    r, g, s = e.r, e.g, slot_nb(own, e.g, 0)
    r[NOW] = x[DUE]
    if run.control[LOGGED] == 0:
        turns, wake = g[G_TURNS], wake_nb(e, links, x, s, until)
        if wake > r[NOW]:
            stretch_nb(e, None, s, wake)
            if g[G_TURNS] > turns:
                return
    hear_nb(run, links, x, r[NOW], looks_nb(g))
    merge_nb(e, s, flight_nb(e, max(g[G_TURNS] - 1, 0)), r[ASYNCHRONOUS])
    s[S_CAME] = s[S_RUNNING]
    resume_nb(e, links, x, s)
    if g[G_WAIT_HEAD] == g[G_WAIT_TAIL]:
        grant_nb(e, own, links, x, s)
        move_nb(run, links, x)
    ended = r[ENDED]
    seat_nb(e, x, s)
    at_once = r[ENDED] - ended
    send_next_nb(run, links, at_once, coming, r[NOW])
    f = blank_nb(e)
    step_nb(e, None, s, f)
    f[F_ROWS] = r[BATCH_ROWS]
    launch_nb(e, f, instance)
    turn, ended = g[G_TURNS] - r[DEPTH], r[ENDED]
    if turn >= 0 and ended_nb(e, own, turn, instance):
        receive_nb(e, None, s, flight_nb(e, turn))
        send_next_nb(run, links, r[ENDED] - ended, coming, r[NOW])
    if at_once > 0:
        g[G_IDLE] = 0  # the loop goes round again, and finds what they gave back


@inner
def wake_nb(e: Engine, links: Links, x: I64, s: I64, until: int) -> int:
    """When a stretch in which nothing happens but the passing of tokens ends at the latest; NONE: there is none."""
    r, g, facts = e.r, e.g, links.facts
    if g[G_IDLE] == 1 or s[S_RUNNING] == 0 or s[S_LEFT] > 0:
        return NONE
    if r[ASYNCHRONOUS] == 1:
        f = flight_nb(e, g[G_TURNS] - 1)
        if f[F_STEP] == 0 or f[F_ENDERS] > 0:
            return NONE
    if x[WAITING_SEATS] > 0 and s[S_RUNNING] < r[MAX_SEQS]:
        return NONE
    gone = g[G_WAIT_HEAD] != g[G_WAIT_TAIL]
    if x[READY] > 0 and not gone:
        return NONE
    active = active_nb(x, s)
    if active < slots_nb(r, facts):
        # There is ever less room for who finds none now.
        room = r[FREE] * r[BLOCK_SIZE] - facts[RESERVED] * (active + 1)
        if gone:
            i = waiting_nb(e, 0)
            if column_nb(e.run, PROMPT)[i] + column_nb(e.run, GENERATED)[i] - 1 <= room:
                return NONE
        elif r[HEAD] != x[FRESH] and column_nb(e.run, PROMPT)[r[HEAD]] <= room:
            return NONE
    wake = min(until, x[SOONEST])
    return wake if x[FRESH] == NONE else min(wake, column_nb(e.run, ARRIVAL)[x[FRESH]])


@inner
def hear_nb(run: Run, links: Links, x: I64, now: int, looks: int) -> None:
    """Take note of requests that have come, where they are looked for, and of prompts."""
    while looks == 1 and x[FRESH] != NONE and column_nb(run, ARRIVAL)[x[FRESH]] <= now:
        x[FRESH] = column_nb(run, FOLLOWING)[x[FRESH]]
    if x[SOONEST] > now:
        return
    following, seen, ends = end_nb(links, NEXT_END), end_nb(links, SEEN), end_nb(links, END_AT)
    soonest, i = NEVER, x[FIRST_END]
    while i != NONE:
        if seen[i] == NONE:
            if ends[i] <= now:
                seen[i] = HEARD
                x[READY] += 1
            else:
                soonest = min(soonest, ends[i])
        i = following[i]
    x[SOONEST] = soonest


@inner
def active_nb(x: I64, s: I64) -> int:
    """Requests that have pages."""
    active: int = s[S_RUNNING] + x[ENDS] + x[WAITING_SEATS]
    return active


@inner
def slots_nb(r: I64, facts: I64) -> int:
    """How many requests may have pages."""
    slots: int = 3 * r[MAX_SEQS] if r[MAX_SEQS] <= facts[FEW_SEATS] else r[MAX_SEQS]
    return slots


@inner
def wait_nb(run: Run, x: I64, i: int) -> None:
    """Request i, all of whose pages are filled, waits for a seat."""
    following = column_nb(run, FOLLOWING)
    following[i] = NONE
    if x[FIRST_WAITING] == NONE:
        x[FIRST_WAITING] = i
    else:
        following[x[LAST_WAITING]] = i
    x[LAST_WAITING] = i
    x[WAITING_SEATS] += 1


@inner
def resume_nb(e: Engine, links: Links, x: I64, s: I64) -> None:
    """Those that were retracted come back, with room for as much again."""
    r, g, reserved = e.r, e.g, links.facts[RESERVED]
    while g[G_WAIT_HEAD] != g[G_WAIT_TAIL]:
        i, active = waiting_nb(e, 0), active_nb(x, s)
        held = column_nb(e.run, PROMPT)[i] + column_nb(e.run, GENERATED)[i] - 1
        if active >= slots_nb(r, links.facts) or held + reserved > r[FREE] * r[BLOCK_SIZE] - reserved * active:
            return
        g[G_WAIT_HEAD] += 1
        r[FREE] -= blocks_nb(held, r[BLOCK_SIZE])
        wait_nb(e.run, x, i)


@inner
def grant_nb(e: Engine, own: Sglang, links: Links, x: I64, s: I64) -> None:
    """Give pages to those that have come, in order, as long as there is room for one, and for the longest that runs."""
    run, r, facts = e.run, e.r, links.facts
    if r[HEAD] == x[FRESH] or active_nb(x, s) >= slots_nb(r, facts):
        return
    prompt, stated, running = column_nb(run, PROMPT), column_nb(run, STATED), at(run.scratch, s[S_RUNNING_AT])
    n, reserved, longest = s[S_RUNNING], facts[RESERVED], 0
    could = s[S_CONTEXT] + (0 if s[S_COMING] == 0 else n)  # what giving way would free
    for place in range(n):
        i = running[place]
        tokens = min(stated[i], CLIP) + prompt[i] - could
        longest = tokens if place == 0 else max(longest, tokens)
    while r[HEAD] != x[FRESH] and active_nb(x, s) < slots_nb(r, facts):
        i = r[HEAD]
        room = r[FREE] * r[BLOCK_SIZE] - max(reserved * active_nb(x, s), longest)
        if max(prompt[i] + reserved, prompt[i] + min(stated[i], CLIP) - could) > room:
            return
        r[HEAD] = column_nb(run, FOLLOWING)[i]
        r[FREE] -= blocks_nb(prompt[i], r[BLOCK_SIZE])
        append_nb(links, x, i, NEVER)  # it is not known yet when its prompt comes
        request = i - facts[REQUESTS]
        source = passage_nb(links, PREFILL_OF)[request]
        column_nb(run, ARRIVAL)[request] = r[NOW] + facts[NOTICE_NS]
        send_nb(run, at(run.replicas, source * REPLICA_SIZE), request)
        due_nb(run, own, links, source)


@inner
def move_nb(run: Run, links: Links, x: I64) -> None:
    """Those whose prompts have come wait for seats."""
    following, seen = end_nb(links, NEXT_END), end_nb(links, SEEN)
    before, i = NONE, x[FIRST_END]
    while x[READY] > 0:
        after = following[i]
        if seen[i] == HEARD:
            strike_nb(links, x, before, i)
            x[READY] -= 1
            wait_nb(run, x, i)
        else:
            before = i
        i = after


@inner
def seat_nb(e: Engine, x: I64, s: I64) -> None:
    """Those who wait take seats; the first token of an answer is seen then."""
    run, r = e.run, e.r
    running, generated = at(run.scratch, s[S_RUNNING_AT]), column_nb(run, GENERATED)
    while x[WAITING_SEATS] > 0 and s[S_RUNNING] < r[MAX_SEQS]:
        i = x[FIRST_WAITING]
        x[FIRST_WAITING] = column_nb(run, FOLLOWING)[i]
        x[WAITING_SEATS] -= 1
        if generated[i] == 0:
            generated[i] = 1
            column_nb(run, FIRST)[i] = r[NOW]
            e.g[G_PASSED] = e.g[G_EVERY]  # SGLang counts this as a batch of prompts
        if generated[i] == column_nb(run, LIMIT)[i]:
            release_nb(e, None, i, blocks_nb(column_nb(run, PROMPT)[i], r[BLOCK_SIZE]))
            column_nb(run, PLACE)[i] = DONE
            answer_nb(run, r, i, r[NOW])
        else:
            running[s[S_RUNNING]] = i
            s[S_RUNNING] += 1
            join_nb(e, s, i, 0)


@inner
def send_next_nb(run: Run, links: Links, answers: int, coming: int, now: int) -> None:
    """Clients that have an answer send the next requests, as long as there are some, in order of time."""
    facts, arrival = links.facts, column_nb(run, ARRIVAL)
    for _ in range(min(answers, facts[REQUESTS] - facts[KNOWN_TO_COME])):
        place, when = facts[KNOWN_TO_COME], now + facts[CLIENT_NS]
        while place > coming and arrival[place - 1] > when:
            arrival[place] = arrival[place - 1]
            place -= 1
        arrival[place] = when
        facts[KNOWN_TO_COME] += 1
