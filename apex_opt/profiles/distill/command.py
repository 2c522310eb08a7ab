"""The command that makes the folders of `profiles/` whose tables others have measured."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError
from apex_opt.profiles.distill.curves import group, ordered_keys
from apex_opt.profiles.distill.screen import Screened, schema_of, screen, take
from apex_opt.profiles.distill.thin import TOLERANCE, lookup_error, needed
from apex_opt.profiles.schema import write_table
from apex_opt.profiles.sources.aiconfigurator import (
    NCCL,
    POWER_RELEASES,
    RELEASES,
    VERSION,
    Raw,
    data_folder,
    listed_gpu,
    raw_tables,
)
from apex_opt.units import GB, TERA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu

    Columns = dict[str, NDArray[Any]]


_ENGINES: Final = {"vllm": "vLLM", "sglang": "SGLang", "trtllm": "TensorRT-LLM", NCCL: "NCCL"}
_ABOUT: Final = {
    "gemm": "out[m,n] = in[m,k] W[n,k]^T; quantising the input included where the engine does it in the call",
    "moe": "routed experts: alignment of tokens, gate-up, activation, down and sum; `held` of `experts` on the rank",
    "attention_decode": "paged attention of one new token per sequence; dtype is the cache's",
    "attention_prefill": "causal attention over whole prompts; dtype is the cache's",
    "mla_decode": "latent attention of DeepSeek-V3 (7168 wide) with its projections, one new token per sequence",
    "mla_prefill": "latent attention of DeepSeek-V3 (7168 wide) with its projections, over whole prompts",
    "mla_kernel_decode": "latent attention of DeepSeek-V3 without projections, one new token per sequence",
    "mla_kernel_prefill": "latent attention of DeepSeek-V3 without projections, over whole prompts",
    "collective": "within one node; bytes are those of the whole vector: input of reductions, output of gathers",
}
_SHALLOW: Final = 128
_POWER_ROWS: Final = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class TableReport:
    """What became of one table.

    Attributes
    ----------
    folder, kind : str
    source_rows, screened_rows, rows, file_bytes : int
    dropped : tuple of (reason, rows)
    error : tuple of four floats or None    relative look-up error: median and P95 of all screened rows, then of all
                                            rows before the rule `lone`; None where rows were only sampled
    """

    folder: str
    kind: str
    source_rows: int
    screened_rows: int
    rows: int
    file_bytes: int
    dropped: tuple[tuple[str, int], ...]
    error: tuple[float, float, float, float] | None


def distill(
    source: Path | None, target: Path, progress: Callable[[str], None] = lambda line: None, only: tuple[str, ...] = ()
) -> tuple[TableReport, ...]:
    """Write `target/<gpu>/<engine>-<release>/` for every accelerator and engine of the package.

    Equal input gives equal bytes.

    Parameters
    ----------
    source : Path       where the package is unpacked; None for the one installed
    target : Path       folder of profile folders; the folders written are emptied first, others left alone
    progress : function     called with one line per table
    only : tuple of str     accelerators, by default all

    Raises
    ------
    InputError      no package, unreadable tables, a folder that cannot be written
    """
    data_folder(source)
    reports: list[TableReport] = []
    for gpu, releases in RELEASES.items():
        if only and gpu not in only:
            continue
        listed = listed_gpu(gpu)
        for engine, version in releases:
            name = f"{gpu}/{engine}-{version}"
            raws = raw_tables(gpu, engine, version, source)
            reports += _folder(target / name, name, engine, version, listed, raws, progress)
        if gpu in POWER_RELEASES:
            engine, version = POWER_RELEASES[gpu]
            name = f"{gpu}/{engine}-{version}-power"
            raws = raw_tables(gpu, engine, version, source, ("moe", "attention_decode", "attention_prefill"))
            reports += _folder(target / name, name, engine, version, listed, raws, progress, sampled=True)
    return tuple(reports)


def _folder(
    folder: Path,
    name: str,
    engine: str,
    version: str,
    listed: Gpu,
    raws: dict[str, Raw],
    progress: Callable[[str], None],
    *,
    sampled: bool = False,
) -> list[TableReport]:
    """Write one folder: its tables, then its card."""
    reports, entries = [], []
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        for kind, raw in raws.items():
            screened = screen(kind, raw.columns, raw.kernel, listed)
            file = folder / f"{kind}.npz"
            report = _table(file, name, kind, raw, screened, sampled=sampled)
            reports.append(report)
            entries.append(_entry(report, hashlib.sha256(file.read_bytes()).hexdigest(), raw))
            progress(describe(report))
        (folder / "card.toml").write_text(
            _card(name, engine, version, listed, entries, raws, sampled=sampled), encoding="utf-8"
        )
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return reports


def _table(file: Path, name: str, kind: str, raw: Raw, screened: Screened, *, sampled: bool) -> TableReport:
    """Thin one table and write it."""
    schema = schema_of(kind)
    columns, dropped = screened.columns, [*raw.left_out, *screened.dropped]
    judged = screened.judged
    if kind == "gemm":
        # No layer is that shallow: the least depth of a projection is one head.
        deep = columns["k"] >= _SHALLOW
        dropped.append((f"k below {_SHALLOW}, which no layer has", int((~deep).sum())))
        columns, judged = take(columns, deep), take(judged, judged["k"] >= _SHALLOW)
    error = None
    if sampled:
        rows = np.unique(np.linspace(0, len(columns["time_us"]) - 1, _POWER_ROWS).round().astype(np.int64))
        kept = np.zeros(len(columns["time_us"]), dtype=bool)
        kept[rows] = True
    else:
        kept = needed(schema, columns)
        errors = lookup_error(schema, columns, kept)
        before = lookup_error(schema, judged, _found(schema_of(kind).size[-1], kind, judged, take(columns, kept)))
        error = (*_middle(errors), *_middle(before))
    thin = take(columns, kept)
    write_table(file, schema, thin)
    return TableReport(
        folder=name,
        kind=kind,
        source_rows=len(raw.kernel) + sum(count for _, count in raw.left_out),
        screened_rows=len(columns["time_us"]),
        rows=len(thin["time_us"]),
        file_bytes=file.stat().st_size,
        dropped=tuple(dropped),
        error=error,
    )


def _found(axis: str, kind: str, judged: Columns, kept: Columns) -> NDArray[np.bool_]:
    """Which rows of one table are in another."""
    schema = schema_of(kind)
    both = {name: np.concatenate([judged[name], kept[name]]) for name in judged}
    owner = group(ordered_keys(schema, both))
    return np.isin(owner[: len(judged[axis])], owner[len(judged[axis]) :])


def _middle(errors: NDArray[np.float64]) -> tuple[float, float]:
    """Median and P95."""
    median, high = np.percentile(errors, [50, 95])
    return float(median), float(high)


def describe(report: TableReport) -> str:
    """One line about one table."""
    lookup = f"; {_lookup(report)}" if report.error else ""
    return f"{report.folder} {report.kind}: {report.rows:,} of {report.source_rows:,} rows{lookup}"


def _lookup(report: TableReport) -> str:
    """The look-up error in words."""
    assert report.error is not None
    median, high, before_median, before_high = (100 * figure for figure in report.error)
    return (
        f"look-up error over all {report.screened_rows:,} screened rows: median {median:.1f}%, P95 {high:.1f}%; "
        f"with the lone rows put back: median {before_median:.1f}%, P95 {before_high:.1f}%"
    )


def _entry(report: TableReport, digest: str, raw: Raw) -> str:
    """The card's section of one table."""
    about = f"{report.rows:,} of {report.source_rows:,} rows of {raw.file}: {_ABOUT[report.kind]}"
    lines = [
        f"[tables.{report.kind}]",
        f'file = "{report.kind}.npz"',
        f'sha256 = "{digest}"',
        f"about = {_quoted(about)}",
    ]
    if report.dropped:
        lines.append(f"dropped = {_quoted('; '.join(f'{reason}: {count:,} rows' for reason, count in report.dropped))}")
    if report.error:
        lines.append(f"lookup = {_quoted(_lookup(report))}")
    return "\n".join(lines)


def _card(
    name: str, engine: str, version: str, listed: Gpu, entries: list[str], raws: dict[str, Raw], *, sampled: bool
) -> str:
    """The text of a card."""
    kernels = sorted({str(kernel) for raw in raws.values() for kernel in np.unique(raw.kernel.astype(str)).tolist()})
    derived = (
        f"screened as apex_opt/profiles/distill/screen.py states, then thinned: {TOLERANCE:.0%} at most at a point"
    )
    if sampled:
        derived = (
            f"screened as apex_opt/profiles/distill/screen.py states; about {_POWER_ROWS:,} rows of each table, evenly"
        )
    tflops = ", ".join(f"{dtype} = {flops / TERA:g}" for dtype, flops in listed.flops_per_s)
    head = {
        "name": name,
        "hardware": f"{listed.name}, application clocks at their maximum, as the package's collector asks",
        "software": f"{_ENGINES[engine]} {version}; kernels: {', '.join(kernels)}",
        "method": "GPU time of a call, replayed from a CUDA graph where it can be captured; the package's collector",
        "origin": f"aiconfigurator-core {VERSION}, systems/data/{next(iter(raws.values())).file.split('/')[0]}",
        "date": "2026",
        "licence": "Apache-2.0",
        "derived": derived,
        "not_measured": "energy" if not sampled else "products, collectives",
    }
    if engine != NCCL:
        head["engine"] = engine
    if sampled:
        head["use"] = "energies"
        head["method"] += "; energy is time times the board's mean power while the call repeats for a second"
    lines = ["# Written by the command that distils tables. Columns, units and bounds: profiles/README.md."]
    lines += [f"{key} = {_quoted(text)}" for key, text in head.items()]
    lines += [
        "",
        "[gpu]",
        f"name = {_quoted(listed.name)}",
        f"memory_gb_per_s = {listed.memory_bytes_per_s / GB:g}",
        f"tflops = {{ {tflops} }}",
        f"tdp_w = {listed.tdp_w:g}",
        f"idle_w = {listed.idle_w:g}",
        f"source = {_quoted(f'the catalogue, {listed.name}')}",
    ]
    return "\n".join(lines) + "\n\n" + "\n\n".join(entries) + "\n"


def _quoted(text: str) -> str:
    """A TOML string; JSON's form of one is among TOML's."""
    return json.dumps(text, ensure_ascii=True)
