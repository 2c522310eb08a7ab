"""Work and energy of the rows of a profile folder, by which the model of power is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.ir.formats import KV_BYTES
from apex_opt.profiles.physics import (
    Arithmetic,
    causal_pairs,
    context_work,
    experts_work,
    gemm_work,
    pair_flops,
    seen_tokens,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.profiles.laws import Source

    Floats = NDArray[np.float64]
    Columns = dict[str, NDArray[Any]]


def kernels_of(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    """Per row of a table: format of the arithmetic, bytes of an activation and of a weight."""
    kernels = {dtype: Arithmetic.of(dtype) for dtype in set(table["dtype"])}
    found = [kernels[dtype] for dtype in table["dtype"]]
    return (
        np.array([kernel.peak for kernel in found]),
        np.array([kernel.input_bytes for kernel in found]),
        np.array([kernel.weight_bytes for kernel in found]),
    )


def of_gemm(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    peaks, inputs, weights = kernels_of(table)
    return peaks, *gemm_work(table["m"], table["n"], table["k"], inputs, weights)


def of_moe(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    peaks, _, weights = kernels_of(table)
    shape = (table[name] for name in ("tokens", "hidden", "expert_ffn", "experts", "held", "topk"))
    return peaks, *experts_work(*shape, weight_bytes=weights, balanced=table["routing"] == "balanced")


def of_memory(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    return np.full(len(table["bytes"]), "bf16"), np.zeros(len(table["bytes"])), table["bytes"]


def of_decode(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    tokens = table["batch"] * seen_tokens(table["context"], table["window"])
    element = np.array([float(KV_BYTES[dtype]) for dtype in table["dtype"]])
    flops, moved = context_work(table["heads"], table["kv_heads"], table["head_dim"], element)
    # The table names the cache's format; attention is computed in 16 bits.
    return np.full(len(tokens), "bf16"), np.asarray(flops * tokens), np.asarray(moved * tokens)


def of_prefill(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    pairs = table["batch"] * causal_pairs(table["length"], seen_tokens(table["length"], table["window"]))
    width = table["head_dim"]
    return np.full(len(pairs), "bf16"), pair_flops(table["heads"], width, width) * pairs, np.zeros(len(pairs))


WORK = {
    "gemm": of_gemm,
    "moe": of_moe,
    "memory": of_memory,
    "attention_decode": of_decode,
    "attention_prefill": of_prefill,
}


def energies(source: Source, kinds: tuple[str, ...]) -> tuple[Floats, Floats, Floats]:
    """Time in seconds, work (16-bit FLOP, narrow FLOP, bytes) and joules of every row with an energy."""
    times: list[Floats] = []
    energies: list[Floats] = []
    work: list[Floats] = []
    for kind in kinds:
        whole = source.table(kind)
        rows = np.isfinite(whole["energy_uj"])
        table = {column: values[rows] for column, values in whole.items()}
        peaks, flops, moved = WORK[kind](table)
        times.append(table["time_us"] * 1e-6)
        energies.append(table["energy_uj"] * 1e-6)
        narrow = np.isin(peaks, ("fp8", "fp4", "int8"))
        work.append(np.column_stack([np.where(narrow, 0.0, flops), np.where(narrow, flops, 0.0), moved]))
    return np.concatenate(times), np.concatenate(work), np.concatenate(energies)
