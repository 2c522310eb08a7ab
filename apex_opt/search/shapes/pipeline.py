"""Pipelines whose stages are on two types of GPU: some first stages on one, the others on the other.

Stages on slower GPUs get fewer layers: the split whose slowest stage is fastest, by what a full batch takes
on each type. Plans are enumerated in plain Python, bounded as those of one type are, with what every piece of a batch
takes at least on either type, and simulated best bound first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

from apex_opt.errors import FormulationError
from apex_opt.oracle.checks import Violation, violations
from apex_opt.oracle.space import cuts
from apex_opt.plans.plan import repeated
from apex_opt.search.ledger import Part
from apex_opt.search.shapes.single import in_turn, replicas_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from apex_opt.cluster.types import Gpu
    from apex_opt.oracle.instance import Instance
    from apex_opt.plans.plan import Plan
    from apex_opt.search.facts import Facts
    from apex_opt.search.problem import Problem
    from apex_opt.search.shapes.single import Bounded, Replicas
    from apex_opt.search.space import Progress

MOST_JOINT: Final = 64
"""GPUs of both types together up to which pipelines over both are looked for: a dense model has 7,000 of them on 64."""

_PACES: Final = 1000
_SHAPES: Final = ("divisibility", "format", "engine")


class Splitter(Protocol):
    """What finds the layers of stages on several types of GPU."""

    def paced(
        self, instance: Instance, plan: Plan, gpus: Sequence[Gpu], pace: tuple[int, ...]
    ) -> tuple[int, ...] | None:
        """Layers of stages on several types of GPU, the slowest stage as fast as can be; None where nothing fits.

        Parameters
        ----------
        instance, plan
        gpus : sequence of Gpu    of each stage
        pace : tuple of int       what a layer takes on each stage
        """
        ...


def joined(problem: Problem, first: int, second: int) -> Problem | None:
    """The problem of pipelines over two types of GPU; None where these share no format, are too many or not linked.

    Parameters
    ----------
    problem
    first : int     number of the first type of GPU
    second : int    number of the second type of GPU
    """
    one, other = problem.offers[first], problem.offers[second]
    formats = dict.fromkeys(zip(one.weight_formats, one.kv_formats, strict=True))
    shared = [pair for pair in zip(other.weight_formats, other.kv_formats, strict=True) if pair in formats]
    if problem.between is None or not shared or one.free + other.free > MOST_JOINT:
        return None
    weights, kv = (tuple(column) for column in zip(*shared, strict=True))
    offers = (replace(o, weight_formats=weights, kv_formats=kv, clocks=(None,)) for o in (one, other))
    return replace(problem, offers=tuple(offers))


def pipelines(problem: Problem) -> Iterator[tuple[Plan, range]]:
    """Every pipeline over both types whose shards are equal and whose formats both compute, with even stages.

    Parameters
    ----------
    problem : as `joined` makes it

    Yields
    ------
    Plan, range    one replica with a router, and the numbers of replicas that find room
    """
    one, other = problem.offers
    free = {offer.name: offer.free for offer in problem.offers}
    nodes = one.cluster.nodes + other.cluster.nodes
    wide = max(one.cluster.gpus_per_node, other.cluster.gpus_per_node)
    both = replace(one.cluster, nodes=nodes, gpus_per_node=wide)
    whole = replace(problem.instance(), cluster=both, max_devices=min(sum(free.values()), problem.max_devices))
    instances = [
        replace(whole, cluster=replace(both, gpu=offer.cluster.gpu), tpot_limit_ns=None) for offer in problem.offers
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
                yield from repeated(replace(cut, on=on), min(fit, whole.max_devices // cut.devices), whole.routings)


def faults(facts: Facts, plan: Plan) -> Iterator[Violation]:
    """Why a pipeline over types cannot run: its GPUs, its shards and formats on either type, its memory."""
    problem, instance = facts.problem, facts.problem.instance()
    for name, stages in plan.on:
        free = next(offer.free for offer in problem.offers if offer.name == name)
        if (taken := plan.replicas * stages * plan.stage_devices) > free:
            yield Violation(family="devices", text=f"it takes {taken} GPUs of {name}, {free} are offered")
    seen = set()
    for offer in problem.offers:
        for fault in violations(replace(instance, cluster=offer.cluster, max_devices=1), plan):
            if fault.family in _SHAPES and fault.family not in seen:
                seen.add(fault.family)
                yield fault
    if not facts.holds(plan):
        blocks = min(stage.kv_blocks for stage in facts.memory(plan))
        yield Violation(
            family="memory",
            text=f"{instance.longest} needs {instance.blocks_needed(plan)} KV blocks, the fullest stage has {blocks}",
        )


class Splits:
    """The layers of pipelines over several types of GPU, once for all that cut the model alike."""

    def __init__(self, facts: Facts, formulation: Splitter) -> None:
        self._facts, self._formulation = facts, formulation
        self._instance = facts.problem.instance()
        self._gpus = {offer.name: offer.cluster.gpu for offer in facts.problem.offers}
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
        if not self._facts.holds(found):
            raise FormulationError(f"joint pipelines: {found} does not fit, though its split was said to")
        return found

    def _pace(self, plan: Plan) -> tuple[int, ...]:
        """What a layer takes each stage, as stages of as many layers take full batches."""
        cost = self._facts.plan_cost(plan)
        laws, together = cost.laws, cost.ranks.shared if cost.ranks else ()
        taken = []
        at = 0
        for _, stages in plan.on:
            law = laws[at]
            chunk = int(law.chunk_ns[-1]) // law.copies
            shared = int(together[at].decode_ns[-1]) + int(together[at].mixed_ns[-1]) if together else 0
            taken.append((int(law.decode_ns[-1]) + int(law.mixed_ns[-1]) + chunk + shared) / plan.layers[at])
            at += stages
        least = min(taken)
        return tuple(
            round(_PACES * own / least) for own, (_, stages) in zip(taken, plan.on, strict=True) for _ in range(stages)
        )


class Pipelines:
    """The pipelines over two types of GPU.

    Parameters
    ----------
    facts : Facts             of a problem as `joined` makes it
    formulation : Splitter    splits their layers
    tell : callable           told (what, done, total) along the way
    bounded : callable        has plans bounded
    """

    def __init__(self, facts: Facts, formulation: Splitter, tell: Progress, bounded: Bounded = in_turn) -> None:
        self._facts, self._tell, self._bounded = facts, tell, bounded
        self._splits = Splits(facts, formulation)
        self._cuts = list(pipelines(facts.problem))
        self.part = Part(
            shape="pipeline",
            types=facts.problem.types,
            objective=facts.problem.objective,
            space=sum(len(counts) for _, counts in self._cuts),
            infeasible={"memory": 0},
        )

    def branches(self) -> Iterator[Replicas]:
        """A branch for every cut and way it lies."""
        order = sorted(self._cuts, key=lambda item: (item[0].cut, item[0].stages))
        cuts = [(cut, counts, self._splits) for cut, counts in order]
        return replicas_of(self._facts, self.part, cuts, None, self._tell, self._bounded)
