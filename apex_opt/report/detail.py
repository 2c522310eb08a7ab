"""What is told of a deployment where a report is asked for: every request of its run, its load over time, its GPUs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.figures.measure import each
from apex_opt.figures.registry import per_item
from apex_opt.plans.engine import schedulers
from apex_opt.report.timeline import load
from apex_opt.simulator.outcome import DisaggregatedOutcome
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from apex_opt.plans.deployment import Pool
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.report.types import Launch, Replica
    from apex_opt.search import Scored, Scorer
    from apex_opt.simulator.outcome import Outcome, Step

MOMENTS: Final = 300
"""Points in time at which loads are told."""
MOST_TOKENS: Final = 3_000_000
"""Output tokens of the longest run whose batches are all kept: a gigabyte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLoad:
    """What the replicas of a pool have to do over time.

    Parameters
    ----------
    name : str                        of the pool
    time_s : float64[moments]         from the first arrival on
    waiting, running : float64[moments]    sequences of all its replicas
    kv_mean, kv_most : float64[moments]    share of the KV blocks in use, over replicas and of the fullest
    """

    name: str
    time_s: NDArray[np.float64]
    waiting: NDArray[np.float64]
    running: NDArray[np.float64]
    kv_mean: NDArray[np.float64]
    kv_most: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoint:
    """A deployment at a rate.

    Parameters
    ----------
    rate_per_s : float    requests per second
    met : bool            whether all goals are
    figures : by name, all in the same unit
    unit : str            theirs
    """

    rate_per_s: float
    met: bool
    figures: Mapping[str, float | None]
    unit: str = "s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """A deployment and its run.

    Parameters
    ----------
    plan : str                       its text
    pools : tuple of str             its pools by their roles, if they have some, and plans
    latencies : of each figure of requests by its key, float64[requests], in its unit; not a number where undefined
    loads : of each of its pools; none where the run is too long to keep its batches
    replicas : the GPUs of each of its pools, where they were looked for
    curve : what requests see at other rates, where rates were asked for
    launch : what starts it; None where its engine has no words for it
    no_launch : str                  why not
    """

    plan: str
    pools: tuple[str, ...]
    latencies: dict[str, NDArray[np.float64]]
    loads: tuple[PoolLoad, ...]
    replicas: tuple[tuple[Replica, ...], ...] = ()
    curve: tuple[RatePoint, ...] = ()
    launch: Launch | None = None
    no_launch: str = ""


def run_detail(scorer: Scorer, scored: Scored, **known: Any) -> Detail:
    """A deployment simulated again, with what becomes of every request and batch.

    Parameters
    ----------
    scorer, scored
    known : what else is known of it: replicas, launch
    """
    trace = scorer.problem.trace
    kept = int(trace.output.sum()) <= MOST_TOKENS
    outcome = scorer.run(scored.deployment, log=kept)
    assert outcome is not None  # nothing to cut it short
    run = scorer.as_run(outcome)
    found = {figure.key: each(run, figure) for figure in per_item() if figure.of == "request"}
    return Detail(
        plan=scored.text,
        pools=tuple(_name(pool) for pool in scored.deployment.pools),
        latencies={key: np.asarray(values, np.float64).ravel() for key, values in found.items()},
        loads=tuple(_loads(scorer, scored, outcome)) if kept else (),
        **known,
    )


def _loads(scorer: Scorer, scored: Scored, outcome: Outcome) -> Iterator[PoolLoad]:
    """The load of each pool; replicas and their ranks are in the order of the pools."""
    every, owners = list(_schedulers(outcome)), 0
    moments = np.linspace(outcome.arrival_ns.min(), outcome.finish_ns.max(), MOMENTS)
    for place, pool in enumerate(scored.deployment.pools):
        facts = scorer.facts_of(pool)
        settings, blocks = facts.problem.settings_for(pool.plan), facts.own_blocks(pool.plan)
        mine = every[owners : owners + pool.plan.replicas * schedulers(settings, pool.plan)]
        owners += len(mine)
        begin, end = outcome.arrival_ns, outcome.finish_ns
        if isinstance(outcome, DisaggregatedOutcome):
            # A prefill instance keeps a prompt until it was read, and from then on the decode instance has it.
            begin, end = (begin, outcome.read_ns[:, 1]) if place == 0 else (outcome.forwarded_ns, end)
        told = np.array([_at(moments, steps, used, begin, end, settings) for steps, used in mine])
        share = told[:, 2] / max(blocks, 1)
        yield PoolLoad(
            name=_name(pool),
            time_s=(moments - moments[0]) / NS_PER_S,
            waiting=told[:, 0].sum(axis=0),
            running=told[:, 1].sum(axis=0),
            kv_mean=share.mean(axis=0),
            kv_most=share.max(axis=0),
        )


def _name(pool: Pool) -> str:
    """A pool by its role, if it has one, and its plan."""
    return f"{pool.role}, {pool.plan}" if pool.role else str(pool.plan)


def _schedulers(outcome: Outcome) -> Iterator[tuple[Sequence[Step], Sequence[tuple[int, ...]]]]:
    """The batches of each scheduler, of a replica or a rank of one, and the blocks in use after them where known."""
    assert outcome.steps is not None and outcome.steps_per_replica is not None
    numbers = [n for group in outcome.groups for n in group.batches] or outcome.steps_per_replica
    at = 0
    for number in numbers:
        yield outcome.steps[at : at + number], (outcome.used or [])[at : at + number]
        at += number


def _at(
    moments: NDArray[np.float64],
    steps: Sequence[Step],
    used: Sequence[tuple[int, ...]],
    begin_ns: NDArray[np.int64],
    end_ns: NDArray[np.int64],
    settings: EngineSettings,
) -> NDArray[np.float64]:
    """Sequences that wait and run and blocks held by a scheduler at some moments, float64[3, moments]."""
    told = np.array(list(load(steps, begin_ns, end_ns, settings)), np.float64).reshape(-1, 4)
    if not len(told):
        return np.zeros((3, len(moments)))
    if used:
        told[: len(used), 3] = [sum(groups) for groups in used]
    places = np.searchsorted(told[:, 0], moments, side="right") - 1
    return np.where(places >= 0, told[np.maximum(places, 0), 1:].T, 0.0)
