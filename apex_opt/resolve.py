"""From names and numbers, as a person gives them, to a problem that can be searched."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from apex_opt.batching import about_blocks, about_chunks, about_engines, choices, settings_asked
from apex_opt.cluster import Cluster, Tree, assumed_network, free_types, load_pools, load_topology, load_wiring
from apex_opt.cluster.tree import slowest
from apex_opt.cost.engine import load_engine
from apex_opt.drafting import about_drafting_seats, speculation_of
from apex_opt.engines import kind_names, load_kind
from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import InputError, UsageError
from apex_opt.figures import load_objectives, parse_goals
from apex_opt.ir import Model, load_model
from apex_opt.offering import clocks_asked, expanded, formats_asked
from apex_opt.overlapping import about_overlap, overlaps_of, plans_overlap
from apex_opt.plans.acceptance import check_acceptance, parse_speculation
from apex_opt.plans.engine import check_states
from apex_opt.plans.routing import SEES_PREFIXES
from apex_opt.profiles import check_profiles
from apex_opt.search import Offer, Problem
from apex_opt.serving import (
    about_handover,
    about_priorities,
    about_pushing,
    moves_of,
    routers_of,
    ways_to_serve,
)
from apex_opt.sharing import about_others, about_shares, fitted, shares_of
from apex_opt.workload import Trace, frame_trace, load_trace
from apex_opt.workload.collect import or_named
from apex_opt.workload.columns import MAX_REQUESTS
from apex_opt.workload.steady import at_rate, loops_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.arguments import Ask
    from apex_opt.cluster.catalogue import Wired
    from apex_opt.cluster.types import Link
    from apex_opt.plans.routing import Routing
    from apex_opt.plans.shares import Shares

T = TypeVar("T")


def resolve(ask: Ask, most_gpus: int | None = None, *, rated: bool = False) -> Problem:
    """Load everything a problem names.

    Parameters
    ----------
    ask : Ask
    most_gpus : int or None    GPUs a search can cope with
    rated : bool               whether rates are looked for, so that the trace need not have arrivals

    Raises
    ------
    ApexError    anything unknown, unreadable or out of range, in one line
    """
    objective, *then = load_objectives(ask.objective)
    slos = parse_goals(ask.slo) if ask.slo is not None else ()
    clusters, trees = _pools(ask)
    name, free = clusters[0].name, sum(c.size if t is None else t.size for c, t in zip(clusters, trees, strict=True))
    if ask.price is not None:
        if len(clusters) > 1:
            raise UsageError(
                f"--price: {name} has GPUs of several types, each with a price of its own; give gpu.price_per_h in the "
                "cluster's file"
            )
        clusters = tuple(replace(c, gpu=c.gpu.priced(ask.price, "given: --price")) for c in clusters)
    gpus = free if ask.gpus is None else ask.gpus
    if not 1 <= gpus <= free:
        which = "free " if ask.busy or ask.down else ""
        raise UsageError(f"--gpus: {gpus} is not between 1 and the {free} {which}GPUs of {name}")
    if most_gpus is not None and gpus > most_gpus:
        raise UsageError(
            f"--gpus: plans of {gpus} GPUs are too many to enumerate, the limit is {most_gpus}; pass "
            f"--gpus={most_gpus} or less, or score a plan of your own with simulate"
        )
    model = _loaded("model", ask.model, Model, load_model)
    kind = load_kind(ask.engine)
    if ask.emit and not kind.commands:
        with_them = ", ".join(name for name in kind_names() if load_kind(name).commands)
        raise UsageError(f"--emit: no command starts {kind.name}; of these there are some: --engine={with_them}")
    trace = _trace(ask)
    if not trace.timed and ask.rate is None and not rated:
        raise UsageError(
            f"--trace: {ask.trace!r:.100} has lengths but no arrivals; give the requests per second as --rate"
            f"{or_named(trace.unread)}"
        )
    if ask.rate is not None:
        trace = at_rate(trace, ask.rate, loops_of(trace))
    model = _seeing(model, trace)
    serving = ways_to_serve(ask, trace, model)
    routings, sides = routers_of(ask, serving, kind)
    rescheduling = moves_of(ask, trace, kind)
    times = kind.handing_over(ask.handover) if "pools" in serving or rescheduling else None
    if times is None and ask.handover is not None:
        raise UsageError("--handover is of prefill and decode pools; give --serving=pools, or leave it out")
    notes = (
        *_about_prefixes(ask, trace, (*routings, *sides[0], *sides[1])),
        *about_priorities(trace, rescheduling),
        *_about_images(model),
        *about_engines(ask, kind, model),
        *about_chunks(ask, kind),
        *about_blocks(ask, kind, model, [cluster.gpu for cluster in clusters]),
        *about_pushing(kind, serving),
        *assumed_network(ask.cluster),
    )
    settings, limits = settings_asked(ask, kind, model, trace, [cluster.gpu for cluster in clusters])
    if "pools" in serving and isinstance(settings.scheduler, VllmScheduling) and not settings.scheduler.idle_sleep_ns:
        raise UsageError(
            f"--serving=pools: instances that wait for reads sleep in between, and {kind.name} has idle_sleep_us=0 "
            "here; give --engine_settings=idle_sleep_us=1000, or use vllm"
        )
    check_states(settings, model)
    keeping = model.state_bytes_per_sequence > 0
    told = settings.scheduler.told(
        chunked_prefill=settings.chunked_prefill, caches=settings.prefix_caching, states=keeping
    )
    notes = (*notes, *told)
    drafters = parse_speculation(ask.speculation)
    named = "spec=" in str(getattr(ask, "plan", ""))
    kind.check_drafting(drafts=None not in drafters or named, ahead=ask.async_scheduling)
    if not any(drafters) and ask.acceptance is not None:
        check_acceptance(ask.acceptance)
        if not named:
            notes = (
                *notes,
                "--acceptance has no effect where no drafts are made; --speculation=eagle:3 would make some",
            )
    notes = (*notes, *about_drafting_seats(ask, drafters))
    drafting, about = speculation_of(ask, settings, model, drafters)
    settings, notes = replace(settings, drafting=drafting), (*notes, *about)
    shares: tuple[Shares, ...] = ()
    if "shared" in serving:
        shares = shares_of(ask, settings, model, [cluster.gpu for cluster in clusters])
        others = about_others(ask, settings, [cluster.gpu for cluster in clusters], shares)
        settings, notes = fitted(ask, settings, trace, shares), (*notes, about_shares(shares), *others)
    elif ask.shares is not None:
        raise UsageError("--shares is of phases side by side on a GPU; give --serving=shared, or leave it out")
    overlaps = overlaps_of(ask, settings, model, serving, clusters)
    notes = (*notes, *about_overlap(settings, {*overlaps, *plans_overlap(ask)}))
    offers = []
    for cluster, tree in zip(clusters, trees, strict=True):
        weight_formats, kv_formats = formats_asked(ask, model, cluster.gpu)
        offers.append(
            Offer(
                cluster=cluster,
                tree=tree,
                weight_formats=weight_formats,
                kv_formats=kv_formats,
                clocks=clocks_asked(ask, cluster.gpu),
                notes=tuple(expanded(weight_formats, cluster.gpu)),
            )
        )
    return Problem(
        model=model,
        trace=trace,
        settings=settings,
        overhead=load_engine(ask.engine),
        offers=tuple(offers),
        between=_between(ask) if len(offers) > 1 else None,
        max_devices=gpus,
        objective=objective,
        then=tuple(then),
        slos=slos,
        batch_limits=choices(limits),
        drafters=drafters,
        shares=shares if "aggregated" not in serving and shares else (None, *shares),
        overlaps=overlaps,
        expert_routing=ask.expert_routing,
        profiles=check_profiles(ask.profiles),
        notes=notes,
        holds_longest=ask.max_model_len is not None,
        routing=routings[0],
        routings=routings if len(routings) > 1 else (),
        sides=sides,
        serving=serving,
        rescheduling=rescheduling,
        handover=times,
        handover_sources=about_handover(ask, kind) if times else (),
    )


def longer(problem: Problem, ask: Ask, times: int) -> Problem | None:
    """The same problem with a trace so many times as long as `--rate` makes it; None without it, or if too long.

    Parameters
    ----------
    problem
    ask : Ask      what was asked
    times : int    how often the trace is repeated
    """
    if ask.rate is None or times * len(problem.trace) > MAX_REQUESTS:
        return None
    trace = _trace(ask)
    loops = times * loops_of(trace)
    return replace(problem, trace=at_rate(trace, ask.rate, loops))


def _trace(ask: Ask) -> Trace:
    """The trace as it is asked for, before it is brought to a rate."""
    load = partial(load_trace, seed=ask.seed, unit=ask.trace_unit, block=ask.trace_block)
    trace = (
        _loaded("trace", ask.trace, Trace, load)
        if isinstance(ask.trace, str | Trace)
        else frame_trace(ask.trace, seed=ask.seed, unit=ask.trace_unit, block=ask.trace_block)
    )
    return trace if trace.timed else replace(trace, arrivals=replace(trace.arrivals, seed=ask.seed))


def _loaded(name: str, given: str | T, kind: type[T], load: Callable[[str], T]) -> T:
    """What a name stands for, or what is given in its place."""
    if isinstance(given, kind):
        return given
    if not isinstance(given, str):
        raise UsageError(f"--{name}: expected a name or a {kind.__name__}, got {given!r:.60}")
    return load(given)


def _about_prefixes(ask: Ask, trace: Trace, routings: Sequence[Routing]) -> tuple[str, ...]:
    """What prefix caching has to say of a trace; refused where what its prompts contain is there but cannot be used."""
    if not ask.prefix_caching:
        return about_blind(routings)
    if trace.content is not None:
        return ()
    if trace.content_fault:
        raise InputError(trace.content_fault)
    return (
        f"--prefix_caching: trace {trace.name:.60} says nothing of what its prompts contain, so none is found in the "
        "cache; a trace with hash_ids does, or a description with prefix=(TOKENS,GROUPS)",
    )


def about_blind(routings: Iterable[Routing]) -> tuple[str, ...]:
    """Of routers before replicas without prefix caches, which of them deal by what these would hold."""
    return tuple(
        f"--routing={name} deals by what caches hold, and they are off, so that nothing is saved; give "
        "--prefix_caching=true"
        for name in dict.fromkeys(routings)
        if name in SEES_PREFIXES
    )


def _seeing(model: Model, trace: Trace) -> Model:
    """The model with what it sees of the traffic: images, whose tower is then served too, and recordings."""
    media, tower = trace.media, model.tower
    if media.audio_s and (tower is None or tower.reads != "audio"):
        raise UsageError(f"--trace: {trace.name:.60} has recordings (audio_s), which {model.name} does not read")
    if media.audio_s and tower is not None and media.audio_s > tower.input_s:
        raise UsageError(
            f"--trace: {trace.name:.60} has recordings of up to {media.audio_s:g} s; {model.name} reads "
            f"{tower.input_s:g} s at once: give a request for each piece"
        )
    if not media.image_share:
        return model
    if tower is None or tower.reads != "images":
        read = "reads no images" if model.tower_heads is None else "has a tower that docs/models.md does not list"
        known = f"{model.name} {read if tower is None else f'reads {tower.reads}'}"
        raise UsageError(
            f"--trace: {trace.name:.60} has images (image_tokens), but {known}; leave image_tokens out to plan for text"
        )
    return replace(model, images=(media.image_tokens, media.image_share))


def _about_images(model: Model) -> tuple[str, ...]:
    """That the time of images is spread over prompts."""
    if model.images is None:
        return ()
    return (
        f"images: {model.images[1]:.0%} of the tokens of prompts; the time of their tower is spread evenly over all "
        "prompts, so that it counts in full, but not request by request",
    )


def _pools(ask: Ask) -> tuple[tuple[Cluster, ...], tuple[Tree | None, ...]]:
    """The cluster of each type of GPU that has any free, with their wiring; None where nodes are alike and all free."""
    wiring, taken = load_wiring(ask.cluster), _taken(ask.cluster, ask.busy, ask.down)
    clusters = load_pools(ask.cluster)
    if isinstance(wiring, Cluster) and not taken:
        return clusters, (None,)
    some = free_types(wiring, taken)
    clusters = tuple(cluster for cluster in clusters if cluster.gpu.name in some) or clusters[:1]
    return clusters, tuple(Tree.of(wiring, taken, cluster.gpu.name) for cluster in clusters)


def tree_beside(ask: Ask, gpus: Sequence[str], types: tuple[str, ...]) -> Tree:
    """The free GPUs of a type but some that another pool has.

    Parameters
    ----------
    ask : Ask
    gpus : names of these
    types : the type, or nothing where there is but one

    Raises
    ------
    UsageError    no GPU is left
    """
    name = types[0] if types else None
    return Tree.of(load_wiring(ask.cluster), _taken(ask.cluster, ask.busy, ask.down) | set(gpus), name)


def _taken(cluster: Wired, busy: str | None, down: str | None) -> set[str]:
    """GPUs that are not to be had."""
    given = [(what, text) for what, text in (("--busy", busy), ("--down", down)) if text is not None]
    topology = load_topology(cluster) if given else None
    return {gpu for what, text in given if topology is not None for gpu in topology.named(text, what)}


def _between(ask: Ask) -> Link | None:
    """The worst link between nodes of a cluster whose GPUs are of several types; None in a single node."""
    taken = _taken(ask.cluster, ask.busy, ask.down)
    top = Tree.of(load_wiring(ask.cluster), taken).levels[-1]
    return slowest(top.reach) if top.far else None
