"""Several answers beside each other: what differs between plans, clusters, and latencies by the rate of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.report.charts import Chart, Row, Spec, dashes, quantity, series, text, told, unit_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.report.detail import Detail
    from apex_opt.schema import Document


def differences_chart(document: Document) -> Iterator[Chart]:
    """The parts of time, energy and memory in which plans differ, a chart for each."""
    found = document["differences"]
    names = [f"{number}  {document['plans'][number - 1]['plan']}" for number in found["plans"]]
    for part in dict.fromkeys(term["part"] for term in found["terms"]):
        terms = [term for term in found["terms"] if term["part"] == part]
        unit = unit_of(terms[0]["unit"], [value for term in terms for value in term["values"]])
        rows: list[Row] = [
            {"series": name, "term": term["name"], "value": unit(value)}
            for term in terms
            for name, value in zip(names, term["values"], strict=True)
        ]
        yield _grouped(part, part.capitalize(), f"Where the plans differ in {part}.", unit.head(part), rows)


def clusters_chart(document: Document) -> Iterator[Chart]:
    """What the best plan on each cluster reaches."""
    rows: list[Row] = []
    answers = [(one["cluster"], one["answer"]["best"], one["answer"]) for one in document["clusters"]]
    found = [(name, best, answer) for name, best, answer in answers if best]
    if not found:
        return
    rates = document["command"] == "capacity"
    own = ("requests/s", "rate_per_s") if rates else (found[0][2]["objective"]["unit"], "value")
    unit = unit_of(own[0], [best[own[1]] for _, best, _ in found])
    head = unit.head("sustained rate" if rates else found[0][2]["objective"]["name"])
    rows = [{"series": best["plan"], "term": name, "value": unit(best[own[1]])} for name, best, _ in found]
    yield _grouped("clusters", "Clusters", "What the best plan on each cluster reaches.", head, rows)


def _grouped(name: str, title: str, says: str, head: str, rows: list[Row]) -> Chart:
    """Bars beside each other, a group for each term."""
    terms, names = (list(dict.fromkeys(row[key] for row in rows)) for key in ("term", "series"))
    encoding: Spec = {
        "y": {"field": "term", "type": "nominal", "sort": terms, "axis": {"title": None, "labelLimit": 190}},
        "yOffset": {"field": "series", "type": "nominal", "sort": names},
        "x": quantity("value", head),
        "color": series(names),
        "tooltip": told(("series", "plan"), ("term", "of"), ("value", head)),
    }
    return Chart(
        name=name,
        title=title,
        says=says,
        spec={"data": {"values": rows}, "mark": "bar", "encoding": encoding},
        heads=("of", "plan", head),
        rows=tuple((row["term"], row["series"], text(row["value"])) for row in rows),
        size=(380, 40 + (6 + 14 * len(names)) * len(terms)),
    )


def curve_charts(details: Sequence[Detail]) -> Iterator[Chart]:
    """What requests see at each rate, a chart for each figure, a line for each deployment."""
    points = [(detail.plan, point) for detail in details for point in detail.curve]
    for figure in dict.fromkeys(key for _, point in points for key in point.figures):
        at = [(plan, point, point.figures[figure]) for plan, point in points if point.figures.get(figure) is not None]
        unit = unit_of(at[0][1].unit, [value for *_, value in at])
        rows: list[Row] = [
            {
                "series": plan,
                "rate": point.rate_per_s,
                "value": unit(value),
                "goals": "met" if point.met else "missed",
            }
            for plan, point, value in at
        ]
        head, names = unit.head(figure), list(dict.fromkeys(row["series"] for row in rows))
        axes = {
            "x": quantity("rate", "requests/s"),
            "y": quantity("value", head, log=min(row["value"] for row in rows) > 0),
        }
        colour: Spec = {"color": series(names), "tooltip": told(
            ("series", "plan"), ("rate", "requests/s"), ("value", head), ("goals", "goals")
        )}  # fmt: skip
        met: Spec = {
            "field": "goals",
            "type": "nominal",
            "scale": {"domain": ["met", "missed"], "range": ["circle", "cross"]},
            "legend": {"orient": "bottom", "title": "goals"},
        }
        yield Chart(
            name=f"curve {figure}",
            title=f"{figure} by rate",
            says=f"{figure} at each rate of requests; a circle where all goals are met, a cross where one is missed.",
            spec={
                "data": {"values": rows},
                "layer": [
                    {"mark": "line", "encoding": {**axes, **colour, "strokeDash": dashes(names)}},
                    {"mark": {"type": "point", "size": 70}, "encoding": {**axes, **colour, "shape": met}},
                ],
            },
            heads=("plan", "requests/s", head, "goals"),
            rows=tuple((r["series"], text(r["rate"]), text(r["value"]), r["goals"]) for r in rows),
        )
