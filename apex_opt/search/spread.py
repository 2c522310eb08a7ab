"""A search spread over workers, which bound and simulate for it; what it answers does not depend on them.

The loop decides alone, in its own order. While workers are idle they begin with what comes next in that order, and
what they find is taken only where it is what would have been found in its turn.
"""

from __future__ import annotations

import pickle
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from apex_opt.errors import InputError
from apex_opt.search.best_first import side_by_side
from apex_opt.search.incumbent import FREE
from apex_opt.search.scorer import Scorer
from apex_opt.search.shapes.single import in_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored
    from apex_opt.search.best_first import Challenge, Scores
    from apex_opt.search.facts import Facts
    from apex_opt.search.ledger import Costs
    from apex_opt.search.problem import Problem
    from apex_opt.search.shapes.single import Bounded

    _Problem = tuple["Kept", "Kept | None"]
    """A problem, and one whose costs serve as well."""

Item = TypeVar("Item")
Found = TypeVar("Found")

CHUNKS: Final = 8
"""Chunks of plans to bound for each worker: the last ones to end leave others idle for no longer than one takes."""


class Crew(Protocol):
    """Who bounds and simulates the plans of a problem."""

    @property
    def bounded(self) -> Bounded: ...
    @property
    def scores(self) -> Scores: ...


class Alone:
    """This process."""

    def __init__(self, scorer: Scorer) -> None:
        self.bounded: Bounded = in_turn
        self.scores = side_by_side(scorer.challenge)


class Kept(Protocol):
    """Bytes that all workers can have."""

    def __hash__(self) -> int: ...
    def packed(self) -> bytes: ...


class Workers(Protocol):
    """Who works on items, as `apex_opt.grids.workers` has them."""

    @property
    def count(self) -> int:
        """Items that are worked on at once."""
        ...

    @property
    def in_hand(self) -> int:
        """Items put whose outcome was not taken yet."""
        ...

    def put(self, function: Callable[[Any], Any], item: Any) -> int:
        """Have a function of a module work on an item; gives the number of its ticket."""
        ...

    def take(self) -> tuple[int, Any]:
        """The ticket and the outcome of an item that is done, an exception where its worker died; waits for one."""
        ...

    def keep(self, packed: bytes) -> Kept:
        """Bytes kept where every worker can load them."""
        ...


class Spread:
    """Workers, who make their own facts of the problem.

    Parameters
    ----------
    scorer : Scorer      of the problem
    workers : Workers
    """

    def __init__(self, scorer: Scorer, workers: Workers) -> None:
        like, self._workers = scorer.like, workers
        self._kept: _Problem = (
            kept_by(workers, scorer.problem),
            None if like is None else kept_by(workers, like.problem),
        )
        self._costs = scorer.problem.costs
        self._flying: dict[int, Challenge] = {}
        self._known: dict[Deployment, tuple[Costs, Scored | None]] = {}

    def bounded(self, facts: Facts, function: Callable[[Facts, Item], Found], items: Sequence[Item]) -> Iterator[Found]:
        """Have workers bound plans, some at a time.

        Parameters
        ----------
        facts, function, items : as of `Bounded`
        """
        size = max(1, len(items) // (CHUNKS * self._workers.count))
        types = facts.problem.types
        tickets = deque(
            self._workers.put(_bounded, (self._kept, types, function, items[at : at + size]))
            for at in range(0, len(items), size)
        )
        done: dict[int, list[Found]] = {}
        while tickets:
            while tickets[0] not in done:
                ticket, found = taken(self._workers)
                done[ticket] = found
            yield from done.pop(tickets.popleft())

    def scores(self, runs: Sequence[Challenge], ahead: Iterable[Challenge]) -> Sequence[Scored | None]:
        """Have workers simulate, those that are idle what comes next."""
        found: dict[Deployment, Scored | None] = {}
        ahead = iter(ahead)
        while True:
            flying = {deployment for deployment, *_ in self._flying.values()}
            for run in runs:
                deployment, _, worst = run
                if deployment in self._known and self._settles(*self._known[deployment], worst):
                    found[deployment] = self._known[deployment][1]
                elif deployment not in found and deployment not in flying:
                    self._begin(run)
            if len(found) == len(runs):
                return [found[deployment] for deployment, *_ in runs]
            flying = {deployment for deployment, *_ in self._flying.values()}
            while self._workers.in_hand < self._workers.count and (run_ := next(ahead, None)) is not None:
                if run_[0] not in self._known and run_[0] not in flying:
                    self._begin(run_)
            ticket, scored = taken(self._workers)
            if ticket in self._flying:
                deployment, _, worst = self._flying.pop(ticket)
                self._known[deployment] = worst, scored

    def _begin(self, run: Challenge) -> None:
        self._flying[self._workers.put(_challenged, (self._kept, run))] = run

    def _settles(self, asked: Costs, scored: Scored | None, worst: Costs) -> bool:
        """Whether what was found for some costs beyond which a run has lost is what would be found for no larger ones.

        A run that had lost has lost all the more; one that comes to its end would do so where it cannot be stopped.
        """
        if asked == worst or scored is None:
            return worst <= asked
        return (asked != FREE or scored.meets_slos) and self._costs(scored.metrics) <= worst


def taken(workers: Workers) -> tuple[int, Any]:
    """The ticket and the outcome of an item that is done.

    Raises
    ------
    InputError    its worker died
    """
    ticket, found = workers.take()
    if isinstance(found, Exception):
        raise InputError(f"--workers: a part of the search has no outcome: {found}")
    return ticket, found


def kept_by(workers: Workers, problem: Problem) -> Kept:
    """A problem where all workers can have it."""
    return workers.keep(pickle.dumps(problem, pickle.HIGHEST_PROTOCOL))  # which keeps arrays read-only


@lru_cache(maxsize=2)
def scorer_of(kept: Kept, like: Kept | None = None) -> Scorer:
    """In a worker: the scorer of a problem, with the facts that it has by now.

    Parameters
    ----------
    kept : a problem
    like : Kept or None    one whose costs serve as well
    """
    return Scorer(pickle.loads(kept.packed()), like=None if like is None else scorer_of(like))


def _challenged(task: tuple[_Problem, Challenge]) -> Scored | None:
    """In a worker: simulate a deployment."""
    kept, run = task
    return scorer_of(*kept).challenge(*run)


def _bounded(task: tuple[_Problem, tuple[str, ...], Callable[[Facts, Any], Any], Sequence[Any]]) -> list[Any]:
    """In a worker: what a function makes of some items."""
    kept, types, function, items = task
    facts = scorer_of(*kept).facts(*types)
    return [function(facts, item) for item in items]
