"""docs/examples.md: its outputs are those printed, and its claims hold."""

from __future__ import annotations

import re

import pytest
from doc_cases import ROOT, blocks_of, solve, words_of

TEXT = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
RUNS = [body for kind, body in blocks_of(TEXT) if kind == "console"]


@pytest.mark.slow
@pytest.mark.parametrize("body", RUNS, ids=lambda body: " ".join(body.splitlines()[0].split()[2:6]))
def test_the_output_shown_is_the_output_printed(body: str) -> None:
    command, *shown = body.splitlines()
    words = words_of(command)
    assert words is not None
    printed = " ".join(solve(words).out.split())
    for part in " ".join(" ".join(shown).split()).split("..."):
        assert part.strip() in printed


def test_the_best_plan_is_more_than_3_37_times_as_fast_as_either_heuristic() -> None:
    found = [re.search(r"e2e_mean = ([\d.]+) s, the best has ([\d.]+) s", body) for body in RUNS]
    ratios = [float(match[1]) / float(match[2]) for match in found if match]
    assert len(ratios) == 2
    assert min(ratios) > 3.37
    for ratio in ratios:
        assert f"**{ratio:.1f} times**" in TEXT


def test_the_least_energy_is_more_than_45_percent_below_that_of_the_least_latency() -> None:
    (saved,) = (float(match[1]) for body in RUNS if (match := re.search(r"^([\d.]+)% less energy", body, re.MULTILINE)))
    assert saved > 45
    assert f"**{saved:.0f}% less**" in TEXT
