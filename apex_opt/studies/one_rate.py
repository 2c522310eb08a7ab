"""What one deployment sustains: its highest rate on a grid, or whether it takes a rate that is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.studies.rates import highest_step

if TYPE_CHECKING:
    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.ledger import Costs
    from apex_opt.studies.rates import Grid
    from apex_opt.studies.steady import Steady, Trial

    Rank = tuple[int, int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A deployment, the last step that it sustains, and why not the next."""

    deployment: Deployment
    step: int
    trial: Trial
    after: Trial | None

    @property
    def rank(self) -> Rank:
        """Better first: rate, then fewer GPUs, then the text form, so that ties fall the same way every time."""
        return -self.step, *size_of(self.deployment)


def highest_of(
    steady: Steady, grid: Grid, last: Rank | None, deployment: Deployment, guess_per_s: float, until: float
) -> Found | None:
    """The last step that a deployment sustains, where it is among the best so far.

    Parameters
    ----------
    steady, grid
    last : of the last of those to show; None where these are fewer
    deployment, guess_per_s
    until : float    as of `Steady.run`
    """
    low = grid.low
    if last is not None:
        low = -last[0] if size_of(deployment) < last[1:] else -last[0] + 1
    if low > grid.high:
        return None
    trials: dict[int, Trial] = {}

    def holds(step: int) -> bool:
        if step not in trials:
            trials[step] = steady.run(deployment, grid.rate_per_s(step), until=until)
        return trials[step].holds

    start = grid.below(guess_per_s) if last is None else low
    step = highest_step(holds, low=low, high=grid.high, start=start)
    while step is not None and step >= low:
        if holds(step):
            trials[step] = steady.confirmed(deployment, grid.rate_per_s(step), trials[step], until)
            if trials[step].holds:
                return Found(deployment=deployment, step=step, trial=trials[step], after=trials.get(step + 1))
        step = _lower(grid, trials, step)
    return None


def _lower(grid: Grid, trials: dict[int, Trial], step: int) -> int:
    """The next step to try below one that is not sustained."""
    trial = trials[step]
    evidence = trial.evidence
    if trial.why == "saturated" and evidence is not None and evidence.saturated_per_s is not None:
        lower = grid.below(evidence.saturated_per_s / (1 + evidence.margin))
        if lower < step - 1:
            trials[lower + 1] = trial
            return lower
    return step - 1


def sustained_by(
    steady: Steady, deployment: Deployment, rate_per_s: float, worst: Costs, bounds: Costs, until: float
) -> Trial:
    """A deployment at a rate, and where its first run holds the further ones.

    Parameters
    ----------
    steady, deployment, rate_per_s
    worst, bounds, until : as of `Steady.run`
    """
    trial = steady.run(deployment, rate_per_s, worst, bounds, until)
    return steady.confirmed(deployment, rate_per_s, trial, until) if trial.holds else trial


def size_of(deployment: Deployment) -> tuple[int, str]:
    return deployment.devices, str(deployment)
