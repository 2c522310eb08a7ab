"""Results of benchmark clients: figures as clients mean them, whatever the layout, and faults in one line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from apex_opt.errors import InputError
from apex_opt.measured.clients import Deployed, read_clients
from apex_opt.measured.readers import read_measured
from apex_opt.plans.engine import EngineSettings

if TYPE_CHECKING:
    from pathlib import Path

DEPLOYED = Deployed(
    model="llama-3.1-8b",
    cluster="1xh200-sxm",
    plan="tp1",
    engine="vllm",
    sweep="a",
    settings=lambda _: EngineSettings(),
)
VLLM: dict[str, Any] = {
    "request_rate": "inf",
    "max_concurrency": 2,
    "completed": 3,
    "total_input_tokens": 60,
    "total_output_tokens": 9,
    "request_throughput": 1.5,
    "input_lens": [10, 20, 30, 40],
    "output_lens": [3, 1, 5, 0],
    "ttfts": [0.1, 0.2, 0.3, 0.0],
    "itls": [[0.01, 0.03], [], [0.02, 0.02, 0.02, 0.06], []],
}
SUMMARY = {
    "backend": "sglang",
    "request_rate": 2.0,
    "max_concurrency": None,
    "completed": 4,
    "total_input_tokens": 400,
    "total_output_tokens": 40,
    "mean_ttft_ms": 50.0,
    "mean_tpot_ms": 10.0,
    "mean_itl_ms": 11.0,
    "mean_e2e_latency_ms": 140.0,
    "request_throughput": 1.9,
}
GUIDELLM = {
    "benchmarks": [
        {
            "config": {"strategy": {"type_": "concurrent", "streams": 2}},
            "requests": {
                "successful": [
                    {
                        "time_to_first_token_ms": 100.0,
                        "request_latency": 0.14,
                        "prompt_tokens": 10,
                        "output_tokens": 3,
                    },
                    {
                        "time_to_first_token_ms": 300.0,
                        "request_latency": 0.42,
                        "prompt_tokens": 30,
                        "output_tokens": 5,
                    },
                ],
                "errored": [],
                "incomplete": [],
            },
        }
    ]
}
AIPERF = {
    "input_config": {"loadgen": {"concurrency": 4}},
    "request_count": {"unit": "requests", "avg": 40},
    "input_sequence_length": {"unit": "tokens", "avg": 128.0},
    "output_sequence_length": {"unit": "tokens", "avg": 16.0},
    "time_to_first_token": {"unit": "ms", "avg": 40.0, "p95": 90.0},
    "inter_token_latency": {"unit": "ms", "avg": 8.0},
    "request_latency": {"unit": "ms", "avg": 160.0},
    "request_throughput": {"unit": "requests/sec", "avg": 24.0},
}


def written(tmp_path: Path, *documents: Any) -> Path:
    path = tmp_path / ("x.json" if len(documents) == 1 else "x.jsonl")
    path.write_text("\n".join(map(json.dumps, documents)))
    return path


def test_a_result_of_another_model_is_refused_and_an_unknown_name_is_not(tmp_path: Path) -> None:
    path = tmp_path / "four.json"
    path.write_text(json.dumps(VLLM | {"model_id": "meta-llama/Llama-3.1-70B-Instruct"}))
    with pytest.raises(InputError, match=r"--model is llama-3\.1-8b; give --model=llama-3.1-70b"):
        read_clients(path, DEPLOYED)
    for same in ("meta-llama/Llama-3.1-8B", "/models/mine", None):
        path.write_text(json.dumps(VLLM | {"model_id": same}))
        assert read_clients(path, DEPLOYED)


def test_figures_of_requests_are_those_of_their_tokens(tmp_path: Path) -> None:
    (run,) = read_clients(written(tmp_path, VLLM), DEPLOYED)
    assert run.measured["ttft_mean"] == pytest.approx(0.2)  # the one without an answer counts nowhere
    assert run.measured["ttft_p95"] == pytest.approx(np.percentile([0.1, 0.2, 0.3], 95))
    assert run.measured["tpot_mean"] == pytest.approx((0.04 / 2 + 0.12 / 4) / 2)
    assert run.measured["itl_mean"] == pytest.approx(0.16 / 6)
    assert run.measured["e2e_mean"] == pytest.approx((0.14 + 0.2 + 0.42) / 3)
    assert run.measured["throughput"] == 1.5
    assert (run.trace.concurrency, run.trace.prompt.tolist()) == (2, [10, 20, 30])
    assert (run.plan, run.engine) == ("tp1", "vllm")


def test_a_summary_has_means_and_a_file_a_load_on_each_line(tmp_path: Path) -> None:
    runs = read_measured(written(tmp_path, SUMMARY, {**SUMMARY, "mean_ttft_ms": 70.0}), DEPLOYED).runs
    assert [run.name for run in runs] == ["x/1", "x/2"]
    measured = [run.measured for run in read_clients(tmp_path / "x.jsonl", DEPLOYED)]
    assert measured[0] == pytest.approx(
        {"ttft_mean": 0.05, "tpot_mean": 0.01, "itl_mean": 0.011, "e2e_mean": 0.14, "throughput": 1.9}
    )
    assert measured[1]["ttft_mean"] == pytest.approx(0.07)


def test_guidellm_and_aiperf_are_read(tmp_path: Path) -> None:
    (run,) = read_clients(written(tmp_path, GUIDELLM), DEPLOYED)
    assert run.measured["ttft_mean"] == pytest.approx(0.2)
    assert run.measured["tpot_mean"] == pytest.approx((0.04 / 2 + 0.12 / 4) / 2)
    (run,) = read_clients(written(tmp_path, AIPERF), DEPLOYED)
    assert run.measured["ttft_p95"] == pytest.approx(0.09)
    assert run.measured["tpot_mean"] == pytest.approx(0.008)
    assert run.measured["e2e_mean"] == pytest.approx(0.16)
    assert (run.trace.concurrency, len(run.trace)) == (4, 40)
    untold = {name: value for name, value in AIPERF.items() if name != "input_config"}
    with pytest.raises(InputError, match="does not say how requests were sent, so nothing can be compared"):
        read_clients(written(tmp_path, untold), DEPLOYED)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ttfts": [0.1, 0.2]}, "one length"),
        ({"ttfts": [0.1, 0.2, "x", 0.0]}, "request 3: ttfts 'x'"),
        ({"itls": [[0.01], [], [1e9], []]}, "request 3: itls"),
        ({"output_lens": [0, 0, 0, 0]}, "no request has an answer"),
        ({"request_throughput": -1}, "request_throughput -1"),
        ({"input_lens": "x"}, "input_lens is 'x'; it has to be a list"),
        ({"start_times": {"a": 1}}, r"start_times is \{'a': 1\}; it has to be a list"),
        ({"ttfts": 3}, "ttfts is 3; it has to be a list"),
        ({"model_id": 7}, "model_id is 7; it has to be the name of a model"),
        ({"duration": float("inf")}, "duration inf is not a number"),
        ({"mean_tpot_ms": float("nan")}, "mean_tpot_ms nan is not a number"),
        ({"max_concurrency": "2"}, "max_concurrency '2' is not a number"),
        ({"completed": 0}, "completed is 0: no request was answered"),
        ({"completed": True}, "completed True is not a number"),
        ({"input_lens": [10, 10**30, 30, 40]}, "request 2: .*1000000000000000000000000000000"),
    ],
)
def test_faults_are_told_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        read_clients(written(tmp_path, {**VLLM, **change}), DEPLOYED)
    assert "\n" not in str(caught.value)


def test_what_ran_has_to_be_told_and_other_files_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give --plan"):
        read_measured(written(tmp_path, VLLM))
    with pytest.raises(InputError, match="not the result of a benchmark"):
        read_clients(written(tmp_path, {"a": 1}), DEPLOYED)
