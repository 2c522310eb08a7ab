"""Which groups of ranks cross nodes when plans are laid out one group after another."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_cases import dense, make_cluster, make_model

from apex_opt.plan.layout import Layout
from apex_opt.plan.plan import Plan, Template, even_split, parse_plan

MODEL = make_model((dense(heads=16, kv=16), 16))


def layout(text: str, nodes: int, gpus: int) -> Layout:
    return Layout.of(parse_plan(text, MODEL), make_cluster(gpus, nodes))


@pytest.mark.parametrize(
    ("plan", "nodes", "gpus", "ranks", "spanned"),
    [
        ("tp8", 1, 8, 8, 1),
        ("tp8", 2, 8, 8, 1),
        ("tp16", 2, 8, 16, 2),
        ("tp16", 2, 8, 8, 1),
        ("attn(dp2,tp8) ffn(tp16)", 2, 8, 8, 1),
        ("dp2 tp4", 2, 4, 4, 1),
        ("dp4 tp4", 2, 8, 4, 1),
        ("tp6", 2, 4, 6, 2),
        ("dp3 tp2", 2, 3, 2, 2),  # three pairs over two nodes of three: the middle one is split
        ("dp2 tp2", 2, 3, 2, 1),  # a pair per node
        ("tp12", 4, 3, 4, 2),
        ("tp12", 4, 3, 12, 4),
        ("tp4", 2, 2, 4, 2),
        ("dp2 tp4", 4, 3, 4, 2),
        ("dp2 tp5", 4, 3, 5, 3),  # at worst one GPU, a whole node, one more GPU
        ("tp5", 2, 3, 5, 2),  # at worst two nodes: there are no more
    ],
)
def test_groups_span_as_many_nodes_as_the_worst_of_them(
    plan: str, nodes: int, gpus: int, ranks: int, spanned: int
) -> None:
    assert layout(plan, nodes, gpus).nodes_spanned(ranks) == spanned


@given(
    nodes=st.integers(1, 5),
    gpus=st.integers(1, 8),
    replicas=st.integers(1, 6),
    stages=st.integers(1, 4),
    dp=st.integers(1, 4),
    tp=st.integers(1, 8),
)
def test_no_group_spans_more_nodes_than_it_is_said_to(
    nodes: int, gpus: int, replicas: int, stages: int, dp: int, tp: int
) -> None:
    assume(replicas * stages * dp * tp <= nodes * gpus)
    cut = Template(dp=dp, tp=tp)
    plan = Plan(
        replicas=replicas,
        layers=even_split(8, stages),
        attention=cut,
        ffn=cut,
        weight_format="bf16",
        kv_format="bf16",
    )
    found = Layout.of(plan, make_cluster(gpus, nodes))
    size = dp * tp
    # Deal the groups out: into whole nodes where all fit that way, else without gaps.
    per_node = gpus // size
    groups = [
        [(i // per_node) * gpus + (i % per_node) * size + k if found.packed else i * size + k for k in range(size)]
        for i in range(replicas * stages)
    ]
    assert max(itertools.chain(*groups)) < nodes * gpus
    for group in groups:
        for start in range(0, size, tp):
            assert len({gpu // gpus for gpu in group[start : start + tp]}) <= found.nodes_spanned(tp)
        assert len({gpu // gpus for gpu in group}) <= found.nodes_spanned(size)
    inside = all(
        len({gpu // gpus for group in groups[r : r + stages] for gpu in group}) == 1
        for r in range(0, len(groups), stages)
    )
    assert found.together == (inside and found.packed)


def test_stages_talk_inside_a_node_only_where_every_replica_has_one_to_itself() -> None:
    two = make_cluster(8, 2)
    one = make_cluster(8, 1)
    assert layout("pp2 tp4", 2, 8).stage_link(two) == two.intra
    assert layout("pp4 tp4", 2, 8).stage_link(two) == two.inter
    assert layout("dp2 pp3 tp2", 2, 8).stage_link(two) == two.inter  # the second replica lies across both
    assert layout("pp3 tp2", 2, 8).stage_link(two) == two.intra
    assert layout("pp3 tp2", 1, 8).stage_link(one) == one.intra
    assert layout("pp2 tp8", 2, 8).stage_link(two) == two.inter


@pytest.mark.parametrize(
    ("plan", "nodes", "gpus", "firsts"),
    [
        ("dp2 pp2 tp3", 2, 8, [0, 3, 8, 11]),  # two groups to a node, two of its GPUs left free
        ("dp3 tp2", 2, 3, [0, 2, 4]),  # no room for that: without gaps
    ],
)
def test_stage_groups_begin_where_the_one_before_ends_or_on_the_next_node(
    plan: str, nodes: int, gpus: int, firsts: list[int]
) -> None:
    found = layout(plan, nodes, gpus)
    assert [found.first_gpu(group) for group in range(len(firsts))] == firsts
