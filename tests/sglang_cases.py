"""Random runs of SGLang's engine: every setting meets every other, many with a pool that is too small for all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from simulator_cases import of_windows

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.speculation import METHODS, Speculation
from apex_opt.simulator import BatchLaw, Outcome, simulate
from apex_opt.workload.trace import Trace, make_trace

if TYPE_CHECKING:
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.api import Implementation


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A trace on some replicas."""

    settings: EngineSettings
    blocks: int
    laws: list[BatchLaw]
    trace: Trace
    replicas: int
    routing: Routing

    def by(self, implementation: Implementation, *, log: bool = True) -> Outcome:
        return simulate(
            self.settings,
            self.blocks,
            self.laws,
            self.trace,
            replicas=self.replicas,
            routing=self.routing,
            log=log,
            implementation=implementation,
        )


def random_run(seed: int) -> Run:
    """The run of a seed; one in two is crowded, such that requests are retracted."""
    r = Random(seed)
    crowded, eos = r.random() < 0.5, r.random() < 0.6
    own = SglangScheduling(
        max_prefill_tokens=r.choice([8, 64, 16384]),
        schedule_policy=r.choice(["fcfs", "lpm"]),
        schedule_conservativeness=r.choice([1.0, 0.3, 0.05]),
        mixed_chunk=r.random() < 0.3,
        ignore_eos=not eos,
        scheduler_recv_interval=Random(seed + 30_000).choice([1, 1, 2, 3, 10]),
    )
    page, longest, chunks = r.choice([1, 1, 2, 3, 16]), r.choice([12, 40, 100]), r.random() < 0.7
    seats = 16 if crowded else r.choice([1, 2, 5, 16])
    tokens = max(r.choice([seats, 16, 64]), seats, page)
    if not chunks:
        tokens = max(longest, own.max_prefill_tokens, seats) + (0 if eos else longest)
    settings = EngineSettings(
        max_num_seqs=seats,
        max_num_batched_tokens=tokens,
        max_model_len=longest,
        chunked_prefill=chunks,
        block_size=page,
        prefix_caching=r.random() < 0.6,
        async_scheduling=r.random() < 0.7,
        scheduler=own,
    )
    trace = _trace(r, longest, crowded=crowded, eos=eos)
    blocks = -(-int(settings.room(trace).max()) // page) + r.choice([0, 1, 4, 20, 200])
    return Run(
        settings=settings,
        blocks=blocks,
        laws=[_law(r, settings) for _ in range(r.choice([1, 1, 1, 2, 3]))],
        trace=trace,
        replicas=r.choice([1, 1, 2, 3]),
        routing=r.choice(["round_robin", "least_loaded"]),
    )


def random_drafting_run(seed: int) -> Run:
    """The run of a seed with drafts on one stage, every other one with a pool that is hardly enough."""
    run, r = random_run(seed), Random(seed + 10_000)
    drafts = r.randint(1, 8)
    method = r.choice(sorted(METHODS))

    def counts(most: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(r.randint(0, most) for _ in range(r.randint(1, 9))) for _ in range(r.randint(1, 3)))

    tokens = max(run.settings.max_num_batched_tokens, run.settings.max_num_seqs * (1 + drafts))
    settings = replace(
        run.settings,
        max_num_batched_tokens=tokens,
        speculation=Speculation(
            method=method,
            draft_tokens=drafts,
            model="other" if method == "draft" else "",
            accepted=counts(drafts + 2),
            proposed=counts(drafts) if r.random() < 0.3 else (),
        ),
        scheduler=replace(run.settings.scheduler, mixed_chunk=False),
    )
    need = int(settings.with_drafts(settings.room(run.trace), settings.speculation).max())
    return replace(
        run,
        settings=settings,
        blocks=-(-need // settings.block_size) + r.choice([0, 1, 4, 20, 200]),
        laws=[_law(r, settings)],
    )


def _trace(r: Random, longest: int, *, crowded: bool, eos: bool) -> Trace:
    """Requests, often with the same beginnings."""
    spread, per, groups, alike = (
        r.choice([0, 200, 3000, 20000]),
        r.choice([1, 4, 8]),
        r.choice([1, 3]),
        r.random() < 0.6,
    )
    arrival, rows, content, now = [], [], [], 0
    for i in range(r.choice([1, 5, 20, 40])):
        now += r.randint(0, spread)
        prompt = r.randint(1, 4) if crowded else r.randint(1, longest - 1)
        most = r.randint(longest - 6 - longest // 4, longest - 5) if crowded else r.randint(1, longest - prompt)
        stated = max(1, min(most, longest - prompt))
        arrival.append(now)
        rows.append((prompt, r.choice([stated, r.randint(1, stated)]) if eos else stated, stated))
        pieces = -(-prompt // per)
        shared = r.randint(0, pieces)
        content.append([(i % groups) * 100 + j if j < shared else 1000 * (i + 1) + j for j in range(pieces)])
    clients = r.choice([None, None, 1, 3, 9])
    return make_trace(
        name="random",
        arrival_ns=arrival,
        prompt=[prompt for prompt, _, _ in rows],
        output=[output for _, output, _ in rows],
        max_new_tokens=[stated for _, _, stated in rows],
        concurrency=clients,
        pause_ns=0 if clients is None else r.choice([0, 0, 40, 3000]),
        content=content if alike else None,
        content_tokens=per if alike else 0,
    )


def _law(r: Random, settings: EngineSettings) -> BatchLaw:
    """Any times at all; in some no batch takes any but for attention."""
    plain = r.random() < 0.8

    def table(entries: int, most: int, least: int = 0) -> np.ndarray:
        return np.array([r.randint(least, most) for _ in range(entries + 1)], np.int64)

    seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    drafts = settings.speculation.draft_tokens if settings.speculation else 0
    drafting: dict[str, Any] = {}
    if drafts:
        drafting = {
            "draft_tokens": drafts,
            "verify_ns": table(tokens, 2000),
            "draft_ns": table(seqs, 700),
            "draft_rate": table(seqs, 1 << 20),
        }
    return BatchLaw(
        decode_ns=table(seqs, 4000, 1000) * plain,
        sequence_ns=table(seqs, 50),
        attend_ns=table(seqs, 50),
        context_rate=table(seqs, 1 << 21),
        mixed_ns=table(tokens, 3000),
        chunk_ns=table(tokens, 300),
        pair_rate=table(tokens, 1 << 20),
        chunk_context_rate=table(tokens, 1 << 20),
        transfer_ns=table(tokens, 500),
        copies=r.choice([1, 1, 2]),
        launch_ns=r.choice([0, 0, 500, 5000]),
        captured_tokens=r.choice([0, 0, 8]),
        **drafting,
        **of_windows(settings, lambda entries: table(entries - 1, 1 << 20)),
    )
