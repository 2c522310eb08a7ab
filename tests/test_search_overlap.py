"""Plans whose forwards are split: program, bounds and search against plain Python and against simulating everything."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import (
    ENGINES,
    OVERHEAD,
    SMALL,
    feasible_plans,
    make_cluster,
    make_model,
    make_problem,
    random_instance,
    random_trace,
    sparse,
)
from search_cases import SPACE, listed_alike, rank

import formulations.deployment as programs
from apex_opt.cluster.types import Link
from apex_opt.engines.overlap import DUAL_BATCH, TWO_BATCH
from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.engines.sglang import SGLANG
from apex_opt.engines.vllm import VLLM
from apex_opt.figures import load_objectives
from apex_opt.figures.registry import names
from apex_opt.ir.formats import FORMATS
from apex_opt.oracle.checks import violations
from apex_opt.plans.deployment import Deployment
from apex_opt.plans.plan import Plan, Template
from apex_opt.search import Problem, Scorer, search
from apex_opt.simulator.ranks import alike_ns
from apex_opt.studies.check import check
from apex_opt.units import GIB

if TYPE_CHECKING:
    from apex_opt.oracle.instance import Instance

SPLIT = "two_batches"
PLAN = Plan(
    replicas=1,
    layers=(6,),
    attention=Template(dp=4),
    ffn=Template(ep=4),
    weight_format="bf16",
    kv_format="bf16",
    overlap=SPLIT,
)


@pytest.fixture(autouse=True)
def _willing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of vLLM want to split small forwards, too, and half of a GPU sends."""
    few = replace(DUAL_BATCH, decode_tokens=2, prompt_tokens=8)
    monkeypatch.setattr(VllmScheduling, "splitting", few)
    monkeypatch.setattr(SglangScheduling, "splitting", replace(TWO_BATCH, prompt_sms=60))


def split_instance(seed: int) -> Instance:
    """A random instance whose forwards are split."""
    rng, instance = np.random.default_rng(seed), random_instance(seed)
    settings = instance.settings
    if rng.random() < 0.5:
        settings = replace(settings, scheduler=SglangScheduling())
    if settings.runnable is not None:
        families = [None, None, frozenset({instance.model.family or ""}), frozenset({"another"})]
        settings = replace(
            settings,
            runnable=replace(
                settings.runnable,
                overlaps=families[rng.integers(4)],
                split_formats=frozenset(name for name in FORMATS if rng.random() < 0.8),
                whole_methods=frozenset({"gptq"}) if rng.random() < 0.3 else frozenset(),
                split_seqs=int(rng.choice([0, 0, 7, 15])),
            ),
        )
    gpu, room = instance.cluster.gpu, round(2 * GIB / settings.gpu_memory_utilization)  # of buffers
    if gpu.cuda:
        gpu = replace(gpu, capability=float(rng.choice([8.9, 9.0, 9.0, 10.0])))
    cluster = replace(instance.cluster, gpu=replace(gpu, memory_bytes=gpu.memory_bytes + room))
    cluster = replace(cluster, intra=replace(cluster.intra, kind=str(rng.choice(["nvlink", "nvlink", "pcie"]))))
    return replace(instance, overlap=SPLIT, settings=settings, cluster=cluster)


def check_program(seed: int) -> int:
    """The program lists and counts what plain Python does; how many plans there are."""
    instance = split_instance(seed)
    counted = listed_alike(instance)
    assert all(plan.overlap == SPLIT for plan in counted.plans)
    return len(counted.plans)


@pytest.mark.parametrize("seeds", [range(16), pytest.param(range(16, 120), marks=pytest.mark.nightly)])
def test_program_and_oracle_agree_on_plans_whose_forwards_are_split(seeds: range) -> None:
    assert sum(map(check_program, seeds)) > 0


def question(seed: int, gpus: int = 4) -> Problem:
    """Busy requests and a mixture of experts on a few GPUs, between which messages take long now and then."""
    rng, trace = np.random.default_rng(seed), random_trace(seed, 30)
    block = sparse(
        hidden=1024, columns=1024, experts=8, chosen=int(rng.integers(1, 3)), shared=int(rng.choice([0, 512]))
    )
    cluster = make_cluster(gpus, multiprocessors=int(rng.choice([132, 108])), price_per_h=2.0)
    slow = Link(bytes_per_s=float(rng.choice([4e9, 30e9, 450e9])), latency_s=1e-6, kind="pcie")
    settings = replace(
        SMALL,
        max_num_seqs=int(rng.integers(2, 24)),
        max_num_batched_tokens=int(rng.choice([64, 256, 1024])),
        async_scheduling=bool(rng.random() < 0.7),
        block_size=int(rng.choice([1, 16])),
        scheduler=VllmScheduling(idle_sleep_us=int(rng.choice([0, 1000]))),
    )
    if seed % 2:
        settings = replace(settings, scheduler=SglangScheduling(mixed_chunk=bool(rng.random() < 0.3)))
    slo = str(rng.choice(["ttft_p95<=40ms", "e2e<=9s@1%", "e2e<=9s@1%", "e2e<=9s@1%"]))
    aims = ["e2e_mean", "tpot_p99", "itl_p99", "ttft_p95", "makespan", "energy", "throughput"]
    return make_problem(
        make_model((block, int(rng.integers(2, 7)))),
        replace(cluster, intra=slow),
        trace,
        slo,
        objective=str(rng.choice(aims)),
        settings=settings,
        overhead=ENGINES[rng.integers(len(ENGINES))],
        overlaps=(None, SPLIT),
        expert_routing=str(rng.choice(["uniform", "skewed"])),
    )


def plans_of(problem: Problem) -> list[Plan]:
    """Every plan whose forwards are split, by plain Python."""
    return feasible_plans(replace(problem, overlaps=(SPLIT,)))


def check_bounds(seed: int) -> tuple[int, int]:
    """No plan is better by any figure than its bounds; how many there were, and forwards of theirs that were split."""
    problem, rng = question(seed), np.random.default_rng(seed)
    objective, *then = load_objectives(",".join(names()))
    problem = replace(problem, objective=objective, then=tuple(then))
    scorer, split, plans = Scorer(problem), 0, plans_of(problem)
    for place in rng.permutation(len(plans))[:4]:
        deployment = Deployment.of(plans[place])
        bounds, possible = scorer.bounds(deployment)
        outcome = scorer.run(deployment)
        assert outcome is not None
        (did,) = outcome.pools
        assert did.shared is not None
        split += int(did.shared.split_decode.sum() + did.shared.split_mixed.sum())
        scored = scorer.scored(deployment, outcome)
        for aim, least, cost in zip(problem.objectives, bounds, problem.costs(scored.metrics), strict=True):
            assert np.isnan(cost) or least <= cost + 1e-9 * abs(cost), (str(plans[place]), aim.name, least, cost)
        assert possible or not scored.meets_slos
    return min(len(plans), 4), split


@pytest.mark.parametrize("seeds", [range(24), pytest.param(range(24, 600), marks=pytest.mark.nightly)])
def test_no_plan_whose_forwards_are_split_beats_its_bounds(seeds: range) -> None:
    plans, split = map(sum, zip(*map(check_bounds, seeds), strict=True))
    assert plans >= 2 * len(seeds) and split > 20 * len(seeds)


@pytest.mark.parametrize("bytes_per_s", [6e9, 20e9, 40e9, 60e9])
def test_no_forward_in_two_halves_takes_less_than_the_floor_of_its_tokens(bytes_per_s: float) -> None:
    link = Link(bytes_per_s=bytes_per_s, latency_s=1e-6, kind="pcie")
    settings = replace(SMALL, max_num_seqs=64, max_num_batched_tokens=8192)
    quick = replace(OVERHEAD, step_s=1e-6, mixed_step_s=0.0)
    model, cluster = make_model((sparse(hidden=2048, columns=2048), 6)), replace(make_cluster(4), intra=link)
    problem = make_problem(model, cluster, random_trace(1), settings=settings, overhead=quick)
    facts = Scorer(problem).facts()
    floor, cost = facts.mean(PLAN), facts.plan_cost(PLAN)
    batches: list[list[tuple[int, int]]] = [[(1, 300)] * 48, [(900, 900)], [(1, 700)] * 20 + [(8000, 8000)]]
    for rows in batches:
        tokens = 4 * sum(count for count, _ in rows)
        took_ns = alike_ns(cost.laws[0], cost.ranks, 0, rows)
        assert max(floor.batch_ns, floor.token_ns * tokens) <= took_ns, (rows, floor, took_ns)


def check_search(seed: int) -> bool:
    """The search finds the best of all plans, and its ledger holds; whether that splits forwards."""
    problem = question(seed, 2)
    scorer, plans = Scorer(problem), plans_of(problem)
    if seed % 3 == 0:
        problem = replace(problem, overlaps=(SPLIT,))
    else:
        plans += feasible_plans(problem)
    every = [scorer.simulate(Deployment.of(plan)) for plan in plans]
    good = sorted((one for one in every if one.meets_slos), key=lambda one: rank(problem, one))
    answer = search(problem, SPACE, top=2)
    assert answer.status == ("optimal" if good else "infeasible")
    assert [one.text for one in answer.candidates[:2]] == [one.text for one in good[:2]]
    found = check(problem, answer, SPACE, programs)
    assert found.holds, found.disagreements
    return any("overlap=" in one.text for one in answer.candidates[:2])


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 120), marks=pytest.mark.nightly)])
def test_the_search_finds_the_best_with_overlap_among_the_choices(seeds: range) -> None:
    assert any([check_search(seed) for seed in seeds])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"attention": Template(tp=4)}, "the plan has one"),
        ({"ffn": Template(tp=4)}, "the plan has ffn(tp4)"),
        ({"ffn": Template(ep=2, tp=2)}, "the plan has ffn(tp2,ep2)"),
        ({"layers": (3, 3)}, "on one pipeline stage, the plan has 2"),
    ],
)
def test_only_forwards_whose_tokens_are_sent_to_experts_of_others_are_split(
    changes: dict[str, object], said: str | None
) -> None:
    problem = question(0, 8)
    problem = replace(problem, model=make_model((sparse(), 6)))
    found = [v.text for v in violations(problem.instance(), replace(PLAN, **changes)) if v.family == "engine"]
    assert (found == []) if said is None else any("overlap=two_batches" in text and said in text for text in found)


@pytest.mark.parametrize(("rules", "family", "runs"), [(VLLM, "other", True), (SGLANG, "other", False)])
def test_an_engine_splits_forwards_of_the_models_that_it_names(rules: object, family: str, runs: bool) -> None:
    for name, wanted in ((family, runs), ("deepseek_v3", True)):
        problem = make_problem(make_model((sparse(), 6), family=name), make_cluster(4), random_trace(1))
        settings = replace(problem.settings, runnable=rules)
        found = [v.text for v in violations(replace(problem.instance(), settings=settings), PLAN)]
        assert any("splits no forward" in text for text in found) != wanted


def test_no_rank_answers_more_sequences_than_the_kernels_of_the_engine_hold() -> None:
    for seats, dp, wanted in ((1024, 4, False), (4096, 4, False), (4100, 4, True), (8192, 8, False), (8192, 4, True)):
        settings = replace(SMALL, scheduler=SglangScheduling(), max_num_seqs=seats, max_num_batched_tokens=16384)
        model = make_model((sparse(experts=8), 6), family="deepseek_v3")
        problem = make_problem(model, make_cluster(8), random_trace(1), settings=settings)
        plan = replace(PLAN, attention=Template(dp=dp), ffn=Template(ep=dp))
        ruled = replace(problem.instance(), settings=replace(settings, runnable=SGLANG))
        found = [v.text for v in violations(ruled, plan) if "at most 1024 sequences of a rank" in v.text]
        assert bool(found) == wanted and all(f"--max_num_seqs={1024 * dp}" in text for text in found)


@pytest.mark.parametrize(("seats", "copies"), [(31, {2, 4, 8}), (32, {4, 8}), (63, {4, 8}), (64, {8}), (200, set())])
def test_the_program_leaves_out_plans_whose_ranks_would_answer_more(seats: int, copies: set[int]) -> None:
    cluster = make_cluster(8)
    cluster = replace(cluster, intra=replace(cluster.intra, kind="nvlink"))
    settings = replace(SMALL, scheduler=SglangScheduling(), max_num_seqs=seats)
    model = make_model((sparse(experts=8), 6), family="deepseek_v3")
    problem = make_problem(model, cluster, random_trace(1), settings=settings)
    rules = replace(SGLANG, split_seqs=15, split_formats=frozenset(FORMATS))
    ruled = replace(problem.instance(), settings=replace(settings, runnable=rules), overlap=SPLIT)
    assert {plan.attention.dp for plan in listed_alike(ruled).plans} == copies


def test_buffers_of_what_is_sent_take_memory_and_a_second_half_no_workspace() -> None:
    facts = Scorer(make_problem(make_model((sparse(), 6)), make_cluster(4), random_trace(1))).facts()
    (split,), (whole,) = facts.memory(PLAN), facts.memory(replace(PLAN, overlap=None))
    assert split.runtime_bytes == whole.runtime_bytes + 2 * GIB
    assert (split.workspace_bytes, split.weights_bytes) == (whole.workspace_bytes, whole.weights_bytes)
    assert split.kv_blocks < whole.kv_blocks
