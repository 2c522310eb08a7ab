"""README: its two commands to the letter, every other command it shows, its files, and the answer it prints."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest
from doc_cases import ROOT, blocks_of, commands_of, shown_and_printed, solve

from apex_opt.cli import arranged
from apex_opt.errors import ApexError

if TYPE_CHECKING:
    from pathlib import Path

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks_of(README)
COMMANDS = commands_of(README)

CAPACITY = commands_of((ROOT / "docs" / "capacity.md").read_text(encoding="utf-8"))
ELSEWHERE = [words[: words.index("--top")] for words in CAPACITY if "--top" in words]
"""Questions that take long, and whose answers the tests of docs/capacity.md hold to what is shown there."""

PLAN_LINE = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/python solve.py plan"
MEASURED = ROOT / "apex_opt" / "measured" / "data" / "runs" / "h200-vllm-0.20.2"

TEST_LINE = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/python -m pytest"


@pytest.mark.parametrize("line", [PLAN_LINE, TEST_LINE])
def test_the_command_stands_alone_on_a_line_of_a_fenced_block(line: str) -> None:
    assert sum(body.strip() == line for _, body in BLOCKS) == 1
    assert README.splitlines().count(line) == 1


def test_no_other_line_sets_up_an_environment() -> None:
    assert README.count("-m venv") == 2


def test_every_command_shown_parses() -> None:
    assert len(COMMANDS) >= 8
    for words in COMMANDS:
        try:
            assert arranged(words)
        except ApexError as error:
            pytest.fail(f"solve.py {shlex.join(words)}: {error}")


def test_the_python_shown_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    (body,) = (body for kind, body in BLOCKS if kind == "python")
    exec(body, {})
    line = capsys.readouterr().out.splitlines()[0]
    assert f"  # {line}" in body


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in COMMANDS if words not in ELSEWHERE], ids=shlex.join)
def test_every_command_shown_runs(words: list[str], tmp_path: Path) -> None:
    if "--measured=FILE" in words:
        (tmp_path / "FILE").symlink_to(MEASURED)
    done = solve(words, tmp_path)
    # Two of them show what is said where nothing fits.
    assert done.code in (0, 3), done.err
    if words[0] != "calibrate":  # whether there is anything to gain is for the runs at hand to say
        assert (done.code == 3) == (words[1:] == ["--cluster", "1xh100-sxm"])


@pytest.mark.slow
def test_the_run_shown_is_what_is_printed_with_its_certificate() -> None:
    (body,) = [body for kind, body in BLOCKS if kind == "console" and "--top 3" in body]
    shown, printed = shown_and_printed(body)
    assert shown in printed
    (text,) = [" ".join(body.split()) for _, body in BLOCKS if body.startswith("Certificate")]
    assert text in printed


@pytest.mark.slow
def test_what_is_shown_where_nothing_fits_is_what_is_printed() -> None:
    (body,) = [body for kind, body in BLOCKS if kind == "console" and "infeasible" in body]
    shown, printed = shown_and_printed(body)
    assert shown in printed


def test_the_models_counted_are_the_models_there_are() -> None:
    from apex_opt.ir import list_models

    assert f"{len(list_models())} by name" in README


def test_files_it_links_to_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (ROOT / link.partition("#")[0]).exists(), link


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_runs_the_two_commands_and_is_a_valid_script() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert PLAN_LINE in text
    assert TEST_LINE in text
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
