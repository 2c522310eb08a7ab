"""What goes with an answer: its document, its GPUs, what starts it, its runs for charts, and files."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, Final, cast

from apex_opt.api.programs import formulation
from apex_opt.errors import ApexError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from apex_opt import arguments
    from apex_opt.arguments import Ask
    from apex_opt.launch import Launch
    from apex_opt.placement import Assignment
    from apex_opt.plans.deployment import Deployment, Pool
    from apex_opt.report.detail import Detail
    from apex_opt.report.types import Answer as TypedAnswer
    from apex_opt.report.types import Launch as LaunchDocument
    from apex_opt.report.types import MixedAnswer
    from apex_opt.search import Answer, Problem, Scored, Scorer
    from apex_opt.studies.capacity_answer import PlanRate
    from apex_opt.studies.explain import Explanation
    from apex_opt.workload import Trace

_SHARES: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)
"""Of the highest rate, at which charts tell what requests see."""


def details_of(runs: Sequence[tuple[Scorer, Scored | None]], ask: Ask) -> Callable[[], Sequence[Detail]]:
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
            known["launch"] = launch_of(scorer, scored, ask, assignments, asked=True)
        else:
            known["no_launch"] = f"no command starts {kind.name}"
    except ApexError as error:
        known["no_launch"] = str(error)
    return run_detail(scorer, scored, replicas=tuple(replicas_document(ranks) for ranks in assignments), **known)


def details_by_rate(plans: Sequence[PlanRate], ask: arguments.CapacityAsk) -> Callable[[], Sequence[Detail]]:
    """Deployments at the rate that each sustains, with what requests see at lower rates and at the next."""
    from apex_opt.planned import resolve_plan
    from apex_opt.report.detail import RatePoint
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


def files_of(problem: Problem, deployment: Deployment, ask: Ask) -> dict[str, Callable[[Path], None]]:
    """Every request and every batch of a plan's run, by the names of the files, as functions of their paths.

    Parameters
    ----------
    problem, deployment, ask
    """
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


def document_of(
    name: str, problem: Problem, answer: Answer, ask: Ask, top: int = 1, found: Explanation | None = None
) -> TypedAnswer | MixedAnswer:
    """An answer with where its figures come from, why there is none, where it goes and what starts it.

    Parameters
    ----------
    name : str           of the command
    problem, answer, ask
    top : int            candidates that are shown
    found : Explanation or None    why there is none, and what would help
    """
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
        run, launch = placed_run(document.best, assignments), launch_of(scorer, best, ask, assignments)
        return replace(document, best=run, launch=launch)
    found = formulation("placement").place_plan(scorer.facts().layouts, best.plan)
    placement = None if problem.tree is None else placed_document(problem, best.plan, found)
    return replace(document, placement=placement, launch=launch_of(scorer, best, ask, [found.assignment]))


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


def launch_of(
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
    measured = bench(problem, trace or problem.trace, found, ask.seed, pools=len(scored.pools))
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


def traffic_of(launch: LaunchDocument | None, trace: Trace, problem: Problem) -> dict[str, Callable[[], Iterator[str]]]:
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
