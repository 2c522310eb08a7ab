"""Charts as specifications: what they show is what tables tell, nothing of it twice alike, in units people read."""

from __future__ import annotations

from typing import Any

import pytest

from apex_opt.report.charts import PALETTE, SHAPES, Chart, Choice, beside, series, shapes, unit_of
from apex_opt.report.charts.chosen import charts_of
from apex_opt.report.charts.front import errors_charts
from apex_opt.report.charts.grid import grid_charts
from apex_opt.report.charts.wiring import placement_chart


@pytest.mark.parametrize(
    ("unit", "values", "head", "first"),
    [
        ("s", [2e-4, None, 5e-4], "x, us", 200.0),
        ("s", [0.2, 0.9], "x, ms", 200.0),
        ("s", [0.2, 1.5], "x, s", 0.2),
        ("J", [2500.0], "x, kJ", 2.5),
        ("B", [3e9], "x, GB", 3.0),
        ("share", [0.25], "x, %", 25.0),
        ("requests/s", [4.0], "x, requests/s", 4.0),
        ("", [4.0], "x", 4.0),
        ("s", [None], "x, us", None),
    ],
)
def test_units_are_those_of_tables(unit: str, values: list[float | None], head: str, first: float | None) -> None:
    found = unit_of(unit, values)
    assert found.head("x") == head
    assert found(values[0]) == (first if first is None else pytest.approx(first))


def test_no_two_of_many_series_look_alike_and_colours_stand_out_from_the_page() -> None:
    names = [f"s{number}" for number in range(len(PALETTE) * (len(SHAPES) - 1))]
    looks = list(zip(series(names)["scale"]["range"], shapes(names)["scale"]["range"], strict=True))
    assert len(set(looks)) == len(names)
    for colour in PALETTE:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 4.5, colour


def test_choices_are_fields_of_the_page_and_no_part_of_a_picture() -> None:
    choices = (
        Choice(field="gpus", label="At most GPUs ", values=(4, 1, 2)),
        Choice(field="kind", label="Of ", values=("a", "b")),
    )
    spec = {"data": {"values": []}, "mark": "point"}
    chart = Chart(name="n", title="t", says="What it shows.", spec=spec, heads=("a",), rows=(), choices=choices)
    page = chart.page_spec()
    assert [param["bind"]["input"] for param in page["params"]] == ["range", "select"]
    assert (page["params"][0]["bind"]["min"], page["params"][0]["value"]) == (1, 4)
    assert page["transform"] == [
        {"filter": "datum['gpus'] <= chosen_gpus"},
        {"filter": "chosen_kind == null || datum['kind'] == chosen_kind"},
    ]
    assert (page["width"], page["description"]) == ("container", "What it shows.")
    assert "params" not in beside([chart, chart], 2)["concat"][0]


def study_rows() -> list[dict[str, Any]]:
    return [
        {"cluster": cluster, "rate": rate, "weights": None, "plan": f"tp{rate}", "energy": 1e3 * rate, "other": "text"}
        for cluster in ("8xh100-sxm", "<b>mine</b>")
        for rate in (1, 2, 4)
    ] + [{"cluster": "8xl40s", "rate": 1, "weights": None, "plan": None, "energy": None}]


def test_a_study_is_shown_along_the_axes_that_vary() -> None:
    (chart,) = grid_charts(study_rows(), ["cluster", "rate", "weights"], {"energy": "J", "other": "", "none": "s"})
    points = chart.spec["data"]["values"]
    assert [point["across"] for point in points] == [1, 2, 4, 1, 2, 4]
    assert [point["y"] for point in points] == [1.0, 2.0, 4.0, 1.0, 2.0, 4.0]
    encoding = chart.spec["encoding"]
    assert (encoding["x"]["title"], encoding["y"]["title"]) == ("rate", "energy, kJ")
    assert encoding["color"]["legend"]["title"] == "cluster"
    assert encoding["color"]["scale"]["domain"] == ["8xh100-sxm", "<b>mine</b>", "8xl40s"]
    assert "shape" not in encoding  # a third axis has one value
    assert chart.heads == ("rate", "cluster", "plan", "energy, kJ")
    assert chart.says == "energy of 6 answers by rate, cluster; 1 point without it."
    assert [choice.label for choice in chart.choices] == ["cluster "]


def test_the_document_of_a_study_is_drawn_with_its_axes_as_numbers_where_they_are() -> None:
    points = [
        {"options": {"rate": rate, "engine": engine}, "plan": "tp1", "figures": {"energy_j": 10.0, "ttft_s.p95": 0.1}}
        for rate in ("1", "2.5")
        for engine in ("vllm", "sglang")
    ] + [{"options": {"rate": "4", "engine": "vllm"}, "plan": None, "figures": {}}]
    found = [chart for _, chart in charts_of({"points": points, "asked": "plan"})]
    assert [chart.name for chart in found] == ["ttft_s.p95", "energy_j"]
    assert [point["across"] for point in found[0].spec["data"]["values"]] == [1.0, 1.0, 2.5, 2.5]
    assert found[0].heads == ("rate", "engine", "plan", "ttft_s.p95, ms")
    assert "1 point without it" in found[0].says


def test_runs_are_told_apart_and_those_set_aside_are_hollow() -> None:
    def row(number: int, aside: bool) -> dict[str, Any]:
        cell = {"measured": 0.1 + number, "predicted": 0.2 + number, "error_pct": 100.0}
        return {
            "status": "predicted",
            "name": f"run {number}",
            "plan": "tp1",
            "cluster": f"c{number}",
            "engine": "vllm",
            "metrics": {"ttft_mean": cell},
            "set_aside": {"ttft_mean": "cold"} if aside else {},
        }

    document = {"units": {"ttft_mean": "s", "energy": "J"}, "rows": [row(n, n == 3) for n in range(10)]}
    (chart,) = errors_charts(document)
    points = chart.spec["data"]["values"]
    assert [point["aside"] for point in points].count(True) == 1
    encoding = chart.spec["layer"][-1]["encoding"]
    assert encoding["fill"]["condition"] == {"test": "datum.aside", "value": "white"}
    looks = zip(encoding["stroke"]["scale"]["range"], encoding["shape"]["scale"]["range"], strict=True)
    assert len(set(looks)) == 10
    assert chart.rows[0] == ("run 0", "tp1", "0.1", "0.2", "+100.0%")
    assert "10 runs" in chart.title


def test_a_plan_of_many_rows_is_drawn_in_part_and_says_so() -> None:
    replicas = [{"replica": number, "stages": [[f"node{number}:0"], [f"node{number}:1"]]} for number in range(40)]
    chart = placement_chart(replicas)
    assert "80 GPUs" in chart.says
    assert "the first 64 of 80 rows are drawn" in chart.says
    assert len(chart.rows) == 64
    assert chart.rows[1] == ("replica 0, stage 1", "0", "node0:1")
