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
from apex_opt.profiles.fits import envelope, lines_of_batches, lines_of_windows, rising_line
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
    seen_tokens,
    sparse_work,
)
from apex_opt.profiles.schema import schema_of
from apex_opt.profiles.shapes import (
    ENCODER_SCALE,
    GEMM_SCALE,
    LATENT_PAIR,
    LATENT_RANK,
    LATENT_ROPE,
    MOE_SCALE,
    STATE_CHUNKS,
    STATE_SCALE,
    Shapes,
)
from apex_opt.profiles.sources.aiconfigurator import PACKAGE, distilled_from, full_tables
from apex_opt.profiles.surface import Surface, build_surface
from apex_opt.profiles.tables import read_table
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    Columns = dict[str, NDArray[Any]]

# Time a product takes however little it moves: the launch, and one pass down the depth k by a single tile. Chosen by
# leaving out each shape of h200-sxm/ops/gemm.csv in turn: the mean error falls from 7.0 to 4.7% (bf16), 8.8 to 5.6%
# (fp8).
GEMM_FLOOR_S: Final = 3e-6
GEMM_FLOOR_S_PER_DEPTH: Final = 0.4e-9
# The same for the fused experts: alignment of tokens, two products, activation and sum are launched one after another.
MOE_FLOOR_S: Final = 15e-6

_LAUNCHED: Final = 128
"""Tokens of a prompt up to which its time is that of a launch."""
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
        seconds = envelope(np.column_stack([n, k]), m, seconds)
        ratio = (GEMM_FLOOR_S + GEMM_FLOOR_S_PER_DEPTH * k + bound) / seconds
        return build_surface(np.column_stack([n, k]), GEMM_SCALE, np.log(m), ratio, 6, 2.0)

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
        ratio = (MOE_FLOOR_S + bound) / envelope(np.column_stack(shape), tokens, rows["time_us"][chosen] * 1e-6)
        per_expert = np.log(tokens * shape[4] / shape[2])
        return build_surface(np.column_stack(shape), MOE_SCALE, per_expert, ratio, 6, 1.0)

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
            work = recurrence_work(op, heads, key, value, key_heads, _STATE_BYTES, STATE_CHUNKS[op])
        decode = kind == "state_decode"
        size = table["batch" if decode else "length"][chosen]
        bound = self.bound_s(Arithmetic.of("bf16"), *(work.of_step(size) if decode else work.of_prompt(size)))
        shape = np.column_stack([heads, key, value, key_heads])
        seconds = envelope(shape, size, table["time_us"][chosen] * 1e-6)
        return build_surface(shape, STATE_SCALE, np.log(size), (STATE_FLOOR_S + bound) / seconds, 4, 1.0)

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
        seconds = envelope(np.column_stack([heads, width]), length, table["time_us"] * 1e-6)
        ratio = (STATE_FLOOR_S + bound) / seconds
        return build_surface(np.column_stack([heads, width]), ENCODER_SCALE, np.log(length), ratio, 4, 1.0)

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
        lines = (
            lines_of_windows(*calls, roof_s, window)
            if window
            else lines_of_batches(*calls, roof_s, _UNCACHED_BYTES / moved)
        )
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
        pairs = causal_pairs(length, seen_tokens(length, window))
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
            floors[kind] = rising_line(widths[rows], seconds[rows])
        large = (kernels != MEMORY_KERNELS["plain"]) & (moved >= _LARGE_BYTES)
        if not large.any():
            raise InputError(f"{self.file('memory')}: the memory table needs a row of at least 128 MiB")
        stream = np.maximum(seconds[large] - min(floor for floor, _ in floors.values()), 1e-9)
        share = float(np.median(moved[large] / stream)) / self.card.memory_bytes_per_s
        return MemoryLaw(floors=floors, efficiency=min(share, 1.0))


@lru_cache(maxsize=64)
def load_source(folder: Path, whole: bool = False) -> Source:
    """A profile folder; its card is read at once, its tables when asked for, `whole` for the rows left out too."""
    return Source(folder, read_card(folder), whole)
