"""Ranks on GPUs: whole chunks in every domain, and what an assignment amounts to, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from topology_cases import compositions

from apex_opt.cluster import Composition, Network, Tree, load_cluster, load_wiring
from apex_opt.cluster.tree import place_of
from apex_opt.placement import Shape, layout_of, rank_order
from apex_opt.placement.assignment import arranged, filled

if TYPE_CHECKING:
    from apex_opt.plans.layout import Tier


def composed(name: str) -> Composition:
    found = load_wiring(name)
    assert isinstance(found, Composition)
    return found


def tiers(tree: Tree, stages: int, ranks: int, *replicas: str) -> list[tuple[str, int, float]]:
    """Kind, ranks and GB/s of the tiers of replicas given as GPUs of nodes: `0:0 0:1`."""
    gpus = [f"node{gpu}" for replica in replicas for gpu in replica.split()]
    shape = Shape(len(replicas), stages, ranks)
    return [told(tier) for tier in layout_of(tree, shape, arranged(gpus, shape)).tiers]


def told(tier: Tier) -> tuple[str, int, float]:
    return tier.kind, tier.chunk, tier.link.bytes_per_s / 1e9


@st.composite
def fillings(draw: st.DrawFn) -> tuple[Tree, list[int], list[int]]:
    """Chunks, and GPUs used of every bin such that every domain has a multiple of its own."""
    tree = Tree.of(draw(compositions()))
    pieces = [[[index]] * len(part.gpus) for index, part in enumerate(tree.bins)]
    chunks, below = [], 1
    for parts_of in tree.parts:
        times = draw(st.integers(1, 3))
        below *= times
        chunks.append(below)
        joined = []
        for parts in parts_of:
            flat = [piece for part in parts for piece in pieces[part]]
            whole = range(0, len(flat) // times * times, times)
            joined.append([[index for piece in flat[at : at + times] for index in piece] for at in whole])
        pieces = joined
    (kept,) = pieces
    assume(kept)
    held = [index for piece in kept for index in piece]
    return tree, chunks, [held.count(index) for index in range(len(tree.bins))]


@given(fillings(), st.booleans())
def test_every_chunk_is_whole_in_a_domain_and_every_gpu_used_holds_one_rank(
    case: tuple[Tree, list[int], list[int]], parted: bool
) -> None:
    tree, chunks, used = case
    shape = Shape(sum(used) // chunks[-1], 1, chunks[-1])
    ranks = [gpu for (stage,) in filled(tree, shape, chunks, used, parted=parted) for gpu in stage]
    assert len(set(ranks)) == len(ranks) == shape.size
    bin_of = {gpu: index for index, part in enumerate(tree.bins) for gpu in part.gpus}
    assert [sum(bin_of[gpu] == index for gpu in ranks) for index in range(len(used))] == used
    for level, chunk in zip(tree.levels, chunks, strict=True):
        home = {index: d.name for d in level.domains for index in range(d.first, d.last)}
        for at in range(0, len(ranks), chunk):
            assert len({home[bin_of[gpu]] for gpu in ranks[at : at + chunk]}) == 1


def test_pairs_on_switches_make_up_fours_on_nodes() -> None:
    tree = Tree.of(composed("2xserver-8xl40s"), {"node0:1", "node1:6"})
    assignment = filled(tree, Shape(2, 1, 4), (2, 2, 4, 4), (0, 2, 2, 0, 2, 2, 0, 0))
    assert assignment == (
        (("node0:2", "node0:3", "node0:4", "node0:5"),),
        (("node1:0", "node1:1", "node1:2", "node1:3"),),
    )


def test_the_first_chunk_is_made_of_several_parts_where_asked_for() -> None:
    tree = Tree.of(composed("server-8xl40s"))
    shape = Shape(2, 1, 4)
    whole = filled(tree, shape, (2, 2, 4), (2, 2, 2, 2))
    parted = filled(tree, shape, (2, 2, 4), (2, 2, 2, 2), parted=True)
    assert [gpus[0] for (gpus,) in whole] == ["node0:0", "node0:4"]
    assert {place_of(gpu)[1] // 4 for gpu in parted[0][0]} == {0, 1}


def test_ranks_in_order_fill_the_free_gpus_in_order() -> None:
    tree = Tree.of(load_cluster("2x4xh100-sxm"), {"node0:1"})
    assert rank_order(tree, Shape(2, 2, 1)) == ((("node0:0",), ("node0:2",)), (("node0:3",), ("node1:0",)))


def test_a_placement_is_as_good_as_its_worst_replica() -> None:
    tree = Tree.of(load_cluster("2x4xh100-sxm"))
    near, far = 450, 50
    assert tiers(tree, 1, 4, "0:0 0:1 0:2 0:3", "1:0 1:1 1:2 1:3") == [("node", 4, near)]
    assert tiers(tree, 1, 4, "0:0 0:1 1:0 1:1") == [("node", 2, near), ("cluster", 4, far)]
    assert tiers(tree, 1, 2, "0:0 0:1", "0:2 1:0") == [("cluster", 2, far)]
    # The chunks are equal: three and one are four of one.
    assert tiers(tree, 1, 4, "0:0 0:1 0:2 1:0") == [("cluster", 4, far)]
    assert tiers(tree, 1, 1, "0:0", "1:3") == []
    # Stages lie whole on nodes, or cut into equal parts.
    assert tiers(tree, 2, 2, "0:0 0:1 1:0 1:1") == [("node", 2, near), ("cluster", 4, far)]
    assert tiers(tree, 3, 2, "0:0 0:1 0:2 0:3 1:0 1:1") == [("node", 2, near), ("cluster", 6, far)]


def test_cards_on_a_switch_share_its_uplink_and_sockets_the_link_between_them() -> None:
    tree = Tree.of(composed("server-8xl40s"))
    up, across = (level.domains[0].out_bytes_per_s / 1e9 for level in tree.levels[:2])
    assert (up, across) == (32, 30)
    assert tiers(tree, 1, 2, "0:0 0:1") == [("switch", 2, 32)]
    assert tiers(tree, 1, 2, "0:0 0:2") == [("socket", 2, up)]
    # Two groups, one card of each on either switch: each has half of the uplink.
    assert tiers(tree, 1, 2, "0:0 0:2", "0:1 0:3") == [("socket", 2, up / 2)]
    # A group over two sockets has their link to itself, of two each has half, of four a quarter.
    assert tiers(tree, 1, 2, "0:0 0:4") == [("node", 2, across)]
    assert tiers(tree, 1, 2, "0:0 0:4", "0:2 0:6") == [("node", 2, across / 2)]
    assert tiers(tree, 1, 2, "0:0 0:4", "0:1 0:5", "0:2 0:6", "0:3 0:7") == [("node", 2, across / 4)]
    # Pairs on switches send once, however many cards they are.
    assert tiers(tree, 1, 4, "0:0 0:1 0:4 0:5") == [("switch", 2, 32), ("node", 4, across)]


def test_gpus_behind_a_nic_share_it() -> None:
    cloud = Tree.of(composed("2xcloud-8xh100"))
    nic = 12.5
    assert tiers(cloud, 1, 2, "0:0 1:0") == [("cluster", 2, nic)]
    assert tiers(cloud, 1, 2, "0:0 1:0", "0:1 1:1") == [("cluster", 2, nic / 2)]
    # Every rank sends its own part, those of a group as well.
    assert tiers(cloud, 1, 8, "0:0 0:1 0:2 0:3 1:0 1:1 1:2 1:3") == [("node", 4, 450), ("cluster", 8, nic / 4)]
    # A pair of cards shares a port of 25 GB/s; the free one of a pair has it for itself.
    cards = Tree.of(composed("2xserver-8xl40s"))
    assert tiers(cards, 1, 2, "0:0 1:0") == [("cluster", 2, 25)]
    assert tiers(cards, 1, 2, "0:0 1:0", "0:1 1:1") == [("cluster", 2, 12.5)]
    assert tiers(cards, 1, 2, "0:0 1:0", "0:2 1:2") == [("cluster", 2, 25)]


def test_groups_over_leaves_share_their_uplinks() -> None:
    network = Network(nodes_per_leaf=1, oversubscription=8.0)
    tree = Tree.of(replace(composed("2xdgx-h100"), network=network))
    uplink = 8 * 50 / 8
    assert tiers(tree, 1, 2, "0:0 1:0") == [("cluster", 2, uplink)]
    assert tiers(tree, 1, 2, "0:0 1:0", "0:1 1:1") == [("cluster", 2, uplink / 2)]
    # The four ranks of a node that are of one group send at once.
    eight = "0:0 0:1 0:2 0:3 1:0 1:1 1:2 1:3"
    assert tiers(tree, 1, 8, eight) == [("node", 4, 450), ("cluster", 8, uplink / 4)]


def test_a_gpu_that_is_not_free_holds_no_rank() -> None:
    tree = Tree.of(load_cluster("2x4xh100-sxm"), {"node0:1"})
    with pytest.raises(KeyError):
        tiers(tree, 1, 2, "0:0 0:1")
