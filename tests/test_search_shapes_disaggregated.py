"""A pool that computes prompts and one that answers them: the search against every pair, and what their bounds say."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import NAMES, beside, dense, make_cluster, make_model, make_problem, tight
from pools_cases import PUSHING, SLEEPY, pairs_of, plans_of, random_question, with_goal
from search_cases import GPUS, SPACE, every, rank

from apex_opt.engines.handover import HandoverTimes
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.figures import load_objective, parse_goals
from apex_opt.plans.deployment import Deployment, Pool, parse_deployment
from apex_opt.search import Scorer, search
from apex_opt.search.bounds.handed import Handed
from apex_opt.search.option import options_of
from apex_opt.search.search import judge, silent
from apex_opt.studies.check import check
from apex_opt.studies.explain.comparison import differences
from apex_opt.workload import make_trace
from formulations import deployment as programs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from apex_opt.plans.routing import Routing
    from apex_opt.search import Problem

TIMES = HandoverTimes(proxy_us=300, notice_us=20, post_us=50, descriptor_us=1.5, rate_share=0.3)
MODEL = make_model((dense(hidden=1024, columns=4096), 6))


def question(seed: int, gpus: int = 3, **changes: Any) -> Problem:
    """Busy requests on a few GPUs of one type, served by pools of either kind."""
    rng = np.random.default_rng(seed)
    requests = int(rng.integers(8, 30))
    trace = make_trace(
        name="test",
        arrival_ns=np.cumsum(rng.exponential(float(rng.choice([1e5, 2e6, 2e7])), requests)).astype(np.int64),
        prompt=rng.integers(1, 700, requests),
        output=rng.integers(1, 40, requests),
    )
    fields: dict[str, Any] = {
        "settings": SLEEPY,
        "trace": trace,
        "serving": ("aggregated", "pools"),
        "handover": TIMES,
        "objective": str(rng.choice(["e2e_mean", "tpot_p99", "itl_p99", "ttft_p95", "makespan", "energy"])),
    }
    if rng.random() < 0.3:
        fields["slo"] = str(rng.choice(["ttft_p95<=40ms", "tpot_p95<=4ms", "e2e_p90<=200ms"]))
    return make_problem(MODEL, make_cluster(gpus, name="quick", price_per_h=2.0), **fields | changes)


def over_two(seed: int, **changes: Any) -> Problem:
    """The same on two types of GPU."""
    return beside(question(seed, 2, **changes), make_cluster(2, **GPUS["slow"] | {"name": "slow", "price_per_h": 1.0}))


@cache
def everything(seed: int, types: int) -> tuple[Problem, tuple[Any, ...]]:
    """A question and every deployment of it, simulated to its end."""
    problem = question(seed) if types == 1 else over_two(seed)
    scorer = Scorer(problem)
    return problem, (*every(problem), *(scorer.simulate(pair) for pair in pairs_of(problem)))


SEEDS = [(seed, 1) for seed in range(44)] + [(seed, 2) for seed in range(16)]
FEW = [case for case in SEEDS if case[0] % 4 == 0]


@pytest.mark.parametrize(
    ("seed", "types"), [pytest.param(*case, marks=() if case in FEW else pytest.mark.nightly) for case in SEEDS]
)
def test_the_best_is_the_best_of_all_pairs_and_of_all_that_do_both_phases(seed: int, types: int) -> None:
    problem, scored = everything(seed, types)
    good = sorted((one for one in scored if one.meets_slos), key=lambda one: rank(problem, one))
    answer = search(problem, SPACE, top=3)
    assert [one.text for one in answer.candidates[:3]] == [one.text for one in good[:3]]
    assert answer.ledger.optimal
    assert answer.status == ("optimal" if good else "infeasible")


def of_both(seed: int) -> Problem:
    """A question of any kind over both ways to serve, with one objective or two, and a goal about what is reached."""
    rng, problem = np.random.default_rng(seed), random_question(seed)
    if isinstance(problem.settings.scheduler, SglangScheduling):
        problem = replace(problem, sides=(("round_robin", "session"), ("round_robin",)))  # the kernel knows these
    objective, *then = (load_objective(str(name)) for name in rng.choice(NAMES, int(rng.integers(1, 3)), replace=False))
    problem = replace(problem, objective=objective, then=tuple(then), serving=("aggregated", "pools"))
    problem = replace(problem, max_devices=min(problem.max_devices, 4))
    pairs = list(pairs_of(problem))
    return with_goal(problem, pairs[int(rng.integers(len(pairs)))], rng) if pairs and rng.random() < 0.6 else problem


@pytest.mark.parametrize(
    "seeds", [(4, 6, 41), pytest.param(range(8, 200), marks=pytest.mark.nightly)], ids=["ci", "all"]
)
def test_the_best_of_questions_of_any_kind_is_the_best_of_simulating_all(seeds: Iterable[int]) -> None:
    for seed in seeds:
        problem = of_both(seed)
        scorer, pairs = Scorer(problem), list(pairs_of(problem))
        if len(pairs) > 120:
            continue
        scored = (*every(problem), *(scorer.simulate(pair) for pair in pairs))
        good = sorted(problem.costs(one.metrics) for one in scored if one.meets_slos)
        answer = search(problem, SPACE, top=3)
        assert (answer.status == "optimal") == bool(good), seed
        if good:
            assert [problem.costs(one.metrics) for one in answer.candidates[:3]] == good[:3], seed


@pytest.mark.parametrize(("seed", "types"), FEW[:4])
def test_a_replay_by_plain_python_bears_the_certificate_out(seed: int, types: int) -> None:
    problem, _ = everything(seed, types)
    found = check(problem, search(problem, SPACE), SPACE, programs)
    assert found.holds, found.disagreements
    assert "pools" in {part.shape for part in found.parts}


@pytest.mark.parametrize(("seed", "types"), FEW)
def test_no_run_of_a_pair_beats_its_bound(seed: int, types: int) -> None:
    problem, scored = everything(seed, types)
    pools = [part for part in check(problem, search(problem, SPACE), SPACE, programs).parts if part.shape == "pools"]
    bounds = {deployment: bound for part in pools for deployment, bound in part.leaves()}
    for one in scored:
        if one.deployment.disaggregated and one.meets_slos:
            assert bounds[one.deployment] <= problem.objective.signed(one.value), one.text


@pytest.mark.parametrize("seed", range(3))
def test_the_best_for_clients_is_the_best_of_all_pairs_and_beats_no_bound(seed: int) -> None:
    problem = question(seed, objective=("e2e_mean", "throughput", "energy")[seed], slo="")
    lengths = {"prompt": problem.trace.prompt, "output": problem.trace.output}
    trace = make_trace(name="clients", arrival_ns=np.zeros(len(problem.trace), np.int64), concurrency=3, **lengths)
    problem = replace(problem, serving=("pools",), trace=trace)
    scorer = Scorer(problem)
    scored = [scorer.simulate(pair) for pair in pairs_of(problem)]
    answer = search(problem, SPACE)
    found = check(problem, answer, SPACE, programs)
    assert found.holds, found.disagreements
    assert problem.costs(answer.candidates[0].metrics) == min(problem.costs(one.metrics) for one in scored)
    bounds = {deployment: bound for part in found.parts for deployment, bound in part.leaves()}
    for one in scored:
        assert bounds[one.deployment] <= problem.objective.signed(one.value), one.text


@pytest.mark.parametrize("seed", range(3))
def test_the_best_that_sglang_hands_over_is_the_best_of_all_pairs_and_beats_no_bound(seed: int) -> None:
    settings = PUSHING
    changes: dict[str, Any] = {"objective": "e2e_mean"}
    if seed == 0:  # each request alone, as bounds have it
        calm = make_trace(name="calm", arrival_ns=[0, 10**10], prompt=[300, 40], output=[3, 2])
        changes = {"objective": "ttft_p95", "trace": calm, "slo": ""}
    problem = replace(question(seed, **changes), serving=("pools",), settings=settings)
    scorer = Scorer(problem)
    scored = [scorer.simulate(pair) for pair in pairs_of(problem)]
    answer = search(problem, SPACE)
    found = check(problem, answer, SPACE, programs)
    assert found.holds, found.disagreements
    good = [problem.costs(one.metrics) for one in scored if one.meets_slos]
    assert [problem.costs(one.metrics) for one in answer.candidates[:1]] == sorted(good)[:1]
    # The first token is the prefill pool's: beyond its own time there are the last page and a message each way.
    deployment = scored[0].deployment
    options = tuple(options_of(scorer.facts_of(pool), [pool], silent)[0] for pool in deployment.pools)
    run, _ = Handed(problem, scorer.outside_ns, scorer.pairs).of([options])
    way = scorer.pairs.handover(*deployment.pools)
    between = way.read_ns + way.block_ns + 2 * way.notice_ns
    assert run.first_ns[0].tolist() == (options[0].first_ns + between).tolist()
    bounds = {deployment: bound for part in found.parts for deployment, bound in part.leaves()}
    for one in scored:
        if one.meets_slos:
            assert bounds[one.deployment] <= one.value, one.text


@pytest.mark.parametrize("seed", range(3))
def test_the_best_routers_are_those_of_simulating_every_pair_with_each(seed: int) -> None:
    sides = ("round_robin", "least_loaded"), ("session", "pull")
    problem = replace(question(seed, 4), serving=("pools",), sides=sides)
    scorer = Scorer(problem)
    scored = [scorer.simulate(pair) for pair in pairs_of(problem)]
    assert {pool.plan.route for one in scored for pool in one.deployment.pools} == {None, *sides[0], *sides[1]}
    good = [one for one in scored if one.meets_slos]
    answer = search(problem, SPACE, top=2)
    assert answer.ledger.optimal
    best = sorted(problem.costs(one.metrics) for one in good)[:2]
    assert [problem.costs(one.metrics) for one in answer.candidates[:2]] == best
    assert check(problem, answer, SPACE, programs).holds


@pytest.mark.parametrize("sides", [(("round_robin", "least_loaded"), ("session",)), (("pull",), ("session", "pull"))])
def test_every_pair_is_read_back_from_its_text_with_the_same_figures(sides: tuple[tuple[Routing, ...], ...]) -> None:
    asked = replace(question(0, 4), serving=("pools",))
    problem = replace(asked, sides=sides)
    scorer, alone = Scorer(problem), Scorer(asked)  # a text says what is dealt how without what was asked
    pairs = pairs_of(problem)
    assert {len([pool for pool in pair.pools if pool.plan.route]) for pair in pairs} == {0, 1, 2}
    for pair in pairs:
        again = parse_deployment(str(pair), problem.model, problem.types)
        assert again == pair
        assert alone.simulate(again).metrics == scorer.simulate(pair).metrics
    found = [pool.plan for one in search(problem, SPACE, top=9).candidates for pool in one.deployment.pools]
    assert all(plan.route is not None for plan in found if plan.replicas > 1)


@pytest.mark.parametrize("pushed", [False, True])
def test_the_parts_of_the_time_to_the_first_token_add_up_and_a_slow_link_is_seen_in_them(pushed: bool) -> None:
    asked = replace(question(0), serving=("pools",))
    if pushed:
        asked = replace(asked, settings=PUSHING)
    assert asked.handover is not None
    pair, means = next(pairs_of(asked)), []
    for share in (0.5, 0.0001):
        problem = replace(asked, handover=replace(asked.handover, rate_share=share))
        scorer = Scorer(problem)
        found = scorer.simulate(pair)
        assert found.handover_s is not None
        parts = {part: its["mean"] for part, its in found.handover_s.items()}
        assert list(parts) == ["prompt", "wait", "read", "answer", "outside"] and min(parts.values()) >= 0
        assert sum(parts.values()) == pytest.approx(found.metrics.latency_s["ttft"]["mean"], rel=1e-9)
        means.append(parts["read"])
    assert means[1] > 100 * means[0]


def test_explain_weighs_the_hand_over_of_a_pair() -> None:
    asked = replace(question(0), serving=("pools",))
    assert asked.handover is not None
    slow = replace(asked, handover=replace(asked.handover, rate_share=0.0001))
    pair = next(pairs_of(asked))
    runs = [(scorer, scorer.simulate(pair)) for scorer in (Scorer(slow), Scorer(asked))]
    terms = [term for term in differences(runs) if term.part == "mean latency"]
    assert terms[0].name == "first token, hand-over" and terms[0].difference > 0
    for place, (_, run) in enumerate(runs):
        assert sum(its.values[place] for its in terms) <= run.metrics.latency_s["e2e"]["mean"]


def test_what_runs_in_plain_python_is_told_before_it_does() -> None:
    problem = replace(question(0, 4), serving=("pools",))
    pushed = replace(problem, settings=PUSHING)
    for one, slow in ((problem, False), (pushed, False), (replace(pushed, routing="least_loaded"), True)):
        told: list[str] = []
        several = (pair for pair in pairs_of(one) if any(pool.plan.replicas > 1 for pool in pair.pools))
        judge(one, next(several), lambda what, *_, told=told: told.append(what))  # type: ignore[misc]
        assert any("in plain Python, about a thousand times slower" in what for what in told) == slow


def test_a_pool_alone_or_in_the_wrong_order_is_no_deployment() -> None:
    problem = question(0)
    plan = plans_of(problem, "prefill", 0)[0]
    for roles in (("prefill",), ("decode", "prefill"), ("prefill", None), ("prefill", "prefill")):
        with pytest.raises(Exception, match="one prefill and one decode pool"):
            Deployment(pools=tuple(Pool(plan=plan, role=role) for role in roles))  # type: ignore[arg-type]


def test_why_pools_do_not_go_together_is_said_of_their_degrees_and_types() -> None:
    scorer = Scorer(question(0, 8))
    plans = {plan.attention.tp: plan for plan in plans_of(scorer.problem, "prefill", 0) if plan.replicas == 1}
    heads = min(block.attention.kv_heads for block in MODEL.blocks)
    copies = 2 * heads
    pools = Pool(plan=plans[copies], role="prefill"), Pool(plan=plans[1], role="decode")
    said = " ".join(fault.text for fault in scorer.faults(Deployment(pools=pools)))
    assert f"tp{copies} cannot hand over to tp1: ranks of the {heads} KV heads would hold copies; give both the" in said


def test_a_pool_that_finds_no_room_is_told_from_the_other_one() -> None:
    problem = question(0, 4, slo="")
    plan = plans_of(problem, "prefill", 0)[0]
    small = tight(problem, 0.001)
    pools = Pool(plan=plan, role="prefill"), Pool(plan=plan, role="decode")
    said = [fault.text for fault in Scorer(small).faults(Deployment(pools=pools)) if fault.family == "memory"]
    assert [text.split(": ")[0] for text in said] == ["prefill pool", "decode pool"]


def test_why_there_is_no_pair_is_said_by_type_of_gpu() -> None:
    problem = beside(question(0, 1, serving=("pools",)), make_cluster(1, **GPUS["slow"] | {"name": "slow"}))
    answer = search(replace(problem, max_devices=1), SPACE)
    assert (
        answer.reason is not None
        and "the smallest take 1 quick and 1 quick GPUs, 1 quick and 1 slow are" in answer.reason
    )


def test_pairs_that_find_no_room_beside_each_other_are_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apex_opt.search.pairs.find_room", lambda *given: False)
    problem = question(0, 2, serving=("pools",))
    answer = search(problem, SPACE)
    assert answer.reason is not None
    assert "room: the pools do not fit into the nodes beside each other on quick, each as it lies best" in answer.reason
    (part,) = answer.ledger.parts
    assert part.infeasible["room"] > 0 == part.infeasible["handover"]
    assert check(problem, answer, SPACE, programs).disagreements == ()


def of_any(seed: int, types: int, **changes: Any) -> Problem:
    """A question of pools or of both ways to serve, on one type of GPU or on two, some with a choice of routers."""
    problem = question(seed, **changes) if types == 1 else over_two(seed, **changes)
    problem = replace(problem, serving=("pools",) if seed % 2 else ("aggregated", "pools"))
    return replace(problem, sides=(("round_robin", "least_loaded"), ("session", "pull"))) if seed % 3 == 0 else problem


def optimum(problem: Problem) -> float:
    """The cost of the best; endless where there is none."""
    best = search(problem, SPACE).best
    return np.inf if best is None else problem.objective.signed(best.value)


def faster(problem: Problem) -> Problem:
    """The same with hand-overs at the whole rate of the link, and nothing to pay for a piece."""
    return replace(problem, handover=replace(TIMES, rate_share=1.0, descriptor_us=0, post_us=0))


CASES = [
    pytest.param(seed, types, marks=() if (seed, types) in ((3, 1), (13, 1), (6, 2)) else pytest.mark.nightly)
    for seed in range(30)
    for types in (1, 2)
]


@pytest.mark.parametrize(("seed", "types"), CASES)
def test_a_further_gpu_or_a_looser_goal_never_hurts_the_optimum(seed: int, types: int) -> None:
    asked = of_any(seed, types)
    first, *others = asked.offers
    larger = replace(first, cluster=replace(first.cluster, gpus_per_node=first.cluster.gpus_per_node + 1))
    more = replace(asked, offers=(larger, *others), max_devices=asked.max_devices + 1)
    assert optimum(more) <= optimum(asked)
    free = replace(asked, slos=())
    best = search(free, SPACE).best
    assert best is not None
    limit_s, costs = best.metrics.latency_s["ttft"]["p95"], []
    for factor in (0.6, 0.95, 1.000001, 2.0):
        costs.append(optimum(replace(free, slos=parse_goals(f"ttft_p95<={limit_s * factor:.9f}s"))))
    assert costs == sorted(costs, reverse=True) and costs[-1] == optimum(free) <= optimum(asked)


def test_goals_of_these_questions_bind() -> None:
    free = replace(of_any(6, 1), slos=())
    best = search(free, SPACE).best
    assert best is not None
    tight = parse_goals(f"ttft_p95<={best.metrics.latency_s['ttft']['p95'] * 0.6:.9f}s")
    assert optimum(replace(free, slos=tight)) > optimum(free)


@pytest.mark.parametrize(("seed", "types"), CASES)
def test_a_faster_link_never_hurts_the_mean_latency_nor_any_figure_where_requests_do_not_meet(
    seed: int, types: int
) -> None:
    """Where they do, prompts that come sooner may meet in larger batches, whose tokens take longer."""
    asked = of_any(seed, types, objective="e2e_mean", slo="")
    assert optimum(faster(asked)) <= optimum(asked)
    calm = of_any(seed, types, slo="")
    calm = replace(calm, slos=(), trace=calm.trace.stretched(1e4))
    assert optimum(faster(calm)) <= optimum(calm)


def test_pools_win_where_the_tail_of_the_time_between_tokens_is_the_aim_and_do_not_raise_throughput() -> None:
    rng = np.random.default_rng(3)
    lengths = {"prompt": rng.integers(300, 900, 40), "output": rng.integers(20, 40, 40)}
    arrival_ns = np.cumsum(rng.exponential(5e6, 40)).astype(np.int64)
    trace = make_trace(name="long prompts", arrival_ns=arrival_ns, **lengths)
    calm = search(question(0, 2, trace=trace, objective="itl_p99", slo=""), SPACE).best
    assert calm is not None
    assert calm.deployment.disaggregated
    burst = make_trace(name="all at once", arrival_ns=[0] * 40, **lengths)
    busy = search(question(0, 2, trace=burst, objective="throughput", slo=""), SPACE).best
    assert busy is not None
    assert not busy.deployment.disaggregated
