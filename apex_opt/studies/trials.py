"""Who tries deployments at rates: this process, or workers who do it for the search.

Both find the same: a worker gets all that an outcome depends on, and one that was found ahead of its turn is taken only
where it is then asked for with the very same.
"""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

from apex_opt.search.best_first import Unfinished
from apex_opt.search.spread import kept_by, scorer_of, taken
from apex_opt.studies.steady import Late, Steady

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.search.spread import Kept, Workers

    Function = Callable[..., Any]
    """Tries a deployment, by a `Steady` and further arguments; raises `Late` when the time is up."""
    Arguments = tuple[Any, ...]
    """Those of a trial, which can be told apart."""

LATE: Final = Unfinished.LATE


class Trials(Protocol):
    """Who tries."""

    def __call__(
        self, function: Function, asked: Sequence[Arguments], ahead: Iterable[Arguments]
    ) -> Sequence[Any | Unfinished]:
        """What a function of a module makes of some arguments each, after the judge of rates; `LATE` where it is late.

        Parameters
        ----------
        function
        asked : of these
        ahead : what comes next, unless these change that; what is idle may begin with them
        """
        ...


class Here:
    """This process, with trials side by side.

    Parameters
    ----------
    steady : Steady    judges deployments at rates
    """

    def __init__(self, steady: Steady) -> None:
        self._steady = steady

    def __call__(
        self, function: Function, asked: Sequence[Arguments], ahead: Iterable[Arguments]
    ) -> Sequence[Any | Unfinished]:
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
            return list(threads.map(lambda arguments: _tried(self._steady, function, arguments), asked))


class Elsewhere:
    """Workers, who make their own judge of rates.

    Parameters
    ----------
    steady : Steady      of the problem; it counts the runs of the trials that are taken
    workers : Workers
    """

    def __init__(self, steady: Steady, workers: Workers) -> None:
        like = steady.own.like
        self._steady, self._workers = steady, workers
        self._kept = (
            kept_by(workers, steady.problem),
            None if like is None else kept_by(workers, like.problem),
        )
        self._flying: dict[int, Arguments] = {}
        self._known: dict[Arguments, tuple[Any | Unfinished, int]] = {}

    def __call__(
        self, function: Function, asked: Sequence[Arguments], ahead: Iterable[Arguments]
    ) -> Sequence[Any | Unfinished]:
        for arguments in asked:
            self._begin(function, arguments)
        ahead = iter(ahead)
        while any(arguments not in self._known for arguments in asked):
            while self._workers.in_hand < self._workers.count and (next_ := next(ahead, None)) is not None:
                self._begin(function, next_)
            ticket, outcome = taken(self._workers)
            if ticket in self._flying:  # what others had put before is of no use any more
                self._known[self._flying.pop(ticket)] = outcome
        found = [self._known[arguments] for arguments in asked]
        self._steady.count(sum(runs for _, runs in found))
        return [outcome for outcome, _ in found]

    def _begin(self, function: Function, arguments: Arguments) -> None:
        if arguments not in self._known and arguments not in self._flying.values():
            self._flying[self._workers.put(_at_work, (*self._kept, function, arguments))] = arguments


def _tried(steady: Steady, function: Function, arguments: Arguments) -> Any | Unfinished:
    try:
        return function(steady, *arguments)
    except Late:
        return LATE


@lru_cache(maxsize=1)
def _judge(kept: Kept, like: Kept | None) -> Steady:
    """In a worker: the judge of a problem, with the facts that it has by now."""
    return Steady(pickle.loads(kept.packed()), None if like is None else scorer_of(like))


def _at_work(task: tuple[Kept, Kept | None, Function, Arguments]) -> tuple[Any | Unfinished, int]:
    """In a worker: what a function makes of its arguments, and the runs that this took."""
    kept, like, function, arguments = task
    steady = _judge(kept, like)
    steady.forget()
    before = steady.simulations
    outcome = _tried(steady, function, arguments)
    return outcome, steady.simulations - before
