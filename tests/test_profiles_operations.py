"""Operation times: the tables where measured, sane and above the roofline everywhere, scaled to other accelerators."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from profile_cases import H200, ROOT, leave_one_out, mine, profile_of, write_source

from apex_opt.cluster import list_gpus, load_cluster
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.ir import FORMATS, list_models
from apex_opt.ir.cells import Cut
from apex_opt.ir.cells.operations import Attend, AttendLatent, Experts, Product
from apex_opt.profiles import Profile, load_profile
from apex_opt.profiles.laws import load_source
from apex_opt.profiles.physics import experts_work
from apex_opt.profiles.schema import TABLE_ENGINES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from apex_opt.cluster.types import Gpu

GPUS: dict[str, Gpu] = {name: load_cluster(name).gpu for name in list_gpus()}
PROFILE = load_profile(H200)
V100 = load_profile(GPUS["v100-pcie-16gb"])
ANY = st.builds(load_profile, st.sampled_from([GPUS[name] for name in sorted(GPUS)]), st.sampled_from(TABLE_ENGINES))
TOKENS = np.array([1, 2, 7, 64, 383, 384, 1000, 8192, 100_000, 5_000_000])


def rows(folder: str, kind: str, **chosen: Any) -> list[dict[str, Any]]:
    """Rows of a shipped table that have the chosen values."""
    table = load_source(ROOT / folder).table(kind)
    found = np.flatnonzero(np.logical_and.reduce([table[name] == value for name, value in chosen.items()]))
    return [{name: column[row] for name, column in table.items()} for row in found]


def kernels(profile: Profile) -> list[str]:
    """Weight formats that an accelerator computes."""
    return [
        name
        for name, entry in FORMATS.items()
        if entry.activation in ("bf16", "fp16") or profile.gpu.supports(entry.activation)
    ]


def roofline(profile: Profile, name: str, flops: Any, moved: Any) -> NDArray[np.float64]:
    gpu = profile.gpu
    return np.maximum(flops / gpu.peak_flops_per_s(profile.kernel(name).peak), moved / gpu.memory_bytes_per_s)


def gemm_roofline(profile: Profile, name: str, m: Any, n: int, k: int) -> NDArray[np.float64]:
    bytes_in = {"fp8": 1.0, "int8": 1.0, "fp4": 9 / 16}.get(FORMATS[name].activation, 2.0)
    held = float(FORMATS[name].weight_bits) / 8
    return roofline(profile, name, 2.0 * m * n * k, held * n * k + m * (bytes_in * k + 2.0 * n))


def test_measured_products_come_back_exactly_unless_a_larger_batch_is_faster() -> None:
    padded = 0
    for dtype in ("bf16", "fp8"):
        found = rows("h200-sxm/ops", "gemm", dtype=dtype)
        for row in found[::3]:
            later = [r["time_us"] for r in found if (r["n"], r["k"]) == (row["n"], row["k"]) and r["m"] >= row["m"]]
            guess = PROFILE.gemm_time_s(dtype, row["m"], int(row["n"]), int(row["k"]), fused=True)
            assert guess == pytest.approx(min(later) * 1e-6, rel=1e-9)
            padded += min(later) < row["time_us"]
        assert padded < 0.3 * len(found)
    fp16 = PROFILE.gemm_time_s("fp16", TOKENS, 4096, 4096)
    assert (fp16 == PROFILE.gemm_time_s("bf16", TOKENS, 4096, 4096)).all()


@pytest.mark.parametrize("gpu", ["a100-sxm-80gb", "h100-sxm-80gb", "l40s-48gb"])
def test_integer_products_are_derived_from_those_in_fp8_at_the_integer_peak(gpu: str) -> None:
    profile = load_profile(GPUS[gpu])
    shape = 8192, 8192
    seconds, half = (float(profile.gemm_time_s(name, 16384, *shape)) for name in ("w8a8", "bf16"))
    flops = 2.0 * 16384 * 8192 * 8192
    assert flops / GPUS[gpu].peak_flops_per_s("int8") <= seconds < 0.85 * half
    assert profile.provenance["gemm w8a8"].startswith("derived")
    assert "fp8" in profile.provenance["gemm w8a8"]
    assert profile.power.joule_per_flop["int8"] < profile.power.joule_per_flop["bf16"]
    few = [float(profile.gemm_time_s(name, 1, *shape)) for name in ("w8a8", "bf16")]
    assert few[0] < few[1]


def test_integer_products_need_hardware_for_them() -> None:
    with pytest.raises(UsageError, match="does not compute in int8"):
        V100.gemm_time_s("w8a8", 1, 64, 64)


@pytest.mark.parametrize(
    ("gpu", "engine", "folder", "dtype"),
    [
        ("h100-sxm-80gb", "vllm", "h100-sxm/vllm-0.24.0", "bf16"),
        ("b200-sxm-180gb", "sglang", "b200-sxm/sglang-0.5.14", "nvfp4"),
        ("a100-sxm-80gb", "vllm", "a100-sxm/vllm-0.14.0", "bf16"),
    ],
)
def test_products_measured_on_an_accelerator_with_an_engine_come_back(
    gpu: str, engine: str, folder: str, dtype: str
) -> None:
    profile = load_profile(GPUS[gpu], engine)
    errors = [
        float(profile.gemm_time_s(dtype, row["m"], int(row["n"]), int(row["k"]))) / row["time_us"] / 1e-6 - 1
        for row in rows(folder, "gemm", dtype=dtype)[::97]
    ]
    assert len(errors) > 30
    # Another engine's table may expose a launch floor, and a larger batch may be faster: never slower than measured.
    assert max(errors) < 1e-9
    assert np.median(errors) > -0.01


def test_measured_experts_come_back_exactly_unless_their_routing_was_lucky() -> None:
    found = rows("h200-sxm/ops", "moe")
    lucky = 0
    for row in found:
        shape = [int(row[name]) for name in ("hidden", "expert_ffn", "experts", "held", "topk")]
        later = [
            r["time_us"] * 1e-6
            for r in found
            if all(r[name] == row[name] for name in ("hidden", "expert_ffn", "experts", "topk"))
            and r["tokens"] >= row["tokens"]
        ]
        least = float(roofline(PROFILE, "bf16", *experts_work(row["tokens"], *shape, weight_bytes=2.0)))
        lucky += least > min(later)
        assert float(PROFILE.moe_time_s("bf16", row["tokens"], *shape)) == pytest.approx(max(least, min(later)))
    assert lucky <= 1


def test_leaving_a_shape_out_of_the_tables_costs_a_few_percent() -> None:
    ops, vllm = load_source(ROOT / "h200-sxm" / "ops"), load_source(ROOT / "h200-sxm" / "vllm-0.24.0")
    said = [
        (ops.gemm("bf16"), 0.03, 0.12),
        (ops.gemm("fp8"), 0.04, 0.15),
        (ops.moe("bf16", "uniform"), 0.05, 0.18),
        (vllm.gemm("bf16"), 0.03, 0.10),
        (vllm.gemm("fp8"), 0.03, 0.10),
        (vllm.moe("bf16", "balanced"), 0.09, 0.40),
    ]
    for surface, median, high in said:
        assert surface is not None
        errors = np.abs(leave_one_out(surface))
        assert np.median(errors) < median
        assert np.percentile(errors, 95) < high


GEMM = "dtype,m,n,k,time_us\n"


def gemm_rows(factor: float, dtype: str = "bfloat16", n: int = 4096, most: int = 1024) -> str:
    """Products of 1, 64 and 1,024 rows, those of up to `most` so many times as slow as the others."""
    return "".join(
        f"{dtype},{m},{n},4096,{(factor if m <= most else 1.0) * (20 + m / 10):.9g}\n" for m in (1, 64, 1024)
    )


def test_an_engines_own_kernels_come_first_then_those_measured_on_the_accelerator_then_the_reference(
    tmp_path: Path,
) -> None:
    write_source(tmp_path, "one/vllm-1", {"gemm": GEMM + gemm_rows(1.0)}, "vllm")
    write_source(tmp_path, "one/sglang-1", {"gemm": GEMM + gemm_rows(1.1)}, "sglang")
    own, other, none = (profile_of(tmp_path, "one", engine) for engine in ("vllm", "sglang", "trtllm"))
    assert own.gemm_time_s("bf16", 64, 4096, 4096) == pytest.approx(26.4e-6)
    assert own.provenance["gemm bf16"] == f"measured ({tmp_path}/one/vllm-1/gemm.csv)"
    assert other.gemm_time_s("bf16", 64, 4096, 4096) == pytest.approx(1.1 * 26.4e-6)
    assert none.gemm_time_s("bf16", 64, 4096, 4096) == pytest.approx(26.4e-6)
    assert "one/sglang-1" in none.provenance["gemm bf16"]
    assert own.memory_time_s(1e6) == PROFILE.memory_time_s(1e6)
    assert own.provenance["memory"].startswith("derived: from profiles/h200-sxm/ops/memory.csv")


def test_what_was_measured_for_all_engines_comes_before_an_engines_own(tmp_path: Path) -> None:
    write_source(tmp_path, "one/ops", {"gemm": GEMM + gemm_rows(1.2)})
    write_source(tmp_path, "one/vllm-1", {"gemm": GEMM + gemm_rows(1.0) + gemm_rows(1.0, n=8192)}, "vllm")
    profile = profile_of(tmp_path, "one")
    assert profile.gemm_time_s("bf16", 64, 4096, 4096) == pytest.approx(1.2 * 26.4e-6)
    assert profile.gemm_time_s("bf16", 64, 8192, 4096) < 1.15 * 26.4e-6


@pytest.mark.parametrize(("slower", "believed"), [(1.2, True), (1.3, False)])
def test_a_launch_floor_of_a_collection_is_exposed_by_another_engines_table(
    tmp_path: Path, slower: float, believed: bool
) -> None:
    write_source(tmp_path, "one/vllm-1", {"gemm": GEMM + gemm_rows(slower, most=64)}, "vllm")
    write_source(tmp_path, "one/sglang-1", {"gemm": GEMM + gemm_rows(1.0)}, "sglang")
    profile = profile_of(tmp_path, "one")
    expected = (slower if believed else 1.0) * 26.4e-6
    assert profile.gemm_time_s("bf16", 64, 4096, 4096) == pytest.approx(expected)
    told = "sglang-1/gemm.csv), where the engine's own table is 1.25 times slower"
    assert (told in profile.provenance["gemm bf16"]) != believed


@pytest.mark.parametrize("rows", [64, 1024])
def test_a_kernel_that_is_slow_where_no_launch_counts_is_believed(tmp_path: Path, rows: int) -> None:
    write_source(tmp_path, "one/vllm-1", {"gemm": GEMM + gemm_rows(1.3)}, "vllm")
    write_source(tmp_path, "one/sglang-1", {"gemm": GEMM + gemm_rows(1.0)}, "sglang")
    profile = profile_of(tmp_path, "one")
    assert profile.gemm_time_s("bf16", rows, 4096, 4096) == pytest.approx(1.3 * (20 + rows / 10) * 1e-6)
    assert "slower" not in profile.provenance["gemm bf16"]


def test_trtllms_own_experts_on_an_h200_are_slower_than_sglangs_at_every_size() -> None:
    shape = (7168, 256, 256, 256, 8)  # of DeepSeek-V3 on eight GPUs
    tokens = np.array([16.0, 1024.0, 8192.0])
    own, other = (
        load_profile(load_cluster("h200-sxm").gpu, engine).moe_time_s("fp8", tokens, *shape)
        for engine in ("trtllm", "sglang")
    )
    assert (own > 1.5 * other).all()


def test_a_slow_kernel_that_two_collections_agree_on_is_believed(tmp_path: Path) -> None:
    for engine, factor in (("vllm", 1.5), ("sglang", 1.6), ("trtllm", 1.0)):
        write_source(tmp_path, f"one/{engine}-1", {"gemm": GEMM + gemm_rows(factor, most=64)}, engine)
    profile = profile_of(tmp_path, "one")
    assert profile.gemm_time_s("bf16", 64, 4096, 4096) == pytest.approx(1.5 * 26.4e-6)
    assert "slower" not in profile.provenance["gemm bf16"]


def test_scales_are_by_row_or_by_block_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    table = GEMM + gemm_rows(1.0, "float8") + gemm_rows(0.9, "fp8_block")
    write_source(tmp_path, "one/vllm-1", {"gemm": table}, "vllm")
    profile = profile_of(tmp_path, "one")
    assert profile.gemm_time_s("fp8", 64, 4096, 4096) == pytest.approx(26.4e-6)
    assert profile.gemm_time_s("fp8", 64, 4096, 4096, by_block=True) == pytest.approx(0.9 * 26.4e-6)


def test_kernels_of_the_engine_come_before_the_way_that_a_checkpoint_is_scaled(tmp_path: Path) -> None:
    write_source(tmp_path, "one/vllm-1", {"gemm": GEMM + gemm_rows(1.0, "fp8_block")}, "vllm")
    write_source(tmp_path, "one/sglang-1", {"gemm": GEMM + gemm_rows(2.0, "float8")}, "sglang")
    own, other = (profile_of(tmp_path, "one", engine) for engine in ("vllm", "trtllm"))
    assert own.gemm_time_s("fp8", 64, 4096, 4096) == pytest.approx(26.4e-6)
    assert other.gemm_time_s("fp8", 64, 4096, 4096) == pytest.approx(2 * 26.4e-6)


def test_only_our_own_narrow_products_need_a_kernel_that_narrows_their_input(tmp_path: Path) -> None:
    narrowing = PROFILE.memory_time_s(64 * 4096 * 3)
    bare = PROFILE.gemm_time_s("fp8", 64, 4096, 4096, fused=True)
    assert PROFILE.gemm_time_s("fp8", 64, 4096, 4096) == pytest.approx(bare + narrowing)
    assert (
        PROFILE.gemm_time_s("bf16", 64, 4096, 4096) == PROFILE.gemm_time_s("bf16", 64, 4096, 4096, fused=True)
    ).all()
    write_source(tmp_path, "one/vllm-1", {"gemm": GEMM + gemm_rows(1.0, "float8")}, "vllm")
    profile = profile_of(tmp_path, "one")
    assert profile.gemm_time_s("fp8", 64, 4096, 4096) == profile.gemm_time_s("fp8", 64, 4096, 4096, fused=True)


@pytest.mark.parametrize(
    ("call", "key", "text"),
    [
        (lambda p: p.gemm_time_s("bf16", 64, 4096, 4096), "gemm bf16", "measured (profiles/h200-sxm/ops/gemm.csv)"),
        (lambda p: p.gemm_time_s("bf16", 64, 4100, 4100), "gemm bf16", "derived: between the measured shapes of "),
        (lambda p: p.gemm_time_s("bf16", 64, 2**20, 64), "gemm bf16", "derived: roofline at the efficiency of the nea"),
        (lambda p: p.gemm_time_s("bf16", 10**6, 4096, 4096), "gemm bf16", "gemm.csv), roofline at the last efficiency"),
        (
            lambda p: p.gemm_time_s("w4a16", 64, 4096, 4096),
            "gemm w4a16",
            "derived: bf16 efficiencies, from profiles/h20",
        ),
        (lambda p: p.moe_time_s("bf16", 64, 4096, 14336, 8, 8, 2), "moe bf16", "measured (profiles/h200-sxm/ops/moe.c"),
        (
            lambda p: p.moe_time_s("fp8", 64, 2**14, 2**14, 8, 8, 2),
            "moe fp8",
            "beyond the measured shapes of profiles/",
        ),
        (lambda p: p.memory_time_s(1.0), "memory", "measured (profiles/h200-sxm/ops/memory.csv)"),
        (
            lambda p: p.decode_attention(32, 8, 128, "bf16", 1),
            "attention decode",
            "measured (profiles/h200-sxm/ops/att",
        ),
        (lambda p: p.decode_attention(33, 3, 128, "bf16", 1), "attention decode", "derived: the nearest shape of prof"),
        (lambda p: p.decode_attention(8, 8, 64, "bf16", 1, 100), "attention decode", "derived: no window, "),
        (lambda p: p.prefill_attention(32, 8, 128, "fp8", 1), "attention prefill", "measured (profiles/h200-sxm/vllm-"),
        (lambda p: p.latent_decode(16, 512, 64, "bf16", 1), "mla kernel decode", "measured (profiles/h200-sxm/"),
        (lambda p: p.latent_decode(20, 256, 32, "bf16", 1), "mla kernel decode", "derived: the nearest shape of"),
        (lambda p: p.latent_prefill(16, 192, 128, "bf16", 1), "mla kernel prefill", "measured (profiles/h200-sxm/trtl"),
    ],
)
def test_provenance_tells_measured_from_derived(call: Callable[[Profile], Any], key: str, text: str) -> None:
    profile = load_profile(H200)
    call(profile)
    assert text in profile.provenance[key]
    assert set(profile.provenance) <= {key, "power", "memory"}


def test_an_accelerator_without_tables_derives_all_from_the_reference() -> None:
    for engine in TABLE_ENGINES:
        profile = load_profile(GPUS["v100-pcie-16gb"], engine)
        profile.gemm_time_s("fp16", TOKENS, 4096, 4096)
        profile.moe_time_s("fp16", TOKENS, 4096, 14336, 8, 8, 2)
        profile.memory_time_s(TOKENS)
        profile.decode_attention(32, 8, 128, "fp16", TOKENS)
        profile.prefill_attention(32, 8, 128, "fp16", TOKENS)
        profile.latent_decode(16, 512, 64, "fp16", TOKENS)
        profile.latent_prefill(16, 192, 128, "fp16", TOKENS)
        assert len(profile.provenance) == 8
        for text in profile.provenance.values():
            assert text.startswith("derived: ")
            assert "h200-sxm" in text
        assert not profile.own("gemm")


def test_tables_of_another_datasheet_are_not_called_measured() -> None:
    faster = load_profile(replace(H200, name="h200-fast", memory_bytes_per_s=5.5e12))
    assert faster.gemm_time_s("bf16", 1, 57344, 8192) < PROFILE.gemm_time_s("bf16", 1, 57344, 8192)
    told = "derived: from profiles/h200-sxm/ops/gemm.csv, its efficiencies on the datasheet of h200-fast"
    assert faster.provenance["gemm bf16"] == told
    assert faster.provenance["power"].startswith("derived: scaled")


def test_derived_times_follow_the_datasheet() -> None:
    """V100 has 0.19 of the bandwidth and 0.11 of the arithmetic of the reference."""
    slower_memory, slower_math = 4800 / 900, 989 / 112
    ratio = V100.gemm_time_s("fp16", [8, 8192], 57344, 8192) / PROFILE.gemm_time_s("bf16", [8, 8192], 57344, 8192)
    assert ratio == pytest.approx([slower_memory, slower_math], rel=0.03)
    tiny = [float(profile.gemm_time_s("fp16", 1, 128, 128)) for profile in (V100, PROFILE)]
    assert tiny[0] == pytest.approx(tiny[1], rel=0.1), "a launch takes as long whatever the bandwidth"
    base, per_token = (
        np.array(pair)
        for pair in zip(*(p.decode_attention(32, 8, 128, "fp16", 64) for p in (V100, PROFILE)), strict=True)
    )
    assert base[0] == base[1]
    assert per_token[0] / per_token[1] == pytest.approx(slower_memory)
    base, per_pair = (
        np.array(pair)
        for pair in zip(*(p.prefill_attention(32, 8, 128, "fp16", 2048) for p in (V100, PROFILE)), strict=True)
    )
    assert base[0] / base[1] == pytest.approx(slower_math)
    assert per_pair[0] / per_pair[1] == pytest.approx(slower_math)
    windowed = [
        base + rate * 256 * 128
        for base, rate in (p.decode_attention(64, 8, 64, "fp16", 256, 128) for p in (V100, PROFILE))
    ]
    assert 1.5 < float(windowed[0] / windowed[1]) < slower_memory


@settings(deadline=None, max_examples=60)
@given(profile=ANY, n=st.integers(1, 2**20), k=st.integers(1, 2**20))
def test_products_of_any_shape_are_finite_and_never_beat_the_roofline(profile: Profile, n: int, k: int) -> None:
    for name in kernels(profile):
        guess = profile.gemm_time_s(name, TOKENS, n, k)
        assert np.isfinite(guess).all()
        assert (guess >= gemm_roofline(profile, name, TOKENS, n, k) * (1 - 1e-12)).all()


@settings(deadline=None, max_examples=60)
@given(
    profile=ANY,
    hidden=st.integers(1, 2**16),
    ffn=st.integers(1, 2**16),
    experts=st.integers(1, 1024),
    parts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    routing=st.sampled_from(["uniform", "skewed"]),
)
def test_experts_of_any_shape_are_finite_and_never_beat_the_roofline(
    profile: Profile, hidden: int, ffn: int, experts: int, parts: tuple[float, float], routing: str
) -> None:
    held, topk = (max(1, round(experts * part)) for part in parts)
    for name in kernels(profile):
        guess = profile.moe_time_s(name, TOKENS, hidden, ffn, experts, held, topk, routing)
        work = experts_work(TOKENS, hidden, ffn, experts, held, topk, weight_bytes=profile.kernel(name).weight_bytes)
        assert np.isfinite(guess).all()
        assert (guess >= roofline(profile, name, *work) * (1 - 1e-12)).all()


@settings(deadline=None, max_examples=80)
@given(
    profile=ANY,
    groups=st.integers(1, 128),
    kv_heads=st.integers(1, 64),
    width=st.integers(1, 1024),
    kv_format=st.sampled_from(["bf16", "fp16", "fp8"]),
    window=st.none() | st.integers(1, 5000),
)
def test_attention_of_any_shape_is_finite_and_never_beats_the_roofline(
    profile: Profile, groups: int, kv_heads: int, width: int, kv_format: str, window: int | None
) -> None:
    shape = (groups * kv_heads, kv_heads, width, kv_format)
    flops, moved = 4.0 * groups * kv_heads * width, 2.0 * kv_heads * width * (1 if kv_format == "fp8" else 2)
    half = profile.gpu.half_dtype
    base, per_token = profile.decode_attention(*shape, TOKENS, window)
    context = 1000 if window is None or window > 1024 else window
    least = roofline(profile, half, flops * TOKENS * context, moved * TOKENS * context)
    assert np.isfinite(base).all()
    assert (base > 0).all()
    assert (base + per_token * TOKENS * context >= least * (1 - 1e-9)).all()
    if window is None or window > 1024:
        assert (np.diff(base) >= 0).all()
    extra, per_pair = profile.prefill_attention(*shape, TOKENS, window)
    seen = TOKENS if window is None or window > 1024 else np.minimum(TOKENS, window)
    pairs = TOKENS * seen - seen * (seen - 1) / 2
    assert np.isfinite(extra).all()
    assert (extra >= 0).all()
    assert (extra + per_pair * pairs >= roofline(profile, half, flops * pairs, 0.0) * (1 - 1e-9)).all()


@settings(deadline=None, max_examples=40)
@given(
    profile=ANY,
    heads=st.integers(1, 256),
    rank=st.integers(16, 2048),
    rope=st.integers(8, 256),
    kv_format=st.sampled_from(["bf16", "fp8"]),
)
def test_latent_attention_of_any_shape_is_finite_and_never_beats_the_roofline(
    profile: Profile, heads: int, rank: int, rope: int, kv_format: str
) -> None:
    base, per_token = profile.latent_decode(heads, rank, rope, kv_format, TOKENS)
    moved = (rank + rope) * (1 if kv_format == "fp8" else 2)
    assert (base > 0).all()
    assert (np.diff(base) >= 0).all()
    assert (per_token >= roofline(profile, profile.gpu.half_dtype, 2.0 * heads * (2 * rank + rope), moved)).all()
    extra, per_pair = profile.latent_prefill(heads, rank // 2 + rope, rank // 2, kv_format, TOKENS)
    assert (extra >= 0).all()
    flops = 2.0 * heads * (2 * (rank // 2) + rope)
    assert (per_pair >= roofline(profile, profile.gpu.half_dtype, flops, 0.0)).all()


@settings(deadline=None, max_examples=40)
@given(
    profile=ANY,
    kind=st.sampled_from(["plain", "norm", "activation"]),
    width=st.integers(0, 2**16),
    moved=st.lists(st.integers(1, 2**50), min_size=2, max_size=20),
)
def test_element_wise_time_grows_with_bytes_and_width_and_never_beats_the_bandwidth(
    profile: Profile, kind: str, width: int, moved: list[int]
) -> None:
    size = np.sort(np.array(moved))
    guess = profile.memory_time_s(size, kind, width)
    assert (np.diff(guess) >= 0).all()
    assert (guess > size / profile.gpu.memory_bytes_per_s).all()
    assert (profile.memory_time_s(size, kind, width + 1000) >= guess).all()
    riding = profile.memory_time_s(size, kind, width, launched=False)
    assert np.ptp(guess - riding) == pytest.approx(0, abs=1e-6 * guess.max())
    assert (riding < guess).all()


def relative_bandwidth(gpu: Gpu) -> float:
    """Bandwidth of the GPU whose tables stand for those of another, over its own."""
    own = [other.memory_bytes_per_s for other in GPUS.values() if other.profile == gpu.like and gpu.like is not None]
    return max(own) / gpu.memory_bytes_per_s if own else 1.0


def told_apart() -> list[str]:
    """GPUs with tables of their own, and of those that others' tables stand for the slowest memory for each."""
    slowest = {GPUS[name].like: name for name in sorted(GPUS, key=lambda n: -GPUS[n].memory_bytes_per_s)}
    return sorted({name for name in GPUS if GPUS[name].profile} | set(slowest.values()) | {"v100-pcie-16gb"})


@pytest.mark.parametrize("gpu", told_apart())
@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.nightly)])
def test_every_cell_of_every_model_has_sane_times_with_every_engine(gpu: str, every: int) -> None:
    """Shapes of the registry cut over 1 to 8 GPUs, in every weight and cache format the accelerator computes.

    In CI every twentieth shape, others with each GPU.
    """
    tokens = np.array([0, 1, 16, 512, 8192])
    first = told_apart().index(gpu) % every
    products, experts, heads, latent = (sorted(some, key=repr)[first::every] for some in shapes_of_all_models())
    for engine in TABLE_ENGINES:
        profile = load_profile(GPUS[gpu], engine)
        # Few sequences do not fill a GPU: their share of its bandwidth is taken to be that of the other.
        slower = max(1.0, relative_bandwidth(GPUS[gpu]))
        for name in kernels(profile):
            for n, k in products:
                sane(profile.gemm_time_s(name, tokens, n, k), gemm_roofline(profile, name, tokens, n, k))
            for shape in experts:
                work = experts_work(tokens, *shape, weight_bytes=profile.kernel(name).weight_bytes)
                for routing in ("uniform", "skewed"):
                    sane(profile.moe_time_s(name, tokens, *shape, routing), roofline(profile, name, *work))
        half = profile.gpu.half_dtype
        for kv_format, element in ((half, 2), ("fp8", 1)):
            for query, kv, width, window in heads:
                least = roofline(profile, half, 4.0 * query * width, 2.0 * kv * width * element)
                base, rate = profile.decode_attention(query, kv, width, kv_format, tokens, window)
                held = min(1000, window or 1000)
                sane(base + rate * tokens * held, tokens * held * least, slower=slower)
                base, rate = profile.prefill_attention(query, kv, width, kv_format, tokens, window)
                seen = np.minimum(tokens, window or tokens)
                pairs = tokens * seen - seen * (seen - 1) / 2
                # Some kernels mask what lies outside a window and compute it all the same.
                pair_s = 4.0 * query * width / profile.gpu.peak_flops_per_s(half)
                sane(base + rate * pairs, pair_s * pairs, pair_s * tokens**2)
            for count, rank, rope, key, value in latent:
                least = roofline(profile, half, 2.0 * count * (2 * rank + rope), (rank + rope) * float(element))
                base, rate = profile.latent_decode(count, rank, rope, kv_format, tokens)
                sane(base + rate * tokens * 1000, tokens * 1000 * least, slower=slower)
                base, rate = profile.latent_prefill(count, key, value, kv_format, tokens)
                least_s = roofline(profile, half, 2.0 * count * (key + value) * tokens * 500, 0.0)
                sane(base + rate * tokens * 500, least_s, slower=slower)
        # Of other makers' GPUs even the efficiencies are assumed.
        kinds = ("derived: ", "measured") if profile.gpu.cuda else ("assumed: ",)
        assert all(text.startswith(kinds) for text in profile.provenance.values())
        assert gpu != "v100-pcie-16gb" or not any("measured (" in text for text in profile.provenance.values())


def sane(
    time: NDArray[np.float64],
    least: NDArray[np.float64],
    usual: NDArray[np.float64] | None = None,
    slower: float = 1.0,
) -> None:
    """Nothing for nothing, else a finite time of at least the roofline and not very many times what is usual.

    `slower` is how many times as long the GPU takes as the one whose efficiencies stand for its own.
    """
    assert time[0] == 0
    assert (time[1:] > 0).all()
    assert (time[1:] >= least[1:] * (1 - 1e-9)).all()
    assert (time[1:] <= 100 * (least if usual is None else usual)[1:] + slower * 200e-6).all()


@cache
def shapes_of_all_models() -> tuple[set[Any], set[Any], set[Any], set[Any]]:
    """Products (n, k); experts; heads (query, KV, width, window); latent heads, of all models and cuts."""
    products, experts, heads, latent = set(), set(), set(), set()
    for model, tp in itertools.product(list_models(), range(1, 9)):
        products.add((-(-model.vocab // tp), model.hidden))
        cuts = Cut(heads=tp, columns=tp, expert_columns=tp), Cut(heads=tp, columns=tp, experts=tp)
        cells = {cell for run in model.runs for cell in run.block.cells}
        for op in (op for cell, cut in itertools.product(cells, cuts) for op in cell.operations(cut, 2)):
            match op:
                case Product():
                    products.add((op.n, op.k))
                case Experts():
                    experts.add((op.hidden, op.columns, op.experts, -(-op.experts // op.groups), op.topk))
                case Attend():
                    heads.add((op.heads, op.kv_heads, op.width, op.limit))
                case AttendLatent():
                    latent.add((op.heads, op.rank, op.rope, op.key, op.value))
    return products, experts, heads, latent


def test_beyond_the_measured_sizes_times_grow_with_tokens() -> None:
    many = np.geomspace(40_000, 1e7, 200).astype(np.int64)
    assert (np.diff(PROFILE.gemm_time_s("bf16", many, 5000, 6000)) > 0).all()
    assert (np.diff(PROFILE.moe_time_s("bf16", many, 5000, 3000, 16, 16, 2)) > 0).all()
    base, per_token = PROFILE.decode_attention(32, 8, 128, "bf16", [4096, 8192])
    assert base[1] == pytest.approx(2 * base[0])
    assert per_token[0] == per_token[1]


def test_no_work_takes_no_time() -> None:
    assert PROFILE.gemm_time_s("bf16", [0, 1], 64, 64)[0] == 0
    assert PROFILE.moe_time_s("bf16", [0, 1], 64, 64, 8, 8, 2)[0] == 0
    assert PROFILE.memory_time_s([0.0])[0] == 0
    for call in (
        lambda window: PROFILE.decode_attention(8, 8, 64, "bf16", [0], window),
        lambda window: PROFILE.prefill_attention(8, 8, 64, "bf16", [0], window),
        lambda window: PROFILE.latent_decode(8, 512, 64, "bf16", [0]),
        lambda window: PROFILE.latent_prefill(8, 192, 128, "bf16", [0]),
    ):
        for window in (None, 128):
            assert [float(part[0]) for part in call(window)] == [0, 0]


def test_smaller_weights_save_time_only_while_memory_is_the_limit() -> None:
    full, eight, four = (PROFILE.gemm_time_s(name, [4, 8192], 28672, 8192) for name in ("bf16", "w8a16", "w4a16"))
    assert full[0] > 1.7 * eight[0] > 1.7 * 1.5 * four[0]
    assert full[1] == eight[1] == four[1]


def test_a_format_measured_nowhere_takes_the_efficiency_of_its_kind(tmp_path: Path) -> None:
    head = "dtype,tokens,hidden,expert_ffn,experts,topk,routing,time_us\n"
    lines = [
        f"{dtype},{tokens},4096,1024,64,4,balanced,{factor * (100 + tokens)}\n"
        for dtype, factor in (("bfloat16", 1), ("float8", 2))
        for tokens in (1, 100)
    ]
    write_source(tmp_path, "one/vllm-1", {"moe": head + "".join(lines)}, "vllm")
    gpu = replace(mine("one"), flops_per_s=(*H200.flops_per_s, ("fp4", 3958e12)))
    profile, shape = load_profile(gpu, "vllm", tmp_path), (4096, 1024, 64, 64, 4)
    for name in ("nvfp4", "w8a16"):
        assert (profile.moe_time_s(name, TOKENS, *shape) > 0).all()
    assert f"derived: fp8 efficiencies, from {tmp_path}/one/vllm-1/moe.csv" in profile.provenance["moe nvfp4"]
    # No table at all has 8-bit weights in 16-bit arithmetic: 4-bit ones do the same work, those of the reference.
    assert "derived: w4a16 efficiencies, " in profile.provenance["moe w8a16"]
    assert "profiles/h200-sxm/" in profile.provenance["moe w8a16"]


def test_skewed_routing_is_read_from_skewed_tables(tmp_path: Path) -> None:
    head = "dtype,tokens,hidden,expert_ffn,experts,topk,routing,time_us\n"
    lines = [
        f"bfloat16,100,4096,1024,64,4,{name},{time}\n" for name, time in (("balanced", 500), ("power_law_1.2", 700))
    ]
    write_source(tmp_path, "one/vllm-1", {"moe": head + "".join(lines)}, "vllm")
    profile, shape = profile_of(tmp_path, "one"), (4096, 1024, 64, 64, 4)
    assert profile.moe_time_s("bf16", 100, *shape, "skewed") == pytest.approx(700e-6)
    # Tables in balance touch every expert; at random a few are missed.
    assert profile.moe_time_s("bf16", 100, *shape) == pytest.approx(500e-6, rel=0.05)


def test_a_skewed_table_of_another_shape_comes_before_a_balanced_one_of_the_shape_itself(tmp_path: Path) -> None:
    head = "dtype,tokens,hidden,expert_ffn,experts,topk,routing,time_us\n"
    balanced, skewed = "bfloat16,100,4096,1024,64,4,balanced,500\n", "bfloat16,100,4096,1536,64,4,power_law_1.2,2100\n"
    write_source(tmp_path, "one/ops", {"moe": head + balanced})
    write_source(tmp_path, "one/vllm-1", {"moe": head + skewed}, "vllm")
    profile, shape = profile_of(tmp_path, "one"), (4096, 1024, 64, 64, 4)
    assert profile.moe_time_s("bf16", 100, *shape, "skewed") == pytest.approx(1400e-6, rel=0.05)
    assert profile.provenance["moe bf16"].startswith("derived: roofline at the efficiency of the nearest shapes")
    assert "one/vllm-1/moe.csv" in profile.provenance["moe bf16"]
    uniform = profile_of(tmp_path, "one")
    assert uniform.moe_time_s("bf16", 100, *shape) == pytest.approx(500e-6, rel=0.05)
    assert uniform.provenance["moe bf16"] == f"measured ({tmp_path}/one/ops/moe.csv)"


def test_where_no_table_is_skewed_a_uniform_one_stands_in_and_is_said_to(tmp_path: Path) -> None:
    head = "dtype,tokens,hidden,expert_ffn,experts,topk,routing,time_us\n"
    write_source(tmp_path, "one/ops", {"moe": head + "bfloat16,100,4096,1024,64,4,uniform,500\n"})
    profile, shape = profile_of(tmp_path, "one"), (4096, 1024, 64, 64, 4)
    assert profile.moe_time_s("bf16", 100, *shape, "skewed") == pytest.approx(500e-6)
    assert profile.provenance["moe bf16"] == f"derived: uniform routing, from {tmp_path}/one/ops/moe.csv"
    wider = profile_of(tmp_path, "one")
    wider.moe_time_s("bf16", 100, 4096, 2048, 64, 64, 4, "skewed")
    assert "derived: uniform routing, roofline at the efficiency of" in wider.provenance["moe bf16"]


def test_expert_parallel_ranks_share_the_work() -> None:
    whole = PROFILE.moe_time_s("bf16", [512, 8192], 4096, 1536, 128, 128, 8)
    eighth = PROFILE.moe_time_s("bf16", [512, 8192], 4096, 1536, 128, 16, 8)
    sixteenth = PROFILE.moe_time_s("bf16", [512, 8192], 4096, 1536, 128, 8, 8)
    assert (eighth < whole / 3).all()
    assert (sixteenth < eighth).all()


def test_decode_attention_follows_the_heads_of_the_rank_and_the_cache_format() -> None:
    _, eight = PROFILE.decode_attention(32, 8, 128, "bf16", 64)
    base_one, one = PROFILE.decode_attention(4, 1, 128, "bf16", 8)
    base_eight, same = PROFILE.decode_attention(32, 8, 128, "bf16", 1)
    assert one < same / 4
    assert base_one == pytest.approx(base_eight, rel=0.5)
    a100 = load_profile(GPUS["a100-sxm-80gb"])
    _, narrow = a100.decode_attention(32, 8, 128, "fp8", 64)
    assert narrow == pytest.approx(a100.decode_attention(32, 8, 128, "bf16", 64)[1] / 2)
    assert "bf16 cache, from profiles/a100-sxm/vllm-0.14.0" in a100.provenance["attention decode"]
    # A head that no table has takes its neighbour's share of the bandwidth.
    _, odd = PROFILE.decode_attention(32, 8, 120, "bf16", 64)
    assert odd == pytest.approx(eight * 120 / 128, rel=1e-9)


def test_a_window_takes_what_was_measured_of_it_and_that_of_the_whole_context_where_nothing_was() -> None:
    base, rate = PROFILE.decode_attention(64, 8, 64, "bf16", [64], 128)
    whole = PROFILE.decode_attention(64, 8, 64, "bf16", [64])
    shape = {"dtype": "bf16", "heads": 64, "kv_heads": 8, "head_dim": 64, "window": 128, "batch": 64}
    filled = [
        row["time_us"] for row in rows("h200-sxm/vllm-0.24.0", "attention_decode", **shape) if row["context"] >= 256
    ]
    assert base[0] + rate[0] * 64 * 128 == pytest.approx(np.median(filled) * 1e-6)
    assert (PROFILE.decode_attention(64, 8, 64, "bf16", [64], 4096)[1] == whole[1]).all()
    prompt, pair = PROFILE.prefill_attention(64, 8, 64, "bf16", [8192], 128)
    all_of_it, per_pair = PROFILE.prefill_attention(64, 8, 64, "bf16", [8192])
    within = 8192 * 128 - 128 * 127 / 2
    assert prompt[0] + pair[0] * within < 0.4 * (all_of_it[0] + per_pair[0] * 8192 * 8193 / 2)


@pytest.mark.parametrize(
    ("gpu", "length", "low", "high"),
    [("h200-sxm-141gb", 1024, 0.3, 0.7), ("h200-sxm-141gb", 16384, 0.6, 0.9), ("a100-sxm-80gb", 16384, 0.45, 0.7)],
)
def test_whole_prompts_reach_the_share_of_peak_that_published_kernels_do(
    gpu: str, length: int, low: float, high: float
) -> None:
    profile = load_profile(GPUS[gpu])
    base, per_pair = profile.prefill_attention(32, 8, 128, "bf16", np.array([length]))
    pairs = length * (length + 1) / 2
    share = 4 * 32 * 128 * pairs / float(base[0] + per_pair[0] * pairs) / profile.gpu.peak_flops_per_s("bf16")
    assert low < share < high


def test_latent_attention_of_an_engine_without_tables_takes_the_faster_of_the_others() -> None:
    """vLLM's kernels of latent attention were not measured alone; on Hopper SGLang's prefill is three times slower."""
    sglang, trtllm, vllm = (
        load_profile(H200, engine).latent_prefill(128, 192, 128, "bf16", [8192])
        for engine in ("sglang", "trtllm", "vllm")
    )
    assert vllm[1] == trtllm[1] < sglang[1] / 2


def test_latent_decode_is_limited_by_arithmetic_where_many_heads_read_one_vector() -> None:
    half = H200.peak_flops_per_s("bf16")
    _, few = PROFILE.latent_decode(1, 512, 64, "bf16", [64])
    _, many = PROFILE.latent_decode(2048, 512, 64, "bf16", [64])
    assert few[0] >= 576 * 2 / H200.memory_bytes_per_s
    assert many[0] >= 2 * 2048 * (2 * 512 + 64) / half
    assert many[0] > 4 * few[0]


@pytest.mark.parametrize(
    ("gpu", "name"), [("a100-sxm-80gb", "fp8"), ("v100-pcie-16gb", "fp8"), ("h200-sxm-141gb", "nvfp4")]
)
def test_formats_without_hardware_are_refused_naming_gpu_and_format(gpu: str, name: str) -> None:
    profile = load_profile(GPUS[gpu])
    for call in (
        lambda: profile.gemm_time_s(name, 1, 64, 64),
        lambda: profile.moe_time_s(name, 1, 64, 64, 8, 8, 2),
    ):
        with pytest.raises(UsageError, match=f"{gpu} does not compute in {FORMATS[name].activation}"):
            call()


@pytest.mark.parametrize(
    "values", [[-1], [float("nan")], [float("inf")], [True], ["8"], [10**400], [[1], [1, 2]], [2.0**60], None]
)
def test_bad_sizes_are_refused(values: Any) -> None:
    for call in (
        lambda: PROFILE.gemm_time_s("bf16", values, 64, 64),
        lambda: PROFILE.moe_time_s("bf16", values, 64, 64, 8, 8, 2),
        lambda: PROFILE.memory_time_s(values),
        lambda: PROFILE.decode_attention(8, 8, 64, "bf16", values),
        lambda: PROFILE.prefill_attention(8, 8, 64, "bf16", values),
        lambda: PROFILE.latent_decode(8, 512, 64, "bf16", values),
        lambda: PROFILE.latent_prefill(8, 192, 128, "bf16", values),
    ):
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, 2**40, pytest.param(10**5000, id="huge"), "64", None])
def test_bad_shapes_are_refused(bad: Any) -> None:
    for call in (
        lambda: PROFILE.gemm_time_s("bf16", 1, bad, 64),
        lambda: PROFILE.gemm_time_s("bf16", 1, 64, bad),
        lambda: PROFILE.moe_time_s("bf16", 1, bad, 64, 8, 8, 2),
        lambda: PROFILE.moe_time_s("bf16", 1, 64, 64, bad, 8, 2),
        lambda: PROFILE.moe_time_s("bf16", 1, 64, 64, 8, bad, 2),
        lambda: PROFILE.decode_attention(bad, 8, 64, "bf16", 1),
        lambda: PROFILE.prefill_attention(8, 8, bad, "bf16", 1),
        lambda: PROFILE.latent_decode(8, bad, 64, "bf16", 1),
        lambda: PROFILE.latent_prefill(8, 192, bad, "bf16", 1),
    ):
        with pytest.raises(UsageError, match="must be a whole number from 1"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PROFILE.moe_time_s("bf16", 1, 64, 64, 8, 9, 2), "held = 9 must be at most the 8 experts"),
        (lambda: PROFILE.moe_time_s("bf16", 1, 64, 64, 8, 8, 9), "topk = 9 must be at most the 8 experts"),
        (lambda: PROFILE.moe_time_s("bf16", 1, 64, 64, 8, 8, 2, "even"), "unknown routing 'even'"),
        (lambda: PROFILE.memory_time_s(1.0, "norms"), "unknown kind of memory kernel 'norms'; did you mean norm"),
        (lambda: PROFILE.decode_attention(8, 8, 64, "int8", 1), "unknown KV format 'int8'"),
        (lambda: PROFILE.gemm_time_s("int3", 1, 64, 64), "unknown number format 'int3'"),
        (lambda: PROFILE.decode_attention(8, 8, 64, "bf16", 1, 0), "window = 0 must be a whole number from 1"),
        (lambda: load_profile(H200, "tgi"), "unknown engine of kernel tables 'tgi'"),
    ],
)
def test_names_and_counts_that_do_not_exist_are_refused_in_one_line(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((UsageError, UnknownNameError)) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_profile_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown profile of h200-sxm-141gb 'h200-sxn'; did you mean h200-sxm"):
        load_profile(replace(H200, profile="h200-sxn"))
    with pytest.raises(UnknownNameError, match="leave it out"):
        load_profile(mine("one"), profiles=tmp_path)


def test_a_faulty_table_is_refused_when_it_is_first_needed(tmp_path: Path) -> None:
    write_source(tmp_path, "one/ops", {"gemm": GEMM + "bfloat16,1,1,1,0\n"})
    profile = load_profile(mine("one"), profiles=tmp_path)
    assert profile.memory_time_s(1e6) > 0
    with pytest.raises(InputError, match="line 2: time_us = '0'"):
        profile.gemm_time_s("bf16", 1, 64, 64)
