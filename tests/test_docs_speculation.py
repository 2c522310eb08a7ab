"""docs/speculation.md: its outputs are those printed, and its models those with a published mean."""

from __future__ import annotations

import re

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

import apex_opt
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


def test_the_best_number_of_drafts_at_each_load_is_as_told() -> None:
    """The table between low and high load; it falls with the load."""
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \|((?: [*\d.]+ s[*]* \|){6})$", TEXT, re.MULTILINE)
    best = []
    for rate, count, told in rows:
        trace = f"poisson:rate={rate},n={count.replace(',', '')},prompt=512,output=200"
        seconds = []
        for drafts in ("none", *(f"eagle:{number}" for number in range(1, 6))):
            plan = f"attn(tp8) ffn(tp8) bf16 spec={drafts}"
            answer = apex_opt.simulate(model="llama-3.3-70b", trace=trace, speculation="eagle:0-5", plan=plan)
            seconds.append(answer.to_dict()["best"]["metrics"]["e2e_s"]["mean"])
        assert re.findall(r"[\d.]+", told) == [f"{value:.2f}" for value in seconds]
        best.append(seconds.index(min(seconds)))
        assert re.findall(r"[*\d.]+ s", told)[best[-1]].startswith("**")
    assert best == sorted(best, reverse=True) and best[0] == 5 and best[-1] == 0 and len(set(best)) == 5


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
