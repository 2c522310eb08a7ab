"""Clusters of nodes of any kind: how they are wired, and what they are as identical nodes."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from topology_cases import LAB, write_cluster

from apex_opt.cluster import Composition, Node, list_gpus, load_cluster, load_pools, load_topology
from apex_opt.cluster.catalogue import is_catalogued
from apex_opt.cluster.node_files import composition_toml, read_composition
from apex_opt.errors import InputError


def test_nodes_of_different_kinds_stand_one_after_another(tmp_path: Path) -> None:
    topology = load_topology(write_cluster(tmp_path, LAB))
    assert topology.name == "lab"
    assert len(topology.gpus()) == 8 + 8 + 4 + 4
    assert [topology.device(f"node{node}:0").gpu.name[:4] for node in range(4)] == ["h100", "h100", "l40s", "a100"]
    assert topology.domains("nvlink")[2:] == ({"node3:0", "node3:3"}, {"node3:1", "node3:2"})
    assert [len(domain) for domain in topology.domains("leaf")] == [16, 8]
    assert topology.route("node3:0", "node3:3") == ("node3:0", "node3:nvlink0", "node3:3")
    assert topology.bandwidth("node3:0", "node3:1") == 32e9
    assert topology.bandwidth("node3:0", "node3:2") == 20e9
    assert topology.bandwidth("node0:0", "node1:7") == 50e9
    assert topology.bandwidth("node0:0", "node2:3") == 12.5e9
    assert "spine" in topology.route("node0:0", "node2:3")
    assert "spine" not in topology.route("node2:0", "node3:3")
    # What is given replaces a field of the preset, whose source it then has not.
    port = next(link for a, b, link in topology.wires if (a, b) == ("node2:nic0", "leaf1"))
    assert (port.bytes_per_s, port.kind, port.source) == (12.5e9, "ethernet", "stated in lab.toml")


def test_gpus_of_several_types_are_no_one_cluster_and_unlike_nodes_are_as_their_worst(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'lab': its GPUs are of several types \(h100-sxm-80gb, l40s-48gb, a100"):
        load_cluster(write_cluster(tmp_path, LAB))
    unlike = '[[nodes]]\npreset = "dgx-h100"\n[[nodes]]\ncount = 2\npreset = "cloud-8xh100"\ngpus = 8\n'
    worst = load_cluster(write_cluster(tmp_path, unlike))
    assert (worst.nodes, worst.gpus_per_node) == (3, 8)
    assert worst.inter is not None
    assert worst.inter.bytes_per_s == 12.5e9 / 8
    alike = load_cluster(
        write_cluster(tmp_path, '[[nodes]]\ncount = 3\npreset = "dgx-h200"\n[network]\nnodes_per_leaf = 2\n')
    )
    assert (alike.nodes, alike.gpus_per_node, alike.gpu.name) == (3, 8, "h200-sxm-141gb")


def test_the_nodes_of_each_type_of_gpu_are_a_cluster_of_their_own(tmp_path: Path) -> None:
    more = LAB.replace("count = 2\n", "", 1) + '\n[[nodes]]\npreset = "dgx-h100"\n'
    pools = load_pools(write_cluster(tmp_path, more))
    assert [(pool.gpu.name, pool.nodes, pool.gpus_per_node) for pool in pools] == [
        ("h100-sxm-80gb", 2, 8),
        ("l40s-48gb", 1, 4),
        ("a100-sxm-80gb", 1, 4),
    ]
    assert pools[0] == replace(load_cluster("2xdgx-h100"), name="lab", inter=pools[0].inter)
    assert load_pools("2xdgx-h100") == (load_cluster("2xdgx-h100"),)
    assert load_pools("8xh100-sxm") == (load_cluster("8xh100-sxm"),)
    # Nodes of one type that differ count as the worst of them.
    other = '[[nodes]]\npreset = "dgx-h100"\ngpus = 4\nsockets = { gpus = 2 }\nnics = { gpus = 4 }\n'
    (unlike, *_) = load_pools(write_cluster(tmp_path, LAB + other))
    assert (unlike.nodes, unlike.gpus_per_node) == (3, 8)


@pytest.mark.parametrize("rails", ["", "rails = true\n"])
def test_a_spine_oversubscribed_two_to_one_halves_what_is_shared(tmp_path: Path, rails: str) -> None:
    text = '[[nodes]]\ncount = 4\npreset = "dgx-h100"\n[network]\nnodes_per_leaf = 2\n' + rails
    all_at_once = [(f"node{node}:{local}", f"node{node + 2}:{local}") for node in (0, 1) for local in range(8)]
    for ratio in (1, 2):
        path = write_cluster(tmp_path, f"{text}oversubscription = {ratio}\n")
        topology = load_topology(path)
        assert set(topology.shared(all_at_once)) == {50e9 / ratio}
        assert topology.bandwidth("node0:0", "node2:0") == 50e9
        assert topology.shared([("node0:0", "node1:0")]) == (50e9,)
        inter = load_cluster(path).inter
        assert inter is not None
        assert inter.bytes_per_s == 50e9 / ratio
    assert len(topology.domains("leaf")) == (16 if rails else 2)


def test_rails_have_a_leaf_for_each_nic_of_a_node(tmp_path: Path) -> None:
    topology = load_topology(
        write_cluster(tmp_path, '[[nodes]]\ncount = 2\npreset = "dgx-h100"\n[network]\nrails = true\n')
    )
    assert topology.domains("leaf")[3] == {"node0:3", "node1:3"}
    assert "spine" not in topology.route("node0:3", "node1:3")
    assert "spine" in topology.route("node0:3", "node1:4")


@pytest.mark.parametrize(
    ("preset", "spec", "port"),
    [
        ("dgx-a100", "8xa100", 25e9),
        ("dgx-h100", "8xh100", 50e9),
        ("dgx-h200", "8xh200", 50e9),
        ("dgx-b200", "8xb200", 50e9),
        ("dgx-b300", "8xb300", 100e9),
        ("nvl72-gb200", "72xgb200", 100e9),
    ],
)
def test_a_preset_with_nvlink_is_wired_as_the_catalogue_has_it(preset: str, spec: str, port: float) -> None:
    cluster, known = load_cluster(f"2x{preset}"), load_cluster(f"2x{spec}")
    assert is_catalogued(cluster)
    # More nodes of a single one can be offered.
    assert load_cluster(preset).inter == cluster.inter
    assert (cluster.gpu, cluster.gpus_per_node, cluster.intra) == (known.gpu, known.gpus_per_node, known.intra)
    assert cluster.inter is not None
    assert known.inter is not None
    assert cluster.inter.bytes_per_s == known.inter.bytes_per_s == port
    assert cluster.inter.latency_s == pytest.approx(known.inter.latency_s)


@pytest.mark.parametrize("gpu", list_gpus())
def test_a_node_of_the_catalogue_is_wired_as_its_cluster_says(gpu: str) -> None:
    known = load_cluster(f"2x{load_cluster(gpu).gpus_per_node}x{gpu}")
    composition = Composition(name=known.name, nodes=((2, Node.of(known)),))
    made = composition.cluster()
    if known.gpus_per_node > 1:
        assert made.intra == known.intra
        assert is_catalogued(made)
    assert made.inter is not None
    assert known.inter is not None
    assert (made.inter.bytes_per_s, made.inter.kind) == (known.inter.bytes_per_s, known.inter.kind)
    assert made.inter.latency_s == pytest.approx(known.inter.latency_s)
    assert read_composition(Path("made.toml"), tomllib.loads(composition_toml(composition))) == composition
