"""docs/rescheduling.md: its output is that printed, and its figures are those that come out."""

from __future__ import annotations

import re

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed, solve, words_of

from apex_opt.simulator.rescheduling import NUMBERS

TEXT = (ROOT / "docs" / "rescheduling.md").read_text(encoding="utf-8")
((_, SHOWN),) = blocks_of(TEXT)
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line.startswith("| `")]
FIGURES = [row for row in ROWS if row[0].startswith("`--")]


def test_the_output_shown_is_the_output_printed() -> None:
    shown, printed = shown_and_printed(SHOWN)
    assert shown in printed


def test_every_number_that_can_be_given_is_told() -> None:
    assert {row[0].strip("`") for row in ROWS if len(row) == 3} == set(NUMBERS)


@pytest.mark.parametrize("row", FIGURES, ids=lambda row: row[0])
def test_its_figures_are_those_printed(row: list[str]) -> None:
    words = words_of(SHOWN.splitlines()[0])
    assert words is not None
    lines = solve([*words[:-2], *row[0].strip("`").split()]).out.splitlines()
    found = {line.split()[0]: re.findall(r"[\d.,]+ ?(?:ms|s)\b|\S+", line) for line in reversed(lines) if line.split()}
    line = " ".join(found["batches"])
    batches = re.fullmatch(r"batches .*?, ([\d,]+) preemptions?(?:, ([\d,]+) moves? between replicas)?", line)
    assert batches is not None
    of = [[found[name][3], found[name][-1]] for name in ("normal", "high")]
    assert row[1:] == [batches[2] or "-", batches[1], found["TTFT"][5], *of[0], *of[1]]


def test_moves_shorten_the_tail_of_the_first_token_and_let_fewer_give_way() -> None:
    by_option = {row[0].strip("`"): row for row in FIGURES}
    tail = {option: float(row[3].removesuffix(" s")) for option, row in by_option.items()}
    moving, dealt = "--rescheduling llumnix", "--rescheduling llumnix:period_ms=999999999"
    assert tail[moving] < tail[dealt] < tail["--routing least_loaded"] < tail["--routing round_robin"]
    said = " ".join(TEXT[TEXT.rindex("The third row") :].split())
    deal, turns = by_option[dealt], by_option["--routing round_robin"]
    assert f"from {turns[3]} with `round_robin` to {deal[3]}, as" in said
    assert f"take it to {by_option[moving][3]}, and the preemptions from {deal[2]} to {by_option[moving][2]}." in said
    assert f"here it is {tail['--routing round_robin'] / tail[moving]:.0f} times less" in said
    assert int(by_option[moving][2]) < min(int(by_option[name][2]) for name in (dealt, "--routing least_loaded"))
