"""Random groups of data-parallel ranks for the simulator's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from simulator_cases import of_windows

from apex_opt.engines.overlap import Splitting
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator import EnginePool, run_deployment
from apex_opt.simulator.law import RATE_BITS, BatchLaw
from apex_opt.simulator.ranks import Halves, Padding, Ranks, SharedLaw
from apex_opt.simulator.recorded.dp import padding
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    import random

    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.workload.trace import Trace

GRAPHS = ("none", "piecewise", "full", "full_decode_only", "full_and_piecewise")


def law_of(settings: EngineSettings, draw: random.Random, *, most: int) -> BatchLaw:
    """A batch law with entries up to so many nanoseconds."""
    seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    noise = np.random.default_rng(draw.randrange(1 << 30))
    by_sequences = {name: noise.integers(0, most, seqs + 1) for name in ("decode_ns", "sequence_ns", "attend_ns")}
    by_tokens = {name: noise.integers(0, most, tokens + 1) for name in ("mixed_ns", "chunk_ns", "transfer_ns")}
    rates = most << RATE_BITS >> 6
    return BatchLaw(
        **by_sequences,
        **by_tokens,
        context_rate=noise.integers(0, rates, seqs + 1),
        pair_rate=noise.integers(0, rates, tokens + 1),
        chunk_context_rate=noise.integers(0, rates, tokens + 1),
        **of_windows(settings, lambda entries: noise.integers(0, rates, entries)),
    )


def random_pool(draw: random.Random, *, count: int | None = None, stages: int | None = None) -> EnginePool:
    """Replicas with ranks, of any settings."""
    longest = draw.choice([16, 40, 100])
    chunked = draw.random() < 0.8
    tokens = draw.choice([8, 16, 64]) if chunked else longest
    seqs = min(tokens, draw.choice([1, 2, 4, 16]))
    block_size = draw.choice([1, 4, 16])
    settings = EngineSettings(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_model_len=longest,
        chunked_prefill=chunked,
        block_size=block_size,
        prefix_caching=draw.random() < 0.2,
        async_scheduling=draw.random() < 0.5,
        scheduler=VllmScheduling(
            long_prefill_token_threshold=draw.choice([0, 0, 0, 3, 7]), idle_sleep_us=draw.choice([0, 1, 1000])
        ),
    )
    ranks = count or draw.choice([1, 2, 2, 3, 4])
    stages = stages or draw.choice([1, 1, 1, 2, 3])
    sizes = sorted(draw.sample(range(1, 2 * tokens), draw.randrange(1, 5)))
    wide = max([tokens, *sizes]) + 1
    lockstep = draw.random() < 0.8
    most = draw.choice([1, 100_000, 3_000_000])
    seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    noise = np.random.default_rng(draw.randrange(1 << 30))
    per = draw.choice([1, ranks])
    shared = [
        SharedLaw(
            padded_ns=noise.integers(0, most, wide),
            decode_ns=noise.integers(0, most, ranks * wide),
            mixed_ns=noise.integers(0, most, ranks * wide),
            eager_ns=noise.integers(0, most, ranks * wide),
            graph_ns=noise.integers(0, most, 3),
            per=per,
        )
        for _ in range(stages)
    ]
    return EnginePool(
        settings=settings,
        blocks=-(-longest // block_size) + draw.choice([0, 1, 3, 100]),
        laws=[law_of(settings, draw, most=most) for _ in range(stages)],
        replicas=draw.choice([1, 1, 2, 3]),
        ranks=Ranks(
            count=ranks,
            lockstep=lockstep,
            front_ends=draw.choice([1, 1, 2, 3]),
            balanced=draw.random() < 0.7,
            dummy_returns=draw.choice(["start", "start", "end"]),
            sync_ns=draw.choice([0, 0, 70_000]),
            send_ns=draw.choice([0, 0, 1000, 5_000_000]),
            control_ns=draw.choice([0, 0, 100_000, 20_000_000]),
            padding=padding(draw.choice(GRAPHS), sizes, seqs, tokens),
            shared=shared,
        ),
    )


def drafting(pool: EnginePool, draw: random.Random) -> EnginePool:
    """The same with drafts, on one stage: with any padding and any times of making them."""
    assert pool.ranks is not None
    drafts = draw.randint(1, 8)
    method = draw.choice(["eagle", "mtp", "ngram"])
    settings = pool.settings
    tokens = max(settings.max_num_batched_tokens, 1 + drafts)
    settings = replace(
        settings,
        max_num_batched_tokens=tokens,
        async_scheduling=settings.async_scheduling and method != "ngram",
        speculation=Speculation(
            method=method,
            draft_tokens=drafts,
            accepted=tuple(
                tuple(draw.randint(0, drafts) for _ in range(draw.randint(1, 7))) for _ in range(draw.randint(1, 3))
            ),
            proposed=((1, drafts, 0),) if draw.random() < 0.3 else (),
        ),
    )
    noise = np.random.default_rng(draw.randrange(1 << 30))
    seqs, most = settings.max_num_seqs, 3000
    law = law_of(settings, draw, most=most)
    law = replace(
        law,
        draft_tokens=drafts,
        verify_ns=noise.integers(0, most, tokens + 1),
        draft_ns=noise.integers(0, most, seqs + 1),
        draft_rate=noise.integers(0, most, seqs + 1),
    )
    need = settings.with_drafts(np.array([settings.max_model_len]), settings.speculation)
    return replace(
        pool,
        settings=settings,
        blocks=max(pool.blocks, -(-int(need[0]) // settings.block_size)),
        laws=[law],
        ranks=drafting_ranks(pool.ranks, settings, noise),
    )


def drafting_ranks(ranks: Ranks, settings: EngineSettings, noise: np.random.Generator) -> Ranks:
    """The ranks on one stage, with any padding and any times of what they share where drafts are made.

    Parameters
    ----------
    ranks : Ranks
    settings : EngineSettings    of each
    noise : Generator
    """
    seqs, tokens, most = settings.max_num_seqs, settings.max_num_batched_tokens, 3000
    every, wide = np.arange(tokens + 1), 2 * tokens + 1
    shared = SharedLaw(
        padded_ns=noise.integers(0, most, wide),
        decode_ns=noise.integers(0, most, ranks.count * wide),
        mixed_ns=noise.integers(0, most, ranks.count * wide),
        eager_ns=noise.integers(0, most, ranks.count * wide),
        graph_ns=noise.integers(0, most, 3),
        per=ranks.shared[0].per,
        draft_ns=noise.integers(0, most, ranks.count * max(seqs, 1) + 1),
    )
    padding_ = Padding(
        decode_mode=noise.integers(0, 3, tokens + 1),
        decode_rows=every + noise.integers(0, tokens, tokens + 1),
        mixed_mode=noise.integers(0, 2, tokens + 1),
        mixed_rows=every + noise.integers(0, tokens, tokens + 1),
    )
    return replace(ranks, padding=padding_, shared=[shared])


def halving(pool: EnginePool, draw: random.Random, *, pads: bool = True) -> EnginePool:
    """The same with forwards that are split, by any thresholds and with any times of halves."""
    assert pool.ranks is not None
    noise, settings = np.random.default_rng(draw.randrange(1 << 30)), pool.settings
    shared = []
    for its in pool.ranks.shared:
        most, entries = int(its.decode_ns.max()) + 1, len(its.decode_ns)
        names = ("decode_ns", "mixed_ns", "network_ns", "decode_host_ns", "mixed_host_ns")
        tables = {name: noise.integers(0, most, entries) for name in names}
        halves = Halves(
            law=law_of(settings, draw, most=most),
            alone_ns=noise.integers(0, most, settings.max_num_seqs + 1),
            layers=draw.randint(1, 9),
            **tables,
        )
        shared.append(replace(its, halves=halves))
    splitting = Splitting(
        decode_tokens=draw.choice([1, 1, 2, 4]),
        prompt_tokens=draw.choice([1, 2, 8]),
        pads=pads,
        decode_sms=0,
        prompt_sms=0,
        graphs=True,
    )
    return replace(pool, ranks=replace(pool.ranks, lockstep=True, shared=shared, splitting=splitting))


def random_ranks(draw: random.Random, count: int, settings: EngineSettings, stages: int) -> Ranks:
    """Ranks that take their turns together, with any padding and any times of what they share.

    Parameters
    ----------
    draw : random.Random
    count : int                  ranks
    settings : EngineSettings    of each
    stages : int
    """
    seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    sizes = sorted(draw.sample(range(1, 2 * max(tokens, 4)), draw.randrange(1, 5)))
    wide = max([tokens, *sizes]) + 1
    noise, per = np.random.default_rng(draw.randrange(1 << 30)), draw.choice([1, count])
    shared = [
        SharedLaw(
            padded_ns=noise.integers(0, 500, wide),
            decode_ns=noise.integers(0, 3000, count * wide),
            mixed_ns=noise.integers(0, 3000, count * wide),
            eager_ns=noise.integers(0, 3000, count * wide),
            graph_ns=noise.integers(0, 500, 3),
            per=per,
        )
        for _ in range(stages)
    ]
    found = padding(draw.choice(GRAPHS), sizes, seqs, tokens)
    return Ranks(count=count, balanced=draw.random() < 0.5, padding=found, shared=shared)


def random_trace(draw: random.Random, longest: int, *, closed: bool | None = None) -> Trace:
    """Requests that come on their own or are sent by clients; some share the beginning of their prompts."""
    count, rate = draw.choice([1, 5, 15, 30]), draw.choice([0, 10_000, 2_000_000, 60_000_000])
    arrival = 0
    rows = []
    for _ in range(count):
        arrival += int(draw.expovariate(1 / rate)) if rate else 0
        if draw.random() < 0.05:
            arrival += 400_000_000
        prompt = draw.randint(1, longest - 2)
        rows.append((arrival, prompt, draw.randint(1, draw.choice([2, 10, longest]))))
    said = [[draw.randrange(2) for _ in range(-(-prompt // 16))] for _, prompt, _ in rows]
    closed = draw.random() < 0.2 if closed is None else closed
    return make_trace(
        name="random",
        arrival_ns=[at for at, _, _ in rows],
        prompt=[prompt for _, prompt, _ in rows],
        output=[output for _, _, output in rows],
        content=said,
        content_tokens=16,
        concurrency=draw.randint(1, count) if closed else None,
        pause_ns=draw.choice([0, 0, 30_000, 5_000_000]) if closed else 0,
    )


def served(pool: EnginePool, trace: Trace, implementation: Implementation, **given: Any) -> Outcome:
    """Serve a trace, with every batch told."""
    return run_deployment([pool], trace, log=True, implementation=implementation, **given)


def assert_same(one: Outcome, other: Outcome) -> None:
    """Two runs are the same in everything."""
    for name in ("arrival_ns", "first_token_ns", "finish_ns", "busy_ns", "gaps_ns"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    for name in ("steps", "steps_per_replica", "groups", "preemptions", "batches", "cached_tokens"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.counts.equals(other.counts)
    for mine, its in zip(one.pools, other.pools, strict=True):
        assert (mine.shared is None) == (its.shared is None)
        assert mine.shared is None or its.shared is None or mine.shared.equals(its.shared)
