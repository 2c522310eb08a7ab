"""The notebook of the docs runs from end to end, and shows what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
pytest.importorskip("ipykernel", reason="ipykernel is not installed")
pytest.importorskip("vl_convert", reason="the extra `report` is not installed")

TOUR = Path(__file__).parent.parent / "docs" / "tour.ipynb"


@pytest.fixture(scope="module")
def tour() -> Any:
    book = nbformat.read(TOUR, as_version=4)
    nbclient.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(TOUR.parent.parent)}}).execute()
    return book


def test_the_tour_runs_and_shows_tables_and_charts(tour: Any) -> None:
    shown = [output.get("data", {}) for cell in tour.cells for output in cell.get("outputs", ())]
    pages = [str(data["text/html"]) for data in shown if "text/html" in data]
    assert any("Certificate" in page and "best plan" in page for page in pages)
    assert sum("image/png" in data for data in shown) == 3
    assert tour.cells[-1].outputs[0]["data"]["text/plain"] == "True"
    assert not [output for cell in tour.cells for output in cell.get("outputs", ()) if output.output_type == "error"]


def test_the_tour_is_kept_without_what_it_showed() -> None:
    kept = nbformat.read(TOUR, as_version=4)
    nbformat.validate(kept)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in kept.cells)
