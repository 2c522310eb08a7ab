"""Measured runs against their simulation as plain data: what `validate` prints as JSON, its tables and its plot."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from apex_opt import __version__
from apex_opt.measured import METRICS, MeasuredRun, coverage, summarise
from apex_opt.report.document import cleaned

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from apex_opt.measured import Comparison, Measurements
    from apex_opt.measured.compare import Prediction
    from apex_opt.measured.steps import StepTimes
    from apex_opt.schema import Document

_GROUPS: Final[Mapping[str, Callable[[Comparison], str]]] = {
    "kind": lambda c: c.run.kind,
    "engine": lambda c: c.run.engine if isinstance(c.run, MeasuredRun) else "",
    "cluster": lambda c: c.run.cluster if isinstance(c.run, MeasuredRun) else "",
    "model": lambda c: c.model,
}
"""What the summary is also given by."""


def validation_document(
    measurements: Measurements, comparisons: Sequence[Comparison], provenance: Mapping[str, str]
) -> Document:
    """Every run with its errors, their summary, and how many runs there were that could not be predicted.

    Figures are in the units that `units` names; errors in percent of the measured value, above 0 where more was
    predicted than measured.

    Parameters
    ----------
    measurements, comparisons
    provenance : mapping    where each figure comes from
    """
    covered = coverage(comparisons)
    return cleaned(
        {
            "command": "validate",
            "status": "ok" if covered.predicted else "nothing predicted",
            "units": dict(METRICS),
            "rows": [_row(comparison) for comparison in comparisons],
            "summary": _summary(comparisons),
            "summary_with_set_aside": _summary(comparisons, all_of_them=True),
            "summary_by": {
                group: {value: _summary(members) for value, members in _grouped(comparisons, key).items()}
                for group, key in _GROUPS.items()
            },
            "coverage": asdict(covered),
            "causes": {
                model: _causes(step for c in members if c.prediction for step in c.prediction.steps)
                for model, members in _grouped(comparisons, _GROUPS["model"]).items()
                if any(c.prediction and c.prediction.steps for c in members)
            },
            "files": list(measurements.files),
            "passed_over": list(measurements.passed_over),
            "provenance": dict(provenance),
            "version": __version__,
        }
    )


def _summary(comparisons: Iterable[Comparison], *, all_of_them: bool = False) -> Document:
    return {metric: asdict(found) for metric, found in summarise(comparisons, all_of_them=all_of_them).items()}


def _grouped(comparisons: Iterable[Comparison], key: Callable[[Comparison], str]) -> dict[str, list[Comparison]]:
    """Runs that were predicted, by what `key` says of them."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.prediction is not None:
            groups.setdefault(key(comparison), []).append(comparison)
    return groups


def _row(comparison: Comparison) -> Document:
    """One run."""
    run, prediction = comparison.run, comparison.prediction
    row: Document = {"name": run.name, "origin": run.origin, "kind": run.kind, "model": comparison.model or run.model}
    if isinstance(run, MeasuredRun):
        row |= {
            "cluster": run.cluster,
            "plan": str(prediction.plan) if prediction else run.plan,
            "engine": run.engine,
            "requests": len(run.trace),
            "concurrency": run.trace.concurrency,
        }
    row |= {"status": "predicted" if prediction else "not predicted"}
    if prediction is None or not isinstance(run, MeasuredRun):
        return row | {"reason": comparison.reason, "detail": comparison.detail}
    errors = comparison.errors_pct(all_of_them=True)
    return row | {
        "gpus": prediction.plan.devices,
        "metrics": {
            metric: {
                "measured": run.measured[metric],
                "predicted": prediction.values[metric],
                "error_pct": errors[metric],
            }
            for metric in METRICS
            if metric in errors
        },
        "set_aside": dict(run.set_aside),
        "assumptions": list(run.assumptions),
        "predicted_breakdown": dict(prediction.operations_s),
        "preemptions": prediction.preemptions,
        "batches": prediction.batches,
        "causes": _row_causes(prediction),
    }


def _row_causes(prediction: Prediction) -> Document | None:
    if not prediction.steps:
        return None
    return {**_causes(prediction.steps), "steps_left_out": prediction.steps_left_out}


def _causes(steps: Iterable[StepTimes]) -> Document:
    """Measured steps against the batch law: by kind, and within a kind by size."""
    kinds: dict[str, dict[tuple[int, int], list[StepTimes]]] = {}
    for step in steps:
        kinds.setdefault(step.kind, {}).setdefault((step.least, step.most), []).append(step)
    return {
        kind: {
            **_times([step for group in sizes.values() for step in group]),
            "by_size": [
                {"least": least, "most": most, **_times(group)} for (least, most), group in sorted(sizes.items())
            ],
        }
        for kind, sizes in kinds.items()
    }


def _times(steps: Sequence[StepTimes]) -> dict[str, Any]:
    measured, predicted = sum(step.measured_s for step in steps), sum(step.predicted_s for step in steps)
    return {
        "steps": sum(step.steps for step in steps),
        "measured_s": measured,
        "predicted_s": predicted,
        "bias_pct": 100 * (predicted / measured - 1) if measured > 0 else None,
    }
