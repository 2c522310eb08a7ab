"""When a simulation can be cut short: its own requests already prove that a limit is passed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.figures.measure import percent
from apex_opt.figures.registry import figure

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.figures.run import Facts

Metric = Literal["first", "step", "whole", "makespan"]
METRICS: Final = ("first", "step", "whole", "makespan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """A limit whose passing ends the simulation.

    A request counts when it is answered, with its time in whole nanoseconds, rounded down: "first" from its arrival to
    its first token, "step" (last - first) / (tokens - 1) where there is more than one, "whole" and "makespan" from its
    own and from the first arrival to its last token.

    - "sum": times add up to more than `limit_ns`, where a request that is not answered yet counts with its floor
    - "count": at least `most` requests take longer than `limit_ns`

    Both only grow as requests are answered, so the simulation is cut short exactly when the finished one would have
    passed the limit.
    """

    metric: Metric
    kind: Literal["sum", "count"]
    limit_ns: int
    most: int = 1

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UnknownNameError("metric of a stop", str(self.metric)[:60], METRICS)
        if self.kind not in ("sum", "count") or (self.kind == "sum" and self.metric == "makespan"):
            raise UsageError(f"a stop cannot {self.kind} the {self.metric}; makespans are counted, other times either")
        if self.most < 1:
            raise UsageError(f"a stop at {self.most} requests would always fire; count at least 1")

    @classmethod
    def mean_above(cls, metric: Metric, seconds: float, requests: int) -> Stop:
        """The mean over so many requests is above a time; never fires on rounding.

        Parameters
        ----------
        metric : Metric    latency that is limited
        seconds : float    the limit
        requests : int     of the trace
        """
        return cls(metric=metric, kind="sum", limit_ns=_upwards(seconds * requests, requests))

    @classmethod
    def percentile_above(cls, metric: Metric, seconds: float, quantile: float, requests: int) -> Stop:
        """The quantile (linear between order statistics) over so many requests is above a time.

        It lies between the order statistics of rank floor(q (n - 1)) and the next, counted from 0: if all from the
        lower one on are above the time, so is it.

        Parameters
        ----------
        metric : Metric     latency that is limited
        seconds : float     the limit
        quantile : float    from 0 to 1
        requests : int      of the trace
        """
        rank = math.floor(quantile * (requests - 1))
        return cls(metric=metric, kind="count", limit_ns=_upwards(seconds, 1), most=max(1, requests - rank))

    @classmethod
    def attainment_below(cls, metric: Metric, seconds: float, fraction: float, requests: int) -> Stop:
        """Fewer than a fraction of so many requests are within a time.

        Parameters
        ----------
        metric : Metric     latency that is limited
        seconds : float     the limit
        fraction : float    share that must be within, from 0 to 1
        requests : int      of the trace
        """
        most = math.floor(requests * (1 - fraction) * (1 + 1e-12) + 1e-9) + 1
        return cls(metric=metric, kind="count", limit_ns=_upwards(seconds, 1), most=most)

    def passed(self, values_ns: NDArray[np.int64]) -> bool:
        """Whether a finished run with these times passes the limit."""
        if self.kind == "sum":
            return int(values_ns.sum()) > self.limit_ns
        return int((values_ns > self.limit_ns).sum()) >= self.most


def _upwards(seconds: float, terms: int) -> int:
    """Nanoseconds, rounded up beyond what adding up floating-point seconds can lose."""
    return min(math.ceil(min(seconds * 1e9 * (1 + 1e-12), 2.0**62)) + terms, 1 << 62)


def latencies_ns(
    metric: str,
    arrival_ns: NDArray[np.int64],
    first_token_ns: NDArray[np.int64],
    finish_ns: NDArray[np.int64],
    generated: NDArray[np.int64],
) -> NDArray[np.int64]:
    """One time of every request as `Stop` counts it; 0 for the step of a single token.

    Parameters
    ----------
    metric : str                 which latency
    arrival_ns : int64[n]        of each request, in order
    first_token_ns : int64[n]    of each request
    finish_ns : int64[n]         of each request
    generated : int64[n]         tokens of each answer
    """
    if metric == "first":
        return first_token_ns - arrival_ns
    if metric == "step":
        return np.where(generated > 1, (finish_ns - first_token_ns) // np.maximum(generated - 1, 1), 0)
    return finish_ns - (arrival_ns if metric == "whole" else arrival_ns.min())


def early_stops(metric: str, statistic: str, limit: float, facts: Facts, fraction: float | None = None) -> list[Stop]:
    """What a run passes only where a figure is on the wrong side of a limit; none where no such sign is known.

    Parameters
    ----------
    metric, statistic : a figure by its name, and which statistic of it
    limit : float             in the unit of the figure
    facts : Facts             of the plan
    fraction : float or None  share of the requests that must be within the limit, in place of a statistic

    Returns
    -------
    list of Stop    gaps between tokens have none, as a simulation without log does not see single tokens
    """
    about = figure(metric)
    if about.stop is not None:
        makespan_s = about.stop(limit, facts)
        if makespan_s == math.inf:
            return []
        return [Stop.percentile_above("makespan", max(makespan_s - facts.request_s, 0.0), 1.0, facts.requests)]
    requests = facts.decoding if about.of_several else facts.requests
    if about.time is None or about.time == "gap" or not requests:
        return []
    # The simulator does not see the way in and out, which is no part of a step.
    inside_s = limit if about.time == "step" else limit - facts.request_s
    if fraction is not None:
        return [Stop.attainment_below(about.time, inside_s, fraction, requests)]
    if statistic == "mean":
        return [Stop.mean_above(about.time, inside_s, requests)]
    return [Stop.percentile_above(about.time, inside_s, percent(statistic) / 100, requests)]
