"""Lower bounds on the times between the tokens of requests.

Why they are admissible. The batch of a token runs after that of the token before it, which it needs, and passes each
stage in at least the least time of a batch and the sequence's own attention to what it holds then (`bounds`). There are
two exceptions. A sequence that gives way while a batch with it is on its way through a pipeline may come back before
that batch ends. Then the one gap may be as short as the last stage takes, which depends on the split: 0 is taken. And
where drafts are verified tokens come together, which ones depends on the run: 0 is taken for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.search.bounds.isolated import StageFloor
    from apex_opt.workload.trace import Trace


def least_gaps_ns(
    settings: EngineSettings, floors: Sequence[StageFloor], trace: Trace, *, overtaking: bool = False
) -> NDArray[np.int64]:
    """Times that the gaps between tokens cannot beat, request by request as in `Outcome.gaps_ns`.

    Parameters
    ----------
    settings, trace : as for `apex_opt.simulator.simulate`, on any number of replicas
    floors : StageFloor of each stage
    overtaking : bool     whether sequences may be preempted on several stages
    """
    generated = trace.generated(settings.max_model_len)
    gaps = generated - 1
    # The token after the j-th is computed over a context of prompt + j tokens.
    index = np.arange(int(gaps.sum())) - np.repeat(np.cumsum(gaps) - gaps, gaps)
    held = np.repeat(trace.prompt, gaps) + index + 1
    if (len(floors) > 1 and overtaking) or settings.speculation is not None:
        return np.zeros(len(held), np.int64)
    least = np.zeros(len(held), np.int64)
    for floor in floors:
        least += floor.batch_ns + floor.held_ns(held)
    return least
