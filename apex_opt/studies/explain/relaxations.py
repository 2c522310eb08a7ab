"""Which changes to a problem without a plan give it one."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from functools import partial
from typing import TYPE_CHECKING, Final

from apex_opt.cluster import list_clusters, load_cluster
from apex_opt.cluster.catalogue import is_catalogued
from apex_opt.engines import ENGINES
from apex_opt.ir.formats import FORMATS
from apex_opt.plans.engine import limited
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.plan import default_kv_format
from apex_opt.search.nearest import nearest
from apex_opt.studies.explain.solving import OutOfTime, Solved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.figures import Goal
    from apex_opt.oracle.instance import Instance
    from apex_opt.search.problem import Problem
    from apex_opt.studies.explain.clashes import Clash
    from apex_opt.studies.explain.solving import Goals, Work

GROWTH: Final = 4
"""How many times the fewest GPUs on which plans can run are tried for goals: every size is a search of its own."""

MOST_GPUS: Final = 64
"""How far more GPUs are tried."""

_DIGITS: Final = 3
_BLOCK: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """A change with which the problem was solved and has a plan.

    Parameters
    ----------
    options : mapping            what to ask for instead: option to value; "nodes" is that of the cluster's file
    more_gpus : int              GPUs beyond those offered
    solved : Solved              the plan it gives: the best, or where there are no goals one that fits
    text : str                   the change in words
    """

    options: dict[str, str]
    more_gpus: int = 0
    solved: Solved
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What was tried: changes that give a plan, those without more GPUs first, those that do not, and those left."""

    found: tuple[Relaxation, ...] = ()
    failed: tuple[str, ...] = ()
    untried: tuple[str, ...] = ()


def relax(clashing: Sequence[Clash], blamed: Goals, work: Work) -> Tried:
    """Try changes to a problem without a plan, those that are quick to solve first, until the time is up.

    Parameters
    ----------
    clashing : sequence of Clash    why it has none
    blamed : tuple of Goal           goals that have part in that
    work : Work
    """
    problem = work.problem
    memory = any("memory" in clash.of for clash in clashing)
    # A format that the GPU does not compute stays one with any cache, on any number of GPUs and for any goal.
    format_alone = any(clash.of == ("format",) for clash in clashing)
    kinds: list[tuple[str, Callable[[], list[Relaxation]]]] = []
    if problem.serving == ("pools",):
        kinds.append(("pools that do both phases", partial(_first, _both_phases(problem), work)))
    if blamed:
        kinds.append(("other limits of the goals", partial(_easier_goals, blamed, work)))
    if memory and not format_alone and _keeps_states(problem):
        kinds.append(("fewer sequences at once", partial(_fewer_sequences, work)))
    if memory and not format_alone:
        kinds.append(("a shorter max_model_len", partial(_shorter, work)))
    if any("engine" in clash.of for clash in clashing) and (ways := _block_sizes(problem)):
        kinds.append(("another block_size", partial(_first, ways, work)))
    if any("engine" in clash.of for clash in clashing) and problem.serving == ("aggregated",):
        kinds.append(("another engine", partial(_first, _engines(problem), work)))
    if not format_alone and (ways := _kv_formats(problem)):
        kinds.append(("an fp8 KV cache", partial(_first, ways, work)))
    if ways := other_weights(problem):
        kinds.append(("another weight format", partial(_first, ways, work)))
    found: list[Relaxation] = []
    failed: list[str] = []
    untried: list[str] = []
    for what, solve in kinds:
        try:
            held = solve()
        except OutOfTime:
            untried.append(what)
        else:
            found += held
            failed += [] if held else [what]
    more = Tried() if format_alone else _more_gpus(problem, work)
    found, failed, untried = found + list(more.found), failed + list(more.failed), untried + list(more.untried)
    if not found and not untried:
        both = _both(work)
        found, untried = list(both.found), list(both.untried)
    ordered = sorted(found, key=lambda r: r.more_gpus)
    return Tried(found=tuple(ordered), failed=tuple(failed), untried=tuple(untried))


def _first(ways: Sequence[tuple[Problem, dict[str, str], str]], work: Work) -> list[Relaxation]:
    """The first of some changes that gives a plan."""
    for changed, options, text in ways:
        if (solved := work.solve(changed)) is not None:
            return [Relaxation(options=options, solved=solved, text=text)]
    return []


def _both_phases(problem: Problem) -> list[tuple[Problem, dict[str, str], str]]:
    """Pools that do both phases, in place of some that hand prompts over."""
    text = "batches that hold both phases, on one pool in place of two"
    return [(replace(problem, serving=("aggregated",)), {"serving": "aggregated"}, text)]


def _engines(problem: Problem) -> list[tuple[Problem, dict[str, str], str]]:
    """The rules of the other engines; the figures stay those of the engine asked for."""
    own = problem.settings.runnable
    return [
        (
            replace(problem, settings=replace(problem.settings, runnable=rules)),
            {"runnable": name},
            f"plans that {rules.release} can start in place of those of {own.release if own else 'any engine'}",
        )
        for name, rules in ENGINES.items()
        if rules is not own
    ]


def _block_sizes(problem: Problem) -> list[tuple[Problem, dict[str, str], str]]:
    """KV blocks as every engine takes them for every model."""
    if problem.settings.block_size == _BLOCK:
        return []
    changed = replace(problem, settings=replace(problem.settings, block_size=_BLOCK))
    return [
        (
            changed,
            {"block_size": str(_BLOCK)},
            f"KV blocks of {_BLOCK} tokens in place of {problem.settings.block_size}",
        )
    ]


def other_weights(problem: Problem) -> list[tuple[Problem, dict[str, str], str]]:
    """Other weight formats, those of the most bits first."""
    ways = []
    for name in sorted(_other_formats(problem.instance()), key=lambda name: -FORMATS[name].weight_bits):
        kv = problem.model.kv_format or default_kv_format(name)
        changed = problem.offering(weight_formats=(name,), kv_formats=(kv,))
        ways.append((changed, {"weights": name}, f"weights in {name}: {FORMATS[name].description}"))
    return ways


def _other_formats(instance: Instance) -> tuple[str, ...]:
    """Formats worth proposing: those of other bits or other arithmetic than asked for, of variants the smallest."""
    gpu = instance.cluster.gpu
    smallest: dict[tuple[int, str], str] = {}
    for entry in sorted(FORMATS.values(), key=lambda entry: -entry.weight_bits):
        dtype = entry.hardware_dtype or gpu.half_dtype
        if gpu.supports(dtype) and (entry.weight_bits < 16 or dtype == gpu.half_dtype):
            smallest[int(entry.weight_bits), dtype] = entry.name
    return tuple(name for name in FORMATS if name in smallest.values() and name not in instance.weight_formats)


def _kv_formats(problem: Problem) -> list[tuple[Problem, dict[str, str], str]]:
    """A KV cache of half the size."""
    if "fp8" in problem.offer.kv_formats:
        return []
    changed = problem.offering(kv_formats=("fp8",) * len(problem.offer.kv_formats))
    return [(changed, {"kv": "fp8"}, "KV cache in fp8")]


def _keeps_states(problem: Problem) -> bool:
    """Whether memory is held beside the KV cache for the state of every sequence that can run at once."""
    instance = problem.instance()
    plan, _ = nearest(instance)
    stages = stage_memory(instance.model, instance.cluster.gpu, plan, limited(instance.settings, plan))
    return any(stage.states_bytes for stage in stages)


def _fewer_sequences(work: Work) -> list[Relaxation]:
    """Half as many sequences at once, again and again until their states leave room for a plan."""
    problem, most = work.problem, work.problem.settings.max_num_seqs
    seqs = most
    while seqs > 1:
        seqs //= 2
        limits = dict.fromkeys((one and min(one, seqs), tokens) for one, tokens in problem.batch_limits)
        settings = replace(problem.settings, max_num_seqs=seqs)
        changed = replace(problem, settings=settings, batch_limits=tuple(limits))
        if work.some(changed) is not None:
            text = f"at most {seqs:,} sequences at once in place of {most:,}, with a state each"
            return _first([(changed, {"max_num_seqs": str(seqs)}, text)], work)
    return []


def _shorter(work: Work) -> list[Relaxation]:
    """The largest max_model_len at which the longest request fits; less of it is held the shorter it is."""
    problem = work.problem
    trace, settings = problem.trace, problem.settings

    def limited_to(tokens: int) -> Problem:
        return replace(problem, settings=replace(settings, max_model_len=tokens))

    low = int(trace.prompt.max()) + 1
    high = settings.max_model_len
    if not problem.holds_longest:
        high = min(high, int((trace.prompt + trace.output).max()))
    if low >= high or work.some(limited_to(low)) is None:
        return []
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if work.some(limited_to(middle)) is None else (middle, high)
    cut = int((trace.prompt + trace.output > low).sum())
    text = f"requests of at most {low:,} tokens: {cut:,} of {len(trace):,} answers end early"
    return _first([(limited_to(low), {"max_model_len": str(low)}, text)], work)


def _easier_goals(blamed: Goals, work: Work) -> list[Relaxation]:
    """For each goal that clashes the nearest limit that can be had; where one is not enough, all of them in turn."""
    slos = work.problem.slos
    found = []
    for goal in blamed:
        others = tuple(other for other in slos if other != goal)
        if (eased := _eased(goal, others, work)) is not None:
            found += _with_goals({goal: eased}, work)
    if not found and len(blamed) > 1:
        kept = tuple(goal for goal in slos if goal not in blamed)
        changes: dict[Goal, tuple[Goal, float]] = {}
        for goal in blamed:
            if (eased := _eased(goal, kept, work)) is None:
                return []
            changes[goal] = eased
            kept = (*kept, eased[0])
        found += _with_goals(changes, work)
    return found


def _eased(goal: Goal, others: Goals, work: Work) -> tuple[Goal, float] | None:
    """A goal with the best limit that plans reach, rounded to what is easier, and that limit as it is."""
    closest = work.runs.closest(goal, others)
    if closest is None:
        return None
    value, _ = closest
    if (goal.limit <= value) if goal.figure.maximise else (goal.limit >= value):
        return goal, goal.limit
    return _rounded(goal, value), value


def _with_goals(changes: dict[Goal, tuple[Goal, float]], work: Work) -> list[Relaxation]:
    """The problem with other limits of some goals: its plans are those of the asked one, with the same runs."""
    goals = tuple(changes[goal][0] if goal in changes else goal for goal in work.problem.slos)
    text = " and ".join(
        f"{new.text} in place of {goal.text}; the best {'beside that ' if index else ''}is {goal.told(value)}"
        for index, (goal, (new, value)) in enumerate(changes.items())
    )
    best = work.runs.best(goals)
    if best is None:
        return []
    solved = Solved(deployment=best.deployment, value=best.value)
    return [Relaxation(options={"slo": ",".join(goal.text for goal in goals)}, solved=solved, text=text)]


def _rounded(goal: Goal, value: float) -> Goal:
    """The goal with a limit of three digits that the value meets."""
    exact = Decimal(repr(value))
    step = Decimal(1).scaleb(exact.adjusted() - _DIGITS + 1)
    rounding = ROUND_FLOOR if goal.figure.maximise else ROUND_CEILING
    return replace(goal, limit=float((exact / step).to_integral_value(rounding) * step), text="")


def _sizes(problem: Problem, work: Work) -> Iterator[tuple[Problem, dict[str, str]]]:
    """The problem with more GPUs, fewest first, as far as they are tried."""
    first = problem.max_devices if not problem.slos or work.some(problem) is not None else None
    for larger, options in _clusters(problem):
        if first is None and work.some(larger) is not None:
            first = larger.max_devices
        if problem.slos and first is not None and larger.max_devices > GROWTH * first:
            return
        yield larger, options


def _clusters(problem: Problem) -> Iterator[tuple[Problem, dict[str, str]]]:
    """The problem with more GPUs of the same type: more of the cluster, then of a full node, then whole nodes."""
    cluster, gpu, most = problem.cluster, problem.cluster.gpu, MOST_GPUS
    for gpus in range(problem.max_devices + 1, min(problem.offer.free, most) + 1):
        yield replace(problem, max_devices=gpus), {"gpus": str(gpus)}
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
        wired = load_cluster(spec) if known else replace(cluster, name=spec, nodes=nodes, gpus_per_node=gpus)
        larger = replace(wired, gpu=gpu)
        options = {"cluster": spec} if known else {"nodes": str(nodes)}
        if problem.max_devices < cluster.size:
            options["gpus"] = str(larger.size)
        yield replace(problem.offering(cluster=larger, tree=None), max_devices=larger.size), options


def _unpriced(gpu: Gpu) -> Gpu:
    return replace(gpu, price_per_h=None, sources=())


def _more_gpus(problem: Problem, work: Work) -> Tried:
    """The fewest GPUs that give a plan: sizes up to twice as many, then up to twice those."""
    sizes = list(_sizes(problem, work))
    first, above = problem.max_devices, problem.max_devices
    last = sizes[-1][0].max_devices if sizes else first
    while sizes:
        band = [size for size in sizes if size[0].max_devices <= 2 * above] or sizes[:1]
        sizes = sizes[len(band) :]
        try:
            found = _fewest(band, first, above, work)
        except OutOfTime:
            failed = (f"up to {above} GPUs",) if above > first else ()
            return Tried(failed=failed, untried=(f"{band[0][0].max_devices} to {last} GPUs",))
        if found is not None:
            return Tried(found=(found,))
        above = band[-1][0].max_devices
    return Tried(failed=(f"up to {last} GPUs",) if last > first else ())


def _fewest(sizes: Sequence[tuple[Problem, dict[str, str]]], first: int, above: int, work: Work) -> Relaxation | None:
    """The first of some sizes that gives a plan over more than `above` GPUs, in place of the `first` there were."""
    largest = sizes[-1][0]
    # Constraints ask how many GPUs there are, not how they are wired, so what fits on some fits on more.
    if not largest.slos:
        sizes = sizes[bisect_left(sizes, True, key=lambda size: work.fits(size[0])) :][:1] if work.fits(largest) else ()
    # More nodes wire no plan worse.
    plans = tuple(plan for plan in work.plans(largest) if plan.devices > above) if largest.slos else ()
    if largest.slos and len(sizes) > 1 and not work.some_meets(largest, plans):
        return None
    for changed, options in sizes:
        gpus = changed.max_devices
        work.tell("trying more GPUs", gpus, largest.max_devices)
        solved = work.solve(changed, tuple(plan for plan in plans if above < plan.devices <= gpus))
        if solved is not None:
            text = f"{gpus} GPUs in place of {first}, as {changed.cluster.name}"
            return Relaxation(options=options, more_gpus=gpus - first, solved=solved, text=text)
        above = gpus
    return None


def _both(work: Work) -> Tried:
    """Where no single change will do: another weight format with the fewest GPUs it takes, of these the fewest."""
    found: list[Relaxation] = []
    untried: list[str] = []
    for changed, weights, text in other_weights(work.problem):
        more = _more_gpus(changed, work)
        found += [replace(r, options=r.options | weights, text=f"{r.text}; {text}") for r in more.found]
        untried += [f"{gpus} with weights in {weights['weights']}" for gpus in more.untried]
    fewest = min(found, key=lambda r: r.more_gpus, default=None)
    return Tried(found=() if fewest is None else (fewest,), untried=tuple(untried))
