"""Lower bounds on the times between the tokens of requests.

Why they are admissible. The batch of a token runs after that of the token before it, which it needs, and passes each
stage in at least the least time of a batch and the sequence's own attention to what it holds then (`bounds`). There is
one exception: a sequence that gives way while a batch with it is on its way through a pipeline may come back before
that batch ends, and its tokens are computed again without the one on its way. Then the later batch still leaves the
last stage after the earlier one, and lacks no more tokens than there can be batches on their way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.search.bounds import StageFloor
from apex_opt.simulator.law import RATE_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.plan.engine import EngineSettings
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.workload.trace import Trace


def least_gaps_ns(settings: EngineSettings, blocks: int, laws: Sequence[BatchLaw], trace: Trace) -> NDArray[np.int64]:
    """Times that the gaps between tokens cannot beat, request by request as in `Outcome.gaps_ns`.

    Parameters
    ----------
    settings, blocks, laws, trace : as for `apex_opt.simulator.simulate`, on any number of replicas
    """
    generated = trace.generated(settings.max_model_len)
    gaps = generated - 1
    # The token after the j-th is computed over a context of prompt + j tokens.
    index = np.arange(int(gaps.sum())) - np.repeat(np.cumsum(gaps) - gaps, gaps)
    held = np.repeat(trace.prompt, gaps) + index + 1
    floors = [StageFloor.of(law) for law in laws]
    if len(floors) > 1 and may_preempt(settings, blocks, trace):
        held = np.maximum(held - len(floors), 0)
        floors = floors[-1:]
    least = np.zeros(len(held), np.int64)
    for floor in floors:
        least += floor.batch_ns + _scaled(held, floor.context_rate)
    return least


def may_preempt(settings: EngineSettings, blocks: int, trace: Trace) -> bool:
    """Whether the sequences that can run at once may need more KV blocks than there are."""
    if settings.policy != "vllm":
        return False
    held = trace.prompt + trace.generated(settings.max_model_len) - 1  # the last token is never computed
    needs = np.sort(-(-held // settings.block_size))[-settings.max_num_seqs :]
    return int(needs.sum()) > blocks


def _scaled(amount: NDArray[np.int64], rate: int) -> NDArray[np.int64]:
    """amount x rate / 2**20, rounded down; amounts are of one sequence, so products stay within 63 bits."""
    return amount * rate >> RATE_BITS
