"""Two pools on the GPUs of one type: whether both find room, and what link lies between them.

Each lies as it would by itself; inside a node nothing but the number of GPUs is looked at.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from apex_opt.cluster.tree import slowest

if TYPE_CHECKING:
    from apex_opt.cluster.tree import Domain, Tree
    from apex_opt.cluster.types import Link
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan


class Chunks(NamedTuple):
    """Equal groups of GPUs, each of which lies in one node: how many, and GPUs of each."""

    number: int
    size: int

    @classmethod
    def of(cls, plan: Plan, layout: Layout) -> Chunks:
        """Those of a plan in a layout."""
        return cls(plan.devices // layout.node_chunk, layout.node_chunk)

    @property
    def gpus(self) -> int:
        """GPUs of all of them."""
        return self.number * self.size


def find_room(tree: Tree, one: Chunks, other: Chunks) -> bool:
    """Whether both find room in the nodes of a tree.

    Parameters
    ----------
    tree
    one, other : Chunks    of two pools
    """
    nodes = tuple(sorted(Counter(tree.free(node) for node in _nodes(tree)).items()))
    if one.gpus + other.gpus > tree.size:
        return False
    small, large = sorted((one, other), key=lambda chunks: chunks.size)
    if large.size % small.size == 0 and all(free % large.size == 0 for free, _ in nodes):
        return True  # what is left of a node beside large chunks is a whole number of small ones
    return _most_beside(nodes, large, small.size) >= small.number


def link_between(tree: Tree, gpus: int) -> Link | None:
    """The link between two pools of so many GPUs together: inside a node where they fit into one, else the worst there
    is; None for one GPU."""
    nodes = _nodes(tree)
    inside = [node.link for node in nodes if tree.free(node) >= gpus and node.link is not None]
    if inside:
        return slowest(inside)
    far = [link for level in tree.levels if level.far for link in level.reach]
    near = [node.link for node in nodes if node.link is not None]
    return slowest(far) if far else slowest(near) if near else None


def _nodes(tree: Tree) -> tuple[Domain, ...]:
    """The domains that are nodes."""
    return [level for level in tree.levels if not level.far][-1].domains


@lru_cache(maxsize=1 << 12)
def _most_beside(nodes: tuple[tuple[int, int], ...], chunks: Chunks, size: int) -> int:
    """Most chunks of a size that find room beside others; -1 where those do not.

    Parameters
    ----------
    nodes : (free GPUs, nodes with as many)
    chunks : the others
    size : int
    """
    best = {0: 0}  # by the chunks that are placed, the most of the others beside them
    for free, count in nodes:
        for _ in range(count):
            after: dict[int, int] = {}
            for placed, beside in best.items():
                for more in range(min(free // chunks.size, chunks.number - placed) + 1):
                    room = beside + (free - more * chunks.size) // size
                    after[placed + more] = max(after.get(placed + more, -1), room)
            best = after
    return best.get(chunks.number, -1)
