"""Times of an engine fitted on a user's own runs: those that the runs can tell, with how well they tell them.

Figures are compared by the logarithm of predicted over measured. How each responds to each time is taken from
simulating all runs again; a time that moves no figure, or that moves them as others do, stays as it was. What is gained
is judged on loads that were left out one at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cost.engine import TIMES, load_engine
from apex_opt.engines.kinds import load_kind
from apex_opt.errors import UsageError
from apex_opt.measured.compare import Comparison, Predictor, Summary, summarise
from apex_opt.measured.expected import FIGURES, of_few
from apex_opt.measured.fit import FITTED_ON
from apex_opt.measured.runs import MeasuredRun

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.measured.runs import Run

    Progress = Callable[[str, int, int], None]
    Floats = NDArray[np.float64]
    Rows = list[tuple[int, str]]

SEEN: Final = 0.01
"""Share by which a time, doubled, has to move some figure: less is not told from what runs differ by anyway."""

APART: Final = 0.25
"""Share of what a time moves that no other time moves alike, below which the two cannot be told apart."""

_ROUNDS: Final = 3
_SPREAD: Final = 0.01
"""Figures of a run repeated differ by as much at least; no fit is taken to be better known than that."""
_NORMAL_95: Final = 1.96
_HUBER: Final = 0.05
_MOST: Final = 8.0
"""Times what is usual that a time may become."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """What became of one time of the engine.

    Parameters
    ----------
    name : str                      field of `EngineOverhead`
    before_s, after_s : float
    low_s, high_s : float or None   what it is between with a confidence of 95%; None where it was not fitted, or ended
                                    at its limit
    kept : str                      why it was not fitted, or nothing
    at_limit : bool                 whether the fit ended at the least or the most that it may be, beyond which these
                                    runs may ask for more, so that no interval is known
    """

    name: str
    before_s: float
    after_s: float
    low_s: float | None = None
    high_s: float | None = None
    kept: str = ""
    at_limit: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """An engine's times before and after, with the errors of both.

    Parameters
    ----------
    before, after : EngineOverhead
    times : tuple of Time
    runs : int                    that were fitted on
    fitted : pair of mapping      errors on these, before and after
    crossed : pair of mapping     errors on each load with times fitted on the others; None with a single load
    held : pair of mapping        errors on runs that were held out altogether; None without
    expected : mapping            by figure the runs, and measured over predicted, low, middle and high, on loads left
                                  out; empty with a single load
    better : bool                 whether the figures left out came nearer, so that the times were changed
    """

    before: EngineOverhead
    after: EngineOverhead
    times: tuple[Time, ...]
    runs: int
    fitted: tuple[Mapping[str, Summary], Mapping[str, Summary]]
    crossed: tuple[Mapping[str, Summary], Mapping[str, Summary]] | None
    held: tuple[Mapping[str, Summary], Mapping[str, Summary]] | None
    expected: Mapping[str, tuple[int, float, float, float]]
    better: bool


def divided(
    runs: Sequence[Run], engine: str, hold: str | None
) -> tuple[tuple[MeasuredRun, ...], tuple[MeasuredRun, ...]]:
    """Runs of an engine to fit on, and those only to be judged by.

    Parameters
    ----------
    runs : sequence of Run    measured
    engine : str              a kind, or the path of an engine file
    hold : str or None        names with commas between them, each standing for the runs that end in it

    Raises
    ------
    UsageError    a name that is none's, or no run to fit on
    """
    rules = load_kind(engine).rules
    mine = [run for run in runs if isinstance(run, MeasuredRun) and load_kind(run.engine).rules is rules]
    named = [name.strip() for name in hold.split(",")] if hold is not None else []
    for name in named:
        if not any(_is_called(run, name) for run in mine):
            known = ", ".join(run.name for run in mine[:8])
            raise UsageError(f"--hold: {name[:60]!r} is no run of {engine}; there are {known or 'none'}")
    held = tuple(run for run in mine if any(_is_called(run, name) for name in named))
    fitted = tuple(run for run in mine if run not in held)
    if not fitted:
        raise UsageError(f"calibrate: no run of {engine} to fit on; name others as --measured, or hold fewer")
    return fitted, held


def _is_called(run: MeasuredRun, name: str) -> bool:
    return run.name == name or run.name.endswith(f"/{name}")


def calibrate(
    runs: Sequence[MeasuredRun], engine: str, progress: Progress, held: Sequence[MeasuredRun] = ()
) -> Calibration:
    """Fit the times of an engine that some runs can tell.

    Parameters
    ----------
    runs : sequence of MeasuredRun     of this engine, one for each load
    engine : str                       a kind, or the path of an engine file
    progress : callable                told (what, done, total) along the way
    held : sequence of MeasuredRun     not fitted on, only judged by

    Raises
    ------
    UsageError    no run could be predicted, or none that tells any time
    """
    before = load_engine(engine)
    fit = _Fit(runs, before, progress)
    chosen, kept = fit.chosen()
    if not chosen:
        raise UsageError(
            f"calibrate: these runs tell none of the times of {before.name}: no figure moves by {SEEN:.0%} where one "
            "is doubled; measure with few clients and short prompts, where the engine's own time counts most"
        )
    while True:
        values, spread = fit.fitted(chosen)
        vague = [name for name in chosen if _NORMAL_95 * spread[name] > max(values[name], fit.scale[name])]
        if not vague or len(chosen) == 1:
            break
        worst = max(vague, key=lambda name: spread[name] / fit.scale[name])
        kept[worst] = "the runs leave it open; it is known no better than by its own size"
        chosen = [name for name in chosen if name != worst]
    after = _with(before, values)
    crossed = fit.crossed(chosen, values)
    better = crossed is None or fit.loss(crossed[1]) < fit.loss(crossed[0])
    if not better:
        kept |= dict.fromkeys(chosen, "fitted on the other loads it brings those left out no nearer")
        after = before
    times = []
    for name in TIMES:
        old = getattr(before, name)
        if name in kept:
            times.append(Time(name=name, before_s=old, after_s=old, kept=kept[name]))
        elif fit.at_limit(name, values[name]):
            times.append(Time(name=name, before_s=old, after_s=values[name], at_limit=True))
        else:
            reach = _NORMAL_95 * spread[name]
            low, high = max(values[name] - reach, 0.0), values[name] + reach
            times.append(Time(name=name, before_s=old, after_s=values[name], low_s=low, high_s=high))
    told = (summarise(fit.compared(before, held)), summarise(fit.compared(after, held))) if held else None
    return Calibration(
        before=before,
        after=after,
        times=tuple(times),
        runs=len(fit.runs),
        fitted=(summarise(fit.compared(before)), summarise(fit.compared(after))),
        crossed=None if crossed is None else (summarise(crossed[0]), summarise(crossed[1])),
        held=told,
        expected={} if crossed is None else _expected(crossed[better]),
        better=better,
    )


def _expected(comparisons: Sequence[Comparison]) -> dict[str, tuple[int, float, float, float]]:
    """What is to be expected of figures of further loads, by those that were left out, where there are two or more."""
    ratios: dict[str, list[float]] = {}
    for one in comparisons:
        for figure, error in one.errors_pct(all_of_them=False).items():
            if figure in FIGURES:
                ratios.setdefault(figure, []).append(1 / (1 + error / 100))
    return {figure: (len(some), *of_few(some)) for figure, some in ratios.items() if len(some) > 1}


def _with(overhead: EngineOverhead, times: Mapping[str, float]) -> EngineOverhead:
    """An engine with some other times."""
    changed: dict[str, Any] = dict(times)
    return replace(overhead, **changed)


class _Fit:
    """How the figures of some runs respond to the times of an engine."""

    def __init__(self, runs: Sequence[MeasuredRun], before: EngineOverhead, progress: Progress) -> None:
        self._before, self._tell = before, progress
        usual = load_engine("vllm")
        self.scale = {name: max(getattr(before, name), getattr(usual, name), 1e-7) for name in TIMES}
        self._known: dict[EngineOverhead, tuple[Comparison, ...]] = {}
        self.runs = tuple(runs)
        found = self.compared(before)
        self.runs = tuple(run for run, one in zip(runs, found, strict=True) if one.prediction is not None)
        if not self.runs:
            why = next((f": {one.reason}, {one.detail}" for one in found if one.reason), "")
            raise UsageError(f"calibrate: no run of engine {before.name} could be predicted{why}")
        self._known.clear()
        self._rows: Rows = [
            (place, metric)
            for place, one in enumerate(self.compared(before))
            for metric in one.errors_pct(all_of_them=False)
            if metric in FITTED_ON
        ]
        if not self._rows:
            raise UsageError(f"calibrate: no run has any of {', '.join(FITTED_ON)} to be compared by")

    def compared(self, overhead: EngineOverhead, runs: Sequence[MeasuredRun] | None = None) -> tuple[Comparison, ...]:
        """Runs beside what is predicted with some times."""
        if runs is not None:
            return Predictor({overhead.name: overhead}).compare(self._named(runs, overhead), _silent)
        if overhead not in self._known:
            self._tell("simulating measured runs", len(self._known), 0)
            self._known[overhead] = Predictor({overhead.name: overhead}).compare(
                self._named(self.runs, overhead), _silent
            )
        return self._known[overhead]

    @staticmethod
    def _named(runs: Sequence[MeasuredRun], overhead: EngineOverhead) -> list[MeasuredRun]:
        """Runs as those of the engine that is fitted, whichever file it is from."""
        return [replace(run, engine=overhead.name) for run in runs]

    def _logs(self, overhead: EngineOverhead) -> Floats:
        """Logarithm of predicted over measured, row by row."""
        errors = [one.errors_pct(all_of_them=False) for one in self.compared(overhead)]
        return np.array([np.log1p(errors[place][metric] / 100) for place, metric in self._rows])

    def _columns(self, at: EngineOverhead, names: Sequence[str]) -> Floats:
        """What each row moves by where a time grows by as much as is usual of it."""
        here = self._logs(at)
        step = 0.5
        moved = [
            (self._logs(_with(at, {name: getattr(at, name) + step * self.scale[name]})) - here) / step for name in names
        ]
        return np.array(moved).T.reshape(len(here), len(names))

    def chosen(self) -> tuple[list[str], dict[str, str]]:
        """Times that the runs tell apart, the one that moves most first, and why the others stay."""
        columns = dict(zip(TIMES, self._columns(self._before, TIMES).T, strict=True))
        order = sorted(TIMES, key=lambda name: -float(np.linalg.norm(columns[name])))
        chosen: list[str] = []
        kept: dict[str, str] = {}
        for name in order:
            column = columns[name]
            if float(np.abs(column).max()) < SEEN:
                kept[name] = f"no figure of these runs moves by {SEEN:.0%} where it grows by its own size"
                continue
            rest, size = column, float(np.linalg.norm(column))
            if chosen:
                basis = np.array([columns[other] for other in chosen]).T
                rest = column - basis @ np.linalg.lstsq(basis, column, rcond=None)[0]
            if len(chosen) + 1 >= len(self._rows) or float(np.linalg.norm(rest)) < APART * size:
                kept[name] = f"these runs cannot tell it from {self._alike(name, chosen, columns)}"
                continue
            chosen.append(name)
        return chosen, kept

    @staticmethod
    def _alike(name: str, chosen: Sequence[str], columns: Mapping[str, Floats]) -> str:
        """The chosen times that together move figures as one does, those that matter for that."""
        basis = np.array([columns[other] for other in chosen]).T
        shares = np.linalg.lstsq(basis, columns[name], rcond=None)[0]
        sizes = np.abs(shares) * np.linalg.norm(basis, axis=0)
        found = [other for other, size in zip(chosen, sizes, strict=True) if size >= 0.3 * sizes.max()]
        return " and ".join(f"{other.removesuffix('_s')}_us" for other in found)

    def fitted(self, names: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Times that fit best, and the standard error of each, in seconds."""
        at = self._before
        for _ in range(_ROUNDS):
            here, columns = self._logs(at), self._columns(at, names)
            move = self._solved(here, columns, np.ones(len(here), bool))
            trial = self._moved(at, names, move)
            for _ in range(2):  # half of the way, where all of it is too far
                if _huber(self._logs(trial)) <= _huber(here):
                    break
                move = move / 2
                trial = self._moved(at, names, move)
            if _huber(self._logs(trial)) >= _huber(here):
                break
            at = trial
        here, columns = self._logs(at), self._columns(at, names)
        self._last = here, columns
        freedom = max(len(here) - len(names), 1)
        variance = max(float((here**2).sum()) / freedom, _SPREAD**2)
        spread = np.sqrt(variance * np.abs(np.diag(np.linalg.pinv(columns.T @ columns))))
        return (
            {name: float(f"{getattr(at, name):.4g}") for name in names},
            {name: float(one) * self.scale[name] for name, one in zip(names, spread, strict=True)},
        )

    def at_limit(self, name: str, value: float) -> bool:
        """Whether a time is the least or the most that it may be, as its digits tell."""
        return value in (0.0, float(f"{_MOST * self.scale[name]:.4g}"))

    def _moved(self, at: EngineOverhead, names: Sequence[str], move: Floats) -> EngineOverhead:
        """Times moved by so many of what is usual, within what they may be."""
        found: dict[str, float] = {}
        for name, by in zip(names, move, strict=True):
            value = getattr(at, name) + float(by) * self.scale[name]
            found[name] = min(max(value, 0.0), _MOST * self.scale[name])
        return _with(at, found)

    @staticmethod
    def _solved(logs: Floats, columns: Floats, of: NDArray[np.bool_]) -> Floats:
        """The move that brings some rows nearest to what was measured, far ones counting less."""
        weights = np.minimum(1.0, _HUBER / np.maximum(np.abs(logs[of]), 1e-12)) ** 0.5
        found = np.linalg.lstsq(columns[of] * weights[:, None], -logs[of] * weights, rcond=None)[0]
        return np.asarray(found, np.float64)

    def crossed(
        self, names: Sequence[str], values: Mapping[str, float]
    ) -> tuple[tuple[Comparison, ...], tuple[Comparison, ...]] | None:
        """Each load with the times before, and with those fitted on the other loads; None with a single load.

        The others' times are found from those of all by how figures respond there.
        """
        loads = [_load_of(run) for run in self.runs]
        each = list(dict.fromkeys(loads))
        if len(each) < 2:
            return None
        logs, columns = self._last
        owner = np.array([each.index(loads[place]) for place, _ in self._rows])
        at, found = _with(self._before, values), dict[int, Comparison]()
        for number, load in enumerate(each):
            self._tell("judging loads left out", number, len(each))
            others = owner != number
            if others.sum() <= len(names):
                return None
            trial = self._moved(at, names, self._solved(logs, columns, others))
            left = [place for place, its in enumerate(loads) if its == load]
            found.update(zip(left, self.compared(trial, [self.runs[place] for place in left]), strict=True))
        return self.compared(self._before), tuple(found[place] for place in range(len(self.runs)))

    @staticmethod
    def loss(comparisons: Sequence[Comparison]) -> float:
        """How far figures are from those measured, far ones counting less."""
        logs = [
            float(np.log1p(error / 100))
            for one in comparisons
            for metric, error in one.errors_pct(all_of_them=False).items()
            if metric in FITTED_ON
        ]
        return _huber(np.array(logs))


def _load_of(run: MeasuredRun) -> tuple[object, ...]:
    """What a run has in common with one that repeats it: requests, clients or rate, and mean lengths, to two digits."""
    trace = run.trace
    means = (float(trace.prompt.mean()), float(trace.output.mean()), float(trace.arrival_ns.max()))
    told = tuple(f"{mean:.1e}" for mean in means)
    return run.model, run.plan, str(run.settings), trace.concurrency, len(trace.prompt), told


def _huber(logs: Floats) -> float:
    """Mean of squares that become straight lines."""
    size = np.abs(logs)
    return float(np.where(size < _HUBER, size**2, 2 * _HUBER * size - _HUBER**2).mean())


def _silent(what: str, done: int, total: int) -> None:
    """Tell nobody, as each of many simulations of all runs would.

    Parameters
    ----------
    what : str     what is being done
    done : int     steps done
    total : int    steps there are
    """
