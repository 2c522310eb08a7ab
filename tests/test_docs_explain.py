"""docs/explain.md: requests that fail for different reasons, each with the output it shows."""

from __future__ import annotations

import re

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

TEXT = (ROOT / "docs" / "explain.md").read_text(encoding="utf-8")
REQUESTS = [body for kind, body in blocks_of(TEXT) if kind == "console"]


def test_five_requests_fail_for_five_reasons() -> None:
    reasons = [re.findall(r"^infeasible, (.*?): no plan", body, re.MULTILINE) for body in REQUESTS]
    assert len({tuple(names) for names in reasons if names}) == len(REQUESTS) == 5


@pytest.mark.slow
@pytest.mark.parametrize("body", REQUESTS, ids=lambda body: body.splitlines()[0].partition("solve.py ")[2])
def test_the_output_shown_is_the_output_printed(body: str) -> None:
    shown, printed = shown_and_printed(body, "--time_limit=300")
    assert "Feasible would be" in shown
    assert shown in printed
