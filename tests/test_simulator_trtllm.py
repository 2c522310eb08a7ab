"""TensorRT-LLM's scheduler: examples worked by hand from its rules, what no run may break, seeded faults, the kernel.

Nothing was recorded of it: its rules were read in its sources.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import (
    IMPLEMENTATIONS,
    TRAFFIC,
    Case,
    Traffic,
    alone,
    assert_same,
    linear,
    random_law,
    requests,
    speculations,
)

import apex_opt
from apex_opt.engines.schedulers import CAPACITY_POLICIES, CHUNKING_POLICIES, TrtllmScheduling, VllmScheduling
from apex_opt.errors import CapacityError, UnknownNameError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.reference.trtllm import TrtllmScheduler
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator import Outcome
    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.reference.sequence import Row, Sequence

Rows = list[tuple[int, int, int]]

ENGINE = EngineSettings(
    max_num_seqs=4,
    max_num_batched_tokens=32,
    max_model_len=64,
    chunked_prefill=False,
    block_size=4,
    async_scheduling=False,
    scheduler=TrtllmScheduling(),
)


def case(
    rows: Rows,
    *,
    blocks: int = 100,
    stated: list[int] | None = None,
    stages: int = 1,
    own: dict[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """Requests of (arrival, prompt, output) on batches of 10 ns and 1 ns for each token."""
    engine = replace(ENGINE, scheduler=TrtllmScheduling(**(own or {})), **changes)
    law = linear(engine, 10, 1)
    if engine.speculation is not None:
        law = linear_law(
            base_ns=10,
            token_ns=1,
            context_ns=0,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=engine.max_num_batched_tokens,
            draft_tokens=engine.speculation.draft_tokens,
        )
    return Case(
        settings=engine,
        blocks=blocks,
        laws=(law,) * stages,
        trace=requests(rows, max_new_tokens=stated),
    )


def shown(outcome: Outcome) -> list[tuple[int, int, Rows, list[int]]]:
    return outcome.steps or []


def drafts(count: int, *accepted: int, method: str = "mtp", **more: Any) -> Speculation:
    """So many drafts in each row, of which that many are right by tokens generated, in turn."""
    return Speculation(method=method, draft_tokens=count, accepted=(accepted,), **more)


WAITING = {"batch_wait_timeout_iters": 2, "batch_wait_max_tokens_ratio": 0.5}
EXAMPLES: dict[str, tuple[Case, list[Any]]] = {
    # The prompt of 1 comes after one that does not fit: nobody overtakes.
    "whole prompts": (
        case([(0, 20, 1), (0, 20, 1), (0, 1, 1)]),
        [(0, 30, [(0, 20, 20)], []), (30, 61, [(1, 20, 20), (2, 1, 1)], [])],
    ),
    # Decoding comes first and is never left out.
    "decoding first": (
        case([(0, 4, 3), (1, 31, 1)]),
        [
            (0, 14, [(0, 4, 4)], []),
            (14, 56, [(0, 1, 5), (1, 31, 31)], []),
            (56, 67, [(0, 1, 6)], []),
        ],
    ),
    # 0 may generate 8 and keeps 3 of 4 blocks; 1 needs 2 and waits, and so does 2, which needs but 1.
    "room to the end": (
        case([(0, 4, 2), (0, 4, 1), (0, 1, 1)], blocks=4, stated=[8, 4, 3]),
        [
            (0, 14, [(0, 4, 4)], []),
            (14, 25, [(0, 1, 5)], []),
            (25, 40, [(1, 4, 4), (2, 1, 1)], []),
        ],
    ),
    # Without overlap a seat is free once the answer is taken in.
    "seats": (
        case([(0, 2, 1), (0, 2, 2), (0, 2, 1)], max_num_seqs=2),
        [(0, 14, [(0, 2, 2), (1, 2, 2)], []), (14, 27, [(1, 1, 3), (2, 2, 2)], [])],
    ),
    # Batch 2 is formed at 0, before the first token is there; the batch after the last one of 0 is not formed for it.
    "overlap": (
        case([(0, 4, 3), (20, 4, 1)], async_scheduling=True),
        [
            (0, 14, [(0, 4, 4)], []),
            (0, 25, [(0, 1, 5)], []),
            (14, 36, [(0, 1, 6)], []),
            (25, 50, [(1, 4, 4)], []),
        ],
    ),
    # With overlap a request whose last token is on its way keeps its seat until that is taken in.
    "overlap, seats": (
        case([(0, 2, 1), (0, 2, 1)], max_num_seqs=1, async_scheduling=True),
        [(0, 12, [(0, 2, 2)], []), (12, 24, [(1, 2, 2)], [])],
    ),
    # Both grow beyond a block at 5 tokens, one block is left: the last that started gives way and keeps its token.
    "giving way": (
        case([(0, 4, 3), (0, 4, 3)], blocks=3, own={"capacity_policy": "MAX_UTILIZATION"}),
        [
            (0, 18, [(0, 4, 4), (1, 4, 4)], []),
            (18, 29, [(0, 1, 5)], [1]),
            (29, 40, [(0, 1, 6)], []),
            (40, 55, [(1, 5, 5)], []),
            (55, 66, [(1, 1, 6)], []),
        ],
    ),
    # 2 comes while 0 and 1 decode, and waits until both have ended.
    "static": (
        case([(0, 4, 2), (0, 4, 3), (1, 1, 1)], own={"capacity_policy": "STATIC_BATCH"}),
        [
            (0, 18, [(0, 4, 4), (1, 4, 4)], []),
            (18, 30, [(0, 1, 5), (1, 1, 5)], []),
            (30, 41, [(1, 1, 6)], []),
            (41, 52, [(2, 1, 1)], []),
        ],
    ),
    # 10 tokens: of 12 a chunk of 8, whole blocks; 2 fit behind it, 3 would be cut to none. Those that end come last.
    "chunks": (
        case([(0, 12, 1), (0, 3, 1), (0, 2, 1)], max_num_batched_tokens=10, chunked_prefill=True),
        [
            (0, 20, [(0, 8, 8), (2, 2, 2)], []),
            (20, 37, [(0, 4, 12), (1, 3, 3)], []),
        ],
    ),
    # A block of 4 for each in turn, or what is left: 1 token of 10 remains, in which the next block of 0 has no room.
    "chunks in turn": (
        case(
            [(0, 12, 1), (0, 3, 1), (0, 2, 1)],
            max_num_batched_tokens=10,
            chunked_prefill=True,
            own={"context_chunking_policy": "EQUAL_PROGRESS"},
        ),
        [
            (0, 19, [(0, 4, 4), (1, 3, 3), (2, 2, 2)], []),
            (19, 37, [(0, 8, 12)], []),
        ],
    ),
    # What has no room for a block has it for the end of a shorter prompt, also in a later round.
    "chunks in turn, passed over": (
        case(
            [(0, 12, 1), (0, 5, 1)],
            max_num_batched_tokens=10,
            chunked_prefill=True,
            own={"context_chunking_policy": "EQUAL_PROGRESS"},
        ),
        [
            (0, 19, [(0, 4, 4), (1, 5, 5)], []),
            (19, 37, [(0, 8, 12)], []),
        ],
    ),
    # Every turn waits 5 ns for 4 new requests, also that in which 0 decodes: 1 comes meanwhile, 2 and 3 only later.
    "waiting to fetch": (
        case([(0, 4, 3), (3, 4, 1), (30, 2, 1), (31, 1, 1)], own={"batch_wait_timeout_ms": 5e-6}),
        [
            (5, 23, [(0, 4, 4), (1, 4, 4)], []),
            (28, 39, [(0, 1, 5)], []),
            (44, 58, [(0, 1, 6), (2, 2, 2), (3, 1, 1)], []),
        ],
    ),
    # Two new ones fill a batch: the wait ends with the second. The next turn waits for two again, as one is known.
    "waiting no longer": (
        case([(0, 2, 1), (3, 2, 1), (4, 2, 1)], max_num_seqs=2, own={"batch_wait_timeout_ms": 5e-6}),
        [(3, 17, [(0, 2, 2), (1, 2, 2)], []), (22, 34, [(2, 2, 2)], [])],
    ),
    # All fit: none is cut, though 6 tokens are no whole blocks.
    "chunks that fit": (
        case([(0, 6, 1), (0, 4, 1)], max_num_batched_tokens=10, chunked_prefill=True),
        [(0, 20, [(0, 6, 6), (1, 4, 4)], [])],
    ),
    # 1 and 2 wait two turns for 16 tokens in a batch, then are computed all the same.
    "waiting": (
        case([(0, 4, 6), (1, 2, 1), (2, 2, 1)], own=WAITING),
        [
            (0, 14, [(0, 4, 4)], []),
            (14, 25, [(0, 1, 5)], []),
            (25, 36, [(0, 1, 6)], []),
            (36, 51, [(0, 1, 7), (1, 2, 2), (2, 2, 2)], []),
            (51, 62, [(0, 1, 8)], []),
            (62, 73, [(0, 1, 9)], []),
        ],
    ),
    # With 15 tokens of prompts and 1 that decodes there is half a batch: they wait no longer.
    "enough": (
        case([(0, 4, 3), (1, 14, 1), (15, 1, 1)], own=WAITING),
        [
            (0, 14, [(0, 4, 4)], []),
            (14, 25, [(0, 1, 5)], []),
            (25, 51, [(0, 1, 6), (1, 14, 14), (2, 1, 1)], []),
        ],
    ),
    # Of two drafts both are right after 1 token, none after 4, one after 5, where only one token is left. What is wrong
    # is taken back: 10 tokens are held at 27, of which 8 stay.
    "drafts": (
        case([(0, 4, 6)], speculation=drafts(2, 0, 2, 0, 0, 0, 1)),
        [(0, 14, [(0, 4, 4)], []), (14, 27, [(0, 3, 7)], []), (27, 40, [(0, 3, 10)], []), (40, 53, [(0, 3, 11)], [])],
    ),
    # With overlap all drafts count as right until their batch is done, and what ends by drafts is in one more.
    "drafts, overlap": (
        case([(0, 4, 7)], speculation=drafts(2, 2), async_scheduling=True),
        [
            (0, 14, [(0, 4, 4)], []),
            (0, 27, [(0, 3, 7)], []),
            (14, 40, [(0, 3, 10)], []),
            (27, 53, [(0, 3, 13)], []),
        ],
    ),
    # Of 8 tokens in a batch the drafts of two take 6; a prompt of 3 waits for the end of one of them.
    "drafts, tokens": (
        case([(0, 2, 5), (0, 2, 3), (1, 3, 1)], max_num_batched_tokens=8, speculation=drafts(2, 1)),
        [
            (0, 14, [(0, 2, 2), (1, 2, 2)], []),
            (14, 30, [(0, 3, 5), (1, 3, 5)], []),
            (30, 46, [(0, 3, 7), (2, 3, 3)], []),
        ],
    ),
    # The drafter keeps KV of the second draft as well: a prompt of 4 takes two blocks of three, and 1 waits until 27,
    # when 0 has ended.
    "drafts, ahead": (
        case(
            [(0, 4, 4), (0, 4, 4)],
            blocks=3,
            own={"capacity_policy": "MAX_UTILIZATION"},
            speculation=drafts(2, 0, 2),
        ),
        [(0, 14, [(0, 4, 4)], []), (14, 27, [(0, 3, 7)], []), (27, 41, [(1, 4, 4)], []), (41, 54, [(1, 3, 7)], [])],
    ),
    # An n-gram is not found after 1 token: nothing of the padded drafts is right.
    "drafts, proposed": (
        case([(0, 4, 4)], speculation=drafts(1, 1, method="ngram", proposed=((0, 0, 1),))),
        [(0, 14, [(0, 4, 4)], []), (14, 26, [(0, 2, 6)], []), (26, 38, [(0, 2, 7)], [])],
    ),
    # On two stages a request is in one batch at a time; batches of one seat follow each other into the pipeline.
    "stages": (
        case([(0, 4, 2), (0, 4, 1)], stages=2, max_num_seqs=1),
        [(0, 28, [(0, 4, 4)], []), (0, 42, [(1, 4, 4)], []), (28, 53, [(0, 1, 5)], [])],
    ),
    # On two stages blocks are looked for two steps ahead: at 34 there is one, which 0 may need; 1 gives way and comes
    # back at once, as 0 is on its way. At 56 only 0 can give way, in a batch without rows; at 75 it is first.
    "stages, giving way": (
        case([(0, 3, 3), (0, 4, 3)], stages=2, blocks=3, own={"capacity_policy": "MAX_UTILIZATION"}),
        [
            (0, 34, [(0, 3, 3), (1, 4, 4)], []),
            (34, 56, [(0, 1, 4)], [1]),
            (34, 75, [(1, 5, 5)], []),
            (75, 105, [(0, 5, 5)], [1]),
            (105, 137, [(1, 6, 6)], []),
        ],
    ),
}


both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@both
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_worked_by_hand(name: str, implementation: Implementation) -> None:
    served, expected = EXAMPLES[name]
    assert shown(served.run(implementation)) == expected


@both
def test_the_first_token_is_told_when_its_batch_is_taken_in(implementation: Implementation) -> None:
    served, _ = EXAMPLES["overlap"]
    outcome = served.run(implementation)
    assert (outcome.first_token_ns.tolist(), outcome.finish_ns.tolist()) == ([14, 50], [36, 50])


# Seeded faults: each is a rule changed, and an example shows it.


def _overtaking(self: TrtllmScheduler, listed: list[Sequence]) -> list[Sequence]:
    available, chosen = self.blocks.free, []
    for sequence in sorted(listed, key=lambda one: not self.decodes(one)):
        if self.decodes(sequence) or self.to_end(sequence) <= available:
            available -= self.to_end(sequence)
            chosen.append(sequence)
    return chosen


def _first_gives(self: TrtllmScheduler, sequence: Sequence) -> bool:
    started = [one for one in self.running if self.started(one) and not self.ending(one)]
    return bool(started) and sequence is started[0]


def _uncut(self: TrtllmScheduler, prompts: list[tuple[Sequence, int]], budget: int) -> list[tuple[Sequence, int]]:
    found = []
    for sequence, tokens in prompts:
        given = min(tokens, budget)
        budget -= given
        found += [(sequence, given)] if given else []
    return found


def _prompts_alone(self: TrtllmScheduler, chosen: list[Sequence]) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
    decoding, prompts = _WITHIN_TOKENS(self, chosen)
    return ([], prompts) if prompts else (decoding, prompts)


def _keeping_wrong_drafts(self: TrtllmScheduler, row: Row) -> int:
    held = row.sequence.computed
    got = _RECEIVE(self, row)
    row.sequence.computed = held
    return got


def _all_proposed(self: TrtllmScheduler, row: Row) -> int:
    assert self.speculation is None or isinstance(self.speculation, Speculation)
    known = self.speculation
    self.speculation = None if known is None else replace(known, proposed=())
    got = _RECEIVE(self, row)
    self.speculation = known
    return got


_RECEIVE = TrtllmScheduler.receive
_WITHIN_TOKENS = TrtllmScheduler.within_tokens
FAULTS: dict[str, tuple[str, Any]] = {
    "a prompt overtakes one without room": ("reserving", _overtaking),
    "room for the output alone": (
        "to_end",
        lambda self, one: ceil_div(one.prompt + one.limit, self.settings.block_size) - one.blocks,
    ),
    "no room kept for what decodes": (
        "to_end",
        lambda self, one: 0 if self.decodes(one) else ceil_div(one.prompt + one.stated, self.settings.block_size),
    ),
    "a step beyond the last token": ("ending", lambda self, one: one.generated >= one.limit),
    "the first gives way": ("gives", _first_gives),
    "nobody gives way": ("gives", lambda self, one: False),
    "prompts are not cut to whole blocks": ("cut", _uncut),
    "prompts never wait": ("held_back", lambda self, decoding, prompts: prompts),
    "prompts wait while any request decodes": (
        "held_back",
        lambda self, decoding, prompts: [] if decoding else prompts,
    ),
    "a request in two batches at once": ("is_free", lambda self, one: True),
    "room for one step on several stages": (
        "to_step",
        lambda self, one: (
            ceil_div(one.computed + 1 if one.computed else one.known, self.settings.block_size) - one.blocks
        ),
    ),
    "decoding waits for prompts": ("within_tokens", _prompts_alone),
    "drafts that are wrong stay": ("receive", _keeping_wrong_drafts),
    "blocks for the drafts of a row alone": (
        "held",
        lambda self, one, tokens: min(tokens, one.prompt + one.stated),
    ),
    "drafts that are not proposed are right": ("receive", _all_proposed),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_noticed_by_an_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrtllmScheduler, *FAULTS[name])

    def differs(served: Case, expected: list[Any]) -> bool:
        try:
            return shown(served.run("reference")) != expected
        except (AssertionError, IndexError):
            return True

    assert any(differs(*example) for example in EXAMPLES.values())


# Random engines and traffic.


@st.composite
def cases(
    draw: st.DrawFn, traffic: Traffic, *, stages: int | None = None, most: int = 20, drafting: bool = False
) -> Case:
    """Everything a simulation takes, from room for one request at a time to room for all."""
    known = draw(speculations()) if drafting else None
    seats, longest, chunked = draw(st.integers(1, 8)), draw(st.integers(4, 48)), draw(st.booleans())
    size = draw(st.sampled_from((1, 2, 4, 8)))
    depth = draw(st.sampled_from((1, 1, 1, 2, 3))) if stages is None and not drafting else stages or 1
    row = 1 + (known.draft_tokens if known else 0)
    engine = EngineSettings(
        max_num_seqs=seats,
        max_num_batched_tokens=max(seats, row, size if chunked else longest) + draw(st.sampled_from((0, 1, 5, 24))),
        max_model_len=longest,
        chunked_prefill=chunked,
        block_size=size,
        async_scheduling=draw(st.booleans()),
        scheduler=TrtllmScheduling(
            capacity_policy=draw(st.sampled_from(CAPACITY_POLICIES)),
            context_chunking_policy=draw(st.sampled_from(CHUNKING_POLICIES)),
            batch_wait_timeout_ms=draw(st.sampled_from((0.0, 0.0, 2e-6, 3e-5, 4e-4))),
            batch_wait_timeout_iters=draw(st.sampled_from((0, 0, 1, 3))),
            batch_wait_max_tokens_ratio=draw(st.sampled_from((0.0, 0.3, 1.0))),
        ),
        speculation=known,
    )
    count, seeds = draw(st.integers(1, most)), st.integers(0, 2**32 - 1)
    lengths = st.tuples(st.integers(1, longest - 1), st.one_of(st.just(1), st.integers(1, 40)), st.integers(0, 20))
    gaps = st.sampled_from((0, 0, 0, 1, 7, 40, 300))
    drawn = draw(st.lists(st.tuples(gaps, lengths), min_size=count, max_size=count))
    arrivals = np.cumsum([gap for gap, _ in drawn]).tolist()
    rows = [(at, prompt, output) for at, (_, (prompt, output, _)) in zip(arrivals, drawn, strict=True)]
    stated = [output + more for _, (_, output, more) in drawn]
    clients = draw(st.integers(1, count + 2)) if traffic == "closed" else None
    pause_ns = 0 if clients is None else draw(st.sampled_from((0, 0, 1, 50)))
    trace = requests(rows, clients, pause_ns, max_new_tokens=stated)
    ahead = known.ahead if known else 0
    needs = [ceil_div(total + ahead, size) for total in (trace.prompt + trace.stated(longest)).tolist()]
    zeros = draw(st.sampled_from((0.0, 0.3)))
    return Case(
        settings=engine,
        blocks=max(needs) + draw(st.integers(0, draw(st.sampled_from((0, 1, max(needs), sum(needs)))))),
        laws=tuple(random_law(engine, draw(seeds), zeros=zeros, copies=1) for _ in range(depth)),
        trace=trace,
        replicas=draw(st.integers(2 if traffic == "routed" else 1, 3)),
        routing="least_loaded" if traffic == "routed" else "round_robin",
    )


def check_same(served: Case) -> None:
    """Logged, where each batch is formed by the rules, and not, where stretches are jumped over."""
    expected = served.run("reference")
    assert_same(served.run("kernel"), expected)
    assert_same(served.run("kernel", log=False), replace(expected, steps=None, gaps_ns=None, drafted=None))


@pytest.mark.parametrize("traffic", TRAFFIC)
@settings(max_examples=60)
@given(data=st.data())
def test_the_kernel_equals_the_reference(traffic: Traffic, data: st.DataObject) -> None:
    check_same(data.draw(cases(traffic)))


@pytest.mark.parametrize("traffic", TRAFFIC)
@settings(max_examples=60)
@given(data=st.data())
def test_the_kernel_equals_the_reference_with_drafts(traffic: Traffic, data: st.DataObject) -> None:
    check_same(data.draw(cases(traffic, drafting=True)))


@pytest.mark.parametrize("routing", ["power_of_two", "cache_aware", "dynamo", "llm_d", "pull"])
@settings(max_examples=15)
@given(data=st.data())
def test_the_kernel_equals_the_reference_behind_every_router(routing: Routing, data: st.DataObject) -> None:
    check_same(data.draw(cases("routed", drafting=data.draw(st.booleans()))).having(routing=routing))


@pytest.mark.nightly
@settings(max_examples=4000)
@given(data=st.data())
def test_the_kernel_equals_the_reference_on_many_cases(data: st.DataObject) -> None:
    traffic, drafting = data.draw(st.sampled_from(TRAFFIC)), data.draw(st.booleans())
    check_same(data.draw(cases(traffic, most=30, drafting=drafting)))


@settings(max_examples=80)
@given(served=cases("dealt"))
def test_nothing_is_lost_or_invented(served: Case) -> None:
    """Every token but the last is computed once after each pause, in order, within seats and tokens."""
    served = served.having(replicas=1)
    engine, outcome = served.settings, served.run("reference")
    prompt, limits = served.trace.prompt.tolist(), served.trace.generated(engine.max_model_len).tolist()
    held: Counter[int] = Counter()
    yielded: Counter[int] = Counter()
    owed = dict(enumerate(prompt))
    for _, _, rows, lost in shown(outcome):
        for i in lost:
            held[i], owed[i] = 0, prompt[i] + yielded[i]
        assert 0 < len(rows) <= engine.max_num_seqs
        assert sum(tokens for _, tokens, _ in rows) <= engine.max_num_batched_tokens
        for i, tokens, after in rows:
            if held[i] and after == tokens:  # it gave way in a batch without rows, which is not told
                held[i], owed[i] = 0, prompt[i] + yielded[i]
            assert after == held[i] + tokens
            assert tokens == 1 or held[i] < owed[i]
            held[i] = after
            yielded[i] += after >= owed[i]
    assert outcome.preemptions == 0 or engine.scheduler.may_preempt
    if outcome.preemptions == 0:
        assert [yielded[i] for i in range(len(prompt))] == limits


@settings(max_examples=60)
@given(served=cases("dealt") | cases("dealt", drafting=True))
def test_no_request_beats_its_bound(served: Case) -> None:
    floor, outcome = alone(served), served.run(log=False)
    assert (outcome.first_token_ns - outcome.arrival_ns >= floor.first_token_ns - floor.arrival_ns).all()
    spent, least = outcome.finish_ns - outcome.first_token_ns, floor.finish_ns - floor.first_token_ns
    assert (spent >= least).all()


# What is refused.


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([(0, 33, 1)], {}, "request 0: 33 tokens are computed at once, the most of a batch is 32; raise"),
        ([(0, 20, 14)], {"own": {"capacity_policy": "MAX_UTILIZATION"}}, "request 0: 33 tokens are computed at once"),
        (
            [(0, 4, 1)],
            {"chunked_prefill": True, "block_size": 64},
            "whole blocks of 64 tokens, the most of a batch is 32",
        ),
        ([(0, 4, 1)], {"blocks": 3, "stated": [9]}, "need 4 KV blocks of 4, the cache has 3"),
    ],
)
def test_a_request_that_could_never_be_served_is_refused(rows: Rows, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CapacityError) as caught:
        case(rows, **changes).run()
    assert said in str(caught.value)


def test_settings_out_of_range_are_named() -> None:
    for wait in (-1, 60_001, float("nan"), True, "1"):
        with pytest.raises(UsageError, match=r"batch_wait_timeout_ms: .* is not a number from 0 to 60,000"):
            TrtllmScheduling(batch_wait_timeout_ms=wait)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown context_chunking_policy 'BY_SIZE'"):
        TrtllmScheduling(context_chunking_policy="BY_SIZE")
    with pytest.raises(UnknownNameError, match="unknown capacity_policy 'EVICT'"):
        TrtllmScheduling(capacity_policy="EVICT")
    for wrong in ({"batch_wait_timeout_iters": -1}, {"batch_wait_max_tokens_ratio": 1.5}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            TrtllmScheduling(**wrong)  # type: ignore[arg-type]


def test_bounds_know_that_a_pipeline_seats_so_many_for_each_stage() -> None:
    """Every plan is simulated to its end: none is better than its bound, which counts the seats of all stages."""
    found = apex_opt.plan(
        model="llama-3.1-8b",
        cluster="2xh200-sxm",
        engine="trtllm",
        trace="static:n=40,prompt=uniform(50,2000),output=60",
        seed=244,
        max_num_seqs=4,
        check=True,
    )
    assert found.holds
    assert [ENGINE.seats(stages) for stages in (1, 3)] == [4, 12]
    assert replace(ENGINE, scheduler=VllmScheduling(), max_num_batched_tokens=64).seats(3) == 4
