"""What groups of ranks cross, given the chunks of a replica and the links between them."""

from __future__ import annotations

from math import ceil, prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.cluster import Link
from apex_opt.plans.layout import Layout, Tier


def link(gb_per_s: float, latency_us: float, kind: str = "pcie") -> Link:
    return Link(bytes_per_s=gb_per_s * 1e9, latency_s=latency_us / 1e6, kind=kind)


SWITCH, SOCKET, NODE = link(32, 10), link(30, 20), link(16, 22)
LEAF, SPINE = link(25, 5, "ethernet"), link(12, 6, "ethernet")
DEEP = Layout(
    stage_devices=16,
    tiers=(
        Tier("switch", 2, SWITCH, False),
        Tier("socket", 4, SOCKET, False),
        Tier("node", 8, NODE, False),
        Tier("leaf", 16, LEAF, True),
        Tier("cluster", 64, SPINE, True),
    ),
)


@pytest.mark.parametrize(
    ("ranks", "stride", "nodes", "near", "far"),
    [
        (1, 1, 1, None, None),
        (1, 8, 1, None, None),
        (2, 1, 1, SWITCH, None),
        (4, 1, 1, SOCKET, None),
        (2, 2, 1, SOCKET, None),
        (8, 1, 1, NODE, None),
        (2, 4, 1, NODE, None),
        (16, 1, 2, NODE, LEAF),
        (2, 8, 2, NODE, LEAF),
        (8, 2, 2, NODE, LEAF),
    ],
)
def test_a_group_crosses_the_domains_that_hold_less_than_all_of_it(
    ranks: int, stride: int, nodes: int, near: Link | None, far: Link | None
) -> None:
    assert DEEP.spread(ranks, stride) == (nodes, near, far)


def test_the_slowest_link_on_the_way_decides_and_the_outermost_tells_the_latency() -> None:
    tiers = (Tier("switch", 2, link(10, 1), False), Tier("node", 4, link(30, 7), False))
    found = Layout(stage_devices=4, tiers=tiers).spread(4).near
    assert found is not None
    assert (found.bytes_per_s, found.latency_s) == (10e9, pytest.approx(7e-6))


def test_stages_talk_over_the_links_beyond_a_stage() -> None:
    found, far = DEEP.stage_link
    assert (found, far) == (SPINE, True)
    inside = Layout(stage_devices=2, tiers=DEEP.tiers[:3])
    assert inside.stage_link == (NODE, False)
    assert Layout(stage_devices=8, tiers=DEEP.tiers[:3]).stage_link == (None, False)


@pytest.mark.parametrize(
    ("chunk", "ranks", "nodes"),
    [(4, 12, 3), (6, 12, 2), (4, 6, 3), (6, 4, 2), (1, 4, 4), (3, 4, 2), (4, 5, 2)],
)
def test_ranks_that_do_not_fill_the_chunks_straddle_them(chunk: int, ranks: int, nodes: int) -> None:
    tiers = (Tier("node", chunk, NODE, False), Tier("cluster", 60, LEAF, True))[chunk == 1 :]
    assert Layout(stage_devices=60, tiers=tiers).spread(ranks).nodes == nodes


@given(chunk=st.integers(1, 12), parts=st.integers(2, 6), ranks=st.integers(1, 24), stride=st.integers(1, 3))
def test_no_aligned_block_touches_more_nodes_than_it_is_said_to(
    chunk: int, parts: int, ranks: int, stride: int
) -> None:
    block, whole = ranks * stride, chunk * parts
    tiers = (Tier("node", chunk, NODE, False), Tier("cluster", whole, LEAF, True))[chunk == 1 :]
    found = Layout(stage_devices=whole, tiers=tiers).spread(ranks, stride)
    for first in range(0, whole - block + 1, block):
        for offset in range(stride):
            touched = {(first + offset + rank * stride) // chunk for rank in range(ranks)}
            assert len(touched) <= found.nodes
    assert found.nodes <= max(1, min(ranks, ceil(block / chunk) + 1))


@given(st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=5), st.integers(0, 5), st.data())
def test_what_the_ranks_of_a_stage_cross_is_known_of_the_stage_alone(
    factors: list[int], inside: int, data: st.DataObject
) -> None:
    links = (SWITCH, SOCKET, NODE, LEAF, SPINE)
    chunks = [prod(factors[: index + 1]) for index in range(len(factors))]
    tiers = [Tier(str(place), chunk, links[place], place >= inside) for place, chunk in enumerate(chunks)]
    stage = data.draw(st.sampled_from([n for n in range(1, chunks[-1] + 1) if chunks[-1] % n == 0]))
    # Chunks cut a stage into equal parts or hold whole stages.
    tiers = [tier for tier in tiers if stage % tier.chunk == 0 or tier.chunk % stage == 0]
    layout = Layout(stage_devices=stage, tiers=tuple(tiers))
    within = layout.of_stage
    assert max((tier.chunk for tier in within.tiers), default=1) == stage
    assert within.of_stage == within
    for ranks in (n for n in range(1, stage + 1) if stage % n == 0):
        for stride in (n for n in range(1, stage // ranks + 1) if stage // ranks % n == 0):
            assert within.spread(ranks, stride) == layout.spread(ranks, stride)
            kinds = [[tier.kind for tier in one.crossed(ranks, stride)] for one in (within, layout)]
            assert kinds[0] == kinds[1]
