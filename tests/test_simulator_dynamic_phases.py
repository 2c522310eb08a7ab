"""Shares that follow the load: the model, the rule by hand, and runs whose load shifts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from simulator_cases import linear, requests

from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.api import run_phases
from apex_opt.simulator.phases import DynamicPhases, Phases
from apex_opt.simulator.pools import EnginePool
from apex_opt.simulator.reference.dynamic_phases import Model, steps_to

SETTINGS = EngineSettings(max_num_seqs=64, max_num_batched_tokens=256, max_model_len=4_096, async_scheduling=False)
HALVES = Phases(prefill_share=50, decode_share=50)


def rules(**changes: Any) -> DynamicPhases:
    return DynamicPhases(**{"start": HALVES, "ttft_ns": 10**9, "tpot_ns": 10**9, "window_ns": 100_000} | changes)


def run(phases: Phases | DynamicPhases, rows: list[tuple[int, int, int]]) -> Any:
    law = linear(SETTINGS, 1_000, 20)
    return run_phases(EnginePool(settings=SETTINGS, blocks=20_000, laws=[law], replicas=1), phases, requests(rows))


def test_the_model_is_the_published_one_scaled_until_two_shares_were_seen() -> None:
    model = Model((0.6284, 0.3818))
    assert model.at(0.5) == float("inf")  # nothing was measured
    model.learn(1.0, 202.04)  # 200 times as long as published
    assert model.at(1.0) == pytest.approx(202.04) and model.at(0.5) == pytest.approx(200 * (0.6284 / 0.5 + 0.3818))
    model.learn(0.5, 302.04)
    assert model.at(0.25) == pytest.approx(502.04)  # 100 / u + 102.04
    assert model.at(0) == float("inf")


def test_a_phase_gets_more_until_its_goal_holds_and_beyond_a_gpu_the_other_gets_less() -> None:
    model = Model((1.0, 0.0))
    model.learn(0.5, 200.0)  # 100 / u
    assert steps_to(50, 50, rules(), model, 190) == (60, 50)  # 60 of 110: 183
    assert steps_to(50, 50, rules(), model, 165) == (80, 50)  # 80 of 130: 162.5
    assert steps_to(50, 50, rules(), model, 10) == (80, 50)  # no more than three steps
    assert steps_to(100, 50, rules(), model, 10) == (100, 20)
    assert steps_to(100, 20, rules(step=15), model, 10) == (100, 20)  # the other one keeps a step at least
    assert steps_to(50, 50, rules(most_steps=9), model, 175, load=0.3) == (100, 10)


def test_shares_stay_where_both_goals_hold_or_both_fail() -> None:
    rows = [(20_000 * i, 200, 40) for i in range(60)]
    still = run(HALVES, rows)
    for goals in ({}, {"ttft_ns": 1, "tpot_ns": 1}):
        found = run(rules(**goals), rows)
        assert found.switches == [] and np.array_equal(found.finish_ns, still.finish_ns)


def test_the_phase_that_misses_its_goal_gets_more_and_gains_by_it() -> None:
    rows = [(12_000 * i, 400, 30) for i in range(80)]
    still = run(HALVES, rows)
    late = run(rules(ttft_ns=20_000), rows)
    assert late.switches and all(x >= 50 for _, _, x, _ in late.switches)
    mean = (late.first_token_ns - late.arrival_ns).mean()
    assert mean < (still.first_token_ns - still.arrival_ns).mean()
    slow = run(rules(tpot_ns=1_200), rows)
    assert slow.switches and all(y >= 50 for _, _, _, y in slow.switches)
    assert slow.gaps_ns.mean() < still.gaps_ns.mean()
    for found in (late, slow):
        assert found.held == 0 and len(found.gaps_ns) == 80 * 29


@pytest.mark.parametrize("name", ["step", "window_ns", "most_steps", "percentile", "ttft_ns"])
def test_numbers_out_of_range_are_refused(name: str) -> None:
    for value in (0, -1) if name == "percentile" else (0, True, 1.5):
        with pytest.raises(UsageError, match=f"dynamic shares: {name}"):
            rules(**{name: value})
