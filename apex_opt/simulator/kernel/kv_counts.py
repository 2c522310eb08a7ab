"""KV blocks over groups of layers that are only counted: without prefix caching it does not matter which ones they are.

A sequence holds, of each group, blocks for its tokens, less those that a window has given back. It gives blocks back
right before it takes more for a row, by what it has computed until then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_state import (
    CHUNK,
    DUE,
    GROUP_SIZE,
    KIND,
    MOST,
    SEEN,
    SIZE,
    SPAN_AT,
    SPAN_SIZE,
    SPAN_TIMES,
    SPAN_TOKENS,
    STATE,
    TIMES,
    WINDOW,
)
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.state import (
    BLOCK_SIZE,
    GENERATED,
    JOINED,
    JOINED_BLOCKS,
    LIMIT,
    LUMP,
    NONE,
    OFFSET,
    RESIDUE_AT,
    RING_SIZE,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.kv_state import Groups
    from apex_opt.simulator.kernel.state import I64, Run


@inner
def entered_nb(groups: Groups, tokens: int) -> int:
    """Blocks that so many tokens take, those given back included."""
    count = 0
    for g in range(groups.number):
        group = at(groups.rows, g * GROUP_SIZE)
        count += group[TIMES] * (1 if group[KIND] == STATE else blocks_nb(tokens, group[SIZE]))
    return count


@inner
def passed_of_nb(group: I64, computed: int) -> int:
    """Blocks of a group that are out of sight before a row, by the tokens computed until then."""
    if group[KIND] == WINDOW:
        return max(0, computed - group[SEEN] + 1) // group[SIZE]
    if group[KIND] == CHUNK:
        return computed // group[SEEN] * group[SEEN] // group[SIZE]
    return 0


@inner
def passed_nb(groups: Groups, computed: int) -> int:
    """Blocks that windows and chunks have given back before a row, by the tokens computed until then."""
    count = 0
    for g in range(groups.number):
        group = at(groups.rows, g * GROUP_SIZE)
        count += group[TIMES] * passed_of_nb(group, computed)
    return count


@inner
def whole_nb(groups: Groups, tokens: int) -> int:
    """Blocks that must be free for a sequence that waits with so many tokens."""
    count = 0
    for g in range(groups.number):
        group = at(groups.rows, g * GROUP_SIZE)
        entries = 1 if group[KIND] == STATE else blocks_nb(tokens, group[SIZE])
        count += group[TIMES] * min(entries, group[MOST])
    return count


@inner
def counts_alike_nb(groups: Groups, r: I64) -> bool:
    """Whether blocks are counted, and all of as many tokens."""
    alike = groups.sizes == 0 or (groups.sizes == 1 and groups.spans[SPAN_TOKENS] == r[BLOCK_SIZE])
    return groups.counting == 1 and alike


# In a steady engine, which has no chunks, sequences decode. Batch by batch, numbered as they are formed, each has one
# token more: what the next batch takes and gives back is a count by the number of that batch, modulo the tokens of a
# block.


@inner
def span_nb(groups: Groups, s: int) -> I64:
    """What is to know of the groups whose blocks have as many tokens."""
    return at(groups.spans, s * SPAN_SIZE)


@inner
def due_at_nb(counts: I64, size: int, phase: int, slot: int) -> tuple[int, int]:
    """Blocks of so many tokens that a batch takes and gives back, by its phase and its slot of the ring."""
    full = at(counts, DUE + 2 * size)
    if full[slot] > 0:
        counts[DUE + size + phase] += full[slot]
        full[slot] = 0
    return counts[DUE + phase], counts[DUE + size + phase]


@inner
def due_nb(run: Run, groups: Groups, r: I64, k: int) -> tuple[int, int]:
    """Blocks that batch k + 1 takes and gives back, after those whose windows are full from now on were noted."""
    taken, back, mask = 0, 0, r[RING_SIZE] - 1
    for s in range(groups.sizes):
        span = span_nb(groups, s)
        size = span[SPAN_TOKENS]
        counts = at(run.scratch, r[RESIDUE_AT] + span[SPAN_AT])
        if k == 0:  # the memory may be that of a replica that ran before
            counts[0] = 0
        here = due_at_nb(counts, size, counts[0], k & mask)
        taken += here[0]
        back += here[1]
    return taken, back


@inner
def on_nb(run: Run, groups: Groups, r: I64) -> None:
    """A batch is formed."""
    for s in range(groups.sizes):
        span = span_nb(groups, s)
        counts = at(run.scratch, r[RESIDUE_AT] + span[SPAN_AT])
        counts[0] = counts[0] + 1 if counts[0] + 1 < span[SPAN_TOKENS] else 0


@inner
def decodes_nb(run: Run, groups: Groups, r: I64, i: int, before: int) -> None:
    """Sequence i decodes from the next batch on; its last row began after `before` tokens."""
    known = column_nb(run, OFFSET)[i] + column_nb(run, JOINED)[i]
    blocks = entered_nb(groups, known) - passed_nb(groups, before)
    column_nb(run, JOINED_BLOCKS)[i] = blocks
    # What it gives back at its first token besides what any sequence with as many tokens does then.
    if column_nb(run, LIMIT)[i] - column_nb(run, GENERATED)[i] > 1:
        r[LUMP] += passed_nb(groups, known - 1) - passed_nb(groups, before)
    count_nb(run, groups, r, i, 1, NONE)


@inner
def count_nb(run: Run, groups: Groups, r: I64, i: int, sign: int, k: int) -> None:
    """Count a decoding sequence in or out; where it is counted out, batch `k` is the last that was looked at."""
    offset, joined = column_nb(run, OFFSET)[i], column_nb(run, JOINED)[i]
    last = joined + column_nb(run, LIMIT)[i] - column_nb(run, GENERATED)[i] - 1
    mask = r[RING_SIZE] - 1
    for s in range(groups.sizes):
        span = span_nb(groups, s)
        size = span[SPAN_TOKENS]
        counts = at(run.scratch, r[RESIDUE_AT] + span[SPAN_AT])
        counts[DUE + (-offset) % size] += sign * span[SPAN_TIMES]
        for g in range(groups.number):
            group = at(groups.rows, g * GROUP_SIZE)
            if group[KIND] != WINDOW or group[SIZE] != size:
                continue
            full = group[SEEN] - 1 + size - offset  # the first block leaves the window before this batch is formed
            if offset + joined >= group[SEEN] or (full <= k and full < last):
                counts[DUE + size + (group[SEEN] - 1 - offset) % size] += sign * group[TIMES]
            elif full < last:
                counts[DUE + 2 * size + (full & mask)] += sign * group[TIMES]


@inner
def held_nb(run: Run, groups: Groups, r: I64, i: int, k: int) -> int:
    """Blocks of a decoding sequence after batch k."""
    if column_nb(run, JOINED)[i] == k:
        blocks: int = column_nb(run, JOINED_BLOCKS)[i]
        return blocks
    done = column_nb(run, OFFSET)[i] + k
    return entered_nb(groups, done) - passed_nb(groups, done - 1)
