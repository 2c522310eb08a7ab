"""What is to be expected of an answer, by runs that were measured: as a document, and as a table."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from rich.text import Text

from apex_opt.measured.expected import FIGURES, Expected, Kind, doubtful, expected
from apex_opt.report import types
from apex_opt.report.layout import amount, count, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from apex_opt.figures import Objective
    from apex_opt.schema import Document
    from apex_opt.search import Problem, Scored

NOTHING: Final = "nothing comparable was measured"
NARROW: Final = 0.1
"""Share of its limit by which a goal may be met for it to be told that no error of its figure is known; assumed."""
_SEEN_BY_CLIENTS: Final = ("ttft_mean", "e2e_mean")


def kind_of(problem: Problem, scored: Scored) -> Kind | None:
    """What a run is of; None where none was measured.

    That is of several pools, drafts, shares, overlap, schedulers for comparison, of reused prefixes, of models that
    read with an encoder (images too) or answer with a vector.
    """
    engine, metrics = problem.overhead.kernels, scored.metrics
    plans, types = [use.pool.plan for use in scored.pools], scored.pools[0].pool.types or problem.types
    unusual = any(plan.speculation is not None or plan.shares is not None or plan.overlap is not None for plan in plans)
    unusual |= problem.settings.prefix_caching or problem.model.pools or problem.model.encoder is not None
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
    return _found(problem, scored, named)


def _found(problem: Problem, scored: Scored, figure: str) -> Expected | None:
    """What is to be expected of a figure: of latencies by an engine file what it was calibrated to, else the board."""
    kind = kind_of(problem, scored)
    if kind is None or figure not in FIGURES:
        return None
    told = problem.overhead.expected
    if told is None or figure == "energy":
        known = expected(kind, figure)
        if known is None or not problem.overhead.name.startswith(f"{kind.engine}-"):
            return known
        # The board has an engine's releases together.
        return replace(known, of=known.of.replace(kind.engine, f"{kind.engine} of all releases", 1), nearest=False)
    of = f"{problem.overhead.name}, loads that were left out when it was calibrated"
    rows = ((runs, low, middle, high) for name, runs, low, middle, high in told if name == figure)
    return next((Expected(of, True, *row) for row in rows), None)


def _way_s(problem: Problem, figure: str) -> float:
    """What a client of a closed loop waits besides, which is in what was measured and not in what is predicted."""
    return problem.overhead.way_s(problem.trace) if figure in _SEEN_BY_CLIENTS else 0.0


def expected_document(problem: Problem, scored: Scored) -> tuple[types.ExpectedFigure, ...]:
    """What would be measured of TTFT, TPOT, E2E and energy of a run."""
    rows = []
    for key, name in FIGURES.items():
        latency = scored.metrics.latency_s.get(key.removesuffix("_mean"))
        predicted = scored.metrics.value("energy") if latency is None else latency["mean"]
        found = _found(problem, scored, key)
        way_s = _way_s(problem, key)
        low, high = (None, None) if found is None else found.interval(predicted + way_s)
        apart = f", clients wait {amount(way_s, 's')} more on their way" if way_s else ""
        rows.append(
            types.ExpectedFigure(
                figure=name,
                unit="J" if key == "energy" else "s",
                predicted=predicted,
                low=low,
                high=high,
                rows=0 if found is None else found.rows,
                of=_nothing(problem) if found is None else found.of + apart,
                nearest=found is not None and found.nearest,
            )
        )
    return tuple(rows)


def _nothing(problem: Problem) -> str:
    """Why nothing is known."""
    return (
        NOTHING if problem.overhead.expected is None else f"{problem.overhead.name} was not calibrated on several loads"
    )


def near_goals(problem: Problem, scored: Scored) -> tuple[types.NearGoal, ...]:
    """Goals that a run meets by less than what is to be expected of the figure's mean.

    Goals on shares of requests are left out: how many more would be late cannot be told from an error of the mean.
    """
    found = []
    for goal in problem.goals:
        figure = "energy" if goal.figure.depends_on == {"energy"} else f"{goal.metric}_mean"
        error = None if goal.fraction is not None else _found(problem, scored, figure)
        margin = goal.margin(goal.reached(scored.metrics))
        if error is None or margin < 0:
            continue
        mean = scored.metrics.latency_s.get(goal.metric, {}).get("mean", 0.0)
        more = 1 + _way_s(problem, figure) / mean if mean else 1.0
        reach = more * (1 + error.above) - 1 if goal.at_most else 1 - more * (1 - error.below)
        # What is met by a share of the limit is missed where the figure is off by more than that of itself.
        if (1 - margin) * (1 + reach) > 1 if goal.at_most else (1 + margin) * (1 - reach) < 1:
            found.append(types.NearGoal(goal=goal.text, margin=margin, error=reach, of=error.of))
    return tuple(found)


def doubts(problem: Problem) -> tuple[str, ...]:
    """Why figures of a type of GPU are a guess: its own runs were far off."""
    found = []
    for gpu in dict.fromkeys(offer.cluster.gpu.name for offer in problem.offers):
        off = [(name, *one) for key, name in FIGURES.items() if (one := doubtful(gpu, key)) is not None]
        if off:
            told = ", ".join(f"{name} {middle:.2g} times" for name, _, middle in off)
            rows = max(rows for _, rows, _ in off)
            found.append(f"{count(rows, 'run')} on {gpu} had {told} what is computed: its figures are a guess")
    return tuple(found)


def untold_errors(problem: Problem, scored: Scored) -> tuple[str, ...]:
    """That goals on ITL are met narrowly: no error of it is known that they could be held against."""
    met = ((goal, goal.margin(goal.reached(scored.metrics))) for goal in problem.goals if goal.fraction is None)
    return tuple(
        f"The goal {goal.text} is met by {margin:.1%}, and no error of ITL is known"
        for goal, margin in met
        if goal.metric == "itl" and 0 <= margin < NARROW
    )


def expected_table(console: Console, document: Document) -> None:
    """The figures with their intervals, and what these are known from."""
    if not (figures := document.get("expected")):
        return
    if all(one["low"] is None for one in figures):
        console.print(Text.assemble(("Expected error", "bold"), f": not known, {figures[0]['of']}.\n"))
    else:
        _figures_table(console, figures)
    for near in document.get("near_goals", ()):
        console.print(
            Text(
                f"The goal {near['goal']} is met by {near['margin']:.1%}, less than the expected error of its figure, "
                f"{near['error']:.0%}.\n"
            )
        )
    for doubt in document.get("doubts", ()):
        console.print(Text(f"{doubt}.\n"))


def _figures_table(console: Console, figures: Sequence[Document]) -> None:
    """Each figure with its interval."""
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
