"""Pipelines whose stages are on two types of GPU: some first stages on one, the others on the other.

Stages on slower GPUs get fewer layers: the split whose slowest stage is fastest, by what a full batch takes
on each type. Plans are enumerated in plain Python, bounded as those of one type are, with what every piece of a batch
takes at least on either type, and simulated best bound first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol

from apex_opt.errors import FormulationError
from apex_opt.evaluate import cuts, violations
from apex_opt.search.answer import Certificate
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.search import Queued, bound_plans, simulate_queue

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.cluster.types import Gpu, Link
    from apex_opt.evaluate import Instance
    from apex_opt.plan.plan import Plan
    from apex_opt.search.answer import Candidate
    from apex_opt.search.question import Question
    from apex_opt.search.search import Progress

    Costs = tuple[float, ...]

MOST_JOINT: Final = 64
"""GPUs of both types together up to which pipelines over both are looked for: a dense model has 7,000 of them on 64."""

_PACES: Final = 1000
_SHAPES: Final = ("divisibility", "format", "engine")


class Splitter(Protocol):
    """What finds the layers of stages on several types of GPU."""

    def paced(
        self, instance: Instance, plan: Plan, gpus: Sequence[Gpu], pace: tuple[int, ...]
    ) -> tuple[int, ...] | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Joint:
    """Pipelines over two types of GPU.

    Parameters
    ----------
    done : tuple of Candidate    those with a score
    space, infeasible, cut_short, out_of_reach : int      as of `Certificate`
    rest : tuple of costs        bounds of those that nothing was tried with
    """

    done: tuple[Candidate, ...]
    space: int
    infeasible: int
    cut_short: int
    out_of_reach: int
    rest: tuple[Costs, ...]

    def left(self, last: Costs | None) -> list[Costs]:
        """Bounds of those that may be as good as some costs."""
        return [bound for bound in self.rest if last is None or bound <= last]

    def certificate(self, question: Question, last: Costs | None) -> Certificate:
        """What became of them, where the last plan to show has some costs."""
        left = len(self.left(last))
        return Certificate(
            space=self.space,
            infeasible={"memory": self.infeasible},
            bounded=self.out_of_reach + len(self.rest) - left,
            out_of_reach=self.out_of_reach,
            simulated=len(self.done) + self.cut_short,
            cut_short=self.cut_short,
            missed=sum(not candidate.meets_slos for candidate in self.done),
            left=left,
            optimal=not left,
            gap=None,
            least_bound=question.objective.signed(min(self.rest)[0]) if self.rest and not left else None,
            incumbent=question.objective.signed(last[0]) if self.rest and not left and last else None,
        )


def joined(one: Question, other: Question, between: Link) -> Question | None:
    """The question of pipelines over two types of GPU; None where these share no format or are too many."""
    formats = dict.fromkeys(zip(one.weight_formats, one.kv_formats, strict=True))
    shared = [pair for pair in zip(other.weight_formats, other.kv_formats, strict=True) if pair in formats]
    if not shared or one.free + other.free > MOST_JOINT:
        return None
    weights, kv = (tuple(column) for column in zip(*shared, strict=True))
    return replace(one, others=(other,), between=between, weight_formats=weights, kv_formats=kv, clocks=(None,))


def pipelines(question: Question, most: int | None = None) -> Iterator[Plan]:
    """Every pipeline over both types whose shards are equal and whose formats both compute, with even stages.

    Parameters
    ----------
    question : as `joined` makes it
    most : GPUs that a plan may take, of both types together; None for all
    """
    one, other = question.pools
    free = {pool.cluster.gpu.name: pool.free for pool in question.pools}
    nodes = one.cluster.nodes + other.cluster.nodes
    wide = max(one.cluster.gpus_per_node, other.cluster.gpus_per_node)
    both = replace(one.cluster, nodes=nodes, gpus_per_node=wide)
    whole = replace(question.instance(), cluster=both, max_devices=min(sum(free.values()), most or both.size))
    instances = [
        replace(whole, cluster=replace(both, gpu=pool.cluster.gpu), tpot_limit_ns=None) for pool in question.pools
    ]
    good: dict[tuple[object, ...], bool] = {}
    for cut in cuts(whole):
        if cut.stages == 1:
            continue
        if cut.cut not in good:
            broken = {found.family for instance in instances for found in violations(instance, cut)}
            good[cut.cut] = not broken & set(_SHAPES)
        if not good[cut.cut]:
            continue
        for first, last in (tuple(free), tuple(free)[::-1]):
            for stages in range(1, cut.stages):
                on = ((first, stages), (last, cut.stages - stages))
                fit = min(free[name] // (n * cut.stage_devices) for name, n in on)
                for replicas in range(1, min(fit, whole.max_devices // cut.devices) + 1):
                    yield replace(cut, replicas=replicas, on=on)


class Splits:
    """The layers of pipelines over several types of GPU, once for all that cut the model alike."""

    def __init__(self, evaluator: Evaluator, formulation: Splitter) -> None:
        self._evaluator, self._formulation = evaluator, formulation
        self._instance = evaluator.question.instance()
        self._gpus = {pool.cluster.gpu.name: pool.cluster.gpu for pool in evaluator.question.pools}
        self._found: dict[tuple[object, ...], tuple[int, ...] | None] = {}

    def __call__(self, plan: Plan) -> Plan | None:
        """The plan with its layers split by the speed of the stages; None where they fit in no way.

        Raises
        ------
        FormulationError    the program and plain Python disagree about what fits
        """
        key = plan.cut, plan.stages
        if key not in self._found:
            gpus = [self._gpus[name] for name, stages in plan.on for _ in range(stages)]
            self._found[key] = self._formulation.paced(self._instance, plan, gpus, self._pace(plan))
        layers = self._found[key]
        if layers is None:
            return None
        found = replace(plan, layers=layers)
        if not self._evaluator.holds(found):
            raise FormulationError(f"joint pipelines: {found} does not fit, though its split was said to")
        return found

    def _pace(self, plan: Plan) -> tuple[int, ...]:
        """What a layer takes each stage, as stages of as many layers take full batches."""
        laws = self._evaluator.costs.plan_cost(plan).laws
        taken = []
        at = 0
        for _, stages in plan.on:
            law = laws[at]
            chunk = int(law.chunk_ns[-1]) // law.copies
            taken.append((int(law.decode_ns[-1]) + int(law.mixed_ns[-1]) + chunk) / plan.layers[at])
            at += stages
        least = min(taken)
        return tuple(
            round(_PACES * own / least) for own, (_, stages) in zip(taken, plan.on, strict=True) for _ in range(stages)
        )


def search_joint(
    question: Question,
    formulation: Splitter,
    tell: Progress,
    top: int,
    deadline: float,
    worst: Costs,
    most: int | None = None,
) -> Joint:
    """The pipelines over both types that are no worse than some costs, and why the others are not.

    Parameters
    ----------
    question : as `joined` makes it
    worst : what the `top`-th best plan found elsewhere costs; infinite where there is none
    most : GPUs that a plan may take
    """
    evaluator = Evaluator(question)
    plans = list(pipelines(question, most))
    bounds = bound_plans(evaluator, plans, question.objectives, tell, 0)
    queue = [Queued(bound, n, plans[n], True) for n, (bound, possible) in enumerate(bounds) if possible]
    queue.sort(key=lambda item: (item.bound, item.place))
    run = simulate_queue(queue, evaluator, Splits(evaluator, formulation), tell, top, deadline, worst)
    seen = len(run.done) + run.cut_short + run.repeated
    return Joint(
        done=tuple(run.done),
        space=len(plans),
        infeasible=run.repeated,
        cut_short=run.cut_short,
        out_of_reach=len(plans) - len(queue),
        rest=tuple(item.bound for item in queue[seen:]),
    )
