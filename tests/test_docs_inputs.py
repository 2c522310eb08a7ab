"""docs/inputs.md: the accelerator it describes is read as it says, and its commands run."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

import pytest
from doc_cases import ROOT, blocks_of, commands_of, solve

from apex_opt.cluster import load_cluster

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
(ACCELERATOR,) = (body for kind, body in blocks_of(TEXT) if kind == "toml")


def test_the_accelerator_described_is_the_one_that_is_used(tmp_path: Path) -> None:
    path = tmp_path / "h200-nvl.toml"
    path.write_text(ACCELERATOR, encoding="utf-8")
    cluster = load_cluster(str(path))
    assert (cluster.size, cluster.gpu.name) == (4, "h200-nvl-141gb")


@pytest.mark.slow
@pytest.mark.parametrize("words", commands_of(TEXT), ids=shlex.join)
def test_every_command_shown_runs(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "h200-nvl.toml").write_text(ACCELERATOR, encoding="utf-8")
    done = solve(words, tmp_path)
    assert done.code == 0, done.err
