"""The power model: recovers a known law, explains the measured energies, scales to other boards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from energy_cases import energies
from hypothesis import given
from hypothesis import strategies as st
from profile_cases import H200, ROOT

from apex_opt.cluster import list_gpus, load_cluster
from apex_opt.errors import UsageError
from apex_opt.profiles import load_profile
from apex_opt.profiles.laws import load_source
from apex_opt.profiles.power import SHORT_DRAW, PowerFit, fit_power, scale_power

WORK = np.array([6e14, 1.2e15, 4e12])
"""What a GPU gets done in a second, about: 16-bit FLOP, narrow FLOP, bytes."""


@given(
    st.floats(0, 200),
    st.tuples(st.floats(0, 2e-12), st.floats(0, 1e-12), st.floats(0, 2e-10)),
    st.integers(0, 2**31),
)
def test_a_known_law_is_recovered_and_never_below_zero(
    active: float, joules: tuple[float, float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    time = rng.uniform(1e-5, 1e-3, 200)
    work = rng.uniform(0, 1, (200, 3)) * time[:, None] * WORK
    energy = (100 + active) * time + work @ np.array(joules)
    fit, errors = fit_power(time, work, energy, 100.0, 1e5)
    assert np.abs(errors).max() < 1e-6
    assert fit.active_w == pytest.approx(active, abs=1e-3)
    found = (fit.joule_per_flop_half, fit.joule_per_flop_narrow, fit.joule_per_byte)
    assert np.array(found) * WORK == pytest.approx(np.array(joules) * WORK, abs=1e-3)
    assert min(*found, fit.active_w) >= 0


def test_a_coefficient_that_noise_would_make_negative_is_zero() -> None:
    rng = np.random.default_rng(3)
    time = np.full(100, 1e-4)
    work = rng.uniform(0, 1, (100, 3)) * time[:, None] * WORK
    energy = 300 * time - 0.2 * work[:, 2] * 50 / WORK[2]
    fit, _ = fit_power(time, work, energy, 100.0, 1e5)
    assert fit.joule_per_byte == 0
    assert fit.active_w == pytest.approx(195, rel=0.03)


def test_samples_at_the_limit_do_not_pull_the_coefficients_down() -> None:
    rng = np.random.default_rng(2)
    time = np.full(300, 1e-4)
    work = np.zeros((300, 3))
    work[:, 0] = rng.uniform(0, 9e14, 300) * time
    free = 100 * time + 1e-12 * work[:, 0]
    fit, errors = fit_power(time, work, np.minimum(free, 700 * time), 100.0, 700.0)
    assert fit.joule_per_flop_half == pytest.approx(1e-12, rel=0.01)
    assert np.abs(errors).max() < 0.02


@pytest.mark.parametrize(
    ("folder", "kinds", "samples", "median"),
    [
        ("h200-sxm/ops", ("gemm", "moe", "memory", "attention_decode"), 111, 0.09),
        ("b200-sxm/vllm-0.22.0-power", ("moe",), 2000, 0.25),
        ("b200-sxm/vllm-0.22.0-power", ("attention_decode", "attention_prefill"), 4000, 0.4),
    ],
)
def test_shipped_coefficients_explain_measured_energies_about_as_well_as_the_best(
    folder: str, kinds: tuple[str, ...], samples: int, median: float
) -> None:
    source = load_source(ROOT / folder)
    card = source.card
    assert card.power is not None
    time, work, energy = energies(source, kinds)
    assert len(energy) == samples
    _, best = fit_power(time, work, energy, card.idle_w, card.tdp_w)
    joules = np.array([card.power.joule_per_flop_half, card.power.joule_per_flop_narrow, card.power.joule_per_byte])
    model = np.minimum((card.idle_w + card.power.active_w) * time + work @ joules, card.tdp_w * time)
    errors = model / np.minimum(energy, card.tdp_w * time) - 1
    assert np.median(np.abs(errors)) < median
    assert np.median(np.abs(errors)) < np.median(np.abs(best)) + 0.05


def test_noise_does_not_make_the_fit_too_low() -> None:
    rng = np.random.default_rng(5)
    time = rng.uniform(1e-5, 1e-3, 2000)
    work = rng.uniform(0, 1, (2000, 3)) * time[:, None] * WORK
    energy = (100 + 50) * time + work @ np.array([3e-13, 2e-13, 5e-11])
    _, errors = fit_power(time, work, energy * np.exp(rng.normal(0, 0.4, 2000)), 100.0, 1e5)
    assert abs(np.median(errors)) < 0.03


def test_a_kernel_that_waits_for_others_draws_more_than_rest_and_less_than_the_limit() -> None:
    for name in list_gpus():
        power = load_profile(load_cluster(name).gpu).power
        assert max(power.active_w, 0.1 * power.limit_w) <= power.spin_w < power.limit_w - power.idle_w


def test_prompt_attention_of_b200_which_was_not_fitted_comes_out_in_the_middle() -> None:
    source = load_source(ROOT / "b200-sxm/vllm-0.22.0-power")
    power = source.card.power
    assert power is not None
    time, work, energy = energies(source, ("attention_prefill",))
    told = power.joules(time, work, source.card.idle_w, source.card.tdp_w) / np.minimum(energy, 1000 * time) - 1
    assert abs(np.median(told)) < 0.1


def test_power_lies_between_idle_and_limit_on_every_accelerator() -> None:
    for name in list_gpus():
        gpu = load_cluster(name).gpu
        power = load_profile(gpu).power
        half = gpu.half_dtype
        assert set(power.joule_per_flop) == {dtype for dtype, _ in gpu.flops_per_s}
        assert all(joule > 0 for joule in power.joule_per_flop.values())
        full = power.energy_j(1.0, gpu.peak_flops_per_s(half), gpu.memory_bytes_per_s, half)
        assert 0.8 * gpu.tdp_w < full <= SHORT_DRAW * gpu.tdp_w
        rest = power.energy_j(np.array([1.0, 2.0]), 0.0, 0.0, half)
        assert rest[0] == pytest.approx(power.idle_w + power.active_w)
        assert rest[1] == 2 * rest[0]
        assert gpu.idle_w <= rest[0] < gpu.tdp_w / 2
        measured = name in ("h200-sxm-141gb", "b200-sxm-180gb")
        assert power.provenance.startswith("measured: fitted on" if measured else "derived: scaled by power limit")


def test_equal_shares_of_peak_draw_equal_shares_of_the_limit() -> None:
    gpu = load_cluster("h100-sxm").gpu
    shares = []
    for board in (H200, gpu, replace(gpu, tdp_w=350.0)):
        power = load_profile(replace(board, profile=None)).power
        draw = power.energy_j(1.0, 0.3 * board.peak_flops_per_s("fp8"), 0.2 * board.memory_bytes_per_s, "fp8")
        shares.append((draw - board.idle_w) / board.tdp_w)
    assert shares == pytest.approx([shares[0]] * 3)


def test_formats_the_fit_does_not_know_draw_the_share_of_one_it_knows() -> None:
    fit = PowerFit(active_w=10.0, joule_per_flop_half=1e-12, joule_per_flop_narrow=0.0, joule_per_byte=1e-10)
    figures = (700.0, 4.8e12, dict(H200.flops_per_s))
    blackwell = load_cluster("b200-sxm").gpu
    power = scale_power(fit, figures, blackwell, "told")
    draw = [joule * blackwell.peak_flops_per_s(dtype) for dtype, joule in power.joule_per_flop.items()]
    assert draw == pytest.approx([1e-12 * 989e12 * 1000 / 700] * len(draw))
    narrow = scale_power(replace(fit, joule_per_flop_narrow=5e-13), figures, blackwell, "told")
    assert narrow.joule_per_flop["fp4"] * 9e15 == pytest.approx(narrow.joule_per_flop["fp8"] * 4.5e15)
    assert narrow.provenance == "told"


def test_a_board_of_another_limit_is_not_called_measured() -> None:
    assert load_profile(H200).power.provenance.startswith("measured: ")
    capped = load_profile(replace(H200, tdp_w=500.0)).power
    assert capped.provenance.startswith("derived: scaled by power limit and peaks from h200-sxm-141gb: ")
    assert capped.limit_w == 500


def test_energy_in_a_format_the_board_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="no energy per FLOP in fp8: the model has bf16, fp16"):
        load_profile(load_cluster("a100").gpu).power.energy_j(1.0, 1.0, 1.0, "fp8")
