"""Launch commands in documents and as lines: the same in both, whole, and nothing but commands and comments."""

from __future__ import annotations

import io
import json
import shlex
import sys

import pytest
from launch_cases import DENSE, emitted
from rich.console import Console

from apex_opt.report.launch import launch_document, launch_section
from apex_opt.report.layout import page
from apex_opt.schema import to_plain


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("plan", ["dp2 pp2[41,39] tp2 clock=1200", "attn(tp4) ffn(dp2,tp2)"])
def test_lines_and_document_hold_the_same(engine: str, plan: str) -> None:
    document = to_plain(launch_document(emitted(engine, DENSE, plan, 1, 8)))
    assert json.loads(json.dumps(document)) == document
    assert document["engine"] == engine
    lines = page(lambda console: launch_section(console, document)).splitlines()
    assert lines[0] == f"Launch ({engine})"
    assert [line for line in lines[1:] if line and not line.startswith("#")] == [
        command["text"] for command in document["commands"]
    ]
    comments = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    for note in document["notes"]:
        assert note in comments
    assert all(len(line) <= 60 for line in lines if line.startswith("#"))


def test_a_command_is_told_by_its_parts_too() -> None:
    document = to_plain(launch_document(emitted("vllm", DENSE, "dp2 tp4 clock=1200", 1, 8)))
    clock, first, second = document["commands"]
    assert (clock["replica"], first["replica"], second["replica"]) == (None, 0, 1)
    assert second["env"] == {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert shlex.split(second["text"]) == ["CUDA_VISIBLE_DEVICES=4,5,6,7", *second["argv"]]


def test_places_are_named_once_and_markup_is_left_alone() -> None:
    document = to_plain(launch_document(emitted("vllm", DENSE, "dp2 tp4", 1, 8)))
    document["notes"] = ["[bold]odd[/bold]"]
    out = io.StringIO()
    launch_section(Console(file=out, width=60), document)
    assert "# [bold]odd[/bold]" in out.getvalue()
    assert out.getvalue().count("# node 0, replica 1") == 1
