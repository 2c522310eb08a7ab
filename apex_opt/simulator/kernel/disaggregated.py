"""Prefill and decode instances together: who acts next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.blocks import empty_cache_nb
from apex_opt.simulator.kernel.handover import due_nb, instance_nb, turn_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import DECODES, DUE, NEVER, NONE, PREFILLS, REPLICA_SIZE, Cache, Links, Run

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I32, I64


@inner
def disaggregated_nb(run: Run, cache: Cache | None, links: Links) -> None:
    """Whoever is due first acts, of equals a prefill instance before a decode instance."""
    count = links.facts[PREFILLS] + links.facts[DECODES]
    for instance in range(count):
        r, x = at(run.replicas, instance * REPLICA_SIZE), instance_nb(links, instance)
        if cache is not None:
            empty_cache_nb(cache, r)
        x[DUE] = due_nb(run, x, r)
    while True:
        first, soonest = NONE, NEVER
        for instance in range(count):
            due = instance_nb(links, instance)[DUE]
            if due < soonest:
                first, soonest = instance, due
        if first == NONE:
            return
        turn_nb(run, cache, links, first)
        x = instance_nb(links, first)
        x[DUE] = due_nb(run, x, at(run.replicas, first * REPLICA_SIZE))


def serve_disaggregated_nb(
    control: I64,
    requests: I64,
    replicas: I64,
    stages: I64,
    laws: I64,
    counts: I64,
    scratch: I64,
    stops: I64,
    floors: I64,
    steps: I64,
    rows: I64,
    lost: I64,
    facts: I64,
    instances: I64,
    ends: I64,
    passages: I64,
) -> None:
    """`disaggregated_nb` without prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    disaggregated_nb(run, None, Links(facts, instances, ends, passages))


def serve_disaggregated_caching_nb(
    control: I64,
    requests: I64,
    replicas: I64,
    stages: I64,
    laws: I64,
    counts: I64,
    scratch: I64,
    stops: I64,
    floors: I64,
    steps: I64,
    rows: I64,
    lost: I64,
    facts: I64,
    instances: I64,
    ends: I64,
    passages: I64,
    piece_blocks: int,
    pieces: I64,
    starts: I64,
    own: I64,
    shared: I64,
    registered: I64,
    slot: I64,
    slots: I64,
    memo: I64,
    table: I32,
    block: I32,
    holder: I32,
) -> None:
    """`disaggregated_nb` with prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    cache = Cache(piece_blocks, pieces, starts, own, shared, registered, slot, slots, memo, table, block, holder)
    disaggregated_nb(run, cache, Links(facts, instances, ends, passages))
