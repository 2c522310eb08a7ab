"""What `capacity` answers: the document, and its tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from rich.text import Text

from apex_opt.figures.goals import parse_goals
from apex_opt.figures.units import percent
from apex_opt.report import studied
from apex_opt.report.document import question_document, scored_document
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import (
    NOUNS,
    count,
    kilojoules,
    notes_lines,
    of_types,
    page,
    provenance_table,
    seconds,
    table,
)
from apex_opt.report.mixed import parts_table, pools_tables
from apex_opt.report.robust import GPUS, robust_section
from apex_opt.report.tables import (
    alike_lines,
    best_tables,
    figure_columns,
    lost_words,
    question_line,
    shares_words,
    told_once,
)
from apex_opt.schema import of
from apex_opt.studies.capacity import ASSUMPTION
from apex_opt.workload.steady import rate_of, words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from apex_opt.report.types import Candidate, MixedRun
    from apex_opt.schema import Document
    from apex_opt.search import Part, Problem
    from apex_opt.studies.capacity_answer import Capacity, PlanRate
    from apex_opt.studies.steady import Evidence

C = TypeVar("C", bound=studied.RateCounts)

_WHY: Final = {
    "queue": "the queue grows",
    "saturated": "it is too near to what the plan serves from a queue that never empties",
    "prediction": "another run could miss a goal",
}
"""Why a rate is not sustained, where no goal is missed."""


def capacity_document(problem: Problem, capacity: Capacity, provenance: Mapping[str, Any]) -> studied.CapacityAnswer:
    """Rates in requests per second, latencies in seconds, sizes in bytes, energy in joules.

    Parameters
    ----------
    problem, capacity
    provenance : mapping    where each figure comes from
    """
    rows: Any = tuple(_plan_rate(problem, item) for item in capacity.plans)
    return studied.CapacityAnswer(
        command="capacity",
        status=capacity.status,
        asked=studied.Asked(
            for_="highest rate" if capacity.asked_per_s is None else "fewest GPUs",
            rate_per_s=capacity.asked_per_s,
            resolution=capacity.resolution,
        ),
        steady=bool(rows),
        reason=capacity.reason,
        best=rows[0] if rows else None,
        candidates=rows,
        certificate=_certificate(problem, capacity),
        assumption=ASSUMPTION if capacity.asked_per_s is None else None,
        question=question_document(problem, words(problem.trace)),
        provenance=dict(provenance),
        notes=(*problem.remarks, *_about_left(capacity)),
    )


def _about_left(capacity: Capacity) -> tuple[str, ...]:
    """That a better answer may be among what was left when the time was up."""
    if not (capacity.plans and capacity.ledger.waiting):
        return ()
    better = "hold a higher rate" if capacity.asked_per_s is None else "be better"
    return (
        f"--time_limit: {count(capacity.ledger.waiting, 'deployment')} left when the time was up may {better}; allow "
        "more time to know",
    )


def _certificate(problem: Problem, capacity: Capacity) -> studied.RateLedger | studied.MixedRateLedger:
    """How every deployment was accounted for; of several pools part by part, and how fast those left can be."""
    ledger, simulations = capacity.ledger, capacity.simulations
    if not problem.several:
        return _part(studied.RateLedger, ledger.parts[0], capacity.larger[0], simulations=simulations)
    parts = tuple(
        _part(studied.RatePart, part, larger, left=part.waiting)
        for part, larger in zip(ledger.parts, capacity.larger, strict=True)
    )
    return of(studied.MixedRateLedger, ledger, parts=parts, simulations=simulations, complete=ledger.optimal)


def _part(kind: type[C], part: Part, larger: int, **more: int) -> C:
    """How the deployments of a part were accounted for; those on more GPUs than are needed are told apart."""
    found = part.simulated - part.cut_short - part.missed
    return of(
        kind,
        part,
        bounded=part.bounded - larger,
        ruled_out=part.simulated - found,
        found=found,
        larger=larger,
        complete=part.complete and not part.waiting,
        **more,
    )


def _plan_rate(problem: Problem, item: PlanRate) -> Candidate | MixedRun:
    """A deployment, its rate, what is missed at the next one, and its run at this rate."""
    own = rate_of(problem.trace)
    transient = item.evidence.transient
    return scored_document(
        problem,
        item.holds,
        (studied.RatedPlan, studied.RatedMixed),
        rate_per_s=item.rate_per_s,
        rate_per_gpu_per_s=item.rate_per_s / item.deployment.devices,
        times_own_rate=item.rate_per_s / own if problem.trace.timed else None,
        steady=True,
        next_rate_per_s=item.next_rate_per_s,
        why_not_next=item.why or None,
        missed_at_next_rate=item.missed,
        arrivals_s=transient.arrivals_s,
        after_last_arrival_s=transient.drain_s,
        evidence=evidence_document(item.evidence),
    )


def evidence_document(evidence: Evidence) -> studied.Evidence:
    """What shows that a rate is sustained; rates in requests per second."""
    transient = evidence.transient
    return of(
        studied.Evidence,
        evidence,
        warm_up_requests=evidence.warm_up,
        backlog_first_half=transient.before,
        backlog_second_half=transient.after,
        backlog_growing=transient.growing,
        goals_first_half=evidence.half,
        goals_whole=evidence.whole,
        margin_below_saturated=evidence.margin,
        further_runs=evidence.runs,
        requests_of_each=evidence.run_requests,
        goals_predicted_at_worst=evidence.predicted,
    )


def capacity_page(document: Document) -> str:
    """The document as text."""
    return page(lambda console: _draw(console, document))


def _draw(console: Console, document: Document) -> None:
    question, best = document["question"], document["best"]
    trace = question["trace"]
    given = "lengths alone" if trace["rate_per_s"] is None else f"{_rate(trace['rate_per_s'])} as given"
    question_line(console, question, given, f", {', '.join(question['slo'])}")
    notes_lines(console, document)
    if best is None:
        console.print(Text.assemble((document["status"], "bold red"), f": {document['reason']}\n"))
    else:
        highest = document["asked"]["rate_per_s"] is None
        so_far = " found so far" if not document["certificate"]["complete"] else " sustained" * highest
        console.print(Text.assemble(f"{document['asked']['for']}{so_far}: ", *_headline(document, best)))
        console.print(f"{_ends(document, best)}\n")
        _plans(console, document)
        if "parts" in best:
            parts_table(console, best["parts"])
            pools_tables(console, best)
        else:
            best_tables(console, best)
    _proof(console, document)
    highest = document["asked"]["rate_per_s"] is None
    aim = {"name": "rate", "unit": "requests/s"} if highest else {"name": "number", "unit": GPUS}
    robust_section(console, document, {**aim, "tolerance": 0.0})
    if best is not None:
        provenance_table(console, document["provenance"])
    if "launch" in document:
        launch_section(console, document["launch"])


def _headline(document: Document, best: Document) -> tuple[str | tuple[str, str], ...]:
    plan, gpus = (best["plan"], "bold green"), count(best["gpus"], "GPU")
    if document["asked"]["rate_per_s"] is None:
        return (_rate(best["rate_per_s"]), "bold green"), " with ", plan, f" on {gpus}"
    return (str(best["gpus"]), "bold green"), f" for {_rate(best['rate_per_s'])}, with ", plan


def _ends(document: Document, best: Document) -> str:
    """What ends the rate, and what shows that it lasts."""
    evidence = best["evidence"]
    times = best["times_own_rate"]
    text = "the trace has no rate of its own" if times is None else f"{times:.3g} times the rate of the trace"
    if document["asked"]["rate_per_s"] is None:
        text += f"; at {_rate(best['next_rate_per_s'])}, the next of the grid, {_not_next(best)}"
    text += (
        f"\nsustained: {count(evidence['requests'], 'request')}, {document['question']['arrivals']}; after the first "
        f"{evidence['warm_up_requests']:,} a backlog of {evidence['backlog_first_half']:.1f}, later "
        f"{evidence['backlog_second_half']:.1f} requests; {evidence['served_per_s']:.3f} answered per second"
    )
    if evidence["further_runs"]:
        text += f"; {count(evidence['further_runs'], 'further run')} of {evidence['requests_of_each']:,} hold as well"
    if evidence["saturated_per_s"] is not None:
        text += f"; saturated it serves at most {evidence['saturated_per_s']:.3f}"
    return text


def _not_next(row: Document) -> str:
    """Why the next rate is not sustained."""
    if row["why_not_next"] == "goals":
        return _missed(row)
    if row["why_not_next"] == "prediction" and row["missed_at_next_rate"]:
        worst = (f"{text} at {_beside(text, value)}" for text, value in row["missed_at_next_rate"].items())
        return f"another run could miss {', '.join(worst)}"
    return _WHY.get(row["why_not_next"] or "", "-")


def _missed(row: Document) -> str:
    """Goals that fail at the next rate, with the figures reached there."""
    figures = (f"{text} fails at {_beside(text, value)}" for text, value in row["missed_at_next_rate"].items())
    return ", ".join(figures) or "-"


def _beside(text: str, value: float) -> str:
    """What is reached of a goal, in as many digits as tell it from the limit."""
    (goal,) = parse_goals(text)
    return seconds(value, goal.limit) if goal.fraction is None else percent(value, goal.fraction, places=2)


def _plans(console: Console, document: Document) -> None:
    highest = document["asked"]["rate_per_s"] is None
    of_requests, goals = figure_columns(document["best"]["metrics"])
    heads = ["#", "plan", "GPUs", "req/s", "per GPU", *(("next", "at the next") * highest)]
    heads += [*of_requests, "answered/s", "kJ"]
    kept = {0, 1, 3} | {place for place, head in enumerate(heads) if head in goals}
    told = told_once(document["candidates"])
    rows = [
        (
            str(rank),
            row["plan"],
            str(row["gpus"]),
            f"{row['rate_per_s']:.3f}",
            f"{row['rate_per_gpu_per_s']:.3f}",
            *((f"{row['next_rate_per_s']:.3f}" if row["next_rate_per_s"] else "-", _not_next(row)) * highest),
            *(read(row) for read in of_requests.values()),
            f"{row['metrics']['throughput_rps']:.3f}",
            kilojoules(row["metrics"]["energy_j"]),
        )
        for rank, row in ((rank, document["candidates"][rank - 1]) for rank in told)
    ]
    title = "Plans by rate" if highest else "Plans on as few GPUs"
    table(console, title, heads, rows, left={1, 6} if highest else {1}, kept=kept)
    alike_lines(console, document["candidates"], told)


def _proof(console: Console, document: Document) -> None:
    certificate = document["certificate"]
    assumed, over = f" Assumed: {document['assumption']}." if document["assumption"] else "", shares_words(document)
    if "parts" not in certificate:
        proof = "every plan is accounted for" if certificate["complete"] else "the space was not exhausted"
        _part_line(console, document, certificate, "Certificate", f"{_runs(certificate)}: {proof}{over}.{assumed}")
        return
    for part in certificate["parts"]:
        left = f"{part['left']:,} left when the time was up" if part["left"] else ""
        _part_line(console, document, part, f"Certificate, {of_types(part['shape'], part['types'])}", left)
    proof = "every deployment is accounted for" if certificate["complete"] else "the space was not exhausted"
    gap = f", those left can be better by {certificate['gap']:.1%}" if certificate["gap"] else ""
    console.print(f"{_runs(certificate).capitalize()}: {proof}{gap}{over}.{assumed}\n")


def _runs(certificate: Document) -> str:
    return f"{count(certificate['simulations'], 'simulation')} in all"


def _part_line(console: Console, document: Document, certificate: Document, title: str, end: str) -> None:
    """How the deployments of a part were accounted for."""
    highest = document["asked"]["rate_per_s"] is None
    parts = [
        f"{count(certificate['space'], NOUNS[certificate.get('shape', 'single')])} in the space",
        lost_words(certificate["infeasible"]),
        f"{certificate['bounded']:,} ruled out by a bound",
        f"{certificate['repeated']:,} the same with layers moved" if certificate["repeated"] else "",
        f"{certificate['ruled_out']:,} ruled out by simulation at the rate "
        + ("of those found" if highest else "asked for"),
        f"{certificate['found']:,} " + ("searched for their highest rate" if highest else "hold"),
    ]
    if not highest:
        parts.append(f"{certificate['larger']:,} on more GPUs than needed")
    told = "; ".join(filter(None, (*parts, end)))
    console.print(Text.assemble((title, "bold"), f": {told}{'' if told.endswith('.') else '.'}\n"))


def _rate(value: float) -> str:
    return f"{value:.3f} requests/s"
