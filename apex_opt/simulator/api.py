"""Entry points of the simulator: `simulate` for plans, `run_deployment` for pools of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from apex_opt.engines.schedulers import RESERVED, SglangScheduling, TrtllmScheduling, VllmScheduling
from apex_opt.errors import CapacityError, UsageError
from apex_opt.plans.routing import check_pushed, check_routing
from apex_opt.simulator.handover import LONGEST_NS, prompts_only
from apex_opt.simulator.law import check_laws
from apex_opt.simulator.pools import EnginePool, shares, sides
from apex_opt.simulator.turns import after_answers
from apex_opt.units import NS_PER_S, ceil_div

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.stops import Stop
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.handover import Handover
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.outcome import DisaggregatedOutcome, Outcome
    from apex_opt.simulator.phases import DynamicPhases, Multiplexing, PhasedOutcome, Phases
    from apex_opt.simulator.rescheduling import Rescheduling
    from apex_opt.simulator.tokens import TokenContent
    from apex_opt.workload.trace import Trace

Implementation = Literal["kernel", "reference"]


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


def simulate(
    settings: EngineSettings,
    blocks: int,
    laws: Sequence[BatchLaw],
    trace: Trace,
    *,
    replicas: int = 1,
    routing: Routing = "round_robin",
    log: bool = False,
    gaps: bool = False,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
    content: TokenContent | None = None,
    implementation: Implementation = "kernel",
) -> Outcome:
    """Serve a trace on identical replicas and return when every request got its tokens.

    Parameters
    ----------
    settings : EngineSettings     batching limits of each replica
    blocks : int                  KV blocks each replica can hand out
    laws : one BatchLaw per pipeline stage
    trace : Trace                 open arrivals, or a closed loop of `trace.concurrency` clients; clients keep to
                                  their replica
    replicas : int                engines with their own scheduler and cache
    routing : "round_robin" (request i to replica i mod R), "least_loaded" (fewest unanswered requests when the
              request arrives, ties to the lowest replica) or another of those in docs/routing.md
    log : bool                    keep every batch
    gaps : bool                   keep the times between the tokens of every request, as a log does too
    stops : limits whose passing cuts the run short (`Outcome.stopped`); with `floors`, times that no request can beat,
        sooner
    content : TokenContent or None    what tokens are, for SGLang's tree, where that is not what the trace says
    implementation : "kernel" (compiled) or "reference" (plain Python); both return the same integers

    Returns
    -------
    Outcome

    Raises
    ------
    CapacityError, UsageError
    """
    pool = EnginePool(settings=settings, blocks=blocks, laws=laws, replicas=replicas)
    return run_deployment(
        [pool],
        trace,
        routing=routing,
        log=log,
        gaps=gaps,
        stops=stops,
        floors=floors,
        content=content,
        implementation=implementation,
    )


def run_deployment(
    pools: Sequence[EnginePool],
    trace: Trace,
    *,
    assigned: NDArray[np.integer] | None = None,
    clients: Sequence[int] | None = None,
    routing: Routing | Sequence[Routing] = "round_robin",
    log: bool = False,
    gaps: bool = False,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
    content: TokenContent | None = None,
    rescheduling: Rescheduling | None = None,
    implementation: Implementation = "kernel",
) -> Outcome:
    """Serve a trace on several pools of replicas, each with its own limits, laws and blocks.

    Parameters
    ----------
    pools : EnginePool of each; they agree on `max_model_len`, on prefix caching and, with it, on the size of a block
    assigned : int[requests] or None    the pool that serves each request; None: any replica of any pool
    clients : of each pool, at least one, where `assigned` is given and the trace is a closed loop; clients keep to
        their replica
    routing : how a replica is found, among those of its pool where a request is assigned to one, then also one of each
        pool; see `simulate`
    rescheduling : Rescheduling or None    how requests are dealt and move between replicas of one pool; simulated by
        the reference, and in place of a routing
    log, gaps, stops, floors, content, implementation : as for `simulate`, of the whole deployment; where requests wait
        for answers no run ends early, and what tokens are is what the trace says

    Returns
    -------
    Outcome    replicas pool by pool, and what each pool did in `pools`

    Raises
    ------
    CapacityError, UsageError
    """
    if trace.delay_ns is not None:
        limits = {"clients": clients, "routing": routing, "log": log, "gaps": gaps, "implementation": implementation}
        return after_answers(
            trace,
            pools[0].settings.max_model_len,
            lambda coming, order: run_deployment(
                pools,
                coming,
                assigned=None if assigned is None else assigned[order],
                rescheduling=rescheduling,
                **limits,  # type: ignore[arg-type]
            ),
        )
    each = [routing] * len(pools) if isinstance(routing, str) else [*routing]
    for name in each:
        check_routing(name)
    if len(each) != len(pools) or (assigned is None and len(set(each)) > 1):
        raise UsageError(
            f"routing: {len(each)} for {len(pools)} pools; give one, or one of each where requests are assigned to them"
        )
    _check_alike(pools, unassigned=assigned is None)
    found = shares(pools, trace, each, assigned, clients)
    for place, pool in enumerate(pools):
        _check_pool(pool, trace if assigned is None else trace.picked(np.flatnonzero(assigned == place)))
    if rescheduling is not None:
        _check_moving(pools, trace, rescheduling)
    from apex_opt.simulator.pack import engines, run

    if rescheduling is not None or implementation == "reference" or not engines.routes(pools, found):
        from apex_opt.simulator import reference

        asked: dict[str, Any] = {"log": log, "gaps": gaps, "stops": stops, "content": content}
        return reference.run_deployment(pools, trace, found, rescheduling=rescheduling, **asked)
    return run.run(pools, trace, found, log=log, gaps=gaps, stops=stops, floors=floors, content=content)


def run_disaggregated(
    prefill: EnginePool,
    decode: EnginePool,
    handover: Handover,
    trace: Trace,
    *,
    routing: tuple[Routing, Routing] = ("round_robin", "round_robin"),
    log: bool = False,
    gaps: bool = False,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
    implementation: Implementation = "kernel",
) -> DisaggregatedOutcome:
    """Serve a trace on instances that compute prompts and others that answer them.

    By default request i goes to prefill instance i mod P; when its prompt is computed it goes to the decode instance
    whose turn it is, in the order in which prompts are computed.

    Parameters
    ----------
    prefill, decode : EnginePool    each of one stage, one scheduler of the engine vllm or sglang and one kind of KV
                                    block, without drafts; they agree on the engine, on `max_model_len`, on prefix
                                    caching and on the size of a block, and those of vllm sleep when there is nothing to
                                    run; those of sglang are simulated by the reference where requests are routed by
                                    loads
    handover : Handover
    trace : Trace                   open arrivals, or a closed loop of clients, whose next requests go through the
                                    routers once they have an answer
    routing : how an instance of either side is found: of the first for a request that comes, of the second when its
              prompt is computed, as loads are then
    log : bool                      keep every batch
    gaps : bool                     keep the times between the tokens of every request, as a log does too
    stops, floors                   as for `simulate`; where requests wait for answers no run ends early
    implementation : "kernel" (compiled) or "reference" (plain Python); both return the same integers

    Returns
    -------
    DisaggregatedOutcome

    Raises
    ------
    CapacityError, UsageError
    """
    if trace.delay_ns is not None:
        asked_of: dict[str, Any] = {"routing": routing, "log": log, "gaps": gaps, "implementation": implementation}
        return after_answers(
            trace,
            decode.settings.max_model_len,
            lambda coming, _: run_disaggregated(prefill, decode, handover, coming, **asked_of),
        )
    asked = prompts_only(trace)
    for name, pool, its in (("prefill", prefill, asked), ("decode", decode, trace)):
        plain = pool.ranks is None and not pool.settings.kv_groups and pool.settings.speculation is None
        plain = plain and not pool.resources
        scheduler = pool.settings.scheduler
        if not plain or len(pool.laws) != 1 or not isinstance(scheduler, VllmScheduling | SglangScheduling):
            raise UsageError(
                f"the {name} instances must be of one stage, one scheduler of the engine vllm or sglang and one kind "
                "of KV block, where one operation follows the other, and verify no drafts"
            )
        if isinstance(scheduler, VllmScheduling) and not scheduler.idle_sleep_ns:
            raise UsageError(
                f"the {name} instances need an idle_sleep_us of at least 1: one that waits for a read or a notice "
                "would take turns without end"
            )
        _check_pool(pool, its)
    _check_alike([prefill, decode], unassigned=False)
    pushed = _check_pushed(prefill, decode, trace)
    if pushed:
        check_pushed(routing)
    if prefill.settings.block_size != decode.settings.block_size:
        sizes = f"{prefill.settings.block_size}, {decode.settings.block_size}"
        raise UsageError(f"prefill and decode instances have the same block_size, got {sizes}")
    blocks = ceil_div(int(trace.prompt.max()), decode.settings.block_size)
    if handover.read_ns + handover.block_ns * blocks > LONGEST_NS:
        raise UsageError(
            f"handover: a read of {blocks} blocks would take longer than {LONGEST_NS // NS_PER_S} s, after which the "
            "prefill instance gives its blocks up; use smaller times or shorter prompts"
        )
    for name in routing:
        check_routing(name)
    if routing[1] == "vllm_dp":
        raise UsageError("routing: vllm_dp is of requests as they come, not of prompts that are computed; use another")
    before = sides(prefill, decode, trace, routing)
    if implementation == "reference" or (pushed and any(share.routed for share in before)):
        from apex_opt.simulator.reference import disaggregated as instances
        from apex_opt.simulator.reference.router import router_of

        first, then = (router_of(share, [prefill, decode], trace, computes=not share.first) for share in before)
        return instances.run(prefill, decode, handover, trace, (first, then), log=log, gaps=gaps, stops=stops)
    from apex_opt.simulator.pack import disaggregated, pushing

    run = pushing.run if pushed else disaggregated.run
    return run(prefill, decode, handover, trace, before, log=log, gaps=gaps, stops=stops, floors=floors)


def run_phases(
    pool: EnginePool,
    phases: Phases | DynamicPhases | Multiplexing,
    trace: Trace,
    *,
    log: bool = False,
    implementation: Implementation = "kernel",
) -> PhasedOutcome:
    """Serve a trace on replicas that compute prompts and answers side by side, each with a share of their GPUs.

    Request i goes to replica i mod R. Shares that are dynamic are simulated by the reference, and so is a run
    whose batches are told.

    Parameters
    ----------
    pool : EnginePool    of one stage and one scheduler, without prefix caching, drafts and kinds of layers; its law is
                         of whole GPUs, and both phases take from its blocks
    phases : Phases, DynamicPhases or Multiplexing
        the shares; dynamic ones follow the load, and multiplexed ones go with SGLang's scheduler and whole prompts
    trace : Trace        open arrivals
    log : bool           keep every batch
    implementation : "kernel" (compiled) or "reference" (plain Python); both return the same integers

    Returns
    -------
    PhasedOutcome

    Raises
    ------
    CapacityError, UsageError
    """
    settings = pool.settings
    if trace.concurrency is not None:
        raise UsageError("phases that share a GPU take open arrivals, not a closed loop of clients")
    if trace.delay_ns is not None:
        raise UsageError("phases that share a GPU take requests that wait for no answers; leave delay_ms out")
    if settings.prefix_caching or settings.kv_groups or settings.speculation is not None:
        raise UsageError("phases share a GPU without prefix caching, drafts and kinds of layers; leave these out")
    if len(pool.laws) > 1 or pool.ranks is not None or pool.resources:
        raise UsageError("phases share the GPUs of one stage with one scheduler, where one operation follows the other")
    _check_pool(pool, trace)
    from apex_opt.simulator.phases import DynamicPhases, Multiplexing
    from apex_opt.simulator.reference import dynamic_phases, multiplexing, shared
    from apex_opt.simulator.reference import phases as loops

    if isinstance(phases, DynamicPhases):
        return shared.serve(pool, trace, lambda mine: dynamic_phases.DynamicReplica(pool, phases, mine))
    if not isinstance(phases, Multiplexing):
        from apex_opt.simulator.pack import phases as divided

        if implementation == "kernel" and not log and divided.serves(pool):
            return divided.run(pool, phases, trace)
        return shared.serve(pool, trace, lambda mine: loops.PhasesReplica(pool, phases, mine))
    if not isinstance(settings.scheduler, SglangScheduling) or settings.chunked_prefill:
        raise UsageError("multiplexing goes with the scheduler of sglang and with whole prompts")
    if implementation == "kernel" and not log:
        from apex_opt.simulator.pack import multiplexing as multiplexed

        return multiplexed.run(pool, phases, trace)
    return shared.serve(pool, trace, lambda mine: multiplexing.MultiplexingReplica(pool, phases, mine))


def _check_pushed(prefill: EnginePool, decode: EnginePool, trace: Trace) -> bool:
    """Whether prompts are handed over as SGLang does it; refused where a decode instance could never have room."""
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


def _check_moving(pools: Sequence[EnginePool], trace: Trace, rules: Rescheduling) -> None:
    """Refuse replicas between which no request can move."""
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


def _check_alike(pools: Sequence[EnginePool], *, unassigned: bool) -> None:
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


def _check_pool(pool: EnginePool, trace: Trace) -> None:
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
