"""Files that describe a cluster node by node: presets, reading, and writing what is read the same."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from apex_opt.cluster.composition import HOP_S, Composition, Level, Network, Node
from apex_opt.cluster.toml_reader import TomlTable, read_toml, shown
from apex_opt.cluster.types import MAX_GPUS, Gpu, Link
from apex_opt.cluster.uniform import LATENCY_US, LINK_GB_PER_S, catalogued, gpu_name, list_gpus, read_gpu
from apex_opt.errors import InputError, UnknownNameError, UsageError, join_faults
from apex_opt.units import GB, GIB, MIB, TERA

_FOLDER: Final = Path(__file__).with_name("presets")

MAX_NODE: Final = 576
"""Most GPUs of one node: an NVLink domain of the largest rack announced."""

_MOST_SOCKETS: Final = 64

_LEVELS: Final = ("nvlink", "pcie", "sockets", "nics")
_ACROSS: Final = ("infiniband", "ethernet")
_INSIDE: Final = ("nvlink", "xgmi")


@lru_cache(maxsize=1)
def list_presets() -> tuple[str, ...]:
    """Names of the nodes that are described here, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


def load_preset(preset: str, count: int = 1, name: str | None = None) -> Composition:
    """So many nodes of a preset.

    Parameters
    ----------
    preset : str          its name
    count : int           of nodes
    name : str or None    of the cluster; None takes that of the preset

    Raises
    ------
    UnknownNameError    a preset that is not there
    InputError          more than MAX_GPUS GPUs
    """
    found = replace(_preset(preset), name=name or preset)
    ((_, node),) = found.nodes
    if count * node.gpus > MAX_GPUS:
        raise InputError(f"cluster {found.name!r}: {count * node.gpus} GPUs, above the limit of {MAX_GPUS}")
    return replace(found, nodes=((count, node),))


@lru_cache(maxsize=32)
def _preset(preset: str) -> Composition:
    path = _FOLDER / f"{preset}.toml"
    return read_composition(path, _preset_fields(preset))


def _preset_fields(preset: str) -> dict[str, Any]:
    if preset not in list_presets():
        raise UnknownNameError("preset", preset, list_presets())
    return read_toml(_FOLDER / f"{preset}.toml", "cluster file")


def read_composition(path: Path, fields: dict[str, Any]) -> Composition:
    """The cluster that a file with a list of nodes describes, from what was read of it.

    Raises
    ------
    InputError      faults, all of them in one line
    """
    faults: list[str] = []
    root = TomlTable(fields, "", faults)
    name = root.text("name", required=False) or path.stem
    entries = [_read_node(entry, path) for entry in root.tables("nodes")]
    table = root.table("network", required=False)
    network = Network() if table is None else _read_network(table)
    root.close()
    nodes = [entry for entry in entries if entry is not None]
    if not faults and (size := sum(count * node.gpus for count, node in nodes)) > MAX_GPUS:
        faults.append(f"nodes hold {size} GPUs together, above the limit of {MAX_GPUS}")
    if not faults and sum(count for count, _ in nodes) > 1:
        for row, (_, node) in enumerate(nodes):
            if node.nics is None:
                faults.append(f"nodes[{row}].nics is missing: several nodes need ports between them")
    if faults:
        raise join_faults(f"cluster file {path}", faults)
    return Composition(name=name, nodes=tuple(nodes), network=network)


def _read_node(entry: TomlTable, path: Path) -> tuple[int, Node] | None:
    """How many nodes of one kind, or None after noting faults."""
    faults, where = entry.faults, entry.where
    before = len(faults)
    count = entry.integer("count", high=MAX_GPUS, required=False) or 1
    if (preset := entry.text("preset", required=False)) is not None:
        try:
            (base,) = _preset_fields(preset)["nodes"]
        except UnknownNameError as error:
            faults.append(f"{where}.preset: {error}")
            return None
        given = {key: value for key, value in entry.items() if key not in ("count", "preset")}
        entry = TomlTable(_merged(base, given), where, faults)
    gpu, wired = _read_accelerator(entry, path)
    gpus = entry.integer("gpus", high=MAX_NODE)
    levels: dict[str, Level | None] = dict.fromkeys(_LEVELS)
    for field in _LEVELS:
        table = entry.table(field, required=field == "pcie")
        if table is not None and gpus is not None:
            levels[field] = _read_level(table, field, gpus, path, wired if field == "nvlink" else None)
        elif table is not None:
            table.items()
    entry.close()
    if len(faults) > before or gpu is None or gpus is None or levels["pcie"] is None:
        return None
    pcie = levels["pcie"]
    sockets = levels["sockets"] or Level((tuple(range(gpus)),), pcie.link)
    if split := next((group for group in pcie.groups if sockets.holding(group) is None), None):
        faults.append(f"{where}.pcie.gpus: GPUs {_listed(split)} share a switch but sit on different sockets")
        return None
    if len(sockets.groups) > _MOST_SOCKETS:
        faults.append(f"{where}.sockets.gpus makes {len(sockets.groups)} sockets, above the limit of {_MOST_SOCKETS}")
        return None
    nvlink, nics = levels["nvlink"], levels["nics"]
    return count, Node(gpu=gpu, gpus=gpus, nvlink=nvlink, pcie=pcie, sockets=sockets, nics=nics)


def _merged(base: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A preset's fields with those given in their place, table by table; a figure given has not the preset's source."""
    merged = dict(base)
    for key, value in given.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            kept = {name: item for name, item in old.items() if name != "source" or not value.keys() & {"gb_per_s"}}
            merged[key] = kept | value
        else:
            merged[key] = value
    return merged


def _read_accelerator(entry: TomlTable, path: Path) -> tuple[Gpu | None, Link | None]:
    """The GPU of a node, and its NVLink as the catalogue has it."""
    if isinstance(name := entry.raw("gpu"), str):
        try:
            base = catalogued(gpu_name(name))
        except (UnknownNameError, UsageError) as error:
            entry.faults.append(f"{entry.where}.gpu: {error}")
            return None, None
        return base.gpu, base.intra if base.intra.kind == "nvlink" else None
    table = entry.table("gpu")
    return (None if table is None else read_gpu(table, path)), None


def _read_level(table: TomlTable, field: str, gpus: int, path: Path, wired: Link | None) -> Level | None:
    """Groups and their link; NVLink figures left out are those of the catalogue, of which a link is one half."""
    before = len(table.faults)
    groups = _read_groups(table, gpus, whole=field in ("sockets", "nics"), required=field != "pcie")
    known = wired is not None and not (table.has("gb_per_s") or table.has("latency_us"))
    gb_per_s = table.within("gb_per_s", LINK_GB_PER_S, required=not known)
    latency_us = table.within("latency_us", LATENCY_US, required=not known)
    kind = "pcie"
    if field == "nics":
        kind = table.text("kind", choices=_ACROSS) or kind
    elif field == "nvlink":
        kind = table.text("kind", choices=_INSIDE, required=False) or _INSIDE[0]
    source = table.text("source", required=False) or f"stated in {path.name}"
    table.close()
    if len(table.faults) > before:
        return None
    if wired is not None and known:
        return Level(groups, replace(wired, latency_s=wired.latency_s / 2))
    assert gb_per_s is not None and latency_us is not None
    link = Link(bytes_per_s=gb_per_s * GB, latency_s=latency_us / 1e6, kind=kind, source=source)
    return Level(groups, link)


def _read_groups(table: TomlTable, gpus: int, *, whole: bool, required: bool) -> tuple[tuple[int, ...], ...]:
    """`gpus` of a table: how many neighbours share one, or lists of GPUs; `whole` where every GPU must be in one."""
    value = table.raw("gpus")
    if value is None or isinstance(value, int):
        size = table.integer("gpus", high=MAX_NODE, required=required)
        return _neighbours(gpus, size) if size else ()
    label = f"{table.where}.gpus = {shown(value)}"
    good = isinstance(value, list) and all(
        isinstance(group, list) and group and all(type(gpu) is int and 0 <= gpu < gpus for gpu in group)
        for group in value
    )
    if not good:
        table.faults.append(f"{label} must be a number of GPUs or lists of GPUs from 0 to {gpus - 1}")
        return ()
    times = Counter(gpu for group in value for gpu in group)
    if twice := [gpu for gpu, number in times.items() if number > 1]:
        table.faults.append(f"{label} names GPU {twice[0]} twice: groups have no common GPUs")
    if whole and len(times) < gpus:
        missing = next(gpu for gpu in range(gpus) if gpu not in times)
        table.faults.append(f"{label} leaves out GPU {missing}: all {gpus} must be in a group")
    return tuple(tuple(sorted(group)) for group in value)


def _read_network(table: TomlTable) -> Network:
    nodes_per_leaf = table.integer("nodes_per_leaf", high=MAX_GPUS, required=False)
    rails = table.switch("rails", required=False)
    ratio = table.number("oversubscription", high=1000, required=False)
    if ratio is not None and ratio < 1:
        table.faults.append(
            f"{table.where}.oversubscription = {ratio:g} must be from 1 to 1000; 2 where the ports of a leaf can send "
            "twice what its uplinks carry"
        )
    latency_us = table.within("latency_us", LATENCY_US, required=False)
    table.close()
    return Network(
        nodes_per_leaf=nodes_per_leaf,
        rails=bool(rails),
        oversubscription=1.0 if ratio is None else ratio,
        latency_s=HOP_S if latency_us is None else latency_us / 1e6,
    )


def _neighbours(gpus: int, size: int) -> tuple[tuple[int, ...], ...]:
    """Groups of so many neighbours; the last one may be smaller."""
    return tuple(tuple(range(first, min(first + size, gpus))) for first in range(0, gpus, size))


def composition_toml(cluster: Composition, notes: tuple[str, ...] = ()) -> str:
    """The file that describes it, with `notes` above as comments; GPUs by their names in the catalogue."""
    lines = [*(f"# {note}" for note in notes), f"name = {_quoted(cluster.name)}"]
    for count, node in cluster.nodes:
        lines += ["", "[[nodes]]", f"count = {count}", f"gpu = {_gpu_toml(node.gpu)}", f"gpus = {node.gpus}"]
        for field in _LEVELS:
            level: Level | None = getattr(node, field)
            if level is not None and (field != "sockets" or len(level.groups) > 1):
                lines.append(f"{field} = {{ {_level_toml(level, node.gpus, field)} }}")
    network = cluster.network
    if network != Network():
        lines += ["", "[network]"]
        lines += [f"nodes_per_leaf = {network.nodes_per_leaf}"] * (network.nodes_per_leaf is not None)
        lines += ["rails = true"] * network.rails
        lines += [f"oversubscription = {network.oversubscription:.12g}"]
        lines += [f"latency_us = {network.latency_s * 1e6:.12g}"]
    return "\n".join(lines) + "\n"


def _level_toml(level: Level, gpus: int, field: str) -> str:
    """The fields of one level."""
    fields = []
    if level.groups:
        size = len(level.groups[0])
        plain = level.groups == _neighbours(gpus, size)
        fields.append(f"gpus = {size}" if plain else f"gpus = {[list(group) for group in level.groups]}")
    link = level.link
    fields += [f"gb_per_s = {link.bytes_per_s / GB:.12g}", f"latency_us = {link.latency_s * 1e6:.12g}"]
    fields += [f"kind = {_quoted(link.kind)}"] * (field == "nics" or link.kind == "xgmi")
    fields += [f"source = {_quoted(link.source)}"] * bool(link.source)
    return ", ".join(fields)


def _gpu_toml(gpu: Gpu) -> str:
    """An accelerator by its name in the catalogue, or with all its figures where it is not there as it is."""
    if gpu.name in list_gpus() and catalogued(gpu.name).gpu == gpu:
        return _quoted(gpu.name)
    in_gib = "memory_gib" in dict(gpu.sources)
    memory = f"memory_gib = {gpu.memory_bytes / GIB!r}" if in_gib else f"memory_mib = {gpu.memory_bytes / MIB!r}"
    tflops = ", ".join(f"{dtype} = {flops / TERA:.12g}" for dtype, flops in gpu.flops_per_s)
    fields = [f"name = {_quoted(gpu.name)}", memory, f"memory_gb_per_s = {gpu.memory_bytes_per_s / GB:.12g}"]
    fields += [f"tflops = {{ {tflops} }}", f"tdp_w = {gpu.tdp_w!r}", f"idle_w = {gpu.idle_w!r}"]
    fields.append("cuda = false" if gpu.capability is None else f"capability = {gpu.capability!r}")
    fields += [] if gpu.clock_mhz is None else [f"clock_mhz = {gpu.clock_mhz!r}"]
    fields += [] if gpu.multiprocessors is None else [f"multiprocessors = {gpu.multiprocessors}"]
    fields += ["overlapped_launch = true"] * gpu.overlapped_launch
    fields += [] if gpu.price_per_h is None else [f"price_per_h = {gpu.price_per_h!r}"]
    fields += [] if gpu.profile is None else [f"profile = {_quoted(gpu.profile)}"]
    fields += [f"like = {_quoted(gpu.like)}"] * ("like" in dict(gpu.sources))
    sources = ", ".join(f"{figure} = {_quoted(text)}" for figure, text in gpu.sources)
    return f"{{ {', '.join(fields)}, sources = {{ {sources} }} }}"


def _quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _listed(group: tuple[int, ...]) -> str:
    return ", ".join(map(str, group))
