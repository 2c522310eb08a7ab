"""Requests dealt to pools that differ in speed, and the clients of closed loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan_cases import SMALL

from apex_opt.search.dealing import clients_of, dealt, tokens_per_s
from apex_opt.simulator.law import linear_law
from apex_opt.workload import make_trace


@pytest.mark.parametrize("seed", range(30))
def test_of_the_first_requests_each_part_has_its_share_but_for_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 10 ** rng.integers(1, 8), (5, 2 + seed % 3))
    requests = int(rng.integers(1, 400))
    owner = dealt(weights, requests)
    assert owner.shape == (5, requests)
    for row, some in zip(owner, weights.tolist(), strict=True):
        for part, weight in enumerate(some):
            dealt_to = np.cumsum(row == part)
            due = np.arange(1, requests + 1) * weight / sum(some)
            # To the nearest where there are two; every further part is dealt what rounding has left.
            assert np.abs(dealt_to - due).max() <= 0.5 * max(1, len(some) - 1) + 1e-9
        for length in (1, requests // 2):
            assert np.array_equal(dealt(np.array([some]), max(1, length))[0], row[: max(1, length)])


def test_equal_parts_take_turns_and_weights_that_are_multiples_deal_alike() -> None:
    assert dealt(np.array([[7, 7]]), 6)[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert dealt(np.array([[1, 1, 1]]), 6)[0].tolist()[:3] in ([0, 1, 2], [1, 0, 2], [2, 0, 1], [1, 2, 0])
    assert np.array_equal(dealt(np.array([[2, 3]]), 50), dealt(np.array([[2000, 3000]]), 50))
    assert np.bincount(dealt(np.array([[1, 3]]), 400)[0]).tolist() == [100, 300]


def test_clients_are_dealt_in_proportion_and_none_goes_without() -> None:
    assert clients_of([1, 3], 8) == [2, 6]
    assert clients_of([1, 1000], 8) == [1, 7]
    assert clients_of([1, 1000, 1], 3) == [1, 1, 1]
    for clients in range(3, 20):
        counts = clients_of([5, 2, 9], clients)
        assert sum(counts) == clients
        assert min(counts) >= 1


def test_the_weight_is_what_full_batches_of_the_slowest_stage_compute() -> None:
    settings = replace(SMALL, max_num_seqs=4, max_num_batched_tokens=100)
    trace = make_trace(name="even", arrival_ns=[0] * 10, prompt=[50] * 10, output=[11] * 10)
    law = linear_law(base_ns=10_000, token_ns=100, context_ns=1, max_num_seqs=4, max_num_batched_tokens=100)
    # Two prompts a batch: 10,000 + 2 (50 x 100 + 50) ns for 100 tokens; four sequences: 10,000 + 4 (100 + 61) ns.
    prompts_ns, later_ns = 500 * 20_100 / 100, 100 * 10_644 / 4
    assert tokens_per_s(settings, 1000, [law], trace, 1) == int(610 * 1e9 / (prompts_ns + later_ns))
    assert tokens_per_s(settings, 1000, [law], trace, 3) == int(3 * 610 * 1e9 / (prompts_ns + later_ns))
    # The slower of two stages counts, and sequences are spread over both.
    slower_ns = 3 * (prompts_ns + 100 * (10_000 + 2 * 161) / 2)
    assert tokens_per_s(settings, 1000, [law, law.scaled(3)], trace, 1) == int(610 * 1e9 / slower_ns)
    # Room in the cache for two sequences of 61 tokens.
    few_ns = prompts_ns + 100 * (10_000 + 2 * 161) / 2
    assert tokens_per_s(settings, 2 * 4, [law], trace, 1) == int(610 * 1e9 / few_ns)


def test_a_part_of_a_trace_keeps_what_its_prompts_say() -> None:
    trace = make_trace(
        name="said",
        arrival_ns=[0, 5, 9],
        prompt=[40, 10, 33],
        output=[1, 2, 3],
        content=[[1, 2, 3], [7], [1, 2, 9]],
        content_tokens=16,
    )
    part = trace.picked(np.array([0, 2]))
    assert part.content is not None
    assert part.content_starts is not None
    assert (part.content.tolist(), part.content_starts.tolist()) == ([1, 2, 3, 1, 2, 9], [0, 3, 6])
    assert (part.arrival_ns.tolist(), part.prompt.tolist(), part.output.tolist()) == ([0, 9], [40, 33], [1, 3])
