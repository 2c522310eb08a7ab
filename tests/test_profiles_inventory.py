"""What profile folders there are: those that ship, and those of a folder of one's own."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.profiles.inventory import inventory
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

SHIPPED = DATA_ROOT / "profiles"


def test_every_shipped_folder_is_listed_with_its_tables() -> None:
    found = inventory(SHIPPED)
    assert {(holding.accelerator, holding.source) for holding in found} == {
        (path.parent.parent.name, path.parent.name) for path in SHIPPED.glob("*/*/card.toml")
    }
    for holding in found:
        folder = SHIPPED / holding.accelerator / holding.source
        assert {kind for kind, _, _ in holding.tables} == {kind for kind, _, _ in holding.card.tables}
        sizes = sum(path.stat().st_size for path in folder.iterdir())
        assert holding.card_bytes + sum(size for _, _, size in holding.tables) == sizes, "nothing else lies there"
        assert all(rows > 0 for _, rows, _ in holding.tables)


@pytest.mark.parametrize("name", ["h200-sxm", "h200-sxm-141gb", "8xh200-sxm", "h200"])
def test_an_accelerator_goes_by_its_folder_or_by_its_name_in_the_catalogue(name: str) -> None:
    found = inventory(SHIPPED, name)
    assert {holding.accelerator for holding in found} == {"h200-sxm"}
    ops = next(holding for holding in found if holding.source == "ops")
    assert ("memory", 36) in {(kind, rows) for kind, rows, _ in ops.tables}


@pytest.mark.parametrize("name", ["v100-pcie", "h999", "../profiles", ""])
def test_an_accelerator_without_tables_is_named(name: str) -> None:
    with pytest.raises(UnknownNameError, match="accelerator with profiles in"):
        inventory(SHIPPED, name)


def test_a_folder_without_profiles_and_a_faulty_table_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no profile folders"):
        inventory(tmp_path)
    shutil.copytree(SHIPPED / "h200-sxm" / "ops", tmp_path / "mine" / "ops")
    assert len(inventory(tmp_path)) == 1
    (tmp_path / "mine" / "ops" / "gemm.csv").write_text("dtype,m\n")
    with pytest.raises(InputError, match=r"gemm table .*column n is missing"):
        inventory(tmp_path)
