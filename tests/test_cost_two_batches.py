"""What two batches in place of one do to the forwards of a run, or would."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import make_cluster, make_model, make_problem, random_trace, sparse

from apex_opt.cost.two_batches import two_batches
from apex_opt.engines.overlap import TWO_BATCH
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import Plan, Template
from apex_opt.search import Scorer
from apex_opt.simulator.ranks import alike_ns
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from apex_opt.cost.model import PlanCost
    from apex_opt.simulator.ranks import Rows

PROBLEM = make_problem(make_model((sparse(), 6)), make_cluster(4), random_trace(1, 60))
PROBLEM = replace(PROBLEM, settings=replace(PROBLEM.settings, max_num_seqs=64, max_num_batched_tokens=1024))
WHOLE = Plan(
    replicas=1, layers=(6,), attention=Template(dp=4), ffn=Template(ep=4), weight_format="bf16", kv_format="bf16"
)
SPLIT = replace(WHOLE, overlap="two_batches")


def took_ns(cost: PlanCost, rows: Rows) -> int:
    """A forward in which each rank has the same batch."""
    return alike_ns(cost.laws[0], cost.ranks, 0, rows)


def test_what_they_would_do_to_a_run_is_told_kind_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(PROBLEM)
    room, found = scorer.overlap(Deployment.of(WHOLE))
    assert {one.kind for one in found} == {one.kind for one in room} == {"answers", "prompts"}
    outcome = scorer.run(Deployment.of(WHOLE))
    assert outcome is not None
    (did,) = outcome.pools
    assert did.shared is not None
    without, split = (scorer.facts().plan_cost(plan) for plan in (WHOLE, SPLIT))
    fewer = replace(did.shared, decode=did.shared.decode.copy(), mixed=did.shared.mixed.copy())
    fewer.decode[32:], fewer.mixed[512:] = 0, 0
    assert all(one.split == 0 for one in two_batches(without, split, did.counts, fewer))
    more = replace(did.shared, decode=np.zeros_like(fewer.decode), mixed=np.zeros_like(fewer.mixed))
    more.decode[64], more.mixed[600] = 3, 5
    answers, prompts = two_batches(without, split, did.counts, more)
    assert (answers.forwards, answers.split, prompts.split) == (3, 3, 5)
    assert prompts.whole_s == pytest.approx(took_ns(without, [(600, 600)]) / NS_PER_S)
    assert prompts.two_s == pytest.approx(took_ns(split, [(600, 600)]) / NS_PER_S)
    assert prompts.gain == pytest.approx(1 - prompts.two_s / prompts.whole_s)
    # Of a plan whose forwards are split the same is told.
    assert {one.kind for one in scorer.overlap(Deployment.of(SPLIT))[1]} == {"answers", "prompts"}
    monkeypatch.setattr(VllmScheduling, "splitting", TWO_BATCH)
    assert all(one.split == one.forwards for one in Scorer(PROBLEM).overlap(Deployment.of(WHOLE))[1])


def test_plans_without_ranks_are_told_nothing_of_it() -> None:
    whole = replace(WHOLE, attention=Template(tp=4), ffn=Template(ep=4))
    assert Scorer(PROBLEM).overlap(Deployment.of(whole))[1] == ()
