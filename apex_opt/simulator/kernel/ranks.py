"""Data-parallel ranks as Python calls them: entries of `group` by each engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.group import by_general_groups_nb, by_general_nb, by_steady_groups_nb, by_steady_nb
from apex_opt.simulator.kernel.group_state import Group
from apex_opt.simulator.kernel.kv_state import Groups
from apex_opt.simulator.kernel.state import Cache, Run

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I32, I64


def serve_ranks_steady_nb(
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
    first: int,
    last: int,
    routed: I64,
    turns: int,
    told: I64,
    groups: I64,
    members: I64,
    fronts: I64,
    memory: I64,
    tables: I64,
    together: I64,
    links: I64,
    forwards: I64,
    events: I64,
    loads: I64,
) -> None:
    """Ranks by the engine of one stage."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    group = Group(told, groups, members, fronts, memory, tables, together, links, forwards, events, loads)
    by_steady_nb(run, None, group, first, last, routed, turns)


def serve_ranks_general_nb(
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
    first: int,
    last: int,
    routed: I64,
    turns: int,
    told: I64,
    groups: I64,
    members: I64,
    fronts: I64,
    memory: I64,
    tables: I64,
    together: I64,
    links: I64,
    forwards: I64,
    events: I64,
    loads: I64,
) -> None:
    """Ranks by the engine that walks the running sequences, without prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    group = Group(told, groups, members, fronts, memory, tables, together, links, forwards, events, loads)
    by_general_nb(run, None, group, first, last, routed, turns)


def serve_ranks_caching_nb(
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
    first: int,
    last: int,
    routed: I64,
    turns: int,
    told: I64,
    groups: I64,
    members: I64,
    fronts: I64,
    memory: I64,
    tables: I64,
    together: I64,
    links: I64,
    forwards: I64,
    events: I64,
    loads: I64,
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
    """Ranks by the engine that walks the running sequences, with prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    group = Group(told, groups, members, fronts, memory, tables, together, links, forwards, events, loads)
    cache = Cache(piece_blocks, pieces, starts, own, shared, registered, slot, slots, memo, table, block, holder)
    by_general_nb(run, cache, group, first, last, routed, turns)


def serve_ranks_steady_groups_nb(
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
    first: int,
    last: int,
    routed: I64,
    turns: int,
    told: I64,
    groups: I64,
    members: I64,
    fronts: I64,
    memory: I64,
    tables: I64,
    together: I64,
    links: I64,
    forwards: I64,
    events: I64,
    loads: I64,
    number: int,
    sets: int,
    multiple: int,
    caching: int,
    splits: int,
    size: int,
    counting: int,
    sizes: int,
    kinds: I64,
    spans: I64,
    order: I64,
    keys_at: I64,
    keys: I32,
    slot: I64,
    slots: I64,
    registers: I64,
    used: I64,
    table: I32,
    block: I32,
    holder: I32,
) -> None:
    """Ranks by the engine of one stage, over groups of layers whose blocks are counted."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    group = Group(told, groups, members, fronts, memory, tables, together, links, forwards, events, loads)
    over = Groups(
        number,
        sets,
        multiple,
        caching,
        splits,
        size,
        counting,
        sizes,
        kinds,
        spans,
        order,
        keys_at,
        keys,
        slot,
        slots,
        registers,
        used,
        table,
        block,
        holder,
    )
    by_steady_groups_nb(run, over, group, first, last, routed, turns)


def serve_ranks_general_groups_nb(
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
    first: int,
    last: int,
    routed: I64,
    turns: int,
    told: I64,
    groups: I64,
    members: I64,
    fronts: I64,
    memory: I64,
    tables: I64,
    together: I64,
    links: I64,
    forwards: I64,
    events: I64,
    loads: I64,
    number: int,
    sets: int,
    multiple: int,
    caching: int,
    splits: int,
    size: int,
    counting: int,
    sizes: int,
    kinds: I64,
    spans: I64,
    order: I64,
    keys_at: I64,
    keys: I32,
    slot: I64,
    slots: I64,
    registers: I64,
    used: I64,
    table: I32,
    block: I32,
    holder: I32,
) -> None:
    """Ranks by the engine that walks the running sequences, over groups of layers."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    group = Group(told, groups, members, fronts, memory, tables, together, links, forwards, events, loads)
    over = Groups(
        number,
        sets,
        multiple,
        caching,
        splits,
        size,
        counting,
        sizes,
        kinds,
        spans,
        order,
        keys_at,
        keys,
        slot,
        slots,
        registers,
        used,
        table,
        block,
        holder,
    )
    by_general_groups_nb(run, over, group, first, last, routed, turns)
