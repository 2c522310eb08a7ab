"""What deployments of several pools, and of phases that share GPUs, take at most; and the best of them by rate."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import test_search_shapes_disaggregated as pools
import test_search_shares as shares
from plan_cases import feasible_plans
from search_cases import SPACE

from apex_opt.figures import parse_goals
from apex_opt.plans.deployment import Deployment
from apex_opt.search.scorer import Scorer
from apex_opt.studies.candidates import Rater
from apex_opt.studies.capacity import fewest_gpus, highest_rate
from apex_opt.studies.steady import Steady
from apex_opt.workload.steady import at_rate, loops_of, rate_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.search import Problem

COARSE = 0.5


@pytest.fixture(autouse=True, scope="module")
def _short() -> Iterator[None]:
    """Rates held for 1,000 requests rather than 20,000."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apex_opt.studies.steady.loops_of", lambda trace: loops_of(trace, 1_000))
        patch.setattr("apex_opt.studies.steady.TOLD", 500)
        yield


def of_pools(seed: int) -> Problem:
    """Pools on up to three GPUs, or two types, with goals that rates end."""
    problem = pools.over_two(seed) if seed % 2 else pools.question(seed, 3)
    return replace(problem, serving=("pools",), slos=parse_goals("ttft_p95<=60ms,tpot_mean<=6ms"))


def of_shares(seed: int) -> Problem:
    """Plans whose phases share a GPU in per cent, beside those of batches of both."""
    problem = shares.question(2 * seed, 2)
    return replace(problem, slos=parse_goals("ttft_p95<=200ms,tpot_mean<=20ms"))


def sharing(problem: Problem) -> list[Deployment]:
    """Every plan, with each choice of shares."""
    return [
        Deployment.of(replace(plan, shares=own))
        for instance, choices in problem.instances()
        for plan in feasible_plans(replace(problem, shares=(instance.shares,)))
        for own in choices
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["pools", "shares"])
def test_no_run_of_many_requests_at_once_serves_more_than_is_said_at_most(kind: str, seed: int) -> None:
    problem = of_pools(seed) if kind == "pools" else of_shares(seed)
    deployments = list(pools.pairs_of(problem)) if kind == "pools" else sharing(problem)
    rater, near = Rater(Scorer(problem)), 0.0
    at_once = replace(problem, trace=at_rate(problem.trace, 1e9, 6), slos=())
    scorer = Scorer(at_once)
    for deployment in deployments:
        _, most_per_s = rater.together([rater.rated(pool) for pool in deployment.pools])
        served = len(at_once.trace) / scorer.simulate(deployment).metrics.value("makespan")
        assert served <= most_per_s
        near = max(near, served / most_per_s)
    assert near > 0.2  # which is why some are ruled out by it


@pytest.mark.parametrize("seed", range(4))
def test_the_pools_found_are_those_of_asking_about_every_pair(seed: int) -> None:
    problem = of_pools(seed)
    found = highest_rate(problem, SPACE, resolution=COARSE, top=2)
    each = [
        (plan.rate_per_s, -pair.devices, str(pair))
        for pair in pools.pairs_of(problem)
        for plan in highest_rate(problem, SPACE, deployment=pair, resolution=COARSE).plans
    ]
    ranked = sorted(each, key=lambda one: (-one[0], -one[1], one[2]))[:2]
    assert [(one.rate_per_s, -one.deployment.devices, str(one.deployment)) for one in found.plans] == ranked
    assert found.status == ("optimal" if each else "infeasible")
    assert sum(part.space for part in found.ledger.parts) == sum(
        sum(part.infeasible.values()) + part.bounded + part.simulated for part in found.ledger.parts
    )


def test_the_pools_on_the_fewest_gpus_are_those_of_asking_about_every_pair() -> None:
    problem = of_pools(1)
    rate = rate_of(problem.trace)
    found = fewest_gpus(problem, SPACE, rate, top=3)
    steady = Steady(problem)
    holding = []
    for pair in pools.pairs_of(problem):
        trial = steady.run(pair, rate)
        if trial.holds and steady.confirmed(pair, rate, trial).holds:
            holding.append(pair)
    least = min(pair.devices for pair in holding)
    assert {str(one.deployment) for one in found.plans} <= {str(pair) for pair in holding if pair.devices == least}
    assert len(found.plans) == min(3, sum(pair.devices == least for pair in holding))


def test_pools_beside_plans_of_both_phases_are_of_one_ledger() -> None:
    problem = replace(of_pools(0), serving=("aggregated", "pools"))
    found = highest_rate(problem, SPACE, resolution=COARSE)
    assert [part.shape for part in found.ledger.parts] == ["single", "pools"]
    alone = [highest_rate(replace(problem, serving=(one,)), SPACE, resolution=COARSE).plans for one in problem.serving]
    assert found.plans[0].rate_per_s == max(plans[0].rate_per_s for plans in alone if plans)


@pytest.mark.parametrize("seed", range(2))
def test_the_shares_found_are_those_of_asking_about_every_plan(seed: int) -> None:
    problem = of_shares(seed)
    found = highest_rate(problem, SPACE, resolution=COARSE)
    each = [
        (-plan.rate_per_s, deployment.devices, str(deployment))
        for deployment in sharing(problem)
        for plan in highest_rate(problem, SPACE, deployment=deployment, resolution=COARSE).plans
    ]
    assert [(-one.rate_per_s, one.deployment.devices, str(one.deployment)) for one in found.plans] == sorted(each)[:1]
    assert found.ledger.parts[0].space >= len(sharing(problem))
