"""Clocks: the highest changes nothing, lower ones slow arithmetic alone and save its energy, others are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_cases import OVERHEAD, SMALL, dense, make_cluster, make_model
from profile_cases import H200

from apex_opt.cluster import list_gpus, load_cluster
from apex_opt.cost import CostModel
from apex_opt.errors import UsageError
from apex_opt.plans.plan import parse_plan
from apex_opt.profiles import Profile, load_profile
from apex_opt.profiles.clock import MEMORY_JOULE_PER_BYTE, SLOWEST, Clock

HIGHEST = 1980
HALF = 990
PROFILE = load_profile(H200)
SHARES = st.floats(SLOWEST, 1.0)


def at(clock_mhz: int | None) -> Profile:
    return load_profile(H200, clock_mhz=clock_mhz)


def test_at_the_highest_clock_nothing_changes_bit_for_bit() -> None:
    same = at(HIGHEST)
    assert same.power == PROFILE.power
    for profile in (same, PROFILE):
        profile.gemm_time_s("bf16", 1, 1, 1)
    rows = np.arange(0, 9000, 37)
    assert np.array_equal(same.gemm_time_s("fp8", rows, 4096, 4096), PROFILE.gemm_time_s("fp8", rows, 4096, 4096))
    assert np.array_equal(same.memory_time_s(rows * 8192), PROFILE.memory_time_s(rows * 8192))
    shape = (4096, 1024, 64, 64, 4)
    assert np.array_equal(same.moe_time_s("bf16", rows, *shape), PROFILE.moe_time_s("bf16", rows, *shape))
    for which in ("decode_attention", "prefill_attention"):
        one, other = (getattr(profile, which)(32, 8, 128, "bf16", rows) for profile in (same, PROFILE))
        assert np.array_equal(one, other), which


def test_a_plan_at_the_highest_clock_has_the_laws_of_a_plan_without_one() -> None:
    model, cluster = make_model((dense(), 4)), load_cluster("2xh200-sxm")
    costs = CostModel(model, cluster, SMALL, OVERHEAD)
    plain, clocked = (costs.plan_cost(parse_plan(text, model)).laws[0] for text in ("tp2", f"tp2 clock={HIGHEST}"))
    for name in ("decode_ns", "mixed_ns", "context_rate", "pair_rate", "chunk_ns"):
        assert np.array_equal(getattr(plain, name), getattr(clocked, name)), name


def test_a_cost_model_at_a_clock_holds_plans_that_name_none_at_it() -> None:
    model, cluster = make_model((dense(), 4)), load_cluster("h200-sxm")
    plan = parse_plan("tp1", model)
    slow = CostModel(model, cluster, SMALL, OVERHEAD, clock_mhz=HALF).plan_cost(plan).laws[0]
    named = CostModel(model, cluster, SMALL, OVERHEAD).plan_cost(replace(plan, clock_mhz=HALF)).laws[0]
    assert np.array_equal(slow.mixed_ns, named.mixed_ns)
    assert (slow.mixed_ns > CostModel(model, cluster, SMALL, OVERHEAD).plan_cost(plan).laws[0].mixed_ns)[1:].all()


def test_compute_bound_work_slows_with_the_clock_and_memory_bound_work_does_not() -> None:
    slow = at(HALF)
    compute = [float(profile.gemm_time_s("bf16", 8192, 8192, 8192)) for profile in (PROFILE, slow)]
    assert compute[1] == pytest.approx(2 * compute[0], rel=1e-6)
    pairs = [float(profile.prefill_attention(32, 8, 128, "bf16", 8192)[1]) for profile in (PROFILE, slow)]
    assert pairs[1] == pytest.approx(2 * pairs[0], rel=1e-6)
    copied = [float(profile.memory_time_s(4e9, launched=False)) for profile in (PROFILE, slow)]
    assert copied[1] == copied[0]
    context = [float(profile.decode_attention(8, 8, 128, "bf16", 64)[1]) for profile in (PROFILE, slow)]
    assert context[1] == context[0]
    few_rows = [float(profile.gemm_time_s("bf16", 8, 28672, 8192)) for profile in (PROFILE, slow)]
    assert few_rows[0] < few_rows[1] < 1.2 * few_rows[0]  # but its launch


@given(share=SHARES, rows=st.integers(1, 8192), n=st.integers(64, 16384), k=st.integers(64, 16384))
def test_no_product_is_faster_at_a_lower_clock_nor_slower_than_the_clock_is(
    share: float, rows: int, n: int, k: int
) -> None:
    clock = round(share * HIGHEST)
    slow, fast = (float(profile.gemm_time_s("bf16", rows, n, k)) for profile in (at(max(clock, 495)), PROFILE))
    assert fast <= slow <= fast * HIGHEST / max(clock, 495) * (1 + 1e-9)


@given(share=SHARES)
def test_energy_per_flop_falls_with_the_square_of_the_voltage(share: float) -> None:
    clock, power = Clock(share=share), PROFILE.power
    lower = clock.power(power)
    for dtype, joule in power.joule_per_flop.items():
        assert lower.joule_per_flop[dtype] == pytest.approx(joule * clock.voltage**2)
    on_chip = power.joule_per_byte - MEMORY_JOULE_PER_BYTE
    assert lower.joule_per_byte - MEMORY_JOULE_PER_BYTE == pytest.approx(on_chip * clock.voltage**2)
    assert lower.active_w == pytest.approx(power.active_w * share * clock.voltage**2)
    assert (lower.idle_w, lower.limit_w) == (power.idle_w, power.limit_w)


def test_the_voltage_falls_in_a_straight_line_to_a_floor() -> None:
    assert Clock().voltage == 1.0
    assert Clock(share=0.8).voltage == pytest.approx((1 + Clock(share=0.6).voltage) / 2)
    assert Clock(share=0.6).voltage == pytest.approx(Clock(share=SLOWEST).voltage)
    assert 0 < Clock(share=SLOWEST).voltage < 1


def test_memory_that_takes_less_than_the_least_known_keeps_what_it_takes() -> None:
    frugal = replace(PROFILE.power, joule_per_byte=MEMORY_JOULE_PER_BYTE / 2)
    assert Clock(share=0.5).power(frugal).joule_per_byte == frugal.joule_per_byte


def test_a_lower_clock_says_that_it_follows_laws_and_which_share_it_is() -> None:
    assert at(HALF).power.provenance.endswith("; at 50% of the highest clock by published laws (derived)")
    assert at(HALF).provenance["power"] == at(HALF).power.provenance


@pytest.mark.parametrize("name", [name for name in list_gpus() if not name.startswith("gb300")])
def test_every_accelerator_of_the_catalogue_but_one_states_its_highest_clock(name: str) -> None:
    gpu = load_cluster(name).gpu
    assert gpu.clock_mhz is not None
    assert Clock.of(gpu, int(gpu.clock_mhz)) == Clock(share=1.0)
    assert Clock.of(gpu, None) == Clock()


@pytest.mark.parametrize("clock_mhz", [0, 494, 1981, 10**6])
def test_a_clock_the_accelerator_does_not_have_is_refused(clock_mhz: int) -> None:
    said = f"clock={clock_mhz}: h200-sxm-141gb can be held at 495 to 1980 MHz"
    with pytest.raises(UsageError, match=said):
        Clock.of(H200, clock_mhz)
    with pytest.raises(UsageError, match=said):
        at(clock_mhz)


def test_without_a_known_highest_clock_none_can_be_set() -> None:
    model, cluster = make_model((dense(), 2)), make_cluster(1, clock_mhz=None)
    with pytest.raises(
        UsageError, match=r"clock=900: the highest clock of test-gpu is not stated; give gpu\.clock_mhz"
    ):
        CostModel(model, cluster, SMALL, OVERHEAD).plan_cost(parse_plan("tp1 clock=900", model))
