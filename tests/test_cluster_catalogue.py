"""Cluster specs and cluster files: what they mean, and what is said of bad ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from apex_opt.cluster import list_clusters, list_gpus, load_cluster
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
    ],
)
def test_a_spec_names_nodes_times_gpus(spec: str, nodes: int, gpus: int, gpu: str) -> None:
    cluster = load_cluster(spec)
    assert (cluster.nodes, cluster.gpus_per_node, cluster.gpu.name) == (nodes, gpus, gpu)


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
        ("8xh", UsageError, "fits h100-sxm-80gb, h200-sxm-141gb"),
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
    assert set(sources) == figures | ({"overlapped_launch"} if cluster.gpu.overlapped_launch else set())
    assert sources["price_per_h"].startswith("assumed: ")
    assert cluster.gpu.price_per_h is not None
    assert 0.1 < cluster.gpu.price_per_h < 20
    assert all(len(text) > 15 for text in sources.values())
    assert cluster.inter is not None
    assert cluster.intra.source and cluster.inter.source
    assert not any("stated in" in text for text in (*sources.values(), cluster.intra.source, cluster.inter.source))


def test_the_catalogue_says_which_formats_the_hardware_has() -> None:
    has = {name: {dtype for dtype, _ in load_cluster(name).gpu.flops_per_s} for name in list_gpus()}
    assert has["v100-pcie-16gb"] == {"fp16"}
    assert has["a100-sxm-80gb"] == {"bf16", "fp16", "int8"}
    blackwell = {name for name in has if name.startswith(("b200", "b300", "gb200"))}
    assert all(has[name] == {"bf16", "fp16", "fp8", "int8"} for name in has if name[:4] in ("h100", "h200", "l40s"))
    assert all(has[name] == {"bf16", "fp16", "fp8", "fp4"} for name in blackwell)
    assert {name for name in has if load_cluster(name).gpu.overlapped_launch} == blackwell
    assert load_cluster("h200-sxm").gpu.memory_bytes == 143771 * MIB


@pytest.mark.parametrize(
    ("gpu", "capability"),
    [("v100-pcie", 7.0), ("a100", 8.0), ("l40s", 8.9), ("h100", 9.0), ("h200", 9.0), ("b200", 10.0), ("b300", 10.3)],
)
def test_the_catalogue_states_compute_capabilities(gpu: str, capability: float) -> None:
    assert load_cluster(gpu).gpu.capability == capability


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
    assert cluster.link_between([0, 15]).bytes_per_s == 200e9
    assert cluster.link_between([0, 16]).kind == "ethernet"
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
        ("memory_gb_per_s = 3000", "memory_gb_per_s = -1", "gpu.memory_gb_per_s = -1 must be above 0"),
        ("memory_gb_per_s = 3000", "memory_gb_per_s = inf", "gpu.memory_gb_per_s = inf"),
        ("memory_gib = 96", "memory_gib = 96\nmemory_mib = 9", "both given"),
        ("memory_gib = 96", "", "gpu.memory_gib is missing"),
        ("fp8 = 1000", "int3 = 7", "gpu.tflops.int3 is not a known field; allowed: bf16, fp16, fp8"),
        ("tflops = { bf16 = 500, fp8 = 1000 }", "tflops = {}", "needs bf16 or fp16"),
        ('kind = "ethernet"', 'kind = "pigeon"', "inter.kind = 'pigeon' must be one of nvlink, pcie"),
        ("latency_us = 4", "latency_us = -4", "intra.latency_us = -4"),
        ('name = "accel-9"', 'name = "accel-9"\nprofile = "../etc"', "gpu.profile = '../etc'"),
        ('name = "accel-9"', 'name = "accel-9"\nidle_w = 700', "idle_w = 700.0 must be below tdp_w"),
        (
            'name = "accel-9"',
            'name = "accel-9"\noverlapped_launch = 1',
            "gpu.overlapped_launch = 1 must be true or false",
        ),
        ("tdp_w = 600", "tdp_w = 600\ncapability = 90", "gpu.capability = 90 must be above 6.9 and at most 15"),
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


def test_unknown_or_oversized_catalogue_gpus_in_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown GPU 'h101'; known: .*h100-sxm-80gb"):
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
        ("a\0b", "embedded null"),
    ):
        with pytest.raises(InputError, match=message):
            load_cluster(str(tmp_path / f"{name}.toml"))
