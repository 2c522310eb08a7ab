"""apex_opt.search.bounds.handed: no run of a prefill and a decode pool beats what is said of the pair beforehand."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from pools_cases import pairs_of, random_question, with_goal

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.search import Scorer
from apex_opt.search.bounds.compose import Help
from apex_opt.search.bounds.handed import Handed
from apex_opt.search.facts import judged
from apex_opt.search.option import options_of
from apex_opt.search.search import silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.search import Problem, Scored

EACH = 6
"""Pairs of a question that are simulated."""


KINDS = 12


def _kinds(problem: Problem, found: Scored) -> Iterator[tuple[str, bool]]:
    """What a run was one of."""
    trace, prefill = problem.trace, found.deployment.pools[0].plan
    yield "of any kind", True
    yield "pushed", isinstance(problem.settings.scheduler, SglangScheduling)
    yield "on two types", len({pool.gpu for pool in found.deployment.pools}) > 1
    yield "several instances", any(pool.plan.replicas > 1 for pool in found.deployment.pools)
    yield "routed by loads", prefill.replicas > 1 and problem.routing_of(prefill) not in ("round_robin", "session")
    yield "with prefixes found", (found.metrics.cached_tokens or 0) > 0
    yield "in a closed loop", trace.concurrency is not None
    yield "turn by turn", trace.delay_ns is not None
    yield "of sessions", trace.session is not None
    yield "with preemptions", any(use.preemptions for use in found.pools)
    yield "of latent attention", any(block.attention.kind == "latent attention" for block in problem.model.blocks)
    yield "that misses a goal", not found.meets_slos


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 1000), marks=pytest.mark.nightly)])
def test_no_run_of_a_pair_beats_its_bounds_whatever_the_question(seeds: range) -> None:
    kinds = compared(seeds)
    assert len(kinds) == KINDS and min(kinds.values()) > len(seeds) // 20, kinds


def compared(seeds: range) -> Counter[str]:
    """Runs of pairs of random questions by what they are of, none of which beat its bounds.

    In no figure and for no request, as a pair and with either pool not chosen yet; nor is a run cut short before it has
    lost.
    """
    kinds: Counter[str] = Counter()
    for seed in seeds:
        problem, rng = random_question(seed), np.random.default_rng(seed)
        pairs = list(pairs_of(problem))
        rng.shuffle(pairs)  # type: ignore[arg-type]
        if not pairs:
            continue
        if rng.random() < 0.5:
            problem = with_goal(problem, pairs[0], rng)
        scorer = Scorer(problem)
        pools = {pool for pair in pairs for pool in pair.pools}
        known = {pool: options_of(scorer.facts_of(pool), [pool], silent)[0] for pool in pools}
        compose = Handed(problem, scorer.outside_ns, scorer.pairs)
        sides = [[known[pool] for pool in pools if pool.role == role] for role in ("prefill", "decode")]
        for pair in pairs[:EACH]:
            outcome = scorer.run(pair)
            assert outcome is not None
            found, chosen = scorer.scored(pair, outcome), tuple(known[pool] for pool in pair.pools)
            run, fit = compose.of([chosen])
            assert fit.all()
            told = seed, str(pair)
            assert (run.first_ns[0] <= outcome.first_token_ns - outcome.arrival_ns).all(), told
            assert (run.rest_ns[0] <= outcome.finish_ns - outcome.first_token_ns).all(), told
            partly = [compose.with_help([(chosen[at],)], Help.of([sides[1 - at]])) for at in (0, 1)]
            costs = problem.costs(found.metrics)
            for one in (run, *partly):
                bounds, possible = judged(one, problem.objectives, problem.goals)
                wrong = [
                    (objective.name, bound, cost)
                    for objective, bound, cost in zip(problem.objectives, bounds[0], costs, strict=True)
                    if bound > cost
                ]
                assert not wrong, (told, wrong)
                assert possible.all() or not found.meets_slos, told
            again = scorer.challenge(pair, tuple(judged(run, problem.objectives, ())[0][0].tolist()), costs)
            assert again is not None or not found.meets_slos, told
            assert again is None or problem.costs(again.metrics) == costs, told
            kinds.update(kind for kind, met in _kinds(problem, found) if met)
    return kinds
