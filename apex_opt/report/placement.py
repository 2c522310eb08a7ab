"""What `place` answers: where a plan goes, what its collectives take there, and what losing GPUs costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from apex_opt.cluster.tree import LEVELS
from apex_opt.launch.commands import on_nodes
from apex_opt.oracle.checks import violations
from apex_opt.placement.assignment import layout_of, rank_order
from apex_opt.placement.domains import groups, replicas_in, rooms
from apex_opt.placement.reasons import lies
from apex_opt.placement.shape import Shape
from apex_opt.plans.engine import limited
from apex_opt.plans.memory import stage_memory
from apex_opt.report import studied, types
from apex_opt.report.layout import count
from apex_opt.schema import of
from apex_opt.search.facts import Facts
from apex_opt.simulator.ranks import alike_ns
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from apex_opt.cluster.composition import Composition
    from apex_opt.cluster.tree import Tree
    from apex_opt.cluster.types import Cluster
    from apex_opt.cost import CostModel
    from apex_opt.placement import Assignment
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan
    from apex_opt.search import Problem

P = TypeVar("P", bound=types.Placement)
B = TypeVar("B", bound=types.OtherPlacement)


class Found(Protocol):
    """A proven placement as the program gives it.

    `tried` ways to lay the plan out are better and have no GPUs; `optimal` says that none as good leaves more GPUs free
    in groups.
    """

    @property
    def assignment(self) -> Assignment: ...
    @property
    def tried(self) -> int: ...
    @property
    def optimal(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """GPUs that go, and where the plan goes then.

    Parameters
    ----------
    gpus : tuple of str           those lost
    before, after : Assignment    of all replicas, and of those that are kept
    tree : Tree                   what is free once they are lost, the plan's own GPUs among them
    plan : Plan                   with as many replicas as still fit
    replicas : tuple of int       which of those before they are
    moved, moved_bytes : int      ranks on other GPUs than before, and their weights
    optimal : bool                whether none as good moves less
    """

    gpus: tuple[str, ...]
    before: Assignment
    after: Assignment
    tree: Tree
    plan: Plan
    replicas: tuple[int, ...]
    moved: int
    moved_bytes: int
    optimal: bool


@dataclass(frozen=True, kw_only=True)
class Site:
    """A plan, the GPUs that it may be placed on, and what it costs there."""

    problem: Problem
    plan: Plan
    wiring: Cluster | Composition
    facts: Facts

    @property
    def tree(self) -> Tree:
        """The free GPUs."""
        return self.facts.layouts.tree

    @property
    def costs(self) -> CostModel:
        """Costs of plans on one type of GPU."""
        return self.facts.costs

    @cached_property
    def shape(self) -> Shape:
        """Replicas, stages and ranks of the plan."""
        return Shape.of(self.plan)

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """Bytes of the weights of a rank, by stage."""
        problem = self.problem
        memory = stage_memory(problem.model, problem.cluster.gpu, self.plan, limited(problem.settings, self.plan))
        return tuple(stage.weights_bytes for stage in memory)

    def layout(self, tree: Tree, assignment: Assignment) -> Layout:
        """What an assignment of all replicas or of fewer amounts to."""
        return layout_of(tree, self.shape._replace(replicas=len(assignment)), assignment)

    def collectives_s(self, layout: Layout) -> float:
        """Seconds of the collectives of a full batch, on its way through all stages."""
        return self.costs.exchanged(self.plan, layout).seconds

    @cached_property
    def batch(self) -> tuple[int, int]:
        """Tokens and sequences of a full batch."""
        settings = self.problem.settings_for(self.plan)
        return settings.max_num_batched_tokens, settings.max_num_seqs

    @cached_property
    def computed_s(self) -> float:
        """Seconds of a full batch but for its collectives: the same wherever the plan lies.

        The batch has its tokens dealt evenly to its sequences, each the beginning of a prompt.
        """
        (tokens, sequences), costs = self.batch, self.costs
        each, more = divmod(tokens, sequences)
        sizes = [each + (index < more) for index in range(sequences)]
        cost, rows = costs.plan_cost(self.plan), [(size, size) for size in sizes]
        step_ns = sum(
            alike_ns(law, cost.ranks, stage, rows) + int(law.transfer_ns[tokens]) for stage, law in enumerate(cost.laws)
        )
        return step_ns / NS_PER_S - self.collectives_s(costs.layouts.best(self.plan))

    @property
    def step_s(self) -> float:
        """Seconds of a full batch where the plan lies best."""
        return self.computed_s + self.collectives_s(self.costs.layouts.best(self.plan))

    def refusal(self, within: str | None, kept: int) -> str | None:
        """Why the plan cannot be placed as asked; None where it can.

        Parameters
        ----------
        within : one of `LEVELS`    what no replica should leave
        kept : int                  GPUs that are free in the end
        """
        broken = violations(self.problem.instance(), self.plan)
        # As `judge` has it: balance and bandwidth keep hopeless plans out of a search alone.
        if fatal := [v for v in broken if v.family not in ("balance", "bandwidth")]:
            return f"{self.plan} cannot run: " + "; ".join(f"{v.family}: {v.text}" for v in fatal)
        size = self.shape.replica
        if within is not None:
            widest = max(rooms(self.wiring, within, self.tree.gpus), key=lambda room: len(room.gpus))
            if len(widest.gpus) < size:
                needed = f"a replica of {self.plan} needs {count(size, 'GPU')} in one {within}"
                return f"{needed}; the largest has {len(widest.gpus)} free ({widest.name})"
        if kept < size:
            return f"a replica of {self.plan} needs {count(size, 'GPU')}; {kept:,} are free after the loss"
        return None


def quickest(sites: Sequence[Site], within: str | None) -> Site:
    """The type of GPU on which a full batch of the plan takes least, of those that can have it; the first if none."""
    able = [site for site in sites if site.refusal(within, site.tree.size) is None]
    return min(able, key=lambda site: site.step_s) if able else sites[0]


def place_document(
    site: Site, found: Found, given: Assignment | None = None, within: str | None = None, loss: Loss | None = None
) -> studied.PlaceAnswer:
    """Where a plan goes and what its collectives take there, beside ranks in order; seconds, bytes, bytes per second.

    Parameters
    ----------
    site, found
    given : Assignment      another placement, to be judged beside
    within : one of `LEVELS`    domains that replicas should not leave
    loss : Loss             GPUs that go afterwards
    """
    judged = [(site.tree, found.assignment), *([] if loss is None else [(loss.tree, loss.after)])]
    best = _best(site, found)
    others = {"rank_order": rank_order(site.tree, site.shape), **({"given": given} if given is not None else {})}
    beside: dict[str, Any] = {
        name: _beside(site, site.tree, other, best, types.OtherPlacement) for name, other in others.items()
    }
    judged += [(site.tree, other) for other in others.values()]
    tree, answer = (site.tree, found.assignment) if loss is None else (loss.tree, loss.after)
    return studied.PlaceAnswer(
        status="optimal" if found.optimal and (loss is None or loss.optimal) else "feasible",
        reason=None,
        batch=_batch(site),
        placement=best,
        proof=_found(found),
        within=None if within is None else _within(site, within),
        loss=None if loss is None else _loss(site, loss),
        left=_left(site, tree, answer),
        devices=tuple(_devices(answer)),
        provenance=_provenance(site, judged),
        **_head(site),
        **{"given": None, **beside},
    )


def placed_document(problem: Problem, plan: Plan, found: Found) -> types.ShownPlacement:
    """Where the plan of an answer goes, beside ranks in order; as `place_document` tells it.

    Parameters
    ----------
    problem, plan
    found : Found    where it lies
    """
    site = Site(problem=problem, plan=plan, wiring=problem.cluster, facts=Facts(problem))
    best = _best(site, found)
    in_order = _beside(site, site.tree, rank_order(site.tree, site.shape), best, types.OtherPlacement)
    return of(types.ShownPlacement, best, batch=_batch(site), rank_order=in_order, proof=_found(found))


def refused_document(site: Site, reason: str) -> studied.Unplaced:
    """A plan that cannot be placed as asked, and why."""
    return studied.Unplaced(status="infeasible", reason=reason, **_head(site))


def _head(site: Site) -> dict[str, Any]:
    return {
        "command": "place",
        "plan": str(site.plan),
        "model": site.problem.model.name,
        "cluster": site.problem.cluster.name,
        "gpu": site.problem.cluster.gpu.name,
        "gpus": {"free": site.tree.size, "replica": site.shape.replica, "plan": site.shape.size},
        "notes": site.problem.remarks,
    }


def _batch(site: Site) -> dict[str, int]:
    return dict(zip(("tokens", "sequences"), site.batch, strict=True))


def _found(found: Found) -> dict[str, int | bool]:
    """What is proven of a placement."""
    return {"better_ways_without_gpus": found.tried, "most_kept_together": found.optimal}


def replicas_document(assignment: Assignment) -> tuple[types.Replica, ...]:
    """GPUs of every rank."""
    return tuple(types.Replica(replica=index, stages=stages) for index, stages in enumerate(assignment))


def _placement(kind: type[P], site: Site, tree: Tree, assignment: Assignment, **more: Any) -> P:
    """GPUs of every rank, what collectives cross and what they take."""
    layout = site.layout(tree, assignment)
    exchanged = site.costs.exchanged(site.plan, layout)
    sent = dict(zip(reversed(LEVELS), exchanged.sent, strict=True))
    return kind(
        replicas=replicas_document(assignment),
        collectives_s=exchanged.seconds,
        step_s=site.computed_s + exchanged.seconds,
        tiers=tuple(
            of(types.Tier, tier, tier.link, ranks=tier.chunk, link=tier.link.kind, sent_bytes=sent[tier.kind])
            for tier in layout.tiers
        ),
        **more,
    )


def _best(site: Site, found: Found) -> types.BestPlacement:
    """The best placement, with what holds its groups."""
    why = _lies(site, site.tree, site.plan, found.assignment)
    return _placement(types.BestPlacement, site, site.tree, found.assignment, lies=why)


def _lies(site: Site, tree: Tree, plan: Plan, assignment: Assignment) -> tuple[types.Lies, ...]:
    """What holds the groups of a plan, and why nothing smaller."""
    return tuple(of(types.Lies, one) for one in lies(tree, plan, site.layout(tree, assignment)))


def _provenance(site: Site, judged: Iterable[tuple[Tree, Assignment]]) -> dict[str, str]:
    """Where the figures of the plan come from, and those of its collectives in other layouts than the best."""
    costs = site.costs
    found = site.facts.provenance([site.plan])
    called = {name.partition("/")[0] for name in found if "/" in name} - {"point_to_point"}
    for layout in (site.layout(tree, assignment) for tree, assignment in judged):
        spread = layout.spread(site.shape.ranks)
        over = costs.of(site.plan).collectives.over(spread.near, spread.far)
        names = {f"{name}/{'inter' if spread.nodes > 1 else 'intra'}" for name in called}
        found |= {name: over.provenance[name] for name in sorted(names - set(found))}
        name, over, link = costs.of(site.plan).operations.between_stages(layout)
        if link is not None and name not in found:
            found[name] = over.provenance[name]
    return found


def _beside(site: Site, tree: Tree, assignment: Assignment, best: types.Placement, kind: type[B], **more: Any) -> B:
    """A placement with what it loses to the best, as shares; null where the best sends nothing."""
    other = _placement(types.Placement, site, tree, assignment)
    ratio = [
        getattr(other, key) / was - 1 if (was := getattr(best, key)) else None for key in ("collectives_s", "step_s")
    ]
    return of(kind, other, collectives_loss=ratio[0], step_loss=ratio[1], **more)


def _within(site: Site, kind: str) -> studied.Within:
    """Domains of a kind with room for a replica: their free GPUs, and for how many."""
    found = rooms(site.wiring, kind, site.tree.gpus)
    size = site.shape.replica
    able = [room for room in found if len(room.gpus) >= size]
    domains = tuple(of(studied.Domain, room, replicas=len(room.gpus) // size) for room in able)
    return studied.Within(kind=kind, domains=domains, others=len(found) - len(able))


def _left(site: Site, tree: Tree, assignment: Assignment) -> studied.Left:
    """What stays free beside a placement, and the replicas that it still has room for."""
    taken = {gpu for stages in assignment for stage in stages for gpu in stage}
    free = [gpu for gpu in tree.gpus if gpu not in taken]
    by_kind = {kind: rooms(site.wiring, kind, free) for kind in LEVELS}
    fits: Any = [
        {
            "kind": kind,
            "largest": max((len(room.gpus) for room in found), default=0),
            "replicas": replicas_in(found, site.shape.replica),
        }
        for kind, found in by_kind.items()
    ]
    return studied.Left(gpus=len(free), groups={str(size): n for size, n in groups(by_kind["node"]).items()}, fits=fits)


def _loss(site: Site, loss: Loss) -> studied.Lost:
    """Before and after, and what moves."""
    before = _placement(types.Placement, site, site.tree, loss.before)
    why = _lies(site, loss.tree, loss.plan, loss.after)
    used = {gpu for stages in loss.before for stage in stages for gpu in stage}
    moves = [
        studied.Move(replica=new, before=old, stage=stage, rank=rank, from_=a, to=b, weights_bytes=site.weights[stage])
        for new, old in enumerate(loss.replicas)
        for stage, (was, now) in enumerate(zip(loss.before[old], loss.after[new], strict=True))
        for rank, (a, b) in enumerate(zip(was, now, strict=True))
        if a != b
    ]
    return of(
        studied.Lost,
        loss,
        used=[gpu for gpu in loss.gpus if gpu in used],
        plan=str(loss.plan),
        replicas_kept=loss.replicas,
        replicas_lost=[index for index in range(len(loss.before)) if index not in loss.replicas],
        before=before,
        placement=_beside(site, loss.tree, loss.after, before, types.MovedPlacement, lies=why),
        fewest=loss.optimal,
        moves=moves,
    )


def _devices(assignment: Assignment) -> Iterable[dict[str, Any]]:
    """GPUs of every replica on every node, in the order of their ranks."""
    for replica, stages in enumerate(assignment):
        for node, gpus in on_nodes(gpu for stage in stages for gpu in stage):
            shown = ",".join(map(str, gpus))
            yield {"node": node, "replica": replica, "env": {"CUDA_VISIBLE_DEVICES": shown}}


def labels(assignment: Assignment) -> Mapping[str, tuple[int, str]]:
    """Of every GPU used its replica, and its stage and rank for a picture."""
    return {
        gpu: (replica, f"{stage}/{rank}")
        for replica, stages in enumerate(assignment)
        for stage, gpus in enumerate(stages)
        for rank, gpu in enumerate(gpus)
    }
