"""Two batches in place of one: what halves take and use beside what a forward that is not split does."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from plan_cases import EAGER, LAUNCHING, make_cluster, make_model, make_problem, random_trace, sparse

from apex_opt.engines.overlap import DUAL_BATCH, Splitting
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import Plan, Template
from apex_opt.search import Scorer
from apex_opt.simulator.ranks import alike_ns
from apex_opt.units import NS_PER_S
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from apex_opt.cost.model import PlanCost
    from apex_opt.simulator.ranks import Halves, Rows

PROBLEM = make_problem(make_model((sparse(), 6)), make_cluster(4, multiprocessors=132), random_trace(1, 60))
PROBLEM = replace(PROBLEM, settings=replace(PROBLEM.settings, max_num_seqs=64, max_num_batched_tokens=1024))
WHOLE = Plan(
    replicas=1, layers=(6,), attention=Template(dp=4), ffn=Template(ep=4), weight_format="bf16", kv_format="bf16"
)
SPLIT = replace(WHOLE, overlap="two_batches")
ALWAYS = replace(DUAL_BATCH, decode_tokens=2, prompt_tokens=2)


def cost_of(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, splitting: Splitting = DUAL_BATCH, **given: object
) -> PlanCost:
    """The costs of a plan where vLLM splits by some rule."""
    monkeypatch.setattr(VllmScheduling, "splitting", splitting)
    return Scorer(replace(PROBLEM, **given)).facts().plan_cost(plan)


def halves_of(cost: PlanCost) -> Halves:
    """What its forwards take in two halves."""
    assert cost.ranks is not None and cost.ranks.shared[0].halves is not None
    return cost.ranks.shared[0].halves


def took_ns(cost: PlanCost, rows: Rows) -> int:
    """A forward in which each rank has the same batch."""
    return alike_ns(cost.laws[0], cost.ranks, 0, rows)


BATCHES: list[Rows] = [[(1, 300)] * 48, [(900, 900)], [(1, 700)] * 20 + [(600, 800)]]


@pytest.mark.parametrize("rows", BATCHES)
def test_two_halves_take_no_less_than_they_compute_and_than_they_send(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = cost_of(SPLIT, monkeypatch)
    halves, tokens = halves_of(cost), sum(count for count, _ in rows)
    together = halves.decode_ns if len(rows) == tokens else halves.mixed_ns
    computes, sends = halves.law.batch_ns(rows) + int(together[tokens]), int(halves.network_ns[tokens])
    assert took_ns(cost, rows) >= max(computes, sends) > 0
    assert took_ns(cost, rows) < computes + sends + int(halves.mixed_host_ns[tokens] + halves.alone_ns[len(rows)])


@pytest.mark.parametrize("rows", [[(1, 300)] * 31, [(511, 511)]])
def test_a_forward_below_the_thresholds_takes_what_one_that_is_never_split_takes(
    rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = cost_of(SPLIT, monkeypatch, replace(DUAL_BATCH, graphs=True))
    assert took_ns(split, rows) == took_ns(cost_of(WHOLE, monkeypatch), rows)


@pytest.mark.parametrize("rows", BATCHES)
def test_the_more_multiprocessors_send_the_longer_a_half_computes(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = [
        halves_of(cost_of(SPLIT, monkeypatch, replace(ALWAYS, decode_sms=sms, prompt_sms=sms))).law.batch_ns(rows)
        for sms in (0, 20, 66)
    ]
    assert computed[0] < computed[1] < computed[2]
    assert computed[2] == pytest.approx(2 * computed[0], abs=20)


def test_halves_are_those_of_half_the_tokens_and_what_surrounds_the_layers_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    none = replace(ALWAYS, decode_sms=0, prompt_sms=0)
    cost, whole = cost_of(SPLIT, monkeypatch, none), cost_of(WHOLE, monkeypatch, replace(none, graphs=False))
    halves = halves_of(cost)
    (pieces,) = whole.pieces
    sent = sum(
        count * work.seconds
        for count, piece in pieces
        for (operation, table), work in piece.parts.items()
        if operation == "communication" and table == "mixed_ns"
    )
    for tokens in (2, 512, 1023):
        two = sent[tokens // 2] + sent[tokens - tokens // 2]
        assert halves.network_ns[tokens] == pytest.approx(two * NS_PER_S, abs=2)
    head = sum(
        count * work.seconds
        for count, piece in pieces
        for (operation, table), work in piece.parts.items()
        if operation in ("lm head", "sampler") and table == "sequence_ns"
    )
    assert halves.alone_ns[7] == pytest.approx((head[7] + 7 * PROBLEM.overhead.sequence_s) * NS_PER_S, abs=2)
    assert halves.layers == 6


@pytest.mark.parametrize("overhead", [LAUNCHING, EAGER])
def test_kernels_of_both_halves_are_launched_one_after_the_other(
    overhead: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    halves = halves_of(cost_of(SPLIT, monkeypatch, ALWAYS, overhead=overhead))
    usual = halves_of(cost_of(SPLIT, monkeypatch, ALWAYS))
    assert halves.mixed_host_ns[2] > usual.mixed_host_ns[2] + 2e9 * LAUNCHING.launch_s * 6 * 10
    # vLLM runs from no graph then, SGLang does.
    assert halves.decode_host_ns[2] > usual.decode_host_ns[2] + 2e9 * LAUNCHING.launch_s * 6 * 10
    graphs = halves_of(cost_of(SPLIT, monkeypatch, replace(ALWAYS, graphs=True), overhead=LAUNCHING))
    assert graphs.decode_host_ns[2] < usual.decode_host_ns[2] + 2e9 * LAUNCHING.launch_s * 6


def test_halves_use_no_less_energy_and_memory_and_their_times_are_told_without_what_is_hidden(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(VllmScheduling, "splitting", replace(ALWAYS, graphs=True))
    slow = replace(PROBLEM.cluster, intra=replace(PROBLEM.cluster.intra, bytes_per_s=2e9))
    burst = make_trace(name="burst", arrival_ns=[0] * 200, prompt=[300] * 200, output=[20] * 200)
    problem = replace(PROBLEM.offering(cluster=slow), trace=burst)
    scorer = Scorer(problem)
    whole, split = (scorer.simulate(Deployment.of(plan)).only.usage for plan in (WHOLE, SPLIT))
    assert split.operations_s["communication"] < whole.operations_s["communication"]
    assert split.operations_s["experts"] > whole.operations_s["experts"]
    outcome = scorer.run(Deployment.of(SPLIT))
    assert outcome is not None
    (did,) = outcome.pools
    assert did.shared is not None
    assert did.shared.split_decode.sum() + did.shared.split_mixed.sum() > 10
    told = sum(took for name, took in split.operations_s.items() if name != "idle")
    assert told == pytest.approx(float(outcome.busy_ns.mean()) / NS_PER_S, rel=0.2)
    above = [usage.energy_j - usage.idle_energy_j for usage in (whole, split)]
    assert above[1] > 0.9 * above[0]


@pytest.mark.parametrize("gap_s", [0.0, 0.001, 0.02])
@pytest.mark.parametrize("bytes_per_s", [2e9, 400e9])
def test_times_by_operation_are_not_negative_and_fit_the_run_with_communication_among_them(
    gap_s: float, bytes_per_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmScheduling, "splitting", ALWAYS)
    links = replace(PROBLEM.cluster, intra=replace(PROBLEM.cluster.intra, bytes_per_s=bytes_per_s))
    lengths = [40 + 97 * number % 700 for number in range(60)]
    trace = make_trace(
        name="uneven",
        arrival_ns=[int(number * gap_s * NS_PER_S) for number in range(60)],
        prompt=lengths,
        output=[1 + length % 30 for length in lengths],
    )
    scorer = Scorer(replace(PROBLEM.offering(cluster=links), trace=trace))
    for plan in (SPLIT, WHOLE):
        outcome = scorer.run(Deployment.of(plan))
        assert outcome is not None and outcome.pools[0].shared is not None
        spent = scorer.simulate(Deployment.of(plan)).only.usage.operations_s
        assert min(spent.values()) >= 0.0 < spent["communication"]
        assert "hidden" not in spent
        makespan_s = (outcome.makespan_ns + scorer.facts().plan_cost(plan).request_ns) / NS_PER_S
        assert sum(spent.values()) == pytest.approx(makespan_s)
