"""Energy of an operation from its time, arithmetic and traffic, fitted on measured energies."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    from apex_opt.cluster.types import Gpu


SHORT_DRAW: Final = 1.13
"""Most that kernels drew in the mean against the board's limit: 788 of 700 W at the 95th percentile of the products of
h200-sxm/ops."""

_ROUNDS: Final = 60
_ALIKE: Final = 1e-3
"""Errors below it weigh alike."""
_LEAST_RATIO: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerModel:
    """Energy = (idle_w + active_w) time + joule_per_flop FLOP + joule_per_byte bytes.

    `idle_w` is drawn at all times, `active_w` on top of it while a kernel runs, `spin_w` while one waits for other
    accelerators. The board holds `limit_w` over milliseconds; a single kernel may draw more for its microseconds, up to
    `SHORT_DRAW` times the limit.
    """

    idle_w: float
    active_w: float
    spin_w: float
    joule_per_flop: Mapping[str, float]
    joule_per_byte: float
    limit_w: float
    provenance: str

    def energy_j(self, time_s: ArrayLike, flops: ArrayLike, moved_bytes: ArrayLike, dtype: str) -> NDArray[np.float64]:
        """Energy of an operation.

        Parameters
        ----------
        time_s, flops, moved_bytes : float64[...]       time, arithmetic and device-memory traffic, of one shape
        dtype : str                                     format of the arithmetic

        Returns
        -------
        float64[...]                                    joules, idle draw included

        Raises
        ------
        UsageError      a format the accelerator does not compute in
        """
        if dtype not in self.joule_per_flop:
            raise UsageError(f"no energy per FLOP in {dtype}: the model has {', '.join(self.joule_per_flop)}")
        time = np.asarray(time_s, dtype=np.float64)
        work = self.joule_per_flop[dtype] * np.asarray(flops, dtype=np.float64)
        work = work + self.joule_per_byte * np.asarray(moved_bytes, dtype=np.float64)
        return np.asarray(np.minimum((self.idle_w + self.active_w) * time + work, SHORT_DRAW * self.limit_w * time))


@dataclass(frozen=True, slots=True, kw_only=True)
class PowerFit:
    """Coefficients fitted on one accelerator, and where they come from; `narrow` is fp8, fp4 and int8 arithmetic.

    `spin_w` is for runs that cannot tell what a kernel draws beside its work, as work fills their time; None where it
    is `active_w`.
    """

    active_w: float
    joule_per_flop_half: float
    joule_per_flop_narrow: float
    joule_per_byte: float
    source: str = ""
    spin_w: float | None = None

    def joules(
        self, time_s: NDArray[np.float64], work: NDArray[np.float64], idle_w: float, limit_w: float
    ) -> NDArray[np.float64]:
        """Energy of each sample, at most what the limit lets through.

        Parameters
        ----------
        time_s : float64[n]
        work : float64[n, 3]       16-bit FLOP, narrow FLOP, bytes
        idle_w, limit_w : float    draw at rest; board limit

        Returns
        -------
        float64[n]
        """
        per_unit = np.array([self.joule_per_flop_half, self.joule_per_flop_narrow, self.joule_per_byte])
        return np.asarray(np.minimum(work @ per_unit + (idle_w + self.active_w) * time_s, limit_w * time_s))


def fit_power(
    time_s: NDArray[np.float64],
    work: NDArray[np.float64],
    energy_j: NDArray[np.float64],
    idle_w: float,
    limit_w: float,
) -> tuple[PowerFit, NDArray[np.float64]]:
    """Non-negative coefficients of time, 16-bit FLOP, narrow FLOP and bytes that explain the energies.

    Parameters
    ----------
    time_s, energy_j : float64[n]       per sample, one call of an operation or one run of an engine
    work : float64[n, 3]                16-bit FLOP, narrow FLOP, bytes
    idle_w, limit_w : float             known draw at rest; board limit

    Returns
    -------
    fit, errors : PowerFit, float64[n]      coefficients; relative error of every sample

    Notes
    -----
    Least absolute logarithms of predicted over measured, by least squares weighted anew: kernels of the same work
    differ by a factor of two in draw, and least squares of relative errors would come out too low. A sample at the
    limit only says that the free draw is at least the limit, as the board then slows its clock; such samples count as
    far as the model falls short of them. Measured means above the limit (short kernels between two readings of the
    counter) are taken as the limit.
    """
    energy = np.minimum(energy_j, limit_w * time_s)
    at_limit = energy >= 0.97 * limit_w * time_s
    columns = np.column_stack([time_s, work]) / energy[:, None]
    target = (energy - idle_w * time_s) / energy
    used, weight = np.ones(len(energy), dtype=bool), np.ones(len(energy))
    coefficients = np.zeros(4)
    for _ in range(_ROUNDS):
        coefficients = _non_negative(columns[used] * weight[used, None], target[used] * weight[used])
        ratio = np.maximum(columns @ coefficients + idle_w * time_s / energy, _LEAST_RATIO)
        # So weighted, squares have the slope of absolute logarithms.
        weight = 1 / np.sqrt(ratio * np.maximum(np.abs(ratio - 1), _ALIKE))
        used = ~at_limit | (ratio < 1)
        if not used.any():
            break
    fit = PowerFit(
        active_w=float(coefficients[0]),
        joule_per_flop_half=float(coefficients[1]),
        joule_per_flop_narrow=float(coefficients[2]),
        joule_per_byte=float(coefficients[3]),
    )
    return fit, fit.joules(time_s, work, idle_w, limit_w) / energy - 1


def _non_negative(columns: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares with no coefficient below zero: the best of all subsets of the few columns."""
    best, best_error = np.zeros(columns.shape[1]), float(target @ target)
    scale = np.maximum(np.abs(columns).max(axis=0), 1e-300)
    for count in range(1, columns.shape[1] + 1):
        for subset in combinations(range(columns.shape[1]), count):
            chosen = list(subset)
            solution = np.linalg.lstsq(columns[:, chosen] / scale[chosen], target, rcond=None)[0] / scale[chosen]
            error = float(((columns[:, chosen] @ solution - target) ** 2).sum())
            if (solution >= 0).all() and error < best_error:
                best, best_error = np.zeros(columns.shape[1]), error
                best[chosen] = solution
    return best


def scale_power(
    fit: PowerFit, fitted_on: tuple[float, float, Mapping[str, float]], gpu: Gpu, provenance: str
) -> PowerModel:
    """The fit as a model of an accelerator.

    Parameters
    ----------
    fitted_on : (tdp_w, memory_bytes_per_s, flops_per_s by format)      the accelerator of the fit

    Notes
    -----
    Derived: the same share of peak throughput draws the same share of the power limit.
    """
    tdp_w, memory_bytes_per_s, flops_per_s = fitted_on
    limit = gpu.tdp_w / tdp_w
    half = flops_per_s["bf16"] if "bf16" in flops_per_s else flops_per_s["fp16"]
    per_flop: dict[str, float] = {}
    for dtype, peak in gpu.flops_per_s:
        joule, reference = fit.joule_per_flop_half, half
        if dtype in ("fp8", "fp4", "int8") and fit.joule_per_flop_narrow > 0:
            # Without narrow samples, the share of the limit that 16-bit work draws stands in.
            joule, reference = fit.joule_per_flop_narrow, flops_per_s.get(dtype, flops_per_s.get("fp8", half))
        per_flop[dtype] = joule * limit * reference / peak
    return PowerModel(
        idle_w=gpu.idle_w,
        active_w=fit.active_w * limit,
        spin_w=(fit.active_w if fit.spin_w is None else fit.spin_w) * limit,
        joule_per_flop=per_flop,
        joule_per_byte=fit.joule_per_byte * limit * memory_bytes_per_s / gpu.memory_bytes_per_s,
        limit_w=gpu.tdp_w,
        provenance=provenance,
    )
