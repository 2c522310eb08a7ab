"""The site of the documents: what `docs/index.md` names, and how CONTRIBUTING and CI build it."""

from __future__ import annotations

import re
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING

from doc_cases import ROOT, blocks_of

import apex_opt

if TYPE_CHECKING:
    from types import ModuleType

DOCS = ROOT / "docs"
PAGES = ("*.md", "*.ipynb", "*/README.md")


def named() -> list[str]:
    """The pages that `docs/index.md` names, relative to it and without their endings."""
    bodies = re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for body in bodies for line in body.splitlines() if line and not line.startswith(":")]
    return [re.sub(r".*<(.*)>", r"\1", line) for line in lines]


def configured() -> ModuleType:
    spec = spec_from_file_location("conf", DOCS / "conf.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(found := module_from_spec(spec))
    return found


def test_every_page_is_named_once_and_no_other() -> None:
    there = {path.relative_to(DOCS) for pattern in PAGES for path in DOCS.glob(pattern)}
    pages = {path.with_suffix("").as_posix() for path in there} - {"index"}
    inside = [name for name in named() if not name.startswith("../")]
    assert set(inside) ^ pages == set(), "what docs/index.md does not name, or names and is not there"
    assert len(set(inside)) == len(inside)


def test_pages_outside_docs_are_there_and_sources_of_the_site() -> None:
    outside = [f"{name.removeprefix('../')}.md" for name in named() if name.startswith("../")]
    assert sorted(outside) == sorted(each for each in configured().include_patterns if not each.startswith("docs/"))
    assert all((ROOT / name).is_file() for name in outside)


def test_every_command_is_on_the_page_of_the_python_api() -> None:
    shown = set(re.findall(r"^\.\. autofunction:: apex_opt\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    assert shown == {name for name in apex_opt.__all__ if name.islower() and not name.startswith("_")}


def test_ci_builds_the_site_as_contributing_says() -> None:
    (body,) = (body for _, body in blocks_of((ROOT / "CONTRIBUTING.md").read_text()) if "sphinx-build" in body)
    assert f"\n{body}" in (ROOT / ".ci" / "run").read_text()
    assert "/site/\n" in (ROOT / ".gitignore").read_text()


def test_second_columns_of_docstrings_are_set_below_as_numpydoc_reads_them() -> None:
    lines = [
        "What it is.",
        "",
        "Raises",
        "------",
        "InputError    a file that",
        "              is not there",
        "",
        "    code",
    ]
    configured().columns(None, "function", "", None, None, lines)
    assert lines[4:] == ["InputError", "    a file that", "    is not there", "", "    code"]
