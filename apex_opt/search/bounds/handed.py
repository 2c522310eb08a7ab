"""What no run can beat of two pools of which one computes prompts and the other one answers them.

Why it is admissible. The first token is the decode pool's: it comes after the prompt was computed, the answer of the
prefill pool was passed on, the blocks were read, which with prefix caching may all be there, and a batch of the decode
pool computed the last token of the prompt; all of these have floors of their own (`isolated`). The times after it are
those of the decode pool. Neither pool takes less time than all requests together take of it (`load`), and both are
there for the whole run: all GPUs idle for all of it.
Where one pool is not chosen yet it has the best of everything that its options have, request by request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.figures.run import Run
from apex_opt.search.bounds.compose import BLOCK, rows_of, stacked
from apex_opt.search.ledger import ROUNDING
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.search.bounds.compose import Help
    from apex_opt.search.option import Option
    from apex_opt.search.pairs import Pairs
    from apex_opt.search.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


class Handed:
    """Floors of a prefill and a decode pool, as `Compose` has them of pools side by side.

    Parameters
    ----------
    problem : Problem
    outside_ns : int    time of a request outside the engine
    pairs : Pairs
    """

    def __init__(self, problem: Problem, outside_ns: int, pairs: Pairs) -> None:
        self._problem, self._outside_ns, self._pairs = problem, outside_ns, pairs
        trace, settings = problem.trace, problem.settings
        assert problem.handover is not None  # where there may be such pools
        self._proxy_ns = int(problem.handover.proxy_us * 1000)
        self._tokens = trace.generated(settings.max_model_len)
        self._steps = int((self._tokens - 1).sum())
        self._blocks = -(-trace.prompt // settings.block_size)
        self._held = int(((self._tokens - 1) * self._blocks).sum())
        # Prompts may all be found in a cache; each answered token is computed, the first as the last of its prompt.
        self._computed = {
            "prefill": len(trace) if settings.prefix_caching else int(trace.prompt.sum()),
            "decode": int(self._tokens.sum()),
        }

    @property
    def at_once(self) -> int:
        """Deployments that fit in the memory meant for it."""
        return max(1, BLOCK // len(self._tokens))

    def of(self, deployments: Sequence[tuple[Option, ...]]) -> tuple[Run, NDArray[np.bool_]]:
        """Floors of pairs of pools.

        Returns
        -------
        Run              a row for each
        bool[k]          whether the two go together
        """
        fit = np.array([self._pairs.fit(one.pool, other.pool) for one, other in deployments])
        prefill, decode = zip(*deployments, strict=True)
        between = np.zeros((len(deployments), len(self._tokens)), np.int64)
        for row, (one, other) in enumerate(deployments):
            if fit[row]:
                between[row] = self._between(one, other)
        first = stacked(prefill, "first_ns") + between + stacked(decode, "first_ns")
        load_s = np.array([max(self._load_s(one), self._load_s(other)) for one, other in deployments])
        run = self._run(first, stacked(decode, "rest_ns"), load_s, rows_of([(one,) for one in decode], "batch_ns"))
        above_j = np.array([[self._above_j(option) for option in one] for one in deployments])
        makespan_s = run.makespan_s[:, None]
        idle_w, limit_w = rows_of(deployments, "idle_w"), rows_of(deployments, "limit_w")
        each = np.minimum(above_j + idle_w * makespan_s, limit_w * makespan_s)
        return self._costing(run, each.sum(axis=1), rows_of(deployments, "cost_per_h").sum(axis=1)), fit

    def with_help(self, deployments: Sequence[tuple[Option, ...]], help_: Help) -> Run:
        """Floors of any pairs of one pool and of others that are not chosen yet."""
        options = [one for (one,) in deployments]
        role = options[0].pool.role
        if role == "prefill":
            first = stacked(options, "first_ns") + self._proxy_ns + help_.first_ns
            rest, batch_ns = np.broadcast_to(help_.rest_ns, first.shape), np.full((len(options), 1), help_.batch_ns)
        else:
            first = help_.first_ns + self._proxy_ns + stacked(options, "first_ns")
            rest, batch_ns = stacked(options, "rest_ns"), rows_of(deployments, "batch_ns")
        run = self._run(first, rest, np.array([self._load_s(one) for one in options]), batch_ns)
        beside = sum(self._computed.values()) - self._computed[role or "decode"]
        above_j = np.array([self._above_j(one) for one in options]) + help_.token_j * beside
        idle_w = np.array([one.idle_w for one in options])
        spare_w = np.minimum([one.limit_w - one.idle_w for one in options], help_.spare_w)
        # Least where one of them draws all it may and the others idle.
        joules = np.minimum(above_j, spare_w * run.makespan_s) + (idle_w + help_.idle_w) * run.makespan_s
        prices = np.array([one.cost_per_h for one in options]) + help_.cost_per_h
        return self._costing(run, joules, prices * (1 - ROUNDING))  # added up in another order they may be less

    def _between(self, prefill: Option, decode: Option) -> Ints:
        """From the end of a prompt on the prefill pool until the decode pool has it, at least."""
        handover = self._pairs.handover(prefill.pool, decode.pool)
        if self._problem.settings.prefix_caching:
            return np.full(len(self._blocks), handover.proxy_ns)
        return handover.proxy_ns + handover.read_ns + handover.block_ns * self._blocks

    def _load_s(self, option: Option) -> float:
        """Seconds for which all requests together keep a pool busy."""
        total_ns = float(option.work_ns.sum()) / option.pool.plan.replicas
        if option.pool.role == "decode":
            total_ns = max(total_ns, self._steps * option.step_ns, self._held * option.held_ns)
        return total_ns / NS_PER_S

    def _above_j(self, option: Option) -> float:
        return option.token_j * self._computed[option.pool.role or "decode"]

    def _run(self, first_ns: Ints, rest_ns: Ints, load_s: Floats, batch_ns: Ints) -> Run:
        trace = self._problem.trace
        return Run.of(
            arrival_ns=trace.arrival_ns,
            first_ns=first_ns,
            rest_ns=rest_ns,
            prompt=trace.prompt,
            tokens=self._tokens,
            outside_ns=self._outside_ns,
            work_s=load_s,
            gap_ns=batch_ns,
            gaps=np.full(batch_ns.shape, self._steps),
            limits=self._problem.per_request,
        )

    def _costing(self, run: Run, joules: Floats, cost_per_h: Floats) -> Run:
        known = None if np.isnan(cost_per_h).any() else cost_per_h
        return run.costing(joules * (1 - ROUNDING), known)
