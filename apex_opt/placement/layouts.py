"""The best layouts of plans on one tree, found by counting."""

from __future__ import annotations

from bisect import bisect_left
from functools import cache
from typing import TYPE_CHECKING, Any

from apex_opt.errors import CapacityError
from apex_opt.placement.shape import Shape, fits, steps, ways

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.cluster.tree import Tree
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan


class Layouts:
    """Layouts on a tree; `measure` orders those of a plan, the best first."""

    def __init__(self, tree: Tree, measure: Callable[[Plan, Layout], Any]) -> None:
        self.tree = tree
        self._ways = cache(lambda shape: tuple(ways(tree, shape, every=False)))
        self._fits = cache(lambda shape, way: fits(tree, shape, way))
        self._steps = cache(lambda stages, ranks: steps(tree, Shape(1, stages, ranks)))
        self._measure = measure
        self._measured: dict[tuple[Any, ...], Any] = {}
        self._best: dict[tuple[Any, ...], Layout] = {}

    def on(self, tree: Tree) -> Layouts:
        """The same on another tree."""
        return Layouts(tree, self._measure)

    def best(self, plan: Plan) -> Layout:
        """The layout of the least measure.

        Raises
        ------
        CapacityError    more GPUs than there are
        """
        shape = Shape.of(plan)
        key = shape, plan.cut
        if key not in self._best:
            found = self._ways(shape)
            if not found:
                raise CapacityError(f"{plan} takes {shape.size} GPUs, {self.tree.size} of {self.tree.name} are free")
            if len(found) > 1:
                ordered = sorted(found, key=lambda way: self.measured(plan, way.layout))
                found = tuple(way for way in ordered if self._fits(shape, way))
            self._best[key] = found[0].layout
        return self._best[key]

    def alike(self, plan: Plan, replicas: Sequence[int]) -> list[tuple[Layout, list[int]]]:
        """Numbers of replicas of a plan by their best layout.

        Raises
        ------
        CapacityError    more GPUs than there are
        """
        groups: dict[int, list[int]] = {}
        for count in replicas:
            groups.setdefault(self._step(plan, count), []).append(count)
        found: dict[Layout, list[int]] = {}
        for counts in groups.values():
            found.setdefault(self.best(plan.times(counts[0])), []).extend(counts)
        return list(found.items())

    def _step(self, plan: Plan, replicas: int) -> int:
        """A number that is the same for numbers of replicas that have the same ways."""
        if self.tree.contended:
            return replicas
        shape = Shape.of(plan)
        return bisect_left(self._steps(shape.stages, shape.ranks), replicas * shape.replica)

    def measured(self, plan: Plan, layout: Layout) -> Any:
        """The measure of a layout, the same for any number of replicas."""
        key = plan.cut, layout
        if key not in self._measured:
            self._measured[key] = self._measure(plan, layout)
        return self._measured[key]
