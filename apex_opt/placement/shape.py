"""What is to be placed, and the ways to lay it out on a tree of domains.

A way is chosen by two things. **Chunks**: for every level of domains a number of consecutive ranks of a replica such
that each such chunk lies inside one domain of that level; chunks of a level are made of those of the level below, and
cut a stage into equal parts or hold whole stages, as engines start equally many ranks on every node. **Rates**: what a
chunk gets of the links it sends over while all others send as well. A chunk inside a node sends round a ring of the
chunks of its group, once out of its domain; out of nodes every rank sends its own part, over the NIC of its GPU, and a
group sends over the uplinks of a leaf what the ranks of one of its nodes do.

Both follow from how many GPUs of every domain are used: a multiple of its chunk, and no more than leaves each chunk
its rate. So a way is feasible if so many fit into the tree from the innermost level up, which is exact as domains lie
within domains; GPUs of a bin are interchangeable, and so are chunks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import inf
from typing import TYPE_CHECKING, Final, NamedTuple

from apex_opt.plans.layout import Layout, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.tree import Tree
    from apex_opt.cluster.types import Link
    from apex_opt.plans.plan import Plan


_UNLIMITED: Final = 1 << 30
_ROUNDING: Final = 1e-9  # a rate that is an n-th of a link serves n


class Shape(NamedTuple):
    """Replicas of pipelines of stages of ranks."""

    replicas: int
    stages: int
    ranks: int

    @classmethod
    def of(cls, plan: Plan) -> Shape:
        """The shape of a plan."""
        return cls(plan.replicas, plan.stages, plan.stage_devices)

    @property
    def replica(self) -> int:
        """Ranks of a replica."""
        return self.stages * self.ranks

    @property
    def size(self) -> int:
        """GPUs it takes."""
        return self.replicas * self.replica

    def chunks(self) -> tuple[int, ...]:
        """Sizes into which a replica can be cut: equal parts of a stage, or whole stages in equal numbers."""
        return _chunks(self.stages, self.ranks)


@cache
def _chunks(stages: int, ranks: int) -> tuple[int, ...]:
    parts, groups = ([n for n in range(1, whole + 1) if whole % n == 0] for whole in (ranks, stages))
    return (*parts, *(n * ranks for n in groups[1:]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Chunks and rates.

    Parameters
    ----------
    chunks : tuple of int             by level
    layout : Layout                   what they amount to
    limits : tuple of tuple of int    by level and domain, GPUs that may be used
    ports : tuple of int              by port, GPUs that may be used
    """

    chunks: tuple[int, ...]
    layout: Layout
    limits: tuple[tuple[int, ...], ...]
    ports: tuple[int, ...]


class _Rate(NamedTuple):
    """What the chunks of a level get, and the GPUs that may then be used of domains, of parts of its own, of ports.

    The domains are those of level `at` that have the links.
    """

    link: Link | None
    at: int
    domains: tuple[int, ...]
    parts: tuple[int, ...]
    ports: tuple[int, ...]


def ways(tree: Tree, shape: Shape, *, every: bool = True) -> list[Way]:
    """The ways to lay a shape out, none where it does not fit.

    Larger chunks are never slower at the same rates, so where nothing is shared the largest are enough to know the
    least time; `every` has the others too, which may be as quick.

    Parameters
    ----------
    tree
    shape : Shape    of the plan
    every : bool     whether those are told that are never quicker, too
    """
    chains = _chains(tree, shape)
    if not every and not tree.contended:
        chains = [chain for chain in chains if not any(_above(other, chain) for other in chains if other != chain)]
    found = []
    for chunks in chains:
        if chunks not in tree.rates:
            tree.rates[chunks] = list(product(*(_rates(tree, chunks, level) for level in range(len(chunks)))))
        found += [_way(tree, shape, chunks, chosen) for chosen in tree.rates[chunks]]
    return found


def steps(tree: Tree, shape: Shape) -> list[int]:
    """Sizes in GPUs, in rising order, between which replicas of a shape have the same ways, however many there are.

    It holds where nothing is shared between domains (`Tree.contended`): only room decides then.
    """
    sizes = shape.chunks()
    chains: list[tuple[int, ...]] = [()]
    found = {tree.size}
    for level in tree.levels[:-1]:
        most = max(tree.free(domain) for domain in level.domains)
        able = [size for size in sizes if size <= most]
        chains = [(*chain, size) for chain in chains for size in able if size % (chain[-1] if chain else 1) == 0]
        found |= {_room(tree, chain) for chain in chains}
    return sorted(found)


def fits(tree: Tree, shape: Shape, way: Way) -> bool:
    """Whether a shape can be placed in a way: whole chunks are filled in from the innermost domains up.

    Where chunks make up larger ones, some of these have to lie in several parts of a domain, or they would be larger.

    Parameters
    ----------
    tree
    shape : Shape    of the plan
    way : Way        how it lies
    """
    rooms = _rooms(tree, way.chunks, way.limits, way.ports)
    if sum(rooms[-1]) < shape.size:
        return False
    for level in range(1, len(way.chunks)):
        chunk, below = way.chunks[level], way.chunks[level - 1]
        if chunk > below and not any(
            room >= chunk and sum(rooms[level - 1][part] >= below for part in parts) > 1
            for room, parts in zip(rooms[level], tree.parts[level], strict=True)
        ):
            return False
    return True


def _rooms(
    tree: Tree, chunks: Sequence[int], limits: Sequence[Sequence[int]] | None = None, ports: Sequence[int] = ()
) -> list[list[int]]:
    """GPUs of every domain that can be used in chunks, by level."""
    room = [len(part.gpus) for part in tree.bins]
    found = []
    for level, chunk in enumerate(chunks):
        above = []
        for index, parts in enumerate(tree.parts[level]):
            inside = sum(room[part] for part in parts)
            for port, mine in tree.ports_in[level].get(index, ()) if ports else ():
                inside -= max(0, sum(room[part] for part in mine) - ports[port])
            most = inside if limits is None else min(inside, limits[level][index])
            above.append(most // chunk * chunk)
        room = above
        found.append(room)
    return found


def _chains(tree: Tree, shape: Shape) -> list[tuple[int, ...]]:
    """Chunks of every level, each a multiple of the one below, with which the shape fits as far as room goes."""
    sizes = shape.chunks()
    chains: list[tuple[int, ...]] = [()]
    for level in tree.levels[:-1]:
        most = max(tree.free(domain) for domain in level.domains)
        steps = [size for size in sizes if size <= most]
        chains = [(*chain, size) for chain in chains for size in steps if size % (chain[-1] if chain else 1) == 0]
        # What does not fit with whole chunks of any size above does not fit.
        chains = [chain for chain in chains if _room(tree, chain) >= shape.size]
    return [(*chain, shape.replica) for chain in chains if tree.size >= shape.size]


def _room(tree: Tree, chunks: tuple[int, ...]) -> int:
    """GPUs of the cluster that can be used in chunks on its inner levels."""
    if chunks not in tree.rooms:
        tree.rooms[chunks] = sum(_rooms(tree, chunks)[-1]) if chunks else tree.size
    return tree.rooms[chunks]


def _above(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether chunks are multiples of others on every level."""
    return all(a % b == 0 for a, b in zip(one, other, strict=True))


def _rates(tree: Tree, chunks: tuple[int, ...], level: int) -> list[_Rate]:
    """What the chunks below a level may get where they make up larger ones, from the most to the least."""
    own, below = tree.levels[level], chunks[level - 1] if level else 1
    at, every = tree.links(level)
    links = [link for link in every if link is not None]
    free = (_UNLIMITED,) * len(every)
    parts = tree.levels[level - 1].domains if level else ()
    if chunks[level] == below or not links:
        return [_Rate(None, at, free, (_UNLIMITED,) * len(parts), (_UNLIMITED,) * len(tree.ports))]
    flows = _flows(tree, chunks, level)
    top = max(link.bytes_per_s for link in links)
    rates = {link.bytes_per_s for link in links}
    for part in parts:
        if part.out_bytes_per_s < inf:
            most = tree.free(part) // below
            rates |= {part.out_bytes_per_s / (count * flows) for count in range(1, most + 1)}
    if own.far:
        rates |= {port.bytes_per_s / n for port in tree.ports for n in range(1, tree.free(port) + 1)}
    found = []
    for rate in sorted((rate for rate in rates if rate <= top), reverse=True):
        for latency_s in sorted({link.latency_s for link in links if link.bytes_per_s >= rate}):
            found.append(
                _Rate(
                    tree.crossed(level, rate, latency_s),
                    at,
                    tuple(
                        _UNLIMITED if link is None or (link.bytes_per_s >= rate and link.latency_s <= latency_s) else 0
                        for link in every
                    ),
                    tuple(_most(part.out_bytes_per_s, rate * flows, below) for part in parts),
                    tuple(_most(port.bytes_per_s, rate, 1) if own.far else _UNLIMITED for port in tree.ports),
                )
            )
    return found


def _flows(tree: Tree, chunks: tuple[int, ...], level: int) -> int:
    """Rings or ranks of a chunk below a level that send out of its domain at once."""
    if not tree.levels[level].far:
        return 1
    return max(chunk for chunk, kind in zip(chunks[:level], tree.levels, strict=False) if not kind.far)


def _most(bytes_per_s: float, rate: float, chunk: int) -> int:
    """GPUs in chunks that each get a rate."""
    return _UNLIMITED if bytes_per_s == inf else int(bytes_per_s / rate * (1 + _ROUNDING)) * chunk


def _way(tree: Tree, shape: Shape, chunks: tuple[int, ...], rates: Sequence[_Rate]) -> Way:
    limits = [(_UNLIMITED,) * len(level.domains) for level in tree.levels]
    for level, rate in enumerate(rates):
        limits[rate.at] = tuple(map(min, limits[rate.at], rate.domains))
        if level:
            limits[level - 1] = tuple(map(min, limits[level - 1], rate.parts))
    ports = tuple(map(min, *(rate.ports for rate in rates))) if len(rates) > 1 else rates[0].ports
    return Way(chunks=chunks, layout=_layout(tree, shape, chunks, rates), limits=tuple(limits), ports=ports)


def _layout(tree: Tree, shape: Shape, chunks: tuple[int, ...], rates: Sequence[_Rate]) -> Layout:
    """The tiers on which chunks of the level below make up larger ones."""
    tiers = (
        Tier(level.kind, chunk, rate.link, level.far)
        for chunk, rate, level in zip(chunks, rates, tree.levels, strict=True)
        if rate.link is not None
    )
    return Layout(stage_devices=shape.ranks, tiers=tuple(tiers))
