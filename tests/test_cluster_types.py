"""What the hardware types promise: checked figures, the link a group crosses, the wiring as a graph."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import make_gpu

from apex_opt.cluster import MAX_GPUS, Cluster, Gpu, Link
from apex_opt.errors import InputError, UsageError

GPU = Gpu(
    name="toy",
    memory_bytes=10**9,
    memory_bytes_per_s=1e12,
    flops_per_s=(("fp16", 1e14),),
    tdp_w=300.0,
    idle_w=50.0,
)
NEAR = Link(bytes_per_s=4e11, latency_s=3e-6, kind="nvlink")
FAR = Link(bytes_per_s=5e10, latency_s=8e-6, kind="infiniband")


def cluster(nodes: int = 2, gpus_per_node: int = 4, inter: Link | None = FAR) -> Cluster:
    return Cluster(name="toy", gpu=GPU, nodes=nodes, gpus_per_node=gpus_per_node, intra=NEAR, inter=inter)


def test_a_format_without_hardware_is_refused_naming_gpu_and_format() -> None:
    assert GPU.supports("fp16")
    assert not GPU.supports("fp8")
    assert GPU.half_dtype == "fp16"
    with pytest.raises(UsageError, match=r"toy does not compute in fp8: it has fp16"):
        GPU.peak_flops_per_s("fp8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_bytes": 0}, "memory_bytes = 0 must be a finite number above 0"),
        ({"memory_bytes": True}, "memory_bytes = True"),
        ({"memory_bytes": 10**5000}, "memory_bytes = a huge number"),
        ({"memory_bytes_per_s": float("nan")}, "memory_bytes_per_s = nan"),
        ({"tdp_w": float("inf")}, "tdp_w = inf"),
        ({"idle_w": -1.0}, "idle_w = -1.0"),
        ({"idle_w": 300.0}, "idle_w = 300.0 must be below tdp_w"),
        ({"flops_per_s": (("fp8", 1e15),)}, "needs bf16 or fp16"),
        ({"flops_per_s": (("fp16", 1e15), ("fp3", 1e15))}, "names fp3; allowed: bf16, fp16, fp8, fp4"),
        ({"flops_per_s": (("fp16", 1e15), ("fp16", 1e15))}, "twice"),
    ],
)
def test_impossible_gpu_figures_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match="gpu 'toy'") as caught:
        replace(GPU, **change)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_all_faults_of_a_link_come_in_one_line() -> None:
    with pytest.raises(InputError) as caught:
        Link(bytes_per_s=0, latency_s=-1, kind="string")
    text = str(caught.value)
    assert "bytes_per_s" in text
    assert "latency_s" in text
    assert "nvlink, xgmi, pcie, infiniband, ethernet" in text


@pytest.mark.parametrize(("nodes", "gpus_per_node"), [(0, 4), (MAX_GPUS + 1, 1), (1, -1), (True, 1), (1024, 1024)])
def test_cluster_sizes_beyond_the_limits_are_refused(nodes: int, gpus_per_node: int) -> None:
    with pytest.raises(InputError, match=str(MAX_GPUS)):
        cluster(nodes, gpus_per_node)


def test_several_nodes_need_a_link_between_them() -> None:
    with pytest.raises(InputError, match="2 nodes need an inter link"):
        cluster(inter=None)
    assert cluster(nodes=1, inter=None).size == 4


def test_a_price_is_a_number_above_nothing_and_keeps_its_source() -> None:
    with pytest.raises(InputError, match="price_per_h = 0 must be a finite number above 0"):
        make_gpu(price_per_h=0)
    gpu = make_gpu(price_per_h=None, sources=(("tdp_w", "datasheet"),))
    priced = gpu.priced(2.5, "given").priced(3.5, "given again")
    assert priced.price_per_h == 3.5
    assert dict(priced.sources) == {"tdp_w": "datasheet", "price_per_h": "given again"}
