"""The command that makes a profile folder of another simulator's tables."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.outputs import check_replaced
from apex_opt.profiles.distill.screen import screen, take
from apex_opt.profiles.folder import Table, Written, write_folder
from apex_opt.profiles.importers.apex import read_apex
from apex_opt.profiles.importers.foreign import csv_files
from apex_opt.profiles.importers.vidur import read_vidur
from apex_opt.profiles.schema import SCHEMAS, schema_of
from apex_opt.profiles.tables import in_bounds

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu
    from apex_opt.profiles.importers.foreign import Found, Part

    Columns = dict[str, NDArray[Any]]

KINDS: Final[Mapping[str, Callable[[Path, Gpu], Found]]] = {"apex": read_apex, "vidur": read_vidur}
"""Simulators whose tables can be read."""

_ABOUT: Final = {
    "gemm": "out[m,n] = in[m,k] W[n,k]^T",
    "attention_decode": "attention of one new token per sequence",
    "attention_prefill": "causal attention over whole prompts",
    "collective": "within one node; bytes are those of the whole vector",
}


def import_profile(kind: str, source: Path, gpu: Gpu, target: Path) -> Written:
    """Write `target/<accelerator>/<kind>/` from the tables of another simulator; equal input gives equal bytes.

    Parameters
    ----------
    kind : str          of `KINDS`
    source : Path       folder or file of that simulator
    gpu : Gpu           the accelerator they were measured on
    target : Path       folder of profile folders; the one written is replaced, others left alone

    Raises
    ------
    InputError, UnknownNameError    no such simulator, no or other tables, a folder that cannot be written
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of profile", kind, KINDS)
    folder = target / (gpu.profile or gpu.name) / kind
    check_replaced(folder, csv_files(source))
    found = KINDS[kind](source, gpu)
    tables = []
    for schema in SCHEMAS:
        parts = [part for part in found.parts if part.kind == schema.name]
        if parts:
            tables.append(_table(schema.name, parts, gpu))
    if empty := [table.kind for table in tables if not len(table.columns["time_us"])]:
        lost = "; ".join(f"{why}: {rows:,}" for table in tables for why, rows in table.dropped)
        if len(empty) == len(tables):
            raise InputError(f"{source}: no row can be used ({lost})")
    head = {**found.head, "derived": "screened as apex_opt/profiles/distill/screen.py states"}
    reports = write_folder(folder, "imports", head, gpu, [table for table in tables if table.kind not in empty])
    unused = tuple((name, "no row can be used") for name in empty)
    return Written(folder=folder, reports=reports, passed_over=(*found.passed_over, *unused))


def _table(kind: str, parts: Sequence[Part], gpu: Gpu) -> Table:
    """The parts of one kind as one table, screened."""
    columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
    kernel = np.concatenate([part.kernel for part in parts])
    dropped: Counter[str] = Counter()
    for part in parts:
        dropped.update(dict(part.dropped))
    source_rows = len(kernel) + dropped.total()
    good = in_bounds(schema_of(kind), columns)
    if not good.all():
        dropped["sizes or times out of bounds"] = int((~good).sum())
        columns, kernel = take(columns, good), kernel[good]
    if len(kernel):
        screened = screen(kind, columns, kernel, gpu)
        columns = screened.columns
        dropped.update(dict(screened.dropped))
    count = len(columns["time_us"])
    return Table(
        kind=kind,
        columns=columns,
        about=f"{count:,} of {source_rows:,} rows: {_ABOUT[kind]}",
        source_rows=source_rows,
        screened_rows=count,
        dropped=tuple(dropped.items()),
    )
