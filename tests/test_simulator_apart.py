"""apex_opt.simulator.kernel.apart: two passes come out as instances that act together, or are not used."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from handover_cases import Pair, compare, pairs
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from simulator_cases import linear, requests

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import EnginePool, Handover, replay_case
from apex_opt.simulator.pack.disaggregated import Apart, most_held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from apex_opt.simulator import DisaggregatedOutcome

NEVER_FULL = Apart.never_full


class Told:
    """What became of every run in two passes: whether it was used."""

    def __init__(self) -> None:
        self.used: list[bool] = []

    def never_full(self, passes: Any) -> bool:
        self.used.append(NEVER_FULL(passes))
        return self.used[-1]


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    found = Told()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Apart, "never_full", lambda passes: found.never_full(passes))
        yield found


def together(pair: Pair, **options: Any) -> DisaggregatedOutcome:
    """A run of instances that act together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Apart, "takes", lambda *_: False)
        return pair.run("kernel", **options)


def roomy(pair: Pair) -> Pair:
    """The same with blocks for all prompts."""
    return replace(pair, prefill=replace(pair.prefill, blocks=64 * len(pair.trace)))


@settings(max_examples=150)
@given(pairs(steady=True))
def test_two_passes_come_out_as_the_reference(told: Told, pair: Pair) -> None:
    before = len(told.used)
    compare(roomy(pair))
    assert told.used[before:] and all(told.used[before:])  # a logged run and one that is not, twice
    compare(pair)


@settings(max_examples=60)
@given(pairs(steady=True))
def test_instances_that_act_together_come_out_as_the_reference_too(pair: Pair) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Apart, "takes", lambda *_: False)
        compare(pair)


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 6000), marks=pytest.mark.nightly)])
def test_many_two_passes_come_out_as_instances_that_act_together(told: Told, seeds: range) -> None:
    before = len(told.used)
    for seed in seeds:
        pair = crowded(np.random.default_rng(seed))
        ours, theirs = pair.run("kernel"), together(pair)
        for name in ("first_token_ns", "finish_ns", "prefilled_ns", "read_ns", "read_blocks", "decode", "held"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), (seed, name)
        assert (ours.batches, ours.preemptions) == (theirs.batches, theirs.preemptions)
    used = told.used[before:]
    assert len(used) == len(seeds) and 0.2 < np.mean(used) < 0.9  # both ways are gone


def crowded(rng: np.random.Generator) -> Pair:
    """Some hundred requests at about the rate that instances can serve, over a cache of some prompts."""
    pools = []
    for _ in range(2):
        engine = EngineSettings(
            max_num_seqs=int(rng.integers(2, 24)),
            max_num_batched_tokens=int(rng.choice([32, 64, 256])),
            max_model_len=256,
            block_size=int(pools[0].settings.block_size if pools else rng.choice([4, 16])),
            async_scheduling=bool(rng.random() < 0.5),
            scheduler=VllmScheduling(idle_sleep_us=int(rng.choice([1, 20]))),
        )
        blocks = 200 // engine.block_size + int(rng.choice([0, 30, 100, 300]))
        law = linear(engine, int(rng.choice([0, 500, 5000])), int(rng.integers(1, 30)), int(rng.integers(0, 2)))
        pools.append(EnginePool(settings=engine, blocks=blocks, laws=(law,), replicas=int(rng.integers(1, 4))))
    count, gap = int(rng.integers(100, 250)), int(rng.choice([300, 2000, 10_000, 60_000]))
    arrival = np.cumsum(rng.exponential(gap, count).astype(int))
    rows = zip(arrival.tolist(), rng.integers(1, 120, count).tolist(), rng.integers(1, 60, count).tolist(), strict=True)
    link = Handover(
        proxy_ns=int(rng.choice([0, 1000])),
        read_ns=int(rng.choice([0, 500, 8000])),
        block_ns=int(rng.choice([0, 40, 900])),
        notice_ns=int(rng.choice([0, 700])),
        in_turn=bool(rng.random() < 0.5),
    )
    return Pair(prefill=pools[0], decode=pools[1], handover=link, trace=requests(list(rows)))


@pytest.mark.data
def test_recorded_runs_are_served_in_two_passes_where_prefill_pools_are_never_full(shared: Path, told: Told) -> None:
    before = len(told.used)
    for name in ("random", "pd_1p1d", "pd_2p1d_async_tight", "pd_2p1d_seats_long_reads"):
        path = shared / "scheduler-golden" / "pd" / f"{name}.json.gz"
        found = json.loads(gzip.decompress(path.read_bytes()))
        for case in found if name == "random" else [found]:
            assert replay_case("pd", case)["batches_sha256"] == case["batches_sha256"]
    assert {True, False} == set(told.used[before:])


def test_a_prompt_that_would_wait_for_a_read_is_noticed() -> None:
    """Two blocks for each prompt: with four of them the third waits for the first to be read, with eight nobody."""
    engine = EngineSettings(
        max_num_seqs=1, max_num_batched_tokens=8, max_model_len=32, block_size=4, async_scheduling=False,
        scheduler=VllmScheduling(idle_sleep_us=1),
    )  # fmt: skip
    pool = EnginePool(settings=engine, blocks=8, laws=(linear(engine, 100),))
    pair = Pair(
        prefill=pool, decode=pool, handover=Handover(read_ns=5000), trace=requests([(0, 8, 1), (0, 8, 1), (0, 8, 1)])
    )
    found = []
    for blocks in (4, 8):
        its = replace(pair, prefill=replace(pool, blocks=blocks))
        compare(its)
        found.append(its.run("kernel").prefilled_ns.tolist())
    assert found[1] == [100, 200, 300]
    assert found[0][:2] == [100, 200] and found[0][2] > 5000


def test_blocks_are_held_from_admission_until_a_batch_after_the_notice() -> None:
    """Five batches that compute a prompt of 10 blocks each: a notice at 1 is heard at 3, before the fifth is formed."""
    needed, ends = np.full(5, 10), np.arange(1, 6)
    never, early = np.full(5, 99), np.array([1, 99, 99, 99, 99])
    assert most_held(needed, ends, never, 99, 0) == 50
    assert [most_held(needed, ends, early, 99, ahead) for ahead in (0, 1)] == [40, 50]
    assert [most_held(needed, ends, never, until, 0) for until in (0, 1, 2)] == [20, 30, 40]  # the first at once


EVENTS: dict[str, Callable[[Pair, DisaggregatedOutcome], bool]] = {
    "an answer is preempted": lambda pair, outcome: outcome.preemptions > 0,
    "several decode instances read over one link in turn": lambda pair, outcome: bool(
        pair.handover.in_turn and pair.decode.replicas > 1 and (outcome.read_ns[:, 0] > outcome.forwarded_ns).any()
    ),
    "a batch is formed before the one ahead of it is taken in": lambda pair, outcome: (
        pair.decode.settings.async_scheduling and outcome.batches > 20
    ),
}


@pytest.mark.parametrize("event", EVENTS)
def test_random_two_passes_reach_the_events_that_matter(event: str) -> None:
    find(
        pairs(steady=True).map(roomy),
        lambda pair: EVENTS[event](pair, pair.run("kernel")),
        settings=settings(max_examples=1500, derandomize=True, database=None, phases=[Phase.generate]),
    )


@pytest.mark.nightly
@settings(max_examples=3000)
@given(pairs(most=60, steady=True), st.booleans())
def test_many_two_passes_come_out_as_the_reference(pair: Pair, ample: bool) -> None:
    compare(roomy(pair) if ample else pair)
