"""docs/placement.md: its outputs are those printed, its table is what `place` finds, its file is read."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from doc_cases import ROOT, blocks_of, solve, words_of

from apex_opt.cluster import list_presets
from apex_opt.described import COMMANDS
from apex_opt.report.layout import seconds

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "docs" / "placement.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(TEXT)
RUNS = [body for kind, body in BLOCKS if kind == "console"]
(RACK,) = (body for kind, body in BLOCKS if kind == "toml")
(RANKS,) = (body for kind, body in BLOCKS if kind == "text")
ROW = re.compile(
    r"^\| `(?P<cluster>[\w-]+)` \| (?:none|`(?P<busy>[\w:,-]+)`) \| `(?P<plan>[\w ]+)` \| (?P<where>[^|]+) "
    r"\| (?P<best>[^|]+) \| (?P<ordered>[^|]+) \| (?P<loss>[^|]+) \|$",
    re.MULTILINE,
)
ROWS = [match.groupdict() for match in ROW.finditer(TEXT)]


def placed(*words: str, cwd: Path = ROOT) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(solve(["place", *words, "--format=json"], cwd).out)
    return document


@pytest.mark.parametrize("body", RUNS, ids=lambda body: " ".join(body.splitlines()[0].split()[3:9]))
def test_the_output_shown_is_the_output_printed(body: str, tmp_path: Path) -> None:
    (tmp_path / "rack.toml").write_text(RACK)
    command, *shown = body.splitlines()
    words = words_of(command)
    assert words is not None
    done = solve(words, tmp_path)
    assert done.code == (3 if "infeasible" in body else 0)
    printed = " ".join(done.out.split())
    for part in " ".join(" ".join(shown).split()).split("..."):
        assert part.strip() in printed


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['cluster']} {row['plan']}")
def test_the_clusters_are_as_the_table_has_them(row: dict[str, str]) -> None:
    model = "llama-3.1-8b" if re.search("l40s|v100", row["cluster"]) else "llama-3.1-70b"
    words = [f"--plan={row['plan']}", f"--model={model}", f"--cluster={row['cluster']}"]
    document = placed(*words, *([f"--busy={row['busy']}"] if row["busy"] else []))
    best, ordered = document["placement"], document["rank_order"]
    assert document["status"] == "optimal"
    assert (row["best"], row["ordered"]) == (seconds(best["collectives_s"]), seconds(ordered["collectives_s"]))
    assert row["loss"] == f"{100 * ordered['collectives_loss']:+,.1f}%"
    for shown, replica in zip(row["where"].removesuffix(" ...").split("; "), best["replicas"], strict=False):
        named = [part.partition(":") for part in shown.split(", ")]
        gpus = [
            f"{node}:{gpu}"
            for node, _, span in named
            for gpu in range(int(span.split("-")[0]), int(span.split("-")[-1]) + 1)
        ]
        assert [gpu for stage in replica["stages"] for gpu in stage] == gpus


def test_the_table_has_six_presets() -> None:
    assert (
        {re.sub(r"^\dx", "", row["cluster"]) for row in ROWS}
        == {
            "dgx-a100",
            "dgx-h100",
            "nvl72-gb200",
            "server-8xl40s",
            "server-4xv100",
            "cloud-8xh100",
        }
        <= set(list_presets())
    )


def test_the_rank_file_begins_as_shown(tmp_path: Path) -> None:
    words = words_of(RUNS[0].splitlines()[0])
    assert words is not None
    assert solve([*words, "--rankfile=ranks.txt"], tmp_path).code == 0
    assert (tmp_path / "ranks.txt").read_text().startswith(RANKS)


def test_every_option_of_its_own_is_explained() -> None:
    for option in ("within", "lose", "at", "rankfile", "plot", "max_model_len"):
        assert COMMANDS["place"].option(option)
        assert f"`--{option}" in TEXT
