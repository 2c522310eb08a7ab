"""Plans by their objectives: the front and what it beats; candidates; the rates that plans sustain."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

from apex_opt.report.charts import PALE, PALETTE, Chart, Choice, quantity, series, shapes, text, told, unit_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from apex_opt.report.charts import Row, Spec
    from apex_opt.schema import Document

_ASIDE: Final = ((7, -7), (7, 9), (-14, -7), (-14, 9), (0, -13), (0, 15), (14, 1), (-22, 1))
"""Where the number of a point may stand, in pixels from it; the first where it covers no other."""


def front_charts(document: Document) -> Iterator[Chart]:
    """A chart for each pair of objectives, all plans of the front numbered as in their table."""
    for across, up in combinations(document["objectives"], 2):
        yield _pair(document, across, up)


def _pair(document: Document, across: Document, up: Document) -> Chart:
    names, plans = (across["name"], up["name"]), [*document["candidates"], *document["beaten"]]
    units = [unit_of(o["unit"], [plan["values"][o["name"]] for plan in plans]) for o in (across, up)]
    rows: list[Row] = []
    for kind, key in (("front", "candidates"), ("beaten", "beaten")):
        for rank, plan in enumerate(document[key], 1):
            x, y = (unit(plan["values"][name]) for unit, name in zip(units, names, strict=True))
            if x is not None and y is not None:
                number = str(rank) if kind == "front" else ""
                rows.append({"kind": kind, "plan": plan["plan"], "gpus": plan["gpus"], "x": x, "y": y, "n": number})
    log = bool(rows) and min(min(row["x"], row["y"]) for row in rows) > 0
    _numbers_apart([row for row in rows if row["n"]], log)
    heads = [unit.head(name) for unit, name in zip(units, names, strict=True)]
    shown = told(("plan", "plan"), ("gpus", "GPUs"), ("x", heads[0]), ("y", heads[1]))
    scale = {"padding": 12} | ({} if log else {"zero": False})
    axes = {
        key: quantity(key, f"{head}{', logarithmic' * log}", log=log, scale=scale)
        for key, head in zip("xy", heads, strict=True)
    }
    colour: Spec = {"domain": ["front", "beaten"], "range": [PALETTE[0], PALE]}
    legend = {"orient": "bottom", "title": None}
    points: Spec = {
        "mark": {"type": "point", "filled": True},
        "encoding": {
            **axes,
            "color": {"field": "kind", "type": "nominal", "scale": colour, "legend": legend},
            "shape": {
                "field": "kind",
                "type": "nominal",
                "scale": {"domain": ["front", "beaten"], "range": ["circle", "cross"]},
                "legend": legend,
            },
            "size": {"condition": {"test": "datum.kind == 'front'", "value": 70}, "value": 25},
            "tooltip": shown,
        },
    }
    layers = [points, *_labels(rows, axes)]
    if len(document["objectives"]) == 2:
        # Between two plans of a front only what the one that is good enough across reaches can be had.
        step = {"type": "line", "interpolate": "step-before" if across["maximise"] else "step-after"}
        line: Spec = {"mark": {**step, "color": PALETTE[0], "strokeWidth": 1}, "encoding": axes}
        layers.insert(0, {"transform": [{"filter": "datum.kind == 'front'"}], **line})
    front = [row for row in rows if row["kind"] == "front"]
    gpus = sorted({row["gpus"] for row in rows})
    return Chart(
        name="front",
        title=f"{names[0]} against {names[1]}",
        says=f"{len(front)} plans that no other beats, and {len(rows) - len(front)} that are beaten.",
        spec={"data": {"values": rows}, "layer": layers},
        heads=("#", "plan", "GPUs", *heads),
        rows=tuple((row["n"], row["plan"], str(row["gpus"]), text(row["x"]), text(row["y"])) for row in front),
        choices=(Choice(field="gpus", label="At most GPUs ", values=tuple(gpus)),) if len(gpus) > 1 else (),
    )


def _numbers_apart(rows: list[Row], log: bool) -> None:
    """Give each point the first place for its number at which it covers no other point or number."""
    from math import log as ln

    def at(key: str, size: float) -> list[float]:
        values = [ln(row[key]) if log else row[key] for row in rows]
        low, span = min(values), (max(values) - min(values)) or 1.0
        return [(value - low) / span * size for value in values]

    if not rows:
        return
    points = list(zip(at("x", 360), [-y for y in at("y", 260)], strict=True))
    taken = list(points)
    for row, (x, y) in zip(rows, points, strict=True):
        free = [(dx, dy) for dx, dy in _ASIDE if all(abs(x + dx - a) > 11 or abs(y + dy - b) > 9 for a, b in taken)]
        row["dx"], row["dy"] = (free or _ASIDE)[0]
        taken.append((x + row["dx"], y + row["dy"]))


def _labels(rows: list[Row], axes: Mapping[str, Any]) -> Iterator[Spec]:
    """The numbers of points, a layer for each place that they stand at."""
    for dx, dy in sorted({(row["dx"], row["dy"]) for row in rows if "dx" in row}):
        yield {
            "transform": [{"filter": f"datum.dx == {dx} && datum.dy == {dy}"}],
            "mark": {"type": "text", "dx": dx, "dy": dy, "fontSize": 11, "color": "#111827"},
            "encoding": {**axes, "text": {"field": "n"}},
        }


def candidates_chart(document: Document) -> Iterator[Chart]:
    """What the plans of an answer reach by its objective, and what each could at best have reached."""
    runs, objective = document["candidates"], document["objective"]
    known = [run for run in runs if run["value"] is not None]
    if len(known) < 2:
        return
    unit = unit_of(objective["unit"], [run["value"] for run in known])
    rows = [
        {
            "plan": f"{rank}  {run['plan']}",
            "gpus": run["gpus"],
            "value": unit(run["value"]),
            "bound": unit(run["bound"]),
        }
        for rank, run in enumerate(known, 1)
    ]
    head, shown = unit.head(objective["name"]), told(("plan", "plan"), ("gpus", "GPUs"), ("value", "simulated"))
    yield _bars(
        "candidates",
        "Candidates",
        f"{objective['name']} of the {len(rows)} best plans; a tick marks the bound that no run of it can beat.",
        rows,
        head,
        [*shown, {"field": "bound", "title": "bound"}],
    )


def rates_chart(document: Document) -> Iterator[Chart]:
    """The highest rate that each plan of a capacity answer sustains."""
    runs = document["candidates"]
    if len(runs) < 2:
        return
    rows = [
        {
            "plan": f"{rank}  {run['plan']}",
            "gpus": run["gpus"],
            "value": run["rate_per_s"],
            "bound": run["next_rate_per_s"],
        }
        for rank, run in enumerate(runs, 1)
    ]
    shown = told(("plan", "plan"), ("gpus", "GPUs"), ("value", "sustained"), ("bound", "not sustained"))
    says = f"Requests per second that {len(rows)} plans sustain; a tick marks the next rate, which fails."
    yield _bars("rates", "Plans by rate", says, rows, "requests/s", shown)


def _bars(name: str, title: str, says: str, rows: list[Row], head: str, shown: list[Spec]) -> Chart:
    """A bar for each plan and a tick for a second figure of it."""
    order = [row["plan"] for row in rows]
    axis = {"labelLimit": 190, "title": None}
    place: Spec = {"y": {"field": "plan", "type": "nominal", "sort": order, "axis": axis}, "tooltip": shown}
    layers: list[Spec] = [
        {"mark": {"type": "bar", "color": PALETTE[0]}, "encoding": {**place, "x": quantity("value", head)}},
        {
            "transform": [{"filter": "datum.bound != null"}],
            "mark": {"type": "tick", "color": PALETTE[1], "thickness": 3},
            "encoding": {**place, "x": quantity("bound", head)},
        },
    ]
    gpus = sorted({row["gpus"] for row in rows})
    return Chart(
        name=name,
        title=title,
        says=says,
        spec={"data": {"values": rows}, "layer": layers},
        heads=("plan", "GPUs", *(one["title"] for one in shown[2:])),
        rows=tuple((row["plan"], str(row["gpus"]), text(row["value"]), text(row["bound"])) for row in rows),
        choices=(Choice(field="gpus", label="At most GPUs ", values=tuple(gpus)),) if len(gpus) > 1 else (),
        size=(380, 40 + 22 * len(rows)),
    )


def errors_charts(document: Document) -> Iterator[Chart]:
    """Predicted against measured, a chart for each figure; runs by cluster and engine, those set aside hollow."""
    rows = [row for row in document["rows"] if row["status"] == "predicted"]
    for metric in (m for m in document["units"] if any(m in row["metrics"] for row in rows)):
        yield from _errors(document["units"][metric], metric, rows)


def _errors(own: str, metric: str, rows: list[Document]) -> Iterator[Chart]:
    cells = [(row, row["metrics"][metric]) for row in rows if metric in row["metrics"]]
    cells = [(row, cell) for row, cell in cells if min(cell["measured"], cell["predicted"]) > 0]
    if not cells:
        return
    unit = unit_of(own, [value for _, cell in cells for value in (cell["measured"], cell["predicted"])])
    points: list[Row] = [
        {
            "run": row["name"],
            "plan": row["plan"],
            "group": f"{row['cluster']}, {row['engine']}",
            "measured": unit(cell["measured"]),
            "predicted": unit(cell["predicted"]),
            "error": f"{cell['error_pct']:+z.1f}%",
            "aside": metric in row["set_aside"],
        }
        for row, cell in cells
    ]
    groups = sorted({point["group"] for point in points})
    values = [point[key] for point in points for key in ("measured", "predicted")]
    low, high = min(values) / 1.3, max(values) * 1.3
    scale = {"domain": [low, high]}
    axes = {
        "x": quantity("measured", unit.head("measured"), log=True, scale=scale),
        "y": quantity("predicted", unit.head("predicted"), log=True, scale=scale),
    }
    layers: list[Spec] = [
        {
            "data": {"values": [{"measured": end, "least": 0.9 * end, "most": 1.1 * end} for end in (low, high)]},
            "mark": {"type": "area", "color": PALE, "opacity": 0.2, "clip": True},
            "encoding": {"x": axes["x"], "y": {**axes["y"], "field": "least"}, "y2": {"field": "most"}},
        },
        {
            "data": {"values": [{"measured": end, "predicted": end} for end in (low, high)]},
            "mark": {"type": "line", "color": PALE, "strokeWidth": 1},
            "encoding": axes,
        },
        {
            "mark": {"type": "point", "size": 45, "clip": True, "fillOpacity": 0.5},
            "encoding": {
                **axes,
                "stroke": series(groups, "group"),
                "fill": {"condition": {"test": "datum.aside", "value": "white"}, **series(groups, "group")},
                "shape": shapes(groups, "group"),
                "tooltip": told(
                    *(("run", "run"), ("plan", "plan"), ("group", "on")),
                    *((key, unit.head(key)) for key in ("measured", "predicted")),
                    ("error", "error"),
                ),
            },
        },
    ]
    yield Chart(
        name=metric,
        title=f"{metric} ({len(points):,} {'run' if len(points) == 1 else 'runs'})",
        says=f"{metric} predicted against measured; the line is no error, the band 10%, hollow what is set aside.",
        spec={"data": {"values": points}, "layer": layers},
        heads=("run", "plan", unit.head("measured"), unit.head("predicted"), "error"),
        rows=tuple((p["run"], p["plan"], text(p["measured"]), text(p["predicted"]), p["error"]) for p in points),
        choices=(Choice(field="group", label="Runs of ", values=tuple(groups)),) if len(groups) > 1 else (),
    )
