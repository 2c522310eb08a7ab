"""Charts as a notebook shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apex_opt.errors import UsageError
from apex_opt.files import expanded
from apex_opt.report.charts import beside
from apex_opt.report.picture import PIXELS_PER_INCH, drawer, write_picture

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.report.charts import Chart

_COLUMNS = 2


@dataclass(frozen=True, slots=True)
class Shown:
    """Charts of an answer: a notebook draws them, `save` writes them."""

    charts: tuple[Chart, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """By which each can be asked for."""
        return tuple(dict.fromkeys(chart.name for chart in self.charts))

    def __repr__(self) -> str:
        """Their names; what draws them is a notebook, or `save`."""
        return f"<charts: {', '.join(self.names)}>"

    def save(self, path: str | Path) -> None:
        """Write them side by side into a PNG or SVG file.

        Raises
        ------
        UsageError    a name that ends in neither, or vl-convert is not installed
        InputError    a path that cannot be written
        """
        place = expanded(str(path))
        if place.suffix not in (".png", ".svg"):
            raise UsageError(f"plot: expected a file name that ends in .png or .svg, got {str(path)!r:.60}")
        write_picture(place, *self.charts, columns=_COLUMNS)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """A picture, for a notebook anywhere."""
        spec = beside(self.charts, _COLUMNS)
        return {"image/png": drawer().vegalite_to_png(spec, ppi=PIXELS_PER_INCH), "text/plain": repr(self)}
