"""Measured tables as plain data: what the commands of `profile` print as JSON and make their tables from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.report import listed
from apex_opt.schema import of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from apex_opt.profiles.folder import TableReport
    from apex_opt.profiles.inventory import Holding


def inventory_document(root: Path, holdings: Sequence[Holding]) -> listed.Inventory:
    """What profile folders there are."""
    profiles = tuple(map(_holding, holdings))
    return listed.Inventory(
        command="profile show",
        status="ok",
        root=str(root),
        profiles=profiles,
        tables=sum(len(profile.tables) for profile in profiles),
        rows=sum(profile.rows for profile in profiles),
        bytes=sum(profile.bytes for profile in profiles),
    )


def _holding(holding: Holding) -> listed.Profile:
    card = holding.card
    return of(
        listed.Profile,
        holding,
        card,
        date=card.date or None,
        power=card.power.source if card.power else None,
        tables=[listed.Table(table=kind, rows=rows, bytes=size) for kind, rows, size in holding.tables],
        rows=sum(rows for _, rows, _ in holding.tables),
        bytes=holding.card_bytes + sum(size for _, _, size in holding.tables),
        **dict(card.texts),
    )


def tables_document(
    command: str, target: Path, reports: Sequence[TableReport], passed_over: Sequence[tuple[str, str]] = ()
) -> listed.MadeTables:
    """What became of tables that were made; look-up errors are relative.

    Parameters
    ----------
    command : str                        whose answer it is
    target : Path                        folder they are in
    reports : sequence of TableReport    of the tables made
    passed_over : sequence               files left out, with the reason
    """
    return listed.MadeTables(
        command=command,
        status="ok",
        target=str(target),
        tables=tuple(map(_made, reports)),
        passed_over=tuple({"what": what, "reason": reason} for what, reason in passed_over),
        source_rows=sum(report.source_rows for report in reports),
        rows=sum(report.rows for report in reports),
        bytes=sum(report.file_bytes for report in reports),
    )


def _made(report: TableReport) -> listed.MadeTable:
    names = ("median", "p95", "with_lone_median", "with_lone_p95")
    error = None if report.error is None else dict(zip(names, report.error, strict=True))
    return of(
        listed.MadeTable,
        report,
        table=report.kind,
        dropped=dict(report.dropped),
        lookup_error=error,
        bytes=report.file_bytes,
    )
