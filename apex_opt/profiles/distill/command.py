"""The command that makes the folders of `profiles/` whose tables others have measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import UnknownNameError
from apex_opt.profiles.distill.curves import group, ordered_keys
from apex_opt.profiles.distill.screen import Screened, screen, take
from apex_opt.profiles.distill.thin import TOLERANCE, lookup_error, needed
from apex_opt.profiles.folder import Table, TableReport, write_folder
from apex_opt.profiles.schema import schema_of
from apex_opt.profiles.sources.aiconfigurator import (
    NCCL,
    PACKAGE,
    POWER_RELEASES,
    RELEASES,
    VERSION,
    Raw,
    data_folder,
    listed_gpu,
    raw_tables,
)
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable

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
    "state_decode": "recurrences (states in 32 bits) and convolutions, one new token per sequence",
    "state_prefill": "recurrences and convolutions over one prompt",
    "sparse": "an indexer's scores in 8 bits, its choice of the 2,048 highest, attention to these; GLM-5, one prompt",
    "attention_encoder": "attention of one input whose tokens all see each other",
    "collective": "within one node; bytes are those of the whole vector: input of reductions, output of gathers",
}
_POWERED: Final = ("moe", "attention_decode", "attention_prefill")
_SHALLOW: Final = 128
_POWER_ROWS: Final = 2000


def default_target() -> Path:
    """The profiles of the checkout that runs, else a folder of this name in the current one.

    What is installed is left alone: other programs may read it, and the next release replaces it.
    """
    return DATA_ROOT / "profiles" if (DATA_ROOT / "pyproject.toml").is_file() else Path("profiles")


def distill(
    source: Path | None,
    target: Path,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    only: tuple[str, ...] = (),
) -> tuple[TableReport, ...]:
    """Write `target/<gpu>/<engine>-<release>/` for every accelerator and engine of the package.

    Equal input gives equal bytes.

    Parameters
    ----------
    source : Path       where the package is unpacked; None for the one installed
    target : Path       folder of profile folders; the folders written are emptied first, others left alone
    progress : function     called with the folder being made, how many are done and how many there are
    only : tuple of str     accelerators, by default all

    Raises
    ------
    InputError, UnknownNameError    no package, no such accelerator in it, unreadable tables, a folder that cannot be
                                    written
    """
    data_folder(source)
    for gpu in only:
        if gpu not in RELEASES:
            raise UnknownNameError(f"accelerator with tables in {PACKAGE}", gpu, RELEASES)
    jobs = [
        (gpu, engine, version, sampled)
        for gpu in RELEASES
        if not only or gpu in only
        for sampled, releases in ((False, RELEASES[gpu]), (True, POWER_RELEASES.get(gpu, ())))
        for engine, version in releases
    ]
    reports: list[TableReport] = []
    for done, (gpu, engine, version, sampled) in enumerate(jobs):
        name = f"{gpu}/{engine}-{version}{'-power' if sampled else ''}"
        progress(f"distilling {name}", done, len(jobs))
        raws = raw_tables(gpu, engine, version, source, _POWERED if sampled else ())
        reports += _folder(target / name, engine, version, listed_gpu(gpu), raws, sampled=sampled)
    return tuple(reports)


def _folder(
    folder: Path, engine: str, version: str, listed: Gpu, raws: dict[str, Raw], *, sampled: bool
) -> tuple[TableReport, ...]:
    """Write one folder."""
    tables = [
        _table(kind, raw, screen(kind, raw.columns, raw.kernel, listed), sampled=sampled) for kind, raw in raws.items()
    ]
    return write_folder(folder, "distils", _head(engine, version, listed, raws, sampled=sampled), listed, tables)


def _table(kind: str, raw: Raw, screened: Screened, *, sampled: bool) -> Table:
    """Thin one table."""
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
        before = lookup_error(schema, judged, _found(schema.size[-1], kind, judged, take(columns, kept)))
        error = (*_middle(errors), *_middle(before))
    thin = take(columns, kept)
    source_rows = len(raw.kernel) + sum(count for _, count in raw.left_out)
    return Table(
        kind=kind,
        columns=thin,
        about=f"{len(thin['time_us']):,} of {source_rows:,} rows of {raw.file}: {_ABOUT[kind]}",
        source_rows=source_rows,
        screened_rows=len(columns["time_us"]),
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


def _head(engine: str, version: str, listed: Gpu, raws: dict[str, Raw], *, sampled: bool) -> dict[str, str]:
    """The fields of a card."""
    kernels = sorted({str(kernel) for raw in raws.values() for kernel in np.unique(raw.kernel.astype(str)).tolist()})
    derived = (
        f"screened as apex_opt/profiles/distill/screen.py states, then thinned: {TOLERANCE:.0%} at most at a point"
    )
    if sampled:
        derived = (
            f"screened as apex_opt/profiles/distill/screen.py states; about {_POWER_ROWS:,} rows of each table, evenly"
        )
    head = {
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
    return head
