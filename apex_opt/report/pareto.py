"""What `pareto` answers: the document, and its tables for people."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from apex_opt.report import studied
from apex_opt.report.document import ledger_document, question_document, scored_document
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import amount, count, notes_lines, page, provenance_table, table
from apex_opt.report.load import loaded
from apex_opt.report.robust import robust_front_section
from apex_opt.report.tables import certificate_line, question_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from apex_opt.report.types import Launch
    from apex_opt.schema import Document
    from apex_opt.search import Problem, Scored
    from apex_opt.studies.pareto import Front


def pareto_document(
    problem: Problem,
    front: Front,
    provenance: Mapping[str, object],
    launch: Callable[[Scored], Launch | None] = lambda _: None,
) -> studied.Front:
    """The front, best by the first objective first, and what it beats; seconds, joules, requests per second.

    Parameters
    ----------
    problem
    front : Front           what was found
    provenance : mapping    where each figure comes from
    launch : callable       the commands that start a deployment, if asked
    """

    def values(scored: Scored) -> dict[str, float | None]:
        return {o.name: o.value(scored.metrics) for o in front.objectives}

    best = front.candidates[0] if front.candidates else None
    kinds = studied.FrontPlan, studied.FrontMixed
    more: dict[str, Any] = {
        "candidates": [
            scored_document(problem, one, kinds, values=values(one), launch=launch(one)) for one in front.candidates
        ],
        "provenance": provenance,
    }
    return (studied.MixedFront if problem.several else studied.FrontAnswer)(
        command="pareto",
        status=front.status,
        objectives=tuple(asdict(objective) for objective in front.objectives),
        reason=front.reason,
        beaten=tuple(studied.BeatenPlan(plan=one.text, gpus=one.devices, values=values(one)) for one in front.beaten),
        question=question_document(problem),
        notes=problem.remarks,
        **loaded(replace(problem, objective=front.objectives[0]), best),
        **ledger_document(problem, front.ledger),
        **more,
    )


def pareto_page(document: Document) -> str:
    """The document as text."""
    return page(lambda console: _draw(console, document))


def _draw(console: Console, document: Document) -> None:
    question_line(console, document["question"])
    notes_lines(console, document)
    names = " against ".join(objective["name"] for objective in document["objectives"])
    if document["reason"] is not None:
        console.print(Text.assemble((document["status"], "bold red"), f": {document['reason']}\n"))
    else:
        whole = "" if document["status"] == "optimal" else ", not the whole of it"
        front = count(len(document["candidates"]), "plan")
        console.print(Text.assemble(f"front of {names}: ", (front, "bold green"), f"{whole}\n"))
        heads = ("#", "plan", "GPUs", *(objective["name"] for objective in document["objectives"]))
        rows = [
            (
                str(rank),
                candidate["plan"],
                str(candidate["gpus"]),
                *(amount(candidate["values"][o["name"]], o["unit"]) for o in document["objectives"]),
            )
            for rank, candidate in enumerate(document["candidates"], 1)
        ]
        table(console, "No plan is better in one of these without being worse in another", heads, rows, left={1})
    certificate_line(console, document)
    robust_front_section(console, document)
    if document["reason"] is None:
        provenance_table(console, document["provenance"])
    for candidate in document["candidates"]:
        if "launch" in candidate:
            launch_section(console, candidate["launch"], candidate["plan"])
