"""Answers over several types of GPU as a page."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.text import Text

from apex_opt.report.expected import expected_table
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import aim, amount, count, kilojoules, notes_lines, page, provenance_table, seconds, table
from apex_opt.report.placement import replicas_document
from apex_opt.report.placement_tables import where_table
from apex_opt.report.robust import robust_section
from apex_opt.report.tables import (
    beside_table,
    candidates_table,
    certificate_line,
    memory_table,
    question_line,
    service_tables,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from apex_opt.placement import Assignment
    from apex_opt.report.types import MixedRun
    from apex_opt.schema import Document


def placed_run(best: MixedRun, assignments: Sequence[Assignment]) -> MixedRun:
    """A deployment with the GPUs of each of its pools."""
    parts = zip(best.parts, assignments, strict=True)
    return replace(best, parts=tuple(replace(part, replicas=replicas_document(ranks)) for part, ranks in parts))


def mixed_page(document: Document) -> str:
    """The same for people."""
    return page(lambda console: _page(console, document))


def _page(console: Console, document: Document) -> None:
    best, question = document["best"], document["question"]
    question_line(console, question)
    notes_lines(console, document)
    if best is None:
        console.print(Text.assemble((document["status"], "bold red"), f": {document['reason']}\n"))
    else:
        aims = ", ".join(map(aim, (document["objective"], *document["then"])))
        text = f" on {count(best['gpus'], 'GPU')}, {aims}\n"
        several = len(best["parts"]) > 1
        word = "pools" if "role" in best["parts"][0] else "fleet" if several or "pools" not in document else "plan"
        head = f"{word} as given" if document["command"] == "simulate" else f"best {word}"
        console.print(Text.assemble(f"{head}: ", (best["plan"], "bold green"), text))
        parts_table(console, best["parts"])
        for part in best["parts"]:
            if "replicas" in part:
                where_table(console, part["replicas"], f"Where it goes: {_part_name(part)}")
        _alone(console, document)
        if len(document["candidates"]) > 1:
            candidates_table(console, document, "deployment" if "pools" in document else "fleet")
        if "beside" in document:
            beside_table(console, document)
        pools_tables(console, best)
        expected_table(console, document)
    certificate_line(console, document)
    robust_section(console, document)
    if best is not None:
        if document["gap"] is not None and not document["optimal"]:
            console.print(f"The best there is may be better by up to {document['gap']:.1%}.\n")
        provenance_table(console, document["provenance"])
    if "launch" in document:
        launch_section(console, document["launch"])


def pools_tables(console: Console, best: Document) -> None:
    """The latencies and service of a deployment, and the memory of each of its pools."""
    service_tables(console, best["metrics"])
    for part in best["parts"]:
        memory_table(console, f"Memory per GPU, GB: {_part_name(part)}", part["memory"])


def _part_name(part: Document) -> str:
    """A pool by its role, where it has one, and its type of GPU."""
    return f"{part['role']} on {part['gpu']}" if "role" in part else str(part["gpu"])


def parts_table(console: Console, parts: Sequence[Document]) -> None:
    """What each pool does."""
    roles = "role" in parts[0]
    heads = ("pool" if roles else "GPU type", "plan", "GPUs", "requests", "share", "kJ", "MFU", "MBU", "idle")
    rows = [
        (
            _part_name(part),
            part["plan"],
            str(part["gpus"]),
            f"{part['requests']:,}",
            f"{part['share']:.1%}",
            kilojoules(part["energy_j"]),
            f"{part['mfu']:.1%}",
            f"{part['mbu']:.1%}",
            seconds(part["operations_s"]["idle"]),
        )
        for part in parts
    ]
    table(
        console, "Prefill and decode pool" if roles else "Parts of the fleet", heads, rows, left={0, 1}, kept=range(5)
    )


def _alone(console: Console, document: Document) -> None:
    """The best plan of each type alone, and what it loses to the best of all."""
    if len(document["alone"]) < 2 and document["best"]["plan"] in {one and one["plan"] for one in document["alone"]}:
        return  # there is one type of GPU, whose best plan is the best
    if not document["alone"]:
        return  # a deployment that is given, or pools alone
    objective = document["objective"]
    rows = []
    left = {tuple(part["types"]): part["left"] for part in document["certificates"]}
    for pool, fleet in zip(document["question"]["cluster"]["pools"], document["alone"], strict=True):
        if fleet is None:
            why = "none meets the constraints and goals"
            why = "none was found before the time was up" if left.get((pool["gpu"],)) else why
            rows.append((pool["gpu"], why, "-", "-", "-"))
            continue
        loss = "-" if fleet["loss"] is None else f"{fleet['loss']:.1%}"
        plan = fleet["parts"][0]["plan"]
        rows.append((pool["gpu"], plan, str(fleet["gpus"]), amount(fleet["value"], objective["unit"]), loss))
    heads = ("GPU type", "plan", "GPUs", objective["name"], "loss")
    table(console, "Best plan of each type alone", heads, rows, left={0, 1})
