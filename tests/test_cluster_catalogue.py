"""Cluster specs and cluster files: what they mean, and what is said of bad ones."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from apex_opt.cluster import (
    Composition,
    assumed_network,
    cluster_names,
    list_clusters,
    list_gpus,
    load_cluster,
    load_pools,
    load_topology,
    load_wiring,
)
from apex_opt.errors import ApexError, InputError, UnknownNameError, UsageError
from apex_opt.units import GIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

NEW_GPU = """
nodes = 2
gpus_per_node = 16
[gpu]
name = "accel-9"
memory_gib = 96
memory_gb_per_s = 3000
tflops = { bf16 = 500, fp8 = 1000 }
tdp_w = 600
source = "vendor sheet"
[intra]
gb_per_s = 200
latency_us = 4
kind = "nvlink"
[inter]
gb_per_s = 25
latency_us = 6
kind = "ethernet"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("spec", "nodes", "gpus", "gpu"),
    [
        ("h100-sxm", 1, 1, "h100-sxm-80gb"),
        ("8xh100-sxm", 1, 8, "h100-sxm-80gb"),
        ("4x8xh200-sxm", 4, 8, "h200-sxm-141gb"),
        ("8xh200-sxm-141gb", 1, 8, "h200-sxm-141gb"),
        (" 2X4XA100 ", 2, 4, "a100-sxm-80gb"),
        ("b200-sxm", 1, 1, "b200-sxm-180gb"),
        ("4xl40s", 1, 4, "l40s-48gb"),
        ("v100-pcie", 1, 1, "v100-pcie-16gb"),
        # Whole names are no beginnings of others.
        ("8xh20", 1, 8, "h20-96gb"),
        ("4xl4", 1, 4, "l4-24gb"),
        ("8xa10", 1, 8, "a10-24gb"),
        ("8xl40", 1, 8, "l40-48gb"),
        # Of several variants the SXM one with the most memory, without one the most memory.
        ("a100", 1, 1, "a100-sxm-80gb"),
        ("a100-sxm", 1, 1, "a100-sxm-80gb"),
        ("a100-pcie", 1, 1, "a100-pcie-80gb"),
        ("8xa100-sxm-40gb", 1, 8, "a100-sxm-40gb"),
        ("8xh100", 1, 8, "h100-sxm-80gb"),
        ("h100-nvl", 1, 1, "h100-nvl-94gb"),
        ("v100", 1, 1, "v100-sxm-32gb"),
        ("gh200", 1, 1, "gh200-144gb"),
        ("72xgb300", 1, 72, "gb300-nvl72-288gb"),
        ("2xrtx-4090", 1, 2, "rtx-4090-24gb"),
        ("2x8xMI300X", 2, 8, "mi300x-192gb"),
    ],
)
def test_a_spec_names_nodes_times_gpus(spec: str, nodes: int, gpus: int, gpu: str) -> None:
    cluster = load_cluster(spec)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu.name) == (nodes, gpus, gpu)
    # What was taken is told in full.
    assert cluster.name.endswith(gpu)
    assert load_cluster(cluster.name) == cluster


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("16xh100-sxm", UsageError, "holds 8 GPUs, asked for 16; write 2x8xh100-sxm"),
        ("3x20xa100", UsageError, "write 8x8xa100"),
        ("0xh100", UsageError, "'0' must be a whole number from 1 to 65536"),
        ("-1xh100", UsageError, "'-1' must be a whole number"),
        ("1.5xh100", UsageError, "'1.5' must be a whole number"),
        ("2x99999999999999999999xh100", UsageError, "must be a whole number"),
        ("65536x8xh100", InputError, "above the limit of 65536"),
        ("xh100", UsageError, "'' must be a whole number"),
        ("8xh", UnknownNameError, "unknown GPU 'h'"),
        ("8xh2", UnknownNameError, "unknown GPU 'h2'"),
        ("8xh100-s", UnknownNameError, "unknown GPU 'h100-s'; did you mean"),
        ("8xl40sx", UnknownNameError, "unknown GPU 'l40sx'"),
        ("8xrtx", UsageError, "fits rtx-4090-24gb, rtx-5090-32gb, rtx-6000-ada-48gb, rtx-pro-6000-96gb: write one of"),
        ("8xgh200-96gb", UsageError, "one node of gh200-96gb holds 1 GPUs, asked for 8; write 8x1xgh200-96gb"),
        ("8xh100-sxx", UnknownNameError, "did you mean h100-sxm-80gb"),
        ("8 GPUs", UsageError, "expected GPU"),
        ("", UsageError, "expected GPU"),
        (8, UsageError, "got 8"),
        (None, UsageError, "got None"),
        ("nowhere/x.toml", InputError, "no such file"),
    ],
)
def test_bad_specs_get_one_clear_line(spec: object, error: type[ApexError], message: str) -> None:
    with pytest.raises(error) as caught:
        load_cluster(spec)  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", list_clusters())
def test_every_catalogue_cluster_loads_and_every_figure_has_a_source(spec: str) -> None:
    cluster = load_cluster(spec)
    sources = dict(cluster.gpu.sources)
    figures = {"memory_mib", "memory_gb_per_s", "tflops", "tdp_w", "idle_w", "clock_mhz", "price_per_h", "capability"}
    figures |= {"overlapped_launch"} if cluster.gpu.overlapped_launch else set()
    # What SGLang can divide, which is what they are for.
    figures |= {"multiprocessors"} if 7 <= (cluster.gpu.capability or 0) < 10 else set()
    figures -= ({"capability"} if not cluster.gpu.cuda else set()) | ({"clock_mhz"} - {*sources})
    assert set(sources) - {"like"} == figures
    assert ("like" in sources) == (cluster.gpu.like != "h200-sxm" or cluster.gpu.name == "h20-96gb" or "144" in spec)
    # A relative's efficiencies are said to be derived, and its tables are never taken for the accelerator's own.
    assert sources.get("like", "derived: ").startswith("derived: ")
    assert cluster.gpu.profile is None or "like" not in sources
    assert sources["price_per_h"].startswith("assumed: ")
    assert cluster.gpu.price_per_h is not None
    assert 0.1 < cluster.gpu.price_per_h < 20
    assert all(len(text) > 15 for text in sources.values())
    assert cluster.inter is not None
    assert cluster.intra.source and cluster.inter.source
    assert not any("stated in" in text for text in (*sources.values(), cluster.intra.source, cluster.inter.source))


# Figures of the makers' datasheets and of drivers, written down again: MiB, GB/s, dense TFLOP/s in 16 bit, fp8, fp4 and
# int8 (0: none, or left out), W, compute capability, GB/s of the link in one direction, and what names the source.
SHEETS = {
    "a10-24gb": (23028, 600, 125, 0, 0, 250, 150, 8.6, 32, "A10 datasheet"),
    "a100-pcie-40gb": (40960, 1555, 312, 0, 0, 624, 250, 8.0, 32, "A100 Tensor Core GPU datasheet"),
    "a100-pcie-80gb": (81920, 1935, 312, 0, 0, 624, 300, 8.0, 32, "A100 Tensor Core GPU datasheet"),
    "a100-sxm-40gb": (40960, 1555, 312, 0, 0, 624, 400, 8.0, 300, "A100 Tensor Core GPU datasheet"),
    "a100-sxm-80gb": (81920, 2039, 312, 0, 0, 624, 400, 8.0, 300, "A100 Tensor Core GPU datasheet"),
    "a30-24gb": (24576, 933, 165, 0, 0, 330, 165, 8.0, 32, "A30 datasheet"),
    "a40-48gb": (46068, 696, 149.7, 0, 0, 299.3, 300, 8.6, 32, "A40 datasheet"),
    "a800-sxm-80gb": (81920, 2039, 312, 0, 0, 624, 400, 8.0, 200, "A800 datasheet"),
    "b200-sxm-180gb": (183359, 7700, 2250, 4500, 9000, 0, 1000, 10.0, 900, "Blackwell architecture brief"),
    "b300-sxm-288gb": (275040, 7750, 2250, 4500, 14000, 0, 1100, 10.3, 900, "HGX B300 figures"),
    "gb200-nvl72-185gb": (189471, 8000, 2500, 5000, 10000, 0, 1200, 10.0, 900, "GB200 NVL72 datasheet"),
    "gb300-nvl72-288gb": (284208, 8000, 2500, 5000, 15000, 0, 1400, 10.3, 900, "GB300 NVL72 datasheet"),
    "gh200-144gb": (145920, 4900, 989, 1979, 0, 1979, 900, 9.0, 450, "GH200 Grace Hopper Superchip datasheet"),
    "gh200-96gb": (97871, 4000, 989, 1979, 0, 1979, 900, 9.0, 450, "GH200 Grace Hopper Superchip datasheet"),
    "h100-nvl-94gb": (95830, 3900, 835, 1670, 0, 1670, 400, 9.0, 64, "H100 NVL datasheet"),
    "h100-pcie-80gb": (81559, 2000, 756, 1513, 0, 1513, 350, 9.0, 64, "H100 PCIe datasheet"),
    "h100-sxm-80gb": (81559, 3350, 989, 1979, 0, 1979, 700, 9.0, 450, "H100 Tensor Core GPU datasheet"),
    "h20-96gb": (97871, 4000, 148, 296, 0, 296, 400, 9.0, 450, "H20 datasheet"),
    "h200-sxm-141gb": (143771, 4800, 989, 1979, 0, 1979, 700, 9.0, 450, "H200 Tensor Core GPU datasheet"),
    "h800-sxm-80gb": (81559, 3350, 989, 1979, 0, 1979, 700, 9.0, 200, "H800 datasheet"),
    "l4-24gb": (23034, 300, 121, 242, 0, 242, 72, 8.9, 32, "L4 datasheet"),
    "l40-48gb": (46068, 864, 181, 362, 0, 362, 300, 8.9, 32, "L40 datasheet"),
    "l40s-48gb": (46068, 864, 362, 733, 0, 733, 350, 8.9, 32, "L40S datasheet"),
    "mi300x-192gb": (196592, 5300, 1307.4, 2614.9, 0, 2614.9, 750, None, 64, "MI300X data sheet"),
    "mi325x-256gb": (262128, 6000, 1307.4, 2614.9, 0, 2614.9, 1000, None, 64, "MI325X data sheet"),
    "mi355x-288gb": (294896, 8000, 2516.6, 5033.2, 10066.3, 5033.2, 1400, None, 76.8, "MI355X data sheet"),
    "rtx-4090-24gb": (24564, 1008, 165.2, 330.3, 0, 660.6, 450, 8.9, 32, "Ada GPU architecture whitepaper"),
    "rtx-5090-32gb": (32607, 1792, 209.5, 419, 1676, 0, 575, 12.0, 64, "Blackwell GPU architecture whitepaper"),
    "rtx-6000-ada-48gb": (49140, 960, 364.2, 728.5, 0, 728.5, 300, 8.9, 32, "RTX 6000 Ada datasheet"),
    "rtx-pro-6000-96gb": (
        97887,
        1792,
        503.8,
        1007.6,
        2015.2,
        0,
        600,
        12.0,
        64,
        "Blackwell GPU architecture whitepaper",
    ),
    "t4-16gb": (15360, 300, 65, 0, 0, 130, 70, 7.5, 16, "T4 datasheet"),
    "v100-pcie-16gb": (16384, 900, 112, 0, 0, 0, 250, 7.0, 16, "V100 datasheet"),
    "v100-sxm-16gb": (16384, 900, 125, 0, 0, 0, 300, 7.0, 150, "V100 datasheet"),
    "v100-sxm-32gb": (32768, 900, 125, 0, 0, 0, 300, 7.0, 150, "V100 datasheet"),
}


def test_the_table_of_datasheets_is_of_the_whole_catalogue() -> None:
    assert set(SHEETS) == set(list_gpus())


@pytest.mark.parametrize("name", SHEETS)
def test_figures_are_those_of_the_datasheet(name: str) -> None:
    mib, gb_per_s, half, fp8, fp4, int8, watts, capability, link, sheet = SHEETS[name]
    cluster = load_cluster(name)
    gpu, flops = cluster.gpu, dict(cluster.gpu.flops_per_s)
    assert gpu.memory_bytes == mib * MIB
    assert gpu.memory_bytes_per_s == pytest.approx(gb_per_s * 1e9)
    assert flops["fp16"] == flops.get("bf16", flops["fp16"]) == pytest.approx(half * 1e12)
    assert [flops.get(dtype, 0) for dtype in ("fp8", "fp4", "int8")] == pytest.approx(
        [n * 1e12 for n in (fp8, fp4, int8)]
    )
    assert ("bf16" in flops) == (name[:2] not in ("v1", "t4"))
    assert (gpu.tdp_w, gpu.capability) == (watts, capability)
    assert cluster.intra.bytes_per_s == pytest.approx(link * 1e9)
    assert sheet in dict(gpu.sources)["tflops"]


def test_accelerators_of_amd_are_none_of_cuda_and_have_links_of_their_own() -> None:
    for name in list_gpus():
        cluster = load_cluster(name)
        assert (cluster.gpu.capability is None) == (not cluster.gpu.cuda) == name.startswith("mi")
        assert (cluster.intra.kind == "xgmi") == name.startswith("mi")


def test_what_is_measured_is_measured_on_no_other_accelerator() -> None:
    measured = {name for name in list_gpus() if load_cluster(name).gpu.profile}
    sxm = {"a100-sxm-80gb", "h100-sxm-80gb", "h200-sxm-141gb", "b200-sxm-180gb", "b300-sxm-288gb"}
    assert measured == sxm | {"gb200-nvl72-185gb", "l40s-48gb"}
    overlapped = {name for name in list_gpus() if load_cluster(name).gpu.overlapped_launch}
    assert overlapped == {name for name in list_gpus() if name.startswith(("b200", "b300", "gb200", "gb300"))}


def test_a_compute_capability_is_stated_or_that_of_the_formats(tmp_path: Path) -> None:
    unstated = load_cluster(write(tmp_path, NEW_GPU)).gpu
    assert unstated.capability == 9.0
    assert dict(unstated.sources)["capability"].startswith("derived: ")
    for formats, capability in (("fp16 = 100", 7.0), ("bf16 = 100, int8 = 200", 8.0), ("bf16 = 1, fp4 = 4", 10.0)):
        text = NEW_GPU.replace("bf16 = 500, fp8 = 1000", formats)
        assert load_cluster(write(tmp_path, text)).gpu.capability == capability
    stated = load_cluster(write(tmp_path, NEW_GPU.replace("tdp_w = 600", "tdp_w = 600\ncapability = 8.9"))).gpu
    assert (stated.capability, dict(stated.sources)["capability"]) == (8.9, "vendor sheet")
    other = load_cluster(write(tmp_path, NEW_GPU.replace("tdp_w = 600", "tdp_w = 600\ncuda = false"))).gpu
    assert other.capability is None
    assert "capability" not in dict(other.sources)


def test_a_new_accelerator_needs_a_file_and_no_code(tmp_path: Path) -> None:
    cluster = load_cluster(write(tmp_path, NEW_GPU))
    assert (cluster.name, cluster.size, cluster.gpu.memory_bytes) == ("mine", 32, 96 * GIB)
    assert cluster.gpu.peak_flops_per_s("fp8") == 1e15
    assert dict(cluster.gpu.sources)["tdp_w"] == "vendor sheet"
    assert cluster.gpu.idle_w == pytest.approx(600 * 125 / 700)
    assert "assumed" in dict(cluster.gpu.sources)["idle_w"]
    assert cluster.inter is not None
    assert (cluster.gpus_per_node, cluster.intra.bytes_per_s, cluster.inter.kind) == (16, 200e9, "ethernet")
    assert not cluster.gpu.overlapped_launch
    launching = NEW_GPU.replace("tdp_w = 600", "tdp_w = 600\noverlapped_launch = true")
    assert load_cluster(write(tmp_path, launching)).gpu.overlapped_launch


def test_a_file_may_name_a_catalogue_gpu_and_rewire_it(tmp_path: Path) -> None:
    text = 'name = "lab"\nnodes = 2\ngpus_per_node = 8\ngpu = "h100-sxm"\n'
    plain = load_cluster(write(tmp_path, text))
    assert plain.name == "lab"
    assert plain.intra == load_cluster("8xh100").intra
    slow = load_cluster(write(tmp_path, text + '[inter]\ngb_per_s = 1.5\nlatency_us = 30\nkind = "ethernet"\n'))
    assert slow.inter is not None
    assert slow.inter.bytes_per_s == 1.5e9
    assert slow.gpu == plain.gpu


def test_a_lone_gpu_needs_no_links(tmp_path: Path) -> None:
    text = NEW_GPU.split("[intra]")[0].replace("= 2", "= 1", 1).replace("= 16", "= 1", 1)
    assert load_cluster(write(tmp_path, text)).size == 1


def test_all_faults_of_a_file_come_at_once(tmp_path: Path) -> None:
    text = NEW_GPU.replace("nodes = 2", "nodes = 0").replace("tdp_w = 600", "tdp_w = nan").replace("96", '"96"')
    with pytest.raises(InputError) as caught:
        load_cluster(write(tmp_path, text + "colour = 1\n"))
    for part in ("nodes = 0", "gpu.tdp_w = nan", "gpu.memory_gib = '96'", "inter.colour is not a known field"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("nodes = 2\n", "", "nodes is missing"),
        ("nodes = 2", "nodes = 2.0", "nodes = 2.0 must be a whole number"),
        ("nodes = 2", "nodes = true", "nodes = True must be a whole number"),
        ("nodes = 2", "nodes = 70000", "nodes = 70000 must be from 1 to 65536"),
        (
            "nodes = 2",
            "knots = 2",
            "knots is not a known field; allowed: name, nodes, gpus_per_node, gpu, intra, inter",
        ),
        ("memory_gb_per_s = 3000", "memory_gb_per_s = -1", "gpu.memory_gb_per_s = -1 must be from 10 to 100000"),
        ("memory_gb_per_s = 3000", "memory_gb_per_s = inf", "gpu.memory_gb_per_s = inf"),
        ("memory_gib = 96", "memory_gib = 96\nmemory_mib = 9", "both given"),
        ("memory_gib = 96", "", "gpu.memory_gib is missing"),
        ("fp8 = 1000", "int3 = 7", "gpu.tflops.int3 is not a known field; allowed: bf16, fp16, fp8"),
        ("tflops = { bf16 = 500, fp8 = 1000 }", "tflops = {}", "needs bf16 or fp16"),
        ('kind = "ethernet"', 'kind = "pigeon"', "inter.kind = 'pigeon' must be one of nvlink, xgmi, pcie"),
        ("latency_us = 4", "latency_us = -4", "intra.latency_us = -4"),
        ('name = "accel-9"', 'name = "accel-9"\nprofile = "../etc"', "gpu.profile = '../etc'"),
        ('name = "accel-9"', 'name = "accel-9"\nidle_w = 700', "idle_w = 700.0 must be below tdp_w"),
        (
            'name = "accel-9"',
            'name = "accel-9"\noverlapped_launch = 1',
            "gpu.overlapped_launch = 1 must be true or false",
        ),
        ("tdp_w = 600", "tdp_w = 600\ncapability = 90", "gpu.capability = 90 must be from 7 to 15"),
        (
            "tdp_w = 600",
            "tdp_w = 600\ncapability = 9\ncuda = false",
            "capability = 9.0 is one of CUDA, and cuda is false",
        ),
        ("nodes = 2", "nodes = = 2", "not valid TOML"),
        ("nodes = 2", "nodes = " + "9" * 5000, "mine.toml"),
        ("[inter]", "[inner]", "inter is missing"),
    ],
)
def test_each_bad_field_is_named_with_its_value_and_limit(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in NEW_GPU
    with pytest.raises(InputError) as caught:
        load_cluster(write(tmp_path, NEW_GPU.replace(old, new, 1)))
    assert message in str(caught.value)


def test_several_specs_are_a_list_or_one_mixed_cluster(tmp_path: Path) -> None:
    assert cluster_names("8xh100-sxm, 8xl40s") == ("8xh100-sxm", "8xl40s")
    assert cluster_names("8xh100-sxm") == ("8xh100-sxm",)
    odd = write(tmp_path, NEW_GPU).replace("mine.toml", "a,b+c.toml")
    (tmp_path / "mine.toml").rename(odd)
    # A file whose name has a comma is a file.
    assert cluster_names(odd) == (odd,)
    assert load_cluster(odd).gpu.name == "accel-9"
    mixed = load_wiring("2x4xh100-sxm + dgx-a100+1xl4")
    assert isinstance(mixed, Composition)
    assert mixed.name == "2x4xh100-sxm-80gb+dgx-a100+1xl4-24gb"
    assert [(count, node.gpus, node.gpu.name) for count, node in mixed.nodes] == [
        (2, 4, "h100-sxm-80gb"),
        (1, 8, "a100-sxm-80gb"),
        (1, 1, "l4-24gb"),
    ]
    pools = load_pools("2x4xh100-sxm+dgx-a100+1xl4")
    assert [(pool.gpu.name, pool.size) for pool in pools] == [
        ("h100-sxm-80gb", 8),
        ("a100-sxm-80gb", 8),
        ("l4-24gb", 1),
    ]
    topology = load_topology("1xh100-sxm+1xl40s")
    assert topology.bandwidth("node0:0", "node1:0") == 12.5e9
    assert assumed_network("1xh100-sxm+1xl40s") == (
        "the link between the parts of 1xh100-sxm-80gb+1xl40s-48gb is assumed: all on one leaf switch, h100-sxm-80gb "
        "by a port each of 50 GB/s infiniband, l40s-48gb by a port each of 12.5 GB/s ethernet",
    )
    assert assumed_network("8xh100-sxm") == ()
    # Of one type it is a cluster as any other.
    assert (load_cluster("8xh100+8xh100").nodes, load_cluster("8xh100+8xh100").gpus_per_node) == (2, 8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "8xh100,8xl40s",
            "plan, energy and capacity compare several clusters, this takes one; a mixed one",
        ),
        ("8xh100+", "an empty place between the parts of a mixed cluster"),
        ("8xh100+8xh101", "unknown GPU 'h101'"),
        ("8000x8xh100+8000x8xa100", "128000 GPUs, above the limit of 65536"),
        ("8xh100+lone.toml", "nodes with accel-9 have no network, which others need to reach them"),
        ("8xh100+lab.toml", "lab.toml has a network of its own; describe all in one TOML file"),
    ],
)
def test_a_mixed_cluster_that_cannot_be_put_together_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lone = NEW_GPU.partition("[inter]")[0].replace("nodes = 2", "nodes = 1")
    (tmp_path / "lone.toml").write_text(lone)
    (tmp_path / "lab.toml").write_text('[[nodes]]\npreset = "dgx-h100"\n[network]\nrails = true\n')
    with pytest.raises(ApexError) as caught:
        load_wiring(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_clusters_has_no_empty_place_and_nothing_twice() -> None:
    with pytest.raises(UsageError, match="an empty place in the list of clusters"):
        cluster_names("8xh100,,8xl40s")
    with pytest.raises(UsageError, match="'8xh100' is given twice"):
        cluster_names("8xh100,8xl40s,8xh100")


BOUNDS = {
    "memory_gib": (1, 4096),
    "memory_gb_per_s": (10, 1e5),
    "bf16": (0.1, 1e6),
    "fp8": (0.1, 1e6),
    "tdp_w": (10, 2e4),
    "price_per_h": (1e-4, 1e4),
    "clock_mhz": (100, 1e4),
    "gb_per_s": (0.01, 1e5),
    "latency_us": (0, 1e5),
}


@pytest.mark.parametrize("field", BOUNDS)
def test_no_figure_is_beyond_what_there_is(tmp_path: Path, field: str) -> None:
    text = NEW_GPU.replace("tdp_w = 600", "tdp_w = 600\nidle_w = 1\nclock_mhz = 1500\nprice_per_h = 2")
    least, most = BOUNDS[field]
    for value in (least, most):
        load_cluster(write(tmp_path, re.sub(rf"\b{field} = [0-9.]+", f"{field} = {value}", text, count=1)))
    for value in (least / 1.001 if least else -1e-9, most * 1.001, 1e-20 if least else -1e-20, 1e300):
        with pytest.raises(InputError) as caught:
            load_cluster(write(tmp_path, re.sub(rf"\b{field} = [0-9.]+", f"{field} = {value}", text, count=1)))
        assert f"{field} = {value!r} must be from {least:.12g} to {most:.12g}" in str(caught.value)


def test_unknown_or_oversized_catalogue_gpus_in_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown GPU 'h101'; did you mean h100 or "):
        load_cluster(write(tmp_path, 'nodes = 1\ngpus_per_node = 1\ngpu = "h101"\n'))
    with pytest.raises(InputError, match="gpus_per_node = 16, but one node of h100-sxm-80gb holds 8"):
        load_cluster(write(tmp_path, 'nodes = 1\ngpus_per_node = 16\ngpu = "h100"\n'))
    with pytest.raises(InputError, match="gpu = 7 must be a table"):
        load_cluster(write(tmp_path, "nodes = 1\ngpus_per_node = 1\ngpu = 7\n"))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff\xfe'")
    (tmp_path / "folder.toml").mkdir()
    for name, message in (
        ("bytes", "not UTF-8"),
        ("folder", "but a folder"),
        ("a\0b", "a name with a null character"),
    ):
        with pytest.raises(InputError, match=message):
            load_cluster(str(tmp_path / f"{name}.toml"))
