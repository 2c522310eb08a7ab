"""The deployments that a question about rates chooses from: as a tree, by number of GPUs, and those that cannot run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING

from apex_opt.search.best_first import Leaf, Queue
from apex_opt.search.search import judge
from apex_opt.search.space import check_lengths
from apex_opt.studies.candidates import Candidate, Candidates, Rater
from apex_opt.studies.one_rate import size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from apex_opt.plans.deployment import Deployment
    from apex_opt.search.answer import Status
    from apex_opt.search.best_first import Branch
    from apex_opt.search.ledger import Costs, Ledger, Part
    from apex_opt.search.scorer import Scorer
    from apex_opt.search.search import Formulations, Progress
    from apex_opt.studies.candidates import Product, Rated
    from apex_opt.studies.steady import Steady


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Deployments to choose from, and those that cannot run.

    Parameters
    ----------
    scorer : Scorer                  at the rate at which what misses a goal by its bound is left out
    parts : tuple of Part
    alone : list of Candidate        of one pool, or the one asked about
    products : list of Product       of several pools
    given : Deployment or None       the only one asked about
    feasible : bool                  whether any can run
    simulations : int                made to find out
    reason : str or None             why the one asked about cannot run
    """

    scorer: Scorer
    parts: tuple[Part, ...]
    alone: list[Candidate]
    products: list[Product]
    given: Deployment | None
    feasible: bool
    simulations: int = 0
    reason: str | None = None

    @classmethod
    def of(
        cls,
        steady: Steady,
        scorer: Scorer,
        formulation: Formulations,
        deployment: Deployment | None,
        tell: Progress,
    ) -> Space:
        """The deployments of the problem, or the one asked about.

        Parameters
        ----------
        steady : Steady
        scorer : Scorer                     at the rate at which what misses a goal by its bound is left out
        formulation : Formulations
        deployment : Deployment or None     the only one asked about
        tell : callable                     told (what, done, total) along the way
        """
        check_lengths(scorer.problem)
        if deployment is None:
            found = Candidates(steady.own, scorer, formulation, tell)
            return cls(
                scorer=scorer,
                parts=found.parts,
                alone=found.alone,
                products=found.products,
                given=None,
                feasible=found.any_feasible,
            )
        answer = judge(scorer.problem, deployment, tell)
        (part,) = answer.ledger.parts
        simulations = part.simulated
        part.seen, part.missed = [], 0
        part.best = None
        alone = []
        if answer.best is not None:
            bounds: Costs = (-inf,) * len(scorer.problem.objectives)
            possible = True
            if len(deployment.pools) == 1:
                bounds, possible = scorer.bounds(deployment)
            if possible:
                rater = Rater(steady.own)
                rated = [rater.rated(pool, beside=len(deployment.pools) > 1) for pool in deployment.pools]
                guess_per_s, most_per_s = rater.together(rated)
                leaf = Leaf(deployment=deployment, bound=bounds)
                alone.append(Candidate(part=part, leaf=leaf, guess_per_s=guess_per_s, most_per_s=most_per_s))
            else:
                part.out_of_reach = 1
        return cls(
            scorer=scorer,
            parts=(part,),
            alone=alone,
            products=[],
            given=deployment,
            feasible=answer.best is not None,
            simulations=simulations,
            reason=answer.reason,
        )

    def status(self, ledger: Ledger, found: bool) -> Status:
        if not found:
            return "unknown" if ledger.waiting else "infeasible"
        return "feasible" if self.given is not None or not ledger.optimal else "optimal"

    def sizes(self, most_gpus: int) -> list[int]:
        """Numbers of GPUs on which there are deployments."""
        alone = {one.leaf.deployment.devices for one in self.alone}
        most = max((product.most_gpus for product in self.products), default=0)
        return sorted(alone | set(range(1, min(most, most_gpus) + 1)))

    def at(self, gpus: int, rate_per_s: float) -> Iterator[Branch]:
        """The deployments on so many GPUs, the best by their bounds first; of several pools the likeliest first.

        Of the many of several pools those whose least work does not allow the rate are counted.
        """
        for part in self.parts:
            able = [one for one in self.alone if one.part is part and one.leaf.deployment.devices == gpus]
            able.sort(key=lambda one: (one.leaf.bound, str(one.leaf.deployment)))
            yield Queue(part, [one.leaf.behind(float(gpus)) for one in able])
        unknown = (float(gpus), *(-inf for _ in self.scorer.problem.objectives))
        for product in self.products:
            able = []
            for chosen in product.of_size(gpus) if gpus <= product.most_gpus else ():
                candidate = product.candidate(chosen)
                if candidate is not None and candidate.most_per_s >= rate_per_s:
                    able.append(candidate)
                elif candidate is not None:
                    product.part.out_of_reach += 1
            able.sort(key=lambda one: (-one.guess_per_s, *size_of(one.leaf.deployment)))
            yield Queue(product.part, [replace(one.leaf, bound=unknown, closer=None) for one in able])

    def beyond(self, part: Part, gpus: int, most_gpus: int) -> int:
        """Deployments of a part on more GPUs.

        Parameters
        ----------
        part : Part
        gpus, most_gpus : int    more than so many, and up to so many
        """
        for product in self.products:
            if product.part is part:
                return product.completions(0, product.most_gpus) - product.completions(0, min(gpus, product.most_gpus))
        return sum(one.part is part and one.leaf.deployment.devices > gpus for one in self.alone)

    def end(self, last: Costs | None) -> None:
        """Close the parts."""
        for part in self.parts:
            part.end(last)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partly:
    """A branch: the pools chosen so far, with options for the next in the order of their guess."""

    product: Product
    admits: Callable[[Costs, Part], bool]
    options: Sequence[tuple[Rated, ...]]
    bounds: Sequence[Costs]
    ends: Sequence[int]
    """Deployments up to each option, that one included."""

    @property
    def part(self) -> Part:
        return self.product.part

    def leaves(self, first: int, last: int) -> int:
        return self.ends[last - 1] - (self.ends[first - 1] if first else 0)

    def child(self, place: int) -> Iterator[Branch]:
        return (beside(self.product, chosen, self.admits) for chosen in [self.options[place]])


def beside(product: Product, chosen: tuple[Rated, ...], admits: Callable[[Costs, Part], bool]) -> Branch:
    """The options of the next pool beside those chosen; of the last pool those that may matter, the others counted.

    Parameters
    ----------
    product : Product
    chosen : tuple of Rated    the pools so far
    admits : callable          whether what has such a bound may matter
    """
    options = list(product.options(chosen))
    if len(chosen) + 1 == product.pools:
        candidates = []
        for option, _ in options:
            candidate = product.candidate((*chosen, option))
            if candidate is None:
                continue
            if admits(_rate_bound(candidate), product.part):
                candidates.append(candidate)
            else:
                product.part.beat(_rate_bound(candidate))
        return by_guess(product.part, candidates)
    rows = []
    for option, ends in options:
        beside = (*chosen, option)
        gpus = sum(one.devices for one in beside)
        rows.append(((-inf, -product.at_most_per_s(beside), float(gpus)), str(option.pool), beside, ends))
    rows.sort(key=lambda row: (row[0], row[1]))
    total, ends_ = 0, []
    for *_, ends in rows:
        total += ends
        ends_.append(total)
    return _Partly(
        product=product,
        admits=admits,
        options=[row[2] for row in rows],
        bounds=[row[0] for row in rows],
        ends=ends_,
    )


def _rate_bound(candidate: Candidate) -> Costs:
    """Bounds as `_Fastest` reads them."""
    return -candidate.most_per_s, -candidate.guess_per_s, float(candidate.leaf.deployment.devices)


def by_guess(part: Part, candidates: Iterable[Candidate]) -> Queue:
    """Deployments in the order of a guess of their rate."""
    ordered = sorted(candidates, key=lambda one: (-one.guess_per_s, *size_of(one.leaf.deployment)))
    return Queue(part, [replace(one.leaf, bound=_rate_bound(one), closer=None) for one in ordered])
