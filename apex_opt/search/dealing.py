"""Requests dealt to pools that differ in speed.

Every part has a weight, the tokens it computes in a second at full batches. Requests are dealt in order of arrival, so
that of the first k the first part has had k times its share, rounded; those it leaves are dealt in the same way among
the others. All of it is integer arithmetic, and how a request is dealt does not depend on those after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.ranks import alike_ns
from apex_opt.units import NS_PER_S, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.ranks import Ranks
    from apex_opt.workload.trace import Trace


def tokens_per_s(
    settings: EngineSettings,
    blocks: int,
    laws: Sequence[BatchLaw],
    trace: Trace,
    replicas: int,
    *,
    ranks: Ranks | None = None,
) -> int:
    """Tokens of a trace that replicas compute in a second where batches are always full: the weight of a part.

    Prompts are taken in batches of as many mean prompts as the limit on tokens allows, later tokens in batches of as
    many mean sequences as the limits and the KV cache allow, these spread over the stages. The slowest stage counts.

    Parameters
    ----------
    settings, laws : as for `apex_opt.simulator.simulate`
    blocks : int      KV blocks of a scheduler
    ranks : Ranks or None    of each replica, all of which have such batches at once
    """
    generated = trace.generated(settings.max_model_len)
    prompts, outputs = int(trace.prompt.sum()), int(generated.sum())
    prompt = ceil_div(prompts, len(trace))
    chunk = min(prompt, settings.max_num_batched_tokens)
    chunks = min(settings.max_num_batched_tokens // chunk, settings.max_num_seqs)
    held = ceil_div(prompts + outputs, len(trace))
    sequences = min(settings.max_num_seqs, blocks // int(settings.most_blocks(np.array(held)))) // len(laws)
    sequences = max(sequences, 1)
    steps = outputs - len(trace)
    slowest_ns = max(
        ceil_div(prompts * alike_ns(law, ranks, stage, [(chunk, prompt)] * chunks), chunk * chunks)
        + ceil_div(steps * alike_ns(law, ranks, stage, [(1, held)] * sequences), sequences)
        for law, stage in {law: stage for stage, law in enumerate(laws)}.items()
    )
    if ranks is not None:
        replicas *= ranks.count
    return max(1, replicas * (prompts + outputs) * NS_PER_S // max(slowest_ns, 1))


def dealt(weights: NDArray[np.int64], requests: int) -> NDArray[np.int8]:
    """Which part each request goes to.

    Parameters
    ----------
    weights : int64[deployments, pools]    tokens per second, at least 1
    requests : int                         in order of arrival

    Returns
    -------
    int8[deployments, requests]
    """
    parts = weights.shape[1]
    place = np.broadcast_to(np.arange(requests), (len(weights), requests))
    part = np.full(place.shape, parts - 1, np.int8)
    left = np.ones(place.shape, bool)
    for index in range(parts - 1):
        weight, total = weights[:, index, None], weights[:, index:].sum(axis=1)[:, None]
        before = _rounded(place * weight, total)
        mine = left & (_rounded((place + 1) * weight, total) > before)
        part[mine] = index
        left &= ~mine
        place = place - before
    return part


def _rounded(amount: NDArray[np.int64], total: NDArray[np.int64]) -> NDArray[np.int64]:
    """amount / total to the nearest integer, halves up."""
    return (2 * amount + total) // (2 * total)


def most_pools(trace: Trace) -> int:
    """Pools that a trace has something to do for: each has a request, and in a closed loop a client."""
    return min(len(trace), trace.concurrency or len(trace))


def clients_of(weights: Sequence[int], clients: int) -> list[int]:
    """Clients of a closed loop for each part, dealt as requests are, but at least one for each.

    Parameters
    ----------
    weights : of the parts
    clients : int    at least as many as parts
    """
    assert clients >= len(weights), "some pool would have none"
    counts = np.bincount(dealt(np.array([weights]), clients)[0], minlength=len(weights))
    while not counts.all():
        counts[counts.argmax()] -= 1
        counts[counts.argmin()] += 1
    return [int(count) for count in counts]
