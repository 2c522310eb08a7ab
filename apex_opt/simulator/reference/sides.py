"""The instances of either side where prompts are handed over, and the routers before them."""

from __future__ import annotations

import heapq
from collections import deque
from typing import TYPE_CHECKING

from apex_opt.simulator.reference.router import Pull

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.simulator.reference.engine import Engine
    from apex_opt.simulator.reference.router import Router
    from apex_opt.simulator.reference.sequence import Sequence
    from apex_opt.workload.trace import Trace


class Coming:
    """Requests in the order in which they come: on their own, or from clients, each a pause after an answer.

    Parameters
    ----------
    trace : Trace
    """

    def __init__(self, trace: Trace) -> None:
        self._pause_ns, closed = trace.pause_ns, trace.concurrency is not None
        self._times: list[int] = [0] * min(trace.concurrency or 0, len(trace)) if closed else trace.arrival_ns.tolist()
        heapq.heapify(self._times)
        self._left = len(trace) - len(self._times)
        self.came: list[int] = []  # when each came

    def by(self, due_ns: int | None) -> int | None:
        """When the next request comes, if it comes before anybody is due or at that time."""
        if not self._times or (due_ns is not None and self._times[0] > due_ns):
            return None
        self.came.append(heapq.heappop(self._times))
        return self.came[-1]

    def answered(self, at_ns: int) -> None:
        """A client has an answer."""
        if self._left:
            self._left -= 1
            heapq.heappush(self._times, at_ns + self._pause_ns)


class Side:
    """The instances of one side and the router before them, with the requests that wait for one of them.

    Parameters
    ----------
    instances : of the side
    router : Router
    """

    def __init__(self, instances: Seq[Engine], router: Router) -> None:
        self.instances, self._router = instances, router
        self.place_of: dict[int, int] = {}  # of each request sent
        self._waiting: deque[Sequence] = deque()

    def send(self, sequence: Sequence, now_ns: int, later_ns: int) -> None:
        """Send a request to the instance that the router chooses now; it comes there some time later.

        Parameters
        ----------
        sequence : Sequence    the request
        now_ns : int           when it is sent
        later_ns : int         until it comes
        """
        if isinstance(self._router, Pull):
            self._waiting.append(sequence)
            self.pull(now_ns, later_ns)
        else:
            chosen = self._router.choose(sequence, now_ns, self.instances)
            self._add(self.instances.index(chosen), sequence, now_ns + later_ns)

    def pull(self, now_ns: int, later_ns: int) -> None:
        """Let instances with a seat take the oldest of those that wait, of several the one with the fewest requests."""
        while self._waiting:
            place, instance = min(enumerate(self.instances), key=lambda one: one[1].unanswered)
            if instance.unanswered >= instance.seats:
                return
            self._add(place, self._waiting.popleft(), now_ns + later_ns)

    def _add(self, place: int, sequence: Sequence, at_ns: int) -> None:
        self.place_of[sequence.id] = place
        self.instances[place].add(sequence, at_ns)
