"""Random prefill and decode instances, and how two of their runs are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st
from simulator_cases import assert_same, blocks_of, random_law, requests

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import DisaggregatedOutcome, EnginePool, Handover, run_disaggregated
from apex_opt.units import ceil_div

if TYPE_CHECKING:
    from apex_opt.simulator.api import Implementation
    from apex_opt.workload import Trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """All arguments of a run."""

    prefill: EnginePool
    decode: EnginePool
    handover: Handover
    trace: Trace

    def run(self, implementation: Implementation, **options: Any) -> DisaggregatedOutcome:
        return run_disaggregated(
            self.prefill, self.decode, self.handover, self.trace, implementation=implementation, **options
        )


@st.composite
def instances(draw: st.DrawFn, longest: int, size: int, *, caching: bool, steady: bool) -> EngineSettings:
    """Settings of the instances of one pool."""
    seats, chunked = draw(st.integers(1, 8)), draw(st.booleans())
    return EngineSettings(
        max_num_seqs=seats,
        max_num_batched_tokens=(seats if chunked else max(seats, longest)) + draw(st.sampled_from((0, 1, 5, 24))),
        max_model_len=longest,
        chunked_prefill=chunked,
        block_size=size,
        prefix_caching=caching,
        async_scheduling=draw(st.booleans()),
        scheduler=VllmScheduling(
            long_prefill_token_threshold=0 if steady else draw(st.sampled_from((0, 0, 1, 7))),
            idle_sleep_us=draw(st.sampled_from((1, 3))),
        ),
    )


@st.composite
def pairs(draw: st.DrawFn, most: int = 25, *, steady: bool = False) -> Pair:
    """Everything a run takes: pools that hold one request to all of them, links that wait and links that do not.

    Parameters
    ----------
    draw
    most : int       requests
    steady : bool    whether the steady engine can run the instances
    """
    caching, size = not steady and draw(st.booleans()), draw(st.sampled_from((1, 2, 3, 8)))
    longest = draw(st.integers(2, 64))
    room = longest - 1
    prompts = st.one_of(st.just(1), st.integers(1, min(room, 6)), st.integers(1, room))
    gaps = st.sampled_from((0, 0, 0, 1, 7, 40, 300, 5000))
    count = draw(st.integers(1, most))
    drawn = draw(st.lists(st.tuples(gaps, prompts, st.integers(1, 30)), min_size=count, max_size=count))
    arrivals = np.cumsum([gap for gap, _, _ in drawn]).tolist()
    rows = [(at, p, o) for at, (_, p, o) in zip(arrivals, drawn, strict=True)]
    seeds = st.integers(0, 2**32 - 1)
    content: dict[str, Any] = {}
    if caching and draw(st.sampled_from((True, True, False))):
        ids = np.random.default_rng(draw(seeds)).integers(0, draw(st.integers(1, 3)), (count, 64)).tolist()
        content = {"content": [ids[i][: ceil_div(p, size)] for i, (_, p, _) in enumerate(rows)], "content_tokens": size}
    pools = []
    for asked in (1, None):
        engine = draw(instances(longest, size, caching=caching, steady=steady))
        needs = [blocks_of(engine, p, asked or o) for _, p, o in rows]
        spare = draw(st.sampled_from((0, 1, 2, max(needs), sum(needs))))
        law = random_law(engine, draw(seeds), zeros=draw(st.sampled_from((0.0, 0.5))), copies=1, unit=7)
        blocks = max(needs) + draw(st.integers(0, spare))
        pools.append(EnginePool(settings=engine, blocks=blocks, laws=(law,), replicas=draw(st.integers(1, 3))))
    times = st.sampled_from((0, 1, 30, 700))
    handover = Handover(
        proxy_ns=draw(times),
        read_ns=draw(times),
        block_ns=draw(st.sampled_from((0, 5, 200))),
        notice_ns=draw(times),
        in_turn=draw(st.booleans()),
    )
    return Pair(prefill=pools[0], decode=pools[1], handover=handover, trace=requests(rows, **content))


def by_instance(outcome: DisaggregatedOutcome) -> list[list[Any]]:
    """The batches of each instance."""
    ends = np.cumsum(outcome.steps_per_replica).tolist()
    steps = outcome.steps or []
    return [steps[end - count : end] for count, end in zip(outcome.steps_per_replica or (), ends, strict=True)]


def compare(pair: Pair, **options: Any) -> None:
    ours, theirs = pair.run("kernel", log=True, **options), pair.run("reference", log=True, **options)
    assert_same(ours, theirs)
    for one, other in zip(ours.pools, theirs.pools, strict=True):
        assert one.counts.equals(other.counts) and np.array_equal(one.busy_ns, other.busy_ns)
        assert (one.preemptions, one.batches, one.cached_tokens) == (
            other.preemptions,
            other.batches,
            other.cached_tokens,
        )
    more = ("prefill", "decode", "prefilled_ns", "forwarded_ns", "read_ns", "read_blocks", "held", "preemptions_of")
    for name in (*more, "gaps_ns"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.steps_per_replica == theirs.steps_per_replica
    silent = pair.run("kernel", **options)
    assert silent.steps is None and np.array_equal(silent.finish_ns, theirs.finish_ns)
