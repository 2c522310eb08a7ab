"""No gap between tokens is shorter than its bound, and bounds are as long as they can be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulator_cases import LOOPS, TRAFFIC, Case, alone, blocks_of, cases, floors_of, floors_run, linear, requests

from apex_opt.engines.schedulers import OrcaScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.search.bounds import may_preempt
from apex_opt.search.bounds.gaps import least_gaps_ns

ENGINE = EngineSettings(
    max_num_seqs=6, max_num_batched_tokens=64, max_model_len=64, block_size=1, async_scheduling=False
)


def shorter(case: Case) -> int:
    """Gaps that are shorter than their bound."""
    run = case.run(log=False, gaps=True)
    overtaking = may_preempt(case.settings, case.blocks, case.trace)
    least = least_gaps_ns(case.settings, floors_of(case.laws), case.trace, overtaking=overtaking)
    assert run.gaps_ns is not None
    assert len(run.gaps_ns) == len(least)
    return int((run.gaps_ns < least).sum())


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "asynchronous pipeline"])
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_no_gap_beats_its_bound_under_any_law_engine_and_traffic(loop: str, traffic: str, data: st.DataObject) -> None:
    case = data.draw(cases(loop, traffic, busy=data.draw(st.booleans())))  # type: ignore[arg-type]
    if len(case.laws) > 1:
        case = case.having(settings=replace(case.settings, async_scheduling=False))
    assert shorter(case) == 0


def test_tokens_of_batches_that_are_on_their_way_together_do_not_beat_their_bound() -> None:
    """Sequences that give way in a pipeline come back while a batch with them has not ended: gaps are then short."""
    rng = np.random.default_rng(1)
    close = 0
    for _ in range(1000):
        stages = int(rng.integers(2, 5))
        engine = replace(ENGINE, max_num_batched_tokens=int(rng.integers(6, 14)))
        rows = sorted(
            (int(rng.integers(0, 60)), int(rng.integers(1, 12)), int(rng.integers(1, 14)))
            for _ in range(int(rng.integers(3, 9)))
        )
        need = max(blocks_of(engine, prompt, output) for _, prompt, output in rows)
        case = Case(
            settings=engine,
            blocks=need + int(rng.integers(0, need + 2)),
            laws=tuple(linear(engine, 10, 0, int(rng.integers(0, 2))) for _ in range(stages)),
            trace=requests(rows),
        )
        assert shorter(case) == 0
        run, floor = case.run(log=False, gaps=True), alone(case)
        assert (run.finish_ns - run.first_token_ns >= floor.finish_ns - floor.first_token_ns).all()
        assert (run.first_token_ns >= floor.first_token_ns).all()
        assert run.gaps_ns is not None
        close += bool((run.gaps_ns < 10 * stages).any())
    assert close > 3


def test_a_request_alone_has_its_bounds_for_gaps() -> None:
    for stages in (1, 3):
        laws = tuple(linear(ENGINE, 100, 10, 2) for _ in range(stages))
        case = Case(settings=ENGINE, blocks=64, laws=laws, trace=requests([(0, 20, 5), (10**6, 7, 1), (10**7, 9, 2)]))
        run = case.run(log=False, gaps=True)
        expected = [stages * (110 + 2 * held) for held in (21, 22, 23, 24, 10)]
        assert np.asarray(run.gaps_ns).tolist() == expected
        assert least_gaps_ns(ENGINE, floors_of(laws), case.trace).tolist() == expected


def test_nobody_gives_way_where_all_that_run_at_once_fit() -> None:
    trace = requests([(0, 10, 5), (0, 20, 5), (0, 30, 5)])  # 14, 24 and 34 tokens are computed
    assert may_preempt(ENGINE, 71, trace) and not may_preempt(ENGINE, 72, trace)
    assert may_preempt(replace(ENGINE, max_num_seqs=2), 57, trace)
    assert not may_preempt(replace(ENGINE, max_num_seqs=2), 58, trace)
    assert not may_preempt(replace(ENGINE, scheduler=OrcaScheduling()), 1, trace)
    assert may_preempt(ENGINE, 57, trace, requests=2)
    assert not may_preempt(ENGINE, 58, trace, requests=2)


def test_a_sequence_that_comes_back_before_its_batch_has_ended_is_faster_than_its_batches_one_after_the_other() -> None:
    engine = replace(ENGINE, max_num_batched_tokens=8)
    laws = (linear(engine, 10),) * 3
    case = Case(settings=engine, blocks=29, laws=laws, trace=requests([(7, 6, 9), (10, 11, 3), (26, 5, 4)]))
    run = case.run(log=False)
    naive = floors_run(engine, floors_of(laws), case.trace)
    took, expected = ((o.finish_ns - o.first_token_ns).tolist() for o in (run, naive))
    assert (took, expected) == ([240, 60, 80], [240, 60, 90])
    least = alone(case)
    assert (run.finish_ns - run.first_token_ns >= least.finish_ns - least.first_token_ns).all()


def test_requests_of_one_token_have_no_gaps() -> None:
    assert least_gaps_ns(ENGINE, floors_of([linear(ENGINE, 100)]), requests([(0, 10, 1)])).tolist() == []
