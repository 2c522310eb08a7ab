"""apex_opt.simulator.turns: requests that wait for answers, against one loop in which answers send them."""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from simulator_cases import IMPLEMENTATIONS, assert_same, linear

from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import InputError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.routing import ROUTINGS, Routing
from apex_opt.simulator import EnginePool, Handover, run_deployment, run_disaggregated
from apex_opt.simulator.pools import shares
from apex_opt.simulator.reference.loop import _replica, next_due, sequences_of
from apex_opt.simulator.reference.router import Dealt, router_of
from apex_opt.simulator.rescheduling import Rescheduling
from apex_opt.workload import load_trace, make_trace

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.workload.trace import Trace

SETTINGS = EngineSettings(
    max_num_seqs=3, max_num_batched_tokens=64, max_model_len=512, block_size=4, prefix_caching=True
)
MS = 1_000_000


def pool(**changes: Any) -> EnginePool:
    own = replace(SETTINGS, **changes)
    return EnginePool(settings=own, blocks=80, laws=[linear(own, 3 * MS, 50_000, 10)], replicas=2)


def conversations(seed: int, sessions: int = 8, most: int = 5) -> Trace:
    """Sessions whose prompts begin with all before; some turns come at once."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[Any]] = {
        name: [] for name in ("arrival_ns", "prompt", "output", "session", "delay_ns", "content")
    }
    for session in range(sessions):
        at, said = int(rng.integers(0, 60)) * MS, 0
        for turn in range(int(rng.integers(1, most))):
            delay = int(rng.choice([0, 0, 5, 40])) * MS if turn else -1
            at, said = at + max(delay, 0), said + int(rng.integers(1, 20))
            output = int(rng.integers(1, 9))
            row = (at, said, output, session, delay, [session * 1000 + piece for piece in range(-(-said // 4))])
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
            said += output
    return make_trace(name="turns", content_tokens=4, **columns)


def in_one_loop(its: EnginePool, trace: Trace, routing: Routing) -> list[tuple[int, int, int]]:
    """(arrival, first token, finish) of each request where each answer sends what waits for it."""
    (share,) = shares([its], trace, [routing])
    engines = [_replica(its, log=False, closed=False) for _ in range(its.replicas)]
    router = Dealt(np.arange(0), None) if routing == "round_robin" else router_of(share, [its], trace)
    sequences = sequences_of(its.settings, trace)
    assert trace.delay_ns is not None
    after = {int(before): row for row, before in enumerate(trace.before) if trace.delay_ns[row] >= 0}
    coming = [(int(trace.arrival_ns[row]), row) for row in range(len(trace)) if trace.delay_ns[row] < 0]
    heapq.heapify(coming)
    while True:
        due = next_due(engines)
        if coming and (due is None or coming[0][0] <= due[0]):
            at, row = heapq.heappop(coming)
            router.choose(sequences[row], at, engines).add(sequences[row], at)
        elif due is not None:
            for answered in due[1].turn(due[0]):
                if (row := after.get(answered.id, -1)) >= 0:
                    assert answered.answered_ns is not None
                    heapq.heappush(coming, (answered.answered_ns + int(trace.delay_ns[row]), row))
        else:
            return [(s.arrival_ns, s.token_ns[0], s.answered_ns or -1) for s in sequences]


ONLINE = ("round_robin", "least_loaded", "cache_aware", "dynamo", "llm_d", "power_of_two")


@pytest.mark.parametrize("routing", ONLINE)
@pytest.mark.parametrize("engine", ["vllm", "sglang", "ahead"])
def test_turns_come_when_one_loop_would_send_them(engine: str, routing: Routing) -> None:
    changes: dict[str, dict[str, Any]] = {
        "vllm": {"async_scheduling": False},
        "ahead": {},
        "sglang": {"scheduler": SglangScheduling()},
    }
    for seed in range(4):
        trace, its = conversations(seed), pool(**changes[engine])
        found = run_deployment([its], trace, routing=routing)
        times = zip(found.arrival_ns.tolist(), found.first_token_ns.tolist(), found.finish_ns.tolist(), strict=True)
        assert list(times) == in_one_loop(its, trace, routing)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_turn_comes_its_delay_after_the_answer_before_and_both_implementations_agree(routing: Routing) -> None:
    trace = conversations(9)
    runs = [run_deployment([pool()], trace, routing=routing, log=True, implementation=one) for one in IMPLEMENTATIONS]
    assert_same(*runs)
    assert trace.delay_ns is not None
    waits = trace.delay_ns >= 0
    assert waits.sum() > 8
    assert (runs[0].arrival_ns[waits] == runs[0].finish_ns[trace.before[waits]] + trace.delay_ns[waits]).all()
    assert (runs[0].arrival_ns[~waits] == trace.arrival_ns[~waits]).all()
    rows = [row for *_, rows, _ in runs[0].steps or () for row in rows]
    computed = [max(after for i, _, after in rows if i == request) for request in range(len(trace))]
    assert computed == (trace.prompt + trace.output - 1).tolist()
    gaps = np.split(runs[0].gaps_ns, np.cumsum(trace.output - 1)[:-1]) if runs[0].gaps_ns is not None else []
    assert [gap.sum() for gap in gaps] == (runs[0].finish_ns - runs[0].first_token_ns).tolist()


def test_turns_wait_before_pools_that_hand_over_and_where_requests_move() -> None:
    plain = {"prefix_caching": False, "scheduler": VllmScheduling(idle_sleep_us=1000)}
    trace, its = conversations(3), pool(**plain)
    handed = run_disaggregated(its, its, Handover(), trace)
    moving = run_deployment([its], trace, rescheduling=Rescheduling(block_ns=1000, period_ns=5 * MS))
    apart = run_deployment([its, its], trace, assigned=np.arange(len(trace)) % 2)
    assert trace.delay_ns is not None
    waits = trace.delay_ns >= 0
    for found in (handed, moving, apart):
        assert (found.arrival_ns[waits] == found.finish_ns[trace.before[waits]] + trace.delay_ns[waits]).all()


def test_files_say_how_long_turns_wait(tmp_path: Path) -> None:
    path = tmp_path / "turns.csv"
    path.write_text("arrival_s,prompt,output,session,delay_ms\n0,8,2,a,\n1,8,2,b,\n,20,2,a,2500\n,30,2,a,0\n")
    trace = load_trace(str(path))
    assert trace.delay_ns is not None
    assert trace.prompt.tolist() == [8, 8, 20, 30]
    assert trace.delay_ns.tolist() == [-1, -1, 2500 * MS, 0]
    assert trace.before.tolist() == [-1, -1, 0, 2]
    assert trace.arrival_ns.tolist() == [0, 1000 * MS, 2500 * MS, 2500 * MS]
    path.write_text("arrival_s,prompt,output,session,delay_ms\n0,8,2,a,\n,8,2,b,5\n")
    with pytest.raises(InputError, match="line 3: missing arrival_s of the first turn"):
        load_trace(str(path))
    for text in ("prompt,output,session,delay_ms\n8,2,a,\n8,2,b,5\n", "prompt,output,delay_ms\n8,2,\n8,2,5\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="line 3: delay_ms of the first turn, which comes after no answer"):
            load_trace(str(path))
    path.write_text("prompt,output,session,delay_ms\n8,2,a,\n20,2,a,5\n")
    assert not load_trace(str(path)).timed


def test_delays_that_cannot_be_are_refused() -> None:
    columns: dict[str, Any] = {"name": "two", "arrival_ns": [0, 0], "prompt": [1, 1], "output": [1, 1]}
    with pytest.raises(InputError, match="row 2 waits for an answer and is the first of its session"):
        make_trace(**columns, delay_ns=[-1, 5], session=[0, 1])
    with pytest.raises(InputError, match="delays are after answers of a session; add a column session"):
        make_trace(**columns, delay_ns=[-1, 5])
    with pytest.raises(InputError, match=r"delays are from 0 to [\d,]+ ms, or -1 where there is none"):
        make_trace(**columns, delay_ns=[-1, -2], session=[0, 0])
    with pytest.raises(InputError, match="of their sessions or of clients, not both"):
        make_trace(**columns, delay_ns=[-1, 5], session=[0, 0], concurrency=1)
    with pytest.raises(
        InputError, match="row 2 waits for an answer and arrives at 9 ns, later than at 5 ns if that came"
    ):
        make_trace(**columns | {"arrival_ns": [0, 9]}, delay_ns=[-1, 5], session=[0, 0])  # bounds would be too high
    trace = make_trace(**columns, delay_ns=[-1, 5], session=[0, 0])
    half = trace.stretched(2.0)
    assert half.delay_ns is not None and half.delay_ns.tolist() == [-1, 10]
    soon = make_trace(**columns | {"arrival_ns": [1, 2]}, delay_ns=[-1, 1], session=[0, 0]).stretched(1.4)
    assert soon.delay_ns is not None and soon.delay_ns.tolist() == [-1, 1] and soon.arrival_ns.tolist() == [1, 2]
    from apex_opt.workload.steady import at_rate

    with pytest.raises(UsageError, match="wait for answers"):
        at_rate(trace, 1.0, 2)
