"""docs/clusters.md: its file and its matrix are read, its outputs are those printed, its presets are those there."""

from __future__ import annotations

import json
import re
import tomllib
from typing import TYPE_CHECKING

import pytest
from doc_cases import ROOT, blocks_of, solve, words_of

from apex_opt.cluster import list_presets
from apex_opt.cluster.importers import import_cluster

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(TEXT)
MATRIX, LIST = (body for kind, body in BLOCKS if kind == "text")
LAB, MIXED = (body for kind, body in BLOCKS if kind == "toml")


@pytest.mark.parametrize("body", [body for kind, body in BLOCKS if kind == "console"], ids=lambda body: body[:60])
def test_the_output_shown_is_the_output_printed(body: str, tmp_path: Path) -> None:
    (tmp_path / "lab.toml").write_text(LAB)
    (tmp_path / "mixed.toml").write_text(MIXED)
    (tmp_path / "topo.txt").write_text(MATRIX)
    command, *shown = body.splitlines()
    words = words_of(command)
    assert words is not None
    printed = " ".join(solve(words, tmp_path).out.split())
    for part in " ".join(" ".join(shown).split()).split("..."):
        assert part.strip() in printed


@pytest.mark.slow
def test_with_few_requests_the_faster_type_serves_them_best_alone(tmp_path: Path) -> None:
    (tmp_path / "mixed.toml").write_text(MIXED)
    done = solve(["plan", "--cluster", "mixed.toml", "--top", "1", "--format", "json"], tmp_path)
    document = json.loads(done.out)
    assert [part["gpu"] for part in document["best"]["parts"]] == ["h100-sxm-80gb"]
    assert f"{document['question']['trace']['rate_per_s']:.2f} requests/s of the `chat` trace" in TEXT


def test_the_list_is_read(tmp_path: Path) -> None:
    (tmp_path / "nodes.txt").write_text(LIST)
    assert sum(count for count, _ in import_cluster(tmp_path / "nodes.txt")[0].nodes) == 3


def test_every_preset_and_every_field_is_explained() -> None:
    table = TEXT.split("## Presets")[1].split("## Nodes")[0]
    assert set(re.findall(r"`([a-z0-9]+-[a-z0-9]+)`", table)) == set(list_presets())
    fields = set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE))
    used = tomllib.loads(LAB)
    assert {*used["network"], *(field for node in used["nodes"] for field in node)} <= fields
