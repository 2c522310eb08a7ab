"""Answers as documents: what `--format json` prints and what the tables are made from."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from apex_opt.cluster import DTYPES
from apex_opt.engines import ANY
from apex_opt.figures.registry import figure, per_run
from apex_opt.report import types
from apex_opt.report.expected import doubts, expected_document, near_goals, untold_errors
from apex_opt.report.load import loaded, transient_document
from apex_opt.report.types import LedgerPart
from apex_opt.schema import of
from apex_opt.units import NS_PER_MS, add_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.cluster.types import Cluster, Gpu
    from apex_opt.figures import Objective
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.plan import Plan
    from apex_opt.report import listed
    from apex_opt.search import Answer, Ledger, Offer, Part, PoolUse, Problem, Scored
    from apex_opt.search.answer import PriorityUse
    from apex_opt.studies.check import Check

_LIMITS: Final = ("max_num_seqs", "max_num_batched_tokens")
_ALONE: Final = (types.Candidate, types.AloneRun)


def answer_document(
    command: str,
    problem: Problem,
    answer: Answer,
    provenance: Mapping[str, object],
    top: int = 1,
    kinds: tuple[type[types.Searched], type[types.Searched]] = (types.Answer, types.MixedAnswer),
    **more: Any,
) -> types.Searched:
    """An answer and everything it depends on; latencies in seconds, sizes in bytes, energy in joules, costs in $.

    Parameters
    ----------
    command : str
    problem, answer : as asked and answered
    provenance : where the figures come from, per operation; of several types of GPU by type
    top : int         candidates to show
    kinds : types of the document, with one type of GPU and with several
    more : what a document of these types holds besides
    """
    best = answer.best
    first, *then = (objective_document(objective, best) for objective in problem.objectives)
    if problem.several:
        alone = (
            s and best and scored_document(problem, s, _ALONE, loss=loss_to(problem, s, best)) for s in answer.alone
        )
        more["alone"] = tuple(alone)
    more |= {
        "best": best and scored_document(problem, best),
        "candidates": [scored_document(problem, scored) for scored in answer.candidates[:top]],
        "provenance": provenance,
        "expected": best and expected_document(problem, best),
        "near_goals": near_goals(problem, best) if best else (),
        "doubts": (*doubts(problem), *(untold_errors(problem, best) if best else ())),
    }
    return kinds[problem.several](
        command=command,
        status=answer.status,
        objective=first,
        then=tuple(then),
        reason=answer.reason,
        question=question_document(problem),
        notes=problem.remarks,
        **loaded(problem, best),
        **ledger_document(problem, answer.ledger),
        **more,
    )


def ledger_document(problem: Problem, ledger: Ledger) -> dict[str, Any]:
    """Why nothing else wins: of one type of GPU a certificate; of several one for every part, and of all together."""
    if not problem.several:
        return {"certificate": part_document(ledger.parts[0])}
    shapes = {"certificates": ("single", "mixed"), "pipelines": ("pipeline",), "pools": ("pools",)}
    parts: dict[str, Any] = {
        name: [part_document(part, types=part.types) for part in ledger.parts if part.shape in some]
        for name, some in shapes.items()
    }
    if not parts["pools"]:
        del parts["pools"]
    return {"optimal": ledger.optimal, "gap": ledger.gap, **parts}


def part_document(part: Part, types: tuple[str, ...] | None = None) -> LedgerPart:
    """What became of the deployments of a part; bounds in the unit of its first objective."""
    told = part.last is not None and part.least is not None
    return of(
        LedgerPart,
        part,
        types=types,
        left=part.waiting,
        least_bound=part.objective.signed(part.least[0]) if told and part.least else None,
        incumbent=part.objective.signed(part.last[0]) if told and part.last else None,
        before=[part_document(before) for before in part.before],
    )


def objective_document(objective: Objective, best: Scored | None) -> types.Objective:
    """An objective and what the best plan reaches, in its unit; plans within the tolerance, a share, count as equal."""
    return of(
        types.Objective,
        objective,
        direction="maximise" if objective.maximise else "minimise",
        value=None if best is None else objective.value(best.metrics),
    )


def replayed(check: Check) -> types.Replay:
    """The replay of a certificate; of several types of GPU also part by part."""
    parts = [of(types.ReplayedPart, part) for part in check.parts] if len(check.parts) > 1 else None
    return of(types.Replay, check, parts=parts)


def beside_document(saved: Scored, problem: Problem, answer: Answer) -> types.Beside:
    """What another problem prefers beside an answer on energy, and the share of its energy that is saved.

    Parameters
    ----------
    saved : Scored    the answer on energy
    problem, answer
    """
    other = answer.best
    assert other is not None
    return types.Beside(
        objective=problem.objective.name,
        best=scored_document(problem, other),
        energy_saving=1 - saved.metrics.value("energy") / other.metrics.value("energy"),
        **({} if problem.several else ledger_document(problem, answer.ledger)),
    )


def scored_document(
    problem: Problem,
    scored: Scored,
    kinds: tuple[type[types.Candidate], type[types.MixedRun]] = (types.Candidate, types.MixedRun),
    **more: Any,
) -> types.Candidate | types.MixedRun:
    """A simulated deployment; latencies in seconds, energy in joules, memory in bytes.

    Where there are several types of GPU, what is told of a GPU is told pool by pool, as `parts`.

    Parameters
    ----------
    problem, scored
    kinds : types of the document, with one type of GPU and with several
    more : what a document of these types holds besides
    """
    bound = scored.bound
    if problem.several:
        own: dict[str, Any] = {"parts": [_pool_document(problem, use, scored.requests) for use in scored.pools]}
    else:
        own = {"memory": memory_document(scored.plan, scored.only.memory)}
    return kinds[problem.several](
        plan=scored.text,
        gpus=scored.devices,
        value=scored.value,
        then=tuple(objective.value(scored.metrics) for objective in problem.then),
        bound=-bound if bound is not None and problem.objective.maximise else bound,
        metrics=metrics_document(problem, scored),
        **own,
        **more,
    )


def _pool_document(problem: Problem, use: PoolUse, requests: int) -> types.Part:
    plan = use.pool.plan
    return of(
        types.Part,
        use,
        use.usage,
        gpu=" + ".join(use.pool.types or problem.types),
        role=use.pool.role,
        plan=str(plan),
        gpus=plan.devices,
        share=use.requests / requests,
        memory=memory_document(plan, use.memory),
    )


def loss_to(problem: Problem, scored: Scored, best: Scored) -> float | None:
    """What a deployment loses to the best by the first objective, as a share of what that one reaches.

    Parameters
    ----------
    problem, scored, best
    """
    cost, least = (problem.objective.signed(one.value) for one in (scored, best))
    return (cost - least) / abs(least) if least else None


def metrics_document(problem: Problem, run: Scored) -> types.Metrics:
    """What the requests of a run saw, and what it took; figures in their units, those known and not to be left out."""
    metrics, names = run.metrics, {name for use in run.pools for name in use.pool.types}
    offers = [place for place, name in enumerate(problem.types) if not names or name in names]
    tells_cost = all(problem.alone(place).tells_cost for place in offers)
    told = (one for one in per_run() if one.name in metrics.figures and (tells_cost or not one.priced))
    figures: dict[str, Any] = {figure(name).key: statistics for name, statistics in metrics.latency_s.items()}
    figures |= {one.key: metrics.figures[one.name] for one in told}
    named = {field.name for field in fields(types.Metrics)}
    if problem.settings.prefix_caching:
        figures |= {"cached_tokens": metrics.cached_tokens, "cache_hit_rate": metrics.cached_share}
    if not problem.several:
        usage = run.only.usage
        figures |= {"mfu": usage.mfu, "mbu": usage.mbu, "operations_s": usage.operations_s}
    return types.Metrics(
        transient=transient_document(types.Transient, run.transient),
        output_tokens_per_s=metrics.output_tokens_per_s,
        total_tokens_per_s=metrics.total_tokens_per_s,
        slo={
            slo.text: types.Goal(
                met=metrics.slo_met[slo.text],
                reached=slo.reached(metrics),
                attainment=metrics.attainment[slo.text],
                unit="share" if slo.fraction is not None else slo.unit,
            )
            for slo in problem.slos
        },
        idle_energy_j=add_up(use.usage.idle_energy_j for use in run.pools),
        mean_power_w=metrics.value("energy") / metrics.value("makespan"),
        preemptions=sum(use.preemptions for use in run.pools),
        batches=sum(use.batches for use in run.pools),
        moved=run.moved,
        priorities=tuple(map(_priority, run.priorities)) or None,
        handover=None if run.handover_s is None else _handed(run.handover_s),
        **{name: value for name, value in figures.items() if name in named},
        further={name: value for name, value in figures.items() if name not in named},
    )


def memory_document(plan: Plan, memory: Sequence[StageMemory]) -> list[types.Memory]:
    """Memory of a GPU of each stage, in bytes."""
    return [of(types.Memory, stage, layers=layers) for layers, stage in zip(plan.layers, memory, strict=True)]


def question_document(problem: Problem, arrivals: str | None = None) -> types.QuestionFacts:
    """What was asked, in the names and numbers that were understood.

    Of several types of GPU each is among the cluster's `pools`, with the formats and clocks to choose from on it.

    Parameters
    ----------
    problem
    arrivals : str or None    how requests come where rates are looked for
    """
    alone, runnable = [problem.alone(place) for place in range(len(problem.offers))], problem.settings.runnable
    name, choices = problem.offers[0].cluster.name, dict[str, Any]()
    trace: dict[str, Any] = problem.trace.summary()
    if problem.several:
        pools = tuple(types.PoolFacts(**_offered(one), **_choices(one.offer)) for one in alone)
        cluster: Any = types.MixedFacts(name=name, gpus=sum(pool.gpus for pool in pools), pools=pools)
    else:
        cluster, choices = types.ClusterFacts(name=name, **_offered(problem)), _choices(problem.offer)
    return types.QuestionFacts(
        model=of(types.ModelFacts, problem.model),
        cluster=cluster,
        trace=types.TraceFacts(**trace),
        slo=tuple(slo.text for slo in problem.slos),
        vacuous_slo=tuple(slo.text for slo in problem.vacuous),
        batch_limits=tuple(dict(zip(_LIMITS, pair, strict=True)) for pair in problem.batch_limits),
        speculation=_drafts(problem) if any(problem.drafters) else None,
        engine=of(
            types.EngineFacts,
            problem.settings,
            problem.settings.scheduler,
            name=problem.overhead.name,
            policy=problem.settings.scheduler.name,
            runnable=ANY if runnable is None else runnable.name,
            routing=_routers(problem),
            expert_routing=problem.expert_routing,
        ),
        serving=None if problem.serving == ("aggregated",) else problem.serving,
        shares=tuple(None if one is None else str(one) for one in problem.shares) if any(problem.shares) else None,
        overlap=problem.overlaps if any(problem.overlaps) else None,
        rescheduling=_moving(problem),
        handover=of(types.HandoverFacts, problem.handover) if problem.handover else None,
        arrivals=arrivals,
        **choices,
    )


def _routers(problem: Problem) -> str:
    """Routers to choose from; before prefill and decode instances with a / between them, where these are not alike."""
    first, then = problem.sides
    if problem.serving == ("pools",) and first != then:
        return f"{','.join(first)}/{','.join(then)}"
    return ",".join(problem.routings) or problem.routing


def _priority(use: PriorityUse) -> types.PriorityFigures:
    """What the requests of one priority saw."""
    seen: dict[str, Any] = {figure(name).key: statistics for name, statistics in use.latency_s.items()}
    return types.PriorityFigures(name=use.name, requests=use.requests, preemptions=use.preemptions, **seen)


def _handed(parts: Mapping[str, Mapping[str, float]]) -> types.HandedFigures:
    """What first tokens take whose prompts are handed over."""
    seen: dict[str, Any] = {f"{part}_s": statistics for part, statistics in parts.items()}
    return types.HandedFigures(**seen)


def _moving(problem: Problem) -> types.ReschedulingFacts | None:
    """How requests move between replicas."""
    rules = problem.rescheduling
    if rules is None:
        return None
    return types.ReschedulingFacts(
        rules="llumnix",
        period_ms=rules.period_ns / NS_PER_MS,
        out_below=float(rules.out_below),
        in_from=float(rules.in_from),
        headroom=rules.headroom,
        draining=tuple(sorted(rules.draining)),
    )


def _drafts(problem: Problem) -> tuple[types.DraftFacts, ...]:
    """Ways to make drafts to choose from."""
    means = {str(its.drafter): its.mean for its in problem.settings.drafting}
    names = ["none" if drafter is None else str(drafter) for drafter in problem.drafters]
    return tuple(types.DraftFacts(drafts=name, tokens=means.get(name, 1.0)) for name in names)


def _offered(problem: Problem) -> dict[str, Any]:
    """The GPUs of the only type of a problem."""
    cluster = problem.cluster
    price = cluster.gpu.price_per_h if problem.tells_cost else None
    told = {"gpus": cluster.size, "offered": problem.max_devices, "gpu": cluster.gpu.name}
    return told | {"usd_per_gpu_h": price}


def _choices(offer: Offer) -> dict[str, Any]:
    """What there is to choose from; null is the highest clock, or the limit among the engine's settings."""
    return {"weights": offer.weight_formats, "kv": offer.kv_formats, "clocks_mhz": offer.clocks}


def cluster_row(cluster: Cluster) -> listed.ListedCluster:
    """A node for the list of clusters: its accelerator, and the link within the node."""
    from apex_opt.report import listed

    gpu, flops = cluster.gpu, dict(cluster.gpu.flops_per_s)
    return of(
        listed.ListedCluster,
        gpu,
        cluster=cluster.name,
        gpu=gpu.name,
        gpus=cluster.size,
        **{f"{dtype}_flops_per_s": flops.get(dtype) for dtype in DTYPES},
        link=cluster.intra.kind,
        link_bytes_per_s=cluster.intra.bytes_per_s,
        usd_per_gpu_h=gpu.price_per_h,
        profile=_tables(gpu),
        sources=dict(gpu.sources),
    )


def _tables(gpu: Gpu) -> str:
    """Whose measured tables an accelerator's times are from."""
    if gpu.profile:
        return f"measured (profiles/{gpu.profile})"
    kernels = "" if gpu.cuda else "; no engine's kernels are known for it"
    return f"derived from the datasheet, efficiencies of profiles/{gpu.like}{kernels}"
