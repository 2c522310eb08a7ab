"""Clusters read from `nvidia-smi topo -m` and from lists of nodes."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.cluster import Composition, load_topology
from apex_opt.cluster.composition import read_composition
from apex_opt.cluster.importers import import_cluster
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError

LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""

# Eight GPUs on NVSwitch, a NIC on the switch of each, and one more for storage on either socket.
NAMES = [*(f"GPU{gpu}" for gpu in range(8)), *(f"NIC{nic}" for nic in range(10))]
OWNER = {"NIC0": 0, "NIC1": 1, "NIC2": 2, "NIC3": 3, "NIC5": 4, "NIC6": 5, "NIC7": 6, "NIC8": 7}


def _cell(row: str, column: str) -> str:
    if row == column:
        return " X "
    if row[:3] == column[:3] == "GPU":
        return "NV18"
    near = [OWNER.get(name, 12) if name[:3] == "NIC" else int(name[3:]) for name in (row, column)]
    if near[0] == near[1] and row[:3] != column[:3]:
        return "PXB"
    # The two NICs of none are on either socket.
    sides = [0 if name == "NIC4" else number // 4 % 2 for name, number in zip((row, column), near, strict=True)]
    return "NODE" if sides[0] == sides[1] else "SYS"


def _row(row: str) -> str:
    side = ["0-51,104-155", "0", "N/A"] if row < "GPU4" else ["52-103,156-207", "1", "N/A"]
    return "\t".join([row, *(_cell(row, column) for column in NAMES), *(side if row[:3] == "GPU" else [])])


DGX_H100 = (
    "\t\x1b[4m"
    + "\t".join([*NAMES, "CPU Affinity", "NUMA Affinity", "GPU NUMA ID"])
    + "\x1b[0m\n"
    + "\n".join(map(_row, NAMES))
    + "\n"
    + LEGEND
)

L40S = (
    """\
$ nvidia-smi topo -m
        GPU0    GPU1    GPU2    GPU3    NIC0    NIC1    CPU Affinity    NUMA Affinity   GPU NUMA ID
GPU0     X      PIX     SYS     SYS     PIX     SYS     0-31,64-95      0               N/A
GPU1    PIX      X      SYS     SYS     PIX     SYS     0-31,64-95      0               N/A
GPU2    SYS     SYS      X      PXB     SYS     NODE    32-63,96-127    1               N/A
GPU3    SYS     SYS     PXB      X      SYS     NODE    32-63,96-127    1               N/A
NIC0    PIX     PIX     SYS     SYS      X      SYS
NIC1    SYS     SYS     NODE    NODE    SYS      X
"""
    + LEGEND
)

PAIRS = """\
        GPU0    GPU1    GPU2    GPU3    mlx5_0  CPU Affinity    NUMA Affinity
GPU0     X      SYS     SYS     NV12    NODE    0-15    0
GPU1    SYS      X      NV12    SYS     SYS     16-31   1
GPU2    SYS     NV12     X      NODE    SYS     16-31   1
GPU3    NV12    SYS     NODE     X      NODE    0-15    0
mlx5_0  NODE    SYS     SYS     NODE     X
"""
PAIRS = PAIRS.replace("GPU2    SYS     NV12     X      NODE", "GPU2    SYS     NV12     X      SYS ")
PAIRS = PAIRS.replace("GPU3    NV12    SYS     NODE", "GPU3    NV12    SYS     SYS ")


def imported(folder: Path, text: str, gpu: str | None = None) -> tuple[Composition, tuple[str, ...]]:
    path = folder / "topo.txt"
    path.write_text(text)
    composition, notes = import_cluster(path, gpu)
    # What is written is what is read again, by `cluster show` too.
    written = composition.toml(notes)
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
        ("NIC1    SYS     SYS     NODE    NODE    SYS      X", "", "no row of NIC1"),
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
        ("", "no node in it; expected the output of nvidia-smi topo -m, or lines NAME GPUS TYPE"),
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


def test_what_the_gpus_are_is_asked_where_it_is_not_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--gpu: nvidia-smi topo -m does not tell what its GPUs are; give it"):
        imported(tmp_path, L40S)
    with pytest.raises(UnknownNameError, match="unknown GPU or preset 'l41'"):
        imported(tmp_path, L40S, "l41")
    with pytest.raises(UsageError, match="--gpu: a list of nodes names the type of each; leave it out"):
        imported(tmp_path, "a 8 l40s\n", "l40s")


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name, message in (("gone", "no such file"), ("bytes", "line 1 is not UTF-8 text"), (".", "a folder")):
        with pytest.raises(InputError, match=message):
            import_cluster(tmp_path / name)
    with pytest.raises(InputError, match="embedded null"):
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
