"""Where ranks go when GPUs are lost or taken away, so that the fewest weights move, as a constraint program.

The best layout comes first, as in `program`; of all assignments that reach it the program seeks the one in which ranks
with the most bytes of weights keep their GPUs. Chunks and domains are as there. Here chunks have names as long as they
stay in a domain in which some of their ranks are; of those that do not, a domain has so many, whichever they are.

Sets and parameters
    chunks c of level h, of replicas that are there;  C(c) the chunk of level h + 1 that c is part of
    D(c)    domains of level h in which ranks of c are now;  k_h chunks of level h in one of level h + 1
    a_cbs   ranks of c and stage s that are on free GPUs of bin b now;  w_s  bytes of weights of one of them

Variables
    y_r     whether replica r stays
    x_cv    whether chunk c stays in domain v, v in D(c)
    n_v     chunks that come to a domain from elsewhere
    u_b     GPUs used of a bin
    t_cbs   ranks that keep their GPUs, 0..a_cbs

Constraints
    M1  the x_cv of a chunk make at most y_r;  x_cv <= x_C(c)w for the domain w around v;  the y_r make the replicas
        asked for, all in the one domain of the last level
    M2  the parts of w hold k_h times as many chunks as w;  those of an innermost domain the GPUs used of its bins
    M3  t_cbs <= a_cbs x_cv;  of a bin no more are kept than used
    M4  GPUs used of a domain or behind a NIC are no more than leave each chunk its rate

Objective: the most of the sum of w_s t_cbs.

Chunks that come to lie together make larger ones. Where that is slower, which is known once GPUs are found, the program
is solved again with D(c) all domains, n_v = 0, and
    M5  of every size that chunks could have instead, some lie in several domains
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError
from apex_opt.placement.assignment import arranged, layout_of

from .program import first_found, maximised

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from apex_opt.cluster.tree import Tree
    from apex_opt.placement.assignment import Assignment
    from apex_opt.placement.shape import Shape, Way
    from apex_opt.plans.layout import Layout


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


class _Kept(NamedTuple):
    """How many of some ranks alike keep their GPUs, and the bytes of weights of one."""

    number: cp_model.IntVar
    ranks: tuple[int, ...]
    weight: int


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
        found = _Program(tree, shape, way, before, weights).solved(time_limit_s)
        if found is None or measure(layout_of(tree, shape, arranged(found.gpus, shape))) <= measure(way.layout):
            return found
        return _Program(tree, shape, way, before, weights, named=True).solved(time_limit_s)

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


class _Program:
    """The program for one way; chunks have names wherever they go where `named`."""

    def __init__(
        self, tree: Tree, shape: Shape, way: Way, before: Assignment, weights: Sequence[int], *, named: bool = False
    ) -> None:
        self.tree, self.shape, self.chunks, self.named = tree, shape, way.chunks, named
        self.model = cp_model.CpModel()
        self.old = [gpu for replica in before for stage in replica for gpu in stage]
        self.bin_of = {gpu: index for index, part in enumerate(tree.bins) for gpu in part.gpus}
        self.present = [self.model.new_bool_var("") for _ in before]
        self.used = [self.model.new_int_var(0, len(part.gpus), "") for part in tree.bins]
        self.stays: list[list[dict[int, cp_model.IntVar]]] = []
        self.come: list[list[cp_model.IntVar]] = []
        self.kept: list[_Kept] = []
        self.model.add(cp_model.LinearExpr.sum(self.present) == shape.replicas)
        for level in range(len(way.chunks)):
            self._level(level, way.limits[level])
        for level in range(len(way.chunks) - 1):
            self._nest(level)
        self._keep(weights)
        for port, limit in zip(tree.ports, way.ports, strict=True):
            self.model.add(cp_model.LinearExpr.sum(self.used[port.first : port.last]) <= limit)

    def _level(self, level: int, limits: Sequence[int]) -> None:
        """Chunks of a level: where they stay, how many come, and that there is room."""
        model, tree, size = self.model, self.tree, self.chunks[level]
        domains, last = tree.levels[level].domains, level == len(self.chunks) - 1
        home = {part: index for index, domain in enumerate(domains) for part in range(domain.first, domain.last)}
        stays = []
        for chunk in range(len(self.old) // size):
            mine = self.old[chunk * size : (chunk + 1) * size]
            there = {home[self.bin_of[gpu]] for gpu in mine if gpu in self.bin_of}
            everywhere = self.named or last
            stays.append({v: model.new_bool_var("") for v in (range(len(domains)) if everywhere else sorted(there))})
            whole = cp_model.LinearExpr.sum(list(stays[-1].values()))
            present = self.present[chunk * size // self.shape.replica]
            model.add(whole == present if everywhere else whole <= present)
        come = [model.new_int_var(0, 0 if self.named or last else tree.free(d) // size, "") for d in domains]
        self.stays.append(stays)
        self.come.append(come)
        for index, domain in enumerate(domains):
            model.add(self._held(level, index) <= min(tree.free(domain), limits[index]) // size)

    def _held(self, level: int, domain: int) -> cp_model.LinearExpr:
        """Chunks of a level in a domain."""
        staying = [choices[domain] for choices in self.stays[level] if domain in choices]
        return cp_model.LinearExpr.sum([*staying, self.come[level][domain]])

    def _nest(self, level: int) -> None:
        """Chunks that stay lie in the domain in which the larger chunk stays that they are part of."""
        model, children = self.model, self.chunks[level + 1] // self.chunks[level]
        for domain, parts in enumerate(self.tree.parts[level + 1]):
            inside = set(parts)
            held = cp_model.LinearExpr.sum([self._held(level, part) for part in parts])
            model.add(held == children * self._held(level + 1, domain))
            for chunk, choices in enumerate(self.stays[level]):
                if mine := [choice for part, choice in choices.items() if part in inside]:
                    around = self.stays[level + 1][chunk // children][domain]
                    model.add(cp_model.LinearExpr.sum(mine) <= around)
        if not self.named or children == 1:
            return
        for size in self.shape.chunks():
            count, left = divmod(size, self.chunks[level])
            if not left and count > 1 and children % count == 0:
                self._part(level, count)

    def _part(self, level: int, count: int) -> None:
        """Have some run of so many chunks lie in several domains: else chunks would be as large."""
        model, parted = self.model, []
        for first in range(0, len(self.stays[level]), count):
            apart, mine = model.new_bool_var(""), self.stays[level][first : first + count]
            for domain in mine[0]:
                model.add(cp_model.LinearExpr.sum([choices[domain] for choices in mine]) <= count - apart)
            model.add(cp_model.LinearExpr.sum([choice for choices in mine for choice in choices.values()]) >= apart)
            parted.append(apart)
        model.add_at_least_one(parted)

    def _keep(self, weights: Sequence[int]) -> None:
        """Ranks that keep their GPUs, each among the GPUs used of its bin."""
        model, size, shape = self.model, self.chunks[0], self.shape
        of_bin: list[list[cp_model.IntVar]] = [[] for _ in self.used]
        for index, parts in enumerate(self.tree.parts[0]):
            model.add(size * self._held(0, index) == cp_model.LinearExpr.sum([self.used[part] for part in parts]))
            inside = set(parts)
            for chunk, choices in enumerate(self.stays[0]):
                homes: dict[tuple[int, int], list[int]] = {}
                for rank in range(chunk * size, (chunk + 1) * size) if index in choices else ():
                    if (part := self.bin_of.get(self.old[rank])) in inside and part is not None:
                        homes.setdefault((part, rank % shape.replica // shape.ranks), []).append(rank)
                for (part, stage), ranks in homes.items():
                    count = model.new_int_var(0, len(ranks), "")
                    model.add(count <= len(ranks) * choices[index])
                    of_bin[part].append(count)
                    self.kept.append(_Kept(count, tuple(ranks), weights[stage]))
        for own, counts in zip(self.used, of_bin, strict=True):
            model.add(cp_model.LinearExpr.sum(counts) <= own)

    def solved(self, time_limit_s: float | None) -> _Found | None:
        """GPUs of every rank; None where there are none."""
        worth = cp_model.LinearExpr.weighted_sum([kept.number for kept in self.kept], [k.weight for k in self.kept])
        self.model.maximize(worth)
        if (found := maximised(self.model, "moves", time_limit_s)) is None:
            return None
        solver, optimal = found
        return _Found(
            replicas=tuple(index for index, stay in enumerate(self.present) if solver.value(stay)),
            gpus=self._gpus(solver),
            kept_bytes=round(solver.objective_value),
            optimal=optimal,
        )

    def _gpus(self, solver: cp_model.CpSolver) -> tuple[str, ...]:
        """GPUs of all ranks in order: those kept, then others of the same domain."""
        given: dict[int, str] = {}
        for kept in self.kept:
            given |= {rank: self.old[rank] for rank in kept.ranks[: solver.value(kept.number)]}
        taken = set(given.values())
        spare: list[list[str]] = []
        for parts in self.tree.parts[0]:
            spare.append([])
            for part in parts:
                gpus = self.tree.bins[part].gpus
                more = solver.value(self.used[part]) - sum(gpu in taken for gpu in gpus)
                spare[-1] += [gpu for gpu in gpus if gpu not in taken][:more]
        found, size = [], self.chunks[0]
        for chunk, home in sorted(self._homes(solver).items()):
            ranks = range(chunk * size, (chunk + 1) * size)
            found += [given[rank] if rank in given else spare[home].pop(0) for rank in ranks]
        return tuple(found)

    def _homes(self, solver: cp_model.CpSolver) -> dict[int, int]:
        """The innermost domain of every chunk of replicas that are there: those that come fill what is left."""
        homes = {index: 0 for index, stay in enumerate(self.present) if solver.value(stay)}
        for level in reversed(range(len(self.chunks) - 1)):
            children = self.chunks[level + 1] // self.chunks[level]
            room = [solver.value(count) for count in self.come[level]]
            below: dict[int, int] = {}
            for chunk, around in homes.items():
                for own in range(chunk * children, (chunk + 1) * children):
                    stay = next((v for v, choice in self.stays[level][own].items() if solver.value(choice)), None)
                    if stay is None:
                        stay = next(part for part in self.tree.parts[level + 1][around] if room[part])
                        room[stay] -= 1
                    below[own] = stay
            homes = below
        return homes
