"""Attention ranks of SGLang: reference and kernel agree, rules by hand, one rank is as none, nothing is lost."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ranks_cases import assert_same, drafting_ranks, random_ranks, served
from sglang_cases import random_drafting_run, random_run
from simulator_cases import requests

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import Speculation
from apex_opt.search.bounds import StageFloor, isolated, may_preempt
from apex_opt.simulator import EnginePool, run_deployment
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.ranks import Ranks
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.workload.trace import Trace

FEW = range(120)
MANY = pytest.param(range(120, 3000), marks=pytest.mark.nightly)


def random_pool(seed: int, count: int | None = None) -> tuple[EnginePool, Trace, str]:
    """Replicas with ranks of the settings of a run without, and its trace."""
    run, draw = random_run(seed), random.Random(seed)
    ranks = random_ranks(draw, count or draw.choice([1, 2, 2, 3, 4]), run.settings, len(run.laws))
    pool = EnginePool(settings=run.settings, blocks=run.blocks, laws=run.laws, replicas=run.replicas, ranks=ranks)
    return pool, run.trace, run.routing


def random_drafting_pool(seed: int, count: int | None = None) -> tuple[EnginePool, Trace, str]:
    """The same where drafts are verified."""
    run, draw = random_drafting_run(seed), random.Random(seed)
    ranks = random_ranks(draw, count or draw.choice([1, 2, 2, 3, 4]), run.settings, 1)
    ranks = drafting_ranks(ranks, run.settings, np.random.default_rng(seed))
    pool = EnginePool(settings=run.settings, blocks=run.blocks, laws=run.laws, replicas=run.replicas, ranks=ranks)
    return pool, run.trace, run.routing


def outcome_of(pool: EnginePool, trace: Trace, implementation: Implementation, routing: str) -> Outcome | None:
    """What comes of a run; None where a prompt in the middle of its chunks finds no room and holds up all others."""
    try:
        return served(pool, trace, implementation, routing=routing)
    except CapacityError:
        return None


def stuck_of(made: Callable[[int], Any], seeds: range) -> int:
    """Both implementations say the same of runs that are made of these seeds; how many of them get stuck in both."""
    stuck = 0
    for seed in seeds:
        pool, trace, routing = made(seed)
        kernel, reference = (outcome_of(pool, trace, which, routing) for which in ("kernel", "reference"))
        assert (kernel is None) == (reference is None), f"seed {seed}"
        stuck += kernel is None
        try:
            if kernel is not None and reference is not None:
                assert_same(kernel, reference)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
    return stuck


# Of 2898 a rank whose requests are all retracted has an empty batch beside one in which some are.
@pytest.mark.parametrize("seeds", [FEW, range(2898, 2899), MANY])
def test_compiled_ranks_equal_the_reference(seeds: range) -> None:
    assert stuck_of(random_pool, seeds) <= len(seeds) // 50


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 2000), marks=pytest.mark.nightly)])
def test_compiled_ranks_that_verify_drafts_equal_the_reference(seeds: range) -> None:
    assert stuck_of(random_drafting_pool, seeds) <= len(seeds) // 20


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 2000), marks=pytest.mark.nightly)])
def test_no_request_on_ranks_that_verify_drafts_beats_its_bound(seeds: range) -> None:
    for seed in seeds:
        pool, trace, routing = random_drafting_pool(seed)
        assert pool.ranks is not None
        try:
            outcome = run_deployment([pool], trace, routing=routing)  # type: ignore[arg-type]
        except CapacityError:
            continue
        first, rest = isolated(
            pool.settings,
            StageFloor.of_pool(pool.laws, pool.ranks),
            trace,
            overtaking=may_preempt(pool.settings, pool.blocks, trace),
        )
        assert (outcome.first_token_ns - outcome.arrival_ns >= first).all(), seed
        assert (outcome.finish_ns - outcome.first_token_ns >= rest).all(), seed


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_one_rank_that_verifies_drafts_does_what_a_scheduler_without_ranks_does(implementation: Implementation) -> None:
    for seed in range(30):
        run = random_drafting_run(seed)
        limits = {
            "max_num_seqs": run.settings.max_num_seqs,
            "max_num_batched_tokens": run.settings.max_num_batched_tokens,
        }
        pool = EnginePool(settings=run.settings, blocks=run.blocks, laws=run.laws, replicas=run.replicas)
        bare = Ranks.bare(1, **limits, drafting=True)
        one = served(replace(pool, ranks=bare), run.trace, implementation, routing=run.routing)
        none = served(pool, run.trace, implementation, routing=run.routing)
        pools = tuple(replace(its, shared=None) for its in one.pools)
        # What came of drafts is told of a scheduler without ranks alone.
        assert_same(replace(one, groups=(), pools=pools), replace(none, drafted=None))


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_one_rank_does_what_a_scheduler_without_ranks_does(implementation: Implementation) -> None:
    for seed in range(40):
        run = random_run(seed)
        limits = {
            "max_num_seqs": run.settings.max_num_seqs,
            "max_num_batched_tokens": run.settings.max_num_batched_tokens,
            "stages": len(run.laws),
        }
        pool = EnginePool(settings=run.settings, blocks=run.blocks, laws=run.laws, replicas=run.replicas)
        one = served(replace(pool, ranks=Ranks.bare(1, **limits)), run.trace, implementation, routing=run.routing)
        none = served(pool, run.trace, implementation, routing=run.routing)
        pools = tuple(replace(its, shared=None) for its in one.pools)
        assert_same(replace(one, groups=(), pools=pools), none)


# By hand.

SMALL = EngineSettings(
    max_num_seqs=4,
    max_num_batched_tokens=8,
    max_model_len=64,
    block_size=1,
    async_scheduling=False,
    scheduler=SglangScheduling(),
)


def two(rows: list[tuple[int, int, int]], *, balanced: bool = False, blocks: int = 200, count: int = 2) -> Outcome:
    """Requests (arrival, prompt, output) on ranks whose batches take 10 ns, and one for each token of all."""
    ranks = Ranks.bare(count, max_num_seqs=4, max_num_batched_tokens=8)
    each = np.arange(count * 8 + 1, dtype=np.int64)
    shared = replace(ranks.shared[0], decode_ns=each, mixed_ns=each)
    law = linear_law(base_ns=10, token_ns=0, context_ns=0, max_num_seqs=4, max_num_batched_tokens=8)
    pool = EnginePool(
        settings=SMALL, blocks=blocks, laws=[law], ranks=replace(ranks, balanced=balanced, shared=(shared,))
    )
    trace = make_trace(
        name="by hand",
        arrival_ns=[at for at, _, _ in rows],
        prompt=[prompt for _, prompt, _ in rows],
        output=[output for _, _, output in rows],
    )
    kernel, reference = (served(pool, trace, which) for which in ("kernel", "reference"))
    assert_same(kernel, reference)
    return reference


def test_a_rank_decodes_beside_one_that_computes_a_prompt_and_all_pay_for_the_tokens_of_all() -> None:
    outcome = two([(0, 3, 3), (14, 8, 1)])
    assert outcome.steps == [
        (0, 13, [(0, 3, 3)], []),
        (13, 24, [(0, 1, 4)], []),
        (24, 43, [(0, 1, 5)], []),  # 10 and 1 + 8 tokens
        (24, 43, [(1, 8, 8)], []),
    ]
    assert outcome.steps_per_replica == [4]
    (group,) = outcome.groups
    assert group.forwards == [[(0, 13, 0, 3), (13, 24, 0, 1), (24, 43, 0, 9)]]
    assert (group.batches, group.dummies) == ([3, 1], [0, 0])


def test_ranks_make_drafts_together_and_one_without_a_batch_runs_along_without_a_sequence() -> None:
    """10 ns, one for each token of all, and 100 for each sequence where drafts are made: not where prompts begin."""
    drafts = Speculation(method="eagle", draft_tokens=2, accepted=((2,),))
    settings = replace(SMALL, max_num_seqs=2, speculation=drafts)
    limits = {"max_num_seqs": 2, "max_num_batched_tokens": 8}
    ranks = Ranks.bare(2, **limits, drafting=True)
    each, made = np.arange(17, dtype=np.int64), 100 * np.arange(5, dtype=np.int64)
    shared = replace(ranks.shared[0], decode_ns=each, mixed_ns=each, draft_ns=made)
    law = linear_law(base_ns=10, token_ns=0, context_ns=0, draft_tokens=2, draft_ns=0, **limits)
    pool = EnginePool(settings=settings, blocks=200, laws=[law], ranks=replace(ranks, shared=(shared,)))
    trace = requests([(0, 3, 4), (0, 8, 2), (300, 3, 4)])
    kernel, reference = (served(pool, trace, which) for which in ("kernel", "reference"))
    assert_same(kernel, reference)
    assert reference.steps == [
        (0, 21, [(0, 3, 3)], []),
        (21, 237, [(0, 3, 6)], []),
        (300, 313, [(2, 3, 3)], []),
        (313, 426, [(2, 3, 6)], []),
        (0, 21, [(1, 8, 8)], []),
        (21, 237, [(1, 3, 11)], []),
    ]
    assert reference.finish_ns.tolist() == [237, 237, 426]


def test_requests_go_to_the_ranks_in_turn_or_to_the_one_with_the_fewest() -> None:
    rows = [(0, 2, 1), (0, 2, 9), (40, 2, 1)]
    in_turn, by_load = two([*rows, (41, 2, 1)]), two([*rows, (41, 2, 1)], balanced=True)
    assert in_turn.groups[0].rank == {0: 0, 1: 1, 2: 0, 3: 1}
    assert by_load.groups[0].rank == {0: 0, 1: 1, 2: 0, 3: 0}


def test_a_rank_waits_for_its_own_room_though_another_has_some() -> None:
    """Rank 0 keeps room for its first request and all that this may generate; rank 1 is empty by then."""
    outcome = two([(0, 2, 20), (0, 2, 1), (0, 6, 20)], blocks=30)
    assert outcome.groups[0].rank[2] == 0
    assert outcome.first_token_ns[2] > outcome.finish_ns[0]


def test_ranks_on_their_own_are_those_of_vllm_alone() -> None:
    ranks = replace(Ranks.bare(2, max_num_seqs=4, max_num_batched_tokens=8), lockstep=False)
    law = linear_law(base_ns=1, token_ns=0, context_ns=0, max_num_seqs=4, max_num_batched_tokens=8)
    pool = EnginePool(settings=SMALL, blocks=9, laws=[law], ranks=ranks)
    with pytest.raises(UsageError, match="ranks of sglang run in lockstep"):
        served(pool, make_trace(name="one", arrival_ns=[0], prompt=[1], output=[1]), "kernel")


def test_whole_prompts_that_may_be_more_than_a_batch_takes_are_refused() -> None:
    own = SglangScheduling(ignore_eos=True, max_prefill_tokens=60)
    settings = replace(SMALL, chunked_prefill=False, max_num_batched_tokens=64, scheduler=own)
    law = linear_law(base_ns=1, token_ns=0, context_ns=0, max_num_seqs=4, max_num_batched_tokens=64)
    trace = make_trace(name="two", arrival_ns=[0, 0], prompt=[59, 6], output=[1, 1])
    with pytest.raises(CapacityError, match="may have 65 tokens with ignore_eos, the most of a batch is 64"):
        served(EnginePool(settings=settings, blocks=99, laws=[law]), trace, "kernel")
