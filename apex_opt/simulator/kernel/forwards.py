"""Forwards of data-parallel ranks: what they agree on and how long one takes, as `simulator.ranks` has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import by_tokens_nb, law_nb
from apex_opt.simulator.kernel.group_state import (
    AGREED,
    ALL,
    CLOCK,
    COUNT,
    DUE,
    END,
    FIRST_RANK,
    FORWARD_END,
    FORWARD_LANE,
    FORWARD_MODE,
    FORWARD_ROWS,
    FORWARD_SIZE,
    FORWARD_START,
    FORWARDS,
    IN_STEP,
    LANE,
    LANE_DONE,
    LATEST,
    LEAST_MODE,
    MAKES,
    MEMBER_SIZE,
    MIXED,
    MOST_FORWARDS,
    MOST_ROWS_,
    NEXT_PART,
    NUMBER,
    OF_DRAFTS,
    OWN_AT,
    PARTS,
    PER,
    RETURNS,
    RETURNS_LATE,
    SEQUENCES,
    SLOT_MASK,
    SLOT_SIZE,
    SLOTS_AT,
    STATE,
    SUM_ROWS,
    SYNC_NS,
    TABLES_AT,
    TAKES,
    TOGETHER_AT,
    WIDE,
)
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    BATCH_DECODES,
    BATCH_MADE,
    BATCH_ROWS,
    BATCH_TOKENS,
    DEPTH,
    DRAFTS,
    FIRST_STAGE,
    LOGGED,
    MAX_SEQS,
    MAX_TOKENS,
    MIXED_NS,
    NEVER,
    REPLICA_SIZE,
    STAGE_BUSY,
    STAGE_FREE,
    STAGE_SIZE,
    STAGES,
    TRANSFER_NS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.group_state import Group
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def slot_nb(group: Group, g: I64, r: I64, lane: int, number: int) -> I64:
    """What is known of a forward."""
    place = lane * (g[SLOT_MASK] + 1) + (number & g[SLOT_MASK])
    return at(group.memory, g[SLOTS_AT] + place * (SLOT_SIZE + 2 * r[STAGES]))


@inner
def done_nb(group: Group, g: I64, m: I64) -> int:
    """Forwards of a rank that are known."""
    done: int = at(group.members, (g[FIRST_RANK] + m[LANE]) * MEMBER_SIZE)[LANE_DONE]
    return done


@inner
def end_nb(group: Group, g: I64, r: I64, m: I64, number: int) -> int:
    """When a forward ends; NEVER where that is not known yet."""
    end: int = NEVER
    if number < done_nb(group, g, m):
        end = slot_nb(group, g, r, m[LANE], number)[END]
    return end


@inner
def returns_nb(group: Group, g: I64, r: I64, m: I64, number: int) -> int:
    """When the call that ran a dummy batch in a forward returns; NEVER where that is not known yet."""
    if number >= done_nb(group, g, m) or g[RETURNS_LATE] == 1:
        return end_nb(group, g, r, m, number)
    behind = slot_nb(group, g, r, m[LANE], number - r[DEPTH])[END] if number >= r[DEPTH] else 0
    return max(slot_nb(group, g, r, m[LANE], number)[AGREED], behind)


@inner
def submit_nb(run: Run, group: Group, g: I64, r: I64, m: I64, dummy: int) -> int:
    """A rank submits the batch in its registers, or a dummy, as its part of a forward; the number of that."""
    number = m[NEXT_PART]
    m[NEXT_PART] += 1
    slot, stages = slot_nb(group, g, r, m[LANE], number), r[STAGES]
    tables = at(group.tables, g[TABLES_AT])
    tokens = r[MAX_TOKENS] + 1
    # Batches that verify drafts are padded by their tokens.
    sequences = tokens if r[DRAFTS] > 0 else r[MAX_SEQS] + 1
    if slot[PARTS] == 0:
        slot[LATEST], slot[LEAST_MODE], slot[MOST_ROWS_], slot[SUM_ROWS], slot[MIXED] = 0, 3, 0, 0, 0
        slot[SEQUENCES], slot[MAKES] = 0, 0
        for entry in range(2 * stages):
            slot[SLOT_SIZE + entry] = 0
    if dummy == 1 or r[BATCH_DECODES] == r[BATCH_ROWS]:
        entry = 1
        if dummy == 0:
            entry = r[BATCH_TOKENS] if r[DRAFTS] > 0 else r[BATCH_ROWS]
        mode, rows = tables[entry], tables[sequences + entry]
    else:
        entry = 2 * sequences + r[BATCH_TOKENS]
        mode, rows = tables[entry], tables[entry + tokens]
        slot[MIXED] = 1
    law = at(tables, 2 * (sequences + tokens))
    for stage in range(stages):
        own = group.memory[m[OWN_AT] + (stages if dummy == 1 else 0) + stage]
        slot[SLOT_SIZE + 2 * stage] = max(slot[SLOT_SIZE + 2 * stage], own)
        padded = at(law, stage * (g[WIDE] + 3 * g[ALL] + 3 + g[OF_DRAFTS]))[rows]
        slot[SLOT_SIZE + 2 * stage + 1] = max(slot[SLOT_SIZE + 2 * stage + 1], own + padded)
    if g[OF_DRAFTS] > 0:
        slot[SEQUENCES] += 1 if dummy == 1 else r[BATCH_ROWS]
        if dummy == 0 and r[BATCH_MADE] == 1:
            slot[MAKES] = 1
    slot[PARTS] += 1
    slot[LATEST] = max(slot[LATEST], g[CLOCK])
    slot[LEAST_MODE] = min(slot[LEAST_MODE], mode)
    slot[MOST_ROWS_] = max(slot[MOST_ROWS_], rows)
    slot[SUM_ROWS] += rows
    if slot[PARTS] == (g[COUNT] if g[IN_STEP] == 1 else 1):
        forward_nb(run, group, g, r, m[LANE], slot, law)
    return number


@inner
def forward_nb(run: Run, group: Group, g: I64, r: I64, lane: int, slot: I64, law: I64) -> None:
    """All ranks have submitted their parts of a forward: when it runs on each stage, and who goes on when."""
    members = slot[PARTS]
    slot[PARTS] = 0
    mode, most = slot[LEAST_MODE], slot[MOST_ROWS_]
    rows = slot[SUM_ROWS] if mode == 0 else most * members
    entry = (rows + g[PER] - 1) // g[PER]
    slot[AGREED] = slot[LATEST] + (g[SYNC_NS] if members > 1 else 0)
    first = at(run.replicas, (g[FIRST_RANK] + lane) * REPLICA_SIZE)
    began, end, drafting = 0, slot[AGREED], (slot[SEQUENCES] + g[PER] - 1) // g[PER]
    for s in range(r[STAGES]):
        table = at(law, s * (g[WIDE] + 3 * g[ALL] + 3 + g[OF_DRAFTS]))
        together = at(table, g[WIDE] + slot[MIXED] * g[ALL])
        duration = at(table, g[WIDE] + 3 * g[ALL])[mode] + together[entry]
        if slot[MIXED] == 1 and mode == 0:
            duration += together[g[ALL] + entry]
        if slot[MAKES] == 1:
            duration += table[g[WIDE] + 3 * g[ALL] + 3 + drafting]
        duration += slot[SLOT_SIZE + 2 * s + 1] if mode == 0 else slot[SLOT_SIZE + 2 * s] + table[most]
        stage = at(run.stages, (first[FIRST_STAGE] + s) * STAGE_SIZE)
        start = max(end, stage[STAGE_FREE])
        if s == 0:
            began = start
        end = start + duration
        stage[STAGE_FREE] = end
        stage[STAGE_BUSY] += duration
        if s + 1 < r[STAGES]:
            end += by_tokens_nb(law_nb(run, r, s), r, MIXED_NS, TRANSFER_NS)[min(most, r[MAX_TOKENS])]
    slot[END] = end
    counts = at(group.together, g[TOGETHER_AT] + slot[MIXED] * g[ALL])
    counts[entry] += 1
    if slot[MIXED] == 1 and mode == 0:
        counts[g[ALL] + entry] += 1
    if slot[MAKES] == 1:
        group.together[g[TOGETHER_AT] + 3 * g[ALL] + drafting] += 1
    lane_row = at(group.members, (g[FIRST_RANK] + lane) * MEMBER_SIZE)
    number = lane_row[LANE_DONE]
    lane_row[LANE_DONE] += 1
    for rank in range(lane, lane + members):
        m = at(group.members, (g[FIRST_RANK] + rank) * MEMBER_SIZE)
        if m[NUMBER] == number:
            if m[STATE] == TAKES:
                m[DUE] = end
            elif m[STATE] == RETURNS:
                m[DUE] = returns_nb(group, g, r, m, number)
    if run.control[LOGGED] == 1:
        place = group.told[FORWARDS]
        if place < group.told[MOST_FORWARDS]:
            told = at(group.forwards, place * FORWARD_SIZE)
            told[FORWARD_LANE], told[FORWARD_START], told[FORWARD_END] = g[FIRST_RANK] + lane, began, end
            told[FORWARD_MODE], told[FORWARD_ROWS] = mode, rows
        group.told[FORWARDS] = place + 1
