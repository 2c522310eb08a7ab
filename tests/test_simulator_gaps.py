"""Times between tokens: kernel and reference agree, and both with what the batches say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulator_cases import LOOPS, TRAFFIC, Case, cases, linear, requests

from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.gaps import gaps_ns

if TYPE_CHECKING:
    from apex_opt.simulator import Outcome


def read_off(case: Case, run: Outcome) -> list[int]:
    """Gaps out of `Outcome.steps`, in plain Python.

    A batch yields a token of a sequence where it computes all its tokens: the prompt, those of batches that had ended
    when it was formed and, where it was formed before the last one ended, the token on its way.
    """
    assert run.steps is not None
    limits = case.trace.generated(case.settings.max_model_len).tolist()
    came: list[list[int]] = [[] for _ in limits]
    for start, end, rows, _ in run.steps:
        for i, _, computed in rows:
            known = sum(time <= start for time in came[i]) if not case.settings.async_scheduling else len(came[i])
            if len(came[i]) < limits[i] and computed >= case.trace.prompt[i] + known:
                came[i].append(end)
    return [b - a for times in came for a, b in pairwise(times)]


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_kernel_reference_and_batches_tell_the_same_gaps(loop: str, traffic: str, data: st.DataObject) -> None:
    # Where every batch takes time, what had come when one was formed can be told by the clock.
    case = data.draw(cases(loop, traffic, busy=True))  # type: ignore[arg-type]
    kernel, reference = case.run("kernel"), case.run("reference")
    assert kernel.gaps_ns is not None
    assert reference.gaps_ns is not None
    assert kernel.gaps_ns.tolist() == reference.gaps_ns.tolist()
    # A pipeline may take in what ended while it slept.
    if len(case.laws) == 1 or case.settings.scheduler.idle_sleep_ns == 0:
        assert kernel.gaps_ns.tolist() == read_off(case, reference)
    generated = case.trace.generated(case.settings.max_model_len)
    assert len(kernel.gaps_ns) == int((generated - 1).sum())
    if case.settings.scheduler.name != "static":  # there, requests are answered together, after their last tokens
        assert kernel.gaps_ns.sum() == int((kernel.finish_ns - kernel.first_token_ns).sum())


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_batches_that_take_no_time_and_runs_without_a_log_change_nothing(loop: str, data: st.DataObject) -> None:
    case = data.draw(cases(loop, data.draw(st.sampled_from(TRAFFIC))))  # type: ignore[arg-type]
    kernel, reference = case.run("kernel", log=False, gaps=True), case.run("reference", log=False, gaps=True)
    assert kernel.steps is None
    assert kernel.gaps_ns is not None
    assert reference.gaps_ns is not None
    assert kernel.gaps_ns.tolist() == reference.gaps_ns.tolist()
    assert case.run("kernel", log=False).gaps_ns is None


def test_gaps_go_by_request_and_tokens_beyond_the_last_are_nobodys() -> None:
    request = np.array([1, 0, 1, 2, 1, 0, 1])
    times = np.array([5, 6, 8, 9, 15, 16, 20])
    assert gaps_ns(request, times, np.array([2, 3, 1])).tolist() == [10, 3, 7]
    assert gaps_ns(request[:0], times[:0], np.array([1, 1])).tolist() == []


def test_a_prompt_between_two_tokens_is_in_the_gap() -> None:
    engine = EngineSettings(
        max_num_seqs=4, max_num_batched_tokens=512, max_model_len=2048, block_size=16, async_scheduling=False
    )
    case = Case(
        settings=engine,
        blocks=500,
        laws=(linear(engine, 1000, 10),),
        trace=requests([(0, 100, 4), (3000, 300, 1)]),
    )
    run = case.run(log=False, gaps=True)
    assert run.gaps_ns is not None
    assert run.gaps_ns.tolist() == [1010, 1010 + 3000, 1010]
    alone = case.having(trace=requests([(0, 100, 4)]), settings=replace(engine, async_scheduling=True))
    assert np.array_equal(np.asarray(alone.run(log=False, gaps=True).gaps_ns), [1010, 1010, 1010])
