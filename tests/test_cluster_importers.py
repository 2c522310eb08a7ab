"""Clusters read from `nvidia-smi topo -m` and from lists of nodes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matrix_cases import CUBE, DGX_H100, L40S, PAIRS

from apex_opt.cluster import Composition, load_topology
from apex_opt.cluster.importers import import_cluster
from apex_opt.cluster.node_files import composition_toml, read_composition
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError

MINE = """
[gpu]
name = "mine-9"
memory_gib = 96
memory_gb_per_s = 3000
tflops = { bf16 = 500.3, fp8 = 1000 }
tdp_w = 600
source = "vendor sheet"
[intra]
gb_per_s = 50
latency_us = 4
kind = "pcie"
[inter]
gb_per_s = 12.5
latency_us = 20
kind = "ethernet"
"""


def imported(folder: Path, text: str, gpu: str | None = None) -> tuple[Composition, tuple[str, ...]]:
    path = folder / "topo.txt"
    path.write_text(text)
    composition, notes = import_cluster(path, gpu)
    # What is written is what is read again, by `cluster show` too.
    written = composition_toml(composition, notes)
    assert read_composition(path, tomllib.loads(written)) == composition
    (folder / "made.toml").write_text(written)
    assert load_topology(str(folder / "made.toml")) == composition.topology()
    return composition, notes


def test_a_dgx_h100_is_the_preset(tmp_path: Path) -> None:
    composition, notes = imported(tmp_path, DGX_H100, "h100-sxm")
    topology, preset = composition.topology(), load_topology("dgx-h100")
    assert topology.wires == preset.wires
    assert topology.devices == preset.devices
    assert "2 of 10 NICs are left out: no GPU is nearest to them" in notes
    assert [len(domain) for domain in topology.domains("nvlink")] == [8]


def test_pcie_switches_and_sockets_of_an_l40s_server(tmp_path: Path) -> None:
    composition, _ = imported(tmp_path, L40S, "l40s")
    topology = composition.topology()
    pairs = ({"node0:0", "node0:1"}, {"node0:2", "node0:3"})
    assert topology.domains("pcie") == topology.domains("socket") == topology.domains("nic") == pairs
    assert topology.domains("nvlink") == ()
    assert topology.bandwidth("node0:0", "node0:1") == 32e9
    assert topology.bandwidth("node0:1", "node0:2") == 30e9


def test_nvlink_bridges_join_pairs_that_are_no_neighbours(tmp_path: Path) -> None:
    composition, notes = imported(tmp_path, PAIRS, "a100-sxm")
    topology = composition.topology()
    assert topology.domains("nvlink") == ({"node0:0", "node0:3"}, {"node0:1", "node0:2"})
    assert topology.domains("socket") == ({"node0:0", "node0:3"}, {"node0:1", "node0:2"})
    assert topology.bandwidth("node0:0", "node0:3") == 300e9
    assert topology.bandwidth("node0:0", "node0:1") == 32e9
    assert topology.domains("pcie") == ()
    assert notes == ("one node, from nvidia-smi topo -m in topo.txt; rates are those of a preset with a100-sxm-80gb",)
    fewer, more = imported(tmp_path, PAIRS.replace("NV12", "NV4", 1).replace("GPU3    NV12", "GPU3    NV4"), "a100")
    assert fewer.topology().bandwidth("node0:1", "node0:2") == 100e9
    assert "pairs have 4 to 12 NVLinks: the fewest are taken for all" in more


def test_blackwell_nvlinks_are_twice_as_fast_and_a_lone_gpu_is_a_node(tmp_path: Path) -> None:
    composition, _ = imported(tmp_path, DGX_H100, "dgx-b200")
    assert composition.topology().bandwidth("node0:0", "node0:7") == 900e9
    alone, _ = imported(tmp_path, "\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-15\tN/A\n", "v100-pcie")
    assert alone.topology().gpus() == ("node0:0",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("GPU0     X ", "GPU0    PIX", "GPU0 to GPU0 is 'PIX', known: X"),
        ("GPU1    PIX", "GPU1    PIG", "GPU1 to GPU0 is 'PIG', known: NV and a number, PIX, PXB, PHB, NODE, SYS"),
        ("GPU1    PIX", "GPU1    SYS", "GPU0 to GPU1 is PIX, and back SYS"),
        (
            "GPU3    SYS     SYS     PXB      X      SYS     NODE    32-63,96-127    1               N/A",
            "",
            "no row of GPU3",
        ),
        ("GPU3    SYS", "GPU9    SYS", "a row of GPU9, which has no column"),
        ("NIC1    SYS     SYS     NODE    NODE    SYS      X", "NIC1 SYS", "NIC1 has 1 entries for 6 columns"),
        ("GPU3    SYS", "GPU2    SYS", "a second row of GPU2"),
        ("GPU2    GPU3    NIC0", "GPU3    GPU2    NIC0", "its columns are not GPU0, GPU1 and so on, then NICs"),
        ("NIC0    PIX", "NIC0    NV4", "GPU0 to NIC0 is PIX, and back NV4"),
    ],
)
def test_a_matrix_with_a_fault_is_refused_in_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in L40S
    with pytest.raises(InputError) as caught:
        imported(tmp_path, L40S.replace(old, new, 1), "l40s")
    assert str(caught.value).startswith(f"source {tmp_path}/topo.txt: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_names_a_node_in_every_line(tmp_path: Path) -> None:
    composition, notes = imported(
        tmp_path, "# our lab\nworker-1 8 dgx-h100\nworker-2 8 hgx-h100\n\nold 4 l40s\nbig 72 nvl72-gb200\n"
    )
    assert [(count, node.gpus, node.gpu.name[:5]) for count, node in composition.nodes] == [
        (2, 8, "h100-"),
        (1, 4, "l40s-"),
        (1, 72, "gb200"),
    ]
    assert notes[1:] == ("node0 is worker-1", "node1 is worker-2", "node2 is old", "node3 is big")
    topology = composition.topology()
    assert topology.domains("pcie") == ({"node2:0", "node2:1"}, {"node2:2", "node2:3"})
    assert topology.wires[:8] == load_topology("2xdgx-h100").wires[:8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no node in it: nvidia-smi topo -m prints a matrix; a list has lines NAME GPUS TYPE"),
        ("hello\n", "holds no matrix and no list: nvidia-smi topo -m prints a matrix"),
        ("# nothing\n", "no node in it"),
        ("a 8\n", "line 1: expected NAME GPUS TYPE such as 'worker-1 8 dgx-h100', got 'a 8'"),
        ("a 0 l40s\n", "line 1: expected NAME GPUS TYPE"),
        ("a eight l40s\n", "got 'a eight l40s'"),
        ("a 8 l40s\na 8 l40s\n", "line 2: a second node 'a'"),
        ("a 9 l40s\n", "line 1: 9 GPUs, but one node of l40s holds 8"),
        ("a 8 rtx\n", "line 1: GPU 'rtx' fits rtx-4090-24gb, rtx-5090-32gb"),
        ("a 8 l40\nb 8 l41\n", "line 2: unknown GPU or preset 'l41'; did you mean l4 or l40 or l40s?"),
        ("".join(f"n{i} 72 gb200\n" for i in range(911)), "65592 GPUs, above the limit of 65536"),
    ],
)
def test_a_list_with_a_fault_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        imported(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mesh_of_nvlinks_is_taken_apart_into_what_is_joined_all_to_all(tmp_path: Path) -> None:
    composition, notes = imported(tmp_path, CUBE, "v100-sxm-32gb")
    topology = composition.topology()
    quads = ({f"node0:{gpu}" for gpu in range(4)}, {f"node0:{gpu}" for gpu in range(4, 8)})
    assert topology.domains("nvlink") == topology.domains("socket") == quads
    assert topology.bandwidth("node0:0", "node0:1") == 25e9
    assert topology.bandwidth("node0:0", "node0:4") == 16e9
    assert notes[1:] == (
        "NVLinks do not join all GPUs with one another: domains are 0-1-2-3, 4-5-6-7, and those of 4 pairs between "
        "them are left out",
        "pairs have 1 to 2 NVLinks: the fewest are taken for all",
    )
    ring = "\n".join(
        [
            "\tGPU0\tGPU1\tGPU2\tGPU3\tGPU4",
            *(
                "\t".join(
                    [f"GPU{a}", *("X" if a == b else "NV2" if (a - b) % 5 in (1, 4) else "PHB" for b in range(5))]
                )
                for a in range(5)
            ),
        ]
    )
    composition, notes = imported(tmp_path, ring, "v100")
    assert composition.topology().domains("nvlink") == ({"node0:0", "node0:1"}, {"node0:2", "node0:3"})
    assert "domains are 0-1, 2-3, and those of 3 pairs between them are left out" in notes[1]


def test_a_mesh_that_is_too_large_to_tell_is_refused(tmp_path: Path) -> None:
    count = 17
    rows = ["\t".join(["", *(f"GPU{gpu}" for gpu in range(count))])]
    for a in range(count):
        cells = ("X" if a == b else "NV2" if abs(a - b) == 1 else "SYS" for b in range(count))
        rows.append("\t".join([f"GPU{a}", *cells]))
    with pytest.raises(InputError, match="NVLinks join 17 GPUs, but not all of them with one another; a mesh of more"):
        imported(tmp_path, "\n".join(rows), "v100")


def test_links_are_as_fast_as_those_of_the_generation(tmp_path: Path) -> None:
    for gpu, rate in (("a40", 14.0625), ("a100-pcie", 25.0), ("h100-nvl", 25.0), ("b200", 50.0), ("v100", 25.0)):
        composition, _ = imported(tmp_path, PAIRS.replace("NV12", "NV4"), gpu)
        assert composition.topology().bandwidth("node0:0", "node0:3") == pytest.approx(max(4 * rate, 0) * 1e9)


@pytest.mark.parametrize(("gpu", "most"), [("v100", 6), ("a100", 12), ("a800", 8), ("h800", 8), ("dgx-a100", 12)])
def test_a_matrix_with_more_nvlinks_than_the_gpu_has_is_of_another(tmp_path: Path, gpu: str, most: int) -> None:
    with pytest.raises(InputError, match=rf"GPU0 to GPU1 is NV18, but \S+ has {most} NVLinks; give the GPU"):
        imported(tmp_path, DGX_H100, gpu)
    imported(tmp_path, DGX_H100.replace("NV18", f"NV{most}"), gpu)


@pytest.mark.parametrize("gpu", ["h100", "h20", "h200", "b200", "b300"])
def test_a_matrix_with_as_many_nvlinks_as_the_gpu_has_is_read(tmp_path: Path, gpu: str) -> None:
    imported(tmp_path, DGX_H100, gpu)


def test_without_affinities_nics_tell_the_sockets(tmp_path: Path) -> None:
    bare = "\n".join("\t".join(line.split("\t")[:19]) for line in DGX_H100.splitlines())
    assert "104-155" not in bare
    composition, _ = imported(tmp_path, bare, "h100")
    assert [len(socket) for socket in composition.topology().domains("socket")] == [4, 4]


def test_gpus_may_be_those_of_the_catalogue_without_a_preset_or_of_a_file(tmp_path: Path) -> None:
    composition, notes = imported(tmp_path, L40S, "a10")
    assert "rates are those of the catalogue's a10-24gb, of its PCIe assumed" in notes[0]
    assert composition.topology().bandwidth("node0:0", "node0:1") == 32e9
    for head in ("", 'name = "node"\nnodes = 2\ngpus_per_node = 8\n'):
        text = head + MINE
        (tmp_path / "mine.toml").write_text(text if head else text.partition("[intra]")[0])
        composition, notes = imported(tmp_path, L40S, str(tmp_path / "mine.toml"))
        ((_, node),) = composition.nodes
        assert (node.gpu.name, node.gpu.memory_bytes, node.gpu.capability) == ("mine-9", 96 * 2**30, 9.0)
        assert dict(node.gpu.sources)["tflops"] == "vendor sheet"
        assert composition.topology().bandwidth("node0:0", "node0:1") == (50e9 if head else 64e9)
        assert "rates are those of mine.toml" in notes[0]
        # Two NICs are there to be wired only where the file tells how fast they are.
        assert (node.nics is None) == (not head)
    (tmp_path / "bad.toml").write_text("[gpu]\nname = 'x'\n")
    with pytest.raises(InputError, match=r"gpu\.memory_gib is missing"):
        imported(tmp_path, L40S, str(tmp_path / "bad.toml"))
    with pytest.raises(InputError, match=r"--gpu: cluster file .*gone\.toml: no such file"):
        imported(tmp_path, L40S, str(tmp_path / "gone.toml"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (
            "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05 |\n|   0  NVIDIA H100 |\n",
            "nvidia-smi prints without topo",
        ),
        ("GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1234)\nGPU 1: NVIDIA H100 80GB HBM3\n", "nvidia-smi prints without"),
        ("GPU 0: NVIDIA A100\n\t Link 0: 25 GB/s\n", "nvidia-smi prints without topo -m"),
        ("==============NVSMI LOG==============\n", "nvidia-smi prints without topo -m"),
        (" \tGPU0\tGPU1\n GPU0\tX\tOK\n GPU1\tOK\tX\n", "the matrix of topo -p2p"),
        ("==== ROCm System Management Interface ====\n       GPU0   GPU1\nGPU0   0      15\n", "AMD's tools print"),
        ("       GPU0   GPU1\nGPU0   0      XGMI\nGPU1   XGMI   0\n", "AMD's tools print"),
        ('{"gpus": 8}\n', "JSON or a page"),
    ],
)
def test_what_is_no_matrix_is_told_what_it_is_and_what_prints_one(tmp_path: Path, text: str, what: str) -> None:
    for gpu in (None, "h100"):
        with pytest.raises(InputError) as caught:
            imported(tmp_path, text, gpu)
        assert f"is what {what}" in str(caught.value) or f"is {what}" in str(caught.value)
        assert "nvidia-smi topo -m prints a matrix" in str(caught.value)


def test_what_the_gpus_are_is_asked_where_it_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--gpu: nvidia-smi topo -m does not tell what its GPUs are; give it"):
        imported(tmp_path, L40S)
    with pytest.raises(UnknownNameError, match="unknown GPU or preset 'l41'"):
        imported(tmp_path, L40S, "l41")
    with pytest.raises(UsageError, match="--gpu: a list of nodes names the type of each; leave it out"):
        imported(tmp_path, "a 8 l40s\n", "l40s")


def test_what_is_no_list_is_told_so_with_a_gpu_too_and_by_its_first_line(tmp_path: Path) -> None:
    for gpu in (None, "l40s"):
        with pytest.raises(InputError, match=r"no matrix and no list: .*; line 1: expected NAME GPUS TYPE") as caught:
            imported(tmp_path, "Some words\non two lines\n", gpu)
        assert "line 2" not in str(caught.value)


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, message in (("gone", "no such file"), ("bytes", "line 1 is not UTF-8 text"), (".", "a folder")):
        with pytest.raises(InputError, match=message):
            import_cluster(tmp_path / name)
    with pytest.raises(InputError, match="a name with a null character"):
        import_cluster(Path("a\0b"))


@given(st.text(alphabet="GPUNICXSYPB0123456789 \t\n-VAffinity", max_size=200))
def test_any_text_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.txt"
    for start in ("", "GPU0 GPU1 CPU\nGPU0 X "):
        path.write_text(start + text)
        for gpu in (None, "h100"):
            try:
                import_cluster(path, gpu)[0].topology()
            except ApexError as error:
                assert str(error)
