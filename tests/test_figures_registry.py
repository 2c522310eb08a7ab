"""apex_opt.figures.registry: a figure is one entry, and one that claims to bound more than it does is caught."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cli_cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import dense, feasible_plans, make_cluster, make_model, make_problem, random_trace

from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.figures import Figure, Goal, load_objective, load_objectives, parse_goals
from apex_opt.figures.measure import can_hold, least_signed, statistic
from apex_opt.figures.registry import figure, figures, names, registered, split
from apex_opt.figures.run import Run
from apex_opt.figures.units import ENERGY, Unit
from apex_opt.search import Scorer, search
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.search import Problem, Scored

SPACE = PlanSpace()
STATISTICS = ("mean", "p37.5", "p95", "max")

POWER = Figure(
    name="power",
    help="W, in the mean over the run",
    unit=Unit(name="W", form="a number, in W", endings={"W": ENERGY.endings["J"]}, written=("W",)),
    value=lambda run: run.energy_j / run.makespan_s,
)
"""The energy over the makespan: it rises with one and falls with the other, so what no run can beat bounds none."""

RUSH = Figure(
    name="rush",
    help="output tokens/s, the fewer the better",
    unit=Unit(name="tokens/s", form="a number, in output tokens per second"),
    value=lambda run: run.output_tokens / run.makespan_s,
)
"""It falls with the makespan and less of it is better: what no run can beat is above what runs reach."""

WASTE = Figure(
    name="waste",
    help="Js, the energy times the makespan",
    unit=Unit(name="Js", form="a number, in joule seconds"),
    value=lambda run: run.energy_j * run.makespan_s,
    rises_with=("energy", "makespan"),
)
TOKENS = Figure(
    name="token_rate",
    help="output tokens/s",
    unit=Unit(name="tokens/s", form="a number, in output tokens per second"),
    better="more",
    value=lambda run: run.output_tokens / run.makespan_s,
    falls_with=("makespan",),
    stop=lambda limit, facts: facts.output_tokens / limit if limit > 0 else np.inf,
)
LENGTH = Figure(
    name="norm",
    help="time to last token, by token",
    unit=figure("e2e").unit,
    of="request",
    value=lambda run: run.whole_s / run.tokens,
    rises_with=("latency",),
)
NEW = (POWER, RUSH, WASTE, TOKENS, LENGTH)


def random_run(rng: np.random.Generator, k: int = 1, n: int = 6) -> Run:
    """Runs of some requests, with gaps that each stand for several."""
    tokens = rng.integers(1, 5, n)
    first, rest = (rng.integers(0, 4_000, (k, n)) * 1_000 for _ in range(2))
    rest[:, tokens == 1] = 0
    return Run.of(
        arrival_ns=np.sort(rng.integers(0, 9_000, n)) * 1_000,
        first_ns=first,
        rest_ns=rest,
        prompt=rng.integers(1, 9, n),
        tokens=tokens,
        outside_ns=int(rng.integers(0, 900)),
        gap_ns=rng.integers(0, 4_000, (k, 3)) * 1_000,
        gaps=np.broadcast_to(rng.multinomial(int((tokens - 1).sum()), [0.2, 0.3, 0.5]), (k, 3)),
        joules=rng.uniform(1, 90, k),
        cost_per_h=rng.uniform(1, 90, k),
        limits=parse_goals("ttft_max<=2ms,tpot_max<=1ms,e2e_p50<=4ms"),
    )


def grown(run: Run, quantities: Sequence[str], rng: np.random.Generator) -> Run:
    """A run with no less of some quantities and as much of the others."""

    def more(values: Any) -> Any:
        factors = rng.choice([0.0, 0.01, 1.0], values.shape) * rng.random(values.shape)
        return values + (values * factors).astype(values.dtype) + (values.dtype == np.int64) * rng.integers(0, 2)

    changes: dict[str, Any] = {}
    if "latency" in quantities:
        rest = np.where(run.several, more(run.rest_ns), 0)
        first = more(run.first_ns)
        changes |= {"first_ns": first, "rest_ns": rest, "whole_ns": np.maximum(first + rest, run.whole_ns)}
        changes["gap_ns"] = more(run.gap_ns)
    if "makespan" in quantities:
        changes["makespan_s"] = more(run.makespan_s)
    if "energy" in quantities:
        changes["joules"] = more(run.joules)
    if "price" in quantities:
        changes["cost_per_h"] = more(run.cost_per_h)
    return replace(run, **changes)


def values_of(entry: Figure, run: Run) -> list[float]:
    """Everything that goals and objectives are compared with."""
    if entry.of == "run":
        return [float(entry.value(run)[0])]
    return [float(statistic(run, entry, which)[0]) for which in STATISTICS]


def overclaims(entry: Figure, seeds: Sequence[int] = range(300)) -> str | None:
    """What a figure claims of its value that random runs disprove; None where it stands.

    Without any of a quantity that is not named it must stay as it is; with more of one that is named it must not move
    against what it says.
    """
    quantities = ("latency", "makespan", "energy", "price")
    if not entry.depends_on:
        return None
    for seed in seeds:
        rng = np.random.default_rng(seed)
        run = random_run(rng)
        for quantity in quantities:
            before, after = values_of(entry, run), values_of(entry, grown(run, (quantity,), rng))
            for old, new in zip(before, after, strict=True):
                slack = 1e-12 * abs(old)
                if quantity not in entry.depends_on and abs(new - old) > slack:
                    return f"moves with the {quantity}, which it does not name"
                if quantity not in entry.falls_with and new < old - slack:
                    return f"falls with the {quantity}"
                if quantity not in entry.rises_with and new > old + slack:
                    return f"rises with the {quantity}"
    return None


@pytest.mark.parametrize("entry", [*figures(), *NEW], ids=lambda entry: entry.name)
def test_what_a_figure_says_that_it_rises_and_falls_with_holds_on_random_runs(entry: Figure) -> None:
    assert overclaims(entry) is None


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (replace(POWER, rises_with=("energy",)), "moves with the makespan, which it does not name"),
        (replace(POWER, rises_with=("energy", "makespan")), "falls with the makespan"),
        (replace(RUSH, rises_with=("makespan",)), "falls with the makespan"),
        (replace(WASTE, rises_with=("energy",)), "moves with the makespan"),
        (replace(TOKENS, falls_with=(), rises_with=("makespan",)), "falls with the makespan"),
        (replace(figure("goodput"), falls_with=("makespan",)), "moves with the latency"),
        (replace(figure("cost"), rises_with=("energy",)), "moves with the price"),
        (replace(LENGTH, value=lambda run: run.whole_s - 2 * run.first_s), "falls with the latency"),
        (replace(LENGTH, value=lambda run: run.first_s * run.makespan_s[:, None]), "moves with the makespan"),
    ],
    ids=lambda part: part if isinstance(part, str) else part.name,
)
def test_a_figure_that_claims_too_much_is_caught(entry: Figure, message: str) -> None:
    assert message in (overclaims(entry) or "")


@pytest.mark.parametrize("entry", [*figures(), *NEW], ids=lambda entry: entry.name)
@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 20))
def test_bounds_from_what_runs_cannot_beat_are_none_too_high_for_any_of_k(entry: Figure, seed: int) -> None:
    """With less of everything in each of k floors, no run costs less than its bound nor meets what cannot hold."""
    rng = np.random.default_rng(seed)
    floors = random_run(rng, k=4)
    runs = grown(floors, ("latency", "makespan", "energy", "price"), rng)
    for which in STATISTICS if entry.of != "run" else ("mean",):
        if entry.name not in {one.name for one in figures()}:
            with registered(entry):
                check_bounds(entry, which, floors, runs)
        else:
            check_bounds(entry, which, floors, runs)


def check_bounds(entry: Figure, which: str, floors: Run, runs: Run) -> None:
    name = entry.name if entry.of == "run" else f"{entry.name}_{which}"
    objective = load_objective(name)
    bounds, reached = least_signed(objective, floors), statistic(runs, entry, which)
    assert bounds.shape == reached.shape == (4,)
    signed = np.array([objective.signed(float(value)) for value in reached])
    assert (bounds <= signed).all(), (bounds, signed)
    for limit in np.unique(reached[reached > 0]):
        goal = Goal(metric=entry.name, statistic=which, limit=float(limit))
        met = np.array([goal.met(float(value)) for value in reached])
        assert (can_hold(goal, floors) | ~met).all()
        if entry.of != "run":
            goal = Goal(metric=entry.name, statistic="attain", limit=float(limit), fraction=0.6)
            met = statistic(runs, entry, "attain", float(limit)) >= 0.6
            assert (can_hold(goal, floors) | ~met).all()


def test_k_runs_at_once_have_the_figures_that_they_have_one_by_one() -> None:
    rng = np.random.default_rng(7)
    runs = random_run(rng, k=5)
    fields = ("first_ns", "rest_ns", "whole_ns", "makespan_s", "gap_ns", "gaps", "joules", "cost_per_h")
    for row in range(5):
        alone = replace(runs, **{name: getattr(runs, name)[row : row + 1] for name in fields})
        for entry in (*figures(), *NEW):
            for which in STATISTICS if entry.of != "run" else ("mean",):
                together = statistic(runs, entry, which)[row]
                assert together == pytest.approx(statistic(alone, entry, which)[0], rel=1e-12)


def test_plans_that_have_their_requests_in_common_have_a_bound_each() -> None:
    """As those that differ in their number of replicas have: the makespan and the load are their own."""
    alone = replace(random_run(np.random.default_rng(4)), joules=None, cost_per_h=None)
    makespan_s, least_s = np.array([1.0, 2.0, 3.0]), np.array([0.0, 1e9, 0.0])
    several = alone.loaded(makespan_s, {"first": {"mean": least_s}}).costing(np.full(3, 7.0), np.arange(3.0))
    for entry in figures():
        assert statistic(several, entry, "mean").shape == (3,)
        assert least_signed(
            load_objective(f"{entry.name}_mean" if entry.of != "run" else entry.name), several
        ).shape == (3,)
    assert can_hold(parse_goals("ttft_mean<=1min")[0], several).tolist() == [True, False, True]
    assert statistic(several, figure("throughput"), "mean").tolist() == [6.0, 3.0, 2.0]
    assert statistic(several, figure("e2e"), "max").tolist() == [float(alone.whole_s.max())] * 3


def test_a_figure_that_says_nothing_rules_nothing_out() -> None:
    floors = random_run(np.random.default_rng(1), k=3)
    with registered(POWER):
        assert not POWER.bounded and POWER.of_gpus
        assert least_signed(load_objective("power"), floors).tolist() == [-np.inf] * 3
        assert can_hold(parse_goals("power<=1e-9W")[0], floors).all()


def test_every_figure_of_a_run_by_hand() -> None:
    """Two requests in a makespan of 4 s: one within its limits, 2 + 6 tokens, 24 J, 18 $/h."""
    run = Run.of(
        arrival_ns=np.array([0, 1_000_000_000]),
        first_ns=np.array([[500_000_000, 1_000_000_000]]),
        rest_ns=np.array([[1_000_000_000, 2_000_000_000]]),
        prompt=np.array([10, 20]),
        tokens=np.array([2, 6]),
        joules=np.array([24.0]),
        cost_per_h=np.array([18.0]),
        limits=parse_goals("ttft_max<=600ms"),
    )
    expected = {
        "ttft": [0.5, 1.0],
        "tpot": [1.0, 0.4],
        "e2e": [1.5, 3.0],
        "makespan": 4.0,
        "throughput": 0.5,
        "goodput": 0.25,
        "energy": 24.0,
        "energy_per_token": 3.0,
        "cost": 18.0,
        "cost_per_mtoken": 18.0 * 4 / 3600 / 8 * 1e6,
    }
    assert {entry.name for entry in figures()} == {*expected, "itl"}
    for name, value in expected.items():
        assert figure(name).value(run)[0] == pytest.approx(value), name
    assert figure("itl").value(run).shape == (1, 0)


def test_a_new_figure_is_known_by_its_name_for_as_long_as_it_is_registered() -> None:
    with registered(TOKENS), registered(LENGTH):
        assert names()[-1] == "token_rate" and "norm_p95" in names()
        (rate, length) = parse_goals("token_rate>=12.5,norm_p95<=20ms")
        assert (rate.text, rate.at_most) == ("token_rate>=12.5", False)
        assert (length.text, length.of_requests) == ("norm_p95<=20ms", True)
        assert parse_goals("norm<=1s@90%")[0].fraction == 0.9
        found = load_objectives("token_rate~2%,norm_p99.9")
        assert [(one.metric, one.statistic, one.unit) for one in found] == [
            ("token_rate", "mean", "tokens/s"),
            ("norm", "p99.9", "s"),
        ]
        with pytest.raises(UsageError, match="SLO 'token_rate<=3': token_rate takes >="):
            parse_goals("token_rate<=3")
    for taken in ("ttft", "ttft_fast", "energy"):
        with pytest.raises(UsageError, match="the name is taken"), registered(replace(TOKENS, name=taken)):
            pass
    with pytest.raises(UnknownNameError, match="unknown objective 'token_rate'"):
        load_objective("token_rate")
    assert split("makespan_p95") == ("makespan_p95", "")


def objectives_of(entry: Figure) -> tuple[str, ...]:
    return (entry.name,) if entry.of == "run" else (f"{entry.name}_p90", f"{entry.name}_mean")


SLOW = {"name": "slow", "memory_bytes_per_s": 1.2e12, "flops_per_s": (("bf16", 200e12), ("fp16", 200e12))}


def problem_of(entry: Figure, *, mixed: bool) -> Problem:
    """Asked for a new figure on four GPUs of one type, or on two and a slower one, over which pipelines may lie."""
    first, *then = (load_objective(name) for name in objectives_of(entry))
    clusters = (make_cluster(2), make_cluster(1, **SLOW)) if mixed else (make_cluster(4),)
    trace = random_trace(5 if mixed else 3, 16 if mixed else 30)
    between = make_cluster(1, 2).inter if mixed else None
    model = make_model((dense(), 4))
    return make_problem(model, clusters, trace, objective=first.name, then=tuple(then), between=between)


@pytest.mark.parametrize("mixed", [False, True], ids=["one type", "two types"])
@pytest.mark.parametrize("entry", NEW, ids=lambda entry: entry.name)
def test_a_new_figure_is_bounded_and_finds_what_brute_force_finds(entry: Figure, mixed: bool) -> None:
    """On single plans, fleets and pipelines over two types, as objective and as goal.

    An unknown figure was once bounded on mixed clusters as energy per token, of which no bound was one.
    """
    with registered(entry):
        problem = problem_of(entry, mixed=mixed)
        everything = search(problem, SPACE, top=1 << 20).candidates
        kinds = {(len(one.pools), bool(one.pools[0].pool.plan.on)) for one in everything}
        assert kinds == ({(1, False), (2, False), (1, True)} if mixed else {(1, False)})
        scorer = Scorer(problem)
        runs = [scorer.simulate(one.deployment) for one in everything]
        for one, run in zip(everything, runs, strict=True):
            costs = problem.costs(run.metrics)
            assert one.bound is not None and one.bound <= costs[0], (one.text, one.bound, costs)
            if len(one.pools) == 1:
                bounds, possible = scorer.bounds(one.deployment)
                assert possible
                assert all(bound <= cost for bound, cost in zip(bounds, costs, strict=True)), (one.text, bounds, costs)
        if not mixed:
            assert {one.plan for one in everything} == set(feasible_plans(problem))
        check_best(problem, runs)
        # As a goal in the middle of what is reached, beside the time of a request as objective.
        metric, which = split(objectives_of(entry)[0])
        value = float(np.median([run.metrics.value(metric, which) for run in runs]))
        goal = Goal(metric=metric, statistic=which, limit=value)
        limited = replace(problem, slos=(goal,), objective=load_objective("e2e_mean"), then=())
        scorer = Scorer(limited, like=scorer)
        check_best(limited, [scorer.simulate(one.deployment) for one in everything])


def check_best(problem: Problem, runs: Sequence[Scored]) -> None:
    good = [run for run in runs if run.meets_slos]
    assert len(good) > 0
    best = min(good, key=lambda run: (problem.costs(run.metrics), run.devices, run.text))
    found = search(problem, SPACE)
    assert found.status == "optimal" and found.best is not None
    assert (found.best.text, found.best.value) == (best.text, best.value)


@pytest.mark.parametrize("cluster", ["2xh100-sxm", "1xh100-sxm+1xl40s"])
def test_the_command_line_takes_a_new_figure_as_objective_and_as_goal_and_tells_of_it(cluster: str) -> None:
    where = ("--model=llama-3.1-8b", f"--cluster={cluster}", "--trace=poisson:rate=9,n=30,prompt=256,output=16")

    def answer(*words: str) -> dict[str, Any]:
        ran = cli_cases.run("plan", *where, *words, "--format=json")
        assert ran.code == 0, ran.err
        found: dict[str, Any] = json.loads(ran.out)
        return found

    with registered(TOKENS), registered(LENGTH):
        best = answer("--objective=token_rate,norm_p95", "--top=3")
        reached = [one["metrics"]["token_rate"] for one in best["candidates"]]
        assert reached == sorted(reached, reverse=True)
        assert best["objective"]["unit"] == "tokens/s" and best["best"]["value"] == reached[0]
        assert best["best"]["then"] == [best["best"]["metrics"]["norm"]["p95"]]
        limited = answer("--objective=cost", f"--slo=token_rate>={reached[0] * 0.999:.6f},norm_p50<=9s")
        assert all(goal["met"] for goal in limited["best"]["metrics"]["slo"].values())
        page = cli_cases.run("plan", *where, "--objective=token_rate", "--slo=norm_p95<=9s").out
        assert "token_rate = " in page and " tokens/s" in page and "norm_p95<=9s: met" in page
        missed = cli_cases.run("plan", *where, f"--slo=token_rate>={reached[0] * 9:.6f}")
        assert missed.code == 3 and "tokens/s" in missed.out
