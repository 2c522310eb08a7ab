"""Screening, thinning and the command: what each rule takes, that no point left out is missed, and equal bytes."""

from __future__ import annotations

import hashlib
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_package import write_package

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.profiles.card import read_card
from apex_opt.profiles.distill.command import default_target, distill
from apex_opt.profiles.distill.curves import Curves, group
from apex_opt.profiles.distill.screen import screen, take
from apex_opt.profiles.distill.thin import TOLERANCE, lookup_error, needed
from apex_opt.profiles.schema import GEMM, MEMORY, SCHEMAS
from apex_opt.profiles.sources.aiconfigurator import listed_gpu
from apex_opt.profiles.tables import read_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Columns = dict[str, NDArray[Any]]

B200 = listed_gpu("b200-sxm")


def curve(times: list[float], op: str = "norm") -> Columns:
    """A memory table of one curve over bytes 1, 2, 4, ..."""
    count = len(times)
    return {
        "op": np.array([op] * count, dtype=object),
        "bytes": 2.0 ** np.arange(count),
        "time_us": np.array(times, dtype=np.float64),
        "energy_uj": np.full(count, np.nan),
    }


def gemm(rows: list[tuple[str, int, int, int, float]]) -> Columns:
    """A table of products."""
    names = ("dtype", "m", "n", "k", "time_us")
    columns = {
        name: np.array([row[at] for row in rows], dtype=object if name == "dtype" else np.float64)
        for at, name in enumerate(names)
    }
    return columns | {"energy_uj": np.full(len(rows), np.nan)}


def joined(*tables: Columns) -> Columns:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def kernels(columns: Columns, name: str = "one") -> NDArray[Any]:
    return np.array([name] * len(columns["time_us"]), dtype=object)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2**40), st.integers(0, 3)), min_size=1, max_size=30))
def test_rows_are_of_one_group_if_and_only_if_they_are_equal(rows: list[tuple[str, int, int]]) -> None:
    owner = group([np.array(column, dtype=object) for column in zip(*rows, strict=True)])
    order = {row: number for number, row in enumerate(sorted(set(rows)))}
    assert owner.tolist() == [order[row] for row in rows]


def test_curves_run_over_the_last_size_whatever_the_order_of_rows() -> None:
    columns = gemm([("bf16", 4, 1, 1, 3.0), ("bf16", 1, 1, 2, 9.0), ("bf16", 1, 1, 1, 1.0), ("bf16", 2, 1, 1, 2.0)])
    curves = Curves.of(GEMM, columns)
    assert curves.rows.tolist() == [[2, 3, 0], [1, -1, -1]]
    assert np.exp(curves.time_log[0]) == pytest.approx([1, 2, 3])
    assert np.isnan(curves.size_log[1, 1:]).all()


# --- screening


def test_a_clean_table_passes_whole_and_sorted() -> None:
    columns = curve([1, 2, 4, 8, 16])
    found = screen("memory", take(columns, np.array([3, 0, 4, 1, 2])), kernels(columns))
    assert found.dropped == ()
    assert found.columns["time_us"].tolist() == [1, 2, 4, 8, 16]


def test_repeats_become_their_median_and_of_several_kernels_the_fastest_stays() -> None:
    columns = joined(curve([1.0]), curve([7.0]), curve([2.0]), curve([1.5]), curve([9.0]))
    names = np.array(["a", "a", "a", "b", "b"], dtype=object)
    found = screen("memory", columns, names)
    assert found.columns["time_us"].tolist() == [1.5]
    assert found.dropped == (("repeats and slower kernels of one key", 4),)
    assert screen("memory", take(columns, names == "a"), names[:3]).columns["time_us"].tolist() == [2.0]


def test_rows_faster_than_the_hardware_go() -> None:
    flops_us = 2 * 4096 * 8192 * 8192 / 2250e12 * 1e6
    weights_us = (65536 * 65536 - 128e6) / 7.7e12 * 1e6
    rows = [
        ("bf16", 4096, 8192, 8192, flops_us / 1.05),
        ("bf16", 4096, 8192, 8064, flops_us / 1.2),
        ("fp8", 1, 65536, 65536, weights_us / 1.05),
        ("fp8", 1, 65536, 65535, weights_us / 1.2),
        ("nvfp4", 1, 65536, 65536, weights_us / 2),
    ]
    found = screen("gemm", gemm(rows), kernels(gemm(rows)), B200)
    assert found.dropped == (("faster than the hardware", 2),)
    assert {(row, int(k)) for row, k in zip(found.columns["dtype"], found.columns["k"], strict=True)} == {
        ("bf16", 8192),
        ("fp8", 65536),
        ("nvfp4", 65536),
    }


@pytest.mark.parametrize("excess_us", [7.5, 8.5])
def test_a_format_timed_with_its_launches_goes_whole(excess_us: float) -> None:
    rows = [(name, m, 512, 512, 3.0 + extra) for name, extra in (("bf16", 0), ("fp8", excess_us)) for m in (1, 8, 64)]
    rows += [(name, 4096, 8192, 8192, 400.0) for name in ("bf16", "fp8")]
    found = screen("gemm", gemm(rows), kernels(gemm(rows)), B200)
    assert set(found.columns["dtype"]) == ({"bf16"} if excess_us > 8 else {"bf16", "fp8"})
    assert set(found.judged["dtype"]) == set(found.columns["dtype"])
    assert found.dropped == ((("fp8: timed with its launches", 4),) if excess_us > 8 else ())


@pytest.mark.parametrize(
    ("times", "bad"),
    [
        ([1, 1, 1.6, 1, 1], [2]),
        ([1, 1, 1.4, 1.3, 1.5], []),
        ([1, 2, 4, 8, 6, 16], [3]),
        ([1.3, 1, 1, 1, 1], [0]),
        ([1, 2, 4, 8, 16], []),
        ([1, 2, 6, 6, 4, 8], []),
        ([10, 10, 20, 10], [2]),
        ([5], []),
    ],
)
def test_only_rows_that_stand_out_alone_go(times: list[float], bad: list[int]) -> None:
    # Twenty smooth curves beside it: a place where more than a tenth stand out is a kernel's choice.
    sizes = [2**at for at in range(len(times))]
    rows = [("bf16", m, 64, 1024, time) for m, time in zip(sizes, times, strict=True)]
    columns = gemm(rows + [("bf16", m, n, 1024, 50.0) for n in range(128, 2688, 128) for m in sizes])
    found = screen("gemm", columns, kernels(columns))
    kept = np.isin(sizes, found.columns["m"][found.columns["n"] == 64])
    assert np.flatnonzero(~kept).tolist() == bad
    assert found.dropped == ((("lone", len(bad)),) if bad else ())


def test_a_size_at_which_many_curves_stand_out_is_left_alone() -> None:
    rows = [("bf16", m, n, 1024, 20.0 if m == 8 else 10.0) for n in (1024, 2048, 4096) for m in (2, 4, 8, 16, 32)]
    assert screen("gemm", gemm(rows), kernels(gemm(rows))).dropped == ()


# --- thinning


POINTS = st.lists(
    st.tuples(st.integers(1, 2**20), st.floats(1.0, 1e4)), min_size=1, max_size=9, unique_by=lambda p: p[0]
)


def table_of(points: list[tuple[int, float]]) -> Columns:
    columns = curve([time for _, time in points])
    columns["bytes"] = np.array([size for size, _ in points], dtype=np.float64)
    return columns


def between(columns: Columns, kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The times of a curve as its kept points give them, in plain numpy."""
    order = np.argsort(columns["bytes"])
    size, time = np.log(columns["bytes"][order]), np.log(columns["time_us"][order])
    guess = np.interp(size, size[kept[order]], time[kept[order]])
    found = np.empty(len(size))
    found[order] = np.exp(guess)
    return found


@given(POINTS)
@settings(deadline=None)
def test_points_left_out_lie_within_the_tolerance_and_no_fewer_points_would_do(points: list[tuple[int, float]]) -> None:
    columns = table_of(points)
    kept = needed(MEMORY, columns)
    order = np.argsort(columns["bytes"])
    assert kept[order[0]] and kept[order[-1]]
    limit = np.log1p(TOLERANCE) * (1 + 1e-9)
    assert np.abs(np.log(between(columns, kept) / columns["time_us"])).max() <= limit
    inner = order[1:-1].tolist()
    for count in range(max(int(kept.sum()) - 2, 0)):
        for chosen in combinations(inner, count):
            fewer = np.zeros(len(points), dtype=bool)
            fewer[[order[0], order[-1], *chosen]] = True
            assert np.abs(np.log(between(columns, fewer) / columns["time_us"])).max() > limit * (1 - 1e-6)


@given(POINTS, st.data())
@settings(deadline=None)
def test_the_error_of_a_look_up_is_that_of_straight_lines_in_logarithms(
    points: list[tuple[int, float]], data: st.DataObject
) -> None:
    columns = table_of(points)
    kept = np.array(data.draw(st.lists(st.booleans(), min_size=len(points), max_size=len(points))))
    errors = lookup_error(MEMORY, columns, kept)
    if not kept.any():
        assert errors.size == 0
        return
    expected = np.abs(between(columns, kept) / columns["time_us"] - 1)
    np.testing.assert_allclose(np.sort(errors), np.sort(expected), atol=1e-9, rtol=1e-9)


def test_curves_are_thinned_each_by_itself() -> None:
    straight, bent = curve([1, 2, 4, 8, 16], "a"), curve([1, 1, 1, 8, 64], "b")
    kept = needed(MEMORY, joined(straight, bent))
    assert kept.tolist() == [True, False, False, False, True, True, False, True, False, True]


# --- the command


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[distill]'")
    return write_package(tmp_path_factory.mktemp("package"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folders_are_whole_described_and_the_same_each_time(package: Path, tmp_path: Path) -> None:
    said: list[tuple[str, int, int]] = []
    reports = distill(package, tmp_path / "one", lambda *told: said.append(told), ("a100-sxm", "b200-sxm"))
    assert [told[1:] for told in said] == [(done, 9) for done in range(9)]
    assert [told[0] for told in said] == list(dict.fromkeys(f"distilling {report.folder}" for report in reports))
    found = contents(tmp_path / "one")
    assert {name.rsplit("/", 1)[0] for name in found} == {
        "a100-sxm/vllm-0.14.0",
        "a100-sxm/sglang-0.5.10",
        "a100-sxm/trtllm-1.0.0",
        "a100-sxm/nccl-2.27.3",
        "b200-sxm/vllm-0.24.0",
        "b200-sxm/sglang-0.5.14",
        "b200-sxm/trtllm-1.3.0rc20",
        "b200-sxm/nccl-2.29.2",
        "b200-sxm/vllm-0.22.0-power",
    }
    stale = tmp_path / "two" / "a100-sxm" / "vllm-0.14.0" / "stale.npz"
    kept = tmp_path / "two" / "a100-sxm" / "ops" / "card.toml"
    for path in (stale, stale.with_name("card.toml"), kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("here before")
    distill(package, tmp_path / "two", only=("a100-sxm", "b200-sxm"))
    assert contents(tmp_path / "two") == {**found, "a100-sxm/ops/card.toml": b"here before"}
    schemas = {schema.name: schema for schema in SCHEMAS}
    for report in reports:
        folder = tmp_path / "one" / report.folder
        card = read_card(folder)
        entry = next(table for table in card.tables if table[0] == report.kind)
        data = (folder / entry[1]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry[2], report.file_bytes)
        table = read_table(folder / entry[1], schemas[report.kind])
        assert len(table["time_us"]) == report.rows <= report.screened_rows <= report.source_rows
        assert report.rows < report.screened_rows or report.folder.endswith("-power")
        assert np.isfinite(table["energy_uj"]).any() == (report.folder.endswith("-power") and report.kind != "moe")


def test_the_error_reported_is_within_the_tolerance_and_what_was_dropped_is_counted(
    package: Path, tmp_path: Path
) -> None:
    reports = distill(package, tmp_path, only=("b200-sxm",))
    for report in reports:
        if report.error is not None:
            median, high, _, before_high = report.error
            assert 0 <= median <= high <= TOLERANCE * 1.01
            assert high <= before_high * 1.0001
    found = next(report for report in reports if report.kind == "gemm")
    assert found.dropped == (("k below 128, which no layer has", 66),)
    text = (tmp_path / found.folder / "card.toml").read_text()
    assert "k below 128, which no layer has: 66 rows" in text
    assert "P95" in text


def test_an_engine_is_on_its_card_and_energies_are_set_apart(package: Path, tmp_path: Path) -> None:
    distill(package, tmp_path, only=("b200-sxm",))
    cards = {path.parent.name: read_card(path.parent) for path in tmp_path.glob("*/*/card.toml")}
    assert {name: card.engine for name, card in cards.items()} == {
        "vllm-0.24.0": "vllm",
        "vllm-0.22.0-power": "vllm",
        "sglang-0.5.14": "sglang",
        "trtllm-1.3.0rc20": "trtllm",
        "nccl-2.29.2": None,
    }
    assert {name for name, card in cards.items() if card.use == "energies"} == {"vllm-0.22.0-power"}
    for card in cards.values():
        assert dict(card.flops_per_s) == pytest.approx(dict(B200.flops_per_s))
        assert card.memory_bytes_per_s == pytest.approx(B200.memory_bytes_per_s)


def test_a_folder_that_cannot_be_written_is_named(package: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"a100-sxm/vllm-0\.14\.0: cannot be written"):
        distill(package, tmp_path / "file", only=("a100-sxm",))


def test_an_accelerator_without_tables_is_named(package: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="b200-sxm"):
        distill(package, tmp_path, only=("b200-smx",))
    assert list(tmp_path.iterdir()) == []


def test_a_checkout_makes_its_own_profiles_anew_and_an_install_leaves_what_is_installed_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apex_opt.profiles.distill.command.DATA_ROOT", tmp_path)
    assert default_target() == Path("profiles")
    (tmp_path / "pyproject.toml").touch()
    assert default_target() == tmp_path / "profiles"
