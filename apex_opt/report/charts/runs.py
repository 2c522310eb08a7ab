"""What requests see of a run and what its replicas have to do: distributions, loads over time, memory, operations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.figures.registry import per_item
from apex_opt.report.charts import (
    PALETTE,
    Chart,
    Choice,
    Row,
    Spec,
    dashes,
    quantity,
    series,
    text,
    told,
    unit_of,
)
from apex_opt.report.layout import count

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.report.detail import Detail
    from apex_opt.schema import Document

_POINTS: Final = 200
_TABLED: Final = (1, 5, 10, 25, 50, 75, 90, 95, 99, 100)
_PARTS: Final = {
    "weights_bytes": "weights",
    "workspace_bytes": "workspace",
    "runtime_bytes": "runtime",
    "kv_bytes": "KV cache",
}


def latency_charts(details: Sequence[Detail]) -> Iterator[Chart]:
    """The distribution of each figure of requests, a line for each deployment."""
    for figure in (one for one in per_item() if one.of == "request"):
        found = {d.plan: d.latencies[figure.key] for d in details if figure.key in d.latencies}
        found = {plan: np.sort(values[np.isfinite(values)]) for plan, values in found.items()}
        found = {plan: values for plan, values in found.items() if len(values)}
        if found:
            yield _distribution(figure.title, figure.unit.name, found)


def _distribution(title: str, own: str, found: dict[str, Any]) -> Chart:
    """Which share of the requests has a figure of at most so much."""
    unit = unit_of(own, [float(values[-1]) for values in found.values()])
    shares = np.linspace(0, 1, _POINTS + 1)
    rows: list[Row] = [
        {"series": plan, "x": unit(round(float(value), 9)), "share": float(share)}
        for plan, values in found.items()
        for share, value in zip(shares, np.quantile(values, shares), strict=True)
    ]
    log = min(float(values[0]) for values in found.values()) > 0
    head, names = unit.head(title), list(found)
    percent = {"format": "%"}
    hovered: Spec = {
        "x": quantity("x", head, log=log),
        "y": quantity("share", "share of requests", axis=percent, scale={"domain": [0, 1]}),
        "color": series(names),
        "tooltip": [
            *told(("series", "plan"), ("x", head)),
            {"field": "share", "title": "of requests at most", "format": ".1%"},
        ],
    }
    encoding = {**hovered, "strokeDash": dashes(names)}
    tabled = [
        (plan, f"{share}%", text(unit(float(value))))
        for plan, values in found.items()
        for share, value in zip(_TABLED, np.percentile(values, _TABLED), strict=True)
    ]
    return Chart(
        name=title.lower(),
        title=f"{title} of requests",
        says=f"Which share of the requests has {title} of at most so much, of {count(len(names), 'run')}.",
        spec={
            "data": {"values": rows},
            "layer": [
                {"mark": {"type": "line", "interpolate": "step-after"}, "encoding": encoding},
                {"mark": {"type": "point", "opacity": 0, "size": 60, "aria": False}, "encoding": hovered},
            ],
        },
        heads=("plan", "share of requests", f"at most, {unit.name}"),
        rows=tuple(tabled),
        choices=_of_series(names),
    )


def _of_series(names: Sequence[str]) -> tuple[Choice, ...]:
    return (Choice(field="series", label="Show ", values=tuple(names)),) if len(names) > 1 else ()


def load_charts(details: Sequence[Detail]) -> Iterator[Chart]:
    """Sequences that wait and run over time, and how full the KV cache is."""
    several = len(details) > 1
    loads = [(f"{d.plan}: {one.name}" if several else one.name, one) for d in details for one in d.loads]
    if not loads:
        return
    counts: list[Row] = []
    shares: list[Row] = []
    for name, one in loads:
        mark = f"{name}, " if len(loads) > 1 else ""
        for moment, wait, run, mean, most in zip(
            one.time_s, one.waiting, one.running, one.kv_mean, one.kv_most, strict=True
        ):
            at = round(float(moment), 4)
            counts += [
                {"series": f"{mark}waiting", "time": at, "value": float(wait)},
                {"series": f"{mark}in the batch", "time": at, "value": float(run)},
            ]
            shares += [
                {"series": f"{mark}mean of the replicas", "time": at, "value": round(float(mean), 5)},
                {"series": f"{mark}the fullest", "time": at, "value": round(float(most), 5)},
            ]
    says = "Sequences that wait and sequences in the batch over time, of all replicas together."
    yield _over_time("load", "Load over time", says, "sequences", counts, {})
    says = "Share of the KV blocks in use over time, in the mean of the replicas and of the fullest."
    yield _over_time("kv", "KV cache in use over time", says, "share of the KV cache", shares, {"format": "%"})


def _over_time(name: str, title: str, says: str, what: str, rows: list[Row], axis: Spec) -> Chart:
    """Lines over time."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    encoding: Spec = {
        "x": quantity("time", "time from the first arrival, s"),
        "y": quantity("value", what, axis=axis),
        "color": series(names),
        "strokeDash": dashes(names),
        "tooltip": [*told(("series", "of"), ("time", "s")), {"field": "value", "title": what, **axis}],
    }
    at = sorted({row["time"] for row in rows})
    shown = set(at[:: max(len(at) // 12, 1)])
    return Chart(
        name=name,
        title=title,
        says=says,
        spec={"data": {"values": rows}, "mark": {"type": "line", "interpolate": "step-after"}, "encoding": encoding},
        heads=("of", "s", what),
        rows=tuple((r["series"], text(r["time"]), _value(r["value"], axis)) for r in rows if r["time"] in shown),
        choices=_of_series(names),
    )


def _value(value: float, axis: Spec) -> str:
    return f"{value:.1%}" if axis else text(value)


def memory_chart(best: Document) -> Iterator[Chart]:
    """What the memory of a GPU of each stage holds."""
    pools = [(f"{p.get('role') or p['gpu']}, ", p["memory"]) for p in best["parts"]] if "parts" in best else []
    stages = [
        (f"{name}stage {stage}", memory)
        for name, of in pools or [("", best["memory"])]
        for stage, memory in enumerate(of)
    ]
    rows: list[Row] = []
    for place, (stage, memory) in enumerate(stages):
        held = {**memory, "kv_bytes": memory["kv_blocks"] * memory["kv_block_bytes"]}
        parts = {word: held[key] / 1e9 for key, word in _PARTS.items()}
        parts["free"] = max(memory["usable_bytes"] / 1e9 - sum(parts.values()), 0.0)
        rows += [
            {"stage": stage, "part": word, "gb": round(gb, 3), "order": order, "place": place}
            for order, (word, gb) in enumerate(parts.items())
        ]
    words = [*_PARTS.values(), "free"]
    colours = [*PALETTE[: len(_PARTS)], "#d1d5db"]
    encoding: Spec = {
        "y": {"field": "stage", "type": "nominal", "sort": {"field": "place"}, "axis": {"title": None}},
        "x": quantity("gb", "memory of a GPU, GB", stack="zero"),
        "color": {
            "field": "part",
            "type": "nominal",
            "scale": {"domain": words, "range": colours},
            "legend": {"orient": "bottom", "title": None, "columns": 2},
        },
        "order": {"field": "order", "type": "quantitative"},
        "tooltip": told(("stage", "of"), ("part", "holds"), ("gb", "GB")),
    }
    yield Chart(
        name="memory",
        title="Memory per GPU",
        says="What the memory of a GPU of each stage holds, of what the engine may use.",
        spec={"data": {"values": rows}, "mark": "bar", "encoding": encoding},
        heads=("of", "holds", "GB"),
        rows=tuple((row["stage"], row["part"], text(row["gb"])) for row in rows),
        size=(380, 40 + 26 * len(stages)),
    )


def operations_chart(best: Document) -> Iterator[Chart]:
    """Where the time of a GPU went, by operation."""
    pools = [(p.get("role") or p["gpu"], p["operations_s"]) for p in best.get("parts", ())]
    rows: list[Row] = []
    for name, spent in pools or [("the plan", best["metrics"].get("operations_s") or {})]:
        total = sum(spent.values()) or 1.0
        rows += [{"series": name, "operation": o, "share": s / total, "s": round(s, 3)} for o, s in spent.items()]
    if not rows:
        return
    names, operations = list(dict.fromkeys(r["series"] for r in rows)), dict.fromkeys(r["operation"] for r in rows)
    encoding: Spec = {
        "y": {"field": "operation", "type": "nominal", "sort": list(operations), "axis": {"title": None}},
        "yOffset": {"field": "series"},
        "x": quantity("share", "share of the time of a GPU", axis={"format": "%"}),
        "color": series(names),
        "tooltip": [
            *told(("series", "of"), ("operation", "operation"), ("s", "s")),
            {"field": "share", "title": "share", "format": ".1%"},
        ],
    }
    yield Chart(
        name="operations",
        title="Time by operation, mean per GPU",
        says="The share of the time of a GPU that each operation takes, the longest first, idle last.",
        spec={"data": {"values": rows}, "mark": "bar", "encoding": encoding},
        heads=("of", "operation", "s", "share"),
        rows=tuple((row["series"], row["operation"], text(row["s"]), f"{row['share']:.1%}") for row in rows),
        size=(380, 40 + 20 * len(operations)),
    )


def certificate_chart(document: Document) -> Iterator[Chart]:
    """What became of every plan of the space."""
    parts = [document["certificate"]] if "certificate" in document else []
    for key in ("certificates", "pipelines", "pools"):
        parts += document.get(key) or []
    parts = [one for part in parts for one in part.get("parts", [part])]
    told_of: dict[str, int] = {}
    words = {
        "ruled out by a bound": "bounded",
        "ruled out by a rate": "ruled_out",
        "on more GPUs than are needed": "larger",
        "the same with layers moved": "repeated",
        "simulated": "simulated",
        "a rate found": "found",
        "left when the time was up": "left",
    }
    for part in parts:
        for family, number in part["infeasible"].items():
            word = f"infeasible: {family}"
            told_of[word] = told_of.get(word, 0) + number
    for word, key in words.items():
        told_of[word] = sum(part.get(key) or 0 for part in parts)
    rows: list[Row] = [{"fate": word, "plans": number} for word, number in told_of.items() if number]
    if not rows or sum(row["plans"] for row in rows) < 2:
        return
    place: Spec = {"y": {"field": "fate", "type": "nominal", "sort": None, "axis": {"title": None, "labelLimit": 240}}}
    shown = told(("fate", "plans that are"), ("plans", "number"))
    # Room for the numbers beside the bars.
    scale = {"domainMax": 1.2 * max(row["plans"] for row in rows)}
    x = quantity("plans", "plans of the space", axis={"tickMinStep": 1}, scale=scale)
    encoding = {**place, "x": x, "tooltip": shown}
    spec: Spec = {
        "data": {"values": rows},
        "layer": [
            {"mark": {"type": "bar", "color": PALETTE[0]}, "encoding": encoding},
            {
                "mark": {"type": "text", "align": "left", "dx": 3, "color": "#111827"},
                "encoding": {**encoding, "text": {"field": "plans", "format": ","}},
            },
        ],
    }
    total = sum(part["space"] for part in parts)
    yield Chart(
        name="certificate",
        title="What became of every plan",
        says=f"The {total:,} plans of the space, by what became of them; together they are all there are.",
        spec=spec,
        heads=("plans that are", "number"),
        rows=tuple((row["fate"], f"{row['plans']:,}") for row in rows),
        size=(380, 40 + 22 * len(rows)),
    )
