"""Which replica serves a request when it arrives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.simulator.reference.engine import Engine
    from apex_opt.simulator.reference.group import Group
    from apex_opt.simulator.reference.sequence import Sequence

    Replica = Engine | Group


class Router(Protocol):
    """Chooses a replica for each request; all of them have taken every turn before it came, and none at that time."""

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        """The replica that serves a request.

        Parameters
        ----------
        sequence : Sequence             the request
        at_ns : int                     when it comes
        engines : sequence of Replica   to choose from
        """
        ...


class RoundRobin:
    """One replica after the other."""

    def __init__(self) -> None:
        self._sent = 0

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        self._sent += 1
        return engines[(self._sent - 1) % len(engines)]


class LeastLoaded:
    """The replica with the fewest unanswered requests, of equals the first."""

    def choose(self, sequence: Sequence, at_ns: int, engines: Seq[Replica]) -> Replica:
        return min(engines, key=lambda engine: engine.outstanding(at_ns))
