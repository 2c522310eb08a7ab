"""Collectives: measured and published times come back, laws between and beyond them never fall as messages grow."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_cases import ROOT, mine, write_source

from apex_opt.cluster import Cluster, Link, list_gpus, load_cluster
from apex_opt.errors import InputError, UsageError
from apex_opt.profiles import Collectives, load_collectives, load_profile
from apex_opt.profiles.laws import load_source
from apex_opt.units import DATA_ROOT, KIB, MIB

if TYPE_CHECKING:
    from pathlib import Path

TABLE = DATA_ROOT / "profiles" / "collectives.toml"
SIZES = np.array([130 * KIB, MIB, 8 * MIB, 64 * MIB])
NAMES = ("all_reduce_s", "all_gather_s", "reduce_scatter_s", "all_to_all_s")
NODES = {name: f"8x{name}" for name in list_gpus() if "nvl72" not in name and "gh200" not in name}
NODES |= {name: f"4x{name}" for name in list_gpus() if "nvl72" in name} | {"gh200-144gb": "2xgh200-144gb"}
HEAD = "op,ranks,bytes,time_us\n"


def measured(spec: str, engine: str = "vllm", **changes: Any) -> Collectives:
    """Collectives of a cluster with the profile of its GPU."""
    cluster = replace(load_cluster(spec), **changes)
    return load_collectives(cluster, profile=load_profile(cluster.gpu, engine))


@pytest.mark.parametrize(("spec", "times_us"), [("8xh100", [19, 34, 74, 322]), ("8xa100", [32, 64, 155, 675])])
def test_published_all_reduces_inside_a_node_come_back(spec: str, times_us: list[float]) -> None:
    library = load_collectives(load_cluster(spec), custom_all_reduce=False)
    assert library.all_reduce_s(SIZES, 8) * 1e6 == pytest.approx(times_us)
    assert library.provenance["all_reduce/intra"].startswith("published medians")


def test_published_all_reduces_over_two_nodes_come_back() -> None:
    cluster = load_cluster("2x8xh100")
    collectives = load_collectives(cluster)
    times = collectives.all_reduce_s([1e6, 1e8], 16)
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


@pytest.mark.parametrize(
    ("spec", "folder", "engine", "own"),
    [
        ("8xh200-sxm", "h200-sxm/nccl-2.29.2", "vllm", "h200-sxm/vllm-0.24.0"),
        ("8xb200-sxm", "b200-sxm/nccl-2.29.2", "trtllm", "b200-sxm/trtllm-1.3.0rc20"),
        ("8xl40s", "l40s/nccl-2.27.3", "sglang", "l40s/sglang-0.5.14"),
        ("4xgb200", "gb200/nccl-2.29.2", "vllm", "gb200/vllm-0.24.0"),
    ],
)
def test_measured_collectives_come_back(spec: str, folder: str, engine: str, own: str) -> None:
    calls = measured(spec, engine)
    plain = replace(calls, custom_all_reduce=False)
    for source, library in ((folder, plain), (own, calls)):
        table = load_source(ROOT / source).table("collective")
        for op, ranks, size in zip(*(table[name] for name in ("op", "ranks", "bytes")), strict=True):
            if size > 2**29:
                continue
            own_kernel = op == "custom_all_reduce"
            found = float(getattr(library, f"{'all_reduce' if own_kernel else op}_s")(size, int(ranks))) * 1e6
            # A message takes no less than a smaller one; the library may be faster than the engine's own kernel.
            smaller = (table["op"] == op) & (table["ranks"] == ranks) & (table["bytes"] <= size)
            expected = float(table["time_us"][smaller].max())
            assert found == pytest.approx(expected) or (own_kernel and found < expected)


def test_the_engines_own_all_reduce_is_told_of_where_it_is_used() -> None:
    calls = measured("8xh200-sxm")
    plain = replace(calls, custom_all_reduce=False)
    library = "measured on 2, 4, 8 ranks (profiles/h200-sxm/nccl-2.29.2/collective.npz), other numbers derived"
    assert plain.provenance["all_reduce/intra"] == library
    assert calls.provenance["all_reduce/intra"] == (
        f"{library}; an engine's own where it is faster, measured on 2, 4, 8 ranks "
        "(profiles/h200-sxm/vllm-0.24.0/collective.npz), other numbers derived"
    )
    assert "custom_all_reduce/intra" not in calls.provenance
    for name in ("all_gather", "reduce_scatter", "all_to_all"):
        assert calls.provenance[f"{name}/intra"] == library
    assert calls.provenance["point_to_point/intra"].startswith("assumed")
    assert float(calls.all_reduce_s(16 * KIB, 8)) < 0.5 * float(plain.all_reduce_s(16 * KIB, 8))
    assert "engines' own all-reduce" in load_collectives(load_cluster("8xh200-sxm")).provenance["all_reduce/intra"]


def test_an_engines_own_all_reduce_serves_no_more_ranks_than_such_kernels_do_and_no_larger_messages(
    tmp_path: Path,
) -> None:
    rows = [f"all_reduce,{ranks},{size},{time}" for ranks in (2, 16) for size, time in ((1024, 20), (2**26, 400))]
    write_source(tmp_path, "one/nccl", {"collective": HEAD + "\n".join(rows)})
    own = ["custom_all_reduce,2,1024,4", "custom_all_reduce,2,65536,8"]
    write_source(tmp_path, "one/vllm-1", {"collective": HEAD + "\n".join(own)}, "vllm")
    profile = load_profile(mine("one"), "vllm", tmp_path)
    node = load_cluster("8xh200-sxm")
    calls = load_collectives(node, profile=profile)
    assert calls.all_reduce_s([1024, 65536], 2) * 1e6 == pytest.approx([4, 8])
    assert float(calls.all_reduce_s(65537, 2)) > 40e-6
    assert replace(calls, gpus_per_node=16).all_reduce_s(1024, 16) * 1e6 == pytest.approx(20)


def test_numbers_of_ranks_between_measured_ones_lie_between_and_others_follow_the_traffic(tmp_path: Path) -> None:
    rows = [f"all_reduce,{ranks},{size},{time * ranks}" for ranks in (2, 4) for size, time in ((1024, 5), (2**26, 400))]
    write_source(tmp_path, "one/nccl", {"collective": HEAD + "\n".join(rows)})
    profile = load_profile(mine("one"), "vllm", tmp_path)
    calls = replace(load_collectives(load_cluster("8xh200-sxm"), profile=profile), custom_all_reduce=False)
    assert calls.all_reduce_s([1024, 2**26], 3) * 1e6 == pytest.approx([15, 1200])
    small, large = calls.all_reduce_s([1024, 2**26], 8) * 1e6
    assert small == pytest.approx(20 * 4 / 3)
    assert large - small == pytest.approx(1580 * (7 / 8) / (3 / 4))
    beyond = calls.all_reduce_s([2**26, 2**28], 4)
    assert beyond[1] == pytest.approx(4 * beyond[0])


def test_nodes_wired_otherwise_than_those_measured_fall_back_on_laws() -> None:
    pcie = Link(bytes_per_s=5e10, latency_s=1e-5, kind="pcie")
    for spec, kept in (("8xh200-sxm", "measured"), ("2x8xh200-sxm", "measured")):
        assert measured(spec).provenance["all_reduce/intra"].startswith(kept)
        other = measured(spec, intra=pcie)
        assert other.provenance["all_reduce/intra"].startswith("assumed: latency and share of the pcie link")
        assert float(other.all_reduce_s(64 * MIB, 8)) > 3 * float(measured(spec).all_reduce_s(64 * MIB, 8))
    faster = load_cluster("8xh200-sxm").intra
    assert (
        measured("8xh200-sxm", intra=replace(faster, bytes_per_s=9e11))
        .provenance["all_reduce/intra"]
        .startswith("derived from the published medians of h100-sxm-80gb")
    )
    assert measured("8xv100-pcie-16gb").provenance["all_gather/intra"].startswith("assumed")
    assert measured("2x8xh200-sxm").provenance["all_reduce/inter"].startswith("derived from published times of two")


@settings(deadline=None, max_examples=80)
@given(
    spec=st.sampled_from(["8xh100", "4x8xh100", "8xa100", "3x8xb200", "4x8xl40s", "2x8xv100", "h200", "16xgb200"]),
    ranks=st.integers(1, 32),
    sizes=st.lists(st.integers(0, 2**40), min_size=2, max_size=30),
    name=st.sampled_from(NAMES),
    own=st.booleans(),
    tables=st.booleans(),
)
def test_every_collective_is_finite_and_never_falls_as_messages_grow(
    spec: str, ranks: int, sizes: list[int], name: str, own: bool, tables: bool
) -> None:
    cluster = load_cluster(spec)
    ranks = min(ranks, cluster.size)
    moved = np.sort(np.array(sizes))
    profile = load_profile(cluster.gpu) if tables else None
    calls = load_collectives(cluster, profile=profile, custom_all_reduce=own)
    times = getattr(calls, name)(moved, ranks)
    assert np.isfinite(times).all()
    assert (np.diff(times) >= 0).all()
    assert (times[moved == 0] == 0).all()
    if ranks == 1:
        assert (times == 0).all()
    else:
        assert (times[moved > 0] > 0).all()


@pytest.mark.parametrize("gpu", sorted(NODES))
def test_no_large_collective_beats_the_link_by_more_than_a_switch_that_adds_up(gpu: str) -> None:
    calls = measured(NODES[gpu])
    for ranks in range(2, calls.gpus_per_node + 1):
        # On a mesh every one of the others is at the end of a link of its own.
        links = ranks - 1 if calls.intra.kind == "xgmi" else 1
        sent = (ranks - 1) / ranks * 2**30 / (calls.intra.bytes_per_s * links)
        assert calls.all_gather_s(2**30, ranks) > 0.9 * sent
        assert calls.reduce_scatter_s(2**30, ranks) > 0.9 * sent
        assert calls.all_to_all_s(2**30, ranks) > 0.9 * sent
        assert calls.all_reduce_s(2**30, ranks) > sent


def test_a_mesh_carries_over_as_many_links_as_there_are_others() -> None:
    calls, share = load_collectives(load_cluster("8xmi300x")), 0.7 * 64e9
    for ranks in (2, 4, 8):
        grown = calls.all_reduce_s(2**31, ranks) - calls.all_reduce_s(2**30, ranks)
        assert grown == pytest.approx(2 / ranks * 2**30 / share)
        grown = calls.all_to_all_s(2**31, ranks) - calls.all_to_all_s(2**30, ranks)
        assert grown == pytest.approx(2**30 / ranks / share)
    assert calls.point_to_point_s(2**31) - calls.point_to_point_s(2**30) == pytest.approx(2**30 / share)
    assert calls.provenance["all_reduce/intra"] == "assumed: latency and share of the xgmi link's rate"


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
