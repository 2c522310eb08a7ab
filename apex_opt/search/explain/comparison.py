"""Why a given plan loses to the best: the terms that differ."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Final

from apex_opt.figures.measure import statistic
from apex_opt.figures.registry import timed
from apex_opt.placement import lies
from apex_opt.search.answer import misses
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.search import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.placement import Lies
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate
    from apex_opt.search.question import Question
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
    """A given plan beside the best one; `reason` says why it has no score, or what it misses.

    Terms are those that differ, the largest share first; `lies` is where the plan's groups of ranks lie.
    """

    plan: Plan
    candidate: Candidate | None
    reason: str | None
    terms: tuple[Term, ...] = ()
    lies: tuple[Lies, ...] = ()


def compare(question: Question, plan: Plan, best: Candidate | None, progress: Progress | None = None) -> Comparison:
    """A given plan beside the best one, with what differs between them."""
    answer = judge(question, plan, progress)
    if answer.best is None:
        return Comparison(plan=plan, candidate=None, reason=answer.reason)
    candidate = answer.best
    missed = misses(candidate.metrics, question.slos)
    reason = f"misses {missed}" if missed else None
    evaluator = Evaluator(question)
    layouts = evaluator.layouts
    where = lies(layouts.tree, plan, layouts.best(plan))
    if best is None:
        return Comparison(plan=plan, candidate=candidate, reason=reason, lies=where)
    terms = differences([(evaluator, candidate), (evaluator, best)])
    return Comparison(plan=plan, candidate=candidate, reason=reason, terms=terms, lies=where)


def differences(runs: Sequence[tuple[Evaluator, Candidate]]) -> tuple[Term, ...]:
    """What differs between runs by part: of time per GPU, latency, energy and memory, the largest share first."""
    parts = [_parts(evaluator, run) for evaluator, run in runs]
    terms = []
    for part, unit in _UNITS.items():
        found = [by_part[part] for by_part in parts]
        whole = max(sum(one.values()) for one in found) or 1.0
        for name in dict.fromkeys(name for one in found for name in one):
            values = tuple(one.get(name, 0.0) for one in found)
            if len(set(values)) > 1:
                share = (max(values) - min(values)) / whole
                terms.append(Term(part=part, name=name, unit=unit, values=values, share=share))
    return tuple(sorted(terms, key=lambda term: (-term.share, term.part, term.name)))


def _parts(evaluator: Evaluator, candidate: Candidate) -> dict[str, dict[str, float]]:
    """What a run took by part; each sums to its whole: the makespan, the mean E2E, the energy, the memory of a GPU."""
    usage = candidate.usage
    alone = float(statistic(evaluator.floor(candidate.plan), timed("first"), "mean")[0])
    first, whole = (candidate.metrics.value(timed(time).name, "mean") for time in ("first", "whole"))
    return {
        "time per GPU": usage.operations_s,
        "mean latency": {
            "first token, least": min(alone, first),
            "first token, waiting and sharing batches": max(first - alone, 0.0),
            "later tokens": whole - first,
        },
        "energy": {"idle draw": usage.idle_energy_j, "operations": usage.energy_j - usage.idle_energy_j},
        "memory per GPU": {
            "weights": fmean(stage.weights_bytes for stage in candidate.memory),
            "workspace": fmean(stage.workspace_bytes for stage in candidate.memory),
            "runtime": fmean(stage.runtime_bytes for stage in candidate.memory),
            "KV cache": fmean(stage.kv_blocks * stage.kv_block_bytes for stage in candidate.memory),
        },
    }
