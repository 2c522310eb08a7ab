"""Groups of ranks that take their turns together: which group a request goes to, and what clients send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.coordinator import link_nb
from apex_opt.simulator.kernel.group_state import (
    AFTER,
    ANSWERED,
    CLOCK,
    COMING,
    COUNT,
    FIRST_RANK,
    GIVEN,
    GROUP_SIZE,
    LAST_COMING,
    WAITING_CLIENT,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    ARRIVAL,
    ENDED,
    LAST_ENDED,
    LAST_ENDED_NS,
    NEVER,
    NONE,
    PASSED,
    PAUSE_NS,
    REPLICA_SIZE,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.group_state import Group, Halves
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def follow_nb(run: Run, group: Group, g: I64) -> None:
    """Requests were answered: in a closed loop as many clients send their next ones."""
    ended = 0
    for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
        ended += run.replicas[rank * REPLICA_SIZE + ENDED]
    for _ in range(ended - g[ANSWERED]):
        i = g[WAITING_CLIENT]
        if i != NONE:
            column_nb(run, ARRIVAL)[i] = g[CLOCK] + run.control[PAUSE_NS]
            g[WAITING_CLIENT] = link_nb(run, group, AFTER)[i]
            g[GIVEN] += 1
    g[ANSWERED] = ended


@inner
def nothing_nb(run: Run, its: Any, g: I64) -> None:
    """Leave the blocks of a group as they are."""


def serving(turns_nb: Any, empty_nb: Any = nothing_nb) -> Any:
    """`serve_nb` of groups, given the function that takes their turns and the one that empties their blocks."""

    @inner
    def serve_nb(
        run: Run, its: Any, group: Group, halves: Halves | None, first: int, last: int, routed: I64, turns: int
    ) -> None:
        """Run groups `first` to `last` - 1; requests as for `deployment.serving`."""
        arrival, after = column_nb(run, ARRIVAL), link_nb(run, group, AFTER)
        for turn in range(turns + 1):
            until = arrival[routed[turn]] if turn < turns else NEVER
            best, least = first, NEVER
            for place in range(first, last):
                if turn == 0:
                    empty_nb(run, its, at(group.groups, place * GROUP_SIZE))
                turns_nb(run, group, halves, its, place, until)
                if run.control[PASSED] == 1:
                    return
                g = at(group.groups, place * GROUP_SIZE)
                outstanding = g[GIVEN] - g[ANSWERED]
                for rank in range(g[FIRST_RANK], g[FIRST_RANK] + g[COUNT]):
                    r = at(run.replicas, rank * REPLICA_SIZE)
                    if r[LAST_ENDED_NS] > until:
                        outstanding += r[LAST_ENDED]  # answered only once the clock gets there
                if outstanding < least:
                    best, least = place, outstanding
            if turn < turns:
                g = at(group.groups, best * GROUP_SIZE)
                if g[COMING] == NONE:
                    g[COMING] = routed[turn]
                else:
                    after[g[LAST_COMING]] = routed[turn]
                g[LAST_COMING] = routed[turn]
                g[GIVEN] += 1

    return serve_nb
