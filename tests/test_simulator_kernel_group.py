"""apex_opt.simulator.kernel.group: compiled ranks equal those of the reference, and one rank is as none."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ranks_cases import assert_same, drafting, random_pool, random_trace, served
from simulator_cases import moved

from apex_opt.simulator import run_deployment
from apex_opt.simulator.pack import memory as packed
from apex_opt.simulator.pack import ranks
from apex_opt.simulator.ranks import Ranks

if TYPE_CHECKING:
    from apex_opt.simulator.api import Implementation

FEW = range(80)
MANY = pytest.param(range(80, 3000), marks=pytest.mark.nightly)


@pytest.mark.parametrize("seeds", [FEW, MANY])
def test_compiled_ranks_equal_the_reference(seeds: range) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        pool = random_pool(draw)
        trace = random_trace(draw, pool.settings.max_model_len)
        routing = draw.choice(["round_robin", "least_loaded"])
        kernel, reference = (served(pool, trace, which, routing=routing) for which in ("kernel", "reference"))
        try:
            assert_same(kernel, reference)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 2000), marks=pytest.mark.nightly)])
def test_compiled_ranks_that_verify_drafts_equal_the_reference(seeds: range) -> None:
    given_way = 0
    for seed in seeds:
        draw = random.Random(seed)
        pool = drafting(random_pool(draw, stages=1), draw)
        trace = random_trace(draw, pool.settings.max_model_len)
        kernel, reference = (served(pool, trace, which) for which in ("kernel", "reference"))
        try:
            assert_same(kernel, reference)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        given_way += kernel.preemptions
    assert given_way > 0


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_one_rank_with_drafts_does_what_a_scheduler_without_ranks_does(implementation: Implementation) -> None:
    for seed in range(12):
        draw = random.Random(seed)
        pool = drafting(random_pool(draw, count=1, stages=1), draw)
        settings = replace(pool.settings, scheduler=replace(pool.settings.scheduler, idle_sleep_us=0))
        limits = {
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
        }
        pool = replace(pool, settings=settings, ranks=Ranks.bare(1, **limits, drafting=True))
        trace = random_trace(draw, settings.max_model_len)
        one = served(pool, trace, implementation)
        none = served(replace(pool, ranks=None), trace, implementation)
        assert_same(replace(one, groups=()), none)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize("lockstep", [True, False])
def test_one_rank_does_what_a_scheduler_without_ranks_does(implementation: Implementation, *, lockstep: bool) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        pool = random_pool(draw, count=1)
        settings = replace(pool.settings, scheduler=replace(pool.settings.scheduler, idle_sleep_us=0))
        limits = {
            "max_num_seqs": settings.max_num_seqs,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "stages": len(pool.laws),
        }
        pool = replace(pool, settings=settings, ranks=replace(Ranks.bare(1, **limits), lockstep=lockstep))
        trace = random_trace(draw, settings.max_model_len)
        one = served(pool, trace, implementation)
        none = served(replace(pool, ranks=None), trace, implementation)
        assert_same(replace(one, groups=()), none)


@pytest.mark.parametrize("rest_ns", [0, 1, 5_000_000_000, 4_999_999_999])
def test_deadlines_passed_in_silence_change_nothing(rest_ns: int) -> None:
    """A run with a log goes through them all; minutes lie between requests, and each front end learns what there is."""
    for seed in range(15):
        draw = random.Random(seed)
        pool = random_pool(draw)
        trace = random_trace(draw, pool.settings.max_model_len, closed=False)
        trace = moved(trace, trace.arrival_ns + np.arange(len(trace)) // 2 * (60_000_000_000 + rest_ns))
        routing = draw.choice(["round_robin", "least_loaded"])
        logged = served(pool, trace, "kernel", routing=routing)
        silent = run_deployment([pool], trace, routing=routing, gaps=True)
        for name in ("first_token_ns", "finish_ns", "busy_ns", "gaps_ns"):
            assert np.array_equal(getattr(logged, name), getattr(silent, name)), (seed, name)
        assert logged.batches == silent.batches


def test_messages_that_find_no_room_get_more_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def memory(*given: Any) -> ranks.GroupMemory:
        made.append(given[4])
        return ranks.GroupMemory(*given)

    for seed in range(20):
        draw = random.Random(seed)
        pool = random_pool(draw)
        trace = random_trace(draw, pool.settings.max_model_len)
        roomy = served(pool, trace, "kernel")
        with monkeypatch.context() as patched:
            patched.setattr(packed, "MESSAGES", 1)
            patched.setattr(packed, "GroupMemory", memory)
            assert_same(served(pool, trace, "kernel"), roomy)
    assert max(made) > 1
