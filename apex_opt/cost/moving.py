"""What it takes to move a request between replicas of a plan: the copies of its KV blocks, by the link between them.

Each rank copies its shard of a block to its counterpart, all of them side by side. A copy is a read of the kind by
which prompts are handed over between pools, with the same times for a piece of memory and the same share of a link's
rate: assumed, as Llumnix publishes none of its own.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.cost.handover import handover
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cluster.types import Link
    from apex_opt.engines.handover import HandoverTimes
    from apex_opt.ir.model import Model
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator.rescheduling import Rescheduling


MOVING: Final = ("post_us", "descriptor_us", "rate_share")
"""Times of a hand-over that moves take."""


def moving(
    rules: Rescheduling,
    times: HandoverTimes,
    model: Model,
    plan: Plan,
    memory: Sequence[StageMemory],
    link: Link | None,
) -> Rescheduling:
    """The rules with the times of a plan: those of the stage whose copies take longest.

    Parameters
    ----------
    rules, times, model, plan
    memory : StageMemory of each stage
    link : Link or None    between replicas; None where there is nothing to cross
    """
    pieces = handover(times, model, plan, plan, 0, None)
    whole = handover(times, model, plan, plan, max(stage.kv_block_bytes for stage in memory), link)
    crossing_ns = whole.block_ns - pieces.block_ns
    own_ns = ceil_div(pieces.block_ns * max(plan.layers), sum(plan.layers))
    return replace(rules, block_ns=own_ns + crossing_ns, stop_ns=whole.read_ns)
