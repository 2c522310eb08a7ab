"""Decode instances on their own, once it is known when prompts are handed over: reads before the steady engine.

All that instances have in common is the links that they read over, so each goes ahead up to the turn in which it may
order a read. A batch in flight, or an empty one that has not been taken in, has the place QUEUE_HEAD among those that
the workers see ends of reads with, and one that is formed the other place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.handover import hear_nb, instance_nb, reading, see_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ASYNCHRONOUS,
    BATCH_COMING,
    BATCH_LOST,
    BATCH_ROWS,
    BATCHES,
    BLOCK_SIZE,
    CHUNKED,
    DECODES,
    DECODING,
    DUE,
    ENDS,
    ENTERED,
    FLIGHT,
    FLIGHT_END,
    FREE,
    GENERATED,
    HEAD,
    HOLLOW,
    LOGGED,
    MAX_SEQS,
    MAX_TOKENS,
    NEVER,
    NONE,
    NOW,
    PARTIAL,
    PASSED,
    PREFILLS,
    PROMPT,
    QUEUE_HEAD,
    READY,
    REPLICA_SIZE,
    SEATED,
    SEEN_IN,
    SIDE,
    SLEEP_NS,
    SOONEST,
    STACK,
)
from apex_opt.simulator.kernel.steady import admit_nb, enter_nb, give_way_nb, launch_nb, stretch_nb, take_in_nb

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Cache, Links, Run


@inner
def hold_nb(run: Run, i: int, total: int, prompt: int) -> None:
    """Nothing to note: a sequence has as many blocks as its tokens need."""


@inner
def seat_nb(run: Run, cache: Cache | None, r: I64, i: int, prompt: int) -> None:
    """Request i, which has its blocks, takes a seat."""
    r[SEATED] += 1
    enter_nb(run, None, r, i, 1, prompt)


start_nb, order_nb = reading(SEATED, hold_nb, seat_nb)


@inner
def apart_nb(run: Run, links: Links) -> None:
    """Whoever may order a read first takes that turn, of equals the first."""
    first, last = links.facts[PREFILLS], links.facts[PREFILLS] + links.facts[DECODES]
    for instance in range(first, last):
        advance_nb(run, links, instance)
    while run.control[PASSED] == 0:
        chosen, soonest = NONE, NEVER
        for instance in range(first, last):
            due = instance_nb(links, instance)[DUE]
            if due < soonest:
                chosen, soonest = instance, due
        if chosen == NONE:
            return
        turn_nb(run, links, chosen)
        advance_nb(run, links, chosen)


@inner
def advance_nb(run: Run, links: Links, instance: int) -> None:
    """Take all turns of an instance before the one that may order a read, which is due then."""
    r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
    arrival = column_nb(run, ARRIVAL)
    while run.control[PASSED] == 0:
        head = r[HEAD]
        coming = arrival[head] if head != NONE else NEVER
        if r[SEATED] == 0 and r[FLIGHT] == 0 and r[STACK] == NONE:
            if x[ENDS] > 0:
                doze_nb(x, r, coming)
            elif coming >= NEVER:
                break
            elif coming > r[NOW]:
                r[NOW] = coming
                r[HOLLOW] = 0
        # Where batches are logged each is formed by the rules.
        quiet = r[PARTIAL] == NONE and r[ENTERED] == 0 and run.control[LOGGED] == 0
        if quiet and r[DECODING] > 0 and (r[FLIGHT] == 1 or r[ASYNCHRONOUS] == 0):
            stretch_nb(run, None, r, wake_nb(run, x, r))
        if coming <= r[NOW]:
            x[DUE] = r[NOW]
            return
        turn_nb(run, links, instance)
    x[DUE] = NEVER


@inner
def doze_nb(x: I64, r: I64, coming: int) -> None:
    """Where there is nothing but reads: sleep as often as it takes until one has ended or somebody has come."""
    if x[READY] == 0 and x[SEEN_IN] == 0 and x[SEEN_IN + 1] == 0:
        left = min(x[SOONEST], coming) - r[NOW]
        if left > 0:
            r[NOW] += (left + r[SLEEP_NS] - 1) // r[SLEEP_NS] * r[SLEEP_NS]


@inner
def wake_nb(run: Run, x: I64, r: I64) -> int:
    """When a stretch in which nothing happens but the passing of tokens ends at the latest; NONE: there is none."""
    n, stack, head, until = r[DECODING], r[STACK], r[HEAD], x[SOONEST]
    if x[SEEN_IN] > 0 or x[SEEN_IN + 1] > 0:
        return NONE
    if r[SEATED] >= r[MAX_SEQS] or n >= r[MAX_TOKENS]:
        return until
    if x[READY] > 0:
        return NONE
    if stack != NONE:
        known = column_nb(run, PROMPT)[stack] + column_nb(run, GENERATED)[stack]
        if r[CHUNKED] == 0 and known > r[MAX_TOKENS] - n:
            return until
        return until if blocks_nb(known, r[BLOCK_SIZE]) > r[FREE] else NONE
    if head == NONE:
        return until
    arrival = column_nb(run, ARRIVAL)[head]
    if arrival > r[NOW]:
        return min(until, arrival)
    return until if blocks_nb(column_nb(run, PROMPT)[head], r[BLOCK_SIZE]) > r[FREE] else NONE


@inner
def turn_nb(run: Run, links: Links, instance: int) -> None:
    """Form a batch, even an empty one, and take in the oldest, unless there is room for another in flight."""
    r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
    k, end, head = r[BATCHES], r[FLIGHT_END], r[HEAD]
    came = head != NONE and column_nb(run, ARRIVAL)[head] <= r[NOW]
    flies, hollow, oldest = r[FLIGHT] == 1, r[HOLLOW] == 1, r[QUEUE_HEAD]
    newest = 1 - oldest if flies or hollow else oldest
    form_nb(run, links, instance)
    another = launch_nb(run, None, r, instance)
    see_nb(links, x, r, newest)
    r[QUEUE_HEAD] = newest
    if another:
        if hollow:
            hear_nb(run, None, links, instance, oldest)
        return
    if flies or r[BATCH_ROWS] > 0:
        if not flies:
            k, end = r[BATCHES], r[FLIGHT_END]
            r[SIDE] = 1 - r[SIDE]
            r[ENTERED] = r[BATCH_COMING]
        take_in_nb(run, None, r, k, end)
        r[ENTERED] = 0
    if flies and r[BATCH_ROWS] > 0:
        r[SIDE] = 1 - r[SIDE]
        r[ENTERED] = r[BATCH_COMING]
    elif flies:
        r[FLIGHT] = 0
        r[HOLLOW] = 1
    if r[BATCH_ROWS] == 0 and (came or r[STACK] != NONE or x[ENDS] > 0):
        r[NOW] += r[SLEEP_NS]
    hear_nb(run, None, links, instance, oldest if flies or hollow else newest)


@inner
def form_nb(run: Run, links: Links, instance: int) -> None:
    """Those who run go on; where nobody has to give way others begin, and reads are ordered."""
    r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
    give_way_nb(run, None, r)
    if r[BATCH_LOST] > 0:
        return
    start_nb(run, None, links, x, r)
    # Those that were preempted are before all that have come, and are never read again.
    head = r[HEAD]
    r[HEAD] = NONE
    admit_nb(run, None, r)
    r[HEAD] = head
    if r[STACK] == NONE:
        order_nb(run, None, links, instance)
