"""Profile tables of Vidur (MIT), read into our columns.

`data/profiling/compute/<device>/<model>/mlp.csv`
    one layer of a model on one of `num_tensor_parallel_workers` ranks with `num_tokens` tokens: medians in ms of
    attn_pre_proj (query, key and value), attn_post_proj, mlp_up_proj (gate and up where `use_gated_mlp`), mlp_down_proj
`data/profiling/compute/<device>/<model>/attention.csv`
    attn_prefill of one sequence with `prefill_chunk_size` new tokens after `kv_cache_size` cached ones; attn_decode of
    `batch_size` sequences with `kv_cache_size` cached tokens each, to which the call adds one
`data/profiling/network/<device>_<wiring>/all_reduce.csv`
    `size` bytes on `num_workers` ranks, `devices_per_node` of them on a node

All in 16 bits (fp16). Source: github.com/microsoft/vidur, vidur/profiling/{mlp,attention,collectives,common}.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cluster import is_named
from apex_opt.errors import InputError
from apex_opt.profiles.importers.foreign import Found, Part, csv_files, part, read_columns
from apex_opt.units import NS_PER_MS, NS_PER_US

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu

    Columns = dict[str, NDArray[Any]]

_NAMES: Final = ("mlp", "attention", "all_reduce", "send_recv", "cpu_overheads")
_UNUSED: Final = {
    "send_recv": "point to point, for which we have no table",
    "cpu_overheads": "the engine's own time, which apex_opt/engines/data holds",
}
_NODE: Final = "dgx"
"""Wiring of the nodes that the catalogue describes."""
_PRODUCTS: Final = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
_LAYER: Final = ("num_tokens", "num_tensor_parallel_workers", "n_head", "n_kv_head", "n_embd", "n_expanded_embd")
_HEADS: Final = ("n_embd", "n_q_head", "n_kv_head", "num_tensor_parallel_workers")
_CALL: Final = ("batch_size", "prefill_chunk_size", "kv_cache_size")
_US_PER_MS: Final = NS_PER_MS / NS_PER_US
_NO_TIME: Final = "no time given"


def read_vidur(source: Path, gpu: Gpu) -> Found:
    """The tables of one accelerator.

    Parameters
    ----------
    source : Path       the repository, or any folder or file of its `data/profiling`

    Raises
    ------
    InputError      no tables, none of the accelerator, columns missing
    """
    device = gpu.name.split("-")[0]
    files = [path for path in csv_files(source) if path.stem in _NAMES]
    if not files:
        raise InputError(f"{source}: holds no tables of Vidur (mlp.csv, attention.csv, all_reduce.csv)")
    parts: list[Part] = []
    passed_over: list[tuple[str, str]] = []
    others: set[str] = set()
    for path in files:
        made_on = _device(path)
        if made_on and not is_named(gpu, made_on.split("_")[0]):
            others.add(made_on)
        elif "_" in made_on and made_on != f"{device}_{_NODE}":
            passed_over.append((_shown(path), "a node wired otherwise than the catalogue's"))
        elif path.stem in _UNUSED:
            passed_over.append((_shown(path), _UNUSED[path.stem]))
        elif path.stem == "mlp":
            parts.append(_products(path))
            passed_over.append(
                ("mlp.csv", "embedding, norms, rotary, activation, sum: a memory table also needs copies")
            )
        elif path.stem == "attention":
            parts += _attention(path)
        else:
            parts.append(_all_reduce(path))
    if not parts:
        there = [*sorted(others), *(f"{name}: {why}" for name, why in passed_over)]
        raise InputError(f"{source}: has nothing to import for {gpu.name} ({device}), only: {'; '.join(there)}")
    backends = sorted({str(name) for found in parts if "attention" in found.kind for name in found.kernel.tolist()})
    return Found(
        parts=tuple(parts),
        passed_over=tuple(dict.fromkeys(passed_over)),
        head={
            "hardware": f"{gpu.name}, as one of its {device}",
            "software": "; ".join(["layers of Sarathi-Serve (cuBLAS), NCCL", *(f"attention: {b}" for b in backends)]),
            "method": "medians of GPU times: 20 calls of a product, 5 of attention, 3 of a collective, by torch's "
            "profiler or CUDA events; weights repeat from call to call",
            "origin": "github.com/microsoft/vidur, data/profiling/",
            "licence": "MIT",
            "not_measured": "experts, memory-bound kernels, energy; collectives other than all-reduce",
        },
    )


def _device(path: Path) -> str:
    """The device that the folders of a file name, empty where they name none."""
    folders = path.absolute().parent.parts
    for folder in ("compute", "network"):
        if folder in folders[:-1]:
            at = len(folders) - 1 - folders[:-1][::-1].index(folder)
            return folders[at].lower()
    return ""


def _shown(path: Path) -> str:
    """A file with the folder it lies in."""
    return f"{path.parent.name}/{path.name}"


def _results(time_ms: NDArray[Any]) -> Columns:
    return {"time_us": time_ms * _US_PER_MS, "energy_uj": np.full(len(time_ms), np.nan)}


def _products(path: Path) -> Part:
    """The four products of a layer."""
    times = tuple(f"time_stats.{name}.median" for name in _PRODUCTS)
    rows = read_columns(path, "Vidur", (*_LAYER, *times), ("use_gated_mlp",))
    ranks, width, ffn = rows["num_tensor_parallel_workers"], rows["n_embd"], rows["n_expanded_embd"]
    heads = rows["n_head"] + 2 * rows["n_kv_head"]
    gated = np.where(rows["use_gated_mlp"] == "True", 2.0, 1.0)
    shapes = (
        (width / rows["n_head"] * heads / ranks, width),
        (width, width / ranks),
        (gated * ffn / ranks, width),
        (width, ffn / ranks),
    )
    tables = [
        {"m": rows["num_tokens"], "n": n, "k": k, **_results(rows[time])}
        for (n, k), time in zip(shapes, times, strict=True)
    ]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    columns = {"dtype": np.full(len(columns["m"]), "fp16", dtype=object), **columns}
    return part("gemm", columns, "cuBLAS", [(_NO_TIME, np.isnan(columns["time_us"]))])


def _attention(path: Path) -> list[Part]:
    """Decode and prefill attention."""
    decode_ms, prefill_ms = "time_stats.attn_decode.median", "time_stats.attn_prefill.median"
    rows = read_columns(path, "Vidur", (*_HEADS, *_CALL), ("is_prefill", "attention_backend"), (decode_ms, prefill_ms))
    if decode_ms not in rows and prefill_ms not in rows:
        raise InputError(f"{path}: not a table of Vidur: neither column {decode_ms} nor {prefill_ms} is there")
    ranks = rows["num_tensor_parallel_workers"]
    shape = {
        "dtype": np.full(len(ranks), "fp16", dtype=object),
        "heads": rows["n_q_head"] / ranks,
        "kv_heads": rows["n_kv_head"] / ranks,
        "head_dim": rows["n_embd"] / rows["n_q_head"],
        "window": np.zeros(len(ranks)),
        "batch": rows["batch_size"],
    }
    whole = rows["is_prefill"] == "True"
    found = []
    if decode_ms in rows:
        columns = {**shape, "context": rows["kv_cache_size"] + 1, **_results(rows[decode_ms])}
        found.append(_chosen("attention_decode", columns, rows, ~whole, []))
    if prefill_ms in rows:
        columns = {**shape, "length": rows["prefill_chunk_size"], **_results(rows[prefill_ms])}
        continued = [("prompts that continue a cached context", rows["kv_cache_size"] > 0)]
        found.append(_chosen("attention_prefill", columns, rows, whole, continued))
    return found


def _chosen(
    kind: str, columns: Columns, rows: Columns, mine: NDArray[np.bool_], losses: list[tuple[str, NDArray[Any]]]
) -> Part:
    """The rows of one of the two kinds of calls."""
    backend = np.array([str(name).rsplit(".", 1)[-1] for name in rows["attention_backend"][mine]], dtype=object)
    columns = {name: values[mine] for name, values in columns.items()}
    lost = [(_NO_TIME, np.isnan(columns["time_us"])), *((why, rows[mine]) for why, rows in losses)]
    return part(kind, columns, backend, lost)


def _all_reduce(path: Path) -> Part:
    """All-reduces within one node."""
    time_ms = "time_stats.all_reduce.median"
    rows = read_columns(path, "Vidur", ("num_workers", "size", "devices_per_node", time_ms))
    columns = {
        "op": np.full(len(rows["size"]), "all_reduce", dtype=object),
        "ranks": rows["num_workers"],
        "bytes": rows["size"],
        **_results(rows[time_ms]),
    }
    return part(
        "collective",
        columns,
        "NCCL",
        [
            (_NO_TIME, np.isnan(columns["time_us"])),
            ("several nodes", rows["num_workers"] > rows["devices_per_node"]),
            ("one GPU", rows["num_workers"] == 1),
        ],
    )
