"""apex_opt.profiles.schema: every column of every kind is described."""

from __future__ import annotations

from apex_opt.profiles.schema import SCHEMAS
from apex_opt.units import DATA_ROOT

ROOT = DATA_ROOT / "profiles"


def test_the_data_dictionary_names_every_column() -> None:
    text = (ROOT / "README.md").read_text()
    for schema in SCHEMAS:
        assert f"| {schema.name} |" in text
        assert all(column.name in text and column.meaning for column in schema.columns)
