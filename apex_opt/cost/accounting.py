"""Energy, arithmetic, traffic and time by operation of a simulated run, from its batch counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from apex_opt.cost.tables import HIDDEN, seen
from apex_opt.units import NS_PER_S, add_up

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from apex_opt.cost.model import CostModel, PlanCost
    from apex_opt.cost.work import Work
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator.law import Window
    from apex_opt.simulator.outcome import BatchCounts, SharedCounts

_OF_ONE_COPY = frozenset({"chunk_ns", "pair_rate", "chunk_context_rate", "seen_pair_rate"})
_OF_DUMMIES = frozenset({"together decode", "decode_ns", "verify_ns"})
"""Tables whose smallest entry that is used is that of a forward of dummies, where there were some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a run took, over all GPUs of the plan and from the first arrival to the last token.

    Parameters
    ----------
    energy_j, idle_energy_j : float      idle is the part drawn whether or not anything ran
    mfu, mbu : float                     share of peak arithmetic (of the plan's format) and of peak memory bandwidth
    operations_s : mapping               mean time per GPU spent in each operation; "idle" is the rest. Of communication
                                         that which no computing hides
    """

    energy_j: float
    idle_energy_j: float
    mfu: float
    mbu: float
    operations_s: dict[str, float]


class Done(NamedTuple):
    """What a run did of one operation: the entries of its tables that batches used, and how often.

    `times` says how often it is in a batch, and `copies` between how many attention copies it is dealt.
    """

    operation: str
    table: str
    work: Work
    entry: NDArray[np.int64]
    used: NDArray[np.float64]
    times: int
    copies: int


def done_of(plan: Plan, cost: PlanCost, counted: BatchCounts, shared: SharedCounts | None = None) -> Iterator[Done]:
    """What a run did, operation by operation on every stage, as `account` adds it up.

    Parameters
    ----------
    plan, cost, counted, shared : as of `account`
    """
    told = law_counts(counted, cost.laws[0].windows)
    if shared is not None:
        told |= {f"together {kind}": getattr(shared, kind) for kind in ("decode", "mixed", "eager", "draft")}
        told |= {"together split decode": shared.split_decode, "together split mixed": shared.split_mixed}
        for table in ("decode_ns", "verify_ns"):
            if len(told[table]):
                told[table] = told[table].copy()
                told[table][1] += shared.dummies
    # Batches of a run use few entries of the tables.
    entries = {table: np.flatnonzero(count) for table, count in told.items()}
    counts = {table: count[entries[table]].astype(np.float64) for table, count in told.items()}
    for stage in cost.pieces:
        for times, piece in stage:
            for (operation, table), work in piece.parts.items():
                of_one = not table.startswith("together")
                if cost.ranks is None:
                    of_one = table.partition("/")[0] in _OF_ONE_COPY
                copies = plan.attention.dp if of_one else 1
                yield Done(operation, table, work, entries[table], counts[table], times, copies)


def account(
    plan: Plan,
    cost: PlanCost,
    model: CostModel,
    counted: BatchCounts,
    makespan_ns: int,
    shared: SharedCounts | None = None,
    busy_ns: int | None = None,
) -> Usage:
    """Multiply the counts of a run into energy, arithmetic, traffic and time.

    Work counted by chunk is done by the one attention copy that owns the sequence, all other work by every device of
    the stage. Energy is that of the operations above idle plus the idle draw of all devices for the whole run, so
    bubbles and waits cost what they cost; GPUs of the cluster that the plan leaves out are not counted.

    Parameters
    ----------
    plan
    cost : PlanCost          what batches of the plan take
    model : CostModel        the costs of the plan
    counted : BatchCounts    batches of the run
    makespan_ns : int        of the run
    shared : SharedCounts or None    forwards of ranks that run in step; each of their batches, dummies among them, is
                                     done by one attention copy
    busy_ns : int or None    that all replicas spent on batches; where operations run at one time each has its share
    """
    makespan_s = (makespan_ns + cost.request_ns) / NS_PER_S
    flops = moved = joules = 0.0
    seconds: dict[str, float] = {}
    of_dummies: dict[str, float] = {}
    for done in done_of(plan, cost, counted, shared):
        devices = done.times * plan.stage_devices / done.copies
        flops += devices * float(done.used @ done.work.flops[done.entry])
        moved += devices * float(done.used @ done.work.moved[done.entry])
        joules += devices * float(done.used @ done.work.joules[done.entry])
        spent = done.times * float(done.used @ done.work.seconds[done.entry])
        spent /= done.copies * plan.stages * plan.replicas
        seconds[done.operation] = seconds.get(done.operation, 0.0) + spent
        if shared is not None and done.table in _OF_DUMMIES and len(done.entry):
            one = done.times * float(done.work.seconds[done.entry[0]])
            of_dummies[done.operation] = of_dummies.get(done.operation, 0.0) + one
    if cost.laws[0].resources and busy_ns is not None:
        seconds = _side_by_side(seconds, busy_ns / (NS_PER_S * plan.replicas))
    if (hidden := seconds.pop(HIDDEN, None)) is not None:
        seconds["communication"] = left_of(seconds["communication"], hidden, cost)
    over = add_up(seconds.values()) - makespan_s
    if over > 0 and shared is not None and shared.dummies:
        # Ranks go on after the last token, with dummies, until they agree that none has requests left.
        most = shared.dummies / (plan.attention.dp * plan.stages * plan.replicas)
        after = min(over / add_up(of_dummies.values()), most)
        seconds = {name: max(spent - after * of_dummies.get(name, 0.0), 0.0) for name, spent in seconds.items()}
        over = add_up(seconds.values()) - makespan_s
    if over > 0 and hidden is not None:  # what ranks compute over their contexts hides some of it as well
        seconds["communication"] = left_of(seconds["communication"], -over, cost)
    seconds["idle"] = max(0.0, makespan_s - add_up(seconds.values()))
    run_s, (peak, rate) = max(makespan_s, 1e-12), rates_of(plan, model)
    idle_j = idle_w(model, plan) * makespan_s
    return Usage(
        energy_j=min(joules + idle_j, limit_w(model, plan) * makespan_s),
        idle_energy_j=idle_j,
        mfu=flops / (run_s * peak),
        mbu=moved / (run_s * rate),
        operations_s=dict(sorted(seconds.items(), key=lambda item: -item[1])),
    )


def _side_by_side(seconds: dict[str, float], busy_s: float) -> dict[str, float]:
    """Times of operations that run at one time, in proportion, such that they and the engine's own fill the batches."""
    own_s = seconds.get("engine", 0.0)
    others_s = add_up(seconds.values()) - own_s
    part = max(busy_s - own_s, 0.0) / others_s if others_s else 0.0
    return {name: spent if name == "engine" else spent * part for name, spent in seconds.items()}


def left_of(sent_s: float, hidden_s: float, cost: PlanCost) -> float:
    """Seconds of sending that are not hidden, at least those of the first half of one of a stage's layers.

    What is hidden is counted as if every rank had as many tokens as the largest, what is sent as they are.

    Parameters
    ----------
    sent_s : float      that everything sent takes
    hidden_s : float    what computing hides of it, below zero
    cost : PlanCost     of a plan that splits forwards
    """
    assert cost.ranks is not None
    layers = max(law.halves.layers for law in cost.ranks.shared if law.halves is not None)
    return max(sent_s + hidden_s, sent_s / (2 * layers))


def rates_of(plan: Plan, model: CostModel) -> tuple[float, float]:
    """Peak arithmetic in the plan's format, FLOP/s, and peak memory bandwidth, bytes/s, of all of its GPUs."""
    peak = rate = 0.0
    for costs, devices in model.on(plan):
        one = costs.rates(plan.weight_format)
        peak, rate = peak + devices * one[0], rate + devices * one[1]
    return peak, rate


def idle_w(costs: CostModel, plan: Plan) -> float:
    """Watts that the GPUs of a plan draw at least."""
    return add_up(model.profile.power.idle_w * gpus for model, gpus in costs.on(plan))


def limit_w(costs: CostModel, plan: Plan) -> float:
    """Watts that the GPUs of a plan may draw."""
    return add_up(model.profile.power.limit_w * gpus for model, gpus in costs.on(plan))


def law_counts(counts: BatchCounts, windows: tuple[Window, ...] = ()) -> dict[str, NDArray[np.int64]]:
    """How often each entry of each table of a law with such windows was used."""
    return {
        **{seen("context_rate", window): row for window, row in zip(windows, counts.seen_context, strict=True)},
        **{seen("pair_rate", window): row for window, row in zip(windows, counts.seen_pairs, strict=True)},
        "decode_ns": counts.decode,
        "sequence_ns": counts.sequences,
        "attend_ns": counts.attend,
        "context_rate": counts.decode_context + counts.attend_context,
        "mixed_ns": counts.mixed,
        "chunk_ns": counts.chunk,
        "pair_rate": counts.chunk_pairs,
        "chunk_context_rate": counts.chunk_context,
        "verify_ns": counts.verify,
        "draft_ns": counts.draft,
        "draft_rate": counts.draft_context,
    }
