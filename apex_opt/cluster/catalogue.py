"""Clusters by name (`4x8xh200-sxm`) or from a TOML file.

The built-in catalogue is a folder of such files, each one node of one accelerator, so a new accelerator needs a file
and no code.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

from apex_opt.cluster.toml_reader import TomlTable, read_toml, shown
from apex_opt.cluster.types import DTYPES, LINK_KINDS, MAX_GPUS, Cluster, Gpu, Link
from apex_opt.errors import InputError, UnknownNameError, UsageError, join_faults
from apex_opt.units import GB, GIB, MIB, TERA, ceil_div

_FOLDER: Final = Path(__file__).with_name("catalogue")
_FORM: Final = "GPU, COUNTxGPU, NODESxCOUNTxGPU (such as 4x8xh200-sxm) or the path of a .toml file"
_SPEC: Final = re.compile(r"(?:([^a-z]*)x)?(?:([^a-z]*)x)?([a-z][a-z0-9._-]*)")
_FOLDER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")

# Idle draw where none is given: the share of the limit measured on the H200 (125 of 700 W).
_IDLE_SHARE: Final = 125 / 700


def list_gpus() -> tuple[str, ...]:
    """Names of the accelerators in the catalogue, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def list_clusters() -> tuple[str, ...]:
    """Specs of common clusters, for help texts: one GPU, one full node and four nodes of every accelerator."""
    specs: list[str] = []
    for name in list_gpus():
        per_node = _catalogued(name).gpus_per_node
        specs += [name, f"{per_node}x{name}", f"4x{per_node}x{name}"]
    return tuple(specs)


def load_cluster(spec: str) -> Cluster:
    """The cluster that a spec names.

    Parameters
    ----------
    spec : str
        `h200-sxm` (one GPU), `8xh100-sxm` (one node), `4x8xh200-sxm` (nodes x GPUs of a node), or the path of a TOML
        file. Accelerators go by their catalogue name or any beginning of it that fits one only.

    Raises
    ------
    UsageError          a spec of another form, a count out of range, more GPUs than a node of that accelerator holds
    UnknownNameError    an accelerator that is not in the catalogue
    InputError          a cluster file with faults, all of them in one line

    Source
    ------
    figures and their origin: `catalogue/*.toml`
    """
    if not isinstance(spec, str) or not spec.strip():
        raise UsageError(f"cluster: expected {_FORM}, got {shown(spec)}")
    text = spec.strip()
    if text.lower().endswith(".toml") or "/" in text or "\\" in text:
        return _from_file(Path(text))
    match = _SPEC.fullmatch(text.lower())
    if not match:
        raise UsageError(f"cluster {shown(spec)}: expected {_FORM}")
    counts = [_count(spec, part) for part in match.groups()[:2] if part is not None]
    base = _catalogued(_gpu_name(match[3]))
    gpus = counts[-1] if counts else 1
    nodes = counts[0] if len(counts) == 2 else 1
    if gpus > base.gpus_per_node:
        whole = min(ceil_div(nodes * gpus, base.gpus_per_node), MAX_GPUS // base.gpus_per_node)
        raise UsageError(
            f"cluster {shown(spec)}: one node of {base.gpu.name} holds {base.gpus_per_node} GPUs, asked for {gpus}; "
            f"write {whole}x{base.gpus_per_node}x{match[3]}, or describe such a node in a TOML file"
        )
    return replace(base, name=text.lower(), nodes=nodes, gpus_per_node=gpus)


def is_catalogued(cluster: Cluster) -> bool:
    """Whether the cluster's nodes are wired as those of the catalogue with the same accelerator."""
    if cluster.gpu.name not in list_gpus():
        return False
    known = _catalogued(cluster.gpu.name)
    return cluster.intra == known.intra and cluster.gpus_per_node <= known.gpus_per_node


def _count(spec: str, text: str) -> int:
    """A count in a spec, 1..MAX_GPUS."""
    if re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= MAX_GPUS:
        return int(text)
    raise UsageError(f"cluster {shown(spec)}: {shown(text)} must be a whole number from 1 to {MAX_GPUS}")


def _gpu_name(text: str) -> str:
    """The catalogue name that starts with the text."""
    names = list_gpus()
    near = [name for name in names if name.startswith(text.lower())]
    if len(near) > 1 and text.lower() not in near:
        raise UsageError(f"GPU {text!r} fits {', '.join(near)}: write one of these")
    if not near:
        raise UnknownNameError("GPU", text, names, "or describe it in a cluster TOML file")
    return text.lower() if text.lower() in near else near[0]


@lru_cache(maxsize=64)
def _catalogued(name: str) -> Cluster:
    """One node of a catalogue accelerator."""
    return _from_file(_FOLDER / f"{name}.toml")


def _from_file(path: Path) -> Cluster:
    """The cluster a TOML file describes."""
    root = TomlTable(read_toml(path, "cluster file"), "", faults := [])
    name = root.text("name", required=False) or path.stem
    nodes = root.integer("nodes", high=MAX_GPUS)
    gpus_per_node = root.integer("gpus_per_node", high=MAX_GPUS)
    base: Cluster | None = None
    gpu: Gpu | None = None
    named = isinstance(root.raw("gpu"), str)
    if named:
        try:
            base = _catalogued(_gpu_name(root.raw("gpu")))
            gpu = base.gpu
        except (UnknownNameError, UsageError) as error:
            faults.append(f"gpu: {error}")
    elif (table := root.table("gpu")) is not None:
        gpu = _read_gpu(table, path)
    intra, inter = (_read_link(root.table(level, required=False), path) for level in ("intra", "inter"))
    if gpus_per_node and not root.has("intra"):
        if base and gpus_per_node > base.gpus_per_node:
            faults.append(
                f"gpus_per_node = {gpus_per_node}, but one node of {base.gpu.name} holds {base.gpus_per_node}; "
                "describe the wiring of this node in [intra]"
            )
        elif gpus_per_node > 1 and not named:
            faults.append("intra is missing: a node of several GPUs needs the link between them")
    if nodes and nodes > 1 and not root.has("inter") and not named:
        faults.append("inter is missing: several nodes need the link between them")
    root.close()
    if gpu and nodes and gpus_per_node and not faults:
        lone = Link(bytes_per_s=gpu.memory_bytes_per_s, latency_s=0.0, kind="pcie", source="a single GPU uses no link")
        try:
            return Cluster(
                name=name,
                gpu=gpu,
                nodes=nodes,
                gpus_per_node=gpus_per_node,
                intra=intra or (base.intra if base else lone),
                inter=inter or (base.inter if base else None),
            )
        except InputError as error:
            faults.append(str(error))
    raise join_faults(f"cluster file {path}", faults)


def _read_gpu(table: TomlTable, path: Path) -> Gpu | None:
    """An accelerator described in a file, or None after noting its faults."""
    before = len(table.faults)
    name = table.text("name")
    in_mib = table.has("memory_mib")
    memory = table.number("memory_mib" if in_mib else "memory_gib", high=1e9 if in_mib else 1e6)
    if in_mib and table.has("memory_gib"):
        table.faults.append("gpu.memory_mib and gpu.memory_gib are both given: keep one")
    gb_per_s = table.number("memory_gb_per_s", high=1e6)
    tdp_w = table.number("tdp_w", high=1e5)
    idle_w = table.number("idle_w", high=1e5, required=False)
    clock_mhz = table.number("clock_mhz", high=1e5, required=False)
    overlapped_launch = table.switch("overlapped_launch", required=False)
    price_per_h = table.number("price_per_h", high=1e6, required=False)
    flops: list[tuple[str, float]] = []
    if (peaks := table.table("tflops")) is not None:
        for dtype in DTYPES:
            if (tflops := peaks.number(dtype, high=1e6, required=False)) is not None:
                flops.append((dtype, tflops * TERA))
        peaks.close()
    profile = table.text("profile", required=False)
    if profile is not None and not _FOLDER_NAME.fullmatch(profile):
        table.faults.append(f"gpu.profile = {profile!r} must be the name of a folder in profiles/")
    source = table.text("source", required=False) or f"stated in {path.name}"
    figures = ["memory_mib" if in_mib else "memory_gib", "memory_gb_per_s", "tflops", "tdp_w", "idle_w"]
    figures += ["clock_mhz"] * (clock_mhz is not None) + ["overlapped_launch"] * (overlapped_launch is not None)
    figures += ["price_per_h"] * (price_per_h is not None)
    sources = dict.fromkeys(figures, source)
    if idle_w is None:
        sources["idle_w"] = "assumed: the share of the power limit measured on the H200 (125 of 700 W)"
    if (given := table.table("sources", required=False)) is not None:
        for figure in figures:
            if (text := given.text(figure, required=False)) is not None:
                sources[figure] = text
        given.close()
    table.close()
    if len(table.faults) > before or not (name and memory and gb_per_s and tdp_w):
        return None
    try:
        return Gpu(
            name=name,
            memory_bytes=int(memory * (MIB if in_mib else GIB)),
            memory_bytes_per_s=gb_per_s * GB,
            flops_per_s=tuple(flops),
            tdp_w=tdp_w,
            idle_w=tdp_w * _IDLE_SHARE if idle_w is None else idle_w,
            clock_mhz=clock_mhz,
            overlapped_launch=bool(overlapped_launch),
            price_per_h=price_per_h,
            profile=profile,
            sources=tuple(sources.items()),
        )
    except InputError as error:
        table.faults.append(str(error))
        return None


def _read_link(table: TomlTable | None, path: Path) -> Link | None:
    """A link described in a file, or None where there is none or it has faults."""
    if table is None:
        return None
    gb_per_s = table.number("gb_per_s", high=1e6)
    latency_us = table.number("latency_us", low=-1e-9, high=1e6)
    kind = table.text("kind", choices=LINK_KINDS)
    source = table.text("source", required=False) or f"stated in {path.name}"
    table.close()
    if gb_per_s is None or latency_us is None or kind is None:
        return None
    return Link(bytes_per_s=gb_per_s * GB, latency_s=max(latency_us, 0.0) / 1e6, kind=kind, source=source)
