"""docs/robust.md: its outputs are those printed, and its Python runs."""

from __future__ import annotations

import contextlib
import io

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

TEXT = (ROOT / "docs" / "robust.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(TEXT)


@pytest.mark.parametrize(
    "body", [body for kind, body in BLOCKS if kind == "console"], ids=["latency", "energy", "capacity", "front"]
)
def test_the_output_shown_is_the_output_printed(body: str) -> None:
    shown, printed = shown_and_printed(body)
    assert "How far times may be off" in shown
    assert shown in printed


def test_the_python_runs_and_finds_what_wins_then() -> None:
    (code,) = (body for kind, body in BLOCKS if kind == "python")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "docs/robust.md", "exec"), {})
    lines = [line.split(maxsplit=3) for line in out.getvalue().splitlines()]
    (best,) = (line for line in lines if line[0] == "best")
    factor, plan = code.partition("# best True ")[2].split("... ")
    assert best[2].startswith(factor) and best[3] == plan.strip()
