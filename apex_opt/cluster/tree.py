"""The free GPUs of a cluster as domains within domains, with what every domain can pass on."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, combinations, groupby, pairwise, product
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apex_opt.cluster.composition import Composition
from apex_opt.errors import UsageError
from apex_opt.units import add_up

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from apex_opt.cluster.composition import Node
    from apex_opt.cluster.topology import Topology
    from apex_opt.cluster.types import Cluster, Gpu, Link

LEVELS: Final = ("switch", "socket", "node", "leaf", "cluster")
"""Kinds of domains from the innermost: an NVLink domain or PCIe switch, a socket, a node, the nodes of a leaf switch,
everything."""

_NODE: Final = LEVELS.index("node")
_FEW: Final = 16  # GPUs of a node up to which all pairs are looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """Free GPUs of one type that are wired alike: nothing tells one from another."""

    gpus: tuple[str, ...]
    gpu: Gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """GPUs that share a switch, a socket, a node, a leaf switch or nothing but the cluster.

    Parameters
    ----------
    name : str
    first, last : int            its bins, from `first` to before `last`
    link : Link or None          what two GPUs in different parts of it have between them at worst, undisturbed; None
                                 where it has one part, and outside nodes (`DomainLevel.reach`)
    out_bytes_per_s : float      what can leave it for the rest of the domain around it, of all its GPUs together;
                                 infinite of a node, which is left over ports
    """

    name: str
    first: int
    last: int
    link: Link | None
    out_bytes_per_s: float = float("inf")


class Port(NamedTuple):
    """A NIC that several GPUs share, from bin `first` to before `last`, and its bytes per second.

    These bins make up domains, or lie in one of the innermost.
    """

    name: str
    first: int
    last: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainLevel:
    """All domains of one kind, in the order of their bins; `far` where their parts are nodes or more.

    There `reach` tells for every node what its GPUs have at worst to one of another node like it: between unlike nodes
    the slower of two decides.
    """

    kind: str
    far: bool
    domains: tuple[Domain, ...]
    reach: tuple[Link, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Bins, the levels of domains above them from the innermost to the whole cluster, and the NICs that are shared.

    What a NIC that one GPU has for itself can carry is in the links of the domains.
    """

    name: str
    bins: tuple[Bin, ...]
    levels: tuple[DomainLevel, ...]
    ports: tuple[Port, ...] = ()

    @property
    def size(self) -> int:
        """Free GPUs."""
        return sum(len(part.gpus) for part in self.bins)

    @property
    def gpus(self) -> tuple[str, ...]:
        """Names of the free GPUs, in the order of nodes and GPUs."""
        return tuple(sorted((gpu for part in self.bins for gpu in part.gpus), key=place_of))

    def free(self, domain: Domain | Port) -> int:
        """Free GPUs of a domain, or of those that share a NIC."""
        return self._sums[domain.last] - self._sums[domain.first]

    @cached_property
    def _sums(self) -> list[int]:
        return [0, *accumulate(len(part.gpus) for part in self.bins)]

    @cached_property
    def contended(self) -> bool:
        """Whether it matters how many GPUs of a domain are used, or whether larger domains can be quicker.

        That is where links are shared, not all alike, or faster than those of a level below.
        """
        links = [{link for link in self.links(depth)[1] if link is not None} for depth in range(len(self.levels))]
        shared = any(domain.out_bytes_per_s < float("inf") for level in self.levels for domain in level.domains)
        slower = [link for alike in links for link in alike]
        quicker = any(a.bytes_per_s < b.bytes_per_s or a.latency_s > b.latency_s for a, b in pairwise(slower))
        return bool(self.ports) or shared or quicker or any(len(alike) > 1 for alike in links)

    def links(self, level: int) -> tuple[int, tuple[Link | None, ...]]:
        """A level, and of each of its domains the link that chunks of some level cross in it, or out of it: nodes."""
        if not self.levels[level].far:
            return level, tuple(domain.link for domain in self.levels[level].domains)
        return sum(not known.far for known in self.levels) - 1, self.levels[level].reach

    def crossed(self, level: int, bytes_per_s: float, latency_s: float) -> Link:
        """A link of a level on which chunks have some rate and delay: of those no slower than that the narrowest.

        Parameters
        ----------
        level : int            of the domains that are crossed
        bytes_per_s : float    rate of the chunks
        latency_s : float      delay of the chunks
        """
        able = [link for link in self.links(level)[1] if link and link.bytes_per_s >= bytes_per_s]
        narrow = min((link for link in able if link.latency_s <= latency_s), key=lambda link: link.bytes_per_s)
        return replace(narrow, bytes_per_s=bytes_per_s, latency_s=latency_s)

    @cached_property
    def rooms(self) -> dict[tuple[int, ...], int]:
        """GPUs that can be used in chunks of some sizes, as far as they were asked for."""
        return {}

    @cached_property
    def rates(self) -> dict[tuple[int, ...], list[Any]]:
        """What chunks of some sizes may get, as far as they were asked for."""
        return {}

    @cached_property
    def parts(self) -> tuple[tuple[range, ...], ...]:
        """Of every level and domain its parts, domains of the level below by index; bins on the innermost."""
        ends = list(range(1, len(self.bins) + 1))
        found = []
        for level in self.levels:
            bounds = [0, *(bisect_left(ends, domain.last) + 1 for domain in level.domains)]
            found.append(tuple(range(first, last) for first, last in pairwise(bounds)))
            ends = [domain.last for domain in level.domains]
        return tuple(found)

    @cached_property
    def ports_in(self) -> tuple[dict[int, tuple[tuple[int, range], ...]], ...]:
        """By level and domain the NICs that its parts share, and no smaller domain has: each with these parts."""
        found: list[dict[int, tuple[tuple[int, range], ...]]] = [{} for _ in self.levels]
        for number, port in enumerate(self.ports):
            for depth, level in enumerate(self.levels):
                at = bisect_left([domain.last for domain in level.domains], port.last)
                if level.domains[at].first > port.first:
                    continue
                ends = [d.last for d in self.levels[depth - 1].domains] if depth else range(1, len(self.bins) + 1)
                parts = [part for part in self.parts[depth][at] if port.first < ends[part] <= port.last]
                found[depth][at] = (*found[depth].get(at, ()), (number, range(parts[0], parts[-1] + 1)))
                break
        return tuple(found)

    @classmethod
    def of(cls, cluster: Cluster | Composition, taken: Collection[str] = (), gpu: str | None = None) -> Tree:
        """The GPUs of a cluster but those taken, or of these those of one type, by its name.

        Equal GPUs of nodes talk on their own rail. An NVLink domain over several sockets joins them.

        Parameters
        ----------
        cluster
        taken : sequence of str    GPUs that are in use
        gpu : str or None          the type that is asked for; None where there is one

        Raises
        ------
        UsageError      no GPU is left
        """
        if isinstance(cluster, Composition):
            return _compose(cluster, frozenset(taken), gpu)
        return _uniform(cluster, frozenset(taken))


def free_types(cluster: Cluster | Composition, taken: Collection[str] = ()) -> tuple[str, ...]:
    """Types of which a GPU is left, in the order of the nodes."""
    if not isinstance(cluster, Composition):
        return (cluster.gpu.name,) if len(taken) < cluster.size else ()
    found, first = {}, 0
    for count, node in cluster.nodes:
        names = (f"node{n}:{local}" for n in range(first, first + count) for local in range(node.gpus))
        if any(name not in taken for name in names):
            found[node.gpu.name] = True
        first += count
    return tuple(found)


def place_of(gpu: str) -> tuple[int, int]:
    """Node and number within it of a GPU's name, `node0:3`."""
    node, local = gpu.removeprefix("node").split(":")
    return int(node), int(local)


def _uniform(cluster: Cluster, taken: frozenset[str]) -> Tree:
    """Identical nodes with one link inside and one between them."""
    names = ([f"node{node}:{local}" for local in range(cluster.gpus_per_node)] for node in range(cluster.nodes))
    nodes = [(node, tuple(gpu for gpu in gpus if gpu not in taken)) for node, gpus in enumerate(names)]
    nodes = [(node, gpus) for node, gpus in nodes if gpus]
    _refuse_none(cluster.name, nodes)
    domains = (
        Domain(name=f"node{node}", first=index, last=index + 1, link=cluster.intra)
        for index, (node, _) in enumerate(nodes)
    )
    levels = [DomainLevel(kind="node", far=False, domains=tuple(domains))]
    if len(nodes) > 1:
        assert cluster.inter is not None  # several nodes have an inter link
        whole = Domain(name="cluster", first=0, last=len(nodes), link=None)
        reach = (cluster.inter,) * len(nodes)
        levels.append(DomainLevel(kind="cluster", far=True, domains=(whole,), reach=reach))
    bins = tuple(Bin(gpus=gpus, gpu=cluster.gpu) for _, gpus in nodes)
    return Tree(name=cluster.name, bins=bins, levels=tuple(levels))


def _refuse_none(name: str, free: Sequence[object]) -> None:
    if not free:
        raise UsageError(f"cluster {name!r}: no GPU is free; take fewer out with --busy and --down")


class _Slot(NamedTuple):
    """Where a GPU sits: numbers of its leaf, node, socket, switch and shared NIC (-1: its own), then its own."""

    leaf: int
    node: int
    socket: int
    switch: int
    nic: int
    local: int


class _Shape:
    """A kind of node: of every GPU the numbers of its socket, its switch and its NIC, and the links between them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.switch, sockets = node.switches(), node.socket_of()
        joined = len(set(zip(self.switch, sockets, strict=True))) > len(set(self.switch))
        self.socket = (0,) * node.gpus if joined else sockets
        groups = node.nics.groups if node.nics else ()
        shared = {local: nic for nic, group in enumerate(groups) if len(group) > 1 for local in group}
        self.nic = [shared.get(local, -1) for local in range(node.gpus)]
        self.topology = Composition(name="node", nodes=((1, node),)).topology()

    def within(self, level: int) -> dict[int, Link]:
        """The worst link between GPUs in different parts of a domain, by its number on a level inside the node."""
        part_of = (range(self.node.gpus), self.switch, self.socket)[level]
        domain_of = (self.switch, self.socket, (0,) * self.node.gpus)[level]
        met: dict[tuple[int, int], list[int]] = {}
        for local, key in enumerate(zip(domain_of, part_of, strict=True)):
            mates = met.setdefault(key, [])
            if len(mates) < 2 or self.node.gpus <= _FEW:
                mates.append(local)
        found: dict[int, Link] = {}
        for domain, groups in groupby(sorted(met), key=lambda key: key[0]):
            parts = [met[key] for key in groups]
            if level == 0 and self.node.gpus > _FEW:
                parts = [parts[0], parts[-1]] if len(parts) > 1 else []  # they have the same link to it
            pairs = [(a, b) for one, other in combinations(parts, 2) for a, b in product(one, other)]
            if pairs:
                found[domain] = worst(self.topology, ((f"node0:{a}", f"node0:{b}") for a, b in pairs))
        return found

    def out(self, level: int) -> dict[int, float]:
        """Bytes per second that can leave a domain for the others of its node, by the narrowest cut between them."""
        import networkx as nx

        domain_of = (self.switch, self.socket, (0,) * self.node.gpus)[level]
        found: dict[int, float] = {}
        for domain in set(domain_of) if len(set(domain_of)) > 1 else ():
            graph: nx.DiGraph[str] = nx.DiGraph()
            for a, b, link in self.topology.wires:
                graph.add_edge(a, b, capacity=link.bytes_per_s)
                graph.add_edge(b, a, capacity=link.bytes_per_s)
            for local in range(self.node.gpus):
                gpu = f"node0:{local}"
                graph.add_edge(*(("from", gpu) if domain_of[local] == domain else (gpu, "to")))
            found[domain] = float(nx.maximum_flow_value(graph, "from", "to"))
        return found


def _compose(composition: Composition, taken: frozenset[str], gpu: str | None) -> Tree:
    """Nodes of any kind and the network between them."""
    network = composition.network
    kinds = [index for index, (count, _) in enumerate(composition.nodes) for _ in range(count)]
    per_leaf = network.nodes_per_leaf or len(kinds)
    shapes = [_Shape(node) for _, node in composition.nodes]
    slots = [
        _Slot(node // per_leaf, node, shape.socket[local], shape.switch[local], shape.nic[local], local)
        for node, kind in enumerate(kinds)
        for shape in (shapes[kind],)
        if gpu in (None, shape.node.gpu.name)
        for local in range(shape.node.gpus)
        if f"node{node}:{local}" not in taken
    ]
    _refuse_none(composition.name, slots)
    slots.sort()
    members = [tuple(group) for _, group in groupby(slots, key=lambda slot: slot[:-1])]
    bins = tuple(
        Bin(gpus=tuple(f"node{slot.node}:{slot.local}" for slot in group), gpu=shapes[kinds[group[0].node]].node.gpu)
        for group in members
    )
    keys = [group[0] for group in members]
    far = _Network(composition, kinds)
    nodes = list(dict.fromkeys(key.node for key in keys)) if len({key.node for key in keys}) > 1 else []
    inner = [[(shape.within(level), shape.out(level)) for level in range(_NODE + 1)] for shape in shapes]
    levels: list[DomainLevel] = []
    for depth, kind in enumerate(LEVELS):
        width, at = len(LEVELS) - 1 - depth, 0
        domains: list[Domain] = []
        for _, group in groupby(keys, key=lambda key: key[:width]):
            mates = list(group)
            slot, last = mates[0], at + len(mates)
            if depth <= _NODE:
                number = (slot.switch, slot.socket, 0)[depth]
                links, outs = inner[kinds[slot.node]][depth]
                name = f"node{slot.node}" + (f":{kind}{number}" if depth < _NODE else "")
                link, out = links.get(number), outs.get(number, float("inf"))
            else:
                link, across = None, kind == "cluster"
                name, out = ("cluster", float("inf")) if across else (f"leaf{slot.leaf}", far.uplink(slot.leaf))
            domains.append(Domain(name=name, first=at, last=last, link=link, out_bytes_per_s=out))
            at = last
        reach = tuple(far.reach(kinds[node], kind == "cluster") for node in nodes) if depth > _NODE else ()
        levels.append(DomainLevel(kind=kind, far=depth > _NODE, domains=tuple(domains), reach=reach))
    kept = _several(levels, bins)
    return Tree(
        name=composition.name, bins=bins, levels=kept, ports=far.ports(keys, [len(part.gpus) for part in bins], kept)
    )


def _several(levels: Iterable[DomainLevel], bins: Sequence[Bin]) -> tuple[DomainLevel, ...]:
    """The levels but those whose domains have one part each, which are joined with the level below."""
    kept: list[DomainLevel] = []
    for level in levels:
        spans = [(domain.first, domain.last) for domain in level.domains]
        alone = all(last - first == 1 and len(bins[first].gpus) == 1 for first, last in spans)
        if alone and level.kind in ("switch", "socket"):
            continue
        if kept and spans == [(domain.first, domain.last) for domain in kept[-1].domains]:
            part = kept.pop()
            own = level if level.kind == "node" or part.far else part
            named = zip(own.domains, part.domains, level.domains, strict=True)
            domains = (replace(d, link=a.link or b.link, out_bytes_per_s=b.out_bytes_per_s) for d, a, b in named)
            level = replace(own, domains=tuple(domains), reach=part.reach or (level.reach if own.far else ()))
        kept.append(level)
    for depth, (level, above) in enumerate(pairwise(kept)):
        around = {index: outer for outer in above.domains for index in range(outer.first, outer.last)}
        wide = max((link.bytes_per_s for link in above.reach), default=0.0)
        parts = tuple(_binding(domain, around[domain.first], wide, bins) for domain in level.domains)
        kept[depth] = replace(level, domains=parts)
    whole = tuple(replace(domain, out_bytes_per_s=float("inf")) for domain in kept[-1].domains)
    return (*kept[:-1], replace(kept[-1], domains=whole))


def _binding(part: Domain, around: Domain, wide: float, bins: Sequence[Bin]) -> Domain:
    """A domain, without what can leave it where its GPUs cannot fill that: then they share nothing."""
    gpus = sum(len(some.gpus) for some in bins[part.first : part.last])
    rate = wide if around.link is None else around.link.bytes_per_s
    if part.out_bytes_per_s >= gpus * rate:
        return replace(part, out_bytes_per_s=float("inf"))
    return part


class _Network:
    """What lies between the nodes of a composition."""

    def __init__(self, composition: Composition, kinds: list[int]) -> None:
        self.composition, self.kinds = composition, kinds
        self.network = composition.network
        self._links: dict[tuple[int, bool], Link] = {}

    def reach(self, kind: int, across: bool) -> Link:
        """The worst link between two nodes of a kind, on different leaves or the same, alone in the cluster."""
        if (kind, across) not in self._links:
            node = self.composition.nodes[kind][1]
            network = replace(self.network, nodes_per_leaf=1 if across else None, rails=False, oversubscription=1.0)
            two = replace(self.composition, nodes=((2, node),), network=network).topology()
            ends = sorted({0, node.gpus - 1}) if node.gpus > _FEW else range(node.gpus)
            self._links[kind, across] = worst(two, [(f"node0:{a}", f"node1:{b}") for a, b in product(ends, ends)])
        return self._links[kind, across]

    def uplink(self, leaf: int) -> float:
        """Bytes per second from the switches of a leaf to the spine."""
        per_leaf = self.network.nodes_per_leaf or len(self.kinds)
        rates = [self._port_rate(kind) for kind in self.kinds[leaf * per_leaf : (leaf + 1) * per_leaf]]
        return add_up(rates) / self.network.oversubscription

    def _port_rate(self, kind: int) -> float:
        """Bytes per second of all NICs of a node."""
        nics = self.composition.nodes[kind][1].nics
        return 0.0 if nics is None else len(nics.groups) * nics.link.bytes_per_s

    def ports(self, keys: Sequence[_Slot], sizes: Sequence[int], levels: Sequence[DomainLevel]) -> tuple[Port, ...]:
        """NICs that several GPUs share; where their GPUs lie across domains, all of a node as if they were one."""
        found: list[Port] = []
        for node, mates in groupby(enumerate(keys), key=lambda item: item[1].node):
            nics = self.composition.nodes[self.kinds[node]][1].nics
            bins: dict[int, list[int]] = {}
            own, every = 0, []
            for index, key in mates:
                every.append(index)
                if key.nic >= 0:
                    bins.setdefault(key.nic, []).append(index)
                else:
                    own += sizes[index]
            if not bins or nics is None:
                continue
            rate = nics.link.bytes_per_s
            ports = [Port(f"node{node}:nic{nic}", at[0], at[-1] + 1, rate) for nic, at in bins.items()]
            whole = all(port.last - port.first == len(at) for port, at in zip(ports, bins.values(), strict=True))
            if not whole or any(_cuts(port, domain) for port in ports for level in levels for domain in level.domains):
                ports = [Port(f"node{node}:nics", every[0], every[-1] + 1, rate * (len(bins) + own))]
            found += ports
        return tuple(found)


def _cuts(port: Port, domain: Domain) -> bool:
    """Whether a domain has GPUs with a NIC and GPUs without, and the NIC has GPUs elsewhere."""
    shared = min(port.last, domain.last) > max(port.first, domain.first)
    inside = domain.first <= port.first and port.last <= domain.last
    around = port.first <= domain.first and domain.last <= port.last
    return shared and not inside and not around


def worst(topology: Topology, pairs: Iterable[tuple[str, str]]) -> Link:
    """The narrowest of the links on the ways between pairs of GPUs, with the longest latency of any way."""
    links = []
    for pair in pairs:
        path = topology.path(*pair)
        links.append(replace(slowest(path), latency_s=add_up(link.latency_s for link in path)))
    return slowest(links)


def slowest(links: Sequence[Link]) -> Link:
    """The narrowest of several links, with the longest latency of any."""
    narrow = min(links, key=lambda link: link.bytes_per_s)
    return replace(narrow, latency_s=max(link.latency_s for link in links))
