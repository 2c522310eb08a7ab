"""Requests that wait for the last answer of their session: when they come depends on the run.

When each comes is found by serving the trace again and again, each time with the arrivals that follow from the answers
of the time before, until these do not change. Whatever happens up to a moment depends on arrivals up to it alone, so
each time the first arrival that is not right yet becomes so, and there is one run only in which all are: it is that of
an engine that answers as it goes. Nothing is asked of engines and routers, which serve arrivals that are given.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.simulator.outcome import GroupLog, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from apex_opt.workload.trace import Trace

    Ints = NDArray[np.int64]

Served = TypeVar("Served", bound=Outcome)

MOST_ROUNDS: Final = 20_000
"""Times that a trace is served at most."""


def after_answers(trace: Trace, max_model_len: int, serve: Callable[[Trace, Ints], Served]) -> Served:
    """What comes of a trace in which requests wait for answers, in its own order.

    Parameters
    ----------
    trace : Trace           with delays
    max_model_len : int     tokens that a request may have
    serve : callable        serves a trace in which none waits, given with the row of each request in the first one

    Raises
    ------
    UsageError    arrivals that do not come to rest
    """
    assert trace.delay_ns is not None
    waits, before, arrival = np.flatnonzero(trace.delay_ns >= 0), trace.before, trace.arrival_ns
    for _ in range(MOST_ROUNDS):
        coming, order = trace.arriving(arrival)
        outcome = serve(coming, order)
        finish = np.empty_like(arrival)
        finish[order] = outcome.finish_ns
        found = trace.arrival_ns.copy()
        found[waits] = finish[before[waits]] + trace.delay_ns[waits]
        if (found == arrival).all():
            return told(outcome, order, coming.generated(max_model_len))
        arrival = found
    raise UsageError(
        f"trace {trace.name:.60}: when its {len(waits):,} requests that wait for answers come is not known after "
        f"serving it {MOST_ROUNDS:,} times; give a shorter trace or longer delays"
    )


def told(outcome: Served, order: Ints, generated: Ints) -> Served:
    """An outcome with its requests in another order.

    Parameters
    ----------
    outcome
    order : int64[n]        the place of each of its requests in that order
    generated : int64[n]    tokens of each of its requests
    """
    n, changed = len(order), dict[str, Any]()
    for field in fields(outcome):
        value = getattr(outcome, field.name)
        if isinstance(value, np.ndarray) and field.name != "gaps_ns" and field.name in _OF_REQUESTS:
            changed[field.name] = np.empty_like(value)
            changed[field.name][order] = value
    names = order.tolist()
    if outcome.steps is not None:
        changed["steps"] = [
            (start, end, [(names[i], tokens, after) for i, tokens, after in rows], sorted(names[i] for i in lost))
            for start, end, rows, lost in outcome.steps
        ]
    if outcome.gaps_ns is not None:
        parts = np.split(outcome.gaps_ns, np.cumsum(generated - 1)[:-1])
        places = np.empty(n, np.int64)
        places[order] = np.arange(n)
        changed["gaps_ns"] = np.concatenate([parts[place] for place in places.tolist()])
    changed["moved"] = tuple((names[i], *others) for i, *others in outcome.moved)
    changed["groups"] = tuple(_ranked(log, names) for log in outcome.groups)
    return replace(outcome, **changed)


def _ranked(log: GroupLog, names: list[int]) -> GroupLog:
    return replace(log, rank={names[i]: rank for i, rank in log.rank.items()})


_OF_REQUESTS: Final = (
    "arrival_ns",
    "first_token_ns",
    "finish_ns",
    "prefill",
    "decode",
    "prefilled_ns",
    "forwarded_ns",
    "read_ns",
    "read_blocks",
)
"""Fields of outcomes that have a value for each request."""
