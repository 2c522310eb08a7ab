"""Whether a run shows a load that lasts, or only how one begins and ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from apex_opt.simulator.outcome import Outcome

WARM_UP: Final = 0.2
"""Share of the requests that come first and are left out of what is taken for steady."""

GROWTH: Final = 1.25
"""What a backlog may grow by from one half of the other requests to the next, over one request, and not count."""

LASTING: Final = 0.1
"""Longest drain of a load that is taken for steady, as a share of the time over which requests come."""

SPAN: Final = 20
"""Least time over which requests come, in mean times of a request, of a load that is taken for steady."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transient:
    """How a run begins and ends.

    Parameters
    ----------
    arrivals_s : float        from the first arrival to the last
    drain_s : float           from the last arrival to the last token
    waiting, unfinished : int requests without a token, and without their last one, when the last one came
    before, after : float     backlog: requests unfinished when another comes, in the mean over those that come after
                              the warm-up, in the first half of these and in the second
    clients : int or None     of a closed loop, whose backlog is that of its clients
    requests : int            of the run
    """

    arrivals_s: float
    drain_s: float
    waiting: int
    unfinished: int
    before: float
    after: float
    clients: int | None = None
    requests: int = 0

    @classmethod
    def of(cls, outcome: Outcome, request_ns: int = 0, *, clients: int | None = None) -> Transient:
        """How a finished run begins and ends; the last token counts once it has left the engine's host.

        Parameters
        ----------
        outcome
        request_ns : int    time of a request outside the engine
        clients : int or None    that send the requests in a closed loop
        """
        arrival, last = np.sort(outcome.arrival_ns), int(outcome.arrival_ns.max())
        met = np.arange(len(arrival)) - np.searchsorted(np.sort(outcome.finish_ns), arrival, "right")
        first = warm_up(len(arrival))
        half = first + (len(arrival) - first + 1) // 2
        return cls(
            arrivals_s=(last - int(arrival[0])) / NS_PER_S,
            drain_s=(int(outcome.finish_ns.max()) + request_ns - last) / NS_PER_S,
            waiting=int((outcome.first_token_ns > last).sum()),
            unfinished=int((outcome.finish_ns > last).sum()),
            before=float(met[first:half].mean()),
            after=float(met[half:].mean()) if half < len(met) else float(met[first:half].mean()),
            clients=clients,
            requests=len(arrival),
        )

    @property
    def closed(self) -> bool:
        """Whether it is a closed loop."""
        return self.clients is not None

    @property
    def growing(self) -> bool:
        """Whether more requests are unfinished the longer it runs."""
        return not self.closed and self.after > GROWTH * self.before + 1

    def lasts(self, request_s: float) -> bool:
        """Whether requests come for long beside the mean time of one, in seconds."""
        return self.arrivals_s >= SPAN * request_s

    @property
    def short(self) -> bool:
        """Whether much of the run comes after the last request.

        The last requests of a closed loop are one of each client, and those of one client alone are all alike.
        """
        if self.clients is not None and (self.clients == 1 or self.clients <= LASTING * self.requests):
            return False
        return self.drain_s > LASTING * self.arrivals_s

    @property
    def measured(self) -> bool:
        """Whether the figures are those of a transient."""
        return self.growing or self.short


def warm_up(requests: int) -> int:
    """Requests that are left out of what is taken for steady."""
    return min(int(requests * WARM_UP), requests - 1)
