"""KV blocks over several groups of layers: `reference.kv_groups.GroupedBlocks` as links in columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.kv_counts import passed_of_nb
from apex_opt.simulator.kernel.kv_state import (
    AHEAD,
    BEFORE,
    BEHIND,
    BLOCK_WIDTH,
    CHUNK,
    CONTENT,
    CONTENT_AT,
    DROPPED,
    ENTRIES,
    FIRST_FOUND,
    FOUND,
    FULL,
    GROUP_SIZE,
    GROWN,
    HOLDER_WIDTH,
    KEPT,
    KIND,
    LAID,
    LENGTH,
    MARK,
    MOST,
    NEWER,
    NEWEST,
    OLDER,
    OLDEST,
    REGISTERED,
    REGISTERS,
    SEARCHED,
    SEEN,
    SIZE,
    SLOTS_LEFT,
    STATE,
    STEP,
    TOGETHER,
    USERS,
    WINDOW,
)
from apex_opt.simulator.kernel.policies import blocks_nb
from apex_opt.simulator.kernel.state import (
    BATCH_ROWS,
    BLOCK_AT,
    BLOCK_SIZE,
    CONTENTS,
    DRAFTS,
    FREE,
    HOLDER_AT,
    LOGGED,
    MAX_SEQS,
    MEMO_AT,
    MOST_STEPS,
    NONE,
    POOL_BLOCKS,
    RECOMPUTES,
    SLOTS_AT,
    STEPS,
    TABLE_AT,
    TABLE_WIDTH,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.kv_state import Groups
    from apex_opt.simulator.kernel.state import I32, I64, Run


@inner
def table_nb(groups: Groups, r: I64, slot: int, group: int) -> I32:
    """A table: its columns, then its entries."""
    return at(groups.table, r[TABLE_AT] + (slot * groups.number + group) * r[TABLE_WIDTH])


@inner
def group_nb(groups: Groups, group: int) -> I64:
    """What is to know of a group."""
    return at(groups.rows, group * GROUP_SIZE)


@inner
def empty_groups_nb(groups: Groups, r: I64) -> None:
    """All blocks free, in order, and nothing known."""
    if groups.counting == 1:
        return
    block, holder = at(groups.block, r[BLOCK_AT]), at(groups.holder, r[HOLDER_AT])
    registers, slots = at(groups.registers, r[MEMO_AT]), at(groups.slots, r[SLOTS_AT])
    front = at(block, r[POOL_BLOCKS] * BLOCK_WIDTH)
    front[BEHIND] = front[AHEAD] = r[POOL_BLOCKS]
    registers[LAID] = 0
    _lay_nb(block, registers, r)
    for key in range(r[CONTENTS] * HOLDER_WIDTH):
        holder[key] = NONE
    for slot in range(r[MAX_SEQS]):
        slots[slot] = slot
    registers[STEP], registers[SLOTS_LEFT] = 0, r[MAX_SEQS]
    for group in range(groups.number):
        registers[REGISTERS + group] = 0


@inner
def _lay_nb(block: I32, registers: I64, r: I64) -> None:
    """Put the next block that was never used to the front of the queue, where there is one.

    Those behind it come before all that were given back, so they need not be there before their turn.
    """
    ends, b = r[POOL_BLOCKS], registers[LAID]
    if b < ends:
        registers[LAID] += 1
        row, front = at(block, b * BLOCK_WIDTH), at(block, ends * BLOCK_WIDTH)
        row[USERS], row[CONTENT], row[MARK] = 0, NONE, 0
        row[BEHIND], row[AHEAD] = front[BEHIND], ends
        block[front[BEHIND] * BLOCK_WIDTH + AHEAD] = b
        front[BEHIND] = b


@inner
def begin_nb(groups: Groups, r: I64) -> None:
    """A batch is begun."""
    if groups.counting == 0:
        groups.registers[r[MEMO_AT] + STEP] += 1


@inner
def log_used_nb(run: Run, groups: Groups, r: I64) -> None:
    """Note the blocks in use of each group, before the batch is logged."""
    step = run.control[STEPS]
    if run.control[LOGGED] == 1 and r[BATCH_ROWS] > 0 and step < run.control[MOST_STEPS]:
        for group in range(groups.number):
            groups.used[step * groups.number + group] = groups.registers[r[MEMO_AT] + REGISTERS + group]


@inner
def split_nb(groups: Groups, r: I64, prompt: int, known: int, computed: int, c: int) -> int:
    """Tokens of a row that ends where a state is kept, of so many, after those computed."""
    if groups.splits == 0 or computed >= max(prompt, known - 1):
        return c
    size = r[BLOCK_SIZE]
    end = known // size * size
    if r[RECOMPUTES] == 1:
        end = max(0, end - size)
    if computed + c < end:
        return c // size * size
    return end - computed if computed < end < computed + c else c


@inner
def open_nb(groups: Groups, r: I64) -> int:
    """Empty tables for a sequence that may be admitted; which."""
    registers = at(groups.registers, r[MEMO_AT])
    slot: int = groups.slots[r[SLOTS_AT] + registers[SLOTS_LEFT] - 1]
    for group in range(groups.number):
        table = table_nb(groups, r, slot, group)
        table[LENGTH], table[REGISTERED], table[GROWN], table[BEFORE] = 0, 0, 0, NONE
    return slot


@inner
def lacking_nb(groups: Groups, r: I64, slot: int, tokens: int, ahead: int, whole: int, found: int) -> int:
    """Free blocks that a row takes; with `found`, beside what was found, which it takes as well."""
    count = 0
    for g in range(groups.number):
        group, table, hit = group_nb(groups, g), table_nb(groups, r, slot, g), table_nb(groups, r, r[MAX_SEQS], g)
        there = table[LENGTH]
        if found == 1:
            there += hit[LENGTH]
            for place in range(hit[REGISTERED], hit[LENGTH]):  # they leave the queue
                count += 1 if groups.block[r[BLOCK_AT] + hit[ENTRIES + place] * BLOCK_WIDTH + USERS] == 0 else 0
        entries = entries_nb(group, r, tokens, ahead)
        if group[KIND] == KEPT:
            if entries > there:
                count += 1 if table[GROWN] == 1 else 1 + r[DRAFTS]
            continue
        if whole == 1:
            entries = min(entries, group[MOST])
        count += max(0, entries - there)
    return count


@inner
def entries_nb(group: I64, r: I64, tokens: int, ahead: int) -> int:
    """Entries that a table has after a row."""
    if group[KIND] == STATE:
        return 1 + r[DRAFTS]
    if group[KIND] == KEPT:
        return blocks_nb(tokens, group[SIZE]) + r[DRAFTS]
    return blocks_nb(ahead, group[SIZE])


@inner
def shed_nb(groups: Groups, r: I64, slot: int, computed: int) -> None:
    """Give back what a running sequence will not look at again."""
    for g in range(groups.number):
        group, table = group_nb(groups, g), table_nb(groups, r, slot, g)
        if group[KIND] == WINDOW or group[KIND] == CHUNK:
            _back_from_nb(groups, r, g, table, passed_of_nb(group, computed))
        elif group[KIND] == KEPT:
            sure, before = max(0, computed - r[DRAFTS]), table[BEFORE]
            _back_from_nb(groups, r, g, table, max(0, sure - 1) // group[SIZE])
            if before != NONE and before < blocks_nb(sure, group[SIZE]) - 1 and table[ENTRIES + before] != NONE:
                _give_back_nb(groups, r, g, table[ENTRIES + before])
                table[ENTRIES + before] = NONE


@inner
def _back_from_nb(groups: Groups, r: I64, g: int, table: I32, entries: int) -> None:
    """Give back, of the first entries, the last, and so on back until a nothing is met."""
    for place in range(min(entries, table[LENGTH]) - 1, -1, -1):
        if table[ENTRIES + place] == NONE:
            return
        _give_back_nb(groups, r, g, table[ENTRIES + place])
        table[ENTRIES + place] = NONE


@inner
def take_groups_nb(groups: Groups, r: I64, slot: int, tokens: int, ahead: int, found: int) -> None:
    """Hand out the blocks of a row; with `found`, what was found before."""
    block = at(groups.block, r[BLOCK_AT])
    if found == 1:
        groups.registers[r[MEMO_AT] + SLOTS_LEFT] -= 1
        for g in range(groups.number):
            table, hit = table_nb(groups, r, slot, g), table_nb(groups, r, r[MAX_SEQS], g)
            for place in range(hit[LENGTH]):
                b = hit[ENTRIES + place]
                table[ENTRIES + place] = b
                if b != NONE:
                    row = at(block, b * BLOCK_WIDTH)
                    if row[USERS] == 0:
                        _out_of_queue_nb(block, row)
                        r[FREE] -= 1
                        groups.registers[r[MEMO_AT] + REGISTERS + g] += 1
                    row[USERS] += 1
            table[LENGTH], table[REGISTERED] = hit[LENGTH], hit[LENGTH]
    for g in range(groups.number):
        group, table = group_nb(groups, g), table_nb(groups, r, slot, g)
        entries = entries_nb(group, r, tokens, ahead)
        if entries <= table[LENGTH]:
            continue
        if group[KIND] == KEPT:
            _move_states_nb(table, entries - r[DRAFTS] - 1, r[DRAFTS])
        for place in range(table[LENGTH], entries):
            table[ENTRIES + place] = _hand_out_nb(groups, r, g)
        table[LENGTH] = entries


@inner
def _move_states_nb(table: I32, running: int, drafts: int) -> None:
    """Fill a table of kept states up to the running one, and move those of drafts behind."""
    held = table[LENGTH]
    if table[GROWN] == 1:
        table[BEFORE] = held - 1 - drafts
    elif held > 0:
        table[BEFORE] = held - 1
    for place in range(held, running):
        table[ENTRIES + place] = NONE
    length = max(held, running)
    if table[GROWN] == 1:
        for place in range(held - drafts, min(held, running)):
            table[ENTRIES + length] = table[ENTRIES + place]
            table[ENTRIES + place] = NONE
            length += 1
    table[LENGTH], table[GROWN] = length, 1


@inner
def register_groups_nb(groups: Groups, r: I64, i: int, tokens: int) -> None:
    """The first tokens of request i can be found from now on, so many."""
    if groups.caching == 0:
        return
    block, step = at(groups.block, r[BLOCK_AT]), groups.registers[r[MEMO_AT] + STEP]
    for g in range(groups.number):
        group, table = group_nb(groups, g), table_nb(groups, r, groups.slot[i], g)
        full = max(0, tokens) // group[SIZE]
        for place in range(table[REGISTERED], full):
            b = table[ENTRIES + place]
            if b == NONE:
                continue
            content = content_nb(groups, i, g, place)
            row, holders = at(block, b * BLOCK_WIDTH), at(groups.holder, r[HOLDER_AT] + content * HOLDER_WIDTH)
            last = holders[NEWEST]
            row[CONTENT] = content
            row[OLDER] = last
            row[NEWER] = NONE
            if last == NONE:
                holders[OLDEST] = b
            else:
                block[last * BLOCK_WIDTH + NEWER] = b
            holders[NEWEST] = b
            if group[KIND] == KEPT:
                row[MARK] = step
        if full > table[REGISTERED]:
            table[REGISTERED] = full


@inner
def content_nb(groups: Groups, i: int, g: int, place: int) -> int:
    """What a request's block holds, among the contents of all groups."""
    key: int = groups.keys[groups.keys_at[g * groups.requests + i] + place]
    return groups.rows[g * GROUP_SIZE + CONTENT_AT] + key


@inner
def release_groups_nb(groups: Groups, r: I64, i: int) -> None:
    """Give all blocks of a running request back, group by group, each last entry first."""
    slot = groups.slot[i]
    for g in range(groups.number):
        table = table_nb(groups, r, slot, g)
        for place in range(table[LENGTH] - 1, -1, -1):
            if table[ENTRIES + place] != NONE:
                _give_back_nb(groups, r, g, table[ENTRIES + place])
    registers = at(groups.registers, r[MEMO_AT])
    groups.slots[r[SLOTS_AT] + registers[SLOTS_LEFT]] = slot
    registers[SLOTS_LEFT] += 1


@inner
def just_kept_nb(groups: Groups, r: I64) -> bool:
    """Whether a state that was found became findable in this very step."""
    for g in range(groups.number):
        hit = table_nb(groups, r, r[MAX_SEQS], g)
        if hit[LENGTH] > 0 and hit[ENTRIES + hit[LENGTH] - 1] != NONE:
            mark = groups.block[r[BLOCK_AT] + hit[ENTRIES + hit[LENGTH] - 1] * BLOCK_WIDTH + MARK]
            if mark == groups.registers[r[MEMO_AT] + STEP]:
                return True
    return False


@inner
def find_nb(groups: Groups, r: I64, i: int, known: int) -> int:
    """Tokens at the beginning of a waiting request that every group holds; the last table gets their blocks."""
    for g in range(groups.number):
        hit = table_nb(groups, r, r[MAX_SEQS], g)
        hit[FOUND], hit[FIRST_FOUND], hit[SEARCHED], hit[DROPPED] = 0, 0, 0, 0
    if groups.caching == 0:
        return 0
    most = known - 1
    length = most
    while True:
        left = length
        for number in range(groups.sets):
            first = groups.order[number]
            group, hit = group_nb(groups, first), table_nb(groups, r, r[MAX_SEQS], first)
            if group[KIND] == FULL and hit[SEARCHED] == 1:
                left = left // group[SIZE] * group[SIZE]
                continue
            drop = 1 if r[RECOMPUTES] == 1 and hit[DROPPED] == 0 else 0
            reach = min(left + group[SIZE], most) if drop == 1 else left
            _search_nb(groups, r, i, first, reach // group[SIZE], drop)
            hit[SEARCHED] = 1
            if drop == 1:
                hit[DROPPED] = 1
            elif hit[FOUND] * group[SIZE] < left:
                for other in range(groups.number):
                    table_nb(groups, r, r[MAX_SEQS], other)[DROPPED] = 0
            left = hit[FOUND] * group[SIZE]
        if left >= length:
            break
        length = left
        if groups.sets == 1 or (groups.sets == 2 and groups.rows[groups.order[0] * GROUP_SIZE + KIND] == FULL):
            break
    for number in range(groups.sets):
        g = groups.order[number]
        hit = table_nb(groups, r, r[MAX_SEQS], g)
        entries, first = min(hit[FOUND], length // group_nb(groups, g)[SIZE]), hit[FIRST_FOUND]
        while g != NONE:
            hit = table_nb(groups, r, r[MAX_SEQS], g)
            hit[LENGTH], hit[REGISTERED] = entries, min(first, entries)
            for place in range(entries):
                content = content_nb(groups, i, g, place)
                block = groups.holder[r[HOLDER_AT] + content * HOLDER_WIDTH + OLDEST]
                hit[ENTRIES + place] = NONE if place < first else block
            g = group_nb(groups, g)[TOGETHER]
    return length


@inner
def _held_nb(groups: Groups, r: I64, i: int, first: int, place: int) -> bool:
    """Whether all groups that search together hold an entry of request i."""
    g = first
    while g != NONE:
        if groups.holder[r[HOLDER_AT] + content_nb(groups, i, g, place) * HOLDER_WIDTH + OLDEST] == NONE:
            return False
        g = group_nb(groups, g)[TOGETHER]
    return True


@inner
def _search_nb(groups: Groups, r: I64, i: int, first: int, reach: int, drop: int) -> None:
    """Search a kind among so many entries: how many are found, and the first of them with a block."""
    group, hit = group_nb(groups, first), table_nb(groups, r, r[MAX_SEQS], first)
    size, multiple, run = group[SIZE], groups.multiple, 0
    hit[FOUND], hit[FIRST_FOUND] = 0, 0
    if group[KIND] == FULL:
        while run < reach and _held_nb(groups, r, i, first, run):
            run += 1
        run -= drop if run > 0 else 0
        hit[FOUND] = run * size // multiple * multiple // size
    elif group[KIND] == WINDOW:
        wanted = max(1, blocks_nb(group[SEEN] - 1, size) + drop)
        for place in range(reach - 1, -1, -1):
            if not _held_nb(groups, r, i, first, place):
                run = 0
            elif run > 0 or (place + 1 - drop) * size % multiple == 0:
                run += 1
                if run == wanted:
                    hit[FOUND], hit[FIRST_FOUND] = place + run - drop, place
                    return
        run = run * size // multiple * multiple // size
        run -= drop if run > 0 else 0
        hit[FOUND] = run * size // multiple * multiple // size
    elif group[KIND] == CHUNK:
        run = reach * size // group[SEEN] * group[SEEN] // size
        hit[FIRST_FOUND] = run
        while run < reach and _held_nb(groups, r, i, first, run):
            run += 1
        hit[FOUND] = run
    elif group[KIND] == KEPT:
        for place in range(reach - 1, -1, -1):
            if (place + 1) * size % multiple == 0 and _held_nb(groups, r, i, first, place):
                hit[FOUND], hit[FIRST_FOUND] = place + 1, place
                return


@inner
def _hand_out_nb(groups: Groups, r: I64, g: int) -> int:
    """The block at the front of the queue, whose content is forgotten."""
    block = at(groups.block, r[BLOCK_AT])
    b: int = block[r[POOL_BLOCKS] * BLOCK_WIDTH + BEHIND]
    row = at(block, b * BLOCK_WIDTH)
    _out_of_queue_nb(block, row)
    if b == groups.registers[r[MEMO_AT] + LAID] - 1:
        _lay_nb(block, at(groups.registers, r[MEMO_AT]), r)
    if row[CONTENT] != NONE:
        holders = at(groups.holder, r[HOLDER_AT] + row[CONTENT] * HOLDER_WIDTH)
        older, newer = row[OLDER], row[NEWER]
        row[CONTENT] = NONE
        if older == NONE:
            holders[OLDEST] = newer
        else:
            block[older * BLOCK_WIDTH + NEWER] = newer
        if newer == NONE:
            holders[NEWEST] = older
        else:
            block[newer * BLOCK_WIDTH + OLDER] = older
    row[USERS] = 1
    r[FREE] -= 1
    groups.registers[r[MEMO_AT] + REGISTERS + g] += 1
    return b


@inner
def _give_back_nb(groups: Groups, r: I64, g: int, b: int) -> None:
    """A table lets go of a block."""
    block = at(groups.block, r[BLOCK_AT])
    row, front = at(block, b * BLOCK_WIDTH), at(block, r[POOL_BLOCKS] * BLOCK_WIDTH)
    row[USERS] -= 1
    if row[USERS] == 0:
        last = front[AHEAD]
        block[last * BLOCK_WIDTH + BEHIND] = b
        row[AHEAD] = last
        row[BEHIND] = r[POOL_BLOCKS]
        front[AHEAD] = b
        r[FREE] += 1
        groups.registers[r[MEMO_AT] + REGISTERS + g] -= 1


@inner
def _out_of_queue_nb(block: I32, row: I32) -> None:
    """A free block leaves the queue."""
    block[row[AHEAD] * BLOCK_WIDTH + BEHIND] = row[BEHIND]
    block[row[BEHIND] * BLOCK_WIDTH + AHEAD] = row[AHEAD]
