"""Deployments scored exactly: every pool serves what is dealt to it, and the runs are measured as one.

Requests are dealt to the pools (`dealing`), and each pool serves its own. One pool alone serves all of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.cost import account, idle_w, limit_w
from apex_opt.cost.handover import reading_j
from apex_opt.cost.head_room import head_room
from apex_opt.cost.moving import MOVING, moving
from apex_opt.cost.two_batches import two_batches
from apex_opt.engines.overlap import TWO
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.figures.measure import measure, statistics_of
from apex_opt.figures.run import Facts as StopFacts
from apex_opt.figures.stops import early_stops
from apex_opt.oracle.checks import Violation, violations
from apex_opt.placement.pools import link_between
from apex_opt.search.answer import PoolUse, PriorityUse, Scored
from apex_opt.search.bounds import StageFloor, isolated, may_preempt, minds_preemption
from apex_opt.search.dealing import clients_of, dealt, tokens_per_s
from apex_opt.search.facts import KEPT, Facts
from apex_opt.search.incumbent import FREE
from apex_opt.search.ledger import ROUNDING
from apex_opt.search.pairs import Pairs
from apex_opt.search.shapes.pipeline import faults, joined
from apex_opt.simulator import EnginePool, run_deployment, run_disaggregated, run_phases
from apex_opt.simulator.outcome import BatchCounts, DisaggregatedOutcome, Outcome
from apex_opt.simulator.transient import Transient
from apex_opt.units import NS_PER_S, add_up
from apex_opt.workload.trace import PRIORITIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from apex_opt.cost import PlanCost
    from apex_opt.cost.head_room import HeadRoom
    from apex_opt.cost.two_batches import TwoBatches
    from apex_opt.figures.run import Run
    from apex_opt.figures.stops import Stop
    from apex_opt.plans.deployment import Deployment, Pool
    from apex_opt.search.ledger import Costs
    from apex_opt.search.problem import Problem
    from apex_opt.simulator.rescheduling import Rescheduling

    Ints = NDArray[np.int64]

_ANY_COST: Final = 1e300


class Scorer:
    """Scores deployments of a problem; facts of plans are shared among them.

    Parameters
    ----------
    problem : Problem
    gaps : bool           times between tokens are looked at even where they are not asked for: it takes a log
    like : Scorer, optional    of the same problem but for its trace and goals, whose costs serve as well
    """

    def __init__(self, problem: Problem, *, gaps: bool = False, like: Scorer | None = None) -> None:
        self.problem = problem
        self._gaps = gaps or problem.asks_gaps
        self._facts: dict[tuple[str, ...], Facts] = {}
        self.like = like
        self._generated = problem.trace.generated(problem.settings.max_model_len)
        # A run asks who serves what, and so does what is made of the run.
        self._dealt = lru_cache(maxsize=KEPT)(self._deal)
        self.pairs = Pairs(problem, self.facts_of)

    def facts(self, *types: str) -> Facts:
        """What is known of plans on a type of GPU, the only one if not named, or of pipelines over two."""
        types = types or self.problem.types[:1]
        if types not in self._facts:
            places = [self.problem.types.index(name) for name in types]
            problem = self.problem.alone(places[0]) if len(places) == 1 else joined(self.problem, *sorted(places))
            assert problem is not None, "there are such pipelines"
            self._facts[types] = Facts(problem, None if self.like is None else self.like.facts(*types).costs)
        return self._facts[types]

    def facts_of(self, pool: Pool) -> Facts:
        """What is known of the plan of a pool."""
        if pool.role is None:
            return self.facts(*sorted(pool.types, key=self.problem.types.index))
        key = pool.role, *(pool.types or self.problem.types[:1])
        if key not in self._facts:
            # What a plan costs does not depend on which tokens it is given.
            side = self.problem.side(pool.role, self.problem.types.index(key[1]))
            self._facts[key] = Facts(side, self.facts(key[1]).costs)
        return self._facts[key]

    def provenance(self, scored: Iterable[Scored]) -> dict[str, Any]:
        """Where the figures behind deployments come from, per operation; of several types of GPU by type."""
        pools = dict.fromkeys(use.pool for one in scored for use in one.pools)
        if not self.problem.several:
            alone = self.facts().provenance(pool.plan for pool in pools)
            copies = {name: said for name, said in self.problem.handover_sources if name.endswith(MOVING)}
            return alone | copies if self.problem.rescheduling is not None else alone
        found: dict[str, dict[str, str]] = {}
        for name in self.problem.types:
            mine = (pool.plan for pool in pools if (pool.types or self.problem.types) == (name,))
            found[name] = dict(self.facts(name).provenance(mine))
        if any(pool.role for pool in pools):
            found[self.problem.types[0]] |= dict(self.problem.handover_sources)
        for pool in pools:
            if pool.plan.on:
                costs = self.facts_of(pool).costs
                costs.plan_cost(pool.plan)
                for name, told in costs.provenance_by_gpu.items():
                    found[name] |= told
        return found

    @property
    def outside_ns(self) -> int:
        """Time of a request outside the engine."""
        return self.facts().costs.request_ns

    @property
    def any_cost(self) -> Costs:
        """Costs that nothing passes, finite: runs then end once they miss a goal, and for no other reason."""
        return tuple(-1 / _ANY_COST if part.maximise else _ANY_COST for part in self.problem.objectives)

    def faults(self, deployment: Deployment) -> Iterator[Violation]:
        """Why a deployment cannot run at all.

        Balance and bandwidth keep hopeless plans out of a search; a plan that is asked for is simulated all the same.
        """
        problem, pools = self.problem, deployment.pools
        taken, most, fault = sum(pool.plan.devices for pool in pools), problem.max_devices, None
        if len(pools) > 1 and taken > most:
            yield (fault := Violation(family="devices", text=f"it takes {taken} GPUs, {most} are offered"))
        for pool in pools:
            facts = self.facts_of(pool)
            found = faults(facts, pool.plan) if pool.plan.on else violations(facts.problem.instance(), pool.plan)
            for fault in (one for one in found if one.family not in ("balance", "bandwidth")):
                yield fault if pool.role is None else replace(fault, text=f"{pool.role} pool: {fault.text}")
        if deployment.disaggregated:
            yield from self.pairs.faults(*pools)
        elif len(pools) > 1 and fault is None:
            yield from self._idle(pools)

    def _idle(self, pools: tuple[Pool, ...]) -> Iterator[Violation]:
        """Pools for which the dealing leaves nothing to do."""
        clients, requests = self.problem.trace.concurrency, len(self.problem.trace)
        if clients is not None and clients < len(pools):
            text = f"{clients} client{'s' * (clients > 1)} for {len(pools)} pools; leave a type of GPU out"
            yield Violation(family="share", text=text)
            return
        owner, _ = self._dealt(pools)
        for place, pool in enumerate(pools):
            if not (owner == place).any():
                names = " and ".join(pool.types)
                text = f"{names} gets none of {requests} requests, by its speed; leave it out"
                yield Violation(family="share", text=text)

    def simulate(self, deployment: Deployment, bound: float | None = None) -> Scored:
        """Score a deployment exactly.

        Raises
        ------
        CapacityError    a request that a pool's KV cache cannot hold
        """
        outcome = self.run(deployment)
        assert outcome is not None  # nothing to cut it short
        return self.scored(deployment, outcome, bound)

    def challenge(self, deployment: Deployment, bounds: Costs, worst: Costs) -> Scored | None:
        """Score a deployment exactly, or find that it misses a goal or costs more than `worst` (None).

        Costs are compared objective by objective. An infinite one asks for the score whatever it is.

        Parameters
        ----------
        deployment
        bounds : Costs    of its costs
        worst : Costs     costs beyond which it has lost

        Raises
        ------
        CapacityError    a request that a pool's KV cache cannot hold
        """
        outcome = self.run(deployment, worst, bounds)
        return None if outcome is None else self.scored(deployment, outcome, bounds[0])

    def bounds(self, deployment: Deployment) -> tuple[Costs, bool]:
        """What a deployment of one pool cannot cost less than, and whether it can still meet the goals."""
        (pool,) = deployment.pools
        return self.facts_of(pool).bounds(pool.plan)

    def run(
        self, deployment: Deployment, worst: Costs = FREE, bounds: Costs = (), *, log: bool = False
    ) -> Outcome | None:
        """Serve the trace; None where a deployment misses a goal or costs more than `worst`, as for `challenge`.

        Parameters
        ----------
        deployment
        worst : Costs     costs beyond which it has lost
        bounds : Costs    of its costs
        log : bool        whether every batch is told
        """
        problem, trace, pools = self.problem, self.problem.trace, deployment.pools
        facts = [self.facts_of(pool) for pool in pools]
        engines = [self._engine(pool, one) for pool, one in zip(pools, facts, strict=True)]
        whole = worst == FREE or trace.delay_ns is not None  # until answers are known nothing is proved
        if deployment.disaggregated:
            prefill, decode = engines
            first, then = (one.problem.routing_of(pool.plan) for pool, one in zip(pools, facts, strict=True))
            limits = [] if whole else self._stops(pools, facts, self._computed_apart(), bounds, worst)
            handed = run_disaggregated(
                prefill,
                decode,
                self.pairs.handover(*pools),
                trace,
                routing=(first, then),
                log=log,
                gaps=self._gaps,
                stops=limits,
                floors=self._floors_apart(pools, facts) if limits else None,
            )
            return None if handed.stopped else handed
        if (shared := facts[0].phases(pools[0].plan)) is not None:
            return run_phases(engines[0], shared, trace, log=log)
        owner, clients = self._dealt(pools)
        rows = [np.flatnonzero(owner == place) for place in range(len(pools))]
        stops = (
            []
            if whole
            else self._stops(pools, facts, [int(self._computed[mine].sum()) for mine in rows], bounds, worst)
        )
        outcome = run_deployment(
            engines,
            trace,
            assigned=None if len(pools) == 1 else owner,
            clients=clients,
            routing=[problem.routing_of(pool.plan) for pool in pools],
            log=log or (self._gaps and trace.priority is not None),
            gaps=self._gaps,
            rescheduling=None if problem.rescheduling is None else self._moving(pools[0], facts[0]),
            stops=stops,
            floors=self._floors(engines, rows) if stops else None,
        )
        return None if outcome.stopped else outcome

    def _moving(self, pool: Pool, facts: Facts) -> Rescheduling | None:
        """How requests move between the replicas of a pool, with the times of the links between these."""
        rules, times, plan = self.problem.rescheduling, self.problem.handover, pool.plan
        assert rules is not None and times is not None
        link = link_between(facts.layouts.tree, plan.devices)
        return moving(rules, times, self.problem.model, plan, facts.memory(plan), link)

    def _engine(self, pool: Pool, facts: Facts) -> EnginePool:
        """A pool as the simulator has it."""
        cost = facts.plan_cost(pool.plan)
        return EnginePool(
            settings=facts.problem.settings_for(pool.plan),
            blocks=facts.own_blocks(pool.plan),
            laws=cost.laws,
            replicas=pool.plan.replicas,
            ranks=cost.ranks,
        )

    def scored(self, deployment: Deployment, outcome: Outcome, bound: float | None = None) -> Scored:
        """The figures of a run: its GPUs idle from the first request to the last token.

        Parameters
        ----------
        deployment, outcome
        bound : float or None    of its cost by the first objective; None where not known
        """
        problem, uses = self.problem, []
        facts = [self.facts_of(pool) for pool in deployment.pools]
        requests = self._requests(deployment)
        prices = [one.cost_per_h(pool.plan) for pool, one in zip(deployment.pools, facts, strict=True)]
        for place, (pool, one, did) in enumerate(zip(deployment.pools, facts, outcome.pools, strict=True)):
            cost = one.plan_cost(pool.plan)
            usage = account(
                pool.plan, cost, one.costs, did.counts, outcome.makespan_ns, did.shared, int(did.busy_ns.sum())
            )
            if isinstance(outcome, DisaggregatedOutcome):
                read_s = float((outcome.read_ns[:, 1] - outcome.read_ns[:, 0]).sum()) / NS_PER_S
                usage = replace(usage, energy_j=usage.energy_j + reading_j(one.costs, pool.plan, read_s))
            uses.append(
                PoolUse(
                    pool=pool,
                    requests=requests[place],
                    usage=usage,
                    memory=one.memory(pool.plan),
                    preemptions=did.preemptions,
                    batches=did.batches,
                )
            )
        costs = None if None in prices else add_up(price for price in prices if price is not None)
        figures = self.as_run(outcome, joules=add_up(use.usage.energy_j for use in uses), cost_per_h=costs)
        metrics = measure(figures, problem.goals, percentiles=problem.percentiles, cached_tokens=outcome.cached_tokens)
        return Scored(
            pools=tuple(uses),
            value=problem.objective.value(metrics),
            metrics=metrics,
            transient=Transient.of(outcome, self.outside_ns, clients=problem.trace.concurrency),
            bound=bound,
            moved=None if problem.rescheduling is None else len(outcome.moved),
            priorities=tuple(self._by_priority(outcome)),
            handover_s=self._handed(outcome) if isinstance(outcome, DisaggregatedOutcome) else None,
        )

    def _handed(self, outcome: DisaggregatedOutcome) -> dict[str, dict[str, float]]:
        """What the first token of a request takes, part by part.

        Parts are its prompt; the wait until the decode instance reads it, for the proxy, room and a turn; the read, of
        pages that are sent earlier what is left when the prompt is computed; the batches until its token is there; and
        the way between client and engine.
        """
        begin = np.maximum(outcome.read_ns[:, 0], outcome.prefilled_ns)
        parts = {
            "prompt": outcome.prefilled_ns - outcome.arrival_ns,
            "wait": begin - outcome.prefilled_ns,
            "read": outcome.read_ns[:, 1] - begin,
            "answer": outcome.first_token_ns - outcome.read_ns[:, 1],
            "outside": np.full(len(begin), self.outside_ns),
        }
        return {part: statistics_of(took / NS_PER_S, self.problem.percentiles) for part, took in parts.items()}

    def _by_priority(self, outcome: Outcome) -> Iterator[PriorityUse]:
        """What the requests of each priority saw, where there are several."""
        trace, levels = self.problem.trace, self.problem.trace.priority
        if levels is None or (levels == levels[0]).all():
            return
        preempted = None
        if outcome.steps is not None:
            preempted = levels[[request for step in outcome.steps for request in step[3]]]
        for level, name in enumerate(PRIORITIES):
            rows = np.flatnonzero(levels == level)
            times = {key: getattr(outcome, key)[rows] for key in ("arrival_ns", "first_token_ns", "finish_ns")}
            seen = replace(outcome, **times, gaps_ns=None).as_run(
                trace.picked(rows), self.problem.settings.max_model_len, outside_ns=self.outside_ns
            )
            yield PriorityUse(
                name=name,
                requests=len(rows),
                latency_s=measure(seen).latency_s,
                preemptions=None if preempted is None else int((preempted == level).sum()),
            )

    def _requests(self, deployment: Deployment) -> list[int]:
        """Requests of each pool; those of pools that hand over pass both."""
        if deployment.disaggregated:
            return [len(self.problem.trace)] * len(deployment.pools)
        owner, _ = self._dealt(deployment.pools)
        return [int((owner == place).sum()) for place in range(len(deployment.pools))]

    def as_run(self, outcome: Outcome, **known: float | None) -> Run:
        """A run of the problem's trace as figures are taken of, with its energy and the $ per hour where `known`."""
        problem = self.problem
        return outcome.as_run(
            problem.trace,
            problem.settings.max_model_len,
            outside_ns=self.outside_ns,
            limits=problem.per_request,
            **known,
        )

    def logged(self, deployment: Deployment) -> tuple[Outcome, PlanCost]:
        """A run of a deployment of one pool that keeps every batch, and what it was run with."""
        outcome = self.run(deployment, log=True)
        assert outcome is not None  # nothing to cut it short
        (pool,) = deployment.pools
        return outcome, self.facts_of(pool).plan_cost(pool.plan)

    def overlap(self, deployment: Deployment) -> tuple[tuple[HeadRoom, ...], tuple[TwoBatches, ...]]:
        """What overlap could give a deployment of one pool at best, and what two batches in place of one would.

        The latter of experts over several attention copies, where the engine can split their forwards; of a plan whose
        are split what that gained.
        """
        outcome = self.run(deployment)
        assert outcome is not None  # nothing to cut it short
        (pool,), (did,) = deployment.pools, outcome.pools
        facts = self.facts_of(pool)
        plan, cost = pool.plan, facts.plan_cost(pool.plan)
        room = head_room(plan, cost, facts.costs, did.counts, did.shared)
        without, overlapped = replace(plan, overlap=None), replace(plan, overlap=TWO)
        faults = violations(facts.problem.instance(), overlapped)
        if did.shared is None or any(fault.family == "engine" for fault in faults):
            return room, ()
        return room, two_batches(facts.plan_cost(without), facts.plan_cost(overlapped), did.counts, did.shared)

    def weight(self, pool: Pool, facts: Facts) -> int:
        """Tokens per second of a pool at full batches, by which requests are dealt."""
        plan, problem = pool.plan, self.problem
        cost, settings = facts.plan_cost(plan), problem.settings_for(plan)
        return plan.replicas * tokens_per_s(
            settings, facts.own_blocks(plan), cost.laws, problem.trace, 1, ranks=cost.ranks
        )

    def _deal(self, pools: tuple[Pool, ...]) -> tuple[NDArray[np.integer], list[int] | None]:
        """The pool of each request, and in closed loops the clients of each of several pools."""
        trace = self.problem.trace
        if len(pools) == 1:
            return np.zeros(len(trace), np.int8), None
        weights = [self.weight(pool, self.facts_of(pool)) for pool in pools]
        clients = None if trace.concurrency is None else clients_of(weights, trace.concurrency)
        return dealt(np.array([weights]), len(trace))[0], clients

    @cached_property
    def _computed(self) -> Ints:
        """Tokens of each request that any pool which serves it computes at least."""
        problem = self.problem
        return self._generated - 1 + (0 if problem.settings.prefix_caching else problem.trace.prompt)

    def _computed_apart(self) -> list[int]:
        """Tokens that the pool which computes prompts and the one which answers compute at least."""
        problem, first = self.problem, len(self._generated)
        pushed = isinstance(problem.settings.scheduler, SglangScheduling)
        prompts = first if problem.settings.prefix_caching else int(problem.trace.prompt.sum())
        return [prompts, int(self._generated.sum()) - (first if pushed else 0)]

    def _floors_apart(self, pools: Sequence[Pool], facts: Sequence[Facts]) -> Outcome:
        """Times that no request can beat which is handed over, in the form of a run."""
        trace, problem = self.problem.trace, self.problem
        prompt, answer = (one.alone(pool.plan) for pool, one in zip(pools, facts, strict=True))
        first = trace.arrival_ns + prompt.first_ns[0]
        if not isinstance(problem.settings.scheduler, SglangScheduling):
            assert problem.handover is not None  # where there may be such pools
            first = first + problem.handover.proxy_ns + answer.first_ns[0]
        return self._as_floors(first, first + answer.rest_ns[0])

    def _stops(
        self, pools: Sequence[Pool], facts: Sequence[Facts], computed: Sequence[int], bounds: Costs, worst: Costs
    ) -> list[Stop]:
        """What proves that a run misses a goal, or that its objectives are worse than some costs.

        Parameters
        ----------
        pools, facts
        computed : tokens that each pool computes at least
        bounds : Costs    of the costs
        worst : Costs     costs beyond which a deployment has lost
        """
        problem, generated = self.problem, self._generated
        every = list(zip(pools, facts, computed, strict=True))
        prices = [one.cost_per_h(pool.plan) for pool, one, _ in every]
        draws = [[watts(one.costs, pool.plan) for watts in (idle_w, limit_w)] for pool, one, _ in every]
        least_j = 0.0
        if problem.asks_gpus:
            least_j = add_up(one.token_j(pool.plan) * tokens for pool, one, tokens in every)
        known = StopFacts(
            requests=len(generated),
            decoding=int((generated > 1).sum()),
            output_tokens=int(generated.sum()),
            request_s=self.outside_ns / NS_PER_S,
            least_j=least_j * (1 - ROUNDING),
            idle_w=add_up(idle for idle, _ in draws),
            # Least where one of them draws all it may and the others idle.
            limit_w=add_up(idle for idle, _ in draws) + min(limit - idle for idle, limit in draws),
            cost_per_h=None if None in prices else add_up(price for price in prices if price is not None),
        )
        stops: list[Stop] = []
        for goal in problem.goals:
            stops += early_stops(goal.metric, goal.statistic, goal.limit, known, goal.fraction)
        if worst == self.any_cost:
            return stops
        for objective, cost, bound in zip(problem.objectives, worst, bounds, strict=True):
            stops += early_stops(objective.metric, objective.statistic, objective.signed(cost), known)
            if bound < cost:
                break  # better by this one, it may be worse by the next
        return stops

    def _floors(self, engines: Sequence[EnginePool], rows: Sequence[Ints]) -> Outcome:
        """Times that no request can beat, in the form of a run."""
        trace = self.problem.trace
        first, finish = trace.arrival_ns.copy(), trace.arrival_ns.copy()
        for engine, mine in zip(engines, rows, strict=True):
            minds = minds_preemption(engine.settings, len(engine.laws))
            overtaking = minds and may_preempt(engine.settings, engine.blocks, trace)
            floors = StageFloor.of_pool(engine.laws, engine.ranks)
            to_first, rest = isolated(engine.settings, floors, trace, overtaking=overtaking)
            first[mine] += to_first[mine]
            finish[mine] = first[mine] + rest[mine]
        return self._as_floors(first, finish)

    def _as_floors(self, first_ns: Ints, finish_ns: Ints) -> Outcome:
        """Times of first and last tokens in the form of a run."""
        return Outcome(
            arrival_ns=self.problem.trace.arrival_ns,
            first_token_ns=first_ns,
            finish_ns=finish_ns,
            preemptions=0,
            batches=0,
            busy_ns=np.zeros((1, 1), np.int64),
            counts=BatchCounts.empty(self.problem.settings),
        )
