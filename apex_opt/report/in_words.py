"""What an answer says, in a few whole sentences: what stands first in a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.report.layout import amount, count, kilojoules, seconds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.schema import Document

_CHANGES = 3
_LISTED = {"models": "model", "clusters": "cluster", "traces": "trace"}


def in_words(document: Document) -> Iterator[str]:
    """An answer in sentences, by what its document has; of one that lists what can be named how many.

    Parameters
    ----------
    document : as plain data
    """
    if document.get("reason"):
        yield f"There is no answer ({document['status']}): {document['reason']}."
        yield from _changes(document)
    elif "objectives" in document:
        yield from _front(document)
    elif "fastest_by" in document:
        yield from _clusters(document)
    elif "differences" in document:
        yield from _plans(document)
    elif "coverage" in document:
        yield from _validation(document)
    elif "rank_order" in document:
        yield from _placed(document)
    elif isinstance(document.get("best"), dict):
        yield from _best(document)
    elif (listed := next((name for name in _LISTED if name in document), None)) is not None:
        yield f"{count(len(document[listed]), _LISTED[listed])} can be named as --{_LISTED[listed]}."


def _best(document: Document) -> Iterator[str]:
    best = document["best"]
    given = document["command"] == "simulate"
    yield f"The plan {'as given' if given else 'found'} is {best['plan']}, on {count(best['gpus'], 'GPU')}."
    if "rate_per_s" in best:
        yield f"It sustains {best['rate_per_s']:.3f} requests per second within the goals."
    elif best["value"] is not None:
        objective = document["objective"]
        yield f"Its {objective['name']} is {amount(best['value'], objective['unit'])}."
    yield from _seen(best["metrics"])
    if document["status"] == "optimal":
        yield "It is proved that no other plan of the space is better under these costs."


def _seen(metrics: Document) -> Iterator[str]:
    """What the requests see, what that takes, and which goals are met."""
    first, last = (metrics[key].get("p95") for key in ("ttft_s", "e2e_s"))
    if first is not None and last is not None:
        yield (
            f"95 of 100 requests see their first token within {seconds(first)} and their last within {seconds(last)}; "
            f"serving them takes {kilojoules(metrics['energy_j'])} kJ."
        )
    if metrics["slo"]:
        missed = [text for text, goal in metrics["slo"].items() if not goal["met"]]
        yield f"It misses {', '.join(missed)}." if missed else f"It meets {', '.join(metrics['slo'])}."


def _changes(document: Document) -> Iterator[str]:
    """Changes that would give a plan."""
    found = document.get("relaxations") or []
    options = (" ".join(f"--{name}={value}" for name, value in one["options"].items()) for one in found[:_CHANGES])
    if found:
        yield f"Feasible would be, fewest GPUs first: {'; '.join(options)}."


def _front(document: Document) -> Iterator[str]:
    front = document["candidates"]
    names = " against ".join(objective["name"] for objective in document["objectives"])
    yield f"{count(len(front), 'plan')} on the front of {names}, and {count(len(document['beaten']), 'plan')} beaten."
    for objective in document["objectives"]:
        name, sign = objective["name"], -1 if objective["maximise"] else 1
        known = [plan for plan in front if plan["values"][name] is not None]
        if known:
            best = min(known, key=lambda plan: sign * plan["values"][name])
            reached = amount(best["values"][name], objective["unit"])
            yield f"The best {name} is {reached}, of {best['plan']} on {count(best['gpus'], 'GPU')}."
    if document["status"] == "optimal":
        yield "It is proved that every other plan of the space is beaten by one of these."


def _clusters(document: Document) -> Iterator[str]:
    for one in document["clusters"]:
        best = one["answer"]["best"]
        if best is None:
            yield f"{one['cluster']}: none, {one['answer']['reason']}."
        else:
            reached = f"sustains {best['rate_per_s']:.3f} requests per second" if "rate_per_s" in best else ""
            if not reached:
                objective = one["answer"]["objective"]
                reached = f"reaches {objective['name']} = {amount(best['value'], objective['unit'])}"
            yield f"On {one['cluster']} the best plan is {best['plan']}, which {reached}."


def _plans(document: Document) -> Iterator[str]:
    if document["best"] is not None:
        best = document["plans"][document["best"] - 1]
        yield f"Of {count(len(document['plans']), 'plan')} the best is {best['plan']}."
        if best["best"]:
            yield from _seen(best["best"]["metrics"])


def _validation(document: Document) -> Iterator[str]:
    covered = document["coverage"]
    yield f"{covered['predicted']:,} of {count(covered['total'], 'measured run')} predicted."
    errors = (f"{name} {one['mean_ape_pct']:.1f}% ({one['n']:,} runs)" for name, one in document["summary"].items())
    if document["summary"]:
        yield f"Mean absolute errors: {', '.join(errors)}."


def _placed(document: Document) -> Iterator[str]:
    loss = document["loss"]
    placement, plan = (loss["placement"], loss["plan"]) if loss else (document["placement"], document["plan"])
    gpus = sum(len(stage) for one in placement["replicas"] for stage in one["stages"])
    yield f"{plan} is placed on {count(gpus, 'GPU')} of {document['cluster']}; no placement is better."
    yield (
        f"The collectives of a full batch take {seconds(placement['collectives_s'])} there, and the whole step "
        f"{seconds(placement['step_s'])}."
    )
