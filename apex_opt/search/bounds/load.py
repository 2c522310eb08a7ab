"""Lower bounds that grow with the load: what all requests together take of the replicas there are.

Why they are admissible. A batch takes at least the sum of what its tokens take at the least share of any batch; the
mean stage of a pipeline is busy for its mean share of that, and works on one batch at a time. So requests whose work is
w take one replica at least their sum, r replicas an r-th of it, and whichever k of the requests are the first to be
done, they are done no sooner than the k smallest works would be from the first arrival on. Where drafts are verified a
batch computes no fewer tokens of a request than it brings it.

The KV cache is such a limit, too. While a batch with one of its tokens is under way a sequence holds the blocks of its
prompt, and with more blocks than there are it does not run: blocks held, times the least time of a batch, summed over
the tokens, is at most the blocks there are times the time it all takes. In a pipeline a token is under way on all
stages in turn; where batches of one sequence may overtake each other (`bounds.may_preempt`), on one of them at least.

A request that is the k-th to be done, of n, waited since the last arrival at least.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import numpy as np

from apex_opt.figures.measure import percent
from apex_opt.search.bounds.isolated import chunked, found_prompts, later_batches
from apex_opt.search.bounds.phases import WHOLE
from apex_opt.simulator.law import RATE_BITS
from apex_opt.simulator.phases import SCALE
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.run import Time
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.search.bounds.isolated import StageFloor
    from apex_opt.search.bounds.phases import Side
    from apex_opt.simulator.law import Window
    from apex_opt.workload.trace import Trace


def replicas_with_room(settings: EngineSettings, mean: StageFloor, stages: int, trace: Trace, blocks: int) -> float:
    """Replicas from which on a load adds nothing to what requests take alone, known without ordering the requests.

    All of the work is then done by the last arrival, and half of it by the mean one: ends of works in rising order lie
    no later on average than if all works were the same.

    Parameters
    ----------
    settings
    mean : StageFloor    what a stage takes on average
    stages : int         of the pipeline
    trace
    blocks : int         KV blocks of a replica
    """
    prompts, pairs, later, steps, context, held = _sums(settings, trace)
    rates = 1 / (1 << RATE_BITS)
    work = prompts * mean.token_ns + pairs * mean.pair_rate * rates
    work += later * mean.decode_token_ns + context * mean.later_rate(settings.scheduler.drafts_at_once) * rates
    for window, context_rate, pair_rate in mean.seen:
        read, computed = _seen_sums(settings, trace, window)
        work += (read * context_rate + computed * pair_rate) * rates
    slots = stages * mean.batch_ns * max(held / max(blocks, 1), steps / settings.seats(stages))
    total_s = max(work, slots) / NS_PER_S
    mean_arrival, last_arrival = _arrivals_s(trace)
    free_s = min(last_arrival, 2 * mean_arrival * len(trace) / (len(trace) + 1))
    return total_s / free_s if free_s else math.inf


@lru_cache(maxsize=8)
def _sums(settings: EngineSettings, trace: Trace) -> tuple[float, float, float, float, float, float]:
    """Over all requests: prompt tokens, query-key pairs, later tokens, their batches, context, and the blocks held."""
    prompt, found = trace.prompt, found_prompts(settings, trace)
    prompts, pairs = prompt - found, prompt * (prompt + 1) // 2 - found * (found + 1) // 2
    later = trace.generated(settings.max_model_len) - 1
    steps = later_batches(settings, later + 1)
    context = steps * trace.prompt + steps * (steps + 1) // 2
    held = steps * settings.least_blocks(trace.prompt)
    columns = prompts, pairs, later, steps, context, held
    return tuple(float(column.sum()) for column in columns)  # type: ignore[return-value]


@lru_cache(maxsize=32)
def _seen_sums(settings: EngineSettings, trace: Trace, window: Window) -> tuple[float, float]:
    """Over all requests: context and query-key pairs within a window."""
    steps = later_batches(settings, trace.generated(settings.max_model_len))
    prompt, found = trace.prompt, found_prompts(settings, trace)
    read = window.all_pairs(prompt + steps) - window.all_pairs(prompt)
    return float(read.sum()), float((window.all_pairs(prompt) - window.all_pairs(found)).sum())


def works_ns(
    settings: EngineSettings, mean: StageFloor, trace: Trace
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each request takes of the mean stage at least, for its prompt and for its later tokens.

    Parameters
    ----------
    mean : StageFloor    mean floor of the stages

    Returns
    -------
    float64[requests], float64[requests]    nanoseconds
    """
    prompt, found = trace.prompt, found_prompts(settings, trace)
    prompts = prompt - found
    tokens = trace.generated(settings.max_model_len) - 1
    steps = later_batches(settings, tokens + 1)
    first = np.maximum(np.floor(prompts * mean.token_ns) + mean.pairs_ns(prompt, found) - chunked(prompts), 0)
    rounded = steps if settings.speculation is None else 2 * steps
    context_ns = mean.context_ns(prompt, steps, drafting=settings.scheduler.drafts_at_once)
    later = np.floor(tokens * mean.decode_token_ns) + np.maximum(context_ns - rounded, 0)
    return first, later


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Seconds from the first arrival that one replica would need at least, divided by replicas where there are more.

    Parameters
    ----------
    total_s : float                          for all requests
    first_s, whole_s : mapping of statistic to seconds
        until so many requests have their first token, or are done; of the mean, the mean over the requests
    mean_arrival_s, last_arrival_s : float   since the first arrival
    """

    total_s: float
    first_s: Mapping[str, float]
    whole_s: Mapping[str, float]
    mean_arrival_s: float
    last_arrival_s: float

    @classmethod
    def of(
        cls,
        settings: EngineSettings,
        mean: StageFloor,
        stages: int,
        trace: Trace,
        blocks: int,
        statistics: Sequence[str],
        *,
        overtaking: bool = False,
        side: Side = WHOLE,
    ) -> Self:
        """The load of a trace on one replica.

        Parameters
        ----------
        mean : StageFloor          mean floor of the stages
        blocks : int               most KV blocks that sequences can hold together
        statistics : "mean", "max" and percentiles, for which bounds are wanted
        overtaking : bool          whether batches of one sequence may overtake each other in a pipeline
        side : Side                how phases share a GPU
        """
        first, later = works_ns(settings, mean, trace)
        steps = later_batches(settings, trace.generated(settings.max_model_len))
        whole = np.max([np.cumsum(np.sort(u * first + v * later)) for u, v in side.weights], axis=0)
        under_way_ns = mean.batch_ns * (1 if overtaking else stages) * (side.later / SCALE)
        if not settings.prefix_caching:  # blocks that prompts share are held once
            held = settings.least_blocks(trace.prompt)
            whole = np.maximum(whole, np.cumsum(np.sort(steps * held)) * (under_way_ns / max(blocks, 1)))
        whole = np.maximum(whole, np.cumsum(np.sort(steps)) * (under_way_ns / settings.seats(stages)))
        arrival, last = _arrivals_s(trace)
        return cls(
            total_s=float(whole[-1]) / NS_PER_S,
            first_s=_by_statistic(np.cumsum(np.sort(first)) * (side.first / SCALE), statistics),
            whole_s=_by_statistic(whole, statistics),
            mean_arrival_s=arrival,
            last_arrival_s=last,
        )

    def least_s(self, replicas: NDArray[np.int64], outside_s: float) -> dict[Time, dict[str, NDArray[np.float64]]]:
        """Seconds that statistics of the times of requests cannot be below on some numbers of replicas.

        Of arrivals that do not depend on the run: in a closed loop only what all take together is known.

        Parameters
        ----------
        replicas : int64[k]
        outside_s : float       time of a request outside the engine

        Returns
        -------
        mapping of `Time` to mapping of statistic to float64[k]
        """
        ends: tuple[tuple[Time, Mapping[str, float]], ...] = (("first", self.first_s), ("whole", self.whole_s))
        return {
            time: {
                statistic: end / replicas
                - (self.mean_arrival_s if statistic == "mean" else self.last_arrival_s)
                + outside_s
                for statistic, end in seconds.items()
            }
            for time, seconds in ends
        }


def _by_statistic(ends_ns: NDArray[np.float64], statistics: Sequence[str]) -> dict[str, float]:
    """Of the earliest ends in order, their mean, or the one that a percentile is no less than."""
    found = {}
    for statistic in statistics:
        if statistic == "mean":
            found[statistic] = float(ends_ns.mean()) / NS_PER_S
        else:
            share = 1.0 if statistic == "max" else percent(statistic) / 100
            found[statistic] = float(ends_ns[math.floor(share * (len(ends_ns) - 1))]) / NS_PER_S
    return found


@lru_cache(maxsize=8)
def _arrivals_s(trace: Trace) -> tuple[float, float]:
    """Mean and last arrival, in seconds since the first."""
    since = (trace.arrival_ns - trace.arrival_ns.min()) / NS_PER_S
    return float(since.mean()), float(since.max())
