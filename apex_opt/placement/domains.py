"""What is free in domains of a kind, and how many replicas that is room for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from apex_opt.cluster.tree import place_of
from apex_opt.cluster.types import Cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.cluster.composition import Composition


class Room(NamedTuple):
    """Free GPUs of a domain, at least one."""

    name: str
    gpus: tuple[str, ...]


def rooms(wiring: Cluster | Composition, kind: str, free: Iterable[str]) -> tuple[Room, ...]:
    """Free GPUs by the domain of a kind that they are in, as the cluster is described; domains without any left out.

    Parameters
    ----------
    kind : one of `LEVELS`    a GPU with neither NVLink nor a PCIe switch is its own switch; identical nodes with one
                              link inside have one switch and one socket each
    free : names
    """
    name_of = _named(wiring, kind)
    found: dict[str, list[str]] = {}
    for gpu in sorted(free, key=place_of):
        found.setdefault(name_of(*place_of(gpu)), []).append(gpu)
    return tuple(Room(name, tuple(gpus)) for name, gpus in found.items())


def _named(wiring: Cluster | Composition, kind: str) -> Callable[[int, int], str]:
    """Name of the domain of a kind that a GPU, by its node and its number there, is in."""
    if kind == "cluster":
        return lambda _node, _local: "cluster"
    if kind == "node" or (isinstance(wiring, Cluster) and kind != "leaf"):
        return lambda node, _local: f"node{node}"
    if isinstance(wiring, Cluster):
        return lambda _node, _local: "leaf0"
    nodes = [node for count, node in wiring.nodes for _ in range(count)]
    if kind == "leaf":
        per_leaf = wiring.network.nodes_per_leaf or len(nodes)
        return lambda node, _local: f"leaf{node // per_leaf}"
    numbers = cache(lambda at: wiring.nodes[at][1].switches() if kind == "switch" else wiring.nodes[at][1].socket_of())
    which = [index for index, (count, _) in enumerate(wiring.nodes) for _ in range(count)]
    return lambda node, local: f"node{node}:{kind}{numbers(which[node])[local]}"


def replicas_in(found: Sequence[Room], size: int) -> int:
    """Replicas of so many GPUs for which there is room, each inside one of some domains."""
    return sum(len(room.gpus) // size for room in found)


def groups(found: Sequence[Room]) -> dict[int, int]:
    """How many groups of 2, of 4, of 8 ... the free GPUs of some domains make, each inside one of them."""
    sizes = (1 << power for power in range(1, max((len(room.gpus) for room in found), default=0).bit_length()))
    return {size: replicas_in(found, size) for size in sizes}
