"""Explanations: the clash is irreducible, every relaxation holds when asked for, and terms add up."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from plan_cases import (
    SMALL,
    dense,
    latent,
    make_cluster,
    make_gpu,
    make_model,
    make_question,
    memory_need,
    random_trace,
)

from apex_opt.ask import Options, ask
from apex_opt.cluster import load_cluster
from apex_opt.engines import ENGINES, VLLM
from apex_opt.evaluate import space, violations
from apex_opt.figures import parse_goals
from apex_opt.figures.measure import each
from apex_opt.ir import load_model
from apex_opt.options import method
from apex_opt.plan.memory import stage_memory
from apex_opt.plan.plan import default_kv_format, parse_plan
from apex_opt.search import Candidate, Evaluator, Question, search
from apex_opt.search.explain import Clash, Explanation, Relaxation, compare, differences, explain, explained
from apex_opt.search.explain.clashes import find_clashes, smallest_clash
from apex_opt.search.explain.relaxations import other_weights
from apex_opt.search.explain.solving import OutOfTime, Solved, Work
from apex_opt.search.search import silent
from apex_opt.workload import make_trace
from formulations.plan_space import PlanSpace

SPACE = PlanSpace()
EIGHT = load_model("llama-3.1-8b")


def changed(question: Question, relaxation: Relaxation) -> Question:
    """The question as the options of a relaxation ask it."""
    for name, value in relaxation.options.items():
        if name == "weights":
            question = replace(question, weight_formats=(value,), kv_formats=(default_kv_format(value),))
        elif name == "kv":
            question = replace(question, kv_formats=(value,) * len(question.kv_formats))
        elif name == "slo":
            question = replace(question, slos=parse_goals(value))
        elif name == "max_model_len":
            question = replace(question, settings=replace(question.settings, max_model_len=int(value)))
        elif name == "nodes":
            cluster = replace(question.cluster, nodes=int(value))
            question = replace(question, cluster=cluster, max_devices=cluster.size)
        elif name == "cluster":
            cluster = load_cluster(value)
            question = replace(question, cluster=cluster, max_devices=cluster.size)
        else:
            assert name == "gpus"
            question = replace(question, max_devices=int(value))
    return question


def indivisible() -> Question:
    """Three GPUs that would hold the model if its eight heads were divided by three."""
    model = make_model((dense(hidden=1024, columns=4096), 1))
    settings = replace(SMALL, max_num_seqs=1, max_num_batched_tokens=16)
    question = make_question(model, make_cluster(3), random_trace(1, 5), settings=settings)
    stages = stage_memory(model, make_gpu(), parse_plan("tp3", model), settings)
    need = max(memory_need(stage, question.instance().kv_blocks_needed) for stage in stages)
    return replace(question, cluster=make_cluster(3, memory_bytes=int(need / 0.9) + 1000))


def missed_by_simulation() -> Question:
    """A goal between the lower bound and what is reached."""
    question = make_question(EIGHT, "2xh100-sxm", random_trace(1, 20), objective="ttft_p95")
    best = search(question, SPACE).best
    assert best is not None
    assert best.bound is not None
    assert best.bound < best.value
    return replace(question, slos=parse_goals(f"ttft_p95<={(best.bound + best.value) / 2:.12f}s"))


def question_of(name: str) -> Question:
    if name == "memory":
        return make_question(load_model("llama-3.1-70b"), "1xh100-sxm", random_trace(1, 5))
    if name == "format":
        return make_question(EIGHT, "1xb200-sxm", random_trace(1, 5), weight_formats=("w8a8",))
    if name == "divisibility":
        return indivisible()
    if name == "bound":
        return make_question(EIGHT, "2xh100-sxm", random_trace(1, 20), "ttft_p95<=1us")
    return missed_by_simulation()


V100 = {"model": "llama-3.1-8b", "cluster": "4xv100-sxm", "weights": "fp8", "trace": "static:n=4,prompt=64,output=16"}
IMPOSSIBLE = ("memory", "format", "divisibility", "bound", "simulation")


@cache
def explained_as(name: str) -> Explanation:
    return explain(question_of(name), SPACE)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_request_is_told_its_clash_with_numbers(name: str) -> None:
    question, found = question_of(name), explained_as(name)
    assert found.answer.status == "infeasible"
    (clash,) = found.clashes
    goals = tuple(goal.text for goal in question.slos)
    of, proof, said = {
        "memory": (("memory",), "constraints", "a GPU needs 14"),
        "format": (("format",), "constraints", "does not compute in int8, which w8a8 needs"),
        "divisibility": (("divisibility", "memory"), "constraints", "attention tp3 does not divide 8 query heads"),
        "bound": (goals, "bound", "its bound, as if no other request were there, is"),
        "simulation": (goals, "simulation", "comes closest and reaches"),
    }[name]
    assert (clash.of, clash.proof) == (of, proof)
    assert said in " ".join(clash.facts)


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_every_relaxation_is_feasible_when_asked_for_and_none_comes_before_a_cheaper_one(name: str) -> None:
    question, found = question_of(name), explained_as(name)
    assert found.tried.found
    for relaxation in found.tried.found:
        asked = changed(question, relaxation)
        best = search(asked, SPACE).best
        assert best is not None
        assert violations(asked.instance(), relaxation.solved.plan) == ()
        assert asked.max_devices == question.max_devices + relaxation.more_gpus
        if question.slos:
            assert relaxation.solved == Solved(plan=best.plan, value=best.value)
    costs = [relaxation.more_gpus for relaxation in found.tried.found]
    assert costs == sorted(costs)


def test_the_gpus_proposed_are_the_fewest_of_the_sizes_there_are() -> None:
    question = make_question(load_model("llama-3.1-405b"), "4xh100-sxm", random_trace(1, 5))
    (more,) = [r for r in explain(question, SPACE).tried.found if r.more_gpus]
    assert more.options == {"cluster": "2x8xh100-sxm-80gb"}
    assert search(replace(question, cluster=load_cluster("8xh100-sxm"), max_devices=8), SPACE).best is None
    fewer = replace(question, cluster=load_cluster("2x8xh100-sxm"), max_devices=2)
    (more,) = [r for r in explain(fewer, SPACE).tried.found if r.more_gpus]
    assert int(more.options["gpus"]) == 2 + more.more_gpus
    assert search(replace(fewer, max_devices=1 + more.more_gpus), SPACE).best is None


def test_the_weights_proposed_are_those_of_the_most_bits_that_do() -> None:
    question = make_question(load_model("llama-3.1-405b"), "8xh100-sxm", random_trace(1, 5))
    (weights,) = [r for r in explain(question, SPACE).tried.found if "weights" in r.options]
    assert weights.options == {"weights": "w8a16"}


@pytest.mark.parametrize(
    ("name", "cluster", "weights", "said"),
    [
        # Of each width and arithmetic the smallest variant that the GPU computes, those of the most bits first.
        ("llama-3.1-405b", "4xh100-sxm", "bf16", ["w4a16"]),
        ("llama-3.1-70b", "1xh200-sxm", "bf16", ["w8a16", "fp8", "w8a8", "w4a16"]),
        ("llama-3.1-70b", "1xh200-sxm", "fp16", ["w8a16", "fp8", "w8a8", "w4a16"]),
        ("llama-3.1-405b", "4xb200-sxm", "bf16", ["w8a16", "fp8", "nvfp4", "w4a16"]),
        ("llama-3.1-8b", "1xb200-sxm", "w8a8", ["bf16", "w8a16", "fp8", "nvfp4", "w4a16"]),
        ("llama-3.1-8b", "1xv100-pcie", "fp16", ["w8a16", "w4a16"]),
    ],
)
def test_the_weights_tried_are_the_usual_formats_and_the_first_that_fits_is_proposed(
    name: str, cluster: str, weights: str, said: list[str]
) -> None:
    question = make_question(load_model(name), cluster, random_trace(1, 5), weight_formats=(weights,))
    fitting = [
        changed.weight_formats[0]
        for changed, _, _ in other_weights(question)
        if any(not violations(changed.instance(), plan) for plan in space(changed.instance()))
    ]
    assert fitting == said
    tried = explain(question, SPACE).tried
    assert tried is not None
    assert [r.options["weights"] for r in tried.found if "weights" in r.options] == said[:1]


def test_a_request_too_long_for_the_cache_may_be_cut_to_the_last_token_that_fits() -> None:
    trace = make_trace(name="long", arrival_ns=[0, 0], prompt=[11_000, 10], output=[120_000, 10])
    settings = replace(SMALL, max_model_len=131_072)
    question = make_question(load_model("llama-3.1-70b"), "2xh100-sxm", trace, settings=settings)
    found = explain(question, SPACE)
    assert "one of a single token would fit" in " ".join(found.clashes[0].facts)
    (cut,) = [r for r in found.tried.found if "max_model_len" in r.options]
    tokens = int(cut.options["max_model_len"])
    assert "1 of 2 answers end early" in cut.text
    for longest, fits in ((tokens, True), (tokens + 1, False)):
        asked = replace(question, settings=replace(settings, max_model_len=longest))
        assert any(not violations(asked.instance(), plan) for plan in space(asked.instance())) is fits


def test_an_engine_that_runs_it_is_proposed_where_the_one_asked_for_does_not() -> None:
    settings = replace(SMALL, runnable=ENGINES["trtllm"])
    question = make_question(EIGHT, "1xa100-sxm", random_trace(1, 5), settings=settings, weight_formats=("fp8",))
    found = explain(question, SPACE)
    assert [clash.of for clash in found.clashes] == [("engine",)]
    (other,) = [r for r in found.tried.found if "runnable" in r.options]
    assert other.options == {"runnable": "vllm"}
    settings = replace(settings, runnable=ENGINES["vllm"])
    assert search(replace(question, settings=settings), SPACE).best is not None


# ---- goals --------------------------------------------------------------------------------------------------------


def every_plan(question: Question) -> list[Candidate]:
    """All plans that can run, simulated."""
    evaluator, instance = Evaluator(question), replace(question, slos=()).instance()
    return [evaluator.simulate(plan) for plan in space(instance) if not violations(instance, plan)]


@cache
def at_odds(seed: int) -> Question:
    """Goals at about what the best plan reaches in each, some of which no plan meets together."""
    rng = np.random.default_rng(seed)
    model = make_model((dense(hidden=1024, columns=4096), int(rng.integers(2, 9))))
    names = ["ttft_p95", "tpot_p95", "e2e_mean", "throughput"]
    goals = ",".join(f"{name}{'>=1e-9' if name == 'throughput' else '<=100s'}" for name in names)
    question = make_question(model, make_cluster(4), random_trace(seed, 25), goals)
    scored = every_plan(question)
    limits = []
    for goal in question.slos:
        values = [c.metrics.judged(goal) for c in scored]
        best = max(values) if goal.metric == "throughput" else min(values)
        limits.append(replace(goal, limit=best * float(rng.choice([0.98, 1, 1, 1, 1.02])), text=""))
    return replace(question, slos=tuple(limits))


def first_of_the_smallest(goals: tuple[str, ...], met: list[frozenset[str]]) -> tuple[str, ...]:
    """By trying every subset: goals that no plan meets together, the fewest, the first in order."""
    clashing = [
        (len(some), index, some)
        for index, some in enumerate(
            some for size in range(1, len(goals) + 1) for some in itertools.combinations(goals, size)
        )
        if not any(set(some) <= held for held in met)
    ]
    return min(clashing)[2] if clashing else ()


@cache
def clashes_of(seed: int) -> tuple[Clash, ...]:
    return find_clashes(Work(at_odds(seed), SPACE, silent))[0]


@pytest.mark.parametrize("seed", range(60))
def test_the_clashes_of_goals_are_the_smallest_of_all_subsets_and_without_them_a_plan_is_left(seed: int) -> None:
    question = at_odds(seed)
    met = [frozenset(text for text, yes in c.metrics.slo_met.items() if yes) for c in every_plan(question)]
    left = tuple(goal.text for goal in question.slos)
    for clash in clashes_of(seed):
        assert clash.of == first_of_the_smallest(left, met)
        assert clash.smallest
        left = tuple(text for text in left if text not in clash.of)
    assert first_of_the_smallest(left, met) == ()


def test_these_goals_clash_alone_and_in_pairs_twice_over_and_not_at_all() -> None:
    clashes = [clashes_of(seed) for seed in range(60)]
    assert {len(clash.of) for found in clashes for clash in found} >= {1, 2}
    assert {len(found) for found in clashes} >= {0, 1, 2}


@pytest.mark.parametrize("seed", range(6))
def test_the_limits_proposed_for_goals_at_odds_have_a_plan(seed: int) -> None:
    question = at_odds(seed)
    found = explain(question, SPACE)
    for relaxation in found.tried.found if found.tried else ():
        assert search(changed(question, relaxation), SPACE).best is not None


@pytest.mark.parametrize("seed", range(200))
def test_the_smallest_clash_of_any_goals_is_what_every_subset_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = ("ttft_mean", "ttft_p95", "tpot_mean", "tpot_p95", "e2e_mean")
    goals = parse_goals(",".join(f"{name}<=1s" for name in names[: 2 + seed % 4]))
    plans = [frozenset(g for g in goals if rng.random() < 0.7) for _ in range(int(rng.integers(0, 7)))]
    found = smallest_clash(goals, lambda some: any(held.issuperset(some) for held in plans))
    texts = [frozenset(goal.text for goal in held) for held in plans]
    assert tuple(goal.text for goal in found) == first_of_the_smallest(tuple(goal.text for goal in goals), texts)


@pytest.mark.parametrize(
    "goal", ["ttft_p95<=1us", "tpot_mean<=1us", "throughput>=1e6", "ttft<=1us@93%", "e2e<=1us@50%"]
)
def test_the_limit_proposed_is_the_best_over_all_plans_to_three_digits(goal: str) -> None:
    model = make_model((dense(hidden=1024, columns=4096), 5))
    question = make_question(model, make_cluster(4), random_trace(2, 40), goal)
    (slo,) = question.slos
    evaluator = Evaluator(question)
    values = []
    for candidate in every_plan(question):
        if slo.fraction is None:
            values.append(candidate.metrics.judged(slo))
            continue
        outcome, cost = evaluator.batches(candidate.plan)
        run = outcome.as_run(question.trace, question.settings.max_model_len, outside_ns=cost.request_ns)
        seen = sorted(each(run, slo.figure))
        values.append(next(v for i, v in enumerate(seen) if (i + 1) / len(seen) >= slo.fraction))
    best = max(values) if slo.metric == "throughput" else min(values)
    (eased,) = [r for r in explain(question, SPACE).tried.found if "slo" in r.options]
    limit = parse_goals(eased.options["slo"])[0].limit
    assert limit == pytest.approx(best, rel=0.01)
    assert limit <= best if slo.metric == "throughput" else limit >= best
    tighter = replace(slo, limit=best * (1.000001 if slo.metric == "throughput" else 0.999999), text="")
    assert search(replace(question, slos=(tighter,)), SPACE).best is None


def test_goals_that_each_are_out_of_reach_are_eased_together() -> None:
    question = make_question(EIGHT, "2xh100-sxm", random_trace(1, 10), "ttft_p95<=1us,tpot_p95<=1us,e2e_max<=100s")
    found = explain(question, SPACE)
    assert [clash.of for clash in found.clashes] == [("bandwidth",), ("ttft_p95<=1us",)]
    (eased,) = [r for r in found.tried.found if "slo" in r.options]
    assert search(changed(question, eased), SPACE).best is not None
    assert "e2e_max<=100s" in eased.options["slo"]
    assert "the best beside that is" in eased.text


def test_a_clash_of_format_and_one_of_memory_are_both_told_and_solved_together() -> None:
    question = make_question(load_model("llama-3.1-70b"), "1xv100-pcie", random_trace(1, 5), weight_formats=("w8a8",))
    found = explain(question, SPACE)
    assert [clash.of for clash in found.clashes] == [("format",), ("memory",)]
    (both,) = found.tried.found
    assert set(both.options) == {"cluster", "weights"}
    assert search(changed(question, both), SPACE).best is not None
    assert "another weight format" in found.tried.failed


# ---- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["memory", "simulation"])
def test_when_the_time_is_up_what_was_not_tried_is_told_and_nothing_is_proposed(name: str) -> None:
    question = question_of(name)
    found = explained(question, search(question, SPACE), SPACE, time_limit_s=0)
    (clash,) = found.clashes
    assert found.tried is not None
    assert found.tried.found == ()
    goals = () if name == "memory" else ("other limits of the goals",)
    *ways, gpus = found.tried.untried
    assert tuple(ways) == (*goals, "an fp8 KV cache", "another weight format")
    assert gpus.endswith(" GPUs")
    # Constraints alone are judged within any time; of goals it is then not known whether fewer of them clash.
    assert clash.smallest is (name == "memory")
    assert clash.of == (("memory",) if name == "memory" else tuple(goal.text for goal in question.slos))


def test_where_the_time_is_up_between_the_first_plan_and_the_best_the_first_is_told_as_such() -> None:
    question = make_question(EIGHT, "2xh100-sxm", random_trace(1, 20), "e2e_max<=100s")
    plans = [plan for plan in space(question.instance()) if not violations(question.instance(), plan)]

    def stop(what: str, done: int, total: int) -> None:
        # The bounds of the first plan are looked at in one pass; those of the search in another.
        seen.append(what)
        if seen.count("bounding plans") > len(plans):
            raise OutOfTime

    seen: list[str] = []
    solved = Work(question, SPACE, stop).solve(question)
    assert solved is not None
    assert not solved.best
    assert solved.plan in plans
    assert Evaluator(question).simulate(solved.plan).value == solved.value


def test_the_plan_nearest_to_what_an_engine_can_run_breaks_the_fewest_of_its_rules() -> None:
    question = ask(Options.of(method("plan")(None, **V100).options))
    (clash,) = explain(question, SPACE).clashes
    assert clash.of == ("engine",)
    assert "compute capability" in clash.facts[0]
    assert "copies" not in clash.facts[0]


def test_blocks_that_an_engine_does_not_take_are_proposed_as_it_does() -> None:
    small = make_model((latent(dense(columns=512)), 4))
    settings = replace(SMALL, block_size=24, runnable=VLLM)
    question = make_question(small, "2xh100-sxm", random_trace(1, 5), settings=settings)
    found = explain(question, SPACE)
    assert [clash.of for clash in found.clashes] == [("engine",)]
    assert "block_size 24" in found.clashes[0].facts[0]
    assert found.tried is not None
    assert {"block_size": "16"} in [relaxation.options for relaxation in found.tried.found]


# ---- a plan beside the best ---------------------------------------------------------------------------------------


def test_terms_are_those_that_differ_largest_first_and_add_up() -> None:
    question = make_question(EIGHT, "4xh100-sxm", random_trace(1, 30))
    found = explain(question, SPACE, plan=parse_plan("dp4", EIGHT))
    assert found.answer.best is not None
    assert (found.clashes, found.tried) == ((), None)
    best, comparison = found.answer.best, found.comparison
    assert comparison is not None
    assert comparison.candidate is not None
    shares = [term.share for term in comparison.terms]
    assert shares == sorted(shares, reverse=True)
    assert all(term.difference for term in comparison.terms)
    by_part = {
        part: sum(term.difference for term in comparison.terms if term.part == part)
        for part in ("time per GPU", "mean latency", "energy")
    }
    mine = comparison.candidate
    assert by_part["time per GPU"] == pytest.approx(
        mine.metrics.value("makespan") - best.metrics.value("makespan"), abs=1e-9
    )
    assert by_part["energy"] == pytest.approx(mine.usage.energy_j - best.usage.energy_j)
    assert by_part["mean latency"] == pytest.approx(
        mine.metrics.latency_s["e2e"]["mean"] - best.metrics.latency_s["e2e"]["mean"]
    )


def test_terms_of_several_runs_have_a_value_for_each_and_share_by_the_widest_gap() -> None:
    question = make_question(EIGHT, "4xh100-sxm", random_trace(1, 30))
    evaluator = Evaluator(question)
    runs = [evaluator.simulate(parse_plan(text, EIGHT)) for text in ("tp4", "dp4", "pp4")]
    terms = differences([(evaluator, run) for run in runs])
    assert {term.part for term in terms} == {"time per GPU", "mean latency", "energy", "memory per GPU"}
    for term in terms:
        assert len(term.values) == len(runs)
        assert len(set(term.values)) > 1
    energy = max(run.usage.energy_j for run in runs)
    (idle,) = [term for term in terms if (term.part, term.name) == ("energy", "idle draw")]
    assert idle.values == tuple(run.usage.idle_energy_j for run in runs)
    assert idle.share == (max(idle.values) - min(idle.values)) / energy
    (weights,) = [term for term in terms if (term.part, term.name) == ("memory per GPU", "weights")]
    for run, value in zip(runs, weights.values, strict=True):
        assert value == pytest.approx(sum(stage.weights_bytes for stage in run.memory) / len(run.memory))


def test_the_best_plan_differs_from_itself_in_nothing() -> None:
    question = make_question(EIGHT, "2xh100-sxm", random_trace(1, 10))
    best = search(question, SPACE).best
    assert best is not None
    assert compare(question, best.plan, best).terms == ()


def test_a_plan_that_cannot_run_or_misses_a_goal_is_told_so() -> None:
    question = make_question(EIGHT, "2xh100-sxm", random_trace(1, 10), "ttft_p95<=1us")
    too_many = compare(question, parse_plan("tp8", EIGHT), None)
    assert too_many.candidate is None
    assert "takes 8 GPUs, 2 are offered" in str(too_many.reason)
    late = compare(question, parse_plan("tp2", EIGHT), None)
    assert late.candidate is not None
    assert str(late.reason).startswith("misses ttft_p95<=1us (it reaches ")


def test_a_goal_missed_by_a_share_of_the_requests_is_told_as_a_share() -> None:
    question = make_question(EIGHT, "2xh100-sxm", random_trace(1, 10), "ttft<=1us@99%")
    late = compare(question, parse_plan("tp2", EIGHT), None)
    assert str(late.reason) == "misses ttft<=1us@99% (it reaches 0.0%)"
