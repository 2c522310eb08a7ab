"""How unevenly a router loads expert groups."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_EXACT_MEAN = 64  # assignments per group up to which the expectation is computed rather than extrapolated


def fullest_group_factor(assignments: NDArray[np.int64], groups: int) -> Floats:
    """Expected load of the fullest of `groups` over the mean load, under uniform routing.

    Each of `assignments[i]` token-to-expert assignments falls into one of `groups` equal groups of experts,
    independently and uniformly. Time is set by the fullest group, not by the mean.

    Parameters
    ----------
    assignments : int64[...]    >= 0
    groups : int                >= 1

    Returns
    -------
    float64[...]                from 1 (one group) to `groups` (a single assignment); 1 where there is none

    Notes
    -----
    The expectation is exact on a grid of loads up to a mean of 64 per group: for a multinomial of N into s cells
    P(max <= m) is the probability that s independent Poisson(N/s) variables, each at most m, add up to N, over
    P(Poisson(N) = N) (Levin, Annals of Statistics 9, 1981). In between, and beyond by a line in 1/sqrt(mean), the
    standardised excess (E[max] - mean) / sqrt(mean) is interpolated, which varies slowly.
    """
    if groups == 1:
        return np.ones(np.shape(assignments))
    counts, excess = _excess(groups)
    load = np.maximum(np.asarray(assignments, np.float64), 1.0)
    mean = load / groups
    # Grid in 1/sqrt(mean): dense where the excess bends, linear to its normal limit at 0.
    z = np.interp(1 / np.sqrt(mean), 1 / np.sqrt(counts[::-1] / groups), excess[::-1])
    slope = (excess[-2] - excess[-1]) / (np.sqrt(groups / counts[-2]) - np.sqrt(groups / counts[-1]))
    beyond = excess[-1] + slope * (1 / np.sqrt(mean) - np.sqrt(groups / counts[-1]))
    z = np.where(load > counts[-1], beyond, z)
    return np.where(np.asarray(assignments) > 0, np.clip((mean + z * np.sqrt(mean)) / mean, 1.0, groups), 1.0)


@lru_cache(maxsize=64)
def _excess(groups: int) -> tuple[Floats, Floats]:
    """Grid of assignments and the standardised excess of the fullest group at each."""
    top = _EXACT_MEAN * groups
    counts = np.unique(np.rint(np.geomspace(1, top, 2 + 3 * int(np.log2(top)))).astype(np.int64))
    excess = [(expected_maximum(int(n), groups) - n / groups) / np.sqrt(n / groups) for n in counts]
    return counts.astype(np.float64), np.array(excess)


def expected_maximum(balls: int, cells: int) -> float:
    """Exact expectation of the largest cell count of a uniform multinomial, up to float64 rounding.

    Source: Levin (1981), with the sum of truncated Poisson variables read off a discrete Fourier transform.
    """
    rate = balls / cells
    logs = np.cumsum(np.log(np.arange(1, balls + 1)))
    log_factorial = np.concatenate(([0.0], logs))
    k = np.arange(balls + 1)
    weights = np.exp(k * np.log(rate) - rate - log_factorial)
    all_at = np.exp(balls * np.log(balls) - balls - log_factorial[-1])
    least = -(-balls // cells)
    expected = float(least)  # the maximum is at least the mean rounded up
    for most in range(least, balls):
        size = max(balls, cells * most - balls) + 1
        spectrum = np.fft.rfft(np.where(k <= most, weights, 0.0)[: most + 1], n=size)
        total = np.fft.irfft(spectrum**cells, n=size)[balls % size]
        above = 1.0 - total / all_at
        if above < 1e-9:
            break
        expected += above
    return expected
