"""What pages are printed with: lines that fit their console."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from apex_opt.report.layout import amount, kilojoules, notes_lines, page_width, seconds


def drawn(draw: Any, *given: Any, width: int = 80, **named: Any) -> list[str]:
    """Lines of what is drawn on a console of this width."""
    text = StringIO()
    draw(
        Console(file=text, width=width, color_system=None, highlight=False, markup=False, emoji=False), *given, **named
    )
    return [line.rstrip() for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("width", [40, 80])
def test_a_note_is_a_line_or_several_indented_ones_that_fit(width: int) -> None:
    note = "20 rows were left out as they have no prompt, of which [bold]none[/bold] were answered"
    lines = drawn(notes_lines, {"notes": ["short", note]}, width=width)
    assert lines[0] == "note: short"
    assert " ".join(" ".join(lines[1:]).split()) == f"note: {note}"
    assert all(len(line) <= width for line in lines)
    assert all(line.startswith("  ") for line in lines[2:])


def test_a_document_without_notes_has_no_lines() -> None:
    assert drawn(notes_lines, {}) == drawn(notes_lines, {"notes": []}) == []


def terminal(columns: int) -> tuple[int, int]:
    """Both ends of a terminal that is this wide."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    return ours, theirs


@pytest.mark.parametrize(
    ("said", "width"), [("60", 60), ("7", 40), ("0", 71), ("", 71), ("-5", 71), ("wide", 71), ("9" * 5000, 71)]
)
def test_pages_are_as_wide_as_columns_says_where_it_is_a_number(
    monkeypatch: pytest.MonkeyPatch, said: str, width: int
) -> None:
    monkeypatch.setattr("apex_opt.report.layout._terminal_width", lambda: 71)
    monkeypatch.setenv("COLUMNS", said)
    assert page_width() == width
    monkeypatch.setattr("apex_opt.report.layout._terminal_width", lambda: 0)
    assert page_width() == (width if said in ("60", "7") else 120)


WIDTH = "from apex_opt.report.layout import page_width; print(page_width())"


@pytest.mark.parametrize("where", ["stdin", "stderr", "controlling", "none"])
def test_behind_a_pipe_pages_are_as_wide_as_the_terminal_that_is_left(where: str) -> None:
    ours, theirs = terminal(63)
    enter = ""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if where != "none":
        streams["stdin" if where == "controlling" else where] = theirs
    if where == "controlling":
        # A session keeps its terminal whatever becomes of its streams.
        enter = (
            "import fcntl, os, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "os.dup2(os.open(os.devnull, os.O_RDONLY), 0)\n"
        )
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    ran = subprocess.run(
        [sys.executable, "-c", enter + WIDTH],
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=Path(__file__).resolve().parents[1],
        env=environment,
        check=True,
        timeout=60,
        **streams,
    )
    os.close(ours)
    os.close(theirs)
    assert int(ran.stdout) == (120 if where == "none" else 63)


@pytest.mark.parametrize(("joules", "told"), [(0.0, "0.000"), (412.0, "0.412"), (1000.0, "1.0"), (907_651.0, "907.7")])
def test_an_energy_is_told_in_kilojoules_and_of_a_short_run_in_whole_joules(joules: float, told: str) -> None:
    assert kilojoules(joules) == told
    assert amount(joules, "J") == f"{told} kJ"


def test_a_time_below_zero_has_the_unit_of_one_as_far_above() -> None:
    assert [seconds(value) for value in (-2.04, -0.002, -3e-6)] == ["-2.04 s", "-2.0 ms", "-3.0 us"]
