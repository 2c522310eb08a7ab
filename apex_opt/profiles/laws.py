"""From the tables of a profile folder to the laws that `operations` evaluates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError
from apex_opt.ir.formats import get_format
from apex_opt.profiles.schema import SCHEMAS, Card, read_card, read_table
from apex_opt.profiles.surface import Surface, build_surface

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Columns = dict[str, NDArray[Any]]
    Size = Floats | float

# Time a product takes however little it moves: the launch, and one pass down the depth k by a single tile. Chosen by
# leaving out each shape of h200-sxm/ops/gemm.csv in turn: the mean error falls from 7.0 to 4.7% (bf16), 8.8 to 5.6%
# (fp8).
GEMM_FLOOR_S: Final = 3e-6
GEMM_FLOOR_S_PER_DEPTH: Final = 0.4e-9
# The same for the fused experts: alignment of tokens, two products, activation and sum are launched one after another.
MOE_FLOOR_S: Final = 15e-6

INPUT_BYTES: Final = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5625}
"""Size of one activation of a format that is computed in; fp4 has a scale of one byte per 16."""

# Table formats that are no plan formats, and the plan format that stands for their arithmetic and sizes.
_TABLE_FORMATS: Final = {"fp8_block": "fp8", "mxfp4_fp8": "mxfp4"}

_HALF_BYTES: Final = 2

# Factors on the logarithms of (n, k) and of (hidden, expert_ffn, experts, held, topk) in the distance between shapes.
_GEMM_SCALE: Final = (1.0, 0.7)
_MOE_SCALE: Final = (1.0, 1.0, 0.5, 1.0, 1.0)
# Distance between two attention shapes per factor of e: heads per KV head, KV heads, width of a head.
_ATTENTION_SCALE: Final = (1.0, 0.5, 4.0)

LATENT: Final = {"kv_heads": np.array([1]), "head_dim": np.array([576])}
"""Shape of the cache that tables of latent attention are measured with (DeepSeek-V3: one vector of 512 + 64)."""

_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 64, 40_000
"""Contexts a decode law is fitted on: shorter ones cost no time, longer ones are rare and would outweigh the rest."""


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a number format computes in, and the bytes of one activation and of one stored weight."""

    peak: str
    input_bytes: float
    weight_bytes: float

    @classmethod
    def of(cls, name: str) -> Arithmetic:
        """Of a plan's or a table's format."""
        chosen = get_format(_TABLE_FORMATS.get(name, name))
        return cls(chosen.activation, INPUT_BYTES[chosen.activation], float(chosen.weight_bits / 8))


def gemm_work(m: Size, n: Size, k: Size, input_bytes: Size, weight_bytes: Size) -> tuple[Floats, Floats]:
    """FLOP and bytes of out[m,n] = in[m,k] W[n,k]^T with 16-bit output; element sizes in bytes."""
    weights = np.asarray(n, dtype=np.float64) * k
    return 2 * weights * m, weights * weight_bytes + m * (np.asarray(k) * input_bytes + np.asarray(n) * _HALF_BYTES)


def moe_work(
    tokens: Size,
    hidden: Size,
    expert_ffn: Size,
    experts: Size,
    held: Size,
    topk: Size,
    weight_bytes: Size,
    *,
    balanced: bool | NDArray[np.bool_] = False,
) -> tuple[Floats, Floats]:
    """FLOP and bytes of gate-up and down over the tokens routed to the `held` of `experts` experts.

    The weights of the held experts that are touched are read once: held (1 - (1 - topk/experts)^tokens) are expected
    under uniform routing, as many as there are assignments where these are `balanced`. 16-bit activations pass in and
    out of both products and through the activation.
    """
    size = np.asarray(hidden, dtype=np.float64) * expert_ffn
    share = np.asarray(topk, dtype=np.float64) / experts
    routed = np.asarray(tokens, dtype=np.float64) * share * held
    touched = held * (1 - (1 - np.minimum(share, 1.0)) ** tokens)
    touched = np.where(balanced, np.minimum(routed, held), touched)
    moved = 3 * size * weight_bytes * touched
    return 6 * size * routed, moved + _HALF_BYTES * routed * (2 * np.asarray(hidden) + 3 * np.asarray(expert_ffn))


MEMORY_KERNELS: Final = {"plain": "copy", "norm": "add_rms_norm", "activation": "silu_and_mul"}
"""Kinds of element-wise kernels, and how the rows they are fitted on begin in a memory table."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryLaw:
    """Element-wise kernels: time = floor + slope x width + bytes / (efficiency x bandwidth).

    `floors` maps a kind of kernel to its floor and slope in seconds: one block of threads works along a whole row, so
    that a wide row takes its time however few there are.
    """

    floors: dict[str, tuple[float, float]]
    efficiency: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeLaw:
    """Decode attention of one measured shape, over units (sequences x KV heads): base, and share of bandwidth.

    The base is the time at no context; the share is that at which the context is read.
    """

    units_log: Floats
    base_s: Floats
    efficiency: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillLaw:
    """Attention of one whole prompt of one measured shape: seconds per FLOP of a long one, and what shorter ones add.

    `extra` is in the same unit: (time - launch) / FLOP of one query-key pair - pairs x asymptote, over log(length).
    """

    launch_s: float
    length_log: Floats
    extra_s: Floats
    pair_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """Rows of an attention table by shape.

    `features` are log(heads / kv_heads), log(kv_heads), log(head_dim), scaled; `rows[i]` the rows of shape i.
    """

    shapes: NDArray[np.int64]
    features: Floats
    rows: tuple[NDArray[np.int64], ...]

    @classmethod
    def of(cls, table: Columns, chosen: NDArray[np.bool_]) -> Shapes:
        """Group the chosen rows."""
        index = np.flatnonzero(chosen)
        sizes = [table["heads"], *(table.get(name, LATENT[name]) for name in LATENT)]
        keys = np.column_stack([np.broadcast_to(size, len(chosen))[index] for size in sizes]).astype(np.int64)
        shapes, owner = np.unique(keys, axis=0, return_inverse=True)
        owner = owner.reshape(-1)
        order = np.argsort(owner, kind="stable")
        parts = np.split(index[order], np.cumsum(np.bincount(owner, minlength=len(shapes)))[:-1])
        return cls(shapes, np.array([attention_feature(*map(int, shape)) for shape in shapes]), tuple(parts))

    def nearest(self, heads: int, kv_heads: int, head_dim: int) -> tuple[int, float]:
        """The nearest measured shape, and how far it is."""
        distance = np.sqrt(((self.features - np.array(attention_feature(heads, kv_heads, head_dim))) ** 2).sum(axis=1))
        found = int(distance.argmin())
        return found, float(distance[found])


def attention_feature(heads: int, kv_heads: int, head_dim: int) -> tuple[float, ...]:
    """A shape of heads as the distance between shapes sees it."""
    return _feature((heads / kv_heads, kv_heads, head_dim), _ATTENTION_SCALE)


class Source:
    """One profile folder; its tables are read, and laws made of them, when first asked for.

    Attributes
    ----------
    card : Card
    name : str      for people: the folder below `profiles/`
    """

    def __init__(self, folder: Path, card: Card) -> None:
        self.card = card
        self.name = f"{folder.parent.name}/{folder.name}"
        self.folder = folder
        self._files = {name: file for name, file, _ in card.tables}
        self._peaks = dict(card.flops_per_s)
        half = self._peaks["bf16"] if "bf16" in self._peaks else self._peaks["fp16"]
        self._peaks.setdefault("bf16", half)
        self._peaks.setdefault("fp16", half)
        # Methods are cached per object: a source lives as long as the process.
        self.table = lru_cache(maxsize=None)(self._table)
        self.gemm = lru_cache(maxsize=None)(self._gemm)
        self.moe = lru_cache(maxsize=None)(self._moe)
        self.shapes = lru_cache(maxsize=None)(self._shapes)
        self.decode = lru_cache(maxsize=None)(self._decode)
        self.prefill = lru_cache(maxsize=None)(self._prefill)
        self.memory = lru_cache(maxsize=None)(self._memory)

    def has(self, kind: str) -> bool:
        """Whether the folder has a table of a kind."""
        return kind in self._files and self.card.use == "times"

    def file(self, kind: str) -> str:
        """A table as messages and provenance name it."""
        return f"profiles/{self.name}/{self._files[kind]}"

    def _table(self, kind: str) -> Columns:
        """A table as columns."""
        schema = next(schema for schema in SCHEMAS if schema.name == kind)
        return read_table(self.folder / self._files[kind], schema)

    def bound_s(self, kernel: Arithmetic, flops: ArrayLike, moved: ArrayLike) -> Floats:
        """Roofline on the accelerator of the card."""
        return np.maximum(
            np.asarray(flops) / self._peaks[kernel.peak], np.asarray(moved) / self.card.memory_bytes_per_s
        )

    def _rows(self, kind: str, dtype: str) -> Columns | None:
        """Rows of a table in one format, or None."""
        if not self.has(kind):
            return None
        table = self.table(kind)
        chosen = table["dtype"] == dtype
        if not chosen.any():
            return None
        if (peak := Arithmetic.of(dtype).peak) not in self._peaks:
            raise InputError(f"profile {self.name}: {self._files[kind]} has rows in {dtype}, the card no {peak} peak")
        return {name: column[chosen] for name, column in table.items()}

    def _gemm(self, dtype: str) -> Surface | None:
        """(floor + roofline) / time over m, per (n, k)."""
        if (rows := self._rows("gemm", dtype)) is None:
            return None
        m, n, k = (rows[name] for name in ("m", "n", "k"))
        kernel = Arithmetic.of(dtype)
        bound = self.bound_s(kernel, *gemm_work(m, n, k, kernel.input_bytes, kernel.weight_bytes))
        seconds = _envelope(np.column_stack([n, k]), m, rows["time_us"] * 1e-6)
        ratio = (GEMM_FLOOR_S + GEMM_FLOOR_S_PER_DEPTH * k + bound) / seconds
        return build_surface(np.column_stack([n, k]), _GEMM_SCALE, np.log(m), ratio, 6, 2.0)

    def _moe(self, dtype: str, routing: str) -> Surface | None:
        """(floor + roofline) / time over tokens per expert, per shape of the experts."""
        if (rows := self._rows("moe", dtype)) is None:
            return None
        chosen = rows["routing"] == routing
        if not chosen.any():
            return None
        names = ("tokens", "hidden", "expert_ffn", "experts", "held", "topk")
        tokens, *shape = (rows[name][chosen] for name in names)
        kernel = Arithmetic.of(dtype)
        work = moe_work(tokens, *shape, kernel.weight_bytes, balanced=routing == "balanced")
        bound = self.bound_s(kernel, *work)
        ratio = (MOE_FLOOR_S + bound) / _envelope(np.column_stack(shape), tokens, rows["time_us"][chosen] * 1e-6)
        per_expert = np.log(tokens * shape[4] / shape[2])
        return build_surface(np.column_stack(shape), _MOE_SCALE, per_expert, ratio, 6, 1.0)

    def _shapes(self, kind: str, dtype: str, window: int) -> Shapes | None:
        """Shapes of heads measured with a KV format and a window (0: the whole context), or None."""
        if not self.has(kind):
            return None
        table = self.table(kind)
        chosen = (table["dtype"] == dtype) & (table.get("window", np.zeros(1)) == window)
        return Shapes.of(table, chosen) if chosen.any() else None

    def _decode(self, kind: str, dtype: str, window: int, index: int, token_bytes: float) -> DecodeLaw:
        """Per measured batch: a straight line in the total context, by least squares on relative errors.

        `token_bytes` is what the shape reads per token of context.
        """
        shapes = self.shapes(kind, dtype, window)
        assert shapes is not None
        table, rows = self.table(kind), shapes.rows[index]
        units = int(shapes.shapes[index][1])
        batches, context, time = (table[name][rows] for name in ("batch", "context", "time_us"))
        lines: list[tuple[float, float, float]] = []
        for batch in np.unique(batches):
            at = batches == batch
            usual = at & (context >= max(_SHORTEST_CONTEXT, window)) & (context <= _LONGEST_CONTEXT)
            at = usual if usual.sum() >= (1 if window else 2) else at
            total, seconds = batch * context[at], time[at] * 1e-6
            if window:
                lines.append((float(batch), float(np.median(seconds)), 1.0))
                continue
            if at.sum() < 2:
                continue
            columns = np.column_stack([1 / seconds, total / seconds])
            base, slope = np.linalg.lstsq(columns, np.ones(len(seconds)), rcond=None)[0]
            if base <= 0 or slope <= 0:
                continue  # noise on a flat curve: neighbouring batches speak for it
            lines.append((float(batch), float(base), min(token_bytes / (slope * self.card.memory_bytes_per_s), 1.0)))
        if not lines:
            raise InputError(f"profile {self.name}: {self._files[kind]} has no batch that grows with its context")
        batch_log = np.log([line[0] * units for line in lines])
        # A running maximum: more work never has a smaller base.
        base_s = np.maximum.accumulate([line[1] for line in lines])
        return DecodeLaw(units_log=batch_log, base_s=base_s, efficiency=np.array([line[2] for line in lines]))

    def _prefill(self, kind: str, dtype: str, window: int, index: int, pair_flops: float) -> PrefillLaw:
        """Single prompts of one shape: launch, asymptote of long ones, and what short ones take more."""
        shapes = self.shapes(kind, dtype, window)
        assert shapes is not None
        table, rows = self.table(kind), shapes.rows[index]
        rows = rows[table["batch"][rows] == table["batch"][rows].min()]
        rows = rows[np.argsort(table["length"][rows])]
        length, seconds = table["length"][rows], table["time_us"][rows] * 1e-6 / table["batch"][rows]
        launch = float(seconds[0])
        pairs = length * (length + 1) / 2
        pair_s = 0.0 if window else float(np.median(((seconds - launch) / pairs)[-3:]))
        extra = np.maximum(seconds - launch - pair_s * pairs, 0.0)
        return PrefillLaw(
            launch_s=launch,
            length_log=np.log(length),
            extra_s=extra / pair_flops,
            pair_s=pair_s / pair_flops,
        )

    def _memory(self) -> MemoryLaw:
        """Launch floor per kind of kernel and share of peak bandwidth, from kernels other than plain copies."""
        table = self.table("memory")
        names = [str(op).rsplit("_", 1) for op in table["op"]]
        moved, seconds = table["bytes"], table["time_us"] * 1e-6
        small = moved <= 2**20
        floors: dict[str, tuple[float, float]] = {}
        for kind, beginning in MEMORY_KERNELS.items():
            rows = np.flatnonzero(np.array([name[0].startswith(beginning) for name in names]) & small)
            if not len(rows):
                raise InputError(f"profile {self.name}: the memory table needs a {beginning} row of at most 1 MiB")
            widths = np.array([float(names[row][1]) if len(names[row]) > 1 else 0.0 for row in rows])
            line = np.polyfit(widths, seconds[rows], 1) if np.ptp(widths) > 0 else np.array([0.0, seconds[rows].mean()])
            floors[kind] = (float(max(line[1], 0.0)), float(max(line[0], 0.0)))
        large = np.array([not name[0].startswith("copy") for name in names]) & (moved >= 2**27)
        if not large.any():
            raise InputError(f"profile {self.name}: the memory table needs a row of at least 128 MiB")
        stream = np.maximum(seconds[large] - min(floor for floor, _ in floors.values()), 1e-9)
        share = float(np.median(moved[large] / stream)) / self.card.memory_bytes_per_s
        return MemoryLaw(floors=floors, efficiency=min(share, 1.0))

    def energies(self, kinds: tuple[str, ...]) -> tuple[Floats, Floats, Floats]:
        """Time in seconds, work (16-bit FLOP, narrow FLOP, bytes) and joules of every row with an energy."""
        times: list[Floats] = []
        energies: list[Floats] = []
        work: list[Floats] = []
        for kind in kinds:
            whole = self.table(kind)
            rows = np.isfinite(whole["energy_uj"])
            table = {column: values[rows] for column, values in whole.items()}
            peaks, flops, moved = _WORK[kind](table)
            times.append(table["time_us"] * 1e-6)
            energies.append(table["energy_uj"] * 1e-6)
            narrow = np.isin(peaks, ("fp8", "fp4"))
            work.append(np.column_stack([np.where(narrow, 0.0, flops), np.where(narrow, flops, 0.0), moved]))
        return np.concatenate(times), np.concatenate(work), np.concatenate(energies)


def _kernels(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    """Per row of a table: format of the arithmetic, bytes of an activation and of a weight."""
    kernels = {dtype: Arithmetic.of(dtype) for dtype in set(table["dtype"])}
    found = [kernels[dtype] for dtype in table["dtype"]]
    return (
        np.array([kernel.peak for kernel in found]),
        np.array([kernel.input_bytes for kernel in found]),
        np.array([kernel.weight_bytes for kernel in found]),
    )


def _gemm_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    peaks, inputs, weights = _kernels(table)
    return peaks, *gemm_work(table["m"], table["n"], table["k"], inputs, weights)


def _moe_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    peaks, _, weights = _kernels(table)
    shape = (table[name] for name in ("tokens", "hidden", "expert_ffn", "experts", "held", "topk"))
    return peaks, *moe_work(*shape, weights, balanced=table["routing"] == "balanced")


def _memory_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    return np.full(len(table["bytes"]), "bf16"), np.zeros(len(table["bytes"])), table["bytes"]


def _decode_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    tokens = table["batch"] * table["context"]
    element = np.array([INPUT_BYTES[dtype] for dtype in table["dtype"]])
    flops = 4 * table["heads"] * table["head_dim"] * tokens
    moved = 2 * table["kv_heads"] * table["head_dim"] * tokens * element
    # The table names the cache's format; attention is computed in 16 bits.
    return np.full(len(tokens), "bf16"), flops, moved


def _prefill_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    pairs = table["batch"] * table["length"] * (table["length"] + 1) / 2
    flops = 4 * table["heads"] * table["head_dim"] * pairs
    width = (2 * table["heads"] + 2 * table["kv_heads"]) * table["head_dim"] * _HALF_BYTES
    return np.full(len(pairs), "bf16"), flops, width * table["batch"] * table["length"]


_WORK: Final = {
    "gemm": _gemm_energy,
    "moe": _moe_energy,
    "memory": _memory_energy,
    "attention_decode": _decode_energy,
    "attention_prefill": _prefill_energy,
}


def _envelope(shapes: Floats, size: Floats, seconds: Floats) -> Floats:
    """Times of each shape, none above that of a larger size.

    An engine can pad a batch to the larger size, and does for captured graphs: where a kernel library picks a poor
    kernel for one size, the next good one bounds it.
    """
    order = np.lexsort((size, *shapes.T[::-1]))
    rows, result = shapes[order], seconds[order]
    last = np.flatnonzero(np.concatenate([(rows[1:] != rows[:-1]).any(axis=1), [True]]))
    # Lifted by one step per shape, each lies below all later ones: one running minimum from the end serves all.
    logs = np.log(result)
    lift = (np.arange(len(last)) * (np.ptp(logs) + 1.0)).repeat(np.diff(np.concatenate([[-1], last])))
    bounded = np.minimum.accumulate((logs + lift)[::-1])[::-1] - lift
    found = np.empty_like(seconds)
    found[order] = np.exp(bounded)
    return found


@lru_cache(maxsize=64)
def load_source(folder: Path) -> Source:
    """A profile folder; its card is read at once, its tables when asked for."""
    return Source(folder, read_card(folder))


def gemm_feature(n: int, k: int) -> tuple[float, ...]:
    """A weight shape as the surface knows it."""
    return _feature((n, k), _GEMM_SCALE)


def moe_feature(hidden: int, expert_ffn: int, experts: int, held: int, topk: int) -> tuple[float, ...]:
    """A shape of experts as the surface knows it."""
    return _feature((hidden, expert_ffn, experts, held, topk), _MOE_SCALE)


def _feature(sizes: tuple[float, ...], scale: tuple[float, ...]) -> tuple[float, ...]:
    """Scaled logarithms of a shape."""
    return tuple((np.log(np.array(sizes, dtype=np.float64)) * np.array(scale)).tolist())
