"""The layer program finds the same split as trying every one."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_opt.plans.plan import even_split
from formulations.layers import Pipeline, split

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = st.integers(1, 9)


@st.composite
def pipelines(draw: Callable[..., int]) -> Pipeline:
    """Few layers of up to three kinds, over stages with a pace, something beside layers, and some room."""
    kinds, step = draw(st.integers(1, 3)), draw(st.sampled_from((1, 1, 2, 3)))
    order = tuple(draw(st.lists(st.integers(0, kinds - 1), min_size=step, max_size=9)))
    order = order[: len(order) // step * step]
    stages = draw(st.integers(1, min(5, len(order))))

    def each(values: st.SearchStrategy[int], count: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(values, min_size=count, max_size=count)))

    group_of = draw(st.lists(st.integers(0, 2), min_size=len(order), max_size=len(order)))
    shared = tuple(tuple(i for i, group in enumerate(group_of) if group == g) for g in range(3))
    return Pipeline(
        kinds=order,
        shared=draw(st.sampled_from([(), shared])),
        page=draw(SMALL),
        weight=each(SMALL, kinds),
        held=each(SMALL, kinds),
        extra=each(st.sampled_from((0, 0, 3, 8)), stages),
        room=each(st.integers(5, 60), stages),
        most=draw(st.sampled_from((len(order), -(-3 * len(order) // (2 * stages))))),
        pace=draw(st.sampled_from([(), each(st.sampled_from((2, 3, 7)), stages)])),
        together=step,
    )


def brute_force(p: Pipeline) -> tuple[int, ...] | None:
    """The best of all splits that fit."""
    layers, stages = len(p.kinds), len(p.extra)
    if stages * p.together > layers:
        return None
    even = [p.together * end for end in accumulate(even_split(layers // p.together, stages))]
    best = []
    for cuts in combinations(range(p.together, layers, p.together), stages - 1):
        spans = list(pairwise((0, *cuts, layers)))
        parts = [p.kinds[i:j] for i, j in spans]
        heaviest = max(
            pace * (sum(p.weight[k] for k in part) + extra)
            for part, extra, pace in zip(parts, p.extra, p.pace or (1,) * stages, strict=True)
        )
        own = [sum(p.held[k] for k in part) for part in parts]
        # Groups share blocks: on every stage there are as many as the group with the most layers there needs.
        pages = [max((sum(i <= layer < j for layer in g) for g in p.shared), default=0) for i, j in spans]
        spare = min(room - held - p.page * most for room, held, most in zip(p.room, own, pages, strict=True))
        if spare >= 0 and max(map(len, parts)) <= p.most:
            apart = tuple((abs(cut - other), cut) for cut, other in zip(cuts, even, strict=False))
            best.append((heaviest, -spare, apart, tuple(map(len, parts))))
    return min(best)[-1] if best else None


@given(pipelines())
@settings(max_examples=200, deadline=None)
def test_the_split_is_the_best_of_all_that_fit(pipeline: Pipeline) -> None:
    assert split(pipeline) == brute_force(pipeline)


@given(pipelines(), st.integers(2, 50))
@settings(max_examples=100, deadline=None)
def test_scaled_weights_are_split_alike(pipeline: Pipeline, factor: int) -> None:
    scaled = replace(
        pipeline,
        weight=tuple(factor * w for w in pipeline.weight),
        extra=tuple(factor * e for e in pipeline.extra),
    )
    assert split(scaled) == split(pipeline)


@pytest.mark.parametrize(("head", "layers"), [(0, (4, 4, 4)), (3, (5, 5, 2)), (1, (4, 4, 4))])
def test_the_last_stage_has_fewer_layers_the_more_its_lm_head_weighs(head: int, layers: tuple[int, ...]) -> None:
    pipeline = Pipeline(kinds=(0,) * 12, weight=(1,), held=(1,), extra=(0, 0, head), room=(99,) * 3, most=6)
    found = split(pipeline)
    assert found is not None
    assert max(found[0], found[1], found[2] + head) == max(layers[0], layers[1], layers[2] + head)
    assert found[2] <= layers[2]


def test_a_stage_half_as_fast_holds_half_the_layers() -> None:
    pipeline = Pipeline(kinds=(0,) * 12, weight=(5,), held=(1,), extra=(0, 0), room=(99, 99), most=12, pace=(1, 2))
    assert split(pipeline) == (8, 4)


def test_a_stage_with_less_room_holds_fewer_layers_and_none_at_all_fits_nowhere() -> None:
    def asked(*room: int) -> tuple[int, ...] | None:
        return split(Pipeline(kinds=(0,) * 9, weight=(2,), held=(10,), extra=(0, 0, 0), room=room, most=9))

    assert asked(99, 99, 99) == (3, 3, 3)
    assert asked(99, 25, 99) == (4, 1, 4)
    assert asked(99, 9, 99) is None
    assert asked(20, 20, 20) is None
