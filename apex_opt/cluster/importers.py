"""Clusters read from what machines print: `nvidia-smi topo -m`, or a list of nodes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Final

from apex_opt.cluster.composition import MAX_NODE, Composition, Level, Node, list_presets, load_preset, resized
from apex_opt.cluster.types import MAX_GPUS, Link
from apex_opt.cluster.uniform import catalogued, gpu_name, names_like
from apex_opt.errors import InputError, UnknownNameError, UsageError, join_faults
from apex_opt.files import read_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_LARGEST_FILE: Final = 16_000_000

_STYLE: Final = re.compile(r"\x1b\[[0-9;]*m")
_GPU: Final = re.compile(r"GPU\d+")
_NVLINK: Final = re.compile(r"NV([1-9]\d?)")
_NEAR: Final = ("PIX", "PXB", "PHB", "NODE", "SYS")
"""Ways over PCIe, nearest first: one switch, several, the host bridge, two of them in a NUMA node, between sockets."""

_SWITCHED: Final = _NEAR[:2]
_LATENCY_S: Final = 1.5e-6
"""Of an NVLink where the preset has none. Assumed, as the catalogue has it."""


def import_cluster(path: Path, gpu: str | None = None) -> tuple[Composition, tuple[str, ...]]:
    """The cluster a file tells of, and what a reader of it should know.

    Parameters
    ----------
    path : Path             what `nvidia-smi topo -m` printed on one node, or a list with a line `name gpus type` for
                            every node, where the type is a GPU of the catalogue or a preset
    gpu : str or None       what the GPUs of a matrix are, as it does not tell

    Raises
    ------
    InputError              a file that cannot be read or is neither, its faults in one line
    UsageError, UnknownNameError    a GPU that is missing, not needed or not known

    Source
    ------
    legend of `nvidia-smi topo -m`; rates are those of the preset with the GPU, as the matrix has none
    """
    text = _STYLE.sub("", read_text(path, limit=_LARGEST_FILE, where=f"source {path}"))
    rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-") or "imported"
    start = next((row for row, (_, words) in enumerate(rows) if words[0] == "GPU0"), None)
    if start is not None:
        return _matrix(path, rows[start:], gpu, name)
    if gpu is not None:
        raise UsageError("--gpu: a list of nodes names the type of each; leave it out")
    return _list(path, rows, name)


# ---- nvidia-smi topo -m --------------------------------------------------------------------------------------------


def _matrix(
    path: Path, rows: list[tuple[int, list[str]]], gpu: str | None, name: str
) -> tuple[Composition, tuple[str, ...]]:
    """One node, from the matrix of its GPUs and NICs."""
    if gpu is None:
        raise UsageError("--gpu: nvidia-smi topo -m does not tell what its GPUs are; give it, such as --gpu=h100-sxm")
    base = _like(gpu)
    cells, sides, gpus, nics = _cells(path, rows)
    count = len(gpus)
    lanes = {
        (a, b): int(match[1])
        for a, b in combinations(range(count), 2)
        if (match := _NVLINK.fullmatch(cells[gpus[a], gpus[b]]))
    }
    switched = [pair for pair in combinations(range(count), 2) if cells[gpus[pair[0]], gpus[pair[1]]] in _SWITCHED]
    for nic in nics:
        near = [index for index, mine in enumerate(gpus) if cells[mine, nic] in _SWITCHED]
        switched += combinations(near, 2)
    # NVLink hides how two GPUs are joined over PCIe: then the CPUs they are near to tell.
    together = [
        (a, b)
        for a, b in combinations(range(count), 2)
        if cells[gpus[a], gpus[b]] in _NEAR[:-1] or ((a, b) in lanes and sides[gpus[a]] == sides[gpus[b]])
    ]
    domains = tuple(group for group in _groups(count, lanes) if len(group) > 1)
    switches = tuple(group for group in _groups(count, switched) if len(group) > 1)
    sockets = _groups(count, [*together, *switched])
    ports = _ports(cells, gpus, nics)
    assert base.nics is not None  # presets have them
    node = replace(
        base,
        gpus=count,
        nvlink=_nvlink(base, domains, min(lanes.values())) if lanes else None,
        pcie=Level(switches, base.pcie.link),
        sockets=Level(sockets, base.sockets.link),
        nics=Level(ports, base.nics.link) if ports else None,
    )
    notes = [f"one node, from nvidia-smi topo -m in {path.name}; rates are those of a preset with {base.gpu.name}"]
    if lanes and len(set(lanes.values())) > 1:
        notes.append(f"pairs have {min(lanes.values())} to {max(lanes.values())} NVLinks: the fewest are taken for all")
    if len(ports) < len(nics):
        notes.append(f"{len(nics) - len(ports)} of {len(nics)} NICs are left out: no GPU is nearest to them")
    return Composition(name=name, nodes=((1, node),)), tuple(_line(note) for note in notes)


def _cells(
    path: Path, rows: list[tuple[int, list[str]]]
) -> tuple[dict[tuple[str, str], str], dict[str, str], list[str], list[str]]:
    """Entries by row and column, the CPUs each GPU is near to, the GPUs and the NICs."""
    faults: list[str] = []
    heads = rows[0][1]
    names = heads[: heads.index("CPU")] if "CPU" in heads else heads
    gpus = [name for name in names if _GPU.fullmatch(name)]
    nics = [name for name in names if name not in gpus]
    if gpus != [f"GPU{index}" for index in range(len(gpus))] or len(set(names)) < len(names):
        raise InputError(f"source {path}: line {rows[0][0]}: its columns are not GPU0, GPU1 and so on, then NICs")
    if len(gpus) > MAX_NODE:
        raise InputError(f"source {path}: {len(gpus)} GPUs, above the limit of {MAX_NODE} in a node")
    cells: dict[tuple[str, str], str] = {}
    sides = dict.fromkeys(gpus, "")
    for number, (row, *words) in rows[1:]:
        if row not in names:
            break
        entries = words[: len(names)]
        if (row, row) in cells:
            faults.append(f"line {number}: a second row of {row}")
        if len(entries) < len(names):
            faults.append(f"line {number}: {row} has {len(entries)} entries for {len(names)} columns")
        for column, entry in zip(names, entries, strict=False):
            if entry not in (("X",) if column == row else _NEAR) and not (column != row and _NVLINK.fullmatch(entry)):
                known = "X" if column == row else f"NV and a number, {', '.join(_NEAR)}"
                faults.append(f"line {number}: {row} to {column} is {entry[:20]!r}, known: {known}")
            cells[row, column] = entry
        if row in sides and len(words) > len(names):
            sides[row] = words[len(names)]
    faults += [f"no row of {name}" for name in names if (name, name) not in cells]
    if not faults:
        faults += [
            f"{a} to {b} is {cells[a, b]}, and back {cells[b, a]}"
            for a, b in combinations(names, 2)
            if cells[a, b] != cells[b, a]
        ]
        faults += [
            f"{mine} to {nic} is {cells[mine, nic]}, known: {', '.join(_NEAR)}"
            for mine in gpus
            for nic in nics
            if cells[mine, nic] not in _NEAR
        ]
    if faults:
        raise join_faults(f"source {path}", faults)
    return cells, sides, gpus, nics


def _ports(cells: dict[tuple[str, str], str], gpus: list[str], nics: list[str]) -> tuple[tuple[int, ...], ...]:
    """GPUs of every NIC that some are nearest to; equally near ones get as many each."""
    dealt: dict[str, list[int]] = {nic: [] for nic in nics}
    for index, mine in enumerate(gpus):
        if nics:
            nearest = min(_NEAR.index(cells[mine, nic]) for nic in nics)
            near = [nic for nic in nics if _NEAR.index(cells[mine, nic]) == nearest]
            dealt[min(near, key=lambda nic: len(dealt[nic]))].append(index)
    return tuple(tuple(group) for group in dealt.values() if group)


def _nvlink(base: Node, domains: tuple[tuple[int, ...], ...], lanes: int) -> Level:
    """NVLink domains of so many links from a GPU."""
    known = base.nvlink.link if base.nvlink else None
    gb_per_s = 50 if known is not None and known.bytes_per_s >= 900e9 else 25  # NVLink 5; 2 to 4
    if known is not None and lanes * gb_per_s * 1e9 == known.bytes_per_s:
        return Level(domains, known)
    source = f"NV{lanes} of nvidia-smi topo -m, {gb_per_s} GB/s a link; latency assumed"
    latency_s = _LATENCY_S if known is None else known.latency_s
    return Level(domains, Link(bytes_per_s=lanes * gb_per_s * 1e9, latency_s=latency_s, kind="nvlink", source=source))


def _groups(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """GPUs that pairs hold together, in order."""
    import networkx as nx

    graph: nx.Graph[int] = nx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(pairs)
    return tuple(sorted(tuple(sorted(group)) for group in nx.connected_components(graph)))


# ---- a list of nodes -----------------------------------------------------------------------------------------------


def _list(path: Path, rows: list[tuple[int, list[str]]], name: str) -> tuple[Composition, tuple[str, ...]]:
    """A node for every line, one after another."""
    faults: list[str] = []
    nodes: list[tuple[int, Node]] = []
    names: dict[str, None] = {}
    for number, words in rows:
        if words[0].startswith("#"):
            continue
        if len(words) != 3 or not re.fullmatch(r"[1-9]\d{0,5}", words[1], re.ASCII):
            line = " ".join(words)
            faults.append(f"line {number}: expected NAME GPUS TYPE such as 'worker-1 8 dgx-h100', got {line!r:.60}")
            continue
        if words[0] in names:
            faults.append(f"line {number}: a second node {words[0][:40]!r}")
        names[words[0]] = None
        try:
            node = _like(words[2])
        except (UsageError, UnknownNameError) as error:
            faults.append(f"line {number}: {error}")
            continue
        if (count := int(words[1])) > node.gpus:
            faults.append(f"line {number}: {count} GPUs, but one node of {words[2][:40]} holds {node.gpus}")
            continue
        node = resized(node, count)
        if nodes and nodes[-1][1] == node:
            nodes[-1] = nodes[-1][0] + 1, node
        else:
            nodes.append((1, node))
    if not faults and not names:
        faults.append("no node in it; expected the output of nvidia-smi topo -m, or lines NAME GPUS TYPE")
    if not faults and (size := sum(count * node.gpus for count, node in nodes)) > MAX_GPUS:
        faults.append(f"{size} GPUs, above the limit of {MAX_GPUS}")
    if faults:
        raise join_faults(f"source {path}", faults)
    notes = [f"from the list of nodes {path.name}; wired as presets are, on one leaf switch: [network] tells another"]
    notes += [f"node{index} is {name}" for index, name in enumerate(names)]
    return Composition(name=name, nodes=tuple(nodes)), tuple(_line(note) for note in notes)


def _like(kind: str) -> Node:
    """A node of a preset, or the one that has a GPU of the catalogue and a network of its own speed."""
    preset = kind.lower().replace("hgx-", "dgx-")
    if preset in list_presets():
        return load_preset(preset).nodes[0][1]
    try:
        gpu = gpu_name(kind)
    except UnknownNameError:
        raise UnknownNameError("GPU or preset", kind[:60], (*names_like(kind), *list_presets())) from None
    nodes = [load_preset(name).nodes[0][1] for name in list_presets() if not name.startswith("cloud-")]
    return next((node for node in nodes if node.gpu.name == gpu), None) or Node.of(catalogued(gpu))


def _line(text: str) -> str:
    """A comment: nothing in a name ends the line or cannot be written."""
    return re.sub(r"[^ -~]", "?", text)
