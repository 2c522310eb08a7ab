"""Why nothing else wins: what became of every deployment of a space."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from apex_opt.errors import FormulationError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.figures import Objective
    from apex_opt.plans.deployment import Deployment

Costs = tuple[float, ...]
Shape = Literal["single", "mixed", "pipeline", "pools"]

LATE: Final[dict[Shape, tuple[str, ...]]] = {
    "single": (),
    "mixed": ("share",),
    "pipeline": ("memory",),
    "pools": ("handover", "room"),
}
"""Families of infeasible deployments that are found out one by one, as the search comes to them."""

ROUNDING: Final = 1e-12
"""Share by which bounds are lowered: sums of floats taken in another order may differ by less."""


@dataclass(slots=True, kw_only=True, eq=False)
class Part:
    """What became of the deployments of one shape on some types of GPU.

    It is kept while these are searched; `end` closes it.

    Parameters
    ----------
    shape : str               "single": a pool on one type; "mixed": a pool on each of several; "pipeline": a pool whose
                              stages are on two; "pools": one that computes prompts and one that answers them
    types : tuple of str      the types of GPU; of "pools" that of each, which may be the same
    objective : Objective     what is bounded: the first objective of the search
    space : int               deployments there are
    infeasible : mapping      those that break a constraint, charged to the first in order; of mixed ones "part" counts
                              those with a plan that is infeasible on its GPUs, "gpus" those over the limit on GPUs, and
                              "share" those with a pool for which the dealing leaves no request or no client, of those
                              that were dealt to; of pools "part" also counts plans that cannot be paired, and
                              "handover" pairs whose formats or degrees keep them from handing over, and "room" those
                              that find no room beside each other in the nodes there are
    complete : bool           whether all feasible ones are known
    out_of_reach : int        those whose bound misses a goal
    beaten : int              those that a bound of the objectives ruled out
    least : Costs or None     the least bound of those beaten
    last : Costs or None      what these had to be better than: the last of the deployments to show
    repeated : int            those that turned out to be others, as their layers, moved, stay even
    seen : list of Deployment those whose batches were simulated, those cut short included
    cut_short : int           simulations that ended early, when their own requests had proved that the deployment is
                              worse than those found or misses a goal
    missed : int              those that were simulated to their end and missed a goal
    left : list of (Costs, int)    bounds of those that could still be among those to show when the time was up, and how
                              many have each
    best : Costs or None      of the best found among them
    before : tuple of Part    of the searches that found the best value of an objective with a tolerance, which
                              deployments then had to come near
    """

    shape: Shape
    types: tuple[str, ...]
    objective: Objective
    space: int
    infeasible: dict[str, int]
    complete: bool = True
    out_of_reach: int = 0
    beaten: int = 0
    least: Costs | None = None
    last: Costs | None = None
    repeated: int = 0
    seen: list[Deployment] = field(default_factory=list)
    cut_short: int = 0
    missed: int = 0
    left: list[tuple[Costs, int]] = field(default_factory=list)
    best: Costs | None = None
    before: tuple[Part, ...] = ()

    @property
    def bounded(self) -> int:
        """Those that a lower bound ruled out."""
        return self.out_of_reach + self.beaten

    @property
    def simulated(self) -> int:
        """Those whose batches were simulated, those cut short included."""
        return len(self.seen)

    @property
    def waiting(self) -> int:
        """Those left when the time was up."""
        return sum(count for _, count in self.left)

    def beat(self, bound: Costs, deployments: int = 1) -> None:
        """Rule out deployments whose bounds are no better than this one."""
        if deployments:
            self.beaten += deployments
            self.least = bound if self.least is None else min(self.least, bound)

    def vanish(self) -> None:
        """Note that a deployment turned out to be another one, or none: its layers, moved, stay even or fit nowhere."""
        if self.shape == "pipeline":
            self.infeasible["memory"] += 1
        else:
            self.repeated += 1

    def end(self, last: Costs | None) -> None:
        """Close the part, with `last` the costs of the last of the deployments to show, None where these are fewer.

        Raises
        ------
        FormulationError    some deployments are not accounted for, or twice
        """
        waiting, self.left = self.left, []
        for bound, count in waiting:
            if last is None or bound <= last:
                self.left.append((bound, count))
            else:
                self.beat(bound, count)
        self.last = last if self.beaten else None
        accounted = sum(self.infeasible.values()) + self.bounded + self.repeated + self.simulated + self.waiting
        if self.space != accounted:
            raise FormulationError(
                f"{self.shape} on {', '.join(self.types)}: {self.space} deployments, {accounted} accounted for"
            )

    @property
    def gap(self) -> float | None:
        """How far the best found of this part can be from its best, as `how_far`; None without one or if unknown."""
        known = self.complete and all(before.optimal for before in self.before)
        return how_far(self.best, (bound for bound, _ in self.left)) if known and self.best is not None else None

    @property
    def optimal(self) -> bool:
        """Whether all are accounted for, or none of those left can be better than the best found."""
        return self.complete and (not self.left or self.gap == 0) and all(before.optimal for before in self.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Why no deployment is better: the parts of a space, which add up to it.

    `best` is what the best deployment found costs.
    """

    parts: tuple[Part, ...]
    best: Costs | None = None

    @property
    def gap(self) -> float | None:
        """How far the best found can be from the best there is, as `how_far`; None without one or if unknown."""
        known = all(part.complete and all(before.optimal for before in part.before) for part in self.parts)
        left = (bound for part in self.parts for bound, _ in part.left)
        return how_far(self.best, left) if known and self.best is not None else None

    @property
    def optimal(self) -> bool:
        """Whether nothing else can win."""
        return self.gap == 0 or all(part.optimal for part in self.parts)

    @property
    def waiting(self) -> int:
        """Deployments left when the time was up."""
        return sum(part.waiting for part in self.parts)

    def of(self, shape: Shape) -> tuple[Part, ...]:
        """The parts of one shape."""
        return tuple(part for part in self.parts if part.shape == shape)


def how_far(best: Costs, left: Iterable[Costs]) -> float:
    """How far the best found can be from the best there is, as a share, where what is left has these bounds.

    It is that by the first objective in which any of what is left, being as good by those before, can be better; 0
    where none can.
    """
    equal = list(left)
    for place, cost in enumerate(best):
        slack = 4 * ROUNDING * abs(cost)  # bounds are lowered by what rounding may have added
        least = min((bound[place] for bound in equal), default=cost)
        if least < cost - slack:
            return (cost - least) / abs(cost)
        equal = [bound for bound in equal if bound[place] <= cost + slack]
    return 0.0
