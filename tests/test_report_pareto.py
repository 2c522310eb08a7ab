"""The front for people, for programs and as a picture: the same plans and figures in each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import make_cluster, make_problem, random_trace

from apex_opt.errors import InputError
from apex_opt.figures import load_objective
from apex_opt.ir import load_model
from apex_opt.report.charts.front import front_charts
from apex_opt.report.layout import kilojoules
from apex_opt.report.pareto import pareto_document, pareto_page
from apex_opt.report.picture import write_picture
from apex_opt.schema import to_plain
from apex_opt.studies.pareto import pareto
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from pathlib import Path


def document(*names: str, slo: str = "") -> dict[str, Any]:
    problem = make_problem(load_model("llama-3.1-8b"), make_cluster(4), random_trace(5, 30), slo)
    front = pareto(problem, [load_objective(name) for name in names], PlanSpace())
    return to_plain(pareto_document(problem, front, {"gemm": "measured"}))


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def test_the_table_has_the_plans_of_the_document_in_its_order() -> None:
    found = document("e2e_mean", "energy")
    text = pareto_page(found)
    assert len(found["candidates"]) > 1
    places = [text.index(f" {row['plan']} ") for row in found["candidates"]]
    assert places == sorted(places)
    assert f"front of e2e_mean against energy: {len(found['candidates'])} plans" in text
    assert "every plan is accounted for, gap 0.0%" in " ".join(text.split())
    for row in found["candidates"]:
        assert row["values"]["energy"] == row["metrics"]["energy_j"]
        assert row["values"]["e2e_mean"] == row["metrics"]["e2e_s"]["mean"]
        assert f"{kilojoules(row['values']['energy'])} kJ" in text
    assert json.loads(json.dumps(found)) == found


def test_where_there_is_no_plan_the_reason_is_shown() -> None:
    found = document("e2e_mean", "energy", slo="ttft_p95<=1us")
    assert (found["status"], found["candidates"]) == ("infeasible", [])
    assert found["reason"] in " ".join(pareto_page(found).split())


@pytest.mark.parametrize("names", [("e2e_mean", "energy"), ("ttft_p95", "throughput", "energy")])
def test_the_picture_is_a_png_and_nothing_is_left_beside_it(tmp_path: Path, names: tuple[str, ...]) -> None:
    pytest.importorskip("vl_convert")
    write_picture(tmp_path / "front.png", *front_charts(document(*names)))
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["front.png"]


def test_the_picture_may_be_an_svg(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    write_picture(tmp_path / "front.svg", *front_charts(document("e2e_mean", "energy")))
    assert (tmp_path / "front.svg").read_bytes().startswith(b"<svg")


def test_a_picture_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    with pytest.raises(InputError, match="cannot be written"):
        write_picture(tmp_path / "nowhere" / "front.png", *front_charts(document("e2e_mean", "energy")))


@pytest.mark.parametrize(("names", "pairs"), [(("e2e_mean", "energy"), 1), (("ttft_p95", "throughput", "energy"), 3)])
def test_every_plan_of_the_front_has_its_number_and_units_are_those_of_tables(
    names: tuple[str, ...], pairs: int
) -> None:
    found = document(*names)
    charts = list(front_charts(found))
    assert len(charts) == pairs
    for chart in charts:
        numbers = [row["n"] for row in chart.spec["data"]["values"] if row["n"]]
        assert numbers == [str(rank) for rank in range(1, len(found["candidates"]) + 1)]
        labels = [layer for layer in chart.spec["layer"] if layer["mark"].get("type") == "text"]
        asides = {(row["dx"], row["dy"]) for row in chart.spec["data"]["values"] if row["n"]}
        assert len(labels) == len(asides)  # a layer for each place that numbers stand at
        assert [row[0] for row in chart.rows] == numbers
        if "energy" in chart.title:
            assert "energy, kJ" in chart.heads
            kj = [row["values"]["energy"] / 1e3 for row in found["candidates"]]
            axis = "x" if chart.title.startswith("energy") else "y"
            assert [row[axis] for row in chart.spec["data"]["values"] if row["n"]] == pytest.approx(kj, rel=1e-5)


def test_axes_that_are_logarithmic_say_so() -> None:
    chart = next(iter(front_charts(document("e2e_mean", "energy"))))
    titles = [chart.spec["layer"][-1]["encoding"][axis]["title"] for axis in "xy"]
    assert all(title.endswith(", logarithmic") for title in titles)
    assert not any("logarithmic" in head for head in chart.heads)
