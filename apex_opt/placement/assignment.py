"""Ranks on GPUs: made from counts, as engines deal them by default, and what any assignment of them amounts to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.cluster.tree import place_of
from apex_opt.plans.layout import Layout, Tier

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.tree import Domain, Tree
    from apex_opt.placement.shape import Shape

Assignment = tuple[tuple[tuple[str, ...], ...], ...]
"""GPUs by replica, stage and rank."""


def arranged(gpus: Sequence[str], shape: Shape) -> Assignment:
    """GPUs dealt to the ranks of one replica after the other, stage by stage."""
    found, at = [], 0
    for _ in range(shape.replicas):
        stages = []
        for _ in range(shape.stages):
            stages.append(tuple(gpus[at : at + shape.ranks]))
            at += shape.ranks
        found.append(tuple(stages))
    return tuple(found)


def rank_order(tree: Tree, shape: Shape) -> Assignment:
    """What engines do by default: ranks in order on the free GPUs in order."""
    return arranged(tree.gpus[: shape.size], shape)


def filled(tree: Tree, shape: Shape, chunks: Sequence[int], used: Sequence[int], *, parted: bool = False) -> Assignment:
    """An assignment with whole chunks in every domain.

    Parameters
    ----------
    chunks : by level
    used : by bin, GPUs that are used: of every domain a multiple of its chunk
    parted : whether the first chunk of a domain is made of several parts of it even if it would fit into one
    """
    pieces: list[list[tuple[str, ...]]] = [
        [(gpu,) for gpu in part.gpus[:count]] for part, count in zip(tree.bins, used, strict=True)
    ]
    for level, chunk in enumerate(chunks):
        joined = []
        for parts in tree.parts[level]:
            queues = [pieces[part] for part in parts if pieces[part]]
            if parted and len(queues) > 1 and chunk > len(queues[0][0]):
                queues = [[queues[0][0]], [queues[1][0]], queues[0][1:], queues[1][1:], *queues[2:]]
            flat = [gpu for queue in queues for piece in queue for gpu in piece]
            joined.append([tuple(flat[at : at + chunk]) for at in range(0, len(flat), chunk)])
        pieces = joined
    replicas = pieces[0] if parted else sorted(pieces[0], key=lambda gpus: place_of(gpus[0]))
    return arranged([gpu for replica in replicas for gpu in replica], shape)


def layout_of(tree: Tree, shape: Shape, assignment: Assignment) -> Layout:
    """What an assignment amounts to, counted GPU by GPU: the oracle of placements.

    The chunks are the largest that lie in one domain each; every link is shared by all that send over it at once.

    Parameters
    ----------
    tree
    shape : Shape    of the plan
    assignment
    """
    replicas = [[gpu for stage in stages for gpu in stage] for stages in assignment]
    bin_of = {gpu: index for index, part in enumerate(tree.bins) for gpu in part.gpus}
    used = [0] * len(tree.bins)
    for gpu in (gpu for gpus in replicas for gpu in gpus):
        used[bin_of[gpu]] += 1
    below, ranks_out, tiers = 1, 1, []
    for depth, level in enumerate(tree.levels):
        ends = {index: number for number, d in enumerate(level.domains) for index in range(d.first, d.last)}
        homes = [[ends[bin_of[gpu]] for gpu in gpus] for gpus in replicas]
        chunk = max(size for size in shape.chunks() if all(_whole(home, size) for home in homes))
        bearers, every = tree.links(depth)
        bearing = zip(tree.levels[bearers].domains, every, strict=True)
        links = [link for domain, link in bearing if link is not None and _count(used, domain)]
        if chunk > below and links:
            flows = ranks_out if level.far else 1
            rates = [link.bytes_per_s for link in links]
            for part in tree.levels[depth - 1].domains if depth else ():
                if mine := _count(used, part):
                    rates.append(part.out_bytes_per_s / (mine // below * flows))
            if level.far:
                rates += [port.bytes_per_s / mine for port in tree.ports if (mine := sum(used[port.first : port.last]))]
            link = tree.crossed(depth, min(rates), max(link.latency_s for link in links))
            tiers.append(Tier(level.kind, chunk, link, level.far))
        if not level.far:
            ranks_out = chunk
        below = chunk
    return Layout(stage_devices=shape.ranks, tiers=tuple(tiers))


def _count(used: Sequence[int], domain: Domain) -> int:
    return sum(used[domain.first : domain.last])


def _whole(homes: Sequence[int], size: int) -> bool:
    """Whether every aligned chunk of so many ranks has one home."""
    return all(len(set(homes[at : at + size])) == 1 for at in range(0, len(homes), size))
