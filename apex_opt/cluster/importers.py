"""Clusters read from what machines print: `nvidia-smi topo -m`, or a list of nodes."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING, Final

from apex_opt.cluster.composition import Composition, Level, Node, assumed_bus, resized
from apex_opt.cluster.matrix import NEAR, NVLINK, Matrix, read_matrix
from apex_opt.cluster.node_files import MAX_NODE, list_presets, load_preset, read_composition
from apex_opt.cluster.toml_reader import read_toml
from apex_opt.cluster.types import MAX_GPUS, Link
from apex_opt.cluster.uniform import catalogued, gpu_name, list_gpus, names_like, uniform_cluster
from apex_opt.errors import InputError, UnknownNameError, UsageError, join_faults
from apex_opt.files import expanded, read_text
from apex_opt.units import GB

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from apex_opt.cluster.types import Gpu

_LARGEST_FILE: Final = 4_000_000
"""Bytes: a list of as many nodes as there may be GPUs, twice over."""

_SWITCHED: Final = NEAR[:2]
_LATENCY_S: Final = 1.5e-6
"""Of an NVLink where the base has none. Assumed, as the catalogue has it."""
_LARGEST_MESH: Final = 16
"""GPUs of the largest NVLink mesh that is told from a switch: a larger one of any known board has switches."""
_BETWEEN: Final = "assumed: what GPUs get between two sockets, at most the rate of their PCIe"

_PRINTS: Final = "nvidia-smi topo -m prints a matrix; a list has lines NAME GPUS TYPE, such as 'worker-1 8 dgx-h100'"
_FOREIGN: Final = (
    (r"ROCm System Management Interface|\b(rocm|amd)-smi\b|\bXGMI\b", "what AMD's tools print, which is not read here"),
    (
        r"^\W*GPU0\s+X\s+(OK|NS|CNS|TNS|GNS|U)\b",
        "the matrix of topo -p2p, which tells what is allowed and not how it is wired",
    ),
)
_OTHERS: Final = (
    (r"NVIDIA-SMI|NVSMI LOG|Driver Version|^\s*GPU \d+:|Link \d+:", "what nvidia-smi prints without topo -m"),
    (r"^\s*[\[{<]", "JSON or a page, not what a terminal shows"),
)
"""What other things people paste look like, and what they are; the first ones may look like a matrix too."""


def import_cluster(path: Path, gpu: str | None = None) -> tuple[Composition, tuple[str, ...]]:
    """The cluster a file tells of, and what a reader of it should know.

    Parameters
    ----------
    path : Path             what `nvidia-smi topo -m` printed on one node, or a list with a line `name gpus type` for
                            every node, where the type is a GPU of the catalogue or a preset
    gpu : str or None       what the GPUs of a matrix are, as it does not tell: a GPU of the catalogue, a preset, or a
                            TOML file with a [gpu] or nodes

    Raises
    ------
    InputError              a file that cannot be read or is neither, its faults in one line
    UsageError, UnknownNameError    a GPU that is missing, not needed or not known

    Source
    ------
    legend of `nvidia-smi topo -m`; rates are those of the preset with the GPU, of the catalogue or of the TOML file, as
    the matrix has none
    """
    text = read_text(path, limit=_LARGEST_FILE, where=f"source {path}")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-") or "imported"
    _refuse_others(path, text, _FOREIGN)
    if (matrix := read_matrix(path, text)) is not None:
        return _node(path, matrix, gpu, name)
    _refuse_others(path, text, _OTHERS)
    rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    listed = _list(path, rows, name)
    if gpu is not None:
        raise UsageError("--gpu: a list of nodes names the type of each; leave it out")
    return listed


def _refuse_others(path: Path, text: str, others: tuple[tuple[str, str], ...]) -> None:
    """Say what a text is that is neither a matrix nor a list."""
    for pattern, what in others:
        if re.search(pattern, text, re.MULTILINE):
            raise InputError(f"source {path}: is {what}: {_PRINTS}")


# ---- nvidia-smi topo -m --------------------------------------------------------------------------------------------


def _node(path: Path, matrix: Matrix, gpu: str | None, name: str) -> tuple[Composition, tuple[str, ...]]:
    """One node, from the matrix of its GPUs and NICs."""
    if gpu is None:
        raise UsageError("--gpu: nvidia-smi topo -m does not tell what its GPUs are; give it, such as --gpu=h100-sxm")
    base, origin = _base(gpu)
    cells, gpus, nics = matrix.cells, matrix.gpus, matrix.nics
    if (count := len(gpus)) > MAX_NODE:
        raise InputError(f"source {path}: {count} GPUs, above the limit of {MAX_NODE} in a node")
    pairs = list(combinations(range(count), 2))
    lanes = {(a, b): int(match[1]) for a, b in pairs if (match := NVLINK.fullmatch(cells[gpus[a], gpus[b]]))}
    switched = [(a, b) for a, b in pairs if cells[gpus[a], gpus[b]] in _SWITCHED]
    for nic in nics:
        near = [index for index, mine in enumerate(gpus) if cells[mine, nic] in _SWITCHED]
        switched += combinations(near, 2)
    # NVLink hides how two GPUs are joined over PCIe: then the CPUs they are near to tell.
    together = [
        (a, b)
        for a, b in pairs
        if cells[gpus[a], gpus[b]] in NEAR[:-1] or ((a, b) in lanes and _on_one_socket(matrix, gpus[a], gpus[b]))
    ]
    notes = [f"one node, from nvidia-smi topo -m in {path.name}; rates are those of {origin}"]
    nvlink, left = _nvlink(path, base, count, lanes)
    notes += left
    switches = tuple(group for group in _groups(count, switched) if len(group) > 1)
    sockets = _groups(count, [*together, *switched])
    between = base.sockets.link if len(base.sockets.groups) > 1 else replace(base.pcie.link, source=_BETWEEN)
    ports = _ports(cells, gpus, nics) if base.nics else ()
    node = replace(
        base,
        gpus=count,
        nvlink=nvlink,
        pcie=Level(switches, base.pcie.link),
        sockets=Level(sockets, between),
        nics=Level(ports, base.nics.link) if ports and base.nics else None,
    )
    if matrix.unread:
        notes.append(f"rows of {len(matrix.unread)} NICs are missing: what the GPUs' rows say of them is taken")
    if len(ports) < len(nics):
        why = "no GPU is nearest to them" if base.nics else f"{origin} has no network"
        notes.append(f"{len(nics) - len(ports)} of {len(nics)} NICs are left out: {why}")
    return Composition(name=name, nodes=((1, node),)), tuple(_line(note) for note in notes)


def _on_one_socket(matrix: Matrix, one: str, other: str) -> bool:
    """Whether two GPUs are near to the same CPUs, or where these are not told, to the same NIC."""
    if matrix.sides[one] or matrix.sides[other]:
        return matrix.sides[one] == matrix.sides[other]
    if not matrix.nics:
        return True
    return any(matrix.cells[one, nic] != "SYS" != matrix.cells[other, nic] for nic in matrix.nics)


def _ports(
    cells: dict[tuple[str, str], str], gpus: tuple[str, ...], nics: tuple[str, ...]
) -> tuple[tuple[int, ...], ...]:
    """GPUs of every NIC that some are nearest to; equally near ones get as many each."""
    dealt: dict[str, list[int]] = {nic: [] for nic in nics}
    for index, mine in enumerate(gpus):
        if nics:
            nearest = min(NEAR.index(cells[mine, nic]) for nic in nics)
            near = [nic for nic in nics if NEAR.index(cells[mine, nic]) == nearest]
            dealt[min(near, key=lambda nic: len(dealt[nic]))].append(index)
    return tuple(tuple(group) for group in dealt.values() if group)


def _nvlink(path: Path, base: Node, count: int, lanes: dict[tuple[int, int], int]) -> tuple[Level | None, list[str]]:
    """NVLink domains and their link, and what is to be said of them.

    Within a domain every GPU has NVLinks to every other. What is joined otherwise, as the cube mesh of a DGX-1 is, is
    taken apart into such domains, the largest first; links between them are left out, which is against us.
    """
    if not lanes:
        return None, []
    _refuse_more_links_than_there_are(path, base.gpu, lanes)
    notes: list[str] = []
    domains: list[tuple[int, ...]] = []
    for group in _groups(count, lanes):
        if all(pair in lanes for pair in combinations(group, 2)):
            domains += [group] if len(group) > 1 else []
        elif len(group) > _LARGEST_MESH:
            raise InputError(
                f"source {path}: NVLinks join {len(group)} GPUs, but not all of them with one another; a mesh of more "
                f"than {_LARGEST_MESH} is not told here: describe its domains in a cluster file"
            )
        else:
            domains += _cliques(group, lanes)
    inside = {pair for domain in domains for pair in combinations(domain, 2)}
    if len(inside) < len(lanes):
        listed, lost = ", ".join("-".join(map(str, domain)) for domain in domains), len(lanes) - len(inside)
        notes.append(
            f"NVLinks do not join all GPUs with one another: domains are {listed}, and those of {lost} pairs between "
            "them are left out"
        )
    counts = {lanes[pair] for pair in inside}
    if len(counts) > 1:
        notes.append(f"pairs have {min(counts)} to {max(counts)} NVLinks: the fewest are taken for all")
    return _nvlink_level(base, tuple(sorted(domains)), min(counts)), notes


def _refuse_more_links_than_there_are(path: Path, gpu: Gpu, lanes: dict[tuple[int, int], int]) -> None:
    """Refuse a matrix of another accelerator than the one named, where its NVLinks tell."""
    link = catalogued(gpu.name).intra if gpu.name in list_gpus() else None
    if link is None or link.kind != "nvlink":
        return
    most = round(link.bytes_per_s / (_lane_gb_per_s(gpu) * GB))
    pair = max(lanes, key=lambda pair: lanes[pair])
    if lanes[pair] > most:
        raise InputError(
            f"source {path}: GPU{pair[0]} to GPU{pair[1]} is NV{lanes[pair]}, but {gpu.name} has {most} NVLinks; give "
            "the GPU of this matrix as --gpu"
        )


def _cliques(group: tuple[int, ...], lanes: dict[tuple[int, int], int]) -> list[tuple[int, ...]]:
    """GPUs of a mesh in parts that are all joined with one another: the largest first, of equal ones the widest."""
    import networkx as nx

    graph: nx.Graph[int] = nx.Graph()
    graph.add_edges_from(pair for pair in lanes if set(pair) <= set(group))
    found = []
    while graph.number_of_edges():
        cliques = [tuple(sorted(clique)) for clique in nx.find_cliques(graph) if len(clique) > 1]
        width = {clique: sum(lanes[pair] for pair in combinations(clique, 2)) for clique in cliques}
        best = min(cliques, key=lambda clique: (-len(clique), -width[clique], clique))
        found.append(best)
        graph.remove_nodes_from(best)
    return found


def _nvlink_level(base: Node, domains: tuple[tuple[int, ...], ...], lanes: int) -> Level:
    """NVLink domains of so many links from a GPU."""
    known = base.nvlink.link if base.nvlink else None
    gb_per_s = _lane_gb_per_s(base.gpu)
    if known is not None and lanes * gb_per_s * GB == known.bytes_per_s:
        return Level(domains, known)
    source = f"NV{lanes} of nvidia-smi topo -m, {gb_per_s:g} GB/s a link; latency assumed"
    latency_s = _LATENCY_S if known is None else known.latency_s
    return Level(domains, Link(bytes_per_s=lanes * gb_per_s * GB, latency_s=latency_s, kind="nvlink", source=source))


def _lane_gb_per_s(gpu: Gpu) -> float:
    """One NVLink in one direction: the fifth generation, the third of boards with GDDR6, the second to fourth."""
    capability = gpu.capability or 0.0
    return 50.0 if capability >= 10 else 14.0625 if capability == 8.6 else 25.0


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
    listed = [(number, words) for number, words in rows if not words[0].startswith("#")]
    if listed and not any(len(words) == 3 and words[1].isdecimal() for _, words in listed):
        faults.append(f"holds no matrix and no list: {_PRINTS}")
        listed = listed[:1]  # what one line lacks all others do
    for number, words in listed:
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
        faults.append(f"no node in it: {_PRINTS}")
    if not faults and (size := sum(count * node.gpus for count, node in nodes)) > MAX_GPUS:
        faults.append(f"{size} GPUs, above the limit of {MAX_GPUS}")
    if faults:
        raise join_faults(f"source {path}", faults)
    notes = [f"from the list of nodes {path.name}; wired as presets are, on one leaf switch: [network] tells another"]
    notes += [f"node{index} is {name}" for index, name in enumerate(names)]
    return Composition(name=name, nodes=tuple(nodes)), tuple(_line(note) for note in notes)


def _base(kind: str) -> tuple[Node, str]:
    """A node with GPUs of a kind, from a TOML file too, and what it is as notes call it."""
    if kind.lower().endswith(".toml"):
        path = expanded(kind)
        return _described(path), path.name
    node = _like(kind)
    made = node == Node.of(catalogued(node.gpu.name))
    return node, f"the catalogue's {node.gpu.name}, of its PCIe assumed" if made else f"a preset with {node.gpu.name}"


def _described(path: Path) -> Node:
    """The node of a cluster file, of which a [gpu] is enough; PCIe of its generation where it states no link."""
    fields = read_toml(path, "--gpu: cluster file")
    if isinstance(fields.get("nodes"), list):
        nodes = {node for _, node in read_composition(path, fields).nodes}
        if len({node.gpu for node in nodes}) > 1:
            raise InputError(f"--gpu: cluster file {path}: holds GPUs of several types, and a matrix is of one node")
        return next(iter(sorted(nodes, key=lambda node: -node.gpus)))
    cluster = uniform_cluster(path, {"nodes": 1, "gpus_per_node": 1} | fields)
    if not isinstance(fields.get("gpu"), str) and "intra" not in fields:
        cluster = replace(cluster, intra=assumed_bus(cluster.gpu))
    return Node.of(cluster)


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
