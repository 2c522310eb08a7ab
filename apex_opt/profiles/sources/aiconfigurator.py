"""The kernel tables of the package aiconfigurator-core (Apache-2.0), read into our columns.

The package holds `systems/data/<system>/<family>/<engine>/<version>/<table>.parquet`, one row per measured call, times
in ms. What its columns mean was settled on the figures themselves:

- MoE: with experts over several ranks a row costs the work of one rank (its time falls with the experts held), while
  `num_tokens` counts all tokens routed; so `tokens` is that, `held` the experts of one rank, `expert_ffn` its share.
- Recurrences keep their states in 32 bits: decoding reads and writes them at 85 to 90% of the bandwidth so, and at half
  of that if they were in 16. With drafts the time grows with the states written, one after each.
- Decode attention: the cache holds `step` tokens and the call adds `isl`, 1; `context` is their sum.
- Collectives: `message_size` counts elements. An int8 row costs what the 2-byte row of half its size does, and only so
  do the largest NCCL all-reduces over 8 H200 reach 460 GB/s of bus bandwidth, as published, and not half of it; the
  engines' own all-reduces fall back to NCCL at large sizes and meet its times only when read alike. Of the largest
  gathers and scatters the size is the whole vector: 337 GB/s of bus bandwidth per GPU, not eight times the link.

Source: aiconfigurator-core 0.12.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cluster.catalogue import load_cluster
from apex_opt.errors import InputError, UnknownNameError
from apex_opt.files import read_bytes
from apex_opt.profiles.distill.curves import group
from apex_opt.profiles.schema import schema_of
from apex_opt.profiles.tables import LARGEST_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu

    Columns = dict[str, NDArray[Any]]

PACKAGE: Final = "aiconfigurator_core"
VERSION: Final = "0.12.0"
WAY_OUT: Final = "pip install 'apex-opt[distill]'"

NCCL: Final = "nccl"
"""In place of an engine: the collectives that every engine may call."""

_HOPPER: Final = (("vllm", "0.24.0"), ("sglang", "0.5.14"), ("trtllm", "1.3.0rc20"), (NCCL, "2.29.2"))
RELEASES: Final = {
    "a100-sxm": (("vllm", "0.14.0"), ("sglang", "0.5.10"), ("trtllm", "1.0.0"), (NCCL, "2.27.3")),
    "l40s": (*_HOPPER[:3], (NCCL, "2.27.3")),
    "h100-sxm": _HOPPER,
    "h200-sxm": _HOPPER,
    "b200-sxm": _HOPPER,
    "gb200": _HOPPER,
    "b300-sxm": _HOPPER,
}
"""Per accelerator: the newest release of each engine whose tables are there."""

CATALOGUE: Final = {
    "a100-sxm": "a100-sxm-80gb",
    "l40s": "l40s-48gb",
    "h100-sxm": "h100-sxm-80gb",
    "h200-sxm": "h200-sxm-141gb",
    "b200-sxm": "b200-sxm-180gb",
    "gb200": "gb200-nvl72-185gb",
    "b300-sxm": "b300-sxm-288gb",
}
"""Their names in our catalogue."""

POWER_RELEASES: Final = {"b200-sxm": (("vllm", "0.22.0"),)}
"""The releases whose rows carry the board power."""

_FORMATS: Final = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "fp8": "fp8",
    "fp8_block": "fp8_block",
    "nvfp4": "nvfp4",
    "int4_wo": "w4a16",
    "w4a16_mxfp4": "mxfp4",
    "w4a8_mxfp4_mxfp8": "mxfp4_fp8",
}
_OPS: Final = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
_MOST_CELLS: Final = 50_000_000
_ELEMENT_BYTES: Final = 2
_UNGATED: Final = ("nongated",)
# What an engine replays inside a CUDA graph; TensorRT-LLM has one entry only.
_LIVE_ALL_REDUCE: Final = ("vLLM_custom_graph", "SGLang_CustomAllReduce_graph", "TRTLLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """One table as the package has it, in our columns.

    Attributes
    ----------
    columns : dict of str to array[n_rows]      as `read_table` returns them, but with keys repeated
    kernel : object[n_rows]                     the kernel that ran
    left_out : tuple of (text, count)           rows that our columns do not cover, and why
    file : str                                  where they came from, below the package's data folder
    """

    columns: Columns
    kernel: NDArray[Any]
    left_out: tuple[tuple[str, int], ...]
    file: str

    def plus(self, other: Raw) -> Raw:
        """With the rows of another file, which leaves out rows for the same reason."""
        counts = dict(self.left_out)
        for why, count in other.left_out:
            counts[why] = counts.get(why, 0) + count
        return Raw(
            columns={name: np.concatenate([values, other.columns[name]]) for name, values in self.columns.items()},
            kernel=np.concatenate([self.kernel, other.kernel]),
            left_out=tuple(counts.items()),
            file=f"{self.file} and {other.file}",
        )


def data_folder(source: Path | None = None) -> Path:
    """The data folder of the package: of the one installed, or of the one unpacked at `source`.

    Raises
    ------
    InputError      no such package, or nothing to read its files with
    """
    if find_spec("pyarrow") is None:
        raise InputError(f"the tables of {PACKAGE} need pyarrow, which is not installed; {WAY_OUT}")
    if source is not None:
        tried = (source, source / "systems" / "data", source / PACKAGE / "systems" / "data")
        for folder in tried:
            if (folder / "h100_sxm").is_dir():
                return folder
        raise InputError(f"{source}: holds no systems/data of {PACKAGE}; name the folder that the package is in")
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"the package {PACKAGE} {VERSION} is not installed; {WAY_OUT}")
    return Path(found.submodule_search_locations[0]) / "systems" / "data"


def _parquet(path: Path) -> Columns:
    """All columns of one file: numbers as float64, the rest as text."""
    from pyarrow import ArrowException, BufferReader, parquet

    data = read_bytes(path, limit=LARGEST_BYTES)
    try:
        file = parquet.ParquetFile(BufferReader(data))
        if file.metadata.num_rows * file.metadata.num_columns > _MOST_CELLS:
            raise InputError(f"{path}: more than {_MOST_CELLS:,} cells, which no table of {PACKAGE} has")
        table = file.read()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a table of {PACKAGE}: {str(error).splitlines()[0][:120]}") from None
    columns: Columns = {}
    for name in table.column_names:
        values = table.column(name).to_numpy()
        columns[name] = values.astype(object) if values.dtype.kind in "OUST" else values.astype(np.float64)
    return columns


def _renamed(values: NDArray[Any], names: dict[str, str]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Our names for theirs, and where there is one."""
    distinct, codes = np.unique(values.astype(str), return_inverse=True)
    ours = np.array([names.get(name, "") for name in distinct.tolist()], dtype=object)[codes.ravel()]
    return ours, ours != ""


def _results(rows: Columns) -> Columns:
    """Times, and energies where the board's power was sampled."""
    time_us = rows["latency"] * 1e3
    power = rows.get("power")
    energy = np.full(len(time_us), np.nan) if power is None else power * time_us
    return {"time_us": time_us, "energy_uj": energy}


def _gemm(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    dtype, known = _renamed(rows["gemm_dtype"], _FORMATS)
    return {"dtype": dtype, "m": rows["m"], "n": rows["n"], "k": rows["k"]}, known, "formats not modelled"


def _moe(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    dtype, known = _renamed(rows["moe_dtype"], _FORMATS)
    kernel = rows["kernel_source"].astype(str)
    for mark in _UNGATED:
        known = known & (np.char.find(kernel, mark) < 0)
    columns = {
        "dtype": dtype,
        "tokens": rows["num_tokens"],
        "hidden": rows["hidden_size"],
        "expert_ffn": rows["inter_size"] / rows["moe_tp_size"],
        "experts": rows["num_experts"],
        "topk": rows["topk"],
        "held": rows["num_experts"] / rows["moe_ep_size"],
        "routing": rows["distribution"],
    }
    whole = (columns["expert_ffn"] % 1 == 0) & (columns["held"] % 1 == 0)
    return columns, known & whole, "formats not modelled, experts without a gate or in fractions"


def _attention(rows: Columns) -> Columns:
    dtype, _ = _renamed(rows["kv_cache_dtype"], _FORMATS)
    window = rows.get("window_size", np.zeros(len(dtype)))
    return {
        "dtype": dtype,
        "heads": rows["num_heads"],
        "kv_heads": rows["num_key_value_heads"],
        "head_dim": rows["head_dim"],
        "window": window,
        "batch": rows["batch_size"],
    }


def _half(rows: Columns, name: str, shape: tuple[str, ...]) -> tuple[NDArray[np.bool_], str]:
    """Rows computed in 16 bits; of a shape without any, those computed in fp8.

    Arithmetic in 16 bits, whatever the format of the cache, is what an engine does unless told otherwise.
    """
    good = rows[name] == "bfloat16"
    owner = group([rows[column] for column in shape if column in rows])
    served = np.zeros(owner.max() + 1, dtype=bool)
    served[owner[good]] = True
    return good | ~served[owner], "attention computed in fp8"


_HEADS: Final = ("kv_cache_dtype", "num_heads", "num_key_value_heads", "head_dim", "window_size")
_LATENT: Final = ("kv_cache_dtype", "gemm_type", "num_heads")


def _attention_decode(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    return {**_attention(rows), "context": rows["step"] + rows["isl"]}, *_half(rows, "attn_dtype", _HEADS)


def _attention_prefill(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    good, why = _half(rows, "attn_dtype", _HEADS)
    return {**_attention(rows), "length": rows["isl"]}, good & (rows["step"] == 0), why


def _mla(rows: Columns) -> Columns:
    columns = {"dtype": _renamed(rows["kv_cache_dtype"], _FORMATS)[0]}
    if "gemm_type" in rows:
        columns["weights"] = _renamed(rows["gemm_type"], _FORMATS)[0]
    return {**columns, "heads": rows["num_heads"], "batch": rows["batch_size"]}


def _mla_decode(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    return {**_mla(rows), "context": rows["step"] + rows["isl"]}, *_half(rows, "mla_dtype", _LATENT)


def _mla_prefill(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    good, why = _half(rows, "mla_dtype", _LATENT)
    return {**_mla(rows), "length": rows["isl"]}, good & (rows["step"] == 0), why


def _state(rows: Columns) -> Columns:
    """What keeps a state: recurrences, and convolutions of all that goes into them, over the heads of one rank."""
    convolves = np.char.startswith(rows["kernel_source"].astype(str), "causal_conv1d")
    if "n_groups" in rows:
        heads, key, value, key_heads = (rows[name] for name in ("nheads", "d_state", "head_dim", "n_groups"))
        kind = "mamba2"
    else:
        heads, key, value, key_heads = (
            rows[name] for name in ("num_v_heads", "head_k_dim", "head_v_dim", "num_k_heads")
        )
        kind = "kda" if (rows["op_name"] == "kda").all() else "gated_delta"
    one = np.ones(len(heads))
    return {
        "op": np.where(convolves, "convolution", kind).astype(object),
        "heads": np.where(convolves, 2 * key_heads * key + heads * value, heads),
        "key": np.where(convolves, rows["d_conv"], key),
        "value": np.where(convolves, one, value),
        "key_heads": np.where(convolves, one, key_heads),
    }


def _state_decode(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    return {**_state(rows), "batch": rows["batch_size"]}, rows["phase"] == "generation", "prompts and drafts"


def _state_prefill(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    good = (rows["phase"] == "context") & (rows["batch_size"] == 1)
    return {**_state(rows), "length": rows["seq_len"]}, good, "decoding, drafts and several prompts"


def _encoder(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    columns = {"heads": rows["num_heads"], "head_dim": rows["head_dim"], "length": rows["isl"]}
    return columns, (rows["attn_dtype"] == "bfloat16") & (rows["batch_size"] == 1), "several inputs"


def _sparse(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    op, heads, width = _OF_SPARSE[str(rows["op_name"][0])]
    ours = np.ones(len(rows["isl"]))
    columns = {
        "op": np.full(len(ours), op, dtype=object),
        "heads": heads * ours,
        "width": width * ours,
        "length": rows["isl"],
        "context": rows["step"] + rows["isl"],
    }
    return columns, rows["batch_size"] == 1, "several prompts, contexts that are chosen whole"


def _nccl(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    op, known = _renamed(rows["op_name"], _OPS)
    columns = {"op": op, "ranks": rows["num_gpus"], "bytes": rows["message_size"] * _ELEMENT_BYTES}
    return columns, known & (rows["nccl_dtype"] == "half"), "int8 elements (the same times, by bytes)"


def _all_reduce(rows: Columns) -> tuple[Columns, NDArray[np.bool_], str]:
    op = np.full(len(rows["num_gpus"]), "custom_all_reduce", dtype=object)
    columns = {"op": op, "ranks": rows["num_gpus"], "bytes": rows["message_size"] * _ELEMENT_BYTES}
    return columns, np.isin(rows["kernel_source"], _LIVE_ALL_REDUCE), "calls outside a CUDA graph"


_TABLES: Final[dict[str, tuple[str, str, Any]]] = {
    "gemm": ("gemm", "gemm_perf", _gemm),
    "moe": ("moe", "moe_perf", _moe),
    "attention_decode": ("attention", "generation_attention_perf", _attention_decode),
    "attention_prefill": ("attention", "context_attention_perf", _attention_prefill),
    "mla_decode": ("mla", "mla_generation_module_perf", _mla_decode),
    "mla_prefill": ("mla", "mla_context_module_perf", _mla_prefill),
    "mla_kernel_decode": ("mla", "generation_mla_perf", _mla_decode),
    "mla_kernel_prefill": ("mla", "context_mla_perf", _mla_prefill),
    "attention_encoder": ("encoder_attention", "encoder_attention_perf", _encoder),
}
_OF_SPARSE: Final = {
    "glm5_mqa_logits_module": ("scores", 32, 128),
    "glm5_topk_module": ("choice", 32, 128),
    "glm5_dsa_attn_module": ("attention", 64, 576 + 512),
}
"""Kernels of GLM-5, one file each: ours, the heads that compute and their width.

Files have the heads of attention in all of them; those of the indexer and widths are `index_n_heads`, `index_head_dim`,
and a latent vector with its rotary key (576) and without (512), as the kernel computes with.
"""
_OF_STATES: Final = (("linear_attention", "gdn_perf"), ("linear_attention", "mamba2_perf"), ("kda", "kda_perf"))
"""Families and files of what keeps a state, which are one table of ours."""


def _files(data: Path, gpu: str, engine: str, version: str) -> list[tuple[str, Path, Any]]:
    """Per table kind: the file and the reader of its rows."""
    system = data / gpu.replace("-", "_")
    if engine == NCCL:
        return [("collective", system / "comm" / NCCL / version / "nccl_perf.parquet", _nccl)]
    found = [
        (kind, system / family / engine / version / f"{stem}.parquet", reader)
        for kind, (family, stem, reader) in _TABLES.items()
    ]
    for kind, reader in (("state_decode", _state_decode), ("state_prefill", _state_prefill)):
        found += [(kind, _newest(system / family / engine, version, stem), reader) for family, stem in _OF_STATES]
    sparse = system / "sparse_attention" / engine
    found += [("sparse", _newest(sparse, version, f"{stem}_perf"), _sparse) for stem in _OF_SPARSE]
    return [*found, ("collective", _newest(system / "comm" / engine, version, "custom_allreduce_perf"), _all_reduce)]


def _newest(folder: Path, version: str, stem: str) -> Path:
    """A file of a release, or of the newest that measured it, as not every release did."""
    path = folder / version / f"{stem}.parquet"
    if path.is_file():
        return path
    others = sorted(folder.glob(f"*/{stem}.parquet"), key=_release)
    return others[-1] if others else path


def _release(path: Path) -> tuple[int, ...]:
    """The numbers of a release, to sort by."""
    return tuple(int(part) for part in path.parent.name.split(".") if part.isdigit())


def raw_tables(
    gpu: str, engine: str, version: str, source: Path | None = None, kinds: tuple[str, ...] = ()
) -> dict[str, Raw]:
    """The tables of one engine on one accelerator, as the package has them.

    Parameters
    ----------
    gpu, engine, version : str      as in `RELEASES`; `NCCL` is an engine here
    source : Path                   where the package is unpacked; by default the one installed
    kinds : tuple of str            kinds of table, by default all

    Raises
    ------
    InputError, UnknownNameError    no package, no such accelerator or release, unreadable file
    """
    if gpu not in RELEASES:
        raise UnknownNameError(f"accelerator with tables in {PACKAGE}", gpu, RELEASES)
    data = data_folder(source)
    tables: dict[str, Raw] = {}
    for kind, path, reader in _files(data, gpu, engine, version):
        if not path.is_file() or (kinds and kind not in kinds):
            continue
        rows = _parquet(path)
        try:
            columns, keep, why = reader(rows)
            columns |= _results(rows)
            kernel = rows["kernel_source"]
        except KeyError as error:
            raise InputError(
                f"{path}: column {error} is missing; {PACKAGE} {VERSION} is the release read here"
            ) from None
        order = schema_of(kind).columns
        good = keep & np.isfinite(columns["time_us"]) & (columns["time_us"] > 0)
        if good.any():
            found = Raw(
                columns={column.name: columns[column.name][good] for column in order},
                kernel=kernel[good],
                left_out=((why, int((~good).sum())),) if not good.all() else (),
                file=path.relative_to(data).as_posix(),
            )
            tables[kind] = tables[kind].plus(found) if kind in tables else found
    if not tables:
        raise InputError(f"{data}: no tables of {engine} {version} on {gpu}")
    return tables


def listed_gpu(gpu: str) -> Gpu:
    """The accelerator as our catalogue has it."""
    return load_cluster(CATALOGUE[gpu]).gpu


def distilled_from(gpu: str, folder: str) -> str | None:
    """The engine (or `NCCL`) whose times a shipped profile folder was distilled from, None where there is none."""
    return next((engine for engine, version in RELEASES.get(gpu, ()) if folder == f"{engine}-{version}"), None)


def full_tables(gpu: str, engine: str, source: Path | None = None, kinds: tuple[str, ...] = ()) -> dict[str, Columns]:
    """The screened tables of one engine on one accelerator, none of their points left out.

    Parameters
    ----------
    gpu, engine : str       as in `RELEASES`; `NCCL` is an engine here
    source : Path           where the package is unpacked; by default the one installed
    kinds : tuple of str    kinds of table, by default all

    Returns
    -------
    dict of str to columns      per kind of table, as `read_table` returns them

    Raises
    ------
    InputError, UnknownNameError    no package, or no such accelerator or engine in it
    """
    from apex_opt.profiles.distill.screen import screen

    if gpu not in RELEASES:
        raise UnknownNameError(f"accelerator with tables in {PACKAGE}", gpu, RELEASES)
    releases = dict(RELEASES[gpu])
    if engine not in releases:
        raise UnknownNameError(f"engine with tables in {PACKAGE} on {gpu}", engine, releases)
    tables: dict[str, Columns] = {}
    for kind, raw in raw_tables(gpu, engine, releases[engine], source, kinds).items():
        columns = screen(kind, raw.columns, raw.kernel, listed_gpu(gpu)).columns
        if len(columns["time_us"]):
            tables[kind] = columns
    return tables
