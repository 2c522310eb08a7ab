"""Overlap inside a GPU as it is asked for: what there is to choose from, and what does not go with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.arguments import ExplainAsk
from apex_opt.engines.overlap import NANO, NANO_SOURCE, OVERLAPS, TWO, without_kernels
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import UnknownNameError, UsageError
from apex_opt.plans.acceptance import parse_speculation
from apex_opt.plans.allotment import allotted
from apex_opt.plans.plan import parse_plan
from apex_opt.serving import plans_pools

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from apex_opt.arguments import Ask
    from apex_opt.cluster.types import Cluster
    from apex_opt.engines.overlap import Overlap
    from apex_opt.ir import Model
    from apex_opt.plans.deployment import Serving
    from apex_opt.plans.engine import EngineSettings

_NONE = "none"


def plans_overlap(ask: Ask) -> tuple[str, ...]:
    """What the plans that are asked about overlap."""
    return tuple(name for name in OVERLAPS if f"overlap={name}" in str(getattr(ask, "plan", "")).lower())


def overlaps_of(
    ask: Ask, settings: EngineSettings, model: Model, serving: Sequence[Serving], clusters: Sequence[Cluster]
) -> tuple[Overlap | None, ...]:
    """What plans may overlap, to choose from; refused where the engine that is to run them cannot.

    Parameters
    ----------
    ask, settings, model
    serving : ways to serve
    clusters : of each type of GPU

    Raises
    ------
    UsageError, UnknownNameError    a name that there is not, or that is given twice; what cannot be overlapped
    """
    chosen = [name.strip() for name in ask.overlap.split(",")]
    for name in chosen:
        if name not in (_NONE, *OVERLAPS):
            raise UnknownNameError("overlap", name[:60], (_NONE, *OVERLAPS), alike=False)
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--overlap: {ask.overlap!r:.60} names one twice")
    planned = plans_overlap(ask)
    for name in planned if plans_pools(ask) else ():
        raise UsageError(
            f"plan {getattr(ask, 'plan', '')!r:.100}: overlap={name} is of replicas whose batches hold both phases, "
            "and pools hand prompts over; leave it out"
        )
    if isinstance(ask, ExplainAsk):
        chosen += [name for name in planned if name not in chosen]  # it is compared with what a search would find
    if _NONE in chosen and "aggregated" not in serving and plans_pools(ask) and not planned:
        return (None,)  # pools are among what is to choose from, and overlap nothing
    wanted = [name for name in OVERLAPS if name in chosen or name in planned]
    for name in wanted:
        fault = _of_one_type(settings, model, serving, clusters)
        if fault := (_no_nano(settings) if name == NANO else _no_halves(settings, model, clusters)) or fault:
            raise UsageError(f"--overlap={name}: {fault}")
    if wanted and _NONE not in chosen and tuple(serving) == ("aggregated",) and _only_drafts(ask):
        raise UsageError(
            f"--overlap={','.join(wanted)}: it is modelled without drafts, and --speculation={ask.speculation:.60} has "
            "every plan make some; give --speculation=none, or --overlap=none"
        )
    if others := [kind for kind in serving if kind != "aggregated" and _NONE not in chosen]:
        raise UsageError(
            f"--overlap={ask.overlap}: only plans that overlap, and --serving has {' and '.join(others)}, which do "
            "not; leave these out, or add none to --overlap"
        )
    return tuple(None if name == _NONE else name for name in chosen)  # type: ignore[misc]  # they are looked at above


def _only_drafts(ask: Ask) -> bool:
    """Whether drafts are made by every plan that is searched, or by the one that is given, unless it names none."""
    if any(drafter is None for drafter in parse_speculation(ask.speculation)):
        return False
    words = str(getattr(ask, "plan", "")).lower()
    return isinstance(ask, ExplainAsk) or not ("spec=none" in words or f"overlap={_NONE}" in words)


def _no_nano(settings: EngineSettings) -> str | None:
    """Why operations cannot run side by side; None where they can."""
    rules, scheduler = settings.runnable, settings.scheduler
    if not isinstance(scheduler, VllmScheduling):
        return f"it is modelled with the scheduler of vllm, not with {scheduler.name}; use --engine=vllm"
    if rules is not None:
        return (
            f"{rules.release} does not run operations that ask for different resources at one time, nor does any other "
            "engine here; --runnable=any shows what NanoFlow's would gain"
        )
    return None


def _no_halves(settings: EngineSettings, model: Model, clusters: Sequence[Cluster]) -> str | None:
    """Why no forward can be split into two batches; None where some can."""
    rules, scheduler = settings.runnable, settings.scheduler
    if not model.is_moe:
        return f"{model.name} has no experts that tokens are sent to; two batches hide that alone"
    if scheduler.splitting is None or (rules is not None and rules.overlaps == frozenset()):
        name = scheduler.name if rules is None or scheduler.splitting is None else rules.release
        return f"{name} does not split a forward into two batches; use --engine=vllm or --engine=sglang"
    if rules is not None and rules.overlaps is not None and model.family not in rules.overlaps:
        some = ", ".join(sorted(rules.overlaps))
        return (
            f"{rules.release} splits forwards of {some} models, not of {model.family or 'such'}; use --engine=vllm, or "
            "--runnable=any to see what that would gain"
        )
    if rules is not None and (why := without_kernels(clusters[0])) is not None:
        return f"{why}, and {rules.release} splits forwards with them; --runnable=any shows what that would gain"
    return None


def _of_one_type(
    settings: EngineSettings, model: Model, serving: Sequence[Serving], clusters: Sequence[Cluster]
) -> str | None:
    """What neither way to overlap is modelled with; None where there is nothing such."""
    if "aggregated" not in serving:
        return "it is of replicas that do both phases of requests; add --serving=aggregated"
    if len(clusters) > 1:
        return "it is modelled on GPUs of one type; give a cluster of one"
    if allotted(model, parse_plan("tp1", model), settings).groups:
        return f"layers of {model.name} keep different things, with which it is not simulated"
    return None


def about_overlap(settings: EngineSettings, asked: Collection[str | None]) -> tuple[str, ...]:
    """Where the times of what plans may overlap are from.

    Parameters
    ----------
    settings
    asked : what they may
    """
    found, splitting = [], settings.scheduler.splitting
    if TWO in asked and splitting is not None:
        graphs = "" if splitting.graphs else "; with the kernels that it takes the engine runs from no CUDA graph"
        found.append(
            "two batches: when a forward is split was read in the engine's sources, what halves take is "
            f"derived{graphs}"
        )
    if NANO in asked:
        found.append(f"nano-batches: {NANO_SOURCE}; no engine here runs them")
    return tuple(found)
