"""apex_opt.simulator.kernel.entries: code of the sources as they are; damage costs a line and time, not an answer."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.shares import parse_shares
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.pack.engines import needs_compiling
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

FILES = {
    "rates.py": "RATE = 2\n",
    "helping.py": "from rates import RATE\nfrom apex_opt.simulator.kernel.jit import inner\n"
    "@inner\ndef helped(value):\n    return RATE * value\n",
    "working.py": "from helping import helped\nfrom apex_opt.simulator.kernel.jit import at, inner\n"
    "@inner\ndef doubled(values, size):\n    for i in range(size):\n        at(values, i)[0] = helped(values[i])\n"
    "@inner\ndef tripled(values, size):\n    for i in range(size):\n        values[i] = 3 * values[i] + 7\n",
    "asking.py": """
import sys
import numpy as np
from apex_opt.simulator.kernel.entries import Entry
entry = Entry("working", "doubled", np.int64, int)
ready = entry.ready()
values = np.array([21, 4])
entry(values, 2)
assert entry.ready()
print(*values, "ready" if ready else "not yet", "numba" if "numba" in sys.modules else "bare")
""",
}
"""A function as the kernel's entries are, of several files, kept in the folder of NUMBA_CACHE_DIR."""

KEPT: list[entries.Entry] = []
"""Machine code is never given back, as that of all entries shares what made it."""


def write(folder: Path, **changed: str) -> Path:
    for name, text in FILES.items():
        (folder / name).write_text(changed.get(name.removesuffix(".py"), text))
    return folder


def run(folder: Path, ready: str = "ready numba", *, values: str = "42 8", **environment: str) -> str:
    """Call the function in a process of its own, and return what is said on stderr."""
    if ready == "ready":
        ready = "ready bare"
    elif ready == "not yet":
        ready = "not yet numba"
    own = {"PYTHONPATH": str(DATA_ROOT), "NUMBA_CACHE_DIR": str(folder / "kept"), "NUMBA_DISABLE_JIT": "0"}
    own["PYTHONDONTWRITEBYTECODE"] = "1"  # an edit within the same second, of the same length, would not be seen
    words = [sys.executable, str(folder / "asking.py")]
    environment = {**os.environ, **own, **environment}
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, f"{values} {ready}\n"), ran.stderr
    return ran.stderr


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "kept").rglob("*.machine"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def garble(path: Path) -> None:
    path.write_bytes(b"no code at all")


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
    folder = write(tmp_path_factory.mktemp("filled"))
    assert run(folder, "not yet") == ""
    assert len(kept(folder)) == 1
    return folder


def test_what_was_kept_is_used_again_without_numba(filled: Path) -> None:
    (path,) = kept(filled)
    before = path.stat().st_ino
    assert run(filled, "ready") == ""
    assert path.stat().st_ino == before


@pytest.fixture
def ask(filled: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Call a function as a process of its own would, and tell whether it was there."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(filled / "kept"))
    monkeypatch.syspath_prepend(str(filled))

    def asked(name: str = "doubled", expected: tuple[int, int] = (42, 8)) -> bool:
        monkeypatch.setattr(entries, "_said", set())
        entry = entries.Entry("working", name, np.int64, int)
        KEPT.append(entry)
        ready, values = entry.ready(), np.array([21, 4])
        entry(values, 2)
        assert tuple(values.tolist()) == expected
        return ready

    return asked


@pytest.mark.parametrize("damage", [cut, garble, empty, flip, lead_nowhere, give_away])
def test_a_damaged_file_is_said_in_a_line_and_replaced(
    filled: Path, damage: Callable[[Path], None], ask: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    if damage is give_away and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    (path,) = kept(filled)
    damage(path)
    assert not ask()
    said = capsys.readouterr().err
    assert said.startswith("note: compiled code in ")
    assert said.count("\n") == 1
    assert "compiling it anew" in said
    assert ask()
    assert capsys.readouterr().err == ""


def test_where_nothing_can_be_kept_the_answer_comes_with_a_line(
    filled: Path, ask: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = kept(filled)
    replace_by_folder(path)
    assert not ask()
    said = capsys.readouterr().err
    assert "compiled code cannot be kept in " in said
    assert said.count("\n") == 2
    path.rmdir()
    assert not ask()
    assert capsys.readouterr().err == ""


def test_an_edit_of_any_file_beside_a_function_compiles_it_anew(tmp_path: Path) -> None:
    assert run(write(tmp_path), "not yet") == ""
    rates, helping = (FILES[f"{name}.py"] for name in ("rates", "helping"))
    write(tmp_path, rates=rates.replace("RATE = 2", "RATE = 5"))
    assert run(tmp_path, "not yet", values="105 20") == ""
    write(tmp_path, rates=rates, helping=helping.replace("RATE * value", "5 * value"))
    assert run(tmp_path, "not yet", values="105 20") == ""
    assert run(tmp_path, "ready", values="105 20") == ""


def test_the_code_of_another_function_in_its_place_is_not_run(filled: Path, ask: Callable[..., bool]) -> None:
    assert not ask("tripled", (70, 19))
    own, other = kept(filled)
    own.write_bytes(other.read_bytes())
    assert not ask()
    assert ask()


@pytest.mark.parametrize("variable", ["NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"])
def test_with_arrays_nothing_is_kept(tmp_path: Path, variable: str) -> None:
    run(write(tmp_path), "not yet", **{variable: "1"})
    assert kept(tmp_path) == []


def test_where_numba_calls_functions_in_another_way_they_are_called_with_arrays(tmp_path: Path) -> None:
    write(tmp_path)
    another = "import apex_opt.simulator.kernel.jit as jit\n"
    another += "jit.native = lambda *_, **options: 'define i64 @doubled(i64 %a)'\n"
    (tmp_path / "asking.py").write_text(another + FILES["asking.py"])
    assert run(tmp_path, "not yet") == ""
    assert kept(tmp_path) == []


@pytest.mark.parametrize("shares", ["80/100", "pdmux"])
def test_phases_side_by_side_are_compiled_first_too(shares: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = parse_shares(shares)
    of = entries.MULTIPLEXING if asked.multiplexed else entries.PHASES
    for there in (True, False):
        monkeypatch.setattr(entries.Entry, "ready", lambda entry, there=there: there or entry is not of)
        assert needs_compiling(EngineSettings(), 1, shares=asked) is not there
