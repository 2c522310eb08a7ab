"""Tables of `validate` for people, made from the document that programs get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt.report.layout import count, kilojoules, notes_lines, page, provenance_table, seconds, table

if TYPE_CHECKING:
    from rich.console import Console

    from apex_opt.schema import Document

_NAME_WIDTH: Final = 40
_EXAMPLE_WIDTH: Final = 120
_HEADS: Final = {
    "ttft_mean": "TTFT",
    "ttft_p95": "TTFT p95",
    "tpot_mean": "TPOT",
    "tpot_p95": "TPOT p95",
    "itl_mean": "ITL",
    "e2e_mean": "E2E",
    "throughput": "req/s",
    "energy": "energy",
}


def validation_page(document: Document, limit: int) -> str:
    """The document as text; of more runs than `limit` those with the largest errors."""
    return page(lambda console: _draw(console, document, limit))


def _draw(console: Console, document: Document, limit: int) -> None:
    rows = document["rows"]
    predicted = [row for row in rows if row["status"] == "predicted"]
    covered = document["coverage"]
    known = f", {covered['supported']:,} of a model that can be described" if covered["supported"] else ""
    aside = f", {covered['aside']:,} set aside" if covered["aside"] else ""
    console.print(
        Text.assemble(
            (f"{covered['predicted']:,} of {count(covered['total'], 'measured run')} predicted", "bold"),
            f" ({covered['rows']:,} in {count(len(document['files']), 'file')}{known}{aside})\n",
        )
    )
    notes_lines(console, document)
    if predicted:
        _runs(console, document, predicted, limit)
        _summary(console, document)
        _steps(console, document)
    _reasons(console, document)
    if predicted:
        provenance_table(console, document["provenance"])


def _runs(console: Console, document: Document, rows: list[Document], limit: int) -> None:
    """Measured, predicted and error of every run, one below the other."""
    shown = rows
    if len(rows) > limit:
        shown = sorted(rows, key=_worst, reverse=True)[:limit]
    metrics = [metric for metric in document["units"] if any(metric in row["metrics"] for row in shown)]
    lines: list[tuple[str, ...]] = []
    for row in shown:
        cells = [(metric, row["metrics"].get(metric)) for metric in metrics]
        lines += [
            (
                _cut(row["name"], _NAME_WIDTH),
                "measured",
                *(_value(metric, cell and cell["measured"]) for metric, cell in cells),
            ),
            (f"  {row['plan']}", "predicted", *(_value(metric, cell and cell["predicted"]) for metric, cell in cells)),
            (f"  {row['engine']}, {row['cluster']}", "error", *(_error(row, *cell) for cell in cells)),
        ]
    order = "largest errors first: by the mean |error| of a row, figures with * left out"
    title = f"Runs ({len(shown)} of {len(rows)}, {order})" if len(shown) < len(rows) else "Runs"
    table(console, title, ("run", "", *(_HEADS[metric] for metric in metrics)), lines, left={0, 1}, kept=range(4))
    marked = dict.fromkeys(text for row in shown for text in row["set_aside"].values())
    others = dict.fromkeys(text for row in rows for text in row["set_aside"].values() if text not in marked)
    for said, texts in (("* shown, but not", marked), ("of runs not shown, not", others)):
        for text in texts:
            console.print(Text(f"{said} in the summary: {text}"))
    if marked or others:
        console.print()


def _error(row: Document, metric: str, cell: Document | None) -> str:
    if cell is None:
        return "-"
    return f"{cell['error_pct']:+z.1f}%" + ("*" if metric in row["set_aside"] else "")


def _worst(row: Document) -> float:
    """Mean absolute error of a run over what is judged."""
    errors = [abs(m["error_pct"]) for name, m in row["metrics"].items() if name not in row["set_aside"]]
    return sum(errors) / len(errors) if errors else 0.0


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _value(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    if metric == "throughput":
        return f"{value:.2f}"
    return f"{kilojoules(value)} kJ" if metric == "energy" else seconds(value)


def _summary(console: Console, document: Document) -> None:
    everything = document["summary_with_set_aside"]
    asides = any(found["n"] < everything[metric]["n"] for metric, found in document["summary"].items())
    heads = ("", "runs", "mean |error|", "median |error|", "bias", *(("all runs", "mean |error|") if asides else ()))
    rows = [
        (_HEADS[metric], f"{found['n']:,}", *_errors(found), *(_errors_of_all(everything[metric]) if asides else ()))
        for metric, found in document["summary"].items()
    ]
    table(console, "Summary", heads, rows, left={0})
    _halves(console, document["summary_by"].get("half", {}))
    for group, parts in document["summary_by"].items():
        if len(parts) < 2 or group == "half":
            continue
        metrics = [m for m in document["summary"] if any(m in part for part in parts.values())]
        lines = [(name, *(_in_short(part.get(metric)) for metric in metrics)) for name, part in parts.items()]
        heads = (group, *(_HEADS[metric] for metric in metrics))
        table(console, f"Mean |error| and bias by {group}", heads, lines, left={0}, kept=range(4))


def _halves(console: Console, halves: Document) -> None:
    """The runs that parameters may be fitted on, and those that are only judged by."""
    if len(halves) < 2:
        return
    rows = [
        (_HEADS[metric], half, f"{found['n']:,}", *_errors(found))
        for metric in _HEADS
        for half, errors in halves.items()
        if (found := errors.get(metric)) is not None
    ]
    heads = ("", "half", "runs", "mean |error|", "median |error|", "bias")
    table(console, "Runs judged by, and runs that parameters may be fitted on", heads, rows, left={0, 1})


def _in_short(found: Document | None) -> str:
    return f"{found['mean_ape_pct']:.1f}% ({found['bias_pct']:+z.1f})" if found else "-"


def _errors(found: Document) -> tuple[str, ...]:
    return (f"{found['mean_ape_pct']:.2f}%", f"{found['median_ape_pct']:.2f}%", f"{found['bias_pct']:+z.2f}%")


def _errors_of_all(found: Document) -> tuple[str, str]:
    """The same with the runs that were set aside."""
    return f"{found['n']:,}", f"{found['mean_ape_pct']:.2f}%"


def _steps(console: Console, document: Document) -> None:
    rows = [
        (
            model,
            kind,
            f"{part['steps']:,}",
            seconds(part["measured_s"] / part["steps"]),
            seconds(part["predicted_s"] / part["steps"]),
            f"{part['bias_pct']:+z.1f}%",
        )
        for model, kinds in document["causes"].items()
        for kind, part in kinds.items()
    ]
    if rows:
        heads = ("model", "step", "steps", "measured", "batch law", "bias")
        table(console, "Measured steps against the batch law, mean", heads, rows, left={0, 1})


def _reasons(console: Console, document: Document) -> None:
    """Why runs were not predicted, each reason with the figures of one of its runs."""
    reasons = document["coverage"]["reasons"]
    if reasons:
        example = {row["reason"]: row["detail"] for row in document["rows"] if row["status"] == "not predicted"}
        rows = [(reason, f"{number:,}", _cut(example[reason], _EXAMPLE_WIDTH)) for reason, number in reasons.items()]
        table(console, "Not predicted", ("reason", "runs", "for example"), rows, left={0, 2})
    for path in document["passed_over"]:
        console.print(Text(f"no measured runs in {path}", "dim"))
    if document["passed_over"]:
        console.print()
