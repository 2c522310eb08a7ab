"""From the tables of a profile folder to the laws that `operations` evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError
from apex_opt.profiles.power import PowerFit, fit_power
from apex_opt.profiles.schema import SCHEMAS, Card, read_card, read_table
from apex_opt.profiles.surface import Surface, build_surface

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Size = Floats | float

# Time a product takes however little it moves: the launch, and one pass down the depth k by a single tile. Chosen by
# leaving out each shape of h200-sxm/gemm.csv in turn: the mean error falls from 7.0 to 4.7% (bf16), 8.8 to 5.6% (fp8).
GEMM_FLOOR_S: Final = 3e-6
GEMM_FLOOR_S_PER_DEPTH: Final = 0.4e-9
# The same for the fused experts: alignment of tokens, two products, activation and sum are launched one after another.
MOE_FLOOR_S: Final = 15e-6

ELEMENT_BYTES: Final = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0}
"""Size of one element of a format that is computed in."""

_HALF_BYTES: Final = 2

# Factors on the logarithms of (n, k) and of (hidden, expert_ffn, experts, topk) in the distance between two shapes.
_GEMM_SCALE: Final = (1.0, 0.7)
_MOE_SCALE: Final = (1.0, 1.0, 1.0, 1.0)


def gemm_work(m: Size, n: Size, k: Size, input_bytes: Size, weight_bytes: Size) -> tuple[Floats, Floats]:
    """FLOP and bytes of out[m,n] = in[m,k] W[n,k]^T with 16-bit output; element sizes in bytes."""
    weights = np.asarray(n, dtype=np.float64) * k
    return 2 * weights * m, weights * weight_bytes + m * (np.asarray(k) * input_bytes + np.asarray(n) * _HALF_BYTES)


def moe_work(
    tokens: Size, hidden: Size, expert_ffn: Size, experts: Size, topk: Size, weight_bytes: Size
) -> tuple[Floats, Floats]:
    """FLOP and bytes of gate-up and down over the routed tokens.

    Weights of the experts that uniform routing is expected to touch, experts (1 - (1 - topk/experts)^tokens), are read
    once; 16-bit activations pass in and out of both products and through the activation.
    """
    size = np.asarray(hidden, dtype=np.float64) * expert_ffn
    routed = np.asarray(tokens, dtype=np.float64) * topk
    touched = experts * (1 - (1 - np.asarray(topk, dtype=np.float64) / experts) ** tokens)
    moved = 3 * size * weight_bytes * touched
    return 6 * size * routed, moved + _HALF_BYTES * routed * (2 * np.asarray(hidden) + 3 * np.asarray(expert_ffn))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionLaw:
    """Decode attention over units (sequences x KV heads): base time, and share of bandwidth on the context."""

    units_log: Floats
    base_s: Floats
    efficiency: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tables:
    """One profile folder, turned into laws; None or empty where the folder has no such table."""

    card: Card
    gemm: dict[str, Surface]
    moe: dict[str, Surface]
    memory: tuple[float, float] | None
    attention: AttentionLaw | None
    power: PowerFit | None
    files: dict[str, str]


@lru_cache(maxsize=16)
def load_tables(folder: Path) -> Tables:
    """A profile folder, read and turned into laws."""
    card = read_card(folder)
    schemas = {schema.name: schema for schema in SCHEMAS}
    files = {name: file for name, file, _ in card.tables}
    raw = {name: read_table(folder / file, schemas[name]) for name, file in files.items()}
    peaks = dict(card.flops_per_s)
    half = peaks["bf16"] if "bf16" in peaks else peaks["fp16"]
    peaks.setdefault("bf16", half)
    peaks.setdefault("fp16", half)
    for name in ("gemm", "moe"):
        if name in raw and (lacking := sorted(set(raw[name]["dtype"]) - set(peaks))):
            raise InputError(
                f"profile {folder}: {files[name]} has rows in {lacking[0]}, which the card's gpu.tflops lacks"
            )
    return Tables(
        card=card,
        gemm=_gemm_surfaces(raw["gemm"], card, peaks) if "gemm" in raw else {},
        moe=_moe_surfaces(raw["moe"], card, peaks) if "moe" in raw else {},
        memory=_memory_law(raw["memory"], card, folder) if "memory" in raw else None,
        attention=_attention_law(raw["attention_decode"], card, folder) if "attention_decode" in raw else None,
        power=_power_fit(raw, card),
        files=files,
    )


def gemm_feature(n: int, k: int) -> tuple[float, ...]:
    """A weight shape as the surface knows it."""
    return _feature((n, k), _GEMM_SCALE)


def _gemm_surfaces(table: dict[str, NDArray[Any]], card: Card, peaks: dict[str, float]) -> dict[str, Surface]:
    """Per format: (floor + roofline) / time over m, per (n, k)."""
    surfaces = {}
    for dtype in sorted(set(table["dtype"])):
        m, n, k, time_us = (table[name][table["dtype"] == dtype] for name in ("m", "n", "k", "time_us"))
        element = ELEMENT_BYTES[dtype]
        flops, moved = gemm_work(m, n, k, element, element)
        bound = np.maximum(flops / peaks[dtype], moved / card.memory_bytes_per_s)
        ratio = (GEMM_FLOOR_S + GEMM_FLOOR_S_PER_DEPTH * k + bound) / (time_us * 1e-6)
        surfaces[dtype] = build_surface(np.column_stack([n, k]), _GEMM_SCALE, np.log(m), ratio, 6, 2.0)
    return surfaces


def moe_feature(hidden: int, expert_ffn: int, experts: int, topk: float) -> tuple[float, ...]:
    """A shape of experts as the surface knows it."""
    return _feature((hidden, expert_ffn, experts, topk), _MOE_SCALE)


def _feature(sizes: tuple[float, ...], scale: tuple[float, ...]) -> tuple[float, ...]:
    """Scaled logarithms of a shape."""
    return tuple((np.log(np.array(sizes, dtype=np.float64)) * np.array(scale)).tolist())


def _moe_surfaces(table: dict[str, NDArray[Any]], card: Card, peaks: dict[str, float]) -> dict[str, Surface]:
    """Per format: (floor + roofline) / time over tokens per expert, per shape of the experts."""
    surfaces = {}
    names = ("tokens", "hidden", "expert_ffn", "experts", "topk")
    for dtype in sorted(set(table["dtype"])):
        chosen = table["dtype"] == dtype
        tokens, hidden, ffn, experts, topk = (table[name][chosen] for name in names)
        flops, moved = moe_work(tokens, hidden, ffn, experts, topk, ELEMENT_BYTES[dtype])
        bound = np.maximum(flops / peaks[dtype], moved / card.memory_bytes_per_s)
        ratio = (MOE_FLOOR_S + bound) / (table["time_us"][chosen] * 1e-6)
        shapes = np.column_stack([hidden, ffn, experts, topk])
        surfaces[dtype] = build_surface(shapes, _MOE_SCALE, np.log(tokens * topk / experts), ratio, 6, 1.0)
    return surfaces


def _memory_law(table: dict[str, NDArray[Any]], card: Card, folder: Path) -> tuple[float, float]:
    """Launch floor in seconds and share of peak bandwidth, from kernels other than plain copies."""
    kernel = np.array([not op.startswith("copy") for op in table["op"]])
    moved, time = table["bytes"][kernel], table["time_us"][kernel] * 1e-6
    small, large = moved <= 2**20, moved >= 2**27
    if not small.any() or not large.any():
        raise InputError(f"profile {folder}: the memory table needs a row of at most 1 MiB and one of at least 128 MiB")
    floor_s = float(np.median(time[small]))
    efficiency = float(np.median(moved[large] / np.maximum(time[large] - floor_s, 1e-9))) / card.memory_bytes_per_s
    return floor_s, min(efficiency, 1.0)


def _attention_law(table: dict[str, NDArray[Any]], card: Card, folder: Path) -> AttentionLaw:
    """Per number of sequences x KV heads: a straight line in the total context."""
    columns = np.column_stack([table[name] for name in ("heads", "kv_heads", "head_dim", "batch")])
    element = np.array([ELEMENT_BYTES[dtype] for dtype in table["dtype"]])
    columns = np.column_stack([columns, element])
    lines: dict[float, tuple[float, float]] = {}
    for group in np.unique(columns, axis=0):
        rows = (columns == group).all(axis=1)
        if rows.sum() < 2:
            continue
        _, kv_heads, head_dim, batch, size = group
        context, time = batch * table["context"][rows], table["time_us"][rows] * 1e-6
        # Weights between absolute and relative errors: short contexts matter less in a step than long ones.
        weight = time**-0.5
        base, slope = np.linalg.lstsq(np.column_stack([weight, weight * context / 1e6]), weight * time, rcond=None)[0]
        if base <= 0 or slope <= 0:
            raise InputError(f"profile {folder}: decode attention at batch {batch:g} does not grow with context")
        efficiency = 2 * kv_heads * head_dim * size / (slope / 1e6 * card.memory_bytes_per_s)
        before = lines.get(batch * kv_heads, (0.0, 0.0))
        lines[batch * kv_heads] = (max(base, before[0]), max(min(efficiency, 1.0), before[1]))
    if not lines:
        raise InputError(f"profile {folder}: the attention_decode table needs two contexts of one batch")
    units = sorted(lines)
    # Running maxima: more work never has a smaller base, nor a smaller share of the bandwidth.
    return AttentionLaw(
        units_log=np.log(np.array(units)),
        base_s=np.maximum.accumulate([lines[unit][0] for unit in units]),
        efficiency=np.maximum.accumulate([lines[unit][1] for unit in units]),
    )


def _power_fit(raw: dict[str, dict[str, NDArray[Any]]], card: Card) -> PowerFit | None:
    """Power coefficients from every row with an energy, or None where there are too few."""
    times: list[Floats] = []
    energies: list[Floats] = []
    work: list[Floats] = []
    for name, whole in raw.items():
        rows = np.isfinite(whole["energy_uj"])
        table = {column: values[rows] for column, values in whole.items()}
        count = int(rows.sum())
        dtypes = table.get("dtype", np.full(count, "bf16", dtype=object))
        element = np.array([ELEMENT_BYTES[dtype] for dtype in dtypes])
        fp8 = dtypes == "fp8"
        if name == "gemm":
            flops, moved = gemm_work(table["m"], table["n"], table["k"], element, element)
        elif name == "moe":
            shape = (table["tokens"], table["hidden"], table["expert_ffn"], table["experts"], table["topk"])
            flops, moved = moe_work(*shape, element)
        elif name == "memory":
            flops, moved = np.zeros(count), table["bytes"]
        else:
            tokens = table["batch"] * table["context"]
            flops = 4 * table["heads"] * table["head_dim"] * tokens
            moved = 2 * table["kv_heads"] * table["head_dim"] * tokens * element
            fp8 = np.zeros(count, dtype=bool)  # the cache's format; attention is computed in 16 bits
        times.append(table["time_us"] * 1e-6)
        energies.append(table["energy_uj"] * 1e-6)
        work.append(np.column_stack([np.where(fp8, 0.0, flops), np.where(fp8, flops, 0.0), moved]))
    if sum(len(part) for part in times) < 8:
        return None
    return fit_power(np.concatenate(times), np.concatenate(work), np.concatenate(energies), card.idle_w, card.tdp_w)
