"""Several pools, each with a plan of its own: one on each of some types of GPU, or one that hands over to another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import inf, prod
from typing import TYPE_CHECKING, Protocol

import numpy as np

from apex_opt.plans.deployment import Deployment
from apex_opt.search.best_first import ROUND, Leaf
from apex_opt.search.bounds.compose import Compose, Help
from apex_opt.search.dealing import most_pools
from apex_opt.search.facts import judged
from apex_opt.search.ledger import LATE, Part

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.run import Run
    from apex_opt.search.answer import Scored
    from apex_opt.search.ledger import Costs
    from apex_opt.search.option import Option
    from apex_opt.search.problem import Problem
    from apex_opt.search.shapes.single import Single
    from apex_opt.search.space import Progress

    Chosen = tuple[Option, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """A branch: the pools chosen so far, with options for the next in the order of their bounds."""

    shape: Together
    chosen: Chosen
    options: Sequence[Option]
    bounds: Sequence[Costs]
    ends: Sequence[int]
    """Deployments up to each option, that one included."""

    @property
    def part(self) -> Part:
        return self.shape.part

    def leaves(self, first: int, last: int) -> int:
        return (self.ends[last - 1] if last else 0) - (self.ends[first - 1] if first else 0)

    def child(self, place: int) -> Leaf | Iterator[Choices]:
        chosen = (*self.chosen, self.options[place])
        if len(chosen) < self.shape.pools:
            return map(self.shape.branch, [chosen])
        return Leaf(deployment=deployed(chosen), bound=self.bounds[place])


class Sized(Protocol):
    """A pool that takes so many GPUs."""

    @property
    def devices(self) -> int: ...


class Room:
    """How many deployments there are with one of the options of each pool, on so many GPUs at most."""

    def __init__(self, options: Sequence[Sequence[Sized]]) -> None:
        self._sizes = [Counter(option.devices for option in some) for some in options]
        self.of = cache(self._of)

    def _of(self, level: int, most_gpus: int) -> int:
        """Those of the pools from one on."""
        if most_gpus < 0:
            return 0
        if level == len(self._sizes):
            return 1
        return sum(times * self.of(level + 1, most_gpus - devices) for devices, times in self._sizes[level].items())


def mixed_part(problem: Problem, singles: Sequence[Single], options: Sequence[Sequence[Sized]]) -> Part:
    """The part of a ledger of the deployments with a pool on each of some types of GPU.

    Parameters
    ----------
    problem : Problem
    singles : the plans of each of these types
    options : of each of these types, all of its feasible plans
    """
    spaces, feasible = (prod(sizes) for sizes in zip(*((s.space.size, s.space.feasible) for s in singles), strict=True))
    different, fitting = prod(map(len, options)), Room(options).of(0, problem.max_devices)
    served = len(options) <= most_pools(problem.trace)
    return Part(
        shape="mixed",
        types=tuple(name for single in singles for name in single.part.types),
        objective=problem.objective,
        space=spaces,
        infeasible={"part": spaces - feasible, "gpus": different - fitting, "share": 0 if served else fitting},
        repeated=feasible - different,
        complete=all(single.space.complete for single in singles),
    )


class Unseen:
    """Deployments with a pool on each of some types of GPU, before which the time was up: all of them are left.

    Parameters
    ----------
    problem : Problem
    singles : the plans of each of these types
    """

    def __init__(self, problem: Problem, singles: Sequence[Single]) -> None:
        spaces, feasible = (
            prod(sizes) for sizes in zip(*((s.space.size, s.space.feasible) for s in singles), strict=True)
        )
        self.part = Part(
            shape="mixed",
            types=tuple(name for single in singles for name in single.part.types),
            objective=problem.objective,
            space=spaces,
            infeasible={"part": spaces - feasible, "gpus": 0, "share": 0},
            left=[((-inf,) * len(problem.objectives), feasible)] if feasible else [],
            complete=False,  # nothing is known of how good they can be
        )

    def branches(self) -> Iterator[Choices]:
        """None."""
        return iter(())

    def scouts(self, best: Sequence[Sequence[Scored]]) -> list[tuple[Deployment, Costs]]:
        """None, whatever the best plans of each type are."""
        return []


class Composed(Protocol):
    """Floors of deployments of several pools."""

    @property
    def at_once(self) -> int: ...

    def of(self, deployments: Sequence[Chosen]) -> tuple[Run, NDArray[np.bool_]]: ...

    def lost(self, deployment: Chosen) -> str: ...

    def with_help(self, deployments: Sequence[Chosen], help_: Help) -> Run: ...


class Together:
    """Deployments of several pools, one of the options of each.

    Parameters
    ----------
    problem : Problem
    part : Part                   what they are a part of; its `LATE` families are counted pool by pool
    options : of each pool, all of its feasible plans
    most_gpus : int               GPUs that a deployment may take in all
    compose : Composed            their floors, and whether the pools go together
    admits : callable             whether a deployment with a bound may matter
    tell : callable               told (what, done, total) along the way
    """

    def __init__(
        self,
        problem: Problem,
        part: Part,
        options: Sequence[Sequence[Option]],
        most_gpus: int,
        compose: Composed,
        admits: Callable[[Costs, Part], bool],
        tell: Progress,
    ) -> None:
        self._problem, self._options, self._admits, self._tell = problem, options, admits, tell
        self._compose, self._most = compose, most_gpus
        self._completions = Room(options).of
        self._helped: dict[int, dict[Option, Costs]] = {}
        self.part = part

    @property
    def pools(self) -> int:
        return len(self._options)

    def branches(self) -> list[Choices]:
        """The options of the first pool."""
        some = self._completions(0, self._most) > sum(self.part.infeasible[family] for family in LATE[self.part.shape])
        return [self.branch(())] if some else []

    def branch(self, chosen: Chosen) -> Choices:
        """The options of the next pool beside those chosen; what they rule out is counted."""
        level, room = len(chosen), self._most - sum(option.devices for option in chosen)
        options, leaves = [], []
        for option in self._options[level]:
            if ends := self._completions(level + 1, room - option.devices):
                options.append(option)
                leaves.append(ends)
        if level:
            options, leaves = self._with_help(level, options, leaves)
        bounds = np.zeros((len(options), len(self._problem.objectives)))
        kept = np.zeros(len(options), bool)
        for start in range(0, len(options), self._compose.at_once):
            self._tell("bounding fleets", start, len(options))
            some = slice(start, start + self._compose.at_once)
            rows = [(*chosen, option) for option in options[some]]
            if level + 1 == self.pools:
                run, served = self._compose.of(rows)
                for place in np.flatnonzero(~served).tolist():
                    self.part.infeasible[self._compose.lost(rows[place])] += 1
            else:
                run, served = (
                    self._compose.with_help(rows, Help.of(self._options[level + 1 :])),
                    np.ones(len(rows), bool),
                )
            bounds[some], possible = self._judged(run)
            self.part.out_of_reach += int(np.array(leaves[some])[served & ~possible].sum())
            kept[some] = served & possible
        order = [int(place) for place in np.lexsort(bounds.T[::-1]) if kept[place]]
        return Choices(
            shape=self,
            chosen=chosen,
            options=[options[place] for place in order],
            bounds=[tuple(bounds[place].tolist()) for place in order],
            ends=np.cumsum([leaves[place] for place in order], dtype=object).tolist() if order else [],
        )

    def scouts(self, best: Sequence[Sequence[Scored]]) -> list[tuple[Deployment, Costs]]:
        """Deployments of the best plans of each type, with their bounds: the better those, the fewer are looked at.

        Parameters
        ----------
        best : of each type, the best plans alone; where there is none, those with the most weight are taken
        """
        chosen = []
        for options, scored in zip(self._options, best, strict=True):
            plans = {option.pool.plan: option for option in options}
            known = [plans[one.plan] for one in scored[:ROUND]]
            chosen.append(known or sorted(options, key=lambda option: -option.weight)[:ROUND])
        rows = [row for row in product(*chosen) if sum(option.devices for option in row) <= self._most]
        if not rows:
            return []
        run, served = self._compose.of(rows)
        bounds, possible = self._judged(run)
        good = np.flatnonzero(served & possible)
        return [(deployed(rows[place]), tuple(bounds[place].tolist())) for place in good.tolist()]

    def _with_help(self, level: int, options: list[Option], leaves: list[int]) -> tuple[list[Option], list[int]]:
        """Options that may matter with the best of everything beside them; the others are counted."""
        if level not in self._helped:
            mine = self._options[level]
            others = Help.of([some for place, some in enumerate(self._options) if place != level])
            self._helped[level] = {}
            for start in range(0, len(mine), self._compose.at_once):
                some = mine[start : start + self._compose.at_once]
                bounds, possible = self._judged(self._compose.with_help([(option,) for option in some], others))
                self._helped[level] |= {some[i]: tuple(bounds[i].tolist()) for i in np.flatnonzero(possible).tolist()}
        kept, ends = [], []
        for option, count in zip(options, leaves, strict=True):
            bound = self._helped[level].get(option)
            if bound is None:
                self.part.out_of_reach += count
            elif not self._admits(bound, self.part):
                self.part.beat(bound, count)
            else:
                kept.append(option)
                ends.append(count)
        return kept, ends

    def _judged(self, run: Run) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return judged(run, self._problem.objectives, self._problem.goals)


def mixed(
    problem: Problem,
    singles: Sequence[Single],
    options: Sequence[Sequence[Option]],
    admits: Callable[[Costs, Part], bool],
    tell: Progress,
) -> Together:
    """Deployments with a pool on each of some types of GPU.

    Parameters
    ----------
    problem : Problem
    singles : the plans of each of these types
    options : of each of these types, all of its feasible plans
    admits : callable      whether a deployment with a bound may matter
    tell : callable        told (what, done, total) along the way
    """
    compose = Compose(problem, singles[0].facts.costs.request_ns)
    part = mixed_part(problem, singles, options)
    return Together(problem, part, options, problem.max_devices, compose, admits, tell)


def deployed(options: Chosen) -> Deployment:
    """The deployment of some options."""
    return Deployment(pools=tuple(option.pool for option in options))
