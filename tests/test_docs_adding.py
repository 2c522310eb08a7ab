"""docs/adding.md: every worked change is applied to a copy of the sources, and what stands under it is run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest
from doc_cases import ROOT

if TYPE_CHECKING:
    from pathlib import Path

TEXT = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
MOST_LINES = 100


class Worked(NamedTuple):
    """A section: the change, and the test of it; `compiled` where it changes what is compiled."""

    title: str
    change: str
    test: str
    compiled: bool


def _worked() -> list[Worked]:
    found = []
    for section in TEXT.split("\n## ")[1:]:
        change = re.search(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        test = re.search(r"^```python( compiled)?\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        assert change and test, section.splitlines()[0]
        found.append(Worked(section.splitlines()[0], change[1], test[2], bool(test[1])))
    return found


WORKED = _worked()


def apply(change: str, root: Path) -> None:
    """Apply a change whose hunks are found by their lines, each of which must be there once."""
    for file in re.split(r"^--- ", change, flags=re.MULTILINE)[1:]:
        head, *hunks = re.split(r"^@@\n", file, flags=re.MULTILINE)
        before, after = head.splitlines()
        path = root / after.removeprefix("+++ ")
        text = "" if before == "/dev/null" else path.read_text(encoding="utf-8")
        assert (before == "/dev/null") != path.exists(), path
        for hunk in hunks:
            lines = hunk.splitlines()
            assert {line[:1] for line in lines} <= {" ", "+", "-"}, hunk
            old, new = ("".join(f"{line[1:]}\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
            assert not text or text.count(old) == 1, (
                f"{path.name}: these lines are there {text.count(old)} times:\n{old}"
            )
            text = text.replace(old, new) if text else new
        path.write_text(text, encoding="utf-8")


def change_all(root: Path, worked: list[Worked]) -> None:
    """Apply changes to a copy of the sources, the data beside it, and write their tests."""
    for name in ("apex_opt", "formulations"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("profiles", "traces", "solve.py"):
        (root / name).symlink_to(ROOT / name)
    (root / "conftest.py").write_text("import apex_opt\n\nassert __file__.startswith(apex_opt.__path__[0][:-9])\n")
    for one in worked:
        apply(one.change, root)
        name = one.title.lower().replace(",", "").replace(" ", "_")
        (root / f"test_{name}.py").write_text(one.test, encoding="utf-8")


def run_tests(root: Path) -> None:
    """Run the tests of a copy on what it holds, uncompiled: to compile its kernel would take longer than they do."""
    path = os.pathsep.join(map(str, (root, ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(root)],
        cwd=root,
        env={**os.environ, "PYTHONPATH": path, "NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_row_of_the_table_that_leads_to_a_change_has_one() -> None:
    links = set(re.findall(r"^\| \[[^\]]+\]\(#([a-z-]+)\)", TEXT, re.MULTILINE))
    assert links == {one.title.lower().replace(",", "").replace(" ", "-") for one in WORKED}


def test_files_that_the_table_names_are_there() -> None:
    for name in re.findall(r"`([\w/]+\.py)`", TEXT):
        places = (ROOT / name, ROOT / "apex_opt" / name, ROOT / "tests" / name)
        assert any(place.exists() for place in places), name


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_links_and_paths_of_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / link).exists(), link
    for name in re.findall(r"`((?:apex_opt|formulations|tests|docs|benchmarks)/[\w/.]+)`", text):
        in_the_wheel = name.startswith("apex_opt/_data/") or name.startswith("apex_opt/formulations")
        assert in_the_wheel or (ROOT / name).exists(), name


@pytest.mark.parametrize("one", WORKED, ids=lambda one: one.title)
def test_a_change_is_short(one: Worked) -> None:
    assert len(one.change.splitlines()) < MOST_LINES


def test_all_changes_together_do_what_their_tests_say(tmp_path: Path) -> None:
    change_all(tmp_path, [one for one in WORKED if not one.compiled])
    run_tests(tmp_path)


def test_what_is_changed_in_the_kernel_equals_the_reference(tmp_path: Path) -> None:
    change_all(tmp_path, [one for one in WORKED if one.compiled])
    run_tests(tmp_path)
