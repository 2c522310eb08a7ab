"""docs/overlap.md: its outputs are those printed."""

from __future__ import annotations

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

TEXT = (ROOT / "docs" / "overlap.md").read_text(encoding="utf-8")
BLOCKS = [body for kind, body in blocks_of(TEXT) if kind == "console"]


@pytest.mark.parametrize("place", range(len(BLOCKS)))
def test_the_output_shown_is_the_output_printed(place: int) -> None:
    shown, printed = shown_and_printed(BLOCKS[place])
    assert shown in printed
