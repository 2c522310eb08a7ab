"""One measured serving run, in the form in which it can be simulated."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.workload.trace import Trace

METRICS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ttft_mean": "s",
        "ttft_p95": "s",
        "tpot_mean": "s",
        "tpot_p95": "s",
        "itl_mean": "s",
        "e2e_mean": "s",
        "throughput": "requests/s",
        "energy": "J",
    }
)
"""What is compared, with its unit.

TTFT, TPOT and E2E as in `apex_opt.figures`; ITL is the mean over all gaps between tokens, so that long
answers weigh more than in TPOT; throughput is requests over the time from first arrival to last token; energy is that
of the plan's GPUs from time 0 of the trace to the last token.
"""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Iterations:
    """The engine's own log of a run, with the requests it belongs to.

    Parameters
    ----------
    log : float64[k, 7]         end of the step (s), running, waiting, prompt tokens completed, tokens generated,
                                preemptions, share of the KV cache in use
    requests : float64[n, 5]    submitted, first token, last token (s), prompt, output tokens; in the trace's order
    """

    log: NDArray[np.float64]
    requests: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MeasuredRun:
    """What was run, under which settings, and what was seen.

    Parameters
    ----------
    name : str                     unique within its file
    origin : str                   the file, and the place in it
    kind : str                     the layout of the file, a key of `apex_opt.measured.readers.READERS`
    model : str                    as `load_model` takes it
    cluster : str                  as `load_cluster` takes it
    plan : str                     as `parse_plan` takes it
    engine : str                   as `load_engine` takes it
    settings : EngineSettings
    trace : Trace                  what was served; time 0 is where the energy measured begins
    poll_every : int               batches between two looks of the engine for new requests
    kv_blocks : int or None        blocks the engine said it can hand out; None where memory has to be estimated
    measured : mapping             keys of `METRICS`
    set_aside : mapping            metrics that are shown but not judged, with the reason
    assumptions : tuple of str     what the file leaves open
    iterations : Iterations or None
    """

    name: str
    origin: str
    kind: str
    model: str
    cluster: str
    plan: str
    engine: str
    settings: EngineSettings
    trace: Trace
    poll_every: int = 1
    kv_blocks: int | None = None
    measured: Mapping[str, float]
    set_aside: Mapping[str, str] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    iterations: Iterations | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusableRun:
    """A run of a file that cannot be simulated, and why: it stays part of the coverage.

    `reason` is short and the same for all runs of its sort, `detail` has the figures of this one.
    """

    name: str
    origin: str
    kind: str
    model: str
    reason: str
    detail: str = ""


Run = MeasuredRun | UnusableRun
