"""From a path to measured runs: every file is recognised by what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from apex_opt.errors import InputError
from apex_opt.files import absence, check_regular, files_below, there
from apex_opt.measured import apex, clients, handed, silicon, vllm_runs
from apex_opt.measured.files import read_header, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from apex_opt.measured.clients import Deployed
    from apex_opt.measured.runs import Run

READERS: Final[Mapping[str, Callable[[Path], list[Run]]]] = MappingProxyType(
    {
        vllm_runs.KIND: vllm_runs.read_vllm_runs,
        apex.KIND: apex.read_apex,
        silicon.KIND: silicon.read_silicon,
        handed.KIND: handed.read_pools,
    }
)
"""Reader of each layout."""

_COLUMNS: Final = {silicon.KIND: silicon.NEEDED, apex.KIND: apex.NEEDED, handed.KIND: handed.NEEDED}
_LAYOUTS: Final = (
    "a .json or .json.gz with 'engine' and 'runs'; a .csv with "
    f"{', '.join(silicon.NEEDED[-2:])}; a .csv with {', '.join(apex.NEEDED[-2:])}; a .csv with "
    f"{', '.join(handed.NEEDED[-2:])}; or what a benchmark client saved"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """Every run found, and the files that hold none."""

    runs: tuple[Run, ...]
    files: tuple[str, ...]
    passed_over: tuple[str, ...]


SHIPPED: Final = Path(__file__).parent / "data" / "runs"
"""Runs of vLLM on one H200 that come with the package, without the engine's log."""


def read_measured(path: Path, deployed: Deployed | None = None) -> Measurements:
    """Every run of a file, or of all files in a folder and below it, in order of their names.

    Files of a folder that have none of the known layouts are passed over and named; a file asked for must have one.

    Parameters
    ----------
    path : Path
    deployed : Deployed or None    what ran while clients measured, which their files do not say

    Raises
    ------
    InputError    no such path, no run in it, or a file of a known layout with faults: the first, in one line
    """
    if not there(path):
        fault = absence(path, "no such file or folder")
        raise InputError(f"{path}: {fault}; docs/validation.md names what measured runs look like")
    single = not path.is_dir()
    if single:
        check_regular(path, want="name a file of measured runs or its folder")
    files = [path] if single else files_below(path)
    runs: list[Run] = []
    read: list[str] = []
    passed: list[str] = []
    for file in files:
        kind = _kind(file)
        if kind is None and single:
            raise InputError(f"{file}: not a known layout of measured runs; expected {_LAYOUTS}")
        if kind is None:
            passed.append(str(file))
        else:
            read.append(str(file))
            if kind != clients.KIND:
                runs += READERS[kind](file)
            elif deployed is None:
                raise InputError(
                    f"{file}: the result of a benchmark does not say what ran; give --plan, --model, --cluster and "
                    "--engine"
                )
            else:
                runs += clients.read_clients(file, deployed)
    if not runs:
        raise InputError(f"{path}: holds no measured runs; expected {_LAYOUTS}")
    return Measurements(runs=tuple(runs), files=tuple(read), passed_over=tuple(passed))


def _kind(path: Path) -> str | None:
    """The layout of a file, by its columns or its top-level keys."""
    name = path.name.lower()
    if name.endswith(".csv"):
        header = read_header(path)
        for kind, columns in _COLUMNS.items():
            # Half of them: a file that lacks some is one with faults, not one of another layout.
            if 2 * len(set(columns) & set(header)) >= len(columns):
                return kind
    elif name.endswith((".jsonl", ".jsonl.gz")):
        return clients.KIND if clients.results_of(path) else None
    elif name.endswith((".json", ".json.gz")):
        if clients.results_of(path):
            return clients.KIND
        if vllm_runs.recognised(read_json(path)):
            return vllm_runs.KIND
    return None
