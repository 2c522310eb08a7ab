"""Cluster files of nodes of any kind, and presets: what they mean, and what is said of bad ones."""

from __future__ import annotations

import tomllib
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from topology_cases import LAB, compositions, write_cluster

from apex_opt.cluster import Composition, list_gpus, list_presets, load_cluster, load_topology
from apex_opt.cluster.node_files import composition_toml, read_composition
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError


def read(text: str) -> Composition:
    return read_composition(Path("drawn.toml"), tomllib.loads(text))


# ---- files --------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(compositions())
def test_a_file_written_describes_the_same_cluster(composition: Composition) -> None:
    text = composition_toml(composition, ("a note",))
    assert text.startswith("# a note\n")
    again = read(text)
    assert again == composition
    assert composition_toml(again, ("a note",)) == text
    assert again.topology() == composition.topology()


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
        load_topology(write_cluster(tmp_path, LAB.replace(old, new, 1)))
    assert str(caught.value).startswith(f"cluster file {tmp_path}/lab.toml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_nodes_need_ports_and_a_list_needs_nodes(tmp_path: Path) -> None:
    text = '[[nodes]]\ncount = 2\ngpu = "l40s"\ngpus = 1\npcie = { gb_per_s = 32, latency_us = 5 }\n'
    with pytest.raises(InputError, match=r"nodes\[0\]\.nics is missing: several nodes need ports between them"):
        load_topology(write_cluster(tmp_path, text))
    assert load_topology(write_cluster(tmp_path, text.replace("count = 2", ""))).gpus() == ("node0:0",)
    assert load_cluster(write_cluster(tmp_path, text.replace("count = 2", ""))).size == 1
    with pytest.raises(InputError, match="must be a list of tables"):
        load_topology(write_cluster(tmp_path, "nodes = []\n"))


def test_an_accelerator_may_be_described_in_place(tmp_path: Path) -> None:
    text = (
        '[[nodes]]\npreset = "dgx-h100"\nnvlink = { gpus = 4, gb_per_s = 100, latency_us = 2 }\n'
        '[nodes.gpu]\nname = "accel-9"\nmemory_gib = 96\nmemory_gb_per_s = 3000\ntflops = { bf16 = 500 }\ntdp_w = 600\n'
    )
    topology = load_topology(write_cluster(tmp_path, text))
    assert topology.device("node0:7").gpu.name == "accel-9"
    assert [len(domain) for domain in topology.domains("nvlink")] == [4, 4]
    with pytest.raises(InputError, match=r"nodes\[0\]\.gpu\.tdp_w is missing"):
        load_topology(write_cluster(tmp_path, text.replace("tdp_w = 600\n", "")))


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
