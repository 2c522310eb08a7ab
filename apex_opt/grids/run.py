"""A study run from where it was to its end: points that are the same question are answered once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.grids.points import INFEASIBLE, Outcome, answered, identified
from apex_opt.grids.workers import Lost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from apex_opt.commands import Result
    from apex_opt.gate import Progress
    from apex_opt.grids.store import Store
    from apex_opt.grids.study import Study
    from apex_opt.grids.workers import Workers

    Row = tuple[int, int | None, dict[str, Any], str, Outcome]


def run_study(
    study: Study,
    store: Store,
    workers: Callable[[], Workers],
    command: Callable[..., Result],
    tell: Progress,
    *,
    again: bool = False,
) -> int:
    """Answer all points of a study that its folder does not have yet.

    Parameters
    ----------
    study : Study
    store : Store         its folder
    workers : callable    opens the workers, where there is something to do
    command : callable    the function of `apex_opt.api` that answers
    tell : Progress       told (what, done, total) along the way
    again : bool          whether points that failed are answered anew

    Returns
    -------
    int                   questions that were answered
    """
    points = list(study.points())
    there = {row["point"]: row for row in store.rows()}
    if again:
        there = {point: row for point, row in there.items() if row["exit_code"] in (0, INFEASIBLE)}
    left = [place for place in range(len(points)) if place not in there]
    if not left:
        return 0
    tell("resolving points", 0, len(left))
    with workers() as at_work:
        keys: dict[int, str] = {}
        for done, (index, found) in enumerate(at_work.each(identified, [(study, points[place]) for place in left]), 1):
            place = left[index]
            if isinstance(found, str):
                keys[place] = found
            else:
                outcome = found if isinstance(found, Outcome) else Outcome.failed(str(found))
                store.add([(place, None, points[place], "", outcome)])
            tell("resolving points", done, len(left))
        same: dict[str, list[int]] = {}
        for place in sorted(keys):
            same.setdefault(keys[place], []).append(place)
        _repeat(store, points, same, there)
        questions = list(same.items())
        items = [(command, {**study.fixed, **points[places[0]]}) for _, places in questions]
        tell("answering points", 0, len(items))
        for done, (index, answer) in enumerate(at_work.each(answered, items), 1):
            key, (first, *others) = questions[index]
            outcome = Outcome.failed(str(answer)) if isinstance(answer, Lost) else answer
            told: list[Row] = [(first, None, points[first], key, outcome)]
            told += [(place, first, points[place], key, outcome) for place in others]
            store.add(told)
            tell("answering points", done, len(items))
    store.close_up()
    return len(items)


def _repeat(store: Store, points: list[Any], same: dict[str, list[int]], there: dict[int, Any]) -> None:
    """Points whose question was answered before the last run ended take that answer."""
    known = {row["key"]: row["point"] for row in there.values() if row["key"] in same and row["same_as"] is None}
    if not known:
        return
    rows: dict[int, list[Any]] = {}
    for row in store.rows():
        rows.setdefault(row["point"], []).append(row)
    for key, first in known.items():
        outcome = _outcome(rows[first])
        store.add((place, first, points[place], key, outcome) for place in same.pop(key))


def _outcome(rows: list[Any]) -> Outcome:
    """What became of a point, from its rows."""

    def told(row: Any) -> Iterator[tuple[str, Any]]:
        yield from (("plan", row["plan"]), ("gpus", row["gpus"]))
        yield "figures", {name[8:]: value for name, value in row.items() if name.startswith("figures.")}

    first = rows[0]
    return Outcome(
        **{name: first[name] for name in ("status", "exit_code", "error", "seconds")},
        rows=tuple(dict(told(row)) for row in rows),
    )
