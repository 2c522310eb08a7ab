"""Profile folders as they are written: whole or not at all, and with the power model that was there."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from apex_opt.cluster import load_cluster
from apex_opt.errors import InputError
from apex_opt.profiles import folder as module
from apex_opt.profiles.card import read_card
from apex_opt.profiles.folder import Table, TableReport, lookup_text, write_folder
from apex_opt.profiles.schema import COLLECTIVE, GEMM, PEAK_DTYPES
from apex_opt.profiles.tables import in_bounds, read_table

if TYPE_CHECKING:
    from pathlib import Path

GPU = load_cluster("h200-sxm").gpu
HEAD = {"hardware": 'one "H200"', "software": "", "licence": "MIT", "date": "2026-01-02"}
POWER = '[power]\nactive_w = 1.5\npj_per_flop = 2\npj_per_narrow_flop = 3\npj_per_byte = 4\nsource = "a [fit]"'


def table(rows: int = 3, **changed: Any) -> Table:
    columns = {
        "op": np.array(["all_reduce"] * rows, dtype=object),
        "ranks": np.full(rows, 8.0),
        "bytes": 2.0 ** np.arange(rows),
        "time_us": np.arange(rows) + 1.0,
        "energy_uj": np.full(rows, np.nan),
    }
    fields: dict[str, Any] = {"source_rows": rows + 2, "screened_rows": rows, "dropped": (("odd", 2),)}
    return Table(kind="collective", columns=columns, about="a few", **fields | changed)


def test_a_folder_reads_back_as_it_was_written(tmp_path: Path) -> None:
    target = tmp_path / "h200-sxm" / "mine"
    (report,) = write_folder(target, "makes", HEAD, GPU, [table(error=(0.001, 0.02, 0.001, 0.05))])
    assert (report.folder, report.kind) == ("h200-sxm/mine", "collective")
    assert (report.source_rows, report.screened_rows, report.rows) == (5, 3, 3)
    data = (target / "collective.npz").read_bytes()
    card = read_card(target)
    assert card.tables == (("collective", "collective.npz", hashlib.sha256(data).hexdigest()),)
    assert report.file_bytes == len(data)
    assert (card.name, card.licence, card.date, card.gpu) == ("h200-sxm/mine", "MIT", "2026-01-02", GPU.name)
    assert dict(card.texts) == {"hardware": 'one "H200"'}, "texts that are empty are left out"
    peaks = {dtype: flops for dtype, flops in GPU.flops_per_s if dtype in PEAK_DTYPES}
    assert dict(card.flops_per_s) == pytest.approx(peaks)
    found = read_table(target / "collective.npz", COLLECTIVE)
    assert found["time_us"] == pytest.approx([1, 2, 3], rel=1e-3)
    text = (target / "card.toml").read_text()
    assert text.startswith("# Written by the command that makes tables.")
    assert "odd: 2 rows" in text
    assert lookup_text(report) in text


def test_equal_tables_give_equal_bytes_and_what_was_there_goes(tmp_path: Path) -> None:
    target = tmp_path / "h200-sxm" / "mine"
    write_folder(target, "makes", HEAD, GPU, [table()])
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    (target / "more.npz").write_text("of an earlier time")
    write_folder(target, "makes", HEAD, GPU, [table()])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in target.parent.iterdir()] == ["mine"]


def test_a_power_model_stays_where_it_was_fitted(tmp_path: Path) -> None:
    target = tmp_path / "h200-sxm" / "mine"
    write_folder(target, "makes", HEAD, GPU, [table()])
    card = target / "card.toml"
    text = card.read_text()
    card.write_text(text.replace("\n[tables.", f"\n{POWER}\n\n[tables.", 1))
    fitted = card.read_text()
    power = read_card(target).power
    assert power is not None
    assert (power.active_w, power.source) == (1.5, "a [fit]")
    write_folder(target, "makes", HEAD, GPU, [table()])
    assert card.read_text() == fitted


def test_a_folder_that_is_no_profile_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "h200-sxm" / "mine"
    target.mkdir(parents=True)
    write_folder(target, "makes", HEAD, GPU, [table()])  # an empty one is as good as none
    other = tmp_path / "h200-sxm" / "photos"
    other.mkdir()
    (other / "me.jpg").write_text("smile")
    with pytest.raises(InputError, match=r"photos: holds files and no card\.toml; .* name another --target"):
        write_folder(tmp_path / "missing" / ".." / "h200-sxm" / "photos", "makes", HEAD, GPU, [table()])
    assert (other / "me.jpg").is_file() and not (tmp_path / "missing").exists()
    with pytest.raises(InputError, match=r"photos: holds files and no card\.toml; .* name another --target"):
        write_folder(other, "makes", HEAD, GPU, [table()])
    assert (other / "me.jpg").read_text() == "smile"
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        write_folder(tmp_path / "file" / "mine", "makes", HEAD, GPU, [table()])


def test_a_write_that_breaks_off_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "h200-sxm" / "mine"
    write_folder(target, "makes", HEAD, GPU, [table()])
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_table", full)
        with pytest.raises(InputError, match=r"mine: cannot be written \(No space left on device\)"):
            write_folder(target, "makes", HEAD, GPU, [table(5)])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    write_folder(target, "makes", HEAD, GPU, [table(5)])
    assert len(read_table(target / "collective.npz", COLLECTIVE)["bytes"]) == 5
    assert [path.name for path in target.parent.iterdir()] == ["mine"], "what the broken one left is gone"


def test_a_report_without_an_error_has_no_words_for_it() -> None:
    fields: dict[str, Any] = {"folder": "x/y", "kind": "gemm", "source_rows": 9, "screened_rows": 1000, "rows": 5}
    assert lookup_text(TableReport(**fields, file_bytes=1, dropped=(), error=None)) == ""
    assert lookup_text(TableReport(**fields, file_bytes=1, dropped=(), error=(0.001, 0.02, 0.001, 0.05))) == (
        "look-up error over all 1,000 screened rows: median 0.1%, P95 2.0%; "
        "with the lone rows put back: median 0.1%, P95 5.0%"
    )


@pytest.mark.parametrize(
    ("name", "values", "good"),
    [
        ("m", [1.0, 0.0, 1.5, np.nan, 2.0**31], [True, False, False, False, True]),
        ("time_us", [1.0, 0.0, np.nan, np.inf, 1e9], [True, False, False, False, True]),
        ("energy_uj", [1.0, 0.0, np.nan, -1.0, 1e12], [True, False, True, False, True]),
    ],
)
def test_numbers_out_of_bounds_are_found(name: str, values: list[float], good: list[bool]) -> None:
    columns: dict[str, Any] = {column: np.ones(5) for column in ("m", "n", "k", "time_us", "energy_uj")}
    columns["dtype"] = np.array(["bf16"] * 5, dtype=object)
    assert in_bounds(GEMM, columns | {name: np.array(values)}).tolist() == good
