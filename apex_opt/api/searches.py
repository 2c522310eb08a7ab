"""Searches: plan, energy, pareto, explain and capacity, and studies of them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from apex_opt import arguments
from apex_opt.api.answers import details_by_rate, details_of, document_of, launch_of, traffic_of
from apex_opt.api.programs import formulation
from apex_opt.arguments import LARGEST_SEARCH
from apex_opt.commands import Result, command
from apex_opt.errors import UsageError
from apex_opt.files import expanded
from apex_opt.gate import Arguments
from apex_opt.schema import differences, to_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from apex_opt.arguments import PlanAsk, SpreadAsk
    from apex_opt.gate import Progress
    from apex_opt.report.types import Document, Robust
    from apex_opt.search import Answer, Problem, Scorer
    from apex_opt.search.spread import Crew, Workers
    from apex_opt.studies.capacity_answer import Capacity
    from apex_opt.studies.check import Check
    from apex_opt.studies.steady import Steady
    from apex_opt.studies.trials import Trials

A = TypeVar("A", bound=Arguments)

_TOLD: Final = 20
"""Places told in which a document is not as it was answered."""


@command(arguments.PlanAsk)
def plan(ask: arguments.PlanAsk) -> Result:
    """Find the plan that serves a trace best, and prove it."""
    return _on_clusters("plan", ask, _best)


@command(arguments.EnergyAsk)
def energy(ask: arguments.EnergyAsk) -> Result:
    """Find the plan that needs the least energy within the goals."""
    return _on_clusters("energy", ask, _best)


def _on_clusters(name: str, ask: A, one: Callable[[A, bool], Result]) -> Result:
    """The answer of a command on its cluster, or on each of several, side by side and with their costs told."""
    from apex_opt.cluster import cluster_names, load_wiring

    clusters = cluster_names(ask.cluster)  # type: ignore[attr-defined]
    if len(clusters) == 1:
        return one(ask, False)
    from apex_opt.report.clusters import clusters_document

    for state in ("busy", "down"):
        if getattr(ask, state) is not None:
            raise UsageError(f"--{state}: is of one cluster, and {len(clusters)} are given; leave it out")
    for cluster in clusters:
        load_wiring(cluster)  # before the first search
    found = [one(replace(ask, cluster=cluster), True) for cluster in clusters]  # type: ignore[call-arg]
    return Result(
        document=clusters_document(name, [each.document for each in found]),
        found=any(each.found for each in found),
        holds=all(each.holds for each in found),
        details=lambda: [
            replace(detail, plan=f"{cluster}: {detail.plan}")
            for cluster, each in zip(clusters, found, strict=True)
            for detail in each.details()
        ],
    )


def _priced(problem: Problem, priced: bool) -> Problem:
    """A problem with its costs told, where they are compared."""
    return replace(problem, priced=priced)


def _best(ask: PlanAsk, priced: bool) -> Result:
    """`plan` and `energy`, which shows the deployment of the best latency beside."""
    from apex_opt.figures import load_latency
    from apex_opt.report.document import beside_document, replayed
    from apex_opt.resolve import resolve
    from apex_opt.search import Scorer, search
    from apex_opt.studies.check import check
    from apex_opt.studies.explain import Explanation, explained

    _check_robust(ask)
    name, latency, top = "plan", None, max(ask.top, 2) if ask.robust else ask.top
    if isinstance(ask, arguments.EnergyAsk):
        name, latency = "energy", load_latency(ask.latency)
    problem = _priced(resolve(ask, most_gpus=LARGEST_SEARCH), priced)
    scorer, space = Scorer(problem), formulation("plan_space").PlanSpace()
    with _crew(ask) as crew:
        answer = search(problem, space, ask.tell, top, ask.time_limit, scorer, crew)
        fastest = None
        if latency is not None and answer.best is not None:
            offers = tuple(replace(offer, clocks=(None,)) for offer in problem.offers)
            fast = replace(problem, objective=latency, then=(), offers=offers)
            fastest = search(fast, space, ask.tell, crew=crew)
        steadfast = _robust(problem, answer, space, scorer, ask, crew) if ask.robust and answer.best else None
    # Of several types of GPU the search says why of each; what would help is for `explain`.
    found = Explanation(answer=answer)
    if not problem.several:
        found = explained(problem, answer, space, ask.tell, ask.time_limit, scorer)

    document = document_of(name, problem, found.answer, ask, top, found)
    document = document if steadfast is None else replace(document, robust=steadfast)
    if fastest is not None and fastest.best is not None and answer.best is not None:
        document = replace(document, beside=beside_document(answer.best, fast, fastest))

    def replay(progress: Progress, said: Document) -> Check:
        found = check(problem, answer, space, formulation("deployment"), progress)
        others = tuple(differences(to_plain(said) | {"check": None}, to_plain(document) | {"check": None}))
        more = (f"and {len(others) - _TOLD} more are not as answered",) if len(others) > _TOLD else ()
        return replace(found, disagreements=(*found.disagreements, *others[:_TOLD], *more))

    tested = replay(ask.tell, document) if ask.check else None
    return Result(
        document=document if tested is None else replace(document, check=replayed(tested)),
        found=answer.best is not None,
        holds=tested is None or tested.holds,
        traffic=traffic_of(document.launch, problem.trace, problem),
        replay=replay,
        details=details_of([(scorer, answer.best)], ask),
    )


@contextmanager
def _crew(ask: SpreadAsk) -> Iterator[Callable[[Scorer], Crew]]:
    """Who bounds and simulates for a scorer: workers, where they are asked for."""
    from apex_opt.search.spread import Alone, Spread

    with _workers(ask) as workers:
        yield Alone if workers is None else partial(Spread, workers=workers)


@contextmanager
def _trials(ask: SpreadAsk) -> Iterator[Callable[[Steady], Trials]]:
    """Who tries deployments at rates for their judge: workers, where they are asked for."""
    from apex_opt.studies.trials import Elsewhere, Here

    with _workers(ask) as workers:
        yield Here if workers is None else partial(Elsewhere, workers=workers)


@contextmanager
def _workers(ask: SpreadAsk) -> Iterator[Workers | None]:
    """The workers that are asked for."""
    if ask.workers is None and ask.ray is None:
        yield None
        return
    from apex_opt.grids.workers import opened

    with opened(ask.ray, ask.workers) as workers:
        yield workers


def _check_robust(ask: PlanAsk | arguments.CapacityAsk) -> None:
    """Refuse what cannot be held against others."""
    if ask.robust and ask.time_limit is not None:
        raise UsageError("--robust: searches again with other times, each to its end; leave --time_limit out")
    if ask.robust and isinstance(ask, arguments.CapacityAsk) and ask.plan is not None:
        raise UsageError("--robust: holds the best plan against all others, and --plan is the only one; leave one out")


def _robust(
    problem: Problem, answer: Answer, space: Any, scorer: Scorer, ask: PlanAsk, crew: Callable[[Scorer], Crew]
) -> Robust:
    """How far the times of an answer may be off, and what is as good within the error that is to be expected.

    Parameters
    ----------
    problem, answer
    space : the program that enumerates plans
    scorer, ask
    crew : who bounds and simulates
    """
    from apex_opt.report.expected import error_of
    from apex_opt.report.robust import robust_document
    from apex_opt.studies.robust import deciding, robust

    assert answer.best is not None
    error = error_of(problem, answer.best, deciding(problem))
    found = robust(problem, answer, space, scorer, None if error is None else error.share, ask.tell, crew)
    return robust_document(problem, answer.best, found, error)


@command(arguments.ParetoAsk)
def pareto(ask: arguments.ParetoAsk) -> Result:
    """Find every plan that no other beats in all of two or three objectives."""
    from apex_opt.figures import load_objective
    from apex_opt.report.charts.front import front_charts
    from apex_opt.report.pareto import pareto_document
    from apex_opt.report.picture import write_picture
    from apex_opt.report.robust import robust_front_document
    from apex_opt.resolve import resolve
    from apex_opt.search import Scorer
    from apex_opt.studies.pareto import pareto as search_front
    from apex_opt.studies.robust_front import robust_front

    objectives = [load_objective(name.strip()) for name in ask.objective.split(",")]
    problem = resolve(ask, most_gpus=LARGEST_SEARCH)
    space, steadfast = formulation("plan_space").PlanSpace(), None
    with _crew(ask) as crew:
        front = search_front(problem, objectives, space, ask.tell, crew)
        if ask.robust and front.candidates:
            steadfast = robust_front_document(robust_front(problem, front, space, ask.tell, crew))
    scorer = Scorer(problem)
    told = scorer.provenance(front.candidates)
    document = pareto_document(problem, front, told, lambda scored: launch_of(scorer, scored, ask))
    document = document if steadfast is None else replace(document, robust=steadfast)
    # Of the whole front those are told request by request that are best by one of the objectives.
    ends = [min(front.candidates, key=lambda s: o.signed(o.value(s.metrics))) for o in objectives if front.candidates]
    return Result(
        document=document,
        found=bool(front.candidates),
        files={"plot": lambda path: write_picture(path, *front_charts(to_plain(document)))} if ends else {},
        details=details_of([(scorer, scored) for scored in {id(one): one for one in ends}.values()], ask),
    )


@command(arguments.ExplainAsk)
def explain(ask: arguments.ExplainAsk) -> Result:
    """Say why no plan fits and what would, or why a plan loses to the best."""
    from apex_opt.planned import planned
    from apex_opt.report.explain import explanation_document
    from apex_opt.resolve import resolve
    from apex_opt.search import Scorer
    from apex_opt.studies.explain import explain as find

    problem, deployment = resolve(ask, most_gpus=LARGEST_SEARCH), None
    if ask.plan is not None:
        # Of several formats to choose from, the first is that of a plan that names none.
        chosen = replace(ask, weights=None if ask.weights is None else ask.weights.split(",")[0])
        deployment = planned(ask.plan, chosen, resolve(chosen))[1]
    with _crew(ask) as crew:
        found = find(problem, formulation("plan_space").PlanSpace(), ask.tell, deployment, ask.time_limit, crew)
    best, scorer = found.answer.best, Scorer(problem)
    document = explanation_document(problem, found, scorer.provenance([] if best is None else [best]))
    return Result(document=document, found=best is not None, details=details_of([(scorer, best)], ask))


@command(arguments.CapacityAsk)
def capacity(ask: arguments.CapacityAsk) -> Result:
    """Find the highest request rate within the goals, or the fewest GPUs for a rate."""
    return _on_clusters("capacity", ask, _capacity)


def _capacity(ask: arguments.CapacityAsk, priced: bool) -> Result:
    from apex_opt.launch.bench import lasting
    from apex_opt.planned import resolve_plan
    from apex_opt.report.capacity import capacity_document
    from apex_opt.resolve import resolve
    from apex_opt.search import Scorer
    from apex_opt.studies.capacity import fewest_gpus, highest_rate

    _check_robust(ask)
    # The rate is what is asked for, not that of the trace, which may have none.
    unrated, deployment = replace(ask, rate=None), None
    if ask.plan is None:
        problem = resolve(unrated, most_gpus=LARGEST_SEARCH, rated=True)
    else:
        problem, deployment = resolve_plan(ask.plan, unrated, rated=True)
    problem = _priced(problem, priced)
    given: dict[str, Any] = {"deployment": deployment, "progress": ask.tell, "top": ask.top}
    given["time_limit_s"] = ask.time_limit
    space = formulation("plan_space").PlanSpace()
    with _trials(ask) as trials:
        if ask.rate is None:
            found = highest_rate(problem, space, resolution=ask.resolution, trials=trials, **given)
        else:
            found = fewest_gpus(problem, space, ask.rate, trials=trials, **given)
        steadfast = _robust_rate(problem, found, space, ask, trials) if ask.robust and found.plans else None
    scorer = Scorer(problem)
    document = capacity_document(problem, found, scorer.provenance(item.holds for item in found.plans))
    traffic = problem.trace
    if found.plans:
        best = found.plans[0]
        traffic = lasting(traffic, best.rate_per_s)
        document = replace(document, launch=launch_of(scorer, best.holds, ask, trace=traffic))
        document = document if steadfast is None else replace(document, robust=steadfast)
    return Result(
        document=document,
        found=bool(found.plans),
        traffic=traffic_of(document.launch, traffic, problem),
        details=details_by_rate(found.plans[:1], ask),
    )


def _robust_rate(
    problem: Problem,
    found: Capacity,
    space: Any,
    ask: arguments.CapacityAsk,
    trials: Callable[[Steady], Trials],
) -> Robust:
    """How far the times of a capacity may be off, and what is as good within the error that is to be expected.

    Parameters
    ----------
    problem
    found : Capacity    the answer
    space : the program that enumerates plans
    ask
    trials : who tries deployments at rates
    """
    from apex_opt.report.expected import error_of
    from apex_opt.report.robust import robust_rate_document
    from apex_opt.studies.robust import deciding
    from apex_opt.studies.robust_rates import robust_rate

    best = found.plans[0]
    # Of rates no error was measured.
    error = None if found.asked_per_s is None else error_of(problem, best.holds, deciding(problem))
    told = robust_rate(problem, found, space, None if error is None else error.share, ask.tell, trials)
    return robust_rate_document(best, told, error)


@command(arguments.StudyAsk)
def study(ask: arguments.StudyAsk) -> Result:
    """Ask plan, energy, capacity or pareto of every point of a grid, and go on where that was interrupted."""
    from apex_opt.grids.points import faults
    from apex_opt.grids.run import run_study
    from apex_opt.grids.store import Store
    from apex_opt.grids.study import read_study
    from apex_opt.grids.workers import opened
    from apex_opt.report.study import listed_document, study_document

    path = expanded(ask.study)
    asked, folder = read_study(path), path.with_suffix("") if ask.target is None else expanded(ask.target)
    if folder == path:
        raise UsageError(f"--target: {path} has no ending, so its results need a folder of their own; name one")
    if ask.dry_run:
        wrong = faults(asked, ask.tell)
        return Result(document=listed_document(asked, folder, wrong), found=not wrong)
    with Store(folder, asked) as store:
        answer = globals()[asked.command]  # the function, which goes to workers by its name
        answered = run_study(asked, store, lambda: opened(ask.ray, ask.workers), answer, ask.tell, again=ask.retry)
        document = study_document(asked, folder, store.rows(), answered)
    return Result(document=document, found=document.found > 0)
