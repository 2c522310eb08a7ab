"""Deployments that may sustain a rate, each with a guess of how much it takes and a rate that it surely does not take.

The guess decides the order in which deployments are looked at, and nothing else.

The rate that none can exceed is that at which its requests come as fast as their least work (`search.bounds.load`) is
done: above it some queue grows as long as requests keep coming, whatever the schedule. One pool of r replicas takes
r / w a second, where w is the mean least work of a request on one of them. Of several pools let c be what each takes
alone, C their sum, and w_i(j) / w_i the work of request j in pool i as a share of the mean there. However N requests
are dealt, the busiest pool works for no less than the mean of what all work, weighted by c / C, which is the sum over
the requests of w_i(j) / w_i in the pool i of each, divided by C, and so at least N k / C, where k is the mean over the
requests of the least such share in any pool. So no more than C / k come a second for ever.

Where one pool computes prompts and another one answers them every request passes both, so the slower one is the limit,
and so is the link of the prefill instances, on which reads follow each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.figures.goals import step_limit_s
from apex_opt.plans.deployment import Deployment, Pool
from apex_opt.search.best_first import Leaf
from apex_opt.search.bounds.handed import Handed
from apex_opt.search.bounds.load import works_ns
from apex_opt.search.facts import judged
from apex_opt.search.shapes import Pipelines, Sides, Single
from apex_opt.search.shapes.disaggregated import most_gpus, part_of
from apex_opt.search.shapes.pipeline import joined
from apex_opt.search.shapes.single import replicas_of
from apex_opt.search.shapes.together import Room, mixed_part
from apex_opt.simulator.law import RATE_BITS
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from apex_opt.plans.plan import Plan
    from apex_opt.search.facts import Facts
    from apex_opt.search.ledger import Part
    from apex_opt.search.scorer import Scorer
    from apex_opt.search.search import Formulations, Progress
    from apex_opt.search.shapes.single import Replicas
    from apex_opt.simulator.law import BatchLaw

_LEAST_DEALT: Final = 2_000
"""Requests of the shortest run that shows a rate: each pool has some of them."""

ROUNDING: Final = 1e-9
"""Share by which what pools take at most is raised: sums of works may come out less in another order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rated:
    """A pool, with what it takes.

    Parameters
    ----------
    pool : Pool
    guess_per_s : float       requests per second that it should sustain
    most_per_s : float        requests per second that no schedule sustains more than
    works : float64[n]        least work of each request of the trace, as a share of their mean
    weight : int              by which requests are dealt to it beside others
    """

    pool: Pool
    guess_per_s: float
    most_per_s: float
    works: NDArray[np.float64] = field(repr=False)
    weight: int = 1

    @property
    def devices(self) -> int:
        return self.pool.plan.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A deployment that may sustain a rate.

    Parameters
    ----------
    part : Part        what it is a part of
    leaf : Leaf        the deployment, with bounds of its costs, infinitely low where none are known
    guess_per_s, most_per_s : float    as of `Rated`
    """

    part: Part
    leaf: Leaf
    guess_per_s: float
    most_per_s: float


class Product:
    """Deployments with a pool on each of several types of GPU.

    Parameters
    ----------
    part : Part
    options : of each type    its pools
    rater : Rater
    most_gpus : int       GPUs that a deployment may take in all
    """

    def __init__(self, part: Part, options: Sequence[Sequence[Rated]], rater: Rater, most_gpus: int) -> None:
        self.part, self._options, self._rater, self.most_gpus = part, options, rater, most_gpus
        self.completions = Room(options).of
        self._best = [max((option.guess_per_s for option in some), default=0.0) for some in options]

    @property
    def pools(self) -> int:
        return len(self._options)

    def options(self, chosen: tuple[Rated, ...]) -> Iterator[tuple[Rated, int]]:
        """Options of the next pool beside those chosen that find room, each with how many deployments it leads to."""
        level, room = len(chosen), self.most_gpus - sum(option.devices for option in chosen)
        for option in self._options[level]:
            if ends := self.completions(level + 1, room - option.devices):
                yield option, ends

    def at_most_per_s(self, chosen: tuple[Rated, ...]) -> float:
        """A guess of what all pools together take, whatever is chosen for those that are open."""
        return sum(option.guess_per_s for option in chosen) + sum(self._best[len(chosen) :])

    def of_size(self, gpus: int, chosen: tuple[Rated, ...] = ()) -> Iterator[tuple[Rated, ...]]:
        """All of them on so many GPUs."""
        room = gpus - sum(option.devices for option in chosen)
        if len(chosen) == self.pools:
            if room == 0:
                yield chosen
            return
        if room > 0:
            for option in self._options[len(chosen)]:
                if option.devices <= room:
                    yield from self.of_size(gpus, (*chosen, option))

    def candidate(self, chosen: tuple[Rated, ...]) -> Candidate | None:
        """The deployment of some pools; None where the dealing leaves one of them nothing to do, which is counted."""
        total = sum(option.weight for option in chosen)
        if min(option.weight for option in chosen) * 2 * _LEAST_DEALT < total:
            self.part.infeasible["share"] += 1
            return None
        return self._rated(chosen)

    def _rated(self, chosen: tuple[Rated, ...]) -> Candidate:
        leaf = Leaf(deployment=Deployment(pools=tuple(option.pool for option in chosen)), bound=())
        guess_per_s, most_per_s = self._rater.together(chosen)
        return Candidate(part=self.part, leaf=leaf, guess_per_s=guess_per_s, most_per_s=most_per_s)


class Handing(Product):
    """Deployments with a pool that computes prompts on one type of GPU and one that answers on another or the same.

    Parameters
    ----------
    scorer : Scorer           of the trace at a rate: what misses a goal there by its bound is out of reach
    prefill, decode : Sides   of these types
    rater : Rater
    """

    def __init__(self, scorer: Scorer, prefill: Sides, decode: Sides, rater: Rater) -> None:
        problem, part = scorer.problem, part_of(scorer.problem, prefill, decode)
        sides = prefill.options["prefill"], decode.options["decode"]
        options = [[rater.rated(option.pool) for option in some] for some in sides]
        super().__init__(part, options, rater, most_gpus(problem, *part.types))
        self._floors = {option.pool: option for some in sides for option in some}
        self._problem, self._compose = problem, Handed(problem, scorer.outside_ns, scorer.pairs)

    def at_most_per_s(self, chosen: tuple[Rated, ...]) -> float:
        """A guess of what both pools take, each by itself."""
        return min([option.guess_per_s for option in chosen] + self._best[len(chosen) :])

    def candidate(self, chosen: tuple[Rated, ...]) -> Candidate | None:
        """The deployment of two pools; None where they do not go together or miss a goal, which is counted."""
        prefill, decode = chosen
        pair = self._floors[prefill.pool], self._floors[decode.pool]
        if family := self._compose.lost(pair):
            self.part.infeasible[family] += 1
            return None
        run, _ = self._compose.of([pair])
        if not judged(run, self._problem.objectives, self._problem.goals)[1][0]:
            self.part.out_of_reach += 1
            return None
        return self._rated(chosen)


class Rater:
    """Says what pools take, alone and together.

    Parameters
    ----------
    own : Scorer    of the trace as given
    """

    def __init__(self, own: Scorer) -> None:
        self._own = own
        self._works: dict[tuple[object, ...], tuple[float, NDArray[np.float64]]] = {}
        self._shares: dict[tuple[int, ...], float] = {}

    def rated(self, pool: Pool, *, beside: bool = False) -> Rated:
        """A pool with what it takes; `beside` others also with its weight."""
        facts, plan = self._own.facts_of(pool), pool.plan
        side = facts.side(plan)
        key = pool.role, pool.types, plan.cut, plan.stages, facts.costs.layouts_of(plan), side
        if key not in self._works:
            problem = facts.problem
            first_ns, later_ns = works_ns(problem.settings_for(plan), facts.mean(plan), problem.trace)
            # Where phases share a GPU what bounds a run is not the sum of their works.
            mean_ns = max(float((u * first_ns + v * later_ns).mean()) for u, v in side.weights)
            self._works[key] = mean_ns, (first_ns + later_ns) / (mean_ns or 1.0)
        mean_ns, works = self._works[key]
        return Rated(
            pool=pool,
            guess_per_s=guess(facts, plan),
            most_per_s=plan.replicas * NS_PER_S / mean_ns if mean_ns else math.inf,
            works=works,
            weight=self._own.weight(pool, facts) if beside else 1,
        )

    def together(self, pools: Sequence[Rated]) -> tuple[float, float]:
        """Guess of what pools take side by side, as requests are dealt by weights, and what they take at most."""
        if len(pools) == 1:
            return pools[0].guess_per_s, pools[0].most_per_s * (1 + ROUNDING)
        if pools[0].pool.role is not None:
            most_per_s = min(self._link_per_s(*pools), *(pool.most_per_s for pool in pools))
            return min(pool.guess_per_s for pool in pools), most_per_s * (1 + ROUNDING)
        total = sum(pool.weight for pool in pools)
        key = tuple(id(pool.works) for pool in pools)
        if key not in self._shares:
            self._shares[key] = float(np.minimum.reduce([pool.works for pool in pools]).mean())
        least, most_per_s = self._shares[key], sum(pool.most_per_s for pool in pools)
        return (
            min(pool.guess_per_s * total / pool.weight for pool in pools),
            most_per_s / least * (1 + ROUNDING) if least else math.inf,
        )

    def _link_per_s(self, prefill: Rated, decode: Rated) -> float:
        """Requests per second that the links of a prefill pool hand over at most."""
        settings, trace = self._own.problem.settings, self._own.problem.trace
        handover = self._own.pairs.handover(prefill.pool, decode.pool)
        if settings.prefix_caching:  # blocks may all be there
            return math.inf
        read_ns = handover.read_ns + handover.block_ns * float((-(-trace.prompt // settings.block_size)).mean())
        return prefill.pool.plan.replicas * NS_PER_S / read_ns if read_ns and handover.in_turn else math.inf


class Candidates:
    """The deployments of a problem that may sustain a rate.

    Parameters
    ----------
    own : Scorer              of the trace as given, by which they are rated
    scorer : Scorer           of the trace at a rate: what misses a goal there by its bound is out of reach
    formulation : Formulations
    tell : callable           told (what, done, total) along the way
    """

    def __init__(self, own: Scorer, scorer: Scorer, formulation: Formulations, tell: Progress) -> None:
        problem = scorer.problem
        self._rater = Rater(own)
        types = () if problem.serving == ("pools",) else problem.types
        singles = [Single(scorer.facts(name), formulation, name if problem.mixed else None, tell) for name in types]
        plans = [single.plans() for single in singles]
        self.alone: list[Candidate] = []
        for single, some in zip(singles, plans, strict=True):
            single.part.repeated = single.space.feasible - len(some)
            cuts = [(*one, None) for plan in some if plan.replicas == 1 for one in single.space.repeated(plan)]
            self._list(single.part, replicas_of(single.facts, single.part, cuts, single.gpu, tell))
        self.products: list[Product] = []
        pipelines: list[Pipelines] = []
        if problem.mixed and singles:
            rated = [
                [self._rater.rated(Pool(plan=plan, gpu=name), beside=True) for plan in some]
                for name, some in zip(types, plans, strict=True)
            ]
            for size in range(2, len(singles) + 1):
                for places in combinations(range(len(singles)), size):
                    options = [rated[place] for place in places]
                    part = mixed_part(problem, [singles[place] for place in places], options)
                    self.products.append(Product(part, options, self._rater, problem.max_devices))
            for one, other in combinations(range(len(singles)), 2):
                if joined(problem, one, other) is not None:
                    facts = scorer.facts(problem.types[one], problem.types[other])
                    pipelines.append(Pipelines(facts, formulation, tell))
                    self._list(pipelines[-1].part, pipelines[-1].branches())
        handing: list[Product] = []
        if "pools" in problem.serving:
            sides = [Sides(scorer, formulation, place, tell) for place in range(len(problem.offers))]
            handing = [Handing(scorer, one, other, self._rater) for one, other in product(sides, repeat=2)]
        self.parts: tuple[Part, ...] = (
            *(single.part for single in singles),
            *(one.part for one in self.products),
            *(shape.part for shape in pipelines),
            *(one.part for one in handing),
        )
        self.products += handing

    @property
    def any_feasible(self) -> bool:
        """Whether any deployment can run."""
        return any(part.space > sum(part.infeasible.values()) + part.repeated for part in self.parts)

    def _list(self, part: Part, branches: Iterable[Replicas]) -> None:
        """Take in the deployments of some branches."""
        for branch in branches:
            for place in range(len(branch.bounds)):
                leaf = branch.child(place)
                guess_per_s, most_per_s = self._rater.together([self._rater.rated(leaf.deployment.pools[0])])
                self.alone.append(Candidate(part=part, leaf=leaf, guess_per_s=guess_per_s, most_per_s=most_per_s))


def guess(facts: Facts, plan: Plan) -> float:
    """Requests per second that would keep the busiest stage of a plan busy: no bound, for the order alone.

    Prompts fill their batches; as many sequences decode at once as the KV cache and the tightest goal on TPOT allow. In
    a pipeline these gather in one batch, as a batch takes all that are free.
    """
    problem = facts.problem
    settings, trace = problem.settings_for(plan), problem.trace
    cost = facts.plan_cost(plan)
    laws, ranks = cost.laws, cost.ranks
    prompt = float(trace.prompt.mean())
    computed = prompt if settings.role != "decode" else 1.0  # what was handed over is not computed again
    output = float(trace.generated(settings.max_model_len).mean())
    held = prompt + output / 2
    groups = settings.kv_groups
    blocks = float(settings.most_blocks(np.array(math.ceil(held)))) if groups else held / settings.block_size
    most = int(facts.own_blocks(plan) / blocks / plan.stages)
    sequences = np.arange(1, min(max(most, 1), settings.max_num_seqs) + 1)
    steps = [law.decode_ns[sequences] + _read_ns(law, sequences, held) for law in laws]
    mixed = [law.mixed_ns[-1] for law in laws]
    if ranks is not None and ranks.in_step:
        steps = [step + shared.decode_ns[sequences] for step, shared in zip(steps, ranks.shared, strict=True)]
        mixed = [own + shared.mixed_ns[-1] for own, shared in zip(mixed, ranks.shared, strict=True)]
    limit_s = step_limit_s(problem.slos)
    limit_ns = math.inf if limit_s is None else NS_PER_S * limit_s
    step_ns = np.sum(steps, axis=0)
    last = max(int((step_ns <= limit_ns).sum()) - 1, 0)
    busy_ns = max(
        computed * full / (len(law.mixed_ns) - 1) + _pairs_ns(law, prompt) / law.copies * (computed / prompt)
        for law, full in zip(laws, mixed, strict=True)
    )
    busy_ns += output * step_ns[last] / sequences[last]
    schedulers = 1 if ranks is None else ranks.count
    return float(plan.replicas * schedulers * NS_PER_S / busy_ns)


def _read_ns(law: BatchLaw, sequences: NDArray[np.int64], held: float) -> NDArray[np.float64]:
    """What reading the contexts of so many sequences takes."""
    total = sequences * held * law.context_rate[sequences]
    for window, rates in zip(law.windows, law.seen_rate, strict=True):
        total += sequences * min(held, window.tokens) * rates[sequences]
    return np.asarray(total / 2**RATE_BITS)


def _pairs_ns(law: BatchLaw, prompt: float) -> float:
    """What the query-key pairs of a prompt take."""
    total = float(prompt**2 / 2 * law.pair_rate[-1])
    for window, rates in zip(law.windows, law.seen_pair_rate, strict=True):
        total += float(window.all_pairs(np.array([round(prompt)]))[0] * rates[-1])
    return total / 2**RATE_BITS
