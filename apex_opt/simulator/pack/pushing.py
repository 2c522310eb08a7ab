"""The door to the kernel for SGLang's prefill and decode instances."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.engines.schedulers import RESERVED
from apex_opt.simulator.gaps import gaps_ns
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.kernel.sglang_state import STATED
from apex_opt.simulator.pack.disaggregated import Instances, behind, places_of
from apex_opt.simulator.pack.log import tokens_of
from apex_opt.simulator.pack.run import served
from apex_opt.simulator.pack.sglang import SglangMemory
from apex_opt.simulator.reference.pushing import FEW_SEATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.stops import Stop
    from apex_opt.simulator.handover import Handover
    from apex_opt.simulator.outcome import DisaggregatedOutcome, Outcome
    from apex_opt.simulator.pack.memory import Room
    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]


def run(
    prefill: EnginePool,
    decode: EnginePool,
    handover: Handover,
    trace: Trace,
    sides: tuple[Share, Share],
    *,
    log: bool,
    gaps: bool,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
) -> DisaggregatedOutcome:
    """Run a trace through the kernel; see `apex_opt.simulator.api.run_disaggregated` for the parameters.

    Parameters
    ----------
    prefill, decode, handover, trace
    sides : how requests are dealt to the instances of either side, beforehand
    log : bool     whether every batch is told
    gaps : bool    whether the times between tokens are told
    stops, floors : limits whose passing ends the run, and times that no request can beat
    """
    limits = stops, None if floors is None else behind(floors)
    build = partial(_Pushing, prefill, decode, handover, trace, sides, limits)
    return served(build, logged=log or gaps).outcome(log=log, gaps=gaps)


class _Pushing(Instances, SglangMemory):
    """The arrays of a run in which prefill instances send what they compute.

    Parameters
    ----------
    prefill, decode, handover, trace, sides, limits, room, more : as of `pack.disaggregated.Together`
    """

    def __init__(
        self,
        prefill: EnginePool,
        decode: EnginePool,
        handover: Handover,
        trace: Trace,
        sides: tuple[Share, Share],
        limits: tuple[Sequence[Stop], Outcome | None],
        room: Room | None,
        **more: Any,
    ) -> None:
        beside = [share._replace(routed=True) for share in sides]  # as they advance together
        super().__init__(prefill, decode, handover, trace, limits, room, beside, content=None, **more)
        self._links.facts[[kn.RESERVED, kn.FEW_SEATS]] = RESERVED, FEW_SEATS
        instances = self._links.instances.reshape(-1, kn.INSTANCE_SIZE)
        instances[:, [kn.FRESH, kn.FIRST_WAITING, kn.LAST_WAITING]] = kn.NONE
        for column, share in zip((kn.PREFILL_OF, kn.DECODE_OF), sides, strict=True):
            self._passages[column] = places_of(share)
        self._passages[[kn.READ_START, kn.READ_END, kn.READ_BLOCKS]] = 0
        self._requests[kn.ARRIVAL, len(trace) :] = kn.NEVER  # until they have come
        self._requests[STATED, len(trace) :] = trace.stated(decode.settings.max_model_len)

    @property
    def _arrival_ns(self) -> I64:
        came_ns: I64 = self._passages[kn.CAME]
        return came_ns

    def _gaps(self, steps: I64, taken_ns: I64, rows: I64) -> I64:
        # The first token of an answer is none of a batch of the instance that goes on with it.
        n = len(self._asked)
        request, token_ns = tokens_of(steps, taken_ns, rows)
        request = np.append(np.arange(n, 2 * n), request)
        return gaps_ns(request, np.append(self._requests[kn.FIRST, n:], token_ns), self._requests[kn.LIMIT])

    def serve(self) -> None:
        """Run the kernel."""
        entries.PUSHING[self._cache is not None](self.run, self._beside(0), self._links)
