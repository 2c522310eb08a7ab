"""All replicas of a run: who acts next, and where a request goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.blocks import empty_cache_nb
from apex_opt.simulator.kernel.general import by_groups_nb, plain_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_groups import empty_groups_nb
from apex_opt.simulator.kernel.kv_state import Groups
from apex_opt.simulator.kernel.speculative import drafting_nb, grouped_nb
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ENDED,
    FOLLOWING,
    HEAD,
    LAST_ENDED,
    LAST_ENDED_NS,
    NEVER,
    NONE,
    PASSED,
    REPLICA_SIZE,
    SENT,
    TAIL,
    Cache,
    Run,
)
from apex_opt.simulator.kernel.steady import steady_nb
from apex_opt.simulator.kernel.trtllm import trtllm_nb

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I32, I64


def serving(turns_nb: Any, empty_nb: Any = empty_cache_nb) -> Any:
    """`serve_nb` by an engine, given as the function that takes its turns and the one that empties its blocks."""

    @inner
    def serve_nb(run: Run, cache: Cache | None, first: int, last: int, routed: I64, turns: int) -> None:
        """Run replicas `first` to `last` - 1.

        Where no request is routed each has its own, and they run one after the other. Else `turns` of them, each to the
        replica with the fewest unanswered ones when it arrives (ties: the lowest), so all advance to each arrival.
        """
        arrival, following = column_nb(run, ARRIVAL), column_nb(run, FOLLOWING)
        for turn in range(turns + 1):
            until = arrival[routed[turn]] if turn < turns else NEVER
            best, least = first, NEVER
            for replica in range(first, last):
                r = at(run.replicas, replica * REPLICA_SIZE)
                if cache is not None and turn == 0:
                    empty_nb(cache, r)
                turns_nb(run, cache, replica, until)
                if run.control[PASSED] == 1:
                    return
                outstanding = r[SENT] - r[ENDED]
                if r[LAST_ENDED_NS] > until:
                    outstanding += r[LAST_ENDED]  # answered only once the clock gets there
                if outstanding < least:
                    best, least = replica, outstanding
            if turn < turns:
                r = at(run.replicas, best * REPLICA_SIZE)
                if r[HEAD] == NONE:
                    r[HEAD] = routed[turn]
                else:
                    following[r[TAIL]] = routed[turn]
                r[TAIL] = routed[turn]
                r[SENT] += 1

    return serve_nb


_by_steady_nb, _by_general_nb = serving(steady_nb), serving(plain_nb)
_by_steady_groups_nb = serving(steady_nb, empty_groups_nb)
_by_general_groups_nb = serving(by_groups_nb, empty_groups_nb)
_by_trtllm_nb = serving(trtllm_nb)
_by_speculative_nb = serving(drafting_nb)
_by_grouped_nb = serving(grouped_nb, empty_groups_nb)


def serve_steady_nb(
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
) -> None:
    """`serve_nb` by the engine of one stage."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    _by_steady_nb(run, None, first, last, routed, turns)


def serve_general_nb(
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
) -> None:
    """`serve_nb` by the engine that walks the running sequences, without prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    _by_general_nb(run, None, first, last, routed, turns)


def serve_trtllm_nb(
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
) -> None:
    """`serve_nb` by the engine of TensorRT-LLM."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    _by_trtllm_nb(run, None, first, last, routed, turns)


def serve_caching_nb(
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
    """`serve_nb` by the engine that walks the running sequences, with prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    cache = Cache(piece_blocks, pieces, starts, own, shared, registered, slot, slots, memo, table, block, holder)
    _by_general_nb(run, cache, first, last, routed, turns)


def serve_speculative_nb(
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
) -> None:
    """`serve_nb` by the engine that verifies drafts, without prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    _by_speculative_nb(run, None, first, last, routed, turns)


def serve_speculative_caching_nb(
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
    """`serve_nb` by the engine that verifies drafts, with prefix caching."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
    cache = Cache(piece_blocks, pieces, starts, own, shared, registered, slot, slots, memo, table, block, holder)
    _by_speculative_nb(run, cache, first, last, routed, turns)


def serve_steady_groups_nb(
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
    """`serve_nb` by the engine of one stage, over groups of layers whose blocks are counted."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
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
    _by_steady_groups_nb(run, over, first, last, routed, turns)


def serve_general_groups_nb(
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
    """`serve_nb` by the engine that walks the running sequences, over groups of layers."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
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
    _by_general_groups_nb(run, over, first, last, routed, turns)


def serve_grouped_nb(
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
    """`serve_nb` by the engine that verifies drafts, over groups of layers."""
    run = Run(control, requests, replicas, stages, laws, counts, scratch, stops, floors, steps, rows, lost)
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
    _by_grouped_nb(run, over, first, last, routed, turns)
