"""Routes between single GPUs, what shares them, and GPUs that are taken out."""

from __future__ import annotations

from itertools import combinations, pairwise

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from topology_cases import compositions

from apex_opt.cluster import Cluster, Composition, Link, Switch, Topology, load_cluster, load_topology
from apex_opt.errors import InputError, UnknownNameError, UsageError

NEAR = Link(bytes_per_s=40e9, latency_s=3e-6, kind="pcie")


@given(
    nodes=st.integers(1, 4),
    per_node=st.integers(1, 6),
    near=st.floats(1e9, 1e12),
    far=st.floats(1e9, 1e12),
    kind=st.sampled_from(["nvlink", "pcie"]),
)
def test_a_uniform_cluster_has_intra_inside_a_node_and_inter_across(
    nodes: int, per_node: int, near: float, far: float, kind: str
) -> None:
    intra, inter = (
        Link(bytes_per_s=near, latency_s=3e-6, kind=kind),
        Link(bytes_per_s=far, latency_s=5e-6, kind="ethernet"),
    )
    gpu = load_cluster("h100-sxm").gpu
    cluster = Cluster(name="c", gpu=gpu, nodes=nodes, gpus_per_node=per_node, intra=intra, inter=inter)
    topology = Topology.of(cluster)
    names = topology.gpus()
    assert len(names) == cluster.size
    assert topology.free() == names
    for a, b in combinations(range(cluster.size), 2):
        link = intra if a // per_node == b // per_node else inter
        assert link is not None
        # Between nodes even where that is wider than the way inside.
        assert topology.bandwidth(names[a], names[b]) == link.bytes_per_s
        assert topology.latency(names[a], names[b]) == pytest.approx(link.latency_s)
        assert {edge.kind for edge in topology.path(names[a], names[b])} == {link.kind}


@settings(max_examples=40)
@given(compositions(), st.data())
def test_a_path_is_the_same_both_ways_and_the_widest(composition: Composition, data: st.DataObject) -> None:
    topology = composition.topology()
    a, b = (data.draw(st.sampled_from(topology.gpus())) for _ in range(2))
    assert topology.path(a, b) == topology.path(b, a)[::-1]
    assert topology.bandwidth(a, b) == topology.bandwidth(b, a)
    assert topology.latency(a, b) == pytest.approx(topology.latency(b, a))
    if a == b:
        assert (topology.path(a, b), topology.bandwidth(a, b), topology.latency(a, b)) == ((), float("inf"), 0)
        return
    route = topology.route(a, b)
    assert not set(route[1:-1]) & set(topology.gpus())
    # By brute force over all ways that pass no GPU, and stay inside where one of them does.
    graph = topology.graph.subgraph([n for n in topology.graph if n in (a, b) or n not in topology.gpus()])
    node = topology.device(a).node
    ways = [
        ([graph.edges[edge]["link"] for edge in pairwise(way)], all(graph.nodes[name]["node"] == node for name in way))
        for way in nx.all_simple_paths(graph, a, b)
    ]
    if any(inside for _, inside in ways):
        ways = [way for way in ways if way[1]]
    best = max((min(x.bytes_per_s for x in links), -sum(x.latency_s for x in links)) for links, _ in ways)
    assert best == (topology.bandwidth(a, b), pytest.approx(-topology.latency(a, b)))


@settings(max_examples=40)
@given(compositions())
def test_domains_have_no_common_gpus_and_those_of_an_nvlink_are_joined_by_it(composition: Composition) -> None:
    topology = composition.topology()
    for kind in ("node", "nvlink", "pcie", "socket", "nic", "leaf"):
        domains = topology.domains(kind)
        names = [name for domain in domains for name in domain]
        assert len(names) == len(set(names))
        if kind in ("node", "socket"):
            assert set(names) == set(topology.gpus())
    for domain in topology.domains("nvlink"):
        for a, b in combinations(sorted(domain), 2):
            kinds = {link.kind for link in topology.path(a, b)}
            assert kinds == {"nvlink"} or topology.bandwidth(a, b) >= 10e9


def test_domains_are_what_the_preset_says() -> None:
    topology = load_topology("2xserver-8xl40s")
    assert topology.domains("pcie")[0] == {"node0:0", "node0:1"}
    assert [len(domain) for domain in topology.domains("socket")] == [4] * 4
    assert [len(domain) for domain in topology.domains("nic")] == [2] * 8
    assert [len(domain) for domain in topology.domains("leaf")] == [16]
    assert topology.domains("nvlink") == ()
    assert [len(domain) for domain in load_topology("nvl72-gb200").domains("nvlink")] == [72]
    with pytest.raises(UnknownNameError, match="unknown kind of domain 'rack'"):
        topology.domains("rack")


def test_transfers_at_once_share_each_direction_of_a_link() -> None:
    topology = load_topology("2xcloud-8xh100")
    assert topology.shared([("node0:0", "node1:0")]) == (12.5e9,)
    assert topology.shared([("node0:0", "node1:0"), ("node0:1", "node1:1")]) == (6.25e9, 6.25e9)
    assert topology.shared([("node0:0", "node1:0"), ("node1:1", "node0:1")]) == (12.5e9, 12.5e9)
    assert topology.shared([("node0:0", "node1:0"), ("node0:1", "node0:2")]) == (12.5e9, 450e9)
    assert topology.shared([]) == ()


def test_states_are_kept_apart_from_the_wiring() -> None:
    topology = load_topology("2xdgx-h100")
    busy = topology.named("node0:0-3, node1:1", "--busy")
    assert busy == ("node0:0", "node0:1", "node0:2", "node0:3", "node1:1")
    marked = topology.marked("busy", busy).marked("down", topology.named("node1:1"))
    assert marked.device("node1:1").state == "down"
    assert len(marked.free()) == 11
    assert marked.wires == topology.wires
    assert topology.free() == topology.gpus()
    assert topology.named("node1") == tuple(f"node1:{local}" for local in range(8))
    assert topology.named("node0:2,node0:2-3") == ("node0:2", "node0:3")
    with pytest.raises(UnknownNameError, match="unknown state of a GPU 'gone'"):
        topology.marked("gone", busy)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected GPUs such as node0:0-3,node2:1 or node1, got ''"),
        ("node0:0,,node1", "got ''"),
        ("0:3", "got '0:3'"),
        ("node0:3-", "got 'node0:3-'"),
        ("node0:-1", "got 'node0:-1'"),
        ("node٣", "expected GPUs"),
        ("node0:9", "node0:9: node0 has GPUs 0 to 7"),
        ("node0:5-8", "node0:5-8: node0 has GPUs 0 to 7"),
        ("node0:5-3", "5 is above 3; write the lower GPU first"),
        ("node2:1", "node2:1: no such node in 2xdgx-h100; it has node0:0-7, node1:0-7"),
    ],
)
def test_gpus_that_are_not_there_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_topology("2xdgx-h100").named(text, "--busy")
    assert str(caught.value).startswith("--busy: ")
    assert message in str(caught.value)


def test_unknown_gpus_and_missing_links_are_errors() -> None:
    topology = load_topology("dgx-h100")
    for ask in (
        topology.device,
        lambda name: topology.marked("busy", [name]),
        lambda name: topology.path(name, "node0:0"),
    ):
        with pytest.raises(UnknownNameError, match="unknown GPU of the cluster 'node7:7'"):
            ask("node7:7")
    loose = Topology(name="x", devices=topology.devices[:2], switches=(), wires=())
    with pytest.raises(InputError, match="no links lead from node0:1 to node0:0"):
        loose.path("node0:1", "node0:0")
    broken = Topology(name="x", devices=(), switches=(Switch(name="a", kind="leaf"),), wires=(("a", "b", NEAR),))
    with pytest.raises(InputError, match="joins a and b, which are not both there"):
        _ = broken.graph


def test_it_cannot_be_changed() -> None:
    topology = load_topology("dgx-h100")
    with pytest.raises(AttributeError):
        topology.name = "other"  # type: ignore[misc]
    with pytest.raises(nx.NetworkXError, match="Frozen"):
        topology.graph.add_edge("node0:0", "node0:1")
