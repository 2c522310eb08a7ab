"""Why a question has no feasible plan, what would give it one, and why a plan loses to the best."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING, Final, Literal, Protocol

import numpy as np

from apex_opt.cluster import list_clusters, load_cluster
from apex_opt.cluster.catalogue import is_catalogued
from apex_opt.evaluate import FAMILIES
from apex_opt.ir.formats import FORMATS
from apex_opt.plan.plan import default_kv_format
from apex_opt.search.advice import MOST_GPUS, feasible, nearest, other_formats
from apex_opt.search.answer import Answer, Candidate, in_words, misses
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.objective import load_objective
from apex_opt.search.search import ROUND, Formulation, judge, search, silent
from apex_opt.simulator.metrics import per_request_s
from apex_opt.units import NS_PER_S
from apex_opt.workload.slo import AT_LEAST, FIGURES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.evaluate import Instance
    from apex_opt.plan.plan import Plan
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress
    from apex_opt.workload.slo import Slo

    Goals = tuple[Slo, ...]

GROWTH: Final = 4
"""How many times the fewest GPUs on which plans can run are tried for goals: every size is a search of its own."""

_EVERY: Final = 1_000_000
_LONGEST_S: Final = 1e9
_PERCENTILES: Final = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99))
_DIGITS: Final = 3

Proof = Literal["constraints", "bound", "simulation"]


class Diagnosis(Formulation, Protocol):
    """What an explanation asks of a plan-space program."""

    def clash(self, instance: Instance, families: Sequence[str] = ...) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Clash:
    """Constraints that no plan satisfies together, though some plan satisfies any of them but one.

    Parameters
    ----------
    of : tuple of str       constraint families, or goals as they were said
    proof : str             shown by the constraints, by a lower bound of every plan, or by simulating the plans
    facts : tuple of str    in words, with the numbers of the plans that come nearest
    """

    of: tuple[str, ...]
    proof: Proof
    facts: tuple[str, ...]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A part of what two runs took, in its unit; `share` is the difference as a share of the larger run's whole."""

    part: str
    name: str
    unit: str
    plan: float
    best: float
    share: float

    @property
    def difference(self) -> float:
        return self.plan - self.best


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A given plan beside the best one; `reason` says why it has no score, or what it misses.

    Terms are those that differ, the largest share first.
    """

    plan: Plan
    candidate: Candidate | None
    reason: str | None
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The answer; where there is none the clashes, what would help and what was tried for nothing."""

    answer: Answer
    clashes: tuple[Clash, ...] = ()
    relaxations: tuple[Relaxation, ...] = ()
    failed: tuple[str, ...] = ()
    comparison: Comparison | None = None


def explain(
    question: Question, formulation: Diagnosis, progress: Progress | None = None, plan: Plan | None = None
) -> Explanation:
    """Why a question has no plan and which changes give it one, or how a plan compares with the best.

    Of clashes that share no constraint all are found. Every relaxation was solved, so it holds by the same proof as a
    plan does.

    Parameters
    ----------
    question : Question
    formulation : Diagnosis          the program that enumerates plans and finds clashes
    progress : callable, optional    told (what, done, total) along the way
    plan : Plan, optional            to compare with the best

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    work = _Work(formulation=formulation, tell=progress or silent)
    answer = search(question, formulation, work.tell)
    comparison = None if plan is None else compare(question, plan, answer.best, work.tell)
    if answer.best is not None:
        return Explanation(answer=answer, comparison=comparison)
    question = replace(question, request_slos=question.per_request)  # what goodput counts stays as asked
    clashes, blamed = _clashes(question, work)
    relaxations, failed = _relaxations(question, clashes, blamed, work)
    return Explanation(answer=answer, clashes=clashes, relaxations=relaxations, failed=failed, comparison=comparison)


# ---- which constraints clash ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A formulation whose plans are known."""

    plans: tuple[Plan, ...]
    complete: bool = True

    def count(self, instance: Instance, families: Sequence[str]) -> int:
        return len(self.plans)

    def enumerate(self, instance: Instance, families: Sequence[str] = FAMILIES) -> _Known:
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """How questions are solved on the way, and what was found for goals."""

    formulation: Diagnosis
    tell: Progress
    least: dict[tuple[Slo, Goals], tuple[float, Candidate] | None] = field(default_factory=dict)

    def solve(self, question: Question, above: int = 0) -> tuple[Plan, float | None] | None:
        """The best plan and its objective, or where there are no goals a plan that fits; None where there is none.

        Plans over at most `above` GPUs are passed over.
        """
        instance = question.instance()
        if not question.slos:
            plan = feasible(instance)
            return None if plan is None else (plan, None)
        plans = tuple(plan for plan in self.formulation.enumerate(instance).plans if plan.devices > above)
        if not plans or (question.clocks == (None,) and not _some_meets(question, plans)):
            return None
        best = search(question, _Known(plans=plans), self.tell).best
        return None if best is None else (best.plan, best.value)

    def meets(self, question: Question, goals: Goals) -> bool:
        """Whether some plan meets these goals."""
        return self.solve(replace(question, slos=goals)) is not None

    def best(self, question: Question, goal: Slo, others: Goals) -> tuple[float, Candidate] | None:
        """The best value of a goal among plans that meet the others, and a plan that has it; None without such a plan.

        Of a goal on a share of the requests, the value is the least limit that so many requests are within.
        """
        key = goal, others
        if key not in self.least:
            self.least[key] = self._best(replace(question, slos=others), goal)
        return self.least[key]

    def _best(self, question: Question, goal: Slo) -> tuple[float, Candidate] | None:
        plans = self.formulation.enumerate(question.instance()).plans
        if not plans:
            return None
        statistic = "mean" if goal.fraction is not None else goal.statistic
        name = goal.metric if goal.metric in FIGURES else f"{goal.metric}_{statistic}"
        asked = replace(question, objective=load_objective(name), then=())
        answer = search(asked, _Known(plans=plans), self.tell, 1 if goal.fraction is None else _EVERY)
        if answer.best is None or np.isnan(answer.best.value):
            return None
        if goal.fraction is None:
            return answer.best.value, answer.best
        return _least_limit(asked, answer.candidates, goal)


def _least_limit(question: Question, candidates: Sequence[Candidate], goal: Slo) -> tuple[float, Candidate]:
    """The least limit that the share of requests a goal asks for is within, over some plans, and a plan that has it."""
    evaluator = Evaluator(question)
    queue = sorted(candidates, key=lambda candidate: _below(question, candidate, goal))
    best = _limit(question, evaluator, queue[0].plan, goal), queue[0]
    for candidate in queue[1:]:
        if _below(question, candidate, goal) >= best[0]:
            break
        best = min(best, (_limit(question, evaluator, candidate.plan, goal), candidate), key=lambda pair: pair[0])
    return best


def _below(question: Question, candidate: Candidate, goal: Slo) -> float:
    """A latency that this share of the requests is not within less of: a percentile two requests below the share."""
    generated = question.trace.generated(question.settings.max_model_len)
    of = {"tpot": int((generated > 1).sum()), "itl": int((generated - 1).sum())}.get(goal.metric, len(question.trace))
    latency = candidate.metrics.latency_s[goal.metric]
    return max((latency[p] for p, q in _PERCENTILES if (goal.threshold - q) * of >= 2), default=0.0)


def _some_meets(question: Question, plans: Sequence[Plan]) -> bool:
    """Whether some plan meets the goals: runs end as soon as they are known to miss one, which a search lets run on."""
    evaluator = Evaluator(replace(question, objective=load_objective("makespan"), then=()))
    bounds = {plan: evaluator.bound(plan) for plan in plans}
    hopeful = sorted((plan for plan in plans if bounds[plan][1]), key=lambda plan: bounds[plan][0])
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for start in range(0, len(hopeful), ROUND):
            runs = pool.map(lambda plan: evaluator.challenge(plan, None, (_LONGEST_S,)), hopeful[start : start + ROUND])
            if any([run is not None and run.meets_slos for run in runs]):
                return True
    return False


def _limit(question: Question, evaluator: Evaluator, plan: Plan, goal: Slo) -> float:
    """The least limit that the share of requests a goal asks for is within."""
    outcome, cost = evaluator.batches(plan)
    generated = question.trace.generated(question.settings.max_model_len)
    if goal.metric == "itl":
        assert outcome.gaps_ns is not None, "a log tells them"
        values = outcome.gaps_ns / NS_PER_S
    else:
        values = per_request_s(outcome, generated, cost.request_ns)[goal.metric]
    values = np.sort(values[~np.isnan(values)])
    shares = np.arange(1, len(values) + 1) / len(values)
    return float(values[np.argmax(shares >= goal.threshold)])


def _clashes(question: Question, work: _Work) -> tuple[tuple[Clash, ...], Goals]:
    """Irreducible clashes, each beside what the ones before it leave, and the goals that have part in them.

    A plan that breaks a family other than bandwidth cannot run. So goals are judged among the plans that can.
    """
    found: list[Clash] = []
    families, goals = tuple(FAMILIES), question.slos
    while core := work.formulation.clash(replace(question, slos=goals).instance(), families):
        tight = _tightest(goals) if "bandwidth" in core else ()
        found.append(_of_families(replace(question, slos=goals).instance(), core, tight, work))
        if tight:
            goals = tuple(goal for goal in goals if goal not in tight)
        else:
            families = tuple(name for name in families if name not in core)
    while families == FAMILIES and goals and not work.meets(question, goals):
        kept = goals
        for goal in goals:
            fewer = tuple(other for other in kept if other != goal)
            kept = fewer if fewer and not work.meets(question, fewer) else kept
        found.append(_of_goals(question, kept, work))
        goals = tuple(goal for goal in goals if goal not in kept)
    return tuple(found), tuple(goal for goal in question.slos if goal not in goals)


def _tightest(goals: Goals) -> Goals:
    """The goals that the bandwidth family stands for."""
    limits = [goal.limit for goal in goals if goal.metric == "tpot"]
    return tuple(goal for goal in goals if goal.metric == "tpot" and goal.limit == min(limits))


def _of_families(instance: Instance, core: tuple[str, ...], tight: Goals, work: _Work) -> Clash:
    """A clash of families: for each the plan that comes nearest while it keeps to the others."""
    parts = []
    for name in core:
        others = tuple(other for other in core if other != name)
        plan, broken = nearest(instance, others)
        text = next(v.text for v in broken if v.family == name)
        keeps = f", which keeps to {' and '.join(others)}" if others else ", which comes nearest"
        goal = f" ({', '.join(goal.text for goal in tight)})" if name == "bandwidth" else ""
        parts.append(f"{name}{goal}: with {plan}{keeps}, {text}")
    if "memory" in core:
        alone = work.formulation.clash(replace(instance, longest_tokens=1), core)
        held = f"the longest request holds {instance.longest_tokens:,} tokens"
        parts.append(f"{held}; one of a single token would {'not fit either' if alone else 'fit'}")
    return Clash(of=core, proof="constraints", facts=tuple(parts))


def _of_goals(question: Question, goals: Goals, work: _Work) -> Clash:
    """A clash of goals: the best value of each while the others are met."""
    asked = replace(question, slos=goals)
    certificate = search(asked, _Known(plans=work.formulation.enumerate(asked.instance()).plans), work.tell).certificate
    by_bound = certificate.simulated == 0
    parts = []
    for goal in goals:
        others = tuple(other for other in goals if other != goal)
        best = work.best(question, goal, others)
        if best is None:  # the other goals are on tokens that nobody generates
            continue
        value, candidate = best
        among = f"of the plans that meet {' and '.join(o.text for o in others)}" if others else "of all plans"
        part = f"{goal.text}: {among} {candidate.plan} comes closest and reaches {in_words(goal, value)}"
        if by_bound and goal.fraction is None and candidate.bound is not None:
            part += f", its lower bound, as if no other request were there, is {in_words(goal, abs(candidate.bound))}"
        parts.append(part)
    proof: Proof = "bound" if by_bound else "simulation"
    return Clash(of=tuple(goal.text for goal in goals), proof=proof, facts=tuple(parts))


# ---- what would help --------------------------------------------------------------------------------------------


def _relaxations(
    question: Question, clashes: Sequence[Clash], blamed: Goals, work: _Work
) -> tuple[tuple[Relaxation, ...], tuple[str, ...]]:
    """Changes that give the question a plan, those without more GPUs first, and those tried for nothing."""
    found: list[Relaxation] = []
    failed: list[str] = []
    memory = any("memory" in clash.of for clash in clashes)
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


def _first(ways: Sequence[tuple[Question, dict[str, str], str]], work: _Work) -> list[Relaxation]:
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


def _shorter(question: Question, work: _Work) -> list[Relaxation]:
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


def _easier_goals(question: Question, blamed: Goals, work: _Work) -> list[Relaxation]:
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


def _eased(question: Question, goal: Slo, others: Goals, work: _Work) -> tuple[Slo, float] | None:
    """A goal with the best limit that plans reach, rounded to what is easier, and that limit as it is."""
    best = work.best(question, goal, others)
    if best is None:
        return None
    if (goal.limit <= best[0]) if goal.metric in AT_LEAST else (goal.limit >= best[0]):
        return goal, goal.limit
    return _rounded(goal, best[0]), best[0]


def _with_goals(question: Question, changes: dict[Slo, tuple[Slo, float]], work: _Work) -> list[Relaxation]:
    goals = tuple(changes[goal][0] if goal in changes else goal for goal in question.slos)
    text = " and ".join(
        f"{new.text} in place of {goal.text}; the best {'beside that ' if index else ''}is {in_words(goal, value)}"
        for index, (goal, (new, value)) in enumerate(changes.items())
    )
    return _first([(replace(question, slos=goals), {"slo": ",".join(goal.text for goal in goals)}, text)], work)


def _rounded(goal: Slo, value: float) -> Slo:
    """The goal with a limit of three digits that the value meets."""
    exact = Decimal(repr(value))
    step = Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1)
    rounding = ROUND_FLOOR if goal.metric in AT_LEAST else ROUND_CEILING
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
    # Another price leaves it the GPU it is; sources differ with it.
    known = is_catalogued(cluster) and _unpriced(load_cluster(gpu.name).gpu) == _unpriced(gpu)
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
        larger = (
            replace(load_cluster(spec), gpu=gpu)
            if known
            else replace(cluster, name=spec, nodes=nodes, gpus_per_node=gpus)
        )
        options = {"cluster": spec} if known else {"nodes": str(nodes)}
        if question.max_devices < cluster.size:
            options["gpus"] = str(larger.size)
        yield replace(question, cluster=larger, max_devices=larger.size), options


def _unpriced(gpu: Gpu) -> Gpu:
    return replace(gpu, price_per_h=None, sources=())


def _more_gpus(question: Question, sizes: Sequence[tuple[Question, dict[str, str]]], work: _Work) -> list[Relaxation]:
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


def _both(question: Question, work: _Work) -> list[Relaxation]:
    """Where no single change will do: another weight format with the fewest GPUs it takes, of these the fewest."""
    found = []
    for changed, weights, text in _weights(question):
        for relaxation in _more_gpus(changed, list(_sizes(changed)), work):
            found.append(replace(relaxation, options=relaxation.options | weights, text=f"{relaxation.text}; {text}"))
    return [min(found, key=lambda r: r.more_gpus)] if found else []


# ---- why a plan loses -------------------------------------------------------------------------------------------


def compare(question: Question, plan: Plan, best: Candidate | None, progress: Progress | None = None) -> Comparison:
    """A given plan beside the best one: by part of its time per GPU, of its latency and of its energy."""
    answer = judge(question, plan, progress)
    if answer.best is None:
        return Comparison(plan=plan, candidate=None, reason=answer.reason)
    candidate = answer.best
    missed = misses(candidate.metrics, question.slos)
    reason = f"misses {missed}" if missed else None
    if best is None:
        return Comparison(plan=plan, candidate=candidate, reason=reason)
    evaluator = Evaluator(question)
    parts = [_parts(evaluator, one) for one in (candidate, best)]
    terms = []
    for part, unit in (("time per GPU", "s"), ("mean latency", "s"), ("energy", "J")):
        of_plan, of_best = (by_part[part] for by_part in parts)
        whole = max(sum(of_plan.values()), sum(of_best.values())) or 1.0
        for name in of_plan | of_best:
            mine, its = of_plan.get(name, 0.0), of_best.get(name, 0.0)
            if mine != its:
                terms.append(Term(part=part, name=name, unit=unit, plan=mine, best=its, share=abs(mine - its) / whole))
    terms.sort(key=lambda term: (-term.share, term.part, term.name))
    return Comparison(plan=plan, candidate=candidate, reason=reason, terms=tuple(terms))


def _parts(evaluator: Evaluator, candidate: Candidate) -> dict[str, dict[str, float]]:
    """What a run took by part; each sums to its whole: the makespan, the mean E2E, the energy."""
    usage, latency = candidate.usage, candidate.metrics.latency_s
    alone = evaluator.floor(candidate.plan).latency_s["ttft"]["mean"]
    ttft, whole = latency["ttft"]["mean"], latency["e2e"]["mean"]
    return {
        "time per GPU": usage.operations_s,
        "mean latency": {
            "first token, least": min(alone, ttft),
            "first token, waiting and sharing batches": max(ttft - alone, 0.0),
            "later tokens": whole - ttft,
        },
        "energy": {"idle draw": usage.idle_energy_j, "operations": usage.energy_j - usage.idle_energy_j},
    }
