"""What `place` answers: where a plan goes, what its collectives take there, and what losing GPUs costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from rich.text import Text

from apex_opt.cluster.tree import LEVELS, place_of
from apex_opt.evaluate import violations
from apex_opt.launch.commands import on_nodes
from apex_opt.placement.assignment import layout_of, rank_order
from apex_opt.placement.domains import groups, replicas_in, rooms
from apex_opt.placement.reasons import lies
from apex_opt.placement.shape import Shape
from apex_opt.plans.engine import limited
from apex_opt.plans.memory import stage_memory
from apex_opt.report import studied, types
from apex_opt.report.layout import count, lies_table, notes_lines, page, provenance_table, seconds, table
from apex_opt.schema import of
from apex_opt.search.facts import Facts
from apex_opt.simulator.ranks import alike_ns
from apex_opt.units import GB, NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console

    from apex_opt.cluster.composition import Composition
    from apex_opt.cluster.tree import Tree
    from apex_opt.cluster.types import Cluster
    from apex_opt.cost import CostModel
    from apex_opt.placement import Assignment
    from apex_opt.plans.layout import Layout
    from apex_opt.plans.plan import Plan
    from apex_opt.schema import Document
    from apex_opt.search import Problem

P = TypeVar("P", bound=types.Placement)
B = TypeVar("B", bound=types.OtherPlacement)

_ROWS: Final = {"placement": "best", "rank_order": "rank order", "given": "as given"}
_SHOWN: Final = 16
"""Rows of a table of replicas or domains; the document has all."""


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


# ---- tables -------------------------------------------------------------------------------------------------------


def place_page(document: Document) -> str:
    """The document as text."""
    return page(lambda console: _shown(console, document))


def _shown(console: Console, document: Document) -> None:
    gpus = document["gpus"]
    head = f": {document['plan']} takes {count(gpus['plan'], 'GPU')}, {gpus['free']:,} {document['gpu']} are free"
    console.print(Text.assemble(f"{document['model']} on ", (document["cluster"], "bold"), head))
    notes_lines(console, document)
    if document["status"] == "infeasible":
        console.print(Text(f"infeasible: {document['reason']}"))
        return
    console.print()
    loss = document["loss"]
    if document["within"]:
        _within_table(console, document["within"])
    if loss:
        _loss_tables(console, document)
    else:
        _times_tables(console, document)
    answer = loss["placement"] if loss else document["placement"]
    if any(one["reason"] for one in answer["lies"]):
        lies_table(console, answer["lies"])
    where_table(console, answer["replicas"])
    _left_table(console, document["left"])
    rows = [
        (f"node{row['node']}", str(row["replica"]), f"CUDA_VISIBLE_DEVICES={row['env']['CUDA_VISIBLE_DEVICES']}")
        for row in document["devices"]
    ]
    _grid(console, "To start it with", ("node", "replica", ""), rows, left={0, 2})
    provenance_table(console, document["provenance"])
    console.print(Text(_proof(document), "bold"))


def placement_section(console: Console, placement: Document) -> None:
    """Where the plan of an answer goes, and what ranks in order would lose."""
    own, other = placement["collectives_s"], placement["rank_order"]
    if own and other["collectives_loss"]:
        text = f"collectives of a full batch take {seconds(own)}; with ranks in order {seconds(other['collectives_s'])}"
        console.print(f"Placed on the GPUs that are free, {text} ({other['collectives_loss']:+.1%}).\n")
    where_table(console, placement["replicas"])
    if any(one["reason"] for one in placement["lies"]):
        lies_table(console, placement["lies"])


def _grid(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[tuple[str, ...]], *, left: set[int]
) -> None:
    """A table of the first rows, and how many more there are."""
    table(console, title, heads, rows[:_SHOWN], left=left)
    if len(rows) > _SHOWN:
        console.print(Text(f"and {len(rows) - _SHOWN:,} more; --format=json has all\n", "dim"))


def _within_table(console: Console, within: Document) -> None:
    rows = [(row["name"], ", ".join(_ranges(row["gpus"])), str(row["replicas"])) for row in within["domains"]]
    title = f"Room for replicas in one {within['kind']} each"
    _grid(console, title, (within["kind"], "free GPUs", "replicas"), rows, left={0, 1})
    if within["others"]:
        console.print(Text(f"{count(within['others'], 'other')} with free GPUs, but too few\n", "dim"))


def _times_tables(console: Console, document: Document) -> None:
    shown = [(name, document[key]) for key, name in _ROWS.items() if document[key]]
    rows = [
        (
            name,
            seconds(row["collectives_s"]),
            _share(row.get("collectives_loss")),
            seconds(row["step_s"]),
            _share(row.get("step_loss")),
        )
        for name, row in shown
    ]
    batch = document["batch"]
    title = f"A batch of {count(batch['tokens'], 'token')} in {count(batch['sequences'], 'sequence')}, derived"
    _grid(console, title, ("placement", "collectives", "loss", "whole step", "loss"), rows, left={0})
    _tiers(console, shown)


def _tiers(console: Console, shown: list[tuple[str, Document]]) -> None:
    """What the collectives of some placements cross."""
    rows = [
        (
            name,
            tier["kind"],
            str(tier["ranks"]),
            tier["link"],
            f"{tier['bytes_per_s'] / 1e9:,.4g} GB/s",
            seconds(tier["latency_s"]),
            f"{tier['sent_bytes'] / GB:,.3g} GB",
        )
        for name, row in shown
        for tier in row["tiers"]
    ]
    if rows:
        heads = ("placement", "in one", "ranks", "link", "each gets", "latency", "data of a rank")
        _grid(console, "What the collectives cross, from the innermost", heads, rows, left={0, 1, 3})


def _loss_tables(console: Console, document: Document) -> None:
    loss = document["loss"]
    lost, used = ", ".join(_ranges(loss["gpus"])), len(loss["used"])
    console.print(Text(f"Lost: {lost}; {'none' if not used else f'{used:,}'} of them held ranks of the plan"))
    if gone := loss["replicas_lost"]:
        named = "replica" if len(gone) == 1 else "replicas"
        console.print(Text(f"No room for {named} {', '.join(map(str, gone))} any more: what is left is {loss['plan']}"))
    console.print()
    before, after = loss["before"], loss["placement"]
    rows = [
        ("before", str(len(before["replicas"])), seconds(before["collectives_s"]), "-", seconds(before["step_s"]), "-"),
        (
            "after",
            str(len(after["replicas"])),
            seconds(after["collectives_s"]),
            _share(after["collectives_loss"]),
            seconds(after["step_s"]),
            _share(after["step_loss"]),
        ),
    ]
    batch = document["batch"]
    title = f"A batch of {count(batch['tokens'], 'token')} in {count(batch['sequences'], 'sequence')}, derived"
    _grid(console, title, ("", "replicas", "collectives", "loss", "whole step", "loss"), rows, left={0})
    _tiers(console, [("before", before), ("after", after)])
    moves: dict[tuple[int, int, int], list[Document]] = {}
    for move in loss["moves"]:
        moves.setdefault((move["before"], move["replica"], move["stage"]), []).append(move)
    lines = [
        (
            str(old) if old == new else f"{old}, now {new}",
            str(stage),
            ", ".join(_ranges(move["from"] for move in some)),
            ", ".join(_ranges(move["to"] for move in some)),
            f"{sum(move['weights_bytes'] for move in some) / GB:,.1f} GB",
        )
        for (old, new, stage), some in moves.items()
    ]
    if lines:
        title = f"{count(loss['moved'], 'rank')} with {loss['moved_bytes'] / GB:,.1f} GB of weights to move"
        _grid(console, title, ("replica", "stage", "from", "to", "weights"), lines, left={0, 2, 3})


def where_table(console: Console, replicas: list[Document], title: str = "Where it goes") -> None:
    """The GPUs of every stage of every replica.

    Parameters
    ----------
    console
    replicas : list of Document    with their GPUs
    title : str                    above the table
    """
    rows = [
        (str(row["replica"]), str(stage), "; ".join(_ranges(gpus)))
        for row in replicas
        for stage, gpus in enumerate(row["stages"])
    ]
    _grid(console, title, ("replica", "stage", "GPUs in the order of their ranks"), rows, left={2})


def _left_table(console: Console, left: Document) -> None:
    sizes = ", ".join(f"{number:,} of {size}" for size, number in left["groups"].items())
    title = f"Left free: {count(left['gpus'], 'GPU')}" + (f", in groups inside nodes: {sizes}" if sizes else "")
    rows = [
        (
            "anywhere" if row["kind"] == "cluster" else f"one {row['kind']}",
            f"{row['largest']:,}",
            f"{row['replicas']:,}",
        )
        for row in left["fits"]
    ]
    _grid(console, title, ("inside", "largest has free", "replicas that still fit"), rows, left={0})


def _ranges(gpus: Iterable[str]) -> list[str]:
    """GPUs in their order, neighbours of a node as one: `node0:0-3`."""
    runs: list[list[Any]] = []
    for node, local in map(place_of, gpus):
        if runs and runs[-1][0] == node and runs[-1][2] + 1 == local:
            runs[-1][2] = local
        else:
            runs.append([node, local, local])
    return [f"node{node}:{first}" + (f"-{last}" if last > first else "") for node, first, last in runs]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+,.1f}%"


def _proof(document: Document) -> str:
    """What is shown to hold."""
    if loss := document["loss"]:
        less = "none as good moves less" if loss["fewest"] else "whether one as good moves less was not decided in time"
        return f"Proof: no placement after the loss is better; {less}."
    ways, together = document["proof"]["better_ways_without_gpus"], document["proof"]["most_kept_together"]
    none = f"{count(ways, 'better way')} to lay the plan out, none with GPUs for it"
    more = "no placement as good leaves more GPUs free together"
    if not together:
        more = "whether one as good leaves more GPUs free together was not decided in time"
    return f"Proof: {none if ways else 'no way to lay the plan out is better'}; {more}."
