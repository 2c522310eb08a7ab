"""The plan space as a program agrees with counting every plan and asking the oracle about each."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from drafts_cases import knowing
from ortools.sat.python import cp_model
from plan_cases import SMALL, dense, instance_at, latent, make_cluster, make_model, random_instance, sparse, ungated

import apex_opt
from apex_opt.engines import SGLANG, VLLM
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import UsageError
from apex_opt.ir import load_model
from apex_opt.oracle.checks import FAMILIES, violations
from apex_opt.oracle.instance import Instance
from apex_opt.oracle.layers import moved
from apex_opt.oracle.space import space
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import Plan, Template, even_split, parse_plan
from apex_opt.plans.speculation import Drafter
from formulations.plan_space import PlanSpace
from formulations.plan_space.sizes import expert_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.ir import Model
    from apex_opt.search.space import Enumeration

SEEDS = range(40)
SPACE = PlanSpace()
CASES = Path(__file__).parent / "cases" / "models"


@functools.lru_cache
def brute_force(seed: int) -> dict[Plan, frozenset[str]]:
    """Every plan of a random problem with the families it breaks, layers even."""
    instance = random_instance(seed)
    plans = [plan for plan in space(instance) if plan.even]
    return {plan: frozenset(v.family for v in violations(instance, plan)) for plan in plans}


@functools.lru_cache
def enumerated(seed: int) -> Enumeration:
    """What the program finds of a random problem."""
    return SPACE.enumerate(random_instance(seed))


@functools.lru_cache
def clash(seed: int) -> tuple[str, ...]:
    """Which families of a random problem leave no plan."""
    return SPACE.clash(random_instance(seed))


@functools.lru_cache
def movable(seed: int) -> dict[Plan, tuple[tuple[int, ...] | None, frozenset[str]]]:
    """Plans of several stages, the layers they should have, and the families they then break."""
    instance = random_instance(seed)
    found = {}
    for plan, faults in brute_force(seed).items():
        if plan.stages > 1:
            layers = moved(instance, plan)
            found[plan] = layers, faults - {"memory"} | ({"memory"} if layers is None else set())
    return found


def single(found: Mapping[Plan, Any]) -> list[tuple[Plan, Any]]:
    """Plans of one replica, with what was found of each."""
    return [(plan, faults) for plan, faults in found.items() if plan.replicas == 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_feasible_plans_are_those_the_oracle_lets_through_in_order_and_once(seed: int) -> None:
    found = enumerated(seed)
    assert found.complete
    # Further replicas break no constraint but the number of GPUs.
    assert set(found.plans) == {plan for plan, faults in single(brute_force(seed)) if not faults}
    assert set(found.movable) == {plan for plan, (_, faults) in single(movable(seed)) if not faults}
    room = random_instance(seed).max_devices
    several = {cut.times(count) for cut in found.plans for count in range(1, room // cut.devices + 1)}
    assert several == {plan for plan, faults in brute_force(seed).items() if not faults}
    for plans in (found.plans, found.movable):
        assert len(set(plans)) == len(plans)
        sizes = [(plan.devices, plan.replicas, plan.stages, plan.attention, plan.ffn) for plan in plans]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("seed", SEEDS)
def test_layers_are_moved_to_where_trying_every_split_puts_them(seed: int) -> None:
    instance = random_instance(seed)
    for plan in enumerated(seed).movable:
        layers, _ = movable(seed)[plan]
        assert layers is not None
        assert SPACE.moved(instance, plan) == (None if layers == plan.layers else replace(plan, layers=layers))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_family_alone_keeps_out_what_breaks_it(seed: int) -> None:
    instance = random_instance(seed)
    for family in FAMILIES[seed % 2 :: 2]:
        found = SPACE.enumerate(instance, [family])
        assert set(found.plans) == {plan for plan, faults in single(brute_force(seed)) if family not in faults}, family


def test_every_family_both_lets_through_and_keeps_out_in_many_of_these_problems() -> None:
    for family in FAMILIES:
        cuts = [[family in faults for faults in brute_force(seed).values()] for seed in SEEDS]
        assert sum(any(cut) and not all(cut) for cut in cuts) >= 5, family


@pytest.mark.parametrize("seed", SEEDS)
def test_counting_without_listing_gives_the_number_of_plans_of_any_families_it_knows(seed: int) -> None:
    instance = random_instance(seed)
    known = ("divisibility", "format", "engine", "balance")
    every = [*brute_force(seed).values(), *(faults for _, faults in movable(seed).values())]
    for size in range(len(known) + 1):
        for families in itertools.combinations(known, size):
            assert SPACE.count(instance, families) == sum(not faults & set(families) for faults in every), families


def allowed(instance: Instance, plan: Plan, families: list[str]) -> bool:
    """Whether the program of some families has a solution with every choice pinned to a plan."""
    model, variables = SPACE.build(instance, families)
    variables.fix(model, plan, instance)
    assert not model.validate()
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    assert status in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.INFEASIBLE)
    return status != cp_model.INFEASIBLE


DENSE = make_model((dense(heads=12, kv=4), 12))
SPARSE = make_model((sparse(experts=6, shared=768), 5))
MIXED = make_model((dense(), 3), (sparse(), 6), tied=True)
MIDDLE = make_model((dense(), 2), (sparse(experts=64), 2), (dense(), 2))
LATENT = make_model((latent(dense(heads=12)), 2), (latent(sparse(heads=12, experts=6, shared=768)), 4))
WINDOWS = make_model(*[(dense(heads=12, window=window), 1) for window in (128, None) * 3])


@pytest.mark.parametrize(
    ("family", "model", "text", "limits", "yes"),
    [
        ("divisibility", DENSE, "attn(tp4) ffn(tp4)", {}, True),
        ("divisibility", DENSE, "attn(tp12) ffn(tp12)", {}, True),  # KV heads three times
        ("divisibility", DENSE, "attn(tp3) ffn(tp3)", {}, False),
        ("divisibility", DENSE, "attn(dp5) ffn(tp5)", {}, False),
        ("divisibility", SPARSE, "attn(dp6) ffn(ep6)", {}, True),
        ("divisibility", SPARSE, "attn(dp4) ffn(ep4)", {}, False),
        ("divisibility", MIXED, "attn(tp4) ffn(tp2,ep2)", {}, True),
        ("divisibility", LATENT, "attn(tp12) ffn(tp12)", {}, True),  # the latent cache is copied
        ("divisibility", LATENT, "attn(dp4) ffn(tp4)", {}, True),
        ("divisibility", LATENT, "attn(tp8) ffn(tp8)", {}, False),
        ("format", DENSE, "tp4 nvfp4", {"formats": (("nvfp4", "bf16"),)}, True),  # expanded to 16 bit
        ("format", DENSE, "tp4 w8a8", {"formats": (("w8a8", "bf16"),)}, False),
        ("format", DENSE, "tp4 nvfp4", {"formats": (("nvfp4", "bf16"),), "flops": ("bf16", "fp4")}, True),
        ("format", DENSE, "tp4 mxfp4", {"formats": (("mxfp4", "bf16"),), "flops": ("fp16",)}, True),
        ("format", DENSE, "tp4 fp8 kv=fp8", {"formats": (("fp8", "fp8"),)}, True),
        ("format", DENSE, "tp4 fp8 kv=fp8", {"formats": (("fp8", "fp8"),), "flops": ("fp16",)}, True),
        ("format", DENSE, "tp4 w8a16", {"formats": (("w8a16", "bf16"),), "flops": ("fp16",)}, True),
        ("balance", make_model((dense(), 4)), "pp3", {}, True),  # on the line
        ("balance", make_model((dense(), 5)), "pp4", {}, False),
        ("memory", DENSE, "pp2 tp4", {"memory": 0}, True),
        ("memory", DENSE, "pp2 tp4", {"memory": -1}, False),
        ("memory", MIXED, "tp4", {"memory": 0}, True),
        ("memory", MIXED, "tp4", {"memory": -1}, False),
        ("memory", MIXED, "pp3 attn(dp2,tp2) ffn(ep4)", {"memory": 0}, True),
        ("memory", MIXED, "pp3 attn(dp2,tp2) ffn(ep4)", {"memory": -1}, False),
        (
            "memory",
            MIDDLE,
            "pp3 tp4",
            {"memory": 0},
            True,
        ),  # the heavy layers are neither on the first stage nor the last
        ("memory", MIDDLE, "pp3 tp4", {"memory": -1}, False),
        ("memory", LATENT, "pp2 attn(tp6) ffn(ep6)", {"memory": 0}, True),
        ("memory", LATENT, "pp2 attn(tp6) ffn(ep6)", {"memory": -1}, False),
        ("memory", WINDOWS, "pp3 tp4", {"memory": 0}, True),
        ("memory", WINDOWS, "pp3 tp4", {"memory": -1}, False),
        ("bandwidth", LATENT, "attn(tp6) ffn(ep6)", {"tpot": 0}, True),
        ("bandwidth", LATENT, "attn(tp6) ffn(ep6)", {"tpot": -1}, False),
        ("memory", SPARSE, "attn(dp6) ffn(ep6)", {"memory": 0}, True),
        ("memory", SPARSE, "attn(dp6) ffn(ep6)", {"memory": -1}, False),
        ("bandwidth", SPARSE, "attn(dp6) ffn(ep6)", {"tpot": 0}, True),
        ("bandwidth", SPARSE, "attn(dp6) ffn(ep6)", {"tpot": -1}, False),
        ("bandwidth", MIXED, "pp2 tp4", {"tpot": 0}, True),
        ("bandwidth", MIXED, "pp2 tp4", {"tpot": -1}, False),
    ],
)
def test_a_plan_pinned_is_allowed_up_to_the_line_and_no_further(
    family: str, model: Model, text: str, limits: dict[str, Any], yes: bool
) -> None:
    plan = parse_plan(text, model)
    instance = instance_at(model, plan, 12, **limits)
    assert allowed(instance, plan, [family]) is yes
    assert (family in {v.family for v in violations(instance, plan)}) is not yes
    # No other family stands in the way.
    assert allowed(instance, plan, [name for name in FAMILIES if name != family])


def test_layers_that_alternate_make_no_more_of_a_program_the_more_they_are() -> None:
    twice = make_model(*[(dense(heads=12, window=window), 1) for window in (128, None) * 6])
    sizes = [len(SPACE.build(instance_at(model, None, 6))[0].proto.variables) for model in (WINDOWS, twice)]
    assert sizes[0] == sizes[1]


def test_a_plan_over_more_gpus_than_offered_is_not_in_the_program() -> None:
    plan = parse_plan("dp3 tp4", DENSE)
    assert allowed(instance_at(DENSE, plan, 12), plan, [])
    assert not allowed(instance_at(DENSE, plan, 11), plan, [])


def test_a_plan_the_program_has_no_choice_for_cannot_be_pinned() -> None:
    instance = instance_at(DENSE, None, 8)
    model, variables = SPACE.build(instance)
    with pytest.raises(UsageError, match="formats are not among"):
        variables.fix(model, parse_plan("tp4 fp8", DENSE), instance)
    with pytest.raises(UsageError, match="splits layers evenly"):
        variables.fix(model, parse_plan("pp2[7,5] tp4", DENSE), instance)
    with pytest.raises(UsageError, match="limits of a batch are not among"):
        variables.fix(model, parse_plan("tp4 seqs=8", DENSE), instance)


def test_common_copies_of_both_cells_are_no_plans_of_their_own() -> None:
    plan = parse_plan("attn(dp2,tp2) ffn(dp2,tp2)", DENSE)
    instance = instance_at(DENSE, plan, 8)
    assert not allowed(instance, plan, [])
    assert allowed(instance, canonical(plan), [])
    assert violations(instance, plan) == ()


def test_moved_layers_and_limits_of_a_batch_occur_among_the_plans_of_these_problems() -> None:
    splits = [(plan, layers) for seed in SEEDS for plan, (layers, faults) in movable(seed).items() if not faults]
    assert sum(layers != plan.layers for plan, layers in splits) >= 50
    # Some fit only so.
    assert sum("memory" in brute_force(seed)[p] for seed in SEEDS for p, (_, lost) in movable(seed).items() if not lost)
    plans = [plan for seed in SEEDS for plan in enumerated(seed).plans]
    assert len({(plan.max_num_seqs, plan.max_num_batched_tokens) for plan in plans}) == 4


def powers(product: int, ways: int) -> list[tuple[int, ...]]:
    """Ways to write a power of two as a product of powers of two."""
    options = [2**i for i in range(product.bit_length())]
    return [cut for cut in itertools.product(options, repeat=ways) if functools.reduce(int.__mul__, cut) == product]


def canonical(plan: Plan) -> Plan:
    """A plan whose common copies of both cells are replicas."""
    common = math.gcd(plan.attention.dp, plan.ffn.dp)
    attention, ffn = (replace(cell, dp=cell.dp // common) for cell in (plan.attention, plan.ffn))
    return replace(plan, replicas=plan.replicas * common, attention=attention, ffn=ffn)


@pytest.mark.parametrize("name", ["llama-3.1-70b", "mixtral-8x22b"])
def test_every_plan_that_apex_plus_would_generate_on_eight_gpus_is_in_the_space(name: str) -> None:
    model = load_model(name)
    found = set(
        SPACE.enumerate(
            Instance(
                model=model,
                cluster=make_cluster(8, memory_bytes=1 << 40),
                settings=EngineSettings(),
                longest_tokens=4096,
                weight_formats=("bf16",),
                kv_formats=("bf16",),
                max_devices=8,
            )
        ).plans
    )
    wanted = []
    for replicas, stages, devices in powers(8, 3):
        cuts = [Template(dp=dp, tp=tp) for dp, tp in powers(devices, 2)]
        experts = [Template(dp=dp, ep=ep) for dp, ep in powers(devices, 2)] if model.is_moe else []
        wanted += [
            Plan(
                replicas=replicas,
                layers=even_split(model.layers, stages),
                attention=attention,
                ffn=ffn,
                weight_format="bf16",
                kv_format="bf16",
            )
            for attention in cuts
            for ffn in {*cuts, *experts}
        ]
    # Copies that both cells have are replicas.
    wanted = [canonical(plan) for plan in wanted]
    assert len(set(wanted)) >= 30
    assert {plan.times(1) for plan in wanted} <= found


@pytest.mark.parametrize(("gates", "room"), [(False, 1), (True, 0)])
def test_the_program_holds_experts_without_a_gate_with_room_for_one_as_the_oracle_does(gates: bool, room: int) -> None:
    """Memory is as the oracle has it, to the byte: a program that counts less lets through what does not fit."""
    model = make_model((sparse(shared=64), 2))
    model, settings = model if gates else ungated(model), replace(SMALL, runnable=VLLM)
    plan = parse_plan("tp2 fp8", model)
    for more, fits in ((-1, False), (0, True)):
        instance = instance_at(model, plan, 2, memory=more, formats=[("fp8", "bf16")], settings=settings)
        assert (plan in SPACE.enumerate(instance).plans) is fits
    (block,) = model.blocks
    held = [replace(instance, settings=replace(settings, runnable=rules)) for rules in (VLLM, SGLANG)]
    sizes = [expert_bytes(one, block, 2, 1, "fp8", touched=False) for one in held]
    assert sizes[0] - sizes[1] == room * 8 * 512 * 768 // 2


def test_drafts_over_attention_copies_are_in_the_space_where_the_engine_makes_them() -> None:
    ways = (None, Drafter(method="ngram", draft_tokens=2), Drafter(method="mtp", draft_tokens=2))
    settings = knowing(replace(SMALL, scheduler=SglangScheduling(), runnable=SGLANG), ways, 0)
    model = make_model((sparse(heads=4, kv=4, experts=4), 1), family="qwen3_moe")
    instance = replace(instance_at(model, None, 4), drafters=ways, settings=settings)
    found = SPACE.enumerate(instance)
    oracle = {plan for plan in space(instance) if plan.even and plan.replicas == 1 and not violations(instance, plan)}
    assert set(found.plans) == oracle
    drafting = {plan.speculation.method for plan in found.plans if plan.speculation and plan.attention.dp > 1}
    assert drafting == {"mtp"}
    every = [plan for plan in space(instance) if not any(v.family == "engine" for v in violations(instance, plan))]
    assert SPACE.count(instance, ["engine"]) == len(every)


def test_an_enumeration_that_runs_out_of_time_says_that_it_is_not_complete() -> None:
    found = SPACE.enumerate(instance_at(SPARSE, None, 64), time_limit_s=0.01)
    assert not found.complete


def test_an_impossible_problem_has_no_plans_and_that_is_complete() -> None:
    plan = parse_plan("tp8", make_model((dense(heads=8, kv=8, columns=4096), 8)))
    instance = instance_at(make_model((dense(heads=8, kv=8, columns=4096), 8)), plan, 8, memory=-(10**9))
    found = SPACE.enumerate(instance)
    assert (found.plans, found.complete) == ((), True)


# ---- which families clash ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_a_clash_is_the_first_of_the_smallest_sets_that_brute_force_leaves_without_a_plan(seed: int) -> None:
    faults = {*brute_force(seed).values(), *(broken for layers, broken in movable(seed).values() if layers is not None)}
    instance = random_instance(seed)
    # Every fifth of the sets of two, three or four families, which over all seeds are each in turn.
    for families in (
        FAMILIES,
        *itertools.islice(itertools.combinations(FAMILIES, 2 + seed % 3), seed // 3 % 5, None, 5),
    ):
        subsets = (itertools.combinations(families, size) for size in range(1, len(families) + 1))
        every = itertools.chain.from_iterable(subsets)
        smallest = next((names for names in every if all(broken & set(names) for broken in faults)), ())
        found = clash(seed) if families is FAMILIES else SPACE.clash(instance, families)
        assert found == smallest


def test_what_fits_with_moved_layers_alone_does_not_clash_in_memory() -> None:
    shape = {"hidden": 576, "heads": 9, "kv": 9}  # which two GPUs do not divide
    model = make_model((dense(**shape, columns=6145), 10), (dense(**shape, columns=1537), 30))
    uneven = next(plan for plan in space(instance_at(model, None, 2)) if not plan.even)
    tight = instance_at(model, uneven, 2, memory=0)
    assert {plan for plan in space(tight) if not violations(tight, plan)} == {uneven}
    assert SPACE.clash(tight) == ()
    timed = replace(tight, tpot_limit_ns=1)
    assert SPACE.clash(timed, ("memory", "bandwidth")) == ("bandwidth",)
    assert SPACE.clash(timed, ("divisibility", "format", "balance", "memory")) == ()


def test_these_problems_clash_over_one_family_and_over_several() -> None:
    cores = {clash(seed) for seed in SEEDS}
    assert {len(core) for core in cores} >= {0, 1, 2}
    assert {name for core in cores for name in core} >= {"divisibility", "format", "memory", "bandwidth"}


@pytest.mark.parametrize("seed", range(0, 72, 9))
def test_the_diagnosis_has_the_plans_of_the_families_whose_literals_are_true(seed: int) -> None:
    instance = random_instance(seed)
    for families in ((), ("divisibility", "memory"), FAMILIES):
        model, literals, _ = SPACE.diagnosis(instance)
        for name, literal in literals.items():
            model.add(literal == (name in families))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        left = any(not broken & set(families) for broken in brute_force(seed).values())
        assert (solver.solve(model) != cp_model.INFEASIBLE) is left


def test_the_solver_loses_no_plan_of_layers_that_share_blocks() -> None:
    """Products with domains far beyond what they can be had presolve of CP-SAT 9.15 lose four plans of these eight."""
    model = str(CASES / "nemotron-3-nano-30b-a3b.json")
    answer = apex_opt.plan(model=model, cluster="2xh100-sxm", trace="poisson:rate=8,n=6,prompt=400,output=6")
    infeasible = answer.to_dict()["certificate"]["infeasible"]
    assert {name: count for name, count in infeasible.items() if count} == {"engine": 1}
