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
    FEWEST,
    FIRST_RANK,
    FORWARD_END,
    FORWARD_LANE,
    FORWARD_MODE,
    FORWARD_ROWS,
    FORWARD_SIZE,
    FORWARD_START,
    FORWARDS,
    HALVES_AT,
    HALVES_COUNTED_AT,
    IN_STEP,
    LANE,
    LANE_DONE,
    LATEST,
    LEAST_DECODE,
    LEAST_MODE,
    LEAST_PROMPT,
    MAKES,
    MEMBER_SIZE,
    MIXED,
    MOST_FORWARDS,
    MOST_ROWS_,
    MOST_SEQUENCES,
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
    UNWILLING,
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
    from apex_opt.simulator.kernel.group_state import Group, Halves
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def slot_nb(group: Group, g: I64, r: I64, lane: int, number: int) -> I64:
    """What is known of a forward."""
    place = lane * (g[SLOT_MASK] + 1) + (number & g[SLOT_MASK])
    return at(group.memory, g[SLOTS_AT] + place * (SLOT_SIZE + 3 * r[STAGES]))


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
def submit_nb(run: Run, group: Group, halves: Halves | None, g: I64, r: I64, m: I64, dummy: int) -> int:
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
        slot[FEWEST], slot[UNWILLING], slot[MOST_SEQUENCES] = NEVER, 0, 0
        for entry in range(3 * stages):
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
    law, width = at(tables, 2 * (sequences + tokens)), stages
    if halves is not None:
        width = 2 * stages
        vote_nb(group, g, r, m, slot, dummy)
    for stage in range(stages):
        own = group.memory[m[OWN_AT] + (width if dummy == 1 else 0) + stage]
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
        forward_nb(run, group, halves, g, r, m[LANE], slot, law)
    return number


@inner
def vote_nb(group: Group, g: I64, r: I64, m: I64, slot: I64, dummy: int) -> None:
    """Whether a rank wants the forward to be split, and what it would compute of both halves."""
    stages, tokens, rows = r[STAGES], 1, 1
    least, own = g[LEAST_DECODE], at(group.memory, m[OWN_AT] + (3 * stages if dummy == 1 else stages))
    if dummy == 0:
        tokens, rows = r[BATCH_TOKENS], r[BATCH_ROWS]
        if r[BATCH_DECODES] < rows:
            least = g[LEAST_PROMPT]
    if tokens < least:
        slot[UNWILLING] = 1
    slot[FEWEST] = min(slot[FEWEST], tokens)
    slot[MOST_SEQUENCES] = max(slot[MOST_SEQUENCES], rows)
    halved = at(slot, SLOT_SIZE + 2 * stages)
    for stage in range(stages):
        halved[stage] = max(halved[stage], own[stage])


@inner
def halves_ns_nb(halves: Halves, g: I64, r: I64, stage: int, entry: int, mixed: int, rows: int, own: int) -> int:
    """`ranks.Halves.forward_ns`, given the most sequences of a rank and the most that one computes by itself."""
    table = at(halves.tables, g[HALVES_AT] + stage * (1 + 5 * g[ALL] + r[MAX_SEQS] + 1))
    computes, sends = own + table[1 + mixed * g[ALL] + entry], table[1 + 2 * g[ALL] + entry]
    alone = table[1 + (3 + mixed) * g[ALL] + entry] + table[1 + 5 * g[ALL] + rows]
    time_ns: int = alone + max(computes, sends) + min(computes, sends) // (2 * table[0])
    return time_ns


@inner
def forward_nb(run: Run, group: Group, halves: Halves | None, g: I64, r: I64, lane: int, slot: I64, law: I64) -> None:
    """All ranks have submitted their parts of a forward: when it runs on each stage, and who goes on when."""
    members = slot[PARTS]
    slot[PARTS] = 0
    mode, most, split = slot[LEAST_MODE], slot[MOST_ROWS_], 0
    if halves is not None:
        split = 1 if slot[UNWILLING] == 0 and most >> 1 < slot[FEWEST] else 0
    rows = slot[SUM_ROWS] if mode == 0 and split == 0 else most * members
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
        if halves is not None:  # noqa: SIM102  # it is left out of what is compiled where there are none
            if split == 1:
                own = slot[SLOT_SIZE + 2 * r[STAGES] + s]
                duration = at(table, g[WIDE] + 3 * g[ALL])[mode]
                duration += halves_ns_nb(halves, g, r, s, entry, slot[MIXED], slot[MOST_SEQUENCES], own)
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
    if slot[MIXED] == 1 and mode == 0 and split == 0:
        counts[g[ALL] + entry] += 1
    if halves is not None:
        halves.counts[g[HALVES_COUNTED_AT] + slot[MIXED] * g[ALL] + entry] += split
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
