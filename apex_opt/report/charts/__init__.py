"""Charts of answers as Vega-Lite specifications: the same for a page to be opened and for a picture in a file.

A chart says in words what it shows and has its figures as a table too, for whoever does not see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from apex_opt.units import GB

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Spec = dict[str, Any]
Row = dict[str, Any]

PALETTE: Final = ("#0067a5", "#c2410c", "#047857", "#9d174d", "#6d28d9", "#525252", "#92610a", "#0e7490")
"""Each stands out from white by 4.5 to 1 at the least, and from its neighbours without red against green."""
PALE: Final = "#6b7280"
"""Of what stands behind: plans that are beaten, bands, links."""
SHAPES: Final = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "stroke")
DASHES: Final = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [1, 3], [10, 4], [6, 2, 2, 2])
_SIZE: Final = (380, 280)
_FONT: Final = "system-ui, 'Segoe UI', 'DejaVu Sans', 'Liberation Sans', sans-serif"
_AXIS: Final = {"labelColor": "#1f2937", "titleColor": "#111827", "gridColor": "#e5e7eb", "labelOverlap": True}
CONFIG: Final[Spec] = {
    "font": _FONT,
    "background": "white",
    "view": {"stroke": "#9ca3af"},
    "axis": {**_AXIS, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 12, "titleFontSize": 12, "labelColor": "#1f2937", "labelLimit": 260},
    "title": {"fontSize": 14, "anchor": "start"},
    "range": {"category": list(PALETTE), "symbol": list(SHAPES)},
    "text": {"font": _FONT},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a reader may choose the points of a chart by.

    Parameters
    ----------
    field : str       of its rows
    label : str       beside the choice
    values : those there are; of numbers the chart shows those up to one of them, of texts one or all
    """

    field: str
    label: str
    values: tuple[float | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A chart.

    Parameters
    ----------
    name : str        by which it can be asked for
    title : str       above it
    says : str        what it shows, in a sentence
    spec : mapping    a single view or layers of Vega-Lite, without its size
    heads, rows : the same figures as a table
    choices : what its points may be chosen by
    size : width and height, in pixels
    wide : bool       whether it keeps its width where there is less, as a drawing does
    """

    name: str
    title: str
    says: str
    spec: Mapping[str, Any]
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    choices: tuple[Choice, ...] = ()
    size: tuple[int, int] = _SIZE
    wide: bool = False

    def page_spec(self) -> Spec:
        """As wide as what it stands in, with its choices as fields of a form."""
        params: list[Spec] = []
        filters: list[Spec] = []
        for choice in self.choices:
            name, field = f"chosen_{choice.field}", f"datum['{choice.field}']"
            numbers = [value for value in choice.values if not isinstance(value, str)]
            if not numbers:
                bind: Spec = {"input": "select", "options": [None, *choice.values], "labels": ["all", *choice.values]}
                params.append({"name": name, "value": None, "bind": {**bind, "name": choice.label}})
                filters.append({"filter": f"{name} == null || {field} == {name}"})
            else:
                low, high = min(numbers), max(numbers)
                slider: Spec = {"input": "range", "min": low, "max": high, "step": 1, "name": choice.label}
                params.append({"name": name, "value": high, "bind": slider})
                filters.append({"filter": f"{field} <= {name}"})
        own = dict(self.spec)
        return {
            **own,
            "params": [*own.get("params", []), *params],
            "transform": [*filters, *own.get("transform", [])],
            "description": self.says,
            "width": self.size[0] if self.wide else "container",
            "height": self.size[1],
            **({} if self.wide else {"autosize": {"type": "fit-x", "contains": "padding"}}),
            "config": CONFIG,
        }

    def view(self) -> Spec:
        """As one of several views of a picture."""
        return {**self.spec, "title": self.title, "width": self.size[0], "height": self.size[1]}


def beside(charts: Sequence[Chart], columns: int) -> Spec:
    """Charts as one specification, so many beside each other."""
    views = [chart.view() for chart in charts]
    shared = {"config": CONFIG, "description": " ".join(chart.says for chart in charts), "padding": 12}
    if len(views) == 1:
        return {**views[0], **shared}
    resolve = {"scale": {"color": "independent", "shape": "independent", "strokeDash": "independent"}}
    return {"concat": views, "columns": columns, "resolve": resolve, "spacing": 30, **shared}


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit in which people read figures, and what a figure is multiplied by to be in it; six digits are kept."""

    name: str
    factor: float

    def __call__(self, value: float | None) -> float | None:
        return None if value is None else float(f"{value * self.factor:.6g}")

    def head(self, what: str) -> str:
        """What is told, with the unit."""
        return f"{what}, {self.name}" if self.name else what


def unit_of(unit: str, values: Iterable[float | None]) -> Unit:
    """The unit that tables tell figures in: seconds or parts of them, as suits the largest; kJ, GB, else its own."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if unit == "s":
        if largest < 1e-3:
            return Unit("us", 1e6)
        return Unit("ms", 1e3) if largest < 1 else Unit("s", 1.0)
    if unit == "share":
        return Unit("%", 100.0)
    return {"J": Unit("kJ", 1e-3), "B": Unit("GB", 1 / GB)}.get(unit, Unit(unit, 1.0))


def quantity(field: str, title: str, *, log: bool = False, **more: Any) -> Spec:
    """A figure along an axis.

    Parameters
    ----------
    field : str      of the rows
    title : str      of the axis
    log : bool       whether equal ratios are equally far
    more : whatever else its channel says
    """
    scale: Spec = {"type": "log", "nice": False} if log else {"nice": True}
    return {"field": field, "type": "quantitative", "title": title, "scale": scale | more.pop("scale", {}), **more}


def text(value: float | None) -> str:
    """A figure of a table, to four digits."""
    return "-" if value is None else f"{value:,.4g}"


def series(names: Sequence[str], field: str = "series") -> Spec:
    """The colour of each of several series, in their order; with one alone there is nothing to tell apart."""
    scale = {"domain": list(names), "range": [PALETTE[place % len(PALETTE)] for place in range(len(names))]}
    legend = None if len(names) < 2 else {"orient": "bottom", "columns": 1, "title": None}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def shapes(names: Sequence[str], field: str = "series") -> Spec:
    """The shape of the points of each of several series: with the colours, which come round later, no two are alike."""
    found = [SHAPES[place % (len(SHAPES) - 1)] for place in range(len(names))]
    legend = None if len(names) < 2 else {"orient": "bottom", "columns": 1, "title": None}
    return {"field": field, "type": "nominal", "scale": {"domain": list(names), "range": found}, "legend": legend}


def dashes(names: Sequence[str], field: str = "series") -> Spec:
    """The dashes of each of several series, so that they are told apart without colours."""
    scale = {"domain": list(names), "range": [list(DASHES[place % len(DASHES)]) for place in range(len(names))]}
    legend = None if len(names) < 2 else {"orient": "bottom", "columns": 1, "title": None}
    return {"field": field, "type": "nominal", "scale": scale, "legend": legend}


def told(*fields: tuple[str, str]) -> list[Spec]:
    """What is said of a point that is hovered over or has the focus: fields of its row, and their heads."""
    return [{"field": field, "title": head} for field, head in fields]
