"""SGLang's prefill and decode instances: who starts when, what is sent when, and nothing lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from simulator_cases import linear, requests

from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import EnginePool, Handover, run_disaggregated
from apex_opt.simulator.reference import pushing

if TYPE_CHECKING:
    from apex_opt.simulator import DisaggregatedOutcome

PLAIN = EngineSettings(
    max_num_seqs=4,
    max_num_batched_tokens=8,
    max_model_len=256,
    block_size=4,
    async_scheduling=False,
    scheduler=SglangScheduling(),
)
LINK = Handover(read_ns=5, block_ns=2, notice_ns=7, in_turn=True)


def pool(blocks: int = 400, replicas: int = 1, step_ns: int = 100, **changes: Any) -> EnginePool:
    """Instances whose batches take so long and 10 ns for a token."""
    settings = replace(PLAIN, **changes)
    return EnginePool(settings=settings, blocks=blocks, laws=(linear(settings, step_ns, 10),), replicas=replicas)


def run(prefill: EnginePool, decode: EnginePool, rows: Any, link: Handover = LINK, **more: Any) -> DisaggregatedOutcome:
    return run_disaggregated(prefill, decode, link, requests(rows), log=True, **more)


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


def test_who_gives_way_keeps_what_it_had_and_goes_on_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "RESERVED", 1)
    monkeypatch.setattr("apex_opt.simulator.api.RESERVED", 1)
    outcome = run(pool(), pool(blocks=16), [(0, 8, 40), (0, 8, 40), (0, 8, 40)])
    assert outcome.preemptions > 0
    for i in range(3):
        contexts = [row[2] for _, _, rows, _ in outcome.steps or () for row in rows if row[0] == i]
        answered = contexts[contexts.index(8) + 1 :]
        assert answered == list(range(9, 48))  # each token is computed once


@pytest.mark.parametrize("seed", range(24))
def test_nothing_is_lost_and_everything_is_given_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    reserved = int(rng.choice([1, 1, 8, 40]))
    monkeypatch.setattr(pushing, "RESERVED", reserved)
    monkeypatch.setattr("apex_opt.simulator.api.RESERVED", reserved)
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
    outcome = run_disaggregated(prefill, decode, LINK, requests(rows, 2, 50), log=True)
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
