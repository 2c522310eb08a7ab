"""Sizes of models as read, against those their publishers state: one table for all families."""

import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from apex_opt.ir import Model, load_model

CASES = Path(__file__).parent / "cases"
PUBLISHED: dict[str, dict[str, Any]] = {
    name: {"file": file.stem, **row}
    for file in sorted((CASES / "published").glob("*.toml"))
    for name, row in tomllib.loads(file.read_text()).items()
}
ACTIVE = [name for name, row in PUBLISHED.items() if "active" in row]
OUTSIDE = {"": 0, "embedding": 1, "embedding and head": 2}


def read(name: str) -> Model:
    """The model of a row: a file of `cases/models`, or a name of the registry."""
    file = CASES / "models" / f"{name}.json"
    return load_model(str(file) if file.exists() else name)


def test_every_row_says_where_its_figures_are_from() -> None:
    assert all(row["source"] and row["parameters"] > 0 for row in PUBLISHED.values())
    assert all(row.get("active_without", "") in OUTSIDE for row in PUBLISHED.values())


def test_every_configuration_has_a_row() -> None:
    assert {file.stem for file in (CASES / "models").glob("*.json")} <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name: str) -> None:
    """Within 0.5%, or half a unit of the last digit where the publisher rounds to fewer than three."""
    model, row = read(name), PUBLISHED[name]
    tower = model.tower.parameters if model.tower is not None and row.get("with_tower") else 0
    unit = row.get("unit", 0)
    assert model.parameters + tower == pytest.approx(row["parameters"], rel=0.005, abs=unit / 2)


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters_are_those_published(name: str) -> None:
    """Within 0.5%, or a unit of the last digit that is printed: some round, some cut."""
    model, row = read(name), PUBLISHED[name]
    left_out = OUTSIDE[row.get("active_without", "")]
    active = model.active_parameters - left_out * model.embedding_parameters
    stated = Decimal(row["active"])
    unit = Decimal(1).scaleb(int(stated.as_tuple().exponent))
    assert active / 1e9 == pytest.approx(float(stated), rel=0.005, abs=float(unit))
