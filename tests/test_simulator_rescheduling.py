"""apex_opt.simulator.rescheduling and its reference: virtual usage, moves in stages, and what moves cannot change."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from simulator_cases import linear, requests

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import EnginePool, run_deployment
from apex_opt.simulator.reference.loop import _replica, sequences_of
from apex_opt.simulator.reference.rescheduling import CROWDED, Llumnix, freeness, virtual_usage
from apex_opt.simulator.rescheduling import Rescheduling, parse_rescheduling

if TYPE_CHECKING:
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.workload.trace import Trace

SETTINGS = EngineSettings(
    max_num_seqs=8,
    max_num_batched_tokens=256,
    max_model_len=1024,
    prefix_caching=False,
    scheduler=VllmScheduling(idle_sleep_us=1000),
)
MS = 1_000_000
NEVER = Rescheduling(block_ns=1000, period_ns=1 << 60)


def pool(blocks: int = 24, replicas: int = 2, **changes: Any) -> EnginePool:
    own = replace(SETTINGS, **changes)
    laws = [linear(own, 10 * MS, 10_000, 100)]
    return EnginePool(settings=own, blocks=blocks, laws=laws, replicas=replicas)


def crowded(seed: int, n: int = 30, gap_ns: int = 60 * MS) -> Trace:
    rng = np.random.default_rng(seed)
    arrival = np.cumsum(rng.integers(0, gap_ns, n)).tolist()
    long = rng.random(n) < 0.3
    prompt = np.where(long, 150, rng.integers(5, 40, n)).tolist()
    output = np.where(rng.random(n) < 0.3, 120, rng.integers(1, 30, n)).tolist()
    return requests(list(zip(arrival, prompt, output, strict=True)))


def served(trace: Trace, rules: Rescheduling, **changes: Any) -> Outcome:
    return run_deployment([pool(**changes)], trace, rescheduling=rules, log=True)


def test_virtual_usage_is_blocks_and_for_high_priority_a_share_of_the_headroom() -> None:
    assert virtual_usage(7) == 7
    assert virtual_usage(7, high=True, highs=2, headroom=9) == Fraction(23, 2)
    assert virtual_usage(7, highs=2, headroom=9) == 7


def test_freeness_is_free_blocks_per_request_and_negative_where_more_are_asked_for() -> None:
    assert freeness(100, Fraction(40), 20) == 3
    assert freeness(100, Fraction(40), 0) == 60
    assert freeness(100, Fraction(120), 4) == -5


def test_the_first_that_waits_counts_by_its_demand_and_the_others_not() -> None:
    its = pool(blocks=10, replicas=2)
    engines = [_replica(its, log=False, closed=False) for _ in range(2)]
    llumnix = Llumnix(engines, 10, replace(NEVER, draining=frozenset({1})))  # type: ignore[arg-type]
    first, other, running = sequences_of(SETTINGS, requests([(0, 100, 2), (0, 160, 2), (0, 60, 2)]))
    engines[0].scheduler.blocks.take(running, 60)  # type: ignore[union-attr]
    engines[0].scheduler.running.append(running)  # type: ignore[union-attr]
    assert llumnix.freeness(0) == 10 - 4
    engines[0].scheduler.waiting.extend([first, other])  # type: ignore[union-attr]
    assert llumnix.freeness(0) == Fraction(10 - 4 - 7, 2)
    assert llumnix.freeness(1) == CROWDED
    assert llumnix.dispatch() == 0


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_every_token_comes_once_in_order_and_no_block_is_lost(seed: int, asynchronous: bool) -> None:
    trace = crowded(seed)
    its = pool(async_scheduling=asynchronous)
    rules = Rescheduling(block_ns=200_000, stop_ns=MS, period_ns=20 * MS, headroom=4)
    engines = [_replica(its, log=True, closed=False) for _ in range(2)]
    sequences = sequences_of(its.settings, trace)
    llumnix = Llumnix(engines, its.blocks, rules, frozenset(range(0, 30, 5)))  # type: ignore[arg-type]
    llumnix.serve(deque(zip(trace.arrival_ns.tolist(), sequences, strict=True)))
    assert [len(s.token_ns) for s in sequences] == trace.output.tolist()
    assert all(a < b for s in sequences for a, b in pairwise(s.token_ns))
    assert [engine.scheduler.blocks.free for engine in engines] == [its.blocks] * 2  # type: ignore[union-attr]
    assert not llumnix.moves and not any(s.blocks for s in sequences)


def test_requests_move_on_crowded_replicas() -> None:
    outcomes = [served(crowded(seed), Rescheduling(block_ns=1000, period_ns=10 * MS)) for seed in range(6)]
    assert sum(len(outcome.moved) for outcome in outcomes) > 5


def queues(outcome: Outcome, trace: Trace) -> bool:
    """Whether a request is not in the first batch that its replica forms once it is there, or has to give way."""
    assert outcome.steps is not None and outcome.steps_per_replica is not None
    first: dict[int, tuple[int, int]] = {}
    starts, end = [], 0
    for place, count in enumerate(outcome.steps_per_replica):
        its, end = outcome.steps[end : end + count], end + count
        starts.append([start for start, *_ in its])
        for start, _, rows, _ in its:
            for request, _, _ in rows:
                first.setdefault(request, (place, start))
    return outcome.preemptions > 0 or any(
        start > min(other for other in starts[place] if other >= trace.arrival_ns[request])
        for request, (place, start) in first.items()
    )


def test_where_nothing_queues_and_nobody_gives_way_moves_change_nothing() -> None:
    """With as few blocks as that takes; with Llumnix's own threshold or fewer blocks requests do move."""
    sooner = fewer = 0
    every = {"block_ns": 1000, "period_ns": 5 * MS}
    for seed in range(12):
        trace = crowded(seed)
        blocks = next(n for n in range(17, 400) if not queues(served(trace, NEVER, blocks=n), trace))
        moving = served(trace, Rescheduling(**every), blocks=blocks)
        assert moving.moved == ()
        assert moving.steps == served(trace, NEVER, blocks=blocks).steps
        sooner += len(
            served(trace, Rescheduling(out_below=Fraction(3), in_from=Fraction(4), **every), blocks=blocks).moved
        )
        fewer += len(served(trace, Rescheduling(**every), blocks=24).moved)
    assert sooner > 5 and fewer > 5


def test_a_drained_replica_gets_nothing_and_what_moves_leaves_it() -> None:
    trace = crowded(1)
    rules = Rescheduling(block_ns=1000, period_ns=10 * MS, draining=frozenset({0}))
    outcome = served(trace, rules)
    assert outcome.steps_per_replica is not None
    assert outcome.steps_per_replica[0] == 0


def test_a_request_stands_still_for_its_last_stage_alone() -> None:
    """Two long requests on one replica, of which one has to give way: the shorter moves while it decodes."""
    rows = [(0, 200, 100), (0, 200, 100), (1, 16, 150), (1, 16, 150), (2, 40, 150)]
    fast, slow = (
        served(requests(rows), Rescheduling(block_ns=block_ns, stop_ns=stop_ns, period_ns=50 * MS), blocks=28)
        for block_ns, stop_ns in ((1000, 0), (1000, 80 * MS))
    )
    assert fast.moved and slow.moved
    (request, _, _, at), late = fast.moved[0], slow.moved[0]
    assert late[:3] == fast.moved[0][:3] and late[3] - at == 80 * MS
    assert slow.finish_ns[request] > fast.finish_ns[request]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prefix_caching": True}, "no prefix caching"),
        ({"scheduler": VllmScheduling()}, "idle_sleep_us"),
    ],
)
def test_replicas_between_which_nothing_can_move_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        served(requests([(0, 10, 2)]), NEVER, **changes)


def test_numbers_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="block_ns -1"):
        Rescheduling(block_ns=-1)
    with pytest.raises(UsageError, match="raise in_from"):
        Rescheduling(block_ns=1, out_below=Fraction(4))
    with pytest.raises(UsageError, match="replica 2 to be drained"):
        served(requests([(0, 10, 2)]), replace(NEVER, draining=frozenset({2})))


def test_rules_are_read_by_name_with_their_numbers() -> None:
    assert parse_rescheduling("llumnix") == Rescheduling()
    found = parse_rescheduling("llumnix:out_below=-1.5,in_from=7,period_ms=0.5,headroom=40,draining=0+2")
    numbers = {"out_below": Fraction(-3, 2), "in_from": Fraction(7), "period_ns": 500_000, "headroom": 40}
    assert found == Rescheduling(draining=frozenset({0, 2}), **numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lumnix", "unknown rescheduling 'lumnix'; did you mean llumnix"),
        ("llumnix:headrom=4", "unknown number of llumnix 'headrom'; did you mean headroom"),
        ("llumnix:headroom=4,headroom=5", "headroom is given twice"),
        ("llumnix:headroom=-4", "'headroom=-4' cannot be read; such as headroom=400"),
        ("llumnix:", "unknown number of llumnix ''"),
        ("llumnix:out_below=9", "raise in_from"),
    ],
)
def test_what_cannot_be_read_of_rules_is_told(text: str, told: str) -> None:
    with pytest.raises((UsageError, UnknownNameError), match=told):
        parse_rescheduling(text)


def test_requests_of_high_priority_are_those_of_the_trace_and_move_after_all_others() -> None:
    """What moved first is made of high priority: until then all is as before, and another one moves in its place."""
    rules, others = Rescheduling(block_ns=1000, period_ns=10 * MS), 0
    for seed in range(6):
        trace = crowded(seed)
        if not (moved := served(trace, rules).moved):
            continue
        first, _, _, at = moved[0]
        levels = (np.arange(len(trace)) == first).astype(np.int64)
        levels.flags.writeable = False
        again = served(replace(trace, priority=levels), rules).moved
        earlier = [request for request, *_, when in again if when <= at]
        others += bool(earlier) and earlier[0] != first
    assert others > 2
