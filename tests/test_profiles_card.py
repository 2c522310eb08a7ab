"""apex_opt.profiles.card: what shipped is whole and described, and bad cards name their faults."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from apex_opt.errors import InputError
from apex_opt.profiles.card import read_card
from apex_opt.profiles.schema import SCHEMAS
from apex_opt.profiles.tables import read_table
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path


ROOT = DATA_ROOT / "profiles"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/*/card.toml"))
OWN = ROOT / "h200-sxm" / "ops"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_every_shipped_table_is_on_its_card_with_its_checksum(folder: Path) -> None:
    card = read_card(folder)
    assert card.name == folder.relative_to(ROOT).as_posix()
    assert card.licence == "Apache-2.0"
    assert {file for _, file, _ in card.tables} == {path.name for path in folder.iterdir()} - {"card.toml"}
    schemas = {schema.name: schema for schema in SCHEMAS}
    for name, file, digest in card.tables:
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
        assert len(read_table(folder / file, schemas[name])["time_us"]) > 10


def test_the_tables_are_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 8e6


def test_only_samples_that_a_power_model_is_fitted_on_are_kept_out_of_look_ups() -> None:
    kept_out = {folder.name for folder in FOLDERS if read_card(folder).use == "energies"}
    assert kept_out == {folder.name for folder in FOLDERS if folder.name.endswith("-power")}


def test_bad_cards_name_all_their_faults(tmp_path: Path) -> None:
    text = (OWN / "card.toml").read_text()
    bad = text.replace("tdp_w = 700", "tdp_w = -1").replace('"gemm.csv"', '"../gemm.csv"').replace("licence", "license")
    (tmp_path / "card.toml").write_text('engine = "vllm2"\nuse = "all"\n' + bad)
    with pytest.raises(InputError) as caught:
        read_card(tmp_path)
    for part in (
        "licence is missing",
        "engine = 'vllm2' must be one of vllm, sglang, trtllm",
        "use = 'all' must be one of times, energies",
        "gpu.tdp_w = -1",
        "'../gemm.csv' must name a .csv or .npz file",
    ):
        assert part in str(caught.value)
    (tmp_path / "card.toml").write_text(text + "\n[tables.gemms]\n")
    with pytest.raises(InputError, match=r"tables\.gemms is not a known field"):
        read_card(tmp_path)


POWER = {
    "active_w": "250",
    "pj_per_flop": "0.6",
    "pj_per_narrow_flop": "0",
    "pj_per_byte": "46",
    "source": '"fitted on something"',
}


def with_power(folder: Path, **changes: str | None) -> Path:
    """A folder with the card of our own tables, its power table rewritten with some fields changed or left out."""
    head, rest = (OWN / "card.toml").read_text().split("[power]")
    fields = {name: value for name, value in (POWER | changes).items() if value is not None}
    body = "".join(f"{name} = {value}\n" for name, value in fields.items())
    (folder / "card.toml").write_text(f"{head}[power]\n{body}\n[tables{rest.partition('[tables')[2]}")
    return folder


def test_a_power_table_is_read_in_joules_and_may_hold_zeros(tmp_path: Path) -> None:
    power = read_card(with_power(tmp_path)).power
    assert power is not None
    assert (power.active_w, power.joule_per_flop_narrow) == (250, 0)
    assert (power.joule_per_flop_half, power.joule_per_byte) == pytest.approx((0.6e-12, 46e-12))
    assert power.source == "fitted on something"
    assert power.spin_w is None
    spun = read_card(with_power(tmp_path, spin_w="91")).power
    assert spun is not None and spun.spin_w == 91
    (tmp_path / "card.toml").write_text((tmp_path / "card.toml").read_text().replace("[power]", "[tables.power]"))
    with pytest.raises(InputError, match=r"tables\.power is not a known field"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active_w": None}, "power.active_w is missing"),
        ({"source": None}, "power.source is missing"),
        ({"pj_per_byte": "-1"}, "power.pj_per_byte = -1 must be from 0"),
        ({"pj_per_flop": '"0.6"'}, "power.pj_per_flop = '0.6' must be a number"),
        ({"pj_per_flop": "inf"}, "power.pj_per_flop = inf must be"),
        ({"joule_per_flop": "1"}, "power.joule_per_flop is not a known field"),
        ({"spin_w": "-1"}, "power.spin_w = -1 must be from 0"),
        ({"active_w": "-1", "pj_per_byte": None}, "power.active_w = -1 must be from 0"),
    ],
)
def test_bad_power_tables_name_field_value_and_limit(
    tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        read_card(with_power(tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_card_may_go_without_a_power_table() -> None:
    powered = {folder.relative_to(ROOT).as_posix() for folder in FOLDERS if read_card(folder).power is not None}
    assert powered == {"h200-sxm/ops", "b200-sxm/vllm-0.22.0-power"}
