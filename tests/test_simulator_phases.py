"""Two phases on one GPU: what a share does, and what a replica does whose phases share one KV pool."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from simulator_cases import blocks_of, floors_of, linear, random_law, requests

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.search.bounds import isolated
from apex_opt.simulator.api import run_phases, simulate
from apex_opt.simulator.phases import SCALE, Phases
from apex_opt.simulator.pools import EnginePool
from apex_opt.units import ceil_div

WHOLE = Phases(prefill_share=100, decode_share=100)


def make_settings(**changes):
    known = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 512, "block_size": 16}
    known |= {"prefix_caching": False, "async_scheduling": False, "scheduler": VllmScheduling()}
    return EngineSettings(**known | changes)


def run(settings, blocks, law, shares, trace, replicas=1, log=True):
    pool = EnginePool(settings=settings, blocks=blocks, laws=[law], replicas=replicas)
    return run_phases(pool, shares, trace, log=log)


def random_case(seed):
    rng = np.random.default_rng(seed)
    settings = make_settings(max_num_seqs=int(rng.integers(1, 6)), chunked_prefill=True)
    n = int(rng.integers(1, 14))
    arrivals = np.sort(rng.integers(0, 4_000, n)).tolist()
    rows = [(at, int(rng.integers(1, 150)), int(rng.integers(1, 40))) for at in arrivals]
    least = max(blocks_of(settings, prompt, output) for _, prompt, output in rows)
    law = linear(settings, int(rng.integers(50, 200)), int(rng.integers(0, 4)), int(rng.integers(0, 2)))
    return settings, least + int(rng.integers(0, 6)), law, requests(rows)


def test_a_share_stretches_prompts_whole_and_answers_by_what_does_not_wait_for_memory():
    shares = Phases(prefill_share=50, decode_share=50)
    assert shares.alone == (2 * SCALE, 16_200) and shares.together == (shares.alone,)  # 0.62 / 0.5 + 0.38
    contended = Phases(prefill_share=80, decode_share=100)
    assert contended.alone == (12_500, SCALE) and contended.together == ((22_500, 14_960),)
    assert Phases(prefill_share=30, decode_share=30).alone.decode == 24_467  # 2.44666... is rounded up


@pytest.mark.parametrize("share", [0, 101, 2.5, True])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(UsageError, match="is not a whole number from 1 to 100"):
        Phases(prefill_share=share, decode_share=100)


def test_one_request_at_a_time_takes_what_an_engine_of_both_phases_takes():
    settings, trace = make_settings(), requests([(i * 1_000_000, 10 + 30 * i, 5 + i) for i in range(5)])
    law = linear(settings, 100, 3, 1)
    one = run(settings, 64, law, WHOLE, trace)
    other = simulate(settings, 64, [law], trace, log=True, implementation="reference")
    for name in ("first_token_ns", "finish_ns", "gaps_ns"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert one.counts.equals(other.counts) and one.batches == other.batches


def test_a_prompt_beside_answers_slows_them_only_while_it_is_computed():
    settings, law = make_settings(), linear(make_settings(), 1_000)
    trace = requests([(0, 16, 4), (1_500, 16, 1)])
    found = run(settings, 64, law, WHOLE, trace)
    # The second prompt comes half way through the first token after the first: from then on both go at half the pace,
    # the answer but for the 38% of it that wait for memory, until that prompt is done.
    assert [(start, end) for start, end, _, _ in found.prompts] == [(0, 1_000), (1_500, 3_500)]
    assert found.first_token_ns.tolist() == [1_000, 3_500]
    halves = 1_500 + ceil_div(500 * 16_200, SCALE)
    assert found.answers[0][:2] == (1_000, halves)
    done = (3_500 - halves) * SCALE // 16_200
    assert found.answers[1][:2] == (halves, 3_500 + 1_000 - done)
    assert found.answers[2][:2] == (4_500 - done, 5_500 - done)


def test_shares_within_the_gpu_hold_whether_or_not_the_other_phase_is_at_work():
    settings, law = make_settings(), linear(make_settings(), 1_000)
    found = run(settings, 64, law, Phases(prefill_share=50, decode_share=50), requests([(0, 16, 3), (2_500, 16, 3)]))
    assert [end - start for start, end, _, _ in found.prompts] == [2_000, 2_000]
    assert {end - start for start, end, _, _ in found.answers} == {1_620}


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 3_000), marks=pytest.mark.nightly)])
def test_every_token_comes_once_no_block_is_lost_and_answers_hold_no_prompt(seeds):
    preempted = 0
    for seed in seeds:
        settings, blocks, law, trace = random_case(seed)
        shares = Phases(prefill_share=40 + 10 * (seed % 7), decode_share=100 - 10 * (seed % 5))
        found = run(settings, blocks, law, shares, trace)
        preempted += found.preemptions
        assert found.held == 0 and found.most_blocks <= blocks
        assert len(found.gaps_ns) == int((trace.generated(settings.max_model_len) - 1).sum())
        assert (found.gaps_ns > 0).all() and (found.first_token_ns > trace.arrival_ns).all()
        assert all(tokens == 1 for _, _, rows, _ in found.answers for _, tokens, _ in rows)
        assert all(len(rows) <= settings.max_num_seqs for _, _, rows, _ in found.answers)
        for steps in (found.prompts, found.answers):
            assert all(end <= start for (_, end, _, _), (start, _, _, _) in pairwise(steps))
        for steps, alone, beside in zip((found.prompts, found.answers), shares.alone, shares.together[0], strict=True):
            for start, end, rows, _ in steps:
                whole = law.batch_ns([(tokens, held) for _, tokens, held in rows])
                assert ceil_div(whole * alone, SCALE) <= end - start <= whole * beside // SCALE + 2
        first, rest = isolated(settings, floors_of([law]), trace, overtaking=False)
        assert (found.first_token_ns - trace.arrival_ns >= first).all()
        assert (found.finish_ns - found.first_token_ns >= rest).all()
        # The phases are two machines: neither is done before all of its own batches are.
        assert found.makespan_ns >= int(found.busy_ns.max())
    assert preempted > 0 or len(seeds) < 60


def test_what_the_loops_cannot_take_is_refused():
    settings, trace = make_settings(), requests([(0, 100, 4)])
    law = linear(settings, 100)
    with pytest.raises(UsageError, match="prefix caching"):
        run(make_settings(prefix_caching=True), 64, law, WHOLE, trace)
    with pytest.raises(UsageError, match="open arrivals"):
        run(settings, 64, law, WHOLE, requests([(0, 10, 4)], concurrency=1))
    with pytest.raises(CapacityError, match="KV blocks"):
        run(settings, 2, law, WHOLE, trace)


def test_replicas_get_requests_in_turn_and_do_what_each_does_alone():
    settings, blocks, law, trace = random_case(7)
    shares = Phases(prefill_share=60, decode_share=80)
    found = run(settings, blocks, law, shares, trace, replicas=3)
    for place in range(3):
        mine = np.arange(place, len(trace), 3)
        alone = run(settings, blocks, law, shares, trace.picked(mine))
        assert np.array_equal(found.finish_ns[mine], alone.finish_ns)
        assert found.busy_ns[place].tolist() == alone.busy_ns[0].tolist()
    assert found.counts.tokens == sum(c for _, _, rows, _ in found.steps for _, c, _ in rows)


@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(80, 6_000), marks=pytest.mark.nightly)])
def test_the_kernel_equals_the_reference(seeds):
    preempted = whole = 0
    for seed in seeds:
        settings, blocks, law, trace = random_case(seed)
        rng = np.random.default_rng(seed)
        law = random_law(settings, seed, zeros=0.0, copies=1) if seed % 3 else law
        if seed % 4 == 1:
            settings = replace(settings, chunked_prefill=False, max_num_batched_tokens=512)
            law = random_law(settings, seed, zeros=0.0, copies=1)
            whole += 1
        shares = Phases(prefill_share=int(rng.integers(1, 101)), decode_share=int(rng.integers(1, 101)))
        replicas = int(rng.integers(1, 4))
        one, other = (run(settings, blocks, law, shares, trace, replicas, log=log) for log in (False, True))
        preempted += one.preemptions
        for name in ("first_token_ns", "finish_ns", "gaps_ns", "busy_ns"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), (seed, name)
        for name in ("preemptions", "batches", "most_blocks", "held"):
            assert getattr(one, name) == getattr(other, name), (seed, name)
        assert one.counts.equals(other.counts)
    assert preempted > 0 and whole > 0
