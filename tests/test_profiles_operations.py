"""Operation times: the tables where measured, sane and above the roofline everywhere, scaled to other accelerators."""

from __future__ import annotations

import pickle
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apex_opt.cluster import list_gpus, load_cluster
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.profiles import Profile, load_profile
from apex_opt.profiles.laws import load_tables
from apex_opt.profiles.schema import ATTENTION_DECODE, GEMM, MEMORY, MOE, Schema, read_table
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = DATA_ROOT / "profiles" / "h200-sxm"
H200 = load_profile(load_cluster("h200-sxm").gpu)
PROFILES = {name: load_profile(load_cluster(name).gpu) for name in list_gpus()}
ANY_GPU = st.sampled_from(sorted(PROFILES))
TOKENS = np.array([1, 2, 7, 64, 383, 384, 1000, 8192, 100_000, 5_000_000])


def rows(file: str, schema: Schema) -> list[dict[str, Any]]:
    table = read_table(FOLDER / file, schema)
    return [{name: column[row] for name, column in table.items()} for row in range(len(table["time_us"]))]


def test_measured_products_come_back_exactly() -> None:
    for row in rows("gemm.csv", GEMM):
        guess = H200.gemm_time_s(row["dtype"], row["m"], int(row["n"]), int(row["k"]))
        assert guess == pytest.approx(row["time_us"] * 1e-6, rel=1e-12)
    fp16 = H200.gemm_time_s("fp16", TOKENS, 4096, 4096)
    assert (fp16 == H200.gemm_time_s("bf16", TOKENS, 4096, 4096)).all()


def test_measured_experts_come_back_exactly_unless_their_routing_was_lucky() -> None:
    lucky = 0
    for row in rows("moe.csv", MOE):
        shape = [int(row[name]) for name in ("hidden", "expert_ffn", "experts", "topk")]
        guess = float(H200.moe_time_s("bf16", row["tokens"], *shape))
        bound = float(H200.moe_roofline_s("bf16", row["tokens"], *shape))
        lucky += bound > row["time_us"] * 1e-6
        assert guess == pytest.approx(max(bound, row["time_us"] * 1e-6), rel=1e-12)
    assert lucky == 1


def test_leaving_a_shape_out_of_the_tables_costs_what_the_docstrings_say() -> None:
    tables = load_tables(FOLDER)
    said = {"bf16": (0.034, 0.14), "fp8": (0.042, 0.165), "moe": (0.047, 0.176)}
    for name, surface in (*tables.gemm.items(), ("moe", tables.moe["bf16"])):
        errors = np.abs(surface.leave_one_out())
        assert np.median(errors) < said[name][0]
        assert np.percentile(errors, 95) < said[name][1]


def test_decode_attention_stays_near_its_table() -> None:
    errors = []
    for row in rows("attention_decode.csv", ATTENTION_DECODE):
        base, per_token = H200.decode_attention(32, 8, 128, 2.0, row["batch"])
        errors.append(float(base + per_token * row["batch"] * row["context"]) / (row["time_us"] * 1e-6) - 1)
    assert np.median(np.abs(errors)) < 0.03
    assert np.max(np.abs(errors)) < 0.31


def test_element_wise_kernels_stay_near_their_table_where_the_cache_does_not_help() -> None:
    errors = [
        float(H200.memory_time_s(row["bytes"])) / (row["time_us"] * 1e-6) - 1
        for row in rows("memory.csv", MEMORY)
        if not row["op"].startswith("copy") and row["bytes"] > 1e8
    ]
    assert len(errors) > 8
    assert np.abs(errors).max() < 0.05


@settings(deadline=None, max_examples=60)
@given(gpu=ANY_GPU, n=st.integers(1, 2**20), k=st.integers(1, 2**20), weight=st.none() | st.sampled_from([0.5, 1.0]))
def test_products_of_any_shape_are_finite_and_never_beat_the_roofline(
    gpu: str, n: int, k: int, weight: float | None
) -> None:
    profile = PROFILES[gpu]
    for dtype, _ in profile.gpu.flops_per_s:
        guess = profile.gemm_time_s(dtype, TOKENS, n, k, weight)
        assert np.isfinite(guess).all()
        assert (guess > 0).all()
        assert (guess >= profile.gemm_roofline_s(dtype, TOKENS, n, k, weight)).all()


@settings(deadline=None, max_examples=60)
@given(
    gpu=ANY_GPU,
    hidden=st.integers(1, 2**16),
    ffn=st.integers(1, 2**16),
    experts=st.integers(1, 1024),
    share=st.floats(1e-4, 1.0),
)
def test_experts_of_any_shape_are_finite_and_never_beat_the_roofline(
    gpu: str, hidden: int, ffn: int, experts: int, share: float
) -> None:
    profile, topk = PROFILES[gpu], share * experts
    guess = profile.moe_time_s("fp16", TOKENS, hidden, ffn, experts, topk)
    assert np.isfinite(guess).all()
    assert (guess > 0).all()
    assert (guess >= profile.moe_roofline_s("fp16", TOKENS, hidden, ffn, experts, topk)).all()


@settings(deadline=None, max_examples=60)
@given(
    gpu=ANY_GPU,
    groups=st.integers(1, 128),
    kv_heads=st.integers(1, 64),
    width=st.integers(1, 1024),
    size=st.sampled_from([1.0, 2.0]),
)
def test_attention_of_any_shape_grows_with_work_and_never_beats_the_bandwidth(
    gpu: str, groups: int, kv_heads: int, width: int, size: float
) -> None:
    profile = PROFILES[gpu]
    least = 2 * kv_heads * width * size / profile.gpu.memory_bytes_per_s
    base, per_token = profile.decode_attention(groups * kv_heads, kv_heads, width, size, TOKENS)
    assert (np.diff(base) >= 0).all()
    assert (np.diff(per_token) <= 0).all()
    assert (per_token >= least).all()
    pieces = profile.prefill_attention(groups * kv_heads, width, kv_heads, size, TOKENS)
    assert all(np.isfinite(piece).all() and (piece > 0).all() for piece in pieces)
    assert (np.diff(pieces[0]) > 0).all()
    assert (pieces[2] >= least).all()


@settings(deadline=None, max_examples=40)
@given(gpu=ANY_GPU, sizes=st.lists(st.integers(1, 2**50), min_size=2, max_size=20))
def test_element_wise_time_grows_with_bytes_and_never_beats_the_bandwidth(gpu: str, sizes: list[int]) -> None:
    moved = np.sort(np.array(sizes))
    guess = PROFILES[gpu].memory_time_s(moved)
    assert (np.diff(guess) >= 0).all()
    assert (guess > moved / PROFILES[gpu].gpu.memory_bytes_per_s).all()


def test_beyond_the_measured_sizes_times_grow_with_tokens() -> None:
    many = np.geomspace(8192, 1e7, 200).astype(np.int64)
    assert (np.diff(H200.gemm_time_s("bf16", many, 5000, 6000)) > 0).all()
    assert (np.diff(H200.moe_time_s("bf16", many, 5000, 3000, 16, 2)) > 0).all()


def test_no_work_takes_no_time() -> None:
    assert H200.gemm_time_s("bf16", [0, 1], 64, 64)[0] == 0
    assert H200.moe_time_s("bf16", [0, 1], 64, 64, 8, 2)[0] == 0
    assert H200.memory_time_s([0.0])[0] == 0
    assert H200.decode_attention(8, 8, 64, 2.0, [0])[1][0] == 0
    assert H200.prefill_attention(8, 64, 8, 2.0, [0])[0][0] == 0


def test_a_memory_bound_product_is_slower_on_h100_by_the_ratio_of_bandwidths() -> None:
    h100 = PROFILES["h100-sxm-80gb"]
    ratio = h100.gemm_time_s("bf16", 8, 57344, 8192) / H200.gemm_time_s("bf16", 8, 57344, 8192)
    assert ratio == pytest.approx(4.8 / 3.35, rel=0.02)
    bound = h100.gemm_time_s("bf16", 8192, 57344, 8192) / H200.gemm_time_s("bf16", 8192, 57344, 8192)
    assert bound == pytest.approx(1.0)


def test_a_launch_takes_as_long_whatever_the_bandwidth() -> None:
    tiny = [float(PROFILES[name].gemm_time_s("fp16", 1, 128, 128)) for name in ("v100-pcie-16gb", "b200-sxm-180gb")]
    assert tiny[0] == pytest.approx(tiny[1], rel=0.05)


def test_smaller_weights_save_time_only_while_memory_is_the_limit() -> None:
    full, eight, four = (H200.gemm_time_s("bf16", [4, 8192], 28672, 8192, size) for size in (None, 1.0, 0.5))
    assert full[0] > 1.7 * eight[0] > 1.7 * 1.5 * four[0]
    assert full[1] == eight[1] == four[1]
    assert (H200.gemm_time_s("bf16", TOKENS, 4096, 4096, 2.0) == H200.gemm_time_s("bf16", TOKENS, 4096, 4096)).all()
    small = H200.moe_time_s("bf16", 64, 4096, 14336, 8, 2, 0.5)
    assert small < 0.4 * H200.moe_time_s("bf16", 64, 4096, 14336, 8, 2)


def test_expert_parallel_ranks_share_the_work() -> None:
    whole = H200.moe_time_s("bf16", [512, 8192], 4096, 1536, 128, 8)
    eighth = H200.moe_time_s("bf16", [512, 8192], 4096, 1536, 16, 1.0)
    sixteenth = H200.moe_time_s("bf16", [512, 8192], 4096, 1536, 8, 0.5)
    assert (eighth < whole / 4).all()
    assert (sixteenth < eighth).all()


def test_decode_attention_follows_the_heads_of_the_rank_and_the_cache_format() -> None:
    _, eight = H200.decode_attention(32, 8, 128, 2.0, 64)
    _, fp8 = H200.decode_attention(32, 8, 128, 1.0, 64)
    base_one, one = H200.decode_attention(4, 1, 128, 2.0, 8)
    base_eight, same = H200.decode_attention(32, 8, 128, 2.0, 1)
    assert fp8 == pytest.approx(eight / 2)
    assert one == pytest.approx(same / 8)
    assert base_one == base_eight
    base, _ = H200.decode_attention(32, 8, 128, 2.0, [64, 128])
    assert base[1] == pytest.approx(2 * base[0])
    # One cached head read by very many query heads is limited by arithmetic.
    _, mla = H200.decode_attention(2048, 1, 576, 1.0, 64)
    assert mla == pytest.approx(4 * 2048 * 576 / (0.5 * 989e12))


@pytest.mark.parametrize(("length", "share"), [(512, 0.33), (1024, 0.44), (4096, 0.59), (16384, 0.64)])
def test_whole_prompts_reach_the_published_share_of_peak(length: int, share: float) -> None:
    base, per_pair, _ = H200.prefill_attention(16, 128, 16, 2.0, np.array([length]))
    launch = float(H200.decode_attention(16, 8, 128, 2.0, 1)[0])
    pairs = length**2 / 2
    compute = float(base[0] + per_pair[0] * pairs) - launch
    assert 4 * 16 * 128 * pairs / compute / 989e12 == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize(("gpu", "dtype"), [("a100-sxm-80gb", "fp8"), ("v100-pcie-16gb", "fp8"), ("v100", "bf16")])
def test_formats_without_hardware_are_refused_naming_gpu_and_format(gpu: str, dtype: str) -> None:
    profile = load_profile(load_cluster(gpu).gpu)
    for call in (
        lambda: profile.gemm_time_s(dtype, 1, 64, 64),
        lambda: profile.moe_time_s(dtype, 1, 64, 64, 8, 2),
    ):
        with pytest.raises(UsageError, match=f"{profile.gpu.name} does not compute in {dtype}"):
            call()


@pytest.mark.parametrize(
    "values", [[-1], [float("nan")], [float("inf")], [True], ["8"], [10**400], [[1], [1, 2]], [2.0**60], None]
)
def test_bad_sizes_are_refused(values: Any) -> None:
    for call in (
        lambda: H200.gemm_time_s("bf16", values, 64, 64),
        lambda: H200.moe_time_s("bf16", values, 64, 64, 8, 2),
        lambda: H200.memory_time_s(values),
        lambda: H200.decode_attention(8, 8, 64, 2.0, values),
        lambda: H200.prefill_attention(8, 64, 8, 2.0, values),
    ):
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, 2**40, pytest.param(10**5000, id="huge"), "64", None])
def test_bad_shapes_are_refused(bad: Any) -> None:
    for call in (
        lambda: H200.gemm_time_s("bf16", 1, bad, 64),
        lambda: H200.gemm_time_s("bf16", 1, 64, bad),
        lambda: H200.moe_time_s("bf16", 1, bad, 64, 8, 2),
        lambda: H200.moe_time_s("bf16", 1, 64, 64, bad, 2),
        lambda: H200.decode_attention(bad, 8, 64, 2.0, 1),
        lambda: H200.prefill_attention(8, 64, bad, 2.0, 1),
    ):
        with pytest.raises(UsageError, match="must be a whole number from 1"):
            call()


@pytest.mark.parametrize("bad", [0, -1.0, 8.5, float("nan"), True, pytest.param(10**400, id="huge"), "2", None])
def test_bad_experts_per_token_and_element_sizes_are_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match="topk"):
        H200.moe_time_s("bf16", 1, 64, 64, 8, bad)
    if bad not in (8.5, None):
        with pytest.raises(UsageError, match="bytes per element"):
            H200.gemm_time_s("bf16", 1, 64, 64, bad)
        with pytest.raises(UsageError, match="bytes per element"):
            H200.decode_attention(8, 8, 64, bad, 1)


def test_provenance_tells_measured_from_derived_and_assumed() -> None:
    assert H200.provenance["gemm"] == "measured (profiles/h200-sxm/gemm.csv)"
    assert H200.provenance["gemm_fp8"] == "measured (profiles/h200-sxm/gemm.csv)"
    assert H200.provenance["moe_fp8"].startswith("derived")
    assert H200.provenance["prefill_attention"].startswith("assumed")
    for name in ("gemm", "moe", "memory", "decode_attention", "power"):
        assert H200.provenance[name].startswith("measured")
        assert PROFILES["h100-sxm-80gb"].provenance[name].startswith("derived")
    assert "gemm_fp8" not in PROFILES["a100-sxm-80gb"].provenance


def own_folder(root: Path, *tables: str) -> None:
    """A profile folder `mine` with some tables of the H200, everything taking twice as long."""
    folder = root / "mine"
    folder.mkdir()
    card = (FOLDER / "card.toml").read_text().replace('name = "h200-sxm"', 'name = "mine"')
    head, *entries = card.split("[tables.")
    kept = [entry for entry in entries if entry.split("]")[0] in tables]
    (folder / "card.toml").write_text("[tables.".join([head, *kept]))
    for name in tables:
        lines = (FOLDER / f"{name}.csv").read_text().splitlines()
        at = lines[0].split(",").index("time_us")
        doubled = [lines[0]]
        for line in lines[1:]:
            cells = line.split(",")
            cells[at] = str(2 * float(cells[at]))
            doubled.append(",".join(cells))
        (folder / f"{name}.csv").write_text("\n".join(doubled))


def test_an_accelerator_brings_its_own_tables_and_the_rest_is_derived(tmp_path: Path) -> None:
    own_folder(tmp_path, "gemm")
    mine = load_profile(replace(H200.gpu, name="mine", profile="mine"), tmp_path)
    assert mine.gemm_time_s("bf16", 64, 4096, 4096) == pytest.approx(2 * H200.gemm_time_s("bf16", 64, 4096, 4096))
    assert mine.memory_time_s(1e6) == H200.memory_time_s(1e6)
    assert mine.provenance["gemm"] == "measured (profiles/mine/gemm.csv)"
    assert mine.provenance["memory"].startswith("derived from the efficiencies of profiles/h200-sxm/memory.csv")


def test_borrowed_tables_are_not_called_measured() -> None:
    faster = load_profile(replace(H200.gpu, name="h200-fast", memory_bytes_per_s=5.5e12))
    assert faster.provenance["gemm"].startswith("derived from the efficiencies of profiles/h200-sxm/gemm.csv")
    assert faster.gemm_time_s("bf16", 1, 57344, 8192) < H200.gemm_time_s("bf16", 1, 57344, 8192)


def test_a_profile_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown profile of h200-sxm-141gb 'h200-sxn'; did you mean h200-sxm"):
        load_profile(replace(H200.gpu, profile="h200-sxn"))
    with pytest.raises(UnknownNameError, match="leave it out"):
        load_profile(H200.gpu, tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("gemm.csv", "dtype,m,n,k,time_us\nbfloat16,1,1,1,0\n", "line 2: time_us = '0'"),
        ("memory.csv", "op,bytes,time_us\nnorm,1000,1\n", "at most 1 MiB and one of at least 128 MiB"),
        (
            "attention_decode.csv",
            "dtype,heads,kv_heads,head_dim,batch,context,time_us\nbfloat16,8,8,64,1,128,5\n",
            "needs two contexts of one batch",
        ),
        (
            "attention_decode.csv",
            "dtype,heads,kv_heads,head_dim,batch,context,time_us\nbfloat16,8,8,64,1,9,5\nbfloat16,8,8,64,1,99,4\n",
            "does not grow with context",
        ),
    ],
)
def test_tables_that_cannot_carry_a_law_are_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    shutil.copytree(FOLDER, tmp_path / "mine")
    (tmp_path / "mine" / file).write_text(text)
    with pytest.raises(InputError, match=message):
        load_profile(replace(H200.gpu, profile="mine"), tmp_path)


def test_a_profile_is_shared_and_travels_between_processes() -> None:
    assert load_profile(H200.gpu) is H200
    copy: Profile = pickle.loads(pickle.dumps(H200))
    assert (copy.gemm_time_s("fp8", TOKENS, 5000, 5000) == H200.gemm_time_s("fp8", TOKENS, 5000, 5000)).all()


def test_a_table_of_8192_tokens_takes_about_a_millisecond() -> None:
    tokens = np.arange(8192)
    H200.gemm_time_s("bf16", tokens, 5001, 6001)
    start = time.perf_counter()
    for _ in range(20):
        H200.gemm_time_s("bf16", tokens, 5001, 6001)
        H200.moe_time_s("bf16", tokens, 5001, 3001, 64, 4)
    assert (time.perf_counter() - start) / 40 < 5e-3
