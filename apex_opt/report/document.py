"""Answers as plain data: what `--format json` prints and what the tables are made from."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apex_opt import __version__
from apex_opt.cluster import DTYPES
from apex_opt.engines import ANY
from apex_opt.figures.registry import figure, per_run
from apex_opt.report.load import loaded, transient_document

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from apex_opt.cluster.types import Cluster, Gpu
    from apex_opt.figures import Objective
    from apex_opt.ir.model import Model
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.plan import Plan
    from apex_opt.schema import Document
    from apex_opt.search import Answer, Ledger, Part, PoolUse, Problem, Scored
    from apex_opt.studies.check import Check
    from apex_opt.workload.trace import Trace


def answer_document(
    command: str, problem: Problem, answer: Answer, provenance: Mapping[str, object], top: int = 1
) -> Document:
    """An answer and everything it depends on; latencies in seconds, sizes in bytes, energy in joules, costs in $.

    Parameters
    ----------
    command : str
    problem, answer : as asked and answered
    provenance : where the figures come from, per operation; of several types of GPU by type
    top : int         candidates to show
    """
    best = answer.best
    first, *then = (objective_document(objective, best) for objective in problem.objectives)
    alone: Document = {}
    if problem.mixed:
        alone = {
            "alone": [
                scored and best and scored_document(problem, scored) | {"loss": _loss(problem, scored, best)}
                for scored in answer.alone
            ]
        }
    document = cleaned(
        {
            "command": command,
            "status": answer.status,
            "objective": first,
            "then": then,
            "reason": answer.reason,
            "best": scored_document(problem, best) if best else None,
            **alone,
            "candidates": [scored_document(problem, scored) for scored in answer.candidates[:top]],
            **ledger_document(problem, answer.ledger),
            "question": question_document(problem),
            "provenance": provenance,
            "version": __version__,
        }
    )
    return noted(loaded(document, problem, best), problem.remarks)


def ledger_document(problem: Problem, ledger: Ledger) -> Document:
    """Why nothing else wins: of one type of GPU a certificate; of several one for every part, and of all together."""
    if not problem.mixed:
        return {"certificate": part_document(ledger.parts[0])}
    certificates, pipelines = (
        [{"types": list(part.types), **part_document(part)} for part in ledger.parts if part.shape in shapes]
        for shapes in (("single", "mixed"), ("pipeline",))
    )
    return {"optimal": ledger.optimal, "gap": ledger.gap, "certificates": certificates, "pipelines": pipelines}


def part_document(part: Part) -> Document:
    """What became of the deployments of a part; bounds in the unit of its first objective."""
    told = part.last is not None and part.least is not None
    return {
        "space": part.space,
        "infeasible": part.infeasible,
        "bounded": part.bounded,
        "simulated": part.simulated,
        "cut_short": part.cut_short,
        "missed": part.missed,
        "optimal": part.optimal,
        "gap": part.gap,
        "left": part.waiting,
        "repeated": part.repeated,
        "out_of_reach": part.out_of_reach,
        "least_bound": part.objective.signed(part.least[0]) if told and part.least else None,
        "incumbent": part.objective.signed(part.last[0]) if told and part.last else None,
        "before": [part_document(before) for before in part.before],
    }


def noted(document: Document, notes: Iterable[str]) -> Document:
    """An answer with what its reader has to know besides, after what it tells already; no note is told twice.

    Parameters
    ----------
    document
    notes : one sentence each, without the full stop, as `Problem.notes`
    """
    return document | {"notes": list(dict.fromkeys((*document.get("notes", ()), *notes)))}


def objective_document(objective: Objective, best: Scored | None) -> Document:
    """An objective and what the best plan reaches, in its unit; plans within the tolerance, a share, count as equal."""
    return {
        "name": objective.name,
        "unit": objective.unit,
        "direction": "maximise" if objective.maximise else "minimise",
        "tolerance": objective.tolerance,
        "value": None if best is None else objective.value(best.metrics),
    }


def checked(document: Document, check: Check) -> Document:
    """An answer with the replay of its certificate; of several types of GPU also part by part."""
    counts = ("space", "infeasible", "repeated", "simulated")
    found = {name: getattr(check, name) for name in (*counts, "meeting", "disagreements", "holds")}
    if len(check.parts) > 1:
        parts = [{name: getattr(part, name) for name in ("shape", "types", *counts)} for part in check.parts]
        found |= {"parts": parts, "chosen": check.chosen}
    return document | {"check": cleaned(found)}


def beside(document: Document, problem: Problem, answer: Answer) -> Document:
    """An answer on energy with the one that another problem prefers, and the share of its energy that is saved.

    Parameters
    ----------
    document, problem, answer
    """
    other = answer.best
    assert other is not None
    saving = 1 - document["best"]["metrics"]["energy_j"] / other.metrics.value("energy")
    found = {"objective": problem.objective.name, "best": cleaned(scored_document(problem, other))}
    certificate = {} if problem.mixed else ledger_document(problem, answer.ledger)
    return document | {"beside": found | certificate | {"energy_saving": saving}}


def scored_document(problem: Problem, scored: Scored) -> Document:
    """A simulated deployment; latencies in seconds, energy in joules, memory in bytes.

    Where there are several types of GPU, what is told of a GPU is told pool by pool, as `parts`.
    """
    told = {"plan": scored.text, "gpus": scored.devices, **values_document(problem, scored)}
    counts = {
        "preemptions": sum(use.preemptions for use in scored.pools),
        "batches": sum(use.batches for use in scored.pools),
    }
    if problem.mixed:
        requests = sum(use.requests for use in scored.pools)
        parts = [_part_document(use, requests) for use in scored.pools]
        return told | {"metrics": metrics_document(problem, scored) | counts, "parts": parts}
    usage = scored.only.usage
    metrics = {
        **metrics_document(problem, scored),
        "mfu": usage.mfu,
        "mbu": usage.mbu,
        "operations_s": usage.operations_s,
    }
    return told | {"metrics": metrics | counts, "memory": memory_document(scored.plan, scored.only.memory)}


def _part_document(use: PoolUse, requests: int) -> Document:
    usage, plan = use.usage, use.pool.plan
    return {
        "gpu": " + ".join(use.pool.types),
        "plan": str(plan),
        "gpus": plan.devices,
        "requests": use.requests,
        "share": use.requests / requests,
        "energy_j": usage.energy_j,
        "idle_energy_j": usage.idle_energy_j,
        "mfu": usage.mfu,
        "mbu": usage.mbu,
        "operations_s": usage.operations_s,
        "preemptions": use.preemptions,
        "batches": use.batches,
        "memory": memory_document(plan, use.memory),
    }


def _loss(problem: Problem, scored: Scored, best: Scored) -> float | None:
    """What a deployment loses to the best by the first objective, as a share of what that one reaches."""
    cost, least = (problem.objective.signed(one.value) for one in (scored, best))
    return (cost - least) / abs(least) if least else None


def values_document(problem: Problem, run: Scored) -> Document:
    """What a run reaches by the objectives, and its bound by the first."""
    bound = run.bound
    if bound is not None and problem.objective.maximise:
        bound = -bound
    return {
        "value": run.value,
        "then": [objective.value(run.metrics) for objective in problem.then],
        "bound": bound,
    }


def metrics_document(problem: Problem, run: Scored) -> Document:
    """What the requests of a run saw, and what it took; figures in their units, those known and not to be left out."""
    metrics, types = run.metrics, {name for use in run.pools for name in use.pool.types}
    offers = [place for place, name in enumerate(problem.types) if not types or name in types]
    tells_cost = all(problem.alone(place).tells_cost for place in offers)
    told = (one for one in per_run() if one.name in metrics.figures and (tells_cost or not one.priced))
    cached: Document = {}
    if problem.settings.prefix_caching:
        cached = {"cached_tokens": metrics.cached_tokens, "cache_hit_rate": metrics.cached_share}
    return {
        **{figure(name).key: statistics for name, statistics in metrics.latency_s.items()},
        **{one.key: metrics.figures[one.name] for one in told},
        "transient": transient_document(run.transient),
        "output_tokens_per_s": metrics.output_tokens_per_s,
        "total_tokens_per_s": metrics.total_tokens_per_s,
        **cached,
        "slo": {
            slo.text: {
                "met": metrics.slo_met[slo.text],
                "reached": slo.reached(metrics),
                "attainment": metrics.attainment[slo.text],
                "unit": "share" if slo.fraction is not None else slo.unit,
            }
            for slo in problem.slos
        },
        "idle_energy_j": sum(use.usage.idle_energy_j for use in run.pools),
        "mean_power_w": metrics.value("energy") / metrics.value("makespan"),
    }


def memory_document(plan: Plan, memory: Sequence[StageMemory]) -> list[Document]:
    """Memory of a GPU of each stage, in bytes."""
    return [{"layers": layers, **asdict(stage)} for layers, stage in zip(plan.layers, memory, strict=True)]


def question_document(problem: Problem) -> Document:
    """What was asked, in the names and numbers that were understood.

    Of several types of GPU each is among the cluster's `pools`, with the formats and clocks to choose from on it.
    """
    settings = {name: getattr(problem.settings, name) for name in problem.settings.__slots__}
    settings["runnable"] = ANY if problem.settings.runnable is None else problem.settings.runnable.name
    offers = [_offer_document(problem.alone(place)) for place in range(len(problem.offers))]
    cluster, choices = offers[0]
    if problem.mixed:
        pools = [{name: value for name, value in own.items() if name != "name"} | some for own, some in offers]
        cluster = {"name": cluster["name"], "gpus": sum(own["gpus"] for own, _ in offers), "pools": pools}
    return {
        "model": {
            "name": problem.model.name,
            "parameters": problem.model.parameters,
            "active_parameters": problem.model.active_parameters,
            "layers": problem.model.layers,
            "source": problem.model.source,
        },
        "cluster": cluster,
        "trace": problem.trace.summary(),
        "slo": [slo.text for slo in problem.slos],
        "vacuous_slo": [slo.text for slo in problem.vacuous],
        **({} if problem.mixed else choices),
        "batch_limits": [
            {"max_num_seqs": seqs, "max_num_batched_tokens": tokens} for seqs, tokens in problem.batch_limits
        ],
        "engine": {
            "name": problem.overhead.name,
            **settings,
            "routing": problem.routing,
            "expert_routing": problem.expert_routing,
        },
    }


def _offer_document(problem: Problem) -> tuple[Document, Document]:
    """The only type of GPU of a problem, and what there is to choose from on it."""
    offer = problem.offer
    cluster = {
        "name": offer.cluster.name,
        "gpus": offer.cluster.size,
        "offered": problem.max_devices,
        "gpu": offer.name,
        **({"usd_per_gpu_h": offer.cluster.gpu.price_per_h} if problem.tells_cost else {}),
    }
    # Choices; null is the highest clock, or the limit among the engine's settings.
    choices = {"weights": list(offer.weight_formats), "kv": list(offer.kv_formats), "clocks_mhz": list(offer.clocks)}
    return cluster, choices


def model_row(model: Model) -> Document:
    """A model for the list of models."""
    cells = model.runs[-1].block
    return {
        "name": model.name,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "layers": model.layers,
        "hidden": model.hidden,
        "query_heads": cells.attention.query_heads,
        "kv_heads": cells.attention.kv_heads,
        "max_position": model.max_position,
        "weights": model.weight_format,
        "source": model.source,
    }


def cluster_row(cluster: Cluster) -> Document:
    """A node for the list of clusters: its accelerator, and the link within the node."""
    gpu, flops = cluster.gpu, dict(cluster.gpu.flops_per_s)
    return {
        "cluster": cluster.name,
        "gpu": gpu.name,
        "gpus": cluster.size,
        "memory_bytes": gpu.memory_bytes,
        "memory_bytes_per_s": gpu.memory_bytes_per_s,
        **{f"{dtype}_flops_per_s": flops.get(dtype) for dtype in DTYPES},
        "capability": gpu.capability,
        "tdp_w": gpu.tdp_w,
        "idle_w": gpu.idle_w,
        "link": cluster.intra.kind,
        "link_bytes_per_s": cluster.intra.bytes_per_s,
        "usd_per_gpu_h": gpu.price_per_h,
        "profile": _tables(gpu),
        "sources": dict(gpu.sources),
    }


def _tables(gpu: Gpu) -> str:
    """Whose measured tables an accelerator's times are from."""
    if gpu.profile:
        return f"measured (profiles/{gpu.profile})"
    kernels = "" if gpu.cuda else "; no engine's kernels are known for it"
    return f"derived from the datasheet, efficiencies of profiles/{gpu.like}{kernels}"


def trace_row(trace: Trace, title: str) -> Document:
    """A trace for the list of traces."""
    return {**trace.summary(), "title": title}


def listing_document(kind: str, rows: list[Document]) -> Document:
    """A list of what can be named."""
    return cleaned({"status": "ok", kind: rows, "version": __version__})


def cleaned(document: Document) -> Document:
    return {key: _clean(value) for key, value in document.items()}


def _clean(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is undefined becomes null."""
    if isinstance(value, dict):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
