"""All replicas of a run: who acts next, and where a request goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.blocks import empty_cache_nb
from apex_opt.simulator.kernel.general import general_nb
from apex_opt.simulator.kernel.jit import at, entry, inner
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ENDED,
    FOLLOWING,
    HEAD,
    LAST_ENDED,
    NEVER,
    NONE,
    NOW,
    PASSED,
    REPLICA_SIZE,
    SENT,
    TAIL,
    Cache,
    Run,
)
from apex_opt.simulator.kernel.steady import steady_nb

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64


@inner
def addresses_nb(run: Run) -> Run:
    """The run with the address of each array, which is all that compiled code asks of it."""
    return Run(
        at(run.control, 0),
        at(run.requests, 0),
        at(run.replicas, 0),
        at(run.stages, 0),
        at(run.laws, 0),
        at(run.counts, 0),
        at(run.scratch, 0),
        at(run.stops, 0),
        at(run.floors, 0),
        at(run.steps, 0),
        at(run.rows, 0),
        at(run.lost, 0),
    )


def serving(turns_nb: Any) -> Any:
    """`serve_nb` by an engine, given as the function that takes its turns."""

    @inner
    def serve_nb(run: Run, cache: Cache | None, first: int, last: int, routed: I64) -> None:
        """Run replicas `first` to `last` - 1.

        Where no request is routed each has its own, and they run one after the other. Else each of `routed` goes to the
        replica with the fewest unanswered ones when it arrives (ties: the lowest), so all advance to each arrival.
        """
        arrival, following = column_nb(run, ARRIVAL), column_nb(run, FOLLOWING)
        for turn in range(len(routed) + 1):
            until = arrival[routed[turn]] if turn < len(routed) else NEVER
            best, least = first, NEVER
            for replica in range(first, last):
                r = at(run.replicas, replica * REPLICA_SIZE)
                if cache is not None and turn == 0:
                    empty_cache_nb(cache, r)
                turns_nb(run, cache, replica, until)
                if run.control[PASSED] == 1:
                    return
                outstanding = r[SENT] - r[ENDED]
                if r[NOW] > until:
                    outstanding += r[LAST_ENDED]  # answered only once the clock gets there
                if outstanding < least:
                    best, least = replica, outstanding
            if turn < len(routed):
                r = at(run.replicas, best * REPLICA_SIZE)
                if r[HEAD] == NONE:
                    r[HEAD] = routed[turn]
                else:
                    following[r[TAIL]] = routed[turn]
                r[TAIL] = routed[turn]
                r[SENT] += 1

    return serve_nb


_by_steady_nb, _by_general_nb = serving(steady_nb), serving(general_nb)


@entry
def serve_steady_nb(run: Run, first: int, last: int, routed: I64) -> None:
    """`serve_nb` by the engine of one stage."""
    _by_steady_nb(addresses_nb(run), None, first, last, routed)


@entry
def serve_general_nb(run: Run, first: int, last: int, routed: I64) -> None:
    """`serve_nb` by the engine that walks the running sequences, without prefix caching."""
    _by_general_nb(addresses_nb(run), None, first, last, routed)


@entry
def serve_caching_nb(run: Run, cache: Cache, first: int, last: int, routed: I64) -> None:
    """`serve_nb` by the engine that walks the running sequences, with prefix caching."""
    known = Cache(
        cache.piece_blocks,
        at(cache.pieces, 0),
        at(cache.starts, 0),
        at(cache.own, 0),
        at(cache.shared, 0),
        at(cache.registered, 0),
        at(cache.slot, 0),
        at(cache.slots, 0),
        at(cache.memo, 0),
        at(cache.table, 0),
        at(cache.block, 0),
        at(cache.holder, 0),
    )
    _by_general_nb(addresses_nb(run), known, first, last, routed)
