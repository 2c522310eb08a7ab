"""The tree of domains: what lies in what, and that its links are those of the wiring it is made from."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from topology_cases import compositions

from apex_opt.cluster import Composition, Network, Topology, Tree, load_cluster, load_wiring
from apex_opt.cluster.tree import LEVELS, Domain, place_of, worst
from apex_opt.errors import UsageError


def gpus_of(tree: Tree, domain: Domain) -> list[str]:
    return [gpu for part in tree.bins[domain.first : domain.last] for gpu in part.gpus]


def composed(name: str) -> Composition:
    found = load_wiring(name)
    assert isinstance(found, Composition)
    return found


@st.composite
def partly_taken(draw: st.DrawFn) -> tuple[Composition, set[str]]:
    composition = draw(compositions())
    gpus = composition.topology().gpus()
    return composition, set(draw(st.lists(st.sampled_from(gpus), max_size=len(gpus) - 1, unique=True)))


@given(partly_taken())
def test_every_free_gpu_is_in_one_bin_and_those_taken_are_gone(case: tuple[Composition, set[str]]) -> None:
    composition, taken = case
    topology = composition.topology()
    tree = Tree.of(composition, taken)
    held = [gpu for part in tree.bins for gpu in part.gpus]
    assert sorted(held, key=place_of) == [gpu for gpu in topology.gpus() if gpu not in taken] == list(tree.gpus)
    assert len(held) == tree.size
    for part in tree.bins:
        assert part.gpus
        assert {topology.device(gpu).gpu for gpu in part.gpus} == {part.gpu}


@given(partly_taken())
def test_domains_lie_within_domains_up_to_the_whole_cluster(case: tuple[Composition, set[str]]) -> None:
    tree = Tree.of(*case)
    kinds = [level.kind for level in tree.levels]
    assert kinds == sorted(kinds, key=LEVELS.index)
    assert [level.far for level in tree.levels] == sorted(level.far for level in tree.levels)
    ends = set(range(len(tree.bins) + 1))
    for level in tree.levels:
        bounds = [0, *(domain.last for domain in level.domains)]
        assert [domain.first for domain in level.domains] == bounds[:-1]
        assert bounds[-1] == len(tree.bins)
        assert set(bounds) <= ends
        ends = set(bounds)
    assert len(tree.levels[-1].domains) == 1
    assert all(domain.out_bytes_per_s > 0 for level in tree.levels for domain in level.domains)
    for port in tree.ports:
        assert 0 <= port.first < port.last <= len(tree.bins)
        assert port.bytes_per_s > 0


def pairs_between_parts(tree: Tree, depth: int, domain: int) -> list[tuple[str, str]]:
    """Pairs of GPUs in different parts of a domain; of one of the innermost all pairs."""
    if depth == 0:
        return list(combinations(gpus_of(tree, tree.levels[0].domains[domain]), 2))
    parts = [gpus_of(tree, tree.levels[depth - 1].domains[part]) for part in tree.parts[depth][domain]]
    return [(a, b) for one, other in combinations(parts, 2) for a in one for b in other]


def plain(composition: Composition) -> Composition:
    """Without rails and with a wide spine, which are not in links: GPUs talk on their own rail, the spine is shared."""
    return replace(composition, network=replace(composition.network, rails=False, oversubscription=1.0))


@given(compositions())
def test_the_link_of_a_domain_inside_a_node_is_that_of_its_worst_pair(composition: Composition) -> None:
    tree, topology = Tree.of(plain(composition)), plain(composition).topology()
    for depth, level in enumerate(tree.levels):
        for index, domain in enumerate(level.domains):
            pairs = pairs_between_parts(tree, depth, index)
            if not pairs or level.far:
                assert domain.link is None
                continue
            found, wanted = domain.link, worst(topology, pairs)
            assert found is not None
            assert found.bytes_per_s == wanted.bytes_per_s
            assert found.latency_s == pytest.approx(wanted.latency_s)


@given(compositions())
def test_two_nodes_have_no_less_than_the_slower_of_them_reaches(composition: Composition) -> None:
    tree, topology = Tree.of(plain(composition)), plain(composition).topology()
    for depth, level in enumerate(tree.levels):
        assert bool(level.reach) == level.far
        if not level.far:
            continue
        at, links = tree.links(depth)
        nodes = list(zip(tree.levels[at].domains, links, strict=True))
        for around in level.domains:
            inside = [(d, link) for d, link in nodes if around.first <= d.first and d.last <= around.last]
            for (one, a), (other, b) in combinations(inside, 2):
                assert a is not None
                assert b is not None
                found = worst(topology, [(x, y) for x in gpus_of(tree, one) for y in gpus_of(tree, other)])
                assert found.bytes_per_s >= min(a.bytes_per_s, b.bytes_per_s)
                assert found.latency_s <= max(a.latency_s, b.latency_s) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["2x4xh100-sxm", "3x8xa100-sxm"])
def test_identical_nodes_have_one_link_inside_and_one_between(name: str) -> None:
    cluster = load_cluster(name)
    tree = Tree.of(cluster, {"node0:1"})
    inside, between = tree.levels
    assert (inside.kind, inside.far, between.kind, between.far) == ("node", False, "cluster", True)
    assert {domain.link for domain in inside.domains} == {cluster.intra}
    assert set(between.reach) == {cluster.inter}
    assert [len(part.gpus) for part in tree.bins] == [cluster.gpus_per_node - 1] + [cluster.gpus_per_node] * (
        cluster.nodes - 1
    )
    assert tree.ports == ()
    assert not tree.contended
    assert [level.kind for level in Tree.of(load_cluster("8xh100-sxm")).levels] == ["node"]


def test_switches_and_sockets_share_what_leads_out_of_them() -> None:
    tree = Tree.of(composed("server-8xl40s"))
    switches, sockets, node = tree.levels
    assert [level.kind for level in tree.levels] == ["switch", "socket", "node"]
    assert [len(gpus_of(tree, domain)) for domain in switches.domains] == [2, 2, 2, 2]
    assert [domain.name for domain in sockets.domains] == ["node0:socket0", "node0:socket1"]
    wires = {
        wire[2].bytes_per_s for wire in composed("server-8xl40s").topology().wires if "socket" in wire[0] + wire[1]
    }
    up, across = max(wires), min(wires)
    # Two cards behind one uplink, four behind the link between the sockets.
    assert {domain.out_bytes_per_s for domain in switches.domains} == {up}
    assert {domain.out_bytes_per_s for domain in sockets.domains} == {across}
    assert [domain.out_bytes_per_s for domain in node.domains] == [float("inf")]


def test_what_the_gpus_of_a_domain_cannot_fill_is_not_shared() -> None:
    free = {"node0:0", "node0:4"}
    taken = set(composed("server-8xl40s").topology().gpus()) - free
    tree = Tree.of(composed("server-8xl40s"), taken)
    (level,) = tree.levels
    assert level.kind == "node"
    assert [domain.out_bytes_per_s for domain in level.domains] == [float("inf")]


def test_an_nvlink_domain_over_sockets_joins_them() -> None:
    tree = Tree.of(composed("2xdgx-h100"))
    assert [level.kind for level in tree.levels] == ["node", "cluster"]
    assert tree.ports == ()  # a NIC for every GPU


def test_a_shared_nic_is_a_port_of_the_gpus_behind_it() -> None:
    cloud = Tree.of(composed("2xcloud-8xh100"), {"node0:7"})
    assert [(port.name, cloud.free(port), port.bytes_per_s) for port in cloud.ports] == [
        ("node0:nic0", 7, 12.5e9),
        ("node1:nic0", 8, 12.5e9),
    ]
    cards = Tree.of(composed("2xserver-8xl40s"))
    assert len(cards.ports) == 8
    assert {(cards.free(port), port.bytes_per_s) for port in cards.ports} == {(2, 25e9)}
    assert [found for found in cards.ports_in[0].values()] == [((n, range(n, n + 1)),) for n in range(8)]


def test_the_links_of_a_leaf_are_shared_as_oversubscribed() -> None:
    network = Network(nodes_per_leaf=2, oversubscription=4.0)
    tree = Tree.of(replace(composed("4xdgx-h100"), network=network))
    leaf = tree.levels[1]
    assert (leaf.kind, leaf.far, len(leaf.domains)) == ("leaf", True, 2)
    assert {domain.out_bytes_per_s for domain in leaf.domains} == {2 * 8 * 50e9 / 4}
    full = Tree.of(replace(composed("4xdgx-h100"), network=replace(network, oversubscription=1.0)))
    assert {domain.out_bytes_per_s for domain in full.levels[1].domains} == {float("inf")}


def test_a_cluster_with_nothing_free_is_refused() -> None:
    for name in ("2xh100-sxm", "server-4xv100"):
        gpus = load_wiring(name)
        topology = gpus.topology() if isinstance(gpus, Composition) else Topology.of(gpus)
        with pytest.raises(UsageError, match=r"no GPU is free; take fewer out with --busy and --down"):
            Tree.of(gpus, topology.gpus())
