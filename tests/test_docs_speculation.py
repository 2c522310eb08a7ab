"""docs/speculation.md: its outputs are those printed, and its models those with a published mean."""

from __future__ import annotations

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

from apex_opt.plans.acceptance import ANY_MODEL, published

TEXT = (ROOT / "docs" / "speculation.md").read_text(encoding="utf-8")
LOW, HIGH = (body for kind, body in blocks_of(TEXT) if kind == "console")


@pytest.mark.parametrize("body", [LOW, HIGH])
def test_the_output_shown_is_the_output_printed(body: str) -> None:
    shown, printed = shown_and_printed(body)
    assert shown in printed


def test_drafts_win_at_low_load_and_lose_at_high_load() -> None:
    assert "spec=eagle" in LOW.split("best plan:")[1].splitlines()[0]
    assert "spec=" not in HIGH.split("best plan:")[1].splitlines()[0]


def test_the_means_told_are_those_published() -> None:
    models = {name for entry in published() for name in entry.models}
    assert models == {
        "llama-3.3-70b",
        "llama-3.1-70b",
        "llama-3.1-8b",
        "kimi-k2.5",
        "deepseek-v3",
        "deepseek-r1",
        "deepseek-v4-pro",
        "minimax-m3",
        "qwen3.5-397b-a17b",
        ANY_MODEL,
    }
