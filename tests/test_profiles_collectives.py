"""Collectives: the published times come back, laws between and beyond them never fall as messages grow."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_opt.cluster import Cluster, Link, load_cluster
from apex_opt.errors import InputError, UsageError
from apex_opt.profiles import load_collectives
from apex_opt.units import DATA_ROOT, KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

TABLE = DATA_ROOT / "profiles" / "collectives.toml"
SIZES = np.array([130 * KIB, MIB, 8 * MIB, 64 * MIB])
NAMES = ("all_reduce_s", "all_gather_s", "reduce_scatter_s", "all_to_all_s")


@pytest.mark.parametrize(("spec", "times_us"), [("8xh100", [19, 34, 74, 322]), ("8xa100", [32, 64, 155, 675])])
def test_published_all_reduces_inside_a_node_come_back(spec: str, times_us: list[float]) -> None:
    library = load_collectives(load_cluster(spec), custom_all_reduce=False)
    assert library.all_reduce_s(SIZES, 8) * 1e6 == pytest.approx(times_us)
    assert library.provenance["all_reduce/intra"].startswith("published medians")


def test_published_all_reduces_over_two_nodes_come_back() -> None:
    cluster = load_cluster("2x8xh100")
    collectives = load_collectives(cluster)
    times = collectives.all_reduce_s([1e6, 1e8], 16, cluster.link_between(range(16)))
    assert times * 1e6 == pytest.approx([88, 647])
    assert (times == collectives.all_reduce_s([1e6, 1e8], 16, nodes=2)).all()


def test_the_engines_own_all_reduce_serves_small_messages_only() -> None:
    cluster = load_cluster("8xh100")
    with_own, without = load_collectives(cluster), load_collectives(cluster, custom_all_reduce=False)
    assert with_own.all_reduce_s(MIB, 8) * 1e6 == pytest.approx(15)
    assert with_own.all_reduce_s(1024, 8) < 8e-6 < without.all_reduce_s(1024, 8)
    assert with_own.all_reduce_s(64 * MIB, 8) == without.all_reduce_s(64 * MIB, 8)
    pcie = replace(cluster, intra=Link(bytes_per_s=3e10, latency_s=1e-5, kind="pcie"))
    own, plain = load_collectives(pcie), load_collectives(pcie, custom_all_reduce=False)
    assert own.all_reduce_s(MIB, 8) == plain.all_reduce_s(MIB, 8)


@settings(deadline=None, max_examples=80)
@given(
    spec=st.sampled_from(["8xh100", "4x8xh100", "8xa100", "3x8xb200", "4x8xl40s", "2x8xv100", "h200"]),
    ranks=st.integers(1, 32),
    sizes=st.lists(st.integers(0, 2**40), min_size=2, max_size=30),
    name=st.sampled_from(NAMES),
    own=st.booleans(),
)
def test_every_collective_is_finite_and_never_falls_as_messages_grow(
    spec: str, ranks: int, sizes: list[int], name: str, own: bool
) -> None:
    cluster = load_cluster(spec)
    ranks = min(ranks, cluster.size)
    moved = np.sort(np.array(sizes))
    times = getattr(load_collectives(cluster, custom_all_reduce=own), name)(moved, ranks)
    assert np.isfinite(times).all()
    assert (np.diff(times) >= 0).all()
    assert (times[moved == 0] == 0).all()
    if ranks == 1:
        assert (times == 0).all()
    else:
        assert (times[moved > 0] > 0).all()


@pytest.mark.parametrize("spec", ["8xh100", "8xl40s"])
def test_more_ranks_in_a_node_never_reduce_faster(spec: str) -> None:
    collectives = load_collectives(load_cluster(spec))
    for size in (KIB, MIB, 64 * MIB):
        times = [float(collectives.all_reduce_s(size, ranks)) for ranks in range(1, 9)]
        assert times == sorted(times)


def test_a_gather_and_a_scatter_together_move_what_a_reduce_moves() -> None:
    collectives = load_collectives(load_cluster("8xh100"), custom_all_reduce=False)
    big = np.array([2**30, 2**31])
    halves = collectives.all_gather_s(big, 8) + collectives.reduce_scatter_s(big, 8)
    assert np.diff(halves) == pytest.approx(np.diff(collectives.all_reduce_s(big, 8)))


def test_twice_the_link_halves_what_exceeds_the_floor() -> None:
    cluster = load_cluster("8xh100")
    fast = replace(cluster, intra=replace(cluster.intra, bytes_per_s=900e9))
    slow_s, fast_s = (
        load_collectives(c, custom_all_reduce=False).all_reduce_s(64 * MIB, 8) * 1e6 for c in (cluster, fast)
    )
    assert slow_s - 19 == pytest.approx(2 * (fast_s - 19))


def test_groups_with_one_rank_per_node_are_bound_by_one_port_each() -> None:
    collectives = load_collectives(load_cluster("2x8xh100"))
    spread = collectives.all_reduce_s(1e9, 2, nodes=2)
    assert spread > 1e9 / 50e9
    assert spread > collectives.all_reduce_s(1e9, 2) * 5


def test_point_to_point_pays_latency_and_bandwidth_of_its_link() -> None:
    cluster = load_cluster("2x8xh100")
    collectives = load_collectives(cluster)
    assert cluster.inter is not None
    for link in (cluster.intra, cluster.inter):
        times = collectives.point_to_point_s([0, 1, 1e9], link)
        assert times[0] == 0
        assert times[1] == pytest.approx(link.latency_s, rel=1e-3)
        assert 1e9 / link.bytes_per_s < times[2] < 1.5e9 / link.bytes_per_s


@pytest.mark.parametrize("bad", [0, -1, 17, 2.0, True, pytest.param(10**5000, id="huge"), None])
def test_impossible_numbers_of_ranks_are_refused(bad: Any) -> None:
    collectives = load_collectives(load_cluster("2x8xh100"))
    with pytest.raises(UsageError, match="from 1 to the cluster's 16 GPUs"):
        collectives.all_reduce_s(1, bad)
    with pytest.raises(UsageError, match="tensor_bytes"):
        collectives.all_reduce_s(-1, 2)
    with pytest.raises(UsageError, match="nodes = 3 must be a whole number from 1 to the 2 ranks"):
        collectives.all_reduce_s(1, 2, nodes=3)


def test_a_group_over_nodes_needs_a_link_between_them() -> None:
    one: Cluster = replace(load_cluster("8xh100"), inter=None)
    with pytest.raises(UsageError, match=r"describe \[inter\]"):
        load_collectives(one).all_to_all_s(1, 8, nodes=2)
    assert "all_reduce/inter" not in load_collectives(one).provenance


def test_every_published_figure_has_a_source_and_bad_tables_are_refused(tmp_path: Path) -> None:
    text = TABLE.read_text()
    path = tmp_path / "collectives.toml"
    for old, new, message in (
        ("time_us = [19, 34, 74, 322]", "time_us = [19, 34, 33, 322]", r"all_reduce\[0\].time_us = .* rising"),
        ("time_us = [19, 34, 74, 322]", "time_us = [19, 34, 74]", "4 sizes and 3 times"),
        ("ranks = 16", "ranks = 15", "15 ranks do not fill 2 nodes"),
        ("anchor_us = 15", "anchor_us = 5", "must be above floor_us"),
        ("pcie = 0.8", "pcie = 1.8", "link_efficiency.pcie = 1.8"),
        ('source = "assumed: protocol overhead"', "", "link_efficiency.source is missing"),
        ("[custom_all_reduce]", "[costume]", "custom_all_reduce is missing"),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(InputError, match=message):
            load_collectives(load_cluster("8xh100"), path=tmp_path / "." / path.name)
        path.unlink()
        path = tmp_path / f"{path.stem}x.toml"  # readers remember a path
