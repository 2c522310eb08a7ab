"""Charts as files and in pages, drawn by Vega-Lite, which comes with vl-convert where that is installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.errors import InputError, UsageError
from apex_opt.outputs import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.report.charts import Chart

PIXELS_PER_INCH = 144


def drawer(option: str = "plot") -> Any:
    """The library that draws.

    Raises
    ------
    UsageError    vl-convert is not installed
    """
    try:
        import vl_convert
    except ImportError:
        raise UsageError(f"--{option}: needs vl-convert-python; pip install 'apex-opt[report]'") from None
    return vl_convert


def script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, which asks nothing of any network."""
    return str(drawer("report").javascript_bundle())


def write_picture(path: Path, *charts: Chart, columns: int = 3) -> None:
    """Write charts side by side as a file of the form its name ends in, .png or .svg; it appears whole or not at all.

    Parameters
    ----------
    path : Path
    charts : one at least
    columns : int    charts beside each other

    Raises
    ------
    UsageError    vl-convert is not installed
    InputError    nothing to draw, or a path that cannot be written
    """
    from apex_opt.report.charts import beside

    library = drawer()
    if not charts:
        raise InputError(f"plot {path}: there is nothing to draw")
    spec = beside(charts, columns)
    if path.suffix == ".svg":
        content = str(library.vegalite_to_svg(spec)).encode()
    else:
        content = bytes(library.vegalite_to_png(spec, ppi=PIXELS_PER_INCH))
    write_whole(path, content, "plot")
