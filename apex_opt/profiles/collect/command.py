"""The command that measures the accelerator it runs on and writes a profile folder."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cluster import list_gpus, load_cluster
from apex_opt.errors import InputError
from apex_opt.profiles.collect.points import OPS, points
from apex_opt.profiles.collect.timing import CallError, Effort, Result, measure
from apex_opt.profiles.folder import Table, Written, write_folder
from apex_opt.profiles.schema import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.collect.points import Point
    from apex_opt.profiles.collect.timing import Machine

_QUICK: Final = Effort(warm_s=0.01, samples=5, sample_s=0.002, energy_s=0.0)
_MEMORY_SHARE: Final = 0.8
_TOO_LARGE: Final = "larger than the memory that is free"
_NEAR: Final = 0.03
_NAME: Final = "collected"
_SIZE: Final = re.compile(r"\d+gb", re.ASCII)
_BOARDS: Final = ("pcie", "nvl")
"""Words of a driver that tell a board from the module with the same chip."""
_ABOUT: Final = {
    "gemm": "out[m,n] = in[m,k] W[n,k]^T; float8 with one scale per row and column, quantising the input not included",
    "moe": "fused experts, gate-up and down, routing uniform at random",
    "attention_decode": "paged attention of one new token per sequence, all of one length; blocks outside a window are "
    "the null block",
    "attention_prefill": "causal attention over one whole prompt",
    "state_decode": "recurrences with the kernels of their gates, states in 32 bits, and convolutions: one new token "
    "per sequence",
    "state_prefill": "the same over one prompt without a state before it; Mamba2 in chunks of 128, lightning of 256",
    "memory": "device copy, fused add and RMSNorm, SiLU and multiply; small sizes are served from the L2 cache",
    "collective": "within one node; bytes are those of the whole vector: input of reductions, output of gathers",
}


def recognised(name: str, memory_bytes: int) -> Gpu:
    """The accelerator of the catalogue that a driver calls so.

    Raises
    ------
    InputError      none, or one with another memory
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    for listed in list_gpus():
        gpu, own = load_cluster(listed).gpu, {word for word in listed.split("-") if not _SIZE.fullmatch(word)}
        boards = {board for board in _BOARDS if board in own} == {board for board in _BOARDS if board in words}
        if own - {"sxm", "nvl72"} <= words and boards and abs(memory_bytes / gpu.memory_bytes - 1) < _NEAR:
            return gpu
    raise InputError(
        f"{name} with {memory_bytes / 2**30:.0f} GiB is not in the catalogue ({', '.join(list_gpus())}); describe it "
        "in a cluster file and name that: --gpu=my-node.toml"
    )


def collect(
    machine: Machine,
    gpu: Gpu,
    target: Path,
    ops: Sequence[str],
    date: str,
    *,
    quick: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Written:
    """Measure, then write `target/<accelerator>/collected/`; nothing is written where nothing could be measured.

    Parameters
    ----------
    machine : Machine       the accelerator and its kernels
    gpu : Gpu               its datasheet
    target : Path           folder of profile folders; the one written is replaced, others left alone
    ops : names of `OPS`
    date : str              for the card
    quick : bool            a few points of every table, no energies
    progress : function     called with what is being measured, how many points are done and how many there are

    Raises
    ------
    InputError      no point could be measured, a folder that cannot be written
    """
    effort = _QUICK if quick else Effort()
    kinds = list(dict.fromkeys(kind for op in OPS if op in ops for kind in OPS[op]))
    passed_over = [(kind, why) for kind in kinds if (why := machine.lacks(kind))]
    asked = [point for point in points(ops, gpu, machine.gpus, quick=quick) if not machine.lacks(point.kind)]
    found: list[tuple[Point, Result]] = []
    failed: dict[str, Counter[str]] = {kind: Counter() for kind in kinds}
    for done, point in enumerate(point for point in asked if point.kind != "collective"):
        progress(f"measuring {point.kind}", done, len(asked))
        try:
            found.append((point, _measured(machine, point, effort)))
        except CallError as error:
            failed[point.kind][str(error)] += 1
        machine.release()
    for point, result in _collectives(machine, [point for point in asked if point.kind == "collective"], effort):
        if isinstance(result, CallError):
            failed[point.kind][str(result)] += 1
        else:
            found.append((point, result))
    tables = [
        _table(schema.name, rows, failed[schema.name])
        for schema in SCHEMAS
        if (rows := [entry for entry in found if entry[0].kind == schema.name])
    ]
    passed_over += [
        (kind, "; ".join(f"{why} ({count:,} points)" for why, count in reasons.items()))
        for kind, reasons in failed.items()
        if reasons and kind not in {table.kind for table in tables}
    ]
    if not tables:
        raise InputError(
            f"{machine.name}: nothing could be measured: {'; '.join(f'{kind}: {why}' for kind, why in passed_over)}"
        )
    energies = any(np.isfinite(table.columns["energy_uj"]).any() for table in tables)
    head = {
        "hardware": machine.hardware,
        "software": machine.software,
        "method": "replay of CUDA graphs of at least 20 calls; weights and KV caches rotated so that none is found in "
        f"the L2 cache; median of {effort.samples} samples"
        + (f"; energy by the board's counter over {effort.energy_s:g} s where sampled" if energies else ""),
        "origin": f"measured by apex-opt profile collect{' --quick' if quick else ''}",
        "date": date,
        "licence": "not stated: it is for whoever measured it to say",
        "not_measured": ", ".join(
            [kind for kind in _ABOUT if kind not in {table.kind for table in tables}] + ["energy"] * (not energies)
        ),
    }
    folder = target / (gpu.profile or gpu.name) / _NAME
    reports = write_folder(folder, "measures", head, gpu, tables)
    return Written(folder=folder, reports=reports, passed_over=tuple(passed_over))


def _measured(machine: Machine, point: Point, effort: Effort) -> Result:
    """One point.

    Raises
    ------
    CallError       it does not fit the memory, or its call fails
    """
    if not _fits(machine, point):
        raise CallError(_TOO_LARGE)
    return measure(machine, machine.calls(point, point.copies(machine.cache_bytes)), effort, energy=point.energy)


def _fits(machine: Machine, point: Point) -> bool:
    return point.held_bytes(machine.cache_bytes) <= _MEMORY_SHARE * machine.free_bytes()


def _collectives(machine: Machine, asked: Sequence[Point], effort: Effort) -> list[tuple[Point, Result | CallError]]:
    """Collectives, group by group."""
    found: list[tuple[Point, Result | CallError]] = []
    for ranks in sorted({int(dict(point.key)["ranks"]) for point in asked}):
        group = [point for point in asked if dict(point.key)["ranks"] == ranks]
        large = [point for point in group if not _fits(machine, point)]
        group = [point for point in group if point not in large]
        found += [(point, CallError(_TOO_LARGE)) for point in large]
        try:
            found += zip(group, machine.collectives(ranks, group, effort), strict=True)
        except CallError as error:
            found += [(point, error) for point in group]
    return found


def _table(kind: str, rows: Sequence[tuple[Point, Result]], failed: Counter[str]) -> Table:
    """The points of one kind that were measured."""
    names = [name for name, _ in rows[0][0].key]
    columns: dict[str, Any] = {}
    for name in names:
        values = [dict(point.key)[name] for point, _ in rows]
        columns[name] = np.array(values, dtype=object if isinstance(values[0], str) else np.float64)
    columns["time_us"] = np.array([result.time_s * 1e6 for _, result in rows])
    columns["energy_uj"] = np.array(
        [np.nan if result.energy_j is None else result.energy_j * 1e6 for _, result in rows]
    )
    return Table(
        kind=kind,
        columns=columns,
        about=_ABOUT[kind],
        source_rows=len(rows) + failed.total(),
        screened_rows=len(rows),
        dropped=tuple(failed.items()),
    )
