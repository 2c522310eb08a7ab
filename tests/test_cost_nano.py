"""Nano-batches: what each resource is asked for, and what a batch then takes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from plan_cases import SMALL, dense, feasible_plans, make_cluster, make_model, make_problem, random_trace

from apex_opt.cost.nano import asked_of, of_resource
from apex_opt.cost.work import Work
from apex_opt.engines.overlap import NANO, NANO_EFFICIENCY
from apex_opt.plans.deployment import Deployment
from apex_opt.search import Scorer

MODEL = make_model((dense(hidden=1024, columns=4096), 6))
BATCHES = [[(1, 300)], [(1, 900)] * 400, [(900, 900)], [(1, 700)] * 400 + [(1000, 2400)]]


def test_an_operation_asks_all_its_time_of_what_bounds_it_and_of_another_what_the_peak_leaves() -> None:
    # 6 FLOP at 2 a second and 4 bytes at 4 a second, in 5 seconds: arithmetic bounds it.
    found = asked_of("gemm", 5.0, 6.0, 4.0, (2.0, 4.0))
    assert (float(found["compute"]), float(found["memory"])) == (5.0, 1.0)
    found = asked_of("attention", 5.0, 2.0, 100.0, (2.0, 4.0))
    assert (float(found["compute"]), float(found["memory"])) == (1.0, 5.0)
    assert asked_of("communication", 5.0, 0.0, 0.0, (2.0, 4.0)) == {"network": 5.0}
    assert asked_of("engine", 5.0, 0.0, 0.0, (2.0, 4.0)) == {"host": 5.0}


def test_the_published_share_is_reached_of_a_resource_and_the_host_takes_its_own_time() -> None:
    one = np.ones(3)
    work = Work(seconds=5 * one, flops=6 * one, moved=4 * one, joules=7 * one)
    parts = {("gemm", "mixed_ns"): work, ("engine", "mixed_ns"): work, ("communication", "mixed_ns"): work}
    for name, gemm, sends in (("compute", 5.0, 0.0), ("memory", 1.0, 0.0), ("network", 0.0, 5.0)):
        found = {operation: its for (operation, _), its in of_resource(name, parts, (2.0, 4.0)).items()}
        assert found["gemm"].seconds == pytest.approx(gemm * one / NANO_EFFICIENCY)
        assert found["communication"].seconds == pytest.approx(sends * one / NANO_EFFICIENCY)
        assert (found["engine"].seconds == 5 * one).all()
        assert (found["gemm"].joules == work.joules).all()


def test_a_batch_takes_no_less_than_the_busiest_resource_and_no_more_than_without() -> None:
    large = replace(SMALL, max_num_seqs=512, max_num_batched_tokens=2048)
    model = make_model((dense(hidden=4096, columns=14336), 4))
    problem = make_problem(model, make_cluster(4), random_trace(1), overlaps=(None, NANO), settings=large)
    facts, faster = Scorer(problem).facts(), 0
    for plan in feasible_plans(replace(problem, overlaps=(NANO,))):
        whole, nano = facts.plan_cost(replace(plan, overlap=None)).laws[0], facts.plan_cost(plan).laws[0]
        floor = facts.mean(plan)
        for rows in BATCHES:
            took, least = nano.batch_ns(rows), max(its.batch_ns(rows) for its in nano.resources)
            assert took == min(whole.batch_ns(rows), least)
            # The three together are asked for no less than all operations take.
            assert 3 * NANO_EFFICIENCY * took >= 0.99 * whole.batch_ns(rows) - 3
            assert max(floor.batch_ns, floor.token_ns * sum(count for count, _ in rows)) <= took
            faster += took < 0.95 * whole.batch_ns(rows)
    assert faster > 0


def test_operations_share_the_time_of_the_run_and_say_where_the_share_is_from() -> None:
    problem = make_problem(MODEL, make_cluster(2), random_trace(1), overlaps=(NANO,))
    scorer = Scorer(problem)
    for plan in feasible_plans(problem):
        done = scorer.simulate(Deployment.of(plan))
        spent = dict(done.only.usage.operations_s)
        idle, makespan_s = spent.pop("idle"), done.metrics.figures["makespan"]
        assert sum(spent.values()) + idle == pytest.approx(makespan_s, rel=1e-6)
        without = scorer.simulate(Deployment.of(replace(plan, overlap=None)))
        assert spent["engine"] == pytest.approx(without.only.usage.operations_s["engine"], rel=0.2)
        assert makespan_s <= without.metrics.figures["makespan"] * 1.001
        assert "NanoFlow" in scorer.facts().provenance([plan])["overlap"]
