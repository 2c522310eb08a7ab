"""Pictures as PNG or SVG files, drawn by matplotlib where it is installed."""

from __future__ import annotations

import contextlib
from io import BytesIO
from typing import TYPE_CHECKING, Any

from apex_opt.errors import InputError, UsageError

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
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_bytes(page.getvalue())
        beside.replace(path)
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            beside.unlink()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"plot {path}: cannot be written ({reason}); name a file in a folder that can") from error
