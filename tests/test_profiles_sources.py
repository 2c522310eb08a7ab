"""Tables of aiconfigurator-core: what its columns mean, what is left out, and what is said where it cannot be read."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest
from measured_package import all_reduce_rows, attention_rows, gemm_rows, moe_rows, write_package, write_rows

from apex_opt.cluster import load_cluster
from apex_opt.errors import InputError, UnknownNameError
from apex_opt.profiles import check_profiles, laws, load_profile, operations
from apex_opt.profiles.schema import SCHEMAS
from apex_opt.profiles.sources import aiconfigurator
from apex_opt.profiles.sources.aiconfigurator import (
    CATALOGUE,
    NCCL,
    RELEASES,
    data_folder,
    full_tables,
    listed_gpu,
    raw_tables,
)
from apex_opt.profiles.tables import read_table, write_table

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("pyarrow", reason="needs pyarrow: pip install -e '.[distill]'")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("package"))


def test_every_accelerator_with_tables_is_in_the_catalogue() -> None:
    assert set(CATALOGUE) == set(RELEASES)
    for gpu in CATALOGUE:
        assert listed_gpu(gpu).profile == gpu


def test_products_keep_their_shape_and_times_become_microseconds(package: Path) -> None:
    raw = raw_tables("b200-sxm", "vllm", "0.24.0", package, ("gemm",))["gemm"]
    row = np.flatnonzero((raw.columns["m"] == 16) & (raw.columns["n"] == 512) & (raw.columns["k"] == 8192))
    assert sorted(raw.columns["dtype"][row]) == ["bf16", "fp8"]
    expected = 4 + 512 * 8192 * 1e-6 + 16 * 512 * 8192 * 5e-9
    assert raw.columns["time_us"][row] == pytest.approx([expected, expected])
    assert raw.file == "b200_sxm/gemm/vllm/0.24.0/gemm_perf.parquet"
    assert raw.left_out == ()


def test_experts_are_those_of_the_layer_and_held_those_of_the_rank(package: Path) -> None:
    columns = raw_tables("b200-sxm", "vllm", "0.24.0", package)["moe"].columns
    shapes = {
        tuple(map(int, row)) for row in zip(*(columns[n] for n in ("expert_ffn", "experts", "held")), strict=True)
    }
    assert shapes == {(1024, 64, 64), (512, 64, 64), (1024, 64, 16)}
    assert set(columns["routing"]) == {"balanced", "power_law_1.2"}


def test_context_counts_the_new_token_and_length_the_prompt(package: Path) -> None:
    tables = raw_tables("b200-sxm", "vllm", "0.24.0", package)
    assert set(tables["attention_decode"].columns["context"]) == {float(2**power) for power in range(11)}
    assert set(tables["attention_prefill"].columns["length"]) == {float(2**power) for power in range(11)}
    assert set(tables["attention_decode"].columns["window"]) == {0.0}


def test_message_sizes_are_elements_of_two_bytes_and_one_byte_rows_are_left_out(package: Path) -> None:
    raw = raw_tables("a100-sxm", NCCL, "2.27.3", package)["collective"]
    assert set(raw.columns["op"]) == {"all_reduce", "all_to_all"}
    assert raw.columns["bytes"].min() == 512
    assert raw.left_out == (("int8 elements (the same times, by bytes)", 22),)
    own = raw_tables("a100-sxm", "vllm", "0.14.0", package)["collective"]
    assert set(own.columns["op"]) == {"custom_all_reduce"}
    assert own.columns["time_us"].min() < 5
    assert own.left_out == (("calls outside a CUDA graph", 22),)


def test_an_all_reduce_not_measured_anew_is_that_of_the_newest_release_that_did(tmp_path: Path) -> None:
    write_package(tmp_path)
    comm = tmp_path / "a100_sxm" / "comm" / "vllm"
    (comm / "0.14.0" / "custom_allreduce_perf.parquet").unlink()
    for version in ("0.9.0", "0.12.0", "0.8.0"):
        write_rows(comm / version / "custom_allreduce_perf.parquet", all_reduce_rows("vLLM_custom_graph"))
    raw = raw_tables("a100-sxm", "vllm", "0.14.0", tmp_path, ("collective",))["collective"]
    assert raw.file == "a100_sxm/comm/vllm/0.12.0/custom_allreduce_perf.parquet"


def test_power_becomes_energy(package: Path) -> None:
    columns = raw_tables("b200-sxm", "vllm", "0.22.0", package)["attention_decode"].columns
    assert columns["energy_uj"] == pytest.approx(300 * columns["time_us"])
    assert np.isnan(raw_tables("b200-sxm", "vllm", "0.24.0", package)["moe"].columns["energy_uj"]).all()


def test_rows_that_our_columns_do_not_cover_are_counted(tmp_path: Path) -> None:
    write_package(tmp_path)
    home = tmp_path / "a100_sxm"
    write_rows(home / "gemm/vllm/0.14.0/gemm_perf.parquet", gemm_rows(("bfloat16", "int8_wo")))
    odd = [row | {"kernel_source": "moe_torch_flow_nongated"} for row in moe_rows()[:4]]
    halves = [row | {"moe_ep_size": 128} for row in moe_rows()[:3]]
    write_rows(home / "moe/vllm/0.14.0/moe_perf.parquet", moe_rows() + odd + halves)
    tables = raw_tables("a100-sxm", "vllm", "0.14.0", tmp_path)
    assert tables["gemm"].left_out == (("formats not modelled", 99),)
    assert tables["moe"].left_out == (("formats not modelled, experts without a gate or in fractions", 7),)


def test_attention_computed_in_fp8_serves_only_shapes_without_any_other(tmp_path: Path) -> None:
    write_package(tmp_path)
    rows = attention_rows("context")
    narrow = [row | {"attn_dtype": "fp8", "latency": 1e-3} for row in rows]
    alone = [row | {"head_dim": 256} for row in narrow]
    write_rows(tmp_path / "a100_sxm/attention/vllm/0.14.0/context_attention_perf.parquet", rows + narrow + alone)
    raw = raw_tables("a100-sxm", "vllm", "0.14.0", tmp_path)["attention_prefill"]
    assert raw.left_out == (("attention computed in fp8", len(rows)),)
    assert set(raw.columns["time_us"][raw.columns["head_dim"] == 256]) == {1.0}
    assert raw.columns["time_us"][raw.columns["head_dim"] == 128].min() > 5


def test_full_tables_are_screened_sorted_and_what_a_reader_returns(package: Path, tmp_path: Path) -> None:
    tables = full_tables("b200-sxm", "vllm", package)
    assert set(tables) == {"gemm", "moe", "attention_decode", "attention_prefill", "collective"}
    for schema in SCHEMAS:
        if schema.name in tables:
            write_table(tmp_path / "t.npz", schema, tables[schema.name])
            found = read_table(tmp_path / "t.npz", schema)
            assert {name: values.dtype for name, values in found.items()} == {
                name: values.dtype for name, values in tables[schema.name].items()
            }
            assert found["time_us"] == pytest.approx(tables[schema.name]["time_us"], rel=1e-3)
    assert len(tables["gemm"]["m"]) == len(gemm_rows())


def test_the_package_is_found_at_its_root_or_at_its_data(package: Path, tmp_path: Path) -> None:
    assert data_folder(package) == package
    deep = tmp_path / "aiconfigurator_core" / "systems" / "data"
    (deep / "h100_sxm").mkdir(parents=True)
    assert data_folder(tmp_path) == data_folder(tmp_path / "aiconfigurator_core") == deep
    with pytest.raises(InputError, match="holds no systems/data"):
        data_folder(package / "h100_sxm")


@pytest.mark.parametrize("lacking", ["pyarrow", "aiconfigurator_core"])
def test_what_is_not_installed_is_named_with_the_way_out(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        return None if name in (lacking, "aiconfigurator_core") else importlib.util.find_spec(name)

    monkeypatch.setattr(aiconfigurator, "find_spec", find)
    with pytest.raises(InputError, match=r"pip install 'apex-opt\[distill\]'") as caught:
        data_folder()
    assert lacking in str(caught.value)


def test_names_and_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    write_package(tmp_path)
    with pytest.raises(UnknownNameError, match="b200-sxm"):
        raw_tables("b200-smx", "vllm", "0.24.0", tmp_path)
    with pytest.raises(UnknownNameError, match="vllm"):
        full_tables("b200-sxm", "vlm", tmp_path)
    with pytest.raises(InputError, match=r"no tables of vllm 0\.25\.0 on b200-sxm"):
        raw_tables("b200-sxm", "vllm", "0.25.0", tmp_path, ("gemm",))
    path = tmp_path / "b200_sxm" / "gemm" / "vllm" / "0.24.0" / "gemm_perf.parquet"
    write_rows(path, [{"m": 1, "latency": 1.0}])
    with pytest.raises(InputError, match="column 'gemm_dtype' is missing"):
        raw_tables("b200-sxm", "vllm", "0.24.0", tmp_path, ("gemm",))
    path.write_bytes(b"PAR1 not parquet")
    with pytest.raises(InputError, match="not a table of aiconfigurator_core") as caught:
        raw_tables("b200-sxm", "vllm", "0.24.0", tmp_path, ("gemm",))
    assert "\n" not in str(caught.value)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in as a package that can be imported; what was read from it is forgotten afterwards."""
    write_package(tmp_path / "aiconfigurator_core" / "systems" / "data")
    (tmp_path / "aiconfigurator_core" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "aiconfigurator_core", raising=False)
    yield tmp_path
    vars(operations)["_load_sources"].cache_clear()
    laws.load_source.cache_clear()


def test_all_rows_of_the_package_are_looked_up_in_place_of_those_that_ship(installed: Path) -> None:
    gpu = load_cluster("a100-sxm").gpu
    shipped, whole = (load_profile(gpu, "vllm", profiles) for profiles in ("shipped", check_profiles("silicon")))
    sizes = np.array([1, 16, 1024])
    expected = (4 + 512 * 8192 * 1e-6 + sizes * 512 * 8192 * 5e-9) * 1e-6
    assert whole.gemm_time_s("bf16", sizes, 512, 8192) == pytest.approx(expected)
    assert shipped.gemm_time_s("bf16", sizes, 512, 8192) != pytest.approx(expected)
    assert whole.provenance["gemm bf16"].startswith("measured (aiconfigurator_core, all rows of profiles/a100-sxm/vllm")
    # What was not distilled from the package is as it ships: the norms of the H200.
    assert whole.memory_time_s(1e6, "norm", 4096) == pytest.approx(shipped.memory_time_s(1e6, "norm", 4096))


def test_profiles_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_profiles("shipped") == "shipped"
    monkeypatch.setattr(aiconfigurator, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="need pyarrow"):
        check_profiles("silicon")
    for name in (str(tmp_path), str(tmp_path / "no"), "silicone", "~nobody-of-this-name/profiles", "a\0b"):
        with pytest.raises(InputError, match="is neither shipped nor silicon nor a folder of profile folders"):
            check_profiles(name)
    (tmp_path / "profiles" / "x" / "y").mkdir(parents=True)
    (tmp_path / "profiles" / "x" / "y" / "card.toml").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_profiles("~/profiles") == str(tmp_path / "profiles")
