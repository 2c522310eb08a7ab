"""docs/calibrate.md: what it shows is what the commands print."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from doc_cases import ROOT, blocks_of, solve, words_of

if TYPE_CHECKING:
    from pathlib import Path

    from cli_cases import Ran

TEXT = (ROOT / "docs" / "calibrate.md").read_text(encoding="utf-8")
SHOWN = {body.splitlines()[0]: body.partition("\n")[2] for kind, body in blocks_of(TEXT) if kind == "console"}


def ran(word: str, cwd: Path = ROOT) -> tuple[Ran, str]:
    """What a command with this word prints, and what is shown of it; a file of the checkout is found from anywhere."""
    ((line, shown),) = ((line, shown) for line, shown in SHOWN.items() if word in line)
    words = words_of(line)
    assert words is not None
    return solve([one.replace("=apex_opt/", f"={ROOT}/apex_opt/") for one in words], cwd), shown


def test_the_commands_that_start_and_measure_are_those_printed() -> None:
    printed, shown = ran("--emit")
    assert shown in printed.out


def test_where_there_is_nothing_to_gain_nothing_is_written() -> None:
    printed, shown = ran("--hold")
    assert printed.code == 3
    assert printed.out.startswith(shown)
    assert "Nothing is written" in printed.out


def test_from_a_wrong_guess_it_finds_the_way_back(tmp_path: Path) -> None:
    guess = next(body for kind, body in blocks_of(TEXT) if kind == "toml")
    (tmp_path / "guess.toml").write_text(guess)
    printed, shown = ran("guess.toml", tmp_path)
    assert printed.code == 0
    assert printed.out.startswith(shown)
    for before, after in re.findall(r"ttft_mean +\d+ +([\d.]+)% +([\d.]+)%", shown):
        assert float(after) < float(before) / 4
    assert "fitted on" in (tmp_path / "my.toml").read_text()
