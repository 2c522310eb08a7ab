"""The door to the kernel for SGLang's multiplexing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import multiplexing_state as mx
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.outcome import PoolOutcome
from apex_opt.simulator.pack.run import served
from apex_opt.simulator.pack.sglang import SglangMemory
from apex_opt.simulator.phases import DECODE_DIVISOR, SCALE, SLICED_TOKENS, PhasedOutcome
from apex_opt.simulator.pools import shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.simulator.phases import Multiplexing
    from apex_opt.simulator.pools import EnginePool, Share
    from apex_opt.workload.trace import Trace

assert (mx.SCALE, mx.SLICED_TOKENS, mx.DIVISOR) == (SCALE, SLICED_TOKENS, DECODE_DIVISOR)


def run(pool: EnginePool, rules: Multiplexing, trace: Trace) -> PhasedOutcome:
    """Serve a trace; see `apex_opt.simulator.api.run_phases`.

    Parameters
    ----------
    pool, rules, trace
    """
    # A batch of prompts and a step are under way at once, as two batches are that are formed ahead.
    engines = replace(pool, settings=replace(pool.settings, async_scheduling=True))
    dealt = shares([engines], trace, ["round_robin"])
    return served(partial(_Multiplexing, engines, dealt, trace, rules), logged=False).phased()


class _Multiplexing(SglangMemory):
    """The arrays of a run in which a GPU is divided.

    Parameters
    ----------
    pool, dealt, trace, more : as of `Memory`
    rules : Multiplexing
    """

    def __init__(
        self, pool: EnginePool, dealt: Sequence[Share], trace: Trace, rules: Multiplexing, **more: Any
    ) -> None:
        super().__init__([pool], trace, dealt, (), None, content=None, **more)
        generated = trace.generated(pool.settings.max_model_len)
        starts = np.append(0, np.cumsum(generated - 1))
        self._gaps_ns = np.zeros(int(starts[-1]) + 1, np.int64)
        self._facts = np.zeros((pool.replicas, mx.FACTS_SIZE), np.int64)
        self._facts[:, [mx.BLOCKS, mx.DIVISIONS, mx.LAYERS]] = pool.blocks, len(rules.divisions), rules.layers
        self._facts[:, [mx.PREFILL_PACE, mx.DECODE_PACE]] = SCALE
        self._tokens = np.zeros((mx.TOKENS_SIZE, len(trace)), np.int64)
        self._tokens[mx.GAPS_AT] = starts[:-1]
        self._paces = np.array(rules.together, np.int64).reshape(-1)

    def serve(self) -> None:
        """Run the kernel."""
        (share,) = self._shares
        self._deal(share)
        for replica in range(share.first, share.last):
            beside = mx.Multiplexed(self._facts[replica], self._paces, self._tokens.reshape(-1), self._gaps_ns)
            entries.MULTIPLEXING(self.run, self._beside(0), beside, replica)

    def phased(self) -> PhasedOutcome:
        """What came of the run."""
        found = self.outcome(log=False, gaps=False)
        (did,) = found.pools
        busy_ns = np.ascontiguousarray(np.stack([self._facts[:, mx.BUSY_NS], did.busy_ns[:, 0]], axis=1))
        did = PoolOutcome(
            preemptions=did.preemptions,
            batches=did.batches,
            cached_tokens=0,
            counts=did.counts,
            busy_ns=busy_ns,
        )
        return PhasedOutcome(
            arrival_ns=found.arrival_ns,
            first_token_ns=found.first_token_ns,
            finish_ns=found.finish_ns,
            preemptions=did.preemptions,
            batches=did.batches,
            busy_ns=busy_ns,
            counts=did.counts,
            gaps_ns=self._gaps_ns[:-1],
            pools=(did,),
            prompts=[],
            answers=[],
            most_blocks=int(self._facts[:, mx.MOST_BLOCKS].max()),
            held=int((self._facts[:, mx.BLOCKS] - self._replicas[:, kn.FREE]).sum()),
        )
