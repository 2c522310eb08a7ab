"""The points of a study: each of its figures along the axes of the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.report.charts import Chart, Choice, quantity, series, shapes, text, told, unit_of
from apex_opt.report.layout import count

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from apex_opt.report.charts import Row, Spec
    from apex_opt.schema import Document


def grid_charts(rows: Sequence[Mapping[str, Any]], axes: Sequence[str], figures: Mapping[str, str]) -> Iterator[Chart]:
    """A chart for each figure: a point for each row that has it, to be chosen by the values of each axis.

    The axis with the most numbers goes across, else that with the most values; the next has the colours, the third the
    shapes. An axis with a single value is left out.

    Parameters
    ----------
    rows : of the study, each with a value for every axis and, where there is an answer, for figures
    axes : names of the axes of the grid
    figures : the unit of each figure that is to be shown, by its name
    """
    values = {axis: list(dict.fromkeys(_value(row.get(axis)) for row in rows)) for axis in axes}
    varied = [axis for axis in axes if len(values[axis]) > 1]
    varied.sort(key=lambda axis: (_numeric(values[axis]), len(values[axis])), reverse=True)
    for name, own in figures.items():
        known = [row for row in rows if isinstance(row.get(name), int | float)]
        if known:
            yield _chart(name, own, known, varied, values, len(rows) - len(known))


_SHOWN: Final = {
    "rate_per_s": "requests/s",
    "ttft_s.p95": "s",
    "tpot_s.p95": "s",
    "e2e_s.mean": "s",
    "throughput_rps": "requests/s",
    "energy_j": "J",
    "cost_usd_per_h": "$/h",
}


def study_charts(document: Document) -> Iterator[Chart]:
    """The figures of a study's points along its axes."""
    rows = [
        {**{axis: _number(text) for axis, text in row["options"].items()}, "plan": row["plan"], **row["figures"]}
        for row in document["points"]
    ]
    axes = list(dict.fromkeys(axis for row in document["points"] for axis in row["options"]))
    yield from grid_charts(rows, axes, _SHOWN)


def _number(option: str) -> float | str:
    """An option along an axis, as a number where it is one."""
    try:
        return float(option)
    except ValueError:
        return option


def _chart(
    name: str, own: str, known: Sequence[Mapping[str, Any]], varied: list[str], values: dict[str, list[Any]], none: int
) -> Chart:
    unit = unit_of(own, [row[name] for row in known])
    head = unit.head(name)
    points: list[Row] = [
        {
            "y": unit(row[name]),
            "plan": str(row.get("plan") or "-"),
            "across": _value(row.get(varied[0])) if varied else "all",
            **{f"axis{place}": str(_value(row.get(axis))) for place, axis in enumerate(varied)},
        }
        for row in known
    ]
    across = varied[0] if varied else "point"
    if varied and _numeric(values[across]):
        x = quantity("across", across, scale={"zero": False, "padding": 12})
    else:
        order = [str(value) for value in values[across]] if varied else None
        x = {"field": "across", "type": "nominal", "title": across, "sort": order, "axis": {"labelLimit": 120}}
    log = min(point["y"] for point in points) > 0
    encoding: Spec = {
        "x": x,
        "y": quantity("y", head, log=log, scale={"padding": 12} | ({} if log else {"zero": False})),
        "tooltip": told(*((f"axis{at}", axis) for at, axis in enumerate(varied)), ("plan", "plan"), ("y", head)),
    }
    for channel, place, make in (("color", 1, series), ("shape", 2, shapes)):
        if len(varied) > place:
            names = [str(value) for value in values[varied[place]]]
            encoding[channel] = make(names, f"axis{place}")
            encoding[channel]["legend"] = {"orient": "bottom", "columns": 2, "title": varied[place]}
    chosen = tuple(
        Choice(field=f"axis{at}", label=f"{axis} ", values=tuple(str(value) for value in values[axis]))
        for at, axis in enumerate(varied)
        if at > 0
    )
    without = f"; {count(none, 'point')} without it" if none else ""
    return Chart(
        name=name,
        title=name,
        says=f"{name} of {count(len(points), 'answer')} by {', '.join(varied) or 'point'}{without}.",
        spec={"data": {"values": points}, "mark": {"type": "point", "size": 55, "filled": True}, "encoding": encoding},
        heads=(*varied, "plan", head),
        rows=tuple(
            (*(point[f"axis{at}"] for at in range(len(varied))), point["plan"], text(point["y"])) for point in points
        ),
        choices=chosen,
    )


def _value(value: Any) -> Any:
    """A value along an axis: a number, or a text of whatever else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return "default" if value is None else str(value)


def _numeric(values: Sequence[Any]) -> bool:
    return all(not isinstance(value, str) for value in values)
