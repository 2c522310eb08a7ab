"""Plans that are given: simulated, checked, placed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from apex_opt import arguments
from apex_opt.api.answers import details_of, document_of, files_of, traffic_of
from apex_opt.api.programs import formulation
from apex_opt.commands import Result, command
from apex_opt.errors import UsageError
from apex_opt.files import expanded
from apex_opt.gate import check_progress
from apex_opt.schema import to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.arguments import SimulateAsk
    from apex_opt.cluster import Tree
    from apex_opt.gate import Progress
    from apex_opt.placement import Assignment
    from apex_opt.plans.deployment import Deployment
    from apex_opt.report.placement import Loss, Site
    from apex_opt.schema import Document
    from apex_opt.search import Answer, Problem


@command(arguments.SimulateAsk)
def simulate(ask: arguments.SimulateAsk) -> Result:
    """Score a given plan batch by batch, or several side by side."""
    from apex_opt.planned import resolve_plan
    from apex_opt.search import Scorer

    if isinstance(ask.plan, tuple):
        return _side_by_side(ask.plan, ask)
    problem, deployment = resolve_plan(ask.plan, ask)
    problem, answer = _judged(problem, deployment, ask)
    document = document_of("simulate", problem, answer, ask)
    return Result(
        document=document,
        found=answer.best is not None,
        traffic=traffic_of(document.launch, problem.trace, problem),
        files={} if answer.best is None or problem.several else files_of(problem, deployment, ask),
        details=details_of([(Scorer(problem), answer.best)], ask),
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
    from apex_opt.planned import resolve_plans
    from apex_opt.report.side_by_side import compared_document
    from apex_opt.search import Scorer, judge
    from apex_opt.studies.explain import differences

    asked = resolve_plans(plans, ask)
    answers = [judge(problem, deployment, ask.tell) for problem, deployment in asked]
    documents = [
        document_of("simulate", problem, answer, ask) for (problem, _), answer in zip(asked, answers, strict=True)
    ]
    runs = [(Scorer(p), answer.best) for (p, _), answer in zip(asked, answers, strict=True) if answer.best]
    terms = differences(runs) if len(runs) > 1 else ()
    document = compared_document([str(deployment) for _, deployment in asked], documents, terms)
    return Result(document=document, found=bool(runs), details=details_of(runs, ask))


def check(answer: Result, progress: Progress | None = None) -> Result:
    """Replay the certificate of an answer of `plan` or `energy`: the answer with what the replay finds, as `check`.

    The space is counted again in plain Python, and every feasible plan is simulated to its end. A document
    that says anything else than was answered does not hold.

    Raises
    ------
    UsageError    an answer without a certificate that can be replayed
    """
    from apex_opt.report.document import replayed

    if not isinstance(answer, Result) or answer.replay is None:
        raise UsageError("check: takes an answer of plan or energy on one cluster")
    if progress is not None:
        check_progress(progress)
    found = answer.replay(progress or (lambda what, done, total: None), answer.document)
    document = replace(answer.document, check=replayed(found))  # type: ignore[call-arg]
    return replace(answer, document=document, holds=found.holds)


@command(arguments.PlaceAsk)
def place(ask: arguments.PlaceAsk) -> Result:
    """Place one given plan on the GPUs that are free, and say what losing some costs."""
    from apex_opt.cluster import Tree, load_topology, load_wiring
    from apex_opt.outputs import write_whole
    from apex_opt.placement import rankfile, read_assignment
    from apex_opt.planned import resolve_place
    from apex_opt.report.placement import Site, labels, place_document, quickest, refused_document
    from apex_opt.report.topology import drawn, topology_document, write_topology
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
