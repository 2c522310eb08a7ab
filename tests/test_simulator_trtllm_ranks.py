"""Attention ranks of TensorRT-LLM: who gets a request, when prompts wait for other ranks, kernel as reference."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from ranks_cases import assert_same, drafting, law_of, random_ranks
from simulator_cases import linear, requests
from test_simulator_trtllm import ENGINE

from apex_opt.engines.schedulers import CAPACITY_POLICIES, CHUNKING_POLICIES, TrtllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import EnginePool, Outcome, run_deployment
from apex_opt.simulator.ranks import Ranks
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from apex_opt.workload.trace import Trace

Rows = list[tuple[int, int, int]]


def served(rows: Rows, *, ranks: int = 2, **own: Any) -> Outcome:
    """Batches of 10 ns and 1 ns for each token of the rank that has most."""
    engine = replace(ENGINE, scheduler=TrtllmScheduling(**own))
    bare = Ranks.bare(ranks, max_num_seqs=engine.max_num_seqs, max_num_batched_tokens=engine.max_num_batched_tokens)
    pool = EnginePool(settings=engine, blocks=100, laws=(linear(engine, 10, 1),), ranks=bare)
    kernel, reference = (
        run_deployment([pool], requests(rows), log=True, implementation=which)  # type: ignore[arg-type]
        for which in ("kernel", "reference")
    )
    assert_same(kernel, reference)
    return reference


def turns_of(outcome: Outcome) -> list[Rows]:
    """The rows of all ranks, turn by turn."""
    turns: dict[int, Rows] = {}
    for start, _, rows, _ in outcome.steps or ():
        turns.setdefault(start, []).extend(rows)
    return [turns[start] for start in sorted(turns)]


def test_the_longest_prompts_go_first_to_the_rank_with_the_fewest_tokens_below_the_mean_load() -> None:
    """9 to rank 0, 5 to rank 1, 4 to rank 1, which has 5 tokens, and 3 to rank 0, as rank 1 has its two."""
    steps = served([(0, 5, 1), (0, 9, 1), (0, 3, 1), (0, 4, 1)]).steps
    assert steps == [(0, 22, [(1, 9, 9), (2, 3, 3)], []), (0, 22, [(0, 5, 5), (3, 4, 4)], [])]


def test_a_rank_without_requests_runs_along_and_no_rank_waits_for_another() -> None:
    assert served([(0, 4, 2)]).steps == [(0, 14, [(0, 4, 4)], []), (14, 25, [(0, 1, 5)], [])]


@pytest.mark.parametrize(("timeout", "waited"), [(1, 0), (3, 2)])
def test_prompts_wait_for_those_of_other_ranks_no_longer_than_told(timeout: int, waited: int) -> None:
    """Both ranks decode; the third prompt is alone, so it waits until as many turns have passed."""
    outcome = served([(0, 4, 9), (0, 4, 9), (1, 2, 1)], adp_balance=True, adp_timeout_iters=timeout)
    turns = turns_of(outcome)
    assert [len(rows) for rows in turns].index(3) == 1 + waited
    assert turns[0] == [(0, 4, 4), (1, 4, 4)]


@pytest.mark.parametrize("wait", [0, 2])
def test_where_every_rank_has_a_prompt_they_wait_on_for_more_while_all_decode(wait: int) -> None:
    rows = [(0, 4, 9), (0, 4, 9), (1, 2, 1), (1, 2, 1)]
    outcome = served(rows, adp_balance=True, adp_batching_wait_iters=wait)
    assert [len(rows) for rows in turns_of(outcome)].index(4) == 1 + wait


def test_without_balance_prompts_run_at_once() -> None:
    outcome = served([(0, 4, 9), (0, 4, 9), (1, 2, 1)])
    assert [len(rows) for rows in turns_of(outcome)][:2] == [2, 3]


FEW = range(150)
MANY = pytest.param(range(150, 3000), marks=pytest.mark.nightly)


def random_pool(seed: int, count: int | None = None) -> tuple[EnginePool, Trace, str]:
    """Replicas with ranks of any settings, with room for one request of each rank or for all, and a trace."""
    draw = random.Random(seed)
    seats, longest, chunked = draw.randint(1, 8), draw.choice([6, 20, 48]), draw.random() < 0.5
    size = draw.choice([1, 2, 4, 8])
    settings = EngineSettings(
        max_num_seqs=seats,
        max_num_batched_tokens=max(seats, size if chunked else longest) + draw.choice([0, 1, 5, 24]),
        max_model_len=longest,
        chunked_prefill=chunked,
        block_size=size,
        async_scheduling=draw.random() < 0.5,
        scheduler=TrtllmScheduling(
            capacity_policy=draw.choice(CAPACITY_POLICIES),
            context_chunking_policy=draw.choice(CHUNKING_POLICIES),
            batch_wait_timeout_ms=draw.choice([0.0, 0.0, 2e-6, 3e-5, 4e-4]),
            adp_balance=draw.random() < 0.6,
            adp_timeout_iters=draw.choice([0, 1, 3, 50]),
            adp_batching_wait_iters=draw.choice([0, 1, 2, 10]),
        ),
    )
    rows, arrival, requests_ = [], 0, draw.choice([1, 5, 20, 40])
    for _ in range(requests_):
        arrival += draw.choice([0, 0, 0, 500, 4000, 40_000])
        prompt = draw.randint(1, longest - 1)
        rows.append((arrival, prompt, draw.randint(1, draw.choice([1, 5, 40]))))
    clients = draw.choice([None, None, 1, 4, 12])
    trace = make_trace(
        name="random",
        arrival_ns=[at for at, _, _ in rows],
        prompt=[prompt for _, prompt, _ in rows],
        output=[output for _, _, output in rows],
        max_new_tokens=[output + draw.randint(0, 9) for _, _, output in rows],
        concurrency=clients,
        pause_ns=0 if clients is None else draw.choice([0, 0, 700, 20_000]),
    )
    stages = draw.choice([1, 1, 1, 2])
    need = -(-int(settings.room(trace).max()) // size)
    pool = EnginePool(
        settings=settings,
        blocks=need + draw.choice([0, 1, need, 10 * need]),
        laws=[law_of(settings, draw, most=5000) for _ in range(stages)],
        replicas=draw.choice([1, 1, 2, 3]),
        ranks=random_ranks(draw, count or draw.choice([1, 2, 2, 3, 4]), settings, stages),
    )
    return pool, trace, draw.choice(["round_robin", "least_loaded"])


# Of 649 a rank whose requests all give way has an empty batch beside one in which some do.
@pytest.mark.parametrize("seeds", [FEW, range(649, 650), MANY])
def test_compiled_ranks_equal_the_reference(seeds: range) -> None:
    for seed in seeds:
        pool, trace, routing = random_pool(seed)
        kernel, reference = (
            run_deployment([pool], trace, log=True, routing=routing, implementation=which)  # type: ignore[arg-type]
            for which in ("kernel", "reference")
        )
        try:
            assert_same(kernel, reference)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 1500), marks=pytest.mark.nightly)])
def test_compiled_ranks_that_verify_drafts_equal_the_reference(seeds: range) -> None:
    for seed in seeds:
        pool, trace, routing = random_pool(seed)
        if len(pool.laws) > 1:
            continue
        pool = drafting(pool, random.Random(seed + 9))
        kernel, reference = (
            run_deployment([pool], trace, log=True, routing=routing, implementation=which)  # type: ignore[arg-type]
            for which in ("kernel", "reference")
        )
        try:
            assert_same(kernel, reference)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error


def test_one_rank_does_what_a_scheduler_without_ranks_does() -> None:
    """But for prompts that are held back, which other settings tell."""
    for seed in range(30):
        pool, trace, _ = random_pool(seed, 1)
        settings = pool.settings
        plain = replace(settings, scheduler=replace(settings.scheduler, adp_balance=False))  # type: ignore[call-arg]
        limits = {"max_num_seqs": settings.max_num_seqs, "max_num_batched_tokens": settings.max_num_batched_tokens}
        pool = replace(pool, settings=plain, ranks=Ranks.bare(1, **limits, stages=len(pool.laws)))
        one, none = (
            run_deployment([its], trace, log=True, implementation="kernel") for its in (pool, replace(pool, ranks=None))
        )
        if len({*trace.arrival_ns.tolist()}) == len(trace) or trace.concurrency == 1:
            assert np.array_equal(one.finish_ns, none.finish_ns), seed
