"""Laws laid over tables: planted ones are recovered, shipped ones stay near their own rows, odd tables degrade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from profile_cases import ROOT, read_source, write_source

from apex_opt.errors import InputError
from apex_opt.ir.formats import KV_BYTES
from apex_opt.profiles import laws, physics
from apex_opt.profiles.laws import Source, load_source
from apex_opt.profiles.shapes import gemm_feature

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

BANDWIDTH, PEAK = 4.8e12, 989e12
DECODE = "dtype,heads,kv_heads,head_dim,window,batch,context,time_us\n"
PREFILL = "dtype,heads,kv_heads,head_dim,window,batch,length,time_us\n"
KERNELS = "op,bytes,time_us\n"


def source(root: Path, **tables: str) -> Source:
    return read_source(write_source(root, "mine/one", tables))


def decode_row(batch: int, context: int, seconds: float, window: int = 0) -> str:
    return f"bfloat16,32,8,128,{window},{batch},{context},{seconds * 1e6:.9g}\n"


def test_small_weights_are_read_no_faster_than_those_no_cache_holds(tmp_path: Path) -> None:
    def row(n: int, share: float) -> str:
        return f"bfloat16,1,{n},4096,{n * 4096 * 2 / BANDWIDTH / share * 1e6:.9g}\n"

    surface = source(tmp_path, gemm="dtype,m,n,k,time_us\n" + row(65536, 0.8) + row(1024, 2.5) + row(2048, 0.4)).gemm(
        "bf16"
    )
    assert surface is not None
    share = {}
    for n in (1024, 2048, 65536):
        bound = float(physics.gemm_work(1, n, 4096, 2.0, 2.0)[1]) / BANDWIDTH
        floor = laws.GEMM_FLOOR_S + laws.GEMM_FLOOR_S_PER_DEPTH * 4096
        share[n] = bound / ((floor + bound) / float(surface.ratio(gemm_feature(n, 4096), np.zeros(1))[0]))
    assert share == pytest.approx({1024: 0.8, 2048: 0.4, 65536: 0.8}, rel=0.01)


def test_a_planted_decode_law_is_recovered(tmp_path: Path) -> None:
    per_token = 2 * 8 * 128 * 2 / BANDWIDTH
    plan = {1: (8e-6, 0.5), 16: (12e-6, 0.7), 64: (30e-6, 0.9)}
    rows = [
        decode_row(batch, context, base + batch * context * per_token / share)
        for batch, (base, share) in plan.items()
        for context in (64, 512, 4096, 32768)
    ]
    law = source(tmp_path, attention_decode=DECODE + "".join(rows)).decode("attention_decode", "bf16", 0, 0)
    assert law.fitted
    assert np.exp(law.units_log) == pytest.approx([8, 128, 512])
    assert law.base_s == pytest.approx([8e-6, 12e-6, 30e-6], rel=1e-3)
    assert law.share == pytest.approx([0.5, 0.7, 0.9], rel=1e-3)


def test_contexts_read_from_a_cache_do_not_make_the_law_faster(tmp_path: Path) -> None:
    """A cache of 100 MB serves repeated calls at four times the memory's rate; steps of a model find it full."""
    per_token = 2 * 8 * 128 * 2 / BANDWIDTH
    rows = ""
    for batch in (1, 4, 16, 64):
        for context in (64, 256, 1024, 4096, 16384):
            total = batch * context
            share = 4.0 if total * 4096 < 100e6 else 0.8
            rows += decode_row(batch, context, 3e-6 + total * per_token / share)
    law = source(tmp_path, attention_decode=DECODE + rows).decode("attention_decode", "bf16", 0, 0)
    assert law.share == pytest.approx([0.8] * 4, rel=0.02)
    assert law.base_s == pytest.approx([3e-6] * 4, rel=0.5)


@pytest.mark.parametrize(
    "times_us",
    [
        {(1, 128): 9.0, (1, 4096): 5.0, (8, 128): 9.0, (8, 4096): 8.9},
        {(1, 128): 9.0, (8, 128): 10.0, (64, 128): 30.0},
        {(4, 2): 9.0},
    ],
    ids=["falling", "one context per batch", "one row"],
)
def test_tables_that_do_not_tell_the_rate_leave_the_roofline(
    tmp_path: Path, times_us: dict[tuple[int, int], float]
) -> None:
    rows = "".join(decode_row(*key, time * 1e-6) for key, time in times_us.items())
    law = source(tmp_path, attention_decode=DECODE + rows).decode("attention_decode", "bf16", 0, 0)
    assert not law.fitted
    assert (law.share == 1).all()
    assert (np.diff(law.base_s) >= 0).all()
    assert (law.base_s > 0).all()
    assert (law.base_s <= 30e-6).all()


def test_a_batch_with_one_context_takes_the_rate_of_its_neighbours(tmp_path: Path) -> None:
    per_token = 2 * 8 * 128 * 2 / BANDWIDTH
    rows = [decode_row(batch, c, 10e-6 + batch * c * per_token / 0.8) for batch in (1, 64) for c in (128, 1024, 8192)]
    rows.append(decode_row(8, 1024, 12e-6 + 8 * 1024 * per_token / 0.8))
    law = source(tmp_path, attention_decode=DECODE + "".join(rows)).decode("attention_decode", "bf16", 0, 0)
    assert law.share == pytest.approx([0.8, 0.8, 0.8], rel=1e-3)
    assert law.base_s[1] == pytest.approx(12e-6, rel=1e-3)


def test_a_window_is_read_once_it_is_full(tmp_path: Path) -> None:
    per_token = 2 * 8 * 128 * 2 / BANDWIDTH
    rows = [
        decode_row(batch, context, 5e-6 + batch * min(context, 128) * per_token / 0.5, 128)
        for batch in (1, 32, 256, 1024)
        for context in (16, 128, 1024, 16384)
    ]
    law = source(tmp_path, attention_decode=DECODE + "".join(rows)).decode("attention_decode", "bf16", 128, 0)
    assert law.base_s == pytest.approx([5e-6] * 4, rel=0.05)
    assert law.share[1:] == pytest.approx([0.5] * 3, rel=0.1)


def test_a_planted_prefill_law_is_recovered(tmp_path: Path) -> None:
    lengths = np.array([16, 256, 1024, 4096, 16384])
    pairs = lengths * (lengths + 1) / 2
    seconds = 6e-6 + 4 * 32 * 128 * pairs / (0.6 * PEAK)
    rows = "".join(f"bfloat16,32,8,128,0,1,{n},{s * 1e6:.9g}\n" for n, s in zip(lengths, seconds, strict=True))
    law = source(tmp_path, attention_prefill=PREFILL + rows).prefill("attention_prefill", "bf16", 0, 0)
    assert law.fitted
    assert law.share == pytest.approx(0.6, rel=0.01)
    assert law.extra * 4 * 32 * 128 / PEAK == pytest.approx(np.zeros(5), abs=2e-6)


@pytest.mark.parametrize("length", [8, 4096])
def test_one_prompt_is_enough_for_a_law(tmp_path: Path, length: int) -> None:
    rows = f"bfloat16,32,8,128,0,2,{length},500\n"
    law = source(tmp_path, attention_prefill=PREFILL + rows).prefill("attention_prefill", "bf16", 0, 0)
    assert law.fitted == (length == 4096)
    assert 0 < law.share <= 1
    assert np.isfinite(law.extra).all()


def whole(found: Source, kind: str, dtype: str, window: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """Context or length and relative error of every row of a table that the memory and not a cache served."""
    table, shapes = found.table(kind), found.shapes(kind, dtype, window)
    assert shapes is not None
    sizes, errors = [], []
    for index, rows in enumerate(shapes.rows):
        heads, kv_heads, width = (int(size) for size in shapes.shapes[index])
        seconds, batch = table["time_us"][rows] * 1e-6, table["batch"][rows]
        if kind.endswith("decode"):
            decode = found.decode(kind, dtype, window, index)
            work = physics.latent_work(heads, 512, 64, KV_BYTES[dtype])
            if not kind.startswith("mla"):
                work = physics.context_work(heads, kv_heads, width, KV_BYTES[dtype])
            size = table["context"][rows]
            least = batch * size * float(found.bound_s(physics.Arithmetic.of("bf16"), *work))
            units_log = np.log(batch * kv_heads)
            guess = np.interp(units_log, decode.units_log, decode.base_s)
            guess += least / np.interp(units_log, decode.units_log, decode.share)
            share = least / seconds
            cached = (least * BANDWIDTH)[(share > 1.1) & (least * found.card.memory_bytes_per_s < 2**28)]
            sound = (share < 1.1) & ((least * BANDWIDTH > cached.max(initial=0.0)) | (share < 0.2))
            kept = sound & (size >= 64) & (size <= 40_000)
        else:
            prefill = found.prefill(kind, dtype, window, index)
            flops = heads * (640.0 if kind.startswith("mla") else 4.0 * width)
            size = table["length"][rows]
            pairs = size * (size + 1) / 2
            extra = np.interp(np.log(size), prefill.length_log, prefill.extra) + pairs / prefill.share
            peak = float(found.bound_s(physics.Arithmetic.of("bf16"), 1.0, 0.0))
            single = np.flatnonzero(batch == 1)
            guess = extra * flops * peak + seconds[single[size[single].argmin()]]
            kept = (batch == 1) & (size > 64)
        sizes.append(size[kept])
        errors.append((guess / seconds - 1)[kept])
    return np.concatenate(sizes), np.concatenate(errors)


@pytest.mark.parametrize(
    ("folder", "kind", "dtype", "median", "ninety"),
    [
        ("h200-sxm/ops", "attention_decode", "bf16", 0.05, 0.13),
        ("h200-sxm/vllm-0.24.0", "attention_decode", "bf16", 0.04, 0.11),
        ("h200-sxm/vllm-0.24.0", "attention_decode", "fp8", 0.03, 0.10),
        ("h100-sxm/sglang-0.5.14", "attention_decode", "bf16", 0.07, 0.22),
        ("h200-sxm/trtllm-1.3.0rc20", "attention_decode", "bf16", 0.10, 0.28),
        ("b200-sxm/vllm-0.24.0", "attention_decode", "fp8", 0.06, 0.17),
        ("gb200/trtllm-1.3.0rc20", "attention_decode", "fp8", 0.06, 0.18),
        ("l40s/vllm-0.24.0", "attention_decode", "bf16", 0.04, 0.16),
        ("a100-sxm/vllm-0.14.0", "attention_decode", "bf16", 0.05, 0.17),
        ("h200-sxm/sglang-0.5.14", "mla_kernel_decode", "bf16", 0.06, 0.18),
        ("b300-sxm/trtllm-1.3.0rc20", "mla_kernel_decode", "fp8", 0.07, 0.25),
        ("h200-sxm/vllm-0.24.0", "attention_prefill", "bf16", 1e-9, 1e-9),
        ("b200-sxm/trtllm-1.3.0rc20", "attention_prefill", "fp8", 1e-9, 0.01),
        ("l40s/sglang-0.5.14", "attention_prefill", "bf16", 1e-9, 1e-9),
        ("h100-sxm/trtllm-1.3.0rc20", "mla_kernel_prefill", "bf16", 1e-9, 1e-9),
    ],
)
def test_attention_laws_stay_near_the_tables_they_are_of(
    folder: str, kind: str, dtype: str, median: float, ninety: float
) -> None:
    _, errors = whole(load_source(ROOT / folder), kind, dtype)
    assert len(errors) >= 30
    assert np.median(np.abs(errors)) < median
    assert np.percentile(np.abs(errors), 90) < ninety


def test_every_shipped_attention_law_is_finite_above_the_roofline_and_rises_with_the_batch() -> None:
    for folder in sorted(path.parent for path in ROOT.glob("*/*/card.toml")):
        found = load_source(folder)
        for kind in ("attention_decode", "attention_prefill", "mla_kernel_decode", "mla_kernel_prefill"):
            if not found.has(kind):
                continue
            table = found.table(kind)
            windows = sorted(set(table.get("window", np.zeros(1)).tolist()))
            for dtype, window in ((dtype, int(size)) for dtype in sorted(set(table["dtype"])) for size in windows):
                shapes = found.shapes(kind, dtype, window)
                for index in range(0 if shapes is None else len(shapes.rows)):
                    if kind.endswith("decode"):
                        law = found.decode(kind, dtype, window, index)
                        assert (law.base_s > 0).all()
                        assert (np.diff(law.base_s) >= 0).all()
                        assert ((law.share > 0) & (law.share <= 1)).all()
                        assert (np.diff(law.units_log) > 0).all()
                    else:
                        prompt = found.prefill(kind, dtype, window, index)
                        assert 0 < prompt.share <= 1
                        assert np.isfinite(prompt.extra).all()
                        assert (prompt.extra >= 0).all()


def memory_table(**changes: str) -> str:
    rows = {
        "copy": "copy,1000,1\n",
        "norm": "add_rms_norm_4096,1000,2.25\nadd_rms_norm_8192,1000,2.75\n",
        "activation": "silu_and_mul_16384,1000,3\n",
        "large": f"add_rms_norm_4096,{2**28},{2**28 / (0.8 * BANDWIDTH) * 1e6 + 1}\n",
    } | changes
    return KERNELS + "".join(rows.values())


def test_element_wise_kernels_have_a_floor_that_grows_with_their_width(tmp_path: Path) -> None:
    law = source(tmp_path, memory=memory_table()).memory()
    assert law.floors["plain"] == pytest.approx((1e-6, 0.0))
    assert law.floors["norm"] == pytest.approx((1.75e-6, 0.5e-6 / 4096))
    assert law.floors["activation"] == pytest.approx((3e-6, 0.0))
    assert law.efficiency == pytest.approx(0.8)


def test_floors_never_fall_with_the_width_nor_below_zero(tmp_path: Path) -> None:
    falling = "add_rms_norm_4096,1000,2.75\nadd_rms_norm_8192,1000,2.25\n"
    steep = "silu_and_mul_1000,1000,1\nsilu_and_mul_9000,1000,100\n"
    law = source(tmp_path, memory=memory_table(norm=falling, activation=steep)).memory()
    assert law.floors["norm"] == pytest.approx((2.5e-6, 0.0))
    assert min(law.floors["activation"]) >= 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copy": "copy_fast,1000,1\n"}, "a row of copy of at most 1 MiB"),
        ({"activation": "silu_and_mul_large,1000,3\n"}, "a row of silu_and_mul of at most 1 MiB"),
        ({"large": ""}, "a row of at least 128 MiB"),
    ],
)
def test_a_memory_table_without_the_rows_of_its_law_is_refused(
    tmp_path: Path, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        source(tmp_path, memory=memory_table(**changes)).memory()
    assert "\n" not in str(caught.value)


def test_rows_in_a_format_the_card_has_no_peak_for_are_refused(tmp_path: Path) -> None:
    found = source(tmp_path, gemm="dtype,m,n,k,time_us\nnvfp4,1,64,64,5\n")
    assert found.gemm("bf16") is None
    with pytest.raises(InputError, match=r"gemm\.csv has rows in nvfp4, the card no fp4 peak"):
        found.gemm("nvfp4")


def test_tables_are_read_when_asked_for_and_samples_of_energies_serve_no_look_up(tmp_path: Path) -> None:
    folder = write_source(tmp_path, "mine/one", {"gemm": "not a table"})
    found = read_source(folder)
    assert found.has("gemm")
    assert not found.has("moe")
    with pytest.raises(InputError, match=r"gemm\.csv"):
        found.gemm("bf16")
    card = folder / "card.toml"
    card.write_text('use = "energies"\n' + card.read_text())
    assert not read_source(folder).has("gemm")
