"""Why a given deployment loses to the best: the terms that differ."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Final

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.figures.measure import statistic
from apex_opt.figures.registry import timed
from apex_opt.placement import lies
from apex_opt.search.answer import misses
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import judge
from apex_opt.units import NS_PER_S, add_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.placement import Lies
    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import PoolUse, Scored
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Progress

_UNITS: Final = {"time per GPU": "s", "mean latency": "s", "energy": "J", "memory per GPU": "B"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A part of what several runs took, run by run, in its unit.

    `share` is the widest difference as a share of the largest run's whole.
    """

    part: str
    name: str
    unit: str
    values: tuple[float, ...]
    share: float

    @property
    def difference(self) -> float:
        """What the first run takes more than the second."""
        return self.values[0] - self.values[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A given deployment beside the best one; `reason` says why it has no score, or what it misses.

    Terms are those that differ, the largest share first; `lies` is where the groups of ranks of its pools lie.
    """

    deployment: Deployment
    scored: Scored | None
    reason: str | None
    terms: tuple[Term, ...] = ()
    lies: tuple[Lies, ...] = ()


def compare(
    problem: Problem, deployment: Deployment, best: Scored | None, progress: Progress | None = None
) -> Comparison:
    """A given deployment beside the best one, with what differs between them.

    Parameters
    ----------
    problem : Problem
    deployment : Deployment
    best : Scored or None            None where there is none
    progress : callable, optional    told (what, done, total) along the way
    """
    answer = judge(problem, deployment, progress)
    if answer.best is None:
        return Comparison(deployment=deployment, scored=None, reason=answer.reason)
    scored, scorer = answer.best, Scorer(problem)
    missed = misses(scored.metrics, problem.slos)
    return Comparison(
        deployment=deployment,
        scored=scored,
        reason=f"misses {missed}" if missed else None,
        terms=() if best is None else differences([(scorer, scored), (scorer, best)]),
        lies=tuple(one for use in scored.pools for one in _lies(scorer, use)),
    )


def _lies(scorer: Scorer, use: PoolUse) -> tuple[Lies, ...]:
    """Where the groups of ranks of a pool lie; of pipelines over several types each stage lies on its own.

    Groups of several pools are told apart by what these do and by their types of GPU.
    """
    pool = use.pool
    if pool.plan.on:
        return ()
    layouts, of = scorer.facts_of(pool).layouts, " on ".join(filter(None, (pool.role, pool.gpu)))
    found = lies(layouts.tree, pool.plan, layouts.best(pool.plan))
    return tuple(replace(one, group=f"{of}: {one.group}" if of else one.group) for one in found)


def differences(runs: Sequence[tuple[Scorer, Scored]]) -> tuple[Term, ...]:
    """What differs between runs by part: of time per GPU, latency, energy and memory, the largest share first."""
    parts = [_parts(scorer, run) for scorer, run in runs]
    terms = []
    for part, unit in _UNITS.items():
        found = [by_part[part] for by_part in parts]
        whole = max(add_up(one.values()) for one in found) or 1.0
        for name in dict.fromkeys(name for one in found for name in one):
            values = tuple(one.get(name, 0.0) for one in found)
            if len(set(values)) > 1:
                share = (max(values) - min(values)) / whole
                terms.append(Term(part=part, name=name, unit=unit, values=values, share=share))
    return tuple(sorted(terms, key=lambda term: (-term.share, term.part, term.name)))


def _parts(scorer: Scorer, run: Scored) -> dict[str, dict[str, float]]:
    """What a run took by part; each sums to its whole: the makespan, the mean E2E, the energy, the memory of a GPU.

    Of several pools what is told of a GPU is the mean over all GPUs, and the least time to the first token that over
    all requests, as if each pool were dealt the same kind of them; where these pass both it is that of both together.
    """
    gpus, requests = run.devices, run.requests
    operations, memory = dict[str, float](), dict[str, float]()
    alone = 0.0
    pushed = run.deployment.disaggregated and isinstance(scorer.problem.settings.scheduler, SglangScheduling)
    for use in run.pools:
        share = use.pool.plan.devices / gpus
        for name, seconds in use.usage.operations_s.items():
            operations[name] = operations.get(name, 0.0) + share * seconds
        held = {
            "weights": fmean(stage.weights_bytes for stage in use.memory),
            "workspace": fmean(stage.workspace_bytes for stage in use.memory),
            "runtime": fmean(stage.runtime_bytes for stage in use.memory),
            "KV cache": fmean(stage.kv_blocks * stage.kv_block_bytes for stage in use.memory),
        }
        for name, size in held.items():
            memory[name] = memory.get(name, 0.0) + share * size
        least = statistic(scorer.facts_of(use.pool).alone(use.pool.plan), timed("first"), "mean")[0]
        if not (pushed and use.pool.role == "decode"):  # the first token is the other pool's
            alone += use.requests / requests * float(least)
    if run.deployment.disaggregated and not pushed:
        alone -= scorer.outside_ns / NS_PER_S  # it was counted with either pool
    first, whole = (run.metrics.value(timed(time).name, "mean") for time in ("first", "whole"))
    idle_j = add_up(use.usage.idle_energy_j for use in run.pools)
    latency = {"first token, least": min(alone, first)}
    more = max(first - alone, 0.0)
    if run.handover_s is not None:
        latency["first token, hand-over"] = min(add_up(run.handover_s[part]["mean"] for part in ("wait", "read")), more)
        more -= latency["first token, hand-over"]
    latency |= {"first token, waiting and sharing batches": more, "later tokens": whole - first}
    return {
        "time per GPU": operations,
        "mean latency": latency,
        "energy": {"idle draw": idle_j, "operations": add_up(use.usage.energy_j for use in run.pools) - idle_j},
        "memory per GPU": memory,
    }
