"""What a hand-over of prompts takes between two pools, by their cuts and the link between them.

A decode rank reads its own heads. With more ranks on the decode side each prefill rank serves several readers, which
share its link; with fewer, a decode rank reads from several at once, over its own link. A latent cache is whole on
every rank, and is read from one.

Source: `NixlConnector` of vLLM 0.20.2, in our own words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.ir.cells import Cut
from apex_opt.simulator.handover import Handover
from apex_opt.units import NS_PER_S, NS_PER_US, ceil_div

if TYPE_CHECKING:
    from apex_opt.cluster.types import Link
    from apex_opt.cost.model import CostModel
    from apex_opt.engines.handover import HandoverTimes
    from apex_opt.ir.model import Model
    from apex_opt.plans.plan import Plan


def shared_heads(model: Model) -> int | None:
    """KV heads that shards are dealt, at least; None where no layer has any, as a latent cache is whole everywhere."""
    heads = [piece.size for block in model.blocks for piece in block.attention.pieces if piece.copied]
    return min(heads, default=None)


def hands_over(model: Model, prefill: Plan, decode: Plan) -> bool:
    """Whether one pool can read what the other one computed.

    Both keep it in the same format, and the ranks of the one divide those of the other; several prefill ranks serve one
    decode rank only where none holds copies of heads.

    Parameters
    ----------
    model
    prefill, decode : Plan    on one stage, with one copy of attention
    """
    if (prefill.weight_format, prefill.kv_format) != (decode.weight_format, decode.kv_format):
        return False
    one, other = prefill.attention.tp, decode.attention.tp
    if other % one == 0:
        return True
    heads = shared_heads(model)
    return one % other == 0 and (heads is None or one <= heads)


def handover(
    times: HandoverTimes,
    model: Model,
    prefill: Plan,
    decode: Plan,
    block_bytes: int,
    link: Link | None,
    *,
    joined: bool = False,
) -> Handover:
    """The hand-over from one pool to another.

    Parameters
    ----------
    times
    model
    prefill, decode : Plan    as for `hands_over`
    block_bytes : int         of a KV block on a rank of the decode pool
    link : Link or None       between a rank of the one and a rank of the other; None where there is nothing to cross
    joined : bool             blocks that lie beside each other are one piece, as all of a transfer are taken to; else
                              each is a piece of its own
    """
    one, other = prefill.attention.tp, decode.attention.tp
    heads = shared_heads(model)
    sources = 1 if heads is None else ceil_div(one, other)
    readers = ceil_div(other, one)
    kinds = sum(run.count * (1 if heads is None else 2) for run in model.runs if run.block.attention.cache(Cut()))
    pieces_ns = kinds * sources * times.descriptor_us * NS_PER_US
    block_ns = 0.0 if joined else pieces_ns
    if link is not None:
        block_ns += block_bytes * readers / (link.bytes_per_s * times.rate_share) * NS_PER_S
    latency_ns = 0 if link is None else round(link.latency_s * NS_PER_S)
    return Handover(
        proxy_ns=times.proxy_ns,
        read_ns=round(times.post_us * NS_PER_US + (pieces_ns if joined else 0)) + latency_ns,
        block_ns=round(block_ns),
        notice_ns=round(times.notice_us * NS_PER_US),
        in_turn=True,
    )


def reading_j(costs: CostModel, plan: Plan, read_s: float) -> float:
    """Energy above the idle draw of the GPUs of one replica at either end of reads, which hold them like a collective.

    Parameters
    ----------
    costs : CostModel    of the pool's GPUs
    plan : Plan          of the pool
    read_s : float       seconds that its reads take, added up
    """
    ((stage, _),) = costs.on(plan)
    return stage.profile.power.active_w * plan.attention.tp * read_s
