"""Nano-batches: what a batch takes where arithmetic, memory and links work at one time, as NanoFlow has it.

A batch is split such that operations which ask for different resources run side by side. It then takes no less than
the busiest of the three alone; of that an engine reaches a share, which was published. What an operation asks of the
resource that bounds it is its time, of another one what that takes at its peak rate. The engine's own time comes on
top, and where all this is more than one operation after the other, a batch is computed so.

Source: NanoFlow (arXiv 2408.12757): the bound, and the shares of it that were reached. Derived from the tables of the
plan. Assumed: that the share reached is the same whichever resource is the busiest, for other models and other GPUs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, TypeVar

import numpy as np

from apex_opt.engines.overlap import NANO_EFFICIENCY

if TYPE_CHECKING:
    from apex_opt.cost.tables import Parts
    from apex_opt.cost.work import Floats

T = TypeVar("T", float, "Floats")

RESOURCES: Final = ("compute", "memory", "network")
"""What operations ask for."""
HOST: Final = "host"
"""What the engine's own time is asked of; it overlaps with nothing."""
_ALONE: Final = {"engine": HOST, "communication": "network"}
"""Operations that neither compute nor read, and what they ask for."""


def asked_of(operation: str, seconds: T, flops: T, moved: T, rates: tuple[float, float]) -> dict[str, Floats]:
    """Seconds that an operation asks of each resource.

    Parameters
    ----------
    operation : str
    seconds, flops, moved : that it takes, computes and moves
    rates : of float    of a GPU: FLOP/s, bytes/s
    """
    if operation in _ALONE:
        return {_ALONE[operation]: np.asarray(seconds)}
    compute, memory = flops / rates[0], moved / rates[1]
    bound = np.asarray(compute >= memory)
    return {
        "compute": np.where(bound, seconds, np.minimum(compute, seconds)),
        "memory": np.where(bound, np.minimum(memory, seconds), seconds),
    }


def of_resource(resource: str, parts: Parts, rates: tuple[float, float]) -> Parts:
    """What operations take of a resource of which so much is reached; energy and traffic are those of the whole.

    Parameters
    ----------
    resource : str      of `RESOURCES`
    parts : Parts
    rates : of float    of a GPU: FLOP/s, bytes/s
    """
    found: Parts = {}
    for (operation, table), work in parts.items():
        asked = asked_of(operation, work.seconds, work.flops, work.moved, rates)
        own = asked.get(HOST, asked.get(resource, np.zeros_like(work.seconds)) / NANO_EFFICIENCY)
        found[operation, table] = replace(work, seconds=own)
    return found
