"""One prefill or decode instance: `reference.handover.Instance` and its schedulers, event for event.

A prompt and its answer are two requests, the second so many places behind the first as there are requests. Ends of
reads that an instance has to learn of stand in a line, in the order in which the reads were ordered: of a decode
instance until the request is admitted, of a prefill instance until its blocks are free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.batch import column_nb, log_step_nb
from apex_opt.simulator.kernel.blocks import found_nb, register_nb, release_nb, take_nb
from apex_opt.simulator.kernel.general import enter_nb, running_nb, take_in_nb, waiting_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.router import choose_nb, send_nb
from apex_opt.simulator.kernel.router_state import (
    FIRST_WAITS,
    LAST_WAITS,
    LOAD,
    PULL,
    REPLICAS_AT,
    ROUTED_SIZE,
    RULE,
    UNHELD,
    WAITING,
)
from apex_opt.simulator.kernel.stages import newest_nb, preempted_nb, queued_nb, through_stages_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    AWAITS,
    BATCH_BUDGET,
    BATCH_LOST,
    BATCH_ROWS,
    BLOCK_NS,
    BLOCK_SIZE,
    BLOCKS,
    CACHED,
    CLIENT_NS,
    COMPUTED,
    DECODE_OF,
    DECODES,
    DEPTH,
    DONE,
    DUE,
    END_AT,
    ENDED,
    ENDS,
    EXECUTED,
    FINISH,
    FIRST_END,
    FOLLOWING,
    FORWARDED,
    FREE,
    HEAD,
    HEARD,
    HOLDS,
    IN_TURN,
    INSTANCE_SIZE,
    KNOWN_TO_COME,
    LAST_END,
    LINK_FREE,
    MAX_SEQS,
    NEVER,
    NEXT_END,
    NONE,
    NOTICE_NS,
    NOW,
    ORDERED,
    PLACE,
    PREEMPTIONS,
    PREFILL_OF,
    PREFILLS,
    PROMPT,
    PROXY_NS,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    READ_BLOCKS,
    READ_END,
    READ_NS,
    READ_START,
    READY,
    RECEIVED,
    REPLICA_SIZE,
    REQUESTS,
    RUNNING,
    RUNNING_AT,
    RUNS,
    SEEN,
    SEEN_IN,
    SENT,
    SLEEP_NS,
    SLOTS_AT,
    SOONEST,
    STACK,
    UNREPORTED,
    WAITS_AT_ROUTER,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Cache, Links, Routers, Run


@inner
def instance_nb(links: Links, instance: int) -> I64:
    """What an instance has beside a replica."""
    return at(links.instances, instance * INSTANCE_SIZE)


@inner
def end_nb(links: Links, column: int) -> I64:
    """A column of the ends of reads, of each prompt and each answer."""
    return at(links.ends, column * 2 * links.facts[REQUESTS])


@inner
def passage_nb(links: Links, column: int) -> I64:
    """A column of what became of each request between its instances."""
    return at(links.passages, column * links.facts[REQUESTS])


@inner
def unfinished_nb(run: Run, x: I64, r: I64) -> bool:
    """Whether there is a request that has come and is not answered."""
    if r[RUNNING] > 0 or preempted_nb(run, r) != NONE or (x[ENDS] > 0 and r[HOLDS] == 0):
        return True
    return r[HEAD] != NONE and column_nb(run, ARRIVAL)[r[HEAD]] <= x[RECEIVED]


@inner
def due_nb(run: Run, x: I64, r: I64) -> int:
    """When the instance acts next."""
    if x[AWAITS] == 1:
        return max(r[NOW], run.scratch[r[QUEUE_AT] + r[QUEUE_HEAD]])
    if r[QUEUED] > 0 or r[UNREPORTED] == 1 or unfinished_nb(run, x, r):
        return r[NOW]
    return NEVER if r[HEAD] == NONE else max(r[NOW], column_nb(run, ARRIVAL)[r[HEAD]])


@inner
def turn_nb(run: Run, cache: Cache | None, links: Links, routers: Routers | None, instance: int) -> None:
    """Form a batch, or take in the oldest once it is done."""
    r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
    queue_end = at(run.scratch, r[QUEUE_AT])
    r[NOW] = x[DUE]
    if x[AWAITS] == 0:
        x[RECEIVED] = r[NOW]
        x[EXECUTED] = 0
        if unfinished_nb(run, x, r) or r[UNREPORTED] == 1:
            launch_nb(run, cache, links, instance)
            if r[BATCH_ROWS] > 0:
                x[EXECUTED] = 1
                if r[QUEUED] < r[DEPTH] and queue_end[r[QUEUE_HEAD]] > r[NOW]:
                    return
        x[AWAITS] = 1
    oldest = r[QUEUE_HEAD]
    if queue_end[oldest] > r[NOW]:
        return
    x[AWAITS] = 0
    ended = r[ENDED]
    take_in_nb(run, cache, None, r)
    if r[HOLDS] == 1:
        forward_nb(run, links, routers, r, oldest)
    # What is pulled from now on comes too late to be slept for.
    sleeps = x[EXECUTED] == 0 and unfinished_nb(run, x, r)
    if routers is not None and r[ENDED] > ended:
        pull_nb(run, links, routers, r[HOLDS], r[NOW])
        if r[HOLDS] == 0:
            send_next_nb(run, links, r[ENDED] - ended, r[NOW])
    if sleeps:
        r[NOW] += r[SLEEP_NS]
    hear_nb(run, cache, links, instance, oldest)


@inner
def launch_nb(run: Run, cache: Cache | None, links: Links, instance: int) -> None:
    """Form a batch, even an empty one, and run it behind those in flight."""
    r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
    r[UNREPORTED] = 0
    running_nb(run, cache, None, r)
    if r[BATCH_LOST] == 0:
        if r[HOLDS] == 1:
            waiting_nb(run, cache, None, r)
        else:
            start_nb(run, cache, links, x, r)
            # Those that were preempted are before all that have come, and are never read again.
            head = r[HEAD]
            r[HEAD] = NONE
            waiting_nb(run, cache, None, r)
            r[HEAD] = head
            if r[STACK] == NONE:
                order_nb(run, cache, links, instance)
    r[PREEMPTIONS] += r[BATCH_LOST]
    end = through_stages_nb(run, r)
    log_step_nb(run, r, instance, r[NOW], end)
    newest = newest_nb(r)
    run.scratch[r[QUEUE_AT] + newest] = end
    run.scratch[r[QUEUE_AT] + r[DEPTH] + newest] = r[BATCH_ROWS]
    r[QUEUED] += 1
    see_nb(links, x, r, newest)


def reading(seated: int, hold_nb: Any, seat_nb: Any) -> Any:
    """`start_nb` and `order_nb` of an engine.

    Parameters
    ----------
    seated : int    the register that tells how many requests have a seat
    hold_nb : takes the blocks of a prompt down, as request i of a replica has so many of them from now on
    seat_nb : enters a request into the batch, which computes its prompt's last token
    """

    @inner
    def start_nb(run: Run, cache: Cache | None, links: Links, x: I64, r: I64) -> None:
        """Admit those whose read is known to have ended, in order; each computes its prompt's last token."""
        following, seen = end_nb(links, NEXT_END), end_nb(links, SEEN)
        before, i = NONE, x[FIRST_END]
        while x[READY] > 0 and r[BATCH_BUDGET] > 0 and r[seated] < r[MAX_SEQS]:
            after = following[i]
            if seen[i] != HEARD:
                before = i
            else:
                strike_nb(links, x, before, i)
                x[READY] -= 1
                seat_nb(run, cache, r, i, column_nb(run, PROMPT)[i])
            i = after

    @inner
    def order_nb(run: Run, cache: Cache | None, links: Links, instance: int) -> None:
        """Order the reads of those that have come, where there are blocks for all of a prompt."""
        r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
        bs, facts = r[BLOCK_SIZE], links.facts
        while r[BATCH_BUDGET] > 0 and r[seated] < r[MAX_SEQS]:
            i = r[HEAD]
            if i == NONE or column_nb(run, ARRIVAL)[i] > r[NOW]:
                return
            prompt = column_nb(run, PROMPT)[i]
            found, unused = 0, 0
            if cache is not None:
                found, unused = found_nb(cache, r, i, (prompt - 1) // bs)
            total = blocks_nb(prompt, bs)
            if total - found + unused > r[FREE]:
                return
            r[HEAD] = column_nb(run, FOLLOWING)[i]
            r[CACHED] += found * bs
            r[FREE] -= total - found + unused
            if cache is not None:
                cache.slot[i] = cache.slots[r[SLOTS_AT] + r[RUNNING]]
                r[SLOTS_AT] += 1
                cache.registered[i] = found
                take_nb(cache, r, i, 0, found, total)
            hold_nb(run, i, total, prompt)
            request = i - facts[REQUESTS]
            source = passage_nb(links, PREFILL_OF)[request]
            y = instance_nb(links, source)
            start = max(r[NOW], y[LINK_FREE]) if facts[IN_TURN] == 1 else r[NOW]
            end = start + facts[READ_NS] + facts[BLOCK_NS] * (total - found)
            y[LINK_FREE] = end
            passage_nb(links, ORDERED)[request] = r[NOW]
            passage_nb(links, READ_START)[request] = start
            passage_nb(links, READ_END)[request] = end
            passage_nb(links, READ_BLOCKS)[request] = total - found
            append_nb(links, x, i, end)
            append_nb(links, y, request, end + facts[NOTICE_NS])

    return start_nb, order_nb


@inner
def hold_nb(run: Run, i: int, total: int, prompt: int) -> None:
    """Request i holds so many blocks, for all of its prompt."""
    column_nb(run, BLOCKS)[i] = total
    column_nb(run, COMPUTED)[i] = prompt


@inner
def seat_nb(run: Run, cache: Cache | None, r: I64, i: int, prompt: int) -> None:
    """Request i, which has its blocks, takes a seat."""
    if cache is not None:
        r[SLOTS_AT] -= 1
        register_nb(cache, r, i, prompt // r[BLOCK_SIZE])
    column_nb(run, PLACE)[i] = RUNS
    run.scratch[r[RUNNING_AT] + r[RUNNING]] = i
    r[RUNNING] += 1
    enter_nb(run, r, i, 1, prompt)


start_nb, order_nb = reading(RUNNING, hold_nb, seat_nb)


@inner
def append_nb(links: Links, x: I64, i: int, end: int) -> None:
    """An instance can learn from `end` on that the read of request i has ended."""
    following = end_nb(links, NEXT_END)
    end_nb(links, END_AT)[i] = end
    end_nb(links, SEEN)[i] = NONE
    following[i] = NONE
    if x[LAST_END] == NONE:
        x[FIRST_END] = i
    else:
        following[x[LAST_END]] = i
    x[LAST_END] = i
    x[ENDS] += 1
    x[SOONEST] = min(x[SOONEST], end)


@inner
def strike_nb(links: Links, x: I64, before: int, i: int) -> None:
    """Take request i out of the line, where it follows `before`."""
    following = end_nb(links, NEXT_END)
    if before == NONE:
        x[FIRST_END] = following[i]
    else:
        following[before] = following[i]
    if x[LAST_END] == i:
        x[LAST_END] = before
    x[ENDS] -= 1


@inner
def see_nb(links: Links, x: I64, r: I64, batch: int) -> None:
    """The workers look which reads have ended, when they are given the batch at a place of the queue."""
    if x[SOONEST] > r[NOW]:
        return
    following, seen, ends = end_nb(links, NEXT_END), end_nb(links, SEEN), end_nb(links, END_AT)
    soonest, i = NEVER, x[FIRST_END]
    while i != NONE:
        if seen[i] == NONE:
            if ends[i] <= r[NOW]:
                seen[i] = batch
                x[SEEN_IN + batch] += 1
            else:
                soonest = min(soonest, ends[i])
        i = following[i]
    x[SOONEST] = soonest


@inner
def hear_nb(run: Run, cache: Cache | None, links: Links, instance: int, batch: int) -> None:
    """The scheduler learns what the workers saw with a batch: who can be admitted, or whose blocks are free."""
    r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
    following, seen, blocks = end_nb(links, NEXT_END), end_nb(links, SEEN), column_nb(run, BLOCKS)
    before, i = NONE, x[FIRST_END]
    while x[SEEN_IN + batch] > 0:
        after = following[i]
        if seen[i] != batch:
            before = i
        else:
            x[SEEN_IN + batch] -= 1
            if r[HOLDS] == 0:
                seen[i] = HEARD
                x[READY] += 1
                before = i
            else:
                strike_nb(links, x, before, i)
                if cache is None:
                    r[FREE] += blocks[i]
                elif blocks[i] > 0:
                    r[FREE] += release_nb(cache, r, i, blocks[i])
                    r[SLOTS_AT] -= 1
                    cache.slots[r[SLOTS_AT] + r[RUNNING]] = cache.slot[i]
                blocks[i] = 0
        i = after


@inner
def forward_nb(run: Run, links: Links, routers: Routers | None, r: I64, batch: int) -> None:
    """Requests whose prompts are computed go to the decode instances, in turn or as their router says."""
    facts, rows = links.facts, queued_nb(run, r, batch)
    for row in range(run.scratch[r[QUEUE_AT] + r[DEPTH] + batch]):
        i = rows[row] >> 1
        if column_nb(run, PLACE)[i] != DONE or passage_nb(links, DECODE_OF)[i] != NONE:
            continue
        answer, now, turn = i + facts[REQUESTS], column_nb(run, FINISH)[i], facts[FORWARDED]
        facts[FORWARDED] += 1
        if routers is None:
            add_nb(run, links, facts[PREFILLS] + turn % facts[DECODES], answer, now + facts[PROXY_NS])
        else:
            passage_nb(links, DECODE_OF)[i] = WAITS_AT_ROUTER
            route_nb(run, links, routers, 0, answer, turn, now)


@inner
def send_next_nb(run: Run, links: Links, answers: int, now: int) -> None:
    """Clients that have an answer send the next requests, as long as there are some."""
    facts = links.facts
    for _ in range(min(answers, facts[REQUESTS] - facts[KNOWN_TO_COME])):
        column_nb(run, ARRIVAL)[facts[KNOWN_TO_COME]] = now + facts[CLIENT_NS]
        facts[KNOWN_TO_COME] += 1


@inner
def add_nb(run: Run, links: Links, instance: int, i: int, now: int) -> None:
    """Request i comes to an instance."""
    r, x, facts = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance), links.facts
    column_nb(run, ARRIVAL)[i] = now
    if i < facts[REQUESTS]:
        passage_nb(links, PREFILL_OF)[i] = instance
    else:
        passage_nb(links, DECODE_OF)[i - facts[REQUESTS]] = instance - facts[PREFILLS]
    send_nb(run, r, i)
    x[DUE] = due_nb(run, x, r)


@inner
def route_nb(run: Run, links: Links, routers: Routers, holds: int, i: int, turn: int, now: int) -> None:
    """Send request i, the `turn`-th of its side, to the instance that its router chooses, or let it wait for one."""
    facts = links.facts
    router = routers.prefill if holds == 1 else routers.decode
    first = 0 if holds == 1 else facts[PREFILLS]
    count = facts[PREFILLS] if holds == 1 else facts[DECODES]
    look_nb(run, router, first, count)
    place = choose_nb(run, router, count, i, turn, now)
    if place != NONE:
        add_nb(run, links, first + place, i, now if holds == 1 else now + facts[PROXY_NS])
    elif router[FIRST_WAITS] == NONE:
        router[FIRST_WAITS] = router[LAST_WAITS] = i
    else:
        column_nb(run, FOLLOWING)[router[LAST_WAITS]] = i
        router[LAST_WAITS] = i


@inner
def look_nb(run: Run, router: I64, first: int, count: int) -> None:
    """How many requests each instance has, and how many wait there; to those who pull, none has room for too many."""
    for place in range(count):
        r = at(run.replicas, (first + place) * REPLICA_SIZE)
        p = at(router, router[REPLICAS_AT] + place * ROUTED_SIZE)
        p[LOAD] = r[SENT] - r[ENDED]
        p[WAITING] = p[LOAD] - r[RUNNING]
        p[UNHELD] = r[FREE]
        if router[RULE] == PULL and p[LOAD] >= r[MAX_SEQS]:
            p[LOAD] = NEVER


@inner
def pull_nb(run: Run, links: Links, routers: Routers, holds: int, now: int) -> None:
    """Let instances of a side that have seats take the oldest of those that wait."""
    facts = links.facts
    router = routers.prefill if holds == 1 else routers.decode
    first = 0 if holds == 1 else facts[PREFILLS]
    count = facts[PREFILLS] if holds == 1 else facts[DECODES]
    while router[FIRST_WAITS] != NONE:
        look_nb(run, router, first, count)
        place, least = NONE, NEVER
        for instance in range(count):
            load = router[router[REPLICAS_AT] + instance * ROUTED_SIZE + LOAD]
            if load < least:
                place, least = instance, load
        if place == NONE:
            return
        i = router[FIRST_WAITS]
        router[FIRST_WAITS] = column_nb(run, FOLLOWING)[i]
        column_nb(run, FOLLOWING)[i] = NONE
        add_nb(run, links, first + place, i, now if holds == 1 else now + facts[PROXY_NS])
