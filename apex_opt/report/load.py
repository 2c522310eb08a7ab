"""What an answer says of its load: whether it lasts, and whether the arrivals are all that limits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from apex_opt.figures.registry import timed
from apex_opt.report import types
from apex_opt.report.layout import count, seconds
from apex_opt.schema import of
from apex_opt.workload.steady import LENGTH

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from apex_opt.schema import Document
    from apex_opt.search import Problem, Scored
    from apex_opt.simulator.transient import Transient

T = TypeVar("T", bound=types.Transient)


def loaded(problem: Problem, best: Scored | None) -> dict[str, Any]:
    """What the best run shows of the load: `steady`, `transient`, `limited_by_arrivals`.

    Parameters
    ----------
    problem
    best : Scored or None    the run that is told of; None where there is none
    """
    if best is None:
        return {"steady": None, "transient": None, "limited_by_arrivals": None}
    transient = best.transient
    limited = problem.objective.figure.by_arrivals and _keeps_up(transient)
    said = (*_said(problem, transient), *([_limited(problem)] if limited else []))
    return {
        "steady": None if transient.closed else is_steady(best),
        "transient": transient_document(types.Load, transient, said=said),
        "limited_by_arrivals": limited,
    }


def said_of(answers: Iterable[tuple[str, Document]]) -> dict[str, tuple[str, ...]]:
    """What several answers, each with its name, say of their load."""
    said = (f"{name}: {text}" for name, one in answers for text in (one.get("transient") or {}).get("said", ()))
    return {"said": tuple(said)}


def is_steady(run: Scored) -> bool:
    """Whether a run shows a load that lasts: long beside its requests, with no backlog that grows."""
    transient = run.transient
    if transient.closed:
        return False
    return transient.lasts(run.metrics.value(timed("whole").name, "mean")) and not transient.measured


def transient_document(kind: type[T], transient: Transient, **more: Any) -> T:
    """How a run begins and ends; the backlog is that of the requests after the first fifth, by halves.

    Parameters
    ----------
    kind : type of the document
    transient
    more : what a document of this type holds besides
    """
    return of(
        kind,
        transient,
        waiting_at_last_arrival=transient.waiting,
        unfinished_at_last_arrival=transient.unfinished,
        backlog_first_half=transient.before,
        backlog_second_half=transient.after,
        backlog_growing=transient.growing,
        **more,
    )


def _keeps_up(transient: Transient) -> bool:
    """Whether requests are answered as they come."""
    return not transient.closed and not transient.growing and transient.drain_s < transient.arrivals_s


def _said(problem: Problem, transient: Transient) -> Iterator[str]:
    """One sentence where the figures are those of a transient."""
    if not transient.measured:
        return
    total = len(problem.trace)
    if not transient.closed and transient.arrivals_s == 0:
        yield f"a transient is measured: {count(total, 'request')} at once, answered in {seconds(transient.drain_s)}"
        return
    grows = ", more than earlier on" if transient.growing else ""
    yield (
        f"a transient is measured: requests come for {seconds(transient.arrivals_s)}, the last token "
        f"{seconds(transient.drain_s)} later; at the last arrival {transient.unfinished:,} of {total:,} are unfinished"
        f"{grows}, {transient.waiting:,} without a token{_lasting(transient, total)}"
    )


def _lasting(transient: Transient, total: int) -> str:
    """Whether such a rate lasts, or who says so; a trace at --rate has LENGTH requests at least."""
    if transient.closed:
        return ""
    if total < LENGTH:
        return "; whether such a rate lasts is for --rate to say"
    if transient.growing:
        return "; the queue grows, such a rate does not last"
    return "; too short to say that such a rate lasts: solve.py capacity finds one that does, in runs long enough"


def _limited(problem: Problem) -> str:
    rate = problem.trace.rate_per_s
    assert rate is not None, "requests come one after the other"
    return (
        f"{problem.objective.name} is limited by the arrivals: a plan that keeps up has what comes, {rate:.2f} "
        "requests/s; the highest rate a plan sustains is for solve.py capacity to say"
    )
