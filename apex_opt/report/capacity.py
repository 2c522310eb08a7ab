"""What `capacity` answers: the document, and its tables for people."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt import __version__
from apex_opt.report.document import candidate_document, cleaned, noted, question_document
from apex_opt.report.layout import count, notes_lines, page, provenance_table, seconds, table
from apex_opt.report.tables import best_tables, cluster_words, figure_columns
from apex_opt.search.capacity import ASSUMPTION

if TYPE_CHECKING:
    from rich.console import Console

    from apex_opt.report.document import Document
    from apex_opt.search import Question
    from apex_opt.search.capacity import Capacity, PlanRate

_LASTING: Final = 0.1
"""Longest tail after the last arrival, as a share of the arrivals' own time, of a load that is taken for steady."""


def capacity_document(question: Question, capacity: Capacity, provenance: dict[str, str]) -> Document:
    """Rates in requests per second, latencies in seconds, sizes in bytes, energy in joules."""
    rows = [_plan_rate(question, item) for item in capacity.plans]
    document = cleaned(
        {
            "command": "capacity",
            "status": capacity.status,
            "asked": {
                "for": "highest rate" if capacity.asked_per_s is None else "fewest GPUs",
                "rate_per_s": capacity.asked_per_s,
                "resolution": capacity.resolution,
            },
            "reason": capacity.reason,
            "best": rows[0] if rows else None,
            "candidates": rows,
            "certificate": asdict(capacity.certificate),
            "assumption": ASSUMPTION if capacity.asked_per_s is None else None,
            "question": question_document(question),
            "provenance": provenance,
            "version": __version__,
        }
    )
    return noted(document, question.remarks)


def _plan_rate(question: Question, item: PlanRate) -> Document:
    """A plan, its rate, what is missed at the next one, and its run at this rate."""
    own = question.trace.rate_per_s
    assert own is not None, "a rate was found"
    missed = {}
    if item.fails is not None:
        metrics = item.fails.metrics
        missed = {slo.text: metrics.judged(slo) for slo in question.slos if not metrics.slo_met[slo.text]}
    span_s = question.trace.duration_s * own / item.rate_per_s
    return {
        "rate_per_s": item.rate_per_s,
        "rate_per_gpu_per_s": item.rate_per_s / item.plan.devices,
        "times_own_rate": item.rate_per_s / own,
        "next_rate_per_s": item.next_rate_per_s,
        "missed_at_next_rate": missed,
        "near": [{"rate_per_s": rate, "holds": holds} for rate, holds in item.near],
        "arrivals_s": span_s,
        "after_last_arrival_s": max(item.holds.metrics.makespan_s - span_s, 0.0),
        **candidate_document(question, item.holds),
    }


def capacity_page(document: Document) -> str:
    """The document as text."""
    return page(lambda console: _draw(console, document))


def _draw(console: Console, document: Document) -> None:
    question, best = document["question"], document["best"]
    trace = question["trace"]
    console.print(
        Text.assemble(
            (question["model"]["name"], "bold"),
            f" ({question['model']['parameters'] / 1e9:.1f} B parameters) on ",
            *cluster_words(question["cluster"]),
            f", trace {trace['name']} ({count(trace['requests'], 'request')}, {_rate(trace['rate_per_s'])} as given), "
            f"{', '.join(question['slo'])}",
        )
    )
    notes_lines(console, document)
    if best is None:
        console.print(Text.assemble((document["status"], "bold red"), f": {document['reason']}\n"))
    else:
        console.print(Text.assemble(f"{document['asked']['for']}: ", *_headline(document, best)))
        console.print(f"{_ends(document, best)}\n")
        _plans(console, document)
        best_tables(console, best)
    _certificate(console, document)
    if best is not None:
        provenance_table(console, document["provenance"])


def _headline(document: Document, best: Document) -> tuple[str | tuple[str, str], ...]:
    plan, gpus = (best["plan"], "bold green"), count(best["gpus"], "GPU")
    if document["asked"]["rate_per_s"] is None:
        return (_rate(best["rate_per_s"]), "bold green"), " with ", plan, f" on {gpus}"
    return (str(best["gpus"]), "bold green"), f" for {_rate(best['rate_per_s'])}, with ", plan


def _ends(document: Document, best: Document) -> str:
    """What ends the rate, and whether the trace is long enough to say that it lasts."""
    text = f"{best['times_own_rate']:.3g} times the rate of the trace"
    if document["asked"]["rate_per_s"] is None and best["next_rate_per_s"] is None:
        return f"{text}, the highest that is looked at: so few requests load no plan; give a longer trace"
    if best["next_rate_per_s"] is not None:
        text += f"; at {_rate(best['next_rate_per_s'])}, the next of the grid, {_missed(best)}\n{_sharpness(best)}"
    text += (
        f"\nrequests arrive for {seconds(best['arrivals_s'])}, the last answer comes "
        f"{seconds(best['after_last_arrival_s'])} later"
    )
    if best["after_last_arrival_s"] > _LASTING * best["arrivals_s"]:
        text += ": too short a trace to say that this rate lasts; one with more requests can give less"
    return text


def _sharpness(row: Document) -> str:
    """Whether the goals hold at all rates simulated below the one found, and at none above."""
    below = [near for near in row["near"] if near["rate_per_s"] < row["rate_per_s"]]
    above = [near for near in row["near"] if near["rate_per_s"] > row["rate_per_s"]]
    odd = [f"fail at {near['rate_per_s']:.3f}" for near in below if not near["holds"]]
    odd += [f"hold at {near['rate_per_s']:.3f}" for near in above if near["holds"]]
    if odd:
        return f"not a sharp limit: the goals {', '.join(odd)} requests/s"
    return f"the goals hold at the {count(len(below), 'rate')} before and fail at the {count(len(above), 'rate')} after"


def _missed(row: Document) -> str:
    """Goals that fail at the next rate, with the figures reached there."""
    figures = (
        f"{text} fails at {f'{value:.2%}' if '@' in text else seconds(value)}"
        for text, value in row["missed_at_next_rate"].items()
    )
    return ", ".join(figures) or "-"


def _plans(console: Console, document: Document) -> None:
    highest = document["asked"]["rate_per_s"] is None
    of_requests, goals = figure_columns(document["best"]["metrics"])
    heads = ["#", "plan", "GPUs", "req/s", "per GPU", *(("next", "at the next") * highest)]
    heads += [*of_requests, "answered/s", "kJ"]
    kept = {0, 1, 3} | {place for place, head in enumerate(heads) if head in goals}
    rows = [
        (
            str(rank),
            row["plan"],
            str(row["gpus"]),
            f"{row['rate_per_s']:.3f}",
            f"{row['rate_per_gpu_per_s']:.3f}",
            *((f"{row['next_rate_per_s']:.3f}" if row["next_rate_per_s"] else "-", _missed(row)) * highest),
            *(read(row) for read in of_requests.values()),
            f"{row['metrics']['throughput_rps']:.3f}",
            f"{row['metrics']['energy_j'] / 1e3:,.1f}",
        )
        for rank, row in enumerate(document["candidates"], 1)
    ]
    title = "Plans by rate" if highest else "Plans on as few GPUs"
    table(console, title, heads, rows, left={1, 6} if highest else {1}, kept=kept)


def _certificate(console: Console, document: Document) -> None:
    certificate = document["certificate"]
    lost = ", ".join(f"{n:,} {family}" for family, n in certificate["infeasible"].items() if n)
    highest = document["asked"]["rate_per_s"] is None
    parts = [
        f"{count(certificate['space'], 'plan')} in the space",
        f"{sum(certificate['infeasible'].values()):,} infeasible" + (f" ({lost})" if lost else ""),
        f"{certificate['bounded']:,} ruled out by a bound",
        f"{certificate['repeated']:,} the same with layers moved" if certificate["repeated"] else "",
        f"{certificate['ruled_out']:,} ruled out by simulation at the rate "
        + ("of those found" if highest else "asked for"),
        f"{certificate['found']:,} " + ("searched for their highest rate" if highest else "hold"),
    ]
    if not highest:
        parts.append(f"{certificate['larger']:,} on more GPUs than needed")
    parts.append(f"{count(certificate['simulations'], 'simulation')} in all")
    proof = "every plan is accounted for" if certificate["complete"] else "the space was not exhausted"
    assumed = f" Assumed: {document['assumption']}." if document["assumption"] else ""
    console.print(Text.assemble(("Certificate", "bold"), f": {'; '.join(filter(None, parts))}: {proof}.{assumed}\n"))


def _rate(value: float) -> str:
    return f"{value:.3f} requests/s"
