"""apex_opt.simulator.pack: what may pass the door to the compiled kernel, and what comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from simulator_cases import IMPLEMENTATIONS, Case, assert_same, linear, requests

from apex_opt.errors import ApexError, CapacityError, UnknownNameError, UsageError
from apex_opt.figures.stops import Stop
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import law, replay
from apex_opt.simulator.kernel import state

if TYPE_CHECKING:
    from apex_opt.simulator import BatchLaw
    from apex_opt.simulator.api import Implementation

ENGINE = EngineSettings(
    max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32, block_size=4, async_scheduling=False
)
SEATS = [f"{name}_ns" for name in ("decode", "sequence", "attend")] + ["context_rate"]
TOKENS = ["mixed_ns", "chunk_ns", "pair_rate", "chunk_context_rate", "transfer_ns"]


def case(**changes: Any) -> Case:
    used: BatchLaw = replace(linear(ENGINE, 10, 1, 1), **changes)
    return Case(settings=ENGINE, blocks=20, laws=(used,), trace=requests([(0, 9, 4), (3, 5, 8)]))


def test_kernel_and_law_agree_on_the_unit_of_rates() -> None:
    assert state.RATE_BITS == law.RATE_BITS


@pytest.mark.parametrize("table", SEATS + TOKENS)
def test_a_negative_entry_anywhere_in_a_table_is_refused(table: str) -> None:
    values = getattr(case().laws[0], table).copy()
    values[-1] = -1
    with pytest.raises(UsageError, match="negative"):
        case(**{table: values}).run()


@pytest.mark.parametrize("copies", [0, -1])
def test_less_than_one_attention_copy_is_refused(copies: int) -> None:
    with pytest.raises(UsageError, match=r"copy|negative"):
        case(copies=copies).run()


@pytest.mark.parametrize(("table", "what"), [("context_rate", "decode"), ("pair_rate", "prefill")])
def test_rates_whose_sums_could_leave_63_bits_are_refused(table: str, what: str) -> None:
    size = getattr(case().laws[0], table).shape
    with pytest.raises(UsageError, match=f"{what} attention of this .* would overflow 63 bits"):
        case(**{table: np.full(size, 1 << 58)}).run()


def test_rates_just_within_63_bits_are_computed_exactly() -> None:
    """The largest rate that passes: two requests of 13 tokens, 4 seats, 20 blocks of 4."""
    most = ((1 << 62) - 1) // 52
    big = case(context_rate=np.full(5, most))
    assert_same(big.run(), big.run("reference"))
    with pytest.raises(UsageError, match="63 bits"):
        case(context_rate=np.full(5, most + 1)).run()


def test_a_law_of_any_integer_type_and_layout_gives_the_same_times() -> None:
    plain = case()
    strided = np.repeat(plain.laws[0].decode_ns, 2).astype(np.int32)[::2]
    assert_same(case(decode_ns=strided).run(), plain.run())


def test_the_trace_is_not_written_to() -> None:
    used = case()
    before = [getattr(used.trace, name).tolist() for name in ("arrival_ns", "prompt", "output")]
    used.run()
    used.having(routing="least_loaded", replicas=2).run()
    assert [getattr(used.trace, name).tolist() for name in ("arrival_ns", "prompt", "output")] == before


def test_two_runs_are_equal_as_nothing_is_kept_between_them() -> None:
    used = case().having(blocks=4, trace=requests([(0, 4, 8), (0, 4, 8)]))
    assert used.run().preemptions > 0
    assert_same(used.run(), used.run())


def test_a_request_that_can_never_finish_does_not_reach_the_kernel() -> None:
    with pytest.raises(CapacityError, match="need 3 KV blocks of 4, the cache has 2"):
        case().having(blocks=2).run()


def test_replicas_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="replicas: 0 is below 1"):
        case().having(replicas=0).run()


def test_replicas_without_a_request_stay_idle() -> None:
    outcome = case().having(replicas=4).run()
    assert (outcome.busy_ns > 0).tolist() == [[True], [True], [False], [False]]


def test_a_log_longer_than_first_guessed_is_complete() -> None:
    used = case().having(blocks=32, trace=requests([(0, 1, 30)] * 200))
    outcome = used.run()
    assert outcome.steps is not None and len(outcome.steps) == outcome.batches == 50 * 30
    assert sum(c for _, _, rows, _ in outcome.steps for _, c, _ in rows) == 200 * 30


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("table", SEATS + TOKENS)
@pytest.mark.parametrize("change", [-1, 1])
def test_a_table_that_does_not_reach_the_engines_limits_is_refused(
    table: str, change: int, implementation: Implementation
) -> None:
    size = getattr(case().laws[0], table).size + change
    with pytest.raises(
        UsageError, match=f"stage 0: {table} has {size} entries, the engine's limits need {size - change}"
    ):
        case(**{table: np.ones(size, np.int64)}).run(implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_batch_too_long_to_add_up_is_refused(implementation: Implementation) -> None:
    with pytest.raises(UsageError, match="a batch of this plan and trace would overflow 63 bits"):
        case(decode_ns=np.full(5, law.LARGEST)).run(implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_run_beyond_the_simulated_clock_is_refused_not_cut(implementation: Implementation) -> None:
    slow = case(decode_ns=np.full(5, law.LARGEST // 4), mixed_ns=np.full(9, law.LARGEST // 4))
    slow.run(implementation)
    with pytest.raises(UsageError, match="the simulated clock passes"):
        replace(slow, trace=requests([(0, 9, 20)] * 40)).run(implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_stage_and_unknown_routing_are_refused(implementation: Implementation) -> None:
    with pytest.raises(UsageError, match="a batch law for each of its stages, got none"):
        replace(case(), laws=()).run(implementation)
    with pytest.raises(UnknownNameError, match="unknown routing 'round'; known: cache_aware"):
        replace(case(), routing="round").run(implementation)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "speed", "kind": "sum"}, "unknown metric of a stop 'speed'"),
        ({"metric": "makespan", "kind": "sum"}, "cannot sum the makespan"),
        ({"metric": "whole", "kind": "mean"}, "cannot mean the whole"),
        ({"metric": "whole", "kind": "count", "most": 0}, "at 0 requests would always fire"),
    ],
)
def test_a_stop_that_means_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ApexError, match=message):
        Stop(limit_ns=5, **changes)


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"law_us": [1, 2]}, [[0, 5, 3]], "law_us must be 3 whole"),
        ({"law_us": [1, 2.5, 0]}, [[0, 5, 3]], "law_us must be 3 whole"),
        ({"stages": "two"}, [[0, 5, 3]], "stages must be 1 whole"),
        ({"num_gpu_blocks": 7.5}, [[0, 5, 3]], "num_gpu_blocks must be 1 whole"),
        ({}, [[0.5, 5, 3]], "arrival_ns 0.5 is not a whole number"),
        ({}, [[0, 5.5, 3]], "prompt 5.5 is not a whole number"),
        ({}, [[1 << 60, 5, 3]], "row 1: arrival_ns"),
        ({}, [[1 << 70, 5, 3]], "row 1: arrival_ns"),
    ],
)
def test_a_replay_takes_whole_numbers_in_range_only(changes: dict[str, Any], rows: list[Any], message: str) -> None:
    recorded = {"law_us": [9, 1, 0], "num_gpu_blocks": 21, "long_prefill_token_threshold": 0}
    config = {name: getattr(ENGINE, name) for name in ENGINE.__slots__} | recorded
    with pytest.raises(ApexError, match=message):
        replay(config | changes, rows)
