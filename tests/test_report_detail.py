"""What charts tell of a run: the latencies and the loads that the simulation gives, to the last digit."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest

import apex_opt
from apex_opt.errors import ApexError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

SMALL: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "2xh100-sxm",
    "trace": "poisson:rate=6,n=60,prompt=256,output=24",
}


def test_latencies_are_those_of_the_file_of_requests_and_of_the_table(tmp_path: Path) -> None:
    answer = apex_opt.simulate(**SMALL, plan="dp2 tp1")
    answer.write(requests=str(tmp_path / "requests.csv"))
    rows = list(csv.DictReader((tmp_path / "requests.csv").open()))
    (detail,) = answer.details()
    for key in ("ttft_s", "tpot_s", "e2e_s"):
        assert detail.latencies[key] == pytest.approx([float(row[key]) for row in rows], abs=1e-9)
        assert np.max(detail.latencies[key]) == pytest.approx(getattr(answer.best.metrics, key)["max"])
    chart = next(chart for _, chart in answer.charts() if chart.name == "ttft")
    tabled = {share: value for _, share, value in chart.rows}
    metrics = answer.best.metrics.ttft_s
    assert [float(tabled[f"{share}%"]) for share in (50, 95, 99)] == pytest.approx(
        [1e3 * metrics[f"p{share}"] for share in (50, 95, 99)], rel=1e-3
    )
    assert float(tabled["100%"]) == pytest.approx(1e3 * np.max(detail.latencies["ttft_s"]), rel=1e-3)


def test_loads_are_of_sequences_that_are_there_and_of_blocks_that_exist() -> None:
    (detail,) = apex_opt.simulate(**SMALL, plan="dp2 tp1").details()
    (load,) = detail.loads
    assert load.waiting[-1] == load.running[-1] == load.kv_most[-1] == 0  # in the end all is done
    assert load.running.max() >= 1
    assert np.all(load.kv_mean <= load.kv_most)
    assert 0 < load.kv_most.max() <= 1
    assert np.all(load.waiting + load.running <= 60)
    assert [len(replica.stages[0]) for replica in detail.replicas[0]] == [1, 1]
    assert {gpu for replica in detail.replicas[0] for gpu in replica.stages[0]} == {"node0:0", "node0:1"}


@pytest.mark.parametrize(
    ("more", "pools"),
    [
        ({"model": "mixtral-8x7b", "plan": "attn(dp2) ffn(ep2)"}, 1),
        ({"plan": "pp2 tp1"}, 1),
        ({"plan": "prefill{tp1} + decode{tp1}", "serving": "pools"}, 2),
        ({"plan": "h100-sxm: tp1 + l40s: tp1", "cluster": "1xh100-sxm+1xl40s"}, 2),
    ],
)
def test_pools_and_ranks_are_told_each_by_itself(more: dict[str, Any], pools: int) -> None:
    answer = apex_opt.simulate(**SMALL | more)
    (detail,) = answer.details()
    assert len(detail.pools) == len(detail.loads) == len(detail.replicas) == pools
    for load in detail.loads:
        assert load.running.max() >= 1
        assert load.running[-1] == load.waiting[-1] == 0
        assert 0 < load.kv_most.max() <= 1
    assert all(chart.rows for _, chart in answer.charts())


def test_the_curve_of_a_capacity_ends_at_the_rate_that_fails() -> None:
    answer = apex_opt.capacity(**SMALL, plan="tp1", slo="ttft_p95<=1s", resolution=0.5)
    (detail,) = answer.details()
    rates = [point.rate_per_s for point in detail.curve]
    assert rates == sorted(rates)
    assert (rates[-2], rates[-1]) == (answer.best.rate_per_s, answer.best.next_rate_per_s)
    assert [point.met for point in detail.curve[:-1]] == [True] * (len(rates) - 1)
    assert detail.curve[-2].figures["TTFT p95"] == answer.best.metrics.ttft_s["p95"]


def test_an_engine_without_commands_says_so() -> None:
    (detail,) = apex_opt.simulate(**SMALL, plan="tp1", engine="orca").details()
    assert (detail.launch, detail.no_launch) == (None, "no command starts orca")
    (detail,) = apex_opt.simulate(**SMALL, plan="tp1").details()
    assert detail.launch is not None
    assert detail.launch.commands[0].argv[:2] == ("vllm", "serve")


def test_a_frame_is_the_trace_that_the_same_file_is(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"arrival_s": [0.0, 0.25, 1.5], "prompt_tokens": [100, 50, 7], "output_tokens": [5, 9, 3]}, index=[7, 7, 1]
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    asked = {"model": "llama-3.1-8b", "cluster": "1xh100-sxm", "plan": "tp1"}
    answers = [apex_opt.simulate(**asked, trace=trace) for trace in (frame, str(tmp_path / "t.csv"))]
    assert answers[0].best.metrics == answers[1].best.metrics
    assert answers[0].document.question.trace.name == "frame"  # type: ignore[union-attr]
    with pytest.raises(ApexError, match="DataFrame"):
        apex_opt.simulate(**asked, trace=frame.drop(columns="prompt_tokens"))
    with pytest.raises(UsageError, match="--trace: expected a name, a Trace or a DataFrame"):
        apex_opt.simulate(**asked, trace={"arrival_s": [0]})


def test_charts_are_asked_for_by_name_and_saved(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    answer = apex_opt.simulate(**SMALL, plan="tp1")
    assert {"ttft", "tpot", "e2e", "load", "kv", "memory"} <= set(answer.plot().names)
    with pytest.raises(UnknownNameError, match=r"unknown chart of this answer 'tftt'; did you mean ttft or tpot\?"):
        answer.plot("tftt")
    shown = answer.plot("ttft")
    shown.save(tmp_path / "a.svg")
    assert ">TTFT, ms<" in (tmp_path / "a.svg").read_text()
    assert shown._repr_mimebundle_()["image/png"].startswith(b"\x89PNG")
    with pytest.raises(UsageError, match=r"ends in .png or .svg"):
        shown.save(tmp_path / "a.pdf")
    with pytest.raises(UsageError, match="has no charts"):
        apex_opt.clusters().plot()
    assert "<table>" in apex_opt.clusters()._repr_html_()


def test_progress_is_a_bar_where_it_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    apex_opt.simulate(**SMALL, plan="tp1", progress=True).details()
    said = capsys.readouterr()
    assert "simulating for charts ..." in said.err
    assert said.out == ""
