"""The ledger replayed: the space counted by plain Python, deployments simulated to their end.

It shares with the search the simulator and the costs that deployments are scored with, and nothing of what makes the
search quick: not the constraint program, not what the bounds rule out, not the early ends, not the order. The layers of
pipelines over two types of GPU are split as in the search.
"""

from __future__ import annotations

import heapq
import math
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import combinations, islice, product
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from apex_opt.oracle.checks import FAMILIES
from apex_opt.oracle.space import tally
from apex_opt.plans.deployment import ROLES, Deployment, Pool
from apex_opt.search.bounds.compose import Compose
from apex_opt.search.bounds.handed import Handed
from apex_opt.search.facts import judged
from apex_opt.search.ledger import LATE, ROUNDING
from apex_opt.search.option import options_of
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import rank, silent, tell_compiling
from apex_opt.search.shapes.pipeline import Splits, joined, pipelines
from apex_opt.search.shapes.together import deployed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from apex_opt.plans.deployment import Role
    from apex_opt.plans.plan import Plan
    from apex_opt.search.answer import Answer, Scored
    from apex_opt.search.ledger import Part, Shape
    from apex_opt.search.option import Option
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Progress
    from apex_opt.search.shapes import Splitter

    Bounded = tuple[Deployment, float]

MOST: Final = 20_000
"""Deployments over several types of GPU up to which all are simulated."""

NEAR: Final = 0.05
"""Of more, those are whose bound is within this share of the best found, the `MOST` of least bound."""

SAMPLE: Final = 2_000
"""And so many others, drawn by lot."""

_SEED: Final = 0
_LEFT_EQUAL: Final = 10 * ROUNDING


@dataclass(slots=True, kw_only=True, eq=False)
class Counted:
    """The deployments of one shape on some types of GPU, counted.

    Parameters
    ----------
    shape, types, space, infeasible, repeated : as of `apex_opt.search.ledger.Part`
    feasible : int      the others, those with a pool that nothing is dealt to among them
    simulated : int     of these
    """

    shape: Shape
    types: tuple[str, ...]
    space: int
    infeasible: dict[str, int]
    repeated: int
    feasible: int
    simulated: int = 0
    devices: Sequence[Sequence[int]] = ()
    """Of several pools, GPUs of each of the plans of each."""
    leaves: Callable[[], Iterator[Bounded]] = field(repr=False)
    """All that can run, each with its bound; infinite where it rules the deployment out."""

    @property
    def words(self) -> str:
        """Whose count it is, before a sentence; nothing where there is no other."""
        names = " and ".join(self.types)
        kinds = {"single": f"{names} alone", "mixed": f"{names} together", "pipeline": f"pipelines over {names}"}
        kinds["pools"] = f"prefill on {self.types[0]}, decode on {self.types[-1]}"
        return f"{kinds[self.shape]}: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What the replay found.

    Parameters
    ----------
    parts : tuple of Counted       the space, in the order of the ledger's parts
    meeting : int                  deployments simulated that meet the goals
    chosen : str or None           which were simulated, where these are not all
    disagreements : tuple of str   what the ledger claims and the replay does not bear out
    """

    parts: tuple[Counted, ...]
    meeting: int
    chosen: str | None
    disagreements: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.disagreements

    @property
    def space(self) -> int:
        """Deployments counted."""
        return sum(part.space for part in self.parts)

    @property
    def infeasible(self) -> dict[str, int]:
        """Those that cannot run, by the first constraint they break."""
        found: Counter[str] = Counter()
        for part in self.parts:
            found.update(part.infeasible)
        return dict(found)

    @property
    def repeated(self) -> int:
        """Those that are others."""
        return sum(part.repeated for part in self.parts)

    @property
    def simulated(self) -> int:
        """Those simulated, each to its end."""
        return sum(part.simulated for part in self.parts)


class Closing(Protocol):
    """What the programs of deployments prove of a ledger."""

    def fitting(self, devices: Sequence[Sequence[int]], most_devices: int) -> int: ...

    def beats(
        self, rows: Sequence[tuple[int, int, float]], simulated: Collection[tuple[int, int]], cost: float
    ) -> tuple[int, int] | None: ...


def check(
    problem: Problem, answer: Answer, splitter: Splitter, closing: Closing, progress: Progress | None = None
) -> Check:
    """Replay the ledger of an answer to a problem.

    It takes the time of simulating every feasible deployment, which the search is there to save. Over several types of
    GPU these can be millions: then those are simulated that may be nearly as good as the best, and a sample.

    Parameters
    ----------
    problem, answer                  as asked and answered
    splitter : Splitter              splits the layers of pipelines over two types of GPU
    closing : Closing                the programs of deployments: which fit together, and that none left can win
    progress : callable, optional    told (what, done, total) along the way
    """
    tell, scorer = progress or silent, Scorer(problem)
    tell("checking constraints", 0, 0)
    parts = tuple(_parts(scorer, splitter, tell))
    total = sum(part.feasible for part in parts)
    some = problem.several and total > MOST
    chosen = _chosen(problem, answer, parts, total, tell) if some else [list(part.leaves()) for part in parts]
    scored: list[Scored] = []
    for part, leaves in zip(parts, chosen, strict=True):
        part.simulated = len(leaves)
        scored += _scored(scorer, leaves, len(scored), sum(map(len, chosen)), tell)
    meeting = [one for one in scored if one.meets_slos]
    disagreements: list[str] = []
    for part, claimed in zip(parts, answer.ledger.parts, strict=True):
        before = part.words if problem.several else ""
        said = [
            *_counts(part, claimed),
            *_fitting(problem, part, closing),
            *_left(problem, answer, part, claimed, closing),
        ]
        disagreements += (f"{before}{one}" for one in said)
    disagreements += _optimum(problem, answer, meeting)
    disagreements += _bounds(problem, scored)
    which = f"those bounded within {NEAR:.0%} of the best, the {MOST:,} of least bound, and {SAMPLE:,} others by lot"
    return Check(parts=parts, meeting=len(meeting), chosen=which if some else None, disagreements=tuple(disagreements))


def _parts(scorer: Scorer, splitter: Splitter, tell: Progress) -> Iterator[Counted]:
    """The deployments of every shape, counted by plain Python, in the order of a ledger."""
    problem = scorer.problem
    if problem.serving != ("pools",):
        yield from _aggregated(scorer, splitter, tell)
    if "pools" in problem.serving:
        places = range(len(problem.offers))
        sides = {(role, place): _side(scorer, role, place, tell) for role in ROLES for place in places}
        for one, other in product(places, repeat=2):
            types = problem.types[one], problem.types[other]
            yield _handed(scorer, types, [sides["prefill", one], sides["decode", other]])


def _aggregated(scorer: Scorer, splitter: Splitter, tell: Progress) -> Iterator[Counted]:
    """The deployments whose pools do both phases of a request."""
    problem = scorer.problem
    singles = [_single(scorer, place) for place in range(len(problem.offers))]
    yield from (part for part, _ in singles)
    if not problem.mixed:
        return
    options = [
        options_of(scorer.facts(name), pools, tell) for name, (_, pools) in zip(problem.types, singles, strict=True)
    ]
    for size in range(2, len(singles) + 1):
        for places in combinations(range(len(singles)), size):
            yield _mixed(scorer, [singles[place][0] for place in places], [options[place] for place in places])
    for one, other in combinations(range(len(singles)), 2):
        if (both := joined(problem, one, other)) is not None:
            yield _pipelines(scorer, both, splitter)


def _single(scorer: Scorer, place: int) -> tuple[Counted, list[Pool]]:
    """The plans of one type of GPU."""
    problem = scorer.problem.alone(place)
    gpu = problem.offer.name if scorer.problem.mixed else None
    space, repeated, pools = 0, 0, list[Pool]()
    infeasible: Counter[str] = Counter(dict.fromkeys(FAMILIES, 0))
    for instance, shares in problem.instances():
        choices, counted = list(product(problem.offer.clocks, shares)), tally(instance)
        space, repeated = space + counted.space * len(choices), repeated + counted.repeated * len(choices)
        infeasible.update({family: count * len(choices) for family, count in counted.infeasible.items()})
        plans = (replace(plan, clock_mhz=clock, shares=own) for clock, own in choices for plan in counted.plans)
        pools += [Pool(plan=plan, gpu=gpu) for plan in plans]
    part = Counted(
        shape="single",
        types=(problem.offer.name,),
        space=space,
        infeasible=dict(infeasible),
        repeated=repeated,
        feasible=len(pools),
        leaves=lambda: (_bounded(scorer, Deployment(pools=(pool,))) for pool in pools),
    )
    return part, pools


def _side(scorer: Scorer, role: Role, place: int, tell: Progress) -> tuple[int, list[Option]]:
    """The plans that there are of a prefill or a decode pool on one type of GPU, and those that can be paired."""
    problem = scorer.problem
    side = problem.side(role, place)
    counted, clocks = tally(side.instance()), side.offer.clocks
    gpu = side.offer.name if problem.mixed else None
    pools = [
        Pool(plan=replace(plan, clock_mhz=clock), gpu=gpu, role=role)
        for clock in clocks
        for plan in counted.plans
        if plan.stages == 1 and plan.attention.dp == 1
    ]
    return counted.space * len(clocks), options_of(scorer.facts_of(pools[0]), pools, tell) if pools else []


def _handed(scorer: Scorer, types: tuple[str, str], sides: Sequence[tuple[int, list[Option]]]) -> Counted:
    """A prefill and a decode pool on two types of GPU, which may be the same."""
    problem = scorer.problem
    space, options = math.prod(size for size, _ in sides), [some for _, some in sides]
    pairs = list(product(*options))
    free = {offer.name: offer.free for offer in problem.offers}
    most = min(problem.max_devices, sum(free[name] for name in set(types)))
    fitting = [pair for pair in pairs if sum(option.devices for option in pair) <= most]
    infeasible = {"part": space - len(pairs), "gpus": len(pairs) - len(fitting)} | dict.fromkeys(LATE["pools"], 0)

    def leaves() -> Iterator[Bounded]:
        return _composed(problem, Handed(problem, scorer.outside_ns, scorer.pairs), fitting, infeasible, LATE["pools"])

    return Counted(
        shape="pools",
        types=types,
        space=space,
        infeasible=infeasible,
        repeated=0,
        feasible=len(fitting),
        leaves=leaves,
    )


def _mixed(scorer: Scorer, singles: Sequence[Counted], options: Sequence[Sequence[Option]]) -> Counted:
    """A pool on each of some types of GPU: the product of their plans, within the limit on GPUs."""
    problem = scorer.problem
    space, feasible = math.prod(one.space for one in singles), math.prod(one.feasible + one.repeated for one in singles)
    sizes, different = {0: 1}, math.prod(map(len, options))
    for some in options:
        taken: dict[int, int] = {}
        for before, ways in sizes.items():
            for option in some:
                taken[before + option.devices] = taken.get(before + option.devices, 0) + ways
        sizes = taken
    fitting = sum(ways for devices, ways in sizes.items() if devices <= problem.max_devices)
    infeasible = {"part": space - feasible, "gpus": different - fitting, "share": 0}

    def leaves() -> Iterator[Bounded]:
        fit = (row for row in product(*options) if sum(option.devices for option in row) <= problem.max_devices)
        return _composed(problem, Compose(problem, scorer.outside_ns), fit, infeasible, LATE["mixed"])

    return Counted(
        shape="mixed",
        types=tuple(name for one in singles for name in one.types),
        space=space,
        infeasible=infeasible,
        repeated=feasible - different,
        feasible=fitting,
        devices=[[option.devices for option in some] for some in options],
        leaves=leaves,
    )


def _composed(
    problem: Problem,
    compose: Compose,
    rows: Iterable[tuple[Option, ...]],
    infeasible: dict[str, int],
    late: Sequence[str],
) -> Iterator[Bounded]:
    """Deployments of several pools with their bounds; those whose pools do not go together are counted.

    Parameters
    ----------
    problem
    compose : Compose     their floors
    rows : the pools of each
    infeasible : by family
    late : the families of these
    """
    left = iter(rows)
    infeasible.update(dict.fromkeys(late, 0))
    while some := list(islice(left, compose.at_once)):
        run, together = compose.of(some)
        for index in np.flatnonzero(~together).tolist():
            infeasible[compose.lost(some[index])] += 1
        bounds, possible = judged(run, problem.objectives, problem.goals)
        for index in np.flatnonzero(together).tolist():
            yield deployed(some[index]), float(bounds[index, 0]) if possible[index] else math.inf


def _pipelines(scorer: Scorer, problem: Problem, splitter: Splitter) -> Counted:
    """The pipelines over two types of GPU whose layers find room."""
    splits = Splits(scorer.facts(*problem.types), splitter)
    plans, space = [], 0
    for cut, counts in pipelines(problem):
        space += len(counts)
        plans += [plan for count in counts if (plan := splits(cut.times(count))) is not None]
    return Counted(
        shape="pipeline",
        types=problem.types,
        space=space,
        infeasible={"memory": space - len(plans)},
        repeated=0,
        feasible=len(plans),
        leaves=lambda: (_bounded(scorer, Deployment.of(plan)) for plan in plans),
    )


def _bounded(scorer: Scorer, deployment: Deployment) -> Bounded:
    """A deployment of one pool with its bound; one that its bound says misses a goal may be no better than anything."""
    bounds, possible = scorer.bounds(deployment)
    return deployment, bounds[0] if possible else math.inf


def _chosen(
    problem: Problem, answer: Answer, parts: Sequence[Counted], total: int, tell: Progress
) -> list[list[Bounded]]:
    """Of each part the deployments that are simulated where there are too many for all of them."""
    limit = -math.inf
    if answer.best is not None:
        cost = problem.objective.signed(problem.objective.value(answer.best.metrics))
        limit = cost + NEAR * abs(cost)
    drawn = set(np.random.default_rng(_SEED).choice(total, min(SAMPLE, total), replace=False).tolist())
    near: list[tuple[float, int, int, Deployment]] = []
    found: list[dict[Deployment, float]] = [{} for _ in parts]
    seen = 0
    for place, part in enumerate(parts):
        for deployment, bound in part.leaves():
            tell("bounding every deployment", seen, total)
            if seen in drawn or (answer.best is not None and deployment == answer.best.deployment):
                found[place][deployment] = bound
            elif bound <= limit:
                heapq.heappush(near, (-bound, -seen, place, deployment))
                if len(near) > MOST:
                    heapq.heappop(near)
            seen += 1
    for bound, _, place, deployment in near:
        found[place][deployment] = -bound
    return [list(some.items()) for some in found]


def _scored(scorer: Scorer, leaves: Sequence[Bounded], before: int, total: int, tell: Progress) -> Iterator[Scored]:
    """Deployments simulated to their end, each with its bound beside."""
    tell_compiling(tell, scorer.problem, (deployment for deployment, _ in leaves))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        for done, one in enumerate(threads.map(lambda leaf: scorer.simulate(*leaf), leaves), before + 1):
            tell("simulating every plan", done, total)
            yield one


def _counts(part: Counted, claimed: Part) -> Iterator[str]:
    """What contradicts how many deployments there are, and what became of them.

    A search knows of repeated plans, of pools that get nothing to do and of layers that fit nowhere only once it comes
    to them: of these there may be more than it counts.
    """
    what = "plans" if part.shape == "single" else "deployments"
    if claimed.space != part.space:
        yield f"the space has {part.space} {what}, not {claimed.space}"
    late = LATE[part.shape]
    for family, count in part.infeasible.items():
        if claimed.infeasible[family] > count or (family not in late and claimed.infeasible[family] != count):
            yield f"{count} {what} break {family} first, not {claimed.infeasible[family]}"
    accounted = claimed.bounded + claimed.repeated + claimed.simulated + claimed.waiting
    listed = part.feasible + part.repeated
    accounted += sum(claimed.infeasible[family] for family in late)
    if part.shape == "pipeline":
        listed += part.infeasible["memory"]
    if accounted != listed:
        yield f"{listed} {what} are feasible, {accounted} are accounted for"
    if claimed.repeated > part.repeated:
        yield f"{part.repeated} {what} have even stages once moved, not {claimed.repeated}"


def _fitting(problem: Problem, part: Counted, closing: Closing) -> Iterator[str]:
    """Whether the program finds as many deployments that fit together as counting does."""
    if part.devices:
        fitting = closing.fitting(part.devices, problem.max_devices)
        if fitting != part.feasible:
            yield f"{fitting} deployments fit together by the program, {part.feasible} by counting"


def _left(problem: Problem, answer: Answer, part: Counted, claimed: Part, closing: Closing) -> Iterator[str]:
    """What was not simulated and could be better than the best, by the closing proof.

    Bounds of several pools hang on more than one plan, so the proof is of plans and pipelines alone.
    """
    tolerant = any(objective.tolerance for objective in problem.objectives)  # the answer need not be best by the first
    if answer.best is None or answer.status != "optimal" or part.shape in ("mixed", "pools") or tolerant:
        return
    cuts: dict[Plan, int] = {}
    rows, seen = [], {deployment.plan for deployment in claimed.seen}
    for deployment, bound in part.leaves():
        plan = deployment.plan
        rows.append((cuts.setdefault(plan.times(1), len(cuts)), plan.replicas, bound))
    simulated = {(cuts[plan.times(1)], plan.replicas) for plan in seen if plan.times(1) in cuts}
    found = closing.beats(rows, simulated, problem.objective.signed(answer.best.value))
    if found is not None:
        plan = next(plan for plan, place in cuts.items() if place == found[0]).times(found[1])
        yield f"{plan} was not simulated, and by its bound could be better than the best"


def _in_order(problem: Problem, meeting: list[Scored]) -> list[Scored]:
    """What can be the answer, best first: near enough by objectives with a tolerance, then by the others."""
    kept, begin = meeting, 0
    for end, part in enumerate(problem.objectives, 1):
        if part.tolerance and kept:
            aims = problem.objectives[begin:end]
            best = min(kept, key=lambda one: problem.costs(one.metrics)[begin:end])
            goals = [goal for aim in aims for goal in aim.near(aim.value(best.metrics))]
            kept = [one for one in kept if all(goal.met(goal.reached(one.metrics)) for goal in goals)]
            begin = end
    return sorted(kept, key=lambda one: (problem.costs(one.metrics)[begin:], *rank(problem, one)[1:]))


def _optimum(problem: Problem, answer: Answer, meeting: list[Scored]) -> Iterator[str]:
    """What contradicts the deployment that is answered, or that there is none."""
    best, gap = answer.best, answer.ledger.gap
    if best is None:
        if meeting and answer.status == "infeasible":
            yield f"{_in_order(problem, meeting)[0].text} meets the goals, though no plan is said to"
        return
    if best.deployment not in {one.deployment for one in meeting}:
        yield f"{best.text} is not among the plans that meet the goals"
        return
    first = _in_order(problem, meeting)[0]
    parts = problem.objectives
    aim = next(part for index, part in enumerate(parts) if not any(later.tolerance for later in parts[index:]))
    said = f"{aim.value(first.metrics):.6g} against {aim.value(best.metrics):.6g}"
    # Where the time was up, plans left that can be no better than the best may yet be as good, and come before it.
    equal = answer.ledger.waiting and all(
        math.isclose(one, other, rel_tol=_LEFT_EQUAL)
        for one, other in zip(*(problem.costs(one.metrics)[parts.index(aim) :] for one in (first, best)), strict=True)
    )
    if answer.status == "optimal" and first.deployment != best.deployment and not equal:
        yield f"{first.text} comes before {best.text}: {said}"
    cost, least = aim.signed(aim.value(best.metrics)), aim.signed(aim.value(first.metrics))
    if gap is not None and least < cost - (gap + ROUNDING) * abs(cost):
        yield f"{first.text} is better by more than the gap of {gap:.1%}: {said}"


def _bounds(problem: Problem, scored: Iterable[Scored]) -> Iterator[str]:
    """Deployments that are better than a bound allows."""
    for one in scored:
        cost, bound = problem.objective.signed(one.value), one.bound
        if bound == math.inf and one.meets_slos:
            yield f"{one.text} meets the goals, which its bound rules out"
        elif bound is not None and bound != math.inf and cost < bound - ROUNDING * abs(bound):
            yield f"{one.text} costs {cost:.6g}, less than its bound {bound:.6g}"
