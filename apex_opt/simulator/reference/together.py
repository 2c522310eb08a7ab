"""Ranks that one loop drives: a scheduler and a pool each, batches formed at one time and run as one forward."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from apex_opt.simulator.law import no_table
from apex_opt.simulator.outcome import GroupLog, SharedCounts
from apex_opt.simulator.ranks import DUMMY, EAGER, Agreed, agree, forward_ns
from apex_opt.simulator.reference.engine import Engine
from apex_opt.simulator.reference.sequence import Batch
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.ranks import Rows


@dataclass(slots=True)
class RankedBatch(Batch):
    """The batches of all ranks, one after the other."""

    parts: list[Batch] = field(default_factory=list)


class Together(Engine):
    """An engine whose scheduler forms a `RankedBatch`: the parts run as one forward, as long as any rank has one."""

    idle_rows: ClassVar[Rows] = DUMMY
    """What a rank without a batch runs with the others."""

    def __init__(self, pool: EnginePool, **given: Any) -> None:
        super().__init__(pool, **given)
        assert pool.ranks is not None
        self.ranks = pool.ranks
        decode, mixed, eager = (np.zeros_like(pool.ranks.shared[0].decode_ns) for _ in range(3))
        draft = np.zeros_like(pool.ranks.shared[0].draft_ns)
        halved = decode if pool.ranks.splitting else no_table()
        self._sums = SharedCounts(
            decode=decode,
            mixed=mixed,
            eager=eager,
            dummies=0,
            draft=draft,
            split_decode=np.zeros_like(halved),
            split_mixed=np.zeros_like(halved),
        )
        self.forwards: list[tuple[int, int, int, int]] = []
        self.batches_of = [0] * pool.ranks.count
        self.preempted_of = [0] * pool.ranks.count
        self.dummies_of = [0] * pool.ranks.count
        self._told()

    def agreed(self, parts: list[Rows]) -> Agreed:
        """What the ranks run a forward as."""
        return agree(self.ranks.padding, parts, self.draft_tokens, self.ranks.splitting)

    def launching_ns(self, batch: Batch) -> int:
        assert isinstance(batch, RankedBatch)
        return max(map(super().launching_ns, batch.parts))

    def _run(self, batch: Batch) -> int:
        assert isinstance(batch, RankedBatch)
        for rank, part in enumerate(batch.parts):
            self.preempted_of[rank] += len(part.preempted)
        if not batch.rows:
            return self.now
        rows = [[(row.tokens, row.computed_after) for row in part.rows] for part in batch.parts]
        parts = [its or self.idle_rows for its in rows]
        agreed = self.agreed(parts)
        makes = [self.scheduler.drafts(part) for part in batch.parts]
        began, end = None, self.now
        for stage, (law, shared) in enumerate(zip(self.laws, self.ranks.shared, strict=True)):
            duration = forward_ns(law, shared, agreed, parts, makes)
            start = max(end, self.stage_free[stage])
            began = start if began is None else began
            end = start + duration
            self.stage_free[stage] = end
            self.busy_ns[stage] += duration
            if stage + 1 < len(self.laws):
                end += int(law.transfer_ns[min(max(agreed.padded), len(law.transfer_ns) - 1)])
        assert began is not None
        self._count(agreed, rows, makes)
        self.forwards.append((began, end, agreed.mode, sum(agreed.padded)))
        if self.steps is not None:
            self._tell(batch, end)
        return end

    def _count(self, agreed: Agreed, rows: list[Rows], makes: list[bool]) -> None:
        """Count a forward, and the batch of each rank that has one.

        Parameters
        ----------
        agreed : Agreed
        rows : of each rank
        makes : of each rank, whether it makes drafts
        """
        entry = ceil_div(sum(agreed.padded), self.ranks.shared[0].per)
        (self._sums.decode if agreed.decoding else self._sums.mixed)[entry] += 1
        self._sums.eager[entry] += not agreed.decoding and agreed.mode == EAGER and not agreed.split
        if agreed.split:
            (self._sums.split_decode if agreed.decoding else self._sums.split_mixed)[entry] += 1
        if len(self._sums.draft) and any(makes):
            self._sums.draft[ceil_div(sum(len(its or self.idle_rows) for its in rows), self.ranks.shared[0].per)] += 1
        for rank, its in enumerate(rows):
            if its:
                self.batches += 1
                self.batches_of[rank] += 1
                self.counts.add(its, draft_tokens=self.draft_tokens, yields=makes[rank], windows=self.windows)
            else:
                self.dummies_of[rank] += len(self.idle_rows)
        self._told()

    def _told(self) -> None:
        """What ranks in step have in common."""
        self.shared = replace(self._sums, dummies=sum(self.dummies_of)) if self.ranks.in_step else None

    def _tell(self, batch: RankedBatch, end: int) -> None:
        """Log the batch of each rank, rank by rank."""
        assert self.steps is not None
        for rank, part in enumerate(batch.parts):
            if part.rows:
                rows = [(row.sequence.id, row.tokens, row.computed_after) for row in part.rows]
                self.steps.insert(sum(self.batches_of[: rank + 1]) - 1, (self.now, end, rows, sorted(part.preempted)))

    def logged(self) -> GroupLog:
        """What else there is to tell."""
        return GroupLog(
            rank=self.served(),
            preemptions=self.preempted_of,
            batches=self.batches_of,
            dummies=self.dummies_of,
            forwards=[self.forwards],
            publications=[],
            waves_started=[],
            waves_ended=[],
        )

    def served(self) -> dict[int, int]:
        """Of each request, the rank that served it."""
        raise NotImplementedError
