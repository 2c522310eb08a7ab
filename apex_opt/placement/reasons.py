"""What the groups of a plan lie in, and in words why not in anything smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.placement.shape import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.cluster.tree import Tree
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan

_DOMAINS = {"switch": "NVLink domain or PCIe switch", "leaf": "leaf switch"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lies:
    """Groups of so many ranks: the kind of domain that holds each, the kind that does not, and why; None where none."""

    group: str
    ranks: int
    inside: str
    beyond: str | None
    reason: str | None


def lies(tree: Tree, plan: Plan, layout: Layout) -> tuple[Lies, ...]:
    """What holds each kind of a plan's groups on a tree, from the smallest group to the replica.

    Parameters
    ----------
    tree, plan, layout
    """
    return tuple(_lies(tree, plan, layout, name, ranks) for name, ranks in _groups(plan))


def _groups(plan: Plan) -> Iterator[tuple[str, int]]:
    """Groups of several ranks that talk, in terms of the plan, each size once."""
    attention, ffn, shape = plan.attention, plan.ffn, Shape.of(plan)
    parts = [f"{name}{n}" for name, n in (("tp", ffn.tp), ("ep", ffn.ep)) if n > 1]
    named = [
        (f"attention tp{attention.tp}", attention.tp),
        (f"FFN {' '.join(parts)}", ffn.tp * ffn.ep),
        ("a stage", plan.stage_devices),
        (f"a replica of {plan.stages} stages", shape.replica),
    ]
    if attention.tp == ffn.tp * ffn.ep and not ffn.ep > 1:
        named[0] = (f"tp{attention.tp}", attention.tp)
    seen = {1}
    for name, ranks in named:
        if ranks not in seen:
            seen.add(ranks)
            yield name, ranks


def _lies(tree: Tree, plan: Plan, layout: Layout, name: str, ranks: int) -> Lies:
    crossed = layout.crossed(ranks)
    kinds = [level.kind for level in tree.levels]
    inside = crossed[-1].kind if crossed else kinds[0]
    if kinds.index(inside) == 0:
        return Lies(group=name, ranks=ranks, inside=inside, beyond=None, reason=None)
    level = tree.levels[kinds.index(inside) - 1]
    free = [tree.free(domain) for domain in level.domains]
    most, groups = max(free), plan.devices // ranks
    kind = _DOMAINS.get(level.kind, level.kind)
    if most < ranks:
        where = level.domains[free.index(most)].name
        reason = f"{name} needs {ranks} GPUs in one {kind}; the largest, {where}, has {most} free"
    elif (room := sum(count // ranks for count in free)) < groups:
        reason = f"{groups} groups of {name} need {ranks} free GPUs in one {kind} each; there is room for {room}"
    else:
        reason = f"{name} could lie in one {kind}; the whole plan is quicker this way"
    return Lies(group=name, ranks=ranks, inside=inside, beyond=level.kind, reason=reason)
