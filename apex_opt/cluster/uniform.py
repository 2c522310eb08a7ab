"""Accelerators of the built-in catalogue, and cluster files of identical nodes.

The catalogue is a folder of such files, each one node of one accelerator, so a new accelerator needs a file and no
code.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from apex_opt.cluster.toml_reader import TomlTable, read_toml
from apex_opt.cluster.types import DTYPES, LINK_KINDS, MAX_GPUS, REFERENCE, Cluster, Gpu, Link
from apex_opt.errors import InputError, UnknownNameError, UsageError, join_faults
from apex_opt.units import GB, GIB, MIB, TERA

_FOLDER: Final = Path(__file__).with_name("catalogue")
_FOLDER_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")

# Idle draw where none is given: the share of the limit measured on the H200 (125 of 700 W).
_IDLE_SHARE: Final = 125 / 700

FIGURES: Final = (
    "memory_mib",
    "memory_gib",
    "memory_gb_per_s",
    "tflops",
    "tdp_w",
    "idle_w",
    "clock_mhz",
    "multiprocessors",
    "overlapped_launch",
    "capability",
    "like",
    "price_per_h",
)
"""Fields of a [gpu] that have a source each."""

_VARIANT: Final = re.compile(r"(-(sxm|pcie|nvl\d*|\d+gb))+$")
"""What follows the name of an accelerator in that of a variant of it."""

# What an accelerator and a link can be: from those of a decade ago, or of a laptop, to ten times what is announced. A
# figure beyond is one in another unit.
MEMORY_MIB: Final = (1024.0, 4096.0 * 1024)
MEMORY_GB_PER_S: Final = (10.0, 100_000.0)
TFLOPS: Final = (0.1, 1_000_000.0)
WATTS: Final = (10.0, 20_000.0)
LINK_GB_PER_S: Final = (0.01, 100_000.0)
LATENCY_US: Final = (0.0, 100_000.0)


def list_gpus() -> tuple[str, ...]:
    """Names of the accelerators in the catalogue, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def gpu_name(text: str) -> str:
    """The catalogue name that a text is, whole or up to a `-`: `h20` is no `h200-sxm-141gb`.

    Of several variants of one accelerator it is the SXM one with the most memory, without one that with the most.

    Raises
    ------
    UsageError          a text that fits different accelerators
    UnknownNameError    one that fits none
    """
    names, asked = list_gpus(), text.lower()
    near = [name for name in names if name == asked or name.startswith(f"{asked}-")]
    if not near:
        raise UnknownNameError("GPU", text, names_like(text), "or describe it in a cluster TOML file")
    if len({_VARIANT.sub("", name) for name in near}) > 1:
        raise UsageError(f"GPU {text!r} fits {', '.join(near)}: write one of these")
    return max(near, key=lambda name: (name == asked, "-sxm-" in name, catalogued(name).gpu.memory_bytes))


def names_like(text: str) -> tuple[str, ...]:
    """What to offer for a text that names no accelerator: whole names, for a bare one names without their variants."""
    return list_gpus() if "-" in text else tuple(sorted({_VARIANT.sub("", name) for name in list_gpus()}))


def is_named(gpu: Gpu, text: str) -> bool:
    """Whether an accelerator is the one that a text names: one of the catalogue as `gpu_name` has it."""
    if not f"{gpu.name}-".startswith(f"{text.lower()}-"):
        return False
    return gpu.name not in list_gpus() or gpu_name(text) == gpu.name


@lru_cache(maxsize=64)
def catalogued(name: str) -> Cluster:
    """One node of a catalogue accelerator."""
    path = _FOLDER / f"{name}.toml"
    return uniform_cluster(path, read_toml(path, "cluster file"))


def uniform_cluster(path: Path, fields: dict[str, Any]) -> Cluster:
    """The cluster that a file of identical nodes describes, from what was read of it.

    Raises
    ------
    InputError      faults, all of them in one line
    """
    root = TomlTable(fields, "", faults := [])
    name = root.text("name", required=False) or path.stem
    nodes = root.integer("nodes", high=MAX_GPUS)
    gpus_per_node = root.integer("gpus_per_node", high=MAX_GPUS)
    base: Cluster | None = None
    gpu: Gpu | None = None
    named = isinstance(root.raw("gpu"), str)
    if named:
        try:
            base = catalogued(gpu_name(root.raw("gpu")))
            gpu = base.gpu
        except (UnknownNameError, UsageError) as error:
            faults.append(f"gpu: {error}")
    elif (table := root.table("gpu")) is not None:
        gpu = read_gpu(table, path)
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


def read_gpu(table: TomlTable, path: Path) -> Gpu | None:
    """An accelerator described in a file, or None after noting its faults."""
    before = len(table.faults)
    name = table.text("name")
    in_mib = table.has("memory_mib")
    memory = table.within("memory_mib", MEMORY_MIB) if in_mib else table.within("memory_gib", (1, 4096))
    if in_mib and table.has("memory_gib"):
        table.faults.append("gpu.memory_mib and gpu.memory_gib are both given: keep one")
    gb_per_s = table.within("memory_gb_per_s", MEMORY_GB_PER_S)
    tdp_w = table.within("tdp_w", WATTS)
    idle_w = table.within("idle_w", (0, WATTS[1]), required=False)
    clock_mhz = table.within("clock_mhz", (100, 10_000), required=False)
    cuda = table.switch("cuda", required=False)
    capability = table.within("capability", (7, 15), required=False)
    multiprocessors = table.within("multiprocessors", (1, 999), required=False)
    overlapped_launch = table.switch("overlapped_launch", required=False)
    price_per_h = table.within("price_per_h", (1e-4, 10_000), required=False)
    flops: list[tuple[str, float]] = []
    if (peaks := table.table("tflops")) is not None:
        for dtype in DTYPES:
            if (tflops := peaks.within(dtype, TFLOPS, required=False)) is not None:
                flops.append((dtype, tflops * TERA))
        peaks.close()
    profile = table.text("profile", required=False)
    if profile is not None and not _FOLDER_NAME.fullmatch(profile):
        table.faults.append(f"gpu.profile = {profile!r} must be the name of a folder in profiles/")
    like = table.text("like", required=False)
    if like is not None and not _FOLDER_NAME.fullmatch(like):
        table.faults.append(f"gpu.like = {like!r} must be the name of a folder in profiles/")
    source = table.text("source", required=False) or f"stated in {path.name}"
    figures = ["memory_mib" if in_mib else "memory_gib", "memory_gb_per_s", "tflops", "tdp_w", "idle_w"]
    figures += ["clock_mhz"] * (clock_mhz is not None) + ["overlapped_launch"] * (overlapped_launch is not None)
    figures += ["multiprocessors"] * (multiprocessors is not None)
    figures += ["capability"] * (capability is not None) + ["like"] * (like is not None)
    figures += ["price_per_h"] * (price_per_h is not None)
    sources = dict.fromkeys(figures, source)
    if idle_w is None:
        sources["idle_w"] = "assumed: the share of the power limit measured on the H200 (125 of 700 W)"
    if capability is None and cuda is not False:
        sources["capability"] = "derived: that of the formats it multiplies in, as gpu.capability is not stated"
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
            cuda=cuda is not False,
            capability=capability,
            clock_mhz=clock_mhz,
            multiprocessors=None if multiprocessors is None else int(multiprocessors),
            overlapped_launch=bool(overlapped_launch),
            price_per_h=price_per_h,
            profile=profile,
            like=like or REFERENCE,
            sources=tuple((figure, sources[figure]) for figure in FIGURES if figure in sources),
        )
    except InputError as error:
        table.faults.append(str(error))
        return None


def _read_link(table: TomlTable | None, path: Path) -> Link | None:
    """A link described in a file, or None where there is none or it has faults."""
    if table is None:
        return None
    gb_per_s = table.within("gb_per_s", LINK_GB_PER_S)
    latency_us = table.within("latency_us", LATENCY_US)
    kind = table.text("kind", choices=LINK_KINDS)
    source = table.text("source", required=False) or f"stated in {path.name}"
    table.close()
    if gb_per_s is None or latency_us is None or kind is None:
        return None
    return Link(bytes_per_s=gb_per_s * GB, latency_s=latency_us / 1e6, kind=kind, source=source)
