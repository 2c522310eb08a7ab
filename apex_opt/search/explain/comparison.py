"""Why a given plan loses to the best: the terms that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.placement import lies
from apex_opt.search.answer import misses
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.search import judge

if TYPE_CHECKING:
    from apex_opt.placement import Lies
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A part of what two runs took, in its unit; `share` is the difference as a share of the larger run's whole."""

    part: str
    name: str
    unit: str
    plan: float
    best: float
    share: float

    @property
    def difference(self) -> float:
        return self.plan - self.best


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
    """A given plan beside the best one: by part of its time per GPU, of its latency and of its energy."""
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
    parts = [_parts(evaluator, one) for one in (candidate, best)]
    terms = []
    for part, unit in (("time per GPU", "s"), ("mean latency", "s"), ("energy", "J")):
        of_plan, of_best = (by_part[part] for by_part in parts)
        whole = max(sum(of_plan.values()), sum(of_best.values())) or 1.0
        for name in of_plan | of_best:
            mine, its = of_plan.get(name, 0.0), of_best.get(name, 0.0)
            if mine != its:
                terms.append(Term(part=part, name=name, unit=unit, plan=mine, best=its, share=abs(mine - its) / whole))
    terms.sort(key=lambda term: (-term.share, term.part, term.name))
    return Comparison(plan=plan, candidate=candidate, reason=reason, terms=tuple(terms), lies=where)


def _parts(evaluator: Evaluator, candidate: Candidate) -> dict[str, dict[str, float]]:
    """What a run took by part; each sums to its whole: the makespan, the mean E2E, the energy."""
    usage, latency = candidate.usage, candidate.metrics.latency_s
    alone = evaluator.floor(candidate.plan).latency_s["ttft"]["mean"]
    ttft, whole = latency["ttft"]["mean"], latency["e2e"]["mean"]
    return {
        "time per GPU": usage.operations_s,
        "mean latency": {
            "first token, least": min(alone, ttft),
            "first token, waiting and sharing batches": max(ttft - alone, 0.0),
            "later tokens": whole - ttft,
        },
        "energy": {"idle draw": usage.idle_energy_j, "operations": usage.energy_j - usage.idle_energy_j},
    }
