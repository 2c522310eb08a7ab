"""Forwards in two halves: who splits them, what they take, and that kernel and reference agree on both."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from ranks_cases import assert_same, halving, random_pool, random_ranks, random_trace, served
from sglang_cases import random_run

from apex_opt.engines.overlap import DUAL_BATCH, TWO_BATCH
from apex_opt.engines.schedulers import TrtllmScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.simulator import EnginePool
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.ranks import Halves, Ranks, agree, alike_ns, forward_ns, splits

if TYPE_CHECKING:
    from apex_opt.simulator.outcome import Outcome

LIMITS = {"max_num_seqs": 64, "max_num_batched_tokens": 1024}
LAW = linear_law(base_ns=1000, token_ns=10, context_ns=0, **LIMITS)


@pytest.mark.parametrize(
    ("tokens", "padded", "decoding", "wanted"),
    [
        ((32, 40), (32, 40), (True, True), True),
        ((31, 400), (32, 400), (True, True), False),  # one rank has too few
        ((32, 64), (32, 64), (True, True), False),  # half of 64 leaves the first rank no second half
        ((33, 64), (40, 64), (True, True), True),
        ((511, 600), (511, 600), (False, False), False),
        ((512, 600), (512, 600), (False, False), True),
        ((40, 600), (40, 600), (True, False), False),  # both want to, but the first would have no second half
        ((400, 600), (400, 600), (True, False), True),
        ((0, 600), (0, 600), (True, False), False),
    ],
)
def test_vllm_splits_where_all_ranks_want_it_and_none_is_left_without_a_second_half(
    tokens: tuple[int, ...], padded: tuple[int, ...], decoding: tuple[bool, ...], wanted: bool
) -> None:
    assert splits(DUAL_BATCH, tokens, padded, decoding) == wanted


@pytest.mark.parametrize(
    ("tokens", "decoding", "wanted"),
    [
        ((1, 40), (True, True), True),
        ((0, 40), (True, False), True),  # a rank without a batch is no obstacle
        ((1, 40), (True, False), False),  # one decodes while another computes a prompt
        ((900, 40), (False, False), True),
        ((0, 0), (True, True), False),
    ],
)
def test_sglang_splits_where_all_ranks_with_a_batch_do_the_same(
    tokens: tuple[int, ...], decoding: tuple[bool, ...], wanted: bool
) -> None:
    assert splits(TWO_BATCH, tokens, tokens, decoding) == wanted


def ranks_of(network_ns: int, *, layers: int = 3) -> Ranks:
    """Two ranks whose halves send for so long, whatever their size."""
    ranks = Ranks.bare(2, **LIMITS)
    halves = Halves.bare(LAW, ranks.shared[0])
    halves = replace(
        halves,
        network_ns=np.full_like(halves.network_ns, network_ns),
        decode_host_ns=np.full_like(halves.network_ns, 7),
        mixed_host_ns=np.full_like(halves.network_ns, 70),
        alone_ns=np.arange(LIMITS["max_num_seqs"] + 1),
        layers=layers,
    )
    return replace(ranks, splitting=DUAL_BATCH, shared=(replace(ranks.shared[0], halves=halves),))


@pytest.mark.parametrize(("network_ns", "takes"), [(600, 1400 + 600 // 6), (14_000, 14_000 + 1400 // 6)])
def test_two_halves_take_as_long_as_the_busier_of_computing_and_sending(network_ns: int, takes: int) -> None:
    rows = [(1, 100)] * 40
    assert LAW.batch_ns(rows) == 1400
    assert alike_ns(LAW, ranks_of(network_ns), 0, rows) == takes + 7 + 40
    few = [(1, 100)] * 31
    assert alike_ns(LAW, ranks_of(network_ns), 0, few) == LAW.batch_ns(few)


def test_the_slowest_rank_computes_for_all_and_those_with_prompts_decide_what_the_host_does() -> None:
    ranks, batches = ranks_of(0), [[(600, 600)], [(512, 512), (1, 9), (1, 9)]]
    agreed = agree(ranks.padding, batches, splitting=ranks.splitting)
    assert agreed.split and not agreed.decoding and agreed.padded == [600, 600]
    assert forward_ns(LAW, ranks.shared[0], agreed, batches) == LAW.batch_ns(batches[0]) + 70 + 3


def compared(pool: EnginePool, seed: int) -> Outcome:
    """The run of a pool, the same by kernel and reference."""
    trace = random_trace(random.Random(seed), pool.settings.max_model_len)
    kernel, reference = (served(pool, trace, which) for which in ("kernel", "reference"))
    try:
        assert_same(kernel, reference)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}") from error
    return kernel


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.nightly)])
def test_compiled_ranks_of_vllm_equal_the_reference(seeds: range) -> None:
    split = np.zeros(2, np.int64)
    for seed in seeds:
        draw = random.Random(seed)
        pool = halving(random_pool(draw, count=draw.choice([2, 3, 4])), draw)
        (did,) = compared(pool, seed).pools
        assert did.shared is not None
        split += did.shared.split_decode.sum(), did.shared.split_mixed.sum()
        assert (did.shared.split_decode <= did.shared.decode).all()
        assert (did.shared.split_mixed <= did.shared.mixed).all()
    assert (split > 0).all()


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.nightly)])
def test_compiled_ranks_of_sglang_equal_the_reference(seeds: range) -> None:
    split = np.zeros(2, np.int64)
    for seed in seeds:
        run, draw = random_run(seed), random.Random(seed)
        ranks = random_ranks(draw, draw.choice([2, 3, 4]), run.settings, len(run.laws))
        pool = EnginePool(settings=run.settings, blocks=run.blocks, laws=run.laws, replicas=run.replicas, ranks=ranks)
        pool, found = halving(pool, draw, pads=False), list["Outcome"]()
        for which in ("kernel", "reference"):
            try:
                found.append(served(pool, run.trace, which, routing=run.routing))
            except CapacityError:  # a prompt in the middle of its chunks finds no room and holds up all others
                break
        if not found:
            continue
        try:
            assert_same(*found)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        (did,) = found[0].pools
        assert did.shared is not None
        split += did.shared.split_decode.sum(), did.shared.split_mixed.sum()
    assert (split > 0).all()


def test_ranks_that_never_want_it_do_what_ranks_without_it_do() -> None:
    for seed in range(10):
        draw = random.Random(seed)
        pool = halving(random_pool(draw, count=2), draw)
        assert pool.ranks is not None and pool.ranks.splitting is not None
        never = replace(pool.ranks.splitting, decode_tokens=1 << 20, prompt_tokens=1 << 20)
        pool = replace(pool, ranks=replace(pool.ranks, splitting=never))
        alone = replace(pool, ranks=replace(pool.ranks, splitting=None))
        trace = random_trace(random.Random(seed), pool.settings.max_model_len)
        one, other = (served(its, trace, "kernel") for its in (pool, alone))
        assert np.array_equal(one.finish_ns, other.finish_ns) and one.steps == other.steps


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="forwards are split of ranks in step"):
        replace(Ranks.bare(2, **LIMITS), splitting=DUAL_BATCH)
    with pytest.raises(UsageError, match="forwards are split of ranks in step"):
        replace(ranks_of(0), lockstep=False)
    pool = halving(random_pool(random.Random(1), count=2), random.Random(1))
    other = replace(pool, settings=replace(pool.settings, scheduler=TrtllmScheduling(), prefix_caching=False))
    with pytest.raises(UsageError, match="by vllm and sglang, not by trtllm"):
        served(other, random_trace(random.Random(1), pool.settings.max_model_len), "reference")
