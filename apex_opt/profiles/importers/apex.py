"""Profile tables of APEX+ (MIT), read into our columns.

`profile/comp/<gpu>/gemm_<clock>.csv`   gpu, dtype, m, k, n, time(us): x[m,k] y[k,n], where m counts output features
                                        and n tokens; host clock over 100 calls, so launches are in it
`profile/comp/<gpu>/mha_<clock>.csv`    gpu, dtype, num_heads, head_size, batch_size, seq_len, time(us): causal
                                        attention over whole prompts, as many KV heads as query heads; kernel time
`profile/comm/<gpu>/<collective>.csv`   gpu, num_nodes, num_gpus_per_node, dtype, size(kb), time(us): size is the whole
                                        vector in KiB: input of reductions and of an all-to-all, output of a gather

Clocks are MHz, 0 the default. Times are cut to whole microseconds, sizes to whole KiB. Energies are not taken: they are
time times a mean power whose samples lie 50 ms apart and mostly outside the work.

Source: github.com/microsoft/apex_plus, profile/scripts/{gemm,mha,comm}.py, apex_plus/simulator/{comp,comm}_profile.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cluster import is_named
from apex_opt.errors import InputError
from apex_opt.profiles.importers.foreign import Found, Part, csv_files, part, read_columns
from apex_opt.units import KIB

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu

    Columns = dict[str, NDArray[Any]]

_FORMATS: Final = {"half": "fp16", "float8": "fp8"}
_OPS: Final = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "alltoall": "all_to_all",
    "reduce_scatter": "reduce_scatter",
}
_UNUSED: Final = {"bimha": "attention without a causal mask", "sendrecv": "point to point, for which we have no table"}
_NAME: Final = re.compile(rf"(gemm|mha|{'|'.join((*_OPS, *_UNUSED))})(?:_(\d+))?")
_FORMAT_LOST: Final = "formats not modelled"


def read_apex(source: Path, gpu: Gpu) -> Found:
    """The tables of one accelerator.

    Parameters
    ----------
    source : Path       the repository, or any folder or file of its `profile`; files below it lie in folders named
                        after accelerators, of which the one named as in our catalogue is read

    Raises
    ------
    InputError      no tables, none of the accelerator, columns missing
    """
    matches = [(path, match) for path in csv_files(source) if (match := _NAME.fullmatch(path.stem))]
    if not matches:
        raise InputError(f"{source}: holds no tables of APEX+ (gemm_*.csv, mha_*.csv, all_reduce.csv ...)")
    mine = [
        (path, match)
        for path, match in matches
        if path.parent.name.lower() == gpu.name or source in (path, path.parent)
    ]
    if not mine:
        there = ", ".join(sorted({path.parent.name for path, _ in matches}))
        raise InputError(f"{source}: has tables of {there}, none of {gpu.name}; name the folder with its tables")
    parts: list[Part] = []
    passed_over: list[tuple[str, str]] = []
    clocks: dict[str, int] = {}
    for kind in ("gemm", "mha"):
        speeds = [int(match[2] or 0) for _, match in mine if match[1] == kind]
        if speeds:
            clocks[kind] = 0 if 0 in speeds else max(speeds)
    for path, match in mine:
        kind, clock = match[1], int(match[2] or 0)
        if kind in _UNUSED:
            passed_over.append((path.name, _UNUSED[kind]))
        elif kind in clocks and clock != clocks[kind]:
            passed_over.append((path.name, f"another clock than the {_clock(clocks[kind])} taken"))
        elif kind == "gemm":
            parts.append(_gemm(path, gpu))
        elif kind == "mha":
            parts.append(_mha(path, gpu))
        else:
            parts.append(_collective(path, gpu, _OPS[kind]))
    if not parts:
        raise InputError(f"{source}: {'; '.join(f'{name}: {why}' for name, why in passed_over)}; nothing to import")
    speed = ", ".join(f"{kind} at {_clock(clock)}" for kind, clock in clocks.items())
    return Found(
        parts=tuple(parts),
        passed_over=tuple(passed_over),
        head={
            "hardware": f"{gpu.name}{': ' if speed else ''}{speed}",
            "software": "torch.matmul (cuBLAS), CUTLASS attention of xformers, NCCL as called by CuPy",
            "method": "host clock over 100 products or 10 to 8,192 collectives, launches included; "
            "attention by the kernel time of one call; all cut to whole microseconds",
            "origin": "github.com/microsoft/apex_plus, profile/",
            "licence": "MIT",
            "not_measured": "decode attention, experts, memory-bound kernels; energy (its samples are coarser than "
            "the work)",
        },
    )


def _clock(clock: int) -> str:
    return f"{clock} MHz" if clock else "default clock"


def _rows(
    path: Path, gpu: Gpu, numbers: tuple[str, ...], clock: str
) -> tuple[Columns, NDArray[Any], list[tuple[str, NDArray[Any]]]]:
    """Columns of a file, our names of its formats, and the rows at another clock than the default one or the highest.

    Raises
    ------
    InputError      not such a table, or one of another accelerator
    """
    rows = read_columns(path, "APEX+", (*numbers, "time(us)"), ("gpu", "dtype"), (clock,))
    for name in sorted(set(rows["gpu"].tolist())):
        if not is_named(gpu, name):
            raise InputError(f"{path}: measured on {name[:40]!r}, not on {gpu.name}")
    formats = np.array([_FORMATS.get(name, "") for name in rows["dtype"].tolist()], dtype=object)
    speeds = np.nan_to_num(rows.get(clock, np.zeros(len(formats))))
    other = speeds != (0 if (speeds == 0).any() else speeds.max())
    return rows, formats, [("another clock", other)]


def _results(rows: Columns) -> Columns:
    return {"time_us": rows["time(us)"], "energy_uj": np.full(len(rows["time(us)"]), np.nan)}


def _gemm(path: Path, gpu: Gpu) -> Part:
    """Products; their m counts our n."""
    rows, formats, losses = _rows(path, gpu, ("m", "k", "n"), "graph_clk_freq")
    columns = {"dtype": formats, "m": rows["n"], "n": rows["m"], "k": rows["k"], **_results(rows)}
    return part("gemm", columns, "torch.matmul", [(_FORMAT_LOST, formats == ""), *losses])


def _mha(path: Path, gpu: Gpu) -> Part:
    """Causal attention over whole prompts."""
    names = ("num_heads", "head_size", "batch_size", "seq_len")
    rows, formats, losses = _rows(path, gpu, names, "graph_clk_freq")
    columns = {
        "dtype": formats,
        "heads": rows["num_heads"],
        "kv_heads": rows["num_heads"],
        "head_dim": rows["head_size"],
        "window": np.zeros(len(formats)),
        "batch": rows["batch_size"],
        "length": rows["seq_len"],
        **_results(rows),
    }
    return part("attention_prefill", columns, "xformers cutlass", [(_FORMAT_LOST, formats == ""), *losses])


def _collective(path: Path, gpu: Gpu, op: str) -> Part:
    """Collectives within one node."""
    rows, _, losses = _rows(path, gpu, ("num_nodes", "num_gpus_per_node", "size(kb)"), "gpu_freq")
    kib = rows["size(kb)"]
    columns = {
        "op": np.full(len(kib), op, dtype=object),
        "ranks": rows["num_gpus_per_node"],
        "bytes": kib * KIB,
        **_results(rows),
    }
    lost = [
        ("elements of 4 bytes (the same times, by bytes)", rows["dtype"] != "half"),
        ("several nodes", rows["num_nodes"] != 1),
        ("one GPU", rows["num_gpus_per_node"] == 1),
        ("sizes below 1 KiB, which are given as 0", kib == 0),
    ]
    return part("collective", columns, "NCCL", [*lost, *losses])
