"""Kinds of deployments that are explained each by itself: one pool, or one that hands prompts over to another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Final, Protocol

from apex_opt.plans.deployment import ROLES, Deployment, Pool
from apex_opt.plans.plan import Plan, repeated
from apex_opt.search.bounds.handed import Handed
from apex_opt.search.nearest import feasible
from apex_opt.search.option import Option, options_of
from apex_opt.search.pairs import pairable
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import Formulations
from apex_opt.search.shapes import Sides
from apex_opt.search.shapes.together import deployed
from apex_opt.search.space import Moves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from apex_opt.figures.run import Run
    from apex_opt.oracle.instance import Instance
    from apex_opt.search.problem import Problem

    Tell = Callable[..., None]


class Diagnosis(Formulations, Protocol):
    """What an explanation asks of a plan-space program."""

    def clash(self, instance: Instance, families: Sequence[str] = ...) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Floored:
    """Deployments with what no run of them can beat.

    Parameters
    ----------
    deployments : tuple of Deployment
    run : Run      a row for each
    alone : Run    the same as if each request were the only one; a row for each, or one for all
    """

    deployments: tuple[Deployment, ...]
    run: Run
    alone: Run


class Kind(Protocol):
    """Deployments of one kind, of a problem with one type of GPU."""

    def listed(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> tuple[Deployment, ...]:
        """All that are feasible, at every clock, the highest first.

        Parameters
        ----------
        problem : Problem
        formulation : Diagnosis    enumerates plans
        tell : callable            told (what, done, total) along the way
        """
        ...

    def some(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> Deployment | None:
        """One that is feasible, on few GPUs.

        Parameters
        ----------
        problem : Problem
        formulation : Diagnosis    enumerates plans
        tell : callable            told (what, done, total) along the way
        """
        ...

    def fits(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> bool:
        """Whether there is one.

        Parameters
        ----------
        problem : Problem
        formulation : Diagnosis    enumerates plans
        tell : callable            told (what, done, total) along the way
        """
        ...

    def floors(self, scorer: Scorer, deployments: Sequence[Deployment], tell: Tell) -> Iterator[Floored]:
        """Of some deployments what no run can beat; those that find no room are left out.

        Parameters
        ----------
        scorer : Scorer
        deployments : sequence of Deployment
        tell : callable            told (what, done, total) along the way
        """
        ...


class OnePool:
    """Pools that do both phases of a request."""

    def listed(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> tuple[Deployment, ...]:
        """All that are feasible, with their layers moved."""
        tell("enumerating plans")
        moves, most, cuts = Moves(problem, formulation), problem.instance().max_devices, list[Plan]()
        for instance, shares in problem.instances():
            found = formulation.enumerate(instance)
            some = list(found.plans)
            for index, movable in enumerate(found.movable):
                tell("moving layers", index, len(found.movable))
                if (cut := moves(movable)) is not None:
                    some.append(cut)
            cuts += [replace(cut, shares=own) for own in shares for cut in some]
        return tuple(
            Deployment.of(replace(routed, clock_mhz=clock).times(count))
            for clock in problem.offer.clocks
            for cut in cuts
            for routed, counts in repeated(cut, most // cut.devices, problem.routings)
            for count in counts
        )

    def some(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> Deployment | None:
        """One that is feasible, by plain Python."""
        plan = feasible(problem.instance())
        return None if plan is None else Deployment.of(plan)

    def fits(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> bool:
        """Whether there is one, by the program."""
        return not formulation.clash(problem.instance())

    def floors(self, scorer: Scorer, deployments: Sequence[Deployment], tell: Tell) -> Iterator[Floored]:
        """Floors of those together that are the same but for the number of replicas."""
        facts, cuts = scorer.facts(), dict[Any, list[int]]()
        for one in deployments:
            cuts.setdefault(replace(one.plan, replicas=1), []).append(one.plan.replicas)
        # Plans of the same cut share their tables while these are still there.
        for done, cut in enumerate(sorted(cuts, key=lambda cut: (cut.cut, cut.stages))):
            tell("bounding plans", done, len(cuts))
            for alike in facts.alike(cut, cuts[cut]):
                yield Floored(
                    deployments=tuple(Deployment.of(alike.plan.times(count)) for count in alike.replicas),
                    run=facts.floors(alike),
                    alone=facts.alone(alike.plan.times(alike.replicas[0])),
                )


class TwoPools:
    """A pool that computes prompts and one that answers them."""

    def listed(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> tuple[Deployment, ...]:
        """All pairs that go together."""
        scorer = Scorer(problem)
        sides = Sides(scorer, formulation, 0, tell)
        pairs = product(*(sides.pools[role] for role in ROLES))
        fitting = (pair for pair in pairs if sum(pool.plan.devices for pool in pair) <= problem.max_devices)
        return tuple(Deployment(pools=pair) for pair in fitting if not scorer.pairs.lost(*pair))

    def some(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> Deployment | None:
        """The smallest plans of either role; where these do not go together, the pair on the fewest GPUs."""
        pair = []
        for role in ROLES:
            plan = feasible(problem.side(role, 0).instance(), pairable)
            if plan is None:
                return None
            pair.append(Pool(plan=plan, role=role))
        if sum(pool.plan.devices for pool in pair) > problem.max_devices:
            return None
        if not Scorer(problem).pairs.lost(*pair):
            return Deployment(pools=tuple(pair))
        found = self.listed(problem, formulation, tell)
        return min(found, key=lambda one: (one.devices, str(one)), default=None)

    def fits(self, problem: Problem, formulation: Diagnosis, tell: Tell) -> bool:
        """Whether any pair goes together."""
        return self.some(problem, formulation, tell) is not None

    def floors(self, scorer: Scorer, deployments: Sequence[Deployment], tell: Tell) -> Iterator[Floored]:
        """Floors of pairs."""
        options = dict[Pool, Option]()
        for place in range(len(ROLES)):
            pools = list(dict.fromkeys(one.pools[place] for one in deployments))
            found = options_of(scorer.facts_of(pools[0]), pools, tell) if pools else []
            options |= dict(zip(pools, found, strict=True))
        compose = Handed(scorer.problem, scorer.outside_ns, scorer.pairs)
        rows = [(options[one.pools[0]], options[one.pools[1]]) for one in deployments]
        rows = [row for row in rows if not compose.lost(row)]
        for start in range(0, len(rows), compose.at_once):
            some = rows[start : start + compose.at_once]
            run, _ = compose.of(some)
            yield Floored(deployments=tuple(map(deployed, some)), run=run, alone=run)


_ONE: Final = OnePool()
_TWO: Final = TwoPools()


def kind_of(problem: Problem) -> Kind:
    """The kind of deployments of a problem that has one."""
    return _TWO if problem.serving == ("pools",) else _ONE


def kinds_of(problem: Problem) -> Iterator[Problem]:
    """The problem with each kind of deployments alone, and of phases that share GPUs those that do so alike."""
    for serving in problem.serving:
        own = replace(problem, serving=(serving,), shares=(None,))
        if serving != "shared":
            yield own
            continue
        for _, shares in problem.instances():
            if shares != (None,):
                yield replace(own, shares=shares)
