"""Prefill and decode instances together: who acts next."""

from __future__ import annotations

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.blocks import empty_cache_nb
from apex_opt.simulator.kernel.handover import due_nb, instance_nb, passage_nb, route_nb, turn_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    CAME,
    DECODES,
    DUE,
    KNOWN_TO_COME,
    NEVER,
    NONE,
    PASSED,
    PREFILLS,
    REPLICA_SIZE,
    STOPS,
    Cache,
    Links,
    Routers,
    Run,
)


@inner
def disaggregated_nb(run: Run, cache: Cache | None, links: Links, routers: Routers | None) -> None:
    """Whoever is due first acts, of equals a prefill instance before a decode instance.

    Where there are routers a request goes to one when it comes, before anybody acts, and clients send the next a pause
    after an answer; else prompts are dealt beforehand.
    """
    count = links.facts[PREFILLS] + links.facts[DECODES]
    for instance in range(count):
        r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
        if cache is not None:
            empty_cache_nb(cache, r)
        x[DUE] = due_nb(run, x, r)
    coming = 0
    while True:
        first, soonest = NONE, NEVER
        for instance in range(count):
            due = instance_nb(links, instance)[DUE]
            if due < soonest:
                first, soonest = instance, due
        if routers is not None and coming < links.facts[KNOWN_TO_COME]:
            now = column_nb(run, ARRIVAL)[coming]
            if now <= soonest:
                passage_nb(links, CAME)[coming] = now
                if run.control[STOPS] > 0:
                    run.floors[coming] = now  # where `stop_nb` looks for it
                route_nb(run, links, routers, 1, coming, coming, now)
                coming += 1
                continue
        if first == NONE:
            return
        turn_nb(run, cache, links, routers, first)
        if run.control[PASSED] == 1:
            return
        x = instance_nb(links, first)
        x[DUE] = due_nb(run, x, at(run.replicas, first * REPLICA_SIZE))
