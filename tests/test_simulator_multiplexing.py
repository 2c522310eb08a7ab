"""SGLang's multiplexing: divisions of a GPU, slices of prompts beside steps, and what a replica does by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from plan_cases import make_gpu
from simulator_cases import linear, random_law, requests

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.shares import divisions, parse_shares
from apex_opt.simulator.api import run_phases
from apex_opt.simulator.phases import SCALE, Multiplexing
from apex_opt.simulator.pools import EnginePool
from apex_opt.units import ceil_div

CHOSEN = parse_shares("pdmux")
HALVES = Multiplexing(divisions=((66, 66),), layers=4)
SETTINGS = EngineSettings(
    max_num_seqs=8,
    max_num_batched_tokens=65_536,
    max_model_len=65_536,
    chunked_prefill=False,
    async_scheduling=False,
    block_size=16,
    scheduler=SglangScheduling(),
)


def run(trace, law=None, rules=HALVES, settings=SETTINGS, blocks=10_000):
    law = linear(settings, 1_000) if law is None else law
    return both(EnginePool(settings=settings, blocks=blocks, laws=[law]), rules, trace)


def both(pool, rules, trace):
    """A run by the reference, as which one by the kernel comes out."""
    theirs = run_phases(pool, rules, trace, log=True, implementation="reference")
    ours = run_phases(pool, rules, trace)
    for name in ("first_token_ns", "finish_ns", "gaps_ns", "busy_ns"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("preemptions", "batches", "most_blocks", "held"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.counts.equals(theirs.counts)
    return theirs


def test_divisions_are_those_of_the_source() -> None:
    hopper, ampere = make_gpu(multiprocessors=132, capability=9.0), make_gpu(multiprocessors=108, capability=8.0)
    assert divisions(CHOSEN, hopper) == ((112, 20), (104, 28), (96, 36), (88, 44), (80, 52), (72, 60))
    assert divisions(CHOSEN, ampere) == ((84, 24), (78, 30), (72, 36), (66, 42), (60, 48), (54, 54))
    assert divisions(parse_shares("pdmux:72/60"), hopper) == ((72, 60),)
    for text, gpu, why in (
        ("pdmux:72/62", hopper, "not the 132"),
        ("pdmux:128/4", hopper, "8 multiprocessors at least"),
        ("pdmux", make_gpu(capability=10.0, multiprocessors=148), "capability 7 to 9"),
        ("pdmux", make_gpu(capability=9.0), "not stated"),
    ):
        with pytest.raises(UsageError, match=why):
            divisions(parse_shares(text), gpu)


def test_the_more_are_answered_the_more_they_have() -> None:
    six = Multiplexing(divisions=divisions(CHOSEN, make_gpu(multiprocessors=132, capability=9.0)), layers=32)
    assert [six.division(n) for n in (1, 6, 11, 12, 18, 24, 30, 36, 500)] == [0, 0, 0, 1, 2, 3, 4, 5, 5]
    assert [six.slice_layers(n) for n in (1, 2_048, 8_192, 16_384, 100_000)] == [65_536, 32, 8, 4, 1]


def test_a_prompt_alone_has_all_of_the_gpu_and_so_has_its_answer() -> None:
    found = run(requests([(0, 16, 3)]))
    assert found.first_token_ns.tolist() == [1_000] and found.finish_ns.tolist() == [3_000]


def test_a_prompt_comes_in_slices_beside_steps_and_joins_after_a_step() -> None:
    # 32,768 tokens: two layers a slice, so two slices of half of the prompt's time each.
    law = linear(SETTINGS, 1_000)
    found = run(requests([(0, 16, 9), (1_500, 32_768, 2)]), law)
    assert found.prompts[0][:2] == (0, 1_000)
    # The step under way ends on the whole GPU; from there on each phase has half of it: prompts take twice as long,
    # steps 1.62 times. The first slice lasts from 2,000 to 3,000, the second is started with the next step.
    assert found.prompts[1][:2] == (2_000, 4_620)
    assert [step[:2] for step in found.answers[:4]] == [(1_000, 2_000), (2_000, 3_620), (3_620, 5_240), (5_240, 6_240)]
    # The prompt is done at 4,620, which is seen when the step beside it ends.
    assert found.first_token_ns[1] == 5_240 and found.finish_ns[1] == 6_240
    assert [len(rows) for _, _, rows, _ in found.answers[:4]] == [1, 1, 1, 2]


def test_slices_queue_up_where_steps_are_short() -> None:
    rules = Multiplexing(divisions=((44, 88),), layers=4)
    law = linear(SETTINGS, 10_000, 1)
    found = run(requests([(0, 16, 40), (15_000, 32_768, 1)]), law, rules)
    whole = law.batch_ns([(32_768, 32_768)])
    start, end = found.prompts[1][:2]
    assert end - start == 2 * ceil_div(whole // 2 * 3 * SCALE, SCALE)  # a third of the GPU, without a pause
    joined = next(end for _, end, _, _ in found.answers if end >= found.prompts[1][1])
    assert found.first_token_ns[1] == joined


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 2_000), marks=pytest.mark.nightly)])
def test_every_token_comes_once_no_block_is_lost_and_no_batch_holds_both(seeds) -> None:
    lost = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        own = SglangScheduling(schedule_conservativeness=0.2, max_prefill_tokens=int(rng.integers(50, 400)))
        settings = replace(SETTINGS, max_num_seqs=int(rng.integers(1, 9)), max_model_len=512, scheduler=own)
        rows = [(int(rng.integers(0, 9_000)), int(rng.integers(1, 200)), int(rng.integers(1, 90))) for _ in range(12)]
        trace, law = requests(sorted(rows)), linear(settings, int(rng.integers(50, 900)), int(rng.integers(0, 4)), 1)
        rules = Multiplexing(divisions=((72, 60), (66, 66))[: int(rng.integers(1, 3))], layers=int(rng.integers(1, 7)))
        blocks = max(-(-(p + o + 17) // 16) for _, p, o in rows) + 1 + int(rng.integers(0, 16))
        found = run(trace, law, rules, settings, blocks)
        lost += found.preemptions
        assert found.held == 0 and found.most_blocks <= blocks
        assert len(found.gaps_ns) == int((trace.generated(512) - 1).sum()) and (found.gaps_ns > 0).all()
        assert all(tokens == 1 for _, _, batch, _ in found.answers for _, tokens, _ in batch)
        for steps in (found.prompts, found.answers):
            assert all(end <= start for (_, end, _, _), (start, _, _, _) in pairwise(steps))
        for start, end, batch, _ in found.prompts:
            assert end - start >= law.batch_ns([(tokens, held) for _, tokens, held in batch])
        assert found.makespan_ns >= int(found.busy_ns.max())
    assert lost > 0 or len(seeds) < 60


def test_it_goes_with_whole_prompts_and_the_scheduler_of_sglang() -> None:
    for settings in (replace(SETTINGS, chunked_prefill=True), replace(SETTINGS, scheduler=EngineSettings().scheduler)):
        with pytest.raises(UsageError, match="scheduler of sglang and with whole prompts"):
            run(requests([(0, 16, 3)]), settings=settings)


@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(80, 4_000), marks=pytest.mark.nightly)])
def test_kernel_equals_reference(seeds) -> None:
    lost = 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        count, seats, size = int(rng.integers(1, 40)), int(rng.integers(1, 9)), int(rng.choice([1, 4, 16]))
        own = SglangScheduling(
            schedule_conservativeness=float(rng.choice([0.1, 0.5, 1.0])),
            max_prefill_tokens=int(rng.integers(20, 400)),
            ignore_eos=bool(rng.random() < 0.2),
        )
        settings = replace(SETTINGS, max_num_seqs=seats, max_model_len=256, block_size=size, scheduler=own)
        settings = replace(settings, async_scheduling=bool(rng.random() < 0.5))
        arrivals = np.cumsum(rng.integers(0, int(rng.choice([1, 100, 3_000])), count)).tolist()
        prompts, outputs = rng.integers(1, 120, count).tolist(), rng.integers(1, 90, count).tolist()
        law = random_law(settings, seed, zeros=float(rng.choice([0, 0.5])), copies=1, unit=7)
        every = ((72, 60), (66, 66), (20, 112))
        rules = Multiplexing(divisions=every[: int(rng.integers(1, 4))], layers=int(rng.integers(1, 70)))
        blocks = max(-(-(p + o + size + 1) // size) for p, o in zip(prompts, outputs, strict=True)) + 2
        blocks += int(rng.integers(0, int(rng.choice([1, 60]))))
        pool = EnginePool(settings=settings, blocks=blocks, laws=[law], replicas=int(rng.integers(1, 4)))
        found = both(pool, rules, requests(list(zip(arrivals, prompts, outputs, strict=True))))
        lost += found.preemptions
    assert lost > 0
