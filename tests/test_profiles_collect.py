"""Measuring an accelerator, on one that is made up: what is planned, how it is timed, what is written.

The machine of these tests keeps a clock and a cache. A call costs what its law says, less where its operands were used
so recently that they are still in the cache; the first runs of anything cost more.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apex_opt.cluster import list_gpus, load_cluster
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.profiles import load_profile
from apex_opt.profiles.card import read_card
from apex_opt.profiles.collect import OPS, asked_ops, collect, recognised, torch_machine
from apex_opt.profiles.collect.points import Point, points
from apex_opt.profiles.collect.timing import LEAST_CALLS, CallError, Effort, Result, measure
from apex_opt.profiles.collect.torch_group import replays
from apex_opt.profiles.schema import schema_of
from apex_opt.profiles.tables import read_table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from random import Random

H200, A100, V100 = (load_cluster(name).gpu for name in ("h200-sxm", "a100-sxm", "v100-pcie"))
CACHE = 50 * 10**6


@dataclass(eq=False)
class Operand:
    """What one call reads."""

    size: int
    cost_s: float


@dataclass(eq=False)
class Fake:
    """A machine with a clock, a cache that forgets what was used longest ago, and a meter."""

    name: str = "NVIDIA H200"
    hardware: str = "NVIDIA H200, power limit 700 W"
    software: str = "made up"
    gpus: int = 8
    memory_bytes: int = H200.memory_bytes
    cache_bytes: int = CACHE
    draw_w: float | None = 400.0
    cached_share: float = 0.25
    cold_runs: int = 3
    jitter: Callable[[int], float] = lambda replay: 1.0
    fails: Callable[[Point], str] = lambda point: ""
    lacking: dict[str, str] = field(default_factory=dict)
    free: int = H200.memory_bytes
    now_s: float = 0.0
    replayed: int = 0
    released: int = 0
    asked: list[Point] = field(default_factory=list)
    recorded: list[int] = field(default_factory=list)
    cache: OrderedDict[int, Operand] = field(default_factory=OrderedDict)

    def lacks(self, kind: str) -> str:
        return self.lacking.get(kind, "")

    def free_bytes(self) -> int:
        return self.free

    def calls(self, point: Point, copies: int) -> Sequence[Callable[[], object]]:
        self.asked.append(point)
        if why := self.fails(point):
            raise CallError(why)
        operands = [Operand(point.cold_bytes, law_s(point)) for _ in range(copies)]
        return [lambda operand=operand: self.call(operand) for operand in operands]

    def call(self, operand: Operand) -> None:
        warm = id(operand) in self.cache and operand.size
        self.now_s += operand.cost_s * (self.cached_share if warm else 1.0)
        self.cache[id(operand)] = operand
        self.cache.move_to_end(id(operand))
        while sum(held.size for held in self.cache.values()) > self.cache_bytes:
            self.cache.popitem(last=False)

    def record(self, calls: Sequence[Callable[[], object]]) -> Any:
        self.recorded.append(len(calls))
        return SimpleNamespace(calls=calls, runs=0)

    def replay_s(self, graph: Any, times: int) -> float:
        begin = self.now_s
        for _ in range(times):
            before = self.now_s
            for call in graph.calls:
                call()
            graph.runs += 1
            spent = self.now_s - before
            self.now_s = before + spent * (5.0 if graph.runs <= self.cold_runs else 1.0)
        self.replayed += 1
        stretched = (self.now_s - begin) * self.jitter(self.replayed)
        self.now_s = begin + stretched
        return stretched

    def energy_j(self) -> float | None:
        return None if self.draw_w is None else self.draw_w * self.now_s

    def release(self) -> None:
        self.released += 1

    def collectives(self, ranks: int, points: Sequence[Point], effort: Effort) -> Sequence[Result]:
        self.asked += points
        if why := self.fails(points[0]):
            raise CallError(why)
        return [Result(time_s=law_s(point)) for point in points]


def law_s(point: Point) -> float:
    """Time of a call whose operands are not cached: a launch, reading, arithmetic."""
    key = dict(point.key)
    sizes = [value for value in key.values() if isinstance(value, int)]
    return 5e-6 + float(np.prod([float(size) for size in sizes if size])) ** 0.5 * 1e-9


def gemm(m: int = 1, n: int = 4096, k: int = 4096, **fields: Any) -> Point:
    key = (("dtype", "bf16"), ("m", m), ("n", n), ("k", k))
    return Point(kind="gemm", key=key, cold_bytes=2 * n * k, **fields)


# --- the plan


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("gpu", [H200, A100, V100], ids=lambda gpu: gpu.name)
def test_every_point_is_a_row_that_a_table_can_hold_and_comes_once(gpu: Any, quick: bool) -> None:
    found = points(tuple(OPS), gpu, 8, quick=quick)
    assert {point.kind for point in found} == {kind for kinds in OPS.values() for kind in kinds}
    assert len({(point.kind, point.key) for point in found}) == len(found)
    for point in found:
        schema = schema_of(point.kind)
        key = dict(point.key)
        assert list(key) == [column.name for column in schema.columns if column.key]
        for column in schema.columns:
            value = key.get(column.name)
            if isinstance(value, int):
                assert column.low < value <= column.high
        assert point.held_bytes(CACHE) > 0


def test_the_formats_are_those_of_the_hardware() -> None:
    formats = {gpu.name: {dict(p.key)["dtype"] for p in points(("gemm",), gpu, 1, quick=True)} for gpu in (H200, V100)}
    assert formats == {H200.name: {"bf16", "fp8"}, V100.name: {"fp16"}}


def test_a_quick_plan_is_small_and_measures_no_energy() -> None:
    quick, whole = (points(tuple(OPS), H200, 8, quick=quick) for quick in (True, False))
    assert len(quick) < len(whole) / 10
    assert not any(point.energy for point in quick)
    assert {point.kind for point in whole if point.energy} == {point.kind for point in whole} - {"collective"}


@pytest.mark.parametrize(("gpus", "ranks"), [(1, set()), (2, {2}), (7, {2, 4}), (8, {2, 4, 8})])
def test_collectives_are_measured_on_as_many_gpus_as_there_are(gpus: int, ranks: set[int]) -> None:
    assert {dict(point.key)["ranks"] for point in points(("collective",), H200, gpus, quick=False)} == ranks


def test_only_what_is_asked_for_is_planned() -> None:
    assert {point.kind for point in points(("attention",), H200, 8, quick=False)} == {
        "attention_decode",
        "attention_prefill",
    }
    assert asked_ops("gemm, Memory") == ("gemm", "memory")
    with pytest.raises(UnknownNameError, match="unknown operation 'gem'; did you mean gemm"):
        asked_ops("moe,gem")
    with pytest.raises(UsageError, match="names an operation twice"):
        asked_ops("moe,moe")
    with pytest.raises(UnknownNameError):
        asked_ops("")


@given(st.integers(1, 2**33), st.integers(1, 2**28))
def test_operands_in_turn_leave_the_cache_before_they_come_again(cold: int, cache: int) -> None:
    point = replace(gemm(), cold_bytes=cold)
    copies = point.copies(cache)
    assert copies == 1024 or copies * cold >= 2 * cache
    assert copies == 1 or (copies - 1) * cold < 2 * cache, "no more than needed"
    assert point.held_bytes(cache) == copies * cold


# --- the loop


def timed(machine: Fake, point: Point, **effort: Any) -> Result:
    return measure(
        machine, machine.calls(point, point.copies(machine.cache_bytes)), Effort(**effort), energy=point.energy
    )


@pytest.mark.parametrize("size", [512, 2048, 8192])
def test_weights_are_timed_cold_and_without_the_first_runs(size: int) -> None:
    point = gemm(n=size, k=size)
    assert timed(Fake(), point).time_s == pytest.approx(law_s(point), rel=1e-9)
    # One operand again and again would be found in the cache.
    machine = Fake()
    warm = measure(machine, machine.calls(point, 1), Effort())
    expected = law_s(point) * (machine.cached_share if 2 * size * size <= CACHE else 1.0)
    assert warm.time_s == pytest.approx(expected, rel=1e-9)


def test_a_graph_has_enough_calls_for_its_launch_not_to_count() -> None:
    for n in (512, 4096, 65536):
        machine = Fake()
        timed(machine, gemm(n=n))
        copies = gemm(n=n).copies(CACHE)
        assert machine.recorded[0] >= LEAST_CALLS
        assert machine.recorded[0] % copies == 0, "every operand as often as the others"
        assert machine.recorded[0] < LEAST_CALLS + copies


@given(st.lists(st.floats(1.0, 50.0), min_size=4, max_size=4), st.randoms(use_true_random=False))
def test_four_disturbed_samples_of_nine_do_not_count(slow: list[float], random: Random) -> None:
    stretches = [1.0] * 5 + slow
    random.shuffle(stretches)
    # One replay warms up here, then nine are samples.
    machine = Fake(cold_runs=0, jitter=lambda replay: 1.0 if replay == 1 else stretches[replay - 2])
    assert timed(machine, gemm(), warm_s=1e-9, samples=9).time_s == pytest.approx(law_s(gemm()))
    assert machine.replayed == 10


def test_a_sample_lasts_as_long_as_asked() -> None:
    machine = Fake(cold_runs=0)
    timed(machine, gemm(), warm_s=0.01, samples=5, sample_s=0.1)
    assert machine.now_s == pytest.approx(0.01 + 5 * 0.1, rel=0.1)


def test_energy_is_what_the_board_drew_per_call() -> None:
    point = gemm(energy=True)
    machine = Fake(draw_w=350.0)
    result = timed(machine, point, energy_s=0.5)
    assert result.energy_j == pytest.approx(350.0 * law_s(point), rel=1e-9)
    assert timed(Fake(draw_w=None), point).energy_j is None
    assert timed(Fake(), replace(point, energy=False)).energy_j is None
    assert timed(Fake(), point, energy_s=0.0).energy_j is None


def test_a_clock_that_stands_still_is_named() -> None:
    with pytest.raises(InputError, match="NVIDIA H200: the device's clock stands still"):
        timed(Fake(jitter=lambda replay: 0.0), gemm())


@given(st.integers(1, 2**30), st.floats(1e-4, 1.0))
def test_collectives_are_repeated_the_less_the_larger_they_are(size: int, sample_s: float) -> None:
    assert replays(size, sample_s) >= replays(2 * size, sample_s) >= 1


# --- the command


def test_what_was_measured_is_written_and_looked_up(tmp_path: Path) -> None:
    machine, said = Fake(), []
    found = collect(
        machine, H200, tmp_path, tuple(OPS), "2026-10-01", quick=True, progress=lambda *told: said.append(told)
    )
    assert found.folder == tmp_path / "h200-sxm" / "collected"
    planned = points(tuple(OPS), H200, 8, quick=True)
    assert {report.kind for report in found.reports} == {point.kind for point in planned}
    assert found.passed_over == ()
    for report in found.reports:
        table = read_table(found.folder / f"{report.kind}.npz", schema_of(report.kind))
        mine = [point for point in planned if point.kind == report.kind]
        assert (report.rows, report.source_rows) == (len(mine), len(mine))
        expected = {point.key: law_s(point) * 1e6 for point in mine}
        names = [name for name, _ in mine[0].key]
        for row in range(report.rows):
            key = tuple((name, table[name][row]) for name in names)
            assert table["time_us"][row] == pytest.approx(expected[key], rel=1e-3)
    card = read_card(found.folder)
    assert (card.engine, card.use, card.date, card.gpu) == (None, "times", "2026-10-01", H200.name)
    texts = dict(card.texts)
    assert texts["hardware"] == machine.hardware
    assert texts["software"] == "made up"
    assert "CUDA graphs" in texts["method"]
    assert texts["not_measured"] == "energy"
    assert [told[1] for told in said] == sorted(told[1] for told in said)
    assert {told[2] for told in said} == {len(planned)}
    assert machine.released == len(planned) - sum(point.kind == "collective" for point in planned)
    profile = load_profile(H200, profiles=str(tmp_path))
    assert profile.gemm_time_s("bf16", 16, 4096, 4096) == pytest.approx(law_s(gemm(16)), rel=1e-3)
    assert "collected" in profile.provenance["gemm bf16"]


def test_energies_are_written_where_they_were_measured(tmp_path: Path) -> None:
    machine = Fake(fails=lambda point: "" if ("op", "copy") in point.key else "left out to be quick")
    found = collect(machine, V100, tmp_path, ("memory",), "2026-10-01")
    table = read_table(found.folder / "memory.npz", schema_of("memory"))
    large = table["bytes"] >= 64 * 2**20
    assert {True, False} == set(large.tolist())
    assert np.isfinite(table["energy_uj"]).tolist() == large.tolist()
    assert table["energy_uj"][large] == pytest.approx(400 * table["time_us"][large], rel=3e-3)
    assert found.folder == tmp_path / "v100-pcie-16gb" / "collected"
    assert "energy by the board's counter over 1 s" in dict(read_card(found.folder).texts)["method"]


def test_what_fails_or_does_not_fit_is_counted_and_the_rest_is_written(tmp_path: Path) -> None:
    machine = Fake(
        free=10**9,
        lacking={"moe": "torch has no fused experts"},
        fails=lambda point: "no such kernel" if ("dtype", "fp8") in point.key or point.kind == "collective" else "",
    )
    found = collect(machine, H200, tmp_path, tuple(OPS), "2026-10-01", quick=True)
    reports = {report.kind: report for report in found.reports}
    kinds = {"gemm", "attention_decode", "attention_prefill", "state_decode", "state_prefill", "memory"}
    assert set(reports) == kinds
    # Of 90 products half are in fp8; the largest of the others does not fit.
    assert dict(reports["gemm"].dropped) == {"larger than the memory that is free": 1, "no such kernel": 45}
    assert dict(reports["attention_decode"].dropped)["larger than the memory that is free"] > 0
    for report in found.reports:
        assert report.source_rows == report.rows + sum(count for _, count in report.dropped)
    assert dict(found.passed_over)["moe"] == "torch has no fused experts"
    assert "no such kernel (48 points)" in dict(found.passed_over)["collective"]
    assert not any(point.kind == "moe" for point in machine.asked)
    assert {"moe", "collective"} <= set(dict(read_card(found.folder).texts)["not_measured"].split(", "))


def test_nothing_is_written_where_nothing_could_be_measured(tmp_path: Path) -> None:
    machine = Fake(fails=lambda point: "out of memory")
    with pytest.raises(InputError, match=r"nothing could be measured: gemm: out of memory \(90 points\)$"):
        collect(machine, H200, tmp_path, ("gemm",), "2026-10-01", quick=True)
    with pytest.raises(InputError, match="nothing could be measured: collective: needs two GPUs"):
        collect(Fake(gpus=1, lacking={"collective": "needs two GPUs"}), H200, tmp_path, ("collective",), "2026-10-01")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "gib", "listed"),
    [
        ("NVIDIA H200", 140, "h200-sxm-141gb"),
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-sxm-80gb"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "a100-sxm-80gb"),
        ("Tesla V100-PCIE-16GB", 15.8, "v100-pcie-16gb"),
    ],
)
def test_a_gpu_is_known_by_the_name_its_driver_gives(name: str, gib: float, listed: str) -> None:
    assert recognised(name, int(gib * 2**30)).name == listed


@pytest.mark.parametrize(
    ("name", "gib"),
    [("NVIDIA H100 NVL", 79.6), ("NVIDIA H200 NVL", 140.4), ("NVIDIA A100-SXM4-64GB", 63.6), ("NVIDIA A16", 15.0)],
)
def test_a_gpu_that_is_not_in_the_catalogue_is_not_taken_for_its_neighbour(name: str, gib: float) -> None:
    with pytest.raises(InputError, match=r"is not in the catalogue .* --gpu=my-node\.toml"):
        recognised(name, int(gib * 2**30))


def test_every_gpu_of_the_catalogue_has_a_name_that_it_is_known_by() -> None:
    for listed in list_gpus():
        gpu = load_cluster(listed).gpu
        words = [word for word in listed.upper().split("-") if word not in ("SXM", "NVL72") and not word.endswith("GB")]
        assert recognised(f"NVIDIA {' '.join(words)}", gpu.memory_bytes) == gpu


@pytest.mark.parametrize(
    ("name", "mib", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", 81559, "h100-sxm-80gb"),
        ("NVIDIA H100 PCIe", 81559, "h100-pcie-80gb"),
        ("NVIDIA H100 NVL", 95830, "h100-nvl-94gb"),
        ("NVIDIA A100-SXM4-40GB", 40960, "a100-sxm-40gb"),
        ("NVIDIA A100 80GB PCIe", 81920, "a100-pcie-80gb"),
        ("NVIDIA A800-SXM4-80GB", 81920, "a800-sxm-80gb"),
        ("NVIDIA GeForce RTX 4090", 24564, "rtx-4090-24gb"),
        ("NVIDIA RTX 6000 Ada Generation", 49140, "rtx-6000-ada-48gb"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887, "rtx-pro-6000-96gb"),
        ("NVIDIA GH200 480GB", 97871, "gh200-96gb"),
        ("Tesla V100-SXM2-32GB", 32768, "v100-sxm-32gb"),
        ("Tesla T4", 15360, "t4-16gb"),
    ],
)
def test_names_that_drivers_give_are_known(name: str, mib: int, gpu: str) -> None:
    assert recognised(name, mib * 2**20).name == gpu


# --- no GPU, no torch


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch_machine, "find_spec", lambda asked: None if asked == name else ModuleSpec(asked, None))


def test_a_machine_without_torch_is_told_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "torch")
    with pytest.raises(InputError, match="measuring needs torch, which is not installed"):
        torch_machine.open_machine()


@pytest.mark.parametrize(
    ("cuda", "message"), [(None, "torch 9.9 is here but built without CUDA"), ("12.4", "finds no CUDA GPU; check the")]
)
def test_a_machine_without_a_gpu_is_told_so(cuda: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "")
    torch = ModuleType("torch")
    vars(torch).update(
        __version__="9.9", version=SimpleNamespace(cuda=cuda), cuda=SimpleNamespace(is_available=lambda: False)
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    with pytest.raises(InputError, match=message):
        torch_machine.open_machine()
