"""Command line of apex_opt: parse, then run. Everything it does lives in `apex_opt` and `formulations`.

fire runs a command before it has looked at all its words, so commands only note what was asked. `apex_opt.options`
holds the commands with their options and checks the words first; fire then dispatches and renders the help; `main`
runs the request afterwards.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before all else, so that an interruption while the rest is loaded ends in a line too.
    from apex_opt.process import end_on_signals

    end_on_signals()

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apex_opt import __version__
from apex_opt.errors import ApexError, UsageError
from apex_opt.files import expanded
from apex_opt.options import COMMANDS, GROUPS, LARGEST_SEARCH, Request, arranged, files_of, group, method, wrapped
from apex_opt.process import end_on_signals, end_undisturbed, open_streams, put
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from apex_opt.cluster import Tree
    from apex_opt.placement import Assignment
    from apex_opt.plan.deployment import Deployment, Pool
    from apex_opt.report import Progress
    from apex_opt.report.document import Document
    from apex_opt.report.placement import Loss, Site
    from apex_opt.search import Answer, Problem, Scored, Scorer
    from apex_opt.studies.check import Check
    from apex_opt.studies.explain import Explanation

EXIT_FAULT = 1
EXIT_INFEASIBLE = 3
EXIT_INTERRUPTED = 130
LONGEST_ERROR = 1000


class Commands:
    """Find the provably best parallel execution plan for serving a large language model.

    Given a model, the GPUs, the traffic and the goals: how to split the
    model over the GPUs, what that gives, and the proof that no other plan of
    the space is better. An answer takes seconds.

      solve.py plan --model=llama-3.1-70b --cluster=8xh100-sxm --trace=chat

    Every command has its own help: solve.py plan --help
    The release: solve.py --version
    """


for _name in (name for name in COMMANDS if " " not in name):
    setattr(Commands, _name, method(_name))
for _name in GROUPS:
    setattr(Commands, _name, group(_name))


def _on_clusters(
    command: str, answer: Callable[[dict[str, Any]], tuple[Document, int]], options: dict[str, Any]
) -> int:
    """The answer of a command on its cluster, or on each of several, side by side."""
    from apex_opt.cluster import cluster_names, load_wiring
    from apex_opt.report.clusters import clusters_document

    names = cluster_names(options["cluster"])
    if len(names) == 1:
        document, code = answer(options)
    else:
        for name in ("busy", "down"):
            if options.get(name) is not None:
                raise UsageError(f"--{name}: is of one cluster, and {len(names)} are given; leave it out")
        for name in names:
            load_wiring(name)  # before the first search
        found = [answer(options | {"cluster": name, "priced": True}) for name in names]
        document, codes = clusters_document(command, [one for one, _ in found]), [code for _, code in found]
        code = EXIT_FAULT if EXIT_FAULT in codes else min(codes)
    _show(document, options)
    return code


def _priced(options: dict[str, Any], problem: Problem) -> Problem:
    """A problem with its costs told, where they are compared."""
    return replace(problem, priced=options.get("priced", False))


def _run_plan(options: dict[str, Any]) -> int:
    return _on_clusters("plan", _plan, options)


def _plan(options: dict[str, Any]) -> tuple[Document, int]:
    from apex_opt.ask import Options, ask
    from apex_opt.report import Progress

    problem = _priced(options, ask(Options.of(options), most_gpus=LARGEST_SEARCH))
    with Progress() as progress:
        found, replay = _searched(problem, options, progress)
        document = _answer_document("plan", problem, found.answer, options, found, replay)
    return document, _exit_code(found.answer, replay)


def _searched(problem: Problem, options: dict[str, Any], progress: Progress) -> tuple[Explanation, Check | None]:
    """The answer to a problem, why there is none where that is so, and the replay of its ledger where asked for."""
    from apex_opt.search import Scorer, search
    from apex_opt.studies.check import check
    from apex_opt.studies.explain import Explanation, explained
    from formulations import deployment
    from formulations.plan_space import PlanSpace

    scorer, space, limit_s = Scorer(problem), PlanSpace(), options["time_limit"]
    answer = search(problem, space, progress, options["top"], limit_s, scorer)
    # Of several types of GPU the search says why of each; what would help is for `explain`.
    found = Explanation(answer=answer)
    if not problem.mixed:
        found = explained(problem, answer, space, progress, limit_s, scorer)
    return found, check(problem, answer, space, deployment, progress) if options["check"] else None


def _run_energy(options: dict[str, Any]) -> int:
    return _on_clusters("energy", _energy, options)


def _energy(options: dict[str, Any]) -> tuple[Document, int]:
    from apex_opt.ask import Options, ask
    from apex_opt.figures import load_latency
    from apex_opt.report import Progress, beside
    from apex_opt.search import search
    from formulations.plan_space import PlanSpace

    latency = load_latency(options["latency"])
    problem = _priced(options, ask(Options.of(options | {"objective": "energy"}), most_gpus=LARGEST_SEARCH))
    offers = tuple(replace(offer, clocks=(None,)) for offer in problem.offers)
    fast = replace(problem, objective=latency, then=(), offers=offers)
    with Progress() as progress:
        found, replay = _searched(problem, options, progress)
        fastest = search(fast, PlanSpace(), progress) if found.answer.best is not None else None
        document = _answer_document("energy", problem, found.answer, options, found, replay)
    if fastest is not None and fastest.best is not None:
        document = beside(document, fast, fastest)
    return document, _exit_code(found.answer, replay)


def _run_simulate(options: dict[str, Any]) -> int:
    from apex_opt.ask import Options, ask_plan
    from apex_opt.report import Progress

    if isinstance(options["plan"], tuple):
        return _run_side_by_side(options["plan"], options)
    problem, deployment = ask_plan(options["plan"], Options.of(options))
    if problem.mixed and (options["requests"] is not None or options["timeline"] is not None):
        named = "requests" if options["requests"] is not None else "timeline"
        raise UsageError(f"--{named}: is of GPUs of one type, and {problem.cluster.name} has several; leave it out")
    with Progress() as progress:
        problem, answer = _judged(problem, deployment, options, progress)
    try:
        _show(_answer_document("simulate", problem, answer, options), options)
        return _exit_code(answer, None)
    finally:
        # An answer that cannot be shown is no reason to lose the files, nor the other way round.
        if answer.best is not None:
            _write_files(problem, deployment, options)


def _judged(
    problem: Problem, deployment: Deployment, options: dict[str, Any], progress: Progress
) -> tuple[Problem, Answer]:
    """A given plan scored; at a rate over a trace made longer, as `capacity` does, until the load is seen to last."""
    from apex_opt.ask import Options, longer
    from apex_opt.report.load import is_steady
    from apex_opt.search import judge
    from apex_opt.studies.steady import DOUBLINGS

    answer = judge(problem, deployment, progress)
    for doubled in range(1, DOUBLINGS + 1):
        if answer.best is None or is_steady(answer.best):
            break
        again = longer(problem, Options.of(options), 2**doubled)
        if again is None:
            break
        problem, answer = again, judge(again, deployment, progress)
    return problem, answer


def _run_side_by_side(plans: tuple[str, ...], options: dict[str, Any]) -> int:
    """`simulate` with several plans."""
    from apex_opt.ask import Options, ask_plans
    from apex_opt.report import Progress
    from apex_opt.report.side_by_side import compared_document
    from apex_opt.search import Scorer, judge
    from apex_opt.studies.explain import differences

    for name in ("requests", "timeline"):
        if options[name] is not None:
            raise UsageError(f"--{name}: is for one plan, and {len(plans)} are given; leave it out, or give one --plan")
    asked = ask_plans(plans, Options.of(options))
    with Progress() as progress:
        answers = [judge(problem, deployment, progress) for problem, deployment in asked]
        documents = [
            _answer_document("simulate", problem, answer, options)
            for (problem, _), answer in zip(asked, answers, strict=True)
        ]
        runs = [(Scorer(p), answer.best) for (p, _), answer in zip(asked, answers, strict=True) if answer.best]
        terms = differences(runs) if len(runs) > 1 else ()
    _show(compared_document([str(deployment) for _, deployment in asked], documents, terms), options)
    return 0 if runs else EXIT_INFEASIBLE


def _run_pareto(options: dict[str, Any]) -> int:
    from apex_opt.ask import Options, ask
    from apex_opt.figures import load_objective
    from apex_opt.report import Progress
    from apex_opt.report.pareto import pareto_document, write_front
    from apex_opt.search import Scorer
    from apex_opt.studies.pareto import pareto
    from formulations.plan_space import PlanSpace

    objectives = [load_objective(name.strip()) for name in options["objective"].split(",")]
    problem = ask(Options.of(options), most_gpus=LARGEST_SEARCH)
    with Progress() as progress:
        front = pareto(problem, objectives, PlanSpace(), progress)
    scorer = Scorer(problem)
    document = pareto_document(problem, front, scorer.provenance(front.candidates))
    pairs = zip(document["candidates"], front.candidates, strict=True)
    document["candidates"] = [_with_launch(row, scorer, scored, options) for row, scored in pairs]
    try:
        _show(document, options)
    finally:
        if options["plot"] is not None and front.candidates:
            write_front(expanded(options["plot"]), document)
    return 0 if front.candidates else EXIT_INFEASIBLE


def _run_explain(options: dict[str, Any]) -> int:
    from apex_opt.ask import Options, ask, planned
    from apex_opt.report import Progress
    from apex_opt.report.explain import explanation_document
    from apex_opt.search import Scorer
    from apex_opt.studies.explain import explain
    from formulations.plan_space import PlanSpace

    given = Options.of(options)
    problem, deployment = ask(given, most_gpus=LARGEST_SEARCH), None
    if options["plan"] is not None:
        # Of several formats to choose from, the first is that of a plan that names none.
        first = None if given.weights is None else given.weights.split(",")[0]
        chosen = replace(given, weights=first)
        deployment = planned(options["plan"], chosen, ask(chosen))[1]
    with Progress() as progress:
        found = explain(problem, PlanSpace(), progress, deployment, options["time_limit"])
    best = found.answer.best
    provenance = Scorer(problem).provenance([] if best is None else [best])
    _show(explanation_document(problem, found, provenance), options)
    return EXIT_INFEASIBLE if best is None else 0


def _write_files(problem: Problem, deployment: Deployment, options: dict[str, Any]) -> None:
    """Every request and every batch of a plan's run, where asked for."""
    if options["requests"] is None and options["timeline"] is None:
        return
    from apex_opt.report import Progress
    from apex_opt.report.requests import write_requests
    from apex_opt.report.timeline import write_timeline
    from apex_opt.search import Scorer

    with Progress() as progress:
        progress("writing files", 0, 0)
        scorer = Scorer(problem)
        outcome, cost = scorer.logged(deployment)
        if options["requests"] is not None:
            longest = problem.settings.max_model_len
            write_requests(expanded(options["requests"]), outcome, problem.trace, longest, scorer.outside_ns)
        if options["timeline"] is not None:
            write_timeline(expanded(options["timeline"]), outcome, cost.laws, problem.settings.block_size)


def _show(document: dict[str, Any], options: dict[str, Any]) -> None:
    """Print a document in the form asked for."""
    from apex_opt.report import show

    show(document, options["format"], options.get("limit", 0), sources=options.get("sources", False))


def _answer_document(
    command: str,
    problem: Problem,
    answer: Answer,
    options: dict[str, Any],
    found: Explanation | None = None,
    replay: Check | None = None,
) -> dict[str, Any]:
    """An answer with everything that was asked of it."""
    from apex_opt.report import answer_document, checked
    from apex_opt.report.explain import explained_document
    from apex_opt.search import Scorer

    top, scorer = options.get("top", 1), Scorer(problem)
    document = answer_document(command, problem, answer, scorer.provenance(answer.candidates[:top]), top)
    if found is not None and not problem.mixed:
        document = explained_document(document, found)
    if answer.best is not None and (problem.mixed or problem.tree is not None or options["emit"] is not None):
        document = _placed(document, scorer, answer.best, options)
    return document if replay is None else checked(document, replay)


def _placed(document: dict[str, Any], scorer: Scorer, best: Scored, options: dict[str, Any]) -> dict[str, Any]:
    """An answer with where its pools go, where GPUs are told apart, and with the commands that start it, if asked."""
    from formulations.placement import place_plan

    problem = scorer.problem
    if problem.mixed:
        from apex_opt.report.mixed import parts_placed

        assignments = [_assigned(scorer, use.pool) for use in best.pools]
        return _with_launch(parts_placed(document, assignments), scorer, best, options, assignments)
    placed = place_plan(scorer.facts().layouts, best.plan)
    if problem.tree is not None:
        from apex_opt.report.placement import with_placement

        document = with_placement(document, problem, best.plan, placed)
    return _with_launch(document, scorer, best, options, [placed.assignment])


def _assigned(scorer: Scorer, pool: Pool) -> Assignment:
    """The GPUs of a pool, those of its type or types."""
    from formulations.placement import place_joint, place_plan

    facts = scorer.facts_of(pool)
    return place_joint(facts.costs, pool.plan) if pool.plan.on else place_plan(facts.layouts, pool.plan).assignment


def _with_launch(
    document: dict[str, Any],
    scorer: Scorer,
    scored: Scored,
    options: dict[str, Any],
    assignments: list[Assignment] | None = None,
) -> dict[str, Any]:
    """A deployment with the commands that start it, if asked; where it lies is looked for unless it is given."""
    if options["emit"] is None:
        return document
    from apex_opt.ir import checkpoint_of
    from apex_opt.launch import launch, together
    from apex_opt.report.launch import launched

    checkpoint, uses = checkpoint_of(options["model"]), scored.pools
    found = [
        launch(scorer.facts_of(use.pool).problem, use.pool.plan, options["emit"], checkpoint, assignment)
        for use, assignment in zip(uses, assignments or [_assigned(scorer, use.pool) for use in uses], strict=True)
    ]
    if not scorer.problem.mixed:
        return launched(document, found[0])
    requests = sum(use.requests for use in uses)
    shares = [use.requests / requests for use in uses]
    return launched(document, together(found, [use.pool.plan.replicas for use in uses], shares))


def _exit_code(answer: Answer, replay: Check | None) -> int:
    """A certificate that does not hold is a fault of ours, whatever the answer."""
    if replay is not None and not replay.holds:
        return EXIT_FAULT
    return EXIT_INFEASIBLE if answer.best is None else 0


def _run_place(options: dict[str, Any]) -> int:
    from apex_opt.ask import ask_place
    from apex_opt.cluster import Tree, load_topology, load_wiring
    from apex_opt.outputs import write_whole
    from apex_opt.placement import rankfile, read_assignment
    from apex_opt.report import Progress
    from apex_opt.report.placement import Site, labels, place_document, quickest, refused_document
    from apex_opt.report.topology import topology_document, write_topology
    from apex_opt.search.facts import Facts
    from formulations.placement import place_plan

    wiring = load_wiring(options["cluster"])
    sites = [Site(question=q, plan=p, wiring=wiring, facts=Facts(q)) for q, p in ask_place(options)]
    site = quickest(sites, options["within"])
    plan, limit_s, topology = site.plan, options["time_limit"], load_topology(options["cluster"])
    lost = () if options["lose"] is None else topology.named(options["lose"], "--lose")
    given = None if options["at"] is None else read_assignment(expanded(options["at"]), site.shape, set(site.tree.gpus))
    kept = [gpu for gpu in site.tree.gpus if gpu not in lost]
    reason = site.refusal(options["within"], len(kept))
    if reason is not None:
        _show(refused_document(site, reason), options)
        return EXIT_INFEASIBLE
    found = place_plan(site.facts.layouts, plan, limit_s)
    loss = None
    if lost:
        tree = Tree.of(site.wiring, set(topology.gpus()) - set(kept))
        with Progress() as progress:
            progress("seeking the fewest moves", 0, 0)
            loss = _loss(site, lost, given or found.assignment, tree, limit_s)
    answer = found.assignment if loss is None else loss.after
    try:
        _show(place_document(site, found, given, options["within"], loss), options)
    finally:
        if options["rankfile"] is not None:
            write_whole(expanded(options["rankfile"]), rankfile(answer).encode(), "rankfile")
        if options["plot"] is not None:
            for state, text in (("busy", options["busy"]), ("down", options["down"]), ("down", options["lose"])):
                topology = topology if text is None else topology.marked(state, topology.named(text))
            write_topology(expanded(options["plot"]), topology_document(topology), labels(answer))
    return 0


def _loss(site: Site, lost: tuple[str, ...], before: Assignment, tree: Tree, limit_s: float | None) -> Loss:
    """Where as many replicas as still fit go once GPUs are lost, so that the fewest weights move."""
    from functools import partial

    from apex_opt.placement import Shape
    from apex_opt.report.placement import Loss
    from formulations.placement import move

    fewer = replace(site.plan, replicas=min(site.plan.replicas, tree.size // site.shape.replica))
    measure = partial(site.facts.layouts.measured, fewer)
    moved = move(tree, Shape.of(fewer), measure, before, site.weights, limit_s)
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


def _run_capacity(options: dict[str, Any]) -> int:
    return _on_clusters("capacity", _capacity, options)


def _capacity(options: dict[str, Any]) -> tuple[Document, int]:
    from apex_opt.ask import Options, ask, ask_plan
    from apex_opt.report import Progress
    from apex_opt.report.capacity import capacity_document
    from apex_opt.search import Scorer
    from apex_opt.studies.capacity import fewest_gpus, highest_rate
    from formulations.plan_space import PlanSpace

    # The rate is what is asked for, not that of the trace, which may have none.
    asked, deployment = Options.of(options | {"rate": None}), None
    if options["plan"] is None:
        problem = ask(asked, most_gpus=LARGEST_SEARCH, rated=True)
    else:
        problem, deployment = ask_plan(options["plan"], asked, rated=True)
    problem = _priced(options, problem)
    with Progress() as progress:
        given: dict[str, Any] = {"deployment": deployment, "progress": progress, "top": options["top"]}
        if options["rate"] is None:
            found = highest_rate(problem, PlanSpace(), resolution=options["resolution"], **given)
        else:
            found = fewest_gpus(problem, PlanSpace(), options["rate"], **given)
    scorer = Scorer(problem)
    document = capacity_document(problem, found, scorer.provenance(item.holds for item in found.plans))
    if found.plans:
        document = _with_launch(document, scorer, found.plans[0].holds, options)
    return document, 0 if found.plans else EXIT_INFEASIBLE


def _run_validate(options: dict[str, Any]) -> int:
    from apex_opt.measured import Predictor, read_measured
    from apex_opt.profiles import check_profiles
    from apex_opt.report import Progress, validation_document

    predictor = Predictor(profiles=check_profiles(options["profiles"]))
    measurements = read_measured(expanded(options["measured"]))
    with Progress() as progress:
        comparisons = predictor.compare(measurements.runs, progress)
    document = validation_document(measurements, comparisons, predictor.provenance)
    try:
        _show(document, options)
    finally:
        if options["plot"] is not None:
            from apex_opt.report.validation_plot import write_plot

            write_plot(expanded(options["plot"]), document)
    return 0 if document["coverage"]["predicted"] else EXIT_INFEASIBLE


def _run_models(options: dict[str, Any]) -> int:
    from apex_opt.ir import list_models
    from apex_opt.report import listing_document, model_row

    _show(listing_document("models", [model_row(model) for model in list_models()]), options)
    return 0


def _run_clusters(options: dict[str, Any]) -> int:
    from apex_opt.cluster import list_clusters, load_cluster
    from apex_opt.report import cluster_row, listing_document

    clusters = [load_cluster(name) for name in list_clusters()]
    nodes = {cluster.gpu.name: cluster for cluster in clusters if cluster.nodes == 1}
    _show(listing_document("clusters", [cluster_row(node) for node in nodes.values()]), options)
    return 0


def _run_cluster_show(options: dict[str, Any]) -> int:
    from apex_opt.cluster import load_topology
    from apex_opt.report.topology import topology_document, write_topology

    topology = load_topology(options["cluster"])
    for state in ("busy", "down"):
        if options[state] is not None:
            topology = topology.marked(state, topology.named(options[state], f"--{state}"))
    document = topology_document(topology)
    if options["plot"] is not None:
        write_topology(expanded(options["plot"]), document)
    _show(document, options)
    return 0


def _run_cluster_import(options: dict[str, Any]) -> int:
    from apex_opt.cluster.importers import import_cluster
    from apex_opt.report.topology import import_document, write_toml

    composition, notes = import_cluster(expanded(options["source"]), options["gpu"])
    document = import_document(composition, notes, options["target"])
    if options["target"] is not None:
        write_toml(expanded(options["target"]), document)
    _show(document, options)
    return 0


def _run_traces(options: dict[str, Any]) -> int:
    from apex_opt.report import listing_document, trace_row
    from apex_opt.workload import list_traces, load_trace

    rows = [trace_row(load_trace(name), title) for name, title in list_traces()]
    _show(listing_document("traces", rows), options)
    return 0


def _run_profile_show(options: dict[str, Any]) -> int:
    from apex_opt.profiles.inventory import inventory
    from apex_opt.report.profiles import inventory_document

    root = DATA_ROOT / "profiles" if options["profiles"] is None else expanded(options["profiles"])
    _show(inventory_document(root, inventory(root, options["gpu"])), options)
    return 0


def _run_profile_distill(options: dict[str, Any]) -> int:
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.distill.command import default_target, distill
    from apex_opt.report import Progress
    from apex_opt.report.profiles import tables_document

    source = None if options["source"] is None else expanded(options["source"])
    target = default_target() if options["target"] is None else expanded(options["target"])
    check_folder(target, "target")
    with Progress() as progress:
        reports = distill(source, target, progress, () if options["gpu"] is None else (options["gpu"],))
    _show(tables_document("profile distill", target, reports), options)
    return 0


def _run_profile_import(options: dict[str, Any]) -> int:
    from apex_opt.cluster import load_cluster
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.importers import import_profile
    from apex_opt.report.profiles import tables_document

    gpu, target = load_cluster(options["gpu"]).gpu, expanded(options["target"])
    check_folder(target, "target")
    found = import_profile(options["kind"], expanded(options["source"]), gpu, target)
    _show(tables_document("profile import", found.folder, found.reports, found.passed_over), options)
    return 0


def _run_profile_collect(options: dict[str, Any]) -> int:
    from datetime import date

    from apex_opt.cluster import load_cluster
    from apex_opt.outputs import check_folder
    from apex_opt.profiles.collect import asked_ops, collect, recognised
    from apex_opt.profiles.collect.torch_machine import open_machine
    from apex_opt.report import Progress
    from apex_opt.report.profiles import tables_document

    ops, target = asked_ops(options["ops"]), expanded(options["target"])
    check_folder(target, "target")
    described = None if options["gpu"] is None else load_cluster(options["gpu"]).gpu
    machine = open_machine()
    gpu = described or recognised(machine.name, machine.memory_bytes)
    with Progress() as progress:
        found = collect(machine, gpu, target, ops, date.today().isoformat(), quick=options["quick"], progress=progress)
    _show(tables_document("profile collect", found.folder, found.reports, found.passed_over), options)
    return 0


def _run_profile_fit(options: dict[str, Any]) -> int:
    from apex_opt.measured import read_measured
    from apex_opt.measured.fit import fit_board, fit_engine
    from apex_opt.report import Progress
    from apex_opt.report.fitting import fit_document

    runs = read_measured(expanded(options["measured"])).runs
    with Progress() as progress:
        fit = fit_engine(runs, options["engine"], progress)
        boards = fit_board(runs, progress, {fit.after.name: fit.after})
    _show(fit_document(fit, boards), options)
    return 0


RUNNERS: dict[str, Callable[[dict[str, Any]], int]] = {
    "plan": _run_plan,
    "energy": _run_energy,
    "pareto": _run_pareto,
    "explain": _run_explain,
    "simulate": _run_simulate,
    "place": _run_place,
    "capacity": _run_capacity,
    "validate": _run_validate,
    "profile show": _run_profile_show,
    "profile distill": _run_profile_distill,
    "profile import": _run_profile_import,
    "profile collect": _run_profile_collect,
    "profile fit": _run_profile_fit,
    "cluster show": _run_cluster_show,
    "cluster import": _run_cluster_import,
    "models": _run_models,
    "clusters": _run_clusters,
    "traces": _run_traces,
}


def main(words: list[str] | None = None) -> None:
    """Parse and run; exit with 0 (answer), 2 (usage or input), 3 (infeasible) or 1 (a fault of ours)."""
    if own := words is None:
        end_on_signals()
        words = sys.argv[1:]
    open_streams()
    try:
        code = _main(words)
    except ApexError as error:
        code = error.exit_code
        if "--debug" in words or "--debug=true" in words:
            import traceback

            traceback.print_exc()
        # What was typed may hold line breaks and be long; an error is one line.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split()))
        print(f"error: {line if len(line) <= LONGEST_ERROR else line[:LONGEST_ERROR] + ' ...'}", file=sys.stderr)
    except OSError as error:
        if "--debug" in words:
            raise
        what = f" {error.filename}" if error.filename else ""
        print(f"error: the system refuses{what} ({error.strerror or error}); --debug shows where", file=sys.stderr)
        code = EXIT_FAULT
    except MemoryError:
        print("error: out of memory; offer fewer GPUs (--gpus), smaller batches or a shorter trace", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    if own:
        end_undisturbed()
    sys.exit(code)


def _main(words: list[str]) -> int:
    if words == ["--version"]:
        put(f"apex-opt {__version__}\n")
        return 0
    import fire

    fire.core.Display = _show_help
    name = "apex-opt" if Path(sys.argv[0]).stem == "apex-opt" else "solve.py"
    request = fire.Fire(Commands(), command=arranged(words), name=name, serialize=_hidden)
    assert isinstance(request, Request), "fire calls a method of Commands or shows help and exits"
    _check_files(request)
    return RUNNERS[request.command](request.options)


def _check_files(request: Request) -> None:
    """Look at what options need before any work is done for them: files to write, and what draws pictures."""
    outputs, inputs = files_of(request)
    if outputs:
        from apex_opt.outputs import check_outputs

        check_outputs(outputs, inputs)
    if "plot" in outputs:
        from apex_opt.report.picture import blank_figure

        blank_figure()


def _show_help(lines: Iterable[str], out: object) -> None:
    """Help goes to stdout as it is: fire would start a pager, or print to stderr."""
    put(wrapped("\n".join(lines)) + "\n")


def _hidden(_: object) -> None:
    """Keep fire from printing the request."""


if __name__ == "__main__":
    main()
