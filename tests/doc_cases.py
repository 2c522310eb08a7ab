"""Documents for the tests of what they show: their fenced blocks, and the commands in them, run."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from cli_cases import ROOT, Once, Ran

if TYPE_CHECKING:
    from pathlib import Path

ONCE = Once()
"""Documents show some questions more than once, with other parts of their answers."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks_of(text: str) -> list[tuple[str, str]]:
    """Kind and body of every fenced block."""
    return FENCE.findall(text)


def words_of(line: str) -> list[str] | None:
    """Words after `solve.py`; an output may mention it, a command begins with it or with an interpreter."""
    match = re.fullmatch(r"(?:\S*python3? )?solve\.py (.+)", line.removeprefix("$ "))
    return shlex.split(match[1]) if match else None


def solve(words: list[str], cwd: Path = ROOT) -> Ran:
    """Run a command where its reader would; tables are as wide as those shown (`conftest.py`)."""
    return ONCE.run(*words, cwd=cwd)


def shown_and_printed(body: str, *more: str) -> tuple[str, str]:
    """What a console block shows below its command, and what the command prints, both with single spaces."""
    command, *shown = body.splitlines()
    words = words_of(command)
    assert words is not None, command
    return " ".join(" ".join(shown).split()), " ".join(solve([*words, *more]).out.split())


def commands_of(text: str) -> list[list[str]]:
    """Words after `solve.py` of every command shown, in fenced blocks or in the text."""
    shown = [line for _, body in blocks_of(text) for line in body.splitlines()]
    shown += re.findall(r"`(solve\.py [^`]+)`", FENCE.sub("", text))
    words = dict.fromkeys(tuple(words) for line in shown if (words := words_of(line)))
    return [list(item) for item in words if "COMMAND" not in item]
