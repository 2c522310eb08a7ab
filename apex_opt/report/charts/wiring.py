"""Drawings: the GPUs of a plan by replica, stage and rank; the GPUs, switches and links of a cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from apex_opt.report.charts import PALE, PALETTE, Chart, told

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from apex_opt.report.charts import Row, Spec
    from apex_opt.schema import Document

MOST_GPUS: Final = 256
"""GPUs of the largest drawing; more could not be told apart."""
_ROWS: Final = 64
_HEIGHTS: Final = {"nvlink": -1.0, "gpu": 0.0, "pcie": 1.0, "socket": 2.0, "nic": 3.0, "leaf": 4.0, "spine": 5.0}
_LINKS: Final = {
    "nvlink": PALETTE[2],
    "xgmi": PALETTE[1],
    "pcie": PALE,
    "infiniband": PALETTE[0],
    "ethernet": PALETTE[6],
}
_STATES: Final = {"free": "#ffffff", "busy": "#c4c9d1", "down": "#f0a08c"}
_SWITCH: Final = "#eef1f5"
_HUES: Final = ("#8ecae6", "#ffd166", "#a7d08c", "#c8b6ff", "#f4acb7", "#7fdcd0", "#e9c46a", "#b5c2a8")
"""Of replicas and stages, pale enough for black letters; they come round again."""


def placement_chart(replicas: Sequence[Document], title: str = "Where the plan goes") -> Chart:
    """A box for every GPU of a plan, a row for each stage of each replica."""
    rows: list[Row] = [
        {
            "row": f"replica {one['replica']}" + (f", stage {stage}" if len(one["stages"]) > 1 else ""),
            "rank": rank,
            "gpu": gpu,
            "short": gpu.removeprefix("node"),
            "stage": str(stage),
        }
        for one in replicas
        for stage, gpus in enumerate(one["stages"])
        for rank, gpu in enumerate(gpus)
    ]
    order = list(dict.fromkeys(row["row"] for row in rows))
    shown = order[:_ROWS]
    stages = sorted({row["stage"] for row in rows}, key=int)
    widest = max(row["rank"] for row in rows) + 1
    place: Spec = {
        "x": {"field": "rank", "type": "ordinal", "title": "rank", "axis": {"labelAngle": 0}},
        "y": {"field": "row", "type": "nominal", "sort": shown, "title": None},
        "tooltip": told(("gpu", "GPU"), ("row", "of"), ("rank", "rank")),
    }
    fill: Spec = {
        "field": "stage",
        "type": "nominal",
        "scale": {"domain": stages, "range": [_HUES[at % len(_HUES)] for at in range(len(stages))]},
        "legend": {"orient": "bottom", "title": "stage"} if len(stages) > 1 else None,
    }
    kept = [row for row in rows if row["row"] in set(shown)]
    layers: list[Spec] = [
        {"mark": {"type": "rect", "stroke": "white", "strokeWidth": 3}, "encoding": {**place, "color": fill}}
    ]
    if widest <= 8:
        layers.append(
            {"mark": {"type": "text", "fontSize": 11, "color": "#111827"}, "encoding": {**place, "text": _of("short")}}
        )
    more = "" if len(order) == len(shown) else f"; the first {len(shown)} of {len(order)} rows are drawn"
    return Chart(
        name="placement",
        title=title,
        says=f"{len(rows)} GPUs as node:GPU, a row for each stage of a replica, a box for each rank{more}.",
        spec={"data": {"values": kept}, "layer": layers},
        heads=("of", "rank", "GPU"),
        rows=tuple((row["row"], str(row["rank"]), row["gpu"]) for row in kept),
        size=(max(200, 60 * min(widest, 16)), 50 + 26 * len(shown)),
        wide=widest > 8,
    )


def _of(field: str) -> Spec:
    return {"field": field, "type": "nominal"}


def topology_chart(document: Document, ranks: Mapping[str, tuple[int, str]] | None = None) -> Chart:
    """GPUs, switches and links, each kind at its own height.

    Parameters
    ----------
    document : of `cluster show`, of 256 GPUs at the most
    ranks : of GPUs that hold a rank its replica, which colours them, and what to write on them
    """
    places, held = _places(document), ranks or {}
    boxes = [*_boxes(document, places, held)]
    links: list[Row] = [
        {
            "kind": link["kind"],
            "between": " and ".join(link["ends"]),
            "rate": f"{link['bytes_per_s'] / 1e9:,.4g} GB/s",
            "width": _width(link),
            **{key: places[end][axis] for end, pair in zip(link["ends"], ("x y", "x2 y2"), strict=True)
               for axis, key in enumerate(pair.split())},
        }
        for link in document["links"]
    ]  # fmt: skip
    kinds = [kind for kind in _LINKS if any(link["kind"] == kind for link in links)]
    fills = dict.fromkeys(box["fill"] for box in boxes)
    hidden: Spec = {"type": "quantitative", "axis": None, "scale": {"zero": False, "nice": False, "padding": 14}}
    spot = {"x": {"field": "x", **hidden}, "y": {"field": "y", **hidden}}
    below = {"orient": "bottom", "columns": 4}
    layers: list[Spec] = [
        {
            "data": {"values": links},
            "mark": "rule",
            "encoding": {
                **spot,
                "x2": {"field": "x2"},
                "y2": {"field": "y2"},
                "color": {
                    "field": "kind",
                    "type": "nominal",
                    "scale": {"domain": kinds, "range": [_LINKS[kind] for kind in kinds]},
                    "legend": {**below, "title": "links"},
                },
                "strokeWidth": {"field": "width", "type": "quantitative", "scale": None},
                "tooltip": told(("between", "between"), ("kind", "link"), ("rate", "carries")),
            },
        },
        {
            "mark": {"type": "square", "size": 900, "stroke": "#374151", "opacity": 1},
            "encoding": {
                **spot,
                "fill": {
                    "field": "fill",
                    "type": "nominal",
                    "scale": {"domain": list(fills), "range": [_colour(fill) for fill in fills]},
                    "legend": {**below, "title": "on GPUs: stage/rank" if held else "GPUs and switches"},
                },
                "tooltip": told(("name", "name"), ("fill", "is"), ("text", "holds")),
            },
        },
        {
            "mark": {"type": "text", "fontSize": 9, "lineBreak": "\n", "lineHeight": 10, "dy": -3, "color": "#111827"},
            "encoding": {**spot, "text": _of("text")},
        },
    ]
    return Chart(
        name="topology",
        title=document["cluster"],
        says=f"{len(document['gpus'])} GPUs, their switches and {len(links)} links; wider links carry more.",
        spec={"data": {"values": boxes}, "layer": layers},
        heads=("link", "between", "carries"),
        rows=tuple((link["kind"], link["between"], link["rate"]) for link in links),
        size=(max(420, 46 * len(document["gpus"])), 480),
        wide=True,
    )


def _boxes(
    document: Document, places: Mapping[str, tuple[float, float]], held: Mapping[str, tuple[int, str]]
) -> Iterator[Row]:
    """GPUs, by replica where they hold a rank and else by state, and switches."""
    for gpu in document["gpus"]:
        replica, rank = held.get(gpu["name"], (None, ""))
        x, y = places[gpu["name"]]
        fill = gpu["state"] if replica is None else f"replica {replica}"
        yield {"name": gpu["name"], "x": x, "y": y, "fill": fill, "text": "\n".join((_short(gpu["name"]), rank))}
    for switch in document["switches"]:
        x, y = places[switch["name"]]
        yield {"name": switch["name"], "x": x, "y": y, "fill": "switch", "text": _short(switch["name"]) + "\n"}


def _colour(fill: str) -> str:
    """That of a replica, a state, or a switch."""
    kind, _, number = fill.partition(" ")
    return _HUES[int(number) % len(_HUES)] if kind == "replica" else {**_STATES, "switch": _SWITCH}[fill]


def _places(document: Document) -> dict[str, tuple[float, float]]:
    """Where everything is drawn: GPUs side by side with a gap between nodes, the rest above or below its own."""
    places = {gpu["name"]: (index + 0.8 * gpu["node"], _HEIGHTS["gpu"]) for index, gpu in enumerate(document["gpus"])}
    beside: dict[str, list[str]] = {}
    for a, b in (link["ends"] for link in document["links"]):
        beside.setdefault(a, []).append(b)
        beside.setdefault(b, []).append(a)
    for kind, height in sorted(_HEIGHTS.items(), key=lambda entry: abs(entry[1])):
        above: dict[str, tuple[float, float]] = {}
        for name in (switch["name"] for switch in document["switches"] if switch["kind"] == kind):
            # What hangs on it is placed already; others of its kind are not.
            below = [places[other][0] for other in beside.get(name, ()) if other in places] or [0.0]
            place = sum(below) / len(below), height
            while place in above.values():
                place = place[0], place[1] - 0.3
            above[name] = place
        places |= above
    return places


def _short(name: str) -> str:
    """A name within its node."""
    return name.partition(":")[2] or name


def _width(link: Document) -> float:
    """Points: wider for more bytes, from 1 to 1,000 GB/s."""
    return float(min(max(0.5 + 0.8 * (len(f"{link['bytes_per_s'] / 1e9:.0f}") - 1), 0.5), 3.0))
