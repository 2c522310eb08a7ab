"""Plant faults in a copy of the source, one at a time, and say which tests find them.

    python -m tests.mutants                   plant all, an hour or more
    python -m tests.mutants bounds k03        plant those of a kind, and single ones by their id
    python -m tests.mutants --list            print id, kind, file and fault of each
    python -m tests.mutants --check           plant none, but say which are stale
    python -m tests.mutants --root FOLDER     plant in a copy of the checkout in another folder

`faults.toml` lists the faults: where, the text that is there, what it becomes, and the files of tests that should find
it. A fault is found where one of these tests fails; one that survives needs a test that notices. A fault whose text is
not found exactly once is stale: the source has moved on, and the fault is to be written anew on what stands for it now.
The tests run in a copy in a temporary folder, so nothing in the source itself is touched; the exit code is 1 where a
fault is stale or survives, 2 for words that name no fault.
"""

from __future__ import annotations

import argparse
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


def find(fault: Fault, whole: Path, copy: Path) -> str | None:
    """Plant a fault in a copy, run its tests, and put the source back; the test that finds it, None if none does.

    Parameters
    ----------
    fault : Fault
    whole, copy : Path    two copies of the source, of which the second gets the fault
    """
    path = copy / fault.file
    try:
        path.write_text(path.read_text().replace(fault.old, fault.new))
        words = ["-m", "pytest", "-x", "-n", "0", "-q", "-p", "no:cacheprovider", "--tb=no"]
        tests = [f"tests/{test}" for test in fault.tests]
        environment = os.environ | {"HYPOTHESIS_PROFILE": "mutants", "CI": "1"}
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
        if ran.returncode < 0:
            return f"the end of the tests by signal {-ran.returncode}"
        named = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.stdout, re.MULTILINE)
        if named is None or "::" not in named[1]:  # wrong usage, no tests, or a file of tests that cannot be read
            raise SystemExit(f"{fault.id}: pytest tried nothing: {(ran.stderr or ran.stdout)[-300:]}")
        return named[1].removeprefix("tests/")
    except subprocess.TimeoutExpired:
        return f"no end within {LONGEST_S} s"
    finally:
        # With what is compiled beside it, which the fault has replaced.
        shutil.rmtree(path.parent)
        shutil.copytree(whole / path.parent.relative_to(copy), path.parent)


def main(words: list[str]) -> int:
    every = faults()
    kinds = list(dict.fromkeys(fault.kind for fault in every))
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {*kinds, *(fault.id for fault in every)}
    parser.add_argument("chosen", nargs="*", metavar="KIND or ID", help=f"kinds: {', '.join(kinds)}; ids: see --list")
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument("--check", action="store_true", help="say which faults are stale and plant none")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help="the checkout to copy, else this one")
    asked = parser.parse_args(words)
    if unknown := [word for word in asked.chosen if word not in known]:
        parser.error(f"{unknown[0]!r} is no fault and no kind of faults; kinds: {', '.join(kinds)}; ids: see --list")
    root, chosen = asked.root.resolve(), asked.chosen
    mine = [fault for fault in every if not chosen or fault.id in chosen or fault.kind in chosen]
    if asked.list:
        for fault in mine:
            print(f"{fault.id}  {fault.kind:12}  {fault.file}: {fault.why}")
        return 0
    stale = {fault.id: reason for fault in mine if (reason := fault.stale(root))}
    for name, reason in stale.items():
        print(f"{name}: STALE: {reason}", flush=True)
    if asked.check:
        return int(bool(stale))
    lost = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        # What is worked on meanwhile is in neither.
        whole, copy = Path(folder) / "whole", Path(folder) / "copy"
        shutil.copytree(root, whole, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
        shutil.copytree(whole, copy, symlinks=True)
        for fault in mine:
            if fault.id in stale:
                continue
            began = time.monotonic()
            by = find(fault, whole, copy)
            lost += [fault.id] if by is None else []
            end = "SURVIVES" if by is None else f"found by {by}"
            print(f"{fault.id} ({fault.why}): {end} [{time.monotonic() - began:.0f} s]", flush=True)
    print(f"{len(mine)} faults: {len(mine) - len(stale) - len(lost)} found, {len(lost)} survive, {len(stale)} stale")
    return int(bool(stale or lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
