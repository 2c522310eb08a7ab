"""vLLM's scheduler over several groups of KV blocks, with drafts and without.

Source: `KVCacheManager.allocate_slots` and `Scheduler._mamba_block_aligned_split` of vLLM 0.20.2, in our own words;
recorded batches over several groups settle it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.reference.kv_groups import GroupedBlocks, Hit, Need
from apex_opt.simulator.reference.schedulers import VllmScheduler
from apex_opt.simulator.reference.speculative import SpeculativeScheduler

if TYPE_CHECKING:
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.reference.sequence import Batch, Sequence


class GroupedScheduler(VllmScheduler):
    """Blocks are counted by group, and where states are kept at ends of blocks, chunks of prompts end there."""

    blocks: GroupedBlocks  # type: ignore[assignment]

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, 0)
        self.blocks = GroupedBlocks(settings, blocks)
        self.splits = any(group.mode == "align" for group in settings.kv_groups)

    def schedule(self) -> Batch:
        self.blocks.begin()
        batch = super().schedule()
        batch.used = tuple(self.blocks.used)
        return batch

    def split(self, sequence: Sequence, computed: int, tokens: int) -> int:
        if not self.splits or computed >= max(sequence.prompt, sequence.known - 1):
            return tokens
        size = self.settings.block_size
        end = sequence.known // size * size
        if self.blocks.recomputes:
            end = max(0, end - size)
        if computed + tokens < end:
            return tokens // size * size
        return end - computed if computed < end < computed + tokens else tokens

    def allocate(self, sequence: Sequence, tokens: int) -> bool:
        held = sequence.computed + tokens
        need = Need(held, self.ahead(held))
        self.blocks.shed(sequence)
        if self.blocks.lacking(sequence, need) > self.blocks.free:
            return False
        self.blocks.take(sequence, need)
        return True

    def place(self, sequence: Sequence, budget: int) -> int:
        hit = self.blocks.find(sequence)
        tokens = self.split(sequence, hit.tokens, self.admitted(sequence.known - hit.tokens, budget))
        held = hit.tokens + tokens
        if (
            tokens == 0
            or self.blocks.just_kept(hit)
            or not self._fits(sequence, sequence.known, hit, whole=True)
            or not self._fits(sequence, held, hit)
        ):
            return 0
        sequence.computed = hit.tokens
        self.blocks.take(sequence, Need(held, held), hit)
        return tokens

    def _fits(self, sequence: Sequence, held: int, hit: Hit, *, whole: bool = False) -> bool:
        return self.blocks.lacking(sequence, Need(held, held), hit, whole=whole) <= self.blocks.free


class GroupedSpeculativeScheduler(GroupedScheduler, SpeculativeScheduler):
    """The same with drafts."""
