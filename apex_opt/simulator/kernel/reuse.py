"""KV blocks of TensorRT-LLM with block reuse: `reference.reuse` without lists of what stands under a block.

A block in the tree tells the block above it and how often that one had been put into the tree by then. Where that one
has left the tree, or been put there anew, what stood under it is not found from the root on, and so has left as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.blocks import block_nb, holder_nb, keys_nb, memo_nb, table_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.state import (
    ABOVE,
    ABOVE_PUT,
    AHEAD,
    BEHIND,
    CONTENT,
    CONTENTS,
    MEMO_LAID,
    MEMO_STAMP,
    NOTHING,
    POOL_BLOCKS,
    PUT,
    REUSED_WIDTH,
    SLOTS,
    SLOTS_AT,
    SLOTS_USED,
)

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I32, I64, Cache


@inner
def empty_reuse_nb(cache: Cache, r: I64) -> None:
    """All blocks free, in order, and nothing known."""
    block, holder, memo = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r)
    for b in range(memo[MEMO_LAID] + 1):
        holder[block[b * REUSED_WIDTH + CONTENT]] = NOTHING
    block[CONTENT], block[BEHIND], block[AHEAD], block[PUT] = NOTHING, NOTHING, NOTHING, 0
    memo[MEMO_LAID], r[SLOTS_USED] = 0, 0
    lay_free_nb(cache, r)
    for slot in range(r[SLOTS]):
        cache.slots[r[SLOTS_AT] + slot] = slot


@inner
def lay_free_nb(cache: Cache, r: I64) -> None:
    """Put the next block that was never used to the front of the queue; see `blocks.lay_nb`."""
    block, memo = block_nb(cache, r), memo_nb(cache, r)
    if memo[MEMO_LAID] < r[POOL_BLOCKS]:
        memo[MEMO_LAID] += 1
        b, behind = memo[MEMO_LAID], block[BEHIND]
        row = at(block, b * REUSED_WIDTH)
        row[CONTENT], row[BEHIND], row[AHEAD], row[PUT] = NOTHING, behind, NOTHING, 0
        block[behind * REUSED_WIDTH + AHEAD] = b
        block[BEHIND] = b


@inner
def under_nb(block: I32, holder: I32, key: int, above: int) -> int:
    """The block with this content under a block of the tree."""
    b: int = holder[key]
    row = at(block, b * REUSED_WIDTH)
    if b == NOTHING or row[ABOVE] != above or row[ABOVE_PUT] != block[above * REUSED_WIDTH + PUT]:
        return NOTHING
    return b


@inner
def reusable_nb(cache: Cache, r: I64, i: int, most: int) -> tuple[int, int, int]:
    """Blocks that hold the beginning of request i, at most so many; those that somebody has; and the last of them."""
    block, holder = block_nb(cache, r), holder_nb(cache, r)
    found, used, last = 0, 0, NOTHING
    key = end = 0
    while found < most:
        if found == end:
            key, end = keys_nb(cache, i, found)
        b = under_nb(block, holder, key, last)
        if b == NOTHING:
            break
        used += 1 if block[b * REUSED_WIDTH + AHEAD] < 0 else 0
        last = b
        found += 1
        key += 1
    return found, used, last


@inner
def new_content_nb(cache: Cache, r: I64, i: int, found: int, last: int, whole: int) -> int:
    """The first of so many whole blocks of request i that is not in the tree, where so many are found; or NOTHING."""
    if found < whole:
        key, _ = keys_nb(cache, i, found)
        if under_nb(block_nb(cache, r), holder_nb(cache, r), key, last) == NOTHING:
            return key
    return NOTHING


@inner
def comes_nb(cache: Cache, r: I64, key: int) -> bool:
    """Whether somebody computes this content in this pass; from now on somebody does."""
    holder, stamp = holder_nb(cache, r), memo_nb(cache, r)[MEMO_STAMP]
    if holder[r[CONTENTS] + key] == stamp:
        return True
    holder[r[CONTENTS] + key] = stamp
    return False


@inner
def claim_nb(cache: Cache, r: I64, i: int, found: int) -> int:
    """Give request i, which has no blocks, so many of the tree; how many of these were free."""
    cache.slot[i] = cache.slots[r[SLOTS_AT] + r[SLOTS_USED]]
    r[SLOTS_USED] += 1
    block, holder, table = block_nb(cache, r), holder_nb(cache, r), table_nb(cache, r, i)
    free = 0
    key = end = 0
    for j in range(found):
        if j == end:
            key, end = keys_nb(cache, i, j)
        b = holder[key]
        row = at(block, b * REUSED_WIDTH)
        if row[AHEAD] >= 0:
            block[row[AHEAD] * REUSED_WIDTH + BEHIND] = row[BEHIND]
            block[row[BEHIND] * REUSED_WIDTH + AHEAD] = row[AHEAD]
            row[AHEAD] = 0
            free += 1
        row[AHEAD] -= 1
        table[j] = b
        key += 1
    return free


@inner
def take_free_nb(cache: Cache, r: I64, i: int, held: int, total: int) -> None:
    """Give request i blocks from the front of the queue, up to a total; what they held is not in the tree any more."""
    block, holder, memo, table = block_nb(cache, r), holder_nb(cache, r), memo_nb(cache, r), table_nb(cache, r, i)
    for j in range(held, total):
        front = block[BEHIND]
        row = at(block, front * REUSED_WIDTH)
        if row[CONTENT] != NOTHING:
            if holder[row[CONTENT]] == front:
                holder[row[CONTENT]] = NOTHING
            row[CONTENT] = NOTHING
        table[j] = front
        block[BEHIND] = row[BEHIND]
        block[row[BEHIND] * REUSED_WIDTH + AHEAD] = NOTHING
        row[AHEAD] = -1
        if front == memo[MEMO_LAID]:
            lay_free_nb(cache, r)


@inner
def store_nb(cache: Cache, r: I64, i: int, whole: int) -> None:
    """So many blocks of request i stand in the tree, or others with the same content."""
    block, holder, table = block_nb(cache, r), holder_nb(cache, r), table_nb(cache, r, i)
    above, known = NOTHING, True
    key = end = 0
    for j in range(whole):
        if j == end:
            key, end = keys_nb(cache, i, j)
        b = under_nb(block, holder, key, above) if known else NOTHING
        if b == NOTHING:
            known, b = False, table[j]
            row = at(block, b * REUSED_WIDTH)
            row[CONTENT], row[ABOVE], row[ABOVE_PUT] = key, above, block[above * REUSED_WIDTH + PUT]
            row[PUT] += 1
            holder[key] = b
        above = b
        key += 1


@inner
def give_back_nb(cache: Cache, r: I64, i: int, held: int) -> int:
    """Give all blocks of request i back, the last one first; how many of them are free now."""
    block, table = block_nb(cache, r), table_nb(cache, r, i)
    last, freed = block[AHEAD], 0
    for j in range(held - 1, -1, -1):
        b = table[j]
        row = at(block, b * REUSED_WIDTH)
        row[AHEAD] += 1
        if row[AHEAD] == 0:
            block[last * REUSED_WIDTH + BEHIND] = b
            row[AHEAD] = last
            last = b
            freed += 1
    block[last * REUSED_WIDTH + BEHIND] = NOTHING
    block[AHEAD] = last
    r[SLOTS_USED] -= 1
    cache.slots[r[SLOTS_AT] + r[SLOTS_USED]] = cache.slot[i]
    return freed
