"""What apex_opt can be asked, as functions: the composition root, which alone knows both the search and `formulations`.

Every function takes keywords with the defaults of the command line, and names or what they stand for: a `Model`, a
`Cluster`, a `Trace`. It returns a `Result` and prints nothing; what cannot be asked raises an `ApexError`, and the
callback `progress` hears of what is being done.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from apex_opt import arguments
from apex_opt.arguments import LARGEST_SEARCH
from apex_opt.commands import Result, command
from apex_opt.errors import ApexError, UsageError
from apex_opt.files import expanded
from apex_opt.gate import Arguments, check_progress
from apex_opt.schema import to_plain
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.arguments import Ask, PlanAsk, SimulateAsk, SpreadAsk
    from apex_opt.cluster import Tree
    from apex_opt.gate import Progress
    from apex_opt.launch import Launch
    from apex_opt.measured.readers import Measurements
    from apex_opt.placement import Assignment
    from apex_opt.plans.deployment import Deployment, Pool
    from apex_opt.report.detail import Detail
    from apex_opt.report.placement import Loss, Site
    from apex_opt.report.types import Answer as TypedAnswer
    from apex_opt.report.types import Launch as LaunchDocument
    from apex_opt.report.types import MixedAnswer, Robust
    from apex_opt.schema import Document
    from apex_opt.search import Answer, Problem, Scored, Scorer
    from apex_opt.search.spread import Crew
    from apex_opt.studies.capacity_answer import PlanRate
    from apex_opt.studies.check import Check
    from apex_opt.studies.explain import Explanation
    from apex_opt.workload import Trace

A = TypeVar("A", bound=Arguments)
PACKAGE: Final = Path(__file__).resolve().parent
_SHARES: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
"""Of the highest rate, at which charts tell what requests see."""


def formulation(name: str) -> Any:
    """A room of `formulations`, which lie inside the package where it is installed, and beside it in a checkout."""
    if (PACKAGE / "formulations").is_dir():
        return importlib.import_module(f"apex_opt.formulations.{name}")
    if "formulations" not in sys.modules:
        # By its place: another folder of that name may come first on the path.
        beside = PACKAGE.parent / "formulations"
        found = spec_from_file_location(beside.name, beside / "__init__.py", submodule_search_locations=[str(beside)])
        assert found is not None and found.loader is not None
        sys.modules[beside.name] = module = module_from_spec(found)
        found.loader.exec_module(module)
    return importlib.import_module(f"formulations.{name}")


# ---- searches ----------------------------------------------------------------------------------------------------


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

    if ask.robust and ask.time_limit is not None:
        raise UsageError("--robust: searches again with other times, each to its end; leave --time_limit out")
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
    # Of several types of GPU the search says why of each; what would help is for `explain`.
    found = Explanation(answer=answer)
    if not problem.several:
        found = explained(problem, answer, space, ask.tell, ask.time_limit, scorer)

    def replay(progress: Progress) -> Check:
        return check(problem, answer, space, formulation("deployment"), progress)

    tested = replay(ask.tell) if ask.check else None
    document = _answer_document(name, problem, found.answer, ask, top, found)
    if ask.robust and answer.best is not None:
        document = replace(document, robust=_robust(problem, answer, space, scorer, ask))
    if fastest is not None and fastest.best is not None and answer.best is not None:
        document = replace(document, beside=beside_document(answer.best, fast, fastest))
    return Result(
        document=document if tested is None else replace(document, check=replayed(tested)),
        found=answer.best is not None,
        holds=tested is None or tested.holds,
        traffic=_traffic(document.launch, problem.trace, problem),
        replay=replay,
        details=_details([(scorer, answer.best)], ask),
    )


@contextmanager
def _crew(ask: SpreadAsk) -> Iterator[Callable[[Scorer], Crew]]:
    """Who bounds and simulates for a scorer: workers, where they are asked for."""
    from apex_opt.search.spread import Alone, Spread

    if ask.workers is None and ask.ray is None:
        yield Alone
        return
    from apex_opt.grids.workers import opened

    with opened(ask.ray, ask.workers) as workers:
        yield partial(Spread, workers=workers)


def _robust(problem: Problem, answer: Answer, space: Any, scorer: Scorer, ask: PlanAsk) -> Robust:
    """How far the times of an answer may be off, and what is as good within the error that is to be expected.

    Parameters
    ----------
    problem, answer
    space : the program that enumerates plans
    scorer, ask
    """
    from apex_opt.report.expected import error_of
    from apex_opt.report.robust import robust_document
    from apex_opt.studies.robust import deciding, robust

    assert answer.best is not None
    error = error_of(problem, answer.best, deciding(problem))
    found = robust(problem, answer, space, scorer, None if error is None else error.share, ask.tell)
    return robust_document(problem, answer.best, found, error)


@command(arguments.ParetoAsk)
def pareto(ask: arguments.ParetoAsk) -> Result:
    """Find every plan that no other beats in all of two or three objectives."""
    from apex_opt.figures import load_objective
    from apex_opt.report.charts.front import front_charts
    from apex_opt.report.pareto import pareto_document
    from apex_opt.report.picture import write_picture
    from apex_opt.resolve import resolve
    from apex_opt.search import Scorer
    from apex_opt.studies.pareto import pareto as search_front

    objectives = [load_objective(name.strip()) for name in ask.objective.split(",")]
    problem = resolve(ask, most_gpus=LARGEST_SEARCH)
    with _crew(ask) as crew:
        front = search_front(problem, objectives, formulation("plan_space").PlanSpace(), ask.tell, crew)
    scorer = Scorer(problem)
    told = scorer.provenance(front.candidates)
    document = pareto_document(problem, front, told, lambda scored: _launch(scorer, scored, ask))
    # Of the whole front those are told request by request that are best by one of the objectives.
    ends = [min(front.candidates, key=lambda s: o.signed(o.value(s.metrics))) for o in objectives if front.candidates]
    return Result(
        document=document,
        found=bool(front.candidates),
        files={"plot": lambda path: write_picture(path, *front_charts(to_plain(document)))} if ends else {},
        details=_details([(scorer, scored) for scored in {id(one): one for one in ends}.values()], ask),
    )


@command(arguments.ExplainAsk)
def explain(ask: arguments.ExplainAsk) -> Result:
    """Say why no plan fits and what would, or why a plan loses to the best."""
    from apex_opt.report.explain import explanation_document
    from apex_opt.resolve import planned, resolve
    from apex_opt.search import Scorer
    from apex_opt.studies.explain import explain as find

    problem, deployment = resolve(ask, most_gpus=LARGEST_SEARCH), None
    if ask.plan is not None:
        # Of several formats to choose from, the first is that of a plan that names none.
        chosen = replace(ask, weights=None if ask.weights is None else ask.weights.split(",")[0])
        deployment = planned(ask.plan, chosen, resolve(chosen))[1]
    found = find(problem, formulation("plan_space").PlanSpace(), ask.tell, deployment, ask.time_limit)
    best, scorer = found.answer.best, Scorer(problem)
    document = explanation_document(problem, found, scorer.provenance([] if best is None else [best]))
    return Result(document=document, found=best is not None, details=_details([(scorer, best)], ask))


@command(arguments.CapacityAsk)
def capacity(ask: arguments.CapacityAsk) -> Result:
    """Find the highest request rate within the goals, or the fewest GPUs for a rate."""
    return _on_clusters("capacity", ask, _capacity)


def _capacity(ask: arguments.CapacityAsk, priced: bool) -> Result:
    from apex_opt.launch.bench import lasting
    from apex_opt.report.capacity import capacity_document
    from apex_opt.resolve import resolve, resolve_plan
    from apex_opt.search import Scorer
    from apex_opt.studies.capacity import fewest_gpus, highest_rate

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
    if ask.rate is None:
        found = highest_rate(problem, space, resolution=ask.resolution, **given)
    else:
        found = fewest_gpus(problem, space, ask.rate, **given)
    scorer = Scorer(problem)
    document = capacity_document(problem, found, scorer.provenance(item.holds for item in found.plans))
    traffic = problem.trace
    if found.plans:
        best = found.plans[0]
        traffic = lasting(traffic, best.rate_per_s)
        document = replace(document, launch=_launch(scorer, best.holds, ask, trace=traffic))
    return Result(
        document=document,
        found=bool(found.plans),
        traffic=_traffic(document.launch, traffic, problem),
        details=_details_by_rate(found.plans[:1], ask),
    )


@command(arguments.StudyAsk)
def study(ask: arguments.StudyAsk) -> Result:
    """Ask plan, energy, capacity or pareto of every point of a grid, and go on where that was interrupted."""
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
        return Result(document=listed_document(asked, folder))
    with Store(folder, asked) as store:
        answer = globals()[asked.command]  # the function, which goes to workers by its name
        answered = run_study(asked, store, lambda: opened(ask.ray, ask.workers), answer, ask.tell, again=ask.retry)
        document = study_document(asked, folder, store.rows(), answered)
    return Result(document=document, found=document.found > 0)


# ---- plans that are given ----------------------------------------------------------------------------------------


@command(arguments.SimulateAsk)
def simulate(ask: arguments.SimulateAsk) -> Result:
    """Score a given plan batch by batch, or several side by side."""
    from apex_opt.resolve import resolve_plan
    from apex_opt.search import Scorer

    if isinstance(ask.plan, tuple):
        return _side_by_side(ask.plan, ask)
    problem, deployment = resolve_plan(ask.plan, ask)
    problem, answer = _judged(problem, deployment, ask)
    document = _answer_document("simulate", problem, answer, ask)
    return Result(
        document=document,
        found=answer.best is not None,
        traffic=_traffic(document.launch, problem.trace, problem),
        files={} if answer.best is None or problem.several else _files(problem, deployment, ask),
        details=_details([(Scorer(problem), answer.best)], ask),
    )


def _judged(problem: Problem, deployment: Deployment, ask: SimulateAsk) -> tuple[Problem, Answer]:
    """A given plan scored; at a rate over a trace made longer, as `capacity` does, until the load is seen to last."""
    from apex_opt.report.load import is_steady
    from apex_opt.resolve import longer
    from apex_opt.search import judge
    from apex_opt.studies.steady import DOUBLINGS

    answer = judge(problem, deployment, ask.tell)
    for doubled in range(1, DOUBLINGS + 1):
        if answer.best is None or is_steady(answer.best):
            break
        again = longer(problem, ask, 2**doubled)
        if again is None:
            break
        problem, answer = again, judge(again, deployment, ask.tell)
    return problem, answer


def _side_by_side(plans: tuple[str, ...], ask: SimulateAsk) -> Result:
    """`simulate` with several plans."""
    from apex_opt.report.side_by_side import compared_document
    from apex_opt.resolve import resolve_plans
    from apex_opt.search import Scorer, judge
    from apex_opt.studies.explain import differences

    asked = resolve_plans(plans, ask)
    answers = [judge(problem, deployment, ask.tell) for problem, deployment in asked]
    documents = [
        _answer_document("simulate", problem, answer, ask) for (problem, _), answer in zip(asked, answers, strict=True)
    ]
    runs = [(Scorer(p), answer.best) for (p, _), answer in zip(asked, answers, strict=True) if answer.best]
    terms = differences(runs) if len(runs) > 1 else ()
    document = compared_document([str(deployment) for _, deployment in asked], documents, terms)
    return Result(document=document, found=bool(runs), details=_details(runs, ask))


def _details(runs: Sequence[tuple[Scorer, Scored | None]], ask: Ask) -> Callable[[], Sequence[Detail]]:
    """Deployments with their runs, GPUs and commands, once and where they are asked for."""
    return cache(lambda: tuple(_detail(scorer, scored, ask) for scorer, scored in runs if scored is not None))


def _detail(scorer: Scorer, scored: Scored, ask: Ask, **known: Any) -> Detail:
    from apex_opt.engines import load_kind
    from apex_opt.report.detail import run_detail
    from apex_opt.report.placement import replicas_document

    ask.tell("simulating for charts", 0, 0)
    assignments = _assigned_all(scorer, scored.deployment, ask)
    kind = load_kind(ask.engine)
    try:
        if kind.commands:
            known["launch"] = _launch(scorer, scored, ask, assignments, asked=True)
        else:
            known["no_launch"] = f"no command starts {kind.name}"
    except ApexError as error:
        known["no_launch"] = str(error)
    return run_detail(scorer, scored, replicas=tuple(replicas_document(ranks) for ranks in assignments), **known)


def _details_by_rate(plans: Sequence[PlanRate], ask: arguments.CapacityAsk) -> Callable[[], Sequence[Detail]]:
    """Deployments at the rate that each sustains, with what requests see at lower rates and at the next."""
    from apex_opt.report.detail import RatePoint
    from apex_opt.resolve import resolve_plan
    from apex_opt.search import Scorer, judge

    def run(text: str, rate: float) -> tuple[Scorer, Scored | None]:
        ask.tell("simulating rates for charts", 0, 0)
        problem, deployment = resolve_plan(text, replace(ask, rate=rate))
        return Scorer(problem), judge(problem, deployment).best

    def point(rate: float, scored: Scored) -> RatePoint:
        metrics = scored.metrics
        figures = {f"{name} p95": metrics.value(name.lower(), "p95") for name in ("TTFT", "TPOT", "E2E")}
        return RatePoint(rate_per_s=rate, met=all(metrics.slo_met.values()), figures=figures)

    @cache
    def told() -> Sequence[Detail]:
        details = []
        for item in plans:
            rates = [share * item.rate_per_s for share in _SHARES] + [item.next_rate_per_s or 1.1 * item.rate_per_s]
            runs = {rate: run(item.holds.text, rate) for rate in rates}
            curve = tuple(point(rate, scored) for rate, (_, scored) in runs.items() if scored is not None)
            scorer, scored = runs[item.rate_per_s]
            if scored is not None:
                details.append(_detail(scorer, scored, ask, curve=curve))
        return details

    return told


def _files(problem: Problem, deployment: Deployment, ask: Ask) -> dict[str, Callable[[Path], None]]:
    """Every request and every batch of a plan's run."""
    from apex_opt.report import requests, timeline
    from apex_opt.search import Scorer

    scorer = Scorer(problem)

    @cache
    def run() -> Any:
        ask.tell("writing files", 0, 0)
        return scorer.logged(deployment)

    def write_requests(path: Path) -> None:
        longest = problem.settings.max_model_len
        requests.write_requests(path, run()[0], problem.trace, longest, scorer.outside_ns)

    def write_timeline(path: Path) -> None:
        outcome, cost = run()
        timeline.write_timeline(path, outcome, cost.laws, problem.settings_for(deployment.pools[0].plan))

    return {"requests": write_requests, "timeline": write_timeline}


def _answer_document(
    name: str, problem: Problem, answer: Answer, ask: Ask, top: int = 1, found: Explanation | None = None
) -> TypedAnswer | MixedAnswer:
    """An answer with where its figures come from, why there is none, where it goes and what starts it."""
    from apex_opt.report.document import answer_document
    from apex_opt.report.explain import why_document
    from apex_opt.search import Scorer

    scorer = Scorer(problem)
    why = {} if found is None or problem.several else why_document(found)
    told = answer_document(name, problem, answer, scorer.provenance(answer.candidates[:top]), top, **why)
    document = cast("TypedAnswer | MixedAnswer", told)
    if answer.best is not None and (problem.mixed or problem.tree is not None or ask.emit):
        document = _placed(document, scorer, answer.best, ask)
    return document


def _placed(document: TypedAnswer | MixedAnswer, scorer: Scorer, best: Scored, ask: Ask) -> TypedAnswer | MixedAnswer:
    """An answer with where its pools go, where GPUs are told apart, and with the commands that start it, if asked."""
    from apex_opt.report.mixed import placed_run
    from apex_opt.report.placement import placed_document
    from apex_opt.report.types import MixedAnswer

    problem = scorer.problem
    if isinstance(document, MixedAnswer):
        assert document.best is not None
        assignments = _assigned_all(scorer, best.deployment, ask)
        run, launch = placed_run(document.best, assignments), _launch(scorer, best, ask, assignments)
        return replace(document, best=run, launch=launch)
    found = formulation("placement").place_plan(scorer.facts().layouts, best.plan)
    placement = None if problem.tree is None else placed_document(problem, best.plan, found)
    return replace(document, placement=placement, launch=_launch(scorer, best, ask, [found.assignment]))


def _assigned(scorer: Scorer, pool: Pool) -> Assignment:
    """The GPUs of a pool, those of its type or types."""
    placement, facts = formulation("placement"), scorer.facts_of(pool)
    if pool.plan.on:
        return cast("Assignment", placement.place_joint(facts.costs, pool.plan))
    return cast("Assignment", placement.place_plan(facts.layouts, pool.plan).assignment)


def _assigned_all(scorer: Scorer, deployment: Deployment, ask: Ask) -> list[Assignment]:
    """The GPUs of every pool: of two on the same type those with the larger part in a node first, then the other."""
    pools = deployment.pools
    if len({pool.types for pool in pools}) == len(pools):
        return [_assigned(scorer, pool) for pool in pools]
    from apex_opt.resolve import tree_beside

    def chunk(place: int) -> int:
        layouts = scorer.facts_of(pools[place]).layouts
        return -layouts.best(pools[place].plan).node_chunk

    found: dict[int, Assignment] = {}
    taken: list[str] = []
    for place in sorted(range(len(pools)), key=chunk):
        layouts = scorer.facts_of(pools[place]).layouts
        free = layouts.on(tree_beside(ask, taken, pools[place].types)) if taken else layouts
        found[place] = formulation("placement").place_plan(free, pools[place].plan).assignment
        taken += [gpu for replica in found[place] for stage in replica for gpu in stage]
    return [found[place] for place in range(len(pools))]


def _launch(
    scorer: Scorer,
    scored: Scored,
    ask: Ask,
    assignments: list[Assignment] | None = None,
    *,
    asked: bool = False,
    trace: Trace | None = None,
) -> LaunchDocument | None:
    """The commands that start a deployment, if asked, and the one that measures it.

    Parameters
    ----------
    scorer, scored, ask
    assignments : its GPUs; looked for unless they are given
    asked : bool                whether they are wanted whatever was asked
    trace : Trace, optional     what is sent to it; by default that of the problem
    """
    if not (asked or ask.emit):
        return None
    from apex_opt.engines import load_kind
    from apex_opt.launch.bench import bench
    from apex_opt.report.launch import launch_document

    engine = load_kind(ask.engine).rules.name
    found = _launched(scorer, scored, ask, engine, assignments)
    if not found.commands:
        return launch_document(found)
    problem = scorer.problem
    measured = bench(problem, trace or problem.trace, found, ask.seed)
    return launch_document(found, measured)


def _launched(scorer: Scorer, scored: Scored, ask: Ask, engine: str, assignments: list[Assignment] | None) -> Launch:
    """The commands that start a deployment.

    Parameters
    ----------
    scorer, scored, ask
    engine : str    that is started
    assignments : its GPUs; looked for unless they are given
    """
    from apex_opt.launch import handing_over, launch, together

    uses, taken = scored.pools, dict[int, int]()
    found = [
        launch(
            scorer.facts_of(use.pool).problem,
            use.pool.plan,
            engine,
            _checkpoint(ask),
            assignment,
            taken,
        )
        for use, assignment in zip(uses, assignments or _assigned_all(scorer, scored.deployment, ask), strict=True)
    ]
    if scored.deployment.disaggregated:
        prefill, decode = found
        return handing_over(prefill, decode, uses[0].pool.plan.replicas)
    if not scorer.problem.several:
        return found[0]
    requests = sum(use.requests for use in uses)
    shares = [use.requests / requests for use in uses]
    return together(found, [use.pool.plan.replicas for use in uses], shares)


def _traffic(launch: LaunchDocument | None, trace: Trace, problem: Problem) -> dict[str, Callable[[], Iterator[str]]]:
    """Files that go with the commands of an answer, as their lines: what its benchmark replays.

    Parameters
    ----------
    launch : the commands, if any
    trace : Trace       that is replayed
    problem : Problem
    """
    from apex_opt.launch.bench import dataset

    if launch is None or launch.bench is None or launch.bench.dataset is None:
        return {}
    return {launch.bench.dataset: lambda: dataset(trace, problem.settings.max_model_len)}


def _checkpoint(ask: Ask) -> str:
    """Where an engine finds the weights: of a model that is given as one, by its name."""
    from apex_opt.ir import checkpoint_of

    return checkpoint_of(ask.model if isinstance(ask.model, str) else ask.model.name)


def check(answer: Result, progress: Progress | None = None) -> Result:
    """Replay the certificate of an answer of `plan` or `energy`: the answer with what the replay finds, as `check`.

    The space is counted again in plain Python, and every feasible plan is simulated to its end.

    Raises
    ------
    UsageError    an answer without a certificate that can be replayed
    """
    from apex_opt.report.document import replayed

    if not isinstance(answer, Result) or answer.replay is None:
        raise UsageError("check: takes an answer of plan or energy on one cluster")
    if progress is not None:
        check_progress(progress)
    found = answer.replay(progress or (lambda what, done, total: None))
    document = replace(answer.document, check=replayed(found))  # type: ignore[call-arg]
    return replace(answer, document=document, holds=found.holds)


@command(arguments.PlaceAsk)
def place(ask: arguments.PlaceAsk) -> Result:
    """Place one given plan on the GPUs that are free, and say what losing some costs."""
    from apex_opt.cluster import Tree, load_topology, load_wiring
    from apex_opt.outputs import write_whole
    from apex_opt.placement import rankfile, read_assignment
    from apex_opt.report.placement import Site, labels, place_document, quickest, refused_document
    from apex_opt.report.topology import drawn, topology_document, write_topology
    from apex_opt.resolve import resolve_place
    from apex_opt.search.facts import Facts

    wiring = load_wiring(ask.cluster)
    sites = [Site(problem=q, plan=p, wiring=wiring, facts=Facts(q)) for q, p in resolve_place(ask)]
    site = quickest(sites, ask.within)
    topology = load_topology(wiring)
    lost = () if ask.lose is None else topology.named(ask.lose, "--lose")
    given = None if ask.at is None else read_assignment(expanded(ask.at), site.shape, set(site.tree.gpus))
    kept = [gpu for gpu in site.tree.gpus if gpu not in lost]
    reason = site.refusal(ask.within, len(kept))
    if reason is not None:
        return Result(document=refused_document(site, reason), found=False)
    found = formulation("placement").place_plan(site.facts.layouts, site.plan, ask.time_limit)
    loss = None
    if lost:
        tree = Tree.of(site.wiring, set(topology.gpus()) - set(kept))
        ask.tell("seeking the fewest moves", 0, 0)
        loss = _loss(site, lost, given or found.assignment, tree, ask.time_limit)
    placed = found.assignment if loss is None else loss.after

    def write_ranks(path: Path) -> None:
        write_whole(path, rankfile(placed).encode(), "rankfile")

    def shown() -> Document:
        marked = topology
        for state, text in (("busy", ask.busy), ("down", ask.down), ("down", ask.lose)):
            marked = marked if text is None else marked.marked(state, marked.named(text))
        plain: Document = to_plain(topology_document(marked))
        return plain

    return Result(
        document=place_document(site, found, given, ask.within, loss),
        files={"rankfile": write_ranks, "plot": lambda path: write_topology(path, shown(), labels(placed))},
        drawn=lambda: (("Where it goes", chart) for chart in drawn(shown(), labels(placed))),
    )


def _loss(site: Site, lost: tuple[str, ...], before: Assignment, tree: Tree, limit_s: float | None) -> Loss:
    """Where as many replicas as still fit go once GPUs are lost, so that the fewest weights move."""
    from functools import partial

    from apex_opt.placement import Shape
    from apex_opt.report.placement import Loss

    fewer = replace(site.plan, replicas=min(site.plan.replicas, tree.size // site.shape.replica))
    measure = partial(site.facts.layouts.measured, fewer)
    moved = formulation("placement").move(tree, Shape.of(fewer), measure, before, site.weights, limit_s)
    assert moved is not None  # so many replicas fit
    return Loss(
        gpus=lost,
        before=before,
        after=moved.assignment,
        tree=tree,
        plan=fewer,
        replicas=moved.replicas,
        moved=moved.moved,
        moved_bytes=moved.moved_bytes,
        optimal=moved.optimal,
    )


# ---- measurements, profiles, clusters and lists ------------------------------------------------------------------


@command(arguments.ValidateAsk)
def validate(ask: arguments.ValidateAsk) -> Result:
    """Compare measured serving runs with their simulation."""
    from apex_opt.measured.compare import Predictor
    from apex_opt.profiles import check_profiles
    from apex_opt.report.validation import validation_document

    predictor = Predictor(profiles=check_profiles(ask.profiles))
    (measurements,) = _measurements(ask, (ask.measured,))
    comparisons = predictor.compare(measurements.runs, ask.tell)
    document = validation_document(measurements, comparisons, predictor.provenance)

    def draw(path: Path) -> None:
        from apex_opt.report.charts.front import errors_charts
        from apex_opt.report.picture import write_picture

        write_picture(path, *errors_charts(to_plain(document)))

    return Result(document=document, found=document.coverage.predicted > 0, files={"plot": draw})


def _measurements(
    ask: arguments.ValidateAsk | arguments.CalibrateAsk, paths: tuple[str | None, ...]
) -> list[Measurements]:
    """The runs of some files or folders; those that ship where none is named."""
    from apex_opt.measured.readers import SHIPPED, read_measured
    from apex_opt.resolve import resolve_deployed

    deployed = None if ask.plan is None else resolve_deployed(ask, ask.plan)
    return [read_measured(SHIPPED if path is None else expanded(path), deployed) for path in paths]


@command(arguments.CalibrateAsk)
def calibrate(ask: arguments.CalibrateAsk) -> Result:
    """Fit the times of an engine on runs of your own, and write it as a file that every command takes."""
    from apex_opt.files import there
    from apex_opt.measured.calibrate import calibrate as fit
    from apex_opt.measured.calibrate import divided
    from apex_opt.outputs import write_whole
    from apex_opt.report.calibration import calibration_document

    out = None if ask.out is None else expanded(ask.out)
    if out is not None and there(out):
        raise UsageError(f"--out: {ask.out} is there already and is left alone; name a file that is not")
    paths = ask.measured if isinstance(ask.measured, tuple) else (ask.measured,)
    runs = [run for found in _measurements(ask, paths) for run in found.runs]
    fitted, held = divided(runs, ask.engine, ask.hold)
    found = fit(fitted, ask.engine, ask.tell, held)
    document = calibration_document(found, ask.engine, ask.out if found.better else None)
    if out is not None and found.better:
        write_whole(out, document.engine_toml.encode(), "out")
    return Result(document=document, found=document.status == "ok")


@command(arguments.ProfileShowAsk)
def profile_show(ask: arguments.ProfileShowAsk) -> Result:
    """List the measured tables there are, and where they come from."""
    from apex_opt.profiles.inventory import inventory
    from apex_opt.report.profiles import inventory_document

    root = DATA_ROOT / "profiles" if ask.profiles is None else expanded(ask.profiles)
    return Result(document=inventory_document(root, inventory(root, ask.gpu)))


@command(arguments.ProfileDistillAsk)
def profile_distill(ask: arguments.ProfileDistillAsk) -> Result:
    """Make the shipped tables anew from the package aiconfigurator-core."""
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.distill.command import default_target, distill
    from apex_opt.report.profiles import tables_document

    source = None if ask.source is None else expanded(ask.source)
    target = default_target() if ask.target is None else expanded(ask.target)
    check_folder(target, "target")
    reports = distill(source, target, ask.tell, () if ask.gpu is None else (ask.gpu,))
    return Result(document=tables_document("profile distill", target, reports))


@command(arguments.ProfileImportAsk)
def profile_import(ask: arguments.ProfileImportAsk) -> Result:
    """Read the profile CSV files of APEX+ or Vidur."""
    from apex_opt.cluster import load_cluster
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.importers import import_profile
    from apex_opt.report.profiles import tables_document

    gpu, target = load_cluster(ask.gpu).gpu, expanded(ask.target)
    check_folder(target, "target")
    found = import_profile(ask.kind, expanded(ask.source), gpu, target)
    return Result(document=tables_document("profile import", found.folder, found.reports, found.passed_over))


@command(arguments.ProfileCollectAsk)
def profile_collect(ask: arguments.ProfileCollectAsk) -> Result:
    """Measure the GPU of this machine."""
    from datetime import date

    from apex_opt.cluster import load_cluster
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.collect import asked_ops, collect, recognised
    from apex_opt.profiles.collect.torch_machine import open_machine
    from apex_opt.report.profiles import tables_document

    ops, target = asked_ops(ask.ops), expanded(ask.target)
    check_folder(target, "target")
    described = None if ask.gpu is None else load_cluster(ask.gpu).gpu
    machine = open_machine()
    gpu = described or recognised(machine.name, machine.memory_bytes)
    found = collect(machine, gpu, target, ops, date.today().isoformat(), quick=ask.quick, progress=ask.tell)
    return Result(document=tables_document("profile collect", found.folder, found.reports, found.passed_over))


@command(arguments.ProfileFitAsk)
def profile_fit(ask: arguments.ProfileFitAsk) -> Result:
    """Fit an engine's own time and the power of GPUs on measured runs."""
    from apex_opt.measured.fit import fit_board, fit_engine
    from apex_opt.measured.readers import read_measured
    from apex_opt.report.fitting import fit_document

    runs = read_measured(expanded(ask.measured)).runs
    fit = fit_engine(runs, ask.engine, ask.tell)
    return Result(document=fit_document(fit, fit_board(runs, ask.tell, {fit.after.name: fit.after})))


@command(arguments.ClusterShowAsk)
def cluster_show(ask: arguments.ClusterShowAsk) -> Result:
    """Show the GPUs of a cluster, how they are wired, and which are free."""
    from apex_opt.cluster import load_topology
    from apex_opt.report.topology import topology_document, write_topology

    topology = load_topology(ask.cluster)
    for state, text in (("busy", ask.busy), ("down", ask.down)):
        if text is not None:
            topology = topology.marked(state, topology.named(text, f"--{state}"))
    document = topology_document(topology)
    return Result(document=document, files={"plot": lambda path: write_topology(path, to_plain(document))})


@command(arguments.ClusterImportAsk)
def cluster_import(ask: arguments.ClusterImportAsk) -> Result:
    """Make a cluster file of what nvidia-smi topo -m printed, or of a list of nodes."""
    from apex_opt.cluster.importers import import_cluster
    from apex_opt.report.topology import import_document, write_toml

    composition, notes = import_cluster(expanded(ask.source), ask.gpu)
    document = import_document(composition, notes, ask.target)
    if ask.target is not None:
        write_toml(expanded(ask.target), document)
    return Result(document=document)


@command(arguments.ModelsAsk)
def models(ask: arguments.ModelsAsk) -> Result:
    """List the models that can be named, or tell whether a configuration is read."""
    from apex_opt.report.models import models_document

    document = models_document(ask.supports)
    return Result(document=document, found=document.reason is None)


@command(arguments.ClustersAsk)
def clusters(_: arguments.ClustersAsk) -> Result:
    """List the accelerators that can be named, and a node of each."""
    from apex_opt.cluster import list_clusters, load_cluster
    from apex_opt.report import listed
    from apex_opt.report.document import cluster_row

    found = [load_cluster(name) for name in list_clusters()]
    nodes = {cluster.gpu.name: cluster for cluster in found if cluster.nodes == 1}
    return Result(document=listed.Clusters(status="ok", clusters=tuple(map(cluster_row, nodes.values()))))


@command(arguments.TracesAsk)
def traces(_: arguments.TracesAsk) -> Result:
    """List the traces that ship with apex_opt."""
    from apex_opt.report import listed
    from apex_opt.workload import list_traces, load_trace

    shipped: list[dict[str, Any]] = [{**load_trace(name).summary(), "title": title} for name, title in list_traces()]
    return Result(document=listed.Traces(status="ok", traces=tuple(listed.ListedTrace(**row) for row in shipped)))
