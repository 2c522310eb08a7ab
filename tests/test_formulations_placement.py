"""The placement program against every assignment there is, and what it keeps to."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from topology_cases import compositions

from apex_opt.cluster.tree import Tree
from apex_opt.placement.assignment import arranged, layout_of
from apex_opt.placement.shape import Shape, fits, ways
from formulations.placement import kept_groups, move, place

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.cluster import Composition
    from apex_opt.placement.assignment import Assignment
    from apex_opt.plans.layout import Layout

MOST_ASSIGNMENTS = 1000


class Talk(NamedTuple):
    """Collectives of so many ranks, so many apart, of so many bytes."""

    ranks: int
    stride: int
    size: float


def measure(talks: tuple[Talk, ...], sent: float) -> Callable[[Layout], tuple[float, ...]]:
    """Time of rings inside nodes and between them, and of what stages send on; then what crosses nodes."""

    def total(layout: Layout) -> tuple[float, float]:
        time = far_bytes = 0.0
        for ranks, stride, size in talks:
            nodes, near, far = layout.spread(ranks, stride)
            time += near.latency_s + size / near.bytes_per_s if near else 0.0
            time += far.latency_s + 2 * (1 - 1 / nodes) * size * nodes / ranks / far.bytes_per_s if far else 0.0
            far_bytes += size * bool(far)
        link, far_away = layout.stage_link
        time += link.latency_s + sent / link.bytes_per_s if link else 0.0
        return time, far_bytes + sent * far_away

    return total


@st.composite
def shapes(draw: st.DrawFn, free: int) -> Shape:
    ranks = draw(st.integers(1, free))
    stages = draw(st.integers(1, free // ranks))
    return Shape(draw(st.integers(1, free // (ranks * stages))), stages, ranks)


@st.composite
def talk(draw: st.DrawFn, shape: Shape) -> Callable[[Layout], tuple[float, ...]]:
    pairs = [(n, stride) for n in range(2, shape.ranks + 1) for stride in (1, 2) if shape.ranks % (n * stride) == 0]
    some = draw(st.lists(st.sampled_from(pairs), max_size=3)) if pairs else []
    sizes = st.sampled_from([1e3, 1e6, 1e9])
    return measure(tuple(Talk(*pair, draw(sizes)) for pair in some), draw(sizes))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tree, Shape, Callable[[Layout], tuple[float, ...]]]:
    """Up to seven free GPUs of a cluster of any kind."""
    composition: Composition = draw(compositions())
    gpus = composition.topology().gpus()
    free = draw(st.lists(st.sampled_from(gpus), min_size=1, max_size=7, unique=True))
    tree = Tree.of(composition, set(gpus) - set(free))
    shape = draw(shapes(tree.size))
    assignments = 1
    for n in range(shape.size):
        assignments *= tree.size - n
    assume(assignments <= MOST_ASSIGNMENTS)
    return tree, shape, draw(talk(shape))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_no_assignment_of_ranks_to_gpus_is_better(
    asked: tuple[Tree, Shape, Callable[[Layout], tuple[float, ...]]],
) -> None:
    tree, shape, judged = asked
    found = place(tree, shape, judged)
    assert found is not None, "a shape that takes no more GPUs than there are always fits"
    best = min(
        judged(layout_of(tree, shape, arranged(gpus, shape))) for gpus in itertools.permutations(tree.gpus, shape.size)
    )
    assert judged(found.layout) == judged(layout_of(tree, shape, found.assignment)) == best
    assert found.optimal


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_of_equally_quick_assignments_none_keeps_more_gpus_in_groups(
    asked: tuple[Tree, Shape, Callable[[Layout], tuple[float, ...]]],
) -> None:
    tree, shape, judged = asked
    found = place(tree, shape, judged)
    assert found is not None

    def kept(gpus: set[str]) -> int:
        near = [level for level in tree.levels if not level.far]
        spans = [tree.bins[domain.first : domain.last] for level in near for domain in level.domains]
        return sum(kept_groups(sum(gpu not in gpus for part in span for gpu in part.gpus)) for span in spans)

    quick = (
        kept(set(gpus))
        for gpus in itertools.permutations(tree.gpus, shape.size)
        if judged(layout_of(tree, shape, arranged(gpus, shape))) == judged(found.layout)
    )
    mine = {gpu for replica in found.assignment for stage in replica for gpu in stage}
    assert found.kept == kept(mine) == max(quick)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems())
def test_what_the_search_counts_with_is_what_the_program_places(
    asked: tuple[Tree, Shape, Callable[[Layout], tuple[float, ...]]],
) -> None:
    tree, shape, judged = asked
    ordered = sorted(ways(tree, shape), key=lambda way: judged(way.layout))
    counted = next(way.layout for way in ordered if fits(tree, shape, way))
    found = place(tree, shape, judged)
    assert found is not None
    assert judged(counted) == found.measure


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.data())
def test_no_assignment_as_quick_moves_fewer_weights(
    asked: tuple[Tree, Shape, Callable[[Layout], tuple[float, ...]]], data: st.DataObject
) -> None:
    tree, shape, judged = asked
    others = ["node9:0", "node9:1", "node9:2"]
    size = data.draw(st.integers(shape.replicas, shape.replicas + 1)) * shape.replica
    gpus = data.draw(st.permutations([*tree.gpus, *others]))
    assume(size <= len(gpus))
    before = arranged(gpus[:size], shape._replace(replicas=size // shape.replica))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=shape.stages, max_size=shape.stages))
    found = move(tree, shape, judged, before, weights)
    assert found is not None
    ends = [weights[stage] for stage in range(shape.stages) for _ in range(shape.ranks)]

    def lost(placed: Assignment, was: Assignment) -> int:
        pairs = zip(placed, was, strict=True)
        return sum(
            weight
            for new, old in pairs
            for weight, gpu, before_gpu in zip(ends, itertools.chain(*new), itertools.chain(*old), strict=True)
            if gpu != before_gpu
        )

    kept = [[before[index] for index in some] for some in itertools.combinations(range(len(before)), shape.replicas)]
    best = min(
        (judged(layout_of(tree, shape, placed)), min(lost(placed, tuple(was)) for was in kept))
        for placed in (arranged(some, shape) for some in itertools.permutations(tree.gpus, shape.size))
    )
    assert (judged(found.layout), found.moved_bytes) == best
    assert lost(found.assignment, tuple(before[index] for index in found.replicas)) == found.moved_bytes


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(compositions(), st.data())
def test_a_spare_gpu_never_makes_the_best_placement_slower(composition: Composition, data: st.DataObject) -> None:
    gpus = composition.topology().gpus()
    free = data.draw(st.lists(st.sampled_from(gpus), min_size=1, max_size=12, unique=True))
    fewer = Tree.of(composition, set(gpus) - set(free))
    shape = data.draw(shapes(fewer.size))
    judged = data.draw(talk(shape))
    spare = data.draw(st.lists(st.sampled_from(gpus), max_size=3, unique=True))
    more = Tree.of(composition, set(gpus) - set(free) - set(spare))
    few, many = place(fewer, shape, judged), place(more, shape, judged)
    assert few is not None
    assert many is not None
    assert many.measure[0] <= few.measure[0] * (1 + 1e-12)
