"""The power model: recovers a known law, fits the measured energies, scales to other boards."""

from __future__ import annotations

import numpy as np
import pytest

from apex_opt.cluster import load_cluster
from apex_opt.errors import UsageError
from apex_opt.profiles import load_profile
from apex_opt.profiles.laws import load_tables
from apex_opt.profiles.power import fit_power
from apex_opt.units import DATA_ROOT


def test_a_known_law_is_recovered_and_never_below_zero() -> None:
    rng = np.random.default_rng(1)
    time = rng.uniform(1e-5, 1e-3, 200)
    work = rng.uniform(0, 1, (200, 3)) * time[:, None] * np.array([6e14, 1.2e15, 4e12])
    truth = np.array([30.0, 4e-13, 0.0, 6e-11])
    energy = 100 * time + truth[0] * time + work @ truth[1:]
    fit = fit_power(time, work, energy, 100.0, 1e4)
    found = (fit.active_w, fit.joule_per_flop_half, fit.joule_per_flop_fp8, fit.joule_per_byte)
    assert found == pytest.approx(truth, rel=1e-6, abs=1e-18)
    assert np.abs(fit.errors).max() < 1e-6


def test_samples_at_the_limit_do_not_pull_the_coefficients_down() -> None:
    rng = np.random.default_rng(2)
    time = np.full(300, 1e-4)
    work = np.zeros((300, 3))
    work[:, 0] = rng.uniform(0, 9e14, 300) * time
    free = 100 * time + 1e-12 * work[:, 0]
    fit = fit_power(time, work, np.minimum(free, 700 * time), 100.0, 700.0)
    assert fit.joule_per_flop_half == pytest.approx(1e-12, rel=0.01)


def test_the_fit_on_measured_energies_is_within_nine_percent_in_the_median() -> None:
    fit = load_tables(DATA_ROOT / "profiles" / "h200-sxm").power
    assert fit is not None
    errors = np.abs(fit.errors)
    assert len(errors) == 111
    assert np.median(errors) < 0.09
    assert np.percentile(errors, 95) < 0.24


def test_power_lies_between_idle_and_limit_on_every_accelerator() -> None:
    for name in ("h200-sxm", "h100-sxm", "b200-sxm", "a100-sxm", "l40s", "v100"):
        gpu = load_cluster(name).gpu
        power = load_profile(gpu).power
        assert set(power.joule_per_flop) == {dtype for dtype, _ in gpu.flops_per_s}
        full = power.energy_j(1.0, gpu.peak_flops_per_s("fp16"), gpu.memory_bytes_per_s, "fp16")
        assert full == pytest.approx(gpu.tdp_w)
        rest = power.energy_j(np.array([1.0, 2.0]), 0.0, 0.0, "fp16")
        assert rest[0] == pytest.approx(power.idle_w + power.active_w)
        assert gpu.idle_w < rest[0] < gpu.tdp_w / 2
        assert ("measured" in power.provenance) == (name == "h200-sxm")


def test_equal_shares_of_peak_draw_equal_shares_of_the_limit() -> None:
    shares = []
    for name in ("h200-sxm", "b200-sxm"):
        gpu = load_cluster(name).gpu
        power = load_profile(gpu).power
        draw = power.energy_j(1.0, 0.3 * gpu.peak_flops_per_s("fp8"), 0.2 * gpu.memory_bytes_per_s, "fp8")
        shares.append((draw - gpu.idle_w) / gpu.tdp_w)
    assert shares[0] == pytest.approx(shares[1])


def test_energy_in_a_format_the_board_lacks_is_refused() -> None:
    with pytest.raises(UsageError, match="no energy per FLOP in fp8: the model has bf16, fp16"):
        load_profile(load_cluster("a100").gpu).power.energy_j(1.0, 1.0, 1.0, "fp8")
