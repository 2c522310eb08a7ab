"""Ways to serve as they are asked for: pools that do both phases, or hand prompts over; routers; requests that move."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from apex_opt.arguments import ExplainAsk
from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.ir.cells import State
from apex_opt.plans.deployment import Serving
from apex_opt.plans.routing import check_pushed, parse_routings, parse_sides
from apex_opt.sharing import check_shared, plans_shares
from apex_opt.simulator.rescheduling import Rescheduling, parse_rescheduling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.arguments import Ask
    from apex_opt.engines import EngineKind
    from apex_opt.ir import Model
    from apex_opt.plans.routing import Routing
    from apex_opt.workload import Trace


def plans_pools(ask: Ask) -> bool:
    """Whether a plan is asked about that has prefill and decode pools, which alone stand in braces."""
    return "{" in str(getattr(ask, "plan", ""))


def ways_to_serve(ask: Ask, trace: Trace, model: Model) -> tuple[Serving, ...]:
    """What may be deployed; prefill and decode pools where a plan has them.

    Parameters
    ----------
    ask, trace, model
    """
    known = get_args(Serving)
    chosen = [name.strip() for name in ask.serving.split(",")]
    if plans_pools(ask) and "shared" in chosen:
        raise UsageError(
            f"--serving={ask.serving:.60}: the plan has prefill and decode pools, and prompts are handed over between "
            "two pools of whole GPUs; leave one out"
        )
    if plans_shares(ask) and "pools" in chosen and not isinstance(ask, ExplainAsk):
        raise UsageError(
            f"--serving={ask.serving:.60}: the plan's share= computes both phases on one pool, which hands nothing "
            "over; leave one out"
        )
    if plans_pools(ask):
        # What a plan is compared with may do both phases.
        chosen = ["aggregated", "pools"] if isinstance(ask, ExplainAsk) and "aggregated" in chosen else ["pools"]
    elif plans_shares(ask):
        pooled = ["pools"] if "pools" in chosen else []
        chosen = ["shared"] if ask.serving == "shared" else ["aggregated", *pooled, "shared"]
    for name in chosen:
        if name not in known:
            raise UnknownNameError("serving", name[:60], known)
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--serving: {ask.serving!r:.60} names one twice")
    if chosen == ["pools"] and (plan := getattr(ask, "plan", None)) and not plans_pools(ask):
        raise UsageError(
            f"--serving=pools: plan {plan!r:.60} is none; write prefill{{...}} + decode{{...}}, or leave it out"
        )
    if "shared" in chosen:
        check_shared(ask, trace)
        if (why := kept_apart(model)) is not None:
            raise UsageError(f"--serving=shared: {model.name} {why}, which is not simulated; leave it out")
    if "pools" not in chosen:
        return tuple(name for name in known if name in chosen)
    if (why := kept_apart(model)) is not None:
        raise UsageError(f"--serving=pools: {model.name} {why}, and such hand-overs are not simulated; leave it out")
    if ask.speculation != "none":
        raise UsageError("--serving=pools: drafts are not simulated where prompts are handed over; leave one out")
    return tuple(name for name in known if name in chosen)


def routers_of(
    ask: Ask, serving: tuple[Serving, ...], kind: EngineKind
) -> tuple[tuple[Routing, ...], tuple[tuple[Routing, ...], tuple[Routing, ...]]]:
    """Routers to choose from, before replicas that do both phases and before the instances of either side.

    Parameters
    ----------
    ask
    serving : what may be deployed
    kind : EngineKind

    Raises
    ------
    UsageError    routers that do not go with what may be deployed, or with the engine
    """
    if "pools" not in serving:
        if "/" in ask.routing:
            raise UsageError(
                f"--routing: {ask.routing!r:.60} is of prefill and decode instances; give --serving=pools, or a router "
                "without a /"
            )
        return parse_routings(ask.routing), (("round_robin",), ("round_robin",))
    sides = parse_sides(ask.routing)
    if kind.scheduler is SglangScheduling:
        check_pushed((*sides[0], *sides[1]))
    if "/" in ask.routing and serving != ("pools",):
        raise UsageError(
            f"--routing: {ask.routing!r:.60} is of prefill and decode instances, and --serving has pools of both "
            "phases as well; give --serving=pools, or routers without a /"
        )
    return sides[0], sides


def kept_apart(model: Model) -> str | None:
    """What a model keeps of a request that no connector is known to hand over; None where it keeps keys and values."""
    if model.pools:
        return "answers with a vector"
    if model.tower is not None:
        return f"reads {model.tower.reads} with a tower"
    if any(isinstance(kept, State) for block in model.blocks for kept in block.attention.cache()):
        return "keeps states of sequences"
    return None


def about_handover(ask: Ask, kind: EngineKind) -> tuple[tuple[str, str], ...]:
    """Where the times of a hand-over are from."""
    given = ask.handover or ""
    return tuple(
        (f"hand-over, {name}", "given: --handover" if f"{name}=" in given else known.source)
        for name, known in kind.handover.items()
    )


def about_pushing(kind: EngineKind, serving: Sequence[Serving]) -> tuple[str, ...]:
    """That how an engine hands prompts over was read."""
    if "pools" not in serving or kind.scheduler is not SglangScheduling:
        return ()
    return ("hand-over: SGLang's rules were read, not recorded",)


def moves_of(ask: Ask, trace: Trace, kind: EngineKind) -> Rescheduling | None:
    """How requests move between replicas, where they do.

    Parameters
    ----------
    ask, trace, kind
    """
    if (text := getattr(ask, "rescheduling", None)) is None:
        return None
    if kind.scheduler is not VllmScheduling or not kind.handover:
        raise UsageError(f"--rescheduling: how requests of {kind.name} move is not modelled; use vllm")
    if ask.routing != "round_robin" or "route=" in str(getattr(ask, "plan", "")):
        raise UsageError("--rescheduling deals requests by its own rules; leave --routing and route= out")
    if plans_pools(ask) or plans_shares(ask):
        raise UsageError("--rescheduling is of replicas whose batches hold both phases of requests; leave one out")
    if trace.concurrency is not None:
        raise UsageError(
            "--rescheduling: requests move where they come on their own, not in a closed loop of clients; give a trace "
            "with arrivals"
        )
    return parse_rescheduling(text)


def about_priorities(trace: Trace, rescheduling: Rescheduling | None) -> tuple[str, ...]:
    """What priorities are without effect on."""
    if trace.priority is None or not trace.priority.any():
        return ()
    if rescheduling is None:
        return ("priorities: no engine and no router here heeds them; simulate --rescheduling=llumnix does",)
    if not rescheduling.headroom:
        return ("priorities: without a headroom they only keep requests from being moved; llumnix:headroom=BLOCKS",)
    return ()
