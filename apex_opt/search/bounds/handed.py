"""What no run can beat of two pools of which one computes prompts and the other one answers them.

Why it is admissible. The first token is the decode pool's: it comes after the prompt was computed, the answer of the
prefill pool was passed on, the blocks were read, which with prefix caching may all be there, and a batch of the decode
pool computed the last token of the prompt; all of these have floors of their own (`isolated`). The times after it are
those of the decode pool. Neither pool takes less time than all requests together take of it (`load`), and both are
there for the whole run: all GPUs idle for all of it.
Of SGLang the first token is the prefill pool's, and comes once the last of the prompt was sent on.
Where one pool is not chosen yet it has the best of everything that its options have, request by request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.search.bounds.compose import Compose, rows_of, stacked
from apex_opt.search.ledger import ROUNDING
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.run import Run
    from apex_opt.search.bounds.compose import Help
    from apex_opt.search.option import Option
    from apex_opt.search.pairs import Pairs
    from apex_opt.search.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


class Handed(Compose):
    """Floors of a prefill and a decode pool, as `Compose` has them of pools side by side.

    Parameters
    ----------
    problem : Problem
    outside_ns : int    time of a request outside the engine
    pairs : Pairs
    """

    def __init__(self, problem: Problem, outside_ns: int, pairs: Pairs) -> None:
        super().__init__(problem, outside_ns)
        assert problem.handover is not None  # where there may be such pools
        self._pairs, self._proxy_ns = pairs, problem.handover.proxy_ns
        self._pushed = isinstance(problem.settings.scheduler, SglangScheduling)
        trace, settings = problem.trace, problem.settings
        self._blocks = -(-trace.prompt // settings.block_size)
        # Prompts may all be found in a cache; each answered token is computed, the first as the last of its prompt.
        self._computed_by = {
            "prefill": len(trace) if settings.prefix_caching else int(trace.prompt.sum()),
            "decode": int((self._steps if self._pushed else self._tokens).sum()),
        }

    def of(self, deployments: Sequence[tuple[Option, ...]]) -> tuple[Run, NDArray[np.bool_]]:
        """Floors of pairs of pools.

        Returns
        -------
        Run              a row for each
        bool[k]          whether the two go together
        """
        fit = np.array([not self.lost(one) for one in deployments])
        prefill, decode = zip(*deployments, strict=True)
        between = np.zeros((len(deployments), len(self._tokens)), np.int64)
        for row, (one, other) in enumerate(deployments):
            if fit[row]:
                between[row] = self._between(one, other)
        first = stacked(prefill, "first_ns") + between + (0 if self._pushed else stacked(decode, "first_ns"))
        load_s = np.array([max(self._load_s(one), self._load_s(other)) for one, other in deployments])
        batch_ns = rows_of([(one,) for one in decode], "batch_ns")
        run = self._run(first, stacked(decode, "rest_ns"), None, load_s, self._gaps(batch_ns), batch_ns)
        above_j = np.array([[self._above_j(option) for option in one] for one in deployments])
        idle_w, limit_w = rows_of(deployments, "idle_w"), rows_of(deployments, "limit_w")
        prices = rows_of(deployments, "cost_per_h").sum(axis=1)
        return self._costing(run, above_j, idle_w, limit_w, prices), fit

    def lost(self, deployment: tuple[Option, ...]) -> str:
        """The family that a pair breaks, if any."""
        prefill, decode = deployment
        return self._pairs.lost(prefill.pool, decode.pool)

    def with_help(self, deployments: Sequence[tuple[Option, ...]], help_: Help) -> Run:
        """Floors of any pairs of one pool and of others that are not chosen yet."""
        options = [one for (one,) in deployments]
        role = options[0].pool.role
        first = stacked(options, "first_ns") + self._proxy_ns + help_.first_ns
        if self._pushed:
            first = stacked(options, "first_ns")
            first = first if role == "prefill" else np.broadcast_to(help_.first_ns, first.shape)
        if role == "prefill":
            rest, batch_ns = np.broadcast_to(help_.rest_ns, first.shape), np.full((len(options), 1), help_.batch_ns)
        else:
            rest, batch_ns = stacked(options, "rest_ns"), rows_of(deployments, "batch_ns")
        load_s = np.array([self._load_s(one) for one in options])
        run = self._run(first, rest, None, load_s, self._gaps(batch_ns), batch_ns)
        beside = sum(self._computed_by.values()) - self._computed_by[role or "decode"]
        above_j = np.array([self._above_j(one) for one in options]) + help_.token_j * beside
        idle_w = np.array([one.idle_w for one in options]) + help_.idle_w
        # Least where one of them draws all it may and the others idle.
        limit_w = idle_w + np.minimum([one.limit_w - one.idle_w for one in options], help_.spare_w)
        # Added up in another order they may be less.
        prices = (np.array([one.cost_per_h for one in options]) + help_.cost_per_h) * (1 - ROUNDING)
        return self._costing(run, above_j[:, None], idle_w[:, None], limit_w[:, None], prices)

    def _between(self, prefill: Option, decode: Option) -> Ints:
        """From the end of a prompt on the prefill pool until the decode pool has it, at least."""
        handover = self._pairs.handover(prefill.pool, decode.pool)
        if self._pushed:  # the last of what is sent, and the word that there is room
            return np.full(len(self._blocks), handover.read_ns + handover.block_ns + 2 * handover.notice_ns)
        if self._problem.settings.prefix_caching:
            return np.full(len(self._blocks), handover.proxy_ns)
        return handover.proxy_ns + handover.read_ns + handover.block_ns * self._blocks

    def _load_s(self, option: Option) -> float:
        """Seconds for which all requests together keep a pool busy."""
        total_ns = float(option.work_ns.sum()) / option.pool.plan.replicas
        if option.pool.role == "decode":
            total_ns = max(total_ns, int(self._steps.sum()) * option.step_ns, int(self._held.sum()) * option.held_ns)
        return total_ns / NS_PER_S

    def _above_j(self, option: Option) -> float:
        return option.token_j * self._computed_by[option.pool.role or "decode"]

    def _gaps(self, batch_ns: Ints) -> Ints:
        """Times between tokens, all of them the decode pool's."""
        return np.full(batch_ns.shape, self._steps.sum())
