"""The layers of each stage of a pipeline, as a constraint program.

Sets and parameters
    L layers, in order, each of a kind; s stages
    w_u     weight of a layer of kind u on a stage: what makes its batches long
    a_k     weight of what stage k holds beside layers: the LM head on the last
    p_k     pace of stage k: what a unit of weight takes it, larger on slower GPUs
    b_u     bytes of a layer of kind u
    q       bytes of each layer of the group with the most layers on a stage, where groups share their blocks
    c_k     bytes that stage k has for its layers, beside embedding, LM head and the rest
    m       most layers of a stage

Variables
    e_k     layers before stage k + 1, k = 1..s-1;  e_0 = 0, e_s = L
    T       what the slowest stage takes
    F       least bytes that a stage has left

Constraints
    S1  1 <= e_k - e_(k-1) <= m
    S2  p_k (a_k + W(e_k) - W(e_(k-1))) <= T,  W(n) the weight of the first n layers
    S3  c_k - B(e_k) + B(e_(k-1)) - q (N_g(e_k) - N_g(e_(k-1))) >= F >= 0 for each group g,  B(n) their bytes, N_g(n)
        how many of them are of the group

    d_k     how far e_k lies from where the even split cuts

Objective: the least T; of these the most F, so that the KV cache has the most room; of these the least d_1, then d_2,
and so on, so that the answer is one. T and F take only values that some range of layers gives. They are decided first,
the least T and the most F first, then the cuts in order; for given T and F the cuts follow by propagation, so the
first solution met is the best one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from math import lcm
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError
from apex_opt.plans.plan import even_split

from ..solver import new_solver

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """What is to be split.

    Parameters
    ----------
    kinds : tuple of int      kind of every layer, in order
    weight, held : tuple of int      weight and bytes of a layer, by kind
    shared : tuple of tuple of int   layers of each group that shares blocks with others, where there are such
    page : int                       bytes of each layer of the group that has the most on a stage
    extra : tuple of int      weight of each stage beside its layers
    room : tuple of int       bytes each stage has for its layers
    most : int                layers a stage may hold
    pace : tuple of int       what a unit of weight takes each stage; () where all are as fast
    """

    kinds: tuple[int, ...]
    weight: tuple[int, ...]
    held: tuple[int, ...]
    extra: tuple[int, ...]
    room: tuple[int, ...]
    most: int
    pace: tuple[int, ...] = ()
    shared: tuple[tuple[int, ...], ...] = ()
    page: int = 0


def rows(
    kinds: tuple[int, ...], held: tuple[int, ...], shared: tuple[tuple[int, ...], ...], page: int
) -> list[list[int]]:
    """Bytes of the first layers, for every number of them; by group where groups share blocks: the most counts.

    Parameters
    ----------
    kinds, held, shared, page : as of `Pipeline`
    """
    found = []
    for places in shared or ((),):
        sizes = [held[kind] for kind in kinds]
        for place in places:
            sizes[place] += page
        found.append([0, *accumulate(sizes)])
    return found


@lru_cache(maxsize=1 << 16)
def split(pipeline: Pipeline) -> tuple[int, ...] | None:
    """Layers of each stage, such that the slowest stage is as fast as can be; None where no split fits.

    Raises
    ------
    FormulationError    the solver does not decide
    """
    layers, stages = len(pipeline.kinds), len(pipeline.extra)
    weight = [0, *accumulate(pipeline.weight[kind] for kind in pipeline.kinds)]
    sums = rows(pipeline.kinds, pipeline.held, pipeline.shared, pipeline.page)
    spans = [(i, j) for i in range(layers) for j in range(i + 1, min(i + pipeline.most, layers) + 1)]
    paces = pipeline.pace or (1,) * stages
    # Were all stages to take as long, each would take so much, hence the slowest does.
    common = lcm(*paces)
    mean = -(-(weight[-1] + sum(pipeline.extra)) * common // sum(common // pace for pace in paces))
    kinds = set(zip(paces, pipeline.extra, strict=True))
    tops = {pace * (weight[j] - weight[i] + extra) for i, j in spans for pace, extra in kinds}
    tops = {top for top in tops if top >= mean}
    sizes = {max(row[j] - row[i] for row in sums) for i, j in spans}
    left = {room - size for size in sizes for room in set(pipeline.room)}
    left = {free for free in left if free >= 0}
    if not tops or not left or stages > layers:
        return None
    model = cp_model.CpModel()
    slowest = model.new_int_var_from_domain(cp_model.Domain.from_values(sorted(tops)), "slowest")
    spare = model.new_int_var_from_domain(cp_model.Domain.from_values(sorted(left)), "spare")
    cuts = [model.new_int_var(k, layers - stages + k, f"cut_{k}") for k in range(1, stages)]
    weights, bytes_held = [], []
    for cut in cuts:
        before = _before(model, cut, pipeline.kinds)
        weights.append(cp_model.LinearExpr.sum([pipeline.weight[kind] * count for kind, count in before]))
        bytes_held.append(cp_model.LinearExpr.sum([pipeline.held[kind] * count for kind, count in before]))
    for count in _between(cuts, layers):
        model.add_linear_constraint(count, 1, pipeline.most)
    for own, extra, pace in zip(_between(weights, weight[-1]), pipeline.extra, paces, strict=True):
        model.add(pace * (own + extra) <= slowest)
    in_all = sum(pipeline.held[kind] for kind in pipeline.kinds)
    for places in pipeline.shared or ((),):
        ends = bytes_held
        if places:
            of_group = [_of_group(model, cut, places, layers) for cut in cuts]
            ends = [own + pipeline.page * count for own, count in zip(bytes_held, of_group, strict=True)]
        for own, room in zip(_between(ends, in_all + pipeline.page * len(places)), pipeline.room, strict=True):
            model.add(room - own >= spare)
    model.add_decision_strategy([slowest], cp_model.CHOOSE_FIRST, cp_model.SELECT_MIN_VALUE)
    model.add_decision_strategy([spare], cp_model.CHOOSE_FIRST, cp_model.SELECT_MAX_VALUE)
    for cut, even in zip(cuts, accumulate(even_split(layers, stages)), strict=False):
        apart = model.new_int_var(0, layers, "apart")
        model.add_abs_equality(apart, cut - even)
        model.add_decision_strategy([apart, cut], cp_model.CHOOSE_FIRST, cp_model.SELECT_MIN_VALUE)
    solver = new_solver()
    solver.parameters.search_branching = cp_model.FIXED_SEARCH
    solver.parameters.cp_model_presolve = False  # propagation is all it takes; and solutions must not be lost
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise FormulationError(f"layers: the solver ends as {solver.status_name(status)}")
    return tuple(solver.value(count) for count in _between(cuts, layers))


def _between(cuts: Sequence[cp_model.LinearExpr], end: int) -> list[cp_model.LinearExpr]:
    """What lies between neighbouring cuts, from 0 to the end."""
    ends = [cp_model.LinearExpr.affine(cut, 1, 0) for cut in cuts] + [cp_model.LinearExpr.constant(end)]
    return [hi - lo for lo, hi in pairwise([cp_model.LinearExpr.constant(0), *ends])]


def _of_group(model: cp_model.CpModel, cut: cp_model.IntVar, places: tuple[int, ...], layers: int) -> cp_model.IntVar:
    """How many layers of a group lie before a cut.

    Parameters
    ----------
    model : CpModel
    cut : IntVar       layers before it
    places : tuple of int    the layers of the group
    layers : int       of the model
    """
    count = model.new_int_var(0, len(places), "of_group")
    model.add_element(cut, [sum(place < end for place in places) for end in range(layers + 1)], count)
    return count


def _before(model: cp_model.CpModel, cut: cp_model.IntVar, kinds: tuple[int, ...]) -> list[tuple[int, cp_model.IntVar]]:
    """Of each run of layers alike its kind and how many lie before a cut: bounds propagate through these both ways."""
    runs = [(kind, len(list(group))) for kind, group in groupby(kinds)]
    if len(runs) == 1:
        return [(kinds[0], cut)]
    result, start = [], 0
    for kind, length in runs:
        count = model.new_int_var(0, length, "before")
        reached = model.new_int_var(-start, length, "reached")
        model.add_min_equality(reached, [cut - start, length])
        model.add_max_equality(count, [reached, 0])
        result.append((kind, count))
        start += length
    model.add(cp_model.LinearExpr.sum([count for _, count in result]) == cut)
    return result
