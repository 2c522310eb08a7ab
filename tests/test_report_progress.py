"""Progress goes to stderr: lines into a pipe, one bar on a terminal."""

from __future__ import annotations

import sys
from io import StringIO

import pytest

from apex_opt.report import progress as module
from apex_opt.report.progress import Progress


class Terminal(StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_one_line_per_kind_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        for what in ("bounding plans", "simulating plans"):
            for done in range(100):
                progress(what, done, 100)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "bounding plans ...\nsimulating plans ...\n"


def test_a_pipe_hears_of_long_work_every_ten_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Progress() as progress:
        for done in range(26):
            clock[0] = float(done)
            progress("simulating plans", 100 * done, 5000)
        clock[0] = 60.0
        progress("simulating plans", 2600, 0)
    assert capsys.readouterr().err.splitlines() == [
        "simulating plans ...",
        "simulating plans: 1,000 of 5,000, 40 s left at this pace",
        "simulating plans: 2,000 of 5,000, 30 s left at this pace",
        "simulating plans: 2,600",
    ]


def test_work_without_steps_is_told_of_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with Progress() as progress:
        for second in (0.0, 30.0, 60.0):
            clock[0] = second
            progress("compiling", 0, 0)
    assert capsys.readouterr().err == "compiling ...\n"


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress() as progress:
        progress("enumerating plans", 0, 0)
        progress("bounding plans", 1, 4)
        progress("bounding plans", 2, 4)
        written = terminal.getvalue()
        progress("simulating plans", 0, 8)
    assert "enumerating plans" in written
    # Work that is done gives its place to the next.
    last = terminal.getvalue().rpartition("simulating plans")[2]
    assert "0/8" in last
    assert "bounding plans" not in last
    assert terminal.getvalue().endswith("\x1b[2K")  # the line is erased
    assert capsys.readouterr().out == ""


def test_a_terminal_is_left_in_order_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")

    def fail() -> None:
        with Progress() as progress:
            progress("simulating plans", 1, 4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert "\x1b[?25h" in terminal.getvalue()  # the cursor is back
