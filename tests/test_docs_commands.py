"""docs/commands.md: it names every option, and shows the commands that start a plan as they are printed."""

from __future__ import annotations

import re

import pytest
from doc_cases import ROOT, blocks_of, shown_and_printed

from apex_opt.described import COMMANDS

TEXT = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(TEXT)


def test_every_option_named_exists_and_every_option_is_named() -> None:
    known = {option.name for command in COMMANDS.values() for option in command.options}
    named = set(re.findall(r"`--(\w+)", TEXT)) - {"help", "version"}
    assert named - known == set()
    assert known - named - {"plan"} == set()


@pytest.mark.slow
def test_the_commands_shown_to_start_a_plan_are_those_printed() -> None:
    (body,) = [body for kind, body in BLOCKS if kind == "console" and "--emit" in body]
    shown, printed = shown_and_printed(body)
    assert shown.startswith("Launch")
    assert shown in printed
