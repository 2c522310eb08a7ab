"""Fits what kernels do not explain, the engine's own time and the power of the board, on measured runs.

The result is text for the file of the engine and for the card of the accelerator; nothing is changed by a fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np

from apex_opt.cluster import load_cluster
from apex_opt.cost.engine import TIMES, load_engine
from apex_opt.errors import UsageError
from apex_opt.measured.compare import Predictor, Summary, summarise
from apex_opt.measured.runs import MeasuredRun
from apex_opt.profiles import load_profile
from apex_opt.profiles.power import PowerFit, fit_power

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.measured.compare import Comparison
    from apex_opt.measured.runs import Run

    Progress = Callable[[str, int, int], None]

T = TypeVar("T")

FITTED_ON: Final = ("ttft_mean", "tpot_mean", "itl_mean", "e2e_mean")

_FACTORS: Final = (0.5, 0.8, 1.25, 2.0)
_SWEEPS: Final = 2
_WORST: Final = float(np.log(2.0))
"""Errors beyond a factor of two say that the run is not what it is taken for: they count no more."""
_LEAST_GAIN: Final = 0.002  # of the loss, so that a parameter that does not matter stays where it was


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFit:
    """An engine's times before and after, and the errors on the runs left to judge by.

    Parameters
    ----------
    before, after : EngineOverhead
    runs : int                               fitted on
    judged : int                             not fitted on; where there are none, errors are of those fitted on
    errors_before, errors_after : mapping    by figure
    """

    before: EngineOverhead
    after: EngineOverhead
    runs: int
    judged: int
    errors_before: Mapping[str, Summary]
    errors_after: Mapping[str, Summary]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFit:
    """Power coefficients of one accelerator with the errors, in percent, on the energies that they are judged by.

    Parameters
    ----------
    gpu : str
    fit : PowerFit
    runs : int                     fitted on
    judged : int                   not fitted on; where there are none, errors are of those fitted on
    errors_pct : tuple of float
    """

    gpu: str
    fit: PowerFit
    runs: int
    judged: int
    errors_pct: tuple[float, ...]


def fit_engine(runs: Sequence[Run], name: str, progress: Progress) -> EngineFit:
    """Times of an engine kind that fit its runs best.

    Runs with drafts are left out, and those that are judged by (`judged_by`) unless all are. Each parameter in turn
    is tried at multiples of its value, all runs being simulated anew, and moved where the mean absolute logarithm of
    predicted over measured (TTFT, TPOT, ITL, E2E, every figure of every run alike) falls.

    Parameters
    ----------
    runs : sequence of Run    measured
    name : str                of the engine
    progress : Progress       told (what, done, total) along the way

    Raises
    ------
    UsageError          no run of this engine could be predicted
    UnknownNameError    an engine that the shipped table lacks
    """
    told = [run for run in runs if isinstance(run, MeasuredRun) and run.engine == name and not run.drafts]
    before = now = load_engine(name)
    everything = [comparison for comparison in _compared(told, now, progress) if comparison.prediction is not None]
    if not everything:
        raise UsageError(f"no run of engine {name} could be predicted: nothing to fit on")
    found, judging = _halves(everything, lambda comparison: _judged(comparison.run))
    mine, least = [comparison.run for comparison in found], _loss(found)
    for _ in range(_SWEEPS):
        start = least
        for parameter in TIMES:
            value = getattr(now, parameter)
            for factor in _FACTORS if value > 0 else ():
                changed: dict[str, Any] = {parameter: float(f"{value * factor:.3g}")}
                trial = replace(now, **changed)
                loss = _loss(_compared(mine, trial, partial(_trying, progress, parameter)))
                if loss < least - _LEAST_GAIN:
                    least, now = loss, trial
        if least > start - _LEAST_GAIN:
            break
    shown = judging or found
    return EngineFit(
        before=before,
        after=now,
        runs=len(found),
        judged=len(judging),
        errors_before=summarise(shown),
        errors_after=summarise(_compared([comparison.run for comparison in shown], now, progress)),
    )


def _judged(run: Run) -> bool:
    return isinstance(run, MeasuredRun) and run.judged


def _halves(all_of_them: Sequence[T], judged: Callable[[T], bool]) -> tuple[list[T], list[T]]:
    """Those to fit on and those to judge by; where all are to judge by, they are fitted on."""
    fitted, judging = [one for one in all_of_them if not judged(one)], [one for one in all_of_them if judged(one)]
    return (fitted, judging) if fitted else (judging, [])


def fit_board(
    runs: Sequence[Run], progress: Progress, overheads: Mapping[str, EngineOverhead] | None = None
) -> tuple[BoardFit, ...]:
    """Power coefficients per accelerator, from the energies of its runs and the work predicted for them.

    Runs that are judged by (`judged_by`) are left out unless all are. Of arithmetic that no run of an accelerator
    has, its coefficient stays what it was. `overheads` stand in for engines of the shipped table.

    Parameters
    ----------
    runs : sequence of Run         measured
    progress : Progress            told (what, done, total) along the way
    overheads : mapping or None    of engines by name
    """
    told = [run for run in runs if isinstance(run, MeasuredRun) and "energy" in run.measured.keys() - run.set_aside]
    samples: dict[Gpu, list[_Sample]] = {}
    for run, comparison in zip(told, Predictor(overheads).compare(told, progress), strict=True):
        if (prediction := comparison.prediction) is not None:
            share = run.measured["energy"] / prediction.plan.devices
            samples.setdefault(load_cluster(run.cluster).gpu, []).append(_Sample(prediction.sample, share, run.judged))
    return tuple(_board(gpu, rows) for gpu, rows in samples.items())


class _Sample(NamedTuple):
    """Work of a run as `Prediction` has it, and its energy."""

    work: tuple[float, float, float, float]
    joules: float
    judged: bool


def _board(gpu: Gpu, samples: Sequence[_Sample]) -> BoardFit:
    """The fit of one accelerator."""
    fitted, judging = _halves(samples, lambda sample: sample.judged)
    work, joules = np.array([one.work for one in fitted]), np.array([one.joules for one in fitted])
    fit, errors = fit_power(work[:, 0], work[:, 1:], joules, gpu.idle_w, gpu.tdp_w)
    if judging:
        other, wanted = np.array([one.work for one in judging]), np.array([one.joules for one in judging])
        errors = fit.joules(other[:, 0], other[:, 1:], gpu.idle_w, gpu.tdp_w) / wanted - 1
    power = load_profile(gpu).power
    before = power.joule_per_flop
    fit = replace(fit, spin_w=power.spin_w)
    source = f"fitted on the energies of {len(joules)} measured serving runs of this accelerator"
    if not work[:, 1].any():
        fit = replace(fit, joule_per_flop_half=before[gpu.half_dtype])
        source += "; 16-bit arithmetic as it was: no run has any"
    if not work[:, 2].any():
        fit = replace(fit, joule_per_flop_narrow=before.get("fp8", 0.0))
        source += "; narrow arithmetic as it was: no run has any"
    return BoardFit(
        gpu=gpu.name,
        fit=replace(fit, source=source),
        runs=len(fitted),
        judged=len(judging),
        errors_pct=tuple((100 * errors).tolist()),
    )


def _trying(progress: Progress, parameter: str, _: str, done: int, total: int) -> None:
    progress(f"fitting {parameter}", done, total)


def _compared(runs: Sequence[Run], overhead: EngineOverhead, progress: Progress) -> tuple[Comparison, ...]:
    return Predictor({overhead.name: overhead}).compare(runs, progress)


def _loss(comparisons: Sequence[Comparison]) -> float:
    """Mean absolute logarithm of predicted over measured, at most a factor of two each."""
    logs = [
        min(abs(float(np.log1p(error / 100))), _WORST)
        for comparison in comparisons
        for metric, error in comparison.errors_pct(all_of_them=False).items()
        if metric in FITTED_ON
    ]
    return float(np.mean(logs)) if logs else 0.0
