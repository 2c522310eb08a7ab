"""A calibration as plain data, as the file of an engine, and as a page."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from apex_opt.engines.kinds import engine_like
from apex_opt.report import listed
from apex_opt.report.fitting import errors_document
from apex_opt.report.layout import count, page, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from apex_opt.measured.calibrate import Calibration
    from apex_opt.measured.compare import Summary
    from apex_opt.schema import Document


_ROUGH: Final = {"tpot_mean": "TPOT", "e2e_mean": "E2E"}
_EXPLAINED_PCT: Final = 10.0
"""Mean error from which on a calibration is doubted: on the runs that ship it is 1 to 3% for both."""


def calibration_document(found: Calibration, engine: str, out: str | None) -> listed.Calibration:
    """What `calibrate` found.

    Parameters
    ----------
    found : Calibration
    engine : str          as it was given: a kind, or the path of an engine file
    out : str or None     file that is written
    """
    times = {
        f"{one.name.removesuffix('_s')}_us": listed.FittedTime(
            before=_us(one.before_s),
            after=_us(one.after_s),
            low=None if one.low_s is None else _us(one.low_s),
            high=None if one.high_s is None else _us(one.high_s),
            kept=one.kept or None,
            at_limit=one.at_limit or None,
        )
        for one in found.times
    }
    like = engine_like(engine)
    rows: list[dict[str, str | float]] = [
        {"time": name, "before_us": one.before, "after_us": one.after} for name, one in times.items()
    ]
    return listed.Calibration(
        command="calibrate",
        status="ok" if found.better else "no better",
        engine=found.before.name,
        like=like,
        runs=found.runs,
        times_us=times,
        fitted=_pair(found.fitted),
        crossed=None if found.crossed is None else _pair(found.crossed),
        held=None if found.held is None else _pair(found.held),
        engine_toml=_file(found, like, times),
        out=out,
        rows=tuple(rows),
    )


def _pair(pair: tuple[Mapping[str, Summary], Mapping[str, Summary]]) -> listed.BeforeAfter:
    before, after = pair
    return listed.BeforeAfter(before=errors_document(before), after=errors_document(after))


def _file(found: Calibration, like: str, times: Mapping[str, listed.FittedTime]) -> str:
    """The engine as a file: what it is like, and all its times."""
    moved = [
        f"{name} {one.after:g} ({'at its limit' if one.at_limit else f'{one.low:g} to {one.high:g}'})"
        for name, one in times.items()
        if one.at_limit or one.low is not None
    ]
    source = f"as {found.before.name}: {found.before.source}"
    if moved:
        source = f"{', '.join(moved)} us fitted on {count(found.runs, 'measured run')}; the rest {source}"
    lines = [
        f"like = {json.dumps(like)}",
        "",
        "[own_time]",
        *(f"{name} = {one.after!r}" for name, one in times.items()),
        f"source = {json.dumps(source[:2000])}",
    ]
    if found.expected:
        lines += [
            "",
            "# Measured over predicted, of loads predicted with times fitted on the others: 8 in 10 between.",
            "[expected]",
        ]
    for figure, (runs, *ratios) in found.expected.items():
        low, middle, high = (f"{ratio:.4g}" for ratio in ratios)
        lines.append(f"{figure} = {{ runs = {runs}, low = {low}, middle = {middle}, high = {high} }}")
    return "\n".join(lines) + "\n"


def calibration_page(document: Document) -> str:
    """The document as text."""
    return page(lambda console: _draw(console, document))


def _draw(console: Console, document: Document) -> None:
    runs = count(document["runs"], "run")
    word = "fitted on" if document["status"] == "ok" else "left as it was, after a fit on"
    console.print(Text.assemble((f"Engine {document['engine']}", "bold"), f" {word} {runs}\n"))
    rows = []
    for name, one in document["times_us"].items():
        between = f"{one['low']:.4g} to {one['high']:.4g}" if "low" in one else "-"
        between = "at its limit" if one.get("at_limit") else between
        rows.append((name, f"{one['before']:g}", f"{one['after']:g}", between, one.get("kept", "")))
    table(console, "", ("time (us)", "before", "after", "95% between", "why it was kept"), rows, left={0, 4})
    if "crossed" not in document:
        console.print(
            Text(
                "One load tells of no other: answers for more or fewer requests at once are extrapolated, and how far "
                "they may be off is not known. Measure at least one load more.\n"
            )
        )
    for key, title in (
        ("fitted", "Runs that were fitted on"),
        ("crossed", "Each load, with times fitted on the others"),
        ("held", "Runs that were held out"),
    ):
        if key in document:
            _errors(console, title, document[key])
    _doubt(console, document)
    if document["status"] != "ok":
        console.print(Text("Nothing is written: a fit brings loads that it has not seen no nearer.\n"))
    elif document["out"] is None:
        console.print(Text("To write it to a file that --engine takes: --out=my.toml\n"))
    else:
        console.print(Text(f"written to {document['out']}; use it as --engine={document['out']}\n"))


def _doubt(console: Console, document: Document) -> None:
    """What is off by more than an engine's own time explains, where a fit has done what it can."""
    errors = document["crossed" if "crossed" in document else "fitted"]["after"]
    off = {name: errors[key]["mean_ape_pct"] for key, name in _ROUGH.items() if key in errors}
    worst = max(off, key=lambda name: off[name], default="")
    if worst and off[worst] > _EXPLAINED_PCT:
        console.print(
            Text(
                f"{worst} is still {off[worst]:.0f}% off, more than the own time of an engine explains: check that "
                "--plan, --cluster, --weights and --engine are what ran.\n"
            )
        )


def _errors(console: Console, title: str, pair: dict[str, Any]) -> None:
    before, after = pair["before"], pair["after"]
    rows = [
        (
            metric,
            str(found["n"]),
            *(f"{errors[metric]['mean_ape_pct']:.2f}%" for errors in (before, after)),
            *(f"{errors[metric]['bias_pct']:+z.2f}%" for errors in (before, after)),
        )
        for metric, found in after.items()
        if metric in before
    ]
    table(console, title, ("", "runs", "mean |error| before", "after", "bias before", "after"), rows, left={0})


def _us(seconds: float) -> float:
    return float(f"{seconds * 1e6:.5g}")
