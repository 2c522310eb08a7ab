"""Clusters put together from nodes of any kind: the wiring that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Final

from apex_opt.cluster.topology import Device, Switch, Topology
from apex_opt.cluster.types import Cluster, Gpu, Link
from apex_opt.errors import InputError
from apex_opt.units import GB, add_up

HOP_S: Final = 0.5e-6
"""Seconds of a link between leaf and spine where none are given. Assumed: a switch takes some hundreds of ns."""

_BUS_S: Final = 1e-6
_BUS: Final = "assumed: PCIe x16 of the accelerator's generation, and its latency"


@dataclass(frozen=True, slots=True)
class Level:
    """Groups of a node's GPUs that share an NVLink domain, a PCIe switch, a socket or a NIC, and the link to it."""

    groups: tuple[tuple[int, ...], ...]
    link: Link

    def holding(self, group: tuple[int, ...]) -> int | None:
        """Number of the group that holds all of another."""
        return next((index for index, mine in enumerate(self.groups) if set(group) <= set(mine)), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """GPUs of one node and their wiring.

    Parameters
    ----------
    nvlink : Level or None      its link leads from a GPU to its NVLink domain
    pcie : Level                its link leads from a GPU to its PCIe switch, from there to the socket and to a NIC;
                                a GPU in no group hangs on the socket
    sockets : Level             its link leads from one socket to another; all GPUs are in one of the groups
    nics : Level or None        its link leads from a NIC to its leaf switch; all GPUs are in one of the groups
    """

    gpu: Gpu
    gpus: int
    nvlink: Level | None = None
    pcie: Level
    sockets: Level
    nics: Level | None = None

    def __post_init__(self) -> None:
        if len(self.sockets.groups) == 1:
            # The link from it to others does not exist: nodes alike are equal, however they were described.
            object.__setattr__(self, "sockets", Level(self.sockets.groups, self.pcie.link))

    @classmethod
    def of(cls, cluster: Cluster) -> Node:
        """A node of a cluster of identical ones: on one socket, each GPU with a NIC of its own where there are any."""
        inside, across, everyone = cluster.intra, cluster.inter, tuple(range(cluster.gpus_per_node))
        half = replace(inside, latency_s=inside.latency_s / 2)
        bus, nvlink = half, None
        if inside.kind != "pcie":
            # The host's side of an accelerator whose sheet is of another link; its time is part of the network's.
            bus = assumed_bus(cluster.gpu)
            if across:
                rate, latency_s = max(bus.bytes_per_s, across.bytes_per_s), min(bus.latency_s, across.latency_s / 4)
                bus = replace(bus, bytes_per_s=rate, latency_s=latency_s)
            nvlink = Level((everyone,), half)
        nics = None
        if across is not None:
            port = replace(across, latency_s=round(max(across.latency_s / 2 - bus.latency_s, 0.0), 12))
            nics = Level(tuple((gpu,) for gpu in everyone), port)
        sockets = Level((everyone,), bus)
        return cls(gpu=cluster.gpu, gpus=len(everyone), nvlink=nvlink, pcie=Level((), bus), sockets=sockets, nics=nics)

    def switches(self) -> tuple[int, ...]:
        """Number of the NVLink domain or PCIe switch of every GPU; one that hangs on neither is its own."""
        numbers: dict[object, int] = {}
        found = []
        for local in range(self.gpus):
            nvlink = None if self.nvlink is None else self.nvlink.holding((local,))
            pcie = self.pcie.holding((local,))
            own = ("nvlink", nvlink) if nvlink is not None else ("pcie", pcie) if pcie is not None else ("gpu", local)
            found.append(numbers.setdefault(own, len(numbers)))
        return tuple(found)

    def socket_of(self) -> tuple[int, ...]:
        """Number of the socket of every GPU."""
        return tuple(self.sockets.holding((local,)) or 0 for local in range(self.gpus))


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Leaf switches that so many nodes share (all where None), with `rails` one for each NIC of a node, and a spine.

    `oversubscription` is what the ports below a leaf can send over what its links to the spine carry.
    """

    nodes_per_leaf: int | None = None
    rails: bool = False
    oversubscription: float = 1.0
    latency_s: float = HOP_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """Nodes in order, each with how often it stands there, and the network between them."""

    name: str
    nodes: tuple[tuple[int, Node], ...]
    network: Network = Network()

    def topology(self) -> Topology:
        """Every GPU, switch and link."""
        flat = [node for count, node in self.nodes for _ in range(count)]
        wiring = _Wiring([], [], [])
        ports: dict[tuple[int, int], list[tuple[str, Link]]] = {}
        for index, node in enumerate(flat):
            wiring.add(index, node)
            if node.nics is None or len(flat) == 1:
                continue  # nothing to reach over ports
            for rail in range(len(node.nics.groups)):
                leaf = index // (self.network.nodes_per_leaf or len(flat)), rail if self.network.rails else 0
                ports.setdefault(leaf, []).append((f"node{index}:nic{rail}", node.nics.link))
        for number, key in enumerate(sorted(ports)):
            wiring.switches.append(Switch(name=f"leaf{number}", kind="leaf"))
            wiring.wires.extend((port, f"leaf{number}", link) for port, link in ports[key])
            if len(ports) > 1:
                wiring.wires.append((f"leaf{number}", "spine", self._uplink([link for _, link in ports[key]])))
        if len(ports) > 1:
            wiring.switches.append(Switch(name="spine", kind="spine"))
        return Topology(
            name=self.name,
            devices=tuple(wiring.devices),
            switches=tuple(wiring.switches),
            wires=tuple(wiring.wires),
        )

    def _uplink(self, ports: list[Link]) -> Link:
        """All links of a leaf to the spine switches, as one."""
        ratio = self.network.oversubscription
        return Link(
            bytes_per_s=add_up(port.bytes_per_s for port in ports) / ratio,
            latency_s=self.network.latency_s,
            kind="ethernet" if any(port.kind == "ethernet" for port in ports) else "infiniband",
            source=f"ports below the leaf, {ratio:g}:1",
        )

    def cluster(self) -> Cluster:
        """The same as identical nodes with one link inside and one between them: the worst, so against us.

        Between nodes a GPU has its share of the NIC and of the way to the spine; all send at once. A node counts as
        large as the largest.

        Raises
        ------
        InputError      GPUs of several types
        """
        if len({node.gpu for _, node in self.nodes}) > 1:
            names = ", ".join(dict.fromkeys(node.gpu.name for _, node in self.nodes))
            raise InputError(
                f"cluster {self.name!r}: its GPUs are of several types ({names}), and this takes one; describe the "
                "nodes of each in a file of their own"
            )
        kinds = [self._worst(node) for node in dict.fromkeys(node for _, node in self.nodes)]
        inters = [link for _, link in kinds if link is not None]
        return Cluster(
            name=self.name,
            gpu=self.nodes[0][1].gpu,
            nodes=sum(count for count, _ in self.nodes),
            gpus_per_node=max(node.gpus for _, node in self.nodes),
            intra=min((link for link, _ in kinds), key=lambda link: link.bytes_per_s),
            inter=min(inters, key=lambda link: link.bytes_per_s, default=None),
        )

    def _worst(self, node: Node) -> tuple[Link, Link | None]:
        """The worst link inside a kind of node, and between two of them."""
        within = replace(self, nodes=((1, node),)).topology()
        pairs = list(combinations(within.gpus(), 2))
        intra = node.nvlink.link if node.nvlink else node.pcie.link
        if pairs:
            narrow = min((link for pair in pairs for link in within.path(*pair)), key=lambda link: link.bytes_per_s)
            intra = replace(narrow, latency_s=max(within.latency(*pair) for pair in pairs))
        if not node.nics:
            return intra, None
        # Two nodes stand for all, on different leaves where there are several; equal ranks talk on their own rail.
        count = sum(count for count, _ in self.nodes)
        several = count > (self.network.nodes_per_leaf or count)
        network = replace(self.network, nodes_per_leaf=1 if several else None, rails=False)
        two = replace(self, nodes=((2, node),), network=network).topology()
        apart = list(product(two.gpus()[: node.gpus], two.gpus()[node.gpus :]))
        port = node.nics.link
        share = port.bytes_per_s / max(map(len, node.nics.groups))
        if several:
            share /= network.oversubscription
        inter = replace(
            port,
            bytes_per_s=min(share, *(two.bandwidth(*pair) for pair in apart)),
            latency_s=max(two.latency(*pair) for pair in apart),
        )
        return intra, inter


@dataclass(frozen=True, slots=True)
class _Wiring:
    """What is there so far."""

    devices: list[Device]
    switches: list[Switch]
    wires: list[tuple[str, str, Link]]

    def add(self, index: int, node: Node) -> None:
        """Wire one node, its NICs included."""
        here = f"node{index}:"
        pcie, bus = node.pcie, node.pcie.link
        for kind, level in (("nvlink", node.nvlink), ("pcie", pcie), ("socket", node.sockets), ("nic", node.nics)):
            for number in range(len(level.groups) if level else 0):
                self.switches.append(Switch(name=f"{here}{kind}{number}", kind=kind, node=index))
        for local in range(node.gpus):
            self.devices.append(Device(node=index, local=local, gpu=node.gpu))
            if node.nvlink and (domain := node.nvlink.holding((local,))) is not None:
                self.wires.append((f"{here}{local}", f"{here}nvlink{domain}", node.nvlink.link))
            switch = pcie.holding((local,))
            above = f"socket{node.sockets.holding((local,))}" if switch is None else f"pcie{switch}"
            self.wires.append((f"{here}{local}", f"{here}{above}", bus))
        for number, group in enumerate(pcie.groups):
            self.wires.append((f"{here}pcie{number}", f"{here}socket{node.sockets.holding(group)}", bus))
        for one, other in combinations(range(len(node.sockets.groups)), 2):
            self.wires.append((f"{here}socket{one}", f"{here}socket{other}", node.sockets.link))
        nics = node.nics.groups if node.nics else ()
        # A NIC of its own is reached over its GPU's PCIe switch, which nothing else then has to share.
        alone = all(len(group) == 1 for group in nics)
        for number, group in enumerate(nics):
            above = str(group[0]) if alone else _above(node, group)
            self.wires.append((f"{here}{above}", f"{here}nic{number}", bus))


def assumed_bus(gpu: Gpu) -> Link:
    """PCIe x16 of an accelerator's generation: Gen3 up to Turing, Gen4 up to Ada, then Gen5."""
    later = gpu.capability is None or gpu.capability >= 9
    gb_per_s = 64 if later else 32 if gpu.capability and gpu.capability >= 8 else 16
    return Link(bytes_per_s=gb_per_s * GB, latency_s=_BUS_S, kind="pcie", source=_BUS)


def _above(node: Node, group: tuple[int, ...]) -> str:
    """What a shared NIC hangs on: the PCIe switch of its GPUs, their socket, else the socket of the first."""
    if (switch := node.pcie.holding(group)) is not None:
        return f"pcie{switch}"
    socket = node.sockets.holding(group)
    return f"socket{node.sockets.holding(group[:1]) if socket is None else socket}"


def resized(node: Node, gpus: int) -> Node:
    """The same node with its first GPUs only."""

    def first(level: Level) -> Level:
        groups = (tuple(gpu for gpu in group if gpu < gpus) for group in level.groups)
        return replace(level, groups=tuple(group for group in groups if group))

    return replace(
        node,
        gpus=gpus,
        nvlink=first(node.nvlink) if node.nvlink else None,
        pcie=first(node.pcie),
        sockets=first(node.sockets),
        nics=first(node.nics) if node.nics else None,
    )
