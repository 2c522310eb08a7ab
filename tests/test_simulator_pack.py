"""apex_opt.simulator.pack: what may pass the door to the compiled kernel, and what comes back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from simulator_cases import Case, assert_same, linear, requests

from apex_opt.errors import CapacityError, UsageError
from apex_opt.plan.engine import EngineSettings
from apex_opt.simulator import kernel, law

if TYPE_CHECKING:
    from apex_opt.simulator import BatchLaw

ENGINE = EngineSettings(
    max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32, block_size=4, async_scheduling=False
)
SEATS = [f"{name}_ns" for name in ("decode", "sequence", "attend")] + ["context_rate"]
TOKENS = ["mixed_ns", "chunk_ns", "pair_rate", "chunk_context_rate", "transfer_ns"]


def case(**changes: Any) -> Case:
    used: BatchLaw = replace(linear(ENGINE, 10, 1, 1), **changes)
    return Case(settings=ENGINE, blocks=20, laws=(used,), trace=requests([(0, 9, 4), (3, 5, 8)]))


def test_kernel_and_law_agree_on_the_unit_of_rates() -> None:
    assert kernel.RATE_BITS == law.RATE_BITS


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
    with pytest.raises(UsageError, match=f"{what} attention: .* would overflow 63 bits"):
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
