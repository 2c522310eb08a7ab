"""Tables for people, made from the same documents that programs get."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt.figures.goals import parse_goals
from apex_opt.figures.registry import figure, per_item, split
from apex_opt.figures.units import percent
from apex_opt.report.expected import expected_table
from apex_opt.report.explain import why_not
from apex_opt.report.launch import launch_section
from apex_opt.report.layout import (
    NOUNS,
    aim,
    amount,
    count,
    kilojoules,
    notes_lines,
    of_types,
    page,
    provenance_table,
    seconds,
    table,
)
from apex_opt.report.robust import robust_section
from apex_opt.units import GB, GIB, TERA, add_up

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

    from rich.console import Console

    from apex_opt.figures import Figure
    from apex_opt.schema import Document

    Read = Callable[[Document], str]
    Column = tuple[str, Read]

_OPERATIONS_SHOWN: Final = 12
_BAR: Final = 30
_DISAGREEMENTS: Final = 3

_INFEASIBLE: Final = {
    "part": "with an infeasible part",
    "gpus": "on more GPUs than offered",
    "share": "with a part that gets nothing to do",
    "handover": "that cannot hand prompts over",
    "room": "without room beside each other",
}
"""Why deployments of several pools are infeasible, in words."""


def rendered(document: Document) -> str:
    """A document as text, as wide as `apex_opt.report.layout.page` makes it."""
    return page(lambda console: (_answer if "certificate" in document else _listing)(console, document))


def _answer(console: Console, document: Document) -> None:
    objective, best = document["objective"], document["best"]
    question_line(console, document["question"])
    notes_lines(console, document)
    if document.get("clashes"):
        why_not(console, document)
    elif best is None:
        console.print(Text.assemble((document["status"], "bold red"), f": {document['reason']}\n"))
    else:
        word = "plan as given" if document["command"] == "simulate" else "best plan"
        text = f" on {count(best['gpus'], 'GPU')}, {', '.join(map(aim, (objective, *document['then'])))}\n"
        console.print(Text.assemble(f"{word}: ", (best["plan"], "bold green"), text))
        if len(document["candidates"]) > 1:
            candidates_table(console, document)
        if "beside" in document:
            beside_table(console, document)
        if "placement" in document:
            from apex_opt.report.placement_tables import placement_section

            placement_section(console, document["placement"])
        best_tables(console, best)
        expected_table(console, document)
    certificate_line(console, document)
    robust_section(console, document)
    if best is not None:
        provenance_table(console, document["provenance"])
    if "launch" in document:
        launch_section(console, document["launch"])


def question_line(console: Console, question: Document, load: str = "", end: str = "") -> None:
    """Model, GPUs and traffic that were asked about.

    Parameters
    ----------
    console, question
    load : str    how requests come, where that is not to be told as it is
    end : str     what else was asked
    """
    trace = question["trace"]
    load = load or (count(trace["concurrency"], "client") if trace["concurrency"] else _arrivals(trace))
    console.print(
        Text.assemble(
            (question["model"]["name"], "bold"),
            f" ({question['model']['parameters'] / 1e9:.1f} B parameters) on ",
            *cluster_words(question["cluster"]),
            f", trace {trace['name']} ({count(trace['requests'], 'request')}, {load}){end}",
        )
    )


def cluster_words(cluster: Document) -> Iterator[str | tuple[str, str]]:
    """The cluster of a question, and its accelerators where the name does not tell them."""
    yield cluster["name"], "bold"
    gpus = [pool["gpu"] for pool in cluster.get("pools", [cluster])]
    if not all(gpu in cluster["name"] for gpu in gpus):
        yield f" ({' + '.join(gpus)})"


def beside_table(console: Console, document: Document) -> None:
    """The plan with the least energy against the one with the best latency."""
    other = document["beside"]
    rows = [
        (
            best_for,
            plan["plan"],
            str(plan["gpus"]),
            kilojoules(plan["metrics"]["energy_j"]),
            *(seconds(plan["metrics"][f"{name}_s"]["p95"]) for name in ("ttft", "tpot", "e2e")),
        )
        for best_for, plan in (("energy", document["best"]), (other["objective"], other["best"]))
    ]
    head = ("best for", "plan", "GPUs", "kJ", "TTFT p95", "TPOT p95", "E2E p95")
    title = f"{other['energy_saving']:.1%} less energy than the best {other['objective']}"
    table(console, title, head, rows, left={0, 1})


def candidates_table(console: Console, document: Document, word: str = "plan") -> None:
    """The best plans, or what else there is to choose from, and what each reaches.

    Parameters
    ----------
    console, document
    word : str    for a candidate: plan or fleet
    """
    objective, then, runs = document["objective"], document["then"], document["candidates"]
    of_requests, goals = figure_columns(runs[0]["metrics"], {one["name"] for one in (objective, *then)})
    columns: dict[str, Read] = {
        word: lambda c: c["plan"],
        "GPUs": lambda c: str(c["gpus"]),
        objective["name"]: lambda c: amount(c["value"], objective["unit"]),
        **{part["name"]: _then(place, part["unit"]) for place, part in enumerate(then)},
        **of_requests,
        "req/s": lambda c: f"{c['metrics']['throughput_rps']:.2f}",
        "kJ": lambda c: kilojoules(c["metrics"]["energy_j"]),
    }
    if all("mfu" in run["metrics"] for run in runs):
        columns |= {
            "MFU": lambda c: f"{c['metrics']['mfu']:.1%}",
            "MBU": lambda c: f"{c['metrics']['mbu']:.1%}",
        }
    told = told_once(runs)
    rows = [(str(rank), *(read(runs[rank - 1]) for read in columns.values())) for rank in told]
    heads = ("#", *columns)
    kept = {0, 1, 3} | {place for place, head in enumerate(heads) if head in goals}
    table(console, "Candidates", heads, rows, left={1}, kept=kept)
    alike_lines(console, runs, told)


_LIMIT: Final = re.compile(r" ((?:seqs|tokens)=\d+)")


def told_once(runs: Sequence[Document]) -> dict[int, list[int]]:
    """Runs by their ranks, each with those of others that differ from it in limits which change no figure.

    Parameters
    ----------
    runs : with their plans and metrics, the best first
    """
    told: dict[int, list[int]] = {}
    for rank, run in enumerate(runs, 1):
        alike = (
            before
            for before in told
            if run["metrics"] == runs[before - 1]["metrics"]
            and _LIMIT.sub("", run["plan"]) == _LIMIT.sub("", runs[before - 1]["plan"])
        )
        first = next(alike, rank)
        told.setdefault(first, []).extend([rank] * (rank != first))
    return told


def alike_lines(console: Console, runs: Sequence[Document], told: Mapping[int, Sequence[int]]) -> None:
    """What else has the figures of a row, below its table.

    Parameters
    ----------
    console
    runs : as for `told_once`
    told : what that found
    """
    named = {rank: " ".join(_LIMIT.findall(runs[rank - 1]["plan"])) for ranks in told.values() for rank in ranks}
    lines = [
        f"all figures of {first} are the same with {' or '.join(named[rank] for rank in ranks)}"
        for first, ranks in told.items()
        if ranks
    ]
    if lines:
        console.print(Text("; ".join(lines) + "\n", "dim"))


def _then(place: int, unit: str) -> Read:
    """What a run reaches by a further objective."""
    return lambda run: amount(run["then"][place], unit)


def figure_columns(metrics: Document, told: Collection[str] = ()) -> tuple[dict[str, Read], set[str]]:
    """What requests saw of each of some runs: tails, and whatever goals are on; with the heads of those with a goal.

    Parameters
    ----------
    metrics : of one of the runs
    told : objectives that have a column of their own
    """
    columns = {f"{one.title} p95": _tail(one.key) for one in per_item() if one.of == "request" and one.time}
    heads = set()
    for text, slo in metrics["slo"].items():
        name = re.split("[<>]", text)[0]
        metric, statistic = split(name.partition("@")[0])
        about = figure(metric)
        if slo["unit"] == "share":
            head = text.partition("@")[0]
        else:
            head = about.head if about.of == "run" else f"{about.title} {statistic}"
        if name not in told or slo["unit"] == "share":
            heads.add(head)
            columns.setdefault(head, _goal(text))
    return columns, heads


def _tail(latency: str) -> Read:
    return lambda run: seconds(run["metrics"][latency]["p95"])


def _goal(text: str) -> Read:
    """What a run reaches of a goal, without a unit that its column has in its head."""

    def read(run: Document) -> str:
        reached, unit = (run["metrics"]["slo"][text][key] for key in ("reached", "unit"))
        if unit == "share":
            return f"{reached:.1%}"
        if unit == "J":
            return f"{reached / 1e3:,.1f}"
        return seconds(reached) if unit == "s" else f"{reached:.3f}"

    return read


def best_tables(console: Console, best: Document) -> None:
    """The latencies, service, memory and operations of the plan that is answered."""
    service_tables(console, best["metrics"])
    memory_table(console, "Memory per GPU, GB", best["memory"])
    _operations(console, best["metrics"]["operations_s"])


def in_order() -> list[Figure]:
    """Figures of requests and gaps as tables have them: from the first token on, the whole time of a request last."""
    return sorted(per_item(), key=lambda one: one.time == "whole")


HANDED: Final = {
    "prompt_s": "prompt computed",
    "wait_s": "wait for the read",
    "read_s": "read",
    "answer_s": "first token after it",
    "outside_s": "client to engine and back",
}
"""Parts of the time to the first token where prompts are handed over."""


def service_tables(console: Console, metrics: Document) -> None:
    """What the requests saw, and what serving them took."""
    heads = tuple(metrics["ttft_s"])
    rows = [
        (one.title, *(amount(metrics[one.key][s], one.unit.name) for s in heads))
        for one in in_order()
        if one.key in metrics
    ]
    table(console, "Latency", ("", *heads), rows, left={0}, turned=True)
    if "handover" in metrics:
        parts = [(said, *(seconds(metrics["handover"][part][s]) for s in heads)) for part, said in HANDED.items()]
        table(console, "Of the TTFT", ("", *heads), parts, left={0}, turned=True)
    _priorities(console, metrics.get("priorities", []))
    facts = [
        ("SLO", f"{text}: {'met' if slo['met'] else 'MISSED'}, {_reached(text, slo)}")
        for text, slo in metrics["slo"].items()
    ]
    facts += [
        (
            "throughput",
            f"{metrics['throughput_rps']:.3f} requests/s, {metrics['output_tokens_per_s']:,.0f} output tokens/s, "
            f"{metrics['total_tokens_per_s']:,.0f} tokens/s in all",
        ),
        *_goodput(metrics),
        *_cached(metrics),
        ("makespan", seconds(metrics["makespan_s"])),
        (
            "energy",
            f"{kilojoules(metrics['energy_j'])} kJ, of which {kilojoules(metrics['idle_energy_j'])} kJ idle draw; "
            f"{metrics['energy_per_output_token_j']:.2f} J per output token; {metrics['mean_power_w']:,.0f} W mean",
        ),
        *_cost(metrics),
        *([("utilisation", f"MFU {metrics['mfu']:.1%}, MBU {metrics['mbu']:.1%}")] if "mfu" in metrics else []),
        ("batches", f"{metrics['batches']:,}, {count(metrics['preemptions'], 'preemption')}{_moved(metrics)}"),
    ]
    table(console, "Service", ("", ""), facts, left={0, 1})


def _moved(metrics: Document) -> str:
    return f", {count(metrics['moved'], 'move')} between replicas" if "moved" in metrics else ""


def _priorities(console: Console, priorities: Sequence[Document]) -> None:
    """What the requests of each priority saw."""
    if not priorities:
        return
    columns = [(key, statistic) for key in ("ttft_s", "tpot_s", "e2e_s") for statistic in ("p50", "p99")]
    rows = [
        (
            one["name"],
            f"{one['requests']:,}",
            *(seconds(one[key][statistic]) for key, statistic in columns),
            "-" if one["preemptions"] is None else f"{one['preemptions']:,}",
        )
        for one in priorities
    ]
    heads = (f"{key.removesuffix('_s').upper()} {statistic}" for key, statistic in columns)
    table(console, "By priority", ("", "requests", *heads, "preempted"), rows, left={0})


def _goodput(metrics: Document) -> list[tuple[str, str]]:
    if "goodput_rps" not in metrics:
        return []
    good, share = metrics["goodput_rps"], metrics["goodput_rps"] / metrics["throughput_rps"]
    return [("goodput", f"{good:.3f} requests/s whose own latencies are within the goals, {share:.1%} of all")]


def _cached(metrics: Document) -> list[tuple[str, str]]:
    if "cached_tokens" not in metrics:
        return []
    return [("cache", f"{metrics['cached_tokens']:,} prompt tokens found, {metrics['cache_hit_rate']:.1%} of all")]


def _cost(metrics: Document) -> list[tuple[str, str]]:
    if "cost_usd_per_h" not in metrics:
        return []
    per_token = f"{metrics['cost_usd_per_mtoken']:,.3f} $ per million output tokens"
    return [("cost", f"{metrics['cost_usd_per_h']:,.2f} $/h; {per_token}")]


def _reached(text: str, slo: Document) -> str:
    """The figure that a goal was compared with, and the share of requests within its limit where it is on these."""
    (goal,) = parse_goals(text)
    about, told = goal.figure, amount(slo["reached"], slo["unit"], goal.limit)
    if about.of == "run":
        return told
    share = f"{percent(slo['attainment'], goal.fraction)} of {about.of}s within"
    return share if slo["unit"] == "share" else f"{told} reached, {share}"


def memory_table(console: Console, title: str, stages: Sequence[Document]) -> None:
    """What the memory of a GPU of each stage holds.

    Parameters
    ----------
    console
    title : str                      above the table
    stages : sequence of Document    of the plan
    """
    heads = ("stage", "layers", "weights", "workspace", "runtime", "KV cache", "KV blocks", "usable")
    rows = [
        (
            str(stage),
            str(part["layers"]),
            *(f"{part[key] / GB:.1f}" for key in ("weights_bytes", "workspace_bytes", "runtime_bytes")),
            f"{part['kv_blocks'] * part['kv_block_bytes'] / GB:.1f}",
            f"{part['kv_blocks']:,}" if part["kv_block_bytes"] else "-",
            f"{part['usable_bytes'] / GB:.1f}",
        )
        for stage, part in enumerate(stages)
    ]
    table(console, title, heads, rows, turned=True)


def _operations(console: Console, operations: Document) -> None:
    """Time by operation, longest first; what is too short to list together; idle last and always."""
    total = add_up(operations.values()) or 1.0
    busy = [item for item in operations.items() if item[0] != "idle"]
    shown = busy[:_OPERATIONS_SHOWN]
    if len(busy) > len(shown):
        shown.append(("other", add_up(spent for _, spent in busy[len(shown) :])))
    shown.append(("idle", operations["idle"]))
    rows = [(name, seconds(spent), f"{spent / total:.1%}", "#" * round(_BAR * spent / total)) for name, spent in shown]
    table(console, "Time by operation, mean per GPU", ("", "time", "share", ""), rows, left={0, 3}, kept=range(3))


def _in_brackets(*facts: str) -> str:
    return f" ({', '.join(filter(None, facts))})" if any(facts) else ""


def certificate_line(console: Console, document: Document) -> None:
    """How every plan of the space was accounted for, in each of the searches where there were several."""
    if document["command"] == "simulate" and document["best"] is not None:
        console.print("The plan was scored as given; whether a better one exists is for solve.py plan to say.\n")
        return
    if "certificate" in document:
        _proofs(console, document, document["certificate"])
    for part in document.get("certificates", ()):
        shape = "mixed" if len(part["types"]) > 1 else "single"
        _proofs(console, document, part, NOUNS[shape], f", {of_types(shape, part['types'])}")
    for name, shape in (("pipelines", "pipeline"), ("pools", "pools")):
        for part in document.get(name, ()):
            _proofs(console, document, part, NOUNS[shape], f", {of_types(shape, part['types'])}")
    if "check" in document:
        _check(console, document["check"], bool(document["question"]["slo"]))


def lost_words(infeasible: Document) -> str:
    """How many deployments are infeasible, in all and by what they break."""
    lost = ", ".join(f"{count:,} {_INFEASIBLE.get(family, family)}" for family, count in infeasible.items() if count)
    return f"{sum(infeasible.values()):,} infeasible" + _in_brackets(lost)


def _proofs(console: Console, document: Document, certificate: Document, noun: str = "plan", of: str = "") -> None:
    """One certificate, those of objectives with a tolerance before it; `of` which plans, where not of all."""
    aims = (document["objective"], *document["then"]) if "then" in document else ()
    unit = aims[0]["unit"] if aims else ""
    tolerant = [index for index, part in enumerate(aims) if part["tolerance"]]
    for index, before in zip(tolerant, certificate["before"], strict=False):
        _proof(console, f"Certificate{of} of the best {aims[index]['name']}", before, unit, noun)
        unit = aims[index + 1]["unit"]
    _proof(console, f"Certificate{of}", certificate, unit, noun, shares_words(document))


def shares_words(document: Document) -> str:
    """Over which shares of GPUs a space is, as the end of a certificate; there are others that are not in it."""
    shares = [name for name in document["question"].get("shares") or () if name is not None]
    return f"; shares searched: {', '.join(shares)}" if shares else ""


def _proof(console: Console, title: str, certificate: Document, unit: str, noun: str, over: str = "") -> None:
    """How plans were accounted for.

    Where plans were ruled out by a bound, it tells what was out of reach and how near the others could come.

    Parameters
    ----------
    console
    title : str                 before it
    certificate : Document
    unit, noun : str            of the objective, and what is counted
    over : str                  what the space is over, behind it
    """
    parts = [
        f"{count(certificate['space'], noun)} in the space",
        lost_words(certificate["infeasible"]),
        f"{certificate['bounded']:,} ruled out by a bound"
        + _in_brackets(
            f"{certificate['out_of_reach']:,} miss an SLO" if certificate["out_of_reach"] else "",
            _against(certificate, unit),
        ),
        f"{certificate['repeated']:,} the same with layers moved" if certificate["repeated"] else "",
        f"{certificate['simulated']:,} simulated"
        + _in_brackets(
            f"{certificate['cut_short']:,} cut short" if certificate["cut_short"] else "",
            f"{certificate['missed']:,} missed an SLO" if certificate["missed"] else "",
        ),
    ]
    if certificate["left"]:
        parts.append(f"{certificate['left']:,} left when the time was up")
    proof = f"every {noun} is accounted for" if certificate["optimal"] else "the space was not exhausted"
    if certificate["optimal"] and certificate["left"]:
        proof = "none of those left can be better"
    gap = "" if certificate["gap"] is None else f", gap {certificate['gap']:.1%}"
    console.print(Text.assemble((title, "bold"), f": {'; '.join(filter(None, parts))}: {proof}{gap}{over}.\n"))


def _against(certificate: Document, unit: str) -> str:
    """How near the plans ruled out could come to those shown."""
    if certificate["least_bound"] is None:
        return ""
    least, found = (amount(certificate[name], unit) for name in ("least_bound", "incumbent"))
    return f"at best {least}, those shown have {found} or better"


def _check(console: Console, check: Document, goals: bool) -> None:
    """What replaying the certificate found.

    Parameters
    ----------
    console, check
    goals : bool    whether there are any
    """
    lost, same, chosen = sum(check["infeasible"].values()), check["repeated"], check.get("chosen")
    counted = count(check["space"], "deployment" if "parts" in check else "plan")
    meeting = f", {check['meeting']:,} within the goals" if goals else ""
    replay = (
        f"{counted} counted again, {lost:,} infeasible, {same:,} the same with layers moved; "
        f"{check['simulated']:,} simulated to the end{f' ({chosen})' if chosen else ''}{meeting}"
    )
    if check["holds"]:
        console.print(Text.assemble(("Check", "bold"), f": {replay}: the certificate holds.\n"))
        return
    shown = check["disagreements"][:_DISAGREEMENTS]
    more = len(check["disagreements"]) - len(shown)
    faults = "; ".join(shown) + (f"; {more:,} more" if more else "")
    console.print(Text.assemble(("Check", "bold"), f": {replay}: the certificate does not hold: {faults}.\n"))


def _listing(console: Console, document: Document) -> None:
    kind = next(key for key in _LISTINGS if key in document)
    columns = _LISTINGS[kind]
    rows = [tuple(read(row) for _, read in columns) for row in document[kind]]
    table(
        console,
        "",
        [head for head, _ in columns],
        rows,
        left={0, len(columns) - 1},
        kept=None if kind == "traces" else range(3),
    )


_LISTINGS: Final[dict[str, tuple[Column, ...]]] = {
    "clusters": (
        ("GPU", lambda r: r["gpu"]),
        ("one node", lambda r: r["cluster"]),
        ("memory", lambda r: f"{r['memory_bytes'] / GIB:.0f} GiB"),
        ("TB/s", lambda r: f"{r['memory_bytes_per_s'] / TERA:.2f}"),
        ("16-bit TFLOPS", lambda r: _tflops(r["bf16_flops_per_s"] or r["fp16_flops_per_s"])),
        ("fp8", lambda r: _tflops(r["fp8_flops_per_s"])),
        ("fp4", lambda r: _tflops(r["fp4_flops_per_s"])),
        ("limit", lambda r: f"{r['tdp_w']:,.0f} W"),
        ("link", lambda r: f"{r['link']} {r['link_bytes_per_s'] / GB:,.0f} GB/s"),
        ("figures", lambda r: r["profile"].split()[0]),
    ),
    "traces": (
        ("name", lambda r: r["name"]),
        ("requests", lambda r: f"{r['requests']:,}"),
        ("req/s", lambda r: f"{r['rate_per_s']:.2f}"),
        ("mean prompt", lambda r: f"{r['prompt_mean']:,.0f}"),
        ("mean output", lambda r: f"{r['output_mean']:,.0f}"),
        ("longest", lambda r: f"{r['longest']:,}"),
        ("title", lambda r: r["title"]),
    ),
}


def _arrivals(trace: Document) -> str:
    """How requests come that clients send on their own; of turns that wait for answers as early as they can."""
    if trace["rate_per_s"] is None:
        return "all at once"
    return f"{trace['rate_per_s']:.2f} requests/s{' if answers came at once' if trace.get('waiting') else ''}"


def _tflops(value: float | None) -> str:
    return "-" if value is None else f"{value / TERA:,.0f}"
