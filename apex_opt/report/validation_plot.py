"""Predicted against measured, a panel per metric, as a PNG file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError
from apex_opt.report.picture import blank_figure, write_picture

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.schema import Document

_COLUMNS: Final = 4
_BANDS: Final = {25: "0.92", 10: "0.8"}
_PANEL_INCHES: Final = 3.4
_MARKERS: Final = "osD^vP*X"


def write_plot(path: Path, document: Document) -> None:
    """Draw every run that was predicted on logarithmic axes, with the line of no error and bands around it.

    Runs are coloured by kind, cluster and engine; those set aside are hollow. The file appears whole or not at all.

    Raises
    ------
    UsageError    matplotlib is not installed
    InputError    nothing to draw, or a path that cannot be written
    """
    blank = blank_figure()
    rows = [row for row in document["rows"] if row["status"] == "predicted"]
    metrics = [metric for metric in document["units"] if any(metric in row["metrics"] for row in rows)]
    if not metrics:
        raise InputError(f"plot {path}: no run was predicted, there is nothing to draw")
    columns = min(_COLUMNS, len(metrics))
    lines = -(-len(metrics) // columns)
    groups = sorted({_group(row) for row in rows})
    legend_lines = -(-(len(groups) + len(_BANDS)) // _COLUMNS)
    height = (_PANEL_INCHES + 0.2) * lines + 0.2 * legend_lines
    figure = blank(figsize=(_PANEL_INCHES * columns, height), layout="constrained")
    for place, metric in enumerate(metrics, 1):
        axes = figure.add_subplot(lines, columns, place)
        points = _draw(axes, metric, rows, groups)
        axes.set_title(f"{metric} ({points:,} runs)", fontsize=9)
        axes.set_xlabel(f"measured, {document['units'][metric]}", fontsize=8)
        axes.set_ylabel("predicted", fontsize=8)
    handles, labels = _legend(figure)
    figure.legend(handles, labels, loc="outside lower center", ncols=_COLUMNS, fontsize=8, frameon=False)
    write_picture(path, figure)


def _group(row: Document) -> str:
    return f"{row['cluster']}, {row['engine']}"


def _draw(axes: Any, metric: str, rows: list[Document], groups: list[str]) -> int:
    """One panel; the number of its points."""
    total = 0
    seen: list[float] = []
    for index, group in enumerate(groups):
        mine = [row for row in rows if _group(row) == group and metric in row["metrics"]]
        for aside in (False, True):
            cells = [row["metrics"][metric] for row in mine if (metric in row["set_aside"]) is aside]
            pairs = [(cell["measured"], cell["predicted"]) for cell in cells]
            pairs = [pair for pair in pairs if min(pair) > 0]
            if not pairs:
                continue
            colour = f"C{index % 10}"
            axes.scatter(
                *zip(*pairs, strict=True),
                s=14,
                marker=_MARKERS[index // 10 % len(_MARKERS)],
                facecolors="none" if aside else colour,
                edgecolors=colour,
                linewidths=0.7,
                alpha=0.7,
                label=group,
            )
            total += len(pairs)
            seen += [value for pair in pairs for value in pair]
    low, high = min(seen, default=1.0) / 1.5, max(seen, default=1.0) * 1.5
    for band, grey in _BANDS.items():
        share = band / 100
        axes.fill_between(
            [low, high],
            [low * (1 - share), high * (1 - share)],
            [low * (1 + share), high * (1 + share)],
            color=grey,
            linewidth=0,
            label=f"within {band}%",
            zorder=0,
        )
    axes.plot([low, high], [low, high], color="0.3", linewidth=0.8, zorder=1)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), box_aspect=1)
    axes.tick_params(labelsize=7)
    return total


def _legend(figure: Any) -> tuple[list[Any], list[str]]:
    """Every label of every panel once."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
