"""From a path to runs: layouts told by content, folders searched, what holds no runs named."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest
from measured_cases import engine, write_runs

from apex_opt.errors import InputError
from apex_opt.measured.apex import NEEDED as APEX_COLUMNS
from apex_opt.measured.readers import read_measured
from apex_opt.measured.silicon import NEEDED as SILICON_COLUMNS
from apex_opt.plans.engine import EngineSettings

if TYPE_CHECKING:
    from pathlib import Path

RUNS = {"a": {"requests": [[0.0, 0.1, 0.2, 10, 5]]}}
BLOCK = engine(EngineSettings())


def test_a_folder_is_searched_to_the_bottom_and_the_rest_is_named(tmp_path: Path) -> None:
    deep = tmp_path / "b" / "c"
    deep.mkdir(parents=True)
    write_runs(deep / "x.json.gz", RUNS, BLOCK)
    write_runs(tmp_path / "y.json", RUNS | {"b": RUNS["a"]}, BLOCK)
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "gemm.csv").write_text("m,n,k,time_us\n1,1,1,1\n")
    (tmp_path / "x.config.json").write_text('{"model_type": "llama"}')
    (tmp_path / ".hidden.json").write_text("not json")
    found = read_measured(tmp_path)
    assert [run.name for run in found.runs] == ["x/a", "y/a", "y/b"]
    assert len(found.files) == 2
    assert [path.rpartition("/")[2] for path in found.passed_over] == ["README.md", "gemm.csv", "x.config.json"]


@pytest.mark.parametrize(("columns", "missing"), [(SILICON_COLUMNS, "silicon_tpot_ms"), (APEX_COLUMNS, "e2e_mean_s")])
def test_a_table_that_lacks_a_column_is_one_with_a_fault(
    tmp_path: Path, columns: tuple[str, ...], missing: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(",".join(name for name in columns if name != missing) + "\n")
    for asked in (path, tmp_path):
        with pytest.raises(InputError, match=f"t.csv: missing column {missing}"):
            read_measured(asked)


def test_a_file_asked_for_must_hold_runs(tmp_path: Path) -> None:
    for name, content in (("a.csv", "x,y\n1,2\n"), ("a.json", "{}"), ("a.txt", "hello")):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=rf"{name}: not a known layout of measured runs; expected .*silicon_ttft"):
            read_measured(tmp_path / name)


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no measured runs; expected"):
        read_measured(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        read_measured(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no such file or folder|cannot be read"):
        read_measured(tmp_path / ("x" * 5000))


def test_a_broken_file_in_a_folder_is_not_passed_over(tmp_path: Path) -> None:
    write_runs(tmp_path / "a.json.gz", RUNS, BLOCK)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps(RUNS).encode())[:30])
    with pytest.raises(InputError, match=r"b\.json\.gz: not a whole gzip file"):
        read_measured(tmp_path)
