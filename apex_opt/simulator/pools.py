"""Pools of identical replicas, and which of them may serve a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.simulator.routing import BEFOREHAND, beforehand

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.ranks import Halves, Ranks
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EnginePool:
    """Identical replicas, as the simulator sees them.

    Parameters
    ----------
    settings : EngineSettings    batching limits of each scheduler
    blocks : int                 KV blocks each scheduler can hand out
    laws : one BatchLaw per pipeline stage; of ranks that run in step, a rank's own part
    replicas : int               engines with their own schedulers and caches
    ranks : Ranks or None        of each replica, with a scheduler and a cache each; None: one scheduler
    """

    settings: EngineSettings
    blocks: int
    laws: Sequence[BatchLaw]
    replicas: int = 1
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise UsageError(f"replicas: {self.replicas} is below 1")

    @property
    def schedulers(self) -> int:
        """Of each replica."""
        return 1 if self.ranks is None else self.ranks.count

    @property
    def resources(self) -> tuple[BatchLaw, ...]:
        """What is asked of each resource on the only stage; nothing where no two work at one time."""
        return self.laws[0].resources if self.laws else ()

    @property
    def walked(self) -> bool:
        """Whether batches take what no engine of the kernel adds up over several of them."""
        return bool(self.halves or self.resources)

    @property
    def halves(self) -> tuple[Halves, ...]:
        """What forwards in two halves take on each stage; nothing where none are split."""
        if self.ranks is None or self.ranks.splitting is None:
            return ()
        return tuple(law.halves for law in self.ranks.shared if law.halves is not None)


class Share(NamedTuple):
    """Requests, and the replicas that serve them.

    Parameters
    ----------
    first, last : int        the replicas, counted over all pools, `last` not among them
    rows : int64[m]          the requests, in order
    clients : int or None    that send them in a closed loop
    routing : Routing        how a replica is found for each
    routed : bool            as loads are when it arrives; else where `places` says, or the j-th of them goes to the
                             j-th replica, over and over, as does the j-th client
    places : int64[m] or None    the replica of each, counted from `first`, where that is known beforehand
    """

    first: int
    last: int
    rows: I64
    clients: int | None
    routing: Routing
    routed: bool
    places: I64 | None = None

    def dealt(self, place: int) -> I64:
        """The requests of the replica at a place, where none is routed."""
        mine: I64 = self.rows[place :: self.last - self.first]
        return mine if self.places is None else self.rows[self.places == place]


def shares(
    pools: Sequence[EnginePool],
    trace: Trace,
    routings: Sequence[Routing],
    assigned: NDArray[np.integer] | None = None,
    clients: Sequence[int] | None = None,
) -> list[Share]:
    """Who serves which requests of a trace.

    Parameters
    ----------
    pools, trace : as for `simulator.api.run_deployment`
    routings : of each pool, among its replicas; where requests are not assigned all the same, among all replicas
    assigned : int[requests] or None    the pool of each request
    clients : of each pool in a closed loop, where requests are assigned

    Returns
    -------
    list of Share    one, or one for each pool; replicas without a request are left out where none is routed

    Raises
    ------
    UsageError    pools that are not there or get no request; clients that do not go with the trace
    """
    lasts = np.cumsum([pool.replicas for pool in pools]).tolist()
    found = [(0, lasts[-1], np.arange(len(trace)), trace.concurrency)]
    if assigned is not None:
        if len(assigned) != len(trace) or not np.isin(assigned, np.arange(len(pools))).all():
            raise UsageError(f"each of {len(trace)} requests is assigned to a pool from 0 to {len(pools) - 1}")
        if (trace.concurrency is None) != (clients is None) or (clients is not None and len(clients) != len(pools)):
            raise UsageError("clients are given for each pool where the trace is a closed loop, and only there")
        shared = [None] * len(pools) if clients is None else clients
        found = [
            (last - pool.replicas, last, np.flatnonzero(assigned == place), its)
            for place, (pool, last, its) in enumerate(zip(pools, lasts, shared, strict=True))
        ]
    if empty := [place for place, (_, _, rows, its) in enumerate(found) if not len(rows) or its == 0]:
        raise UsageError(f"pool {empty[0]} has no request or no client; leave it out")
    return [_share(*one, routing, trace) for one, routing in zip(found, routings, strict=False)]


def sides(
    prefill: EnginePool, decode: EnginePool, trace: Trace, routing: tuple[Routing, Routing]
) -> tuple[Share, Share]:
    """All requests, before the instances that compute prompts and again before those that answer them.

    Parameters
    ----------
    prefill, decode, trace
    routing : of each side
    """
    rows, last = np.arange(len(trace)), prefill.replicas
    return (
        _share(0, last, rows, None, routing[0], trace)._replace(last=last),
        _share(last, last + decode.replicas, rows, None, routing[1], trace)._replace(last=last + decode.replicas),
    )


def _share(first: int, last: int, rows: I64, clients: int | None, routing: Routing, trace: Trace) -> Share:
    """A share, of whose replicas those without a request are left out where none is routed.

    Parameters
    ----------
    first, last, rows, clients : as of `Share`
    routing, trace
    """
    if clients is not None or last - first == 1:
        routing = "round_robin"
    if routing not in BEFOREHAND:
        return Share(first, last, rows, clients, routing, routed=True)
    places = beforehand(routing, trace, rows, last - first)
    used = min(len(rows), clients or len(rows)) if places is None else int(places.max()) + 1
    return Share(first, min(last, first + used), rows, clients, routing, routed=False, places=places)
