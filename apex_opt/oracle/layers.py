"""Which layers lie on which stage, found by trying."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from apex_opt.plans.allotment import allotted
from apex_opt.plans.engine import limited
from apex_opt.plans.memory import (
    block_shard_bytes,
    stage_memory,
    state_seats,
    vocab_copies,
)
from apex_opt.plans.plan import Plan, even_split
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.oracle.instance import Instance

from apex_opt.oracle.checks import IMBALANCE, cuttable


def moved(instance: Instance, plan: Plan) -> tuple[int, ...] | None:
    """Layers of the stages such that the heaviest is as light as can be; None where nothing fits.

    A stage weighs the bytes that a full batch reads: its layers, and the LM head on the last. Of the lightest splits
    it is the one that leaves the most for the KV cache where the least is left, of these the one whose boundaries, in
    order, lie nearest those of the even split. Activations are looked at only where a split does not fit beside them.
    Stages are several and balanced, and shards equal, or there is none.
    """
    if plan.stages == 1 or not cuttable(instance, plan):
        return None
    model, tp, settings = instance.model, plan.attention.tp, limited(instance.settings, plan)
    vocab = 2 * ceil_div(model.vocab, 1 if instance.held.whole_vocabulary else tp) * model.hidden
    weights = [0]
    for run in model.runs:
        read = block_shard_bytes(run.block, plan, instance.held) + 2 * run.block.own_parameters
        weights += [weights[-1] + count * read for count in range(1, run.count + 1)]
    held = _held_before(instance, plan, weights)
    stages = stage_memory(model, instance.cluster.gpu, plan, settings)
    head = vocab + 2 * model.after_parameters
    last = plan.stages - 1
    copies = [vocab_copies(model, instance.held, index == 0, index == last) for index in range(plan.stages)]
    ends = {0: model.before_bytes(tp), last: 2 * model.after_parameters}
    beside = [vocab * n + ends.get(index, 0) + instance.held.table_bytes for index, n in enumerate(copies)]
    extra = (*(0,) * (plan.stages - 1), head)
    most, step = IMBALANCE[0] * model.layers // (IMBALANCE[1] * plan.stages), model.together
    rooms = tuple(s.usable_bytes - s.runtime_bytes - other for s, other in zip(stages, beside, strict=True))
    active = tuple(room - stage.workspace_bytes for room, stage in zip(rooms, stages, strict=True))
    if sum(active) < max(row[-1] for row in held) or plan.stages * step > model.layers:
        return None
    whole = tuple(weights[::step]), tuple(row[::step] for row in held)
    found = _lightest(*whole, extra, rooms, most // step)
    if found is not None and any(
        _taken(whole[1], i, j) > room for (i, j), room in zip(pairwise([0, *accumulate(found)]), active, strict=True)
    ):
        found = _lightest(*whole, extra, active, most // step)
    return None if found is None else tuple(count * step for count in found)


def _held_before(instance: Instance, plan: Plan, weights: list[int]) -> tuple[tuple[int, ...], ...]:
    """By group of layers the bytes that the layers before each take: weights, blocks of the longest request, states.

    A stage has room for as many blocks as its layers of the group with the most there.
    """
    settings = limited(instance.settings, plan)
    allotment, seats = allotted(instance.model, plan, settings), state_seats(plan, settings)
    page = (instance.blocks_needed(plan) + 1) * allotment.page_bytes
    states = allotment.states_before or (0,) * len(weights)
    return tuple(
        tuple(read + page * places + seats * state for read, places, state in zip(weights, row, states, strict=True))
        for row in allotment.before
    )


def _taken(held: tuple[tuple[int, ...], ...], first: int, last: int) -> int:
    """Bytes that the layers from the `first` to before the `last` take on one stage."""
    return max(row[last] - row[first] for row in held)


@lru_cache(maxsize=1 << 12)
def _lightest(
    weight: tuple[int, ...],
    held: tuple[tuple[int, ...], ...],
    extra: tuple[int, ...],
    room: tuple[int, ...],
    most: int,
) -> tuple[int, ...] | None:
    """The split of `moved`: what a stage may weigh and must leave by bisection, the boundaries from the last stage."""
    layers, stages = len(weight) - 1, len(extra)
    spans = [(i, j) for i in range(layers) for j in range(i + 1, min(i + most, layers) + 1)]
    taken = {(i, j): _taken(held, i, j) for i, j in spans}
    even = [0, *accumulate(even_split(layers, stages))]

    def reach(top: int, least: int) -> tuple[int, ...] | None:
        """The boundaries nearest the even ones within a weight and with so much left."""
        tails: dict[int, tuple[tuple[int, int], ...] | None] = {layers: ()}
        for k in range(stages - 1, -1, -1):
            fresh: dict[int, tuple[tuple[int, int], ...] | None] = {}
            for i in range(layers):
                options = [
                    ((abs(j - even[k + 1]), j), *tail)
                    for j in range(i + 1, min(i + most, layers) + 1)
                    if (tail := tails.get(j)) is not None
                    and weight[j] - weight[i] + extra[k] <= top
                    and room[k] - taken[i, j] >= least
                ]
                if options:
                    fresh[i] = min(options)
            tails = fresh
        found = tails.get(0)
        return None if found is None else tuple(j for _, j in found)

    tops = sorted({weight[j] - weight[i] + e for i, j in spans for e in set(extra)})
    top = _first(tops, lambda value: reach(value, 0) is not None)
    if top is None:
        return None
    frees = sorted({r - size for size in set(taken.values()) for r in set(room)}, reverse=True)
    least = _first([free for free in frees if free >= 0], lambda value: reach(top, value) is not None)
    assert least is not None  # what is least left in the split just found is among them
    ends = reach(top, least)
    assert ends is not None
    return tuple(j - i for i, j in pairwise((0, *ends)))


def _first(values: list[int], holds: Callable[[int], bool]) -> int | None:
    """The first value from which on something holds, by bisection."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(values[middle]) else (middle + 1, high)
    return values[low] if low < len(values) else None
