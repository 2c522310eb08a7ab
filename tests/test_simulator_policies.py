"""Orca's and static batching: what their rules say, followed through the log, and where they must equal vLLM's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from simulator_cases import IMPLEMENTATIONS, TRAFFIC, Case, assert_same, blocks_of, cases, linear, moved, requests

from apex_opt.engines.schedulers import SCHEDULINGS, OrcaScheduling, StaticScheduling, VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings

if TYPE_CHECKING:
    from typing import Literal

    from apex_opt.simulator import Outcome
    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.outcome import Step

    Reserving = Literal["orca", "static"]

POLICY = pytest.mark.parametrize("policy", ["orca", "static"])
both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def any_traffic(policy: Reserving) -> st.SearchStrategy[Case]:
    return st.one_of([cases(policy, traffic) for traffic in TRAFFIC])


def alone(policy: Reserving) -> st.SearchStrategy[Case]:
    """One replica whose every batch takes time."""
    either = st.one_of(cases(policy, "dealt", busy=True), cases(policy, "closed", busy=True))
    return either.map(lambda case: case.having(replicas=1))


def batches(outcome: Outcome) -> list[Step]:
    assert outcome.steps is not None
    return outcome.steps


def limits(case: Case) -> list[int]:
    """Tokens each request generates."""
    pairs = zip(case.trace.prompt.tolist(), case.trace.output.tolist(), strict=True)
    return [min(output, case.settings.max_model_len - prompt) for prompt, output in pairs]


def reserved(case: Case) -> list[int]:
    """Blocks each request holds from admission on: prompt and answer, but for the last token, which is not computed."""
    pairs = zip(case.trace.prompt.tolist(), limits(case), strict=True)
    return [-(-(prompt + limit - 1) // case.settings.block_size) for prompt, limit in pairs]


@POLICY
@pytest.mark.parametrize("examples", [50, pytest.param(3000, marks=pytest.mark.nightly)])
def test_kernel_equals_reference_on_random_engines_and_traffic(policy: Reserving, examples: int) -> None:
    @settings(max_examples=examples)
    @given(any_traffic(policy))
    def check(case: Case) -> None:
        assert case.settings.scheduler.name == policy
        assert_same(case.run("kernel"), case.run("reference"))

    check()


# Both: blocks reserved for the whole answer, first come first served, whole prompts, as early as can be.


@POLICY
def test_nobody_is_ever_preempted(policy: Reserving) -> None:
    @settings(max_examples=30)
    @given(any_traffic(policy))
    def check(case: Case) -> None:
        outcome = case.run()
        assert outcome.preemptions == 0
        assert all(lost == [] for _, _, _, lost in batches(outcome))

    check()


@POLICY
def test_admission_is_first_come_first_served_in_whole_prompts_and_within_reserved_blocks(policy: Reserving) -> None:
    @settings(max_examples=30)
    @given(alone(policy))
    def check(case: Case) -> None:
        outcome, engine, need = case.run(), case.settings, reserved(case)
        arrival, finish = outcome.arrival_ns.tolist(), outcome.finish_ns.tolist()
        prompt = case.trace.prompt.tolist()
        admitted: list[int] = []
        for start, _, rows, _ in batches(outcome):
            before = [i for i in admitted if finish[i] > start]
            tokens = sum(c for _, c, _ in rows)
            assert tokens <= engine.max_num_batched_tokens
            for i, c, held in rows:
                if i in admitted:
                    assert c == 1
                    continue
                assert (c, held) == (prompt[i], prompt[i]), "a prompt is computed in one batch"
                assert arrival[i] <= start
                assert i == len(admitted), "in order of arrival"
                admitted.append(i)
            running = [i for i in admitted if finish[i] > start]
            assert len(running) <= engine.max_num_seqs
            assert sum(need[i] for i in running) <= case.blocks
            # Whoever comes next waits for a reason.
            behind = len(admitted)
            if behind < len(prompt) and arrival[behind] <= start:
                assert (
                    len(running) == engine.max_num_seqs
                    or tokens + prompt[behind] > engine.max_num_batched_tokens
                    or sum(need[i] for i in running) + need[behind] > case.blocks
                    or (policy == "static" and before)
                )
        assert admitted == list(range(len(prompt)))

    check()


@POLICY
def test_every_token_but_the_last_is_computed_once(policy: Reserving) -> None:
    @settings(max_examples=30)
    @given(alone(policy))
    def check(case: Case) -> None:
        outcome = case.run()
        held = [0] * len(case.trace)
        beyond = 0
        for _, _, rows, _ in batches(outcome):
            for i, c, after in rows:
                if after == held[i]:
                    beyond += c  # static: done, and computing on
                else:
                    assert after == held[i] + c
                held[i] = after
        assert held == [p + n - 1 for p, n in zip(case.trace.prompt.tolist(), limits(case), strict=True)]
        assert policy == "static" or beyond == 0
        assert outcome.counts.tokens == sum(held) + beyond

    check()


@both
def test_a_long_prompt_in_front_holds_up_short_ones_behind_it(implementation: Implementation) -> None:
    """Ten tokens of budget, nine of them gone: the next prompt needs two and waits, and the one behind it with it."""
    engine = EngineSettings(
        max_num_seqs=4, max_num_batched_tokens=10, max_model_len=10, scheduler=OrcaScheduling(), async_scheduling=False
    )
    case = Case(
        settings=engine, blocks=9, laws=(linear(engine, 10),), trace=requests([(0, 9, 1), (0, 2, 1), (0, 1, 1)])
    )
    assert [rows for _, _, rows, _ in batches(case.run(implementation))] == [[(0, 9, 9)], [(1, 2, 2), (2, 1, 1)]]


@both
def test_the_last_token_needs_no_block(implementation: Implementation) -> None:
    """Four tokens of prompt and answer fill a block of four with the fifth never computed."""
    for output, together in ((2, True), (3, False)):
        engine = EngineSettings(
            max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32, block_size=4, scheduler=OrcaScheduling()
        )
        case = Case(
            settings=engine, blocks=3 - together, laws=(linear(engine, 10),), trace=requests([(0, 3, output)] * 2)
        )
        first = batches(case.run(implementation))[0][2]
        assert len(first) == 1 + together


@both
def test_an_answer_that_the_models_length_cuts_reserves_only_what_it_can_fill(implementation: Implementation) -> None:
    engine = EngineSettings(
        max_num_seqs=4, max_num_batched_tokens=16, max_model_len=8, block_size=4, scheduler=OrcaScheduling()
    )
    case = Case(settings=engine, blocks=4, laws=(linear(engine, 10),), trace=requests([(0, 4, 1000)] * 2))
    assert blocks_of(engine, 4, 1000) == 2
    outcome = case.run(implementation)
    assert [len(rows) for _, _, rows, _ in batches(outcome)] == [2] * 4


@settings(max_examples=30)
@given(alone("orca"))
def test_orca_gives_every_running_sequence_a_token_in_every_batch_of_a_synchronous_stage(case: Case) -> None:
    engine = replace(case.settings, async_scheduling=False)
    outcome = case.having(settings=engine, laws=case.laws[:1]).run()
    finish = outcome.finish_ns.tolist()
    running: list[int] = []
    for start, _, rows, _ in batches(outcome):
        running = [i for i in running if finish[i] > start]
        running += [i for i, _, _ in rows if i not in running]
        assert [i for i, _, _ in rows] == running


# Static batching.


@settings(max_examples=50)
@given(alone("static"))
def test_static_batches_start_when_nobody_runs_and_are_answered_together(case: Case) -> None:
    outcome, limit, prompt = case.run(), limits(case), case.trace.prompt.tolist()
    steps = batches(outcome)
    first, finish = outcome.first_token_ns.tolist(), outcome.finish_ns.tolist()
    at = 0
    seen: list[int] = []
    while at < len(steps):
        members = [i for i, _, _ in steps[at][2]]
        assert not set(members) & set(seen)
        seen += members
        # As many batches as the longest answer has tokens; who is done keeps a row over the same context.
        longest = max(limit[i] for i in members)
        for turn in range(longest):
            start, _, rows, _ = steps[at + turn]
            assert [i for i, _, _ in rows] == members
            assert [held for _, _, held in rows] == [prompt[i] + min(turn, limit[i] - 1) for i in members]
            assert [c for _, c, _ in rows] == [prompt[i] if turn == 0 else 1 for i in members]
            if at + turn:
                assert start >= steps[at + turn - 1][1], "one batch at a time, on any number of stages"
        assert {finish[i] for i in members} == {steps[at + longest - 1][1]}
        assert {first[i] for i in members} == {steps[at][1]}
        at += longest
    assert sorted(seen) == list(range(len(prompt)))
    assert outcome.batches == len(steps)


@settings(max_examples=40)
@given(alone("static"))
def test_static_batching_does_not_depend_on_asynchronous_scheduling(case: Case) -> None:
    """There is nothing to schedule while a batch runs."""
    with_it, without = (
        case.having(settings=replace(case.settings, async_scheduling=flag)).run() for flag in (True, False)
    )
    assert_same(with_it, without)


# Where policies must agree.


@st.composite
def light(draw: st.DrawFn) -> Case:
    """Seats, tokens and blocks for all requests at once; a pipeline without asynchronous scheduling, as it may run past
    the end of an answer before it learns of it."""
    case = draw(alone("orca"))
    engine = replace(
        case.settings,
        max_num_seqs=len(case.trace),
        max_num_batched_tokens=case.trace.prompt_tokens + len(case.trace) + case.settings.max_model_len,
        async_scheduling=case.settings.async_scheduling and len(case.laws) == 1,
    )
    laws = tuple(linear(engine, *draw(st.tuples(*[st.integers(0, 20)] * 3))) for _ in case.laws)
    return case.having(settings=engine, laws=laws, blocks=sum(reserved(case)))


@settings(max_examples=50)
@given(light(), st.booleans())
def test_orca_equals_vllm_where_neither_tokens_nor_blocks_nor_seats_are_short(case: Case, chunked: bool) -> None:
    assert case.settings.scheduler.name == "orca"
    vllm = replace(case.settings, scheduler=VllmScheduling(), chunked_prefill=chunked)
    for implementation in IMPLEMENTATIONS:
        assert_same(case.run(implementation), case.having(settings=vllm).run(implementation))


@settings(max_examples=30)
@given(light())
def test_all_policies_agree_on_requests_that_are_alone(case: Case) -> None:
    assume(case.trace.concurrency is None)
    spread = case.trace.arrival_ns + 10_000_000 * (1 + case.trace.arrival_ns.argsort(kind="stable"))
    case = case.having(trace=moved(case.trace, spread))
    outcomes = [
        case.having(settings=replace(case.settings, scheduler=SCHEDULINGS[policy]())).run(implementation)
        for policy in ("vllm", "orca", "static")
        for implementation in IMPLEMENTATIONS
    ]
    one = outcomes[0]
    for other in outcomes[1:]:
        # Static batching has nothing to form ahead, so that only the times at which batches are formed may differ.
        assert [step[1:] for step in batches(other)] == [step[1:] for step in batches(one)]
        assert_same(replace(other, steps=None), replace(one, steps=None))


@settings(max_examples=40)
@given(light())
def test_static_never_answers_before_orca_where_nothing_is_short(case: Case) -> None:
    """All at once: one static batch, answered when the longest is done; Orca answers each as it is."""
    case = case.having(trace=moved(replace(case.trace, concurrency=None, pause_ns=0), case.trace.arrival_ns * 0))
    orca = case.run()
    static = case.having(settings=replace(case.settings, scheduler=StaticScheduling())).run()
    assert (static.first_token_ns == orca.first_token_ns).all()
    assert (static.finish_ns >= orca.finish_ns).all()
    assert len(set(static.finish_ns.tolist())) == 1


# Settings.


@pytest.mark.parametrize("scheduler", ["orca", "", None, 1, OrcaScheduling, ["orca"]])
def test_what_is_no_scheduler_is_refused_with_those_there_are(scheduler: Any) -> None:
    with pytest.raises(UsageError, match=r"scheduler: .* is none of vllm, sglang, trtllm, orca, static") as caught:
        EngineSettings(scheduler=scheduler)
    assert "\n" not in str(caught.value)


@POLICY
def test_prefix_caching_goes_with_engines_that_are_deployed(policy: str) -> None:
    EngineSettings(prefix_caching=True, scheduler=VllmScheduling())
    with pytest.raises(
        UsageError, match=f"prefix_caching goes with the engines vllm, sglang, trtllm, not with {policy}; "
    ):
        EngineSettings(prefix_caching=True, scheduler=SCHEDULINGS[policy](), max_model_len=8192)


@POLICY
@pytest.mark.parametrize("chunked", [False, True])
def test_a_budget_below_the_models_length_is_refused_as_no_prompt_is_split(policy: str, chunked: bool) -> None:
    EngineSettings(
        scheduler=SCHEDULINGS[policy](), chunked_prefill=chunked, max_num_batched_tokens=2048, max_model_len=2048
    )
    EngineSettings(scheduler=VllmScheduling(), max_num_batched_tokens=2048, max_model_len=2049)
    with pytest.raises(UsageError, match="max_num_batched_tokens 2048 must reach max_model_len 2049"):
        EngineSettings(
            scheduler=SCHEDULINGS[policy](), chunked_prefill=chunked, max_num_batched_tokens=2048, max_model_len=2049
        )


def test_whole_prompts_are_what_only_chunked_vllm_splits() -> None:
    wide: dict[str, Any] = {"max_num_batched_tokens": 4096, "max_model_len": 4096}
    assert not EngineSettings(**wide).whole_prompts
    assert EngineSettings(**wide, chunked_prefill=False).whole_prompts
    assert EngineSettings(**wide, scheduler=OrcaScheduling()).whole_prompts
    assert EngineSettings(**wide, scheduler=StaticScheduling()).whole_prompts
