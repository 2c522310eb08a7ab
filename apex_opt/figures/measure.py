"""The figures of runs: of one that was made, everything that is told; of many, or of bounds, what is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.figures.metrics import Metrics
from apex_opt.figures.registry import STATISTICS, per_item, per_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.figures.goals import Goal, Objective
    from apex_opt.figures.registry import Figure
    from apex_opt.figures.run import Bools, Floats, Ints, Run

ROUNDING: Final = 1e-12
"""Share by which bounds are lowered: sums of floats taken in another order may differ by less."""


def measure(
    run: Run,
    goals: Sequence[Goal] = (),
    *,
    percentiles: Sequence[str] = (),
    cached_tokens: int = 0,
) -> Metrics:
    """Everything that is told of a run.

    Parameters
    ----------
    run : Run             one run
    goals : what to judge by
    percentiles : statistics to tell beyond `STATISTICS`
    cached_tokens : int   prompt tokens found in the cache

    Returns
    -------
    Metrics
    """
    values = {one.name: one.value(run)[0] for one in per_item() if one.of == "request" or run.gap_ns is not None}
    figures = {one.name: float(one.value(run)[0]) for one in per_run()}
    attainment, met = dict[str, float](), dict[str, bool]()
    makespan_s = float(run.makespan_s[0])
    metrics = Metrics(
        latency_s={name: statistics_of(seen, percentiles) for name, seen in values.items()},
        figures={name: value for name, value in figures.items() if value == value},
        output_tokens_per_s=run.output_tokens / makespan_s,
        total_tokens_per_s=int((run.tokens + run.prompt).sum()) / makespan_s,
        output_tokens=run.output_tokens,
        cached_tokens=cached_tokens,
        cached_share=cached_tokens / int(run.prompt.sum()),
        attainment=attainment,
        slo_met=met,
    )
    for goal in goals:
        if goal.figure.of == "run":
            met[goal.text] = goal.met(goal.reached(metrics))
            attainment[goal.text] = float(met[goal.text])
            continue
        seen = values[goal.metric]
        attainment[goal.text] = float(np.mean(seen <= goal.limit)) if len(seen) else 1.0
        met[goal.text] = goal.met(goal.reached(metrics)) or not len(seen)
    return metrics


def each(run: Run, about: Figure) -> Floats:
    """A figure of every request of one run; NaN of those that have none.

    Returns
    -------
    float64[n]
    """
    values = np.full(run.requests, np.nan)
    values[run.several if about.of_several else slice(None)] = about.value(run)[0]
    return values


def percent(statistic: str) -> float:
    """The percentile that a statistic other than the mean is."""
    return 100.0 if statistic == "max" else float(statistic[1:])


def statistics_of(values: Floats, percentiles: Sequence[str]) -> dict[str, float]:
    """The usual statistics and further percentiles, in rising order; NaN of no values."""
    names = sorted((*STATISTICS[1:-1], *percentiles), key=percent)
    if not len(values):
        return dict.fromkeys(("mean", *names, "max"), float("nan"))
    found = np.percentile(values, [percent(name) for name in names]).tolist()
    return {"mean": float(values.mean()), **dict(zip(names, found, strict=True)), "max": float(values.max())}


def statistic(run: Run, about: Figure, which: str, limit: float = 0.0) -> Floats:
    """A figure of each of some runs, or of what these cannot beat.

    Parameters
    ----------
    run : Run             k of them
    about : Figure
    which : str           of requests and gaps: "mean", "max", a percentile, or "attain": the share within the limit
    limit : float         of "attain"

    Returns
    -------
    float64[k]    NaN where no request has one, or the figure is not known; of nothing all is within the limit
    """
    if about.of == "run":
        return _each_run(about.value(run), run)
    key = about.name, which, limit if which == "attain" else 0.0
    if key not in run.memo:
        counts = run.gaps if about.of == "gap" else None
        run.memo[key] = _over(about.value(run), counts, which, limit)
    known = None if about.time is None else run.least.get(about.time, {}).get(which)
    found: Floats = run.memo[key]
    return _each_run(found if known is None else np.maximum(found, known), run)


def _each_run(values: Floats, run: Run) -> Floats:
    """A value for each run, also where these have their requests in common (`Run.loaded`)."""
    return values if values.shape == run.makespan_s.shape else np.broadcast_to(values, run.makespan_s.shape)


def _over(values: Floats, counts: Ints | None, which: str, limit: float) -> Floats:
    """A statistic of each row, where every value stands for so many."""
    if counts is not None:
        return _weighted(values, counts, which, limit)
    if not values.shape[1]:
        return np.full(len(values), 1.0 if which == "attain" else np.nan)
    if which == "attain":
        return np.asarray((values <= limit).mean(axis=1))
    if which == "mean":
        return np.asarray(values.mean(axis=1))
    return np.asarray(np.percentile(values, percent(which), axis=1))


def _weighted(values: Floats, counts: Ints, which: str, limit: float) -> Floats:
    """A statistic of each row, of percentiles the least that they can be."""
    total = counts.sum(axis=1)
    if not total.any():
        return np.full(len(total), 1.0 if which == "attain" else np.nan)
    if which == "mean":
        return np.asarray((counts * values).sum(axis=1) / total)
    if which == "attain":
        return np.asarray((counts * (values <= limit)).sum(axis=1) / total)
    order = np.argsort(values, axis=1)
    ends = np.cumsum(np.take_along_axis(counts, order, axis=1), axis=1)
    rank = np.floor(percent(which) / 100 * (total - 1))
    place = (ends <= rank[:, None]).sum(axis=1)
    return np.take_along_axis(values, np.take_along_axis(order, place[:, None], axis=1), axis=1)[:, 0]


def least_signed(objective: Objective, floors: Run) -> Floats:
    """Bounds by an objective, signed such that less is better, from what runs cannot beat.

    Of a figure that does not say what it rises or falls with, nothing is known: it never rules anything out. Others are
    lowered by what rounding may have added; the price of GPUs is one product, the same in every run.

    Parameters
    ----------
    objective : Objective
    floors : Run         k of them

    Returns
    -------
    float64[k]    no run costs less; one that no request has counts as nothing
    """
    about = objective.figure
    if not about.bounded:
        return np.full(len(floors.makespan_s), -np.inf)
    value = statistic(floors, about, objective.statistic)
    signed = np.where(np.isnan(value), 0.0, -value if objective.maximise else value)
    return signed if about.exact else signed - ROUNDING * np.abs(signed)


def can_hold(goal: Goal, floors: Run) -> Bools:
    """Whether runs can meet a goal, from what they cannot beat.

    A goal on the edge of what rounding moves is left to the run, and so is one on a figure that nothing is known of, or
    that no request has.

    Parameters
    ----------
    goal : Goal
    floors : Run         k of them

    Returns
    -------
    bool[k]
    """
    if not goal.figure.bounded:
        return np.ones(len(floors.makespan_s), bool)
    value = statistic(floors, goal.figure, goal.statistic, goal.limit)
    if goal.at_most:
        return np.asarray(~(value * (1 - ROUNDING) > goal.threshold))
    return np.asarray(~(value * (1 + ROUNDING) < goal.threshold))
