"""SGLang's prefix cache: `reference.tree.PrefixTree` as rows of nodes.

The content of a page tells all before it as well, so a node is found by its first page alone, wherever it hangs. Leaves
that nobody uses stand in a heap by when they were used last; who has been used since is put back when its turn comes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.batch import column_nb
from apex_opt.simulator.kernel.jit import at, inner
from apex_opt.simulator.kernel.sglang_state import (
    G_BEYOND,
    G_CLOCK,
    G_EVICTABLE,
    G_FREE_NODE,
    G_HASH_AT,
    G_HASH_MASK,
    G_HEAP,
    G_HEAP_AT,
    G_MOST_NODES,
    G_NODE_AT,
    G_NODES,
    G_SPARE_NODES,
    HELD,
    N_CHILDREN,
    N_FROM,
    N_OWNER,
    N_PARENT,
    N_QUEUED,
    N_SIZE,
    N_TO,
    N_USED,
    N_USERS,
    NODE,
    ROOT,
)
from apex_opt.simulator.kernel.state import BLOCK_SIZE, FREE, LIMIT, NONE, PROMPT

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.sglang_state import Engine, Tree
    from apex_opt.simulator.kernel.state import I64


@inner
def empty_tree_nb(e: Engine, tree: Tree | None) -> None:
    """Nothing is known."""
    if tree is None:
        return
    g = e.g
    g[G_NODES], g[G_FREE_NODE], g[G_SPARE_NODES] = 1, NONE, g[G_MOST_NODES] - 1
    g[G_CLOCK], g[G_EVICTABLE], g[G_HEAP] = 0, 0, 0
    root = node_nb(e, tree, ROOT)
    for column in range(N_SIZE):
        root[column] = 0
    root[N_PARENT] = NONE
    root[N_USERS] = 1
    slots = at(tree.slots, g[G_HASH_AT])
    for slot in range(g[G_HASH_MASK] + 1):
        slots[slot] = NONE


@inner
def node_nb(e: Engine, tree: Tree, node: int) -> I64:
    """The row of a node."""
    return at(tree.nodes, (e.g[G_NODE_AT] + node) * N_SIZE)


@inner
def number_nb(e: Engine, tree: Tree, i: int, t: int) -> int:
    """What token t of request i is."""
    prompt = column_nb(e.run, PROMPT)[i]
    if t < prompt:
        per = tree.piece_tokens
        return tree.pieces[tree.starts[i] + t // per] * per + t % per
    if t == prompt + column_nb(e.run, LIMIT)[i] - 1:
        return tree.last[i]
    return tree.own[i] + t - prompt


@inner
def key_nb(e: Engine, tree: Tree, i: int, page: int) -> int:
    """What a page of request i holds, all before it included."""
    return number_nb(e, tree, i, (page + 1) * e.r[BLOCK_SIZE] - 1 + e.g[G_BEYOND])


@inner
def known_pages_nb(e: Engine, tokens: int) -> int:
    """Pages whose content so many tokens tell."""
    return (tokens - e.g[G_BEYOND]) // e.r[BLOCK_SIZE]


@inner
def place_nb(key: int, mask: int) -> int:
    """Where the search for a content begins in the table."""
    h = (key * 0x9E3779B1) & 0x3FFFFFFFFFFFFFFF
    return (h ^ (h >> 29)) & mask


@inner
def begins_nb(e: Engine, tree: Tree, node: int) -> int:
    """What the first page of a node holds."""
    row = node_nb(e, tree, node)
    return key_nb(e, tree, row[N_OWNER], row[N_FROM])


@inner
def child_nb(e: Engine, tree: Tree, key: int) -> int:
    """The node whose first page holds this, or NONE."""
    mask, slots = e.g[G_HASH_MASK], at(tree.slots, e.g[G_HASH_AT])
    slot = place_nb(key, mask)
    while slots[slot] != NONE:
        if begins_nb(e, tree, slots[slot]) == key:
            return slots[slot]
        slot = (slot + 1) & mask
    return NONE


@inner
def enter_table_nb(e: Engine, tree: Tree, node: int) -> None:
    """Let a node be found."""
    mask, slots = e.g[G_HASH_MASK], at(tree.slots, e.g[G_HASH_AT])
    slot = place_nb(begins_nb(e, tree, node), mask)
    while slots[slot] != NONE:
        slot = (slot + 1) & mask
    slots[slot] = node


@inner
def leave_table_nb(e: Engine, tree: Tree, node: int, by: int) -> None:
    """Put another node in a node's place in the table, or NONE."""
    mask, slots = e.g[G_HASH_MASK], at(tree.slots, e.g[G_HASH_AT])
    slot = place_nb(begins_nb(e, tree, node), mask)
    while slots[slot] != node:
        slot = (slot + 1) & mask
    slots[slot] = by
    if by != NONE:
        return
    # Those behind it that would not be found past the gap move up.
    gap = slot
    while True:
        slot = (slot + 1) & mask
        if slots[slot] == NONE:
            return
        home = place_nb(begins_nb(e, tree, slots[slot]), mask)
        if ((slot - home) & mask) >= ((slot - gap) & mask):
            slots[gap] = slots[slot]
            slots[slot] = NONE
            gap = slot


@inner
def new_node_nb(e: Engine, tree: Tree) -> int:
    """A node that is not in use; the turn began with enough of them."""
    g = e.g
    node: int = g[G_FREE_NODE]
    if node != NONE:
        g[G_FREE_NODE] = node_nb(e, tree, node)[N_PARENT]
    else:
        node = g[G_NODES]
        g[G_NODES] += 1
    g[G_SPARE_NODES] -= 1
    row = node_nb(e, tree, node)
    row[N_CHILDREN], row[N_USERS], row[N_QUEUED] = 0, 0, 0
    return node


@inner
def touch_nb(e: Engine, tree: Tree, node: int) -> None:
    """A node is the one used last."""
    e.g[G_CLOCK] += 1
    node_nb(e, tree, node)[N_USED] = e.g[G_CLOCK]


@inner
def split_nb(e: Engine, tree: Tree, node: int, page: int) -> int:
    """Make a node of what is before a page of one; it stands above the rest."""
    above = new_node_nb(e, tree)
    leave_table_nb(e, tree, node, above)
    row, its = node_nb(e, tree, node), node_nb(e, tree, above)
    its[N_OWNER], its[N_FROM], its[N_TO] = row[N_OWNER], row[N_FROM], page
    its[N_PARENT], its[N_USERS], its[N_CHILDREN] = row[N_PARENT], row[N_USERS], 1
    row[N_FROM], row[N_PARENT] = page, above
    enter_table_nb(e, tree, node)
    return above


@inner
def match_nb(e: Engine, tree: Tree, i: int, pages: int) -> tuple[int, int]:
    """Follow the first pages of request i as far as they are known; the node where that ends, and after how many."""
    node, done = ROOT, 0
    while done < pages:
        child = child_nb(e, tree, key_nb(e, tree, i, done))
        if child == NONE:
            break
        row = node_nb(e, tree, child)
        end, owner = row[N_TO], row[N_OWNER]
        # Pages that are alike lie before those that are not.
        least, most = done + 1, min(end, pages)
        if owner == i:
            least = most
        while least < most:
            middle = (least + most + 1) // 2
            if key_nb(e, tree, owner, middle - 1) == key_nb(e, tree, i, middle - 1):
                least = middle
            else:
                most = middle - 1
        if least < end:
            touch_nb(e, tree, child)
            child = split_nb(e, tree, child, least)
        touch_nb(e, tree, child)
        node, done = child, least
    return node, done


@inner
def insert_nb(e: Engine, tree: Tree, i: int, pages: int, border: int) -> tuple[int, int]:
    """Add the first pages of request i, with an end of a node where the border is new; its node, and what was known."""
    node, known = match_nb(e, tree, i, pages)
    done = known
    for step in range(2):
        end = min(border, pages) if step == 0 else pages
        if done < end:
            new = new_node_nb(e, tree)
            row = node_nb(e, tree, new)
            row[N_OWNER], row[N_FROM], row[N_TO], row[N_PARENT] = i, done, end, node
            node_nb(e, tree, node)[N_CHILDREN] += 1
            enter_table_nb(e, tree, new)
            touch_nb(e, tree, new)
            e.g[G_EVICTABLE] += end - done
            node, done = new, end
    return node, known


@inner
def hold_nb(e: Engine, tree: Tree, node: int) -> None:
    """Keep a node, and all above it, from being dropped."""
    while node != ROOT:
        row = node_nb(e, tree, node)
        if row[N_USERS] == 0:
            e.g[G_EVICTABLE] -= row[N_TO] - row[N_FROM]
        row[N_USERS] += 1
        node = row[N_PARENT]


@inner
def let_go_nb(e: Engine, tree: Tree, node: int) -> None:
    """Undo `hold_nb`."""
    while node != ROOT:
        row = node_nb(e, tree, node)
        row[N_USERS] -= 1
        if row[N_USERS] == 0:
            e.g[G_EVICTABLE] += row[N_TO] - row[N_FROM]
            queue_nb(e, tree, node)
        node = row[N_PARENT]


@inner
def queue_nb(e: Engine, tree: Tree, node: int) -> None:
    """Note a node that can be dropped, if it is one and has not been noted."""
    row = node_nb(e, tree, node)
    if row[N_CHILDREN] > 0 or row[N_USERS] > 0 or row[N_QUEUED] == 1:
        return
    row[N_QUEUED] = 1
    heap, place, used = at(tree.heap, e.g[G_HEAP_AT]), e.g[G_HEAP], row[N_USED]
    e.g[G_HEAP] += 1
    while place > 0:
        above = (place - 1) // 2
        if heap[2 * above] <= used:
            break
        heap[2 * place], heap[2 * place + 1] = heap[2 * above], heap[2 * above + 1]
        place = above
    heap[2 * place], heap[2 * place + 1] = used, node


@inner
def first_nb(e: Engine, tree: Tree) -> int:
    """Take out the first of those noted; it is used no later than it says."""
    heap = at(tree.heap, e.g[G_HEAP_AT])
    node: int = heap[1]
    e.g[G_HEAP] -= 1
    size = e.g[G_HEAP]
    used, moved = heap[2 * size], heap[2 * size + 1]
    place = 0
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and heap[2 * below + 2] < heap[2 * below]:
            below += 1
        if heap[2 * below] >= used:
            break
        heap[2 * place], heap[2 * place + 1] = heap[2 * below], heap[2 * below + 1]
        place = below
    heap[2 * place], heap[2 * place + 1] = used, moved
    node_nb(e, tree, node)[N_QUEUED] = 0
    return node


@inner
def drop_nb(e: Engine, tree: Tree, pages: int) -> None:
    """Drop leaves that nobody uses, whole and the least recent first, until so many pages are gone."""
    g, heap = e.g, at(tree.heap, e.g[G_HEAP_AT])
    gone = 0
    while gone < pages and g[G_HEAP] > 0:
        noted = heap[0]
        node = first_nb(e, tree)
        row = node_nb(e, tree, node)
        if row[N_CHILDREN] > 0 or row[N_USERS] > 0:
            continue
        if row[N_USED] != noted:
            queue_nb(e, tree, node)
            continue
        gone += row[N_TO] - row[N_FROM]
        leave_table_nb(e, tree, node, NONE)
        parent = row[N_PARENT]
        row[N_PARENT] = g[G_FREE_NODE]
        g[G_FREE_NODE] = node
        g[G_SPARE_NODES] += 1
        node_nb(e, tree, parent)[N_CHILDREN] -= 1
        queue_nb(e, tree, parent)
    g[G_EVICTABLE] -= gone
    e.r[FREE] += gone


@inner
def cache_nb(e: Engine, tree: Tree, i: int, tokens: int, border: int) -> None:
    """Put the whole pages of request i's first tokens into the tree, which it holds from then on."""
    pages = known_pages_nb(e, tokens)
    held, holds = column_nb(e.run, HELD), column_nb(e.run, NODE)
    node, known = insert_nb(e, tree, i, pages, known_pages_nb(e, border))
    e.r[FREE] += known - held[i]  # computed by others meanwhile: theirs are used
    hold_nb(e, tree, node)
    let_go_nb(e, tree, holds[i])
    holds[i] = node
    held[i] = pages
