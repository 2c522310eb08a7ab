"""Measured tables as plain data: what the commands of `profile` print as JSON and make their tables from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt import __version__
from apex_opt.report.document import cleaned

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from apex_opt.profiles.folder import TableReport
    from apex_opt.profiles.inventory import Holding
    from apex_opt.schema import Document


def inventory_document(root: Path, holdings: Sequence[Holding]) -> Document:
    """What profile folders there are."""
    return cleaned(
        {
            "command": "profile show",
            "status": "ok",
            "root": str(root),
            "profiles": [_holding(holding) for holding in holdings],
            "tables": sum(len(holding.tables) for holding in holdings),
            "rows": sum(rows for holding in holdings for _, rows, _ in holding.tables),
            "bytes": sum(_bytes(holding) for holding in holdings),
            "version": __version__,
        }
    )


def _bytes(holding: Holding) -> int:
    return holding.card_bytes + sum(size for _, _, size in holding.tables)


def _holding(holding: Holding) -> Document:
    card = holding.card
    return {
        "accelerator": holding.accelerator,
        "source": holding.source,
        "gpu": card.gpu,
        "engine": card.engine,
        "use": card.use,
        "date": card.date or None,
        "licence": card.licence,
        **dict(card.texts),
        "power": card.power.source if card.power else None,
        "tables": [{"table": kind, "rows": rows, "bytes": size} for kind, rows, size in holding.tables],
        "rows": sum(rows for _, rows, _ in holding.tables),
        "bytes": _bytes(holding),
    }


def tables_document(
    command: str, target: Path, reports: Sequence[TableReport], passed_over: Sequence[tuple[str, str]] = ()
) -> Document:
    """What became of tables that were made; look-up errors are relative.

    Parameters
    ----------
    command : str                        whose answer it is
    target : Path                        folder they are in
    reports : sequence of TableReport    of the tables made
    passed_over : sequence               files left out, with the reason
    """
    return cleaned(
        {
            "command": command,
            "status": "ok",
            "target": str(target),
            "tables": [_made(report) for report in reports],
            "passed_over": [{"what": what, "reason": reason} for what, reason in passed_over],
            "source_rows": sum(report.source_rows for report in reports),
            "rows": sum(report.rows for report in reports),
            "bytes": sum(report.file_bytes for report in reports),
            "version": __version__,
        }
    )


def _made(report: TableReport) -> Document:
    error = None
    if report.error is not None:
        median, p95, with_lone_median, with_lone_p95 = report.error
        error = {"median": median, "p95": p95, "with_lone_median": with_lone_median, "with_lone_p95": with_lone_p95}
    return {
        "folder": report.folder,
        "table": report.kind,
        "source_rows": report.source_rows,
        "screened_rows": report.screened_rows,
        "rows": report.rows,
        "dropped": dict(report.dropped),
        "lookup_error": error,
        "bytes": report.file_bytes,
    }
