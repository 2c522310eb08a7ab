"""Attention ranks of TensorRT-LLM: a scheduler and a pool each, one loop for all, forwards in lockstep.

Source: `_fetch_new_requests_attention_dp`, `_balance_requests_across_ranks` and `_balance_adp_requests` of
`tensorrt_llm/_torch/pyexecutor` (1.1/1.2 line), read and not run, in our own words. What a rank without requests runs
with the others is a sequence of one token. Assumed: ranks agree on a forward as `simulator.ranks` has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.simulator.reference.together import RankedBatch, Together
from apex_opt.simulator.reference.trtllm import TrtllmScheduler
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.reference.sequence import Batch, Sequence


class RankedScheduler(TrtllmScheduler):
    """Deals requests to ranks when they come, and holds their prompts back so that ranks compute some together."""

    def __init__(self, settings: EngineSettings, blocks: int, stages: int, ranks: int) -> None:
        super().__init__(settings, blocks, stages)
        self.members = [TrtllmScheduler(settings, blocks, stages) for _ in range(ranks)]
        self.waited_for_some = self.waited_on = 0
        self.rank_of: dict[int, int] = {}

    @property
    def unfinished(self) -> bool:
        return bool(self.waiting) or any(member.unfinished for member in self.members)

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return len(self.waiting) + sum(len(member.waiting) for member in self.members)

    def schedule(self) -> Batch:
        self.deal()
        chosen = [member.choose() for member in self.members]
        held = self.own.adp_balance and self.balance([(len(decoding), len(prompts)) for _, decoding, prompts in chosen])
        whole = RankedBatch(0)
        for member, (batch, decoding, prompts) in zip(self.members, chosen, strict=True):
            whole.parts.append(member.form(batch, decoding, [] if held else prompts))
            whole.rows += batch.rows
            whole.preempted += batch.preempted
        self.cached = sum(member.cached for member in self.members)
        return whole

    def deal(self) -> None:
        """Longest prompts first, each to the rank with the fewest prompt tokens of those below the mean load."""
        seats = self.settings.max_num_seqs * self.stages
        active = [len(member.running) + len(member.waiting) for member in self.members]
        taken = [self.waiting.popleft() for _ in range(min(len(self.waiting), seats * len(active) - sum(active)))]
        tokens = [sum(sequence.prompt for sequence in (*member.running, *member.waiting)) for member in self.members]
        mean = ceil_div(sum(active) + len(taken), len(active))
        for sequence in sorted(taken, key=lambda one: -one.prompt):
            below = [rank for rank in range(len(active)) if active[rank] < mean]
            rank = min(below, key=lambda rank: (tokens[rank], active[rank], rank))
            self.members[rank].waiting.append(sequence)
            self.rank_of[sequence.id] = rank
            active[rank] += 1
            tokens[rank] += sequence.prompt

    def balance(self, ranks: Seq[tuple[int, int]]) -> bool:
        """Whether prompts are held back, by how many requests decode and how many prompts there are on each rank."""
        all_decode = all(decoding > 0 for decoding, _ in ranks)
        if all(decoding < self.settings.max_num_seqs and prompts > 0 for decoding, prompts in ranks):
            self.waited_for_some = 0
            if all_decode and self.waited_on < self.own.adp_batching_wait_iters:
                self.waited_on += 1
                return True
            if all_decode:
                self.waited_on = 0
            return False
        self.waited_for_some += 1
        if self.waited_for_some >= self.own.adp_timeout_iters or not all_decode:
            self.waited_for_some = 0
            return False
        return True

    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        assert isinstance(batch, RankedBatch)
        answered: list[Sequence] = []
        for member, part in zip(self.members, batch.parts, strict=True):
            answered += member.update(part, now_ns)
        return answered


class TrtllmRanks(Together):
    """Ranks whose batches run as one forward, as long as any of them has one."""

    scheduler: RankedScheduler

    def __init__(self, pool: EnginePool, *, log: bool) -> None:
        super().__init__(pool, log=log)
        assert isinstance(pool.settings.scheduler, TrtllmScheduling)
        assert pool.ranks is not None
        self.scheduler = RankedScheduler(pool.settings, pool.blocks, len(pool.laws), pool.ranks.count)

    def served(self) -> dict[int, int]:
        return self.scheduler.rank_of
