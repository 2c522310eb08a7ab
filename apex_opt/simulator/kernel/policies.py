"""What the policies decide, as functions of integers: the rules of `reference.schedulers`."""

from __future__ import annotations

from apex_opt.simulator.kernel.jit import inner
from apex_opt.simulator.kernel.state import VLLM


@inner
def blocks_nb(tokens: int, block_size: int) -> int:
    """KV blocks of some tokens."""
    return (tokens + block_size - 1) // block_size


@inner
def wanted_nb(
    policy: int,
    known: int,
    coming: int,
    computed: int,
    prompt: int,
    output: int,
    limit: int,
    threshold: int,
    length: int,
) -> int:
    """Tokens that a running sequence has ready to compute; none where its last one is on its way."""
    if coming > 0 and computed + 2 - coming >= prompt + output:
        return 0
    c = known + coming - computed
    if threshold > 0:
        c = min(c, threshold)
    c = min(c, length - 1 - computed)
    if policy != VLLM:
        c = min(c, prompt + limit - 1 - computed)
    return c


@inner
def reserved_nb(policy: int, known: int, prompt: int, limit: int) -> int:
    """Tokens that a waiting sequence has to find room for."""
    if policy == VLLM:
        return known
    return prompt + limit - 1  # the last token is never computed


@inner
def admits_nb(policy: int, tokens: int, budget: int, threshold: int, chunked: int) -> int:
    """Tokens that a waiting sequence computes in this batch, of so many it has not computed; 0 where it waits."""
    if threshold > 0 and policy == VLLM:
        tokens = min(tokens, threshold)
    if tokens <= budget:
        return tokens
    if chunked == 0 or policy != VLLM:
        return 0
    return budget
