"""One measured serving run, in the form in which it can be simulated."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """The instances that answer what others have computed the prompts of.

    Parameters
    ----------
    plan : str                 as `parse_plan` takes it, with as many replicas as there are instances
    settings : EngineSettings
    """

    plan: str
    settings: EngineSettings


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
    plan : str                     as `parse_plan` takes it; where prompts are handed over, of those who compute them
    engine : str                   as `load_engine` takes it
    settings : EngineSettings      of the plan
    answering : Answering or None  who answers, where prompts are handed over
    trace : Trace                  what was served; time 0 is where the energy measured begins
    sweep : str                    what the run has in common with those that differ in load alone: all of them are
                                   judged by, or none is
    share_of : str                 what `gpu_memory_utilization` is a share of: "all" memory for all there is,
                                   "static", all memory for weights and cache alone; "left", what the rest leaves
    rows : int                     of the file that hold this measurement
    captured_tokens : int or None  most tokens of a batch with prompts that runs from captured pieces; None: as usual
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
    sweep: str
    answering: Answering | None = None
    share_of: str = "all"
    rows: int = 1
    captured_tokens: int | None = None
    kv_blocks: int | None = None
    measured: Mapping[str, float]
    set_aside: Mapping[str, str] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    iterations: Iterations | None = None

    @property
    def judged(self) -> bool:
        """Whether the run is judged by; else parameters may be fitted on it. See `judged_by`."""
        return judged_by(self.sweep)

    @property
    def drafts(self) -> bool:
        """Whether the engine made drafts: how many of them were right is fitted, and hides what else is off."""
        return bool(self.settings.drafting)


def judged_by(sweep: str) -> bool:
    """Whether runs of a sweep are judged by: where the SHA-256 of its name begins with an odd byte.

    The rule was written down before anything was fitted by it. All loads of a deployment and all releases of its engine
    are on one side, so that no neighbour of a judged run was fitted on.
    """
    return sha256(sweep.encode()).digest()[0] % 2 == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class UnusableRun:
    """A run of a file that cannot be simulated, and why: it stays part of the coverage.

    `reason` is short and the same for all runs of its sort, `detail` has the figures of this one. `aside` says that the
    run is not what it claims to be, so that it does not count.
    """

    name: str
    origin: str
    kind: str
    model: str
    reason: str
    detail: str = ""
    rows: int = 1
    aside: bool = False


Run = MeasuredRun | UnusableRun
