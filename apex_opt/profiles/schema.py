"""What the tables of a profile folder hold: the columns of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

TABLE_DTYPES: Final = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "w4a16": "w4a16",
    "mxfp4": "mxfp4",
    "mxfp4_fp8": "mxfp4_fp8",
}
"""How tables spell the number formats, and how they are called once read."""

PEAK_DTYPES: Final = ("bf16", "fp16", "fp8", "fp4")
"""Formats whose matrix throughput a card may state."""

TABLE_ENGINES: Final = ("vllm", "sglang", "trtllm")
"""Engines whose kernels a folder may hold; a card without one serves all of them."""

ROUTINGS: Final = ("uniform", "balanced", "power_law_1.01", "power_law_1.2")
COLLECTIVES: Final = ("all_reduce", "custom_all_reduce", "all_gather", "reduce_scatter", "all_to_all")

STATE_OPS: Final = ("gated_delta", "kda", "mamba2", "mamba1", "lightning", "convolution")
"""Recurrences, and the causal convolution of so many channels (`heads`) over so many tokens (`key`) before them."""

SPARSE_OPS: Final = ("scores", "choice", "attention")
"""Kernels of sparse attention: an indexer's scores of what the context holds, its choice of the highest, and attention
over what it chose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: `kind` is `text`, `int` or `float`; numbers lie above `low` and up to `high`.

    An `optional` figure may be blank or its column left out. A column with a `default` may be left out: each row then
    holds that value, or what the row has in the column of that name where `default` names one.
    """

    name: str
    kind: str
    unit: str
    meaning: str
    low: float = 0.0
    high: float = 2.0**31
    choices: tuple[str, ...] = ()
    key: bool = False
    optional: bool = False
    default: str | int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """One kind of table; `size` names the columns whose product a curve runs over."""

    name: str
    columns: tuple[Column, ...]
    size: tuple[str, ...]


def _size(name: str, unit: str, meaning: str, high: float = 2.0**31, default: str | None = None) -> Column:
    """A whole number that belongs to the key."""
    return Column(name=name, kind="int", unit=unit, meaning=meaning, high=high, key=True, default=default)


def _format(name: str, meaning: str) -> Column:
    """A number format that belongs to the key."""
    return Column(name=name, kind="text", unit="", meaning=meaning, choices=tuple(TABLE_DTYPES), key=True)


_DTYPE: Final = _format("dtype", "number format")
_CACHE: Final = _format("dtype", "number format of the KV cache")
_WEIGHTS: Final = _format("weights", "number format of the projections")
_HEADS: Final = _size("heads", "count", "query heads", 2.0**20)
_ATTENTION: Final = (
    _CACHE,
    _HEADS,
    _size("kv_heads", "count", "KV heads", 2.0**20),
    _size("head_dim", "elements", "width of one head", 2.0**20),
    Column(
        name="window",
        kind="int",
        unit="tokens",
        meaning="tokens that a query sees at most, 0 for all",
        low=-1.0,
        key=True,
        default=0,
    ),
)
_BATCH: Final = _size("batch", "sequences", "sequences of the batch")
_CONTEXT: Final = _size("context", "tokens", "tokens per sequence, the new one included")
_LENGTH: Final = _size("length", "tokens", "tokens of each prompt, none of them cached before")
_RESULTS: Final = (
    Column(name="time_us", kind="float", unit="us", meaning="device time of one call", high=1e9),
    Column(name="energy_uj", kind="float", unit="uJ", meaning="board energy of one call", high=1e12, optional=True),
)

GEMM: Final = Schema(
    name="gemm",
    columns=(
        _DTYPE,
        _size("m", "rows", "rows of the input"),
        _size("n", "columns", "columns of the output"),
        _size("k", "elements", "depth of the product"),
        *_RESULTS,
    ),
    size=("m",),
)
MOE: Final = Schema(
    name="moe",
    columns=(
        _DTYPE,
        _size("tokens", "tokens", "tokens routed over all experts"),
        _size("hidden", "elements", "width of the model"),
        _size("expert_ffn", "elements", "width of one expert on one rank"),
        _size("experts", "count", "experts of the layer", 2.0**20),
        _size("topk", "count", "experts per token", 2.0**20),
        _size("held", "count", "experts on one rank", 2.0**20, default="experts"),
        Column(
            name="routing",
            kind="text",
            unit="",
            meaning="how tokens fall on experts",
            choices=ROUTINGS,
            key=True,
            default="uniform",
        ),
        *_RESULTS,
    ),
    size=("tokens",),
)
MEMORY: Final = Schema(
    name="memory",
    columns=(
        Column(name="op", kind="text", unit="", meaning="kernel and width", key=True),
        _size("bytes", "bytes", "read plus written", 2.0**50),
        *_RESULTS,
    ),
    size=("bytes",),
)
ATTENTION_DECODE: Final = Schema(
    name="attention_decode", columns=(*_ATTENTION, _BATCH, _CONTEXT, *_RESULTS), size=("batch", "context")
)
ATTENTION_PREFILL: Final = Schema(
    name="attention_prefill", columns=(*_ATTENTION, _BATCH, _LENGTH, *_RESULTS), size=("batch", "length")
)
MLA_DECODE: Final = Schema(
    name="mla_decode", columns=(_CACHE, _WEIGHTS, _HEADS, _BATCH, _CONTEXT, *_RESULTS), size=("batch", "context")
)
MLA_PREFILL: Final = Schema(
    name="mla_prefill", columns=(_CACHE, _WEIGHTS, _HEADS, _BATCH, _LENGTH, *_RESULTS), size=("batch", "length")
)
MLA_KERNEL_DECODE: Final = Schema(
    name="mla_kernel_decode", columns=(_CACHE, _HEADS, _BATCH, _CONTEXT, *_RESULTS), size=("batch", "context")
)
MLA_KERNEL_PREFILL: Final = Schema(
    name="mla_kernel_prefill", columns=(_CACHE, _HEADS, _BATCH, _LENGTH, *_RESULTS), size=("batch", "length")
)
_STATES: Final = (
    Column(name="op", kind="text", unit="", meaning="recurrence or convolution", choices=STATE_OPS, key=True),
    _size("heads", "count", "matrices of the state, or channels", 2.0**20),
    _size("key", "elements", "rows of each, or tokens an output depends on", 2.0**20),
    _size("value", "elements", "columns of each", 2.0**20),
    _size("key_heads", "count", "heads of queries and keys", 2.0**20),
)
STATE_DECODE: Final = Schema(name="state_decode", columns=(*_STATES, _BATCH, *_RESULTS), size=("batch",))
STATE_PREFILL: Final = Schema(
    name="state_prefill",
    columns=(*_STATES, _size("length", "tokens", "tokens of one prompt"), *_RESULTS),
    size=("length",),
)
SPARSE: Final = Schema(
    name="sparse",
    columns=(
        Column(name="op", kind="text", unit="", meaning="kernel", choices=SPARSE_OPS, key=True),
        _HEADS,
        _size("width", "elements", "multiplied per head: of an indexer's, or key and value", 2.0**20),
        _size("length", "tokens", "tokens of one prompt in the call"),
        _size("context", "tokens", "tokens that it holds after the call"),
        *_RESULTS,
    ),
    size=("length", "context"),
)
ENCODER: Final = Schema(
    name="attention_encoder",
    columns=(
        _HEADS,
        _size("head_dim", "elements", "width of one head", 2.0**20),
        _size("length", "tokens", "tokens of one input, which all see each other"),
        *_RESULTS,
    ),
    size=("length",),
)
COLLECTIVE: Final = Schema(
    name="collective",
    columns=(
        Column(name="op", kind="text", unit="", meaning="collective", choices=COLLECTIVES, key=True),
        _size("ranks", "count", "GPUs of the group", 2.0**20),
        _size("bytes", "bytes", "the whole vector of one GPU", 2.0**50),
        *_RESULTS,
    ),
    size=("bytes",),
)
SCHEMAS: Final = (
    GEMM,
    MOE,
    MEMORY,
    ATTENTION_DECODE,
    ATTENTION_PREFILL,
    MLA_DECODE,
    MLA_PREFILL,
    MLA_KERNEL_DECODE,
    MLA_KERNEL_PREFILL,
    STATE_DECODE,
    STATE_PREFILL,
    ENCODER,
    SPARSE,
    COLLECTIVE,
)


def schema_of(kind: str) -> Schema:
    """The schema of a kind of table."""
    return next(schema for schema in SCHEMAS if schema.name == kind)
