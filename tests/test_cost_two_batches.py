"""Two batches in place of one: the vote of all ranks, the time of halves, and forwards as the simulator has them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import make_cluster, make_model, make_problem, random_trace, sparse

from apex_opt.cost.two_batches import Forward, forward, halves_s, splits, two_batches
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import Plan, Template
from apex_opt.search import Scorer
from apex_opt.simulator.ranks import alike_ns
from apex_opt.units import NS_PER_S

PROBLEM = make_problem(make_model((sparse(), 6)), make_cluster(4), random_trace(1, 60))
PLAN = Plan(
    replicas=1, layers=(6,), attention=Template(dp=4), ffn=Template(ep=4), weight_format="bf16", kv_format="bf16"
)


@pytest.mark.parametrize(
    ("tokens", "padded", "decoding", "wanted"),
    [
        ((32, 40), (32, 40), (True, True), True),
        ((31, 400), (32, 400), (True, True), False),  # one rank has too few
        ((32, 64), (32, 64), (True, True), False),  # half of 64 leaves the first rank no second half
        ((33, 64), (40, 64), (True, True), True),
        ((511, 600), (511, 600), (False, False), False),
        ((512, 600), (512, 600), (False, False), True),
        ((40, 600), (40, 600), (True, False), False),  # both want to, but the first would have no second half
        ((400, 600), (400, 600), (True, False), True),
    ],
)
def test_a_forward_is_split_where_all_ranks_want_it_and_none_is_left_without_a_second_half(
    tokens: tuple[int, ...], padded: tuple[int, ...], decoding: tuple[bool, ...], wanted: bool
) -> None:
    assert splits(tokens, padded, decoding) == wanted


def test_two_halves_take_as_long_as_the_busier_of_computing_and_sending() -> None:
    computes, sends = Forward(0.9, 0.3, 0.5), Forward(0.3, 0.9, 0.5)
    assert halves_s(computes, 0.5, 3) == halves_s(sends, 0.5, 3) == pytest.approx(1.8 + 0.1 + 0.5)
    assert halves_s(computes, 0.5, 3, slower=2.0) == pytest.approx(3.6 + 0.1 + 0.5)
    # With halves that cost half, overlap can only help; with halves that cost as much as the whole it can only harm.
    assert halves_s(Forward(0.5, 0.5, 0.0), 0.0, 6) < 2.0 < halves_s(Forward(1.0, 0.2, 0.0), 0.0, 6)


def test_a_forward_takes_what_it_takes_in_the_simulator() -> None:
    cost = Scorer(PROBLEM).facts().plan_cost(PLAN)
    assert cost.ranks is not None
    for rows in (1, 2, 4, 8, 16):
        told = alike_ns(cost.laws[0], cost.ranks, 0, [(1, 300)] * rows) / NS_PER_S
        assert forward(cost, rows, 300.0).whole_s == pytest.approx(told, abs=3e-9 * rows)
    told = alike_ns(cost.laws[0], cost.ranks, 0, [(200, 200)]) / NS_PER_S
    mine = [forward(cost, 200, None, eager) for eager in (0.0, 1.0)]
    assert min(one.whole_s for one in mine) - 1e-5 <= told <= max(one.whole_s for one in mine) + 1e-5
    assert mine[0].network_s == mine[1].network_s > 0


def test_only_forwards_that_ranks_would_split_change() -> None:
    problem = replace(PROBLEM, settings=replace(PROBLEM.settings, max_num_seqs=64, max_num_batched_tokens=1024))
    scorer = Scorer(problem)
    (_, found), cost = scorer.overlap(Deployment.of(PLAN)), scorer.facts().plan_cost(PLAN)
    assert {one.kind for one in found} == {"answers", "prompts"}
    outcome = scorer.run(Deployment.of(PLAN))
    assert outcome is not None
    (did,) = outcome.pools
    assert did.shared is not None
    fewer = replace(did.shared, decode=did.shared.decode.copy(), mixed=did.shared.mixed.copy())
    fewer.decode[32:], fewer.mixed[512:] = 0, 0
    for one in two_batches(PLAN, cost, did.counts, fewer, None):
        assert one.split == 0 and one.two_s == one.whole_s and one.gain == 0
    more = replace(did.shared, decode=did.shared.decode * 0, mixed=did.shared.mixed * 0)
    more.decode[64], more.mixed[600] = 3, 5
    answers, prompts = two_batches(PLAN, cost, did.counts, more, None)
    assert (answers.split, prompts.split) == (3, 5) and answers.two_s != answers.whole_s


def test_plans_without_ranks_are_told_nothing_of_it() -> None:
    whole = replace(PLAN, attention=Template(tp=4), ffn=Template(ep=4))
    assert Scorer(PROBLEM).overlap(Deployment.of(whole))[1] == ()
