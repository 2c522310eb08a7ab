"""What is to be expected of an answer, by runs that were measured: as a document, and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt.measured.expected import FIGURES, Kind, expected
from apex_opt.report import types
from apex_opt.report.layout import amount, table

if TYPE_CHECKING:
    from rich.console import Console

    from apex_opt.figures import Objective
    from apex_opt.measured.expected import Expected
    from apex_opt.schema import Document
    from apex_opt.search import Problem, Scored

NOTHING: Final = "nothing comparable was measured"


def kind_of(problem: Problem, scored: Scored) -> Kind | None:
    """What a run is of; None where none was measured: several pools, drafts, shares, schedulers for comparison."""
    engine, metrics = problem.overhead.kernels, scored.metrics
    plans, types = [use.pool.plan for use in scored.pools], scored.pools[0].pool.types or problem.types
    unusual = any(plan.speculation is not None or plan.shares is not None for plan in plans)
    if unusual or len(plans) > 1 or len(types) > 1 or problem.settings.scheduler.name != engine:
        return None
    in_flight = metrics.value("throughput") * metrics.latency_s["e2e"]["mean"] / scored.devices
    return Kind.of(engine, types[0], problem.model, in_flight)


def error_of(problem: Problem, scored: Scored, objective: Objective) -> Expected | None:
    """What is to be expected of an objective: of a latency what is of its mean, of energies that of the whole run.

    Parameters
    ----------
    problem, scored, objective
    """
    named = "energy" if objective.figure.depends_on == {"energy"} else f"{objective.metric}_mean"
    kind = kind_of(problem, scored)
    return None if kind is None or named not in FIGURES else expected(kind, named)


def expected_document(problem: Problem, scored: Scored) -> tuple[types.ExpectedFigure, ...]:
    """What would be measured of TTFT, TPOT, E2E and energy of a run."""
    kind, rows = kind_of(problem, scored), []
    for key, name in FIGURES.items():
        latency = scored.metrics.latency_s.get(key.removesuffix("_mean"))
        predicted = scored.metrics.value("energy") if latency is None else latency["mean"]
        found = None if kind is None else expected(kind, key)
        low, high = (None, None) if found is None else found.interval(predicted)
        rows.append(
            types.ExpectedFigure(
                figure=name,
                unit="J" if key == "energy" else "s",
                predicted=predicted,
                low=low,
                high=high,
                rows=0 if found is None else found.rows,
                of=NOTHING if found is None else str(found.kind),
                nearest=found is not None and found.nearest,
            )
        )
    return tuple(rows)


def expected_table(console: Console, document: Document) -> None:
    """The figures with their intervals, and what these are known from."""
    if not (figures := document.get("expected")):
        return
    if all(one["low"] is None for one in figures):
        console.print(Text.assemble(("Expected error", "bold"), f": not known, {NOTHING}.\n"))
        return
    rows = [
        (
            one["figure"],
            amount(one["predicted"], one["unit"]),
            "-" if one["low"] is None else f"{amount(one['low'], one['unit'])} to {amount(one['high'], one['unit'])}",
            f"{one['rows']:,}" if one["rows"] else "-",
            one["of"] + ("" if one["nearest"] or not one["rows"] else ", the nearest there is"),
        )
        for one in figures
    ]
    heads = ("mean", "predicted", "measured, 8 in 10", "runs", "known from")
    table(console, "Expected error", heads, rows, left={0, 4}, kept=range(3))
