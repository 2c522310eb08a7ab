"""Where ranks go when GPUs are lost or taken away, so that the fewest weights move, as a constraint program.

The best layout comes first, as in `program`; of all assignments that reach it the program seeks the one in which ranks
with the most bytes of weights keep their GPUs. Chunks and domains are as there; here chunks have names.

Sets and parameters
    chunks c of level h, of replicas that are there; C(c) the chunk of level h + 1 that c is part of
    a_cbs   ranks of c and stage s that are on free GPUs of bin b now;  w_s  bytes of weights of one of them

Variables
    y_r     whether replica r stays
    x_cv    whether chunk c goes to domain v
    u_b     GPUs used of a bin
    t_cbs   ranks that keep their GPUs, 0..a_cbs

Constraints
    M1  the x_cv of a chunk make y_r;  x_cv <= x_C(c)w for the domain w around v;  the y_r make the replicas asked for
    M2  the chunks of an innermost domain take as many GPUs as are used of its bins
    M3  t_cbs <= a_cbs x_cv;  of a bin no more are kept than used
    M4  GPUs used of a domain or behind a NIC are no more than leave each chunk its rate
    M5  where chunks make up larger ones, some of these lie in several domains of the level below

Objective: the most of the sum of w_s t_cbs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError, UndecidedError
from apex_opt.placement.assignment import arranged, layout_of
from formulations.placement.program import first_found

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.cluster.tree import Tree
    from apex_opt.placement.assignment import Assignment
    from apex_opt.placement.shape import Shape, Way
    from apex_opt.plan.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A placement, and what is new in it.

    Parameters
    ----------
    assignment, layout, measure : as of `Placed`
    replicas : tuple of int      which of the replicas before these are
    moved, moved_bytes : int     ranks on other GPUs than before, and their weights
    optimal : bool               whether none as quick moves less
    """

    assignment: Assignment
    layout: Layout
    measure: Any
    replicas: tuple[int, ...]
    moved: int
    moved_bytes: int
    optimal: bool


class _Found(NamedTuple):
    replicas: tuple[int, ...]
    gpus: tuple[str, ...]
    kept_bytes: int
    optimal: bool


def move(
    tree: Tree,
    shape: Shape,
    measure: Callable[[Layout], Any],
    before: Assignment,
    weights: Sequence[int],
    time_limit_s: float | None = None,
) -> Moved | None:
    """The best placement on the GPUs that are left that moves the fewest weights; None where the shape does not fit.

    Parameters
    ----------
    tree : Tree             GPUs that can be used, those of `before` that are not lost among them
    shape : Shape           as many replicas as before, or fewer
    measure : callable      of a layout, as of `place`
    before : Assignment     where the ranks are
    weights : by stage      bytes of weights of a rank
    time_limit_s : float    for each layout as good as the best

    Raises
    ------
    UndecidedError      the time does not suffice
    FormulationError    the solver does not decide
    """

    def solve(way: Way) -> _Found | None:
        return _solve(tree, shape, way, before, weights, time_limit_s)

    found = first_found(tree, shape, measure, solve)
    if found is None:
        return None
    value, _, alike = found
    best = max((solved for _, solved in alike), key=lambda solved: solved.kept_bytes)
    assignment = arranged(best.gpus, shape)
    layout = layout_of(tree, shape, assignment)
    if measure(layout) > value:
        raise FormulationError(f"moves: {assignment} is not as quick as it was said to be")
    moved = [
        weights[stage]
        for replica, old in zip(assignment, (before[index] for index in best.replicas), strict=True)
        for stage, (gpus, olds) in enumerate(zip(replica, old, strict=True))
        for gpu, before_gpu in zip(gpus, olds, strict=True)
        if gpu != before_gpu
    ]
    return Moved(
        assignment=assignment,
        layout=layout,
        measure=value,
        replicas=best.replicas,
        moved=len(moved),
        moved_bytes=sum(moved),
        optimal=all(solved.optimal for _, solved in alike),
    )


def _solve(
    tree: Tree, shape: Shape, way: Way, before: Assignment, weights: Sequence[int], time_limit_s: float | None
) -> _Found | None:
    """GPUs of every rank for one way; None where there are none."""
    model = cp_model.CpModel()
    old = [gpu for replica in before for stage in replica for gpu in stage]
    bin_of = {gpu: index for index, part in enumerate(tree.bins) for gpu in part.gpus}
    stays = [model.new_bool_var("") for _ in before]
    model.add(cp_model.LinearExpr.sum(stays) == shape.replicas)
    used = [model.new_int_var(0, len(part.gpus), "") for part in tree.bins]
    kept: list[Any] = []
    of_bin: list[list[Any]] = [[] for _ in tree.bins]
    worth: list[int] = []
    chosen: list[tuple[cp_model.IntVar, int, int, int]] = []
    inner: list[list[cp_model.IntVar]] = []
    above: list[list[cp_model.IntVar]] = []
    for level in reversed(range(len(way.chunks))):
        size, domains = way.chunks[level], tree.levels[level].domains
        goes = [[model.new_bool_var("") for _ in domains] for _ in range(len(old) // size)]
        for chunk, choices in enumerate(goes):
            model.add(cp_model.LinearExpr.sum(choices) == stays[chunk * size // shape.replica])
        for index in range(len(domains)):
            most = min(tree.free(domains[index]), way.limits[level][index]) // size
            model.add(cp_model.LinearExpr.sum([choices[index] for choices in goes]) <= most)
        if above:
            _nest(model, goes, above, tree.parts[level + 1], [n // size for n in shape.chunks() if n % size == 0])
        above = inner = goes
    size = way.chunks[0]
    for index, parts in enumerate(tree.parts[0]):
        taken = cp_model.LinearExpr.sum([choices[index] for choices in inner])
        model.add(size * taken == cp_model.LinearExpr.sum([used[part] for part in parts]))
        there = set(parts)
        for chunk, choices in enumerate(inner):
            mine = range(chunk * size, (chunk + 1) * size)
            homes = Counter(
                (bin_of[old[rank]], rank % shape.replica // shape.ranks)
                for rank in mine
                if bin_of.get(old[rank]) in there
            )
            for (part, stage), count in homes.items():
                some = model.new_int_var(0, count, "")
                model.add(some <= count * choices[index])
                of_bin[part].append(some)
                kept.append(some)
                worth.append(weights[stage])
                chosen.append((some, chunk, part, stage))
    for own, all_kept in zip(used, of_bin, strict=True):
        model.add(cp_model.LinearExpr.sum(all_kept) <= own)
    for port, limit in zip(tree.ports, way.ports, strict=True):
        model.add(cp_model.LinearExpr.sum(used[port.first : port.last]) <= limit)
    model.maximize(cp_model.LinearExpr.weighted_sum(kept, worth))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    if time_limit_s is not None:
        solver.parameters.max_time_in_seconds = time_limit_s
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None
    if status == cp_model.UNKNOWN and time_limit_s is not None:
        raise UndecidedError(f"moves: {time_limit_s:g} s do not suffice to find GPUs; allow more time (--time_limit)")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise FormulationError(f"moves: the solver ends as {solver.status_name(status)}")
    return _Found(
        replicas=tuple(index for index, stay in enumerate(stays) if solver.value(stay)),
        gpus=_gpus(solver, tree, shape, size, old, used, inner, chosen),
        kept_bytes=round(solver.objective_value),
        optimal=status == cp_model.OPTIMAL,
    )


def _nest(
    model: cp_model.CpModel,
    goes: Sequence[Sequence[cp_model.IntVar]],
    above: Sequence[Sequence[cp_model.IntVar]],
    parts: Sequence[Sequence[int]],
    larger: Sequence[int],
) -> None:
    """Chunks lie in the domain of the larger chunk they are part of, and they are as large as they could be.

    Parameters
    ----------
    goes, above : by chunk and domain
    larger : of how many chunks larger ones could be; of each size up to the actual one some lies in several domains
    """
    children = len(goes) // len(above)
    for chunk, choices in enumerate(goes):
        for around, inside in zip(above[chunk // children], parts, strict=True):
            model.add(cp_model.LinearExpr.sum([choices[part] for part in inside]) <= around)
    for count in larger:
        if count == 1 or children % count:
            continue
        parted = []
        for first in range(0, len(goes), count):
            apart, mine = model.new_bool_var(""), goes[first : first + count]
            for part in range(len(mine[0])):
                model.add(cp_model.LinearExpr.sum([choices[part] for choices in mine]) <= count - apart)
            model.add(cp_model.LinearExpr.sum([choice for choices in mine for choice in choices]) >= apart)
            parted.append(apart)
        model.add_at_least_one(parted)


def _gpus(
    solver: cp_model.CpSolver,
    tree: Tree,
    shape: Shape,
    size: int,
    old: Sequence[str],
    used: Sequence[cp_model.IntVar],
    inner: Sequence[Sequence[cp_model.IntVar]],
    chosen: Sequence[tuple[cp_model.IntVar, int, int, int]],
) -> tuple[str, ...]:
    """GPUs of all ranks in order: those kept first, then others of the same domain."""
    bin_of = {gpu: index for index, part in enumerate(tree.bins) for gpu in part.gpus}
    given: dict[int, str] = {}
    for count, chunk, part, stage in chosen:
        mine = [
            rank
            for rank in range(chunk * size, (chunk + 1) * size)
            if bin_of.get(old[rank]) == part and rank % shape.replica // shape.ranks == stage
        ]
        given |= {rank: old[rank] for rank in mine[: solver.value(count)]}
    taken = set(given.values())
    spare: dict[int, list[str]] = {}
    for index, parts in enumerate(tree.parts[0]):
        spare[index] = []
        for part in parts:
            gpus = tree.bins[part].gpus
            more = solver.value(used[part]) - sum(gpu in taken for gpu in gpus)
            spare[index] += [gpu for gpu in gpus if gpu not in taken][:more]
    found = []
    for chunk, choices in enumerate(inner):
        home = next((index for index, choice in enumerate(choices) if solver.value(choice)), None)
        if home is not None:
            ranks = range(chunk * size, (chunk + 1) * size)
            found += [given[rank] if rank in given else spare[home].pop(0) for rank in ranks]
    return tuple(found)
