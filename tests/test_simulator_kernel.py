"""apex_opt.simulator.kernel: equal to the reference to the last integer, and to queueing theory where it knows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from simulator_cases import (
    LOOPS,
    TRAFFIC,
    Case,
    Loop,
    Traffic,
    assert_same,
    cases,
    linear,
    random_law,
    requests,
)

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.figures.stops import Stop, latencies_ns
from apex_opt.plans.engine import EngineSettings
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.figures.stops import Metric
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator import Outcome

SERVICE_NS = 1000


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("examples", [20, pytest.param(500, marks=pytest.mark.nightly)])
def test_kernel_equals_reference_on_random_engines(loop: Loop, traffic: Traffic, examples: int) -> None:
    @settings(max_examples=examples)
    @given(cases(loop, traffic))
    def check(case: Case) -> None:
        assert_same(case.run("kernel"), case.run("reference"))

    check()


REACHED: dict[str, Callable[[Case, Outcome], bool]] = {
    "five preemptions": lambda _, outcome: outcome.preemptions >= 5,
    "a prompt in three chunks": lambda case, _: 3 * case.settings.max_num_batched_tokens < int(case.trace.prompt.max()),
    "an answer cut by the model's length": lambda case, outcome: (
        int((case.trace.prompt + case.trace.output).max()) > case.settings.max_model_len
    ),
    "a batch of five": lambda _, outcome: any(len(rows) >= 5 for _, _, rows, _ in outcome.steps or ()),
    "a batch without duration": lambda _, outcome: any(start == end for start, end, _, _ in outcome.steps or ()),
    "two requests ending at once": lambda _, outcome: len(np.unique(outcome.finish_ns)) < len(outcome.finish_ns),
    "an idle gap": lambda case, outcome: int(outcome.busy_ns[0, 0]) < outcome.makespan_ns,
}


@pytest.mark.parametrize("event", REACHED)
@pytest.mark.parametrize("loop", ["threshold", "asynchronous pipeline", "prefix caching"])
def test_random_engines_reach_the_events_that_matter(loop: Loop, event: str) -> None:
    happens = REACHED[event]
    find(
        cases(loop, "dealt"),
        lambda case: happens(case, case.run()),
        settings=settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate]),
    )


METRICS: tuple[Metric, ...] = ("first", "step", "whole", "makespan")


@st.composite
def stops(draw: st.DrawFn, outcome: Outcome, generated: Any) -> Stop:
    """A limit near what a finished run has, on either side."""
    metric = draw(st.sampled_from(METRICS))
    adds = metric != "makespan" and draw(st.booleans())
    values = latencies_ns(metric, outcome.arrival_ns, outcome.first_token_ns, outcome.finish_ns, generated)
    limit = int(values.sum()) if adds else draw(st.sampled_from(values.tolist()))
    limit = max(limit + draw(st.sampled_from((-100, -1, 0, 1))), 0)
    return Stop(metric=metric, kind="sum" if adds else "count", limit_ns=limit, most=draw(st.integers(1, len(values))))


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=12)
@given(data=st.data())
def test_a_run_is_cut_short_exactly_where_the_finished_one_passes_a_limit(
    loop: Loop, traffic: Traffic, data: st.DataObject
) -> None:
    case = data.draw(cases(loop, traffic))
    whole = case.run()
    generated = np.minimum(case.trace.output, case.settings.max_model_len - case.trace.prompt)
    limits = data.draw(st.lists(stops(whole, generated), min_size=1, max_size=2))
    # Under random laws what a request needs on an empty engine is no floor; half of its wait is.
    halved = replace(
        whole,
        first_token_ns=whole.arrival_ns + (whole.first_token_ns - whole.arrival_ns) // 2,
        finish_ns=whole.arrival_ns + (whole.first_token_ns - whole.arrival_ns) // 2,
    )
    reference = case.run("reference", stops=limits)
    for floors in (None, halved):
        kernel = case.run(stops=limits, floors=floors)
        assert kernel.stopped == reference.stopped
        if not kernel.stopped:
            assert_same(kernel, reference)


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=10)
@given(data=st.data())
def test_times_do_not_depend_on_whether_batches_are_logged(loop: Loop, traffic: Traffic, data: st.DataObject) -> None:
    """Only a run without a log jumps over stretches in which sequences just decode."""
    case = data.draw(cases(loop, traffic))
    silent, logged = case.run(log=False), case.run(log=True)
    assert silent.steps is None
    assert logged.steps is not None and len(logged.steps) == logged.batches
    assert_same(silent, replace(logged, steps=None, gaps_ns=None))
    assert case.run("reference", log=False).steps is None


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kernel_equals_reference_on_long_crowded_traces(seed: int) -> None:
    """What small examples do not reach: dozens of sequences in one ring slot, long stretches, deep preemption."""
    rng = np.random.default_rng(seed)
    seats = int(rng.integers(16, 64))
    for asynchronous, stages, threshold in ((False, 1, 0), (False, 1, 0), (False, 1, 40), (True, 1, 0), (True, 3, 0)):
        engine = EngineSettings(
            max_num_seqs=seats,
            max_num_batched_tokens=seats + int(rng.integers(0, 300)),
            max_model_len=600,
            scheduler=VllmScheduling(long_prefill_token_threshold=threshold),
            block_size=int(rng.choice([1, 3, 16])),
            async_scheduling=asynchronous,
        )
        rows = [
            (int(a), int(p), int(o))
            for a, p, o in zip(
                np.cumsum(rng.integers(0, 400, 150)),
                rng.integers(1, 300, 150),
                rng.choice([1, 10, 64, 250], 150),
                strict=True,
            )
        ]
        case = Case(
            settings=engine,
            blocks=2400 // engine.block_size,
            laws=tuple(random_law(engine, seed + 10 * s, zeros=0.1, copies=s + 1) for s in range(stages)),
            trace=requests(rows),
        )
        reference = case.run("reference")
        assert reference.preemptions > 20
        assert_same(case.run("kernel"), reference)
        assert_same(case.run("kernel", log=False), replace(reference, steps=None, gaps_ns=None))


# Queueing theory. With a token in and a token out on one seat a request is served by one batch of fixed length.


def one_seat(arrival_ns: Any, *, concurrency: int | None = None, asynchronous: bool = False) -> Case:
    engine = EngineSettings(
        max_num_seqs=1, max_num_batched_tokens=1, max_model_len=2, block_size=1, async_scheduling=asynchronous
    )
    ones = np.ones(len(arrival_ns), np.int64)
    trace = make_trace(name="queue", arrival_ns=arrival_ns, prompt=ones, output=ones, concurrency=concurrency)
    return Case(settings=engine, blocks=1, laws=(linear(engine, SERVICE_NS),), trace=trace)


def poisson(seed: int, n: int, per_service: float) -> Any:
    """Arrival times with so many requests per service time."""
    gaps = np.random.default_rng(seed).exponential(SERVICE_NS / per_service, n)
    return np.rint(np.cumsum(gaps)).astype(np.int64)


def waits(outcome: Outcome) -> Any:
    return outcome.finish_ns - outcome.arrival_ns - SERVICE_NS


def test_mean_wait_of_m_d_1_is_within_its_confidence_interval() -> None:
    rho, seeds = 0.6, 16
    means = [waits(one_seat(poisson(seed, 40_000, rho)).run(log=False)).mean() for seed in range(seeds)]
    expected = rho * SERVICE_NS / (2 * (1 - rho))  # Pollaczek-Khinchine with no variance in service
    half_width = 4.07 * np.std(means, ddof=1) / np.sqrt(seeds)  # Student's t, 15 degrees of freedom, 99.9%
    assert half_width < 0.03 * expected
    assert abs(np.mean(means) - expected) < half_width


@pytest.mark.parametrize("asynchronous", [False, True])
def test_every_wait_on_one_seat_follows_lindleys_recursion(asynchronous: bool) -> None:
    arrival = poisson(7, 40_000, 0.9)
    wait = 0
    expected: list[int] = []
    for gap in np.diff(arrival, prepend=arrival[0]).tolist():
        wait = max(0, wait + SERVICE_NS - gap) if expected else 0
        expected.append(wait)
    outcome = one_seat(arrival, asynchronous=asynchronous).run(log=False)
    assert waits(outcome).tolist() == expected
    assert np.array_equal(outcome.first_token_ns, outcome.finish_ns)
    assert outcome.busy_ns.tolist() == [[40_000 * SERVICE_NS]]


@pytest.mark.parametrize("replicas", [2, 4])
def test_round_robin_over_equal_services_is_one_shared_queue(replicas: int) -> None:
    """With equal services the replica whose turn it is frees first, so every wait is that of M/D/R, first come."""
    arrival = poisson(3, 20_000, 0.9 * replicas)
    free_at = [0] * replicas
    expected: list[int] = []
    for now in arrival.tolist():
        server = min(range(replicas), key=free_at.__getitem__)
        expected.append(max(0, free_at[server] - now))
        free_at[server] = max(now, free_at[server]) + SERVICE_NS
    outcome = one_seat(arrival).having(replicas=replicas).run(log=False)
    assert waits(outcome).tolist() == expected


@pytest.mark.parametrize("replicas", [2, 4])
def test_least_loaded_waits_less_than_round_robin_where_services_differ(replicas: int) -> None:
    """Answers of 1 or 20 tokens; with equal services round robin could not be beaten (see above)."""
    engine = EngineSettings(max_num_seqs=1, max_num_batched_tokens=1, max_model_len=32, block_size=32)
    for seed in range(4):
        output = np.random.default_rng(seed).choice([1, 20], 20_000, p=[0.9, 0.1])
        trace = make_trace(
            name="queue",
            arrival_ns=poisson(seed, 20_000, 0.8 * replicas / 2.9),
            prompt=np.ones_like(output),
            output=output,
        )
        case = Case(settings=engine, blocks=1, laws=(linear(engine, SERVICE_NS),), trace=trace, replicas=replicas)
        routings: tuple[Routing, ...] = ("least_loaded", "round_robin")
        least, turns = (case.having(routing=r).run(log=False) for r in routings)
        assert (least.first_token_ns - least.arrival_ns).mean() < 0.8 * (turns.first_token_ns - turns.arrival_ns).mean()


@pytest.mark.parametrize("clients", [1, 3, 10])
def test_a_closed_loop_on_one_seat_keeps_it_busy_and_obeys_littles_law(clients: int) -> None:
    n = 5000
    outcome = one_seat(np.zeros(n, np.int64), concurrency=clients).run(log=False)
    assert outcome.finish_ns.tolist() == [SERVICE_NS * (i + 1) for i in range(n)]  # throughput is 1 / service
    assert outcome.arrival_ns.tolist() == [0] * clients + outcome.finish_ns[:-clients].tolist()
    response = (outcome.finish_ns - outcome.arrival_ns)[clients:]
    assert set(response.tolist()) == {clients * SERVICE_NS}  # clients = throughput * response time


def test_a_batch_server_answers_a_full_house_per_batch() -> None:
    """C clients on C seats are served in lockstep: throughput C / D."""
    engine = EngineSettings(max_num_seqs=6, max_num_batched_tokens=6, max_model_len=2, block_size=1)
    case = Case(
        settings=engine,
        blocks=6,
        laws=(linear(engine, SERVICE_NS),),
        trace=requests([(0, 1, 1)] * 600, concurrency=6),
    )
    outcome = case.run()
    assert outcome.batches == 100
    assert outcome.makespan_ns == 100 * SERVICE_NS
