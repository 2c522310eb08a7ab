"""Attention ranks of SGLang: a scheduler, a pool and a tree each, turns taken together, forwards in lockstep.

Source: `scheduler_components/dp_attn.py` and `data_parallel_controller.py` of SGLang 0.5, read and not run, in our own
words. Before each batch all ranks exchange what they have formed: where any has a batch those without one run an empty
one beside it, each its own kind. All ranks launch and take in at the same times, as a forward ends for all at once.
Assumed: the controller knows how many requests a rank has as of the turn before, and hands requests over at the next;
where drafts are verified a rank without a batch of its own runs along without a sequence, also in the passes that make
drafts, and a batch of drafts alone is padded by its tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from apex_opt.simulator.ranks import EAGER, agree
from apex_opt.simulator.reference.sglang import SglangEngine, SglangScheduler
from apex_opt.simulator.reference.sglang_drafts import SpeculativeSglangScheduler
from apex_opt.simulator.reference.together import RankedBatch, Together

if TYPE_CHECKING:
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.ranks import Agreed, Rows
    from apex_opt.simulator.reference.sequence import Batch, Sequence


class RankedSglang(SglangScheduler):
    """Deals requests to ranks when they come, each of which forms its batches as it would alone."""

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        self.members: list[SglangScheduler] = []
        self.balanced = False
        self.dealt = 0
        self.rank_of: dict[int, int] = {}
        self.unanswered: list[int] = []

    def spread_over(self, count: int, stages: int, *, balanced: bool) -> None:
        """Make so many ranks.

        Parameters
        ----------
        count : int        ranks
        stages : int       of the pipeline
        balanced : bool    requests go to the rank that has the fewest, else in turn
        """
        settings = replace(self.settings, scheduler=self.own.of_a_rank) if count > 1 else self.settings
        kind = SglangScheduler if settings.speculation is None else SpeculativeSglangScheduler
        self.members = [kind(settings, self.free) for _ in range(count)]
        for member in self.members:
            member.spread(stages)
        self.balanced, self.unanswered = balanced, [0] * count

    @property
    def cached(self) -> int:
        """Prompt tokens found when their request was first admitted."""
        return sum(member.cached for member in self.members)

    @cached.setter
    def cached(self, value: int) -> None:
        assert value == 0

    def rest(self) -> None:
        for member in self.members:
            member.rest()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting) + sum(len(member.waiting) for member in self.members)

    def schedule(self) -> Batch:
        while self.waiting:
            self._deal(self.waiting.popleft())
        whole = RankedBatch(0)
        for member in self.members:
            batch = member.schedule()
            whole.parts.append(batch)
            whole.rows += batch.rows
            whole.preempted += batch.preempted
        return whole

    def drafts(self, batch: Batch) -> bool:
        return self.members[0].drafts(batch)

    def _deal(self, sequence: Sequence) -> None:
        """Hand a request over to a rank."""
        rank = self.dealt % len(self.members)
        if self.balanced:
            rank = self.unanswered.index(min(self.unanswered))
        self.dealt += 1
        self.rank_of[sequence.id] = rank
        self.unanswered[rank] += 1
        self.members[rank].waiting.append(sequence)

    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        assert isinstance(batch, RankedBatch)
        answered: list[Sequence] = []
        for rank, (member, part) in enumerate(zip(self.members, batch.parts, strict=True)):
            done = member.update(part, now_ns)
            self.unanswered[rank] -= len(done)
            answered += done
        return answered


class SglangRanks(Together, SglangEngine):
    """Ranks that take the turns of SGLang's loop together."""

    idle_rows = []  # noqa: RUF012
    scheduler: RankedSglang

    def __init__(self, pool: EnginePool, *, log: bool) -> None:
        super().__init__(pool, log=log, scheduler=RankedSglang)
        assert pool.ranks is not None
        self.scheduler.spread_over(pool.ranks.count, len(pool.laws), balanced=pool.ranks.balanced)

    def agreed(self, parts: list[Rows]) -> Agreed:
        """Where no graph runs nobody is padded."""
        agreed = agree(self.ranks.padding, parts, self.draft_tokens, self.ranks.splitting)
        if agreed.mode != EAGER:
            return agreed
        return agreed._replace(padded=[sum(tokens for tokens, _ in rows) for rows in parts])

    def served(self) -> dict[int, int]:
        return self.scheduler.rank_of
