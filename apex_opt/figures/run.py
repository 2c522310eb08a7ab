"""`Run`: what figures are functions of, whether it was measured, simulated, or is what no run can beat."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

Time = Literal["first", "step", "whole", "gap"]
"""Times that runs are made of: of a request until its first token, from one token to the next in its mean, and in all;
between two tokens."""

Quantity = Literal["latency", "makespan", "energy", "price"]
"""What figures rise or fall with: the times of requests and the gaps between their tokens, all together; the makespan;
the joules; the $ per hour."""


class Limit(Protocol):
    """What every request must keep to in order to be good."""

    def late(self, run: Run) -> Bools:
        """bool[k, n], which requests of each run do not."""
        ...


NO_LEAST: Final[Mapping[Time, Mapping[str, Floats]]] = {}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """k runs of the same n requests, or what none of k runs can beat.

    Of what no run can beat, every time, the makespan, the energy and the price are as small as could be, each on its
    own.

    Parameters
    ----------
    arrival_ns : int64[n] or [k, n]          since any moment that is the same for all requests of a run
    first_ns, rest_ns, whole_ns : int64[k, n]
        of each request from its arrival to its first token, from there to its last, and from its arrival to its last,
        without what it takes outside the engine; the least whole time may be more than the least of its two parts
    prompt, tokens : int64[n]                tokens of each prompt, and tokens generated
    outside_ns : int                         time of a request outside the engine
    makespan_s : float64[k]                  from the first arrival to the last token, time outside the engine included
    gap_ns : int64[k, m] or None             times between consecutive tokens, where known
    gaps : int64[k, m] or None               gaps that each of these stands for; None: one
    joules, cost_per_h : float64[k] or None energy, and $ per hour of the GPUs, where known
    limits : tuple of Limit                  what every request must keep to in order to be good
    least : mapping of `Time` to mapping of statistic to float64[k]
        seconds that a statistic cannot be below, where more is known than what follows from each request on its own
    """

    arrival_ns: Ints
    first_ns: Ints
    rest_ns: Ints
    whole_ns: Ints
    prompt: Ints
    tokens: Ints
    outside_ns: int = 0
    makespan_s: Floats
    gap_ns: Ints | None = None
    gaps: Ints | None = None
    joules: Floats | None = None
    cost_per_h: Floats | None = None
    limits: tuple[Limit, ...] = ()
    least: Mapping[Time, Mapping[str, Floats]] = field(default_factory=lambda: NO_LEAST)
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)
    """What was worked out from the times of the requests."""

    @classmethod
    def of(
        cls,
        *,
        arrival_ns: Ints,
        first_ns: Ints,
        rest_ns: Ints,
        prompt: Ints,
        tokens: Ints,
        whole_ns: Ints | None = None,
        outside_ns: int = 0,
        work_s: Floats | float = 0.0,
        **known: Any,
    ) -> Self:
        """Runs whose makespans end with their last requests.

        Parameters
        ----------
        arrival_ns, first_ns, rest_ns, prompt, tokens, outside_ns : as the fields
        whole_ns : int64[k, n] or None      None: the first and the rest
        work_s : float64[k]                 the least that all requests take together from the first arrival on
        known : further fields

        Returns
        -------
        Run
        """
        whole_ns = first_ns + rest_ns if whole_ns is None else whole_ns
        ends_ns = (arrival_ns + whole_ns).max(axis=-1) - arrival_ns.min(axis=-1)
        ends_s = np.maximum(ends_ns + outside_ns, 1) / NS_PER_S
        return cls(
            arrival_ns=arrival_ns,
            first_ns=first_ns,
            rest_ns=rest_ns,
            whole_ns=whole_ns,
            prompt=prompt,
            tokens=tokens,
            outside_ns=outside_ns,
            makespan_s=np.maximum(ends_s, work_s + outside_ns / NS_PER_S),
            **known,
        )

    def loaded(self, makespan_s: Floats, least: Mapping[Time, Mapping[str, Floats]] = NO_LEAST) -> Self:
        """The same requests, with what is known of all of them together; k may be another where it was one."""
        return self._sharing(replace(self, makespan_s=makespan_s, least=least))

    def costing(self, joules: Floats | None, cost_per_h: Floats | None) -> Self:
        """The same requests, with the energy and the price of serving them."""
        return self._sharing(replace(self, joules=joules, cost_per_h=cost_per_h))

    def _sharing(self, other: Self) -> Self:
        object.__setattr__(other, "memo", self.memo)
        return other

    @property
    def requests(self) -> int:
        return len(self.tokens)

    @property
    def output_tokens(self) -> int:
        """Tokens generated in each of the runs."""
        return int(self.tokens.sum())

    @property
    def several(self) -> Bools:
        """Which requests have more than one token, and so times between them."""
        return self.tokens > 1

    @property
    def first_s(self) -> Floats:
        """Seconds from the arrival of each request to its first token."""
        return np.asarray((self.first_ns + self.outside_ns) / NS_PER_S)

    @property
    def step_s(self) -> Floats:
        """Mean seconds from one token to the next, of the `several`."""
        several = self.several
        return np.asarray(self.rest_ns[:, several] / (self.tokens[several] - 1) / NS_PER_S)

    @property
    def whole_s(self) -> Floats:
        """Seconds from the arrival of each request to its last token."""
        return np.asarray((self.whole_ns + self.outside_ns) / NS_PER_S)

    @property
    def gap_s(self) -> Floats:
        """Seconds between consecutive tokens; none where they are not known."""
        return np.zeros((len(self.first_ns), 0)) if self.gap_ns is None else np.asarray(self.gap_ns / NS_PER_S)

    @property
    def energy_j(self) -> Floats:
        """Joules; NaN where they are not known."""
        return np.full(len(self.makespan_s), np.nan) if self.joules is None else self.joules

    @property
    def price(self) -> Floats:
        """$ per hour; NaN where they are not known."""
        return np.full(len(self.makespan_s), np.nan) if self.cost_per_h is None else self.cost_per_h

    @property
    def good(self) -> Floats:
        """Requests of each run whose own figures are all within the `limits`; NaN where there are none.

        A figure that a request does not have binds nothing.
        """
        if not self.limits:
            return np.full(len(self.first_ns), np.nan)
        if "good" not in self.memo:
            late = np.logical_or.reduce([limit.late(self) for limit in self.limits])
            self.memo["good"] = (~late).sum(axis=1).astype(np.float64)
        return np.asarray(self.memo["good"])

    def spread(self, of_several: Bools) -> Bools:
        """What is true of the `several`, and of no other request."""
        found = np.zeros(self.first_ns.shape, bool)
        found[:, self.several] = of_several
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a plan before it runs.

    Parameters
    ----------
    requests, decoding : int        requests, and those with a time per output token
    output_tokens : int             tokens the requests generate
    request_s : float               time of a request outside the simulation
    least_j : float                 energy above the idle draw that no run can do without
    idle_w, limit_w : float         least and most draw of all its GPUs
    cost_per_h : float or None     $ per hour of them
    """

    requests: int
    decoding: int
    output_tokens: int
    request_s: float
    least_j: float
    idle_w: float
    limit_w: float
    cost_per_h: float | None
