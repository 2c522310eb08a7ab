"""How far the times behind an answer may be off before another deployment wins, and which are as good within the error.

Were everything to take f times as long while clients send as they do, every run would be that of another problem, f
times as slow: of one whose requests come f times as fast and whose limits are f times as tight. So what the answer
would be is asked of the search itself, with another trace and other limits. Timers of an engine, such as that of vLLM's
coordinator, count as times like all others.

Factors are powers of 1.01, asked farther and farther from 1 until the best deployment no longer wins, and then between
the last two by bisection. That a deployment wins which is as near to the best as the error is no news, and does not
count.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, TypeVar

from apex_opt.errors import UsageError
from apex_opt.search.answer import reached
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import rank, search, silent
from apex_opt.search.spread import Alone

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from apex_opt.figures import Figure, Objective
    from apex_opt.search.answer import Answer, Scored
    from apex_opt.search.problem import Problem
    from apex_opt.search.search import Formulations, Progress
    from apex_opt.search.spread import Crew

L = TypeVar("L")
Times = Literal["all", "best", "others"]
"""Whose times are off: of every deployment alike, of the best alone, of any of the others alone."""

STEP: Final = 1.01
STEPS: Final = 70
"""Up to which times are taken for longer or shorter: to about twice and half of what they are."""
MOST_TIED: Final = 20
"""Deployments that are told to be as good as the best."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """What is where the best deployment no longer wins.

    Parameters
    ----------
    winner : Scored or None     who wins; None where nothing meets the goals
    value : float or None       what that one reaches by the first objective, its times being as they then are
    missed : str                goals that the deployment misses, in words; empty where it is beaten
    """

    winner: Scored | None
    value: float | None
    missed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """How far times may be off in one way.

    Parameters
    ----------
    times : "all", "best" or "others"
    slower : bool               whether they are longer than computed
    holds : float               the factor farthest from 1 at which the deployment wins, as at all asked before it
    factor : float or None      the nearest that was found at which it does not; None: it wins at all that were asked
    loss : Loss or None         what is then
    """

    times: Times
    slower: bool
    holds: float
    factor: float | None = None
    loss: Loss | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Robustness:
    """How far times may be off before another deployment wins, and which are as good within the error.

    Parameters
    ----------
    turns : tuple of Turn       none where no other deployment can run and there are no goals to miss
    common : bool               whether times that are off in common can matter; else they were not asked about
    runner_up : Scored or None  the best of the others, times as computed
    deciding : str              what deployments are held against each other by: the first that is not exact anyhow
    tied : tuple of Scored or None    deployments nearer to the best by it than the error, best first; None where no
                                error is known
    searches, simulations : int made for all this; a simulation is of the best deployment alone
    """

    turns: tuple[Turn, ...]
    common: bool
    runner_up: Scored | None
    deciding: str
    tied: tuple[Scored, ...] | None
    searches: int
    simulations: int


def robust(
    problem: Problem,
    answer: Answer,
    formulation: Formulations,
    scorer: Scorer,
    error: float | None = None,
    progress: Progress | None = None,
    crew: Callable[[Scorer], Crew] = Alone,
) -> Robustness:
    """How far times may be off before another deployment wins than the best of an answer.

    Parameters
    ----------
    problem : Problem
    answer : Answer                  its answer, with the two best at least where there are two
    formulation : Formulations       the programs that enumerate plans and split layers
    scorer : Scorer                  of the problem, whose costs are used again
    error : float or None            of the deciding objective, as far as deployments do not share it, as a share
    progress : callable, optional    told (what, done, total) along the way
    crew : callable                  who bounds and simulates, as of `search`

    Raises
    ------
    UsageError    an answer without a deployment, a figure of which it is not known how it moves with times
    """
    return _Study(problem, answer, formulation, scorer, progress or silent, crew).asked(error)


def deciding(problem: Problem) -> Objective:
    """The first objective that is not known exactly beforehand, as prices are; the first where all are."""
    return next((one for one in problem.objectives if not one.figure.exact), problem.objective)


def slowed(problem: Problem, factor: float) -> Problem:
    """The problem whose runs, made so many times as slow, are those of this one with all its times so much longer.

    Parameters
    ----------
    problem
    factor : float    of all times but those at which clients send

    Raises
    ------
    UsageError    a figure of which it is not known how it moves with times
    """
    trace = problem.trace
    if trace.concurrency is None:
        trace = trace.stretched(1 / factor)
    elif trace.pause_ns:
        trace = replace(trace, pause_ns=round(trace.pause_ns / factor))
    slos = tuple(replace(goal, limit=goal.limit / scale(goal.figure, factor)) for goal in problem.slos)
    return replace(problem, trace=trace, slos=slos)


def missed_by(problem: Problem, run: Scored, factor: float) -> str:
    """The goals of a problem that a run of it, slowed, misses, and what it reaches in the problem's own time.

    Parameters
    ----------
    problem
    run : Scored      of the slowed problem
    factor : float    by which that is slowed
    """
    missed = []
    for goal, then in zip(problem.slos, slowed(problem, factor).slos, strict=True):
        if not run.metrics.slo_met[goal.text]:
            value = then.reached(run.metrics)
            told = value if then.fraction is not None else value * scale(then.figure, factor)
            missed.append(f"{goal.text} (it reaches {reached(goal, told)})")
    return " and ".join(missed)


def scale(figure: Figure, factor: float) -> float:
    """What a figure is multiplied by where all takes so many times as long."""
    power = figure.unit.of_time
    if power is None:
        raise UsageError(f"--robust: how {figure.name} moves with all times is not known; ask without it")
    return float(factor**power)


class _Study:
    """What is asked about one answer."""

    def __init__(
        self,
        problem: Problem,
        answer: Answer,
        formulation: Formulations,
        scorer: Scorer,
        tell: Progress,
        crew: Callable[[Scorer], Crew],
    ) -> None:
        if answer.best is None:
            raise UsageError("robust: the answer has no deployment; there is nothing to hold against others")
        self._problem, self._answer, self._best = problem, answer, answer.best
        self._formulation, self._scorer, self._crew = formulation, scorer, crew
        self._runner_up = answer.candidates[1] if len(answer.candidates) > 1 else None
        # With a tolerance candidates are those within it, and others may be left.
        self._tolerant = any(objective.tolerance for objective in problem.objectives)
        self._only = self._runner_up is None and not self._tolerant
        self._same = {self._best.deployment}
        self._rival = self._runner_up
        self._searches = self._simulations = 0
        self._course = Course(tell, 2 * self._moves + 2 * (not self._tolerant))

    def asked(self, error: float | None) -> Robustness:
        """Everything."""
        tied = None if error is None else () if self._only else self._tied(error)
        if tied:
            self._same |= {one.deployment for one in tied}
            self._rival = self._another(self._search(self._problem, len(self._same) + 1))
        turns = list(self._turns())
        return Robustness(
            turns=tuple(turns),
            common=self._moves,
            runner_up=self._runner_up,
            deciding=deciding(self._problem).name,
            tied=tied,
            searches=self._searches,
            simulations=self._simulations,
        )

    def _turns(self) -> Iterator[Turn]:
        if self._only and not self._problem.slos:
            return  # no other can run
        if self._moves:
            yield self._turn("all", self._beaten_by_all, slower=True)
            yield self._turn("all", self._beaten_by_all, slower=False)
        if self._tolerant:
            return  # what counts as equal then depends on the best of all, and so on whose times are off
        yield self._turn("best", self._beaten_alone, slower=True)
        yield self._turn("others", self._beaten_by_others, slower=False)

    @property
    def _moves(self) -> bool:
        """Whether times that are off in common change more than all figures alike: something is not in these times."""
        problem = self._problem
        clients = problem.trace.arrival_ns
        waits = problem.trace.pause_ns > 0 or problem.trace.delay_ns is not None or int(clients[-1]) > int(clients[0])
        return waits or any(scale(goal.figure, 2.0) != 1 for goal in problem.slos)

    def _turn(self, times: Times, lost: Callable[[float], Loss | None], *, slower: bool) -> Turn:
        """Where the deployment stops to win, with the times of some.

        Parameters
        ----------
        times : whose are off
        lost : callable    what is at a factor, where the deployment does not win
        slower : bool      whether factors are above 1
        """
        holds, factor, loss = self._course.last_before(lost, slower=slower)
        return Turn(times=times, slower=slower, holds=holds, factor=factor, loss=loss)

    def _beaten_by_all(self, factor: float) -> Loss | None:
        """With the times of all."""
        problem = slowed(self._problem, factor)
        found = self._search(problem, 1).best
        if found is not None and found.deployment == self._best.deployment:
            return None
        run = self._alone(problem)
        if found is not None and found.deployment in self._same and run.meets_slos:
            return None
        return self._loss(factor, run, found, factor)

    def _beaten_alone(self, factor: float) -> Loss | None:
        """With the times of the best alone, which another then beats, or which misses a goal."""
        run = self._alone(slowed(self._problem, factor))
        if not run.meets_slos:
            return self._loss(factor, run, self._runner_up, 1.0)
        if self._rival is None or self._rank(run, factor) < self._rank(self._rival, 1.0):
            return None
        return self._loss(factor, run, self._rival, 1.0)

    def _beaten_by_others(self, factor: float) -> Loss | None:
        """With the times of any other alone; those of all others are asked together, as each is for itself."""
        rival = self._another(self._search(slowed(self._problem, factor), len(self._same) + 1))
        if rival is None or self._rank(self._best, 1.0) < self._rank(rival, factor):
            return None
        return self._loss(1.0, self._best, rival, factor)

    def _another(self, answer: Answer) -> Scored | None:
        """The best that is neither the best as computed nor tied with it."""
        return next((one for one in answer.candidates if one.deployment not in self._same), None)

    def _loss(self, factor: float, run: Scored, winner: Scored | None, of_winner: float) -> Loss:
        """What is with a run of the best deployment, and another that wins.

        Parameters
        ----------
        factor : of the times of the run
        run : Scored
        winner : Scored or None
        of_winner : factor of the winner's times
        """
        objective = self._problem.objective
        value = None if winner is None else winner.value * scale(objective.figure, of_winner)
        return Loss(winner=winner, value=value, missed=missed_by(self._problem, run, factor))

    def _rank(self, scored: Scored, factor: float) -> tuple[object, ...]:
        """Better first, with its times so many times those of its run."""
        costs, *others = rank(self._problem, scored)
        scales = (scale(objective.figure, factor) for objective in self._problem.objectives)
        return tuple(cost * scale for cost, scale in zip(costs, scales, strict=True)), *others

    def _tied(self, error: float) -> tuple[Scored, ...]:
        """Those as near to the best by the deciding objective as an error, as a share."""
        objectives = tuple(replace(one, tolerance=0.0) for one in self._problem.objectives)
        by = deciding(self._problem)
        near = (
            goal
            for one in (*(one for one in objectives if one.figure.exact), replace(by, tolerance=error))
            for goal in one.near(one.value(self._best.metrics))
        )
        first, *then = objectives
        problem = replace(self._problem, objective=first, then=tuple(then), near=tuple(near))
        found = self._search(problem, MOST_TIED + 1).candidates
        return tuple(one for one in found if one.deployment != self._best.deployment)[:MOST_TIED]

    def _alone(self, problem: Problem) -> Scored:
        """The best deployment simulated in another problem."""
        self._simulations += 1
        return Scorer(problem, like=self._scorer).simulate(self._best.deployment)

    def _search(self, problem: Problem, top: int) -> Answer:
        """The answer to another problem."""
        self._searches += 1
        scorer = Scorer(problem, like=self._scorer)
        return search(problem, self._formulation, silent, top, scorer=scorer, crew=self._crew)


class Course:
    """How far a study of factors has come, of which it is told how much is to be asked at most.

    Parameters
    ----------
    tell : callable    told (what, done, total)
    turns : int        ways in which times may be off
    """

    def __init__(self, tell: Progress, turns: int) -> None:
        self._tell, self._turns, self._asked = tell, turns, 0

    def last_before(self, lost: Callable[[float], L | None], *, slower: bool) -> tuple[float, float | None, L | None]:
        """Where an answer stops to hold: first farther and farther from 1, then between the last two factors.

        Parameters
        ----------
        lost : callable    what is at a factor, where the answer does not hold
        slower : bool      whether factors are above 1

        Returns
        -------
        float, float or None, what is there
            the factor farthest from 1 at which it holds, as at all asked before; the nearest that was found at which
            it does not, and what is there, both None where it holds at all that were asked
        """
        self._turns -= 1
        low, high, found = 0, STEPS + 1, None
        while high - low > 1:
            most = _most_asked(low, high, lost=found is not None) + self._turns * _most_asked(0, STEPS + 1, lost=False)
            self._tell("asking with other times", self._asked, self._asked + most)
            self._asked += 1
            step = _next_step(low, high, lost=found is not None)
            loss = lost(factor_of(step, slower))
            if loss is None:
                low = step
            else:
                high, found = step, loss
        return factor_of(low, slower), None if found is None else factor_of(high, slower), found


def _next_step(low: int, high: int, *, lost: bool) -> int:
    """The step to ask about, between one at which an answer holds and one at which it does not, or the end."""
    return (low + high) // 2 if lost else min(max(2 * low, 1), STEPS)


def _most_asked(low: int, high: int, *, lost: bool) -> int:
    """Steps that may have to be asked about."""
    if high - low <= 1:
        return 0
    step = _next_step(low, high, lost=lost)
    return 1 + max(_most_asked(step, high, lost=lost), _most_asked(low, step, lost=True))


def factor_of(step: int, slower: bool) -> float:
    """A factor that is asked about."""
    return float(STEP**step if slower else STEP**-step)
