"""The document of `validate`, its tables and its plot: all runs are in it, and what is shown is what was found."""

from __future__ import annotations

import copy
import json
import sys
from typing import TYPE_CHECKING, Any

import pytest

from apex_opt.errors import InputError, UsageError
from apex_opt.measured.compare import Comparison, Prediction
from apex_opt.measured.readers import Measurements
from apex_opt.measured.runs import MeasuredRun, UnusableRun
from apex_opt.measured.steps import StepTimes
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import Plan, Template
from apex_opt.report.charts.front import errors_charts
from apex_opt.report.picture import write_picture
from apex_opt.report.validation import validation_document
from apex_opt.report.validation_tables import validation_page
from apex_opt.schema import to_plain
from apex_opt.workload import load_trace

if TYPE_CHECKING:
    from pathlib import Path

PLAN = Plan(
    replicas=1, layers=(32,), attention=Template(tp=2), ffn=Template(tp=2), weight_format="bf16", kv_format="bf16"
)


def measured(name: str, **changes: Any) -> MeasuredRun:
    given: dict[str, Any] = {
        "name": name,
        "origin": f"file.json: run {name}",
        "kind": "vllm-runs",
        "model": "llama-3.1-8b",
        "cluster": "2xh200-sxm",
        "plan": "tp2",
        "engine": "vllm",
        "settings": EngineSettings(),
        "sweep": "a",
        "trace": load_trace("static:n=3,prompt=10,output=5"),
        "measured": {"ttft_mean": 0.02, "tpot_mean": 0.005, "energy": 2000.0},
    }
    return MeasuredRun(**given | changes)


def step(kind: str, least: int, most: int, measured_s: float, predicted_s: float) -> StepTimes:
    return StepTimes(kind=kind, least=least, most=most, steps=10, measured_s=measured_s, predicted_s=predicted_s)


def predicted(run: MeasuredRun, model: str = "llama-3.1-8b", steps: tuple[StepTimes, ...] = ()) -> Comparison:
    values = {"ttft_mean": 0.03, "ttft_p95": 0.1, "tpot_mean": 0.0045, "energy": 2200.0}
    prediction = Prediction(
        plan=PLAN,
        values=values,
        operations_s={"ffn up": 1.0, "idle": 0.5},
        sample=(1.5, 1e14, 0.0, 2e12),
        preemptions=1,
        batches=7,
        steps=steps,
        steps_left_out=2,
    )
    return Comparison(run=run, prediction=prediction, model=model)


def case(*comparisons: Comparison) -> dict[str, Any]:
    runs = tuple(comparison.run for comparison in comparisons)
    measurements = Measurements(runs=runs, files=("file.json",), passed_over=("README.md",))
    return to_plain(validation_document(measurements, comparisons, {"h200, gemm": "measured"}))


STEPS = (step("decode", 1, 1, 1.0, 1.1), step("decode", 2, 2, 1.0, 0.9), step("mixed", 5, 8, 2.0, 3.0))
UNUSABLE = UnusableRun(
    name="u", origin="a.csv: line 9", kind="silicon", model="acme/x", reason="odd", detail="why" * 99
)


@pytest.fixture
def document() -> dict[str, Any]:
    return case(
        predicted(measured("one"), steps=STEPS),
        predicted(measured("two", cluster="8xb200-sxm", set_aside={"ttft_mean": "cold start: slow"})),
        Comparison(run=UNUSABLE, reason="model not described: acme/x", detail="why" * 99),
        Comparison(run=measured("three"), reason="engine not described", detail="no tgi", model="llama-3.1-8b"),
    )


def test_a_program_finds_rows_summary_and_coverage(document: dict[str, Any]) -> None:
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert {"rows", "summary", "coverage", "units", "provenance", "version", "command", "status"} <= set(document)
    assert document["command"] == "validate"
    assert document["units"]["ttft_mean"] == "s"
    assert document["coverage"] == {
        "predicted": 2,
        "total": 4,
        "rows": 4,
        "supported": 3,
        "aside": 0,
        "reasons": {"model not described: acme/x": 1, "engine not described": 1},
    }
    found = document["summary"]["ttft_mean"]
    assert set(found) == {"mean_ape_pct", "median_ape_pct", "bias_pct", "n"}
    assert (found["n"], found["bias_pct"]) == (1, pytest.approx(50))
    assert document["summary_with_set_aside"]["ttft_mean"]["n"] == 2
    assert document["summary"]["energy"]["mean_ape_pct"] == pytest.approx(10)


def test_every_run_has_its_row(document: dict[str, Any]) -> None:
    one, two, unusable, three = document["rows"]
    assert one["metrics"]["tpot_mean"] == {"measured": 0.005, "predicted": 0.0045, "error_pct": pytest.approx(-10)}
    assert "ttft_p95" not in one["metrics"]  # predicted, not measured
    assert one["predicted_breakdown"] == {"ffn up": 1.0, "idle": 0.5}
    assert (one["plan"], one["gpus"], one["batches"]) == ("attn(tp2) ffn(tp2) bf16", 2, 7)
    assert two["set_aside"] == {"ttft_mean": "cold start: slow"}
    assert (unusable["status"], unusable["model"]) == ("not predicted", "acme/x")
    assert (three["reason"], three["detail"], three["plan"]) == ("engine not described", "no tgi", "tp2")


def test_causes_add_up_by_kind_and_by_model(document: dict[str, Any]) -> None:
    causes = document["rows"][0]["causes"]
    assert causes["decode"]["steps"] == 20
    assert causes["decode"]["bias_pct"] == pytest.approx(0)
    assert [part["bias_pct"] for part in causes["decode"]["by_size"]] == pytest.approx([10, -10])
    assert causes["mixed"]["bias_pct"] == pytest.approx(50)
    assert causes["steps_left_out"] == 2
    assert document["rows"][1]["causes"] is None
    assert document["causes"]["llama-3.1-8b"]["mixed"]["measured_s"] == 2.0


def test_groups_hold_the_runs_that_were_predicted(document: dict[str, Any]) -> None:
    clusters = document["summary_by"]["cluster"]
    assert set(clusters) == {"2xh200-sxm", "8xb200-sxm"}
    assert "ttft_mean" not in clusters["8xb200-sxm"]  # set aside
    assert set(document["summary_by"]["engine"]) == {"vllm"}


def test_tables_show_the_runs_the_summary_and_the_rest(document: dict[str, Any]) -> None:
    text = validation_page(document, 30)
    flat = " ".join(text.split())
    assert "2 of 4 measured runs predicted (4 in 1 file, 3 of a model that can be described)" in flat
    for part in ("20.0 ms", "30.0 ms", "+50.0%", "-10.0%", "2.0 kJ", "2.2 kJ", "+50.0%*"):
        assert part in text, part
    assert "* shown, but not in the summary: cold start: slow" in flat
    assert "Mean |error| and bias by cluster" in flat
    assert "Mean |error| and bias by engine" not in flat  # there is but one
    assert "engine not described 1 no tgi" in flat
    assert "why" * 99 not in text  # long figures are cut
    assert "no measured runs in README.md" in flat
    assert "Measured steps against the batch law" in flat
    assert max(len(line) for line in text.splitlines()) <= 120


def test_of_many_runs_those_with_the_largest_errors_are_shown() -> None:
    small = {"tpot_mean": 0.0045}
    comparisons = [predicted(measured(f"run-{k}", measured=small)) for k in range(5)]
    comparisons.append(predicted(measured("the-worst", measured={"tpot_mean": 0.5})))
    text = validation_page(case(*comparisons), 2)
    assert "Runs (2 of 6, largest errors first: by the mean |error| of a row, figures with * left out)" in text
    assert text.index("the-worst") < text.index("run-0")
    assert "run-1" not in text
    assert "run-4" in validation_page(case(*comparisons), 6)


def test_nothing_predicted_is_still_a_document() -> None:
    document = case(Comparison(run=UNUSABLE, reason="odd", detail="why"))
    assert document["status"] == "nothing predicted"
    assert (document["summary"], document["coverage"]["predicted"]) == ({}, 0)
    text = validation_page(document, 5)
    assert "0 of 1 measured run predicted" in text
    assert "odd" in text


def test_the_plot_is_a_picture_of_every_metric(tmp_path: Path, document: dict[str, Any]) -> None:
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    path = tmp_path / "errors.png"
    write_picture(path, *errors_charts(document))
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width > 3 * height / 2 > 300  # three panels side by side
    assert [file.name for file in tmp_path.iterdir()] == ["errors.png"]


def test_a_plot_that_cannot_be_written_is_one_clear_line(tmp_path: Path, document: dict[str, Any]) -> None:
    pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
    with pytest.raises(InputError, match=r"plot .*nowhere.* cannot be written"):
        write_picture(tmp_path / "nowhere" / "a.png", *errors_charts(document))
    empty = copy.deepcopy(document)
    empty["rows"] = [row for row in empty["rows"] if row["status"] != "predicted"]
    with pytest.raises(InputError, match="there is nothing to draw"):
        write_picture(tmp_path / "a.png", *errors_charts(empty))
    assert not list(tmp_path.iterdir())


def test_without_the_plotting_library_the_way_to_get_it_is_named(
    tmp_path: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UsageError, match=r"--plot: needs vl-convert-python; pip install 'apex-opt\[report\]'"):
        write_picture(tmp_path / "a.png", *errors_charts(document))
