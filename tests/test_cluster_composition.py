"""Cluster files of nodes of any kind, and presets: what they mean, and what is said of bad ones."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from topology_cases import compositions

from apex_opt.cluster import Composition, Node, list_gpus, list_presets, load_cluster, load_pools, load_topology
from apex_opt.cluster.catalogue import is_catalogued
from apex_opt.cluster.composition import read_composition
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError

LAB = """
[[nodes]]
count = 2
preset = "dgx-h100"

[[nodes]]
preset = "server-8xl40s"
gpus = 4
nics = { gpus = 4, gb_per_s = 12.5 }

[[nodes]]
gpu = "a100-sxm"
gpus = 4
nvlink = { gpus = [[0, 3], [1, 2]], gb_per_s = 300, latency_us = 1.5 }
pcie = { gpus = 2, gb_per_s = 32, latency_us = 3 }
sockets = { gpus = 2, gb_per_s = 20, latency_us = 1 }
nics = { gpus = 4, gb_per_s = 12.5, latency_us = 5, kind = "ethernet" }

[network]
nodes_per_leaf = 2
oversubscription = 2
"""


def write(folder: Path, text: str) -> str:
    path = folder / "lab.toml"
    path.write_text(text)
    return str(path)


def read(text: str) -> Composition:
    return read_composition(Path("drawn.toml"), tomllib.loads(text))


# ---- files --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(compositions())
def test_a_file_written_describes_the_same_cluster(composition: Composition) -> None:
    text = composition.toml(("a note",))
    assert text.startswith("# a note\n")
    again = read(text)
    assert again == composition
    assert again.toml(("a note",)) == text
    assert again.topology() == composition.topology()


def test_nodes_of_different_kinds_stand_one_after_another(tmp_path: Path) -> None:
    topology = load_topology(write(tmp_path, LAB))
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
        load_cluster(write(tmp_path, LAB))
    unlike = '[[nodes]]\npreset = "dgx-h100"\n[[nodes]]\ncount = 2\npreset = "cloud-8xh100"\ngpus = 8\n'
    worst = load_cluster(write(tmp_path, unlike))
    assert (worst.nodes, worst.gpus_per_node) == (3, 8)
    assert worst.inter is not None
    assert worst.inter.bytes_per_s == 12.5e9 / 8
    alike = load_cluster(write(tmp_path, '[[nodes]]\ncount = 3\npreset = "dgx-h200"\n[network]\nnodes_per_leaf = 2\n'))
    assert (alike.nodes, alike.gpus_per_node, alike.gpu.name) == (3, 8, "h200-sxm-141gb")


def test_the_nodes_of_each_type_of_gpu_are_a_cluster_of_their_own(tmp_path: Path) -> None:
    more = LAB.replace("count = 2\n", "", 1) + '\n[[nodes]]\npreset = "dgx-h100"\n'
    pools = load_pools(write(tmp_path, more))
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
    (unlike, *_) = load_pools(write(tmp_path, LAB + other))
    assert (unlike.nodes, unlike.gpus_per_node) == (3, 8)


@pytest.mark.parametrize("rails", ["", "rails = true\n"])
def test_a_spine_oversubscribed_two_to_one_halves_what_is_shared(tmp_path: Path, rails: str) -> None:
    text = '[[nodes]]\ncount = 4\npreset = "dgx-h100"\n[network]\nnodes_per_leaf = 2\n' + rails
    all_at_once = [(f"node{node}:{local}", f"node{node + 2}:{local}") for node in (0, 1) for local in range(8)]
    for ratio in (1, 2):
        path = write(tmp_path, f"{text}oversubscription = {ratio}\n")
        topology = load_topology(path)
        assert set(topology.shared(all_at_once)) == {50e9 / ratio}
        assert topology.bandwidth("node0:0", "node2:0") == 50e9
        assert topology.shared([("node0:0", "node1:0")]) == (50e9,)
        inter = load_cluster(path).inter
        assert inter is not None
        assert inter.bytes_per_s == 50e9 / ratio
    assert len(topology.domains("leaf")) == (16 if rails else 2)


def test_rails_have_a_leaf_for_each_nic_of_a_node(tmp_path: Path) -> None:
    topology = load_topology(write(tmp_path, '[[nodes]]\ncount = 2\npreset = "dgx-h100"\n[network]\nrails = true\n'))
    assert topology.domains("leaf")[3] == {"node0:3", "node1:3"}
    assert "spine" not in topology.route("node0:3", "node1:3")
    assert "spine" in topology.route("node0:3", "node1:4")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("count = 2", "count = 0", "nodes[0].count = 0 must be from 1 to 65536"),
        ("count = 2", "count = 65536", "nodes hold 524296 GPUs together, above the limit of 65536"),
        ("count = 2", "cuont = 2", "nodes[0].cuont is not a known field"),
        ('"dgx-h100"', '"dgx-h101"', "nodes[0].preset: unknown preset 'dgx-h101'; did you mean dgx-h100"),
        ('"a100-sxm"', '"a101"', "nodes[2].gpu: unknown GPU 'a101'"),
        ("gpus = 4\nnvlink", "gpus = 577\nnvlink", "nodes[2].gpus = 577 must be from 1 to 576"),
        (
            "[0, 3]",
            "[0, 4]",
            "nodes[2].nvlink.gpus = [[0, 4], [1, 2]] must be a number of GPUs or lists of GPUs from 0",
        ),
        ("[0, 3]", "[0, 1]", "nodes[2].nvlink.gpus = [[0, 1], [1, 2]] names GPU 1 twice: groups have no common GPUs"),
        ("[0, 3]", "[]", "nodes[2].nvlink.gpus = [[], [1, 2]] must be a number of GPUs or lists"),
        ("{ gpus = 4, gb_per_s = 12.5, l", "{ gpus = [[0, 1]], gb_per_s = 12.5, l", "leaves out GPU 2: all 4 must be"),
        ("pcie = { gpus = 2", "pcie = { gpus = 4", "pcie.gpus: GPUs 0, 1, 2, 3 share a switch but sit on different"),
        (
            "gpus = 4\nnvlink = { gpus = [[0, 3], [1, 2]]",
            "gpus = 260\nnvlink = { gpus = 2",
            "nodes[2].sockets.gpus makes 130 sockets, above the limit of 64",
        ),
        ("gb_per_s = 20", "gb_per_s = -20", "nodes[2].sockets.gb_per_s = -20 must be from 0.01 to 100000"),
        ('kind = "ethernet"', 'kind = "nvlink"', "nodes[2].nics.kind = 'nvlink' must be one of infiniband, ethernet"),
        ("pcie = ", "pice = ", "nodes[2].pcie is missing"),
        (
            "nics = { gpus = 4, gb_per_s = 12.5, l",
            "x = { gpus = 4, gb_per_s = 12.5, l",
            "nodes[2].x is not a known field",
        ),
        ("oversubscription = 2", "oversubscription = 0.5", "oversubscription = 0.5 must be from 1 to 1000; 2 where"),
        ("nodes_per_leaf = 2", "nodes_per_leaf = 0", "network.nodes_per_leaf = 0 must be from 1 to 65536"),
        ("nodes_per_leaf = 2", "rails = 1", "network.rails = 1 must be true or false"),
        ("[network]", "[netwrok]", "netwrok is not a known field; allowed: name, nodes, network"),
    ],
)
def test_each_bad_field_is_named_with_its_value_and_limit(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in LAB
    with pytest.raises(InputError) as caught:
        load_topology(write(tmp_path, LAB.replace(old, new, 1)))
    assert str(caught.value).startswith(f"cluster file {tmp_path}/lab.toml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_nodes_need_ports_and_a_list_needs_nodes(tmp_path: Path) -> None:
    text = '[[nodes]]\ncount = 2\ngpu = "l40s"\ngpus = 1\npcie = { gb_per_s = 32, latency_us = 5 }\n'
    with pytest.raises(InputError, match=r"nodes\[0\]\.nics is missing: several nodes need ports between them"):
        load_topology(write(tmp_path, text))
    assert load_topology(write(tmp_path, text.replace("count = 2", ""))).gpus() == ("node0:0",)
    assert load_cluster(write(tmp_path, text.replace("count = 2", ""))).size == 1
    with pytest.raises(InputError, match="must be a list of tables"):
        load_topology(write(tmp_path, "nodes = []\n"))


def test_an_accelerator_may_be_described_in_place(tmp_path: Path) -> None:
    text = (
        '[[nodes]]\npreset = "dgx-h100"\nnvlink = { gpus = 4, gb_per_s = 100, latency_us = 2 }\n'
        '[nodes.gpu]\nname = "accel-9"\nmemory_gib = 96\nmemory_gb_per_s = 3000\ntflops = { bf16 = 500 }\ntdp_w = 600\n'
    )
    topology = load_topology(write(tmp_path, text))
    assert topology.device("node0:7").gpu.name == "accel-9"
    assert [len(domain) for domain in topology.domains("nvlink")] == [4, 4]
    with pytest.raises(InputError, match=r"nodes\[0\]\.gpu\.tdp_w is missing"):
        load_topology(write(tmp_path, text.replace("tdp_w = 600\n", "")))


# ---- presets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_loads_alone_and_twice_and_every_figure_has_a_source(name: str) -> None:
    one, two = load_topology(name), load_topology(f"2x{name}")
    assert (one.name, len(two.gpus())) == (name, 2 * len(one.gpus()))
    assert all(len(link.source) > 10 and "stated in" not in link.source for _, _, link in two.wires)
    cluster = load_cluster(f"2x{name}")
    assert (cluster.nodes, cluster.size) == (2, len(two.gpus()))
    assert cluster.inter is not None
    # The uniform cluster never promises more than a transfer gets.
    for a, b in combinations(range(0, cluster.size, 3), 2):
        link = cluster.intra if a // cluster.gpus_per_node == b // cluster.gpus_per_node else cluster.inter
        assert link.bytes_per_s <= two.bandwidth(two.gpus()[a], two.gpus()[b]) * (1 + 1e-12)
        assert link.latency_s >= two.latency(two.gpus()[a], two.gpus()[b]) * (1 - 1e-12)


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
    assert read_composition(Path("made.toml"), tomllib.loads(composition.toml())) == composition


def test_presets_cover_the_catalogue_and_boards_go_by_either_name() -> None:
    of = [load_cluster(name).gpu.name for name in list_presets()]
    assert (
        {"h100-sxm-80gb", "a100-sxm-80gb", "l40s-48gb", "v100-pcie-16gb", "gb200-nvl72-185gb"}
        < set(of)
        < set(list_gpus())
    )
    assert load_topology("2xHGX-H100").wires == load_topology("2xdgx-h100").wires
    assert load_cluster("2xcloud-8xh100").inter.bytes_per_s == 12.5e9 / 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("2x8xdgx-h100", UsageError, "a preset is a whole node; write 2xdgx-h100"),
        ("0xdgx-h100", UsageError, "'0' must be a whole number from 1 to 65536"),
        ("65536xdgx-h100", InputError, "524288 GPUs, above the limit of 65536"),
        ("dgx-h101", UnknownNameError, "did you mean dgx-h100"),
    ],
)
def test_bad_specs_of_presets_get_one_clear_line(spec: str, error: type[ApexError], message: str) -> None:
    for load in (load_cluster, load_topology):
        with pytest.raises(error) as caught:
            load(spec)
        assert message in str(caught.value)
