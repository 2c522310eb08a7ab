"""Entry points of the simulator: `simulate` for plans, `run_deployment` for pools of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.routing import check_pushed, check_routing
from apex_opt.simulator.checks import check_alike, check_moving, check_pool, pushed_over
from apex_opt.simulator.handover import LONGEST_NS, prompts_only
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
    check_alike(pools, unassigned=assigned is None)
    found = shares(pools, trace, each, assigned, clients)
    for place, pool in enumerate(pools):
        check_pool(pool, trace if assigned is None else trace.picked(np.flatnonzero(assigned == place)))
    if rescheduling is not None:
        check_moving(pools, trace, rescheduling)
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
        check_pool(pool, its)
    check_alike([prefill, decode], unassigned=False)
    pushed = pushed_over(prefill, decode, trace)
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

    given = disaggregated.Asked(prefill, decode, handover, trace, before).ending(stops, floors)
    return (pushing.run if pushed else disaggregated.run)(given, log=log, gaps=gaps)


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
    check_pool(pool, trace)
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
