"""KV blocks with prefix caching: `reference.blocks.PrefixCachingManager` as links in columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    AHEAD,
    BEHIND,
    BLOCK_AT,
    BLOCK_WIDTH,
    CONTENT,
    CONTENTS,
    FOUND_AT,
    HOLDER_AT,
    HOLDER_WIDTH,
    MARK,
    MEMO_AT,
    MEMO_FOUND,
    MEMO_REQUEST,
    MEMO_STAMP,
    MEMO_UNUSED,
    NEWER,
    NEWEST,
    NONE,
    OLDER,
    OLDEST,
    POOL_BLOCKS,
    SLOTS,
    SLOTS_AT,
    TABLE_AT,
    TABLE_WIDTH,
    USERS,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I32, I64, Cache


@inner
def memo_nb(cache: Cache, r: I64) -> I64:
    """What was found last."""
    return at(cache.memo, r[MEMO_AT])


@inner
def block_nb(cache: Cache, r: I64) -> I32:
    """What is known of the blocks of a replica."""
    return at(cache.block, r[BLOCK_AT])


@inner
def holder_nb(cache: Cache, r: I64) -> I32:
    """Which blocks hold each content."""
    return at(cache.holder, r[HOLDER_AT])


@inner
def table_nb(cache: Cache, r: I64, i: int) -> I32:
    """The blocks of a running request, in order."""
    return at(cache.table, r[TABLE_AT] + cache.slot[i] * r[TABLE_WIDTH])


@inner
def empty_cache_nb(cache: Cache, r: I64) -> None:
    """All blocks free, in order, and nothing known."""
    block, holder = block_nb(cache, r), holder_nb(cache, r)
    ends = r[POOL_BLOCKS]
    for b in range(ends + 1):
        row = at(block, b * BLOCK_WIDTH)
        row[USERS] = 0
        row[CONTENT] = NONE
        row[BEHIND] = b + 1 if b < ends else 0
        row[AHEAD] = b - 1 if b > 0 else ends
        row[MARK] = 0
    for key in range(r[CONTENTS] * HOLDER_WIDTH):
        holder[key] = NONE
    for slot in range(r[SLOTS]):
        cache.slots[r[SLOTS_AT] + slot] = slot
    memo_nb(cache, r)[MEMO_REQUEST] = NONE


@inner
def key_nb(cache: Cache, i: int, j: int) -> int:
    """Content of a request's j-th block."""
    shared = cache.shared[i]
    if j < shared:
        per = cache.piece_blocks
        return cache.pieces[cache.starts[i] + j // per] * per + j % per
    return cache.own[i] + j - shared


@inner
def found_nb(cache: Cache, r: I64, i: int, most: int) -> tuple[int, int]:
    """Blocks that hold the beginning of request i, at most so many, and those of them that nobody uses."""
    block, holder, memo = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r)
    if memo[MEMO_REQUEST] != i:
        memo[MEMO_REQUEST] = i
        memo[MEMO_FOUND] = 0
        memo[MEMO_UNUSED] = 0
        memo[MEMO_STAMP] += 1
    stamp, found, unused = memo[MEMO_STAMP], memo[MEMO_FOUND], memo[MEMO_UNUSED]
    while found < most:
        b = holder[key_nb(cache, i, found) * HOLDER_WIDTH + OLDEST]
        if b == NONE:
            break
        row = at(block, b * BLOCK_WIDTH)
        if row[USERS] == 0:
            unused += 1
        row[MARK] = stamp
        row[FOUND_AT] = found
        found += 1
    memo[MEMO_FOUND] = found
    memo[MEMO_UNUSED] = unused
    return found, unused


@inner
def recomputed_nb(cache: Cache, r: I64, i: int, j: int) -> int:
    """Whether nobody uses the block that holds the j-th content of request i, which it computes again."""
    b = holder_nb(cache, r)[key_nb(cache, i, j) * HOLDER_WIDTH + OLDEST]
    return 1 if block_nb(cache, r)[b * BLOCK_WIDTH + USERS] == 0 else 0


@inner
def take_nb(cache: Cache, r: I64, i: int, held: int, found: int, total: int) -> None:
    """Give request i its found blocks, then fresh ones from the front of the queue, up to a total."""
    block, holder, memo, table = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r), table_nb(cache, r, i)
    front = at(block, r[POOL_BLOCKS] * BLOCK_WIDTH)
    for j in range(held, total):
        b = holder[key_nb(cache, i, j) * HOLDER_WIDTH + OLDEST] if j < found else front[BEHIND]
        row = at(block, b * BLOCK_WIDTH)
        if row[USERS] == 0:
            block[row[AHEAD] * BLOCK_WIDTH + BEHIND] = row[BEHIND]
            block[row[BEHIND] * BLOCK_WIDTH + AHEAD] = row[AHEAD]
            if row[MARK] == memo[MEMO_STAMP]:
                memo[MEMO_UNUSED] -= 1
        if j >= found and row[CONTENT] != NONE:
            forget_nb(cache, r, b)
        row[USERS] += 1
        table[j] = b


@inner
def forget_nb(cache: Cache, r: I64, b: int) -> None:
    """The content of a block is overwritten: nobody finds it any more, nor what would follow it."""
    block, holder, memo = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r)
    row = at(block, b * BLOCK_WIDTH)
    waits = memo[MEMO_REQUEST]
    if row[MARK] == memo[MEMO_STAMP] and waits != NONE:
        # What was found for the request that waits ends before this block now.
        for later in range(row[FOUND_AT] + 1, memo[MEMO_FOUND]):
            lost = at(block, holder[key_nb(cache, waits, later) * HOLDER_WIDTH + OLDEST] * BLOCK_WIDTH)
            if lost[USERS] == 0:
                memo[MEMO_UNUSED] -= 1
            lost[MARK] = 0
        memo[MEMO_FOUND] = row[FOUND_AT]
        row[MARK] = 0
    holders = at(holder, row[CONTENT] * HOLDER_WIDTH)
    row[CONTENT] = NONE
    older, newer = row[OLDER], row[NEWER]
    if older == NONE:
        holders[OLDEST] = newer
    else:
        block[older * BLOCK_WIDTH + NEWER] = newer
    if newer == NONE:
        holders[NEWEST] = older
    else:
        block[newer * BLOCK_WIDTH + OLDER] = older


@inner
def register_nb(cache: Cache, r: I64, i: int, full: int) -> None:
    """The first `full` blocks of request i can be found from now on."""
    block, table = block_nb(cache, r), table_nb(cache, r, i)
    for j in range(cache.registered[i], full):
        b = table[j]
        key = key_nb(cache, i, j)
        row, holders = at(block, b * BLOCK_WIDTH), at(holder_nb(cache, r), key * HOLDER_WIDTH)
        last = holders[NEWEST]
        row[CONTENT] = key
        row[OLDER] = last
        row[NEWER] = NONE
        if last == NONE:
            holders[OLDEST] = b
        else:
            block[last * BLOCK_WIDTH + NEWER] = b
        holders[NEWEST] = b
    if full > cache.registered[i]:
        cache.registered[i] = full


@inner
def release_nb(cache: Cache, r: I64, i: int, held: int) -> int:
    """Give all blocks of request i back, the last one first; how many of them are free now."""
    block, memo, table = block_nb(cache, r), memo_nb(cache, r), table_nb(cache, r, i)
    ends = r[POOL_BLOCKS]
    front = at(block, ends * BLOCK_WIDTH)
    freed = 0
    for j in range(held - 1, -1, -1):
        b = table[j]
        row = at(block, b * BLOCK_WIDTH)
        row[USERS] -= 1
        if row[USERS] == 0:
            last = front[AHEAD]
            block[last * BLOCK_WIDTH + BEHIND] = b
            row[AHEAD] = last
            row[BEHIND] = ends
            front[AHEAD] = b
            freed += 1
            if row[MARK] == memo[MEMO_STAMP]:
                memo[MEMO_UNUSED] += 1
    cache.registered[i] = 0
    return freed
