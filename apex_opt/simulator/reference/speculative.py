"""vLLM's scheduler where drafts of the tokens to come are verified together with the last known one.

Source: `Scheduler.schedule`, `update_from_output`, `update_draft_token_ids` and `AsyncScheduler` of vLLM 0.20.2, in our
own words; recorded batches with drafts settle it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.reference.schedulers import VllmScheduler

if TYPE_CHECKING:
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.speculation import Speculation
    from apex_opt.simulator.reference.sequence import Batch, Row, Sequence


def right_after(speculation: Speculation, request: int, generated: int) -> int:
    """How many drafts of a request are right once it has generated so many tokens.

    Parameters
    ----------
    speculation
    request, generated : int
    """
    counts = speculation.accepted[request % len(speculation.accepted)]
    return min(speculation.draft_tokens, counts[generated % len(counts)])


def made_after(speculation: Speculation, request: int, generated: int) -> int:
    """How many drafts of a request are made once it has generated so many tokens.

    Parameters
    ----------
    speculation
    request, generated : int
    """
    most, lists = speculation.draft_tokens, speculation.proposed
    if not lists:
        return most
    counts = lists[request % len(lists)]
    return min(most, counts[generated % len(counts)])


def accepted(speculation: Speculation, row: Row) -> int:
    """How many of the drafts in a row are right."""
    return min(row.drafts, right_after(speculation, row.sequence.id, row.sequence.generated))


def proposed(speculation: Speculation, sequence: Sequence) -> int:
    """Drafts that are made once the tokens of a batch are known."""
    return made_after(speculation, sequence.id, sequence.generated)


class SpeculativeScheduler(VllmScheduler):
    """A decoding sequence wants its drafts along with its last token; what of them is wrong is taken back.

    Blocks stay where drafts turn out wrong. Asynchronously drafts count as right until the batch is done.
    """

    def __init__(self, settings: EngineSettings, blocks: int) -> None:
        super().__init__(settings, blocks)
        assert settings.speculation is not None
        self.speculation = settings.speculation

    def ahead(self, held: int) -> int:
        """The drafter keeps KV of the drafts to come as well."""
        return min(held + self.speculation.ahead, self.settings.max_model_len)

    def found(self, sequence: Sequence) -> list[int]:
        found = self.blocks.found(sequence)
        return found[:-1] if self.speculation.rules.recomputes else found

    def launch(self, row: Row) -> None:
        sequence = row.sequence
        sequence.proposed = 0  # what was not scheduled is forgotten
        if row.yields and self.settings.async_scheduling:
            sequence.in_flight += 1 + row.drafts
            sequence.proposed = self.speculation.draft_tokens

    def preempt(self, sequence: Sequence) -> None:
        super().preempt(sequence)
        sequence.proposed = 0

    def receive(self, row: Row) -> int:
        """The drafts up to the first wrong one, and the token that comes after these."""
        sequence, right = row.sequence, accepted(self.speculation, row)
        rejected = row.drafts - right
        if sequence.computed > 0:  # else it was preempted since
            sequence.computed -= rejected
        got = min(right + 1, sequence.limit - sequence.generated)
        if self.settings.async_scheduling:
            sequence.in_flight -= rejected + got
        return got

    def update(self, batch: Batch, now_ns: int) -> list[Sequence]:
        answered = super().update(batch, now_ns)
        if not self.settings.async_scheduling:
            for row in batch.rows:
                if row.yields and not row.sequence.finished:
                    row.sequence.proposed = proposed(self.speculation, row.sequence)
        return answered
