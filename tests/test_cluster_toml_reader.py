"""The strict TOML reader: it gathers faults instead of stopping at the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from apex_opt.cluster.toml_reader import TomlTable, read_toml, shown
from apex_opt.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def test_getters_note_faults_and_return_none() -> None:
    faults: list[str] = []
    table = TomlTable({"a": "text", "b": True, "c": float("nan"), "d": [], "e": " "}, "t", faults)
    assert table.number("a", high=1.0) is None
    assert table.integer("b", high=1) is None
    assert table.number("c", high=1.0) is None
    assert table.table("d") is None
    assert table.text("e") is None
    assert table.tables("d") == []
    assert table.numbers("d", high=1.0) == []
    assert table.switch("a") is None
    assert table.integer("absent", high=1, required=False) is None
    assert table.switch("absent", required=False) is None
    assert len(faults) == 8
    assert table.switch("b") is True
    assert all(fault.startswith("t.") for fault in faults)


@pytest.mark.parametrize("value", ["two\nlines", "a\x1b[31mb", "a\u2028b", "a\x9bb"])
def test_a_text_is_one_line_of_what_is_printed(value: str) -> None:
    faults: list[str] = []
    assert TomlTable({"name": value}, "t", faults).text("name") is None
    assert len(faults) == 1 and faults[0].endswith("must be one line of printable text")
    assert faults[0].isprintable()


@pytest.mark.parametrize("value", [[1.0], [2.0, 1.0], [1.0, float("nan")], [1.0, True], [0.0, 1.0], [1, 10**400], "12"])
def test_number_lists_must_rise_and_stay_in_range(value: object) -> None:
    faults: list[str] = []
    assert TomlTable({"x": value}, "", faults).numbers("x", high=1e6) == []
    assert len(faults) == 1


def test_values_too_long_to_print_are_shortened() -> None:
    assert shown(10**5000) == "a huge number"
    assert len(shown("y" * 500)) == 60


def test_deep_nesting_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "deep.toml"
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.toml"):
        read_toml(path, "file")


@pytest.mark.parametrize("text", ["a{} = 1", "[a{}]", "x = {{ a{} = 1 }}", "a . 'b' {} = 1"])
def test_keys_of_very_many_parts_are_refused_before_they_take_time(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text.format(" . a" * 65))
    with pytest.raises(InputError, match=r"cluster file .*: a key of more than 64 parts"):
        read_toml(path, "cluster file")
    path.write_text(text.format(".a" * 60))
    read_toml(path, "cluster file")


def test_many_numbers_and_names_are_no_key(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'x = [{"1.5, " * 500}]\ny = "a.b"\n' + "".join(f"[n.a{i}]\nv = 1.5\n" for i in range(500)))
    assert len(read_toml(path, "cluster file")["n"]) == 500
