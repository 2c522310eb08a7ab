"""What to measure: the points of every table, and what each takes of the device."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.units import MIB, ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from apex_opt.cluster.types import Gpu

OPS: Final[Mapping[str, tuple[str, ...]]] = {
    "gemm": ("gemm",),
    "moe": ("moe",),
    "attention": ("attention_decode", "attention_prefill"),
    "window": ("attention_decode", "attention_prefill"),
    "state": ("state_decode", "state_prefill"),
    "memory": ("memory",),
    "collective": ("collective",),
}
"""Operations that can be asked for, and their kinds of table."""

_HALF_BYTES: Final = 2
_STATE_BYTES: Final = 4
_CHUNK: Final = 64
"""Tokens of a prompt after each of which kernels keep the state, at the least."""
_FILLED: Final = (1, 2, 8)
"""Contexts of decoding sequences, in windows: the law of a window reads those of at least two."""
_OVERWRITING: Final = ("kda", "convolution")
"""What vLLM's kernels write over what they read, so that another call draws less than a model's would."""
_MOST_COPIES: Final = 1024
_LEAST_TURNED: Final = 2**16
"""Bytes that take a hundredth of a launch to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One row to measure.

    Attributes
    ----------
    kind : str                      kind of table
    key : tuple of (column, value)  formats as `read_table` has them
    cold_bytes : int                what a call reads that an engine does not find in the cache: weights, KV caches
    shared_bytes : int              memory that all copies of the operands share
    energy : bool                   whether to measure its energy too
    """

    kind: str
    key: tuple[tuple[str, str | int], ...]
    cold_bytes: int = 0
    shared_bytes: int = 0
    energy: bool = False

    def copies(self, cache_bytes: int) -> int:
        """How many operands to take in turn, so that each has left the cache when its turn comes again."""
        return 1 if not self.cold_bytes else min(max(ceil_div(2 * cache_bytes, self.cold_bytes), 1), _MOST_COPIES)

    def held_bytes(self, cache_bytes: int) -> int:
        """Device memory that the operands take."""
        return self.shared_bytes + self.copies(cache_bytes) * self.cold_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Sizes of all points.

    Shapes of attention are (heads, KV heads, width), behind their window where they have one; of experts (hidden, FFN,
    all, top k); of recurrences (kind, matrices of the state, rows, columns, heads of queries and keys); of convolutions
    (channels, tokens).
    """

    rows: tuple[int, ...]
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    energy_rows: tuple[int, ...]
    experts: tuple[tuple[int, int, int, int], ...]
    splits: tuple[int, ...]
    tokens: tuple[int, ...]
    heads: tuple[tuple[int, int, int], ...]
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    lengths: tuple[int, ...]
    windows: tuple[tuple[int, int, int, int], ...]
    states: tuple[tuple[str, int, int, int, int], ...]
    convolutions: tuple[tuple[int, int], ...]
    copied: tuple[int, ...]
    hidden: tuple[int, ...]
    vectors: tuple[int, ...]


_POWERS: Final = tuple(2**power for power in range(31))
# Powers of two make a full grid, between whose points shapes are interpolated; experts and heads are those of published
# models: Mixtral 8x7B and 8x22B, Qwen3 30B-A3B and 235B-A22B, DeepSeek-V3, gpt-oss-120b; Llama 3, Qwen 2.5, gpt-oss.
# Windows are those of gpt-oss, Gemma 3 27B and Mistral 7B; states those of Qwen3-Next 80B-A3B, Qwen3.5 27B and
# 397B-A17B, Kimi Linear, Kimi K3, Nemotron 3 Nano and Super, MiniMax-Text-01, with the convolutions before them, and
# that of LFM2.
_FULL: Final = _Grid(
    rows=(1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192),
    widths=_POWERS[9:18],
    depths=_POWERS[9:16],
    energy_rows=(1, 64, 1024, 8192),
    experts=(
        (4096, 14336, 8, 2),
        (6144, 16384, 8, 2),
        (2048, 768, 128, 8),
        (4096, 1536, 128, 8),
        (7168, 2048, 256, 8),
        (2880, 2880, 128, 4),
    ),
    splits=(1, 2, 4, 8),
    tokens=_POWERS[:14],
    heads=((32, 8, 128), (16, 4, 128), (8, 2, 128), (4, 1, 128), (64, 8, 128), (8, 1, 128), (32, 32, 128), (64, 8, 64)),
    batches=_POWERS[:10],
    contexts=_POWERS[7:18],
    lengths=_POWERS[4:16],
    windows=((128, 64, 8, 64), (1024, 32, 16, 128), (4096, 32, 8, 128)),
    states=(
        ("gated_delta", 32, 128, 128, 16),
        ("gated_delta", 48, 128, 128, 16),
        ("gated_delta", 64, 128, 128, 16),
        ("kda", 32, 128, 128, 32),
        ("kda", 96, 128, 128, 96),
        ("mamba2", 64, 128, 64, 8),
        ("mamba2", 128, 128, 64, 8),
        ("lightning", 64, 128, 128, 64),
    ),
    convolutions=((2048, 3),),
    copied=_POWERS[14:31:2],
    hidden=(2048, 4096, 8192),
    vectors=_POWERS[10:29],
)
_QUICK: Final = _Grid(
    rows=(1, 16, 128, 1024, 8192),
    widths=(1024, 4096, 16384),
    depths=(1024, 4096, 16384),
    energy_rows=(),
    experts=((4096, 14336, 8, 2), (2048, 768, 128, 8)),
    splits=(1, 8),
    tokens=(1, 16, 256, 4096),
    heads=((32, 8, 128), (4, 1, 128)),
    batches=(1, 16, 128),
    contexts=(128, 1024, 8192, 32768),
    lengths=(16, 256, 2048, 8192),
    windows=((128, 64, 8, 64),),
    states=(
        ("gated_delta", 32, 128, 128, 16),
        ("kda", 32, 128, 128, 32),
        ("mamba2", 64, 128, 64, 8),
        ("lightning", 64, 128, 128, 64),
    ),
    convolutions=(),
    copied=(2**14, 2**20, 2**28),
    hidden=(4096,),
    vectors=(2**12, 2**18, 2**24, 2**28),
)


def asked_ops(text: str) -> tuple[str, ...]:
    """Operations as they are named on a command line, by commas.

    Raises
    ------
    UnknownNameError, UsageError    one that there is not, or is named twice
    """
    names = tuple(name.strip().lower() for name in text.split(","))
    for name in names:
        if name not in OPS:
            raise UnknownNameError("operation", name[:60], OPS, "such as --ops=gemm,attention")
    if len(set(names)) < len(names):
        raise UsageError(f"--ops: {text!r:.60} names an operation twice")
    return names


def points(ops: Sequence[str], gpu: Gpu, gpus: int, *, quick: bool) -> tuple[Point, ...]:
    """Every point of the operations asked for, table by table.

    Parameters
    ----------
    ops : names of `OPS`
    gpu : Gpu           whose formats are measured
    gpus : int          accelerators in the node: collectives are measured on 2, 4, 8 ... of them
    quick : bool        a few points of every table only, and no energies
    """
    grid = _QUICK if quick else _FULL
    tables: Mapping[str, Callable[[], Iterable[Point]]] = {
        "gemm": lambda: _gemm(grid, gpu),
        "moe": lambda: _moe(grid, gpu),
        "attention": lambda: _attention(grid, gpu),
        "window": lambda: _windows(grid, gpu),
        "state": lambda: _states(grid),
        "memory": lambda: _memory(grid),
        "collective": lambda: _collective(grid, gpus),
    }
    return tuple(point for op in OPS if op in ops for point in tables[op]())


def _gemm(grid: _Grid, gpu: Gpu) -> Iterator[Point]:
    """Products in 16 bits, and in fp8 where there is hardware for it."""
    formats = {gpu.half_dtype: _HALF_BYTES} | ({"fp8": 1} if gpu.supports("fp8") else {})
    for (dtype, size), n, k, m in product(formats.items(), grid.widths, grid.depths, grid.rows):
        yield Point(
            kind="gemm",
            key=(("dtype", dtype), ("m", m), ("n", n), ("k", k)),
            cold_bytes=n * k * size,
            shared_bytes=m * (k * size + n * _HALF_BYTES),
            energy=m in grid.energy_rows,
        )


def _moe(grid: _Grid, gpu: Gpu) -> Iterator[Point]:
    """Experts in 16 bits: whole, their width split, and fewer of them held."""
    for hidden, ffn, experts, topk in grid.experts:
        shapes = [(ffn // split, experts) for split in grid.splits]
        shapes += [(ffn, experts // split) for split in grid.splits[1:]]
        for (width, held), tokens in product(shapes, grid.tokens):
            key = {"tokens": tokens, "hidden": hidden, "expert_ffn": width, "experts": experts, "topk": topk}
            weights = 3 * hidden * width * _HALF_BYTES
            yield Point(
                kind="moe",
                key=(("dtype", gpu.half_dtype), *key.items(), ("held", held), ("routing", "uniform")),
                # All copies are other routings over the same weights, which together do not fit the cache.
                shared_bytes=held * weights + 2 * tokens * topk * (hidden + 2 * width) * _HALF_BYTES,
                energy=tokens in grid.energy_rows,
            )


def _attention(grid: _Grid, gpu: Gpu) -> Iterator[Point]:
    """Decode attention over caches of equal length, then prefill of one prompt."""
    for (heads, kv_heads, width), batch, context in product(grid.heads, grid.batches, grid.contexts):
        yield Point(
            kind="attention_decode",
            key=_heads(gpu, (heads, kv_heads, width), 0, batch, "context", context),
            cold_bytes=2 * batch * context * kv_heads * width * _HALF_BYTES,
            shared_bytes=2 * batch * heads * width * _HALF_BYTES,
            energy=batch in grid.energy_rows,
        )
    for (heads, kv_heads, width), length in product(grid.heads, grid.lengths):
        yield Point(
            kind="attention_prefill",
            key=_heads(gpu, (heads, kv_heads, width), 0, 1, "length", length),
            # The prompt's keys and values were just written: an engine finds them in the cache too.
            shared_bytes=2 * length * (heads + kv_heads) * width * _HALF_BYTES,
            energy=length in grid.energy_rows,
        )


def _windows(grid: _Grid, gpu: Gpu) -> Iterator[Point]:
    """The same under windows, with heads whole and split: sequences that fill their window, and whole prompts."""
    for (window, heads, kv_heads, width), split in product(grid.windows, grid.splits):
        shape = (heads // split, kv_heads // split, width)
        token_bytes = 2 * shape[1] * width * _HALF_BYTES
        for batch, filled in product(grid.batches, _FILLED):
            yield Point(
                kind="attention_decode",
                key=_heads(gpu, shape, window, batch, "context", filled * window),
                # Blocks that no query sees any more are given back.
                cold_bytes=_turned(batch * window * token_bytes),
                shared_bytes=2 * batch * shape[0] * width * _HALF_BYTES,
                energy=batch in grid.energy_rows,
            )
        for length in grid.lengths:
            yield Point(
                kind="attention_prefill",
                key=_heads(gpu, shape, window, 1, "length", length),
                shared_bytes=2 * length * (shape[0] + shape[1]) * width * _HALF_BYTES,
                energy=length in grid.energy_rows,
            )


def _heads(
    gpu: Gpu, shape: tuple[int, int, int], window: int, batch: int, name: str, size: int
) -> tuple[tuple[str, str | int], ...]:
    """The key of an attention point."""
    heads = zip(("heads", "kv_heads", "head_dim"), shape, strict=True)
    return (("dtype", gpu.half_dtype), *heads, ("window", window), ("batch", batch), (name, size))


def _states(grid: _Grid) -> Iterator[Point]:
    """Recurrences, their states whole and split, and convolutions: a new token of each sequence, then one prompt."""
    for op, heads, key, value, key_heads in _shapes(grid):
        shape = (("heads", heads), ("key", key), ("value", value), ("key_heads", key_heads))
        if op == "convolution":
            state_bytes, token_bytes = (key - 1) * heads * _HALF_BYTES, 2 * heads * _HALF_BYTES
            kept_bytes = 0
        else:
            state_bytes = heads * key * value * _STATE_BYTES
            token_bytes = 2 * (key_heads * key + heads * value) * _HALF_BYTES
            kept_bytes = state_bytes
        for batch in grid.batches:
            yield Point(
                kind="state_decode",
                key=(("op", op), *shape, ("batch", batch)),
                cold_bytes=_turned(batch * state_bytes),
                shared_bytes=batch * token_bytes,
                energy=batch in grid.energy_rows and op not in _OVERWRITING,
            )
        for length in grid.lengths:
            yield Point(
                kind="state_prefill",
                key=(("op", op), *shape, ("length", length)),
                # What chunks hand on to each other, and what is solved for within them, in copies of the operands.
                shared_bytes=4 * length * token_bytes + ceil_div(length, _CHUNK) * kept_bytes,
                energy=length in grid.energy_rows and op not in _OVERWRITING,
            )


def _turned(size: int) -> int:
    """What operands are taken in turn for; of so little that even many of them fit a cache, nothing."""
    return size if size >= _LEAST_TURNED else 0


def _shapes(grid: _Grid) -> tuple[tuple[str, int, int, int, int], ...]:
    """Recurrences and the convolutions of what goes into them, whole and split; each once."""
    inputs = [
        (heads * value + 2 * key_heads * key, 4)
        for op, heads, key, value, key_heads in grid.states
        if op != "lightning"
    ]
    convolutions = [("convolution", channels, tokens, 1, 1) for channels, tokens in (*inputs, *grid.convolutions)]
    found = [
        (op, heads // split, key, value, max(key_heads // split, 1))
        for (op, heads, key, value, key_heads), split in product((*grid.states, *convolutions), grid.splits)
    ]
    return tuple(dict.fromkeys(found))


def _memory(grid: _Grid) -> Iterator[Point]:
    """Copies, fused sum and norm, and gated activations; what they read was just written, so all may be cached."""
    calls = [("copy", size) for size in grid.copied]
    for hidden, rows in product(grid.hidden, grid.rows):
        calls.append((f"add_rms_norm_{hidden}", rows * 4 * hidden * _HALF_BYTES))
        calls.append((f"silu_and_mul_{4 * hidden}", rows * 3 * 4 * hidden * _HALF_BYTES))
    for op, size in calls:
        # Of smaller ones the counter sees too little.
        energy = bool(grid.energy_rows) and size >= 64 * MIB
        yield Point(kind="memory", key=(("op", op), ("bytes", size)), shared_bytes=size, energy=energy)


def _collective(grid: _Grid, gpus: int) -> Iterator[Point]:
    """Collectives on 2, 4, 8 ... accelerators."""
    groups = [ranks for ranks in _POWERS[1:10] if ranks <= gpus]
    for op, ranks, size in product(("all_reduce", "all_gather", "reduce_scatter", "all_to_all"), groups, grid.vectors):
        yield Point(kind="collective", key=(("op", op), ("ranks", ranks), ("bytes", size)), shared_bytes=2 * size)
