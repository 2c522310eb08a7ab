"""How a run begins and ends: its span, its drain, its backlog."""

from __future__ import annotations

import numpy as np
import pytest
from plan_cases import SMALL

from apex_opt.simulator.outcome import BatchCounts, Outcome
from apex_opt.simulator.transient import GROWTH, LASTING, SPAN, WARM_UP, Transient, warm_up


def run(arrival: list[int], first: list[int], finish: list[int]) -> Outcome:
    columns = (np.array(times, np.int64) for times in (arrival, first, finish))
    return Outcome(
        **dict(zip(("arrival_ns", "first_token_ns", "finish_ns"), columns, strict=True)),
        preemptions=0,
        batches=0,
        busy_ns=np.zeros((1, 1), np.int64),
        counts=BatchCounts.empty(SMALL),
    )


def queue(gap: float, service: float, requests: int = 1000) -> Transient:
    """Requests that come evenly to one server, in microseconds."""
    arrival = (np.arange(requests) * gap * 1000).astype(int)
    free, finish = 0, []
    for at in arrival.tolist():
        free = max(free, at) + round(service * 1000)
        finish.append(free)
    return Transient.of(run(arrival.tolist(), finish, finish))


def test_span_drain_and_what_is_left_at_the_last_arrival() -> None:
    transient = Transient.of(run([0, 10, 20, 30, 40], [5, 35, 45, 60, 70], [15, 39, 100, 80, 90]), request_ns=7)
    assert transient.arrivals_s == pytest.approx(40e-9)
    assert transient.drain_s == pytest.approx(67e-9)
    assert (transient.waiting, transient.unfinished) == (3, 3)


def test_the_backlog_is_what_requests_meet_after_the_warm_up() -> None:
    arrival = [10 * i for i in range(10)]
    finish = [10 * i + 25 for i in range(10)]
    transient = Transient.of(run(arrival, finish, finish))
    assert (transient.before, transient.after) == (2.0, 2.0)
    assert warm_up(10) == 10 * WARM_UP
    assert [warm_up(n) for n in (1, 2, 4)] == [0, 0, 0]


@pytest.mark.parametrize(("gap", "service", "growing"), [(2, 1, False), (1.01, 1, False), (1, 1.1, True), (1, 3, True)])
def test_a_queue_grows_where_requests_come_faster_than_they_are_served(
    gap: float, service: float, growing: bool
) -> None:
    transient = queue(gap, service)
    assert transient.growing == growing
    assert transient.measured == growing
    if growing:
        assert transient.after > GROWTH * transient.before + 1


def test_a_burst_is_a_transient_though_no_queue_is_seen_to_grow() -> None:
    transient = queue(0, 1, 10)
    assert transient.arrivals_s == 0
    assert transient.short
    assert transient.measured
    assert queue(1, 1, 3).drain_s > LASTING * queue(1, 1, 3).arrivals_s


def test_a_closed_loop_has_no_backlog_that_grows() -> None:
    arrival = list(range(0, 100, 10))
    outcome = run(arrival, [1000 + i for i in arrival], [1000 + i for i in arrival])
    assert Transient.of(outcome).growing
    assert not Transient.of(outcome, clients=4).growing


def test_a_load_lasts_where_it_is_long_beside_its_requests() -> None:
    transient = queue(1, 0.5, 101)
    assert transient.lasts(100e-6 / SPAN)
    assert not transient.lasts(101e-6 / SPAN)


def test_one_request_is_no_load() -> None:
    transient = Transient.of(run([5], [9], [12]))
    assert (transient.arrivals_s, transient.before, transient.after) == (0, 0, 0)
    assert transient.drain_s == pytest.approx(7e-9)
