"""Whether a deployment sustains a rate: its goals hold however long requests keep coming at it.

A rate is sustained where all of this holds, looked at in this order:

1. One run of the trace repeated (`apex_opt.workload.steady`), of `LENGTH` requests or more, keeps to the goals, as a
   whole and without its warm-up.
2. That run is settled: its arrivals last `SPAN` times as long as a mean request, and the backlog of the second half
   after the warm-up is no more than `GROWTH` times that of the first, and one. A run that is not is repeated with
   twice the requests, up to `DOUBLINGS` times.
3. The rate is below what the deployment works off where a queue never empties, by `SIGMAS` standard deviations of what
   is offered in a run of `REPEATS` times the trace, or of `TOLD` requests where that is more: nearer to it no run of
   that length could tell the two apart.
4. `DRAWS` further runs with other arrivals, each of `REPEATS` times the trace and no shorter than the first, keep to
   the goals, and so would one more of `REPEATS` times the trace: the latency that a goal is about, or that its share of
   the requests keeps to, is within the limit even at the upper end of a prediction interval of 99%, of its logarithm.
   None has a growing backlog, neither over a run of condition 3 nor as a whole. Where the trace was drawn from a
   law, every other one has lengths drawn anew as well. Of recorded arrivals, looped, there are but `FEW` runs, begun at
   other requests, and no interval.

The third is needed because a backlog near the limit changes too slowly to be seen growing; the others because a
deployment can serve less than when it is saturated from the beginning: a pipeline fills unevenly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from threading import Lock
from time import time
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from apex_opt.figures.measure import statistic
from apex_opt.figures.registry import timed
from apex_opt.plans.engine import of_all
from apex_opt.search.incumbent import FREE
from apex_opt.search.scorer import Scorer
from apex_opt.simulator.transient import Transient, warm_up
from apex_opt.units import NS_PER_S
from apex_opt.workload.columns import MAX_REQUESTS
from apex_opt.workload.steady import another, at_rate, loops_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Scored
    from apex_opt.search.ledger import Costs
    from apex_opt.search.problem import Problem
    from apex_opt.simulator.outcome import Outcome
    from apex_opt.workload.trace import Trace

DOUBLINGS: Final = 3
"""Times that a run which is not settled is made twice as long."""

REPEATS: Final = 20
"""Repetitions of the trace that a rate must hold for."""

TOLD: Final = 10_000
"""Requests of a run that can tell whether a queue grows, at least."""

DRAWS: Final = 6
"""Further runs with other arrivals."""

FEW: Final = 2
"""Further runs where there is no chance in them."""

SIGMAS: Final = 3.0

_PREDICTED: Final = 3.365
"""Of Student's t with `DRAWS` - 1 degrees of freedom, one-sided 99%."""

_SATURATED: Final = (2_000, 16_000)
"""Least and most requests to find a saturated rate by, without those that fill the deployment."""

_MOST_SEATS: Final = 4_000
"""Sequences running at once from which on it is not looked for."""

_MOST_TOKENS: Final = 20_000_000
"""Tokens of a run whose times between tokens are asked for: a log takes 24 B each."""

_AT_ONCE_PER_S: Final = 1e9

_MOST_REPEATED: Final = 2_000_000
"""Requests of the further runs, at most, but for twice the trace."""

_KEPT: Final = 16
"""Rates whose scores are kept: some MB each."""


class Late(Exception):
    """The time is up."""


Why = Literal["", "goals", "queue", "saturated", "prediction"]
"""Why a rate is not sustained: goals are missed, the queue grows, it is too near to what a saturated plan serves, or
another run could miss a goal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What shows that a rate is sustained, or how far it was looked at.

    Parameters
    ----------
    requests, warm_up : int            of the run that is shown, and those of it that are left out at first
    transient : Transient              its backlog, its drain
    served_per_s : float               requests answered per second between the warm-up and the last arrival
    half, whole : mapping              figure of each goal after the warm-up, over the first half and over all
    saturated_per_s : float or None    requests per second worked off from a queue that never empties; None where it
                                       was not looked for
    margin : float                     share by which the rate stays below that
    runs, run_requests : int           further runs, and requests of each
    predicted : mapping                latency in seconds of each goal that one more run reaches at worst
    """

    requests: int
    warm_up: int
    transient: Transient
    served_per_s: float
    half: dict[str, float]
    whole: dict[str, float]
    saturated_per_s: float | None = None
    margin: float = 0.0
    runs: int = 0
    run_requests: int = 0
    predicted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A deployment at a rate: why it does not hold, else its run and what shows that it holds.

    Where a run was made longer `first` is what it was before, which is of as many requests for every deployment. Of one
    that was cut short there is no run; `loops` is how often it repeated the trace.
    """

    why: Why
    run: Scored | None = None
    first: Scored | None = None
    loops: int = 1
    evidence: Evidence | None = None

    @property
    def holds(self) -> bool:
        return self.why == ""


class Steady:
    """Judges deployments at rates; costs do not depend on the rate and are shared.

    Parameters
    ----------
    problem : Problem
    like : Scorer or None    of the same problem but for its trace and goals, whose costs serve as well
    """

    def __init__(self, problem: Problem, like: Scorer | None = None) -> None:
        self.problem = problem
        self._own = Scorer(problem, like=like)
        self._repeated = lru_cache(maxsize=_KEPT)(self._scorer_at)
        self._saturated: dict[Deployment, float | None] = {}
        self._counted, self._lock = 0, Lock()
        self._latencies = [goal for goal in problem.slos if goal.figure.of != "run"]
        trace = problem.trace
        self._most = max(MAX_REQUESTS // len(trace), 1)
        if problem.asks_gaps:
            tokens = int(trace.generated(problem.settings.max_model_len).sum())
            self._most = max(min(self._most, _MOST_TOKENS // tokens), 1)
        self.loops = min(loops_of(trace), self._most)
        self._repeats = min(REPEATS, max(_MOST_REPEATED // len(trace), 2), self._most)
        # Of the few requests of a short trace no run tells a queue that grows from chance.
        self._told = max(self._repeats * len(trace), min(TOLD, self._most * len(trace)))

    @property
    def own(self) -> Scorer:
        """Scores of the trace as given."""
        return self._own

    def at(self, rate_per_s: float, loops: int | None = None) -> Scorer:
        """Scores of the trace repeated at a rate."""
        return self._repeated(rate_per_s, loops or self.loops)

    @property
    def simulations(self) -> int:
        """Runs so far."""
        return self._counted

    def count(self, runs: int) -> None:
        """Count runs, also those that were made elsewhere."""
        with self._lock:
            self._counted += runs

    def forget(self) -> None:
        """Forget what saturated deployments serve, so that a trial takes as many runs whatever was tried before."""
        self._saturated.clear()

    def _scorer_at(self, rate_per_s: float, loops: int) -> Scorer:
        return self._scorer(at_rate(self.problem.trace, rate_per_s, loops))

    def _scorer(self, trace: Trace) -> Scorer:
        return Scorer(replace(self.problem, trace=trace), like=self._own)

    def run(
        self,
        deployment: Deployment,
        rate_per_s: float,
        worst: Costs = FREE,
        bounds: Costs = (),
        until: float = math.inf,
    ) -> Trial:
        """The first run of a deployment at a rate, once settled: conditions 1 and 2.

        Parameters
        ----------
        worst : costs by the objectives that the run must not pass; by default there are none
        bounds : of its costs, where `worst` is given
        until : float    time of day, in seconds, after which no simulation is begun

        Raises
        ------
        Late
        """
        loops, first = self.loops, None
        for _ in range(DOUBLINGS + 1):
            scorer = self.at(rate_per_s, loops)
            free = first is not None or worst == FREE
            served = self._served(scorer, deployment, scorer.any_cost if free else worst, bounds, until)
            if served is None:
                return Trial(why="goals", loops=loops)
            scored, evidence = scorer.scored(deployment, served), self._evidence(scorer, served)
            first = first or scored
            if not (scored.meets_slos and self._within(evidence.whole)):
                return Trial(why="goals", run=scored, first=first, evidence=evidence)
            if _settled(scored, evidence):
                return Trial(why="", run=scored, first=first, evidence=evidence)
            if 2 * loops > self._most:
                break
            loops *= 2
        return Trial(why="queue", run=scored, first=first, evidence=evidence)

    def missed(self, trial: Trial) -> dict[str, float]:
        """Goals that a trial misses, or could miss in another run, with the figures reached."""
        slos, run, evidence = self.problem.slos, trial.run, trial.evidence
        if trial.why == "prediction" and evidence is not None:
            return {slo.text: v for slo in slos if (v := evidence.predicted.get(slo.text, 0.0)) > slo.limit}
        if trial.why == "goals" and run is not None:
            figures = {slo.text: slo.reached(run.metrics) for slo in slos}
            if run.meets_slos and evidence is not None:
                figures = evidence.whole
        else:
            figures = {}
        return {slo.text: figures[slo.text] for slo in slos if slo.text in figures and not slo.met(figures[slo.text])}

    def confirmed(self, deployment: Deployment, rate_per_s: float, first: Trial, until: float = math.inf) -> Trial:
        """Conditions 3 and 4 for a deployment whose first run holds.

        Parameters
        ----------
        deployment
        rate_per_s : float    requests per second
        first : Trial         its first run
        until : float         as of `run`

        Raises
        ------
        Late
        """
        assert first.evidence is not None
        trace, evidence = self.problem.trace, first.evidence
        saturated, margin = self.saturated(deployment), self._margin()
        evidence = replace(evidence, saturated_per_s=saturated, margin=margin)
        if saturated is not None and rate_per_s > saturated / (1 + margin):
            return replace(first, why="saturated", evidence=evidence)
        requests = max(self._repeats * len(trace), min(evidence.requests, self._most * len(trace)))
        loops = -(-requests // len(trace))
        recorded = trace.arrivals.kind == "recorded"
        evidence = replace(evidence, runs=0, run_requests=requests)
        runs: list[dict[str, float]] = []
        for draw in range(1, 1 + (FEW if recorded else DRAWS)):
            more = another(trace, rate_per_s, requests, draw) if draw % 2 == 0 else None
            scorer = self._scorer(more or at_rate(trace, rate_per_s, loops, draw))
            served = self._served(scorer, deployment, scorer.any_cost, until=until)
            if served is None or not scorer.scored(deployment, served).meets_slos:
                return replace(first, why="prediction", evidence=evidence)
            if any(Transient.of(_first(served, n)).growing for n in (self._told, requests)):
                return replace(first, why="queue", evidence=evidence)
            runs.append(self._reached(scorer, served))
        evidence = replace(evidence, runs=len(runs))
        if not recorded:
            evidence = replace(evidence, predicted=self._predicted(runs, requests))
            if any(evidence.predicted[slo.text] > slo.limit for slo in self._latencies):
                return replace(first, why="prediction", evidence=evidence)
        return replace(first, evidence=evidence)

    def _served(
        self, scorer: Scorer, deployment: Deployment, worst: Costs, bounds: Costs = (), until: float = math.inf
    ) -> Outcome | None:
        if time() > until:
            raise Late
        self.count(1)
        return scorer.run(deployment, worst, bounds)

    def saturated(self, deployment: Deployment) -> float | None:
        """Requests per second worked off from a queue that never empties; None where many run at once.

        It is the difference of two runs, so that filling and draining the deployment cancel, and no less than it would
        be with one more batch of sequences in it, for these may begin and end together.
        """
        if deployment not in self._saturated:
            self._saturated[deployment] = self._worked_off(deployment)
        return self._saturated[deployment]

    def _worked_off(self, deployment: Deployment) -> float | None:
        trace, seats = self.problem.trace, 0
        for pool in deployment.pools:
            facts = self._own.facts_of(pool)
            settings, asked = of_all(facts.problem.settings_for(pool.plan), pool.plan), facts.problem.trace
            blocks = facts.blocks(pool.plan)
            held = settings.most_blocks(asked.prompt + asked.generated(settings.max_model_len))
            seats += pool.plan.replicas * max(1, min(settings.max_num_seqs, int(blocks / held.mean())))
        if seats > _MOST_SEATS:
            return None
        least, most = _SATURATED
        # A pipeline takes ten times as long to simulate.
        most = most if all(pool.plan.stages == 1 for pool in deployment.pools) else most // 2
        loops = -(-min(max(8 * seats, least), most) // len(trace))
        ends = []
        for times in (1, 2):
            scorer = self.at(_AT_ONCE_PER_S, times * loops)
            self.count(1)
            ends.append(scorer.simulate(deployment).metrics.value("makespan"))
        return (loops * len(trace) + seats) / max(ends[1] - ends[0], 1e-9)

    def _margin(self) -> float:
        """`SIGMAS` standard deviations of the load that is offered in a run long enough to tell."""
        trace = self.problem.trace
        lengths = (trace.prompt + trace.output).astype(np.float64)
        arrivals = {"uniform": 0.0, "recorded": trace.burstiness or 0.0}.get(trace.arrivals.kind, trace.arrivals.cv)
        spread = arrivals**2 + float(lengths.std() / lengths.mean()) ** 2
        return SIGMAS * math.sqrt(spread / self._told)

    def _evidence(self, scorer: Scorer, outcome: Outcome) -> Evidence:
        trace, requests = scorer.problem.trace, len(outcome.arrival_ns)
        first = warm_up(requests)
        half = first + (requests - first + 1) // 2
        begin, end = int(outcome.arrival_ns[first]), int(outcome.arrival_ns[-1])
        answered = int(((outcome.finish_ns > begin) & (outcome.finish_ns <= end)).sum())
        return Evidence(
            requests=requests,
            warm_up=first,
            transient=Transient.of(outcome),
            served_per_s=answered / max((end - begin) / NS_PER_S, 1e-9),
            half=self._figures(scorer, outcome, trace, first, half),
            whole=self._figures(scorer, outcome, trace, first, requests),
        )

    def _figures(self, scorer: Scorer, outcome: Outcome, trace: Trace, first: int, end: int) -> dict[str, float]:
        """The figure of each goal over some of the requests."""
        problem, gaps = self.problem, outcome.gaps_ns
        if gaps is not None:
            before = np.concatenate(([0], np.cumsum(trace.generated(problem.settings.max_model_len) - 1)))
            gaps = gaps[before[first] : before[end]]
        part = replace(
            outcome,
            arrival_ns=outcome.arrival_ns[first:end],
            first_token_ns=outcome.first_token_ns[first:end],
            finish_ns=outcome.finish_ns[first:end],
            gaps_ns=gaps,
        )
        run = part.as_run(
            trace.picked(np.arange(first, end)),
            problem.settings.max_model_len,
            outside_ns=scorer.outside_ns,
        )
        return {
            goal.text: float(statistic(run, goal.figure, goal.statistic, goal.limit)[0]) for goal in self._latencies
        }

    def _within(self, figures: dict[str, float]) -> bool:
        """Whether figures keep to the goals; one that nobody has binds nothing."""
        return all(value != value or slo.met(value) for slo in self.problem.slos for value in _of(figures, slo.text))

    def _reached(self, scorer: Scorer, outcome: Outcome) -> dict[str, float]:
        """The latency in seconds that each goal is about; of a share of the requests, what so many keep to."""
        run = outcome.as_run(scorer.problem.trace, self.problem.settings.max_model_len, outside_ns=scorer.outside_ns)
        found = {}
        for goal in self._latencies:
            which = goal.statistic if goal.fraction is None else f"p{100 * goal.fraction}"
            reached = float(statistic(run, goal.figure, which)[0])
            found[goal.text] = 0.0 if reached != reached else reached
        return found

    def _predicted(self, runs: Sequence[dict[str, float]], requests: int) -> dict[str, float]:
        """The worst latency of each goal in one more run of `REPEATS` times the trace, but for one in a hundred."""
        found = {}
        shorter = requests / (self._repeats * len(self.problem.trace))
        for text in runs[0]:
            logs = np.log(np.maximum([reached[text] for reached in runs], 1e-12))
            further = _PREDICTED * float(logs.std(ddof=1)) * math.sqrt(shorter + 1 / len(logs))
            found[text] = math.exp(float(logs.mean()) + further)
        return found


def _first(outcome: Outcome, requests: int) -> Outcome:
    """The first requests of a run."""
    times = (outcome.arrival_ns, outcome.first_token_ns, outcome.finish_ns)
    arrival, first, finish = (column[:requests] for column in times)
    return replace(outcome, arrival_ns=arrival, first_token_ns=first, finish_ns=finish)


def _settled(scored: Scored, evidence: Evidence) -> bool:
    """Whether a run shows a load that lasts."""
    mean_s = scored.metrics.value(timed("whole").name, "mean")
    return evidence.transient.lasts(mean_s) and not evidence.transient.growing


def _of(figures: dict[str, float], text: str) -> tuple[float, ...]:
    return (figures[text],) if text in figures else ()
