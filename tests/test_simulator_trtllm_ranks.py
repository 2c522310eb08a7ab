"""Attention ranks of TensorRT-LLM, by hand: who gets a request, and when prompts wait for other ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from simulator_cases import linear, requests
from test_simulator_trtllm import ENGINE

from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.errors import UsageError
from apex_opt.simulator import EnginePool, Outcome, run_deployment
from apex_opt.simulator.ranks import Ranks

Rows = list[tuple[int, int, int]]


def served(rows: Rows, *, ranks: int = 2, implementation: Any = "reference", **own: Any) -> Outcome:
    """Batches of 10 ns and 1 ns for each token of the rank that has most."""
    engine = replace(ENGINE, scheduler=TrtllmScheduling(**own))
    bare = Ranks.bare(ranks, max_num_seqs=engine.max_num_seqs, max_num_batched_tokens=engine.max_num_batched_tokens)
    pool = EnginePool(settings=engine, blocks=100, laws=(linear(engine, 10, 1),), ranks=bare)
    return run_deployment([pool], requests(rows), log=True, implementation=implementation)


def test_the_longest_prompts_go_first_to_the_rank_with_the_fewest_tokens_below_the_mean_load() -> None:
    """9 to rank 0, 5 to rank 1, 4 to rank 1, which has 5 tokens, and 3 to rank 0, as rank 1 has its two."""
    (step,) = served([(0, 5, 1), (0, 9, 1), (0, 3, 1), (0, 4, 1)]).steps or ()
    assert step == (0, 22, [(1, 9, 9), (2, 3, 3), (0, 5, 5), (3, 4, 4)], [])


def test_a_rank_without_requests_runs_along_and_no_rank_waits_for_another() -> None:
    assert served([(0, 4, 2)]).steps == [(0, 14, [(0, 4, 4)], []), (14, 25, [(0, 1, 5)], [])]


@pytest.mark.parametrize(("timeout", "waited"), [(1, 0), (3, 2)])
def test_prompts_wait_for_those_of_other_ranks_no_longer_than_told(timeout: int, waited: int) -> None:
    """Both ranks decode; the third prompt is alone, so it waits until as many turns have passed."""
    outcome = served([(0, 4, 9), (0, 4, 9), (1, 2, 1)], adp_balance=True, adp_timeout_iters=timeout)
    turns = [rows for _, _, rows, _ in outcome.steps or ()]
    assert [len(rows) for rows in turns].index(3) == 1 + waited
    assert turns[0] == [(0, 4, 4), (1, 4, 4)]


@pytest.mark.parametrize("wait", [0, 2])
def test_where_every_rank_has_a_prompt_they_wait_on_for_more_while_all_decode(wait: int) -> None:
    rows = [(0, 4, 9), (0, 4, 9), (1, 2, 1), (1, 2, 1)]
    outcome = served(rows, adp_balance=True, adp_batching_wait_iters=wait)
    assert [len(rows) for _, _, rows, _ in outcome.steps or ()].index(4) == 1 + wait


def test_without_balance_prompts_run_at_once() -> None:
    outcome = served([(0, 4, 9), (0, 4, 9), (1, 2, 1)])
    assert [len(rows) for _, _, rows, _ in outcome.steps or ()][:2] == [2, 3]


def test_the_kernel_says_that_it_does_not_serve_them() -> None:
    with pytest.raises(UsageError, match="attention ranks of trtllm are simulated by implementation"):
        served([(0, 4, 2)], implementation="kernel")
