"""From the cells of a stage to the law of ranks that run in step: what each does for itself, and what all share.

Attention, and whatever goes along with it, is a rank's own: a forward waits for the slowest. What copies of the FFN do
with the tokens of several ranks, and the collectives that gather these, is shared: its tables go by the mean tokens of
a rank, rounded up, as a forward of so many tokens on every rank.
"""

from __future__ import annotations

from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cost.cells import Operations
from apex_opt.cost.halves import Layers, halves_of
from apex_opt.cost.least import Least
from apex_opt.cost.stage import add_up_pieces, cut_of
from apex_opt.cost.tables import Parts, Tables
from apex_opt.cost.work import Work
from apex_opt.plans.memory import stage_runs
from apex_opt.simulator.law import no_table
from apex_opt.simulator.ranks import EAGER, FULL, PIECEWISE, Padding, Ranks, SharedLaw

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.cost.stage import Named, Piece, Pieces, StageCosts
    from apex_opt.cost.work import Floats
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator.law import BatchLaw

_TOGETHER: Final = ("together decode", "together mixed", "together eager", "together draft")
_KEPT: Final = 64


def in_step(plan: Plan) -> bool:
    """Whether the attention copies of a plan share more than an address: whole copies run on their own."""
    return plan.attention.dp != plan.ffn.dp


class RankCosts:
    """Costs of stages whose attention copies are ranks, on GPUs of one type, at one clock and within one set of limits.

    Parameters
    ----------
    costs : StageCosts    of the same, with the limits of one rank
    """

    def __init__(self, costs: StageCosts) -> None:
        self._costs = costs
        self._own = costs.operations.as_own()
        # What is sent to experts may be hidden where forwards are split.
        self._computing = self._own.hiding()
        self._of_all: dict[tuple[int, int], Operations] = {}
        self._stages = lru_cache(maxsize=_KEPT)(self._stage)
        drafting = costs.drafts > 0
        self._least_own = cache(lambda count, *what: costs.piece(*what).least.of_a_rank(count, drafting=drafting))
        self._least_of_all = cache(lambda count, *what: _together(costs.piece(*what)).by_mean(count))

    def stage(self, plan: Plan, index: int, layout: Layout) -> tuple[BatchLaw, SharedLaw, Pieces]:
        """A rank's own law, what all ranks share, and the operations of one stage of a plan.

        Parameters
        ----------
        plan
        index : int    of the stage
        layout
        """
        runs, last = stage_runs(self._costs.model, plan.layers)[index], index == plan.stages - 1
        overlapped = self._costs.settings.async_scheduling or plan.stages > 1
        return self._stages(cut_of(plan), layout, self._costs.named(runs), index == 0, last, overlapped)

    def _stage(
        self, plan: Plan, layout: Layout, named: Named, first: bool, last: bool, overlapped: bool
    ) -> tuple[BatchLaw, SharedLaw, Pieces]:
        """One stage of a plan cut so, as `StageCosts` has it."""
        costs, tables, within = self._costs, self._costs.tables, layout.of_stage
        runs = costs.runs_of(named)
        captured, launched = costs.kernels(plan, runs)
        launched += costs.drafting(plan) if last else 0
        own = list(costs.looked_up(plan, within, runs, (first, last), costs.piece, self._own))
        seconds = costs.sum_of(own)
        together: list[tuple[int, Piece]] = []
        halves, more = None, Parts()
        if in_step(plan):
            for operations in self._operations(plan):
                found = list(costs.looked_up(plan, within, runs, (False, False), costs.piece, operations))
                if last and plan.speculation is not None:
                    found.append((1, costs.piece(*costs.made_by_drafts(plan, within, operations))))
                together += [(n, piece) for n, piece in found if piece.parts]
            shared = self._sum_of(together)
            # What a rank computes of a forward of so many tokens on average, which its launches may take longer than.
            mean = np.minimum(tables.tokens, len(tables.sequences) - 1)
            busy = {
                "decode": seconds["decode_ns"][mean] + seconds.get("verify_ns", 0.0) + shared["together decode"],
                "mixed": seconds["mixed_ns"] + seconds["chunk_ns"] + shared["together mixed"],
            }
            engine_of_all = self._engine(overlapped, captured, launched, busy)
            if plan.overlap is not None:
                computing = self._computing
                made = list(
                    costs.looked_up(
                        plan,
                        within,
                        runs,
                        (first, last),
                        lambda *what: (what[0] == computing.head, costs.piece(*what)),
                        computing,
                    )
                )
                halves, more = halves_of(
                    costs,
                    Layers(
                        own=[(n, piece) for n, (is_head, piece) in made if not is_head],
                        head=[(n, piece) for n, (is_head, piece) in made if is_head],
                        together=together,
                        sent=self._own.sent(runs, plan.attention, plan.ffn, layout),
                        number=sum(run.count for run in runs),
                        captured=captured,
                        launched=launched,
                        step_s=costs.overhead.step_s if overlapped else costs.overhead.blocking_step_s,
                        engine=engine_of_all,
                    ),
                )
            together.append((1, costs.summed(engine_of_all)))
            each = Work.waiting(costs.profile.power, costs.overhead.sequence_s * tables.sequences.astype(np.float64))
            engine = costs.summed({("engine", "decode_ns"): each, ("engine", "sequence_ns"): each})
        else:
            engine = costs.summed(costs.engine(overlapped, captured, launched, seconds, 1))
        for table, values in engine.seconds.items():
            seconds[table] += values
        seconds["transfer_ns"] = np.zeros(len(tables.tokens))
        if not last:
            whole = next(self._operations(plan))
            seconds["transfer_ns"] = whole.transfer(costs.model, plan.attention, layout)
        shared = self._sum_of(together)
        sums = SharedLaw(
            padded_ns=np.zeros_like(tables.tokens),
            decode_ns=costs.integers(shared["together decode"]),
            mixed_ns=costs.integers(shared["together mixed"]),
            eager_ns=costs.integers(shared["together eager"]),
            graph_ns=np.zeros(3, np.int64),
            per=plan.attention.dp if in_step(plan) else 1,
            draft_ns=costs.integers(shared["together draft"]) if costs.drafts and in_step(plan) else no_table(),
            halves=halves,
        )
        law = costs.launched(costs.law_of(seconds, drafts=costs.drafts), launched)
        return law, sums, (*own, *together, (1, engine), (1, costs.summed(more)))

    def group(self, plan: Plan, shared: Sequence[SharedLaw]) -> Ranks:
        """The ranks of a replica of a plan.

        A batch that only decodes is padded to the next captured size and runs as one graph, another one with few tokens
        as graphs of its pieces, both as the engine has them. Messages among ranks take no time.
        """
        tables, overhead = self._costs.tables, self._costs.overhead
        largest = max(overhead.captured_sizes, default=0)
        alone = tables.sequences if tables.verified is None else tables.tokens
        padding = Padding(
            decode_mode=np.where(alone <= largest, FULL, EAGER),
            decode_rows=tables.alone[1],
            mixed_mode=np.where(tables.tokens <= overhead.captured_tokens, PIECEWISE, EAGER),
            mixed_rows=tables.tokens,
        )
        return Ranks(
            count=plan.attention.dp,
            lockstep=in_step(plan),
            balanced=self._costs.settings.scheduler.balances_ranks,
            padding=padding,
            shared=tuple(shared),
            splitting=None if plan.overlap is None else self._costs.settings.scheduler.splitting,
        )

    def _operations(self, plan: Plan) -> Iterator[Operations]:
        """Operations on the tokens of all ranks, for each number of parts that these are dealt to."""
        costs, count = self._costs, plan.attention.dp
        whole = costs.operations
        for parts in sorted({1, plan.ffn.dp}):
            key = count, parts
            if key not in self._of_all:
                tokens = -(-count * costs.tables.tokens // parts)
                tables = Tables(tokens, costs.tables.sequences, costs.tables.padded)
                fused = tuple(whole.fused)
                made = Operations(
                    tables,
                    costs.profile,
                    costs.collectives,
                    whole.routing,
                    fused,
                    whole.held,
                    by_block=whole.by_block,
                    experts_flops_per_s=whole.experts_flops_per_s,
                )
                made.role, made.called = parts, whole.called
                self._of_all[key] = made
            yield self._of_all[key]

    def _sum_of(self, pieces: Sequence[tuple[int, Piece]]) -> dict[str, Floats]:
        """Sums of what all ranks do together, per table."""
        tables = self._costs.tables
        by = {"together draft": tables.sequences}
        seconds = {name: np.zeros(len(by.get(name, tables.tokens))) for name in _TOGETHER}
        add_up_pieces(seconds, pieces)
        return seconds

    def _engine(self, overlapped: bool, captured: int, launched: int, busy: dict[str, Floats]) -> Parts:
        """The engine's own time in a forward of all ranks: see `StageCosts.engine`.

        Parameters
        ----------
        overlapped : bool               whether the host forms the next batch while this one runs
        captured, launched : int        kernels of a forward, from captured graphs and one by one
        busy : dict of float64[n]       seconds of those of a forward, by the mean tokens of a rank
        """
        overhead, power, some = self._costs.overhead, self._costs.profile.power, self._costs.tables.tokens > 0
        step_s = overhead.step_s if overlapped else overhead.blocking_step_s
        step_s += captured * self._costs.operations.gap_s
        decode, mixed = np.where(some, step_s, 0.0), np.where(some, step_s + overhead.mixed_step_s, 0.0)
        launch_s = launched * overhead.launch_s
        waiting = np.where(some, np.maximum(launch_s - busy["mixed"] - mixed, 0.0), 0.0)
        if not overhead.captured_sizes:
            decode = decode + np.where(some, np.maximum(launch_s - busy["decode"] - decode, 0.0), 0.0)
        return {
            ("engine", "together decode"): Work.waiting(power, decode),
            ("engine", "together mixed"): Work.waiting(power, mixed),
            ("engine", "together eager"): Work.waiting(power, waiting),
        }

    def least_parts(self, plan: Plan, layout: Layout) -> Iterator[tuple[int, Least]]:
        """What a forward takes at least, piece by piece: no less than the mean of the ranks' own and what all share.

        Parameters
        ----------
        plan
        layout : Layout    of a stage
        """
        costs, count = self._costs, plan.attention.dp
        # Sending may be hidden; a half is no cheaper than the share of its tokens in the least of any batch.
        own = self._own if plan.overlap is None else self._computing
        yield from costs.least_of(plan, layout, partial(self._least_own, count), own)
        if in_step(plan):
            for operations in self._operations(plan):
                least = partial(self._least_of_all, count)
                yield from costs.least_of(plan, layout, least, operations, ends=False)
                if plan.speculation is not None:
                    yield 1, least(*costs.made_by_drafts(plan, layout, operations))
        gaps = costs.kernels(plan, costs.model.runs)[0] * costs.operations.gap_s
        yield 1, Least.of_every(gaps, gaps)

    def stage_least(self, plan: Plan) -> Least:
        """What a forward takes at least on every stage of a plan beside its layers."""
        overhead = self._costs.overhead
        step_s = overhead.blocking_step_s
        if self._costs.settings.async_scheduling or plan.stages > 1:
            step_s = overhead.step_s
        return Least.of_every(step_s, step_s + overhead.mixed_step_s)


def _together(piece: Piece) -> Least:
    """The least of a piece that ranks do together."""
    return Least.together(piece.parts, piece.seconds)
