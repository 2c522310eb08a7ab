"""The one search: best first over a tree of deployments whose branches are looked into only when their turn comes.

A branch has its children in the order of their bounds, and no child's bound is better than that of the branch it is on.
So the heap holds, of every branch, the next child alone (Lawler, Management Science 18(7), 1972; Murty, Operations
Research 16(3), 1968), products of choices are never listed, and a child that cannot matter closes all after it.
"""

from __future__ import annotations

import heapq
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored
    from apex_opt.search.incumbent import Incumbent
    from apex_opt.search.ledger import Costs, Part

    Progress = Callable[[str, int, int], None]
    Challenge = tuple[Deployment, Costs, Costs]
    """A deployment to simulate, bounds of its costs, and costs beyond which it has lost."""
    Trials = Callable[[Sequence[Challenge], Iterable[Challenge]], Sequence["Scored | Unfinished | None"]]
    """As `Scores`, where the time may be up in the middle of one."""

ROUND: Final = 4
"""Deployments simulated side by side before the incumbent is updated; fixed, so that results do not depend on the
cores."""


class Unfinished(Enum):
    """In place of a score."""

    LATE = "late"
    """The time was up before there was one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """A deployment to simulate, once what is decided late is decided.

    Parameters
    ----------
    deployment : Deployment
    bound : tuple of float     of its costs
    late : callable or None    gives the deployment with its layers moved; None where it turns out to be another one, or
                               none
    closer : callable or None  bounds of its costs, once that is decided
    """

    deployment: Deployment
    bound: Costs
    late: Callable[[Deployment], Deployment | None] | None = None
    closer: Callable[[Deployment], Costs] | None = None

    def decided(self) -> Leaf | None:
        """The same with nothing left to decide, and no lower bounds; None where there is no such deployment."""
        if self.late is None:
            return self
        deployment = self.late(self.deployment)
        if deployment is None:
            return None
        bound = self.bound
        if self.closer is not None:
            bound = tuple(max(pair) for pair in zip(bound, self.closer(deployment), strict=True))
        return Leaf(deployment=deployment, bound=bound)

    def behind(self, *first: float) -> Leaf:
        """The same where some costs that are known count before the others."""
        closer = self.closer
        after = None if closer is None else lambda deployment: (*first, *closer(deployment))
        return replace(self, bound=(*first, *self.bound), closer=after)


class Branch(Protocol):
    """Children side by side, in the order of their bounds."""

    @property
    def part(self) -> Part:
        """What they are a part of."""
        ...

    @property
    def bounds(self) -> Sequence[Costs]:
        """Of each child, what none of its deployments can beat."""
        ...

    def leaves(self, first: int, last: int) -> int:
        """Deployments of the children from one on, up to another."""
        ...

    def child(self, place: int) -> Leaf | Iterable[Branch]:
        """A child: a deployment, or the branches below it, which are made as they are asked for."""
        ...


class Branches(Protocol):
    """A shape that deployments can have."""

    def branches(self) -> Iterable[Branch]:
        """The branches of its root."""
        ...


class Queue:
    """A branch of deployments that are known one by one, in the order in which they are looked at."""

    def __init__(self, part: Part, leaves: Sequence[Leaf]) -> None:
        self.part, self._leaves = part, leaves
        self.bounds = [leaf.bound for leaf in leaves]

    def leaves(self, first: int, last: int) -> int:
        return last - first

    def child(self, place: int) -> Leaf:
        return self._leaves[place]


class Scores(Protocol):
    """Who simulates."""

    def __call__(self, runs: Sequence[Challenge], ahead: Iterable[Challenge]) -> Sequence[Scored | None]:
        """The scores of some deployments; None for those that miss a goal or have lost.

        Parameters
        ----------
        runs : of these
        ahead : those that come next, unless these turn out to be better; what is idle may begin with them
        """
        ...


def side_by_side(challenge: Callable[[Deployment, Costs, Costs], Scored | None]) -> Scores:
    """Simulations in threads of this process, by a function of one of them: compiled, they run side by side."""

    def scores(runs: Sequence[Challenge], ahead: Iterable[Challenge]) -> Sequence[Scored | None]:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            return list(threads.map(lambda run: challenge(*run), runs))

    return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A deployment that was simulated to its end."""

    part: Part
    scored: Scored


def best_first(
    branches: Iterable[Branch],
    incumbent: Incumbent,
    scores: Trials,
    tell: Progress,
    deadline: float,
    prepare: Callable[[Iterable[Deployment]], None],
    begun: int = 0,
) -> list[Simulated]:
    """Simulate the deployments that may matter, the best bound first, a round at a time.

    Parameters
    ----------
    branches : of the root
    incumbent : Incumbent    what the search is after
    scores : Scores          simulates, or finds that a deployment misses a goal or costs more than given, or that the
                             time is up, which leaves it
    tell : callable          told (what, done, total) along the way
    deadline : float         point in time after which no further round is begun; what is open then is left
    prepare : callable       told what is about to be simulated
    begun : int              deployments simulated before; without any a round is begun whatever the time

    Returns
    -------
    list of Simulated        those simulated to their end, in order; the parts tell what became of all others
    """
    heap: list[tuple[Costs, int, int, Branch]] = []
    turns = count()
    done: list[Simulated] = []

    def push(branch: Branch, place: int) -> None:
        if place < len(branch.bounds):
            heapq.heappush(heap, (incumbent.order(branch.bounds[place]), next(turns), place, branch))

    for branch in branches:
        push(branch, 0)
    while heap and not (begun and monotonic() > deadline):
        round_: list[tuple[Part, Leaf]] = []
        while heap and len(round_) < ROUND:
            _, _, place, branch = heapq.heappop(heap)
            bound, part = branch.bounds[place], branch.part
            if not incumbent.admits(bound, part):
                after = len(branch.bounds) if incumbent.in_order else place + 1
                part.beat(bound, branch.leaves(place, after))
                push(branch, after)
                continue
            push(branch, place + 1)
            child = branch.child(place)
            if not isinstance(child, Leaf):
                for below in child:
                    push(below, 0)
            elif (leaf := child.decided()) is None:
                part.vanish()
            elif incumbent.order(leaf.bound) > incumbent.order(bound):
                push(Queue(part, [leaf]), 0)  # its turn comes later
            else:
                round_.append((part, leaf))
                continue
            if monotonic() > deadline:
                break
        prepare(leaf.deployment for _, leaf in round_)
        asked = [(leaf.deployment, leaf.bound, incumbent.worst(part)) for part, leaf in round_]
        found = scores(asked, _ahead(heap, incumbent)) if asked else ()
        begun += len(round_)
        good = []
        for (part, leaf), scored in zip(round_, found, strict=True):
            if isinstance(scored, Unfinished):
                part.left.append((leaf.bound, 1))
                continue
            part.seen.append(leaf.deployment)
            if scored is None:
                part.cut_short += 1
                continue
            done.append(Simulated(part=part, scored=scored))
            if scored.meets_slos:
                good.append((scored, part))
            else:
                part.missed += 1
        for scored, part in good:
            incumbent.take(scored, part)
        tell("simulating plans", begun, begun + len(heap))
    for _, _, place, branch in heap:
        for place_, bound in enumerate(branch.bounds[place:], place):
            branch.part.left.append((bound, branch.leaves(place_, place_ + 1)))
    return done


def _ahead(heap: list[tuple[Costs, int, int, Branch]], incumbent: Incumbent) -> Iterator[Challenge]:
    """What would be simulated next if nothing better were found, without looking into branches further down."""
    rest = list(heap)
    while rest:
        _, turn, place, branch = heapq.heappop(rest)
        bound, part = branch.bounds[place], branch.part
        if place + 1 < len(branch.bounds):
            heapq.heappush(rest, (incumbent.order(branch.bounds[place + 1]), turn, place + 1, branch))
        child = branch.child(place) if incumbent.admits(bound, part) else None
        leaf = child.decided() if isinstance(child, Leaf) else None
        if leaf is not None and incumbent.admits(leaf.bound, part):
            yield leaf.deployment, leaf.bound, incumbent.worst(part)
