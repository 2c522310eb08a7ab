"""Steps out of a log: what every step computed is found again, so that a right law shows no error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measured_cases import recorded

from apex_opt.measured.runs import Iterations
from apex_opt.measured.steps import step_times
from apex_opt.measured.vllm_runs import read_vllm_runs
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.law import linear_law
from apex_opt.workload import load_trace

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.simulator.law import BatchLaw
    from apex_opt.workload.trace import Trace

ENGINE = EngineSettings(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096)


def law_of(engine: EngineSettings, context_ns: int = 40) -> BatchLaw:
    return linear_law(
        base_ns=4_000_000,
        token_ns=30_000,
        context_ns=context_ns,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
    )


def iterations_of(engine: EngineSettings, law: BatchLaw, trace: Trace) -> Iterations:
    run = recorded(engine, law, trace)
    return Iterations(log=np.array(run["iterations"], float), requests=np.array(run["requests"], float))


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    "load",
    [
        "poisson:rate=8,n=60,prompt=uniform(1,300),output=uniform(1,80)",
        "poisson:rate=20,n=80,prompt=uniform(100,2000),output=uniform(20,60)",
        "poisson:rate=0.5,n=10,prompt=200,output=8",
    ],
)
def test_a_log_made_by_a_law_agrees_with_it(load: str, asynchronous: bool) -> None:
    engine = EngineSettings(
        max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096, async_scheduling=asynchronous
    )
    law = law_of(engine)
    iterations = iterations_of(engine, law, load_trace(load, seed=7))
    times, left_out = step_times(iterations, engine, law)
    assert left_out < 0.35 * len(iterations.log)
    for kind in {part.kind for part in times}:
        measured = sum(part.measured_s for part in times if part.kind == kind)
        predicted = sum(part.predicted_s for part in times if part.kind == kind)
        assert predicted == pytest.approx(measured, rel=0.02), kind


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), rate=st.sampled_from([2, 8, 30]), longest=st.sampled_from([64, 700, 3000]))
def test_decode_steps_are_told_exactly_whatever_the_load(seed: int, rate: int, longest: int) -> None:
    engine = EngineSettings(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=4096, async_scheduling=False)
    law = law_of(engine)
    trace = load_trace(f"poisson:rate={rate},n=30,prompt=uniform(1,{longest}),output=uniform(1,50)", seed=seed)
    times, left_out = step_times(iterations_of(engine, law, trace), engine, law)
    assert left_out >= 1  # the first step began with an idle engine
    for part in times:
        assert part.steps > 0
        assert part.least <= part.most
        if part.kind == "decode":
            assert part.predicted_s == pytest.approx(part.measured_s, rel=0.02)


def test_a_law_that_is_off_shows_by_how_much() -> None:
    law, slower = law_of(ENGINE, context_ns=0), law_of(ENGINE, context_ns=0).scaled(3)
    trace = load_trace("poisson:rate=8,n=60,prompt=uniform(1,300),output=uniform(1,80)", seed=1)
    times, _ = step_times(iterations_of(ENGINE, law, trace), ENGINE, slower)
    measured, predicted = sum(part.measured_s for part in times), sum(part.predicted_s for part in times)
    assert predicted == pytest.approx(3 * measured, rel=0.02)


def test_a_late_end_before_a_mixed_step_is_moved_to_it() -> None:
    # The host notes the end of the step before a prompt 10 ms late: by so much the mixed step looks shorter.
    law = law_of(ENGINE)
    trace = load_trace("poisson:rate=4,n=40,prompt=400,output=60", seed=3)
    right = iterations_of(ENGINE, law, trace)
    late = right.log.copy()
    completes = np.flatnonzero(late[:, 3] > 0)
    before = [k - 1 for k in completes if k and late[k - 1, 3] == 0 and late[k, 0] - late[k - 1, 0] > 0.012]
    assert len(before) > 5
    late[before, 0] += 0.010
    times, _ = step_times(Iterations(log=late, requests=right.requests), ENGINE, law)
    for kind in ("decode", "mixed"):
        measured = sum(part.measured_s for part in times if part.kind == kind)
        predicted = sum(part.predicted_s for part in times if part.kind == kind)
        assert predicted == pytest.approx(measured, rel=0.03), kind


def test_preempting_steps_are_left_out() -> None:
    law = law_of(ENGINE)
    iterations = iterations_of(ENGINE, law, load_trace("poisson:rate=8,n=40,prompt=100,output=40", seed=2))
    _, before = step_times(iterations, ENGINE, law)
    log = iterations.log.copy()
    log[20:30, 5] = 1
    _, after = step_times(Iterations(log=log, requests=iterations.requests), ENGINE, law)
    assert before < after <= before + 10


@pytest.mark.data
def test_nearly_every_recorded_step_can_be_told(shared: Path) -> None:
    for path in sorted((shared / "measured" / "h200-vllm-0.20.2").glob("*.json.gz")):
        for run in read_vllm_runs(path):
            assert run.iterations is not None
            law = law_of(run.settings)
            _, left_out = step_times(run.iterations, run.settings, law)
            assert left_out <= max(0.2 * len(run.iterations.log), 1), run.name
