"""Prefix caching: recorded batches come out batch for batch, and what is found is what somebody has said before."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from golden.condense import digest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from simulator_cases import (
    IMPLEMENTATIONS,
    REPLAYED,
    TRAFFIC,
    Case,
    Traffic,
    assert_recorded,
    assert_same,
    blocks_of,
    engines,
    linear,
    random_law,
    requests,
)

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import ApexError, InputError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import replay
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.simulator import Outcome
    from apex_opt.simulator.api import Implementation

SOURCE = Path(__file__).parent / "golden" / "prefix_caching.json.gz"
RECORDED: list[dict[str, Any]] = json.loads(gzip.decompress(SOURCE.read_bytes()))


def computed(steps: list[Any]) -> int:
    """Tokens of all batches."""
    return sum(c for _, _, rows, _ in steps for _, c, _ in rows)


# What was recorded.


@REPLAYED
def test_recorded_batches_come_out_batch_for_batch(implementation: Implementation, every: int) -> None:
    for number in range(0, len(RECORDED), every):
        case = RECORDED[number]
        assert_recorded(replay(case["config"], case["trace"], implementation), case, number)


def test_the_recording_has_hits_preemptions_and_every_kind_of_engine_loop() -> None:
    configs = [case["config"] for case in RECORDED]
    assert len(configs) == 150 and all(config["prefix_caching"] for config in configs)
    assert sum(config["async_scheduling"] for config in configs) >= 50
    assert sum(config["stages"] > 1 for config in configs) >= 30
    assert sum(config["async_scheduling"] and config["stages"] > 1 for config in configs) >= 10
    assert sum(config["long_prefill_token_threshold"] > 0 for config in configs) >= 20
    assert sum(not config["chunked_prefill"] for config in configs) >= 20
    assert sum(case["preemptions"] > 0 for case in RECORDED) >= 20
    assert len({config["block_size"] for config in configs}) >= 3
    assert any(config["hash_block_tokens"] > config["block_size"] for config in configs)


def test_most_recorded_cases_would_come_out_differently_without_caching() -> None:
    without = [replay(case["config"] | {"prefix_caching": False}, [r[:3] for r in case["trace"]]) for case in RECORDED]
    changed = [digest(r.steps) != case["batches_sha256"] for r, case in zip(without, RECORDED, strict=True)]
    assert sum(changed) >= 75


def test_ids_of_a_recorded_case_say_nothing_but_which_are_equal() -> None:
    """Other numbers for the same pieces, large ones too, change no batch."""
    for case in RECORDED[:20]:
        trace = [[*row[:3], [(i * 0x9E3779B97F4A7C15 + 12345) % (1 << 62) for i in row[3]]] for row in case["trace"]]
        assert digest(replay(case["config"], trace).steps) == case["batches_sha256"]


SMALL: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 8,
    "max_model_len": 32,
    "chunked_prefill": True,
    "long_prefill_token_threshold": 0,
    "block_size": 4,
    "num_gpu_blocks": 9,
    "prefix_caching": True,
    "hash_block_tokens": 4,
    "async_scheduling": False,
    "law_us": [10, 1, 0],
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("config", "trace", "error", "message"),
    [
        ({"hash_block_tokens": 6}, [[0, 5, 3, [1]]], UsageError, "block_size 4 does not divide the 6 tokens"),
        ({"hash_block_tokens": 0}, [[0, 5, 3, [1]]], InputError, "content_tokens must be a whole number from 1"),
        ({}, [[0, 5, 3, [1]]], InputError, "row 1: 1 content ids for a prompt of 5 tokens; give one per 4"),
        ({}, [[0, 5, 3, [1, 2]], [0, 5, 3, [1, 2, 3]]], InputError, "row 2: 3 content ids for a prompt of 5 tokens"),
        ({}, [[0, 5, 3, [1, 1.5]]], InputError, "content of row 1: piece 2: id 1.5 is not a whole number"),
        ({}, [[0, 5, 3, [1, 2]], [0, 5, 3]], InputError, "row 2: 3 entries"),
        ({"hash_block_tokens": None}, [[0, 5, 3, [1, 2]]], UsageError, "config: missing hash_block_tokens"),
    ],
)
def test_content_that_does_not_fit_is_refused_in_one_line(
    config: dict[str, Any], trace: list[Any], error: type[ApexError], message: str, implementation: Implementation
) -> None:
    used = {key: value for key, value in (SMALL | config).items() if value is not None}
    with pytest.raises(error, match=message) as caught:
        replay(used, trace, implementation)
    assert "\n" not in str(caught.value)


# The compiled code equals the specification.


@st.composite
def conversations(draw: st.DrawFn, traffic: Traffic, *, most: int = 30, crowded: bool = False) -> Case:
    """Requests that take up what an earlier one has said, from some point on in other words, or start anew.

    Blocks of 1 to 16 tokens and pools that hold little more than the largest request, so that what could be found is
    often overwritten. In a crowd several compute the same long prompt chunk by chunk, so that equal content lies in
    many blocks, and preempt each other.
    """
    engine = replace(draw(engines("prefix caching")), block_size=draw(st.integers(1, 4 if crowded else 16)))
    if crowded:
        engine = replace(
            engine,
            max_num_seqs=draw(st.integers(2, 6)),
            max_num_batched_tokens=100,
            max_model_len=draw(st.integers(12, 64)),
            scheduler=VllmScheduling(long_prefill_token_threshold=draw(st.integers(1, 30))),
        )
    size = engine.block_size
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    piece = size * draw(st.sampled_from((1, 1, 2, 3)))
    again, words = (
        (0.9, 1) if crowded else draw(st.tuples(st.sampled_from((0.3, 0.8, 1.0)), st.sampled_from((2, 1000))))
    )
    count, gap = draw(st.integers(1, most)), draw(st.sampled_from((1, 30, 300)))
    room = engine.max_model_len - 1
    said: list[list[int]] = []
    rows: list[tuple[int, int, int]] = []
    now = 0
    for _ in range(count):
        prompt = int(rng.integers(1, 1 + rng.choice([min(4, room), room])))
        pieces = ceil_div(prompt, piece)
        before = said[rng.integers(len(said))] if said and rng.random() < again else []
        kept = before[: rng.integers(len(before) + 1)] if rng.random() < 0.3 else before
        said.append((kept + rng.integers(0, words, pieces).tolist())[:pieces])
        rows.append((now, prompt, int(rng.integers(1, 1 + rng.choice([2, 30])))))
        now += int(rng.integers(0, gap))
    need = [blocks_of(engine, p, o) for _, p, o in rows]
    stages = draw(st.sampled_from((1, 1, 2, 3)))
    zeros = draw(st.sampled_from((0.0, 0.0, 0.5)))
    return Case(
        settings=engine,
        blocks=max(need)
        + draw(st.sampled_from((0, 1, 3, max(need) // 2, *(() if crowded else (max(need), sum(need)))))),
        laws=tuple(
            random_law(engine, int(rng.integers(2**32)), zeros=zeros, copies=int(rng.integers(1, 4)))
            for _ in range(stages)
        ),
        trace=requests(
            rows,
            draw(st.integers(1, count + 2)) if traffic == "closed" else None,
            content=said,
            content_tokens=piece,
        ),
        replicas=draw(st.integers(2 if traffic == "routed" else 1, 3)),
        routing="least_loaded" if traffic == "routed" else "round_robin",
    )


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("examples", [40, pytest.param(2000, marks=pytest.mark.nightly)])
def test_kernel_equals_reference_on_random_conversations(traffic: Traffic, crowded: bool, examples: int) -> None:
    @settings(max_examples=examples)
    @given(conversations(traffic, crowded=crowded))
    def check(case: Case) -> None:
        assert_same(case.run("kernel"), case.run("reference"))

    check()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_prompt_tokens_found_in_the_cache_are_counted_once_a_request(implementation: Implementation) -> None:
    engine = EngineSettings(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=128, block_size=4, prefix_caching=True
    )
    # The second finds three whole blocks, the third, whose last block is all it lacks, all but that one.
    says = [[1, 2, 3, 4], [1, 2, 3, 9], [1, 2, 3, 4], [7, 2, 3, 4]]
    trace = requests([(1000 * i, 16, 2) for i in range(4)], content=says, content_tokens=4)
    case = Case(settings=engine, blocks=40, laws=(linear(engine, 10),), trace=trace)
    outcome = case.run(implementation)
    assert outcome.cached_tokens == 12 + 12
    assert outcome.cached_tokens == trace.prompt_tokens + 4 - outcome.counts.tokens
    off = replace(case, settings=replace(engine, prefix_caching=False)).run(implementation)
    assert off.cached_tokens == 0


@settings(max_examples=100)
@given(conversations("dealt"))
def test_what_is_not_found_is_computed_where_nobody_is_preempted(case: Case) -> None:
    # A batch formed before the last one ends may compute a token too many.
    outcome = replace(case, settings=replace(case.settings, async_scheduling=False)).run("kernel")
    generated = case.trace.generated(case.settings.max_model_len)
    if not outcome.preemptions:
        wanted = case.trace.prompt_tokens + int(generated.sum()) - len(case.trace)
        assert outcome.cached_tokens == wanted - outcome.counts.tokens
    assert 0 <= outcome.cached_tokens < case.trace.prompt_tokens


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_kernel_equals_reference_on_long_crowded_conversations(seed: int) -> None:
    """What small examples do not reach: deep preemption, many holders of one content, long queues of free blocks."""
    rng = np.random.default_rng(seed)
    for asynchronous, stages, threshold in ((False, 1, 0), (True, 1, 0), (True, 1, 40), (False, 2, 0), (True, 3, 0)):
        size = int(rng.choice([1, 3, 16]))
        engine = EngineSettings(
            max_num_seqs=24,
            max_num_batched_tokens=24 + int(rng.integers(0, 300)),
            max_model_len=600,
            scheduler=VllmScheduling(long_prefill_token_threshold=threshold),
            block_size=size,
            async_scheduling=asynchronous,
            prefix_caching=True,
        )
        said: list[list[int]] = []
        rows: list[tuple[int, int, int]] = []
        for number, now in enumerate(np.cumsum(rng.integers(0, 400, 150)).tolist()):
            before = said[rng.integers(max(0, number - 20), number)] if number and rng.random() < 0.8 else []
            said.append((before + rng.integers(0, 3, 100 // size).tolist())[: 300 // size])
            prompt = int(rng.integers(1, len(said[-1]) * size + 1))
            said[-1] = said[-1][: ceil_div(prompt, size)]
            rows.append((now, prompt, int(rng.choice([1, 10, 64, 250]))))
        case = Case(
            settings=engine,
            blocks=1800 // size,
            laws=tuple(random_law(engine, seed + 10 * s, zeros=0.1, copies=s + 1) for s in range(stages)),
            trace=requests(rows, content=said, content_tokens=size),
        )
        reference = case.run("reference")
        assert reference.preemptions > 0
        assert_same(case.run("kernel"), reference)


def found_tokens(case: Case, outcome: Outcome) -> list[int]:
    """Tokens that each request did not compute when it was first admitted."""
    found: dict[int, int] = {}
    for _, _, rows, _ in outcome.steps or ():
        for i, c, held in rows:
            found.setdefault(i, held - c)
    return [found[i] for i in range(len(case.trace))]


REACHED: dict[str, Callable[[Case, Outcome], bool]] = {
    "five preemptions": lambda _, outcome: outcome.preemptions >= 5,
    "a hit of three blocks": lambda case, outcome: max(found_tokens(case, outcome)) >= 3 * case.settings.block_size,
    "a hit of another request's block while it runs": lambda case, outcome: any(
        len(rows) > 1 and any(held > c > 1 and held - c == case.settings.block_size for _, c, held in rows[1:])
        for _, _, rows, _ in outcome.steps or ()
    ),
    "a hit that a larger pool would have made": lambda case, outcome: (
        sum(found_tokens(case, outcome)) < sum(found_tokens(case, case.having(blocks=10_000).run()))
    ),
    "a prompt found but for its last token": lambda case, outcome: any(
        prompt > 1 and found == prompt - 1
        for prompt, found in zip(case.trace.prompt.tolist(), found_tokens(case, outcome), strict=True)
    ),
}


@pytest.mark.parametrize("event", REACHED)
def test_random_conversations_reach_the_events_that_matter(event: str) -> None:
    find(
        conversations("dealt"),
        lambda case: REACHED[event](case, case.run()),
        settings=settings(max_examples=1000, derandomize=True, database=None, phases=[Phase.generate]),
    )


# What caching must and must not do.


def uncached(case: Case) -> Case:
    return case.having(settings=replace(case.settings, prefix_caching=False))


def plenty(case: Case) -> Case:
    """One replica with a pool in which nothing is ever overwritten."""
    tokens = int((case.trace.prompt + case.trace.output).sum()) + len(case.trace) * (case.settings.block_size + 8)
    return case.having(blocks=ceil_div(tokens, case.settings.block_size), replicas=1, routing="round_robin")


@settings(max_examples=100)
@given(st.one_of(conversations("dealt"), conversations("closed")))
def test_caching_saves_exactly_what_is_found_and_never_computes_more_on_a_large_pool(case: Case) -> None:
    case = plenty(case)
    cached, without = case.run(), uncached(case).run()
    assert cached.preemptions == without.preemptions == 0
    if len(case.laws) > 1 and case.settings.async_scheduling:
        return  # such a pipeline may compute tokens past the end of an answer, how many depends on the times
    assert cached.counts.tokens == without.counts.tokens - sum(found_tokens(case, cached))
    assert cached.counts.tokens == computed(cached.steps or [])


@settings(max_examples=60)
@given(conversations("dealt"), st.booleans())
def test_where_nothing_is_said_twice_a_large_pool_gives_the_times_of_no_caching(case: Case, silent: bool) -> None:
    case = plenty(case)
    trace = case.trace
    if silent:
        trace = replace(trace, content=None, content_starts=None, content_tokens=0)
    else:
        assert trace.content is not None
        ids = np.arange(len(trace.content))[::-1].copy()
        ids.flags.writeable = False
        trace = replace(trace, content=ids)
    assert_same(case.having(trace=trace).run(), uncached(case).run())


@settings(max_examples=60)
@given(conversations("dealt", most=12))
def test_requests_that_follow_each_other_find_the_longest_beginning_anyone_has_said(case: Case) -> None:
    """From token to token: what counts is equal text, in whole blocks, and never the last token of a prompt."""
    case = plenty(case)
    trace, size = case.trace, case.settings.block_size
    assert trace.content is not None and trace.content_starts is not None
    apart = 10_000_000 * np.arange(len(trace))
    apart.flags.writeable = False
    case = case.having(trace=replace(trace, arrival_ns=apart))
    texts: list[list[tuple[int, int]]] = []
    expected = []
    for i, prompt in enumerate(trace.prompt.tolist()):
        ids = trace.content[trace.content_starts[i] : trace.content_starts[i + 1]].tolist()
        text = [(piece, position) for piece in ids for position in range(trace.content_tokens)][:prompt]
        alike = 0
        for other in texts:
            same = 0
            while same < min(len(text), len(other)) and text[same] == other[same]:
                same += 1
            alike = max(alike, same)
        expected.append(min(alike, prompt - 1) // size * size)
        texts.append(text)
    for implementation in IMPLEMENTATIONS:
        outcome = case.run(implementation)
        assert (outcome.finish_ns[:-1] <= apart[1:]).all()
        assert found_tokens(case, outcome) == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("prompt", [1, 2, 15, 16, 17, 32, 33, 48])
def test_a_prompt_said_again_computes_only_what_its_last_block_leaves(
    prompt: int, size: int, implementation: Implementation
) -> None:
    engine = EngineSettings(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_model_len=64,
        block_size=size,
        prefix_caching=True,
        async_scheduling=False,
    )
    pieces = list(range(ceil_div(prompt, size)))
    case = Case(
        settings=engine,
        blocks=200,
        laws=(linear(engine, 10, 1),),
        trace=requests([(0, prompt, 1), (1000, prompt, 1)], content=[pieces] * 2, content_tokens=size),
    )
    outcome = case.run(implementation)
    rest = prompt - (prompt - 1) // size * size
    assert [rows for _, _, rows, _ in outcome.steps or ()] == [[(0, prompt, prompt)], [(1, rest, prompt)]]
    assert outcome.finish_ns.tolist() == [10 + prompt, 1000 + 10 + rest]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_answer_can_be_found_by_nobody_but_its_own_request(implementation: Implementation) -> None:
    """Request 0 holds a prompt of 4 and an answer of 8; request 1 says the same 4 and 8 more of its own."""
    engine = EngineSettings(
        max_num_seqs=1, max_num_batched_tokens=32, max_model_len=32, block_size=4, prefix_caching=True
    )
    case = Case(
        settings=engine,
        blocks=20,
        laws=(linear(engine, 10, 1),),
        trace=requests([(0, 4, 9), (1000, 12, 1)], content=[[7], [7, 8, 9]], content_tokens=4),
    )
    assert found_tokens(case, case.run(implementation)) == [0, 4]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("blocks", "again"), [(5, (1, 5)), (4, (3, 5))])
def test_a_preempted_request_finds_what_is_left_of_its_own_blocks_its_answer_included(
    blocks: int, again: tuple[int, int], implementation: Implementation
) -> None:
    """Both hold two full blocks of two tokens. Of five blocks request 0 takes the last, and request 1 later finds both
    of its own; of four it takes the one that request 1 filled last, so that only the first one is found."""
    engine = EngineSettings(
        max_num_seqs=2,
        max_num_batched_tokens=32,
        max_model_len=32,
        block_size=2,
        prefix_caching=True,
        async_scheduling=False,
    )
    case = Case(
        settings=engine,
        blocks=blocks,
        laws=(linear(engine, 10, 1),),
        trace=requests([(0, 2, 4), (0, 2, 4)], content=[[1], [2]], content_tokens=2),
    )
    outcome = case.run(implementation)
    assert outcome.preemptions == 1
    mine = [(c, held) for _, _, rows, _ in outcome.steps or () for i, c, held in rows if i == 1]
    assert mine == [(2, 2), (1, 3), (1, 4), again]


def test_caching_speeds_up_a_long_shared_beginning() -> None:
    """512 of 600 prompt tokens are the same: after the first request each computes 88."""
    engine = EngineSettings(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=1024, prefix_caching=True)
    rows = [(1000 * i, 600, 1) for i in range(20)]
    said = [[*range(32), *(100 * (i + 1) + j for j in range(6))] for i in range(20)]
    case = Case(
        settings=engine,
        blocks=2000,
        laws=(linear(engine, 1, 1),),
        trace=requests(rows, content=said, content_tokens=16),
    )
    cached, without = case.run(), uncached(case).run()
    assert found_tokens(case, cached) == [0] + [512] * 19
    assert int(cached.busy_ns.sum()) < 0.25 * int(without.busy_ns.sum())
