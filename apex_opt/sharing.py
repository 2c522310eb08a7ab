"""Shares of a GPU as they are asked for: which there are to choose from, and what does not go with them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from apex_opt.arguments import LARGEST_BATCH, ExplainAsk
from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.allotment import allotted
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.shares import Shares, division_fault, parse_shares
from apex_opt.simulator.phases import LAW

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.arguments import Ask
    from apex_opt.cluster.types import Gpu
    from apex_opt.ir import Model
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.workload import Trace

USUAL: Final = ("50/50", "60/60", "80/100", "100/100")
"""Per cent of a GPU that prompts and answers may have where nothing else is asked for, the last but one semi-PD's."""


def plans_shares(ask: Ask) -> bool:
    """Whether a plan is asked about that computes both phases side by side on the same GPUs."""
    return "share=" in str(getattr(ask, "plan", ""))


def check_shared(ask: Ask, trace: Trace) -> None:
    """Refuse traffic and settings with which phases do not share a GPU."""
    if trace.concurrency is not None:
        raise UsageError(
            "--serving=shared: phases that share a GPU are simulated with arrivals, not with a closed loop of clients; "
            "give a trace with arrivals or a rate"
        )
    if trace.delay_ns is not None:
        raise UsageError("--serving=shared: it is simulated without requests that wait for answers; leave delay_ms out")
    for name, given, usual in (
        ("--speculation", ask.speculation, "none"),
        ("--routing", ask.routing, "round_robin"),
        ("--prefix_caching", bool(ask.prefix_caching), False),
    ):
        if given != usual:
            raise UsageError(f"--serving=shared: it is simulated without {name}; leave one out")


def shares_of(ask: Ask, settings: EngineSettings, model: Model, gpus: Sequence[Gpu]) -> tuple[Shares, ...]:
    """What both phases may have of a GPU; refused where the engine that is to run it cannot, or the GPUs cannot.

    Parameters
    ----------
    ask, settings, model
    gpus : of each type
    """
    rules, multiplexing = settings.runnable, isinstance(settings.scheduler, SglangScheduling)
    if len(gpus) > 1:
        raise UsageError("--serving=shared: phases share GPUs of one type; give a cluster of one")
    if not isinstance(settings.scheduler, VllmScheduling | SglangScheduling):
        raise UsageError(f"--serving=shared: phases share a GPU by the rules of vllm or sglang, not of {ask.engine}")
    if rules is not None and not (rules.multiplexes and multiplexing):
        raise UsageError(
            f"--serving=shared: {rules.release} does not compute prompts and answers side by side on a GPU; use "
            "--engine=sglang, or --runnable=any to see what that would gain"
        )
    if getattr(settings.scheduler, "scheduler_recv_interval", 1) > 1:
        raise UsageError(
            "--engine_settings: scheduler_recv_interval is not simulated where phases share a GPU, whose loop looks "
            "for requests in every turn; leave it out"
        )
    if allotted(model, parse_plan("tp1", model), settings).groups:
        raise UsageError(f"--serving=shared: layers of {model.name} keep different things, which is not simulated")
    found = tuple(parse_shares(name) for name in _searched(ask, settings, gpus))
    if plans_shares(ask):
        words = " ".join(ask.plan) if isinstance(ask.plan, tuple) else str(ask.plan)  # type: ignore[attr-defined]
        given = tuple(parse_shares(word[6:]) for word in dict.fromkeys(words.split()) if word.startswith("share="))
        # It is compared with what a search would choose from.
        found = tuple(dict.fromkeys((*found, *given))) if isinstance(ask, ExplainAsk) else given
    if len(set(found)) < len(found):
        raise UsageError(f"--shares: {ask.shares!r:.60} names one twice")
    for shares in found:
        if shares.multiplexed and not multiplexing:
            raise UsageError(f"--shares={shares}: multiplexing is SGLang's; use --engine=sglang, or such as 50/50")
        if rules is not None and not shares.multiplexed:
            raise UsageError(
                f"--shares={shares}: {rules.release} has no shares but those of its multiplexing, such as pdmux; use "
                "--runnable=any to see what others would gain"
            )
        if shares.multiplexed and (fault := division_fault(shares, gpus[0])):
            raise UsageError(f"--shares={shares}: {fault}")
    return found


def _searched(ask: Ask, settings: EngineSettings, gpus: Sequence[Gpu]) -> list[str]:
    """The shares that are asked for, or else those that a search has to choose from."""
    if ask.shares is not None:
        return [name.strip() for name in ask.shares.split(",")]
    division = Shares(prefill=0, decode=0, multiplexed=True)
    if settings.runnable is not None:
        return [str(division)]
    multiplexing = isinstance(settings.scheduler, SglangScheduling) and division_fault(division, gpus[0]) is None
    return [*USUAL, *([str(division)] if multiplexing else [])]


def about_others(ask: Ask, settings: EngineSettings, gpus: Sequence[Gpu], shares: Sequence[Shares]) -> tuple[str, ...]:
    """That a plan has shares which a search with the same options would not choose from.

    Parameters
    ----------
    ask, settings
    gpus : of each type
    shares : those of the plan
    """
    named = _searched(ask, settings, gpus)
    known = [parse_shares(name) for name in named]
    if not plans_shares(ask) or not (others := [str(one) for one in shares if one not in known]):
        return ()
    return (
        f"share={', '.join(others)}: plan searches {', '.join(named)}, and its best is the best of these; with "
        f"--shares={','.join([*named, *others])} it searches the plan's too",
    )


def fitted(ask: Ask, settings: EngineSettings, trace: Trace, shares: Sequence[Shares]) -> EngineSettings:
    """Settings with which a batch takes the longest prompt whole, where shares are multiplexed.

    Parameters
    ----------
    ask, settings, trace
    shares : to choose from
    """
    if not any(one.multiplexed for one in shares):
        return settings
    longest = settings.max_model_len
    if ask.max_model_len is None:
        longest = min(longest, max(trace.longest, 2))
    if longest > LARGEST_BATCH:
        raise UsageError(
            f"--serving=shared: multiplexing computes prompts whole, in batches of up to {LARGEST_BATCH} tokens, and "
            f"requests have up to {longest}; give --max_model_len={LARGEST_BATCH} or less, or other shares"
        )
    return replace(settings, max_model_len=longest)


def about_shares(shares: Sequence[Shares]) -> str:
    """Where the times of phases that share a GPU are from."""
    assumed = "that shares beyond a GPU are divided in their ratio is assumed"
    if any(one.multiplexed for one in shares):
        assumed += (
            ", as is that slices of prompts take their share of the layers; SGLang's rules were read, not recorded"
        )
    return f"shares of a GPU: {LAW}; {assumed}"
