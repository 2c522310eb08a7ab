"""Fleets over several types of GPU as plain data and as a page."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt import __version__
from apex_opt.report.document import (
    cleaned,
    memory_document,
    metrics_document,
    noted,
    objective_document,
    question_document,
    values_document,
)
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import aim, amount, count, notes_lines, page, provenance_table, seconds, table
from apex_opt.report.load import loaded
from apex_opt.report.placement import where_table
from apex_opt.report.tables import (
    beside_table,
    candidates_table,
    memory_table,
    proof_lines,
    question_line,
    service_tables,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from apex_opt.placement import Assignment
    from apex_opt.report.document import Document
    from apex_opt.search import Question
    from apex_opt.search.fleet import Fleet, FleetPart
    from apex_opt.search.fleet_search import FleetAnswer

_INFEASIBLE: Final = {
    "part": "with an infeasible part",
    "gpus": "on more GPUs than offered",
    "share": "with a part that gets nothing to do",
}


def fleet_document(
    command: str,
    pools: Sequence[Question],
    answer: FleetAnswer,
    provenance: Mapping[str, Mapping[str, str]],
    top: int = 1,
) -> Document:
    """An answer over several types of GPU and everything it depends on, in the units of `answer_document`.

    Parameters
    ----------
    pools : the question of each type
    provenance : by type, where its figures come from
    """
    question, best = pools[0], answer.best
    types = [pool.cluster.gpu.name for pool in pools]
    first, *then = (objective_document(objective, best) for objective in question.objectives)
    document = cleaned(
        {
            "command": command,
            "status": answer.status,
            "objective": first,
            "then": then,
            "reason": answer.reason,
            "best": _fleet(pools, best) if best else None,
            "alone": [
                None if fleet is None or best is None else _fleet(pools, fleet) | {"loss": _loss(question, fleet, best)}
                for fleet in answer.alone
            ],
            "candidates": [_fleet(pools, fleet) for fleet in answer.candidates[:top]],
            "optimal": answer.optimal,
            "gap": answer.gap,
            "certificates": [
                {"types": [types[place] for place in places], **asdict(certificate)}
                for places, certificate in answer.certificates
            ],
            "pipelines": [
                {"types": [types[place] for place in places], **asdict(certificate)}
                for places, certificate in answer.pipelines
            ],
            "question": _question(pools),
            "provenance": provenance,
            "version": __version__,
        }
    )
    document = loaded(document, question, best)
    return noted(document, (note for pool in pools for note in pool.remarks))


def parts_placed(document: Document, assignments: Sequence[Assignment]) -> Document:
    """An answer with the GPUs of each part of its best fleet."""
    parts = [
        part | {"replicas": [{"replica": index, "stages": stages} for index, stages in enumerate(assignment)]}
        for part, assignment in zip(document["best"]["parts"], assignments, strict=True)
    ]
    return document | {"best": cleaned(document["best"] | {"parts": parts})}


def beside_fleet(document: Document, pools: Sequence[Question], other: Fleet) -> Document:
    """An answer on energy with the fleet that another objective prefers, and the share of its energy that is saved."""
    saving = 1 - document["best"]["metrics"]["energy_j"] / other.metrics.value("energy")
    best = _fleet(pools, other)
    return document | {"beside": cleaned({"objective": pools[0].objective.name, "best": best, "energy_saving": saving})}


def _question(pools: Sequence[Question]) -> Document:
    """What was asked, with each type of GPU among the cluster's pools; formats and clocks are those of the type."""
    asked = [question_document(pool) for pool in pools]
    own = ("weights", "kv", "clocks_mhz")
    cluster = {
        "name": asked[0]["cluster"]["name"],
        "gpus": sum(one["cluster"]["gpus"] for one in asked),
        "pools": [
            {name: value for name, value in one["cluster"].items() if name != "name"}
            | {name: one[name] for name in own}
            for one in asked
        ],
    }
    return {name: value for name, value in asked[0].items() if name not in own} | {"cluster": cluster}


def _fleet(pools: Sequence[Question], fleet: Fleet) -> Document:
    """A simulated fleet; what is told of a GPU is told part by part."""
    question = pools[0]
    tells_cost = all(pools[part.pool].tells_cost for part in fleet.parts)
    idle_j = sum(part.usage.idle_energy_j for part in fleet.parts)
    return {
        "plan": fleet.text,
        "gpus": fleet.devices,
        **values_document(question, fleet),
        "metrics": {
            **metrics_document(question, fleet, idle_j, tells_cost=tells_cost),
            "preemptions": sum(part.preemptions for part in fleet.parts),
            "batches": sum(part.batches for part in fleet.parts),
        },
        "parts": [_part(part, len(question.trace)) for part in fleet.parts],
    }


def _part(part: FleetPart, requests: int) -> Document:
    usage = part.usage
    return {
        "gpu": part.gpu,
        "plan": str(part.plan),
        "gpus": part.plan.devices,
        "requests": part.requests,
        "share": part.requests / requests,
        "energy_j": usage.energy_j,
        "idle_energy_j": usage.idle_energy_j,
        "mfu": usage.mfu,
        "mbu": usage.mbu,
        "operations_s": usage.operations_s,
        "preemptions": part.preemptions,
        "batches": part.batches,
        "memory": memory_document(part.plan, part.memory),
    }


def _loss(question: Question, fleet: Fleet, best: Fleet) -> float | None:
    """What a fleet loses to the best by the first objective, as a share of what that one reaches."""
    cost, least = (question.objective.signed(one.value) for one in (fleet, best))
    return (cost - least) / abs(least) if least else None


def fleet_page(document: Document) -> str:
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
        console.print(Text.assemble("best fleet: ", (best["plan"], "bold green"), text))
        _parts(console, best["parts"])
        for part in best["parts"]:
            if "replicas" in part:
                where_table(console, part["replicas"], f"Where it goes: {part['gpu']}")
        _alone(console, document)
        if len(document["candidates"]) > 1:
            candidates_table(console, document, "fleet")
        if "beside" in document:
            beside_table(console, document)
        service_tables(console, best["metrics"])
        for part in best["parts"]:
            memory_table(console, f"Memory per GPU, GB: {part['gpu']}", part["memory"])
    for certificate in document["certificates"]:
        several = len(certificate["types"]) > 1
        of = f", {' and '.join(certificate['types'])}{' together' if several else ' alone'}"
        proof_lines(console, document, _in_words(certificate), "fleet" if several else "plan", of)
    for certificate in document["pipelines"]:
        proof_lines(console, document, certificate, "pipeline", f", stages on {' and on '.join(certificate['types'])}")
    if best is not None:
        if document["gap"] is not None and not document["optimal"]:
            console.print(f"The best there is may be better by up to {document['gap']:.1%}.\n")
        provenance_table(console, document["provenance"])
    if "launch" in document:
        launch_section(console, document["launch"])


def _in_words(certificate: Document) -> Document:
    """A certificate whose kinds of infeasible fleets have names for people, those of searches before it too."""
    named = {_INFEASIBLE.get(name, name): number for name, number in certificate["infeasible"].items()}
    return certificate | {"infeasible": named, "before": [_in_words(before) for before in certificate["before"]]}


def _parts(console: Console, parts: Sequence[Document]) -> None:
    """What each type of GPU does."""
    heads = ("GPU type", "plan", "GPUs", "requests", "share", "kJ", "MFU", "MBU", "idle")
    rows = [
        (
            part["gpu"],
            part["plan"],
            str(part["gpus"]),
            f"{part['requests']:,}",
            f"{part['share']:.1%}",
            f"{part['energy_j'] / 1e3:,.1f}",
            f"{part['mfu']:.1%}",
            f"{part['mbu']:.1%}",
            seconds(part["operations_s"]["idle"]),
        )
        for part in parts
    ]
    table(console, "Parts of the fleet", heads, rows, left={0, 1}, kept=range(5))


def _alone(console: Console, document: Document) -> None:
    """The best plan of each type alone, and what it loses to the fleet."""
    objective = document["objective"]
    rows = []
    for pool, fleet in zip(document["question"]["cluster"]["pools"], document["alone"], strict=True):
        if fleet is None:
            rows.append((pool["gpu"], "none meets the constraints and goals", "-", "-", "-"))
            continue
        loss = "-" if fleet["loss"] is None else f"{fleet['loss']:.1%}"
        plan = fleet["parts"][0]["plan"]
        rows.append((pool["gpu"], plan, str(fleet["gpus"]), amount(fleet["value"], objective["unit"]), loss))
    heads = ("GPU type", "plan", "GPUs", objective["name"], "loss")
    table(console, "Best plan of each type alone", heads, rows, left={0, 1})
