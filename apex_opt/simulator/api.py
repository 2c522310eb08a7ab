"""Entry points of the simulator: `simulate` for plans, `run_deployment` for pools of them, `replay` for recordings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from apex_opt.errors import CapacityError, UnknownNameError, UsageError, join_faults
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.law import check_laws, linear_law
from apex_opt.simulator.outcome import Routing
from apex_opt.simulator.pools import EnginePool, shares
from apex_opt.units import NS_PER_US, ceil_div
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from apex_opt.figures.stops import Stop
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.simulator.outcome import Outcome
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
    held = np.minimum(trace.prompt + trace.output, settings.max_model_len) - 1  # the last token is never computed
    i = int(held.argmax())
    need = ceil_div(int(held[i]), settings.block_size)
    if need > blocks:
        raise CapacityError(
            f"request {i}: {trace.prompt[i]} prompt + {trace.output[i]} output tokens need {need} KV blocks of "
            f"{settings.block_size}, the cache has {blocks}; use more or larger GPUs, a smaller KV format or a lower "
            "max_model_len"
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
    routing : "round_robin" (request i to replica i mod R) or "least_loaded" (fewest unanswered requests when the
              request arrives, ties to the lowest replica)
    log : bool                    keep every batch
    gaps : bool                   keep the times between the tokens of every request, as a log does too
    stops : limits whose passing cuts the run short (`Outcome.stopped`); with `floors`, times that no request can beat,
        sooner
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
        implementation=implementation,
    )


def run_deployment(
    pools: Sequence[EnginePool],
    trace: Trace,
    *,
    assigned: NDArray[np.integer] | None = None,
    clients: Sequence[int] | None = None,
    routing: Routing = "round_robin",
    log: bool = False,
    gaps: bool = False,
    stops: Sequence[Stop] = (),
    floors: Outcome | None = None,
    implementation: Implementation = "kernel",
) -> Outcome:
    """Serve a trace on several pools of replicas, each with its own limits, laws and blocks.

    Parameters
    ----------
    pools : EnginePool of each; they agree on `max_model_len`, on prefix caching and, with it, on the size of a block
    assigned : int[requests] or None    the pool that serves each request; None: any replica of any pool
    clients : of each pool, at least one, where `assigned` is given and the trace is a closed loop; clients keep to
        their replica
    routing : how a replica is found, among those of its pool where a request is assigned to one; see `simulate`
    log, gaps, stops, floors, implementation : as for `simulate`, of the whole deployment

    Returns
    -------
    Outcome    replicas pool by pool, and what each pool did in `pools`

    Raises
    ------
    CapacityError, UsageError
    """
    if routing not in get_args(Routing):
        raise UnknownNameError("routing", str(routing)[:60], get_args(Routing))
    _check_alike(pools)
    found = shares(pools, trace, routing, assigned, clients)
    for place, pool in enumerate(pools):
        _check_pool(pool, trace if assigned is None else trace.picked(np.flatnonzero(assigned == place)))
    if implementation == "reference":
        from apex_opt.simulator import reference

        return reference.run_deployment(pools, trace, found, log=log, gaps=gaps, stops=stops)
    from apex_opt.simulator import pack

    return pack.run(pools, trace, found, log=log, gaps=gaps, stops=stops, floors=floors)


def _check_alike(pools: Sequence[EnginePool]) -> None:
    """Refuse pools that cannot stand side by side."""
    if not pools:
        raise UsageError("a deployment needs a pool of replicas, got none")
    for name in ("max_model_len", "prefix_caching", *(("block_size",) if pools[0].settings.prefix_caching else ())):
        if len(values := {getattr(pool.settings, name) for pool in pools}) > 1:
            raise UsageError(f"pools of one deployment have the same {name}, got {', '.join(map(str, values))}")


def _check_pool(pool: EnginePool, trace: Trace) -> None:
    """Refuse requests and laws that the replicas of a pool cannot take."""
    settings = pool.settings
    check_fits(settings, pool.blocks, trace)
    longest = trace.longest
    check_laws(
        pool.laws,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        longest=longest,
        # Sequences that share a prefix hold more tokens together than there are in the pool.
        held=longest * settings.max_num_seqs
        if settings.prefix_caching
        else min(longest * settings.max_num_seqs, pool.blocks * settings.block_size),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replayed trace in the format of the recorded batches: lists, microseconds, requests by their index."""

    steps: list[list[Any]]
    first_token_us: list[int]
    finish_us: list[int]
    preemptions: int


def replay(config: dict[str, Any], trace: list[Any], implementation: Implementation = "kernel") -> Replay:
    """Replay a recorded case: engine settings and law as a mapping, requests as rows.

    Parameters
    ----------
    config : mapping with `max_num_seqs`, `max_num_batched_tokens`, `max_model_len`, `chunked_prefill`,
        `long_prefill_token_threshold`, `block_size`, `num_gpu_blocks` (one of them is never handed out),
        `async_scheduling`, `stages`, `stage_weight`, and `law_us = [a, b, c]`: a batch takes
        ``weight * (a + b * tokens + c * context)`` µs on a stage
    trace : rows `[arrival_us, prompt_tokens, output_tokens]`; with `prefix_caching` also the content ids of the
        prompt, one per `hash_block_tokens` tokens
    implementation : "kernel" or "reference"

    Raises
    ------
    UsageError, CapacityError, InputError    settings or requests that no engine accepts
    """
    caching = bool(config.get("prefix_caching", False))
    needed = (*_SETTINGS, "num_gpu_blocks", "law_us", *(("hash_block_tokens",) if caching else ()))
    missing = [key for key in needed if key not in config]
    if missing:
        raise UsageError(f"config: missing {', '.join(missing)}")
    short = [f"row {number}: {len(row)} entries" for number, row in enumerate(trace, 1) if len(row) < 3 + caching]
    if short:
        raise join_faults(f"a request has {3 + caching}, with its content ids" if caching else "a request has 3", short)
    settings = EngineSettings(**{key: config[key] for key in _SETTINGS}, prefix_caching=caching)
    (stages,) = _whole("stages", [config.get("stages", 1)], 1)
    weights = config.get("stage_weight", [1] * stages)
    if len(weights) != stages:
        raise UsageError(f"config: {len(weights)} stage weights for {stages} stages")
    weights = _whole("stage_weight", weights, stages)
    (pool,) = _whole("num_gpu_blocks", [config["num_gpu_blocks"]], 1)
    base, token, context = (NS_PER_US * x for x in _whole("law_us", config["law_us"], 3))
    law = linear_law(
        base_ns=base,
        token_ns=token,
        context_ns=context,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    requests = make_trace(
        name="replay",
        # Multiplied as Python integers: what leaves 63 bits is refused rather than wrapped.
        arrival_ns=[row[0] * NS_PER_US if isinstance(row[0], int) else row[0] for row in trace],
        prompt=[row[1] for row in trace],
        output=[row[2] for row in trace],
        content=[row[3] for row in trace] if caching else None,
        content_tokens=config["hash_block_tokens"] if caching else 0,
        source="recorded batches",
    )
    order = np.argsort([row[0] for row in trace], kind="stable")  # as `make_trace` sorts
    outcome = simulate(
        settings,
        pool - 1,
        [law.scaled(weight) for weight in weights],
        requests,
        log=True,
        implementation=implementation,
    )
    ids = order.tolist()
    steps = [
        [start // NS_PER_US, end // NS_PER_US, [[ids[i], c, h] for i, c, h in rows], sorted(ids[i] for i in lost)]
        for start, end, rows, lost in outcome.steps or ()
    ]
    first, finish = (np.zeros(len(ids), np.int64) for _ in range(2))
    first[order] = outcome.first_token_ns // NS_PER_US
    finish[order] = outcome.finish_ns // NS_PER_US
    return Replay(
        steps=steps, first_token_us=first.tolist(), finish_us=finish.tolist(), preemptions=outcome.preemptions
    )


def _whole(name: str, values: Sequence[Any], count: int) -> list[int]:
    """So many whole numbers from 0, as they stand in a config."""
    given: list[Any] = list(values) if isinstance(values, list | tuple) else [values]
    good = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 40 for x in given)
    if len(given) != count or not good:
        raise UsageError(f"config: {name} must be {count} whole number(s) from 0 to 2**40, got {str(values)[:60]}")
    return given


_SETTINGS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "chunked_prefill",
    "long_prefill_token_threshold",
    "block_size",
    "async_scheduling",
)
