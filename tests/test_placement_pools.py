"""Two pools on the GPUs of one type: room for both against every way to fill the nodes, and the link between."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st
from plan_cases import make_cluster

from apex_opt.cluster import Tree
from apex_opt.placement.pools import Chunks, find_room, link_between


def by_hand(free: list[int], one: Chunks, other: Chunks) -> bool:
    """Whether some way to give every node a number of chunks of the first leaves room for the second."""
    for placed in product(*(range(gpus // one.size + 1) for gpus in free)):
        left = (gpus - count * one.size for gpus, count in zip(free, placed, strict=True))
        if sum(placed) == one.number and sum(gpus // other.size for gpus in left) >= other.number:
            return True
    return False


CHUNKS = st.builds(Chunks, st.integers(1, 6), st.integers(1, 5))


@given(st.lists(st.integers(0, 6), min_size=2, max_size=4), CHUNKS, CHUNKS)
def test_two_pools_find_room_where_some_way_to_fill_the_nodes_has_it(
    busy: list[int], one: Chunks, other: Chunks
) -> None:
    cluster = make_cluster(6, nodes=len(busy))
    taken = {f"node{node}:{local}" for node, count in enumerate(busy) for local in range(min(count, 5))}
    tree = Tree.of(cluster, taken)
    free = [6 - min(count, 5) for count in busy]
    assert find_room(tree, one, other) == by_hand(free, one, other)
    assert find_room(tree, other, one) == find_room(tree, one, other)


def test_pools_that_fit_into_a_node_are_linked_inside_it_and_others_over_the_network() -> None:
    cluster = make_cluster(4, nodes=2)
    tree = Tree.of(cluster)
    assert link_between(tree, 4) == cluster.intra
    assert link_between(tree, 5) == cluster.inter
    assert link_between(Tree.of(make_cluster(4)), 4) == make_cluster(4).intra
