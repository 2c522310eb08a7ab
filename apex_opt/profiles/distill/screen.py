"""Which rows of a measured table can be believed.

The rules, in order. None looks at anything but the table itself and the datasheet of its accelerator.

repeats     several rows of one key and kernel become their median; of several kernels the fastest stays, which is the
            one a tuned engine picks.
faster      a row faster than the arithmetic it stands for at 1.1 times the datasheet's peak, or than reading its
            operands, less a cache of 128 MB, at 1.1 times the bandwidth: something was not computed.
launches    a number format whose small products (m up to 64, n and k up to 1024) take 8 us longer than those in 16
            bits: three launches more than quantising needs. The clock ran on the host, so all rows of the format go:
            the rest would make curves without small m.
host        a state of which the least row takes more than 100 us: the clock ran on the host, as SGLang's rows of the
            same kernel and shape show, which take 8.
lone        a row above 1.5 times both its neighbours on its curve, or above 1.25 times some larger size while neither
            neighbour is. Two such rows in line are left alone, and so is a size at which more than a tenth of the
            curves of a format stand out: a library that switches kernels does that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.profiles.distill.curves import Curves, group, ordered_keys
from apex_opt.profiles.schema import PEAK_DTYPES, schema_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.schema import Schema

    Columns = dict[str, NDArray[Any]]
    Floats = NDArray[np.float64]
    Rule = tuple[str, int]

_SLACK: Final = 1.1
_CACHE_BYTES: Final = 128e6
_SMALL_ROWS, _SMALL_WIDTH = 64, 1024
_LAUNCHES_US: Final = 8.0
_HOST_US: Final = 100.0
_PEAK: Final = 1.5
_DIP: Final = 1.25
_SYSTEMATIC: Final = 0.1
_HALF: Final = ("bf16", "fp16")
# Bytes of one stored element: 4-bit formats with their scales.
_STORED: Final = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp8_block": 1.0}
_STORED_4_BIT: Final = 0.5
_COMPUTED: Final = {"fp8": "fp8", "fp8_block": "fp8", "nvfp4": "fp4", "mxfp4_fp8": "fp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Screened:
    """What is left of a table.

    Attributes
    ----------
    columns : dict of str to array[n_rows]      as `read_table` returns them, sorted by key
    dropped : tuple of (rule, rows)             what each rule took, in order; rules that took nothing are left out
    judged : dict of str to array               the table as measured, keys once, without the formats dropped whole
    """

    columns: Columns
    dropped: tuple[Rule, ...]
    judged: Columns


def take(columns: Columns, rows: NDArray[Any]) -> Columns:
    """Some rows of a table: a mask or their numbers."""
    return {name: values[rows] for name, values in columns.items()}


def screen(kind: str, columns: Columns, kernel: NDArray[Any], gpu: Gpu | None = None) -> Screened:
    """Apply the rules.

    Parameters
    ----------
    kind : str                              kind of table
    columns : dict of str to array[n_rows]  as `read_table` returns them, but with keys repeated
    kernel : object[n_rows]                 the kernel that ran
    gpu : Gpu                               whose datasheet the rule `faster` reads; None leaves the rule out
    """
    schema = schema_of(kind)
    dropped: list[Rule] = []
    if gpu is not None:
        good = columns["time_us"] >= _least_us(kind, columns, gpu)
        _note(dropped, "faster than the hardware", good)
        columns, kernel = take(columns, good), kernel[good]
    before = len(kernel)
    columns = _once(schema, columns, kernel)
    if before > len(columns["time_us"]):
        dropped.append(("repeats and slower kernels of one key", before - len(columns["time_us"])))
    if kind == "gemm":
        for name in _launch_bound(columns):
            good = columns["dtype"] != name
            _note(dropped, f"{name}: timed with its launches", good)
            columns = take(columns, good)
    if kind in ("state_decode", "state_prefill"):
        good = ~_on_host(columns)
        _note(dropped, "timed on the host", good)
        columns = take(columns, good)
    judged = columns
    good = ~_lone(schema, columns)
    _note(dropped, "lone", good)
    return Screened(columns=take(columns, good), dropped=tuple(dropped), judged=judged)


def _note(dropped: list[Rule], rule: str, good: NDArray[np.bool_]) -> None:
    """Count what a rule takes."""
    if not good.all():
        dropped.append((rule, int((~good).sum())))


def _once(schema: Schema, columns: Columns, kernel: NDArray[Any]) -> Columns:
    """Each key once, sorted by key: the median of a kernel's rows, the fastest of the kernels."""
    owner = group(ordered_keys(schema, columns))
    run = group([owner, kernel.astype(str)])
    order = np.lexsort((columns["time_us"], run))
    counts = np.bincount(run)
    first = np.cumsum(counts) - counts
    # The lower of two middle rows: a row that was measured, with its own energy.
    middle = order[first + (counts - 1) // 2]
    by_time = middle[np.lexsort((columns["time_us"][middle], owner[middle]))]
    fastest = np.concatenate([[True], np.diff(owner[by_time]) > 0])
    return take(columns, by_time[fastest])


def _least_us(kind: str, columns: Columns, gpu: Gpu) -> Floats:
    """Time below which a row cannot have done its work."""
    least = np.zeros(len(columns["time_us"]))
    if kind == "gemm":
        stored, flops_per_s = _by_format(columns["dtype"], gpu)
        m, n, k = columns["m"], columns["n"], columns["k"]
        least = _bound_us(2 * m * n * k, n * k * stored, flops_per_s, gpu)
    elif kind == "moe":
        _, flops_per_s = _by_format(columns["dtype"], gpu)
        # The share of an even spread; two matrices, as of experts without a gate, are the least.
        routed = columns["tokens"] * columns["topk"] * columns["held"] / columns["experts"]
        least = _bound_us(
            4 * routed * columns["hidden"] * columns["expert_ffn"], np.zeros_like(routed), flops_per_s, gpu
        )
        least[columns["routing"] != "balanced"] = 0.0
    elif kind in ("attention_decode", "attention_prefill"):
        stored, _ = _by_format(columns["dtype"], gpu)
        fastest = np.full_like(stored, max(flops for dtype, flops in gpu.flops_per_s if dtype in PEAK_DTYPES))
        size = columns["context" if kind == "attention_decode" else "length"]
        seen = np.where(columns["window"] > 0, np.minimum(size, columns["window"]), size)
        width = columns["batch"] * columns["head_dim"]
        if kind == "attention_decode":
            least = _bound_us(
                4 * width * columns["heads"] * seen, 2 * width * columns["kv_heads"] * seen * stored, fastest, gpu
            )
        else:
            least = _bound_us(2 * width * columns["heads"] * size * seen, 0 * size, fastest, gpu)
            least[columns["window"] > 0] = 0.0
    return least


def _by_format(dtype: NDArray[Any], gpu: Gpu) -> tuple[Floats, Floats]:
    """Stored bytes per element and peak FLOP/s, by row."""
    names, codes = np.unique(dtype.astype(str), return_inverse=True)
    peaks = dict(gpu.flops_per_s)
    half = peaks[gpu.half_dtype]
    stored = np.array([_STORED.get(name, _STORED_4_BIT) for name in names.tolist()])
    flops = np.array([peaks.get(_COMPUTED.get(name, "bf16"), half) for name in names.tolist()])
    return stored[codes.ravel()], flops[codes.ravel()]


def _bound_us(flops: Floats, moved: Floats, flops_per_s: Floats, gpu: Gpu) -> Floats:
    """The roofline, with slack and a cache taken off."""
    reading = np.maximum(moved - _CACHE_BYTES, 0.0) / gpu.memory_bytes_per_s
    return 1e6 / _SLACK * np.maximum(flops / flops_per_s, reading)


def _launch_bound(columns: Columns) -> list[str]:
    """Formats of products that were timed with their launches."""
    small = (columns["m"] <= _SMALL_ROWS) & (columns["n"] <= _SMALL_WIDTH) & (columns["k"] <= _SMALL_WIDTH)
    half = small & np.isin(columns["dtype"], _HALF)
    if not half.any():
        return []
    floor_us = float(np.median(columns["time_us"][half]))
    found = []
    for name in sorted(set(columns["dtype"][small].tolist()) - set(_HALF)):
        time_us = float(np.median(columns["time_us"][small & (columns["dtype"] == name)]))
        if time_us > floor_us + _LAUNCHES_US:
            found.append(name)
    return found


def _on_host(columns: Columns) -> NDArray[np.bool_]:
    """Rows of states that take long however little there is to do."""
    owner = group([columns[name] for name in ("op", "heads", "key", "value", "key_heads")])
    least = np.full(owner.max() + 1, np.inf)
    np.minimum.at(least, owner, columns["time_us"])
    return np.asarray(least[owner] > _HOST_US)


def _lone(schema: Schema, columns: Columns) -> NDArray[np.bool_]:
    """Rows that stand out of their curve alone."""
    curves = Curves.of(schema, columns)
    time = curves.time_log
    edge = np.full((len(time), 1), np.nan)
    before, after = np.hstack([edge, time[:, :-1]]), np.hstack([time[:, 1:], edge])
    with np.errstate(invalid="ignore"):
        peak = time > np.log(_PEAK) + np.maximum(before, after)
        filled = np.where(np.isnan(time), np.inf, time)
        least = np.minimum.accumulate(filled[:, ::-1], axis=1)[:, ::-1]
        dip = time > np.log(_DIP) + least
    no = np.zeros((len(time), 1), dtype=bool)
    alone = dip & ~np.hstack([no, dip[:, :-1]]) & ~np.hstack([dip[:, 1:], no])
    bad = np.zeros(len(columns["time_us"]), dtype=bool)
    bad[curves.rows[peak | alone]] = True
    place = group([columns[schema.columns[0].name], columns[schema.size[-1]]])
    share = np.bincount(place, weights=bad) / np.bincount(place)
    return bad & (share[place] <= _SYSTEMATIC)
