"""Fits what kernels do not explain, the engine's own time and the power of the board, on measured runs.

The result is text for the file of the engine and for the card of the accelerator; nothing is changed by a fit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

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

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.cost.engine import EngineOverhead
    from apex_opt.measured.compare import Comparison
    from apex_opt.measured.runs import Run

    Progress = Callable[[str, int, int], None]

FITTED_ON: Final = ("ttft_mean", "tpot_mean", "itl_mean", "e2e_mean")

_FACTORS: Final = (0.5, 0.8, 1.25, 2.0)
_SWEEPS: Final = 2
_WORST: Final = float(np.log(2.0))
"""Errors beyond a factor of two say that the run is not what it is taken for: they count no more."""
_LEAST_GAIN: Final = 0.002  # of the loss, so that a parameter that does not matter stays where it was


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFit:
    """An engine's times before and after, with the errors on the runs they were fitted on."""

    before: EngineOverhead
    after: EngineOverhead
    runs: int
    errors_before: Mapping[str, Summary]
    errors_after: Mapping[str, Summary]


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardFit:
    """Power coefficients of one accelerator with the errors, in percent, on the energies they were fitted on."""

    gpu: str
    fit: PowerFit
    errors_pct: tuple[float, ...]


def fit_engine(runs: Sequence[Run], name: str, progress: Progress) -> EngineFit:
    """Times of an engine kind that fit its runs best.

    Runs with drafts are left out. Each parameter in turn is tried at multiples of its value, all runs being simulated
    anew, and moved where the mean absolute logarithm of predicted over measured (TTFT, TPOT, ITL, E2E, every figure of
    every run alike) falls.

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
    mine = [run for run in runs if isinstance(run, MeasuredRun) and run.engine == name and not run.drafts]
    before = now = load_engine(name)
    found = _compared(mine, now, progress)
    predicted = sum(comparison.prediction is not None for comparison in found)
    if not predicted:
        raise UsageError(f"no run of engine {name} could be predicted: nothing to fit on")
    first = summarise(found)
    least = _loss(found)
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
    return EngineFit(
        before=before,
        after=now,
        runs=predicted,
        errors_before=first,
        errors_after=summarise(_compared(mine, now, progress)),
    )


def fit_board(
    runs: Sequence[Run], progress: Progress, overheads: Mapping[str, EngineOverhead] | None = None
) -> tuple[BoardFit, ...]:
    """Power coefficients per accelerator, from the energies of its runs and the work predicted for them.

    Of arithmetic that no run of an accelerator has, its coefficient stays what it was. `overheads` stand in for engines
    of the shipped table.

    Parameters
    ----------
    runs : sequence of Run         measured
    progress : Progress            told (what, done, total) along the way
    overheads : mapping or None    of engines by name
    """
    told = [run for run in runs if isinstance(run, MeasuredRun) and "energy" in run.measured.keys() - run.set_aside]
    samples: dict[Gpu, list[tuple[tuple[float, float, float, float], float]]] = {}
    for run, comparison in zip(told, Predictor(overheads).compare(told, progress), strict=True):
        if (prediction := comparison.prediction) is not None:
            share = run.measured["energy"] / prediction.plan.devices
            samples.setdefault(load_cluster(run.cluster).gpu, []).append((prediction.sample, share))
    return tuple(_board(gpu, *map(np.array, zip(*rows, strict=True))) for gpu, rows in samples.items())


def _board(gpu: Gpu, work: NDArray[np.float64], joules: NDArray[np.float64]) -> BoardFit:
    """The fit of one accelerator: samples as `Prediction` has them, and the energy of each."""
    fit, errors = fit_power(work[:, 0], work[:, 1:], joules, gpu.idle_w, gpu.tdp_w)
    before = load_profile(gpu).power.joule_per_flop
    source = f"fitted on the energies of {len(joules)} measured serving runs of this accelerator"
    if not work[:, 1].any():
        fit = replace(fit, joule_per_flop_half=before[gpu.half_dtype])
        source += "; 16-bit arithmetic as it was: no run has any"
    if not work[:, 2].any():
        fit = replace(fit, joule_per_flop_narrow=before.get("fp8", 0.0))
        source += "; narrow arithmetic as it was: no run has any"
    return BoardFit(gpu=gpu.name, fit=replace(fit, source=source), errors_pct=tuple((100 * errors).tolist()))


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
