"""apex_opt.cost.ranks: what ranks do for themselves and what they share add up to a stage, and bounds lie below it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from plan_cases import OVERHEAD, SMALL, dense, make_cluster, make_model, sparse

from apex_opt.cost import CostModel
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.speculation import Speculation
from apex_opt.search.bounds import StageFloor
from apex_opt.simulator.ranks import DUMMY, EAGER, FULL, PIECEWISE, SharedLaw, agree, alike_ns, forward_ns

MODEL = make_model((sparse(), 3), (dense(), 1))


@pytest.mark.parametrize("text", ["attn(dp4) ffn(ep4)", "attn(dp4) ffn(tp4)", "attn(dp2,tp2) ffn(ep4)"])
def test_the_slowest_rank_sets_its_own_part_and_all_tokens_what_is_shared(text: str) -> None:
    cost = CostModel(MODEL, make_cluster(4), SMALL, OVERHEAD).plan_cost(parse_plan(text, MODEL))
    (law,), ranks = cost.laws, cost.ranks
    assert ranks is not None and ranks.in_step
    (shared,) = ranks.shared
    busy, light = [(1, 900)] * 8, [(1, 100)] * 8
    everyone = alike_ns(law, ranks, 0, busy)
    batches = [busy] + [light] * (ranks.count - 1)
    assert (
        forward_ns(law, shared, agree(ranks.padding, batches), batches) == everyone
    )  # attention waits for the longest
    lone = [busy] + [DUMMY] * (ranks.count - 1)
    assert forward_ns(law, shared, agree(ranks.padding, lone), lone) == everyone  # dummies are padded as the others
    chunk = [[(200, 200)]] + [DUMMY] * (ranks.count - 1)
    assert forward_ns(law, shared, agree(ranks.padding, chunk), chunk) < alike_ns(law, ranks, 0, [(200, 200)])


def test_ranks_with_twice_the_times_take_twice_as_long_and_are_padded_as_before() -> None:
    cost = CostModel(MODEL, make_cluster(4), SMALL, OVERHEAD).plan_cost(parse_plan("attn(dp4) ffn(ep4)", MODEL))
    assert cost.ranks is not None
    random = np.random.default_rng(3)
    changes: dict[str, Any] = {
        field.name: random.integers(1, 999, len(value))
        for field in fields(SharedLaw)
        if isinstance(value := getattr(cost.ranks.shared[0], field.name), np.ndarray)
    }
    ranks = replace(cost.ranks, sync_ns=3, send_ns=5, control_ns=7, shared=(replace(cost.ranks.shared[0], **changes),))
    twice = ranks.scaled(2)
    assert (twice.sync_ns, twice.send_ns, twice.control_ns) == (6, 10, 14)
    assert (twice.count, twice.lockstep, twice.front_ends) == (ranks.count, ranks.lockstep, ranks.front_ends)
    for rows in ([(1, 900)] * 3, [(200, 200), (1, 50)], [(17, 40)]):
        batches = [rows] + [DUMMY] * 3
        for mode in (EAGER, PIECEWISE, FULL):
            agreed = agree(ranks.padding, batches)._replace(mode=mode)
            assert agree(twice.padding, batches)._replace(mode=mode) == agreed
            once_ns = forward_ns(cost.laws[0], ranks.shared[0], agreed, batches)
            twice_ns = forward_ns(cost.laws[0].scaled(2), twice.shared[0], agreed, batches)
            assert twice_ns == pytest.approx(2 * once_ns, abs=2 * len(rows))  # rates are rounded once a sequence


@pytest.mark.parametrize("text", ["attn(dp4) ffn(ep4)", "attn(dp2,tp2) ffn(ep4)", "attn(dp4) ffn(tp4)"])
def test_drafts_are_made_by_each_rank_and_by_all_together_and_lie_above_their_floor(text: str) -> None:
    model = replace(MODEL, mtp_layers=1)
    known = Speculation(method="mtp", draft_tokens=3, accepted=((2,),))
    costs = CostModel(model, make_cluster(4), replace(SMALL, drafting=(known,)), OVERHEAD)
    plan = parse_plan(f"{text} spec=mtp:3", model)
    cost, plain = costs.plan_cost(plan), costs.plan_cost(parse_plan(text, model))
    assert cost.ranks is not None and plain.ranks is not None
    (shared,) = cost.ranks.shared
    assert len(shared.draft_ns) == SMALL.max_num_seqs + 1
    assert (shared.draft_ns[1:] > 0).all()
    rows = [(4, 900)] * 4
    made = alike_ns(cost.laws[0], cost.ranks, 0, rows)
    batches = [rows] * cost.ranks.count
    agreed = agree(cost.ranks.padding, batches, 3)
    verified = forward_ns(cost.laws[0], shared, agreed, batches, [False] * len(batches))
    assert verified < made
    assert alike_ns(plain.laws[0], plain.ranks, 0, [(1, 900)] * 4) < verified
    (floor,) = StageFloor.of_pool(cost.laws, cost.ranks)
    mean = StageFloor.mean(costs.least(plan), 1, 1, 3)
    for name in ("batch_ns", "token_ns", "decode_token_ns", "pair_rate", "context_rate", "draft_ns", "draft_rate"):
        assert getattr(mean, name) <= getattr(floor, name) + 1, name
    assert floor.batch_ns + floor.draft_ns <= made


def test_whole_copies_are_ranks_of_their_own_with_the_law_of_one() -> None:
    model = make_model((dense(), 4))
    costs = CostModel(model, make_cluster(4), SMALL, OVERHEAD)
    copies, one = (costs.plan_cost(parse_plan(text, model)) for text in ("attn(dp2,tp2) ffn(dp2,tp2)", "tp2"))
    assert copies.ranks is not None and not copies.ranks.in_step and copies.ranks.count == 2
    for name in ("decode_ns", "mixed_ns", "sequence_ns", "context_rate", "pair_rate"):
        assert np.array_equal(getattr(copies.laws[0], name), getattr(one.laws[0], name)), name


@pytest.mark.parametrize(
    "text", ["attn(dp4) ffn(ep4)", "attn(dp4) ffn(tp4)", "attn(dp2,tp2) ffn(ep4)", "attn(dp4) ffn(dp4)"]
)
def test_the_floor_of_the_mean_stage_lies_below_that_of_the_law(text: str) -> None:
    costs = CostModel(MODEL, make_cluster(4), SMALL, OVERHEAD)
    plan = parse_plan(text, MODEL)
    cost = costs.plan_cost(plan)
    (floor,) = StageFloor.of_pool(cost.laws, cost.ranks)
    mean = StageFloor.mean(costs.least(plan), 1, 1)
    for name in ("batch_ns", "token_ns", "decode_token_ns", "pair_rate", "context_rate"):
        assert getattr(mean, name) <= getattr(floor, name) + 1, name
