"""docs/calibrate.md: what it shows is what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

from cli_cases import run

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "calibrate.md").read_text()


def test_the_output_shown_is_what_is_printed() -> None:
    (shown,) = re.findall(r"```console\n\$ \.venv/bin/python solve\.py (.*)\n((?:.*\n)+?)```", TEXT)
    ran = run(*shown[0].split())
    assert ran.code == 3
    assert ran.out.startswith(shown[1])
    assert "Nothing is written" in ran.out
