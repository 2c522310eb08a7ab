"""apex_opt.simulator.pools: unlike replicas serve one trace together, exactly as the reference has it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulator_cases import (
    IMPLEMENTATIONS,
    LOOPS,
    TRAFFIC,
    Loop,
    Traffic,
    assert_same,
    blocks_of,
    cases,
    linear,
    random_law,
    requests,
)

from apex_opt.errors import ApexError, CapacityError
from apex_opt.figures.stops import Stop, latencies_ns
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import EnginePool, run_deployment

if TYPE_CHECKING:
    from apex_opt.simulator import Outcome
    from apex_opt.simulator.api import Implementation
    from apex_opt.workload import Trace

ENGINE = EngineSettings(
    max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32, block_size=4, async_scheduling=False
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """All arguments of a run over several pools."""

    pools: list[EnginePool]
    trace: Trace
    dealing: dict[str, Any]

    def run(self, implementation: Implementation = "kernel", **asked: Any) -> Outcome:
        return run_deployment(self.pools, self.trace, implementation=implementation, **self.dealing, **asked)


@st.composite
def deployments(draw: st.DrawFn, loop: Loop, traffic: Traffic) -> Deployment:
    """Two or three pools: the engine of a case and others with their own seats, budgets, stages and laws."""
    case = draw(cases(loop, traffic, most=15))
    pools = [EnginePool(settings=case.settings, blocks=case.blocks, laws=case.laws, replicas=case.replicas)]
    least = max(blocks_of(case.settings, p, o) for p, o in zip(case.trace.prompt, case.trace.output, strict=True))
    for _ in range(draw(st.integers(1, 2))):
        own = replace(
            case.settings,
            max_num_seqs=draw(st.integers(1, case.settings.max_num_seqs)),
            max_num_batched_tokens=case.settings.max_num_batched_tokens + draw(st.integers(0, 9)),
            async_scheduling=draw(st.booleans()),
        )
        laws = [
            random_law(own, draw(st.integers(0, 2**32 - 1)), zeros=0.3, copies=draw(st.integers(1, 2)))
            for _ in range(draw(st.sampled_from((1, 1, 2))))
        ]
        pools.append(
            EnginePool(
                settings=own, blocks=least + draw(st.integers(0, 5)), laws=laws, replicas=draw(st.integers(1, 3))
            )
        )
    dealing: dict[str, Any] = {"routing": case.routing}
    if draw(st.booleans()) and len(case.trace) >= len(pools):
        assigned = np.array(draw(st.permutations([i % len(pools) for i in range(len(case.trace))])))
        dealing["assigned"] = assigned
        if case.trace.concurrency is not None:
            dealing["clients"] = [draw(st.integers(1, 4)) for _ in pools]
    return Deployment(pools=pools, trace=case.trace, dealing=dealing)


def assert_all_same(one: Outcome, other: Outcome) -> None:
    """Every number of two runs, as a whole and pool by pool."""
    assert_same(one, other)
    assert one.steps_per_replica == other.steps_per_replica
    assert len(one.pools) == len(other.pools)
    for ours, theirs in zip(one.pools, other.pools, strict=True):
        for name in ("preemptions", "batches", "cached_tokens"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert np.array_equal(ours.busy_ns, theirs.busy_ns) and ours.counts.equals(theirs.counts)
    if one.gaps_ns is not None and other.gaps_ns is not None:
        assert np.array_equal(one.gaps_ns, other.gaps_ns)


@pytest.mark.parametrize("traffic", TRAFFIC)
@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=25)
@given(data=st.data())
def test_kernel_equals_reference_on_random_deployments(loop: Loop, traffic: Traffic, data: st.DataObject) -> None:
    deployment = data.draw(deployments(loop, traffic))
    assert_all_same(deployment.run(log=True), deployment.run("reference", log=True))


@pytest.mark.parametrize("traffic", TRAFFIC)
@settings(max_examples=25)
@given(data=st.data())
def test_a_deployment_is_cut_short_exactly_where_all_of_it_together_passes_a_limit(
    traffic: Traffic, data: st.DataObject
) -> None:
    deployment = data.draw(deployments(data.draw(st.sampled_from(LOOPS)), traffic))
    whole = deployment.run()
    generated = deployment.trace.generated(deployment.pools[0].settings.max_model_len)
    metric = data.draw(st.sampled_from(("first", "step", "whole", "makespan")))
    values = latencies_ns(metric, whole.arrival_ns, whole.first_token_ns, whole.finish_ns, generated)
    adds = metric != "makespan" and data.draw(st.booleans())
    limit = int(values.sum()) if adds else data.draw(st.sampled_from(values.tolist()))
    stop = Stop(
        metric=metric,
        kind="sum" if adds else "count",
        limit_ns=max(0, limit + data.draw(st.sampled_from((-1, 0)))),
        most=data.draw(st.integers(1, len(values))),
    )
    # Times that none beats, some of them the very times.
    part = data.draw(st.sampled_from((1, 2)))
    floors = replace(
        whole,
        first_token_ns=whole.arrival_ns + (whole.first_token_ns - whole.arrival_ns) // part,
        finish_ns=whole.arrival_ns
        + (whole.first_token_ns - whole.arrival_ns) // part
        + (whole.finish_ns - whole.first_token_ns) // part,
    )
    for known in (None, *(() if deployment.trace.concurrency else (floors,))):
        run = deployment.run(stops=[stop], floors=known)
        assert run.stopped == stop.passed(values)
        if not run.stopped:
            assert_all_same(run, whole)


@pytest.mark.parametrize("loop", LOOPS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_pool_serves_the_requests_assigned_to_it_as_if_it_were_alone(loop: Loop, data: st.DataObject) -> None:
    case = data.draw(cases(loop, data.draw(st.sampled_from(TRAFFIC)), most=15))
    two = case.trace if len(case.trace) > 1 else requests([(0, 1, 1), (0, 1, 1)])
    assigned = np.arange(len(two)) % 2
    pool = EnginePool(settings=case.settings, blocks=case.blocks, laws=case.laws, replicas=case.replicas)
    clients = None if two.concurrency is None else [1, 2]
    run = run_deployment([pool, pool], two, assigned=assigned, clients=clients, routing=case.routing)
    for place in (0, 1):
        rows = np.flatnonzero(assigned == place)
        alone = case.having(trace=two.picked(rows, clients and clients[place])).run(log=False)
        for name in ("arrival_ns", "first_token_ns", "finish_ns"):
            assert np.array_equal(getattr(run, name)[rows], getattr(alone, name)), name
        its = run.pools[place]
        assert its.counts.equals(alone.counts) and np.array_equal(its.busy_ns, alone.busy_ns)
        assert (its.preemptions, its.batches) == (alone.preemptions, alone.batches)
        assert its.cached_tokens == alone.cached_tokens


def pool(base: int, replicas: int = 1, **changes: Any) -> EnginePool:
    """Replicas whose batches take so many ns each."""
    engine = replace(ENGINE, **changes)
    return EnginePool(settings=engine, blocks=40, laws=[linear(engine, base)], replicas=replicas)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_unlike_pools_the_least_loaded_replica_of_all_is_chosen(implementation: Implementation) -> None:
    """A request takes 10 ns in the first pool and 100 in each replica of the second."""
    trace = requests([(0, 1, 1), (1, 1, 1), (2, 1, 1), (20, 1, 1), (21, 1, 1), (150, 1, 1)])
    run = run_deployment(
        [pool(10), pool(100, 2)], trace, routing="least_loaded", log=True, implementation=implementation
    )
    assert run.finish_ns.tolist() == [10, 101, 102, 30, 40, 160]
    assert run.steps_per_replica == [4, 1, 1]
    assert [its.batches for its in run.pools] == [4, 2]
    assert run.busy_ns.tolist() == [[40], [100], [100]]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_turn_requests_and_clients_go_over_the_replicas_of_all_pools(implementation: Implementation) -> None:
    rows = [(0, 1, 1)] * 6
    run = run_deployment([pool(10), pool(100, 2)], requests(rows), log=True, implementation=implementation)
    assert run.finish_ns.tolist() == [10, 100, 100, 10, 100, 100]
    closed = run_deployment([pool(10), pool(100, 2)], requests(rows, 2), log=True, implementation=implementation)
    assert closed.finish_ns.tolist() == [10, 100, 20, 200, 30, 300]
    assert closed.steps_per_replica == [3, 3, 0]


@pytest.mark.parametrize(
    ("pools", "changes", "message"),
    [
        ([], {}, "needs a pool of replicas"),
        ([pool(10), pool(10, max_model_len=16)], {}, "the same max_model_len, got"),
        ([pool(10), pool(10, prefix_caching=True)], {}, "the same prefix_caching, got"),
        ([pool(10, prefix_caching=True), pool(10, prefix_caching=True, block_size=2)], {}, "the same block_size, got"),
        ([pool(10), pool(10)], {"assigned": np.array([0, 1])}, "each of 3 requests is assigned to a pool from 0 to 1"),
        ([pool(10), pool(10)], {"assigned": np.array([0, 1, 2])}, "each of 3 requests is assigned to a pool"),
        ([pool(10), pool(10)], {"assigned": np.array([0, 0, 0])}, "pool 1 has no request"),
        ([pool(10)], {"assigned": np.array([0, 0, 0]), "clients": [1]}, "clients are given for each pool where"),
        ([pool(10)], {"routing": "best"}, "unknown routing 'best'"),
    ],
)
def test_what_cannot_be_run_side_by_side_is_refused(
    pools: list[EnginePool], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ApexError, match=message):
        run_deployment(pools, requests([(0, 1, 1)] * 3), **changes)


def test_only_the_requests_of_a_pool_have_to_fit_it() -> None:
    small = replace(pool(10), blocks=1)
    trace = requests([(0, 4, 1), (0, 12, 4)])
    run = run_deployment([small, pool(10)], trace, assigned=np.array([0, 1]))
    assert run.finish_ns.tolist() == [10, 50]
    with pytest.raises(CapacityError, match="the cache has 1"):
        run_deployment([small, pool(10)], trace, assigned=np.array([1, 0]))
