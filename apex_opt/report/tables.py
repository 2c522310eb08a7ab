"""Tables for people, made from the same documents that programs get."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from apex_opt.units import GB, GIB, TERA

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from apex_opt.report.document import Document

_PIPE_WIDTH = 132
_OPERATIONS_SHOWN = 12


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH, color_system=None)


def print_answer(document: Document) -> None:
    """An answer as tables on stdout."""
    console = _console()
    question, objective, best = document["question"], document["objective"], document["best"]
    trace = question["trace"]
    load = f"{trace['concurrency']} clients" if trace["concurrency"] else _rate(trace["rate_per_s"])
    console.print(
        f"[bold]{question['model']['name']}[/] ({question['model']['parameters'] / 1e9:.1f} B parameters) on "
        f"[bold]{question['cluster']['name']}[/], trace {trace['name']} ({trace['requests']} requests, {load})",
        highlight=False,
    )
    if best is None:
        console.print(f"[bold]{document['status']}[/]: {document['reason']}", highlight=False)
    else:
        aim = f"{objective['name']} = {_amount(objective['value'], objective['unit'])}"
        word = "best plan" if document["status"] == "optimal" else document["status"]
        console.print(f"{word}: [bold]{best['plan']}[/] on {best['gpus']} GPUs, {aim}\n", highlight=False)
        if len(document["candidates"]) > 1:
            _candidates(console, document)
        _best(console, best)
    _certificate(console, document)
    _provenance(console, document["provenance"])


def _candidates(console: Console, document: Document) -> None:
    objective = document["objective"]
    rows = []
    for rank, candidate in enumerate(document["candidates"], 1):
        metrics = candidate["metrics"]
        rows.append(
            (
                str(rank),
                candidate["plan"],
                str(candidate["gpus"]),
                _amount(candidate["value"], objective["unit"]),
                _seconds(metrics["ttft_s"]["p95"]),
                _seconds(metrics["tpot_s"]["p95"]),
                _seconds(metrics["e2e_s"]["p95"]),
                f"{metrics['throughput_rps']:.2f}",
                f"{metrics['energy_j'] / 1e3:,.0f}",
                f"{metrics['mbu']:.0%}",
            )
        )
    heads = ("#", "plan", "GPUs", objective["name"], "TTFT p95", "TPOT p95", "E2E p95", "req/s", "kJ", "MBU")
    _table(console, "Candidates", heads, rows, left={1})


def _best(console: Console, best: Document) -> None:
    metrics = best["metrics"]
    names = {"ttft_s": "TTFT", "tpot_s": "TPOT", "e2e_s": "E2E"}
    heads = tuple(metrics["ttft_s"])
    rows = [(name, *(_seconds(metrics[key][s]) for s in heads)) for key, name in names.items()]
    _table(console, "Latency", ("", *heads), rows, left={0})
    facts = [
        (
            "throughput",
            f"{metrics['throughput_rps']:.3f} requests/s, {metrics['output_tokens_per_s']:,.0f} output tokens/s",
        ),
        ("makespan", _seconds(metrics["makespan_s"])),
        (
            "energy",
            f"{metrics['energy_j'] / 1e3:,.1f} kJ ({metrics['idle_energy_j'] / 1e3:,.1f} kJ idle draw), "
            f"{metrics['energy_per_output_token_j']:.2f} J per output token, {metrics['mean_power_w']:,.0f} W mean",
        ),
        ("utilisation", f"MFU {metrics['mfu']:.1%}, MBU {metrics['mbu']:.1%}"),
        ("batches", f"{metrics['batches']:,}, {metrics['preemptions']:,} preemptions"),
    ]
    for text, slo in metrics["slo"].items():
        verdict = "met" if slo["met"] else "missed"
        facts.append((text, f"{verdict}; {slo['attainment']:.1%} of requests within the limit"))
    _table(console, "Service", ("", ""), facts, left={0, 1})
    rows = [
        (
            f"{stage}",
            str(part["layers"]),
            *(f"{part[key] / GB:.1f}" for key in ("weights_bytes", "workspace_bytes", "runtime_bytes")),
            f"{part['kv_blocks'] * part['kv_block_bytes'] / GB:.1f}",
            f"{part['kv_blocks']:,}",
            f"{part['usable_bytes'] / GB:.1f}",
        )
        for stage, part in enumerate(best["memory"])
    ]
    heads = ("stage", "layers", "weights", "workspace", "runtime", "KV cache", "KV blocks", "usable")
    _table(console, "Memory per GPU, GB", heads, rows)
    operations = list(metrics["operations_s"].items())
    total = sum(seconds for _, seconds in operations) or 1.0
    shown = operations[:_OPERATIONS_SHOWN]
    if len(operations) > len(shown):
        shown.append(("other", sum(seconds for _, seconds in operations[_OPERATIONS_SHOWN:])))
    rows = [(name, _seconds(s), f"{s / total:.1%}", "#" * round(40 * s / total)) for name, s in shown]
    _table(console, "Time by operation, mean per GPU", ("", "time", "share", ""), rows, left={0, 3})


def _certificate(console: Console, document: Document) -> None:
    certificate = document["certificate"]
    lost = ", ".join(f"{count} {family}" for family, count in certificate["infeasible"].items() if count)
    infeasible = sum(certificate["infeasible"].values())
    parts = [
        f"{certificate['space']:,} plans in the space",
        f"{infeasible:,} infeasible" + (f" ({lost})" if lost else ""),
        f"{certificate['bounded']:,} ruled out by a bound",
        f"{certificate['simulated']:,} simulated"
        + (f" ({certificate['missed']:,} missed an SLO)" if certificate["missed"] else ""),
    ]
    proof = "every plan is accounted for" if certificate["optimal"] else "the space was not exhausted"
    gap = "" if certificate["gap"] is None else f", gap {certificate['gap']:.1%}"
    console.print(f"[bold]Certificate[/]: {'; '.join(parts)}: {proof}{gap}.", highlight=False)


def _provenance(console: Console, provenance: dict[str, str]) -> None:
    _table(console, "Where the figures come from", ("", ""), provenance.items(), left={0, 1})


def print_listing(document: Document) -> None:
    """Models, accelerators or traces as a table on stdout."""
    kind = next(key for key in document if key not in ("status", "version"))
    rows = document[kind]
    heads, cells = _LISTINGS[kind]
    _table(_console(), "", heads, [tuple(cell(row) for cell in cells) for row in rows], left={0, len(heads) - 1})


_LISTINGS: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "models": (
        ("name", "parameters", "active", "layers", "hidden", "heads", "KV heads", "positions", "weights"),
        (
            lambda r: r["name"],
            lambda r: f"{r['parameters'] / 1e9:.2f} B",
            lambda r: f"{r['active_parameters'] / 1e9:.2f} B",
            lambda r: str(r["layers"]),
            lambda r: str(r["hidden"]),
            lambda r: str(r["query_heads"]),
            lambda r: str(r["kv_heads"]),
            lambda r: f"{r['max_position']:,}",
            lambda r: r["weights"],
        ),
    ),
    "clusters": (
        ("GPU", "one node", "memory", "bandwidth", "bf16/fp16", "fp8", "limit", "figures"),
        (
            lambda r: r["gpu"],
            lambda r: r["cluster"],
            lambda r: f"{r['memory_bytes'] / GIB:.0f} GiB",
            lambda r: f"{r['memory_bytes_per_s'] / TERA:.2f} TB/s",
            lambda r: _tflops(r["bf16_flops_per_s"] or r["fp16_flops_per_s"]),
            lambda r: _tflops(r["fp8_flops_per_s"]),
            lambda r: f"{r['tdp_w']:.0f} W",
            lambda r: r["profile"],
        ),
    ),
    "traces": (
        ("name", "requests", "rate", "prompt mean", "output mean", "longest", "title"),
        (
            lambda r: r["name"],
            lambda r: f"{r['requests']:,}",
            lambda r: _rate(r["rate_per_s"]),
            lambda r: f"{r['prompt_mean']:,.0f}",
            lambda r: f"{r['output_mean']:,.0f}",
            lambda r: f"{r['longest']:,}",
            lambda r: r["title"],
        ),
    ),
}


def _table(
    console: Console,
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: set[int] | None = None,
) -> None:
    table = Table(
        title=title or None, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_header=any(heads)
    )
    for index, head in enumerate(heads):
        side = "left" if index in (left or set()) else "right"
        table.add_column(head, justify="left" if side == "left" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(table, highlight=False)


def _seconds(value: float | None) -> str:
    """A duration with the unit that suits it."""
    if value is None:
        return "-"
    if value < 1e-3:
        return f"{value * 1e6:.1f} us"
    if value < 1:
        return f"{value * 1e3:.1f} ms"
    return f"{value:.2f} s" if value < 1e4 else f"{value:,.0f} s"


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "s":
        return _seconds(value)
    return f"{value / 1e3:,.1f} kJ" if unit == "J" else f"{value:.3f} {unit}"


def _rate(value: float | None) -> str:
    return "all at once" if value is None else f"{value:.2f} requests/s"


def _tflops(value: float | None) -> str:
    return "-" if value is None else f"{value / TERA:,.0f} TFLOP/s"
