"""docs/routing.md: its output is that printed, its tables have every router, with the figures that come out."""

from __future__ import annotations

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed, solve, words_of

from apex_opt.plans.routing import ROUTINGS

TEXT = (ROOT / "docs" / "routing.md").read_text(encoding="utf-8")
(_, SHOWN), (_, CHOSEN), (_, SIDES), (_, TALKS) = blocks_of(TEXT)
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
HEAD = "`--routing`"
FIGURED = [row for row in ROWS if len(row) == 6]
FIGURES, TURNS = FIGURED[1 : len(ROUTINGS) + 1], FIGURED[len(ROUTINGS) + 2 :]


@pytest.mark.parametrize("body", [SHOWN, CHOSEN, SIDES, TALKS])
def test_the_output_shown_is_the_output_printed(body: str) -> None:
    shown, printed = shown_and_printed(body)
    assert shown in printed


def test_with_one_router_another_plan_is_best_than_with_a_choice() -> None:
    words = words_of(CHOSEN.splitlines()[0])
    assert words is not None
    at = words.index("--routing")
    printed = solve([*words[:at], *words[at + 2 :]]).out
    assert "best plan: attn(tp4) ffn(tp4) bf16 on 4 GPUs" in printed


def test_every_router_has_its_rule_and_its_figures() -> None:
    routers = {f"`{name}`" for name in ROUTINGS}
    assert {row[0] for row in ROWS if len(row) == 2 and row[0] != HEAD} == routers
    assert {row[0] for row in FIGURES} == routers


@pytest.mark.parametrize(("body", "row"), [*((SHOWN, row) for row in FIGURES), *((TALKS, row) for row in TURNS)])
def test_its_figures_are_those_printed(body: str, row: list[str]) -> None:
    words = words_of(body.splitlines()[0])
    assert words is not None
    name, found, mean, e2e, ttft, energy = row
    lines = solve([*words[:-1], name.strip("`")]).out.splitlines()
    assert any(line.startswith("cache") and line.endswith(f"found, {found} of all") for line in lines)
    assert any(line.endswith(f"e2e_mean = {mean}") for line in lines)
    assert any(line.startswith(f"energy       {energy}") for line in lines)
    for label, p95 in (("E2E", e2e), ("TTFT", ttft)):
        line = next(line for line in lines if line.startswith(label))
        assert p95 == " ".join(line.split()[7:9])
