"""docs/pools.md: its outputs are those printed, and pools win where it says they do."""

from __future__ import annotations

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

TEXT = (ROOT / "docs" / "pools.md").read_text(encoding="utf-8")
BLOCKS = [body for kind, body in blocks_of(TEXT) if kind == "console"]


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_the_output_shown_is_the_output_printed(place: int) -> None:
    shown, printed = shown_and_printed(BLOCKS[place])
    assert shown in printed


def test_pools_win_for_the_tail_between_tokens_under_load_and_nowhere_for_the_first_token() -> None:
    rows = [line.split("|")[1:-1] for line in TEXT.splitlines() if line[2:3].isdigit() and " : " in line[:12]]
    assert len(rows) == 6
    assert [row[2].strip().startswith("**pools**") for row in rows] == [False, True, False, True, False, False]
    assert not any("pools" in row[3] for row in rows)
