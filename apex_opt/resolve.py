"""From names and numbers, as a person gives them, to a problem that can be searched."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from apex_opt.arguments import LARGEST_BATCH, Ask
from apex_opt.cluster import Cluster, Tree, assumed_network, free_types, load_pools, load_topology, load_wiring
from apex_opt.cluster.tree import slowest
from apex_opt.cost.engine import load_engine
from apex_opt.engines import ANY, kind_names, load_kind, load_rules
from apex_opt.engines.kinds import COMMON
from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.errors import InputError, UnknownNameError, UsageError
from apex_opt.figures import load_objectives, parse_goals
from apex_opt.ir import KV_BYTES, Model, get_format, load_model
from apex_opt.overlapping import about_overlap, overlaps_of, plans_overlap
from apex_opt.plans.acceptance import check_acceptance, parse_speculation, speculations
from apex_opt.plans.engine import EngineSettings, check_snapshots, check_states
from apex_opt.plans.plan import default_kv_format, foreign_mix
from apex_opt.plans.routing import SEES_PREFIXES
from apex_opt.profiles import check_profiles
from apex_opt.profiles.clock import Clock
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
from apex_opt.workload.columns import MAX_REQUESTS
from apex_opt.workload.steady import at_rate, loops_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from apex_opt.cluster.catalogue import Wired
    from apex_opt.cluster.types import Gpu, Link
    from apex_opt.engines import EngineKind, EngineRules
    from apex_opt.plans.routing import Routing
    from apex_opt.plans.shares import Shares
    from apex_opt.plans.speculation import Drafter, Speculation

T = TypeVar("T")

_CLOCK_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5)  # of the highest, with which `all` stands for six
_CLOCK_STEP = 15  # MHz: GPUs step their clock so


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
        *_about_engines(ask, kind, model),
        *_about_chunks(ask, kind),
        *_about_blocks(ask, kind, model, [cluster.gpu for cluster in clusters]),
        *about_pushing(kind, serving),
        *assumed_network(ask.cluster),
    )
    settings, limits = _settings(ask, kind, model, trace, [cluster.gpu for cluster in clusters])
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
    notes = (*notes, *_about_drafting_seats(ask, drafters))
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
        weight_formats, kv_formats = _formats(ask, model, cluster.gpu)
        offers.append(
            Offer(
                cluster=cluster,
                tree=tree,
                weight_formats=weight_formats,
                kv_formats=kv_formats,
                clocks=_clocks(ask, cluster.gpu),
                notes=tuple(_expanded(weight_formats, cluster.gpu)),
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
        batch_limits=_choices(limits),
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


def _rules(ask: Ask, kind: EngineKind) -> EngineRules | None:
    """What plans are to keep to so that an engine can run them; None where none need be able to."""
    return kind.rules if ask.runnable is None else load_rules(ask.runnable)


def _about_engines(ask: Ask, kind: EngineKind, model: Model) -> tuple[str, ...]:
    """That no engine need be able to run a plan, or that this one's release does not know the model."""
    if ask.runnable == ANY:
        return (f"--runnable={ANY}: plans are told that no engine need be able to start",)
    rules = _rules(ask, kind)
    text = rules.lacking(model.family) if rules is not None else ""
    return (f"runnable: {text}",) if text else ()


def _about_drafting_seats(ask: Ask, drafters: Sequence[Drafter | None]) -> tuple[str, ...]:
    """That SGLang's own limit where drafts are verified was asked for and does nothing."""
    if "drafting_seats" not in (ask.engine_settings or ""):
        return ()
    if not any(drafters) and "spec=" not in str(getattr(ask, "plan", "")):
        return (
            "--engine_settings: drafting_seats has no effect where no drafts are made; --speculation=eagle:3 would "
            "make some",
        )
    if ask.max_num_seqs is not None:
        return ("--engine_settings: drafting_seats has no effect beside --max_num_seqs, which holds with drafts too",)
    return ()


def _about_chunks(ask: Ask, kind: EngineKind) -> tuple[str, ...]:
    """That an engine splits no prompts, where it was asked to."""
    if not ask.chunked_prefill or kind.scheduler.splits_prompts:
        return ()
    return (f"--chunked_prefill=true: {kind.name} computes prompts whole all the same",)


_USUAL_BLOCK: Final = 16
"""Tokens of a block whose multiples the usual attention of vLLM takes."""


def _about_blocks(ask: Ask, kind: EngineKind, model: Model, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """That blocks of unusual sizes are computed by another kernel than the one whose times are known."""
    if ask.block_size is None:
        return ()
    fast = 1 if (rules := _rules(ask, kind)) is None else rules.kernel_block(model, _runs(ask, model, gpus))
    if ask.block_size % fast:
        return (
            f"--block_size={ask.block_size}: the fastest kernels of this attention on these GPUs take multiples of "
            f"{fast} tokens; of others {kind.name} takes slower kernels than the times here are of, or rounds them up",
        )
    # What an engine starts no blocks of is refused plan by plan.
    usual = issubclass(kind.scheduler, VllmScheduling) and "latent" not in model.traits
    if ask.block_size % _USUAL_BLOCK == 0 or not usual:
        return ()
    return (
        f"--block_size={ask.block_size}: vLLM's usual attention takes multiples of {_USUAL_BLOCK} tokens; of others it "
        "falls back to FlexAttention, which is slower than the times here",
    )


_SPLITTING: Final = ("chunked_prefill", "prefix_caching")
"""What engines switch off where an encoder has to see all of a prompt."""


def _settings(
    ask: Ask, kind: EngineKind, model: Model, trace: Trace, gpus: Sequence[Gpu]
) -> tuple[EngineSettings, list[tuple[int, int]]]:
    """Settings of the engine, the widest limits of a batch among them, and the limits to choose from.

    Parameters
    ----------
    ask, kind, model, trace
    gpus : sequence of Gpu    those that there are
    """
    asked = {name: getattr(ask, name) for name in COMMON if getattr(ask, name) is not None}
    common, scheduler = kind.common(min(gpu.memory_bytes for gpu in gpus)) | asked, kind.scheduling(ask.engine_settings)
    if model.sees_whole_prompts:
        for name in _SPLITTING:
            if asked.get(name):
                raise UsageError(f"--{name}=true: {model.name} is an encoder, or has one, which sees all of a prompt")
        common |= dict.fromkeys(_SPLITTING, False)
    if model.encoder is not None and model.images is None and not isinstance(scheduler, VllmScheduling):
        raise UsageError(f"--engine={kind.name}: encoder-decoders such as {model.name} are planned for vllm")
    if model.pools and trace.output.max() > 1:
        raise UsageError(
            f"--trace: {trace.name:.60} asks for up to {trace.output.max()} tokens, but {model.name} answers with a "
            "vector; give an output of 1, which stands for it"
        )
    whole = not scheduler.splits_prompts or not common["chunked_prefill"]
    by_length = whole and scheduler.whole_length
    check_snapshots(scheduler, model)
    longest = ask.max_model_len
    if longest is None:
        # A batch must take the longest prompt whole: no longer than the trace needs, as its time is tabulated.
        longest = min(model.max_position, max(trace.longest, 2)) if by_length else model.max_position
    if longest > model.max_position:
        raise UsageError(
            f"--max_model_len: {longest} is beyond the {model.max_position} positions {model.name} is made for"
        )
    if by_length or not whole:
        least = longest if whole else 0
    else:
        # What gave way comes back with what it has generated.
        least = trace.longest if scheduler.may_preempt else int(trace.prompt.max())
    if isinstance(scheduler, SglangScheduling) and "max_num_seqs" in asked:
        scheduler = replace(scheduler, drafting_seats=0)
    runnable = _rules(ask, kind)
    if runnable is not None and "block_size" not in asked:
        common["block_size"] = runnable.block_size(model, common["block_size"], _runs(ask, model, gpus))
    _check_least(ask, least, splits=scheduler.splits_prompts and not model.sees_whole_prompts)
    limits = _batch_limits(common.pop("max_num_seqs"), common.pop("max_num_batched_tokens"), least)
    _check_own(limits[0], asked, kind)
    settings = EngineSettings(
        **common,
        max_num_seqs=max(seqs for seqs, _ in limits),
        max_num_batched_tokens=max(tokens for _, tokens in limits),
        max_model_len=longest,
        scheduler=scheduler,
        runnable=runnable,
    )
    return settings, limits


def speculation_of(
    ask: Ask, settings: EngineSettings, model: Model, drafters: Sequence[Drafter | None]
) -> tuple[tuple[Speculation, ...], tuple[str, ...]]:
    """What comes of the drafts of each way to make them, and what has to be told of that.

    Parameters
    ----------
    ask, settings, model
    drafters : of which none makes none
    """
    chosen = [drafter for drafter in drafters if drafter is not None]
    if chosen and not settings.scheduler.verifies_drafts:
        raise UsageError(
            f"--speculation={chosen[0]}: drafts are modelled for vLLM, SGLang and TensorRT-LLM, not for {ask.engine}; "
            "use --engine=vllm, --engine=sglang or --engine=trtllm"
        )
    if chosen and settings.runnable not in (None, load_kind(ask.engine).rules):
        raise UsageError(
            f"--speculation={chosen[0]}: drafts are modelled as {ask.engine} makes them, and --runnable={ask.runnable} "
            "asks for plans that another engine can run; leave one of them out"
        )
    for drafter in chosen:
        if drafter.method == "draft" and (rows := load_model(drafter.model).vocab) != model.vocab:
            raise UsageError(
                f"--speculation={drafter}: {drafter.model} has a vocabulary of {rows} tokens and {model.name} of "
                f"{model.vocab}; a draft model has that of the model"
            )
    drafting, notes = speculations(model, drafters, ask.acceptance)
    between = [of.method for of in drafting if not of.rules.forms_ahead]
    if ask.async_scheduling and between and settings.scheduler.waits_for_host:
        notes = (
            *notes,
            f"--async_scheduling=true: {between[0]} makes its drafts on the host, between two batches, so plans with "
            "them form no batch ahead",
        )
    return drafting, notes


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


def _clocks(ask: Ask, gpu: Gpu) -> tuple[int | None, ...]:
    """Clocks to choose from; the highest is None, which needs no law."""
    if ask.clock is None:
        return (None,)
    if ask.clock.strip().lower() == "all":
        if gpu.clock_mhz is None:
            raise UsageError(f"--clock: the highest clock of {gpu.name} is not stated; give gpu.clock_mhz")
        return (None, *(round(gpu.clock_mhz * share / _CLOCK_STEP) * _CLOCK_STEP for share in _CLOCK_SHARES))
    clocks: list[int | None] = []
    for text in ask.clock.split(","):
        if not re.fullmatch(r"[0-9]{1,5}", text.strip()):
            raise UsageError(
                f"--clock: {text.strip()[:20]!r} is no clock in MHz; e.g. --clock=1200,1600 or --clock=all"
            )
        mhz = int(text)
        Clock.of(gpu, mhz)
        clocks.append(None if mhz == gpu.clock_mhz else mhz)
    if len(set(clocks)) < len(clocks):
        raise UsageError(f"--clock: {ask.clock!r:.60} names a clock twice")
    return tuple(clocks)


def _batch_limits(
    seqs: int | tuple[int, ...], tokens: int | tuple[int, ...], least_tokens: int
) -> list[tuple[int, int]]:
    """Pairs of limits of a batch to choose from, those without room for a token of every sequence left out.

    Where prompts are not split a batch must take the longest one, so the engine's own limit on tokens is no less.

    Parameters
    ----------
    seqs, tokens : one limit or several
    least_tokens : int    that a batch must take
    """
    if least_tokens > LARGEST_BATCH:
        raise UsageError(
            f"--chunked_prefill=false: a batch would have to take a prompt of {least_tokens} tokens whole, the limit "
            f"is {LARGEST_BATCH}; pass --max_model_len={LARGEST_BATCH} or less, or chunk"
        )
    all_seqs = _several(seqs)
    all_tokens = tuple(dict.fromkeys(max(limit, least_tokens) for limit in _several(tokens)))
    pairs = [(one, limit) for one in all_seqs for limit in all_tokens]
    # With no pair left the settings say what is wrong with the widest.
    return [pair for pair in pairs if pair[0] <= pair[1]] or [(min(all_seqs), max(all_tokens))]


def _check_least(ask: Ask, least: int, *, splits: bool) -> None:
    """Refuse limits on the tokens of a batch that were asked for and have no room for a whole prompt.

    Parameters
    ----------
    ask
    least : int      tokens that a batch must take; more than 0 where prompts are not split
    splits : bool    whether prompts could be split
    """
    asked = () if ask.max_num_batched_tokens is None else _several(ask.max_num_batched_tokens)
    for limit in asked:
        if limit < min(least, LARGEST_BATCH):
            typed = "leave --chunked_prefill=false out" if ask.chunked_prefill is False else "--chunked_prefill=true"
            more = f", or {typed}" if splits else ""
            raise UsageError(
                f"--max_num_batched_tokens: {limit} has no room for the {least} tokens that a batch must take here, as "
                f"prompts are not split; give {least} or more{more}"
            )


def _check_own(limits: tuple[int, int], asked: Mapping[str, object], kind: EngineKind) -> None:
    """Refuse limits of a batch that contradict each other where one of them is the engine's own.

    Parameters
    ----------
    limits : of sequences and of tokens
    asked : by name, what was given
    kind
    """
    seqs, tokens = limits
    if seqs <= tokens or ("max_num_seqs" in asked) == ("max_num_batched_tokens" in asked):
        return
    own = f", the default of {kind.name},"
    first, second = ("", own) if "max_num_batched_tokens" in asked else (own, "")
    way_out = f"--max_num_seqs={tokens} or less" if second else f"--max_num_batched_tokens={seqs} or more"
    raise UsageError(
        f"max_num_batched_tokens {tokens}{first} is below max_num_seqs {seqs}{second.removesuffix(',')}: every running "
        f"sequence may want a token in one batch; give {way_out}"
    )


def _choices(limits: list[tuple[int, int]]) -> tuple[tuple[int | None, int | None], ...]:
    """Limits as plans name them: only where there is a choice."""
    some_seqs, some_tokens = (len(set(column)) > 1 for column in zip(*limits, strict=True))
    return tuple((seqs if some_seqs else None, tokens if some_tokens else None) for seqs, tokens in limits)


def _several(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)


def _expanded(names: tuple[str, ...], gpu: Gpu) -> Iterator[str]:
    """Formats that a GPU has no arithmetic for, and so reads narrow and multiplies in 16 bits."""
    for name in names:
        whole = get_format(name)
        for form in whole.mixed or (whole,):
            used = form.computed(gpu.supports)
            if used is not None and used is not form:
                yield (
                    f"{gpu.name} has no {form.hardware_dtype} arithmetic: weights in {form.name} are expanded to "
                    f"{gpu.half_dtype}, and cost as {used.name}"
                )


def _runs(ask: Ask, model: Model, gpus: Sequence[Gpu]) -> set[tuple[float | None, str]]:
    """The compute capabilities and formats of a KV cache that a question offers."""
    return {(gpu.capability, kv) for gpu in gpus for kv in _formats(ask, model, gpu)[1]}


def _formats(ask: Ask, model: Model, gpu: Gpu) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Weight formats to choose from, each with its KV format."""
    if ask.weights is None:
        # A 16-bit model runs in whichever 16-bit type the GPU has.
        own = model.weight_format
        names: tuple[str, ...] = (own if own not in ("bf16", "fp16") or gpu.supports(own) else gpu.half_dtype,)
    else:
        names = tuple(get_format(name.strip()[:60]).name for name in ask.weights.split(","))
        if len(set(names)) < len(names):
            raise UsageError(f"--weights: {ask.weights!r:.60} names a format twice")
        for fault in filter(None, (foreign_mix(name, model) for name in names)):
            raise UsageError(f"--weights: {fault}")
    if ask.kv is None:
        return names, tuple(model.kv_format or default_kv_format(name) for name in names)
    kv = ask.kv.strip().lower()
    if "," in kv:
        raise UsageError(
            f"--kv: {ask.kv!r:.60} names several formats, and it takes one of {', '.join(KV_BYTES)}; ask once for each"
        )
    if kv not in KV_BYTES:
        raise UnknownNameError("KV format", ask.kv[:60], KV_BYTES)
    return names, (kv,) * len(names)
