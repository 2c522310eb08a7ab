"""How prompts that one pool of instances computes get to another, which answers them.

Source: `NixlConnector` of vLLM 0.20.2 behind a proxy that asks a prefill instance first, in our own words.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.errors import UsageError
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from apex_opt.workload.trace import Trace


LONGEST_NS: Final = 480 * NS_PER_S
"""What a read may take, after which a prefill instance gives its blocks up.

Source: VLLM_NIXL_ABORT_REQUEST_TIMEOUT of vLLM 0.20.2.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handover:
    """How a prompt gets from the instance that computed it to the one that answers; times in nanoseconds.

    Parameters
    ----------
    proxy_ns : int               from the answer of the prefill instance to the decode instance
    read_ns, block_ns : int      of a read, and of each block in it
    notice_ns : int              from the end of a read until the prefill instance can hear of it
    in_turn : bool               reads from one prefill instance follow each other on its link; else side by side

    Raises
    ------
    UsageError    a time below 0, or above `LONGEST_NS`
    """

    proxy_ns: int = 0
    read_ns: int = 0
    block_ns: int = 0
    notice_ns: int = 0
    in_turn: bool = False

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self) if f.name != "in_turn"):
            value = getattr(self, name)
            if not 0 <= value <= LONGEST_NS:
                raise UsageError(f"handover: {name} must be from 0 to {LONGEST_NS} ns, it is {value}")


def prompts_only(trace: Trace) -> Trace:
    """The trace as prefill instances see it: one token is asked of each prompt."""
    output = np.ones_like(trace.output)
    output.flags.writeable = False
    return replace(trace, output=output, max_new_tokens=None)
