"""Clusters by name (`4x8xh200-sxm`, `2xdgx-h100`) or from a TOML file."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from apex_opt.cluster.composition import Composition, Network, Node
from apex_opt.cluster.node_files import list_presets, load_preset, read_composition
from apex_opt.cluster.toml_reader import read_toml, shown
from apex_opt.cluster.topology import Topology
from apex_opt.cluster.types import MAX_GPUS, Cluster
from apex_opt.cluster.uniform import catalogued, gpu_name, list_gpus, names_like, uniform_cluster
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.files import expanded, there
from apex_opt.units import GB, ceil_div

if TYPE_CHECKING:
    from pathlib import Path

Wired = str | Cluster | Composition
"""A cluster as a spec or as what a spec stands for."""

_FORM: Final = (
    "GPU, COUNTxGPU, NODESxCOUNTxGPU (such as 4x8xh200-sxm), PRESET, NODESxPRESET (such as 2xdgx-h100) or the path of "
    "a .toml file; a mixed cluster as SPEC+SPEC"
)
_SPEC: Final = re.compile(r"(?:([^a-z]*)x)?(?:([^a-z]*)x)?([a-z][a-z0-9._-]*)")


def list_clusters() -> tuple[str, ...]:
    """Specs of common clusters, for help texts: one GPU, one full node and four nodes of every accelerator."""
    specs: list[str] = []
    for name in list_gpus():
        per_node = catalogued(name).gpus_per_node
        specs += [name, f"{per_node}x{name}", f"4x{per_node}x{name}"]
    return tuple(specs)


def load_cluster(spec: Wired) -> Cluster:
    """The cluster of identical nodes that a spec names.

    Parameters
    ----------
    spec : str
        `h200-sxm` (one GPU), `8xh100-sxm` (one node), `4x8xh200-sxm` (nodes x GPUs of a node), `dgx-h100` or
        `2xdgx-h100` (nodes of a preset), or the path of a TOML file. Accelerators go by their catalogue name, whole or
        up to a `-`.

    Raises
    ------
    UsageError          a spec of another form, a count out of range, more GPUs than a node of that accelerator holds
    UnknownNameError    an accelerator that is not in the catalogue
    InputError          a cluster file with faults, all of them in one line; one with several types of GPUs

    Source
    ------
    figures and their origin: `catalogue/*.toml`, `presets/*.toml`
    """
    found = load_wiring(spec)
    return found.cluster() if isinstance(found, Composition) else found


def load_pools(spec: Wired) -> tuple[Cluster, ...]:
    """The GPUs of each type that a spec names, as a cluster of identical nodes; types in the order of their nodes.

    Raises
    ------
    UsageError, UnknownNameError, InputError    as `load_cluster`
    """
    found = load_wiring(spec)
    if not isinstance(found, Composition):
        return (found,)
    types = dict.fromkeys(node.gpu.name for _, node in found.nodes)
    nodes = [tuple(item for item in found.nodes if item[1].gpu.name == name) for name in types]
    return tuple(replace(found, nodes=some).cluster() for some in nodes)


def load_topology(spec: Wired) -> Topology:
    """The single GPUs and links of what a spec names, which `load_cluster` describes; its nodes may differ.

    Raises
    ------
    UsageError, UnknownNameError, InputError    as `load_cluster`
    """
    found = load_wiring(spec)
    return found.topology() if isinstance(found, Composition) else Topology.of(found)


def cluster_names(spec: Wired) -> tuple[Wired, ...]:
    """The specs in a list of them, `8xh100-sxm,8xa100-sxm`; a file whose name has a comma is one.

    Raises
    ------
    UsageError      an empty place in the list, or the same twice
    """
    if not isinstance(spec, str) or "," not in spec or there(expanded(spec.strip())):
        return (spec,)
    names = tuple(part.strip() for part in spec.split(","))
    if not all(names):
        raise UsageError(f"cluster {shown(spec)}: an empty place in the list of clusters")
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise UsageError(f"cluster {shown(spec)}: {shown(twice[0])} is given twice")
    return names


def assumed_network(spec: Wired) -> tuple[str, ...]:
    """What is assumed of the links between the parts of a mixed cluster that a spec puts together, as a note."""
    parts = _parts(spec)
    if len(parts) < 2:
        return ()
    found = load_wiring(spec)
    assert isinstance(found, Composition)  # of several parts
    ports = dict.fromkeys((node.gpu.name, node.nics) for _, node in found.nodes)
    listed = ", ".join(
        f"{name} by {'a port each' if max(map(len, nics.groups)) == 1 else 'ports they share'} of "
        f"{nics.link.bytes_per_s / GB:g} GB/s {nics.link.kind}"
        for name, nics in ports
        if nics is not None
    )
    return (f"the link between the parts of {found.name} is assumed: all on one leaf switch, {listed}",)


def _parts(spec: Wired) -> tuple[str, ...]:
    """The specs that one of a mixed cluster puts together, `8xh100-sxm+8xl40s`."""
    text = spec.strip() if isinstance(spec, str) else ""
    return (text,) if "+" not in text or there(expanded(text)) else tuple(part.strip() for part in text.split("+"))


def _together(spec: str, parts: tuple[str, ...]) -> Composition:
    """Nodes of several specs on one leaf switch."""
    if not all(parts):
        raise UsageError(f"cluster {shown(spec)}: an empty place between the parts of a mixed cluster")
    nodes: list[tuple[int, Node]] = []
    names = []
    for part in parts:
        found = load_wiring(part)
        names.append(found.name)
        if isinstance(found, Cluster):
            nodes.append((found.nodes, Node.of(found)))
            continue
        if found.network != Network():
            raise UsageError(f"cluster {shown(spec)}: {part} has a network of its own; describe all in one TOML file")
        nodes += found.nodes
    without = [node.gpu.name for _, node in nodes if node.nics is None]
    if without:
        raise UsageError(
            f"cluster {shown(spec)}: nodes with {without[0]} have no network, which others need to reach them; give "
            "[inter] or nics in their file"
        )
    if (size := sum(count * node.gpus for count, node in nodes)) > MAX_GPUS:
        raise UsageError(f"cluster {shown(spec)}: {size} GPUs, above the limit of {MAX_GPUS}")
    return Composition(name="+".join(names), nodes=tuple(nodes))


def load_wiring(spec: Wired) -> Cluster | Composition:
    """What a spec names, as it is described; what is described already stays as it is."""
    if isinstance(spec, Cluster | Composition):
        return spec
    if not isinstance(spec, str) or not spec.strip():
        raise UsageError(f"cluster: expected {_FORM}, got {shown(spec)}")
    text = spec.strip()
    if len(cluster_names(text)) > 1:
        raise UsageError(
            f"cluster {shown(spec)}: plan, energy and capacity compare several clusters, this takes one; a mixed one "
            "is written with +, as in 8xh100-sxm+8xl40s"
        )
    if len(parts := _parts(text)) > 1:
        return _together(spec, parts)
    if text.lower().endswith(".toml") or "/" in text or "\\" in text:
        return _from_file(expanded(text))
    match = _SPEC.fullmatch(text.lower())
    if not match:
        raise UsageError(f"cluster {shown(spec)}: expected {_FORM}")
    counts = [_count(spec, part) for part in match.groups()[:2] if part is not None]
    # An HGX board and the DGX server built on it are wired alike.
    preset = match[3].replace("hgx-", "dgx-")
    if preset in list_presets():
        if len(counts) == 2:
            raise UsageError(f"cluster {shown(spec)}: a preset is a whole node; write {counts[0]}x{match[3]}")
        return load_preset(preset, counts[0] if counts else 1, text.lower())
    try:
        base = catalogued(gpu_name(match[3]))
    except UnknownNameError:
        names = (*names_like(match[3]), *list_presets())
        raise UnknownNameError("GPU", match[3], names, "or describe it in a cluster TOML file") from None
    gpus = counts[-1] if counts else 1
    nodes = counts[0] if len(counts) == 2 else 1
    if gpus > base.gpus_per_node:
        whole = min(ceil_div(nodes * gpus, base.gpus_per_node), MAX_GPUS // base.gpus_per_node)
        raise UsageError(
            f"cluster {shown(spec)}: one node of {base.gpu.name} holds {base.gpus_per_node} GPUs, asked for {gpus}; "
            f"write {whole}x{base.gpus_per_node}x{match[3]}, or describe such a node in a TOML file"
        )
    name = "x".join([*map(str, counts), base.gpu.name])
    return replace(base, name=name, nodes=nodes, gpus_per_node=gpus)


def _from_file(path: Path) -> Cluster | Composition:
    """What a TOML file describes: a list of nodes, or so many identical ones."""
    fields: dict[str, Any] = read_toml(path, "cluster file")
    read = read_composition if isinstance(fields.get("nodes"), list) else uniform_cluster
    return read(path, fields)


def is_catalogued(cluster: Cluster) -> bool:
    """Whether the cluster's nodes are wired as those of the catalogue with the same accelerator."""
    if cluster.gpu.name not in list_gpus():
        return False
    known = catalogued(cluster.gpu.name)
    return cluster.intra == known.intra and cluster.gpus_per_node <= known.gpus_per_node


def _count(spec: str, text: str) -> int:
    """A count in a spec, 1..MAX_GPUS."""
    if re.fullmatch(r"[0-9]{1,9}", text) and 1 <= int(text) <= MAX_GPUS:
        return int(text)
    raise UsageError(f"cluster {shown(spec)}: {shown(text)} must be a whole number from 1 to {MAX_GPUS}")
