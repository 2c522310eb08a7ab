"""Which changes to a question without a plan give it one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING, Final

from apex_opt.cluster import list_clusters, load_cluster
from apex_opt.cluster.catalogue import is_catalogued
from apex_opt.ir.formats import FORMATS
from apex_opt.plan.plan import default_kv_format
from apex_opt.search.advice import MOST_GPUS, feasible, other_formats
from apex_opt.search.explain.solving import amount

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.plan.plan import Plan
    from apex_opt.search.explain.clashes import Clash
    from apex_opt.search.explain.solving import Goals, Work
    from apex_opt.search.question import Question
    from apex_opt.workload.slo import Slo

GROWTH: Final = 4
"""How many times the fewest GPUs on which plans can run are tried for goals: every size is a search of its own."""

_DIGITS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """A change with which the question was solved and has a plan.

    Parameters
    ----------
    options : mapping            what to ask for instead: option to value; "nodes" is that of the cluster's file
    more_gpus : int              GPUs beyond those offered
    plan : Plan                  the best plan then, or where there are no goals one that fits
    value : float or None        its objective, where it was simulated
    text : str                   the change in words
    """

    options: dict[str, str]
    more_gpus: int = 0
    plan: Plan
    value: float | None = None
    text: str


def relaxations(
    question: Question, clashing: Sequence[Clash], blamed: Goals, work: Work
) -> tuple[tuple[Relaxation, ...], tuple[str, ...]]:
    """Changes that give the question a plan, those without more GPUs first, and those tried for nothing."""
    found: list[Relaxation] = []
    failed: list[str] = []
    memory = any("memory" in clash.of for clash in clashing)
    if blamed:
        eased = _easier_goals(question, blamed, work)
        found += eased
        failed += [] if eased else ["other limits of the goals"]
    if memory:
        shorter = _shorter(question, work)
        found += shorter
        failed += [] if shorter else ["a shorter max_model_len"]
    for ways, what in ((_kv_formats(question), "an fp8 KV cache"), (_weights(question), "another weight format")):
        if ways:
            held = _first(ways, work)
            found += held
            failed += [] if held else [what]
    sizes = list(_sizes(question))
    if sizes:
        more = _more_gpus(question, sizes, work)
        found += more
        failed += [] if more else [f"up to {sizes[-1][0].max_devices} GPUs"]
    if not found:
        found = _both(question, work)
    return tuple(sorted(found, key=lambda r: r.more_gpus)), tuple(failed)


def _first(ways: Sequence[tuple[Question, dict[str, str], str]], work: Work) -> list[Relaxation]:
    """The first of some changes that gives a plan."""
    for changed, options, text in ways:
        if (solved := work.solve(changed)) is not None:
            plan, value = solved
            return [Relaxation(options=options, plan=plan, value=value, text=text)]
    return []


def _weights(question: Question) -> list[tuple[Question, dict[str, str], str]]:
    """Other weight formats, those of the most bits first."""
    ways = []
    for name in sorted(other_formats(question.instance()), key=lambda name: -FORMATS[name].weight_bits):
        kv = question.model.kv_format or default_kv_format(name)
        changed = replace(question, weight_formats=(name,), kv_formats=(kv,))
        ways.append((changed, {"weights": name}, f"weights in {name}: {FORMATS[name].description}"))
    return ways


def _kv_formats(question: Question) -> list[tuple[Question, dict[str, str], str]]:
    """A KV cache of half the size."""
    if "fp8" in question.kv_formats:
        return []
    changed = replace(question, kv_formats=("fp8",) * len(question.kv_formats))
    return [(changed, {"kv": "fp8"}, "KV cache in fp8")]


def _shorter(question: Question, work: Work) -> list[Relaxation]:
    """The largest max_model_len at which the longest request fits; less of it is held the shorter it is."""
    trace, settings = question.trace, question.settings

    def limited_to(tokens: int) -> Question:
        return replace(question, settings=replace(settings, max_model_len=tokens))

    low = int(trace.prompt.max()) + 1
    high = min(settings.max_model_len, int((trace.prompt + trace.output).max()))
    if low >= high or feasible(limited_to(low).instance()) is None:
        return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if feasible(limited_to(middle).instance()) is None else (middle, high)
    cut = int((trace.prompt + trace.output > low).sum())
    text = f"requests of at most {low:,} tokens: {cut:,} of {len(trace):,} answers end early"
    return _first([(limited_to(low), {"max_model_len": str(low)}, text)], work)


def _easier_goals(question: Question, blamed: Goals, work: Work) -> list[Relaxation]:
    """For each goal that clashes the nearest limit that can be had; where one is not enough, all of them in turn."""
    found = []
    for goal in blamed:
        others = tuple(other for other in question.slos if other != goal)
        if (eased := _eased(question, goal, others, work)) is not None:
            found += _with_goals(question, {goal: eased}, work)
    if not found and len(blamed) > 1:
        kept = tuple(goal for goal in question.slos if goal not in blamed)
        changes: dict[Slo, tuple[Slo, float]] = {}
        for goal in blamed:
            if (eased := _eased(question, goal, kept, work)) is None:
                return []
            changes[goal] = eased
            kept = (*kept, eased[0])
        found += _with_goals(question, changes, work)
    return found


def _eased(question: Question, goal: Slo, others: Goals, work: Work) -> tuple[Slo, float] | None:
    """A goal with the best limit that plans reach, rounded to what is easier, and that limit as it is."""
    best = work.best(question, goal, others)
    if best is None:
        return None
    if (goal.limit <= best[0]) if goal.metric == "throughput" else (goal.limit >= best[0]):
        return goal, goal.limit
    return _rounded(goal, best[0]), best[0]


def _with_goals(question: Question, changes: dict[Slo, tuple[Slo, float]], work: Work) -> list[Relaxation]:
    goals = tuple(changes[goal][0] if goal in changes else goal for goal in question.slos)
    text = " and ".join(
        f"{new.text} in place of {goal.text}; the best {'beside that ' if index else ''}is {amount(goal, value)}"
        for index, (goal, (new, value)) in enumerate(changes.items())
    )
    return _first([(replace(question, slos=goals), {"slo": ",".join(goal.text for goal in goals)}, text)], work)


def _rounded(goal: Slo, value: float) -> Slo:
    """The goal with a limit of three digits that the value meets."""
    exact = Decimal(repr(value))
    step = Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1)
    rounding = ROUND_FLOOR if goal.metric == "throughput" else ROUND_CEILING
    return replace(goal, limit=float((exact / step).to_integral_value(rounding) * step), text="")


def _sizes(question: Question) -> Iterator[tuple[Question, dict[str, str]]]:
    """The question with more GPUs, fewest first, as far as they are tried."""
    first = question.max_devices if feasible(question.instance()) is not None else None
    for larger, options in _clusters(question):
        if first is None and feasible(larger.instance()) is not None:
            first = larger.max_devices
        if question.slos and first is not None and larger.max_devices > GROWTH * first:
            return
        yield larger, options


def _clusters(question: Question) -> Iterator[tuple[Question, dict[str, str]]]:
    """The question with more GPUs of the same type: more of the cluster, then of a full node, then whole nodes."""
    cluster, gpu, most = question.cluster, question.cluster.gpu, MOST_GPUS
    for gpus in range(question.max_devices + 1, min(cluster.size, most) + 1):
        yield replace(question, max_devices=gpus), {"gpus": str(gpus)}
    known = is_catalogued(cluster) and load_cluster(gpu.name).gpu == gpu
    node = cluster.gpus_per_node
    specs = []
    if known and cluster.nodes == 1:
        node = max(load_cluster(spec).gpus_per_node for spec in list_clusters() if spec.endswith(f"x{gpu.name}"))
        specs += [(1, gpus, f"{gpus}x{gpu.name}") for gpus in range(cluster.size + 1, node + 1)]
    if cluster.inter is not None:
        first = cluster.size // node + 1
        specs += [(nodes, node, f"{nodes}x{node}x{gpu.name}") for nodes in range(max(first, 2), most // node + 1)]
    for nodes, gpus, spec in specs:
        if nodes * gpus > most:
            return
        larger = load_cluster(spec) if known else replace(cluster, name=spec, nodes=nodes, gpus_per_node=gpus)
        options = {"cluster": spec} if known else {"nodes": str(nodes)}
        if question.max_devices < cluster.size:
            options["gpus"] = str(larger.size)
        yield replace(question, cluster=larger, max_devices=larger.size), options


def _more_gpus(question: Question, sizes: Sequence[tuple[Question, dict[str, str]]], work: Work) -> list[Relaxation]:
    """The fewest GPUs that give a plan; plans over fewer were tried with the size before."""
    above = question.max_devices
    for changed, options in sizes:
        work.tell("trying more GPUs", changed.max_devices, sizes[-1][0].max_devices)
        if (solved := work.solve(changed, above)) is not None:
            plan, value = solved
            more = changed.max_devices - question.max_devices
            text = f"{changed.max_devices} GPUs in place of {question.max_devices}, as {changed.cluster.name}"
            return [Relaxation(options=options, more_gpus=more, plan=plan, value=value, text=text)]
        above = changed.max_devices
    return []


def _both(question: Question, work: Work) -> list[Relaxation]:
    """Where no single change will do: another weight format with the fewest GPUs it takes, of these the fewest."""
    found = []
    for changed, weights, text in _weights(question):
        for relaxation in _more_gpus(changed, list(_sizes(changed)), work):
            found.append(replace(relaxation, options=relaxation.options | weights, text=f"{relaxation.text}; {text}"))
    return [min(found, key=lambda r: r.more_gpus)] if found else []
