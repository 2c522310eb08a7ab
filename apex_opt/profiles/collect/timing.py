"""How long a call takes: replayed from a graph, over operands in turn, warmed up, by the median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from apex_opt.errors import InputError
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.profiles.collect.points import Point

    Call = Callable[[], object]

LEAST_CALLS: Final = 20
"""Calls of one graph: launching it then weighs little."""

_MOST_WARM_UPS: Final = 1000


class CallError(Exception):
    """A call that cannot be made on this machine: a reason of a few words."""


class Machine(Protocol):
    """An accelerator and the kernels on it.

    Attributes
    ----------
    name, hardware, software : str      as the driver calls it; for a card: power limit and driver; libraries, kernels
    gpus : int                          accelerators in the node
    memory_bytes, cache_bytes : int     device memory in all; the last cache before it
    """

    name: str
    hardware: str
    software: str
    gpus: int
    memory_bytes: int
    cache_bytes: int

    def lacks(self, kind: str) -> str:
        """Why a kind of table cannot be measured, empty where it can."""

    def free_bytes(self) -> int:
        """Device memory that is free."""

    def calls(self, point: Point, copies: int) -> Sequence[Call]:
        """The call of a point over so many operands, one call each.

        Raises
        ------
        CallError
        """

    def record(self, calls: Sequence[Call]) -> Any:
        """A graph of calls one after another.

        Raises
        ------
        CallError
        """

    def replay_s(self, graph: Any, times: int) -> float:
        """Device time of so many replays.

        Raises
        ------
        CallError
        """

    def energy_j(self) -> float | None:
        """Reading of the board's energy counter, None where there is none."""

    def release(self) -> None:
        """Give operands and graphs no longer in use back."""

    def collectives(self, ranks: int, points: Sequence[Point], effort: Effort) -> Sequence[Result]:
        """The results of collectives on so many accelerators, in the order of the points.

        Parameters
        ----------
        ranks : int                   that take part
        points : sequence of Point    what is measured
        effort : Effort               how long is measured

        Raises
        ------
        CallError
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to measure.

    Attributes
    ----------
    warm_s : float          replays before the first sample: clocks settle, lazily loaded kernels are there
    samples, sample_s       samples of at least so long each, of which the median counts
    energy_s : float        length of an energy reading: many of the counter's updates
    """

    warm_s: float = 0.03
    samples: int = 9
    sample_s: float = 0.004
    energy_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Time and energy of one call; energy is None where it was not measured."""

    time_s: float
    energy_j: float | None = None


def measure(machine: Machine, calls: Sequence[Call], effort: Effort, *, energy: bool = False) -> Result:
    """Time one call, the operands taken in turn.

    Parameters
    ----------
    machine
    calls : sequence of Call    what is timed
    effort : Effort             how long is measured
    energy : bool               whether joules are measured too

    Raises
    ------
    CallError       a call that fails
    InputError      a clock that stands still
    """
    rounds = ceil_div(LEAST_CALLS, len(calls))
    graph = machine.record([*calls] * rounds)
    count = len(calls) * rounds
    spent = 0.0
    for _ in range(_MOST_WARM_UPS):
        once = machine.replay_s(graph, 1)
        spent += once
        if spent >= effort.warm_s:
            break
    if not once > 0:
        raise InputError(f"{machine.name}: the device's clock stands still; its driver cannot time calls")
    times = max(round(effort.sample_s / once), 1)
    samples = sorted(machine.replay_s(graph, times) / (times * count) for _ in range(effort.samples))
    result = Result(time_s=samples[len(samples) // 2])
    before = machine.energy_j() if energy and effort.energy_s else None
    if before is None:
        return result
    done, spent = 0, 0.0
    while spent < effort.energy_s:
        spent += machine.replay_s(graph, times)
        done += times
    after = machine.energy_j()
    assert after is not None  # a counter does not vanish
    return Result(time_s=result.time_s, energy_j=(after - before) / (done * count))
