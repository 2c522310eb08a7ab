"""apex_opt.simulator.kernel.kept: code of the sources as they are; damage costs a line and time, not an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# A function as the kernel's are: compiled when called, kept in the folder of NUMBA_CACHE_DIR.
SCRIPT = """
from apex_opt.simulator.kernel.jit import entry
@entry
def doubled(value):
    return 2 * value
from apex_opt.simulator.kernel.jit import is_ready
before = is_ready(doubled)
print(doubled(21), doubled(0.5))
assert is_ready(doubled)
import sys
assert before is (sys.argv[1] == "ready"), before
"""


def run(folder: Path, ready: str = "ready") -> subprocess.CompletedProcess[str]:
    source = folder / "doubling.py"
    source.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(DATA_ROOT), "NUMBA_CACHE_DIR": str(folder), "NUMBA_DISABLE_JIT": "0"}
    ran = subprocess.run(
        [sys.executable, str(source), ready], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (0, "42 1.0\n"), ran.stderr
    return ran


def kept(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.rglob(pattern))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    path.write_bytes(b"no pickle at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(bytes(data))


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


def give_away(path: Path) -> None:
    os.chown(path, 54321, -1)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    assert run(folder, "not yet").stderr == ""
    assert len(kept(folder, "*.nbi")) == 1
    assert len(kept(folder, "*.nbc")) == 2
    return folder


def test_what_was_kept_is_used_again(filled: Path) -> None:
    before = {path: path.stat().st_ino for path in kept(filled, "*.nb?")}
    assert run(filled).stderr == ""
    assert {path: path.stat().st_ino for path in kept(filled, "*.nb?")} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (cut, "*.nbi"),
        (garble, "*.nbc"),
        (empty, "*.nbi"),
        (flip, "*.nbc"),
        (lead_nowhere, "*.nb?"),
        (give_away, "*.nbi"),
    ],
)
def test_damaged_files_are_said_in_a_line_and_replaced(
    filled: Path, pattern: str, damage: Callable[[Path], None]
) -> None:
    if damage is give_away and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    for path in kept(filled, pattern):
        damage(path)
    # What is in the data shows only when it is taken.
    said = run(filled, "ready" if pattern == "*.nbc" else "not yet").stderr
    assert said.startswith("note: compiled code in ")
    assert said.count("\n") == 1
    assert "compiling it anew" in said


@pytest.mark.slow
def test_where_nothing_can_be_kept_the_answer_comes_with_a_line(filled: Path) -> None:
    for path in kept(filled, "*.nbi"):
        replace_by_folder(path)
    said = run(filled, "not yet").stderr
    assert "Traceback" not in said
    assert "compiled code cannot be kept in " in said
    assert said.count("\n") == 2
    for path in kept(filled, "*.nbi"):
        path.rmdir()
    assert run(filled, "not yet").stderr == ""


FILES = {
    "rates.py": "RATE = 2\n",
    "helping.py": "from rates import RATE\nfrom apex_opt.simulator.kernel.jit import inner\n"
    "@inner\ndef helped(value):\n    return RATE * value\n",
    "asked.py": "from helping import helped\nfrom apex_opt.simulator.kernel.jit import entry, is_ready\n"
    "@entry\ndef asked(value):\n    return helped(value) + 1\n"
    "ready = is_ready(asked)\nprint(asked(20), ready)\n",
}


@pytest.mark.parametrize(
    ("file", "before", "after"), [("rates.py", "RATE = 2", "RATE = 5"), ("helping.py", "RATE * value", "5 * value")]
)
def test_an_edit_of_any_file_beside_a_function_compiles_it_anew(
    tmp_path: Path, file: str, before: str, after: str
) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(DATA_ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    environment["NUMBA_DISABLE_JIT"] = "0"

    def asked() -> str:
        words = [sys.executable, str(tmp_path / "asked.py")]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout

    assert [asked(), asked()] == ["41 False\n", "41 True\n"]
    (tmp_path / file).write_text(FILES[file].replace(before, after))
    assert [asked(), asked()] == ["101 False\n", "101 True\n"]


def test_where_numba_keeps_its_classes_elsewhere_functions_compile_without_a_cache(tmp_path: Path) -> None:
    hidden = "import sys, numba.core.caching\ndel numba.core.caching.IndexDataCacheFile\n"
    (tmp_path / "doubling.py").write_text(hidden + SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(DATA_ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    environment["NUMBA_DISABLE_JIT"] = "0"
    for _ in range(2):
        words = [sys.executable, str(tmp_path / "doubling.py"), "not yet"]
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "42 1.0\n", "")
    assert not (tmp_path / "kept").exists()


def test_the_code_of_another_function_in_its_place_is_not_run(tmp_path: Path) -> None:
    for name, body in (("doubled", "2 * value"), ("tripled", "3 * value + 7")):
        (tmp_path / f"{name}.py").write_text(
            "from apex_opt.simulator.kernel.jit import entry\n"
            f"@entry\ndef {name}(value):\n    return {body}\nprint({name}(21))\n"
        )
    environment = {**os.environ, "PYTHONPATH": str(DATA_ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "kept")}
    environment["NUMBA_DISABLE_JIT"] = "0"

    def ran(name: str) -> tuple[str, str]:
        words = [sys.executable, str(tmp_path / f"{name}.py")]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout, done.stderr

    assert ran("doubled") == ("42\n", "")
    assert ran("tripled") == ("70\n", "")
    (own,), (other,) = ((tmp_path / "kept").rglob(f"{name}*.nbc") for name in ("doubled", "tripled"))
    own.write_bytes(other.read_bytes())
    said, note = ran("doubled")
    assert said == "42\n"
    assert "that of doubled is of tripled" in note
    assert ran("doubled") == ("42\n", "")
