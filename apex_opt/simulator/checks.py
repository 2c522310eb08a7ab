"""What the simulator takes: requests that can be finished, and pools that can be served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from apex_opt.engines.schedulers import RESERVED, SglangScheduling, TrtllmScheduling, VllmScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.simulator.law import check_laws

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator.pools import EnginePool
    from apex_opt.simulator.rescheduling import Rescheduling
    from apex_opt.workload.trace import Trace


def check_fits(settings: EngineSettings, blocks: int, trace: Trace) -> None:
    """Refuse a trace with a request that the engine could never finish.

    Parameters
    ----------
    settings
    blocks : int    KV blocks of a replica
    trace

    Raises
    ------
    CapacityError    a prompt that leaves no room for one token within `max_model_len`, or a request whose tokens
                     need more KV blocks than the pool has; names the request, the limit and the way out
    """
    room = settings.max_model_len - 1
    if int(trace.prompt.max()) > room:
        i = int(trace.prompt.argmax())
        raise CapacityError(
            f"request {i}: a prompt of {trace.prompt[i]} tokens leaves no room to answer within max_model_len "
            f"{settings.max_model_len}; raise max_model_len or shorten the trace"
        )
    sglang = settings.scheduler if isinstance(settings.scheduler, SglangScheduling) else None
    most = trace.output if sglang is None else trace.stated(settings.max_model_len)
    if sglang is not None and sglang.ignore_eos and (most > trace.output).any():
        i = int(np.argmax(most > trace.output))
        raise CapacityError(
            f"request {i}: ends after {trace.output[i]} of {most[i]} max_new_tokens, which no request does with "
            "ignore_eos; leave that out, or give max_new_tokens as the output"
        )
    if sglang is not None:
        _check_foreseen(settings, sglang, trace)
    held = settings.room(trace)
    if isinstance(settings.scheduler, TrtllmScheduling):
        at_once = trace.prompt + trace.generated(settings.max_model_len) - 1
        _check_whole(settings, at_once if settings.scheduler.may_preempt else trace.prompt)
    if settings.speculation is not None:
        held = settings.with_drafts(held, settings.speculation)
    i = int(held.argmax())
    tokens = settings.max_num_batched_tokens
    chunk = min(tokens, settings.scheduler.prompt_threshold or tokens)
    if any(group.mode == "align" for group in settings.kv_groups) and chunk < settings.block_size <= int(held[i]):
        raise CapacityError(
            f"request {i}: chunks of prompts end where states are kept, every {settings.block_size} tokens, and a "
            f"batch has {chunk} of one prompt at most; raise max_num_batched_tokens or long_prefill_token_threshold"
        )
    need = int(settings.most_blocks(held[i]))
    if need > blocks:
        sizes = "/".join(str(size) for size in dict.fromkeys(group.block_size for group in settings.groups))
        raise CapacityError(
            f"request {i}: {trace.prompt[i]} prompt + {most[i]} output tokens need {need} KV blocks of {sizes}, the "
            f"cache has {blocks}; use more or larger GPUs, a smaller KV format or a lower max_model_len"
        )


def _check_foreseen(settings: EngineSettings, own: SglangScheduling, trace: Trace) -> None:
    """Refuse whole prompts whose batches may have more tokens than the limit of a batch.

    Where SGLang foresees all ends (`ignore_eos` without a cache) a prompt is added as long as any of the limit is left.
    """
    if settings.chunked_prefill or settings.prefix_caching or not own.ignore_eos:
        return
    tokens = settings.max_num_batched_tokens
    known = np.sort(trace.prompt + trace.generated(settings.max_model_len) - 1)
    at_once = min(settings.max_num_seqs, trace.concurrency or len(trace))
    most = min(min(own.max_prefill_tokens, tokens) - 1 + int(known[-1]), int(known[-at_once:].sum()))
    if most > tokens:
        raise CapacityError(
            f"batches of whole prompts may have {most} tokens with ignore_eos, the most of a batch is {tokens}; raise "
            "max_num_batched_tokens, lower max_prefill_tokens, or split prompts (chunked_prefill)"
        )


def _check_whole(settings: EngineSettings, computed: NDArray[np.int64]) -> None:
    """Refuse a prompt that no batch of TensorRT-LLM can take.

    Parameters
    ----------
    settings
    computed : int64[n]    most tokens of each request that are computed at once
    """
    i, tokens = int(computed.argmax()), settings.max_num_batched_tokens
    if not settings.chunked_prefill and computed[i] > tokens:
        raise CapacityError(
            f"request {i}: {computed[i]} tokens are computed at once, the most of a batch is {tokens}; raise "
            "max_num_batched_tokens, or split prompts (chunked_prefill)"
        )
    if settings.chunked_prefill and settings.block_size > tokens:
        raise CapacityError(
            f"prompts are split into whole blocks of {settings.block_size} tokens, the most of a batch is {tokens}; "
            "raise max_num_batched_tokens or lower block_size"
        )


def pushed_over(prefill: EnginePool, decode: EnginePool, trace: Trace) -> bool:
    """Whether prompts are handed over as SGLang does it.

    Parameters
    ----------
    prefill, decode : EnginePool    the two sides
    trace : Trace

    Raises
    ------
    UsageError       sides of two engines
    CapacityError    a request for which a decode instance could never have room
    """
    kinds = {type(pool.settings.scheduler) for pool in (prefill, decode)}
    if len(kinds) > 1:
        raise UsageError("prefill and decode instances are of the same engine")
    if kinds != {SglangScheduling}:
        return False
    stated = trace.stated(decode.settings.max_model_len)
    needed = trace.prompt + stated + RESERVED
    i, there = int(needed.argmax()), decode.blocks * decode.settings.block_size
    if needed[i] > there:
        raise CapacityError(
            f"request {i}: a decode instance of sglang keeps room for {needed[i]} tokens, {RESERVED} of them for what "
            f"is to come, and its cache has {there}; use more or larger GPUs, or a smaller KV format"
        )
    return True


def check_moving(pools: Sequence[EnginePool], trace: Trace, rules: Rescheduling) -> None:
    """Refuse replicas between which no request can move.

    Parameters
    ----------
    pools : sequence of EnginePool    of the deployment
    trace : Trace
    rules : Rescheduling              when requests move

    Raises
    ------
    UsageError    several pools, an engine or a trace that moves are not modelled for, or replicas that are not there
    """
    settings = pools[0].settings
    plain = pools[0].ranks is None and not settings.kv_groups and settings.speculation is None
    if len(pools) > 1 or not plain or not isinstance(settings.scheduler, VllmScheduling) or settings.prefix_caching:
        raise UsageError(
            "rescheduling: requests move between replicas of one pool with one scheduler of the engine vllm, one kind "
            "of KV block, no drafts and no prefix caching; leave one of them out"
        )
    if trace.concurrency is not None:
        raise UsageError("rescheduling: requests move where they come on their own, not in a closed loop of clients")
    if not settings.scheduler.idle_sleep_ns:
        raise UsageError(
            "rescheduling: replicas need an idle_sleep_us of at least 1; one whose blocks are all held "
            "for requests that come would take turns without end"
        )
    if unknown := [place for place in rules.draining if not 0 <= place < pools[0].replicas]:
        raise UsageError(f"rescheduling: replica {unknown[0]} to be drained is not among the {pools[0].replicas}")


def check_alike(pools: Sequence[EnginePool], *, unassigned: bool) -> None:
    """Refuse pools that cannot stand side by side."""
    if not pools:
        raise UsageError("a deployment needs a pool of replicas, got none")
    groups = {(pool.settings.kv_groups, pool.settings.max_num_batched_tokens) for pool in pools}
    if unassigned and len(groups) > 1 and any(its for its, _ in groups):
        raise UsageError("requests are assigned to pools where these have different groups of layers or limits of them")
    blocks = pools[0].settings.prefix_caching and not any(pool.settings.kv_groups for pool in pools)
    for name in ("max_model_len", "prefix_caching", *(("block_size",) if blocks else ())):
        if len(values := {getattr(pool.settings, name) for pool in pools}) > 1:
            raise UsageError(f"pools of one deployment have the same {name}, got {', '.join(map(str, values))}")
    if unassigned and len({pool.ranks is None for pool in pools}) > 1:
        raise UsageError("requests are assigned to pools where only some of these have replicas with ranks")


def check_pool(pool: EnginePool, trace: Trace) -> None:
    """Refuse requests and laws that the replicas of a pool cannot take."""
    settings = pool.settings
    check_fits(settings, pool.blocks, trace)
    if settings.kv_groups and not isinstance(settings.scheduler, VllmScheduling):
        raise UsageError(f"groups of layers go with vllm, not with {settings.scheduler.name}")
    if settings.speculation is not None and len(pool.laws) > 1:
        raise UsageError(
            f"speculation: drafts are made on one stage, the plan has {len(pool.laws)}; use pp1 or no drafts"
        )
    if pool.ranks is not None and not isinstance(
        settings.scheduler, VllmScheduling | SglangScheduling | TrtllmScheduling
    ):
        raise UsageError("ranks go with the engines vllm, sglang and trtllm; leave one of them out")
    if pool.ranks is not None and settings.speculation is not None and not settings.scheduler.ranks_draft:
        raise UsageError(f"ranks of {settings.scheduler.name} with drafts are not modelled; leave one of them out")
    if pool.ranks is not None and not pool.ranks.lockstep and not isinstance(settings.scheduler, VllmScheduling):
        raise UsageError(f"ranks of {settings.scheduler.name} run in lockstep; those of vllm alone can be on their own")
    if pool.halves and (settings.kv_groups or settings.speculation is not None):
        raise UsageError("forwards are split of ranks that run in step, without drafts and groups of layers")
    if pool.halves and not isinstance(settings.scheduler, VllmScheduling | SglangScheduling):
        raise UsageError(f"forwards are split by vllm and sglang, not by {settings.scheduler.name}")
    if any(law.resources for law in pool.laws) and not (
        isinstance(settings.scheduler, VllmScheduling)
        and len(pool.laws) == 1
        and pool.ranks is None
        and not settings.kv_groups
        and settings.speculation is None
    ):
        raise UsageError(
            "resources work at one time on one stage with one scheduler of the engine vllm, without drafts and groups "
            "of layers; leave one of them out"
        )
    drafts = settings.speculation.draft_tokens if settings.speculation else 0
    longest = trace.longest + drafts
    check_laws(
        (*pool.laws, *(halves.law for halves in pool.halves), *pool.resources),
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        longest=longest,
        draft_tokens=drafts,
        # Sequences that share a prefix, or give blocks back, hold more tokens together than there are in the pool.
        held=longest * settings.seats(len(pool.laws))
        if settings.prefix_caching or settings.kv_groups
        else min(longest * settings.seats(len(pool.laws)), pool.blocks * settings.block_size),
    )
