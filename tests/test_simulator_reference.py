"""apex_opt.simulator.reference: each rule by hand, nothing lost or invented, and what must not matter does not."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulator_cases import (
    IMPLEMENTATIONS,
    LOOPS,
    TRAFFIC,
    Case,
    Loop,
    Traffic,
    assert_same,
    blocks_of,
    cases,
    linear,
    moved,
    requests,
    sleeping,
)

from apex_opt.engines.schedulers import OrcaScheduling, StaticScheduling, VllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import Outcome, replay
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from typing import Any

    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.outcome import Step

UNCACHED = [loop for loop in LOOPS if loop != "prefix caching"]

# Each rule by hand. A batch takes 10 ns and 1 ns a token, unless said otherwise.

ENGINE = EngineSettings(
    max_num_seqs=4,
    max_num_batched_tokens=8,
    max_model_len=32,
    block_size=4,
    async_scheduling=False,
)


def serve(
    rows: list[tuple[int, int, int]],
    *,
    implementation: Implementation = "reference",
    blocks: int = 100,
    stages: int = 1,
    transfer: int = 0,
    content: dict[str, Any] | None = None,
    **changes: Any,
) -> Outcome:
    engine = replace(ENGINE, **changes)
    law = linear(engine, 10, 1, transfer_ns=np.full(engine.max_num_batched_tokens + 1, transfer))
    case = Case(settings=engine, blocks=blocks, laws=(law,) * stages, trace=requests(rows, **(content or {})))
    return case.run(implementation)


def batches(outcome: Outcome) -> list[Step]:
    assert outcome.steps is not None
    return outcome.steps


both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@both
def test_a_prompt_yields_a_token_when_its_batch_ends_and_one_per_batch_from_then_on(
    implementation: Implementation,
) -> None:
    outcome = serve([(7, 5, 3)], implementation=implementation)
    assert batches(outcome) == [(7, 22, [(0, 5, 5)], []), (22, 33, [(0, 1, 6)], []), (33, 44, [(0, 1, 7)], [])]
    assert (outcome.first_token_ns.tolist(), outcome.finish_ns.tolist()) == ([22], [44])
    assert outcome.busy_ns.tolist() == [[37]]
    assert outcome.makespan_ns == 37


@both
def test_running_sequences_come_before_waiting_ones_and_take_from_the_budget(implementation: Implementation) -> None:
    """At 22 request 0 takes one token of eight, request 1 the seven left of its ten; the rest follows."""
    outcome = serve([(7, 5, 9), (8, 10, 1)], implementation=implementation)
    assert batches(outcome)[1:3] == [(22, 40, [(0, 1, 6), (1, 7, 7)], []), (40, 54, [(0, 1, 7), (1, 3, 10)], [])]
    assert outcome.first_token_ns.tolist() == [22, 54]


@both
def test_an_arrival_at_the_very_end_of_a_batch_joins_the_next(implementation: Implementation) -> None:
    outcome = serve([(0, 1, 2), (11, 1, 1), (12, 1, 1)], implementation=implementation)
    assert [rows for _, _, rows, _ in batches(outcome)] == [[(0, 1, 1)], [(0, 1, 2), (1, 1, 1)], [(2, 1, 1)]]


@both
def test_equal_arrivals_go_by_their_order_and_seats_are_limited(implementation: Implementation) -> None:
    outcome = serve([(0, 1, 1)] * 6, implementation=implementation)
    assert [[i for i, _, _ in rows] for _, _, rows, _ in batches(outcome)] == [[0, 1, 2, 3], [4, 5]]


@both
def test_without_chunking_a_prompt_waits_for_its_whole_budget_and_holds_up_those_behind(
    implementation: Implementation,
) -> None:
    rows = [(0, 20, 1), (0, 20, 1), (0, 1, 1)]
    outcome = serve(rows, implementation=implementation, chunked_prefill=False, max_num_batched_tokens=32)
    assert [r for _, _, r, _ in batches(outcome)] == [[(0, 20, 20)], [(1, 20, 20), (2, 1, 1)]]
    outcome = serve(rows, implementation=implementation, max_num_batched_tokens=32)
    assert [r for _, _, r, _ in batches(outcome)] == [[(0, 20, 20), (1, 12, 12)], [(1, 8, 20), (2, 1, 1)]]


@both
def test_a_threshold_leaves_budget_to_those_behind_a_long_prompt(implementation: Implementation) -> None:
    outcome = serve(
        [(0, 7, 1), (0, 4, 1)], implementation=implementation, scheduler=VllmScheduling(long_prefill_token_threshold=3)
    )
    assert [rows for _, _, rows, _ in batches(outcome)] == [
        [(0, 3, 3), (1, 3, 3)],
        [(0, 3, 6), (1, 1, 4)],
        [(0, 1, 7)],
    ]


@both
def test_the_blocks_of_a_whole_prompt_must_be_free_to_start_though_only_a_chunk_takes_them(
    implementation: Implementation,
) -> None:
    """Four blocks: request 0 has one until it ends at 12; the four of request 1 are free only then, and request 2
    finds none before the end of request 1."""
    outcome = serve([(0, 2, 1), (0, 15, 1), (0, 1, 1)], implementation=implementation, blocks=4)
    assert batches(outcome) == [
        (0, 12, [(0, 2, 2)], []),
        (12, 30, [(1, 8, 8)], []),
        (30, 47, [(1, 7, 15)], []),
        (47, 58, [(2, 1, 1)], []),
    ]


@both
def test_the_last_running_sequence_is_preempted_waits_in_front_and_keeps_its_tokens(
    implementation: Implementation,
) -> None:
    """Two blocks of 4. Both fill a block with their prompts and want a second in the same batch: the last gives way and
    waits before request 2, which came earlier than the preemption; later it computes prompt and token again."""
    outcome = serve([(0, 4, 3), (0, 4, 2), (1, 1, 1)], implementation=implementation, blocks=2, max_num_seqs=2)
    assert batches(outcome) == [
        (0, 18, [(0, 4, 4), (1, 4, 4)], []),
        (18, 29, [(0, 1, 5)], [1]),
        (29, 40, [(0, 1, 6)], []),
        (40, 55, [(1, 5, 5)], []),
        (55, 66, [(2, 1, 1)], []),
    ]
    assert outcome.preemptions == 1
    assert outcome.first_token_ns.tolist() == [18, 18, 66]
    assert outcome.finish_ns.tolist() == [40, 55, 66]


@both
def test_a_sequence_at_the_tail_preempts_itself_and_nobody_else(implementation: Implementation) -> None:
    """Two blocks of 4: at 16 request 1 needs a second block and is itself the last. To compute its five tokens again
    it needs two, which are not free before request 0 ends."""
    outcome = serve([(0, 2, 4), (0, 4, 2)], implementation=implementation, blocks=2)
    assert batches(outcome) == [
        (0, 16, [(0, 2, 2), (1, 4, 4)], []),
        (16, 27, [(0, 1, 3)], [1]),
        (27, 38, [(0, 1, 4)], []),
        (38, 49, [(0, 1, 5)], []),
        (49, 64, [(1, 5, 5)], []),
    ]


@both
def test_an_answer_ends_where_the_model_does(implementation: Implementation) -> None:
    outcome = serve([(0, 5, 100)], implementation=implementation, max_model_len=8)
    assert [rows for _, _, rows, _ in batches(outcome)] == [[(0, 5, 5)], [(0, 1, 6)], [(0, 1, 7)]]
    assert outcome.first_token_ns.tolist() == [15]


@both
def test_asynchronous_scheduling_forms_the_next_batch_while_one_runs(implementation: Implementation) -> None:
    """The coming token counts as known, so request 0 is in a second batch at once; its third waits for a result.
    Request 1 misses the batches already formed."""
    outcome = serve([(0, 3, 3), (1, 2, 1)], implementation=implementation, async_scheduling=True)
    assert batches(outcome) == [
        (0, 13, [(0, 3, 3)], []),
        (0, 24, [(0, 1, 4)], []),
        (13, 37, [(0, 1, 5), (1, 2, 2)], []),
    ]
    assert outcome.finish_ns.tolist() == [37, 37]


@both
def test_stages_work_on_different_batches_at_once_and_transfers_delay_them(implementation: Implementation) -> None:
    """The second batch, request 1 alone as 0 is in flight, enters stage 0 when the first leaves it for stage 1."""
    outcome = serve([(0, 8, 2), (0, 2, 1)], implementation=implementation, stages=2, transfer=5)
    assert batches(outcome) == [
        (0, 18 + 5 + 18, [(0, 8, 8)], []),
        (0, 41 + 12, [(1, 2, 2)], []),
        (41, 41 + 11 + 5 + 11, [(0, 1, 9)], []),
    ]
    assert outcome.busy_ns.tolist() == [[18 + 12 + 11] * 2]


@both
def test_prefix_caching_computes_a_shared_beginning_once(implementation: Implementation) -> None:
    """Two blocks of eight tokens are found; of a prompt that is known to its end the last block is computed again."""
    content = {"content": [[1, 2, 3], [1, 2, 4], [1, 2], [2, 1]], "content_tokens": 4}
    rows = [(0, 9, 1), (100, 9, 1), (200, 8, 1), (300, 8, 1)]
    arguments: dict[str, Any] = {"implementation": implementation, "content": content, "max_num_batched_tokens": 16}
    with_cache = serve(rows, prefix_caching=True, **arguments)
    assert [r for _, _, r, _ in batches(with_cache)] == [[(0, 9, 9)], [(1, 1, 9)], [(2, 4, 8)], [(3, 8, 8)]]
    without = serve(rows, prefix_caching=False, **arguments)
    assert [r for _, _, r, _ in batches(without)] == [[(0, 9, 9)], [(1, 9, 9)], [(2, 8, 8)], [(3, 8, 8)]]


@both
def test_orca_reserves_blocks_for_the_whole_answer_and_preempts_nobody(implementation: Implementation) -> None:
    """Each request will hold six tokens: two blocks of the three, from the start, so that they go one by one."""
    arguments: dict[str, Any] = {"implementation": implementation, "blocks": 3, "max_num_batched_tokens": 32}
    outcome = serve([(0, 4, 3), (0, 4, 3)], scheduler=OrcaScheduling(), **arguments)
    assert batches(outcome) == [
        (0, 14, [(0, 4, 4)], []),
        (14, 25, [(0, 1, 5)], []),
        (25, 36, [(0, 1, 6)], []),
        (36, 50, [(1, 4, 4)], []),
        (50, 61, [(1, 1, 5)], []),
        (61, 72, [(1, 1, 6)], []),
    ]
    assert batches(serve([(0, 4, 3), (0, 4, 3)], **arguments))[0] == (0, 18, [(0, 4, 4), (1, 4, 4)], [])


@both
def test_static_batching_answers_a_batch_when_its_longest_request_is_done(implementation: Implementation) -> None:
    """Request 1 is done at 16, goes on computing over its two tokens and is answered at 40; 2 waits for that."""
    rows = [(0, 4, 3), (0, 2, 1), (5, 1, 1)]
    outcome = serve(rows, implementation=implementation, scheduler=StaticScheduling(), max_num_batched_tokens=32)
    assert batches(outcome) == [
        (0, 16, [(0, 4, 4), (1, 2, 2)], []),
        (16, 28, [(0, 1, 5), (1, 1, 2)], []),
        (28, 40, [(0, 1, 6), (1, 1, 2)], []),
        (40, 51, [(2, 1, 1)], []),
    ]
    assert outcome.first_token_ns.tolist() == [16, 16, 51]
    assert outcome.finish_ns.tolist() == [40, 40, 51]


@both
def test_a_closed_loop_sends_a_request_when_another_is_answered(implementation: Implementation) -> None:
    case = Case(
        settings=ENGINE,
        blocks=100,
        laws=(linear(ENGINE, 10, 1),),
        trace=requests([(0, 1, 1), (0, 1, 3), (0, 2, 1), (0, 1, 1)], concurrency=2),
    )
    outcome = case.run(implementation)
    assert outcome.arrival_ns.tolist() == [0, 0, 12, 25]
    assert outcome.finish_ns.tolist() == [12, 37, 25, 37]


@both
def test_a_client_pauses_before_it_sends_its_next_request(implementation: Implementation) -> None:
    """Request 2 misses the batch that is formed when request 0 is answered; request 3 comes while none runs."""
    case = Case(
        settings=ENGINE,
        blocks=100,
        laws=(linear(ENGINE, 10, 1),),
        trace=requests([(0, 1, 1), (0, 1, 3), (0, 2, 1), (0, 1, 1)], concurrency=2, pause_ns=1),
    )
    outcome = case.run(implementation)
    assert outcome.arrival_ns.tolist() == [0, 0, 13, 37]
    assert outcome.finish_ns.tolist() == [12, 36, 36, 48]


@both
def test_least_loaded_picks_the_replica_with_fewest_unanswered_and_the_lowest_of_equals(
    implementation: Implementation,
) -> None:
    """Requests 1 and 2 go to replica 1 and to replica 0 (of equals the lowest); 2 waits for 0. Request 3 arrives when
    replica 1 has answered all."""
    engine = replace(ENGINE, max_num_seqs=1)
    case = Case(
        settings=engine,
        blocks=100,
        laws=(linear(engine, 10),),
        trace=requests([(0, 1, 5), (0, 1, 1), (1, 1, 1), (20, 1, 1)]),
        replicas=2,
        routing="least_loaded",
    )
    outcome = case.run(implementation)
    assert outcome.finish_ns.tolist() == [50, 10, 60, 30]
    assert outcome.busy_ns.tolist() == [[60], [20]]


@both
def test_an_answer_at_the_moment_of_an_arrival_counts_as_given(implementation: Implementation) -> None:
    """Replica 0 ends request 0 at 10; a request arriving then finds it empty, one arriving at 9 does not."""
    engine = replace(ENGINE, max_num_seqs=1)
    case = Case(settings=engine, blocks=9, laws=(linear(engine, 10),), trace=requests([(0, 1, 1)]), replicas=2)
    case = case.having(routing="least_loaded")
    for arrival, busy in ((9, [[10], [10]]), (10, [[20], [0]])):
        outcome = case.having(trace=requests([(0, 1, 1), (arrival, 1, 1)])).run(implementation)
        assert outcome.busy_ns.tolist() == busy


# The sleep of 1 us after a turn that scheduled nothing while requests are unfinished.

SLEEPS: dict[str, Any] = {"scheduler": VllmScheduling(idle_sleep_us=1)}
ONE_SEAT: dict[str, Any] = {"max_num_seqs": 1, "async_scheduling": True, **SLEEPS}


@both
def test_whoever_waits_for_the_last_seat_waits_for_a_sleep_where_batches_are_formed_ahead(
    implementation: Implementation,
) -> None:
    """A turn finds nothing to schedule while the last token is on its way; without batches ahead there is none."""
    outcome = serve([(0, 1, 1), (0, 1, 1)], implementation=implementation, **ONE_SEAT)
    assert [step[:2] for step in batches(outcome)] == [(0, 11), (1011, 1022)]
    walking = ONE_SEAT | {"scheduler": VllmScheduling(idle_sleep_us=1, long_prefill_token_threshold=8)}
    outcome = serve([(0, 1, 1), (0, 1, 1)], implementation=implementation, **walking)
    assert [step[:2] for step in batches(outcome)] == [(0, 11), (1011, 1022)]
    outcome = serve([(0, 1, 1), (0, 1, 1)], implementation=implementation, max_num_seqs=1, **SLEEPS)
    assert [step[:2] for step in batches(outcome)] == [(0, 11), (11, 22)]


@both
def test_who_arrives_while_the_last_batch_runs_does_not_have_the_engine_sleep(implementation: Implementation) -> None:
    outcome = serve([(0, 1, 1), (5, 1, 1)], implementation=implementation, **ONE_SEAT)
    assert [step[:2] for step in batches(outcome)] == [(0, 11), (11, 22)]


@both
def test_a_pipeline_with_one_request_sleeps_before_each_of_its_tokens(implementation: Implementation) -> None:
    """The second turn finds it in flight; without a log the kernel jumps over the turns."""
    engine = replace(ENGINE, **SLEEPS)
    case = Case(settings=engine, blocks=9, laws=(linear(engine, 10),) * 2, trace=requests([(0, 1, 30)]))
    outcome = case.run(implementation, log=True)
    assert [step[:2] for step in batches(outcome)] == [(1020 * turn, 1020 * turn + 20) for turn in range(30)]
    assert case.run(implementation, log=False).finish_ns.tolist() == [1020 * 29 + 20]


@both
def test_an_answer_counts_as_given_while_the_replica_sleeps(implementation: Implementation) -> None:
    """Replica 0 answers one at 10 and sleeps; the request that comes at 500 finds one left there, as at replica 1."""
    engine = replace(ENGINE, max_model_len=300, **ONE_SEAT)
    rows = [(0, 1, 1), (0, 1, 200), (0, 1, 1), (500, 1, 1)]
    case = Case(settings=engine, blocks=99, laws=(linear(engine, 10),), trace=requests(rows), replicas=2)
    outcome = case.having(routing="least_loaded").run(implementation)
    assert outcome.busy_ns.tolist() == [[30], [2000]]
    assert outcome.finish_ns.tolist() == [10, 2000, 1020, 2030]


@both
def test_a_client_sends_its_next_request_with_its_answer_though_the_engine_sleeps(
    implementation: Implementation,
) -> None:
    engine = replace(ENGINE, **ONE_SEAT)
    trace = replace(requests([(0, 1, 1)] * 3), concurrency=2)
    case = Case(settings=engine, blocks=9, laws=(linear(engine, 10),), trace=trace)
    outcome = case.run(implementation)
    assert (outcome.arrival_ns.tolist(), outcome.finish_ns.tolist()) == ([0, 0, 10], [10, 1020, 2030])


# Nothing lost, nothing invented: what every log must show.


def audit(case: Case, outcome: Outcome) -> None:
    """Follow the log of one replica with a separate account of tokens and blocks; every batch must take time."""
    engine, steps, threshold = case.settings, batches(outcome), case.settings.scheduler.prompt_threshold
    prompt, output = case.trace.prompt.tolist(), case.trace.output.tolist()
    arrival, first, finish = (x.tolist() for x in (outcome.arrival_ns, outcome.first_token_ns, outcome.finish_ns))
    limit = [min(o, engine.max_model_len - p) for p, o in zip(prompt, output, strict=True)]
    computed: Counter[int] = Counter()
    seen: Counter[tuple[int, int]] = Counter()
    yielded: dict[int, int] = {}
    unlogged = outcome.preemptions - sum(len(lost) for _, _, _, lost in steps)
    assert unlogged >= 0
    stage_free = [0] * len(case.laws)
    busy = [0] * len(case.laws)
    depth = len(case.laws) if len(case.laws) > 1 else 1 + engine.async_scheduling
    # While a pipeline sleeps after an empty turn, and another, batches end that it takes in thereafter.
    late = depth * engine.scheduler.idle_sleep_ns if len(case.laws) > 1 else 0

    for number, (start, end, rows, lost) in enumerate(steps):
        tokens = sum(c for _, c, _ in rows)
        ids = [i for i, _, _ in rows]
        assert 0 < tokens <= engine.max_num_batched_tokens
        assert len(set(ids)) == len(ids)
        assert lost == sorted(set(lost)) and not set(lost) & set(ids)
        for i in lost:
            assert computed.pop(i) > 0
        admitted = False
        for i, c, held in rows:
            assert arrival[i] <= start
            begin = held - c
            if computed[i] and begin == computed[i]:
                # Found blocks can hide that it was preempted and admitted again.
                assert not admitted or (engine.prefix_caching and unlogged > 0), (
                    "a running sequence after a waiting one"
                )
            else:
                admitted = True
                unlogged -= computed[i] > 0  # preempted in a batch that was empty but for that
                assert begin == 0 or (engine.prefix_caching and begin % engine.block_size == 0)
                if engine.whole_prompts and not threshold:
                    assert held >= prompt[i]
            assert 0 < held < engine.max_model_len
            if threshold:
                assert c <= threshold
            computed[i] = held
            seen.update((i, t) for t in range(begin, held))
            if held >= prompt[i]:
                yielded.setdefault(i, end)
        assert not (admitted and lost), "somebody was admitted though another had to give way"

        # The clock: stages in order, one batch at a time, no more in flight than the loop allows.
        time = start
        for stage, law in enumerate(case.laws):
            duration = law.batch_ns([(c, held) for _, c, held in rows])
            time = max(time, stage_free[stage]) + duration
            stage_free[stage] = time
            busy[stage] += duration
            if stage + 1 < len(case.laws):
                time += int(law.transfer_ns[tokens])
        assert end == time > start
        if number:
            assert steps[number - 1][0] <= start and steps[number - 1][1] < end
        assert sum(other[1] > start for other in steps[: number + 1]) <= depth

        # The pool, as of this batch: those who have ended by now hold nothing.
        holding = {i: held for i, held in computed.items() if finish[i] > start}
        assert all(finish[i] > start or (late > 0 and finish[i] == start) for i in ids)
        assert len(holding) <= engine.max_num_seqs or unlogged > 0
        if not engine.prefix_caching and unlogged == 0:
            assert sum(ceil_div(held, engine.block_size) for held in holding.values()) <= case.blocks

    assert unlogged >= 0
    assert outcome.batches == len(steps)
    assert outcome.busy_ns.tolist() == [busy]
    assert outcome.counts.tokens == sum(seen.values()) == sum(c for _, _, rows, _ in steps for _, c, _ in rows)
    assert all(0 <= first[i] - yielded[i] <= late for i in range(len(prompt)))
    ends = [end for _, end, _, _ in steps]
    for i in range(len(prompt)):
        assert arrival[i] < first[i] <= finish[i]
        assert any(0 <= finish[i] - end <= late for end in ends)
        assert (first[i] == finish[i]) == (limit[i] == 1)
        if outcome.preemptions == 0 and not engine.prefix_caching:
            # Every token but the last is computed once; a pipeline may run past the end before it learns of it.
            beyond = len(case.laws) if engine.async_scheduling and len(case.laws) > 1 else 0
            mine = [seen[i, t] for t in range(prompt[i] + limit[i] - 1 + beyond)]
            assert mine[: prompt[i] + limit[i] - 1] == [1] * (prompt[i] + limit[i] - 1)
            assert max(mine) == 1
            assert sum(mine) == sum(count for (j, _), count in seen.items() if j == i)


@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop != "static"])
@settings(max_examples=25)
@given(data=st.data())
def test_the_log_accounts_for_every_token_block_and_nanosecond(loop: Loop, data: st.DataObject) -> None:
    case = data.draw(st.one_of(cases(loop, "dealt", busy=True), cases(loop, "closed", busy=True)))
    case = case.having(replicas=1)
    audit(case, case.run("reference"))


@pytest.mark.parametrize("loop", UNCACHED)
@settings(max_examples=15)
@given(data=st.data())
def test_a_first_token_takes_at_least_the_prompt_alone_on_the_slowest_stage(loop: Loop, data: st.DataObject) -> None:
    """Under a law that grows with tokens and context; a whole prompt in one chunk passes all stages in turn."""
    case = data.draw(cases(loop, "routed"))
    terms = data.draw(st.lists(st.tuples(*[st.integers(1, 30)] * 2, st.integers(0, 3)), min_size=4, max_size=4))
    longest = replace(case.settings, max_num_batched_tokens=64)
    used = terms[: len(case.laws)]
    case = case.having(laws=tuple(linear(case.settings, *term) for term in used))
    alone = [[linear(longest, *term).batch_ns([(p, p)]) for term in used] for p in case.trace.prompt.tolist()]
    outcome = case.run()
    ttft = (outcome.first_token_ns - outcome.arrival_ns).tolist()
    chunk = case.settings.scheduler.prompt_threshold or 64
    for waited, prompt, stages in zip(ttft, case.trace.prompt.tolist(), alone, strict=True):
        assert waited >= max(stages)
        if prompt <= chunk and not case.settings.chunked_prefill:
            assert waited >= sum(stages)


# What must not matter does not, and what must scale does.


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=6)
@given(data=st.data())
def test_slower_hardware_and_rarer_requests_scale_all_times_alike(
    loop: Loop, traffic: Traffic, data: st.DataObject
) -> None:
    case = data.draw(cases(loop, traffic, exact=True))
    k = data.draw(st.integers(2, 1000))
    once = case.run()
    slower = case.having(
        settings=sleeping(case.settings, case.settings.scheduler.idle_sleep_ns * k),
        laws=tuple(law.scaled(k) for law in case.laws),
        trace=replace(moved(case.trace, case.trace.arrival_ns * k), pause_ns=case.trace.pause_ns * k),
    ).run()
    expected = replace(
        once,
        arrival_ns=once.arrival_ns * k,
        first_token_ns=once.first_token_ns * k,
        finish_ns=once.finish_ns * k,
        busy_ns=once.busy_ns * k,
        steps=[(start * k, end * k, rows, lost) for start, end, rows, lost in batches(once)],
        gaps_ns=None if once.gaps_ns is None else once.gaps_ns * k,
    )
    assert_same(slower, expected)


@pytest.mark.parametrize("traffic", ["dealt", "routed"])
@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=8)
@given(data=st.data())
def test_a_trace_that_starts_later_ends_as_much_later(loop: Loop, traffic: Traffic, data: st.DataObject) -> None:
    case = data.draw(cases(loop, traffic))
    later = data.draw(st.integers(1, 1 << 60))
    once = case.run()
    expected = replace(
        once,
        arrival_ns=once.arrival_ns + later,
        first_token_ns=once.first_token_ns + later,
        finish_ns=once.finish_ns + later,
        steps=[(start + later, end + later, rows, lost) for start, end, rows, lost in batches(once)],
    )
    assert_same(case.having(trace=moved(case.trace, case.trace.arrival_ns + later)).run(), expected)


@pytest.mark.parametrize("loop", UNCACHED)
@settings(max_examples=20)
@given(data=st.data())
def test_blocks_beyond_what_all_requests_need_change_nothing(loop: Loop, data: st.DataObject) -> None:
    case = data.draw(cases(loop, "dealt"))
    surplus = data.draw(st.integers(1, 10**6))
    # A pipeline may compute a few tokens past the end.
    both = zip(case.trace.prompt.tolist(), (case.trace.output + len(case.laws)).tolist(), strict=True)
    enough = sum(blocks_of(case.settings, p, o) for p, o in both)
    plenty = case.having(blocks=enough).run()
    assert plenty.preemptions == 0
    assert_same(case.having(blocks=enough + surplus).run(), plenty)


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=15)
@given(data=st.data())
def test_turns_between_replicas_are_separate_engines_with_every_rth_request(loop: Loop, data: st.DataObject) -> None:
    case = data.draw(cases(loop, "dealt"))
    whole, parts = case.run(), []
    trace = case.trace
    for replica in range(min(case.replicas, len(trace))):
        mine = slice(replica, None, case.replicas)
        content: dict[str, Any] = {}
        if trace.content is not None and trace.content_starts is not None:
            says = np.split(trace.content, trace.content_starts[1:-1])[mine]
            content = {"content": says, "content_tokens": trace.content_tokens}
        columns = (trace.arrival_ns[mine], trace.prompt[mine], trace.output[mine])
        rows = list(zip(*(column.tolist() for column in columns), strict=True))
        alone = case.having(replicas=1, trace=requests(rows, **content)).run()
        assert np.array_equal(whole.first_token_ns[mine], alone.first_token_ns)
        assert np.array_equal(whole.finish_ns[mine], alone.finish_ns)
        assert np.array_equal(whole.busy_ns[replica], alone.busy_ns[0])
        parts.append(alone)
    assert whole.preemptions == sum(part.preemptions for part in parts)
    assert whole.counts.equals(sum((part.counts for part in parts[1:]), parts[0].counts))


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=15)
@given(data=st.data())
def test_more_clients_than_requests_are_a_burst_at_zero(loop: Loop, data: st.DataObject) -> None:
    case = data.draw(cases(loop, "closed"))
    idle = data.draw(st.integers(0, 3))
    closed = case.having(trace=replace(case.trace, concurrency=len(case.trace) + idle))
    burst = replace(case.trace, concurrency=None, pause_ns=0)  # nobody waits for an answer to pause after
    assert_same(closed.run(), case.having(trace=burst).run())


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=12)
@given(data=st.data())
def test_each_request_is_routed_to_the_replica_with_fewest_unanswered(loop: Loop, data: st.DataObject) -> None:
    """Routing by definition: from the requests before, every replica simulated on its own, to this one's place."""
    case = data.draw(cases(loop, "routed", busy=True, most=9))
    assume(case.trace.content is None)
    trace = case.trace
    rows = list(zip(trace.arrival_ns.tolist(), trace.prompt.tolist(), trace.output.tolist(), strict=True))
    dealt: list[list[int]] = [[] for _ in range(case.replicas)]
    finish: dict[int, int] = {}
    for i, (now, _, _) in enumerate(rows):
        best = min(range(case.replicas), key=lambda r: sum(finish[j] > now for j in dealt[r]))
        dealt[best].append(i)
        alone = case.having(replicas=1, trace=requests([rows[j] for j in dealt[best]])).run()
        finish |= dict(zip(dealt[best], alone.finish_ns.tolist(), strict=True))
    assert case.run("reference").finish_ns.tolist() == [finish[i] for i in range(len(rows))]


@settings(max_examples=25)
@given(
    st.permutations(range(12)),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=4, max_size=4),
    st.booleans(),
)
def test_permuting_rows_among_equal_requests_permutes_nothing_but_ids(
    order: list[int], kinds: list[tuple[int, int]], asynchronous: bool
) -> None:
    """Requests that arrive together are alike, so it cannot matter in which row each is written."""
    rows = [[3 * (i // 3), *kinds[i // 3]] for i in range(12)]
    config = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 8,
        "max_model_len": 32,
        "chunked_prefill": True,
        "long_prefill_token_threshold": 0,
        "block_size": 4,
        "num_gpu_blocks": 12,
        "async_scheduling": asynchronous,
        "law_us": [5, 1, 1],
    }
    one, other = replay(config, rows), replay(config, [rows[i] for i in order])
    assert sorted(zip(*zip(*rows, strict=True), one.first_token_us, one.finish_us, strict=True)) == sorted(
        zip(*zip(*(rows[i] for i in order), strict=True), other.first_token_us, other.finish_us, strict=True)
    )
    assert one.preemptions == other.preemptions
    assert [step[:2] for step in one.steps] == [step[:2] for step in other.steps]
