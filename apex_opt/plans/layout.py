"""How the ranks of a plan lie on the hardware, as far as collectives can tell.

Ranks of a replica are numbered stage by stage, within a stage as its cells are cut. A placement is as good as its
worst replica: what counts is how large the chunks of consecutive ranks are of which every one, in every replica, lies
inside one domain of a kind, and what links the chunks have between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Link


class Tier(NamedTuple):
    """Domains of a kind: the ranks of a replica that lie in one, and what the smaller chunks in it have between them.

    `link` is what each chunk gets when all chunks send at once; `far` where it leads out of nodes, and then each rank.
    """

    kind: str
    chunk: int
    link: Link
    far: bool


class Spread(NamedTuple):
    """What a collective crosses: nodes, the slowest link inside them and the slowest between them, if any."""

    nodes: int
    near: Link | None
    far: Link | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Chunks of a replica's ranks and the links between them.

    Parameters
    ----------
    stage_devices : int
    tiers : tuple of Tier       from the innermost, chunks rising, each a multiple of the one before; the last holds the
                                whole replica; none for a single rank
    """

    stage_devices: int
    tiers: tuple[Tier, ...]

    @property
    def node_chunk(self) -> int:
        """Ranks of a replica that lie in one node."""
        return max((tier.chunk for tier in self.tiers if not tier.far), default=1)

    def crossed(self, ranks: int, stride: int = 1) -> tuple[Tier, ...]:
        """The tiers over which so many ranks, so many apart, lie at worst, from the innermost; none for one rank."""
        block, inside = ranks * stride, 1
        found = []
        for tier in self.tiers if ranks > 1 else ():
            if inside % block == 0:
                break
            found.append(tier)
            inside = tier.chunk
        return tuple(found)

    def spread(self, ranks: int, stride: int = 1) -> Spread:
        """What a collective of so many ranks, so many apart, crosses at worst."""
        crossed = self.crossed(ranks, stride)
        near, far = ([tier.link for tier in crossed if tier.far == out] for out in (False, True))
        nodes = min(ranks, _touched(ranks * stride, self.node_chunk)) if far else 1
        return Spread(nodes, slowest(near), slowest(far))

    @property
    def of_stage(self) -> Layout:
        """That of one stage, by which collectives cross as much: those of a stage are of ranks that divide it."""
        return _of_stage(self)

    @property
    def stage_link(self) -> tuple[Link | None, bool]:
        """Link between consecutive stages where it is slowest, None for one stage; whether it leads out of a node."""
        tiers = [tier for tier in self.tiers if tier.chunk > self.stage_devices]
        return slowest([tier.link for tier in tiers]), any(tier.far for tier in tiers)


@lru_cache(maxsize=1 << 12)
def _of_stage(layout: Layout) -> Layout:
    """The tiers up to that which holds a stage whole, and of this what a stage has of it."""
    ranks, tiers = layout.stage_devices, list[Tier]()
    for tier in layout.tiers if ranks > 1 else ():
        tiers.append(tier._replace(chunk=min(tier.chunk, ranks)))
        if tier.chunk >= ranks:
            break
    return Layout(stage_devices=ranks, tiers=tuple(tiers))


def slowest(links: Sequence[Link]) -> Link | None:
    """The narrowest of the links on a way, the latency that of the last; None for none."""
    if not links:
        return None
    narrow = min(links, key=lambda link: link.bytes_per_s)
    return narrow if narrow.latency_s == links[-1].latency_s else replace(narrow, latency_s=links[-1].latency_s)


def _touched(block: int, chunk: int) -> int:
    """Chunks that aligned blocks of ranks touch at worst."""
    if chunk % block == 0:
        return 1
    if block % chunk == 0:
        return block // chunk
    return (block - 2) // chunk + 2
