"""SGLang's engine with drafts: worked by hand, kernel and reference agree, nothing is lost, without drafts it is plain.

Nothing was recorded of it: its rules were read in the sources of SGLang 0.5.23.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sglang_cases import random_drafting_run, random_run
from simulator_cases import IMPLEMENTATIONS, assert_same, requests

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import Speculation
from apex_opt.search.bounds import StageFloor, isolated, may_preempt
from apex_opt.search.bounds.load import Load
from apex_opt.simulator import simulate
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.reference import loop, sglang

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.simulator import BatchLaw, Outcome
    from apex_opt.simulator.api import Implementation
    from apex_opt.workload.trace import Trace

EAGLE = Speculation(method="eagle", draft_tokens=3, accepted=((2,),))
SMALL = EngineSettings(
    max_num_seqs=4,
    max_num_batched_tokens=32,
    max_model_len=64,
    block_size=1,
    scheduler=SglangScheduling(),
    speculation=EAGLE,
)


def law(settings: EngineSettings, draft_ns: int = 10) -> BatchLaw:
    """A batch takes 100, and 10 more for each draft where any are made."""
    drafts = settings.speculation.draft_tokens if settings.speculation else 0
    return linear_law(
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        base_ns=100,
        token_ns=0,
        context_ns=0,
        draft_tokens=drafts,
        draft_ns=draft_ns if drafts else 0,
    )


def served(settings: EngineSettings, blocks: int, trace: Trace, implementation: Implementation) -> Outcome:
    return simulate(settings, blocks, [law(settings)], trace, log=True, implementation=implementation)


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 4000), marks=pytest.mark.nightly)])
def test_kernel_equals_reference_on_random_runs(seeds: range) -> None:
    for seed in seeds:
        run = random_drafting_run(seed)
        specified, logged, computed = run.by("reference"), run.by("kernel"), run.by("kernel", log=False)
        assert_same(specified, logged)
        assert_same(replace(specified, steps=None, gaps_ns=None, drafted=None), computed)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_step_is_formed_before_it_is_known_what_the_last_one_brought(implementation: Implementation) -> None:
    """Two of three drafts are right; a step takes 130 with its drafts, a batch of prompts 100."""
    found = served(SMALL, 99, requests([(0, 3, 8), (150, 5, 2)]), implementation)
    assert found.steps == [
        (0, 100, [(0, 3, 3)], []),
        (0, 230, [(0, 4, 7)], []),  # 3 + 1 - 1 computed, and 4
        (100, 360, [(0, 4, 10)], []),  # the device has 3 more tokens by then, the scheduler not yet
        (230, 460, [(1, 5, 5)], []),
        (360, 590, [(0, 4, 13), (1, 4, 9)], []),
    ]
    # Pages for two steps of right drafts beyond what is known to be computed: 3 + 8 from 99, then no more.
    assert found.drafted == [
        (96, [(0, 1)]),
        (88, [(3, 3)]),
        (88, [(3, 3)]),
        (83, [(0, 1)]),
        (69, [(3, 1), (3, 1)]),
    ]
    assert found.finish_ns.tolist() == [590, 590]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_overlap_a_step_is_known_before_the_next_one(implementation: Implementation) -> None:
    found = served(replace(SMALL, async_scheduling=False), 99, requests([(0, 3, 8), (150, 5, 2)]), implementation)
    assert found.steps == [
        (0, 100, [(0, 3, 3)], []),
        (100, 230, [(0, 4, 7)], []),
        (230, 330, [(1, 5, 5)], []),
        (330, 460, [(0, 4, 10), (1, 4, 9)], []),
        (460, 590, [(0, 4, 13)], []),
    ]
    assert found.finish_ns.tolist() == [590, 460]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_end_by_length_is_foreseen_only_where_one_token_is_enough(implementation: Implementation) -> None:
    """With two tokens left a step may bring one, so that another one is formed, whose result nobody needs."""
    one, two = (served(SMALL, 99, requests([(0, 3, output)]), implementation) for output in (2, 3))
    assert one.steps is not None and two.steps is not None
    assert [rows for _, _, rows, _ in one.steps] == [[(0, 3, 3)], [(0, 4, 7)]]
    assert [rows for _, _, rows, _ in two.steps] == [[(0, 3, 3)], [(0, 4, 7)], [(0, 4, 10)]]
    assert two.finish_ns.tolist() == [230]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_who_has_no_room_for_two_steps_of_right_drafts_waits(implementation: Implementation) -> None:
    """Two requests of 3 + 4 tokens: each needs 3 + 8 pages to decode, of 21 there are too few for both."""
    settings = replace(SMALL, async_scheduling=False)
    trace = requests([(0, 3, 4), (0, 3, 4)])
    enough, few = (served(settings, blocks, trace, implementation) for blocks in (22, 21))
    assert (enough.preemptions, few.preemptions) == (0, 1)
    assert few.steps is not None
    assert [(rows, lost) for _, _, rows, lost in few.steps] == [
        ([(0, 3, 3), (1, 3, 3)], []),
        ([(0, 4, 7)], [1]),
        ([(1, 4, 4)], []),  # its first token is kept
        ([(1, 4, 8)], []),
    ]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_drafter_of_hidden_states_finds_one_token_less_of_a_prefix(implementation: Implementation) -> None:
    """The second prompt is the first one's, in pages of 4: its last token is computed, with pairs the one before it."""
    plain = Speculation(method="draft", draft_tokens=3, accepted=((2,),), model="other")
    for tokens, pairs, alone in ((9, 4, 8), (10, 8, 8), (8, 4, 4)):
        trace = requests([(0, tokens, 2), (9000, tokens, 2)], content=[[1], [1]], content_tokens=tokens)
        for speculation, cached in ((EAGLE, pairs), (plain, alone)):
            settings = replace(SMALL, prefix_caching=True, block_size=4, speculation=speculation)
            assert served(settings, 99, trace, implementation).cached_tokens == cached, (tokens, speculation.method)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_right_drafts_batches_are_those_of_a_plain_engine(implementation: Implementation) -> None:
    """But for the rows, which are of four tokens, and where there are enough pages for those."""
    speculation = Speculation(method="ngram", draft_tokens=3, accepted=((0,),))
    for seed in range(2000, 2030):
        run = random_run(seed)
        scheduler = replace(run.settings.scheduler, mixed_chunk=False)
        tokens = max(run.settings.max_num_batched_tokens, 4 * run.settings.max_num_seqs)
        settings = replace(run.settings, max_num_batched_tokens=tokens, scheduler=scheduler)
        drafting = replace(settings, speculation=speculation)
        one, other = (
            replace(run, settings=its, laws=[law(its, draft_ns=0)], blocks=10_000).by(implementation)
            for its in (settings, drafting)
        )
        assert one.steps is not None and other.steps is not None
        assert len(one.steps) == len(other.steps)
        for step, with_drafts in zip(one.steps, other.steps, strict=True):
            assert step[:2] == with_drafts[:2], seed
            assert [i for i, _, _ in step[2]] == [i for i, _, _ in with_drafts[2]], seed
        assert one.finish_ns.tolist() == other.finish_ns.tolist()


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[sglang.SglangEngine]]:
    """Every engine that a run of the reference makes."""
    engines: list[sglang.SglangEngine] = []

    class Kept(sglang.SglangEngine):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            engines.append(self)

    monkeypatch.setattr(loop, "SglangEngine", Kept)
    yield engines


def test_all_is_given_back_and_every_request_gets_its_tokens(kept: list[sglang.SglangEngine]) -> None:
    retracted = 0
    for seed in range(1000, 1040):
        run = random_drafting_run(seed)
        retracted += run.by("reference").preemptions
        for engine in kept:
            scheduler = engine.scheduler
            assert scheduler.left() == run.blocks * run.settings.block_size
            assert scheduler.free_seats == run.settings.max_num_seqs
            for sequence in engine.sent:
                assert len(sequence.token_ns) == sequence.limit
                assert sequence.token_ns == sorted(sequence.token_ns)
                assert sequence.in_flight == 0 or sequence.finished
                assert sequence.node is None and sequence.held == sequence.blocks == 0
        kept.clear()
    assert retracted > 10


def test_limits_that_drafts_do_not_go_with_are_named() -> None:
    with pytest.raises(UsageError, match="max_num_seqs 9 with 3 drafts each are more than the max_num_batched"):
        replace(SMALL, max_num_seqs=9)
    with pytest.raises(UsageError, match="mixed_chunk: sglang switches it off where drafts are verified"):
        replace(SMALL, scheduler=SglangScheduling(mixed_chunk=True))
    with pytest.raises(CapacityError, match=r"3 prompt \+ 2 output tokens need 11 KV blocks of 1, the cache has 10"):
        served(SMALL, 10, requests([(0, 3, 2)]), "reference")


@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(80, 5000), marks=pytest.mark.nightly)])
def test_no_run_beats_its_bounds(seeds: range) -> None:
    for seed in seeds:
        run = random_drafting_run(seed)
        outcome = run.by("kernel")
        overtaking = may_preempt(run.settings, run.blocks, run.trace)
        floors = [StageFloor.of(of) for of in run.laws]
        first, rest = isolated(run.settings, floors, run.trace, overtaking=overtaking)
        assert (outcome.first_token_ns - outcome.arrival_ns >= first).all(), seed
        assert (outcome.finish_ns - outcome.first_token_ns >= rest).all(), seed
        assert overtaking or outcome.preemptions == 0, seed
        if run.trace.concurrency is not None or run.replicas > 1:
            continue
        load = Load.of(run.settings, floors[0], 1, run.trace, run.blocks, ("mean", "max"), overtaking=overtaking)
        since = int(run.trace.arrival_ns.min())
        first_s, whole_s = (outcome.first_token_ns - since) * 1e-9, (outcome.finish_ns - since) * 1e-9
        least = 2e-9 + np.array([load.first_s["mean"], load.first_s["max"], load.whole_s["mean"], load.total_s])
        assert (np.array([first_s.mean(), first_s.max(), whole_s.mean(), whole_s.max()]) + 4e-9 >= least).all(), seed
