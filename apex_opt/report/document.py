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
    from collections.abc import Iterable, Sequence

    from apex_opt.cluster.types import Cluster, Gpu
    from apex_opt.figures import Objective
    from apex_opt.ir.model import Model
    from apex_opt.plan.memory import StageMemory
    from apex_opt.plan.plan import Plan
    from apex_opt.search import Answer, Candidate, Check, Question
    from apex_opt.search.fleet import Fleet
    from apex_opt.workload.trace import Trace

Document = dict[str, Any]


def answer_document(
    command: str, question: Question, answer: Answer, provenance: dict[str, str], top: int = 1
) -> Document:
    """An answer and everything it depends on; latencies in seconds, sizes in bytes, energy in joules, costs in $."""
    best = answer.best
    first, *then = (objective_document(objective, best) for objective in question.objectives)
    document = cleaned(
        {
            "command": command,
            "status": answer.status,
            "objective": first,
            "then": then,
            "reason": answer.reason,
            "best": candidate_document(question, best) if best else None,
            "candidates": [candidate_document(question, c) for c in answer.candidates[:top]],
            "certificate": asdict(answer.certificate),
            "question": question_document(question),
            "provenance": provenance,
            "version": __version__,
        }
    )
    return noted(loaded(document, question, best), question.remarks)


def noted(document: Document, notes: Iterable[str]) -> Document:
    """An answer with what its reader has to know besides, after what it tells already; no note is told twice.

    Parameters
    ----------
    document
    notes : one sentence each, without the full stop, as `Question.notes`
    """
    return document | {"notes": list(dict.fromkeys((*document.get("notes", ()), *notes)))}


def objective_document(objective: Objective, best: Candidate | Fleet | None) -> Document:
    """An objective and what the best plan reaches, in its unit; plans within the tolerance, a share, count as equal."""
    return {
        "name": objective.name,
        "unit": objective.unit,
        "direction": "maximise" if objective.maximise else "minimise",
        "tolerance": objective.tolerance,
        "value": None if best is None else objective.value(best.metrics),
    }


def checked(document: Document, check: Check) -> Document:
    """An answer with the replay of its certificate."""
    return document | {"check": asdict(check) | {"holds": check.holds}}


def beside(document: Document, question: Question, answer: Answer) -> Document:
    """An answer on energy with the plan that another question prefers, and the share of its energy that is saved."""
    best, other = document["best"], answer.best
    assert other is not None
    return document | {
        "beside": {
            "objective": question.objective.name,
            "best": cleaned(candidate_document(question, other)),
            "certificate": asdict(answer.certificate),
            "energy_saving": 1 - best["metrics"]["energy_j"] / other.usage.energy_j,
        }
    }


def candidate_document(question: Question, candidate: Candidate) -> Document:
    """A simulated plan; latencies in seconds, energy in joules, memory in bytes."""
    usage = candidate.usage
    return {
        "plan": str(candidate.plan),
        "gpus": candidate.plan.devices,
        **values_document(question, candidate),
        "metrics": {
            **metrics_document(question, candidate, usage.idle_energy_j, tells_cost=question.tells_cost),
            "mfu": usage.mfu,
            "mbu": usage.mbu,
            "operations_s": usage.operations_s,
            "preemptions": candidate.preemptions,
            "batches": candidate.batches,
        },
        "memory": memory_document(candidate.plan, candidate.memory),
    }


def values_document(question: Question, run: Candidate | Fleet) -> Document:
    """What a run reaches by the objectives, and its bound by the first."""
    bound = run.bound
    if bound is not None and question.objective.maximise:
        bound = -bound
    return {
        "value": run.value,
        "then": [objective.value(run.metrics) for objective in question.then],
        "bound": bound,
    }


def metrics_document(question: Question, run: Candidate | Fleet, idle_energy_j: float, *, tells_cost: bool) -> Document:
    """What the requests of a run saw, and what it took; figures in their units, those known and not to be left out.

    Parameters
    ----------
    idle_energy_j : of all GPUs
    tells_cost : whether figures that take the price of the GPUs are told
    """
    metrics = run.metrics
    told = [one for one in per_run() if one.name in metrics.figures and (tells_cost or not one.priced)]
    energy_j, makespan_s = (metrics.value(name) for name in ("energy", "makespan"))
    cached: Document = {}
    if question.settings.prefix_caching:
        cached = {"cached_tokens": metrics.cached_tokens, "cache_hit_rate": metrics.cached_share}
    return {
        **{figure(name).key: statistics for name, statistics in metrics.latency_s.items()},
        # Keys stand where they are named first.
        "makespan_s": makespan_s,
        "transient": transient_document(run.transient),
        **{one.key: metrics.figures[one.name] for one in told if one.is_speed},
        "output_tokens_per_s": metrics.output_tokens_per_s,
        "total_tokens_per_s": metrics.total_tokens_per_s,
        **cached,
        "slo": {
            slo.text: {
                "met": metrics.slo_met[slo.text],
                "reached": metrics.judged(slo),
                "attainment": metrics.attainment[slo.text],
                "unit": "share" if slo.fraction is not None else slo.unit,
            }
            for slo in question.slos
        },
        "energy_j": energy_j,
        "idle_energy_j": idle_energy_j,
        **{one.key: metrics.figures[one.name] for one in told if not one.is_speed},
        "mean_power_w": energy_j / makespan_s,
    }


def memory_document(plan: Plan, memory: Sequence[StageMemory]) -> list[Document]:
    """Memory of a GPU of each stage, in bytes."""
    return [{"layers": layers, **asdict(stage)} for layers, stage in zip(plan.layers, memory, strict=True)]


def question_document(question: Question) -> Document:
    """What was asked, in the names and numbers that were understood."""
    settings = {name: getattr(question.settings, name) for name in question.settings.__slots__}
    settings["runnable"] = ANY if question.settings.runnable is None else question.settings.runnable.name
    return {
        "model": {
            "name": question.model.name,
            "parameters": question.model.parameters,
            "active_parameters": question.model.active_parameters,
            "layers": question.model.layers,
            "source": question.model.source,
        },
        "cluster": {
            "name": question.cluster.name,
            "gpus": question.cluster.size,
            "offered": question.max_devices,
            "gpu": question.cluster.gpu.name,
            **({"usd_per_gpu_h": question.cluster.gpu.price_per_h} if question.tells_cost else {}),
        },
        "trace": question.trace.summary(),
        "slo": [slo.text for slo in question.slos],
        "vacuous_slo": [slo.text for slo in question.vacuous],
        "weights": list(question.weight_formats),
        "kv": list(question.kv_formats),
        # Choices; null is the highest clock, or the limit among the engine's settings.
        "clocks_mhz": list(question.clocks),
        "batch_limits": [
            {"max_num_seqs": seqs, "max_num_batched_tokens": tokens} for seqs, tokens in question.batch_limits
        ],
        "engine": {
            "name": question.overhead.name,
            **settings,
            "routing": question.routing,
            "expert_routing": question.expert_routing,
        },
    }


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
