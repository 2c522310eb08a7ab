"""Batches in flight: the queue they stand in, and their way through the stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import batch_ns_nb, by_tokens_nb, chunk_ns_nb, column_nb, count_batch_nb, law_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    BATCH_DECODES,
    BATCH_ROWS,
    BATCH_TOKENS,
    COMPUTED,
    DEPTH,
    DONE,
    ENTERING_AT,
    FIRST_STAGE,
    LAUNCH_NS,
    LAUNCHED_FREE,
    MAX_SEQS,
    MIXED_NS,
    NONE,
    NOW,
    PLACE,
    QUEUE_AT,
    QUEUE_HEAD,
    QUEUED,
    RESOURCES,
    RUNNING,
    SLEEP_NS,
    STACK,
    STAGE_BUSY,
    STAGE_FREE,
    STAGE_SIZE,
    STAGES,
    TRANSFER_NS,
    UNDER,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def newest_nb(r: I64) -> int:
    """Place in the queue of the batch that is formed."""
    newest: int = r[QUEUE_HEAD] + r[QUEUED]
    return newest - r[DEPTH] if newest >= r[DEPTH] else newest


@inner
def queued_nb(run: Run, r: I64, place: int) -> I64:
    """Rows of the batch at a place of the queue, 2 * request + yields each."""
    return at(run.scratch, r[QUEUE_AT] + 2 * r[DEPTH] + place * r[MAX_SEQS])


@inner
def chunks_ns_nb(run: Run, r: I64, law: I64, batch: I64, batch_tokens: I64) -> int:
    """What the chunks of the batch take by a law, one after the other."""
    chunks_ns, computed = 0, column_nb(run, COMPUTED)
    if r[BATCH_DECODES] < r[BATCH_ROWS]:
        for row in range(r[BATCH_ROWS]):
            if batch_tokens[row] > 1:
                chunks_ns += chunk_ns_nb(law, r, batch_tokens[row], computed[batch[row] >> 1])
    return chunks_ns


@inner
def busiest_ns_nb(run: Run, r: I64, batch: I64, batch_tokens: I64) -> int:
    """What the batch takes of the resource that is asked for most, where all work at one time."""
    most = 0
    for k in range(r[RESOURCES]):
        law = law_nb(run, r, r[STAGES] + k)
        most = max(most, batch_ns_nb(law, r, chunks_ns_nb(run, r, law, batch, batch_tokens)))
    return most


@inner
def through_stages_nb(run: Run, r: I64) -> int:
    """Pass the batch through the stages; when it leaves the last one."""
    end = r[NOW]
    if r[BATCH_ROWS] == 0:
        return end
    batch, batch_tokens = queued_nb(run, r, newest_nb(r)), at(run.scratch, r[ENTERING_AT])
    for s in range(r[STAGES]):
        law, stage = law_nb(run, r, s), at(run.stages, (r[FIRST_STAGE] + s) * STAGE_SIZE)
        duration = batch_ns_nb(law, r, chunks_ns_nb(run, r, law, batch, batch_tokens))
        if r[RESOURCES] > 0:
            duration = min(duration, busiest_ns_nb(run, r, batch, batch_tokens))
        end = max(end, stage[STAGE_FREE]) + duration
        stage[STAGE_FREE] = end
        stage[STAGE_BUSY] += duration
        if s + 1 < r[STAGES]:
            end += by_tokens_nb(law, r, MIXED_NS, TRANSFER_NS)[r[BATCH_TOKENS]]
    count_batch_nb(run, r)
    return end


@inner
def launching_nb(r: I64) -> int:
    """How long the loop launches the batch that was formed and sees nothing else."""
    launching: int = 0
    if r[BATCH_DECODES] < r[BATCH_ROWS] and r[BATCH_TOKENS] > r[LAUNCHED_FREE]:
        launching = r[LAUNCH_NS]
    return launching


@inner
def preempted_nb(run: Run, r: I64) -> int:
    """Who was preempted last; those are passed over who have ended since by tokens that were in flight."""
    place, under, i = column_nb(run, PLACE), column_nb(run, UNDER), r[STACK]
    while i != NONE and place[i] == DONE:
        i = under[i]
    r[STACK] = i
    return i


@inner
def rest_nb(run: Run, r: I64, came: bool) -> None:
    """Sleep after a turn that scheduled nothing, while somebody runs or waits, as those who came before it do."""
    if r[BATCH_ROWS] == 0 and (came or r[RUNNING] > 0 or preempted_nb(run, r) != NONE):
        r[NOW] += r[SLEEP_NS]
