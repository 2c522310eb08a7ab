"""SGLang's prefill and decode instances: who starts when, what is sent when, and nothing lost."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from simulator_cases import IMPLEMENTATIONS, assert_same, linear, random_law, requests

from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.figures.stops import Stop
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import EnginePool, Handover, run_disaggregated
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from collections.abc import Callable

    from apex_opt.simulator import DisaggregatedOutcome
    from apex_opt.workload import Trace

PLAIN = EngineSettings(
    max_num_seqs=4,
    max_num_batched_tokens=8,
    max_model_len=256,
    block_size=4,
    async_scheduling=False,
    scheduler=SglangScheduling(),
)
LINK = Handover(read_ns=5, block_ns=2, notice_ns=7, in_turn=True)
ALIKE = (
    "arrival_ns",
    "first_token_ns",
    "finish_ns",
    "prefill",
    "decode",
    "prefilled_ns",
    "forwarded_ns",
    "read_ns",
    "read_blocks",
    "preemptions_of",
    "held",
    "busy_ns",
)


def pool(blocks: int = 400, replicas: int = 1, step_ns: int = 100, **changes: Any) -> EnginePool:
    """Instances whose batches take so long and 10 ns for a token."""
    settings = replace(PLAIN, **changes)
    return EnginePool(settings=settings, blocks=blocks, laws=(linear(settings, step_ns, 10),), replicas=replicas)


def run(prefill: EnginePool, decode: EnginePool, rows: Any, link: Handover = LINK, **more: Any) -> DisaggregatedOutcome:
    return both(prefill, decode, link, requests(rows), **more)


def both(prefill: EnginePool, decode: EnginePool, link: Handover, trace: Trace, **more: Any) -> DisaggregatedOutcome:
    """A run by the reference, as which one by the kernel comes out."""
    run = partial(run_disaggregated, prefill, decode, link, trace, **more)
    theirs, ours, silent = run(log=True, implementation="reference"), run(log=True), run()
    assert_same(ours, theirs)
    for name in ALIKE:
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
        assert np.array_equal(getattr(silent, name), getattr(theirs, name)), name
    assert ours.steps_per_replica == theirs.steps_per_replica
    assert np.array_equal(ours.gaps_ns, theirs.gaps_ns)
    for one in (ours, silent):
        for mine, its in zip(one.pools, theirs.pools, strict=True):
            assert mine.counts.equals(its.counts)
            assert (mine.preemptions, mine.batches, mine.cached_tokens) == (
                its.preemptions,
                its.batches,
                its.cached_tokens,
            )
    return theirs


@pytest.fixture
def reserve(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Lets decode instances keep room for so many tokens to come."""

    def reserve(tokens: int) -> None:
        for module in ("reference.pushing", "checks", "pack.pushing"):
            monkeypatch.setattr(f"apex_opt.simulator.{module}.RESERVED", tokens)

    return reserve


def test_a_request_goes_through_room_prompt_chunks_that_are_sent_and_answer() -> None:
    # It has room at once, which takes 7 to hear; chunks of 8, 8 and 4 tokens take 180, 180 and 140.
    outcome = run(pool(), pool(), [(0, 20, 3)])
    prefilled = 7 + 180 + 180 + 140
    assert outcome.prefilled_ns.tolist() == [prefilled]
    # The first two chunks are sent meanwhile; the last takes 5 and 2 for its page, and 7 until it is heard of.
    first = prefilled + 5 + 2 + 7
    assert outcome.first_token_ns.tolist() == [first]
    # The other two tokens are the decode instance's.
    assert outcome.finish_ns.tolist() == [first + 2 * 110]
    assert [rows for _, _, rows, _ in outcome.steps or ()][-2:] == [[(0, 1, 21)], [(0, 1, 22)]]
    # What is told of the link is all that it takes: three reads of five pages.
    assert outcome.read_ns.tolist() == [[first - 7 - (3 * 5 + 5 * 2), first - 7]]
    assert outcome.read_blocks.tolist() == [5]


def test_an_answer_of_one_token_takes_no_batch_of_the_decode_instance() -> None:
    outcome = run(pool(), pool(), [(0, 4, 1), (0, 4, 2)])
    assert outcome.finish_ns[0] == outcome.first_token_ns[0]
    assert [rows for _, _, rows, _ in outcome.steps or ()][-1] == [(1, 1, 5)]


def test_prompts_wait_until_the_decode_instance_has_room_for_them_and_what_is_to_come() -> None:
    # Room for a prompt of 8 tokens, 4 to come and 512 kept, twice over but for a page.
    tight = run(pool(), pool((2 * (8 + 512)) // 4 - 1), [(0, 8, 4), (0, 8, 4)])
    roomy = run(pool(), pool((2 * (8 + 512)) // 4 + 8), [(0, 8, 4), (0, 8, 4)])
    second = min(start for start, _, rows, _ in tight.steps or () if rows[0][0] == 1)
    assert second == tight.finish_ns[0] + 7
    assert min(start for start, _, rows, _ in roomy.steps or () if rows[0][0] == 1) < roomy.finish_ns[0]


def test_pages_of_a_prompt_are_held_until_they_are_sent() -> None:
    # Room for one prompt at a time: the next is computed once all of the first are sent.
    slow = replace(LINK, read_ns=1000)
    outcome = run(pool(blocks=5), pool(), [(0, 8, 2), (0, 8, 2)], slow)
    starts = [start for start, _, rows, _ in outcome.steps or () if rows[0][2] == 8]
    assert starts[1] == outcome.read_ns[0, 1] == outcome.prefilled_ns[0] + 1000 + 2 * 2


def test_who_gives_way_keeps_what_it_had_and_goes_on_with_it(reserve: Callable[[int], None]) -> None:
    reserve(1)
    outcome = run(pool(), pool(blocks=16), [(0, 8, 40), (0, 8, 40), (0, 8, 40)])
    assert outcome.preemptions > 0
    for i in range(3):
        contexts = [row[2] for _, _, rows, _ in outcome.steps or () for row in rows if row[0] == i]
        answered = contexts[contexts.index(8) + 1 :]
        assert answered == list(range(9, 48))  # each token is computed once


@pytest.mark.parametrize("seed", range(24))
def test_nothing_is_lost_and_everything_is_given_back(seed: int, reserve: Callable[[int], None]) -> None:
    rng = np.random.default_rng(seed)
    reserved = int(rng.choice([1, 1, 8, 40]))
    reserve(reserved)
    count = 40
    arrivals = np.cumsum(rng.integers(0, int(rng.choice([20, 400])), count)).tolist()
    prompts, outputs = rng.integers(1, 60, count).tolist(), rng.integers(1, 50, count).tolist()
    changes = {"async_scheduling": bool(rng.random() < 0.5), "prefix_caching": bool(rng.random() < 0.4)}
    changes["chunked_prefill"] = bool(rng.random() < 0.7)
    changes["max_num_batched_tokens"] = 8 if changes["chunked_prefill"] else 256
    least = (60 + 50 + reserved) // 4 + 2
    prefill = pool(int(rng.integers(40, 80)), int(rng.integers(1, 3)), **changes)
    decode = pool(least + int(rng.integers(0, 40)), int(rng.integers(1, 3)), int(rng.choice([10, 300])), **changes)
    content = {}
    if changes["prefix_caching"]:
        pieces = [
            [int(rng.integers(0, 2)), *(-(-prompt // 4) * [1000 + i])][: -(-prompt // 4)]
            for i, prompt in enumerate(prompts)
        ]
        content = {"content": pieces, "content_tokens": 4}
    rows = list(zip(arrivals, prompts, outputs, strict=True))
    routing = tuple(rng.choice(["round_robin", "least_loaded", "cache_aware"], 2).tolist())
    outcome = run_disaggregated(prefill, decode, LINK, requests(rows, **content), log=True, routing=routing)  # type: ignore[arg-type]
    cached = prefill.settings.prefix_caching
    assert outcome.held[prefill.replicas :].tolist() == [0] * decode.replicas
    assert cached or not outcome.held.any()
    ends = np.cumsum([0, *(outcome.steps_per_replica or ())])
    sides = (outcome.steps or [])[: ends[prefill.replicas]], (outcome.steps or [])[ends[prefill.replicas] :]
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        computed = [(row[1], row[2]) for _, _, taken, _ in sides[0] for row in taken if row[0] == i]
        assert computed[-1][1] == prompt
        assert cached or sum(tokens for tokens, _ in computed) == prompt
        # Where batches are formed ahead a token of who gives way may be computed again.
        answered = [row[2] for _, _, taken, _ in sides[1] for row in taken if row[0] == i]
        assert sorted(set(answered)) == list(range(prompt + 1, prompt + output))
    assert (outcome.first_token_ns >= outcome.read_ns[:, 1] + LINK.notice_ns).all()
    assert (outcome.read_ns[:, 1] > outcome.prefilled_ns).all()
    assert (outcome.finish_ns >= outcome.first_token_ns).all()
    for first, last in pairwise(ends):
        starts = [start for start, *_ in (outcome.steps or [])[first:last]]
        assert starts == sorted(starts)


def test_clients_send_their_next_requests_once_they_have_answers() -> None:
    rows = [(0, 8, 4), (0, 4, 2), (0, 6, 3), (0, 3, 1)]
    prefill, decode = pool(replicas=2), pool(replicas=2)
    outcome = both(prefill, decode, LINK, requests(rows, 2, 50))
    assert outcome.arrival_ns.tolist() == [0, 0, *(np.sort(outcome.finish_ns)[:2] + 50).tolist()]


def test_what_can_never_have_room_is_refused_with_the_room_there_is() -> None:
    with pytest.raises(CapacityError, match=r"keeps room for 524 tokens, 512 of them .* its cache has 520"):
        run(pool(), pool(blocks=130), [(0, 8, 4)])


def test_instances_of_two_engines_do_not_hand_over() -> None:
    other = pool(scheduler=VllmScheduling(idle_sleep_us=1))
    with pytest.raises(UsageError, match="of the same engine"):
        run(pool(), other, [(0, 8, 4)])


def test_nobody_pulls_what_is_sent_to_both_at_once() -> None:
    with pytest.raises(UsageError, match="which pull does not"):
        run(pool(), pool(), [(0, 8, 4)], routing=("pull", "round_robin"))


def drawn(rng: np.random.Generator, reserved: int) -> tuple[EnginePool, EnginePool, Handover, Trace]:
    """Instances of every kind over caches that hold little more than one request, before arrivals or clients."""
    page, longest, count = int(rng.choice([1, 1, 4, 8])), int(rng.choice([16, 64, 128])), int(rng.integers(1, 60))
    caching = bool(rng.random() < 0.4)
    prompts, outputs = rng.integers(1, longest // 2, count), rng.integers(1, longest // 2, count)
    stated = outputs
    if rng.random() < 0.5:
        stated = np.maximum(outputs, np.minimum(outputs + rng.integers(0, 30, count), longest - prompts))
    pools = []
    for room in (prompts + 1, prompts + stated + reserved):
        chunked, seats = bool(rng.random() < 0.6), int(rng.integers(1, 9) if rng.random() < 0.8 else 36)
        settings = EngineSettings(
            max_num_seqs=seats,
            max_num_batched_tokens=max(seats, page) + int(rng.integers(0, 24)) if chunked else 4 * longest + seats,
            max_model_len=longest,
            chunked_prefill=chunked,
            block_size=page,
            prefix_caching=caching,
            async_scheduling=bool(rng.random() < 0.5),
            scheduler=SglangScheduling(
                ignore_eos=bool(rng.random() < 0.2 and chunked and (stated == outputs).all()),
                mixed_chunk=bool(rng.random() < 0.3),
                schedule_policy="lpm" if rng.random() < 0.5 else "fcfs",
                max_prefill_tokens=int(rng.choice([8, 64, 16384])) if chunked else 16384,
                scheduler_recv_interval=int(rng.choice([1, 2, 10])) if rng.random() < 0.3 else 1,
            ),
        )
        law = random_law(settings, int(rng.integers(1 << 30)), zeros=float(rng.choice([0, 0.5])), copies=1, unit=7)
        blocks = ceil_div(int(room.max()), page) + 4 + int(rng.integers(0, int(rng.choice([1, 20, 400]))))
        pools.append(EnginePool(settings=settings, blocks=blocks, laws=(law,), replicas=int(rng.integers(1, 4))))
    arrivals = np.cumsum(rng.integers(0, int(rng.choice([0, 5, 100, 3000])) + 1, count))
    clients: tuple[int, ...] = ()
    if rng.random() < 0.3:
        clients, arrivals = (int(rng.integers(1, 8)), int(rng.choice([0, 50, 4000]))), np.zeros(count, int)
    content = {}
    if caching and rng.random() < 0.8:
        pieces = [
            (rng.random(ceil_div(int(p), page)) * 2 + 100 * i * (rng.random() < 0.3)) for i, p in enumerate(prompts)
        ]
        content = {"content": [its.astype(int).tolist() for its in pieces], "content_tokens": page}
    rows = list(zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True))
    trace = requests(rows, *clients, **content)
    if (stated > outputs).any():
        stated.flags.writeable = False
        trace = replace(trace, max_new_tokens=stated)
    link = Handover(
        read_ns=int(rng.choice([0, 5, 700])),
        block_ns=int(rng.choice([0, 2, 90])),
        notice_ns=int(rng.choice([0, 7, 300])),
        in_turn=bool(rng.random() < 0.5),
    )
    return *pools, link, trace  # type: ignore[return-value]


@pytest.mark.parametrize("seeds", [range(80), pytest.param(range(80, 6000), marks=pytest.mark.nightly)])
def test_kernel_equals_reference(seeds: range, reserve: Callable[[int], None]) -> None:
    seen: set[str] = set()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        reserved = int(rng.choice([1, 1, 8, 40, 512]))
        reserve(reserved)
        given = drawn(rng, reserved)
        try:
            outcome = both(*given)
        except CapacityError as error:
            with pytest.raises(CapacityError, match=re.escape(str(error))):
                run_disaggregated(*given)
            continue
        trace = given[3]
        seen |= {"retracted"} if outcome.preemptions else set()
        seen |= {"clients"} if trace.concurrency is not None else set()
        seen |= {"found"} if outcome.cached_tokens else set()
        seen |= {"no batch of the decode instance"} if (outcome.first_token_ns == outcome.finish_ns).any() else set()
        read_ns = outcome.read_ns[:, 1] + given[2].notice_ns
        seen |= {"a wait for a seat"} if (outcome.first_token_ns > read_ns + 5000).any() else set()
    assert len(seen) == 5, seen


def test_a_run_ends_early_where_the_whole_one_passes_a_limit() -> None:
    rows = [(0, 8, 4), (10, 4, 2), (20, 6, 30), (25, 3, 1)]
    whole = run(pool(), pool(), rows)
    longest = int((whole.finish_ns - whole.arrival_ns).max())
    for limit, passed in ((longest, False), (longest - 1, True)):
        stops = [Stop(metric="whole", kind="count", limit_ns=limit)]
        found = [
            run_disaggregated(pool(), pool(), LINK, requests(rows), stops=stops, implementation=one)
            for one in IMPLEMENTATIONS
        ]
        assert [one.stopped for one in found] == [passed, passed]


def test_routers_that_look_at_loads_are_those_of_the_reference() -> None:
    rows = [(10 * i, 8, 4) for i in range(6)]
    routing: Any = ("least_loaded", "least_loaded")
    outcome = run(pool(replicas=2), pool(replicas=2), rows, routing=routing)
    assert set(outcome.prefill.tolist()) == set(outcome.decode.tolist()) == {0, 1}
    dealt: Any = ("vllm_dp", "round_robin")
    assert run(pool(replicas=3), pool(replicas=2), rows, routing=dealt).decode.tolist() == [0, 1, 0, 1, 0, 1]
