"""Resources that work at one time: a batch takes what the busiest asks, and kernel and reference agree on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import Case, alone, assert_same, cases, random_law

from apex_opt.errors import UsageError
from apex_opt.simulator.law import BatchLaw, linear_law

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64}


def law(base_ns: int, token_ns: int, *resources: BatchLaw) -> BatchLaw:
    made = linear_law(base_ns=base_ns, token_ns=token_ns, context_ns=0, **LIMITS)
    return replace(made, resources=resources)


def test_a_batch_takes_as_long_as_the_busiest_resource_but_no_longer_than_one_thing_after_the_other() -> None:
    both = law(100, 10, law(20, 10), law(60, 2))
    assert both.batch_ns([(1, 1)]) == 62
    assert both.batch_ns([(6, 6)]) == 80
    assert law(100, 0, law(10, 1), law(130, 0)).batch_ns([(1, 1)]) == 100
    assert both.scaled(3).batch_ns([(6, 6)]) == 240


def overlapping(case: Case, seed: int) -> Case:
    """The case with two or three resources whose laws have no order."""
    rng = np.random.default_rng(seed)
    asked = [
        random_law(case.settings, int(rng.integers(1 << 32)), zeros=0.3, copies=case.laws[0].copies)
        for _ in range(int(rng.integers(2, 4)))
    ]
    return case.having(laws=(replace(case.laws[0], resources=tuple(asked)),))


LOOPS = ("synchronous", "asynchronous", "threshold", "prefix caching")


@settings(max_examples=60, deadline=None)
@given(
    st.one_of([cases(loop, traffic) for loop in LOOPS for traffic in ("dealt", "routed", "closed")]),
    st.integers(0, 1 << 32),
)
def test_the_kernel_equals_the_reference(case: Case, seed: int) -> None:
    if len(case.laws) > 1:
        case = case.having(laws=case.laws[:1])
    case = overlapping(case, seed)
    reference = case.run("reference")
    assert_same(case.run("kernel"), reference)
    assert_same(case.run("kernel", log=False), case.run("reference", log=False))
    floors = alone(case)
    assert (floors.first_token_ns <= reference.first_token_ns).all() or case.trace.concurrency is not None
    assert (floors.finish_ns - floors.arrival_ns <= reference.finish_ns - reference.arrival_ns).all()


@pytest.mark.parametrize("loop", ["orca", "pipeline"])
def test_they_go_with_one_stage_of_the_engine_vllm(loop: str) -> None:
    """Whatever else there is, the kernel has no such batches of it."""

    @settings(max_examples=5, deadline=None)
    @given(cases(loop, "dealt"))  # type: ignore[arg-type]
    def refused(case: Case) -> None:
        laws = tuple(replace(one, resources=(one, one)) for one in case.laws)
        with pytest.raises(UsageError, match="resources work at one time on one stage with one scheduler"):
            case.having(laws=laws).run()

    refused()
