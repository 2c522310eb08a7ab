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
from apex_opt.simulator.pack.disaggregated import Instances, places_of
from apex_opt.simulator.pack.log import tokens_of
from apex_opt.simulator.pack.run import served
from apex_opt.simulator.pack.sglang import SglangMemory
from apex_opt.simulator.reference.pushing import FEW_SEATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.simulator.outcome import DisaggregatedOutcome
    from apex_opt.simulator.pack.disaggregated import Asked
    from apex_opt.simulator.pack.memory import Room

    I64 = NDArray[np.int64]


def run(asked: Asked, *, log: bool, gaps: bool) -> DisaggregatedOutcome:
    """Run a trace through the kernel.

    Parameters
    ----------
    asked : Asked
    log : bool     whether every batch is told
    gaps : bool    whether the times between tokens are told
    """
    return served(partial(_Pushing, asked), logged=log or gaps).outcome(log=log, gaps=gaps)


class _Pushing(Instances, SglangMemory):
    """The arrays of a run in which prefill instances send what they compute."""

    def __init__(self, asked: Asked, room: Room | None, **more: Any) -> None:
        _, decode, _, trace, sides, _ = asked
        beside = [share._replace(routed=True) for share in sides]  # as they advance together
        super().__init__(asked, room, beside, content=None, **more)
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
