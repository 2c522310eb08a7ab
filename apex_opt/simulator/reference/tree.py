"""SGLang's prefix cache: a tree of runs of pages, whose leaves that nobody uses are dropped, the least recent first.

Source: `UnifiedRadixCache` of SGLang 0.5.23, in our own words; recorded batches settle it.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq


@dataclass(slots=True, eq=False)
class Node:
    """A run of pages after those of its parent.

    Parameters
    ----------
    keys : list of int           content of its pages, equal only where all before it is equal too
    parent : Node or None        None of the root alone
    children : dict              by the content of their first page
    users : int                  requests that hold it or what lies below it
    used : int                   when it was matched or inserted last, on the tree's own clock
    """

    keys: list[int]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)
    users: int = 0
    used: int = 0


class PrefixTree:
    """All pages whose content is known; `evictable` counts those that nobody uses."""

    def __init__(self) -> None:
        self.root = Node([], None, users=1)
        self.evictable = 0
        self._clock = 0

    def match(self, keys: Seq[int]) -> tuple[Node, int]:
        """Follow a content from the root as far as it is known; where it ends, and after how many pages.

        Every node on the way is the most recently used after it, the deepest one last. A node of which only the
        beginning is matched is split; its rest has then been used as well.
        """
        node, done = self.root, 0
        while done < len(keys) and (child := node.children.get(keys[done])) is not None:
            alike = _alike(child.keys, keys, done)
            if alike < len(child.keys):
                self._touch(child)
                child = self._split(child, alike)
            self._touch(child)
            node, done = child, done + alike
        return node, done

    def insert(self, keys: Seq[int], border: int) -> tuple[Node, int]:
        """Add a content; its last node, and how many pages were known.

        Parameters
        ----------
        keys : sequence of int    content of the pages, from the first
        border : int              pages after which a node ends, where those around it are new
        """
        node, known = self.match(keys)
        done = known
        for end in (border, len(keys)):
            if done < end <= len(keys):
                new = Node(list(keys[done:end]), node)
                node.children[keys[done]] = new
                self._touch(new)
                self.evictable += end - done
                node, done = new, end
        return node, known

    def hold(self, node: Node) -> None:
        """Keep a node, and all above it, from being dropped."""
        while node.parent is not None:
            if node.users == 0:
                self.evictable -= len(node.keys)
            node.users += 1
            node = node.parent

    def let_go(self, node: Node) -> None:
        """Undo a `hold`."""
        while node.parent is not None:
            node.users -= 1
            if node.users == 0:
                self.evictable += len(node.keys)
            node = node.parent

    def drop(self, pages: int) -> int:
        """Drop leaves that nobody uses, whole, the least recent first, until so many pages are gone; how many are."""
        leaves = [(leaf.used, leaf) for leaf in self._unused_leaves()]
        heapq.heapify(leaves)
        gone = 0
        while leaves and gone < pages:
            leaf = heapq.heappop(leaves)[1]
            gone += len(leaf.keys)
            parent = leaf.parent
            assert parent is not None
            del parent.children[leaf.keys[0]]
            if parent.parent is not None and not parent.children and parent.users == 0:
                heapq.heappush(leaves, (parent.used, parent))
        self.evictable -= gone
        return gone

    def _unused_leaves(self) -> list[Node]:
        found, open_ = [], [self.root]
        while open_:
            node = open_.pop()
            open_ += node.children.values()
            if not node.children and node.users == 0:
                found.append(node)
        return found

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.used = self._clock

    def _split(self, node: Node, pages: int) -> Node:
        """Make a node of the first pages of one; it stands above the rest."""
        assert node.parent is not None
        above = Node(node.keys[:pages], node.parent, users=node.users)
        node.parent.children[above.keys[0]] = above
        node.keys, node.parent = node.keys[pages:], above
        above.children[node.keys[0]] = node
        return above


def _alike(run: Seq[int], keys: Seq[int], start: int) -> int:
    """How many pages at the beginning of a run are those of a content from there on, the first of them in any case."""
    least, most = 1, min(len(run), len(keys) - start)
    while least < most:
        middle = (least + most + 1) // 2
        if run[middle - 1] == keys[start + middle - 1]:
            least = middle
        else:
            most = middle - 1
    return least
