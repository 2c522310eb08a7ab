"""A trace that goes on: its requests in their own order, over and over, coming at a rate as they come in the trace.

What a trace of some minutes shows at a high rate is a burst: the requests have all come before the first are answered.
So a rate is judged by a longer trace. Lengths repeat in their order. Arrivals that were drawn from a law are drawn
anew (Poisson and gamma; even ones stay even), those of a trace that tells none are Poisson, recorded ones are looped:
after the last comes the first again, a mean gap later. What prompts say is new in every repetition: of a prompt that
comes again nothing is in a cache, and what requests share they share within a repetition.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.units import NS_PER_S
from apex_opt.workload.columns import MAX_ARRIVAL_NS, MAX_REQUESTS
from apex_opt.workload.generators import describe_trace
from apex_opt.workload.trace import RECORDED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.workload.trace import Trace

LENGTH: Final = 20_000
"""Requests of a trace that a rate is judged by, at least."""

LEAST_LOOPS: Final = 2
"""Times that a trace is repeated for that, at least."""

_STREAM: Final = 0x57EAD
"""Keeps the arrivals drawn here apart from those that a description draws with the same seed."""


def rate_of(trace: Trace) -> float:
    """Requests per second of a trace; 1 where it tells no arrivals.

    Raises
    ------
    UsageError    a closed loop, and requests that all come at once
    """
    if trace.arrivals.kind == "unknown":
        return 1.0
    if trace.rate_per_s is None:
        kind = "is a closed loop" if trace.concurrency is not None else "has all its requests arrive at once"
        raise UsageError(
            f"--trace: {trace.name} {kind}, so there is no rate to change; give one with arrival times, such as "
            "poisson:rate=2,n=500"
        )
    return trace.rate_per_s


def loops_of(trace: Trace, requests: int = LENGTH) -> int:
    """Times that a trace is repeated for so many requests at least."""
    return max(LEAST_LOOPS, -(-requests // len(trace)))


def at_rate(trace: Trace, rate_per_s: float, loops: int, draw: int = 0) -> Trace:
    """The trace repeated, its requests coming at a rate.

    Parameters
    ----------
    rate_per_s : float    requests per second
    loops : int           repetitions
    draw : int            which of many such traces; the rate of the first is exact, that of others as it falls

    Raises
    ------
    UsageError    a trace without rate, more requests or later ones than a trace can hold
    """
    if trace.delay_ns is not None:
        raise UsageError(
            f"--rate: requests of {trace.name:.60} wait for answers (delay_ms), so that they have no rate of their "
            "own; leave it out"
        )
    own = rate_of(trace)
    requests = len(trace) * loops
    if requests > MAX_REQUESTS:
        raise UsageError(
            f"--rate: {trace.name} repeated {loops} times has {requests:,} requests, at most {MAX_REQUESTS:,} can be "
            "used; give a shorter trace"
        )
    order = np.arange(len(trace))
    if trace.arrivals.kind == "recorded":
        order = np.roll(order, -(round(draw * 0.618 * len(trace)) % len(trace)))
        since = (trace.arrival_ns - trace.arrival_ns[0]) * (own / NS_PER_S)  # in mean gaps
        since = np.concatenate([since[order[0] :] - since[order[0]], since[: order[0]] + len(trace) - since[order[0]]])
        gaps: NDArray[np.float64] = (since + np.arange(float(loops))[:, None] * len(trace)).ravel()
    else:
        gaps = _drawn(trace, requests, draw)
        if draw == 0 and requests > 1:
            gaps = gaps * ((requests - 1) / float(gaps[-1]))
    times = np.rint(gaps * (NS_PER_S / rate_per_s))
    if times[-1] > MAX_ARRIVAL_NS:
        raise UsageError(
            f"--rate: at {rate_per_s:g} requests/s the last of {requests:,} would arrive beyond 2**61 ns (73 years); "
            "raise the rate"
        )
    content, starts = _content(trace, order, loops)
    columns = [times.astype(np.int64), np.tile(trace.prompt[order], loops), np.tile(trace.output[order], loops)]
    stated = None if trace.max_new_tokens is None else np.tile(trace.max_new_tokens[order], loops)
    session = None
    if trace.session is not None:  # other conversations in every repetition
        _, codes = np.unique(trace.session, return_inverse=True)
        session = (codes[order] + np.arange(loops)[:, None] * len(trace)).ravel().astype(np.int64)
    priority = None if trace.priority is None else np.tile(trace.priority[order], loops)
    for column in (*columns, stated, content, starts, session, priority):
        if column is not None:
            column.flags.writeable = False
    kind, comma, reason = words(trace).partition(", as ")
    coming = f"{kind} at {rate_per_s:g} requests/s{comma}{reason}"
    return replace(
        trace,
        name=f"{trace.name} at {rate_per_s:g}/s",
        arrival_ns=columns[0],
        prompt=columns[1],
        output=columns[2],
        max_new_tokens=stated,
        content=content,
        content_starts=starts,
        session=session,
        priority=priority,
        source=f"{trace.source}; {loops} times over, {coming}",
        notes=(*trace.notes, f"the trace is taken {loops:,} times over, {coming}"),
        arrivals=RECORDED,
    )


def another(trace: Trace, rate_per_s: float, requests: int, draw: int) -> Trace | None:
    """Requests of the same law, lengths drawn anew as well, none longer than the longest; None where no law is known.

    A plan holds the longest request of the trace, and need hold none that is longer.

    Parameters
    ----------
    trace
    rate_per_s : float    requests per second
    requests : int        of the new trace
    draw : int            number of the draw
    """
    law, seed = trace.arrivals.law, trace.arrivals.seed
    if law is None:
        return None
    (number,) = np.random.SeedSequence([_STREAM, seed, draw]).generate_state(1)
    changed = {"rate": f"{rate_per_s:.12g}", "n": str(min(requests, MAX_REQUESTS)), "seed": str(int(number))}
    found = describe_trace(law, changed=changed)
    found = found.picked(np.flatnonzero(found.prompt <= trace.prompt.max()))
    output = np.maximum(np.minimum(found.output, trace.longest - found.prompt), 1)
    stated = None
    if found.max_new_tokens is not None and trace.max_new_tokens is not None:
        longest = int((trace.prompt + trace.max_new_tokens).max())
        stated = np.maximum(np.minimum(found.max_new_tokens, longest - found.prompt), output)
        stated.flags.writeable = False
    output.flags.writeable = False
    return replace(found, output=output, max_new_tokens=stated)


def words(trace: Trace) -> str:
    """How the requests of such a trace come, for people."""
    kinds = {
        "recorded": "recorded arrivals looped",
        "poisson": "fresh Poisson arrivals",
        "gamma": f"fresh gamma arrivals, cv {trace.arrivals.cv:g}",
        "uniform": "even arrivals",
        "unknown": "Poisson arrivals, as the trace tells none",
    }
    return kinds[trace.arrivals.kind]


def _drawn(trace: Trace, requests: int, draw: int) -> NDArray[np.float64]:
    """Arrivals by law, in mean gaps, the first at 0."""
    arrivals = trace.arrivals
    if arrivals.kind == "uniform":
        return np.arange(requests, dtype=np.float64)
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_STREAM, arrivals.seed, draw])))
    if arrivals.kind == "gamma":
        gaps = rng.standard_gamma(arrivals.cv**-2, requests) * arrivals.cv**2
    else:
        gaps = rng.standard_exponential(requests)
    gaps[0] = 0.0
    return np.cumsum(gaps)


def _content(
    trace: Trace, order: NDArray[np.int64], loops: int
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64] | None]:
    """Content ids, other ones in every repetition."""
    if trace.content is None or trace.content_starts is None:
        return None, None
    _, ids = np.unique(trace.content, return_inverse=True)
    counts = np.diff(trace.content_starts)[order]
    starts = np.concatenate(([0], np.cumsum(counts)))
    ids = ids[np.arange(starts[-1]) + np.repeat(trace.content_starts[order] - starts[:-1], counts)]
    known = int(ids.max()) + 1
    content = (ids + np.arange(loops)[:, None] * known).ravel().astype(np.int64)
    return content, np.concatenate(([0], np.cumsum(np.tile(counts, loops))))
