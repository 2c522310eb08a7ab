"""Plant faults in a copy of the source, one at a time, and say which tests find them.

    python -m tests.mutants [--root FOLDER] [--check] [KIND or ID ...]

`faults.toml` lists the faults: where, the text that is there, what it becomes, and the files of tests that should find
it. A fault whose text is not found exactly once is stale: the source has moved on, and the fault is to be written anew
on what stands for it now. `--check` does no more than look for these. The tests run in a copy in a temporary folder,
so nothing in the source itself is touched; the exit code is 1 where a fault is stale or survives.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = (".git", ".venv", ".hypothesis", ".mypy_cache", ".ruff_cache", ".pytest_cache")
LONGEST_S = 1500


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One entry of `faults.toml`: `why` says the fault in words, `old` and `new` are lines of `file`."""

    id: str
    kind: str
    file: str
    why: str
    old: str
    new: str
    tests: tuple[str, ...]

    def stale(self, root: Path) -> str | None:
        """Why the fault cannot be planted; None where it can."""
        path = root / self.file
        found = path.read_text().count(self.old) if path.is_file() else -1
        if found < 0:
            return f"there is no file {self.file}"
        if found != 1:
            return f"its text is found {found} times in {self.file}"
        missing = [test for test in self.tests if not (root / "tests" / test).is_file()]
        return f"there is no tests/{missing[0]}" if missing else None


def faults() -> list[Fault]:
    """All entries, in order."""
    entries = tomllib.loads((HERE / "faults.toml").read_text())["fault"]
    return [Fault(**entry | {"tests": tuple(entry["tests"])}) for entry in entries]


def find(fault: Fault, root: Path, copy: Path) -> str | None:
    """Plant a fault in the copy, run its tests, and put the source back; the test that finds it, None if none does."""
    path = copy / fault.file
    try:
        path.write_text(path.read_text().replace(fault.old, fault.new))
        words = ["-m", "pytest", "-x", "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=no"]
        tests = [f"tests/{test}" for test in fault.tests]
        environment = os.environ | {"CI": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(
            [sys.executable, *words, *tests],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )
        if ran.returncode == 0:
            return None
        if ran.returncode in (4, 5):  # wrong usage, no tests: nothing was tried
            raise SystemExit(f"{fault.id}: pytest tried nothing: {(ran.stderr or ran.stdout)[-300:]}")
        named = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
        return named[1].removeprefix("tests/") if named else f"exit {ran.returncode}: {ran.stdout[-200:]!r}"
    except subprocess.TimeoutExpired:
        return f"no end within {LONGEST_S} s"
    finally:
        # With what is compiled beside it, which the fault has replaced.
        shutil.rmtree(path.parent)
        shutil.copytree(root / path.parent.relative_to(copy), path.parent)


def main(words: list[str]) -> int:
    root = Path(words[words.index("--root") + 1]).resolve() if "--root" in words else HERE.parents[1]
    chosen = [word for at, word in enumerate(words) if word[:2] != "--" and words[at - 1 : at] != ["--root"]]
    mine = [fault for fault in faults() if not chosen or fault.id in chosen or fault.kind in chosen]
    stale = {fault.id: reason for fault in mine if (reason := fault.stale(root))}
    for name, reason in stale.items():
        print(f"{name}: STALE: {reason}", flush=True)
    if "--check" in words:
        return int(bool(stale))
    lost = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        for fault in mine:
            if fault.id in stale:
                continue
            began = time.monotonic()
            by = find(fault, root, copy)
            lost += [fault.id] if by is None else []
            end = "SURVIVES" if by is None else f"found by {by}"
            print(f"{fault.id} ({fault.why}): {end} [{time.monotonic() - began:.0f} s]", flush=True)
    print(f"{len(mine)} faults: {len(mine) - len(stale) - len(lost)} found, {len(lost)} survive, {len(stale)} stale")
    return int(bool(stale or lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
