"""docs/pools.md: its outputs are those printed, and pools win where it says they do."""

from __future__ import annotations

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

import apex_opt

TEXT = (ROOT / "docs" / "pools.md").read_text(encoding="utf-8")
BLOCKS = [body for kind, body in blocks_of(TEXT) if kind == "console"]


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_the_output_shown_is_the_output_printed(place: int) -> None:
    shown, printed = shown_and_printed(BLOCKS[place])
    assert shown in printed


HEAD, *ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("| prompt : ") or line[2:3].isdigit()
]
GOALS = [cell.removeprefix("within ").strip("`") for cell in HEAD[2:]]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.nightly if place % 2 else ()) for place, row in enumerate(ROWS)],
    ids=lambda row: " ".join(row[:2]),
)
def test_the_map_of_where_pools_win_is_what_comes_out(row: list[str]) -> None:
    prompt, output = row[0].replace(",", "").split(" : ")
    trace = f"poisson:rate={row[1]},n=200,prompt={prompt},output={output}"
    asked = {"model": "llama-3.1-8b", "cluster": "4xh100-sxm", "serving": "aggregated,pools", "trace": trace}
    found = []
    for goal in GOALS:
        answer = apex_opt.plan(**asked, slo=goal, top=1).to_dict()
        assert answer["status"] == "optimal"
        (best,) = answer["candidates"]
        plan = best["plan"].replace(" bf16", "")
        found.append(f"{'**pools** ' if '{' in plan else ''}`{plan}`, {best['value']:.3g} s")
    assert row[2:] == found


def test_the_map_bears_out_what_is_said_of_it() -> None:
    """Pools for the tail between tokens alone, for ever shorter prompts the tighter it is, and at no low rate."""
    assert len(ROWS) == 9 and GOALS[:2] == ["itl_p99<=10ms", "itl_p99<=25ms"] and "ttft" in GOALS[2]
    wins = [{(row[0], row[1]) for row in ROWS if row[2 + place].startswith("**pools**")} for place in range(3)]
    assert wins[0] > wins[1] > wins[2] == set()
    assert not any(rate == "2" for _, rate in wins[0])
