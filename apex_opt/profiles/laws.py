"""From the tables of a profile folder to the laws that `operations` evaluates."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError
from apex_opt.ir.formats import KV_BYTES
from apex_opt.profiles.card import Card, read_card
from apex_opt.profiles.physics import (
    Arithmetic,
    causal_pairs,
    context_work,
    convolution_work,
    encoder_work,
    experts_work,
    gemm_work,
    latent_work,
    pair_flops,
    recurrence_work,
    sparse_work,
)
from apex_opt.profiles.schema import schema_of
from apex_opt.profiles.sources.aiconfigurator import PACKAGE, distilled_from, full_tables
from apex_opt.profiles.surface import Surface, build_surface
from apex_opt.profiles.tables import read_table
from apex_opt.units import DATA_ROOT

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

# Factors on the logarithms of (n, k) and of (hidden, expert_ffn, experts, held, topk) in the distance between shapes.
_GEMM_SCALE: Final = (1.0, 0.7)
_MOE_SCALE: Final = (1.0, 1.0, 0.5, 1.0, 1.0)
# Distance between two attention shapes per factor of e: heads per KV head, KV heads, width of a head.
_ATTENTION_SCALE: Final = (1.0, 0.5, 4.0)

LATENT_RANK, LATENT_ROPE = 512, 64
LATENT_PAIR: Final = (192, 128)
"""Tables of latent attention are measured on the shapes of DeepSeek-V3: one cached vector of 512 + 64, and in prompts a
key of 192 and a value of 128 per head."""
_LATENT: Final = {"kv_heads": np.array([1]), "head_dim": np.array([LATENT_RANK + LATENT_ROPE])}

_SHORTEST_CONTEXT, _LONGEST_CONTEXT = 64, 40_000
"""Contexts a decode law is fitted on: shorter ones cost no time, longer ones are rare and would outweigh the rest."""
_LAUNCHED: Final = 128
"""Tokens of a prompt up to which its time is that of a launch."""
# A call that reads faster than the memory can by so much found its context in the cache, where repeated calls leave it;
# so did calls that read less. Where reading takes less than the second share of a call, it matters to neither.
_CACHED, _SILENT = 1.1, 0.2
_UNCACHED_BYTES: Final = 2**28
"""What no cache holds."""


CHOSEN: Final = 2048
"""Entries that each query chose in the tables of sparse attention."""
_LEAST_SCORED, _LONGEST_SCORED = 4096, 262_144
"""Contexts that tell the rate of a kernel of sparse attention: in shorter ones launches count, few are longer."""
STATE_FLOOR_S: Final = 5e-6
"""Time that a recurrence or a convolution takes however little there is to do."""
_STATE_BYTES: Final = 4.0
"""Bytes of an element of the states that tables were measured with."""
_ENCODER_SCALE: Final = (1.0, 2.0)
_STATE_SCALE: Final = (1.0, 1.0, 1.0, 0.5)
"""Distance between two states per factor of e: matrices, rows, columns, heads of queries and keys."""

MEMORY_KERNELS: Final = {"plain": "copy", "norm": "add_rms_norm", "activation": "silu_and_mul"}
"""Kinds of element-wise kernels, and the names of those that stand for them in a memory table, less their widths."""
_KERNEL_NAME: Final = re.compile(r"(.+)_([0-9]{1,9})")
_SMALL_BYTES, _LARGE_BYTES = 2**20, 2**27
"""Rows of which memory tables tell launches, and those that tell bandwidth."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MemoryLaw:
    """Element-wise kernels: time = floor + slope x width + bytes / (efficiency x bandwidth).

    `floors` maps a kind of kernel to its floor and slope in seconds: one block of threads works along a whole row, so
    a wide row takes its time however few there are.
    """

    floors: dict[str, tuple[float, float]]
    efficiency: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecodeLaw:
    """Decode attention of one measured shape, over units (sequences x KV heads): base, and share of the roofline.

    The base is the time at no context in seconds; the share is that of bandwidth, or of arithmetic where this is the
    limit, at which the context is worked through. `fitted` is False where no batch of the table tells it: it is 1 then.
    """

    units_log: Floats
    base_s: Floats
    share: Floats
    fitted: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefillLaw:
    """Attention of one whole prompt of one measured shape: share of peak that a long one reaches, what others add.

    `extra` is over log(length): time beside the launch and the pairs at that share, in pairs at peak. `fitted` is False
    where the table has no long prompt: the share is 1 then.
    """

    length_log: Floats
    extra: Floats
    share: float
    fitted: bool


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
        sizes = [table["heads"], *(table.get(name, size) for name, size in _LATENT.items())]
        keys = np.column_stack([np.broadcast_to(size, len(chosen))[index] for size in sizes]).astype(np.int64)
        shapes, owner = np.unique(keys, axis=0, return_inverse=True)
        owner = owner.reshape(-1)
        order = np.argsort(owner, kind="stable")
        parts = np.split(index[order], np.cumsum(np.bincount(owner, minlength=len(shapes)))[:-1])
        return cls(shapes, np.array([attention_feature(*map(int, shape)) for shape in shapes]), tuple(parts))

    def nearest(self, heads: int, kv_heads: int, head_dim: int) -> tuple[int, float]:
        """The nearest measured shape, and how far it is.

        Parameters
        ----------
        heads : int       query heads
        kv_heads : int    heads of the cache
        head_dim : int    elements of a head
        """
        distance = np.sqrt(((self.features - np.array(attention_feature(heads, kv_heads, head_dim))) ** 2).sum(axis=1))
        found = int(distance.argmin())
        return found, float(distance[found])


def attention_feature(heads: int, kv_heads: int, head_dim: int) -> tuple[float, ...]:
    """A shape of heads as the distance between shapes sees it.

    Parameters
    ----------
    heads : int       query heads
    kv_heads : int    heads of the cache
    head_dim : int    elements of a head
    """
    return _feature((heads / kv_heads, kv_heads, head_dim), _ATTENTION_SCALE)


class Source:
    """One profile folder; its tables are read, and laws made of them, when first asked for.

    Attributes
    ----------
    card : Card
    name : str      for people: the folder below `profiles/`
    """

    def __init__(self, folder: Path, card: Card, whole: bool = False) -> None:
        self.card = card
        self.name = f"{folder.parent.name}/{folder.name}"
        self.folder = folder
        self._files = {name: file for name, file, _ in card.tables}
        self._engine = distilled_from(folder.parent.name, folder.name) if whole else None
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
        self.state = lru_cache(maxsize=None)(self._state)
        self.sparse = lru_cache(maxsize=None)(self._sparse)
        self.encoder = lru_cache(maxsize=None)(self._encoder)

    def has(self, kind: str) -> bool:
        """Whether the folder has a table of a kind."""
        return kind in self._files and self.card.use == "times"

    def file(self, kind: str) -> str:
        """A table as messages and provenance name it."""
        if self._engine is not None:
            return f"{PACKAGE}, all rows of profiles/{self.name}/{self._files[kind]}"
        shipped = self.folder.is_relative_to(DATA_ROOT / "profiles")
        return f"profiles/{self.name}/{self._files[kind]}" if shipped else str(self.folder / self._files[kind])

    def _table(self, kind: str) -> Columns:
        """A table as columns; where all rows are asked for, those that the one that ships was distilled from."""
        if self._engine is not None:
            return full_tables(self.folder.parent.name, self._engine, kinds=(kind,))[kind]
        return read_table(self.folder / self._files[kind], schema_of(kind))

    def bound_s(self, kernel: Arithmetic, flops: ArrayLike, moved: ArrayLike) -> Floats:
        """Roofline on the accelerator of the card.

        Parameters
        ----------
        kernel : Arithmetic    what is computed
        flops : array          FLOP
        moved : array          bytes moved
        """
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
        weights, seconds = n * k * kernel.weight_bytes, rows["time_us"] * 1e-6
        large = weights >= _UNCACHED_BYTES
        if large.any():
            # Repeated calls find small weights in a large cache, steps of a model do not: no faster than the large.
            seconds = np.maximum(seconds, weights / (weights / seconds)[large].max())
        seconds = _envelope(np.column_stack([n, k]), m, seconds)
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
        work = experts_work(tokens, *shape, weight_bytes=kernel.weight_bytes, balanced=routing == "balanced")
        bound = self.bound_s(kernel, *work)
        ratio = (MOE_FLOOR_S + bound) / _envelope(np.column_stack(shape), tokens, rows["time_us"][chosen] * 1e-6)
        per_expert = np.log(tokens * shape[4] / shape[2])
        return build_surface(np.column_stack(shape), _MOE_SCALE, per_expert, ratio, 6, 1.0)

    def _state(self, kind: str, op: str) -> Surface | None:
        """(floor + roofline) / time over the batch or the length of a prompt, per shape of the state."""
        if not self.has(kind):
            return None
        table = self.table(kind)
        chosen = table["op"] == op
        if not chosen.any():
            return None
        heads, key, value, key_heads = (table[name][chosen] for name in ("heads", "key", "value", "key_heads"))
        if op == "convolution":
            work = convolution_work(heads, key)
        else:
            work = recurrence_work(op, heads, key, value, key_heads, _STATE_BYTES)
        decode = kind == "state_decode"
        size = table["batch" if decode else "length"][chosen]
        bound = self.bound_s(Arithmetic.of("bf16"), *(work.of_step(size) if decode else work.of_prompt(size)))
        shape = np.column_stack([heads, key, value, key_heads])
        seconds = _envelope(shape, size, table["time_us"][chosen] * 1e-6)
        return build_surface(shape, _STATE_SCALE, np.log(size), (STATE_FLOOR_S + bound) / seconds, 4, 1.0)

    def _sparse(self, op: str) -> Surface | None:
        """Roofline / time of a query-key pair over the tokens of a chunk, beyond the launch.

        Of the longest usual context: however few the queries, all keys are read and multiplied by as many as a tile
        has.
        """
        if not self.has("sparse"):
            return None
        table = self.table("sparse")
        chosen = (table["op"] == op) & (table["context"] <= _LONGEST_SCORED)
        if not chosen.any():
            return None
        length, context, time_us = (table[name][chosen] for name in ("length", "context", "time_us"))
        order = np.lexsort((context, length))
        last = order[np.append(np.flatnonzero(np.diff(length[order]) > 0), len(order) - 1)]
        last = last[context[last] >= _LEAST_SCORED]
        width = np.column_stack([table["heads"][chosen][last] * table["width"][chosen][last]])
        narrow = "fp8" if "fp8" in self._peaks else "bf16"
        bound = self.bound_s(Arithmetic.of("bf16" if op == "attention" else narrow), *sparse_work(op, width[:, 0]))
        before = context[last] - length[last]
        pairs = causal_pairs(context[last], context[last]) - causal_pairs(before, before)
        if op == "attention":
            pairs = length[last] * float(CHOSEN)
        launch_us = min(float(time_us.min()), 1e6 * STATE_FLOOR_S)
        seconds = np.maximum(time_us[last] - launch_us, 1e-3) * 1e-6 / pairs
        return build_surface(width, (1.0,), np.log(length[last]), np.minimum(bound / seconds, 1.0), 1, 1.0)

    def _encoder(self) -> Surface | None:
        """(floor + roofline) / time over the tokens of an input, per number and width of heads."""
        if not self.has("attention_encoder"):
            return None
        table = self.table("attention_encoder")
        heads, width, length = (table[name] for name in ("heads", "head_dim", "length"))
        bound = self.bound_s(Arithmetic.of("bf16"), *encoder_work(heads, heads, width, length))
        seconds = _envelope(np.column_stack([heads, width]), length, table["time_us"] * 1e-6)
        ratio = (STATE_FLOOR_S + bound) / seconds
        return build_surface(np.column_stack([heads, width]), _ENCODER_SCALE, np.log(length), ratio, 4, 1.0)

    def _shapes(self, kind: str, dtype: str, window: int) -> Shapes | None:
        """Shapes of heads measured with a KV format and a window (0: the whole context), or None."""
        if not self.has(kind):
            return None
        table = self.table(kind)
        chosen = (table["dtype"] == dtype) & (table.get("window", np.zeros(1)) == window)
        return Shapes.of(table, chosen) if chosen.any() else None

    def _decode(self, kind: str, dtype: str, window: int, index: int) -> DecodeLaw:
        """Per measured batch a straight line in the total context, by least squares on relative errors.

        Times that only the cache explains are left out. Batches without two contexts to fit take the share of their
        neighbours. A window has one context, itself: its base is the quickest batch, the rest goes to the share.
        """
        shapes = self.shapes(kind, dtype, window)
        assert shapes is not None
        table, rows = self.table(kind), shapes.rows[index]
        heads, kv_heads, head_dim = (int(size) for size in shapes.shapes[index])
        if kind.startswith("mla"):
            flops, moved = latent_work(heads, LATENT_RANK, LATENT_ROPE, KV_BYTES[dtype])
        else:
            flops, moved = context_work(heads, kv_heads, head_dim, KV_BYTES[dtype])
        roof_s = float(self.bound_s(Arithmetic.of("bf16"), flops, moved))
        calls = table["batch"][rows], table["context"][rows], table["time_us"][rows] * 1e-6
        lines = _windowed(*calls, roof_s, window) if window else _lines(*calls, roof_s, _UNCACHED_BYTES / moved)
        batches, base_s, share = (np.array(column) for column in zip(*lines, strict=True))
        known = np.isfinite(share)
        units_log = np.log(batches * kv_heads)
        return DecodeLaw(
            units_log=units_log,
            # A running maximum: more work never has a smaller base.
            base_s=np.maximum.accumulate(base_s),
            share=np.interp(units_log, units_log[known], share[known]) if known.any() else np.ones(len(share)),
            fitted=bool(known.any()),
        )

    def _prefill(self, kind: str, dtype: str, window: int, index: int) -> PrefillLaw:
        """Single prompts of one shape: launch, share of peak of long ones, and what short ones take more."""
        shapes = self.shapes(kind, dtype, window)
        assert shapes is not None
        table, rows = self.table(kind), shapes.rows[index]
        heads, _, head_dim = (int(size) for size in shapes.shapes[index])
        flops = pair_flops(heads, *(LATENT_PAIR if kind.startswith("mla") else (head_dim, head_dim)))
        rows = rows[table["batch"][rows] == table["batch"][rows].min()]
        rows = rows[np.argsort(table["length"][rows])]
        length, seconds = table["length"][rows], table["time_us"][rows] * 1e-6 / table["batch"][rows]
        # In pairs at peak from here on. No prompt takes more than a longer one: short ones differ by noise alone.
        taken = (seconds - (seconds[0] if length[0] <= _LAUNCHED else 0.0)) * self._peaks["bf16"] / flops
        taken = np.minimum.accumulate(np.maximum(taken, 0.0)[::-1])[::-1]
        pairs = causal_pairs(length, _seen(length, window))
        long = length > _LAUNCHED
        # The best of the longest: of few heads only the very longest come near it, and what others lack is in `extra`.
        shares = (pairs[long] / np.maximum(taken[long], pairs[long]))[-3:]
        share = float(shares.max(initial=0.0)) or 1.0
        return PrefillLaw(
            length_log=np.log(length),
            extra=np.maximum(taken - pairs / share, 0.0),
            share=share,
            fitted=len(shares) > 0,
        )

    def _memory(self) -> MemoryLaw:
        """Launch floor per kind of kernel and share of peak bandwidth, from kernels other than plain copies."""
        table = self.table("memory")
        names = [_KERNEL_NAME.fullmatch(op) for op in table["op"]]
        kernels = np.array([name[1] if name else op for name, op in zip(names, table["op"], strict=True)], dtype=object)
        widths = np.array([float(name[2]) if name else 0.0 for name in names])
        moved, seconds = table["bytes"], table["time_us"] * 1e-6
        floors: dict[str, tuple[float, float]] = {}
        for kind, kernel in MEMORY_KERNELS.items():
            rows = (kernels == kernel) & (moved <= _SMALL_BYTES)
            if not rows.any():
                raise InputError(f"{self.file('memory')}: the memory table needs a row of {kernel} of at most 1 MiB")
            floors[kind] = _rising_line(widths[rows], seconds[rows])
        large = (kernels != MEMORY_KERNELS["plain"]) & (moved >= _LARGE_BYTES)
        if not large.any():
            raise InputError(f"{self.file('memory')}: the memory table needs a row of at least 128 MiB")
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
            narrow = np.isin(peaks, ("fp8", "fp4", "int8"))
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
    return peaks, *experts_work(*shape, weight_bytes=weights, balanced=table["routing"] == "balanced")


def _memory_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    return np.full(len(table["bytes"]), "bf16"), np.zeros(len(table["bytes"])), table["bytes"]


def _decode_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    tokens = table["batch"] * _seen(table["context"], table["window"])
    element = np.array([float(KV_BYTES[dtype]) for dtype in table["dtype"]])
    flops, moved = context_work(table["heads"], table["kv_heads"], table["head_dim"], element)
    # The table names the cache's format; attention is computed in 16 bits.
    return np.full(len(tokens), "bf16"), np.asarray(flops * tokens), np.asarray(moved * tokens)


def _prefill_energy(table: Columns) -> tuple[NDArray[Any], Floats, Floats]:
    pairs = table["batch"] * causal_pairs(table["length"], _seen(table["length"], table["window"]))
    width = table["head_dim"]
    return np.full(len(pairs), "bf16"), pair_flops(table["heads"], width, width) * pairs, np.zeros(len(pairs))


_WORK: Final = {
    "gemm": _gemm_energy,
    "moe": _moe_energy,
    "memory": _memory_energy,
    "attention_decode": _decode_energy,
    "attention_prefill": _prefill_energy,
}


def _lines(
    batch: Floats, context: Floats, seconds: Floats, roof_s: float, cacheable: float
) -> list[tuple[float, float, float]]:
    """Per batch: itself, seconds at no context, share of the roofline (NaN where only other batches can tell).

    `roof_s` is the least time per token of context; a cache may hold so many tokens.
    """
    total = batch * context
    share = total * roof_s / seconds
    too_fast = share > _CACHED
    found_in_cache = total[too_fast & (total < cacheable)].max(initial=0.0)
    usual = (context >= _SHORTEST_CONTEXT) & (context <= _LONGEST_CONTEXT)
    usual &= ~too_fast & ((total > found_in_cache) | (share <= _SILENT))
    lines: dict[float, tuple[float, float] | None] = {}
    for size in np.unique(batch):
        at = usual & (batch == size)
        line = _fit_line(total[at], seconds[at], roof_s) if at.sum() > 1 else None
        if line is not None and line[1] == 1.0 and total[at].max() <= found_in_cache:
            line = None  # The cache kept up with so few tokens, which tells nothing of the memory.
        if line is not None and found_in_cache:
            # Fitted far out; what the cache served took the base at the least.
            line = min(line[0], float(seconds[batch == size].min())), line[1]
        lines[float(size)] = line
    known = {size: line for size, line in lines.items() if line is not None}
    sizes, shares = np.log(list(known)), [line[1] for line in known.values()]
    found = []
    for size in lines:
        if size in known:
            found.append((size, *known[size]))
            continue
        near = float(np.interp(np.log(size), sizes, shares)) if known else 1.0
        base = (seconds - total * roof_s / near)[usual & (batch == size)].min(initial=np.inf)
        found.append((size, float(base if 0 < base < np.inf else seconds[batch == size].min()), float("nan")))
    return found


def _fit_line(total: Floats, seconds: Floats, roof_s: float) -> tuple[float, float] | None:
    """Base and share of the roofline of one batch; None where noise on a flat curve leaves no such line."""
    weight = 1 / seconds
    base, slope = np.linalg.lstsq(np.column_stack([weight, total * weight]), np.ones(len(seconds)), rcond=None)[0]
    if 0 < slope < roof_s:
        slope = roof_s  # and so the share exactly 1
        base = float((weight**2) @ (seconds - total * roof_s) / (weight**2).sum())
    return (float(base), float(roof_s / slope)) if base > 0 and slope > 0 else None


def _windowed(
    batch: Floats, context: Floats, seconds: Floats, roof_s: float, window: int
) -> list[tuple[float, float, float]]:
    """As `_lines`, of sequences that fill their window.

    At twice the window, where there are such rows: kernels change their ways at the window itself.
    """
    full = min(2.0 * window, float(context.max()))
    times = {}
    for size in np.unique(batch):
        at = (batch == size) & (context >= full)
        if at.any():
            times[float(size)] = float(np.median(seconds[at]))
    launch = min(times.values())
    lines = []
    for size in np.unique(batch):
        least = float(size) * min(full, window) * roof_s
        share = least / max(times[size] - launch, least) if size in times else float("nan")
        lines.append((float(size), launch, share))
    return lines


def _seen(tokens: Floats, window: Size) -> Floats:
    """Tokens that a query sees of those there are; a window of 0 is none."""
    return np.where(np.asarray(window) > 0, np.minimum(tokens, window), tokens)


def _rising_line(widths: Floats, seconds: Floats) -> tuple[float, float]:
    """Seconds at no width and per element, neither below zero; the mean where the widths do not tell."""
    if np.ptp(widths) > 0:
        slope, floor = np.polyfit(widths, seconds, 1)
        if slope > 0 and floor > 0:
            return float(floor), float(slope)
    return float(seconds.mean()), 0.0


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
def load_source(folder: Path, whole: bool = False) -> Source:
    """A profile folder; its card is read at once, its tables when asked for, `whole` for the rows left out too."""
    return Source(folder, read_card(folder), whole)


def gemm_feature(n: int, k: int) -> tuple[float, ...]:
    """A weight shape as the surface knows it."""
    return _feature((n, k), _GEMM_SCALE)


def moe_feature(hidden: int, expert_ffn: int, experts: int, held: int, topk: int) -> tuple[float, ...]:
    """A shape of experts as the surface knows it.

    Parameters
    ----------
    hidden : int        width of the residual stream
    expert_ffn : int    columns of an expert
    experts : int       of a layer
    held : int          experts that a GPU holds
    topk : int          experts of a token
    """
    return _feature((hidden, expert_ffn, experts, held, topk), _MOE_SCALE)


def state_feature(heads: int, key: int, value: int, key_heads: int) -> tuple[float, ...]:
    """A shape of states as the surface knows it.

    Parameters
    ----------
    heads : int        matrices of the state, or channels of a convolution
    key : int          rows of each, or tokens that an output depends on
    value : int        columns of each
    key_heads : int    heads of queries and keys
    """
    return _feature((heads, key, value, key_heads), _STATE_SCALE)


def encoder_feature(heads: int, width: int) -> tuple[float, ...]:
    """Heads of an encoder as the surface knows them."""
    return _feature((heads, width), _ENCODER_SCALE)


def _feature(sizes: tuple[float, ...], scale: tuple[float, ...]) -> tuple[float, ...]:
    """Scaled logarithms of a shape."""
    return tuple((np.log(np.array(sizes, dtype=np.float64)) * np.array(scale)).tolist())
