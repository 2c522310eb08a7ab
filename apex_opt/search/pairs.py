"""A pool that computes prompts and one that answers them: whether they go together, and the way between them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.cluster.tree import slowest
from apex_opt.cost.handover import handover, hands_over, shared_heads
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.oracle.checks import Violation
from apex_opt.placement.pools import Chunks, find_room, link_between

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from apex_opt.cluster.types import Link
    from apex_opt.plans.deployment import Pool
    from apex_opt.plans.plan import Plan
    from apex_opt.search.facts import Facts
    from apex_opt.search.problem import Problem
    from apex_opt.simulator.handover import Handover


def pairable(plan: Plan) -> bool:
    """Whether the connector takes instances of a plan: it tells ranks by their shard of attention alone."""
    return plan.stages == 1 and plan.attention.dp == 1


class Pairs:
    """Prefill and decode pools of a problem.

    Parameters
    ----------
    problem : Problem
    facts_of : callable    what is known of the plan of a pool
    """

    def __init__(self, problem: Problem, facts_of: Callable[[Pool], Facts]) -> None:
        self._problem, self._facts_of = problem, facts_of
        self._fit: dict[tuple[object, ...], bool] = {}

    def faults(self, prefill: Pool, decode: Pool) -> Iterator[Violation]:
        """Why two pools do not go together."""
        for text in self._unlike(prefill, decode):
            yield Violation(family="handover", text=text)
        if not self._find_room(prefill, decode):
            where = f"on {self._names(prefill, decode)}, each as it lies best"
            yield Violation(family="room", text=f"the pools do not fit into the nodes beside each other {where}")

    def _unlike(self, prefill: Pool, decode: Pool) -> Iterator[str]:
        """Why one pool cannot hand over to the other."""
        for pool in (prefill, decode):
            if not pairable(pool.plan):
                yield f"{pool}: prompts are handed over between plans of one stage and one attention copy"
        one, other = prefill.plan, decode.plan
        if (one.weight_format, one.kv_format) != (other.weight_format, other.kv_format):
            yield (
                f"the pools keep weights and cache in {one.weight_format} and {one.kv_format}, and in "
                f"{other.weight_format} and {other.kv_format}; give both the same"
            )
        elif not hands_over(self._problem.model, one, other):
            heads, from_, to = shared_heads(self._problem.model), one.attention.tp, other.attention.tp
            divides = from_ % to == 0
            why = f"ranks of the {heads} KV heads would hold copies" if divides else "neither divides the other"
            yield f"tp{from_} cannot hand over to tp{to}: {why}; give both the same tp"

    def lost(self, prefill: Pool, decode: Pool) -> str:
        """What two pools break that by themselves have room and can be paired: "handover", "room", or nothing."""
        if not hands_over(self._problem.model, prefill.plan, decode.plan):
            return "handover"
        return "" if self._find_room(prefill, decode) else "room"

    def handover(self, prefill: Pool, decode: Pool) -> Handover:
        """What handing a prompt over takes."""
        times = self._problem.handover
        assert times is not None  # where there may be such pools
        block_bytes = self._facts_of(decode).memory(decode.plan)[0].kv_block_bytes
        link = self._link(prefill, decode)
        # SGLang sends what lies beside each other at once (`group_concurrent_contiguous`).
        joined = isinstance(self._problem.settings.scheduler, SglangScheduling)
        return handover(times, self._problem.model, prefill.plan, decode.plan, block_bytes, link, joined=joined)

    def _link(self, prefill: Pool, decode: Pool) -> Link | None:
        gpus = prefill.plan.devices + decode.plan.devices
        trees = [self._facts_of(pool).layouts.tree for pool in (prefill, decode)]
        if prefill.types == decode.types:
            return link_between(trees[0], gpus)
        if self._problem.between is not None:
            return self._problem.between
        inside = [link for tree in trees if (link := link_between(tree, tree.size)) is not None]
        return slowest(inside) if inside else None

    def _find_room(self, prefill: Pool, decode: Pool) -> bool:
        if prefill.types != decode.types:
            return True
        tree = self._facts_of(prefill).layouts.tree
        if prefill.plan.devices + decode.plan.devices > tree.size:
            return False  # one of them alone may be too large to lie anywhere
        sizes = self._chunks(prefill), self._chunks(decode)
        key = prefill.types, *sizes
        if key not in self._fit:
            self._fit[key] = find_room(tree, *sizes)
        return self._fit[key]

    def _chunks(self, pool: Pool) -> Chunks:
        return Chunks.of(pool.plan, self._facts_of(pool).layouts.best(pool.plan))

    def _names(self, prefill: Pool, decode: Pool) -> str:
        types = dict.fromkeys((*prefill.types, *decode.types)) or self._problem.types
        return " and ".join(types)
