"""What has been found, and what may still matter beside it: what a search is after."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.search.answer import Scored
    from apex_opt.search.ledger import Costs, Part
    from apex_opt.search.problem import Problem

FREE: Final[Costs] = (inf,)
"""Costs that nothing passes."""


class Incumbent:
    """What a search is after; unless it says otherwise, all that may cost no more than `worst`, which is everything."""

    in_order = True
    """Whether what comes later in a branch matters no more than what comes before."""

    def order(self, bound: Costs) -> Costs:
        """What is looked at first has the least of it; no less for what lies further down the tree."""
        return bound

    def admits(self, bound: Costs, part: Part) -> bool:
        """Whether a deployment of a part, with this bound, may matter."""
        return bound <= self.worst(part)

    def worst(self, part: Part) -> Costs:
        """Costs beyond which a run of a deployment of a part may end early."""
        return FREE

    def scouted(self, scouts: Sequence[Scored]) -> None:
        """Note deployments that are known before they are come across."""

    def take(self, scored: Scored, part: Part) -> None:
        """Note a deployment that meets the goals."""
        raise NotImplementedError


class Best(Incumbent):
    """The `top` best deployments, and the best on each type of GPU alone."""

    def __init__(self, problem: Problem, top: int) -> None:
        self._problem, self._top = problem, top
        self._costs: list[Costs] = []
        self._ceiling = FREE

    @property
    def last(self) -> Costs | None:
        """Costs of the last of the deployments to show; None where these are fewer."""
        return self._costs[self._top - 1] if len(self._costs) >= self._top else None

    def scouted(self, scouts: Sequence[Scored]) -> None:
        known = sorted([*self._costs, *(self._problem.costs(scored.metrics) for scored in scouts)])
        self._ceiling = known[self._top - 1] if len(known) >= self._top else FREE

    def worst(self, part: Part) -> Costs:
        worst = min(self.last or FREE, self._ceiling)
        return max(worst, part.best or FREE) if part.shape == "single" and self._problem.several else worst

    def take(self, scored: Scored, part: Part) -> None:
        costs = self._problem.costs(scored.metrics)
        part.best = costs if part.best is None else min(part.best, costs)
        self._costs = sorted([*self._costs, costs])[: self._top]
