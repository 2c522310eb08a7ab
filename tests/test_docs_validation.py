"""docs/validation.md: its errors are those that `validate` finds in the measured runs."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from doc_cases import ROOT, solve

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TEXT = (ROOT / "docs" / "validation.md").read_text(encoding="utf-8")
MEASURED = ROOT.parent / "shared" / "measured"
SETS = {"H200": "h200-vllm-0.20.2", "8 H100": "apex-8xh100.csv", "closed loops": "silicon/agg_dev.csv"}
FIGURES = {"TTFT": "ttft_mean", "TPOT": "tpot_mean", "ITL": "itl_mean", "E2E": "e2e_mean", "energy": "energy"}


def _errors(label: str, figures: Iterable[str], summary: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Rows of a table of errors as the page has them."""
    rows = []
    for figure in figures:
        error = summary[FIGURES[figure]]
        numbers = f"{error['mean_ape_pct']:.1f}% | {error['median_ape_pct']:.1f}% | {error['bias_pct']:+.1f}%"
        rows.append(f"| {label} | {figure} | {numbers} | {error['n']:,} |")
    return rows


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize(
    "name",
    # The closed loops, more than a thousand runs, take half a minute.
    [pytest.param(name, marks=pytest.mark.nightly if name == "closed loops" else ()) for name in SETS],
)
def test_the_errors_shown_are_those_that_validate_finds(name: str) -> None:
    path = MEASURED / SETS[name]
    if not path.exists():
        pytest.skip(f"no measured runs in {path}")
    shown = re.findall(rf"^\| {name} \| ([A-Za-z]\w*) \|", TEXT, re.MULTILINE)
    assert len(shown) >= 2
    document = json.loads(solve(["validate", "--measured", str(path), "--format", "json"]).out)
    for row in _errors(name, shown, document["summary_by"]["half"]["judged"]):
        assert row in TEXT
    covered = document["coverage"]
    assert f"{covered['predicted']:,} of {covered['total']:,}" in TEXT
