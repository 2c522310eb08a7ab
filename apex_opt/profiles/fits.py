"""Lines and envelopes through the rows of a table: what the laws of operations are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 64, 40_000
"""Contexts a decode law is fitted on: shorter ones cost no time, longer ones are rare and would outweigh the rest."""
# A call that reads faster than the memory can by so much found its context in the cache, where repeated calls leave it;
# so did calls that read less. Where reading takes less than the second share of a call, it matters to neither.
_CACHED, _SILENT = 1.1, 0.2


def lines_of_batches(
    batch: Floats, context: Floats, seconds: Floats, roof_s: float, cacheable: float
) -> list[tuple[float, float, float]]:
    """Per batch: itself, seconds at no context, share of the roofline (NaN where only other batches can tell).

    Parameters
    ----------
    batch, context, seconds : float64[rows]    sequences, tokens of each, and what a call took
    roof_s : float                             least seconds per token of context
    cacheable : float                          tokens that a cache may hold
    """
    total = batch * context
    share = total * roof_s / seconds
    too_fast = share > _CACHED
    found_in_cache = total[too_fast & (total < cacheable)].max(initial=0.0)
    usual = (context >= _SHORTEST_CONTEXT) & (context <= _LONGEST_CONTEXT)
    usual &= ~too_fast & ((total > found_in_cache) | (share <= _SILENT))
    lines: dict[float, tuple[float, float] | None] = {}
    for size in np.unique(batch):
        at = usual & (batch == size)
        line = _fit_line(total[at], seconds[at], roof_s) if at.sum() > 1 else None
        if line is not None and line[1] == 1.0 and total[at].max() <= found_in_cache:
            line = None  # The cache kept up with so few tokens, which tells nothing of the memory.
        if line is not None and found_in_cache:
            # Fitted far out; what the cache served took the base at the least.
            line = min(line[0], float(seconds[batch == size].min())), line[1]
        lines[float(size)] = line
    known = {size: line for size, line in lines.items() if line is not None}
    sizes, shares = np.log(list(known)), [line[1] for line in known.values()]
    found = []
    for size in lines:
        if size in known:
            found.append((size, *known[size]))
            continue
        near = float(np.interp(np.log(size), sizes, shares)) if known else 1.0
        base = (seconds - total * roof_s / near)[usual & (batch == size)].min(initial=np.inf)
        found.append((size, float(base if 0 < base < np.inf else seconds[batch == size].min()), float("nan")))
    return found


def _fit_line(total: Floats, seconds: Floats, roof_s: float) -> tuple[float, float] | None:
    """Base and share of the roofline of one batch; None where noise on a flat curve leaves no such line."""
    weight = 1 / seconds
    base, slope = np.linalg.lstsq(np.column_stack([weight, total * weight]), np.ones(len(seconds)), rcond=None)[0]
    if 0 < slope < roof_s:
        slope = roof_s  # and so the share exactly 1
        base = float((weight**2) @ (seconds - total * roof_s) / (weight**2).sum())
    return (float(base), float(roof_s / slope)) if base > 0 and slope > 0 else None


def lines_of_windows(
    batch: Floats, context: Floats, seconds: Floats, roof_s: float, window: int
) -> list[tuple[float, float, float]]:
    """As `lines_of_batches`, of sequences that fill their window.

    At twice the window, where there are such rows: kernels change their ways at the window itself.

    Parameters
    ----------
    batch, context, seconds : float64[rows]    sequences, tokens of each, and what a call took
    roof_s : float                             least seconds per token of context
    window : int                               tokens that a query sees
    """
    full = min(2.0 * window, float(context.max()))
    times = {}
    for size in np.unique(batch):
        at = (batch == size) & (context >= full)
        if at.any():
            times[float(size)] = float(np.median(seconds[at]))
    launch = min(times.values())
    lines = []
    for size in np.unique(batch):
        least = float(size) * min(full, window) * roof_s
        share = least / max(times[size] - launch, least) if size in times else float("nan")
        lines.append((float(size), launch, share))
    return lines


def rising_line(widths: Floats, seconds: Floats) -> tuple[float, float]:
    """Seconds at no width and per element, neither below zero; the mean where the widths do not tell."""
    if np.ptp(widths) > 0:
        slope, floor = np.polyfit(widths, seconds, 1)
        if slope > 0 and floor > 0:
            return float(floor), float(slope)
    return float(seconds.mean()), 0.0


def envelope(shapes: Floats, size: Floats, seconds: Floats) -> Floats:
    """Times of each shape, none above that of a larger size.

    An engine can pad a batch to the larger size, and does for captured graphs: where a kernel library picks a poor
    kernel for one size, the next good one bounds it.

    Parameters
    ----------
    shapes : float64[rows, dimensions]    what must be the same for two rows to be of one shape
    size, seconds : float64[rows]         the size by which the times of a shape rise, and the times
    """
    order = np.lexsort((size, *shapes.T[::-1]))
    rows, result = shapes[order], seconds[order]
    last = np.flatnonzero(np.concatenate([(rows[1:] != rows[:-1]).any(axis=1), [True]]))
    # Lifted by one step per shape, each lies below all later ones: one running minimum from the end serves all.
    logs = np.log(result)
    lift = (np.arange(len(last)) * (np.ptp(logs) + 1.0)).repeat(np.diff(np.concatenate([[-1], last])))
    bounded = np.minimum.accumulate((logs + lift)[::-1])[::-1] - lift
    found = np.empty_like(seconds)
    found[order] = np.exp(bounded)
    return found
