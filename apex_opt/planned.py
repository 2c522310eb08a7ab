"""From a plan as text, or several, to problems and deployments."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import TYPE_CHECKING

from apex_opt.arguments import Ask, Setup, SimulateAsk
from apex_opt.drafting import speculation_of
from apex_opt.engines import load_kind
from apex_opt.errors import UsageError
from apex_opt.measured.clients import Deployed
from apex_opt.plans.deployment import parse_deployment
from apex_opt.plans.plan import default_kv_format
from apex_opt.resolve import about_blind, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.arguments import PlaceAsk
    from apex_opt.plans.deployment import Deployment, Pool
    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.plan import Plan
    from apex_opt.plans.speculation import Drafter
    from apex_opt.search import Offer, Problem
    from apex_opt.workload import Trace


def resolve_plan(text: str, ask: Ask, *, rated: bool = False, ran: bool = False) -> tuple[Problem, Deployment]:
    """A deployment from its text form, and the problem it answers; formats it does not name are those asked for.

    Parameters
    ----------
    text : str      as it was given
    ask : Ask       what was asked
    rated : bool    whether a rate is asked for, rather than that of the trace
    ran : bool      whether it ran and was measured, so that it may be what the search does not look for

    Raises
    ------
    ApexError    as `resolve` and `planned`
    """
    return planned(text, ask, resolve(ask, rated=rated), ran=ran)


def resolve_deployed(setup: Setup, text: str) -> Deployed:
    """What ran while a client measured: the setup of an engine, and the plan of a text.

    Raises
    ------
    ApexError    as `resolve_plan`, and where it goes on several types of GPU
    """
    given = {field.name: getattr(setup, field.name) for field in fields(Setup)}

    def asked(trace: str | Trace) -> tuple[Problem, Deployment]:
        return resolve_plan(text, SimulateAsk(**given, plan=text, trace=trace), ran=True)

    problem, deployment = asked("static:n=1,prompt=16,output=2")
    if problem.several or not isinstance(setup.cluster, str) or not isinstance(setup.model, str):
        raise UsageError(
            "--plan: a measured run is of one plan on GPUs of one type, with a model and a cluster by name"
        )

    if deployment.plan.shares is not None:
        raise UsageError(
            f"--plan: share={deployment.plan.shares} computes both phases side by side, and measured runs are held "
            "against batches of both; leave it out"
        )

    def settings(trace: Trace) -> EngineSettings:
        sent = trace if trace.timed or trace.concurrency else f"static:n=1,prompt={trace.longest},output=1"
        return asked(sent)[0].settings

    plan = str(deployment.pools[0].plan)
    return Deployed(
        model=setup.model,
        cluster=setup.cluster,
        plan=plan,
        engine=setup.engine,
        sweep=f"{problem.model.name} {problem.cluster.name} {problem.overhead.name} {plan}",
        settings=settings,
    )


def resolve_plans(texts: Sequence[str], ask: Ask) -> tuple[tuple[Problem, Deployment], ...]:
    """Several deployments from their texts, each with its problem, as `resolve_plan`; none is given twice."""
    problem = resolve(ask)
    asked = tuple(planned(text, ask, problem) for text in texts)
    for place, (_, deployment) in enumerate(asked):
        if any(deployment == other for _, other in asked[:place]):
            raise UsageError(
                f"--plan: {texts[place]!r:.60} is {deployment}, which is given before; give each plan once"
            )
    return asked


def planned(text: str, ask: Ask, problem: Problem, *, ran: bool = False) -> tuple[Problem, Deployment]:
    """A deployment from its text form, on the GPUs of a problem, and the problem with its formats alone.

    Parameters
    ----------
    text : str    as it was given
    ask : Ask     what was asked
    problem
    ran : bool    whether it ran and was measured

    Raises
    ------
    UsageError    a plan that cannot be read, or that does not say which of several formats, clocks or limits it has
    """
    deployment = parse_deployment(text, problem.model, problem.types)
    pools, offers = [], {offer.name: offer for offer in problem.offers}
    for pool in deployment.pools:
        if not ran:
            _check_copies(pool.plan, text)
        if pool.plan.on and not problem.mixed:
            raise UsageError(
                f"plan {text!r}: on= puts stages on several types of GPU, and {problem.cluster.name} has one; leave it "
                "out"
            )
        for name in pool.types or problem.types:
            plan = _completed(pool, text, ask, problem, offers[name])
            offers[name] = replace(offers[name], weight_formats=(plan.weight_format,), kv_formats=(plan.kv_format,))
        if pool.role is not None and plan.speculation is not None:
            raise UsageError(
                f"plan {text!r:.100}: drafts are not simulated where prompts are handed over; leave spec= out"
            )
        pools.append(replace(pool, plan=plan))
    if problem.rescheduling is not None and (len(pools) > 1 or pools[0].plan.replicas == 1):
        raise UsageError(
            f"--rescheduling: requests move between the replicas of a plan, and {text!r:.60} is not one plan of several"
        )
    named = tuple(dict.fromkeys(pool.plan.speculation for pool in pools))
    load_kind(ask.engine).check_drafting(drafts=None not in named, ahead=ask.async_scheduling)
    if named != problem.drafters:
        problem = _drafting(named, ask, problem)
    blind = () if ask.prefix_caching else about_blind(pool.plan.route for pool in pools if pool.plan.route is not None)
    notes = tuple(dict.fromkeys((*problem.notes, *blind)))
    problem = replace(problem, offers=tuple(offers.values()), batch_limits=((None, None),), notes=notes)
    return problem, replace(deployment, pools=tuple(pools))


def _check_copies(plan: Plan, text: str) -> None:
    """Refuse copies of the whole model that are not written as replicas, which is what the search knows them as."""
    attention, ffn = plan.attention, plan.ffn
    if (copies := math.gcd(attention.dp, ffn.dp)) > 1:
        apart = replace(
            plan,
            replicas=plan.replicas * copies,
            attention=replace(attention, dp=attention.dp // copies),
            ffn=replace(ffn, dp=ffn.dp // copies),
        )
        raise UsageError(
            f"plan {text!r:.100}: attention dp{attention.dp} and FFN dp{ffn.dp} are {copies} copies of the whole, "
            f"which are replicas; write {apart}"
        )


def _drafting(named: tuple[Drafter | None, ...], ask: Ask, problem: Problem) -> Problem:
    """The problem with the drafts of a plan alone: what comes of them is as in the choice that was asked for."""
    chosen = [drafter for drafter in named if drafter is not None]
    if not any(problem.drafters):
        drafting, notes = speculation_of(ask, problem.settings, problem.model, named)
        notes = (*problem.notes, *notes)
    else:
        if unasked := [drafter for drafter in chosen if drafter not in problem.drafters]:
            raise UsageError(
                f"plan: spec={unasked[0]} is not among --speculation={ask.speculation:.60}, of whose drafts "
                f"--acceptance is; give --speculation={unasked[0]}"
            )
        drafting = tuple(its for its in problem.settings.drafting if its.drafter in chosen)
        notes = problem.notes
        if ask.acceptance is None:
            told = speculation_of(ask, problem.settings, problem.model, problem.drafters)[1]
            own = speculation_of(ask, problem.settings, problem.model, named)[1]
            notes = (*(note for note in notes if note not in told), *own)
    settings = replace(problem.settings, drafting=drafting)
    return replace(problem, settings=settings, drafters=named, notes=notes)


def _completed(pool: Pool, text: str, ask: Ask, problem: Problem, offer: Offer) -> Plan:
    """The plan of a pool with the formats, the clock and the drafts that its text does not name: those asked for."""
    plan = pool.plan
    words = text.lower().replace("{", " ").replace("}", " ").split()
    _check_named(plan, words, ask, problem, offer)
    weights = plan.weight_format if plan.weight_format in words else offer.weight_formats[0]
    if any(word.startswith("kv=") for word in words):
        kv = plan.kv_format
    elif ask.kv is None and weights != offer.weight_formats[0]:
        kv = problem.model.kv_format or default_kv_format(weights)
    else:
        kv = offer.kv_formats[0]
    clock = plan.clock_mhz
    if clock is None and None not in offer.clocks:  # as answers do, a plan names no clock where it is the highest
        (clock,) = offer.clocks
    drafter = plan.speculation
    # A plan names its drafts, if any, as answers do; it takes those that every plan of the question has.
    if drafter is None and "spec=none" not in words and None not in problem.drafters:
        if len(problem.drafters) > 1:
            raise UsageError(
                f"--speculation: {ask.speculation!r:.60} is a choice; one plan makes drafts in one way: name it as "
                f"spec={problem.drafters[0]}, or as spec=none"
            )
        (drafter,) = problem.drafters
    overlap = plan.overlap
    if overlap is None and "overlap=none" not in words and None not in problem.overlaps:
        (overlap,) = problem.overlaps
    routers = problem.routers(pool.role) if plan.replicas > 1 else ()
    if len(routers) > 1 and plan.route is None:
        raise UsageError(f"--routing: {ask.routing!r:.60} is a choice; one plan has one router (route=)")
    route = plan.route or (routers[0] if routers else None)
    return replace(
        plan,
        weight_format=weights,
        kv_format=kv,
        clock_mhz=clock,
        speculation=drafter,
        overlap=overlap,
        route=route,
    )


def _check_named(plan: Plan, words: Sequence[str], ask: Ask, problem: Problem, offer: Offer) -> None:
    """Refuse a plan that does not say which of several formats, clocks or limits is its own.

    Parameters
    ----------
    plan
    words : those of its text, in lower case
    ask, problem, offer

    Raises
    ------
    UsageError
    """
    seqs, tokens = problem.batch_limits[0]  # None where there is no choice
    formats, clocks = offer.weight_formats, offer.clocks
    unnamed = {
        ("weights", formats[0]): len(formats) > 1 and plan.weight_format not in words,
        ("clock", f"clock={clocks[0]}"): len(clocks) > 1 and plan.clock_mhz is None and None not in clocks,
        ("max_num_seqs", f"seqs={seqs}"): seqs is not None and plan.max_num_seqs is None,
        ("max_num_batched_tokens", f"tokens={tokens}"): tokens is not None and plan.max_num_batched_tokens is None,
    }
    for option, named in (key for key, missing in unnamed.items() if missing):
        given = getattr(ask, option)
        told = given if isinstance(given, str) else ",".join(map(str, given))
        raise UsageError(
            f"--{option}={told:.60} is a choice, and one plan has one of these: give one, or name it in the plan, as "
            f"{named}"
        )


def resolve_place(given: PlaceAsk) -> tuple[tuple[Problem, Plan], ...]:
    """A plan to be placed, for each type of GPU, with the problem it would answer: only what is `given` matters of it.

    Of several types of GPU the plan may name the one that it goes on. The KV cache must hold one request of
    `max_model_len` where that is given, else a token.

    Raises
    ------
    ApexError    as `resolve_plan`, and where it goes on several types
    """
    setup = {field.name: getattr(given, field.name) for field in fields(Setup)}
    # Where ranks lie does not depend on how many drafts are right.
    if "{" in given.plan:
        raise UsageError(f"plan {given.plan!r:.100}: place is of one plan; place that of each pool by itself")
    acceptance = "1" if "spec=" in given.plan else None
    trace = f"static:n=1,prompt={(given.max_model_len or 2) - 1},output=1"
    ask = SimulateAsk(**setup, plan=given.plan, trace=trace, acceptance=acceptance)
    problem = resolve(ask)
    places: Sequence[int] = range(len(problem.offers))
    if problem.mixed and ":" in given.plan:
        (pool, *more) = parse_deployment(given.plan, problem.model, problem.types).pools
        if more or pool.plan.on:
            raise UsageError(
                f"--plan: {given.plan!r:.100} is on several types of GPU, and place takes a plan on one; place each of "
                f"{' and '.join(problem.types)} by itself, or see where all go with solve.py plan or simulate"
            )
        places = [problem.types.index(pool.types[0])]
    alone = (planned(given.plan, ask, problem.alone(place)) for place in places)
    return tuple((own, deployment.plan) for own, deployment in alone)
