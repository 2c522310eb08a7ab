"""docs/models.md: its output is that printed, its methods are those read, its limits those derived."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from configurations import published, row_of, shown
from doc_cases import ROOT, blocks_of, solve, words_of

from apex_opt.errors import UnknownNameError
from apex_opt.ir import load_model
from apex_opt.ir.context import context_limit
from apex_opt.ir.fields import Fields
from apex_opt.ir.formats import FORMATS
from apex_opt.ir.quantisation import SUPPORTED_METHODS

if TYPE_CHECKING:
    from pathlib import Path

OTHERWISE = {
    "mistralai/Mixtral-8x22B-v0.1": "its name stands for the vocabulary of the checkpoints that followed",
    "moonshotai/Kimi-K3": "its name stands for the decoder without the tower, by whose heads vLLM cuts",
}
"""Names of the registry for other revisions than those of the package, each with the reason."""

TEXT = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("body", [body for kind, body in blocks_of(TEXT) if kind == "console"])
def test_the_output_shown_is_the_output_printed(body: str, tmp_path: Path) -> None:
    command, *shown = body.splitlines()
    words = words_of(command)
    assert words is not None
    words = [str(ROOT / word) if word.startswith("tests/") else word for word in words]
    printed = " ".join(solve(words, tmp_path).out.split())
    for part in " ".join(" ".join(shown).split()).split("..."):
        assert part.strip() in printed


SEEN = {
    "gpt-oss-20b": {"layer_types": ["full_attention"] * 24},
    "tests/cases/models/gemma-4-26b-a4b.json": {"sliding_window": 262_144},
    "tests/cases/models/minimax-text-01.json": {"attn_type_list": [1] * 80},
}
"""Models of the plans that used to be called infeasible, and what makes all their layers see all of the context."""


@pytest.mark.parametrize("name", SEEN)
def test_plans_that_used_to_be_infeasible_would_be_if_all_layers_kept_all_tokens(name: str, tmp_path: Path) -> None:
    body = next(body for kind, body in blocks_of(TEXT) if kind == "console" and name in body and "best plan" in body)
    words = words_of(body.splitlines()[0])
    assert words is not None
    file = ROOT / name if "/" in name else ROOT / "apex_opt" / "ir" / "configs" / f"{name}.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config.get("text_config", config).update(SEEN[name])
    (full := tmp_path / "full.json").write_text(json.dumps(config), encoding="utf-8")
    ran = solve([str(full) if word == name else word for word in words])
    assert ran.code == 3
    needed, usable = re.findall(r"a GPU needs ([\d.]+) GB.* may use ([\d.]+)\.", " ".join(ran.out.split()))[0]
    assert f"| {needed} GB of {usable} |" in TEXT


def test_a_million_tokens_of_minimax_take_what_its_publisher_says() -> None:
    held = 1e6 * load_model(str(ROOT / "tests" / "cases" / "models" / "minimax-text-01.json")).kv_bytes_per_token(2)
    assert f"{held / 1e9:.1f} GB ({held / 2**30:.1f} GiB) for every million" in TEXT


def test_the_methods_listed_are_those_that_are_read() -> None:
    rows = re.findall(r"^\| ((?:`[a-z0-9_-]+`(?:, )?)+) \| ([^|]*\b(?:fp8|w4a16|mxfp4)\b[^|]*) \|", TEXT, re.MULTILINE)
    assert [name for names, _ in rows for name in re.findall("`([^`]+)`", names)] == list(SUPPORTED_METHODS)
    named = {word for _, text in rows for word in re.findall(r"\b(?:fp8|nvfp4|mxfp4|w\da\d+(?:g\d+)?)\b", text)}
    assert named <= set(FORMATS)


def test_the_limits_listed_are_those_derived() -> None:
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*length[^|]*) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 3
    for names, text in rows:
        for name in re.findall("`([^`]+)`", names):
            scaling = {"type": name, "original_max_position_embeddings": 100}
            if "length x factor" in text or "x factor" in text:
                scaling["factor"] = 3
            limit = context_limit(Fields({"max_position_embeddings": 1000, "rope_scaling": scaling}))
            assert limit == (300 if name == "yarn" else 3000 if "factor" in text else 1000)


def test_the_configurations_shown_are_those_that_are_read() -> None:
    """All of them where the package is there; else those that the registry has under the same id."""
    rows, files = shown(), published()
    assert len(rows) == 89
    if files:
        assert set(rows) == set(files)
    named = {name: name for name in rows if name not in OTHERWISE and _named(name)}
    compared = {name: str(file) for name, file in files.items()} or named
    assert len(compared) >= 20
    for name, given in compared.items():
        assert rows[name] == row_of(name, given)


def _named(name: str) -> bool:
    try:
        load_model(name)
    except UnknownNameError:
        return False
    return True
