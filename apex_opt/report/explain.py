"""Explanations as plain data and as a page: why there is no plan, what would give one, why a plan loses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from rich.padding import Padding
from rich.text import Text

from apex_opt.report import types
from apex_opt.report.document import answer_document
from apex_opt.report.layout import (
    NOUNS,
    aim,
    amount,
    count,
    lies_table,
    notes_lines,
    of_types,
    page,
    provenance_table,
    seconds,
    table,
)
from apex_opt.schema import of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from apex_opt.report import studied
    from apex_opt.schema import Document
    from apex_opt.search import Problem
    from apex_opt.studies.explain import Comparison, Diagnosed, Explanation

_TERMS_SHOWN: Final = 12
_DERIVED: Final = "derived: what each operation asks of each resource by the tables; the busiest one alone and the host"
_HALVES: Final = "derived: halves by the tables at half the tokens; the vote was read, even shares are assumed"
_ALONE: Final = {"type": "gpu", "way to serve": "serving"}
_RESOURCES: Final = ("compute", "memory", "network", "host")
_SERVING: Final = {
    "aggregated": "batches of both phases",
    "pools": "prefill and decode pools",
    "shared": "phases that share GPUs",
}
"""Ways to serve, in words."""
_PROOFS: Final = {
    "constraints": "by the constraints, before anything is simulated",
    "bound": "by a lower bound of every plan",
    "simulation": "by simulating the plans",
}


def explanation_document(problem: Problem, found: Explanation, provenance: dict[str, Any]) -> types.Searched:
    """An explanation and the answer it is of; seconds, joules, requests per second.

    Parameters
    ----------
    problem
    found : Explanation     what was explained
    provenance : mapping    where each figure comes from
    """
    from apex_opt.report import studied

    kinds, compared = (studied.Explained, studied.MixedExplained), found.comparison
    more = why_document(found) | {"comparison": None if compared is None else _comparison(compared)}
    if not problem.several:
        more["head_room"] = [of(studied.HeadRoomFacts, one, source=_DERIVED) for one in found.head_room]
        if found.two_batches:
            more["two_batches"] = [of(studied.TwoBatchesFacts, one, source=_HALVES) for one in found.two_batches]
    return answer_document("explain", problem, found.answer, provenance, kinds=kinds, **more)


def why_document(found: Explanation) -> dict[str, Any]:
    """Why there is no answer and what would help, where that was asked."""
    several, ways_to_serve = (len({getattr(one, of) for one in found.diagnosed}) > 1 for of in ("gpu", "serving"))
    tried = [(one, one.tried) for one in found.diagnosed if one.tried is not None]
    ways = sorted(((one, way) for one, what in tried for way in what.found), key=lambda pair: pair[1].more_gpus)
    return {
        "clashes": [
            of(
                types.Clash,
                clash,
                gpu=one.gpu if several else None,
                serving=one.serving if ways_to_serve else None,
            )
            for one in found.diagnosed
            for clash in one.clashes
        ],
        "relaxations": [
            of(
                types.Relaxation,
                way,
                way.solved,
                plan=str(way.solved.deployment),
                gpus=way.solved.deployment.devices,
                gpu=one.gpu if several else None,
                serving=one.serving if ways_to_serve else None,
            )
            for one, way in ways
        ],
        "tried_for_nothing": [way for one, what in tried for way in _on(one, several, ways_to_serve, what.failed)],
        "not_tried": [way for one, what in tried for way in _on(one, several, ways_to_serve, what.untried)],
        "explain_time_limit_s": found.time_limit_s,
    }


def _on(one: Diagnosed, types: bool, kinds: bool, ways: Sequence[str]) -> list[str]:
    """Changes, with what is explained alone where there are several types of GPU or ways to serve.

    Parameters
    ----------
    one : Diagnosed
    types, kinds : whether there are several
    ways : the changes
    """
    alone = [*([f"{one.gpu} alone"] if types else ()), *([_SERVING[one.serving]] if kinds else ())]
    return [f"{', '.join(alone)}: {way}" if alone else way for way in ways]


def _comparison(comparison: Comparison) -> studied.ComparedPlan:
    one = comparison.scored
    from apex_opt.report import studied

    return studied.ComparedPlan(
        plan=str(comparison.deployment),
        gpus=comparison.deployment.devices,
        value=None if one is None else one.value,
        meets_slos=None if one is None else one.meets_slos,
        reason=comparison.reason,
        preemptions=None if one is None else sum(use.preemptions for use in one.pools),
        batches=None if one is None else sum(use.batches for use in one.pools),
        makespan_s=None if one is None else one.metrics.value("makespan"),
        terms=tuple(of(studied.ComparedTerm, t, plan=t.values[0], best=t.values[1]) for t in comparison.terms),
        lies=tuple(of(types.Lies, lies) for lies in comparison.lies),
    )


def explanation_page(document: Document) -> str:
    """The same for people."""
    return page(lambda console: _page(console, document))


def _page(console: Console, document: Document) -> None:
    asked = document["question"]
    offered = " + ".join(
        f"{pool['offered']} x {pool['gpu']}" for pool in asked["cluster"].get("pools", [asked["cluster"]])
    )
    weights = dict.fromkeys(name for pool in asked["cluster"].get("pools", [asked]) for name in pool["weights"])
    console.print(
        Text.assemble(
            (asked["model"]["name"], "bold"),
            " on ",
            (offered, "bold"),
            f", weights {' or '.join(weights)}, trace {asked['trace']['name']}"
            + "".join(f", {goal}" for goal in asked["slo"]),
        )
    )
    notes_lines(console, document)
    if "pipelines" in document:
        console.print(_compared_shapes(document))
    if document["clashes"]:
        console.print()
        why_not(console, document)
    elif document["best"] is None:
        console.print(Text.assemble((document["status"], "bold red"), f": {document['reason']}\n"))
    else:
        best = document["best"]
        plan = (best["plan"], "bold green")
        value = ", ".join(map(aim, (document["objective"], *document["then"])))
        console.print(
            Text.assemble("feasible: the best plan is ", plan, f" on {count(best['gpus'], 'GPU')}, {value}\n")
        )
    if document["comparison"] is not None:
        _compared(console, document)
    if document.get("head_room"):
        _head_room(console, document)
    if document.get("two_batches"):
        _two_batches(console, document)
    if document["best"] is not None:
        provenance_table(console, document["provenance"])


def _compared_shapes(document: Document) -> str:
    """Of several types of GPU, what was compared: how many deployments of each shape."""
    shapes = [("mixed" if len(part["types"]) > 1 else "single", part) for part in document["certificates"]]
    shapes += [("pipeline", part) for part in document["pipelines"]]
    shapes += [("pools", part) for part in document.get("pools", ())]
    told = [f"{count(part['space'], NOUNS[shape])} ({of_types(shape, part['types'])})" for shape, part in shapes]
    of_each = [name for name in ("type", "way to serve") if any(_ALONE[name] in clash for clash in document["clashes"])]
    why = " None fits."
    if of_each:
        why = f" None fits; why is told of each {' and '.join(of_each)} alone, as what gives one of them a plan gives "
        why += "one to the whole."
    every = " and ".join(filter(None, (", ".join(told[:-1]), told[-1])))
    return f"Compared were {every}.{why if document['clashes'] else ''}"


def _head_room(console: Console, document: Document) -> None:
    """What overlap could give the best plan at best."""
    rows = [
        (
            one["kind"] if one["kind"] == "prompts" else "answers alone",
            f"{one['batches']:,}",
            *(seconds(one[f"{name}_s"]) for name in ("batch", *_RESOURCES, "least")),
            f"{one['gain']:z.0%}",
        )
        for one in document["head_room"]
    ]
    heads = ("batches with", "how many", "time", *_RESOURCES, "at best", "saved")
    table(console, "Head-room of overlap, mean batch of the best plan (derived)", heads, rows, left={0})


def _two_batches(console: Console, document: Document) -> None:
    """What two batches in place of one do to the forwards of the best plan, or would."""
    rows = [
        (
            one["kind"] if one["kind"] == "prompts" else "answers alone",
            f"{one['forwards']:,}",
            f"{one['split']:,}",
            seconds(one["whole_s"]),
            seconds(one["two_s"]),
            f"{one['gain']:z.0%}",
        )
        for one in document["two_batches"]
    ]
    heads = ("forwards with", "how many", "split", "without", "with two batches", "saved")
    table(console, "Two batches in place of one, --overlap=two_batches (derived)", heads, rows, left={0})
    console.print(
        "Here every rank is taken to have an even share, and prompts to come one to a forward; head-room is that of "
        "the batches as they came. So their times differ.\n"
    )


def why_not(console: Console, document: Document) -> None:
    """The constraints that clash, what would give a plan, and what was tried for nothing or not at all."""
    for clash in document["clashes"]:
        names = (" and ".join(clash["of"]), "bold")
        several = len(clash["of"]) > 1
        fewer = ", though some plan satisfies any fewer of them" if clash["smallest"] else ""
        proof = f", shown {_PROOFS[clash['proof']]}."
        said = f": no plan satisfies {f'them together{fewer}' if several else 'it'}{proof}"
        alone = f", {_SERVING[clash['serving']]}" if "serving" in clash else ""
        alone += f" on {clash['gpu']} alone" if "gpu" in clash else ""
        console.print(Text.assemble(("infeasible", "bold red"), f"{alone}, ", names, said))
        for fact in clash["facts"]:
            console.print(Padding(Text(f"{fact}."), (0, 0, 0, 2)))
        if several and not clash["smallest"]:
            console.print(
                Padding("Fewer of them may clash already: the time was up before that was known.", (0, 0, 0, 2))
            )
        console.print()
    unit = document["objective"]["unit"]
    rows = [
        (
            " ".join(_option(name, value) for name, value in way["options"].items()),
            way["text"]
            + (f" (on {way['gpu']} alone)" if "gpu" in way else "")
            + (f" ({_SERVING[way['serving']]})" if "serving" in way else ""),
            way["plan"],
            "-" if way["value"] is None else amount(way["value"], unit),
        )
        for way in document["relaxations"]
    ]
    if rows:
        heads = ("ask for", "that is", "plan", document["objective"]["name"])
        table(console, "Feasible would be, fewest GPUs first", heads, rows, left={0, 1, 2})
    elif not document["not_tried"]:
        console.print("No change that was tried makes it feasible: use other GPUs, or a lighter or shorter trace.")
    notes = []
    if early := [way["plan"] for way in document["relaxations"] if not way["best"]]:
        notes.append(f"Not shown to be the best, the time was up: {', '.join(early)}.")
    if any("weights" in way["options"] for way in document["relaxations"]):
        notes.append("Of weight formats that give a plan the one of the most bits is told; a narrower may be faster.")
    if document["tried_for_nothing"]:
        notes.append(f"Alone would not do: {', '.join(document['tried_for_nothing'])}.")
    if document["not_tried"]:
        limit = f"{document['explain_time_limit_s']:g} s"
        left = ", ".join(document["not_tried"])
        notes.append(f"Not tried, as the time limit of {limit} was reached: {left}. A longer --time_limit tries them.")
    if notes:
        console.print("\n".join(notes) + "\n")


def _option(name: str, value: str) -> str:
    """An option as a shell takes it; a cluster that is not in the catalogue grows in its file."""
    if name == "nodes":
        return f"nodes = {value} in the cluster's file"
    return f"--{name}={value}" if value.replace("-", "").replace(".", "").isalnum() else f'--{name}="{value}"'


def _compared(console: Console, document: Document) -> None:
    given, best, objective = document["comparison"], document["best"], document["objective"]
    if given["meets_slos"] is None:
        console.print(f"{given['reason']}\n")
        return
    reason = f"; it {given['reason']}" if given["reason"] else ""
    if best is None:
        console.print(f"{given['plan']} runs{reason}\n")
        lies_table(console, given["lies"])
        return
    values = [amount(one["value"], objective["unit"]) for one in (given, best)]
    if given["plan"] == best["plan"]:
        console.print(f"The plan that was given is the best: {objective['name']} = {values[0]}\n")
        lies_table(console, given["lies"])
        return
    console.print(
        f"{given['plan']} on {count(given['gpus'], 'GPU')}: {objective['name']} = {values[0]}, the best has {values[1]}"
        f"{_apart(given['value'], best['value'])}{reason}\n"
    )
    metrics = best["metrics"]
    facts = [
        ("GPUs", str(given["gpus"]), str(best["gpus"])),
        ("preemptions", f"{given['preemptions']:,}", f"{metrics['preemptions']:,}"),
        ("batches", f"{given['batches']:,}", f"{metrics['batches']:,}"),
        ("makespan", seconds(given["makespan_s"]), seconds(metrics["makespan_s"])),
    ]
    table(console, "Runs", ("", "plan", "best"), facts, left={0})
    terms_table(console, ("plan", "best"), [term | {"values": (term["plan"], term["best"])} for term in given["terms"]])
    lies_table(console, given["lies"])


def terms_table(console: Console, runs: Sequence[str], terms: Sequence[Document]) -> None:
    """What differs between runs, part by part, a column for each run; of two also how much.

    Parameters
    ----------
    console
    runs : sequence of str          heads of the two columns
    terms : sequence of Document    what differs
    """
    if not terms:
        console.print(f"The {len(runs)} runs take the same.\n")
        return
    two = len(runs) == 2
    rows = [
        (
            term["part"],
            term["name"],
            *(amount(value, term["unit"]) for value in term["values"]),
            *([_signed(term["values"][0] - term["values"][1], term["unit"])] if two else []),
            f"{term['share']:.1%}",
        )
        for term in terms[:_TERMS_SHOWN]
    ]
    heads = ("of", "", *runs, *(["difference"] if two else []), "share")
    table(console, "What differs, largest share of its whole first", heads, rows, left={0, 1})


def _signed(value: float, unit: str) -> str:
    return ("+" if value > 0 else "-") + amount(abs(value), unit)


def _apart(value: float | None, best: float | None) -> str:
    if value is None or not best or value == best:
        return ""
    return f" ({value / best - 1:+z.1%})"
