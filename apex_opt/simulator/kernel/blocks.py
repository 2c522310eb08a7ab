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
    HOLDER_AT,
    LINE_WIDTH,
    MARK,
    MEMO_AT,
    MEMO_FOUND,
    MEMO_LAID,
    MEMO_REQUEST,
    MEMO_STAMP,
    MEMO_UNUSED,
    NEVER,
    NEWER,
    NONE,
    NOTHING,
    OLDER,
    POOL_BLOCKS,
    SLOTS,
    SLOTS_AT,
    TABLE_AT,
    TABLE_WIDTH,
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
    block, holder, memo = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r)
    for b in range(memo[MEMO_LAID] + 1):
        holder[abs(block[b * BLOCK_WIDTH + CONTENT])] = NOTHING
    block[CONTENT], block[BEHIND], block[AHEAD] = NOTHING, NOTHING, NOTHING
    memo[MEMO_LAID] = 0
    lay_nb(cache, r)
    for slot in range(r[SLOTS]):
        cache.slots[r[SLOTS_AT] + slot] = slot
    memo[MEMO_REQUEST] = NONE


@inner
def lay_nb(cache: Cache, r: I64) -> None:
    """Put the next block that was never used to the front of the queue, where there is one.

    Those behind it come before all that were given back, so they need not be there before their turn.
    """
    block, memo = block_nb(cache, r), memo_nb(cache, r)
    if memo[MEMO_LAID] < r[POOL_BLOCKS]:
        memo[MEMO_LAID] += 1
        b, behind = memo[MEMO_LAID], block[BEHIND]
        row = at(block, b * BLOCK_WIDTH)
        row[CONTENT], row[BEHIND], row[AHEAD], row[MARK] = NOTHING, behind, NOTHING, 0
        block[behind * BLOCK_WIDTH + AHEAD] = b
        block[BEHIND] = b


@inner
def keys_nb(cache: Cache, i: int, j: int) -> tuple[int, int]:
    """Content of a request's j-th block, from 1, and the block before which it stops counting on from there."""
    shared = cache.shared[i]
    if j >= shared:
        return cache.own[i] + j - shared + 1, NEVER
    per = cache.piece_blocks
    piece = j // per
    return (cache.pieces[cache.starts[i] + piece] - piece) * per + j + 1, min(shared, (piece + 1) * per)


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
    key = end = found
    while found < most:
        if found == end:
            key, end = keys_nb(cache, i, found)
        b = holder[key]
        if b == NOTHING:
            break
        row = at(block, b * BLOCK_WIDTH)
        if row[AHEAD] >= 0:
            unused += 1
        row[MARK] = stamp
        found += 1
        key += 1
    memo[MEMO_FOUND] = found
    memo[MEMO_UNUSED] = unused
    return found, unused


@inner
def recomputed_nb(cache: Cache, r: I64, i: int, j: int) -> int:
    """Whether nobody uses the block that holds the j-th content of request i, which it computes again."""
    key, _ = keys_nb(cache, i, j)
    return 1 if block_nb(cache, r)[holder_nb(cache, r)[key] * BLOCK_WIDTH + AHEAD] >= 0 else 0


@inner
def take_nb(cache: Cache, r: I64, i: int, held: int, found: int, total: int) -> None:
    """Give request i its found blocks, then fresh ones from the front of the queue, up to a total."""
    block, holder, memo, table = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r), table_nb(cache, r, i)
    stamp = memo[MEMO_STAMP]
    key = end = held
    for j in range(held, found):
        if j == end:
            key, end = keys_nb(cache, i, j)
        b = holder[key]
        row = at(block, b * BLOCK_WIDTH)
        if row[AHEAD] >= 0:
            block[row[AHEAD] * BLOCK_WIDTH + BEHIND] = row[BEHIND]
            block[row[BEHIND] * BLOCK_WIDTH + AHEAD] = row[AHEAD]
            row[AHEAD] = 0
            if row[MARK] == stamp:
                memo[MEMO_UNUSED] -= 1
        row[AHEAD] -= 1
        table[j] = b
        key += 1
    for j in range(max(held, found), total):
        front = block[BEHIND]
        row = at(block, front * BLOCK_WIDTH)
        if row[MARK] == stamp:
            memo[MEMO_UNUSED] -= 1
        if row[CONTENT] != NOTHING:
            forget_nb(cache, r, front)
        table[j] = front
        block[BEHIND] = row[BEHIND]
        block[row[BEHIND] * BLOCK_WIDTH + AHEAD] = NOTHING
        row[AHEAD] = -1
        if front == memo[MEMO_LAID]:
            lay_nb(cache, r)


@inner
def forget_nb(cache: Cache, r: I64, b: int) -> None:
    """The content of a block is overwritten: nobody finds it any more, nor what would follow it."""
    memo, row = memo_nb(cache, r), at(block_nb(cache, r), b * BLOCK_WIDTH)
    if row[MARK] == memo[MEMO_STAMP] and memo[MEMO_REQUEST] != NONE:
        lose_nb(cache, r, b)
    key = row[CONTENT]
    row[CONTENT] = NOTHING
    if key > 0:
        holder_nb(cache, r)[key] = NOTHING
    else:
        unlink_nb(cache, r, b, -key)


@inner
def lose_nb(cache: Cache, r: I64, b: int) -> None:
    """What was found for the request that waits ends before a block now."""
    block, holder, memo = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r)
    other = NOTHING
    while other != b:
        memo[MEMO_FOUND] -= 1
        key, _ = keys_nb(cache, memo[MEMO_REQUEST], memo[MEMO_FOUND])
        other = holder[key]
        row = at(block, other * BLOCK_WIDTH)
        row[MARK] = 0
        if row[AHEAD] >= 0 and other != b:
            memo[MEMO_UNUSED] -= 1


@inner
def line_nb(cache: Cache, r: I64, b: int) -> I32:
    """Where a block stands in the line of those with its content."""
    return at(block_nb(cache, r), (r[POOL_BLOCKS] + 1) * BLOCK_WIDTH + b * LINE_WIDTH)


@inner
def unlink_nb(cache: Cache, r: I64, b: int, key: int) -> None:
    """Strike a block from the line of those with its content."""
    holder, line = holder_nb(cache, r), line_nb(cache, r, b)
    older, newer, oldest = line[OLDER], line[NEWER], holder[key]
    if oldest == b:
        holder[key] = newer
        if newer != NOTHING:
            line_nb(cache, r, newer)[OLDER] = older
    else:
        line_nb(cache, r, older)[NEWER] = newer
        line_nb(cache, r, oldest if newer == NOTHING else newer)[OLDER] = older


@inner
def link_nb(cache: Cache, r: I64, b: int, key: int, oldest: int) -> None:
    """Put a block at the end of the line of those with its content."""
    first, line = line_nb(cache, r, oldest), line_nb(cache, r, b)
    row = at(block_nb(cache, r), oldest * BLOCK_WIDTH)
    if row[CONTENT] > 0:
        row[CONTENT] = -key
        first[OLDER] = oldest
    line[OLDER] = first[OLDER]
    line[NEWER] = NOTHING
    line_nb(cache, r, first[OLDER])[NEWER] = b
    first[OLDER] = b


@inner
def register_nb(cache: Cache, r: I64, i: int, full: int) -> None:
    """The first `full` blocks of request i can be found from now on."""
    block, holder, table = block_nb(cache, r), holder_nb(cache, r), table_nb(cache, r, i)
    first = cache.registered[i]
    key = end = first
    for j in range(first, full):
        if j == end:
            key, end = keys_nb(cache, i, j)
        b = table[j]
        row, oldest = at(block, b * BLOCK_WIDTH), holder[key]
        if oldest == NOTHING:
            holder[key] = b
            row[CONTENT] = key
        else:
            link_nb(cache, r, b, key, oldest)
            row[CONTENT] = -key
        key += 1
    cache.registered[i] = max(first, full)


@inner
def release_nb(cache: Cache, r: I64, i: int, held: int) -> int:
    """Give all blocks of request i back, the last one first; how many of them are free now."""
    block, memo, table = block_nb(cache, r), memo_nb(cache, r), table_nb(cache, r, i)
    stamp, last, freed = memo[MEMO_STAMP], block[AHEAD], 0
    for j in range(held - 1, -1, -1):
        b = table[j]
        row = at(block, b * BLOCK_WIDTH)
        row[AHEAD] += 1
        if row[AHEAD] == 0:
            block[last * BLOCK_WIDTH + BEHIND] = b
            row[AHEAD] = last
            last = b
            freed += 1
            if row[MARK] == stamp:
                memo[MEMO_UNUSED] += 1
    block[last * BLOCK_WIDTH + BEHIND] = NOTHING
    block[AHEAD] = last
    cache.registered[i] = 0
    return freed
