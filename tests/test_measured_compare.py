"""Predictions of measured runs: none but real errors, nothing dropped, sums that add up."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from measured_cases import engine, recorded, write_runs

from apex_opt.cluster import load_cluster
from apex_opt.cost import CostModel
from apex_opt.cost.engine import load_engine
from apex_opt.ir import load_model
from apex_opt.measured.compare import Comparison, Predictor, coverage, summarise
from apex_opt.measured.runs import METRICS, MeasuredRun, UnusableRun
from apex_opt.measured.vllm_runs import read_vllm_runs
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.plan import parse_plan
from apex_opt.profiles import load_profile
from apex_opt.workload import load_trace

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

SETTINGS = EngineSettings(max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=4096)
LOAD = load_trace("poisson:rate=6,n=40,prompt=uniform(20,1500),output=uniform(2,120)", seed=5)


def quiet(*_: object) -> None:
    """No progress."""


def compare(*runs: MeasuredRun | UnusableRun) -> tuple[Comparison, ...]:
    return Predictor().compare(runs, quiet)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> MeasuredRun:
    """A run "measured" on our own cost model."""
    model, cluster = load_model("llama-3.1-8b"), load_cluster("h200-sxm")
    costs = CostModel(model, cluster, SETTINGS, load_engine("vllm"))
    law = costs.plan_cost(parse_plan("tp1", model)).laws[0]
    path = tmp_path_factory.mktemp("h200-vllm-1") / "x.json.gz"
    write_runs(path, {"a": recorded(SETTINGS, law, LOAD)}, engine(SETTINGS))
    (run,) = read_vllm_runs(path)
    assert isinstance(run, MeasuredRun)
    return run


def test_a_run_measured_on_the_model_itself_shows_no_error(own: MeasuredRun) -> None:
    (comparison,) = compare(own)
    errors = comparison.errors_pct(all_of_them=True)
    # Times in a file have a nanosecond, its clients none of the time outside the engine.
    request_s = load_engine("vllm").request_s
    assert errors.pop("ttft_mean") == pytest.approx(100 * request_s / own.measured["ttft_mean"], rel=1e-3)
    assert errors.pop("ttft_p95") == pytest.approx(100 * request_s / own.measured["ttft_p95"], rel=1e-3)
    assert errors.pop("e2e_mean") == pytest.approx(100 * request_s / own.measured["e2e_mean"], rel=1e-3)
    errors.pop("energy")
    # The last answer is on its way out for as long.
    alone_s = len(own.trace) / own.measured["throughput"]
    assert errors.pop("throughput") == pytest.approx(100 * (alone_s / (alone_s + request_s) - 1), rel=1e-3)
    assert set(errors) == {"tpot_mean", "tpot_p95", "itl_mean"}
    assert list(errors.values()) == pytest.approx([0] * 3, abs=1e-4)
    prediction = comparison.prediction
    assert prediction is not None
    assert {part.kind for part in prediction.steps} == {"decode", "mixed"}
    decode = [part for part in prediction.steps if part.kind == "decode"]
    assert sum(p.predicted_s for p in decode) == pytest.approx(sum(p.measured_s for p in decode), rel=0.01)


def test_energy_counts_the_idle_time_before_the_first_arrival(own: MeasuredRun) -> None:
    def energy_j(run: MeasuredRun) -> float:
        (comparison,) = compare(run)
        assert comparison.prediction is not None
        return comparison.prediction.values["energy"]

    later = replace(own.trace, arrival_ns=_frozen(own.trace.arrival_ns + 10_000_000_000))
    idle_w = load_profile(load_cluster("h200").gpu).power.idle_w
    assert energy_j(replace(own, trace=later)) - energy_j(own) == pytest.approx(10 * idle_w, rel=1e-6)


def _frozen(values: np.ndarray) -> np.ndarray:
    values.flags.writeable = False
    return values


def test_time_by_operation_adds_up_to_the_run(own: MeasuredRun) -> None:
    (comparison,) = compare(own)
    assert comparison.prediction is not None
    makespan_s = len(own.trace) / comparison.prediction.values["throughput"]
    assert sum(comparison.prediction.operations_s.values()) == pytest.approx(makespan_s, rel=0.01)


def test_a_format_that_the_gpu_expands_is_work_in_16_bit(own: MeasuredRun) -> None:
    (comparison,) = compare(replace(own, cluster="a100", plan="tp1 fp8", kv_blocks=None))
    assert comparison.prediction is not None
    _, half, narrow, _ = comparison.prediction.sample
    assert half > 0 == narrow


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "acme/unheard-of"}, "model not described: acme/unheard-of"),
        ({"cluster": "8xmi250x"}, "GPU not in the catalogue"),
        ({"engine": "tgi"}, "engine not described"),
        ({"plan": "tp1 what"}, "plan that cannot be read"),
        ({"plan": "tp2"}, "plan does not fit: devices"),
        ({"cluster": "8xh200-sxm", "plan": "tp3"}, "plan does not fit: divisibility"),
        ({"cluster": "v100", "plan": "tp1 w8a8", "kv_blocks": None}, "format the GPU lacks"),
        ({"model": "llama-3.1-70b", "kv_blocks": None}, "plan does not fit: memory"),
        ({"kv_blocks": 10}, "request beyond the engine's limits"),
    ],
)
def test_what_cannot_be_simulated_says_why(own: MeasuredRun, changes: dict[str, Any], reason: str) -> None:
    (comparison,) = compare(replace(own, **changes))
    assert (comparison.prediction, comparison.reason) == (None, reason)
    assert comparison.detail
    assert comparison.errors_pct(all_of_them=True) == {}
    assert comparison.model == ("" if "unheard" in reason else load_model(changes.get("model", "llama-3.1-8b")).name)


def test_recorded_blocks_overrule_our_estimate_of_memory(own: MeasuredRun) -> None:
    (comparison,) = compare(replace(own, model="llama-3.1-70b"))
    assert comparison.prediction is not None  # it did run, whatever we think of its memory


def test_nothing_is_dropped_and_the_order_stays(own: MeasuredRun) -> None:
    unusable = UnusableRun(name="u", origin="f", kind="k", model="llama-3.1-8b", reason="odd", detail="3")
    unknown = replace(unusable, name="v", model="acme/unheard-of")
    runs = (unknown, own, unusable, replace(own, name="b", engine="tgi"))
    found = compare(*runs)
    assert tuple(comparison.run for comparison in found) == runs
    counted = coverage(found)
    assert (counted.predicted, counted.total, counted.supported) == (1, 4, 3)
    assert counted.reasons == {"model not described: acme/unheard-of": 1, "odd": 1, "engine not described": 1}
    assert counted.predicted + sum(counted.reasons.values()) == counted.total


def test_the_summary_weighs_runs_alike_and_leaves_out_what_is_set_aside(own: MeasuredRun) -> None:
    (right,) = compare(own)
    assert right.prediction is not None
    value = right.prediction.values["throughput"]
    runs = [
        replace(own, measured={"throughput": value / 1.1}),  # 10% too much
        replace(own, measured={"throughput": value / 0.8}),  # 20% too little
        replace(own, measured={"throughput": value / 2}, set_aside={"throughput": "cold"}),
    ]
    found = compare(*runs)
    judged = summarise(found)["throughput"]
    assert judged.n == 2
    assert judged.mean_ape_pct == pytest.approx(15)
    assert judged.median_ape_pct == pytest.approx(15)
    assert judged.bias_pct == pytest.approx(-5)
    everything = summarise(found, all_of_them=True)["throughput"]
    assert (everything.n, everything.mean_ape_pct) == (3, pytest.approx(130 / 3))
    assert list(summarise(found)) == [metric for metric in METRICS if metric == "throughput"]


def test_figures_that_were_used_are_named_with_their_gpu(own: MeasuredRun) -> None:
    predictor = Predictor()
    predictor.compare([own], quiet)
    assert any(key.startswith("h200-sxm-141gb, ") for key in predictor.provenance)
    assert all(predictor.provenance.values())


@pytest.mark.data
@pytest.mark.slow
def test_recorded_runs_of_one_h200_are_all_predicted(shared: Path) -> None:
    folder = shared / "measured" / "h200-vllm-0.20.2"
    found = compare(*(run for path in sorted(folder.glob("*.json.gz")) for run in read_vllm_runs(path)))
    assert coverage(found).predicted == len(found) == 18
    judged = summarise(found)
    assert set(judged) == set(METRICS)
    # Far from what is aimed at: this only shows that the comparison compares like with like.
    assert judged["e2e_mean"].median_ape_pct < 10
    assert judged["throughput"].median_ape_pct < 10
