"""`Metrics`: what was measured of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from apex_opt.figures.registry import figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What the requests of a run saw, and what that took.

    Parameters
    ----------
    latency_s : mapping of figure to mapping of statistic to seconds
        of those of requests and, where known, gaps; percentiles interpolate linearly, every gap weighs the same; NaN
        where no request has one
    figures : mapping of figure to value  those that a run has one of, where known
    output_tokens_per_s, total_tokens_per_s : float    over the makespan
    output_tokens : int                   tokens generated
    cached_tokens, cached_share : int, float    prompt tokens found in the cache, also as a share of all
    attainment : mapping of goal's text to share of requests (of ITL, of gaps) within its limit; 1 or 0 of a run
    slo_met : mapping of goal's text to whether it holds
    """

    latency_s: dict[str, dict[str, float]]
    figures: dict[str, float]
    output_tokens_per_s: float
    total_tokens_per_s: float
    output_tokens: int
    cached_tokens: int = 0
    cached_share: float = 0.0
    attainment: dict[str, float] = field(default_factory=dict)
    slo_met: dict[str, bool] = field(default_factory=dict)

    def value(self, metric: str, statistic: str = "mean") -> float:
        """A figure in its unit, of requests and gaps a statistic of it; NaN where not known."""
        if metric in self.latency_s:
            return self.latency_s[metric][statistic]
        return self.figures.get(figure(metric).name, float("nan"))
