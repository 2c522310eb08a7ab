"""Pictures as PNG or SVG files, drawn by matplotlib where it is installed."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from apex_opt.errors import UsageError
from apex_opt.outputs import write_whole

if TYPE_CHECKING:
    from pathlib import Path


def blank_figure() -> Any:
    """The class of a figure that needs no display.

    Raises
    ------
    UsageError    matplotlib is not installed
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot: needs matplotlib; pip install 'apex-opt[plot]'") from None
    return Figure


def write_picture(path: Path, figure: Any) -> None:
    """Write a figure in the form its name ends in, .png or .svg; the file appears whole or not at all.

    Raises
    ------
    InputError    a path that cannot be written
    """
    page = BytesIO()
    figure.savefig(page, format="svg" if path.suffix == ".svg" else "png", dpi=120)
    write_whole(path, page.getvalue(), "plot")
