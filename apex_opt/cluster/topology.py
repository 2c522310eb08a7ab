"""Single GPUs and how they are wired: what a transfer between two of them really crosses."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.units import add_up

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import networkx as nx

    from apex_opt.cluster.types import Cluster, Gpu, Link

STATES: Final = ("free", "busy", "down")
DOMAIN_KINDS: Final = ("node", "nvlink", "pcie", "socket", "nic", "leaf")

_GPUS: Final = re.compile(r"node(\d{1,6})(?::(\d{1,6})(?:-(\d{1,6}))?)?", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU: the node it sits in, its number there, what it is and whether it can be had (one of `STATES`)."""

    node: int
    local: int
    gpu: Gpu
    state: str = "free"

    @property
    def name(self) -> str:
        """Such as `node0:3`."""
        return f"node{self.node}:{self.local}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """What links meet in other than a GPU, one of `DOMAIN_KINDS` or the spine; `node` is None outside the nodes."""

    name: str
    kind: str
    node: int | None = None


@dataclass(frozen=True, kw_only=True)
class Topology:
    """GPUs, switches, and the links between them.

    Parameters
    ----------
    devices : tuple of Device                   by node, then by their number there
    switches : tuple of Switch
    wires : tuple of (name, name, Link)         a link carries `bytes_per_s` in each direction at once, and takes
                                                `latency_s` from its one end to the other

    GPUs are given and returned by name. A name that is not there is an UnknownNameError everywhere.
    """

    name: str
    devices: tuple[Device, ...]
    switches: tuple[Switch, ...]
    wires: tuple[tuple[str, str, Link], ...]

    @classmethod
    def of(cls, cluster: Cluster) -> Topology:
        """The wiring that a cluster of identical nodes stands for: `intra` within a node, `inter` between nodes."""
        several = cluster.nodes > 1 and cluster.inter is not None
        # Two links between GPUs of a node and four between GPUs of two nodes, which share the latency.
        near = replace(cluster.intra, latency_s=cluster.intra.latency_s / 2)
        kind = "pcie" if near.kind == "pcie" else "nvlink"
        devices, switches, wires = [], [], []
        for node in range(cluster.nodes):
            switches.append(Switch(name=f"node{node}:{kind}0", kind=kind, node=node))
            for local in range(cluster.gpus_per_node):
                devices.append(Device(node=node, local=local, gpu=cluster.gpu))
                wires.append((f"node{node}:{local}", f"node{node}:{kind}0", near))
                if several and cluster.inter is not None:
                    far = replace(cluster.inter, latency_s=cluster.inter.latency_s / 4)
                    port = f"node{node}:nic{local}"
                    switches.append(Switch(name=port, kind="nic", node=node))
                    wires += [(f"node{node}:{local}", port, far), (port, "leaf0", far)]
        if several:
            switches.append(Switch(name="leaf0", kind="leaf"))
        return cls(name=cluster.name, devices=tuple(devices), switches=tuple(switches), wires=tuple(wires))

    # ---- GPUs ----

    def gpus(self) -> tuple[str, ...]:
        """Names of all GPUs, in order."""
        return tuple(device.name for device in self.devices)

    def free(self) -> tuple[str, ...]:
        """Names of the GPUs that are neither busy nor down, in order."""
        return tuple(device.name for device in self.devices if device.state == "free")

    def device(self, name: str) -> Device:
        """The GPU of a name."""
        if (found := self._devices.get(name)) is None:
            raise UnknownNameError("GPU of the cluster", name, self._shape())
        return found

    def marked(self, state: str, gpus: Iterable[str]) -> Topology:
        """The same GPUs, some of them in another state, one of `STATES`."""
        if state not in STATES:
            raise UnknownNameError("state of a GPU", state, STATES)
        names = {self.device(gpu).name for gpu in gpus}
        devices = (replace(device, state=state) if device.name in names else device for device in self.devices)
        return replace(self, devices=tuple(devices))

    def named(self, text: str, what: str = "GPUs") -> tuple[str, ...]:
        """GPUs as people list them: `node0:0-3,node2:1`, or `node1` for all of a node; in order, each once.

        Raises
        ------
        UsageError      a text of another form, a node or GPU that is not there; `what` begins the message
        """
        found: set[str] = set()
        for part in text.split(","):
            match = _GPUS.fullmatch(part.strip())
            if not match:
                raise UsageError(f"{what}: expected GPUs such as node0:0-3,node2:1 or node1, got {part.strip()!r:.60}")
            node = int(match[1])
            there = {device.local for device in self.devices if device.node == node}
            if not there:
                known = ", ".join(self._shape())
                raise UsageError(f"{what}: {match[0]}: no such node in {self.name}; it has {known}")
            first = int(match[2] or min(there))
            last = int(match[3] or match[2] or max(there))
            if last < first:
                raise UsageError(f"{what}: {match[0]}: {first} is above {last}; write the lower GPU first")
            asked = set(range(first, last + 1)) if match[2] else there
            if not asked <= there:
                raise UsageError(f"{what}: {match[0]}: node{node} has GPUs {min(there)} to {max(there)}")
            found |= {f"node{node}:{local}" for local in asked}
        return tuple(name for name in self.gpus() if name in found)

    # ---- links ----

    def route(self, a: str, b: str) -> tuple[str, ...]:
        """Names from GPU `a` to GPU `b`, switches between them: the widest way, of equally wide ones the quickest.

        GPUs pass nothing on, and two GPUs of one node that are wired inside it stay inside.

        Raises
        ------
        InputError      no links lead from one to the other
        """
        ends = sorted((self.device(a), self.device(b)), key=lambda device: (device.node, device.local))
        if a == b:
            return (a,)
        # Found from the lower one always, so that the way back is the same way.
        first, last = (device.name for device in ends)
        if first not in self._routes:
            self._routes[first] = self._widest(first)
        if (found := self._routes[first].get(last)) is None:
            raise InputError(f"cluster {self.name!r}: no links lead from {a} to {b}; describe the NICs of their nodes")
        return found if a == first else found[::-1]

    def path(self, a: str, b: str) -> tuple[Link, ...]:
        """The links of `route`, in order; none from a GPU to itself."""
        return tuple(self.graph.edges[edge]["link"] for edge in pairwise(self.route(a, b)))

    def bandwidth(self, a: str, b: str) -> float:
        """Bytes per second of a transfer that has its links to itself; infinite from a GPU to itself."""
        return min((link.bytes_per_s for link in self.path(a, b)), default=float("inf"))

    def latency(self, a: str, b: str) -> float:
        """Seconds until the first byte arrives."""
        return add_up(link.latency_s for link in self.path(a, b))

    def shared(self, transfers: Sequence[tuple[str, str]]) -> tuple[float, ...]:
        """Bytes per second of each of several transfers at once.

        Every direction of a link is dealt evenly among the transfers that cross it, and a transfer gets the least of
        its shares: what one leaves unused no other takes, so this is a lower bound.
        """
        routes = [list(pairwise(self.route(a, b))) for a, b in transfers]
        crossing = Counter(edge for route in routes for edge in route)
        edges = self.graph.edges
        return tuple(
            min((edges[edge]["link"].bytes_per_s / crossing[edge] for edge in route), default=float("inf"))
            for route in routes
        )

    def domains(self, kind: str) -> tuple[frozenset[str], ...]:
        """GPUs that share a node, an NVLink domain, a PCIe switch, or that are nearest to the same socket, NIC or leaf.

        Parameters
        ----------
        kind : str      one of `DOMAIN_KINDS`

        Returns
        -------
        tuple of sets, none of them empty, without common GPUs; GPUs in none of them are left out
        """
        if kind not in DOMAIN_KINDS:
            raise UnknownNameError("kind of domain", kind, DOMAIN_KINDS)
        found: dict[object, set[str]] = {}
        if kind == "node":
            for device in self.devices:
                found.setdefault(device.node, set()).add(device.name)
        elif switches := [switch.name for switch in self.switches if switch.kind == kind]:
            import networkx as nx

            # What hangs on an NVLink or PCIe switch is wired to it; the others are reached over switches.
            furthest = 1 if kind in ("nvlink", "pcie") else None
            paths = nx.multi_source_dijkstra_path(
                self.graph, switches, cutoff=furthest, weight=lambda u, _v, _data: None if u in self._devices else 1
            )
            found = {switch: set() for switch in switches}
            for name in self.gpus():
                if name in paths:
                    found[paths[name][0]].add(name)
        return tuple(frozenset(names) for names in found.values() if names)

    @cached_property
    def graph(self) -> nx.Graph[str]:
        """Frozen; vertices carry `kind` and `node`, edges `link`."""
        import networkx as nx

        graph: nx.Graph[str] = nx.Graph(name=self.name)
        graph.add_nodes_from((device.name, {"kind": "gpu", "node": device.node}) for device in self.devices)
        graph.add_nodes_from((switch.name, {"kind": switch.kind, "node": switch.node}) for switch in self.switches)
        for a, b, link in self.wires:
            if a not in graph or b not in graph:
                raise InputError(f"cluster {self.name!r}: a link joins {a} and {b}, which are not both there")
            graph.add_edge(a, b, link=link)
        nx.freeze(graph)
        return graph

    @cached_property
    def _devices(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    @cached_property
    def _routes(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Routes found so far, by their first GPU."""
        return {}

    def _widest(self, start: str) -> dict[str, tuple[str, ...]]:
        """The route from one GPU to every other that can be reached."""
        import networkx as nx

        home = self.device(start).node
        nodes = self.graph.nodes
        widths = sorted({link.bytes_per_s for _, _, link in self.wires}, reverse=True)
        found: dict[str, tuple[str, ...]] = {}
        for inside in (True, False):
            wanted = {device.name for device in self.devices if not inside or device.node == home}
            for width in widths:
                if wanted <= found.keys():
                    break

                def latency(u: str, v: str, data: dict[str, Any], width: float = width, inside: bool = inside) -> Any:
                    """Of an edge that is wide enough; None hides it."""
                    passed_on = u != start and u in self._devices
                    if passed_on or data["link"].bytes_per_s < width or (inside and nodes[v]["node"] != home):
                        return None
                    return data["link"].latency_s

                paths = nx.single_source_dijkstra_path(self.graph, start, weight=latency)
                for name in wanted & paths.keys():
                    found.setdefault(name, tuple(paths[name]))
        return found

    def _shape(self) -> list[str]:
        """The first nodes with their GPUs, for messages."""
        nodes: dict[int, list[int]] = {}
        for device in self.devices:
            nodes.setdefault(device.node, []).append(device.local)
        spans = [f"node{node}:{min(local)}-{max(local)}" for node, local in nodes.items()]
        return spans if len(spans) <= 4 else [*spans[:3], f"to {spans[-1]}"]
