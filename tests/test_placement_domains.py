"""What is free in domains, as the cluster is described, and how many replicas that is room for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from topology_cases import compositions

from apex_opt.cluster import Composition, Network, Tree, load_wiring
from apex_opt.cluster.tree import LEVELS, place_of
from apex_opt.described import COMMANDS
from apex_opt.placement import Room, groups, replicas_in, rooms


def free_of(name: str, *taken: str) -> tuple[str, ...]:
    return Tree.of(load_wiring(name), taken).gpus


@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("server-8xl40s", "switch", [2, 2, 2, 2]),
        ("server-8xl40s", "socket", [4, 4]),
        ("server-8xl40s", "node", [8]),
        ("2xdgx-h100", "switch", [8, 8]),  # NVLink counts before PCIe
        ("2xdgx-h100", "socket", [4, 4, 4, 4]),
        ("2xdgx-h100", "leaf", [16]),
        ("2xdgx-h100", "cluster", [16]),
        ("2x4xh100-sxm", "switch", [4, 4]),
        ("2x4xh100-sxm", "socket", [4, 4]),
        ("2x4xh100-sxm", "node", [4, 4]),
        ("2x4xh100-sxm", "leaf", [8]),
        ("server-4xv100", "switch", [1, 1, 1, 1]),
    ],
)
def test_domains_are_those_described(name: str, kind: str, sizes: list[int]) -> None:
    assert [len(room.gpus) for room in rooms(load_wiring(name), kind, free_of(name))] == sizes


def test_taken_gpus_are_not_counted_and_names_stay_those_of_the_whole_cluster() -> None:
    free = free_of("server-8xl40s", "node0:0", "node0:1", "node0:5")
    assert rooms(load_wiring("server-8xl40s"), "switch", free) == (
        Room("node0:switch1", ("node0:2", "node0:3")),
        Room("node0:switch2", ("node0:4",)),
        Room("node0:switch3", ("node0:6", "node0:7")),
    )
    assert [room.name for room in rooms(load_wiring("3x2xh100-sxm"), "node", ("node2:1", "node0:0"))] == [
        "node0",
        "node2",
    ]


def test_nodes_share_leaves_in_order() -> None:
    wiring = load_wiring("4xdgx-h100")
    assert isinstance(wiring, Composition)
    leaves = Composition(name="a", nodes=wiring.nodes, network=Network(nodes_per_leaf=3))
    assert [(room.name, len(room.gpus)) for room in rooms(leaves, "leaf", free_of("4xdgx-h100"))] == [
        ("leaf0", 24),
        ("leaf1", 8),
    ]


@given(compositions(), st.data())
def test_every_free_gpu_is_in_one_domain_of_every_kind_and_smaller_ones_lie_in_larger(
    composition: Composition, data: st.DataObject
) -> None:
    gpus = composition.topology().gpus()
    free = data.draw(st.lists(st.sampled_from(gpus), min_size=1, unique=True))
    for kind in LEVELS:
        found = [gpu for room in rooms(composition, kind, free) for gpu in room.gpus]
        assert sorted(found, key=place_of) == sorted(free, key=place_of)
    for inner, outer in (("switch", "node"), ("socket", "node"), ("node", "leaf"), ("leaf", "cluster")):
        around = [set(room.gpus) for room in rooms(composition, outer, free)]
        assert all(any(set(room.gpus) <= other for other in around) for room in rooms(composition, inner, free))


def test_replicas_and_groups_do_not_cross() -> None:
    found = [Room("a", tuple("1234567")), Room("b", tuple("123")), Room("c", ("1",))]
    assert [replicas_in(found, size) for size in (1, 2, 3, 4, 8)] == [11, 4, 3, 1, 0]
    assert groups(found) == {2: 4, 4: 1}
    assert groups(found[2:]) == groups([]) == {}


def test_the_kinds_that_can_be_asked_for_are_those_there_are() -> None:
    assert COMMANDS["place"].option("within").choices == LEVELS[:-1]
