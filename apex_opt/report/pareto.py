"""What `pareto` answers: the document, its tables for people, and its picture."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from apex_opt.report import studied
from apex_opt.report.document import ledger_document, question_document, scored_document
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import amount, count, notes_lines, page, provenance_table, table
from apex_opt.report.load import loaded
from apex_opt.report.picture import blank_figure, write_picture
from apex_opt.report.tables import certificate_line, question_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from rich.console import Console

    from apex_opt.report.types import Launch
    from apex_opt.schema import Document
    from apex_opt.search import Problem, Scored
    from apex_opt.studies.pareto import Front

_PANEL_INCHES: Final = 4.5
_LABELLED: Final = 12
"""Plans of the front that a picture names; more would cover each other."""


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
    if document["reason"] is None:
        provenance_table(console, document["provenance"])
    for candidate in document["candidates"]:
        if "launch" in candidate:
            launch_section(console, candidate["launch"], candidate["plan"])


def write_front(path: Path, document: Document) -> None:
    """Draw the front and the plans it beats as a PNG file, a panel for each pair of objectives.

    Raises
    ------
    UsageError    matplotlib is not installed
    InputError    a path that cannot be written
    """
    blank = blank_figure()
    pairs = list(combinations(document["objectives"], 2))
    figure = blank(figsize=(_PANEL_INCHES * len(pairs), _PANEL_INCHES), layout="constrained")
    for place, (across, up) in enumerate(pairs, 1):
        _panel(figure.add_subplot(1, len(pairs), place), document, across, up)
    write_picture(path, figure)


def _panel(axes: Any, document: Document, across: Document, up: Document) -> None:
    for key, style in (("beaten", {"c": "0.7", "s": 10}), ("candidates", {"c": "C0", "s": 24, "zorder": 3})):
        points = _points(document[key], across, up)
        if points:
            axes.scatter(*zip(*points, strict=True), **style, label="front" if key == "candidates" else "beaten")
    if len(document["objectives"]) == 2:
        line = sorted(_points(document["candidates"], across, up))
        # Between two plans of a front only what the one that is good enough across reaches can be had.
        where = "pre" if across["maximise"] else "post"
        axes.step(*zip(*line, strict=True), where=where, color="C0", lw=0.8)
    for rank, point in enumerate(_points(document["candidates"], across, up)[:_LABELLED], 1):
        axes.annotate(str(rank), point, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel(f"{across['name']}, {across['unit']}", fontsize=8)
    axes.set_ylabel(f"{up['name']}, {up['unit']}", fontsize=8)
    shown = [*_points(document["beaten"], across, up), *_points(document["candidates"], across, up)]
    if all(min(point) > 0 for point in shown):
        axes.set(xscale="log", yscale="log")
    axes.tick_params(labelsize=7, which="both")
    axes.legend(fontsize=7, frameon=False)


def _points(rows: list[Document], across: Document, up: Document) -> list[tuple[float, float]]:
    pairs = ((row["values"][across["name"]], row["values"][up["name"]]) for row in rows)
    return [(x, y) for x, y in pairs if x is not None and y is not None]
