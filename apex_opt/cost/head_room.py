"""What the overlap of arithmetic, memory and network could give a plan at best.

A batch computes its operations one after the other: what multiplies matrices leaves the memory idle, what reads a cache
the arithmetic, and both the network. NanoFlow splits a batch such that operations of different kinds run at one time
(`cost.nano`); then a batch takes no less than the busiest of the three alone, and the engine's own time stays. Derived
from the tables of the plan, not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.cost.accounting import done_of, left_of, rates_of
from apex_opt.cost.nano import asked_of
from apex_opt.cost.tables import HIDDEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.cost.model import CostModel, PlanCost
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator.outcome import BatchCounts, SharedCounts

_OF_ANSWERS: Final = ("decode", "decode_context", "verify", "draft", "draft_context")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRoom:
    """What the mean batch of one kind takes on the mean stage, and what it asks of each resource, in seconds.

    Parameters
    ----------
    kind : str                              "answers" alone, or "prompts", with or without answers
    batches : int                           how many there were, of all replicas
    batch_s : float                         what it takes, one operation after the other
    compute_s, memory_s, network_s : float  what is asked of arithmetic, of memory and of links
    host_s : float                          the engine's own time, which no overlap shortens here
    """

    kind: str
    batches: int
    batch_s: float
    compute_s: float
    memory_s: float
    network_s: float
    host_s: float

    @property
    def least_s(self) -> float:
        """What it would take if the busiest resource alone counted."""
        return max(self.compute_s, self.memory_s, self.network_s) + self.host_s

    @property
    def gain(self) -> float:
        """Share of its time that this saves."""
        return 1 - self.least_s / self.batch_s if self.batch_s else 0.0


def head_room(
    plan: Plan, cost: PlanCost, model: CostModel, counted: BatchCounts, shared: SharedCounts | None = None
) -> tuple[HeadRoom, ...]:
    """The head-room of the batches of a run, by kind.

    Parameters
    ----------
    plan, cost, model, counted, shared : as of `apex_opt.cost.accounting.account`
    """
    gpus = plan.replicas * plan.stages * plan.stage_devices
    peak, rate = rates_of(plan, model)
    found = []
    for kind in ("answers", "prompts"):
        mine, own = _of_kind(kind, counted), None if shared is None else _forwards(kind, shared)
        # Seconds, FLOP and bytes of each operation: what a kernel takes whatever its size counts as what the rest does.
        spent: dict[str, NDArray[np.float64]] = {}
        for done in done_of(plan, cost, mine, own):
            tables = done.work.seconds, done.work.flops, done.work.moved
            took = np.array([float(done.used @ table[done.entry]) for table in tables])
            took *= done.times / (done.copies * plan.stages * plan.replicas)
            spent[done.operation] = spent.get(done.operation, np.zeros(3)) + took
        if (hidden := spent.pop(HIDDEN, None)) is not None:
            spent["communication"][0] = left_of(float(spent["communication"][0]), float(hidden[0]), cost)
        asked = dict.fromkeys(("batch", "compute", "memory", "network", "host"), 0.0)
        for operation, (seconds, flops, moved) in spent.items():
            asked["batch"] += seconds
            for resource, its in asked_of(operation, seconds, flops, moved, (peak / gpus, rate / gpus)).items():
                asked[resource] += float(its)
        # Of ranks that run in step a forward is a batch of all.
        batches = int(mine.decode.sum() + mine.sequences.sum())
        if own is not None:
            batches = int(own.decode.sum() + own.mixed.sum())
        if batches:
            each = {f"{name}_s": float(value) * plan.replicas / batches for name, value in asked.items()}
            found.append(HeadRoom(kind=kind, batches=batches, **each))
    return tuple(found)


def _of_kind(kind: str, counted: BatchCounts) -> BatchCounts:
    """The counts of batches of one kind; of windows, which count both together, by the contexts that both read."""
    answers = kind == "answers"
    read = counted.decode_context if answers else counted.attend_context
    every = np.maximum(counted.decode_context + counted.attend_context, 1)
    kept: dict[str, NDArray[np.int64]] = {}
    for field in fields(counted):
        table = getattr(counted, field.name)
        kept[field.name] = table if (field.name in _OF_ANSWERS) == answers else np.zeros_like(table)
    kept["seen_context"] = counted.seen_context * read // every
    return replace(counted, **kept)


def _forwards(kind: str, shared: SharedCounts) -> SharedCounts:
    """The same of forwards of ranks."""
    none, answers = np.zeros_like(shared.decode), kind == "answers"
    return replace(
        shared,
        decode=shared.decode if answers else none,
        mixed=none if answers else shared.mixed,
        eager=none if answers else shared.eager,
        split_decode=shared.split_decode if answers else np.zeros_like(shared.split_decode),
        split_mixed=np.zeros_like(shared.split_mixed) if answers else shared.split_mixed,
        dummies=shared.dummies if answers else 0,
    )
