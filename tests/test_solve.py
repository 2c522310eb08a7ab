"""solve.py as a process: what is particular to one, such as streams, terminals and where it is installed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest
from cli_cases import CHEAP, ROOT


def shell(*words: str, **given: Any) -> subprocess.CompletedProcess[str]:
    """Run as its own process."""
    command = [sys.executable, str(ROOT / "solve.py"), *words]
    defaults: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "cwd": ROOT}
    return subprocess.run(command, check=False, **defaults | given)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from apex_opt import cli\n"
        "for words in (['--help'], ['plan', '--help'], ['plan', '--bogus'], ['profile'], ['profile', 'import']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'numba', 'ortools', 'pandas', 'rich', 'numpy', 'networkx'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines()[-1] == "[]"


def test_a_process_answers_with_its_exit_code() -> None:
    ran = shell("plan", *CHEAP, "--format=json")
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["status"] == "optimal"
    ran = shell("plan", *CHEAP, "--cluster=nowhere")
    assert (ran.returncode, ran.stdout) == (2, "")
    ran = shell("plan", "--model=llama-3.1-70b", "--cluster=1xl40s", "--trace=static:n=1")
    assert ran.returncode == 3


@pytest.mark.parametrize(
    "words", [("clusters",), ("plan", "--help"), ("simulate", "--plan=tp1", *CHEAP, "--format=json")]
)
def test_a_reader_that_leaves_early_is_no_error(words: tuple[str, ...]) -> None:
    script = f"set -o pipefail; {sys.executable} solve.py {' '.join(repr(word) for word in words)} | head -1"
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0
    assert ran.stdout.count("\n") == 1
    assert "Traceback" not in ran.stderr
    assert "Broken" not in ran.stderr
    reader, writer = os.pipe()
    os.close(reader)
    ran = shell(*words, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert ran.returncode == 0
    assert "Traceback" not in ran.stderr
    assert "Broken" not in ran.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_said_in_one_line() -> None:
    with open("/dev/full", "w") as full:
        ran = shell("clusters", "--format=json", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ran.returncode == 2
    assert ran.stderr == "error: standard output cannot be written (No space left on device); write to another place\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_streams_do_no_harm(closed: str) -> None:
    script = f"{sys.executable} solve.py clusters {closed}"
    ran = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0
    assert ran.stderr == ""
    assert ("h100-sxm" in ran.stdout) == (closed == "2>&-")


def test_a_name_of_any_bytes_can_be_printed(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff [bold]\n.jsonl"
    with open(path, "w") as file:
        file.write('{"arrival_s": 0, "prompt": 10, "output": 5}\n')
    for form in ("table", "json"):
        ran = shell("simulate", "--plan=tp1", *CHEAP[:2], "--trace=" + os.fsdecode(path), f"--format={form}")
        assert ran.returncode == 0, ran.stderr
        assert "[bold]" in ran.stdout


def test_a_terminal_gets_colours_help_without_a_pager_and_tables_of_its_width() -> None:
    pty = pytest.importorskip("pty")
    fcntl, struct, termios = (__import__(name) for name in ("fcntl", "struct", "termios"))
    for words in (("plan", "--help"), ("simulate", "--plan=tp1", *CHEAP)):
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 90, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PAGER": "sleep 100"}
        environment.pop("COLUMNS", None)
        process = subprocess.Popen(
            [sys.executable, "solve.py", *words], cwd=ROOT, stdin=child, stdout=child, stderr=child, env=environment
        )
        os.close(child)
        output = b""
        with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
            while chunk := os.read(parent, 65536):
                output += chunk
        assert process.wait(timeout=60) == 0
        os.close(parent)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())
        assert "\x1b[1m" in output.decode()
        page = text[text.index("Latency") if "Latency" in text else 0 :]
        assert all(len(line) <= 90 for line in page.splitlines())


def test_the_console_script_is_the_same_program(tmp_path: Path) -> None:
    script = tmp_path / "apex-opt"
    script.write_text(f"#!{sys.executable}\nfrom apex_opt.cli import main\nmain()\n")
    script.chmod(0o755)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([script, "--help"], capture_output=True, text=True, check=True, env=environment)
    assert ran.stdout.startswith("NAME\n    apex-opt - ")


@pytest.mark.parametrize("words", [("--version",), ("--help",), ("models", "--bogus")])
def test_the_package_itself_is_the_same_program_wherever_one_stands(tmp_path: Path, words: tuple[str, ...]) -> None:
    (tmp_path / "solve.py").write_text("raise SystemExit('another solve.py')")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "apex_opt", *words]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    same = shell(*words)
    assert (ran.returncode, ran.stdout, ran.stderr) == (same.returncode, same.stdout, same.stderr)


@pytest.mark.nightly
@pytest.mark.skipif(not hasattr(numba.config, "CACHE_LOCATOR_CLASSES"), reason="this numba always finds a folder")
def test_an_install_that_cannot_be_written_still_works_and_says_it_compiles() -> None:
    environment = {
        **os.environ,
        "NUMBA_DISABLE_JIT": "0",
        "NUMBA_CACHE_DIR": "/proc/nowhere",
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
    }
    ran = shell("simulate", "--plan=tp1", *CHEAP, "--format=json", env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "compiling the simulator, once on this machine: " in ran.stderr
    assert json.loads(ran.stdout)["status"] == "feasible"
