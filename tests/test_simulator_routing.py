"""apex_opt.simulator.routing and reference.router: every published example, and what holds for all policies."""

from __future__ import annotations

import gzip
import itertools
import json
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_cases import random_drafting_run, random_run
from simulator_cases import DRAFTING, IMPLEMENTATIONS, Case, Loop, assert_same, cases, linear, requests

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.routing import Routing
from apex_opt.simulator import EnginePool, run_deployment
from apex_opt.simulator.pack import engines
from apex_opt.simulator.pools import shares
from apex_opt.simulator.ranks import Ranks
from apex_opt.simulator.reference.coordinator import FrontEnd
from apex_opt.simulator.reference.router import CacheAware, Dynamo, LlmD, prefix_scores, queue_scores
from apex_opt.simulator.reference.sequence import Sequence
from apex_opt.simulator.routing import (
    Prefixes,
    RouterSettings,
    beforehand,
    begun_anew,
    in_turn_by,
    number_pieces,
    pairs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

ROUTINGS: tuple[Routing, ...] = get_args(Routing)


@dataclass(eq=False)
class Stub:
    """A replica of which a router sees what it is told."""

    load: int = 0
    waiting: int = 0
    free: Fraction = Fraction(1)

    def outstanding(self, at_ns: int) -> int:
        return self.load


def told(prompts: Seq[Seq[int]], tokens: int = 1) -> tuple[Prefixes, list[Sequence]]:
    """Requests whose prompts have these pieces, and what a router knows of them."""
    starts = np.cumsum([0, *map(len, prompts)])
    pieces, known = number_pieces(starts, np.concatenate([np.array(its, np.int64) for its in prompts]))
    sequences = [Sequence(id=i, prompt=len(its) * tokens, output=1, limit=1) for i, its in enumerate(prompts)]
    return Prefixes(starts, pieces, tokens, known), sequences


# vLLM's balancer.


@pytest.mark.parametrize(
    ("loads", "fronts", "front", "places", "after"),
    [
        ("00 00 00", 1, 0, "0120120", [3, 2, 2]),
        ([[0, 5], [1, 0], [0, 3]], 1, 0, "2102", [1, 2, 2]),
        ([[2, 0], [0, 9], [0, 8]], 1, 0, "0210", [4, 1, 1]),
        ("00 00 00 00", 2, 1, "23012", [2, 2, 4, 2]),
        ([[0, 6], [0, 0], [0, 0]], 2, 0, "12012", [2, 4, 4]),
        ([[0, 6], [0, 0], [0, 0]], 1, 0, "12120", [1, 2, 2]),
        ([[0, 128], [30, 9], [0, 127]], 3, 1, "2012", [3, 33, 6]),
        ("00 00 00 00 00", 3, 2, "340123", [3, 3, 3, 6, 3]),
    ],
)
def test_the_balancer_of_vllm_sends_as_published(
    loads: Any, fronts: int, front: int, places: str, after: list[int]
) -> None:
    copy = [[int(a), int(b)] for a, b in loads.split()] if isinstance(loads, str) else loads
    sent: list[int] = []
    group: Any = SimpleNamespace(
        ranks=SimpleNamespace(count=len(copy), front_ends=fronts),
        now=0,
        send=lambda sequence, rank, wave: sent.append(rank),
    )
    balancer = FrontEnd(group, front)
    balancer.news.put(0, SimpleNamespace(counts=copy, wave=0, running=True))
    balancer.act()
    for _ in places:
        balancer.arrive(Sequence(id=0, prompt=1, output=1, limit=1), None)
    assert sent == [int(place) for place in places]
    assert [waiting for waiting, _ in balancer.loads] == after


def test_for_dense_models_it_deals_in_turn_and_begins_anew_as_recorded() -> None:
    path = Path(__file__).parents[2] / "shared" / "scheduler-golden" / "dp" / "dense4_balancer.json.gz"
    if not path.exists():
        pytest.skip("the recorded case is not there")
    case = json.loads(gzip.decompress(path.read_bytes()))
    arrival_us = np.array([row[0] for row in case["trace"]])
    # The front end hears of a publication, and the coordinator of a first request, as much later.
    late_us = case["config"]["control_us"]
    assert 0 < late_us < np.diff(arrival_us).max()
    assert begun_anew(arrival_us * 1000, 4).tolist() == case["rank"]


def test_a_publication_long_after_the_last_request_is_not_missed() -> None:
    second = 10**9
    assert begun_anew(np.array([0, 1, 60_000_000, 3 * second, 4 * second]), 3).tolist() == [0, 1, 0, 1, 2]
    assert begun_anew(np.array([60_000_000, 6000 * second, 6004 * second, 6009 * second]), 3).tolist()[1] == 0


# SGLang's.


def unlike(count: int, length: int = 100) -> list[list[int]]:
    return [[1_000_000 * (text + 1) + i for i in range(length)] for text in range(count)]


EAGER = RouterSettings(imbalance=2)


def dealt(texts: Seq[Seq[int]], *, answered: bool = False) -> str:
    """Which of three workers texts go to, by letter."""
    known, sequences = told(texts)
    workers, router = [Stub(), Stub(), Stub()], CacheAware(known, EAGER)
    places = ""
    for sequence in sequences:
        chosen: Any = router.choose(sequence, 0, workers)  # type: ignore[arg-type]
        chosen.load += not answered
        places += "ABC"[workers.index(chosen)]
    return places


def test_unlike_texts_go_to_the_least_loaded_and_idle_workers_are_equal() -> None:
    assert dealt(unlike(3)) == "ABC"
    long, short, other = unlike(3)
    assert dealt([long * 10, short[:10], other[:10]], answered=True) == "AAA"


@pytest.mark.parametrize(("same", "others", "goes"), [(30, 70, "A"), (31, 69, "B"), (100, 100, "B"), (100, 245, "A")])
def test_a_prefix_counts_from_three_tenths_on(same: int, others: int, goes: str) -> None:
    first, text, tail = unlike(3, 300)
    text = text[:100]
    known, sequences = told([first, text, text[:same] + tail[:others]])
    workers, router = [Stub(), Stub(), Stub()], CacheAware(known, EAGER)
    for place, sequence in enumerate(sequences[:2]):  # to A, then to B while A is busy
        workers[0].load = place
        router.choose(sequence, 0, workers)  # type: ignore[arg-type]
    workers[0].load = 0
    chosen: Any = router.choose(sequences[2], 0, workers)  # type: ignore[arg-type]
    assert "ABC"[workers.index(chosen)] == goes


def test_uneven_loads_overrule_prefixes() -> None:
    new = unlike(10)[9]
    assert dealt([new] * 5) == "AAABC"
    assert dealt([*unlike(9), *[new] * 6]) == "ABCABCABC" + "AAABCA"


def test_a_ratio_of_exactly_the_threshold_is_even() -> None:
    known, sequences = told(unlike(1) * 2)
    workers, router = [Stub(), Stub(6), Stub(6)], CacheAware(known, EAGER)
    router.choose(sequences[0], 0, workers)  # type: ignore[arg-type]
    workers[0].load = 9
    assert router.choose(sequences[1], 0, workers) is workers[0]  # type: ignore[arg-type, comparison-overlap]


# Dynamo's.

A, B, NEW = [1, 2, 3, 4], [5, 6, 7, 8], list(range(100, 200))


@pytest.mark.parametrize(
    ("state", "prompt", "costs"),
    [
        ("A in prefill", (B, 64), (256, 128)),
        ("A in prefill", (A, 64), (192, 128)),
        ("A decodes", (B, 64), (192, 128)),
        ("A decodes", (A, 64), (128, 128)),
        ("B cached", (B, 64), (128, 128)),
        ("B cached", (B[:3] + NEW[:1], 64), (144, 128)),
        ("B cached", (B + NEW[:2], 96), (192, 192)),
        ("B cached", (B[:3], 40), (104, 72)),
        ("B cached, Y busy", (B, 64), (128, 200)),
        ("B cached", (B + NEW[:36], 640), (1280, 1352 - 72)),
        ("B cached, Y busy", (B + NEW[:36], 640), (1280, 1352)),
        ("B cached, A answered", (B + NEW[:36], 640), (1216, 1280)),
        ("B and 40 new in prefill", (NEW[:4], 64), (264, 128)),
    ],
)
def test_dynamo_costs_what_is_published(state: str, prompt: tuple[list[int], int], costs: tuple[int, int]) -> None:
    texts = [A, B, NEW[50:53], prompt[0], B + NEW[60:63]]
    known, (a, b, busy, asked, longer) = told(texts, 16)
    busy.prompt, asked.prompt, longer.prompt = 40, prompt[1], 104
    x, y = Stub(), Stub()
    router: Any = Dynamo(known, 16, caching="cached" in state or "new" in state)
    if "B" in state:
        b.token_ns, b.answered_ns = [1], 1
        router.send(b, x)
        router.cost(asked, 1, x)
    if "new" in state:
        router.send(longer, x)
    else:
        router.send(a, x)
        a.token_ns = [] if "prefill" in state else [1]
        a.answered_ns = 1 if "answered" in state else None
    if "busy" in state:
        router.send(busy, y)
    assert (router.cost(asked, 2, x), router.cost(asked, 2, y)) == costs
    assert router.choose(asked, 2, [x, y]) is (x if costs[0] <= costs[1] else y)


# llm-d's.


@pytest.mark.parametrize(
    ("queues", "matched", "scores", "chosen"),
    [
        ([0, 0, 0], [0, 0, 0], ["2", "2", "2"], 0),
        ([0, 5, 10], [0, 0, 0], ["2", "1", "0"], 0),
        ([0, 5, 10], [0, 0, 8], ["2", "1", "3"], 2),
        ([0, 5, 10], [0, 4, 8], ["2", "5/2", "3"], 2),
        ([0, 1, 1], [0, 5, 6], ["2", "15/8", "9/4"], 2),
        ([0, 9, 10], [0, 6, 0], ["2", "49/20", "0"], 1),
        ([3, 3, 3], [2, 1, 0], ["11/4", "19/8", "2"], 0),
    ],
)
def test_llm_d_scores_as_published(queues: list[int], matched: list[int], scores: list[str], chosen: int) -> None:
    found = zip(queue_scores(queues), prefix_scores(matched, 8), strict=True)
    assert [2 * queue + 3 * prefix for queue, prefix in found] == [Fraction(score) for score in scores]
    text = list(range(8))
    known, sequences = told([*(text[:its] or [99] for its in matched), text], 16)
    replicas = [Stub(waiting=its) for its in queues]
    router: Any = LlmD(known, 16)
    for sequence, replica in zip(sequences, replicas, strict=False):
        router.choose(sequence, 0, [replica])
    assert router.choose(sequences[-1], 0, replicas) is replicas[chosen]


@pytest.mark.parametrize(
    ("queues", "matched", "usage", "scores", "chosen"),
    [
        ([0, 4, 8], [0, 4, 8], ["9/10", "1/2", "1/4"], ["11/5", "7/2", "9/2"], 2),
        ([0, 0, 0], [4, 4, 0], ["3/5", "1/2", "0"], ["43/10", "9/2", "4"], 1),
    ],
)
def test_llm_d_scores_free_blocks_as_published(
    queues: list[int], matched: list[int], usage: list[str], scores: list[str], chosen: int
) -> None:
    free = [1 - Fraction(share) for share in usage]
    found = zip(queue_scores(queues), prefix_scores(matched, 8), free, strict=True)
    assert [2 * queue + 3 * prefix + 2 * its for queue, prefix, its in found] == [Fraction(score) for score in scores]
    text = list(range(8))
    known, sequences = told([*(text[:its] or [99] for its in matched), text], 16)
    replicas = [Stub(waiting=its, free=share) for its, share in zip(queues, free, strict=True)]
    router: Any = LlmD(known, 16, 2)
    for sequence, replica in zip(sequences, replicas, strict=False):
        router.choose(sequence, 0, [replica])
    assert router.choose(sequences[-1], 0, replicas) is replicas[chosen]


# Those whose dealing is known, or drawn.


def test_sessions_keep_to_the_replica_that_their_first_request_was_dealt() -> None:
    assert in_turn_by(np.array([7, 7, 3, 9, 3, 4]), 3).tolist() == [0, 0, 1, 2, 1, 0]


def test_two_different_replicas_are_drawn_and_each_as_often() -> None:
    drawn = pairs(30_000, 4)
    assert (drawn[:, 0] < drawn[:, 1]).all()
    counts = np.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16).reshape(4, 4)[np.triu_indices(4, 1)]
    assert counts.min() > 4_700 and counts.max() < 5_300
    assert np.array_equal(drawn, pairs(30_000, 4))


# What holds for all.

ONE_SEAT = EngineSettings(
    max_num_seqs=1, max_num_batched_tokens=32, max_model_len=64, block_size=4, async_scheduling=False
)
KERNEL_LOOPS: tuple[Loop, ...] = ("synchronous", "asynchronous", "threshold", "prefix caching", "pipeline", "static")


def test_a_shared_queue_hands_the_oldest_to_whoever_has_a_seat_first() -> None:
    # A batch takes 10 ns: requests of 6, 1, 1 and 1 tokens on two replicas with a seat each.
    case = Case(
        settings=ONE_SEAT,
        blocks=20,
        laws=(linear(ONE_SEAT, 10),),
        trace=requests([(0, 4, 6), (0, 4, 1), (1, 4, 1), (2, 4, 1)]),
        replicas=2,
        routing="pull",
    )
    outcome = case.run("reference")
    assert outcome.finish_ns.tolist() == [60, 10, 20, 30]
    assert outcome.arrival_ns.tolist() == [0, 0, 1, 2]
    assert case.having(routing="round_robin").run("reference").finish_ns.tolist() == [60, 10, 70, 20]


@pytest.mark.parametrize("routing", ROUTINGS)
@settings(max_examples=6, deadline=None)
@given(cases("synchronous", "routed", busy=True, most=5))
def test_no_policy_beats_the_best_dealing(routing: Routing, case: Case) -> None:
    case = case.having(replicas=2)
    chosen = case.having(routing=routing).run("reference")
    pool = EnginePool(settings=case.settings, blocks=case.blocks, laws=case.laws)
    latencies = []
    for dealing in itertools.product(range(2), repeat=len(case.trace)):
        parts = sorted(set(dealing))
        assigned = np.array([parts.index(place) for place in dealing])
        outcome = run_deployment(
            [pool] * len(parts), case.trace, assigned=assigned, routing="round_robin", implementation="reference"
        )
        latencies.append(int((outcome.finish_ns - outcome.arrival_ns).sum()))
    total = int((chosen.finish_ns - chosen.arrival_ns).sum())
    assert total in latencies


@pytest.mark.parametrize("routing", ROUTINGS)
@settings(max_examples=10, deadline=None)
@given(st.one_of([cases(loop, "routed", most=12) for loop in ("synchronous", "prefix caching", "pipeline")]))
def test_every_request_is_answered_by_one_replica(routing: Routing, case: Case) -> None:
    outcome = case.having(routing=routing).run("reference")
    assert outcome.steps is not None and outcome.steps_per_replica is not None
    assert (outcome.finish_ns >= outcome.first_token_ns).all() and (outcome.first_token_ns >= outcome.arrival_ns).all()
    starts = np.cumsum([0, *outcome.steps_per_replica])
    served = [
        {row[0] for step in outcome.steps[first:last] for row in step[2]} for first, last in itertools.pairwise(starts)
    ]
    assert sorted(itertools.chain.from_iterable(served)) == list(range(len(case.trace)))


# The kernel.


@pytest.mark.parametrize("routing", [name for name in ROUTINGS if name not in ("round_robin", "least_loaded")])
@settings(max_examples=25, deadline=None)
@given(st.one_of([cases(loop, "routed") for loop in (*KERNEL_LOOPS, *DRAFTING)]))
def test_the_kernel_equals_the_reference(routing: Routing, case: Case) -> None:
    case = case.having(routing=routing)
    assert_same(case.run("kernel"), case.run("reference"))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("most_gap", [3, 40])
def test_it_does_so_where_loads_are_high_and_prompts_begin_alike(routing: Routing, most_gap: int) -> None:
    engine = EngineSettings(
        max_num_seqs=8, max_num_batched_tokens=64, max_model_len=256, block_size=4, prefix_caching=True
    )
    rng, count = np.random.default_rng(most_gap), 400
    says = [[100 * first + j for j in range(8)] + rng.integers(0, 2, 4).tolist() for first in rng.integers(0, 3, count)]
    arrivals, outputs = np.cumsum(rng.integers(0, most_gap, count)).tolist(), rng.integers(1, 40, count).tolist()
    rows = [
        (at, int(prompt), output)
        for at, prompt, output in zip(arrivals, rng.integers(45, 49, count), outputs, strict=True)
    ]
    case = Case(
        settings=engine,
        blocks=200,
        laws=(linear(engine, 10, 1),),
        trace=requests(rows, content=says, content_tokens=4),
        replicas=4,
        routing=routing,
    )
    for caching in (True, False):
        case = case.having(settings=replace(engine, prefix_caching=caching))
        assert_same(case.run("kernel", log=False), case.run("reference", log=False))


def test_pools_of_their_own_limits_are_routed_together_and_apart() -> None:
    small = replace(ONE_SEAT, max_num_seqs=2)
    pools = [
        EnginePool(settings=its, blocks=30, laws=[linear(its, base)], replicas=2)
        for its, base in ((ONE_SEAT, 10), (small, 7))
    ]
    rng = np.random.default_rng(5)
    trace = requests(
        [
            (int(at), 4, int(output))
            for at, output in zip(np.cumsum(rng.integers(0, 9, 40)), rng.integers(1, 9, 40), strict=True)
        ]
    )
    for routing, assigned in itertools.product(ROUTINGS, (None, rng.integers(0, 2, 40))):
        runs = [
            run_deployment(pools, trace, assigned=assigned, routing=routing, log=True, implementation=implementation)
            for implementation in IMPLEMENTATIONS
        ]
        assert_same(*runs)


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 1500), marks=pytest.mark.nightly)])
def test_the_kernel_equals_the_reference_before_sglang(seeds: range) -> None:
    rules: tuple[Routing, ...] = ("power_of_two", "cache_aware", "dynamo", "llm_d")
    compared = 0
    for seed in seeds:
        run = (random_drafting_run if seed % 3 == 0 else random_run)(seed)
        if run.trace.concurrency is not None:
            continue
        pool = EnginePool(settings=run.settings, blocks=run.blocks, laws=run.laws, replicas=2 + seed % 2)
        routing, page, piece = rules[seed % 4], run.settings.block_size, run.trace.content_tokens
        if routing in ("dynamo", "llm_d") and piece and page % piece and piece % page:
            continue  # what is in a page is not known
        assert engines.routes([pool], shares([pool], run.trace, [routing]))
        assert_same(
            *(
                run_deployment([pool], run.trace, routing=routing, log=True, implementation=implementation)
                for implementation in IMPLEMENTATIONS
            )
        )
        compared += 1
    assert compared > len(seeds) // 4


def test_the_kernel_has_all_routers_but_for_some_before_sglang_and_waits_and_those_before_ranks() -> None:
    pool = EnginePool(settings=ONE_SEAT, blocks=30, laws=[linear(ONE_SEAT, 10)], replicas=2)
    trace = requests([(0, 4, 1), (0, 4, 1)])
    sglang = replace(pool, settings=replace(ONE_SEAT, scheduler=SglangScheduling()))
    trtllm = replace(pool, settings=replace(ONE_SEAT, scheduler=TrtllmScheduling()))
    limits = {"max_num_seqs": ONE_SEAT.max_num_seqs, "max_num_batched_tokens": ONE_SEAT.max_num_batched_tokens}
    ranks = replace(pool, ranks=Ranks.bare(2, **limits))
    for routing in ROUTINGS:
        assert engines.routes([pool], shares([pool], trace, [routing]))
        assert engines.routes([trtllm], shares([trtllm], trace, [routing])) == (routing != "llm_d_kv")
        assert engines.routes([sglang], shares([sglang], trace, [routing])) == (routing not in ("pull", "llm_d_kv"))
        known = routing in ("round_robin", "least_loaded", "vllm_dp", "session")
        assert engines.routes([ranks], shares([ranks], trace, [routing])) == known


def test_sessions_are_those_of_the_trace_where_it_tells_them() -> None:
    told_by = {"content": [[1], [1], [2], [2]], "content_tokens": 4}
    trace = requests([(0, 4, 1), (1, 4, 1), (2, 4, 1), (3, 4, 1)], **told_by)
    assert beforehand("session", trace, np.arange(4), 2).tolist() == [0, 0, 1, 1]  # type: ignore[union-attr]
    trace = requests([(0, 4, 1), (1, 4, 1), (2, 4, 1), (3, 4, 1)], **told_by, session=[7, 3, 7, 3])
    assert beforehand("session", trace, np.arange(4), 2).tolist() == [0, 1, 0, 1]  # type: ignore[union-attr]
    assert beforehand("session", trace.picked(np.array([1, 2])), np.arange(2), 2).tolist() == [0, 1]  # type: ignore[union-attr]
