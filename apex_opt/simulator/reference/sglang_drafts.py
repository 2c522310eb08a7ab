"""SGLang's scheduler where drafts are verified: every running request with all of its drafts in every step.

Source: `eagle_prepare_for_decode`, `get_alloc_reserve_per_decode`, `_new_tokens_required_next_decode_spec_v2`,
`_reqs_finishing_inflight`, `_resolve_spec_v2_tokens`, `Req.owned_kv_len` and `RadixKey` of SGLang 0.5.23, for chains of
drafts (`--speculative-eagle-topk 1`), in our own words; read and not recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.reference.sequence import Row
from apex_opt.simulator.reference.sglang import SglangScheduler
from apex_opt.simulator.reference.speculative import made_after, right_after
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.reference.sequence import Batch, Sequence


class SpeculativeSglangScheduler(SglangScheduler):
    """A step gives each running sequence its last token and all of its drafts.

    What a step brings is known to the next one, which may be formed before: the device hands it on. The scheduler
    learns of it when the step is taken in, and takes pages for two steps of nothing but right drafts ahead.
    """

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        assert settings.speculation is not None
        self.speculation = settings.speculation
        self.each = 1 + settings.speculation.draft_tokens
        self.ahead_of = self.own.ahead(settings.speculation.draft_tokens)
        self.beyond = settings.beyond_page

    def known_pages(self, tokens: int) -> int:
        return max(0, tokens - self.beyond) // self.page

    def needed(self, sequence: Sequence) -> int:
        pages = ceil_div(sequence.computed + self.ahead_of, self.page)
        return max(0, pages - sequence.blocks)

    def advance(self, sequences: Seq[Sequence], batch: Batch) -> None:
        needed = [self.needed(sequence) for sequence in sequences]
        if self.page > 1 and any(needed):
            self.make_room((sum(needed) + len(sequences)) * self.page)
        for sequence, pages in zip(sequences, needed, strict=True):
            self.free -= pages
            sequence.blocks += pages
            there = sequence.generated + sequence.in_flight
            drafts = self.each - 1
            row = Row(sequence, self.each, sequence.prompt + there + drafts, True, drafts=drafts)
            row.comes = 1 + self._right(sequence, there)
            sequence.in_flight += row.comes
            sequence.coming = row
            batch.rows.append(row)

    def drafts(self, batch: Batch) -> bool:
        """The first draft after a prompt comes of the pass over it; the others are made when it is verified."""
        return any(row.drafts for row in batch.rows)

    def _right(self, sequence: Sequence, there: int) -> int:
        """How many drafts after so many tokens are right; beyond its end nobody asks."""
        if there >= sequence.limit:
            return 0
        right = right_after(self.speculation, sequence.id, there)
        return right if self.settings.async_scheduling else min(right, made_after(self.speculation, sequence.id, there))

    def receive(self, row: Row) -> int:
        """The drafts up to the first wrong one, and the token that comes after these."""
        sequence = row.sequence
        if row.prompt:
            return super().receive(row)
        sequence.in_flight -= row.comes
        got = min(row.comes, sequence.limit - sequence.generated)
        # The last token told is not computed, but where others were accepted after it.
        sequence.computed = min(sequence.computed + row.comes, sequence.prompt + sequence.limit)
        return got
