"""A lower bound on the mean time of requests that grows with their rate: how large batches must be to keep up.

A large batch serves more tokens a second than a small one, but every sequence in it waits for all of it. Requests that
come at a rate force batches to be large, and so each of their tokens to take longer than it would alone.

Why it is admissible. Let a batch of n tokens take t(n) or more in all, over the stages that it passes. Every sequence
in it is there for t(n). Its own share of that, t(n) / n for each of its tokens, adds up to what the batch takes of the
stages. Up to the last arrival, at H, the S stages of r replicas are busy for r S H at most. So with any price L
of the time of a stage

    sum of the times of all requests  >=  sum over requests of (time there + L x shares up to H)  -  L r S H.

A later token whose batch ends by H adds t(n) + L t(n) / n to the former, whatever n is no less than

    m(L) = min over n of (1 + L / n) t(n),

a prompt the least that a request takes up to its first token when alone (`isolated`), and L times its work (`load`).
Both hold together, as one is of time and the other one of shares. If all of a request is done by H that makes

    first + L x work of the prompt + later tokens x m(L).

If not, it is there from its arrival to H, a time D, and then once more for the least time of a batch, f, for each
token but the one whose batch was under way at H. What is done by H takes no less than D or its sum as above, so with k
of G later tokens left, k >= 1, it is there for max(D, first + L x work + (G - k) m) + (k - 1) f or more, and for
D + G f where the first token comes after H. As f <= m, both are no less than

    D (1 - f / m) + (G - 1) f + (f / m) min(D, first + L x work).

No request takes less than alone either. Of these three each has the least of the first two, or the last where that is
more. All of that holds for any L: the L that would serve if requests came for ever is a good one.

Little's law says the same of the best L: it is that of the batches that are just large enough to serve as many tokens
as come. Where batches of n tokens are the only ones to mix with others, their size is that mean.

Attention to what a sequence holds adds to its time and to its share alike. Of ranks that run in step a forward takes
what its slowest rank takes, with an even share of the tokens or more, and what all do together: attention of one rank
hides behind the tokens of another and is left out. Ranks each on its own are stages of their own.

Where batches of a sequence may overtake each other (`bounds.may_preempt`), all of this holds of a replica on which
nobody is ever preempted. On any other there was a moment at which so many requests were there that they may fill its KV
cache, m or more, each since its arrival. The times of these alone add up to no less than W, the least that m requests
one after the other on that replica are apart from the last of them in all. Of its requests, at most N, let each count
for no more than W / N: then neither kind of replica takes less than its requests count for, less L S H. Only routers
that deal in turn say who is on which replica; of others W is that of any m requests of the trace, shared by all.

Where drafts are verified, where both phases share a GPU, where forwards are split in two, and where arrivals depend on
the run nothing is said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from apex_opt.cost.least import SIZES
from apex_opt.search.bounds.isolated import chunked, found_prompts
from apex_opt.search.bounds.load import works_ns
from apex_opt.search.ledger import ROUNDING
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.cost.least import Least
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.search.bounds.isolated import StageFloor
    from apex_opt.workload.trace import Trace

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

PRICES: Final = np.geomspace(0.25, 4096, 57)
"""Of a second of a stage in seconds of requests, in rising order."""
_MOST: Final = np.append(SIZES[1:] - 1, np.inf)
_ROUNDED: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """What batches of a plan take by their sizes.

    Parameters
    ----------
    decode_ns, mixed_ns : float64[sizes]    of batches of so many tokens (`SIZES`) or more, over all stages
    prompt_ns : float                       beside that of a batch with a prompt, whatever its size
    count : int                             schedulers that tokens are counted for each of
    in_step : bool                          whether all of these run a batch together
    """

    decode_ns: Floats
    mixed_ns: Floats
    prompt_ns: float = 0.0
    count: int = 1
    in_step: bool = False

    @classmethod
    def of(cls, least: Least, stages: int, *, count: int, in_step: bool) -> Self:
        """Of what the stages of a plan take at least together, whose tables are rounded to nanoseconds.

        Parameters
        ----------
        least : Least
        stages : int
        count : int         schedulers of a replica
        in_step : bool      whether they run a batch together
        """
        decode, mixed = (np.maximum(by * NS_PER_S - _ROUNDED * stages, 0.0) for by in (least.decode_by, least.mixed_by))
        # A rank beside one with a prompt may have none.
        prompt = least.chunk + least.sequence + least.attend if count == 1 else 0.0
        return cls(decode_ns=decode, mixed_ns=mixed, prompt_ns=prompt * NS_PER_S, count=count, in_step=in_step)

    def token_ns(self, prices: Floats) -> Floats:
        """The least that a token takes of the time of its request and, at each of some prices, of the stages."""
        shares = 1 + prices[:, None] / (self.count * _MOST)
        return np.asarray(np.minimum(shares * self.decode_ns, shares * self.mixed_ns + self.prompt_ns).min(axis=1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """What each request takes for certain at some prices of the time of a stage.

    Parameters
    ----------
    prices : float64[prices]      that serve best on some numbers of replicas
    times : float64[n] of each    nanoseconds, of the stages' time included
    whole : float64[n]            nanoseconds that a request takes if nothing is paid for the stages
    stages_s : float              that the stages of a replica can work until the last request comes
    """

    prices: Floats
    times: tuple[Floats, ...]
    whole: Floats
    stages_s: float

    @classmethod
    def of(
        cls,
        settings: EngineSettings,
        batches: Batches,
        mean: StageFloor,
        stages: int,
        trace: Trace,
        alone_ns: tuple[Ints, Ints],
        replicas: Ints,
    ) -> Self:
        """Of a trace on some numbers of replicas.

        Parameters
        ----------
        settings : EngineSettings
        batches : Batches
        mean : StageFloor               mean floor of the stages
        stages : int                    of the pipeline
        trace : Trace
        alone_ns : two of int64[n]      what no request can beat until its first token, and from there on, if nobody is
                                        preempted in a pipeline
        replicas : int64[k]
        """
        first, rest = (part.astype(np.float64) for part in alone_ns)
        later = (trace.generated(settings.max_model_len) - 1).astype(np.float64)
        prompt, read = _shares(settings, batches, mean, trace)
        prompt, read = prompt * stages, read * stages
        batch = float(stages * mean.batch_ns)
        apart = first + (later * batch if batches.in_step else rest)  # of ranks in step attention hides
        since = trace.arrival_ns - int(trace.arrival_ns.min())
        until = (int(since.max()) - since).astype(np.float64)
        # The price that would serve best if all requests came long before the last.
        worth = batches.token_ns(PRICES)
        gains = later.sum() * worth + PRICES * float((prompt + read).sum())
        free = PRICES * stages * float(since.max())
        best = np.unique(np.argmax(gains[:, None] - free[:, None] * replicas, axis=0))
        whole, shares = first + rest, prompt + read
        times = []
        for price, token in zip(PRICES[best].tolist(), worth[best].tolist(), strict=True):
            share = min(1.0, batch / token) if token else 1.0
            begun = first + price * prompt
            done = apart + price * shares + later * (token - batch)
            cut = until * (1 - share) + (later - 1) * batch + share * np.minimum(until, begun)
            times.append(np.maximum(np.minimum(done, cut), whole))
        stages_s = stages * float(since.max()) / NS_PER_S
        return cls(prices=PRICES[best], times=tuple(times), whole=whole, stages_s=stages_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowding:
    """Bounds of the mean time of requests: each some seconds, less some for every replica.

    Parameters
    ----------
    least_s : float64[prices, 1 or numbers of replicas]    the same for all numbers of replicas where there is one
    replica_s : float64[prices]
    """

    least_s: Floats
    replica_s: Floats

    @classmethod
    def of(cls, crowd: Crowd, caps_ns: Floats | None = None) -> Self:
        """Of what requests take.

        Parameters
        ----------
        crowd : Crowd
        caps_ns : float64[k], optional  most that a request counts for on the numbers of replicas, where somebody may be
                                        preempted (`shared_ns`)
        """
        if caps_ns is None:
            paid, means = crowd.prices, np.array([[float(times.mean())] for times in crowd.times])
        else:
            # What is so even if nothing is paid for the stages is told by others unless requests count for less.
            paid = np.append(0.0, crowd.prices)
            means = np.array([_capped_means(times, caps_ns) for times in (crowd.whole, *crowd.times)])
        return cls(least_s=means / NS_PER_S, replica_s=paid * (crowd.stages_s / len(crowd.whole)))

    def mean_s(self, replicas: Ints) -> Floats:
        """Seconds that the mean time of a request within the engine cannot be below on some numbers of replicas."""
        return np.asarray((self.least_s - self.replica_s[:, None] * replicas).max(axis=0))


def _shares(settings: EngineSettings, batches: Batches, mean: StageFloor, trace: Trace) -> tuple[Floats, Floats]:
    """Nanoseconds of the mean stage that each prompt takes of it, and attention to what later tokens hold."""
    if batches.in_step:
        computed = trace.prompt - found_prompts(settings, trace)
        return np.maximum(np.floor(computed * mean.token_ns) - chunked(computed), 0), np.zeros(len(trace))
    later = trace.generated(settings.max_model_len) - 1
    first, whole = works_ns(settings, mean, trace)
    return first, whole - np.floor(later * mean.decode_token_ns)


def _capped_means(times: Floats, caps: Floats) -> Floats:
    """The mean of some times, of each no more than a cap, for every cap."""
    rising = np.sort(times)
    caps = np.minimum(caps, rising[-1])
    below = np.searchsorted(rising, caps)
    sums = np.append(0.0, np.cumsum(rising))[below] + (len(times) - below) * caps
    return np.asarray(sums * (1 - ROUNDING) / len(times))


def shared_ns(trace: Trace, filling: int, replicas: int, *, dealt: bool) -> float:
    """What each request of a replica on which somebody was preempted counts for at least; infinite where nobody can be.

    Parameters
    ----------
    trace
    filling : int     fewest requests that may fill the KV cache (`fewest_to_fill`)
    replicas : int
    dealt : bool      whether the router deals in turn
    """
    apart = replicas if dealt else 1
    return least_waited_ns(trace, filling, apart) / -(-len(trace) // apart)


@lru_cache(maxsize=1 << 12)
def least_waited_ns(trace: Trace, requests: int, apart: int) -> float:
    """The least that so many requests, each so many places behind the one before it, wait in all for the last of them.

    Parameters
    ----------
    trace
    requests, apart : int
    """
    before = requests - 1
    if before * apart >= len(trace):
        return math.inf
    since = trace.arrival_ns - int(trace.arrival_ns.min())
    rows = np.zeros((-(-len(since) // apart) + 1) * apart, np.int64)
    rows[apart : apart + len(since)] = since
    sums = rows.reshape(-1, apart).cumsum(axis=0).ravel()  # of all at such places up to the one before
    last = np.arange(before * apart, len(since))
    return float((before * since[last] - sums[last] + sums[last - before * apart]).min())
