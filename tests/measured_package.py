"""A small stand-in for the package aiconfigurator-core: the same folders and columns, times made up by simple laws."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a parquet file."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def gemm_rows(formats: tuple[str, ...] = ("bfloat16", "fp8"), floor_ms: float = 0.004) -> list[dict[str, Any]]:
    """Products that cost a launch, their weights and their arithmetic."""
    return [
        {
            "kernel_source": "made_up",
            "gemm_dtype": name,
            "m": m,
            "n": n,
            "k": k,
            "latency": floor_ms + n * k * 1e-9 + m * n * k * 5e-12,
        }
        for name, m, n, k in product(formats, SIZES, (64, 512, 4096), (64, 1024, 8192))
    ]


def moe_rows() -> list[dict[str, Any]]:
    """One layer of 64 experts, whole and over 4 ranks."""
    return [
        {
            "kernel_source": "made_up",
            "moe_dtype": "bfloat16",
            "num_tokens": tokens,
            "hidden_size": 2048,
            "inter_size": 1024,
            "topk": 8,
            "num_experts": 64,
            "moe_tp_size": tp,
            "moe_ep_size": ep,
            "distribution": routing,
            "latency": 0.02 + tokens * 1e-3 / (tp * ep),
        }
        for tokens, (tp, ep), routing in product(SIZES, ((1, 1), (2, 1), (1, 4)), ("balanced", "power_law_1.2"))
    ]


def attention_rows(kind: str, power: bool = False) -> list[dict[str, Any]]:
    """Decode (`generation`) or prefill (`context`) attention of two shapes."""
    rows: list[dict[str, Any]] = []
    for (heads, kv_heads), batch, size in product(((8, 2), (16, 4)), (1, 4, 16), SIZES):
        new, cached = (1, size - 1) if kind == "generation" else (size, 0)
        rows.append(
            {
                "kernel_source": "made_up",
                "batch_size": batch,
                "isl": new,
                "num_heads": heads,
                "num_key_value_heads": kv_heads,
                "head_dim": 128,
                "attn_dtype": "bfloat16",
                "kv_cache_dtype": "bfloat16",
                "step": cached,
                "latency": 0.006 + batch * size * new * heads * 1e-6,
            }
            | ({"power": 300.0, "power_limit": 1000.0} if power else {})
        )
    return rows


def all_reduce_rows(kernel: str) -> list[dict[str, Any]]:
    """An engine's own all-reduce, as CUDA graphs replay it and as it is called one by one."""
    return [
        {"kernel_source": name, "num_gpus": ranks, "message_size": 128 * size, "latency": 0.004 * slow + size * 1e-5}
        for (name, slow), ranks, size in product(((kernel, 1), ("eager", 5)), (2, 8), SIZES)
    ]


def nccl_rows() -> list[dict[str, Any]]:
    """Collectives of elements of one and of two bytes."""
    return [
        {
            "kernel_source": "NCCL",
            "op_name": op,
            "nccl_dtype": name,
            "num_gpus": 8,
            "message_size": 256 * size,
            "latency": 0.01 + size * width * 1e-4,
        }
        for op, (name, width), size in product(("all_reduce", "alltoall"), (("half", 2), ("int8", 1)), SIZES)
    ]


def write_package(folder: Path) -> Path:
    """Tables of every release that is read on two accelerators: A100, and B200 with power."""
    (folder / "h100_sxm").mkdir(parents=True)
    engines = {
        "a100_sxm": (("vllm", "0.14.0"), ("sglang", "0.5.10"), ("trtllm", "1.0.0")),
        "b200_sxm": (("vllm", "0.24.0"), ("sglang", "0.5.14"), ("trtllm", "1.3.0rc20"), ("vllm", "0.22.0")),
    }
    graphs = {"vllm": "vLLM_custom_graph", "sglang": "SGLang_CustomAllReduce_graph", "trtllm": "TRTLLM"}
    for system, releases in engines.items():
        for engine, version in releases:
            home = folder / system
            power = version == "0.22.0"
            write_rows(home / "moe" / engine / version / "moe_perf.parquet", moe_rows())
            for kind in ("generation", "context"):
                rows = attention_rows(kind, power)
                write_rows(home / "attention" / engine / version / f"{kind}_attention_perf.parquet", rows)
            if not power:
                formats = ("bfloat16",) if system == "a100_sxm" else ("bfloat16", "fp8")
                write_rows(home / "gemm" / engine / version / "gemm_perf.parquet", gemm_rows(formats))
                rows = all_reduce_rows(graphs[engine])
                write_rows(home / "comm" / engine / version / "custom_allreduce_perf.parquet", rows)
    write_rows(folder / "a100_sxm" / "comm" / "nccl" / "2.27.3" / "nccl_perf.parquet", nccl_rows())
    write_rows(folder / "b200_sxm" / "comm" / "nccl" / "2.29.2" / "nccl_perf.parquet", nccl_rows())
    return folder
