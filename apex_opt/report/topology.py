"""What `cluster` answers: GPUs and their wiring as a document, as tables, as a picture and as a file."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.text import Text

from apex_opt.cluster.node_files import composition_toml
from apex_opt.cluster.topology import DOMAIN_KINDS, STATES
from apex_opt.errors import InputError
from apex_opt.outputs import write_whole
from apex_opt.report import listed
from apex_opt.report.charts.wiring import MOST_GPUS, topology_chart
from apex_opt.report.layout import count, page, seconds, table
from apex_opt.report.picture import write_picture
from apex_opt.schema import of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from rich.console import Console

    from apex_opt.cluster.composition import Composition
    from apex_opt.cluster.topology import Topology
    from apex_opt.report.charts import Chart
    from apex_opt.schema import Document


def topology_document(topology: Topology) -> listed.ShownCluster:
    """Every GPU with its state, what they share, every link, and what one GPU reaches; bytes per second, seconds."""
    states = Counter(device.state for device in topology.devices)
    return listed.ShownCluster(
        command="cluster show",
        status="ok",
        cluster=topology.name,
        count={state: states[state] for state in STATES},
        gpus=tuple(of(listed.Device, device, gpu=device.gpu.name) for device in topology.devices),
        switches=tuple({"name": s.name, "node": s.node, "kind": s.kind} for s in topology.switches),
        domains={kind: tuple(map(tuple, _domains(topology, kind))) for kind in DOMAIN_KINDS},
        links=tuple(of(listed.Wire, link, ends=(a, b)) for a, b, link in topology.wires),
        reached=tuple(_reached(topology)),
    )


def _domains(topology: Topology, kind: str) -> list[list[str]]:
    """GPUs of every domain, in their order."""
    order = {name: place for place, name in enumerate(topology.gpus())}
    return [sorted(domain, key=order.__getitem__) for domain in topology.domains(kind)]


def _reached(topology: Topology) -> Iterator[listed.Reached]:
    """What the first GPU of every kind of node reaches, by the switches on the way; the first GPU of each such way."""
    kinds = {switch.name: switch.kind for switch in topology.switches}
    shapes: dict[Any, str] = {}
    for domain in _domains(topology, "node"):
        devices = [topology.device(name) for name in domain]
        shapes.setdefault((devices[0].gpu.name, len(devices)), domain[0])
    for first in shapes.values():
        ways: dict[tuple[tuple[str, ...], float, float], list[str]] = {}
        for other in topology.gpus():
            if other == first:
                continue
            try:
                route = topology.route(first, other)
            except InputError:  # no links lead there
                continue
            over = tuple(kinds[name] for name in route[1:-1])
            way = over, topology.bandwidth(first, other), topology.latency(first, other)
            ways.setdefault(way, []).append(other)
        for (over, bytes_per_s, latency_s), gpus in ways.items():
            yield listed.Reached(
                from_=first, to=gpus[0], gpus=len(gpus), over=over, bytes_per_s=bytes_per_s, latency_s=latency_s
            )


def import_document(composition: Composition, notes: tuple[str, ...], target: str | None) -> listed.ImportedCluster:
    """A cluster file, where it goes, and what is in it.

    Parameters
    ----------
    composition : Composition    what was read
    notes : tuple of str         what the reader has to know
    target : str or None         file it is in; None where it is printed
    """
    return listed.ImportedCluster(
        command="cluster import",
        status="ok",
        cluster=composition.name,
        nodes=sum(count for count, _ in composition.nodes),
        gpus=sum(count * node.gpus for count, node in composition.nodes),
        notes=notes,
        toml=composition_toml(composition, notes),
        target=target,
    )


def write_toml(path: Path, document: listed.ImportedCluster) -> None:
    """Write the cluster file; it appears whole or not at all.

    Raises
    ------
    InputError    a path that cannot be written
    """
    write_whole(path, document.toml.encode(), "target")


# ---- tables -------------------------------------------------------------------------------------------------------


def cluster_page(document: Document) -> str:
    """The document as text; a cluster file that goes nowhere else as it is."""
    if document["command"] == "cluster show":
        return page(lambda console: _shown(console, document))
    if document["target"] is None:
        return str(document["toml"])
    made = f"{count(document['nodes'], 'node')} with {count(document['gpus'], 'GPU')} written to {document['target']}"
    return page(lambda console: console.print(Text("\n".join([made, *document["notes"]]))))


def _shown(console: Console, document: Document) -> None:
    states = ", ".join(f"{number:,} {state}" for state, number in document["count"].items() if number)
    console.print(Text.assemble((document["cluster"], "bold"), f": {count(len(document['gpus']), 'GPU')}, {states}\n"))
    heads = ("node", "GPUs", "type", "NVLink", "PCIe switch", "socket", "NIC", "free", "busy", "down")
    table(console, "Nodes, and how many GPUs share what", heads, _node_rows(document), left={0, 2, 3, 4, 5, 6})
    rows = [
        (row["from"], row["to"], str(row["gpus"]), ", ".join(row["over"]), _rate(row), seconds(row["latency_s"]))
        for row in document["reached"]
    ]
    ways = ("from", "to", "GPUs like it", "over", "bandwidth", "latency")
    table(console, "What a transfer crosses", ways, rows, left={0, 1, 3})
    links = ("link", "kind", "links", "bandwidth", "latency", "source")
    table(console, "Links, each way", links, _link_rows(document), left={0, 1, 5})


def _node_rows(document: Document) -> list[tuple[str, ...]]:
    """A row for neighbouring nodes that are alike."""
    nodes: dict[int, list[Document]] = {}
    for gpu in document["gpus"]:
        nodes.setdefault(gpu["node"], []).append(gpu)
    shares: dict[tuple[int, str], list[int]] = {}
    home = {gpu["name"]: gpu["node"] for gpu in document["gpus"]}
    for kind in ("nvlink", "pcie", "socket", "nic"):
        for domain in document["domains"][kind]:
            shares.setdefault((home[domain[0]], kind), []).append(len(domain))
    rows: list[tuple[list[int], tuple[str, ...]]] = []
    for node, gpus in nodes.items():
        states = Counter(gpu["state"] for gpu in gpus)
        cells = (
            str(len(gpus)),
            ", ".join(dict.fromkeys(gpu["gpu"] for gpu in gpus)),
            *(_sizes(shares.get((node, kind), [])) for kind in ("nvlink", "pcie", "socket", "nic")),
            *(str(states[state]) for state in STATES),
        )
        if rows and rows[-1][1] == cells:
            rows[-1][0].append(node)
        else:
            rows.append(([node], cells))
    return [(f"node{at[0]}" if len(at) == 1 else f"node{at[0]}-{at[-1]}", *cells) for at, cells in rows]


def _sizes(sizes: list[int]) -> str:
    """How many domains of which size: `4 of 2`."""
    return ", ".join(f"{number} of {size}" for size, number in Counter(sizes).items()) or "-"


def _link_rows(document: Document) -> Iterable[tuple[str, ...]]:
    """A row for links alike."""
    kinds = {entry["name"]: entry["kind"] for entry in document["switches"]}
    alike: Counter[tuple[str, ...]] = Counter()
    for link in document["links"]:
        ends = " to ".join(kinds.get(end, "GPU") for end in link["ends"])
        alike[ends, link["kind"], _rate(link), seconds(link["latency_s"]), link["source"]] += 1
    return [(ends, kind, f"{number:,}", *rest) for (ends, kind, *rest), number in alike.items()]


def _rate(row: Document) -> str:
    return f"{row['bytes_per_s'] / 1e9:,.4g} GB/s"


# ---- picture ------------------------------------------------------------------------------------------------------


def drawn(document: Document, ranks: Mapping[str, tuple[int, str]] | None = None) -> Iterator[Chart]:
    """The drawing of a cluster, unless it is too large to be read."""
    if len(document["gpus"]) <= MOST_GPUS:
        yield topology_chart(document, ranks)


def write_topology(path: Path, document: Document, ranks: Mapping[str, tuple[int, str]] | None = None) -> None:
    """Draw GPUs, switches and links into a PNG or SVG file, each kind at its own height.

    Parameters
    ----------
    path : Path
    document : of the cluster
    ranks : of GPUs that hold a rank its replica, which colours them, and what to write on them

    Raises
    ------
    UsageError    vl-convert is not installed
    InputError    more than 256 GPUs, or a path that cannot be written
    """
    if (gpus := len(document["gpus"])) > MOST_GPUS:
        raise InputError(
            f"plot {path}: {gpus} GPUs are above the {MOST_GPUS} that a picture can show; draw fewer nodes"
        )
    write_picture(path, *drawn(document, ranks))
