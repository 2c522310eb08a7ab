"""What no ranks can beat: floors of random groups lie below what is simulated."""

from __future__ import annotations

import random

import pytest
from ranks_cases import random_pool, random_trace

from apex_opt.search.bounds import StageFloor, isolated, may_preempt
from apex_opt.search.bounds.load import works_ns
from apex_opt.simulator import run_deployment

FEW = range(300)
MANY = pytest.param(range(300, 10_000), marks=pytest.mark.nightly)


@pytest.mark.parametrize("seeds", [FEW, MANY])
def test_floors_of_random_ranks_lie_below_what_is_simulated(seeds: range) -> None:
    """Of one request alone, and of the work of all: the slowest rank is no faster than the mean of all."""
    compared = 0
    for seed in seeds:
        draw = random.Random(seed)
        pool = random_pool(draw)
        trace = random_trace(draw, pool.settings.max_model_len)
        if len(pool.laws) > 1 and pool.settings.async_scheduling:
            continue  # no plan forms batches ahead on several stages
        assert pool.ranks is not None
        outcome = run_deployment([pool], trace)
        floors = StageFloor.of_pool(pool.laws, pool.ranks)
        overtaking = len(pool.laws) > 1 and may_preempt(pool.settings, pool.blocks, trace)
        first, rest = isolated(pool.settings, floors, trace, overtaking=overtaking)
        assert (outcome.first_token_ns - outcome.arrival_ns >= first).all(), seed
        assert (outcome.finish_ns - outcome.first_token_ns >= rest).all(), seed
        if len(pool.laws) > 1:
            continue
        steps = trace.generated(pool.settings.max_model_len) - 1
        ranks = pool.replicas * (1 if pool.ranks.in_step else pool.ranks.count)
        schedulers = pool.replicas * pool.ranks.count
        least = sum(float(part.sum()) for part in works_ns(pool.settings, floors[0], trace)) / ranks
        seats = float(steps.sum()) * floors[0].batch_ns / (pool.settings.max_num_seqs * schedulers)
        held = float((steps * -(-trace.prompt // pool.settings.block_size)).sum()) * floors[0].batch_ns
        held = 0.0 if pool.settings.prefix_caching else held / (pool.blocks * schedulers)
        assert outcome.makespan_ns >= max(least, seats, held) - 1, seed
        compared += least > 0
    assert compared > len(seeds) // 3
