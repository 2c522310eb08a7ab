"""What a plan is judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UnknownNameError
from apex_opt.simulator.metrics import STATISTICS
from apex_opt.workload.slo import LATENCIES

if TYPE_CHECKING:
    from apex_opt.cost.accounting import Usage
    from apex_opt.simulator.metrics import Metrics

NAMES: Final = (
    *(f"{metric}_{statistic}" for metric in LATENCIES for statistic in STATISTICS),
    "makespan",
    "throughput",
    "energy",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A figure to make small, or large where `maximise`."""

    name: str
    unit: str
    maximise: bool = False

    def value(self, metrics: Metrics, usage: Usage) -> float:
        """The figure as people read it."""
        if self.name == "makespan":
            return metrics.makespan_s
        if self.name == "throughput":
            return metrics.requests_per_s
        if self.name == "energy":
            return usage.energy_j
        metric, statistic = self.name.split("_")
        return metrics.latency_s[metric][statistic]

    def cost(self, value: float) -> float:
        """The figure with its sign such that less is better; a latency no request has counts as nothing."""
        if value != value:
            return 0.0
        return -value if self.maximise else value


def load_objective(name: str) -> Objective:
    """An objective by name.

    Raises
    ------
    UnknownNameError    not in `NAMES`
    """
    if name not in NAMES:
        raise UnknownNameError("objective", name, NAMES)
    unit = {"throughput": "requests/s", "energy": "J"}.get(name, "s")
    return Objective(name=name, unit=unit, maximise=name == "throughput")
