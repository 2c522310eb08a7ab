"""Problems small enough that every deployment of them can be simulated, of every kind there is beside every other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, combinations, pairwise, product
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from plan_cases import (
    beside,
    dense,
    feasible_plans,
    make_cluster,
    make_model,
    make_problem,
    memory_need,
    random_problem,
    simulated,
    sparse,
)

from apex_opt.figures import load_objectives, parse_goals
from apex_opt.figures.registry import names
from apex_opt.oracle.checks import FAMILIES, OF_CUTS, violations
from apex_opt.oracle.space import space, tally
from apex_opt.plans.deployment import Deployment, Pool
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.search import Scorer, search
from apex_opt.search.dealing import dealt
from apex_opt.search.option import options_of
from apex_opt.search.search import silent
from apex_opt.search.shapes import Pipelines, Single, Together, mixed
from apex_opt.search.shapes.pipeline import Splits, joined, pipelines
from apex_opt.workload import make_trace
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.oracle.instance import Instance
    from apex_opt.oracle.space import Tally
    from apex_opt.search import Answer, Offer, Problem, Scored

SPACE: Final = PlanSpace()
GPUS: Final[dict[str, dict[str, Any]]] = {
    "quick": {},
    "slow": {"memory_bytes_per_s": 1.5e12, "flops_per_s": (("bf16", 300e12), ("fp8", 600e12)), "price_per_h": 1.1},
    "frugal": {"tdp_w": 300.0, "idle_w": 20.0, "memory_bytes_per_s": 2e12, "price_per_h": 0.9},
}
SHAPES: Final[dict[str, tuple[tuple[str, int], ...]]] = {
    "single": (("quick", 4),),
    "two": (("quick", 2), ("slow", 1)),
    "linked": (("frugal", 1), ("quick", 2)),
    "three": (("slow", 1), ("frugal", 1), ("quick", 1)),
}
"""GPUs of each type; pipelines span two types where these are linked, and so do those of three."""
FACTORS: Final[dict[str, tuple[Any, ...]]] = {
    "shape": tuple(SHAPES),
    "objective": ("ttft_p95", "goodput", "energy_per_token", "cost", "itl_p99", "makespan"),
    "then": (None, "e2e_mean", "tolerance"),
    "goals": ("none", "requests", "run"),
    "clocks": ((None,), (None, 1200)),
    "formats": (("bf16",), ("fp8", "bf16")),
    "closed": (False, True),
    "tight": (False, True),
    "spare": (0, 1),
    "top": (1, 3),
    "routing": ("round_robin", "least_loaded", "pull", "dynamo"),
    "experts": (False, True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A choice of every factor."""

    values: tuple[Any, ...]

    def __getitem__(self, name: str) -> Any:
        return self.values[list(FACTORS).index(name)]


def _covering() -> Iterator[Row]:
    """Rows in which every value of a factor is beside every value of every other, chosen greedily."""
    sizes = [len(values) for values in FACTORS.values()]
    open_ = {
        ((one, a), (other, b))
        for one, other in combinations(range(len(sizes)), 2)
        for a, b in product(range(sizes[one]), range(sizes[other]))
    }
    rng = np.random.default_rng(0)
    while open_:
        best: tuple[int, list[int]] = (0, [])
        for _ in range(60):
            ((one, a), (other, b)) = sorted(open_)[int(rng.integers(len(open_)))]
            row = [-1] * len(sizes)
            row[one], row[other] = a, b
            for place in rng.permutation(len(sizes)).tolist():
                if row[place] < 0:
                    gains = [_gain(open_, row, place, value) for value in range(sizes[place])]
                    row[place] = int(rng.choice(np.flatnonzero(np.array(gains) == max(gains))))
            gain = sum(pair in open_ for pair in combinations(enumerate(row), 2))
            best = max(best, (gain, row))
        open_ -= set(combinations(enumerate(best[1]), 2))
        yield Row(values=tuple(values[at] for values, at in zip(FACTORS.values(), best[1], strict=True)))


def _gain(open_: set[tuple[tuple[int, int], tuple[int, int]]], row: Sequence[int], place: int, value: int) -> int:
    """Pairs not yet covered that a value adds to a row."""
    mine = (place, value)
    others = ((other, at) for other, at in enumerate(row) if at >= 0)
    return sum(((mine, other) if mine < other else (other, mine)) in open_ for other in others)


ROWS: Final = tuple(_covering())


@cache
def problem_of(place: int) -> Problem:
    """The problem of a row of the covering array."""
    row, rng = ROWS[place], np.random.default_rng(place)
    block = sparse(hidden=1024, columns=1024) if row["experts"] else dense(hidden=1024, columns=4096)
    trace = make_trace(
        name="test",
        arrival_ns=np.cumsum(rng.exponential(float(rng.choice([3e5, 2e6, 2e7])), 24)).astype(np.int64),
        prompt=rng.integers(1, 700, 24),
        output=rng.integers(1, 40, 24),
        concurrency=int(rng.integers(2, 8)) if row["closed"] else None,
    )
    types = SHAPES[row["shape"]]
    link = make_cluster(1, 2).inter
    objectives = row["objective"] + ("~20%,e2e_p90" if row["then"] == "tolerance" else "")
    objective, *then = load_objectives(",".join(filter(None, (objectives, *_then(row["then"])))))
    problem = make_problem(
        make_model((block, 6)),
        [make_cluster(gpus, name=name, **GPUS[name]) for name, gpus in types],
        trace,
        objective=objective.name,
        then=tuple(then),
        request_slos=parse_goals("ttft_max<=20ms,tpot_max<=9ms"),
        weight_formats=row["formats"],
        kv_formats=("bf16",) * len(row["formats"]),
        clocks=row["clocks"],
        routing=row["routing"],
        between=link if row["shape"] in ("linked", "three") else None,
        max_devices=sum(gpus for _, gpus in types) - row["spare"],
    )
    problem = replace(problem, objective=objective)
    if row["tight"]:
        problem = replace(problem, offers=tuple(_tight(problem, offer) for offer in problem.offers))
    return problem if row["goals"] == "none" else replace(problem, slos=parse_goals(_goals(problem, row, rng)))


def _then(kind: str | None) -> tuple[str, ...]:
    return () if kind in (None, "tolerance") else (kind,)


def _tight(problem: Problem, offer: Offer) -> Offer:
    """GPUs that have little room to spare for half of the model, or for all of it in a format of half the size."""
    gpu, instance = offer.cluster.gpu, problem.alone(0).instance()
    plan = parse_plan("tp1 fp8 kv=bf16" if "fp8" in offer.weight_formats else "pp2", problem.model)
    stages = stage_memory(problem.model, gpu, plan, problem.settings_for(plan))
    need = max(memory_need(stage, instance.blocks_needed(plan) + 10) for stage in stages)
    return replace(offer, cluster=replace(offer.cluster, gpu=replace(gpu, memory_bytes=int(need / 0.9) + 1000)))


def _goals(problem: Problem, row: Row, rng: np.random.Generator) -> str:
    """Goals that some plans meet and some miss."""
    runs = [
        simulated(Scorer(alone, gaps=True), plans[int(rng.integers(len(plans)))])
        for alone in map(problem.alone, range(len(problem.offers)))
        if (plans := feasible_plans(alone))
    ]
    if not runs:
        return "makespan<=1s"
    metrics = runs[int(rng.integers(len(runs)))].metrics
    ttft, itl, tpot = (
        metrics.latency_s[name][statistic] for name, statistic in (("ttft", "p95"), ("itl", "p90"), ("tpot", "p50"))
    )
    if row["goals"] == "requests":
        return f"ttft_p95<={1.2 * ttft:.12f}s,itl<={1.1 * itl:.12f}s@90%,tpot<={1.3 * tpot:.12f}s@40%"
    return f"energy<={2 * metrics.value('energy'):.9f}J,makespan<={1.3 * metrics.value('makespan'):.12f}s"


def mixed_problem(seed: int) -> Problem:
    """A random problem on one GPU or two, and in half of them on those of another type."""
    one = random_problem(seed)
    gpus, memory = 1 + seed % 2, one.cluster.gpu.memory_bytes
    one = replace(one.offering(cluster=make_cluster(gpus, memory_bytes=memory)), max_devices=gpus)
    name = ("slow", "frugal")[seed // 2 % 2]
    other = make_cluster(1 + seed // 4 % 2, **GPUS[name] | {"memory_bytes": memory, "name": name})
    found = beside(one, other, between=make_cluster(1, 2).inter)
    return replace(found, max_devices=2) if seed % 5 == 4 else found


@cache
def answer_of(place: int) -> Answer:
    """What the search answers to the problem of a row."""
    return search(problem_of(place), SPACE, top=ROWS[place]["top"])


@cache
def every_of(place: int) -> tuple[Scored, ...]:
    """Every deployment of the problem of a row, simulated to its end."""
    return tuple(every(problem_of(place)))


def every(problem: Problem) -> list[Scored]:
    """Every deployment of a problem, simulated to its end."""
    scorer = Scorer(problem)
    return [scorer.simulate(deployment) for deployment in deployments(problem, scorer)]


def pools_of(problem: Problem) -> list[list[Pool]]:
    """Every feasible plan of each type of GPU, each type with all the GPUs that a deployment may take."""
    types = problem.types if problem.mixed else (None,)
    return [
        [Pool(plan=plan, gpu=name) for plan in feasible_plans(problem.alone(place))] for place, name in enumerate(types)
    ]


def deployments(problem: Problem, scorer: Scorer | None = None) -> Iterator[Deployment]:
    """Every deployment of a problem: on one type, on several side by side, and pipelines over two."""
    scorer = scorer or Scorer(problem)
    pools = pools_of(problem)
    sides = chain.from_iterable(combinations(pools, size) for size in range(1, len(pools) + 1))
    for side in sides:
        for some in product(*side):
            found = Deployment(pools=some)
            if found.devices <= problem.max_devices and (len(some) == 1 or served(scorer, found)):
                yield found
    yield from pipes(problem)


def shapes_of(problem: Problem) -> list[Single | Together | Pipelines]:
    """Every shape that deployments of a problem can have, none of whose deployments is too bad to look at."""
    scorer = Scorer(problem)
    singles = [Single(scorer.facts(name), SPACE, name if problem.mixed else None, silent) for name in problem.types]
    if not problem.mixed:
        return [*singles]
    options = [
        options_of(single.facts, [Pool(plan=plan, gpu=single.gpu) for plan in single.plans()], silent)
        for single in singles
    ]
    places = range(len(singles))
    fleets = [
        mixed(problem, [singles[i] for i in some], [options[i] for i in some], lambda bound, part: True, silent)
        for size in range(2, len(singles) + 1)
        for some in combinations(places, size)
    ]
    found = [
        Pipelines(scorer.facts(problem.types[one], problem.types[other]), SPACE, silent)
        for one, other in combinations(places, 2)
        if joined(problem, one, other) is not None
    ]
    return [*singles, *fleets, *found]


def pipes(problem: Problem) -> Iterator[Deployment]:
    """Every pipeline over two types of GPU, with its layers split."""
    for one, other in combinations(range(len(problem.offers)), 2):
        both = joined(problem, one, other)
        if both is None:
            continue
        splits = Splits(Scorer(problem).facts(*both.types), SPACE)
        for cut, counts in pipelines(both):
            for count in counts:
                plan = splits(cut.times(count))
                if plan is not None:
                    yield Deployment.of(plan)


def served(scorer: Scorer, deployment: Deployment) -> bool:
    """Whether the dealing leaves a request, and in a closed loop a client, for each pool."""
    pools, trace = deployment.pools, scorer.problem.trace
    weights = [scorer.weight(pool, scorer.facts_of(pool)) for pool in pools]
    owner = dealt(np.array([weights]), len(trace))[0]
    return set(owner.tolist()) == set(range(len(pools))) and (trace.concurrency or len(pools)) >= len(pools)


def rank(problem: Problem, scored: Scored) -> tuple[list[float], int, str]:
    """By the figures that each objective names, worked out from what the run took and what its requests saw."""
    metrics = scored.metrics
    prices = {offer.name: offer.cluster.gpu.price_per_h or 0.0 for offer in problem.offers}
    energy = sum(use.usage.energy_j for use in scored.pools)
    price = sum(
        prices[name] * stages * use.pool.plan.replicas * use.pool.plan.stage_devices
        for use in scored.pools
        for name, stages in use.pool.plan.on or ((use.pool.gpu or problem.types[0], use.pool.plan.stages),)
    )
    tokens = int(problem.trace.generated(problem.settings.max_model_len).sum())
    figures = {
        "makespan": metrics.value("makespan"),
        "throughput": -metrics.value("throughput"),
        "goodput": -np.nan_to_num(metrics.value("goodput")),
        "energy": energy,
        "energy_per_token": energy / tokens,
        "cost": price,
        "cost_per_mtoken": price * metrics.value("makespan") / 3600 / tokens * 1e6,
    }
    costs = []
    for name in (objective.name for objective in problem.objectives):
        metric, _, statistic = name.partition("_")
        cost = figures[name] if name in figures else metrics.latency_s[metric][statistic]
        costs.append(0.0 if np.isnan(cost) else cost)
    return costs, scored.devices, scored.text


def on_every_figure(problem: Problem) -> Problem:
    """The problem with every figure there is among its objectives."""
    objective, *then = load_objectives(",".join((*names(), "itl_p99.9", "ttft_p12.5")))
    return replace(problem, objective=objective, then=tuple(then))


def listed_alike(instance: Instance) -> Tally:
    """The program lists and counts plans without moved layers as plain Python does, and so by each family alone."""
    found, counted = SPACE.enumerate(instance), tally(instance)
    room = instance.max_devices
    assert {cut.times(n) for cut in found.plans for n in range(1, room // cut.devices + 1)} == set(counted.plans)
    assert found.movable == ()
    assert SPACE.count(instance, ()) == counted.space
    lost = [SPACE.count(instance, OF_CUTS[:place]) for place in range(len(OF_CUTS) + 1)]
    assert [a - b for a, b in pairwise(lost)] == [counted.infeasible[name] for name in OF_CUTS]
    kept = [plan for plan in space(instance) if plan.replicas == 1 and plan.even]
    for family in FAMILIES:
        alone = {plan for plan in kept if family not in {v.family for v in violations(instance, plan)}}
        assert set(SPACE.enumerate(instance, [family]).plans) == alone, family
    return counted
