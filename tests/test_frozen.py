"""Answers of the command line are those frozen in tests/golden/answers, to the last digit.

Where an answer is meant to move, `python -m tests.golden.freeze` records it anew; `--search` records no more than how
searches went, which may change with their order.
"""

from __future__ import annotations

from functools import cache
from math import nextafter
from typing import Any

import pytest

from tests.golden.freeze import at_night, commands, difference, lines, read, run

# A question is asked for in one form after the other, as its answer is not kept for long.
COMMANDS = sorted(
    ((group, command) for group, members in commands().items() for command in members),
    key=lambda member: member[1].replace(" --format=table", ""),
)
ASKED = [
    pytest.param(group, command, marks=pytest.mark.nightly if command in at_night() else ())
    for group, command in COMMANDS
]
MOST_LINES = 25


@cache
def answered(command: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return run(command)


@pytest.fixture(autouse=True)
def _width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def told(command: str, moved: list[str]) -> str:
    """What moved, for whoever has to find out why."""
    short = [line if len(line) <= 300 else f"{line[:300]} ..." for line in moved[:MOST_LINES]]
    return "\n".join([f"{len(moved)} moved in: {command}", *short])


@pytest.mark.parametrize(("group", "command"), ASKED)
def test_an_answer_is_as_frozen(group: str, command: str) -> None:
    moved = difference(read(group).get(command), answered(command)[0])
    assert not moved, told(command, moved)


@pytest.mark.parametrize(("group", "command"), ASKED)
def test_a_search_goes_as_frozen(group: str, command: str) -> None:
    moved = difference(read("search").get(command, {}), answered(command)[1])
    assert not moved, told(command, moved)


def test_all_that_is_frozen_is_asked() -> None:
    for group, members in commands().items():
        assert list(read(group)) == list(dict.fromkeys(members))
    assert set(read("search")) <= {command for _, command in COMMANDS}


def test_the_least_change_of_a_figure_or_key_is_told() -> None:
    one = {"best": {"value": 0.1, "plans": ["tp1", "tp2"], "none": None}}
    assert difference(one, {"best": {"none": None, "plans": ["tp1", "tp2"], "value": 0.1}}) == []
    other = {"best": {"value": nextafter(0.1, 1), "plans": ["tp1"], "none": 0, "new": {}}}
    assert difference(one, other) == [
        "best.value: 0.1 -> 0.10000000000000002",
        "best.plans[1]: tp2 -> (nothing)",
        "best.none: None -> 0",
        "best.new: (nothing) -> {}",
    ]
    assert difference({"optimal": True}, {"optimal": 1}) == ["optimal: True -> 1"]
    assert lines({"a": {"b": [1, {}]}}, 2) == '{\n"a": {\n"b": [1, {}]\n}\n}'
