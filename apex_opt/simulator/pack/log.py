"""Reads the log of a run: its batches, what came of drafts, and whose tokens came when."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.kernel import state as kn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.simulator.outcome import Drafted, Step

    I64 = NDArray[np.int64]


def taken_of(logged: I64) -> tuple[I64, I64]:
    """The batches of a log, and when each was taken in: at its end, unless a row without sequences tells otherwise.

    A replica takes its batches in in the order in which it formed them.
    """
    batches = logged[:, kn.STEP_ROWS] > 0
    steps, taken = logged[batches], logged[~batches]
    taken_ns = steps[:, kn.STEP_END].copy()
    formed, told = (np.argsort(rows[:, kn.STEP_REPLICA], kind="stable") for rows in (steps, taken))
    formed = formed[np.isin(steps[formed, kn.STEP_REPLICA], taken[:, kn.STEP_REPLICA])]
    taken_ns[formed] = taken[told, kn.STEP_END]
    return steps, taken_ns


def tokens_of(steps: I64, taken_ns: I64, rows: I64) -> tuple[I64, I64]:
    """Whose tokens batches yield, and when these are taken in.

    Parameters
    ----------
    steps, rows : of a log
    taken_ns : int64[steps]    when each batch is taken in
    """
    end_ns, got = np.repeat(taken_ns, steps[:, kn.STEP_ROWS]), rows[:, kn.ROW_REQUEST] & 15
    return np.repeat(rows[:, kn.ROW_REQUEST] >> 8, got), np.repeat(end_ns, got)


def steps_of(steps: I64, rows: I64, lost: I64) -> list[Step]:
    """The log as lists, replica by replica.

    Parameters
    ----------
    steps, rows, lost : as the kernel writes them: a line for each batch, each sequence in one, each that gave way
    """
    shares, preempted = rows.tolist(), lost.tolist()
    found: list[tuple[int, Step]] = []
    row = gone = 0
    for replica, start, end, size, victims, _ in steps.tolist():
        chunk = [(i >> 8, tokens, computed) for i, tokens, computed in shares[row : row + size]]
        found.append((replica, (start, end, chunk, sorted(preempted[gone : gone + victims]))))
        row += size
        gone += victims
    return [step for _, step in sorted(found, key=lambda s: s[0])]


def drafted_of(steps: I64, rows: I64) -> list[Drafted]:
    """What came of the drafts in a log, replica by replica."""
    drafts, got = (rows[:, kn.ROW_REQUEST] >> 4 & 15).tolist(), (rows[:, kn.ROW_REQUEST] & 15).tolist()
    found: list[tuple[int, Drafted]] = []
    row = 0
    for step in steps.tolist():
        last = row + step[kn.STEP_ROWS]
        found.append(
            (step[kn.STEP_REPLICA], (step[kn.STEP_FREE], list(zip(drafts[row:last], got[row:last], strict=True))))
        )
        row = last
    return [drafted for _, drafted in sorted(found, key=lambda s: s[0])]
