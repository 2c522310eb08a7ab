"""Which GPUs hold the ranks of a plan, as a constraint program.

A way to lay a plan out (`apex_opt.placement.shape`) says how large the chunks of ranks are that lie in one domain of
each level, and what rate they have; its time follows. Ways are tried from the least time on, of equal times from the
least traffic over the widest domains on. The first that the program finds GPUs for is best: none of those before has
any.

Sets and parameters
    bins b of free GPUs that are wired alike, f_b of them
    domains v of levels h = 1..H, each made of domains of the level below, those of the first of bins
    m_h     ranks of a chunk on level h, a multiple of m_(h-1);  m_H a whole replica
    l_v     GPUs that may be used of a domain, so that each chunk in it has its rate
    c_p     GPUs that may be used behind a NIC p that they share
    N       GPUs that the plan takes

Variables
    u_b     GPUs used of a bin, 0..f_b
    x_vc    whether a domain has c chunks

Constraints
    P1  of the x_vc of a domain one is true;  the parts of v use m_h c together, which is no more than l_v
    P2  the bins behind p use c_p together at most
    P3  the whole cluster uses N
    P4  where m_h > m_(h-1), two parts of some domain of level h are used: else the chunks would be larger
    P5  of domains alike in the same domain the first use no less than the next

Objective: the most GPUs that stay free in groups of 2, of 4, of 8 ... inside a domain, summed over sizes and domains
inside nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError, UndecidedError
from apex_opt.placement.assignment import filled, layout_of
from apex_opt.placement.shape import Shape, fits, ways

from ..solver import new_solver

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.cluster.tree import Tree
    from apex_opt.cost import CostModel
    from apex_opt.placement.assignment import Assignment
    from apex_opt.placement.layouts import Layouts
    from apex_opt.placement.shape import Way
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A placement, and what proves that none is better.

    Parameters
    ----------
    assignment : Assignment  GPUs by replica, stage and rank
    layout : Layout          what it amounts to, counted again GPU by GPU
    measure : tuple          what the layout was judged by
    kept : int               sum over sizes 2, 4, 8 ... of the GPUs that stay free in groups of that size
    optimal : bool           whether nothing is better
    tried : int              ways that come before it, for which there are no GPUs
    """

    assignment: Assignment
    layout: Layout
    measure: Any
    kept: int
    optimal: bool
    tried: int


def place(
    tree: Tree, shape: Shape, measure: Callable[[Layout], Any], time_limit_s: float | None = None
) -> Placed | None:
    """The best placement of a shape on the free GPUs of a tree; None where it does not fit.

    Parameters
    ----------
    measure : callable      of a layout, by which ways are ordered; the least is best
    time_limit_s : float    for the arrangement of what stays free; the measure is proven in any case

    Raises
    ------
    UndecidedError      the time does not suffice
    FormulationError    the solver does not decide
    """
    found = first_found(tree, shape, measure, lambda way: _solve(tree, shape, way, time_limit_s))
    if found is None:
        return None
    value, tried, alike = found
    way, counts = max(alike, key=lambda item: item[1].kept)
    assignment, layout = _arranged(tree, shape, way, counts.used, measure)
    return Placed(
        assignment=assignment,
        layout=layout,
        measure=value,
        kept=counts.kept,
        optimal=all(some.optimal for _, some in alike),
        tried=tried,
    )


def first_found(
    tree: Tree, shape: Shape, measure: Callable[[Layout], Any], solve: Callable[[Way], Found | None]
) -> tuple[Any, int, list[tuple[Way, Found]]] | None:
    """The least measure of a way that `solve` finds GPUs for, the ways before it, and what it finds for all such.

    Parameters
    ----------
    tree
    shape : Shape         of the plan
    measure : callable    what is made best
    solve : callable      finds a placement of a way
    """
    ordered = sorted((measure(way.layout), index, way) for index, way in enumerate(ways(tree, shape)))
    tried = 0
    for value, alike in groupby(ordered, key=lambda item: item[0]):
        found, ways_alike = [], 0
        for _, _, way in alike:
            # Ways without room are known before the program is asked.
            solved = solve(way) if fits(tree, shape, way) else None
            ways_alike += 1
            found += [(way, solved)] if solved is not None else []
        if found:
            return value, tried, found
        tried += ways_alike
    return None


def place_plan(layouts: Layouts, plan: Plan, time_limit_s: float | None = None) -> Placed:
    """The best placement of a plan, by the measure of its layouts.

    Parameters
    ----------
    layouts : Layouts               of the tree that it goes to
    plan
    time_limit_s : float or None    seconds after which the best so far is taken

    Raises
    ------
    CapacityError, FormulationError    more GPUs than are free; as `place`
    """
    layouts.best(plan)  # refuses what does not fit
    found = place(layouts.tree, Shape.of(plan), partial(layouts.measured, plan), time_limit_s)
    assert found is not None  # where chunks of one rank fit, so does the shape
    return found


def place_joint(costs: CostModel, plan: Plan, time_limit_s: float | None = None) -> Assignment:
    """The GPUs of a plan whose stages are on several types: the stages on each type placed on their own.

    Parameters
    ----------
    costs : CostModel               of the plan
    plan
    time_limit_s : float or None    seconds after which the best so far is taken

    Raises
    ------
    CapacityError, FormulationError    as `place_plan`
    """
    parts = (place_plan(layouts, part, time_limit_s).assignment for _, part, layouts in costs.parts_of(plan))
    return tuple(tuple(stage for part in replica for stage in part) for replica in zip(*parts, strict=True))


def _arranged(
    tree: Tree, shape: Shape, way: Way, used: Sequence[int], measure: Callable[[Layout], Any]
) -> tuple[Assignment, Layout]:
    """An assignment of the GPUs used that is as good as the way promises, by a count that shares no code with it."""
    for parted in (False, True):
        assignment = filled(tree, shape, way.chunks, used, parted=parted)
        layout = layout_of(tree, shape, assignment)
        if measure(layout) <= measure(way.layout):
            return assignment, layout
    raise FormulationError(f"placement: {way.chunks} on {used} of {tree.name} is not as quick as it was said to be")


class _Counts(NamedTuple):
    """GPUs used of every bin, what they keep free in groups, and whether that is the most."""

    used: tuple[int, ...]
    kept: int
    optimal: bool


def _part_somewhere(model: cp_model.CpModel, below: Sequence[Any], parts: Sequence[Sequence[int]]) -> None:
    """Have two parts of some domain used: where all chunks lay in one part each, they would be larger ones."""
    parted = []
    for inside in parts:
        apart = model.new_bool_var("")
        used = [model.new_bool_var("") for _ in inside]
        for literal, part in zip(used, inside, strict=True):
            model.add(below[part] >= literal)
        model.add(cp_model.LinearExpr.sum(used) >= 2 * apart)
        parted.append(apart)
    model.add_at_least_one(parted)


def kept_groups(free: int) -> int:
    """GPUs in groups of 2, of 4, of 8 ... that so many free ones make, summed over the sizes."""
    return sum(free >> power << power for power in range(1, free.bit_length()))


def _solve(tree: Tree, shape: Shape, way: Way, time_limit_s: float | None) -> _Counts | None:
    """GPUs for one way, those that keep the most room; None where there are none."""
    model = cp_model.CpModel()
    used = [model.new_int_var(0, len(part.gpus), "") for part in tree.bins]
    below: Sequence[Any] = used
    # Domains are alike that are so part by part, what shares a NIC told by its place.
    kinds: list[Any] = [
        (len(part.gpus), *((p.first - at, p.last - at, n) for p, n in behind if p.first <= at < p.last))
        for behind in (list(zip(tree.ports, way.ports, strict=True)),)
        for at, part in enumerate(tree.bins)
    ]
    kept = []
    for depth, (level, chunk, limits) in enumerate(zip(tree.levels, way.chunks, way.limits, strict=True)):
        sums, alike = [], []
        for index, (domain, parts) in enumerate(zip(level.domains, tree.parts[depth], strict=True)):
            free = tree.free(domain)
            most = min(free, limits[index]) // chunk
            inside = [below[part] for part in parts]
            if level.far:
                taken = model.new_int_var(0, most, "") * chunk
            else:
                # A choice for every number of chunks tells the solver what each is worth.
                chosen = [model.new_bool_var("") for _ in range(most + 1)]
                model.add_exactly_one(chosen)
                taken = cp_model.LinearExpr.weighted_sum(chosen, range(0, (most + 1) * chunk, chunk))
                worth = [kept_groups(free - count * chunk) for count in range(most + 1)]
                kept.append(cp_model.LinearExpr.weighted_sum(chosen, worth))
            model.add(taken == cp_model.LinearExpr.sum(inside))
            sums.append(taken)
            alike.append((limits[index], tuple(kinds[part] for part in parts)))
            for one, other in pairwise(parts):
                if kinds[one] == kinds[other]:
                    model.add(below[one] >= below[other])
        if depth and chunk > way.chunks[depth - 1]:
            _part_somewhere(model, below, tree.parts[depth])
        below, kinds = sums, alike
    for port, limit in zip(tree.ports, way.ports, strict=True):
        model.add(cp_model.LinearExpr.sum(used[port.first : port.last]) <= limit)
    model.add(cp_model.LinearExpr.sum(list(below)) == shape.size)
    model.maximize(cp_model.LinearExpr.sum(kept))
    if (found := maximised(model, "placement", time_limit_s)) is None:
        return None
    solver, optimal = found
    return _Counts(
        used=tuple(solver.value(count) for count in used),
        kept=round(solver.objective_value),
        optimal=optimal,
    )


def maximised(model: cp_model.CpModel, what: str, time_limit_s: float | None) -> tuple[cp_model.CpSolver, bool] | None:
    """The solver with a solution of a model, and whether that is the best; None where there is none.

    Parameters
    ----------
    model : CpModel                 the program
    what : str                      what is looked for, for messages
    time_limit_s : float or None    seconds after which the best so far is taken

    Raises
    ------
    UndecidedError      the time does not suffice
    FormulationError    the solver does not decide
    """
    solver = new_solver(time_limit_s)
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None
    if status == cp_model.UNKNOWN and time_limit_s is not None:
        raise UndecidedError(f"{what}: {time_limit_s:g} s do not suffice to find GPUs; allow more time (--time_limit)")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise FormulationError(f"{what}: the solver ends as {solver.status_name(status)}")
    return solver, status == cp_model.OPTIMAL
