"""What no run of several pools side by side can beat: of many deployments at once, without simulating them.

Why it is admissible. How requests are dealt is known beforehand, so each has the floor of the pool it goes to
(`isolated`); a floor found for the whole trace holds for a pool with fewer requests and clients. A pool takes no less
time than its own requests together take of it (`load`), and a run lasts as long as that of its slowest pool. All GPUs
idle for all of that time. A gap between tokens takes one batch at least.
Where a pool is not chosen yet it has the best of everything that its options have, request by request: what is out of
reach with that help is out of reach with any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from apex_opt.figures.run import Run
from apex_opt.search.dealing import dealt, most_pools
from apex_opt.search.ledger import ROUNDING
from apex_opt.units import NS_PER_S, add_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.search.option import Option
    from apex_opt.search.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

BLOCK: Final = 1 << 21
"""Requests of deployments that are looked at together: a few arrays of so many numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Help:
    """The best of everything that pools not chosen yet may have.

    Parameters
    ----------
    first_ns, rest_ns, whole_ns : int64[n]    of any of them
    batch_ns, token_j : int, float            of any of them
    idle_w, cost_per_h : float               of one of each pool together
    spare_w : float                           what any of them may draw above its idle draw
    """

    first_ns: Ints
    rest_ns: Ints
    whole_ns: Ints
    batch_ns: int
    token_j: float
    idle_w: float
    cost_per_h: float
    spare_w: float

    @classmethod
    def of(cls, pools: Sequence[Sequence[Option]]) -> Self:
        """The help of any option of each pool."""
        every = [option for options in pools for option in options]
        return cls(
            first_ns=np.minimum.reduce([option.first_ns for option in every]),
            rest_ns=np.minimum.reduce([option.rest_ns for option in every]),
            whole_ns=np.minimum.reduce([option.first_ns + option.rest_ns for option in every]),
            batch_ns=min(option.batch_ns for option in every),
            token_j=min(option.token_j for option in every),
            idle_w=add_up(min(option.idle_w for option in options) for options in pools),
            cost_per_h=add_up(min(option.cost_per_h for option in options) for options in pools),
            spare_w=min(option.limit_w - option.idle_w for option in every),
        )


class Compose:
    """Floors of deployments of several pools.

    Parameters
    ----------
    problem : Problem
    outside_ns : int    time of a request outside the engine
    """

    def __init__(self, problem: Problem, outside_ns: int) -> None:
        self._problem, self._outside_ns = problem, outside_ns
        trace, settings = problem.trace, problem.settings
        prompts = np.zeros_like(trace.prompt) if settings.prefix_caching else trace.prompt  # a cache may hold any
        self._tokens = trace.generated(settings.max_model_len)
        self._steps = self._tokens - 1
        self._held = self._steps * -(-trace.prompt // settings.block_size)
        self._computed = self._steps + prompts

    @property
    def at_once(self) -> int:
        """Deployments that fit in the memory meant for it."""
        return max(1, BLOCK // len(self._steps))

    def of(self, deployments: Sequence[tuple[Option, ...]]) -> tuple[Run, NDArray[np.bool_]]:
        """Floors of deployments of as many pools.

        Returns
        -------
        Run              a row for each
        bool[k]          whether each pool has a request, and in a closed loop a client
        """
        trace, shape = self._problem.trace, (len(deployments), len(deployments[0]))
        owner = dealt(np.array([[option.weight for option in one] for one in deployments]), len(trace))
        first, rest = (np.zeros(owner.shape, np.int64) for _ in range(2))
        load_s, above_j = np.zeros(len(deployments)), np.zeros(shape)
        gaps, served = np.zeros(shape, np.int64), np.full(len(deployments), most_pools(trace) >= shape[1])
        for index, options in enumerate(zip(*deployments, strict=True)):
            mine = owner == index
            first = np.where(mine, stacked(options, "first_ns"), first)
            rest = np.where(mine, stacked(options, "rest_ns"), rest)
            gaps[:, index] = mine @ self._steps
            replicas = [option.pool.plan.replicas for option in options]
            for total_ns in (
                np.where(mine, stacked(options, "work_ns"), 0.0).sum(axis=1) / replicas,
                (mine @ self._held) * stacked(options, "held_ns"),
                gaps[:, index] * stacked(options, "step_ns"),
            ):
                load_s = np.maximum(load_s, total_ns / NS_PER_S)
            above_j[:, index] = (mine @ self._computed) * stacked(options, "token_j")
            served &= mine.any(axis=1)
        run = self._run(first, rest, None, load_s, gaps, rows_of(deployments, "batch_ns"))
        idle_w, limit_w = rows_of(deployments, "idle_w"), rows_of(deployments, "limit_w")
        prices = np.array([add_up(option.cost_per_h for option in one) for one in deployments])
        return self._costing(run, above_j, idle_w, limit_w, prices), served

    def lost(self, deployment: tuple[Option, ...]) -> str:
        """The family that a deployment breaks whose pools do not go together: one of them has nothing to do."""
        return "share"

    def with_help(self, deployments: Sequence[tuple[Option, ...]], help_: Help) -> Run:
        """Floors of any deployments of some pools and of others not chosen yet, whatever their shares."""
        first, rest, whole = help_.first_ns, help_.rest_ns, help_.whole_ns
        for options in zip(*deployments, strict=True):
            own_first, own_rest = stacked(options, "first_ns"), stacked(options, "rest_ns")
            first, rest = np.minimum(own_first, first), np.minimum(own_rest, rest)
            whole = np.minimum(own_first + own_rest, whole)
        size = len(deployments)
        gaps = np.full((size, 1), self._steps.sum())
        batch_ns = np.minimum(rows_of(deployments, "batch_ns").min(axis=1), help_.batch_ns)[:, None]
        run = self._run(first, rest, whole, np.zeros(size), gaps, batch_ns)
        own_idle, own_limit = rows_of(deployments, "idle_w"), rows_of(deployments, "limit_w")
        idle_w = own_idle.sum(axis=1) + help_.idle_w
        # Least where one of them draws all it may and the others idle.
        limit_w = idle_w + np.minimum((own_limit - own_idle).min(axis=1), help_.spare_w)
        token_j = np.minimum(rows_of(deployments, "token_j").min(axis=1), help_.token_j)
        prices = rows_of(deployments, "cost_per_h").sum(axis=1) + help_.cost_per_h
        # Added up in another order they may be less.
        prices = prices * (1 - ROUNDING)
        above_j = token_j * self._computed.sum()
        return self._costing(run, above_j[:, None], idle_w[:, None], limit_w[:, None], prices)

    def _run(
        self, first_ns: Ints, rest_ns: Ints, whole_ns: Ints | None, load_s: Floats, gaps: Ints, gap_ns: Ints
    ) -> Run:
        trace = self._problem.trace
        return Run.of(
            arrival_ns=trace.arrival_ns,
            first_ns=first_ns,
            rest_ns=rest_ns,
            whole_ns=whole_ns,
            prompt=trace.prompt,
            tokens=self._tokens,
            outside_ns=self._outside_ns,
            work_s=load_s,
            gap_ns=gap_ns,
            gaps=gaps,
            limits=self._problem.per_request,
        )

    def _costing(self, run: Run, above_j: Floats, idle_w: Floats, limit_w: Floats, cost_per_h: Floats) -> Run:
        """With the least energy: pool by pool what it draws above its idle draw, and no more than it may."""
        makespan_s = run.makespan_s[:, None]
        each = np.minimum(above_j + idle_w * makespan_s, limit_w * makespan_s)
        known = None if np.isnan(cost_per_h).any() else cost_per_h
        return run.costing(each.sum(axis=1) * (1 - ROUNDING), known)


def stacked(options: Sequence[Option], of: str) -> NDArray[Any]:
    """A field of each option, one after the other."""
    return np.stack([np.asarray(getattr(option, of)) for option in options])


def rows_of(deployments: Sequence[tuple[Option, ...]], of: str) -> NDArray[Any]:
    """A field of each pool of each deployment."""
    return np.array([[getattr(option, of) for option in one] for one in deployments])
