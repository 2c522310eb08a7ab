"""All replicas of a run: who acts next, and where a request goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.blocks import empty_cache_nb
from apex_opt.simulator.kernel.general import by_groups_nb, plain_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_groups import empty_groups_nb
from apex_opt.simulator.kernel.reuse import empty_reuse_nb
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
)
from apex_opt.simulator.kernel.steady import steady_nb
from apex_opt.simulator.kernel.trtllm import trtllm_nb

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Cache, Run


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


by_steady_nb, by_general_nb = serving(steady_nb), serving(plain_nb)
by_steady_groups_nb = serving(steady_nb, empty_groups_nb)
by_general_groups_nb = serving(by_groups_nb, empty_groups_nb)
by_trtllm_nb = serving(trtllm_nb, empty_reuse_nb)
by_speculative_nb = serving(drafting_nb)
by_grouped_nb = serving(grouped_nb, empty_groups_nb)
