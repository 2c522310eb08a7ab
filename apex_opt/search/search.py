"""From a problem to the best deployment and the ledger: enumerate, bound, simulate, prove.

Deployments of four shapes compete: a pool on one type of GPU, a pool on each of several, a pool whose pipelines span
two, and a pool that computes prompts beside one that answers them. All are looked for by the same loop (`best_first`),
with one incumbent. The plans of one type come first: they are few, and what they find is what the others have to beat.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations, product
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol

from apex_opt.engines.overlap import NANO, TWO
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import UsageError
from apex_opt.oracle.checks import FAMILIES
from apex_opt.plans.deployment import Deployment, Pool
from apex_opt.plans.engine import has_ranks
from apex_opt.search.answer import Answer, Scored, misses
from apex_opt.search.best_first import Simulated, best_first
from apex_opt.search.incumbent import FREE, Best
from apex_opt.search.ledger import Ledger, Part
from apex_opt.search.nearest import nearest_violation
from apex_opt.search.option import options_of
from apex_opt.search.scorer import Scorer
from apex_opt.search.shapes import Pipelines, Sides, Single, Splitter, Together, disaggregated, mixed
from apex_opt.search.shapes.disaggregated import no_pair
from apex_opt.search.shapes.pipeline import joined
from apex_opt.search.shapes.together import Unseen
from apex_opt.search.space import Formulation, TimeIsUp, check_lengths
from apex_opt.search.spread import Alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from apex_opt.search.answer import Status
    from apex_opt.search.best_first import Branches, Challenge
    from apex_opt.search.incumbent import Incumbent
    from apex_opt.search.ledger import Costs, Shape
    from apex_opt.search.problem import Problem
    from apex_opt.search.spread import Crew

    Progress = Callable[[str, int, int], None]

MOST_GAPS: Final = 20_000_000
"""Tokens up to which a given deployment's times between tokens are told without being asked for: a log takes 24 B
each."""


class Formulations(Formulation, Splitter, Protocol):
    """What the search asks of the programs."""


def search(
    problem: Problem,
    formulation: Formulations,
    progress: Progress | None = None,
    top: int = 1,
    time_limit_s: float | None = None,
    scorer: Scorer | None = None,
    crew: Callable[[Scorer], Crew] = Alone,
) -> Answer:
    """The best deployment for a problem, with its ledger, and the next best.

    Where an objective has a tolerance, the best by it is searched for first, and then, among the deployments that come
    as near to it as that, the best by those after it.

    Everything feasible is enumerated, bounded and simulated best bound first, until the next bound is no better than
    the `top`-th best found. So the answer is the optimum of the space, unless the enumeration was cut short.

    Parameters
    ----------
    problem : Problem
    formulation : Formulations       the programs that enumerate plans and split layers
    progress : callable, optional    told (what, done, total) along the way
    top : int                        best deployments to find, each exactly
    time_limit_s : float, optional   after so long no further simulation is begun; what is open then makes the gap
    scorer : Scorer, optional        of this problem, with the facts it already has, for others to share
    crew : callable                  who bounds and simulates for a scorer, this process or `Spread` over workers; it
                                     changes nothing in the answer

    Raises
    ------
    CapacityError    a request no engine of this model could serve, whatever the plan
    """
    deadline = inf if time_limit_s is None else monotonic() + time_limit_s
    check_lengths(problem)
    return _search(problem, formulation, progress or silent, top, deadline, crew, scorer)


def _search(
    problem: Problem,
    formulation: Formulations,
    tell: Progress,
    top: int,
    deadline: float,
    crew: Callable[[Scorer], Crew],
    scorer: Scorer | None = None,
) -> Answer:
    """As `search`, until a point in time."""
    split = next((index for index, part in enumerate(problem.objectives, 1) if part.tolerance), None)
    if split is not None:
        return _lexicographic(problem, split, formulation, tell, top, deadline, crew)
    best, tree = Best(problem, top), Tree(problem, scorer or Scorer(problem), formulation, tell, crew)
    found = tree.simulated(best, deadline)
    good = [one for one in found if one.scored.meets_slos]
    ranked = sorted((one.scored for one in good), key=lambda scored: rank(problem, scored))
    tree.end(problem.costs(ranked[top - 1].metrics) if len(ranked) >= top else None)
    ledger = Ledger(parts=tree.parts, best=problem.costs(ranked[0].metrics) if ranked else None)
    of_part = {id(one.scored): one.part for one in good}
    alone = tuple(next((s for s in ranked if of_part[id(s)] is single.part), None) for single in tree.singles)
    if ranked:
        status: Status = "optimal" if ledger.optimal else "feasible"
        return Answer(status=status, candidates=tuple(ranked), alone=alone, ledger=ledger)
    status, why = "unknown" if ledger.waiting else "infeasible", tree.why_not(found)
    return Answer(status=status, candidates=(), alone=alone, ledger=ledger, reason=why, told=tree.told)


def _lexicographic(
    problem: Problem,
    split: int,
    formulation: Formulations,
    tell: Progress,
    top: int,
    deadline: float,
    crew: Callable[[Scorer], Crew],
) -> Answer:
    """The best by the first objectives, then by the others among what is as good but for a tolerance."""
    aims = tuple(replace(part, tolerance=0.0) for part in problem.objectives[:split])
    first = _search(replace(problem, objective=aims[0], then=aims[1:]), formulation, tell, 1, deadline, crew)
    if first.best is None:
        return first
    metrics = first.best.metrics
    near = (goal for part in problem.objectives[:split] for goal in part.near(part.value(metrics)))
    if split == len(problem.objectives):
        last = problem.objectives[-1].name
        raise UsageError(f"objective {last}: has a tolerance and nothing after it to choose by; name one more")
    objective, *then = problem.objectives[split:]
    nearer = replace(problem, objective=objective, then=tuple(then), near=(*problem.near, *near))
    found = _search(nearer, formulation, tell, top, deadline, crew)
    for part, before in zip(found.ledger.parts, first.ledger.parts, strict=True):
        part.before = (before, *part.before)
    scorer = Scorer(problem)

    def retold(scored: Scored) -> Scored:
        """By the first objective; of several pools no bound is known before they are dealt to."""
        bound = None if problem.several else scorer.bounds(scored.deployment)[0][0]
        return replace(scored, value=problem.objective.value(scored.metrics), bound=bound)

    alone = (after or before for after, before in zip(found.alone, first.alone, strict=True))
    return Answer(
        status="optimal" if found.ledger.optimal else "feasible",
        candidates=tuple(map(retold, found.candidates or first.candidates)),
        alone=tuple(scored and retold(scored) for scored in alone),
        ledger=found.ledger,
    )


class Tree:
    """The deployments of a problem, by shape.

    Parameters
    ----------
    problem : Problem
    scorer : Scorer
    formulation : Formulations
    tell : callable      told (what, done, total) along the way
    crew : callable      who bounds and simulates for a scorer
    """

    def __init__(
        self,
        problem: Problem,
        scorer: Scorer,
        formulation: Formulations,
        tell: Progress,
        crew: Callable[[Scorer], Crew] = Alone,
    ) -> None:
        self.problem, self.scorer, self._crew = problem, scorer, crew(scorer)
        self._formulation, self._tell = formulation, tell
        types = () if problem.serving == ("pools",) else problem.types
        self.singles = [
            Single(scorer.facts(name), formulation, name if problem.mixed else None, tell, self._crew.bounded)
            for name in types
        ]
        self._others: list[Together | Unseen | Pipelines] = []
        self.told = 0  # runs made for `why_not`
        self._sides: list[Sides] = []

    @property
    def parts(self) -> tuple[Part, ...]:
        """What became of each shape."""
        return tuple(shape.part for shape in (*self.singles, *self._others))

    def simulated(self, incumbent: Incumbent, deadline: float) -> list[Simulated]:
        """Everything that may matter, simulated: what one type of GPU does alone, then several together."""
        found = self._best_first(self.singles, incumbent, deadline)
        if not self.problem.several:
            return found
        fleets = self._mixed(incumbent, deadline) if self.problem.mixed and self.singles else []
        scouts = self._scouts(fleets, incumbent, found, deadline)
        self._others = [*fleets, *(self._pipelines() if self.singles else ()), *self._pools(incumbent)]
        found += self._best_first(self._others, incumbent, deadline, scouts, len(found))
        # Where time was up before their turn, those known beforehand may be the best all the same.
        known = {one.scored.deployment for one in found}
        return found + [
            Simulated(part=part, scored=one) for one, part in scouts.values() if one.deployment not in known
        ]

    def end(self, last: Costs | None) -> None:
        """Close the parts, with `last` the costs of the last of the deployments to show."""
        for part in self.parts:
            part.end(last)

    def why_not(self, found: Sequence[Simulated]) -> str:
        """Why no deployment is an answer, with the numbers of the one that comes closest."""
        reasons = [
            self._why_not(single, [one.scored for one in found if one.part is single.part]) for single in self.singles
        ]
        if not self.problem.several:
            return reasons[0]
        told = [f"{one.part.types[0]} alone: {why}" for one, why in zip(self.singles, reasons, strict=True)]
        for shape, where, what, none in _TOGETHER:
            parts = [part for part in self.parts if part.shape == shape]
            if left := sum(part.waiting for part in parts):
                told.append(f"{where}: the time limit was reached with {left} {what}left")
            elif tried := sum(part.bounded + part.simulated for part in parts):
                told.append(f"{where}: none of {tried} {what}meets the SLOs")
            elif parts and none:
                told.append(f"{where}: {no_pair(self.problem, self._sides) if shape == 'pools' else none}")
        return "; ".join(told)

    def _best_first(
        self,
        shapes: Iterable[Branches],
        incumbent: Incumbent,
        deadline: float,
        known: dict[Deployment, tuple[Scored, Part]] | None = None,
        begun: int = 0,
    ) -> list[Simulated]:
        """One search, in which some deployments are known already, and so many were simulated before."""

        there = {deployment: scored for deployment, (scored, _) in (known or {}).items()}

        def aimed(runs: Iterable[Challenge]) -> Iterator[Challenge]:
            for deployment, bounds, worst in runs:
                # A run of several pools ends once it misses a goal, in any case.
                free = len(deployment.pools) > 1 and worst == FREE
                if deployment not in there:
                    yield deployment, bounds, self.scorer.any_cost if free else worst

        def scores(runs: Sequence[Challenge], ahead: Iterable[Challenge]) -> list[Scored | None]:
            found = iter(self._crew.scores(list(aimed(runs)), aimed(ahead)))
            return [there[run[0]] if run[0] in there else next(found) for run in runs]

        prepare = partial(tell_compiling, self._tell, self.problem)
        branches = (branch for shape in shapes for branch in shape.branches())
        return best_first(branches, incumbent, scores, self._tell, deadline, prepare, begun)

    def _mixed(self, incumbent: Incumbent, deadline: float) -> list[Together] | list[Unseen]:
        """Deployments with a pool on each of two types of GPU or more; unseen where the time is up before."""
        chosen = [
            places
            for size in range(2, len(self.singles) + 1)
            for places in combinations(range(len(self.singles)), size)
        ]
        options = []
        for single in self.singles:
            try:
                pools = [Pool(plan=plan, gpu=single.gpu) for plan in single.plans(deadline)]
            except TimeIsUp:
                return [Unseen(self.problem, [self.singles[place] for place in places]) for places in chosen]
            options.append(options_of(single.facts, pools, self._tell))
        return [
            mixed(
                self.problem,
                [self.singles[place] for place in places],
                [options[place] for place in places],
                incumbent.admits,
                self._tell,
            )
            for places in chosen
        ]

    def _pipelines(self) -> list[Pipelines]:
        """Pipelines over two types of GPU."""
        types = self.problem.types
        return [
            Pipelines(self.scorer.facts(types[one], types[other]), self._formulation, self._tell, self._crew.bounded)
            for one, other in combinations(range(len(types)), 2)
            if joined(self.problem, one, other) is not None
        ]

    def _pools(self, incumbent: Incumbent) -> list[Together]:
        """Pairs of a pool that computes prompts and one that answers them, on one type of GPU or two."""
        if "pools" not in self.problem.serving:
            return []
        self._sides = [
            Sides(self.scorer, self._formulation, place, self._tell) for place in range(len(self.problem.offers))
        ]
        return [
            disaggregated(self.scorer, prefill, decode, incumbent.admits, self._tell)
            for prefill, decode in product(self._sides, repeat=2)
        ]

    def _scouts(
        self, fleets: Sequence[Together | Unseen], incumbent: Incumbent, found: Sequence[Simulated], deadline: float
    ) -> dict[Deployment, tuple[Scored, Part]]:
        """Some of the best plans of each type side by side, simulated beforehand."""
        alone = {}
        for single in self.singles:
            good = [one.scored for one in found if one.part is single.part and one.scored.meets_slos]
            alone[single.part.types] = sorted(good, key=lambda scored: rank(self.problem, scored))
        scouts: dict[Deployment, tuple[Scored, Part]] = {}
        for shape in fleets:
            if monotonic() > deadline:
                break
            runs = shape.scouts([alone[(name,)] for name in shape.part.types])
            for place, (deployment, _) in enumerate(runs):
                self._tell("simulating plans", len(scouts), 0)
                worst = incumbent.worst(shape.part)
                aims = self.scorer.any_cost if worst == FREE else worst
                now, *later = ((one, bound, aims) for one, bound in runs[place:])
                (scored,) = self._crew.scores([now], later)
                if scored is not None and scored.meets_slos:
                    scouts[deployment] = scored, shape.part
                    incumbent.scouted([one for one, _ in scouts.values()])
        return scouts

    def _why_not(self, single: Single, done: Sequence[Scored]) -> str:
        """Why no plan of one type of GPU is an answer."""
        problem = single.facts.problem
        if single.part.waiting:
            waiting = single.part.waiting
            left = f"{waiting:,} plan{'s' * (waiting != 1)} left"
            return f"the time limit was reached with {left}, before one was found that meets the goals"
        if not single.space.feasible:
            return nearest_violation(problem.instance())
        closest, told = min(done, key=lambda scored: _miss(problem, scored), default=None), "; the closest, {}, misses"
        if closest is None:
            # Every plan was ruled out by a bound; the one with the least bound shows by how much.
            plans = (Deployment.of(plan, single.gpu) for plan in single.plans())
            closest = self.scorer.simulate(min(plans, key=lambda one: self.scorer.bounds(one)[0][0]))
            told = ", as bounds show; by these the closest, {}, run to tell how far off, misses"
            self.told += 1
        return (
            f"no feasible plan meets the SLOs{told.format(closest.plan)} "
            f"{misses(closest.metrics, problem.slos)}: relax these, offer more or faster GPUs, or lighten the trace"
        )


_TOGETHER: Final[tuple[tuple[Shape, str, str, str], ...]] = (
    ("mixed", "together", "fleets ", ""),
    ("pipeline", "pipelines over two types", "", "none fits the memory"),
    ("pools", "prefill and decode pools", "pairs ", "none fits"),
)


def judge(problem: Problem, deployment: Deployment, progress: Progress | None = None) -> Answer:
    """Score one given deployment; infeasible where it cannot run, feasible otherwise, with the goals it misses.

    Parameters
    ----------
    problem, deployment
    progress : Progress or None    told (what, done, total) along the way

    Raises
    ------
    CapacityError    a request that no plan of this model could serve
    """
    check_lengths(problem)
    tell, scorer = progress or silent, Scorer(problem)
    types = tuple(name for pool in deployment.pools for name in (pool.types or problem.types))
    several: Shape = "pools" if deployment.disaggregated else "mixed" if len(deployment.pools) > 1 else "pipeline"
    part = Part(
        shape="single" if len(types) == 1 else several,
        types=types,
        objective=problem.objective,
        space=1,
        infeasible=dict.fromkeys(FAMILIES, 0),
    )
    if fatal := tuple(scorer.faults(deployment)):
        part.infeasible[fatal[0].family] = 1
        reason = f"{deployment} cannot run: " + "; ".join(f"{v.family}: {v.text}" for v in fatal)
        return Answer(status="infeasible", candidates=(), alone=(), ledger=Ledger(parts=(part,)), reason=reason)
    if int(problem.trace.output.sum()) <= MOST_GAPS:
        scorer = Scorer(problem, gaps=True)
    tell_compiling(tell, problem, [deployment])
    tell("simulating the plan", 0, 1)
    bound = scorer.bounds(deployment)[0][0] if len(deployment.pools) == 1 else None
    scored = scorer.simulate(deployment, bound)
    part.seen.append(deployment)
    part.missed, part.best = int(not scored.meets_slos), problem.costs(scored.metrics)
    return Answer(status="feasible", candidates=(scored,), alone=(), ledger=Ledger(parts=(part,), best=part.best))


def rank(problem: Problem, scored: Scored) -> tuple[Costs, int, list[int], str]:
    """Better first: the objectives in turn, fewer GPUs, routers as they are named, then the text form.

    So ties fall the same way every time.
    """
    pools = [(use.pool.plan.route, problem.routers(use.pool.role)) for use in scored.pools]
    named = [names.index(route) for route, names in pools if route in names]
    return problem.costs(scored.metrics), scored.devices, named, scored.text


def _miss(problem: Problem, scored: Scored) -> float:
    """How far a run is from the goals it misses: the worst relative excess."""
    missed = (goal for goal in problem.slos if not scored.metrics.slo_met[goal.text])
    return max((-goal.margin(goal.reached(scored.metrics)) for goal in missed), default=0.0)


def tell_compiling(tell: Progress, problem: Problem, deployments: Iterable[Deployment]) -> None:
    """Say that the next simulations will take longer, where they will.

    Parameters
    ----------
    tell : Progress             told (what, done, total) along the way
    problem
    deployments : iterable      that are about to be simulated
    """
    from apex_opt.simulator.pack.engines import needs_compiling
    from apex_opt.simulator.routing import BEFOREHAND

    sglang = isinstance(problem.settings.scheduler, SglangScheduling)
    pools = [pool for one in deployments for pool in one.pools]
    handed = [pool.plan for pool in pools if pool.role]
    if sglang and any(plan.replicas > 1 and problem.routing_of(plan) not in BEFOREHAND for plan in handed):
        tell("simulating what SGLang hands over by loads in plain Python, about a thousand times slower", 0, 0)
    if any(
        needs_compiling(
            problem.settings_for(pool.plan),
            pool.plan.stages,
            ranks=has_ranks(problem.settings, pool.plan),
            halves=pool.plan.overlap == TWO,
            walked=pool.plan.overlap == NANO,
            handed=pool.role is not None,
            shares=pool.plan.shares,
        )
        for pool in pools
        if pool.plan.shares is None or pool.plan.attention.dp == 1
    ):
        tell("compiling the simulator, once on this machine: 4 to 15 s", 0, 0)


def silent(what: str, done: int, total: int) -> None:
    """Tell nobody.

    Parameters
    ----------
    what : str     what is being done
    done : int     steps done
    total : int    steps there are; 0 where not known
    """
