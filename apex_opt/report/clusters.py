"""The same problem on several clusters, side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.text import Text

from apex_opt.figures.registry import figure, split
from apex_opt.report import studied
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import amount, count, kilojoules, notes_lines, page, provenance_table, seconds, table
from apex_opt.report.load import said_of
from apex_opt.report.robust import robust_section
from apex_opt.report.side_by_side import merged
from apex_opt.report.sources import in_full
from apex_opt.report.tables import certificate_line, cluster_words, question_line
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from apex_opt.report.types import Status
    from apex_opt.schema import Document


def clusters_document(command: str, found: Sequence[Any]) -> studied.ClustersAnswer:
    """The answer of a command on each of several clusters, and which is the cheapest and which the fastest.

    `cheapest` is by $ per million output tokens, or by $ per hour where a rate was given; `fastest` by the objective
    where it is a latency, a rate or the makespan, else by the mean E2E, and of `capacity` by the rate; `best` by the
    objective: numbers of the cluster, from 1, or null.

    Parameters
    ----------
    command : str
    found : the document of each; costs are told in them
    """
    answers = [to_plain(one) for one in found]
    names = [answer["question"]["cluster"]["name"] for answer in answers]
    able = [number for number, answer in enumerate(answers, 1) if answer["best"] is not None]
    by_speed, speed = _speed(answers[0])
    return studied.ClustersAnswer(
        command=command,
        status=_status([answers[number - 1]["status"] for number in able]),
        cheapest=_least(answers, able, _cost(answers[0])),
        fastest=_least(answers, able, speed),
        fastest_by=by_speed,
        best=_least(answers, able, _value(answers[0])),
        clusters=tuple(studied.ClusterAnswer(cluster=n, answer=one) for n, one in zip(names, found, strict=True)),
        question=replace(found[0].question, cluster=None),
        transient=said_of(zip(names, answers, strict=True)),
        provenance=merged([_priced_apart(answer) for answer in answers]),
        notes=tuple(dict.fromkeys(note for one in found for note in one.notes)),
    )


def _priced_apart(answer: Document) -> dict[str, str]:
    """Where the figures of one cluster come from, its price under its name, as others have theirs."""
    name = answer["question"]["cluster"]["name"]
    told = in_full(answer["provenance"])
    return {f"{name}, price" if figure == "price" else figure: text for figure, text in told.items()}


def _status(found: Sequence[str]) -> Status:
    """Of all answers: proved where every one is."""
    return "infeasible" if not found else "optimal" if set(found) == {"optimal"} else "feasible"


def _least(answers: Sequence[Document], able: Sequence[int], figure: Callable[[Document], float | None]) -> int | None:
    """The number of the cluster whose best plan has least of a figure."""
    known = [(value, number) for number in able if (value := figure(answers[number - 1]["best"])) is not None]
    return min(known)[1] if known else None


def _cost(answer: Document) -> Callable[[Document], float | None]:
    """What a best plan costs."""
    name = "cost_usd_per_h" if answer.get("asked", {}).get("rate_per_s") else "cost_usd_per_mtoken"
    return lambda best: best["metrics"].get(name)


def _speed(answer: Document) -> tuple[str, Callable[[Document], float | None]]:
    """By what a plan is fast, its name and its figure, less being faster."""
    if "asked" in answer:
        if answer["asked"]["rate_per_s"] is None:
            return "rate", _value(answer)
        return "e2e_mean", lambda best: best["metrics"]["e2e_s"]["mean"]
    objective = answer["objective"]
    if figure(split(objective["name"])[0]).is_speed:  # by others the mean time of a request tells
        return objective["name"], _value(answer)
    return "e2e_mean", lambda best: best["metrics"]["e2e_s"]["mean"]


def _value(answer: Document) -> Callable[[Document], float | None]:
    """What a best plan reaches by the objective, less being better."""
    if "asked" in answer:
        given = answer["asked"]["rate_per_s"] is not None
        return lambda best: best["gpus"] if given else -best["rate_per_s"]
    sign = -1 if answer["objective"]["direction"] == "maximise" else 1
    return lambda best: None if best["value"] is None else sign * best["value"]


def clusters_page(document: Document) -> str:
    """The same for people."""
    return page(lambda console: _page(console, document))


def _page(console: Console, document: Document) -> None:
    rows, first = document["clusters"], document["clusters"][0]["answer"]
    told = document["question"] | {"cluster": {"name": count(len(rows), "cluster"), "gpu": ""}}
    question_line(console, told)
    if document["question"]["slo"]:
        console.print(f"goals: {', '.join(document['question']['slo'])}")
    notes_lines(console, document)
    console.print()
    columns = _columns(first, document["fastest_by"])
    heads = ("cluster", "", "best plan", "GPUs", *(head for head, _ in columns))
    lines = []
    for number, row in enumerate(rows, 1):
        best, name = row["answer"]["best"], Text.assemble(*cluster_words(row["answer"]["question"]["cluster"])).plain
        marks = [mark for mark in ("cheapest", "fastest") if document[mark] == number]
        if best is None:
            lines.append((name, "", row["answer"]["status"], *["-"] * (1 + len(columns))))
        else:
            figures = (figure(best) for _, figure in columns)
            lines.append((name, ", ".join(marks), best["plan"], str(best["gpus"]), *figures))
    table(console, "Best plan on each cluster", heads, lines, left={0, 1, 2}, kept={0, 1, 2, 3, 4})
    for row in rows:
        if row["answer"]["best"] is None:
            text = f"{row['answer']['status']} on {row['cluster']}: {row['answer']['reason']}"
            console.print(Text(text, "red"))
    if document["best"] is None:
        return
    by = f"fastest by {document['fastest_by']}"
    console.print(f"{by}; cheapest by {_dearness(first)}, at prices that are assumed unless given\n")
    for row in rows:
        if row["answer"].get("robust") or "check" in row["answer"]:
            console.print(Text(row["cluster"], "bold"))
            certificate_line(console, row["answer"])
            robust_section(console, row["answer"])
    provenance_table(console, document["provenance"])
    for row in rows:
        if "launch" in row["answer"]:
            console.print(Text(row["cluster"], "bold"))
            launch_section(console, row["answer"]["launch"])


def _dearness(answer: Document) -> str:
    return "$ per hour" if answer.get("asked", {}).get("rate_per_s") else "$ per million output tokens"


def _columns(answer: Document, fastest_by: str) -> list[tuple[str, Callable[[Document], str]]]:
    """Heads and cells of the figures of a best plan."""

    def latency(name: str, statistic: str) -> Callable[[Document], str]:
        return lambda best: seconds(best["metrics"][f"{name}_s"][statistic])

    def dollars(name: str, places: int) -> Callable[[Document], str]:
        return lambda best: _figure(best["metrics"].get(name), places)

    found: list[tuple[str, Callable[[Document], Any]]] = []
    if "asked" in answer:
        found.append(("req/s", lambda best: f"{best['rate_per_s']:.2f}"))
        found.append(("per GPU", lambda best: f"{best['rate_per_gpu_per_s']:.2f}"))
        if fastest_by != "rate":
            found.append(("E2E mean", latency("e2e", "mean")))
    else:
        objective = answer["objective"]
        found.append((objective["name"], lambda best: amount(best["value"], objective["unit"])))
        if fastest_by != objective["name"]:
            found.append(("E2E mean", latency("e2e", "mean")))
    found.append(("$/Mtoken", dollars("cost_usd_per_mtoken", 3)))
    found.append(("$/h", dollars("cost_usd_per_h", 2)))
    found.append(("TTFT p95", latency("ttft", "p95")))
    found.append(("TPOT p95", latency("tpot", "p95")))
    if "asked" not in answer:
        found.append(("req/s", lambda best: f"{best['metrics']['throughput_rps']:.2f}"))
    found.append(("kJ", lambda best: kilojoules(best["metrics"]["energy_j"])))
    return found


def _figure(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:,.{places}f}"
