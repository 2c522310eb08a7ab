"""Measured runs against their simulation as plain data: what `validate` prints as JSON, its tables and its plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from apex_opt.measured.compare import coverage, summarise
from apex_opt.measured.runs import METRICS, MeasuredRun
from apex_opt.report import listed
from apex_opt.report.fitting import errors_document
from apex_opt.schema import of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from apex_opt.measured.compare import Comparison, Prediction
    from apex_opt.measured.readers import Measurements
    from apex_opt.measured.runs import Run
    from apex_opt.measured.steps import StepTimes

S = TypeVar("S", bound=listed.Steps)

_GROUPS: Final[Mapping[str, Callable[[Comparison], str]]] = {
    "half": lambda c: _half(c.run),
    "kind": lambda c: c.run.kind,
    "engine": lambda c: c.run.engine if isinstance(c.run, MeasuredRun) else "",
    "cluster": lambda c: c.run.cluster if isinstance(c.run, MeasuredRun) else "",
    "model": lambda c: c.model,
}
"""What the summary is also given by."""


def _half(run: Run) -> str:
    """Whether a run is judged by or fitted on; runs with drafts, and those whose prompts are handed over, apart."""
    if not isinstance(run, MeasuredRun):
        return "fitted on"
    apart = ", with drafts" if run.drafts else ", of pools" if run.answering else ""
    return ("judged" if run.judged else "fitted on") + apart


def validation_document(
    measurements: Measurements, comparisons: Sequence[Comparison], provenance: Mapping[str, str]
) -> listed.Validation:
    """Every run with its errors, their summary, and how many runs there were that could not be predicted.

    Figures are in the units that `units` names; errors in percent of the measured value, above 0 where more was
    predicted than measured.

    Parameters
    ----------
    measurements, comparisons
    provenance : mapping    where each figure comes from
    """
    covered = coverage(comparisons)
    return listed.Validation(
        command="validate",
        status="ok" if covered.predicted else "nothing predicted",
        units=dict(METRICS),
        rows=tuple(map(_row, comparisons)),
        summary=errors_document(summarise(comparisons)),
        summary_with_set_aside=errors_document(summarise(comparisons, all_of_them=True)),
        summary_by={
            group: {value: errors_document(summarise(some)) for value, some in _grouped(comparisons, key).items()}
            for group, key in _GROUPS.items()
        },
        coverage=of(listed.Coverage, covered),
        causes={
            model: _causes(step for c in members if c.prediction for step in c.prediction.steps)
            for model, members in _grouped(comparisons, _GROUPS["model"]).items()
            if any(c.prediction and c.prediction.steps for c in members)
        },
        files=measurements.files,
        passed_over=measurements.passed_over,
        provenance=dict(provenance),
    )


def _grouped(comparisons: Iterable[Comparison], key: Callable[[Comparison], str]) -> dict[str, list[Comparison]]:
    """Runs that were predicted, by what `key` says of them."""
    groups: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        if comparison.prediction is not None:
            groups.setdefault(key(comparison), []).append(comparison)
    return groups


def _row(comparison: Comparison) -> listed.Predicted | listed.Unpredicted | listed.Unread:
    """One run."""
    run, prediction = comparison.run, comparison.prediction
    own: dict[str, Any] = {"model": comparison.model or run.model}
    if not isinstance(run, MeasuredRun):
        return of(listed.Unread, comparison, run, status="not predicted", **own)
    own |= {"requests": len(run.trace), "concurrency": run.trace.concurrency}
    if prediction is None:
        return of(listed.Unpredicted, comparison, run, status="not predicted", **own)
    errors = comparison.errors_pct(all_of_them=True)
    return of(
        listed.Predicted,
        run,
        prediction,
        plan=str(prediction.plan),
        status="predicted",
        gpus=prediction.plan.devices,
        metrics={
            metric: listed.Compared(
                measured=run.measured[metric], predicted=prediction.values[metric], error_pct=errors[metric]
            )
            for metric in METRICS
            if metric in errors
        },
        set_aside=dict(run.set_aside),
        predicted_breakdown=dict(prediction.operations_s),
        causes=_row_causes(prediction),
        **own,
    )


def _row_causes(prediction: Prediction) -> dict[str, listed.StepKind | int] | None:
    if not prediction.steps:
        return None
    return {**_causes(prediction.steps), "steps_left_out": prediction.steps_left_out}


def _causes(steps: Iterable[StepTimes]) -> dict[str, listed.StepKind]:
    """Measured steps against the batch law: by kind, and within a kind by size."""
    kinds: dict[str, dict[tuple[int, int], list[StepTimes]]] = {}
    for step in steps:
        kinds.setdefault(step.kind, {}).setdefault((step.least, step.most), []).append(step)
    return {
        kind: _times(
            listed.StepKind,
            [step for group in sizes.values() for step in group],
            by_size=tuple(
                _times(listed.StepSize, group, least=least, most=most) for (least, most), group in sorted(sizes.items())
            ),
        )
        for kind, sizes in kinds.items()
    }


def _times(kind: type[S], steps: Sequence[StepTimes], **more: Any) -> S:
    measured, predicted = sum(step.measured_s for step in steps), sum(step.predicted_s for step in steps)
    return kind(
        steps=sum(step.steps for step in steps),
        measured_s=measured,
        predicted_s=predicted,
        bias_pct=100 * (predicted / measured - 1) if measured > 0 else None,
        **more,
    )
