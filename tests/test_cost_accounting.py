"""Energy, arithmetic and time of a run equal what every one of its batches took."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import (
    OVERHEAD,
    SMALL,
    SharingScheduling,
    dense,
    make_cluster,
    make_model,
    make_problem,
    random_trace,
    simulated,
    sparse,
)

from apex_opt.cost import CostModel, Usage, account
from apex_opt.ir import load_model
from apex_opt.plans.plan import Plan, parse_plan
from apex_opt.search import Scorer
from apex_opt.simulator import Outcome, simulate
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from apex_opt.cost import PlanCost
    from apex_opt.ir import Model

SHARED = replace(SMALL, scheduler=SharingScheduling(), max_num_batched_tokens=2048)
"""Attention copies share a scheduler."""

DENSE = make_model((dense(hidden=2048, heads=16, kv=8, columns=8192, width=128), 8))
SPARSE = make_model((dense(hidden=1024, columns=4096), 1), (sparse(hidden=1024, columns=1024, shared=1024), 3))
PLANS = [
    "tp1",
    "tp2",
    "dp2 tp1",
    "pp2 tp1",
    "pp2[5,3] tp2",
    "attn(dp2) ffn(dp2)",
    "attn(dp4) ffn(tp4)",
    "dp2 attn(dp2,tp2) ffn(tp4)",
]


@cache
def run(model: Model, text: str, blocks: int = 4000) -> tuple[Plan, PlanCost, CostModel, Outcome, Usage]:
    """A small trace on a plan, with every batch."""
    plan = parse_plan(text, model)
    costs = CostModel(model, make_cluster(8), SHARED, OVERHEAD)
    cost = costs.plan_cost(plan)
    settings = SHARED if plan.stages == 1 else replace(SHARED, async_scheduling=False)
    outcome = simulate(settings, blocks, cost.laws, random_trace(7, 24), replicas=plan.replicas, log=True)
    return plan, cost, costs, outcome, account(plan, cost, costs, outcome.counts, outcome.makespan_ns)


def batch_by_batch(plan: Plan, cost: PlanCost, outcome: Outcome) -> dict[str, float]:
    """FLOP, bytes and joules above idle of every batch of the log, on every device that works on it."""
    total = dict.fromkeys(("flops", "moved", "joules"), 0.0)
    copies, devices = plan.attention.dp, plan.stage_devices
    for _, _, rows, _ in outcome.steps or ():
        decoding = [held for _, tokens, held in rows if tokens == 1]
        chunks = [(tokens, held) for _, tokens, held in rows if tokens > 1]
        every = sum(tokens for _, tokens, _ in rows)
        # How much of each entry of each table the batch uses, and on how many devices.
        used: dict[str, list[tuple[int, float, float]]] = {"context_rate": [(len(decoding), sum(decoding), devices)]}
        if not chunks:
            used["decode_ns"] = [(len(rows), 1, devices)]
        else:
            used["mixed_ns"] = [(every, 1, devices)]
            used["sequence_ns"] = [(len(rows), 1, devices)]
            used["attend_ns"] = [(len(decoding), 1, devices)]
            own = devices / copies
            used["chunk_ns"] = [(tokens, 1, own) for tokens, _ in chunks]
            used["chunk_context_rate"] = [(tokens, held, own) for tokens, held in chunks]
            used["pair_rate"] = [(tokens, sum(range(held - tokens + 1, held + 1)), own) for tokens, held in chunks]
        for parts in cost.parts:
            for (_, table), work in parts.items():
                for entry, often, on in used.get(table, ()):
                    for kind in total:
                        total[kind] += on * often * float(getattr(work, kind)[entry])
    return total


@pytest.mark.parametrize("text", PLANS)
@pytest.mark.parametrize("model", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_totals_equal_the_sum_over_every_batch_of_the_log(model: Model, text: str) -> None:
    if model is SPARSE and text.startswith("pp2["):
        text = "pp2[1,3] tp2"
    plan, cost, costs, outcome, usage = run(model, text)
    total = batch_by_batch(plan, cost, outcome)
    gpu, seconds = costs.cluster.gpu, plan.devices * (outcome.makespan_ns + cost.request_ns) / 1e9
    assert usage.idle_energy_j == pytest.approx(gpu.idle_w * seconds)
    assert usage.energy_j == pytest.approx(usage.idle_energy_j + total["joules"], rel=1e-9)
    assert usage.mfu == pytest.approx(total["flops"] / (seconds * gpu.peak_flops_per_s("bf16")), rel=1e-9)
    assert usage.mbu == pytest.approx(total["moved"] / (seconds * gpu.memory_bytes_per_s), rel=1e-9)


@pytest.mark.parametrize("text", PLANS)
def test_operations_and_idle_fill_the_run_and_shares_of_peak_lie_between_none_and_all(text: str) -> None:
    plan, cost, costs, outcome, usage = run(DENSE, text)
    makespan_s = (outcome.makespan_ns + cost.request_ns) / 1e9
    assert sum(usage.operations_s.values()) == pytest.approx(makespan_s, rel=1e-6)
    assert all(seconds >= 0 for seconds in usage.operations_s.values())
    assert usage.energy_j > usage.idle_energy_j > 0
    assert usage.energy_j < costs.cluster.gpu.tdp_w * plan.devices * makespan_s
    assert 0 < usage.mfu < 1
    assert 0 < usage.mbu < 1


@pytest.mark.parametrize("text", ["tp1", "tp2", "dp2 tp1", "pp2 tp1"])
def test_time_in_operations_is_the_time_stages_were_busy(text: str) -> None:
    plan, _, _, outcome, usage = run(DENSE, text)
    busy_s = outcome.busy_ns.sum() / (plan.replicas * plan.stages) / 1e9
    assert sum(usage.operations_s.values()) - usage.operations_s["idle"] == pytest.approx(busy_s, rel=1e-4)


def test_arithmetic_of_a_run_is_that_of_its_tokens() -> None:
    plan, cost, costs, outcome, usage = run(DENSE, "tp2")
    padding = 1.6  # decode batches are padded to captured sizes
    done = (
        usage.mfu
        * plan.devices
        * (outcome.makespan_ns + cost.request_ns)
        / 1e9
        * costs.cluster.gpu.peak_flops_per_s("bf16")
    )
    tokens = outcome.counts.tokens
    assert 2 * DENSE.matrix_parameters * tokens < done
    logits = 2 * DENSE.lm_head_matrix_parameters * tokens
    pairs = sum(int(table.sum()) for table in (outcome.counts.chunk_pairs, outcome.counts.decode_context))
    attention = 4 * 8 * 2048 * (pairs + int(outcome.counts.attend_context.sum()))
    assert done < padding * (2 * DENSE.matrix_parameters * tokens + logits + attention)


def test_work_done_again_after_preemption_is_paid_again() -> None:
    plan = parse_plan("tp1", DENSE)
    costs = CostModel(DENSE, make_cluster(8), SMALL, OVERHEAD)
    cost = costs.plan_cost(plan)
    trace = make_trace(name="test", arrival_ns=[0] * 6, prompt=[100] * 6, output=[60] * 6)
    roomy, tight = (simulate(SMALL, blocks, cost.laws, trace) for blocks in (200, 50))
    assert roomy.preemptions == 0
    assert tight.preemptions > 0
    once, again = (account(plan, cost, costs, outcome.counts, outcome.makespan_ns) for outcome in (roomy, tight))
    assert again.energy_j - again.idle_energy_j > once.energy_j - once.idle_energy_j


def test_gpus_that_wait_cost_their_idle_draw() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "8xh100-sxm", random_trace(1, 20))
    scorer = Scorer(problem)
    one, eight = (simulated(scorer, parse_plan(text, problem.model)) for text in ("tp1", "dp8 tp1"))
    assert eight.only.usage.energy_j > one.only.usage.energy_j
    assert eight.only.usage.operations_s["idle"] > one.only.usage.operations_s["idle"]
    assert np.isclose(eight.only.usage.idle_energy_j, 8 * 125 * eight.metrics.value("makespan"), rtol=0.3)


def test_shares_of_peak_of_4_bit_arithmetic_refer_to_its_peak_and_of_stored_4_bit_to_that_of_16() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "1xb200-sxm", random_trace(1, 20))
    scorer = Scorer(problem)
    done = {}
    for name, peak in (("bf16", 2.25e15), ("nvfp4", 9e15), ("mxfp4", 2.25e15)):
        run = simulated(scorer, parse_plan(f"tp1 {name} kv=bf16", problem.model))
        done[name] = run.only.usage.mfu * peak * run.metrics.value("makespan")
    # The same traffic, in batches that differ a little.
    assert done["nvfp4"] == pytest.approx(done["bf16"], rel=0.3)
    assert done["mxfp4"] == pytest.approx(done["bf16"], rel=0.3)


def test_shares_of_peak_refer_to_the_format_that_is_computed_in() -> None:
    problem = make_problem(load_model("llama-3.1-8b"), "1xh100-sxm", random_trace(1, 20))
    scorer = Scorer(problem)
    wide, narrow = (simulated(scorer, parse_plan(f"tp1 {name} kv=bf16", problem.model)) for name in ("bf16", "fp8"))
    # The same arithmetic over twice the peak, in a run that the arrivals make about as long.
    longer = narrow.metrics.value("makespan") / wide.metrics.value("makespan")
    assert 0.35 * wide.only.usage.mfu < narrow.only.usage.mfu * longer < 0.65 * wide.only.usage.mfu
