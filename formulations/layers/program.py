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
    T       what the slowest stage takes
    F       least bytes that a stage has left

    W(n)    weight of the first n layers, B(n) their bytes, N_g(n) how many of them are of group g
    V_k     values of e_k that can be reached from the first layer and from the last for a T and an F, the nearest to
            where the even split cuts first, of two as near the earlier one

Variables
    r_k     place of e_k in V_k, where e_k are the layers before stage k + 1, k = 1..s-1;  e_0 = 0, e_s = L

Constraints
    (r_(k-1), r_k) is a pair for which stage k holds
    S1  1 <= e_k - e_(k-1) <= m
    S2  p_k (a_k + W(e_k) - W(e_(k-1))) <= T
    S3  c_k - B(e_k) + B(e_(k-1)) - q (N_g(e_k) - N_g(e_(k-1))) >= F >= 0 for each group g

Objective: the least T; of these the most F, so that the KV cache has the most room; of these the least r_1, then r_2,
and so on, so that the answer is one. T and F take only values that some range of layers gives, and are found before by
bisection: S1 to S3 tie neighbouring cuts alone, so for a T and an F the cuts that can be reached follow stage by stage.
No value of V_k is a dead end, so that the first solution met is the best one.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from math import lcm
from typing import TYPE_CHECKING

import numpy as np
from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError
from apex_opt.plans.plan import even_split

from ..solver import new_solver

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    _Stage = tuple[int, int, int]


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
    together : int            so many layers, counted from the first, lie on one stage: they are one layer below
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
    together: int = 1


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
    step, stages = pipeline.together, len(pipeline.extra)
    layers, most = len(pipeline.kinds) // step, pipeline.most // step
    if stages > layers:
        return None
    weight = [0, *accumulate(pipeline.weight[kind] for kind in pipeline.kinds)][::step]
    sums = [row[::step] for row in rows(pipeline.kinds, pipeline.held, pipeline.shared, pipeline.page)]
    paces = pipeline.pace or (1,) * stages
    reach = _Reach(replace(pipeline, most=most), weight, sums, paces)
    spans = [np.array(row)[1:, None] - np.array(row)[:-1] for row in (weight, *sums)]  # from a layer up to another
    held = np.tril(np.ones((layers, layers), bool)) & ~np.tril(np.ones((layers, layers), bool), -most)
    # Were all stages to take as long, each would take so much, hence the slowest does.
    common = lcm(*paces)
    mean = -(-(weight[-1] + sum(pipeline.extra)) * common // sum(common // pace for pace in paces))
    kinds = set(zip(paces, pipeline.extra, strict=True))
    weights = np.unique(spans[0][held]).tolist()
    tops = sorted(top for own in weights for pace, extra in kinds if (top := pace * (own + extra)) >= mean)
    place = bisect_left(tops, True, key=lambda top: reach.holds(top, 0))
    if place == len(tops):
        return None
    slowest = tops[place]
    sizes = np.unique(np.maximum.reduce(spans[1:])[held]).tolist()
    left = sorted({room - size for size in sizes for room in set(pipeline.room) if room >= size}, reverse=True)
    spare = left[bisect_left(left, True, key=lambda free: reach.holds(slowest, free))]
    model = cp_model.CpModel()
    # The nearest to where the even split cuts comes first, of two as near the earlier one.
    evens = accumulate(even_split(layers, stages))
    ends = [
        sorted(values, key=lambda end: (abs(end - even), end))
        for values, even in zip(reach.ends(slowest, spare), evens, strict=False)
    ]
    cuts = [model.new_int_var(0, len(values) - 1, "cut") for values in ends]
    for two, allowed in zip(pairwise(cuts), reach.ranges(slowest, spare, ends), strict=False):
        model.add_allowed_assignments(two, allowed)
    model.add_decision_strategy(cuts, cp_model.CHOOSE_FIRST, cp_model.SELECT_MIN_VALUE)
    solver = new_solver()
    solver.parameters.search_branching = cp_model.FIXED_SEARCH
    # Propagation is all it takes: no solution may be lost before, and none has to be learnt from.
    solver.parameters.cp_model_presolve = False
    solver.parameters.cp_model_probing_level = 0
    solver.parameters.inprocessing_dtime_ratio = 0
    solver.parameters.inprocessing_probing_dtime = 0
    solver.parameters.inprocessing_minimization_dtime = 0
    solver.parameters.linearization_level = 0
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise FormulationError(f"layers: the solver ends as {solver.status_name(status)}")
    found = [0, *(values[solver.value(cut)] for cut, values in zip(cuts, ends, strict=True)), layers]
    return tuple(step * (end - start) for start, end in pairwise(found))


class _Reach:
    """Which cuts stages that take no more than a T, and leave an F or more, can be filled up to.

    Parameters
    ----------
    pipeline : Pipeline
    weight : list of int           weight of the first layers, for every number of them
    sums : list of list of int     bytes of these, by group
    paces : tuple of int           of the stages
    """

    def __init__(self, pipeline: Pipeline, weight: list[int], sums: list[list[int]], paces: tuple[int, ...]) -> None:
        self._most, self._weight, self._sums = pipeline.most, np.array(weight), [np.array(row) for row in sums]
        self._places = np.arange(len(weight))
        self._stages = list(zip(paces, pipeline.extra, pipeline.room, strict=True))

    def holds(self, slowest: int, spare: int) -> bool:
        """Whether some split fits.

        Parameters
        ----------
        slowest, spare : int    T and F
        """
        return bool(self._reached(self._by_stage(slowest, spare))[-1] >> len(self._weight) - 1)

    def ends(self, slowest: int, spare: int) -> list[list[int]]:
        """Of each cut the values that can be reached from the first layer and from the last, where some split fits.

        Parameters
        ----------
        slowest, spare : int    T and F
        """
        by_stage = self._by_stage(slowest, spare)
        reached = self._reached(by_stage)
        kept = [1 << len(self._weight) - 1]
        for stage, starts in zip(reversed(self._stages), reversed(reached[:-1]), strict=True):
            far, barred = by_stage[stage]
            able, before = 0, 0
            for first, last in _runs(kept[-1]):
                # Before the first end those that go so far, from there on those that go anywhere.
                able |= _between(max(bisect_left(far, first), before), first - 1) | _between(first, last - 1) & ~barred
                before = last
            kept.append(able & starts)
        return [[end for first, last in _runs(mask) for end in range(first, last + 1)] for mask in kept[-2:0:-1]]

    def _reached(self, by_stage: dict[_Stage, tuple[list[int], int]]) -> list[int]:
        """Where each stage may begin, and the last one end, as sets of bits: the n-th stands for n layers."""
        reached = [1]
        for stage in self._stages:
            far, barred = by_stage[stage]
            ends = 0
            for first, last in _runs(reached[-1]):
                # The further a stage begins, the further it goes; it goes past no layer that fits nowhere.
                ends |= _between(first + 1, far[last]) & ~(barred << 1)
            reached.append(ends)
        return reached

    def ranges(self, slowest: int, spare: int, ends: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
        """Of each stage between two cuts where it may begin and end, as places among the values of these.

        Parameters
        ----------
        slowest, spare : int    T and F
        ends : of each cut the values to choose from
        """
        found, furthest = [], self._by_stage(slowest, spare)
        for stage, (starts, stops) in zip(self._stages[1:], pairwise(ends), strict=False):
            far, _ = furthest[stage]
            found.append([(a, b) for a, i in enumerate(starts) for b, j in enumerate(stops) if i < j <= far[i]])
        return found

    def _by_stage(self, slowest: int, spare: int) -> dict[_Stage, tuple[list[int], int]]:
        """`_furthest` of every kind of stage, which are few, and behind which layers such a stage goes nowhere."""
        found = {}
        for stage in set(self._stages):
            far = self._furthest(*stage, slowest, spare)
            found[stage] = far.tolist(), sum(1 << start for start in np.flatnonzero(far == self._places).tolist())
        return found

    def _furthest(self, pace: int, extra: int, room: int, slowest: int, spare: int) -> NDArray[np.int64]:
        """Where a stage that begins behind so many layers ends at the furthest, no further than it begins if nowhere.

        Parameters
        ----------
        pace, extra, room : int    of the stage
        slowest, spare : int       T and F
        """
        heaviest, largest = slowest // pace - extra, room - spare
        if heaviest < 0 or largest < 0:
            return self._places
        far = self._places + self._most
        for row, most in ((self._weight, heaviest), *((row, largest) for row in self._sums)):
            far = np.minimum(far, np.searchsorted(row, row + most, side="right") - 1)
        return far


def _between(first: int, last: int) -> int:
    """The set of bits from one to another, both included; none where the last comes before the first."""
    return (1 << last + 1) - (1 << first) if last >= first else 0


def _runs(mask: int) -> Iterator[tuple[int, int]]:
    """The first and the last bit of each run in a set, in rising order."""
    while mask:
        first = (mask & -mask).bit_length() - 1
        last = first + (~(mask >> first) & (mask >> first) + 1).bit_length() - 2
        yield first, last
        mask &= -1 << last + 1
