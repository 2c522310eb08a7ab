"""Files of measurements: whole ones are read, others refused in one line that says where."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING

import pytest

from apex_opt.errors import InputError
from apex_opt.measured.files import read_json, read_rows, read_text

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.measured.files import Row


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_packed_file_reads_like_a_plain_one(tmp_path: Path) -> None:
    text = "\ufeff" + '{"a": [1, 2.5]}'
    plain = write(tmp_path / "a.json", text)
    packed = write(tmp_path / "a.json.gz", gzip.compress(text.encode()))
    assert read_json(plain) == read_json(packed) == {"a": [1, 2.5]}


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(b"x" * 9999)[:20], b"\x1f\x8b"], ids=range(3))
def test_a_file_that_is_no_whole_gzip_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"a\.json\.gz: (not a whole gzip file|not JSON)"):
        read_json(write(tmp_path / "a.json.gz", content))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n "b" 2}', r"not JSON at line 2 column 6"),
        ('{"a": NaN}', r"holds NaN, which is no JSON number"),
        ('{"a": -Infinity}', r"holds -Infinity"),
        ("[" * 100_000, r"nested too deeply"),
        ('{"a": ' + "9" * 10_000 + "}", r"too many digits"),
        ("", r"the file is empty"),
    ],
)
def test_json_with_faults_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_json(write(tmp_path / "a.json", text))


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 2 is not UTF-8"):
        read_text(write(tmp_path / "a.csv", b"a,b\n\xff\xfe"))
    for name, said in ((".", "not a regular file but a folder"), ("nothing.csv", "no such file")):
        with pytest.raises(InputError, match=f"{said}; name a file of measured runs or its folder"):
            read_text(tmp_path / name)


def row_of(tmp_path: Path, cell: str) -> Row:
    (row,) = read_rows(write(tmp_path / "a.csv", f"x,y\n\n{cell},1\n"), ("x",))
    return row


def test_rows_know_their_line_and_their_numbers(tmp_path: Path) -> None:
    row = row_of(tmp_path, " 2.0 ")
    assert (row.line, row.number("x"), row.whole("x"), row.whole("y")) == (3, 2.0, 2, 1)
    blank = row_of(tmp_path, " ")
    assert blank.number("x") is None is blank.whole("x")


@pytest.mark.parametrize("cell", ["-1", "nan", "inf", "1e999", "two", "1_0x"])
def test_a_cell_that_is_no_number_from_0_is_refused_with_its_line(tmp_path: Path, cell: str) -> None:
    with pytest.raises(InputError, match=r"a\.csv: line 3: x .* is not a finite number of at least 0"):
        row_of(tmp_path, cell).number("x")


@pytest.mark.parametrize("cell", ["1.5", "1e30"])
def test_a_count_that_is_not_whole_is_refused(tmp_path: Path, cell: str) -> None:
    with pytest.raises(InputError, match=r"line 3: x .* is not a whole number"):
        row_of(tmp_path, cell).whole("x")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "missing column x; found none"),
        ("a,b\n1,2\n", "missing column x; found a, b"),
        ("x,b\n", "columns but no rows"),
        ("x,b\n1,2\n1\n", "line 3 has 1 cells under 2 columns"),
        ('x,b\n1,"' + "y" * 200_000 + '"\n', "line .* is not CSV"),
    ],
)
def test_a_table_of_another_form_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_rows(write(tmp_path / "a.csv", text), ("x",))
