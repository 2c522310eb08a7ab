"""docs/capacity.md: its output is that printed, and its figures are those of the code."""

from __future__ import annotations

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

from apex_opt.simulator import transient
from apex_opt.studies import steady
from apex_opt.workload.steady import LEAST_LOOPS, LENGTH

TEXT = (ROOT / "docs" / "capacity.md").read_text(encoding="utf-8")
(RUN,) = (body for kind, body in blocks_of(TEXT) if kind == "console")


@pytest.mark.slow
def test_the_output_shown_is_the_output_printed() -> None:
    shown, printed = shown_and_printed(RUN)
    assert shown in printed


def test_the_parameters_told_are_those_used() -> None:
    flat = " ".join(TEXT.split())
    assert f"{LENGTH:,} requests or more, twice at least" in flat
    assert LEAST_LOOPS == 2
    assert f"the first {transient.WARM_UP:.0%}" in flat
    assert f"last at least {transient.SPAN} times as long as a mean request" in flat
    assert f"at most {transient.GROWTH} times that in the first" in flat
    assert (steady.DOUBLINGS, steady.SIGMAS, steady.DRAWS, steady.REPEATS, steady.FEW) == (3, 3.0, 6, 20, 2)
