"""The points of a study as a document and as a page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from apex_opt.report import studied
from apex_opt.report.layout import count, page, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Protocol

    from rich.console import Console

    from apex_opt.schema import Document

    class Grid(Protocol):
        """What is told of a study."""

        @property
        def command(self) -> str: ...
        @property
        def fixed(self) -> Mapping[str, Any]: ...
        @property
        def axes(self) -> Mapping[str, tuple[Any, ...]]: ...
        def __len__(self) -> int: ...
        def points(self) -> Any: ...


SHOWN: Final = ("rate_per_s", "ttft_s.p95", "tpot_s.p95", "e2e_s.mean", "throughput_rps", "energy_j", "cost_usd_per_h")
"""Figures of the table, where any point has them; all are in JSON and CSV, and in the folder."""

_FAULTY: Final = 2
_NO_PLAN: Final = 3
_LONGEST_REASONS: Final = 5


def option_text(value: Any) -> str:
    """An option as a study's file has it, without quotes round a text."""
    return value if isinstance(value, str) else json.dumps(value)


def study_document(study: Grid, folder: Path, rows: Sequence[dict[str, Any]], answered: int) -> studied.StudyAnswer:
    """The points of a study with what became of them.

    Parameters
    ----------
    study : Study
    folder : Path      of its results
    rows : sequence    of its table
    answered : int     questions that this run answered
    """
    codes = {row["point"]: row["exit_code"] for row in rows}
    return studied.StudyAnswer(
        status="complete" if len(codes) == len(study) else "open",
        asked=study.command,
        fixed={name: option_text(value) for name, value in study.fixed.items()},
        folder=str(folder),
        size=len(study),
        answered=answered,
        found=sum(code == 0 for code in codes.values()),
        infeasible=sum(code == _NO_PLAN for code in codes.values()),
        failed=sum(code not in (0, _NO_PLAN) for code in codes.values()),
        points=tuple(map(_row, rows)),
    )


def _row(row: dict[str, Any]) -> studied.StudyRow:
    def below(name: str) -> dict[str, Any]:
        start = f"{name}."
        return {key.removeprefix(start): value for key, value in row.items() if key.startswith(start)}

    plain = ("point", "row", "same_as", "status", "exit_code", "error", "seconds", "plan", "gpus")
    return studied.StudyRow(**{name: row[name] for name in plain}, options=below("options"), figures=below("figures"))


def listed_document(study: Grid, folder: Path, faults: Mapping[int, str]) -> studied.StudyAnswer:
    """The points of a study, none of them answered.

    Parameters
    ----------
    study : Study
    folder : Path       of its results
    faults : mapping    why points cannot be asked, by their numbers
    """
    empty = dict.fromkeys(("same_as", "exit_code", "error", "seconds", "plan", "gpus"))
    wrong = {place: {"status": "failed", "exit_code": _FAULTY, "error": text} for place, text in faults.items()}
    rows = [
        {"point": place, "row": 0, **empty, "status": "open", **wrong.get(place, {})}
        | {f"options.{name}": option_text(value) for name, value in point.items()}
        for place, point in enumerate(study.points())
    ]
    document = study_document(study, folder, [], 0)
    told = {"failed": len(wrong), "points": tuple(map(_row, rows))}
    return studied.StudyAnswer(**vars(document) | told)


def study_page(document: Document) -> str:
    """The same for people."""
    return page(lambda console: _page(console, document))


def _page(console: Console, document: Document) -> None:
    rows = document["points"]
    fixed = ", ".join(f"{name}={value}" for name, value in document["fixed"].items())
    console.print(
        Text.assemble(
            (f"study of {document['asked']}", "bold"), f", {count(document['size'], 'point')}{fixed and f', {fixed}'}"
        )
    )
    if document["status"] == "open":
        wrong = f"{count(document['failed'], 'point')} cannot be asked; " if document["failed"] else ""
        console.print(f"open; {wrong}results will be in {document['folder']}\n")
    else:
        console.print(
            f"{document['found']:,} with a plan, {document['infeasible']:,} infeasible, {document['failed']:,} failed; "
            f"{count(document['answered'], 'question')} answered in this run; all in {document['folder']}\n"
        )
    axes = list(rows[0]["options"]) if rows else []
    shown = [name for name in SHOWN if any(row["figures"].get(name) is not None for row in rows)]
    heads = ("#", *axes, "status", "plan", "GPUs", *map(_head, shown))
    lines = [
        (
            str(row["point"]),
            *row["options"].values(),
            row["status"] if row["same_as"] is None else f"as #{row['same_as']}",
            row["plan"] or "-",
            "-" if row["gpus"] is None else str(row["gpus"]),
            *(_amount(row["figures"].get(name)) for name in shown),
        )
        for row in rows
    ]
    left = {*range(1, len(axes) + 3)}
    table(console, "Points", heads, lines, left=left, kept={*range(len(axes) + 4)})
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["exit_code"] and row["error"]:
            reasons.setdefault(row["error"], []).append(f"#{row['point']}")
    for text, places in list(reasons.items())[:_LONGEST_REASONS]:
        which = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        console.print(Text(f"{which}: {text}", "red"))
    if len(reasons) > _LONGEST_REASONS:
        console.print(f"{len(reasons) - _LONGEST_REASONS:,} more reasons: --format=csv has all\n")


def _head(name: str) -> str:
    """A figure with its statistic and unit."""
    key, _, statistic = name.partition(".")
    title, _, unit = key.rpartition("_")
    if statistic:
        return f"{title.upper()} {statistic}, s"
    return {
        "rate_per_s": "rate, 1/s",
        "throughput_rps": "throughput, req/s",
        "energy_j": "energy, J",
        "cost_usd_per_h": "cost, $/h",
    }.get(name, f"{title}, {unit}")


def _amount(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
