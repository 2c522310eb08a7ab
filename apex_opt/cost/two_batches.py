"""What two batches in place of one do to the forwards of a run: see `cost.halves` for what they take.

Derived: told as if ranks had even shares, and prompts came one to a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.ranks import agree, alike_ns
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from apex_opt.cost.model import PlanCost
    from apex_opt.simulator.outcome import BatchCounts, SharedCounts
    from apex_opt.simulator.ranks import Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoBatches:
    """The forwards of one kind of a run, without overlap and as they are with two batches in place of one.

    Parameters
    ----------
    kind : str             "answers" alone, or "prompts", with or without answers
    forwards, split : int  how many there were, and how many of them ranks with even shares split
    whole_s, two_s : float mean time of these, without overlap and with it
    """

    kind: str
    forwards: int
    split: int
    whole_s: float
    two_s: float

    @property
    def gain(self) -> float:
        """Share of their time that this saves; below zero where it takes longer."""
        return 1 - self.two_s / self.whole_s if self.whole_s else 0.0


def two_batches(
    without: PlanCost, overlapped: PlanCost, counted: BatchCounts, shared: SharedCounts
) -> tuple[TwoBatches, ...]:
    """What two batches in place of one do to the forwards of a run, by kind, as if ranks had even shares.

    Parameters
    ----------
    without, overlapped : PlanCost    of the plan without overlap and with it
    counted : BatchCounts             batches of its ranks
    shared : SharedCounts             forwards of all of them
    """
    assert without.ranks is not None and overlapped.ranks is not None  # experts lie over attention copies
    ranks, found = overlapped.ranks, []
    decoded = int(counted.decode @ np.arange(len(counted.decode)))
    context = max(round(int(counted.decode_context.sum()) / max(decoded, 1)), 1)
    most = len(counted.decode) - 1
    for kind, table in (("answers", shared.decode), ("prompts", shared.mixed)):
        forwards, split, whole, two = int(table.sum()), 0, 0.0, 0.0
        for tokens in np.flatnonzero(table).tolist():
            rows = [(1, context)] * min(tokens, most) if kind == "answers" else [(tokens, tokens)]
            count = int(table[tokens])
            whole, two = whole + count * _took_s(without, rows), two + count * _took_s(overlapped, rows)
            split += count * agree(ranks.padding, [rows] * ranks.count, splitting=ranks.splitting).split
        if forwards:
            found.append(
                TwoBatches(kind=kind, forwards=forwards, split=split, whole_s=whole / forwards, two_s=two / forwards)
            )
    return tuple(found)


def _took_s(cost: PlanCost, rows: Rows) -> float:
    """Seconds of a forward on all stages, where each rank has the same batch."""
    return sum(alike_ns(law, cost.ranks, stage, rows) for stage, law in enumerate(cost.laws)) / NS_PER_S
