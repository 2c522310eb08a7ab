"""Profile tables and cards: what shipped is whole and described, and bad ones are refused line by line."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from apex_opt.errors import InputError
from apex_opt.profiles.schema import GEMM, MEMORY, SCHEMAS, read_card, read_table
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

FOLDERS = sorted(path.parent for path in (DATA_ROOT / "profiles").glob("*/card.toml"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_shipped_table_is_on_its_card_with_its_checksum(folder: Path) -> None:
    card = read_card(folder)
    assert card.licence == "Apache-2.0"
    assert {file for _, file, _ in card.tables} == {path.name for path in folder.glob("*.csv")}
    schemas = {schema.name: schema for schema in SCHEMAS}
    for name, file, digest in card.tables:
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest
        assert len(read_table(folder / file, schemas[name])["time_us"]) > 10


def test_the_data_dictionary_names_every_column() -> None:
    text = (DATA_ROOT / "profiles" / "README.md").read_text()
    for schema in SCHEMAS:
        assert f"| {schema.name} |" in text
        assert all(column.name in text and column.meaning for column in schema.columns)


def test_columns_may_come_in_any_order_and_optional_ones_may_lack(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("time_us,k,n,m,dtype\n1.5,3,2,1,float8\n")
    table = read_table(tmp_path / "t.csv", GEMM)
    assert (table["dtype"][0], table["m"][0], table["k"][0], table["time_us"][0]) == ("fp8", 1, 3, 1.5)
    assert np.isnan(table["energy_uj"][0])


GOOD = "dtype,m,n,k,time_us,energy_uj\nbfloat16,1,2,3,4.5,\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty; the header must be dtype,m,n,k,time_us,energy_uj"),
        ("dtype,m,n,k,time_us,energy_uj\n", "a header and no rows"),
        (GOOD.replace("time_us", "seconds"), "column time_us is missing; column 'seconds' is not known"),
        (GOOD.replace("k,", "m,"), "column m is there 2 times"),
        (GOOD + "bfloat16,1,2\n", "line 3 has 3 fields instead of 6"),
        (GOOD + "bfloat16,1,2,3,9,\n", "line 3 repeats the key of line 2"),
        (GOOD.replace(",1,", ",1.5,"), "line 2: m = '1.5' must be a whole number above 0"),
        (GOOD.replace(",1,", ",0,"), "line 2: m = '0'"),
        (GOOD.replace(",1,", ",x,"), "line 2: m = 'x'"),
        (GOOD.replace(",1,", ",,"), "line 2: m = ''"),
        (GOOD.replace("4.5", "nan"), "line 2: time_us = 'nan' must be a number"),
        (GOOD.replace("4.5", "inf"), "line 2: time_us = 'inf'"),
        (GOOD.replace("4.5", "-1"), "line 2: time_us = '-1'"),
        (GOOD.replace("4.5,", "4.5,nan"), "line 2: energy_uj = 'nan'"),
        (GOOD.replace("bfloat16", "int3"), "line 2: dtype = 'int3' must be one of bfloat16, float16, float8"),
        (GOOD.replace("bfloat16", '"bf'), "not CSV"),
    ],
)
def test_bad_tables_name_line_column_value_and_limit(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gemm.csv"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_table(path, GEMM)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_the_first_five_faults_are_spelled_out(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    path.write_text("op,bytes,time_us\n" + "".join(f"norm{row},-1,1\n" for row in range(9)))
    with pytest.raises(InputError, match=r"line 2: .*line 6: .*and 4 more"):
        read_table(path, MEMORY)


def test_tables_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for path, message in (("bytes.csv", "not UTF-8"), (".", "cannot be read"), ("no.csv", "no such file")):
        with pytest.raises(InputError, match=message):
            read_table(tmp_path / path, GEMM)


def test_bad_cards_name_all_their_faults(tmp_path: Path) -> None:
    text = (FOLDERS[0] / "card.toml").read_text()
    bad = text.replace("tdp_w = 700", "tdp_w = -1").replace('"gemm.csv"', '"../gemm.csv"').replace("licence", "license")
    (tmp_path / "card.toml").write_text(bad)
    with pytest.raises(InputError) as caught:
        read_card(tmp_path)
    for part in (
        "licence is missing",
        "gpu.tdp_w = -1",
        "'../gemm.csv' must name a .csv file",
        "license is not a known",
    ):
        assert part in str(caught.value)
