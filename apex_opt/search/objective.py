"""What a plan is judged by."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.workload.slo import AT_LEAST, FIGURES, LATENCIES, STATISTICS, Slo, known_statistic

if TYPE_CHECKING:
    from apex_opt.simulator.metrics import Metrics

NAMES: Final = (*(f"{metric}_{statistic}" for metric in LATENCIES for statistic in STATISTICS), *FIGURES)
"""The objectives there are; of latencies any other percentile is one too."""


_COSTS: Final = ("cost", "cost_per_mtoken", "energy", "energy_per_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A figure to make small, or large where `maximise`.

    Where others come after it, plans within `tolerance` of the best by it, as a share, count as equal.
    """

    name: str
    unit: str
    maximise: bool = False
    tolerance: float = 0.0

    @property
    def metric(self) -> str:
        """The latency or the figure it is about."""
        return self.name if self.name in FIGURES else self.name.partition("_")[0]

    @property
    def statistic(self) -> str:
        """Of a latency; figures have their mean only."""
        return "mean" if self.name in FIGURES else self.name.partition("_")[2]

    def value(self, metrics: Metrics) -> float:
        """The figure as people read it."""
        return metrics.value(self.metric, self.statistic)

    def cost(self, value: float) -> float:
        """The figure with its sign such that less is better; a latency no request has counts as nothing."""
        if value != value:
            return 0.0
        return -value if self.maximise else value

    def near(self, best: float) -> tuple[Slo, ...]:
        """What a plan must reach to count as equal to one of this value; nothing where every plan does."""
        limit = best * (1 - self.tolerance) if self.maximise else best * (1 + self.tolerance)
        if limit != limit or (self.maximise and limit <= 0):
            return ()
        return (Slo(metric=self.metric, statistic=self.statistic, limit=max(limit, sys.float_info.min)),)


TIES: Final = Objective(name="e2e_mean", unit="s")
"""What decides where costs alone do not."""


def load_objective(name: str) -> Objective:
    """An objective by name: one of `NAMES`, or another percentile such as `e2e_p99.9`.

    Raises
    ------
    UnknownNameError    not a name of one
    """
    metric, _, statistic = name.partition("_")
    if name not in FIGURES:
        if metric not in LATENCIES or not statistic:
            raise UnknownNameError("objective", name[:60], NAMES)
        name = f"{metric}_{known_statistic(statistic, f'objective: statistic of {metric}')}"
    return Objective(name=name, unit=FIGURES.get(name, "s"), maximise=name in AT_LEAST)


def load_objectives(text: str) -> tuple[Objective, ...]:
    """Objectives by name, the most important first: `energy,e2e_p95`.

    Of plans equal by the first, the best by the second is the best, and so on. `energy~2%,e2e_p95` takes for equal all
    that are within 2% of the best. Many plans cost the same: where none but costs and energies are named, `e2e_mean`
    comes after them.

    Raises
    ------
    UnknownNameError    a name that is none
    UsageError          one named twice, a tolerance that is no share or has nothing after it
    """
    found = []
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        name, tilde, share = part.partition("~")
        objective = load_objective(name.strip())
        if tilde:
            objective = replace(objective, tolerance=_share(part, share.strip()))
        found.append(objective)
    names = [objective.name for objective in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--objective: {text!r:.60} names {twice[0]} twice; name each once")
    if found[-1].tolerance:
        raise UsageError(
            f"--objective: {parts[-1]!r:.60} has a tolerance and nothing after it to choose by; e.g. energy~2%,e2e_p95"
        )
    if all(objective.metric in _COSTS for objective in found):
        found.append(TIES)
    return tuple(found)


def load_latency(name: str) -> Objective:
    """A latency by name, such as `e2e_mean` or `ttft_p99.9`.

    Raises
    ------
    UsageError          a figure that is no latency
    UnknownNameError    not a name of one
    """
    if name in FIGURES:
        raise UsageError(
            f"--latency: {name} is no latency; give one of {', '.join(LATENCIES)} with _mean, _max or such as _p95"
        )
    return load_objective(name)


def _share(part: str, text: str) -> float:
    """A share in percent, above 0 and at most 1000."""
    digits = text.removesuffix("%")
    if text.endswith("%") and digits.replace(".", "", 1).isdecimal() and digits.isascii() and 0 < float(digits) <= 1000:
        return float(Decimal(digits) / 100)
    raise UsageError(
        f"--objective: {part!r:.60}: a tolerance is a share above 0% and at most 1000%, e.g. energy~2%,e2e_p95"
    )
