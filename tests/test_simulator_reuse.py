"""TensorRT-LLM's block reuse: examples worked by hand from its rules, seeded faults, and the kernel.

Nothing was recorded of it: its rules were read in its sources.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from ranks_cases import law_of, random_ranks
from simulator_cases import IMPLEMENTATIONS, Case, alone, assert_same, linear, random_law, requests
from test_simulator_trtllm import ENGINE

from apex_opt.engines.schedulers import CAPACITY_POLICIES, CHUNKING_POLICIES, TrtllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator import EnginePool, run_deployment
from apex_opt.simulator.reference.reuse import ReusedBlocks
from apex_opt.simulator.reference.trtllm import TrtllmScheduler
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.reference.sequence import Batch, Sequence
    from apex_opt.workload.trace import Trace

Rows = list[tuple[int, int, int]]


def case(
    rows: Rows,
    content: list[list[int]],
    *,
    blocks: int = 100,
    stated: list[int] | None = None,
    own: dict[str, Any] | None = None,
    **changes: Any,
) -> Case:
    """Requests of (arrival, prompt, output), a content id for every 4 tokens, on batches of 10 ns and 1 ns a token."""
    engine = replace(ENGINE, prefix_caching=True, scheduler=TrtllmScheduling(**(own or {})), **changes)
    trace = requests(rows, max_new_tokens=stated, content=content, content_tokens=4)
    return Case(settings=engine, blocks=blocks, laws=(linear(engine, 10, 1),), trace=trace)


FORCED = {"context_chunking_policy": "FORCE_CHUNK", "snapshot_interval": 8}
EXAMPLES: dict[str, tuple[Case, list[Any]]] = {
    # The second prompt finds two blocks that the first has left behind.
    "found": (
        case([(0, 9, 1), (50, 9, 1)], [[1, 2, 3], [1, 2, 3]]),
        [(0, 19, [(0, 9, 9)], []), (50, 61, [(1, 1, 9)], [])],
    ),
    # All 8 tokens are cached, yet the next token comes of the last one: its block is computed again.
    "last block": (
        case([(0, 8, 1), (50, 8, 1)], [[1, 2], [1, 2]]),
        [(0, 18, [(0, 8, 8)], []), (50, 64, [(1, 4, 8)], [])],
    ),
    # 1 waits for what 0 computes; 2, which begins otherwise, does not wait behind it.
    "waiting for another": (
        case([(0, 9, 1), (0, 9, 1), (0, 4, 1)], [[1, 2, 3], [1, 2, 3], [7]]),
        [(0, 23, [(0, 9, 9), (2, 4, 4)], []), (23, 34, [(1, 1, 9)], [])],
    ),
    # With overlap all of the first prompt is scheduled and nothing of it is stored when the second is looked at again.
    "waiting for another, overlap": (
        case([(0, 9, 1), (0, 9, 1)], [[1, 2, 3], [1, 2, 3]], async_scheduling=True),
        [(0, 19, [(0, 9, 9)], []), (0, 38, [(1, 9, 9)], [])],
    ),
    # STATIC_BATCH waits for nobody.
    "static": (
        case([(0, 9, 1), (0, 9, 1)], [[1, 2, 3], [1, 2, 3]], own={"capacity_policy": "STATIC_BATCH"}),
        [(0, 28, [(0, 9, 9), (1, 9, 9)], [])],
    ),
    # 0 is kept 4 of 5 blocks; of the 3 that 1 needs it has 2 already. The prompt is stored once it is computed.
    "shared blocks": (
        case([(0, 8, 4), (20, 9, 3)], [[1, 2], [1, 2, 3]], blocks=5, stated=[8, 3]),
        [
            (0, 18, [(0, 8, 8)], []),
            (18, 29, [(0, 1, 9)], []),
            (29, 41, [(0, 1, 10), (1, 1, 9)], []),
            (41, 53, [(0, 1, 11), (1, 1, 10)], []),
            (53, 64, [(1, 1, 11)], []),
        ],
    ),
    # Free blocks that hold something are free: 0 and its 3 blocks make room for 1, what 2 would find is gone.
    "forgotten": (
        case([(0, 9, 1), (50, 12, 1), (100, 9, 1)], [[1, 2, 3], [7, 8, 9], [1, 2, 3]], blocks=4),
        [(0, 19, [(0, 9, 9)], []), (50, 72, [(1, 12, 12)], []), (100, 115, [(2, 5, 9)], [])],
    ),
    # 12 of 20 tokens are left, 8 fit.
    "chunks": (
        case(
            [(0, 9, 1), (50, 20, 1)],
            [[1, 2, 3], [1, 2, 4, 5, 6]],
            max_num_batched_tokens=8,
            max_num_seqs=1,
            chunked_prefill=True,
        ),
        [
            (0, 18, [(0, 8, 8)], []),
            (18, 29, [(0, 1, 9)], []),
            (50, 68, [(1, 8, 16)], []),
            (68, 82, [(1, 4, 20)], []),
        ],
    ),
    # A block in turn for each of what is not cached: 4 + 4, then the rest of 1.
    "chunks in turn": (
        case(
            [(0, 9, 1), (50, 17, 1), (50, 16, 1)],
            [[1, 2, 3], [1, 2, 4, 5, 6], [7, 8, 9, 10]],
            max_num_batched_tokens=10,
            chunked_prefill=True,
            own={"context_chunking_policy": "EQUAL_PROGRESS"},
        ),
        [
            (0, 19, [(0, 9, 9)], []),
            (50, 68, [(1, 4, 12), (2, 4, 4)], []),
            (68, 87, [(2, 4, 8), (1, 5, 17)], []),
            (87, 105, [(2, 8, 16)], []),
        ],
    ),
    # States are kept every 8 tokens, where chunks end. 3 blocks of the second prompt are there, states after 2 of them.
    "states": (
        case([(0, 20, 1), (100, 15, 1)], [[1, 2, 3, 4, 5], [1, 2, 3, 9]], chunked_prefill=True, own=FORCED),
        [
            (0, 18, [(0, 8, 8)], []),
            (18, 36, [(0, 8, 16)], []),
            (36, 50, [(0, 4, 20)], []),
            (100, 117, [(1, 7, 15)], []),
        ],
    ),
    # The second prompt is charged for 8 tokens, as if none was cached, so that 2 is cut, and computes 7.
    "states, charged": (
        case(
            [(0, 8, 1), (50, 15, 1), (50, 12, 1)],
            [[1, 2], [1, 2, 3, 9], [7, 8, 9]],
            max_num_batched_tokens=12,
            chunked_prefill=True,
            own=FORCED,
        ),
        [
            (0, 18, [(0, 8, 8)], []),
            (50, 71, [(2, 4, 4), (1, 7, 15)], []),
            (71, 85, [(2, 4, 8)], []),
            (85, 99, [(2, 4, 12)], []),
        ],
    ),
    # Who gave way finds its prompt again, as nobody has taken its block meanwhile.
    "giving way": (
        case([(0, 4, 3), (0, 4, 3)], [[1], [2]], blocks=3, own={"capacity_policy": "MAX_UTILIZATION"}),
        [
            (0, 18, [(0, 4, 4), (1, 4, 4)], []),
            (18, 29, [(0, 1, 5)], [1]),
            (29, 40, [(0, 1, 6)], []),
            (40, 51, [(1, 1, 5)], []),
            (51, 62, [(1, 1, 6)], []),
        ],
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_worked_by_hand(name: str, implementation: Implementation) -> None:
    served, expected = EXAMPLES[name]
    assert served.run(implementation).steps == expected


def test_what_a_request_finds_when_it_first_begins_is_counted() -> None:
    assert [EXAMPLES[name][0].run().cached_tokens for name in ("found", "last block", "giving way")] == [8, 4, 0]


def test_forced_chunks_are_first_come_first_served_where_no_states_are_kept() -> None:
    """Without block reuse there is nothing to keep them for."""
    rows, content = [(0, 20, 1), (0, 30, 1)], [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13]]
    forced = case(rows, content, chunked_prefill=True, own=FORCED)
    plain = case(rows, content, chunked_prefill=True)
    steps = [replace(its, settings=replace(its.settings, prefix_caching=False)).run().steps for its in (forced, plain)]
    assert steps[0] == steps[1] == [(0, 42, [(1, 12, 12), (0, 20, 20)], []), (42, 70, [(1, 18, 30)], [])]


def test_states_are_kept_where_a_block_ends() -> None:
    with pytest.raises(UsageError, match="snapshot_interval 6 is not a multiple of block_size 4"):
        replace(ENGINE, scheduler=TrtllmScheduling(snapshot_interval=6))


# Seeded faults: each is a rule changed, and an example shows it.


def _at_once(self: TrtllmScheduler, batch: Batch, sequence: Sequence, tokens: int) -> None:
    _ENTER(self, batch, sequence, tokens)
    self.blocks.register(sequence, min(sequence.computed, sequence.known))


def _whole(self: ReusedBlocks, sequence: Sequence) -> list[int]:
    return self._walk(sequence.keys[: sequence.known // self.block_size])


def _front(self: ReusedBlocks, sequence: Sequence) -> None:
    table = sequence.table[::-1]
    sequence.table = table
    _RELEASE(self, sequence)


def _anywhere(self: TrtllmScheduler, sequence: Sequence) -> list[int]:
    return self.reused.found(sequence) if self.reused and not self.started(sequence) else []


def _not_charged(self: TrtllmScheduler, prompts: list[Sequence], left: list[int], budget: int) -> list[int]:
    return [min(given, most) for given, most in zip(_BY_STATES(self, prompts, left, budget), left, strict=True)]


_ENTER, _RELEASE, _BY_STATES = TrtllmScheduler.enter, ReusedBlocks.release, TrtllmScheduler.by_states
FAULTS: dict[str, tuple[type, str, Any]] = {
    "the last block need not be computed": (ReusedBlocks, "found", _whole),
    "nobody waits for another": (TrtllmScheduler, "better_later", lambda self, sequence, coming: False),
    "shared blocks are taken anew": (ReusedBlocks, "used", lambda self, found: 0),
    "blocks are known when they are scheduled": (TrtllmScheduler, "enter", _at_once),
    "what ends is not stored": (TrtllmScheduler, "stored", lambda self, sequence: 0),
    "the first block is handed out first": (ReusedBlocks, "release", _front),
    "states are anywhere": (TrtllmScheduler, "found", _anywhere),
    "chunks end anywhere": (
        TrtllmScheduler,
        "by_states",
        lambda self, prompts, left, budget: self.one_by_one(left, budget),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_noticed_by_an_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*FAULTS[name])

    def differs(served: Case, expected: list[Any]) -> bool:
        try:
            return served.run("reference").steps != expected
        except AssertionError:
            return True

    assert any(differs(*example) for example in EXAMPLES.values())


# Random engines and traffic.


def random_settings(draw: random.Random, *, drafting: bool = False) -> EngineSettings:
    """Any settings with block reuse."""
    size, longest, chunked, seats = (
        draw.choice([1, 2, 4]),
        draw.choice([8, 20, 48]),
        draw.random() < 0.6,
        draw.randint(1, 8),
    )
    drafts = None
    if drafting:
        most = draw.randint(1, 3)
        counts = tuple(draw.randint(0, most) for _ in range(4))
        method = draw.choice(["mtp", "eagle", "ngram"])
        drafts = Speculation(method=method, draft_tokens=most, accepted=(counts,))
    row = 1 + (drafts.draft_tokens if drafts else 0)
    return EngineSettings(
        max_num_seqs=seats,
        max_num_batched_tokens=max(seats, row, size if chunked else longest) + draw.choice([0, 1, 5, 24]),
        max_model_len=longest,
        chunked_prefill=chunked,
        block_size=size,
        async_scheduling=draw.random() < 0.5,
        prefix_caching=True,
        speculation=drafts,
        scheduler=TrtllmScheduling(
            capacity_policy=draw.choice(CAPACITY_POLICIES),
            context_chunking_policy=draw.choice(CHUNKING_POLICIES),
            snapshot_interval=draw.choice([0, size, 2 * size, 3 * size]),
            batch_wait_timeout_ms=draw.choice([0.0, 0.0, 2e-6, 3e-5]),
            batch_wait_timeout_iters=draw.choice([0, 0, 1, 3]),
            batch_wait_max_tokens_ratio=draw.choice([0.0, 0.3, 1.0]),
            adp_balance=draw.random() < 0.5,
        ),
    )


def random_trace(draw: random.Random, settings: EngineSettings) -> Trace:
    """Requests that begin alike as far as chance has it, in pieces of less than a block or of several."""
    size = settings.block_size
    piece = draw.choice([size, size, 2 * size, 3 * size, max(1, size // 2)])
    beginnings = [[draw.randint(0, 2) for _ in range(60)] for _ in range(3)]
    rows, content, at = list[tuple[int, int, int]](), list[list[int]](), 0
    for _ in range(draw.choice([1, 5, 20, 40])):
        at += draw.choice([0, 0, 0, 500, 4000, 40_000])
        prompt = draw.randint(1, settings.max_model_len - 1)
        rows.append((at, prompt, draw.randint(1, draw.choice([1, 5, 40]))))
        pieces = -(-prompt // piece)
        alike = draw.randint(0, pieces)
        own = [1000 + draw.randint(0, 500) for _ in range(pieces - alike)]
        content.append(draw.choice(beginnings)[:alike] + own)
    return make_trace(
        name="random",
        arrival_ns=[at for at, _, _ in rows],
        prompt=[prompt for _, prompt, _ in rows],
        output=[output for _, _, output in rows],
        max_new_tokens=[output + draw.randint(0, 9) for _, _, output in rows],
        content=content,
        content_tokens=piece,
        concurrency=draw.choice([None, None, 1, 4]),
    )


def random_pool(seed: int, *, ranks: bool = False) -> tuple[EnginePool, Trace, Routing]:
    """Replicas with block reuse, with room for one request or for all of them, and a trace."""
    draw = random.Random(seed)
    settings = random_settings(draw, drafting=not ranks and draw.random() < 0.25)
    trace = random_trace(draw, settings)
    stages = 1 if settings.speculation else draw.choice([1, 1, 1, 2])
    room = settings.room(trace)
    if settings.speculation is not None:
        room = settings.with_drafts(room, settings.speculation)
    need = -(-int(room.max()) // settings.block_size)
    law: Any = law_of(settings, draw, most=5000) if ranks else None
    pool = EnginePool(
        settings=settings,
        blocks=need + draw.choice([0, 1, need, 10 * need]),
        laws=[law or random_law(settings, draw.randint(0, 9999), zeros=0.1, copies=1) for _ in range(stages)],
        replicas=draw.choice([1, 1, 2]),
        ranks=random_ranks(draw, draw.choice([1, 2, 3]), settings, stages) if ranks else None,
    )
    open_loop: list[Routing] = ["round_robin", "least_loaded"] + ["cache_aware"] * (not ranks)
    return pool, trace, draw.choice(open_loop) if trace.concurrency is None else "round_robin"


FEW = range(150)
MANY = pytest.param(range(150, 5000), marks=pytest.mark.nightly)


@pytest.mark.parametrize("seeds", [FEW, MANY])
def test_the_compiled_engine_equals_the_reference_and_no_batch_has_too_many_tokens(seeds: range) -> None:
    found = gave_way = 0
    for seed in seeds:
        pool, trace, routing = random_pool(seed)
        kernel, reference, unlogged = (
            run_deployment([pool], trace, log=log, routing=routing, implementation=which)  # type: ignore[arg-type]
            for which, log in (("kernel", True), ("reference", True), ("kernel", False))
        )
        try:
            assert_same(kernel, reference)
            assert unlogged.finish_ns.tolist() == reference.finish_ns.tolist()
            assert unlogged.cached_tokens == reference.cached_tokens
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
        assert reference.steps is not None
        tokens = [sum(tokens for _, tokens, _ in rows) for _, _, rows, _ in reference.steps]
        assert max(tokens, default=0) <= pool.settings.max_num_batched_tokens
        found += reference.cached_tokens > 0
        gave_way += reference.preemptions > 0
    assert found > len(seeds) // 3 and gave_way > 0


def crowded_pool(seed: int) -> tuple[EnginePool, Trace]:
    """Few contents of one token, long answers beside short ones, and hardly more blocks than the longest takes."""
    draw, at = random.Random(seed), 0
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 32}
    settings = replace(ENGINE, **limits, max_model_len=32, block_size=1, async_scheduling=True, prefix_caching=True)
    rows, content = list[tuple[int, int, int]](), list[list[int]]()
    for _ in range(40):
        at += draw.choice([0, 0, 20, 60])
        prompt = draw.choice([1, 2, 3])
        content.append([draw.choice([1, 1, 2]), *(draw.choice([1, 2]) for _ in range(prompt - 1))])
        rows.append((at, prompt, draw.choice([1, 1, 1, 14])))
    pool = EnginePool(settings=settings, blocks=draw.randint(17, 24), laws=[linear(settings, 10, 1)])
    return pool, requests(rows, content=content, content_tokens=1)


def test_who_is_in_the_middle_of_a_prompt_goes_on_though_one_before_it_has_no_room() -> None:
    """Of 931 a prompt that has waited for another's blocks comes before one that has begun meanwhile."""
    pool, trace, _ = random_pool(931)
    assert_same(*(run_deployment([pool], trace, log=True, implementation=which) for which in IMPLEMENTATIONS))


# Of 2643 a block is put into the tree again under which another one stood that has left it since.
@pytest.mark.parametrize(
    "seeds", [range(20), range(2643, 2644), pytest.param(range(20, 9000), marks=pytest.mark.nightly)]
)
def test_they_are_equal_where_blocks_are_few_and_prompts_alike(seeds: range) -> None:
    for seed in seeds:
        pool, trace = crowded_pool(seed)
        assert_same(*(run_deployment([pool], trace, log=True, implementation=which) for which in IMPLEMENTATIONS))


@pytest.mark.parametrize("seeds", [FEW, MANY])
def test_no_request_beats_its_bound(seeds: range) -> None:
    for seed in seeds:
        pool, trace, _ = random_pool(seed)
        served = Case(settings=pool.settings, blocks=pool.blocks, laws=tuple(pool.laws), trace=trace)
        floor, outcome = alone(served), served.run(log=False)
        assert (outcome.first_token_ns - outcome.arrival_ns >= floor.first_token_ns - floor.arrival_ns).all(), seed
        spent, least = outcome.finish_ns - outcome.first_token_ns, floor.finish_ns - floor.first_token_ns
        assert (spent >= least).all(), seed


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 2000), marks=pytest.mark.nightly)])
def test_compiled_ranks_with_block_reuse_equal_the_reference(seeds: range) -> None:
    for seed in seeds:
        pool, trace, routing = random_pool(seed, ranks=True)
        kernel, reference = (
            run_deployment([pool], trace, log=True, routing=routing, implementation=which)  # type: ignore[arg-type]
            for which in ("kernel", "reference")
        )
        try:
            assert_same(kernel, reference)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}") from error
