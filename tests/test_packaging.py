"""The wheel: what is in it, and that it works away from the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from apex_opt import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RELEASE = (ROOT / "docs" / "release.md").read_text(encoding="utf-8")
CITATION = (ROOT / "CITATION.cff").read_text(encoding="utf-8")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("pip") is None or find_spec("hatchling") is None,
        reason="needs pip and hatchling: pip install -e '.[test]'",
    ),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    _pip("install", str(wheel), "--no-deps", "--no-compile", "--target", str(target))
    return target


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", words[0], "--quiet", "--no-index", *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _run(command: list[str], target: Path, elsewhere: Path) -> str:
    """Run with the installed wheel and without the checkout on the path; stdout."""
    # The installed files come before an editable install on the path; a safe path leaves the current folder out.
    # What is asked takes less time by the kernel as plain Python than by one that is compiled for this copy first.
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1", "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_what_it_should_and_nothing_else(wheel: Path) -> None:
    done = _contents(wheel)
    assert done.returncode == 0, done.stderr
    told = {line.split()[0] for line in done.stdout.splitlines()[1:]}
    assert told == set(re.findall(r"^\| `(apex_opt.*?)`", RELEASE, re.MULTILINE)), (
        "rooms told and rooms in docs/release.md"
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("apex_opt/py.typed", None, "lacks: apex_opt/py.typed (1 in all)"),
        ("apex_opt/tests/test_it.py", "", "holds besides: apex_opt/tests/test_it.py (1 in all)"),
        ("apex_opt/units.py", "", "holds otherwise than the checkout: apex_opt/units.py (1 in all)"),
    ],
)
def test_a_wheel_is_refused_that_differs_in_a_file(
    name: str, content: str | None, said: str, wheel: Path, tmp_path: Path
) -> None:
    other = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(other, "w") as changed:
        for each in archive.namelist():
            if each != name:
                changed.writestr(each, archive.read(each))
        if content is not None:
            changed.writestr(name, content)
    done = _contents(other)
    assert (done.returncode, done.stderr) == (1, f"{wheel.name} {said}\n")


def _contents(wheel: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "contents.py"), str(wheel)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_wheel_holds_each_table_that_the_cards_of_profiles_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        cards = {name for name in names if name.startswith("apex_opt/_data/profiles/") and name.endswith("/card.toml")}
        assert cards
        for card in cards:
            folder = card.removesuffix("card.toml")
            for table in tomllib.loads(archive.read(card).decode())["tables"].values():
                assert hashlib.sha256(archive.read(folder + table["file"])).hexdigest() == table["sha256"]
    assert wheel.stat().st_size < 12e6, "a few seconds to download"


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    code = (
        "import apex_opt; from apex_opt.api.programs import formulation; print(apex_opt.__file__)\n"
        "print(formulation('plan_space').__file__)"
    )
    found = [Path(line) for line in _run([sys.executable, "-c", code], installed, tmp_path).splitlines()]
    inside = installed / "apex_opt"
    assert found == [inside / "__init__.py", inside / "formulations" / "plan_space" / "__init__.py"]


def test_the_api_finds_a_plan_and_its_placement_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = (
        "import apex_opt\n"
        "asked = dict(model='llama-3.1-8b', cluster='2xh200-sxm', trace='static:n=3,prompt=64,output=8')\n"
        "answer = apex_opt.plan(**asked, engine='vllm', emit=True)\n"
        "assert apex_opt.check(answer).holds\n"
        "print(answer.to_json())"
    )
    assert "vllm" in json.loads(_run([sys.executable, "-c", code], installed, tmp_path))["launch"]["engine"]


def test_the_module_lists_models_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    document = json.loads(_run([sys.executable, "-m", "apex_opt", "models", "--format=json"], installed, tmp_path))
    assert "llama-3.1-70b" in {row["name"] for row in document["models"]}


def test_the_package_runs_wherever_one_stands(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "solve.py").write_text("raise SystemExit('another solve.py')")
    (tmp_path / "formulations").mkdir()
    command = [sys.executable, "-m", "apex_opt", "--version"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"apex-opt {__version__}\n"), done.stderr


def test_the_installed_entry_point_finds_a_plan_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    entry = installed / "bin" / "apex-opt"
    if not entry.exists():
        entry = installed / "Scripts" / "apex-opt.exe"
    words = ["plan", "--top", "1", "--trace", "static:n=5,prompt=100,output=10", "--format=json"]
    document = json.loads(_run([str(entry), *words], installed, tmp_path))
    assert document["status"] == "optimal"
    assert document["certificate"]["optimal"] is True
    assert len(document["candidates"]) == 1


def test_a_shipped_trace_is_read_from_the_installed_package(installed: Path, tmp_path: Path) -> None:
    document = json.loads(_run([sys.executable, "-m", "apex_opt", "traces", "--format=json"], installed, tmp_path))
    assert "chat" in {row["name"] for row in document["traces"]}


def test_the_profiles_of_the_installed_package_are_shown(installed: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "apex_opt", "profile", "show", "--format=json"]
    document = json.loads(_run(words, installed, tmp_path))
    assert document["root"] == str(installed / "apex_opt" / "_data" / "profiles")
    assert len(document["profiles"]) == len(list((ROOT / "profiles").glob("*/*/card.toml")))


def test_extras_that_read_tables_name_the_release_that_is_read() -> None:
    from apex_opt.profiles.sources.aiconfigurator import PACKAGE, VERSION

    extras = PROJECT["optional-dependencies"]
    assert extras["distill"] == extras["silicon"]
    assert f"{PACKAGE.replace('_', '-')}=={VERSION}" in extras["distill"]
    assert any(line.startswith("pyarrow") for line in extras["distill"])
    assert any(line.startswith("pyarrow") for line in extras["test"])


def test_an_editable_install_finds_programs_and_data_in_the_checkout(tmp_path: Path) -> None:
    _pip("install", "-e", str(ROOT), "--no-deps", "--no-build-isolation", "--target", str(tmp_path))
    (path_file,) = tmp_path.glob("*.pth")
    code = "from apex_opt.api.programs import formulation; from apex_opt.units import DATA_ROOT; print(DATA_ROOT)\n"
    code += "print(formulation('plan_space').__file__)"
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "formulations").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": path_file.read_text().strip()}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [str(ROOT), str(ROOT / "formulations" / "plan_space" / "__init__.py")]


def test_the_version_is_stated_once(wheel: Path) -> None:
    assert wheel.name.split("-")[1] == __version__
    assert "version" not in PROJECT
    assert not re.search(r"^version:", CITATION, re.MULTILINE)


def test_ci_tries_the_release_on_every_python_that_is_named() -> None:
    script = ROOT / ".ci" / "release"
    assert "\nbash .ci/release\n" in (ROOT / ".ci" / "run").read_text()
    (search,) = re.findall(r"sed -nE '(.*?)' ", script.read_text())
    found = subprocess.run(["sed", "-nE", search, str(ROOT / "pyproject.toml")], capture_output=True, text=True)
    named = [each.rpartition(" ")[2] for each in PROJECT["classifiers"] if "Python :: 3." in each]
    assert found.stdout.split() == named
    assert PROJECT["requires-python"] == f">={named[0]}"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0


def test_the_citation_names_those_whom_the_project_names_and_the_paper() -> None:
    project, paper = CITATION.split("references:\n")
    assert re.findall(r"^  - name: (.*)$", project, re.MULTILINE) == [
        f'"{each["name"]}"' for each in PROJECT["authors"]
    ]
    assert f"\nlicense: {PROJECT['license']}\n" in project
    assert "arXiv:2411.17651" in paper


def test_every_package_the_tests_import_is_declared() -> None:
    import ast

    # Only a machine with a GPU has these, and whoever measures it installs them.
    # numba brings llvmlite, of the release that it is made for.
    measuring = {"torch", "vllm", "pynvml"}

    declared = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    names = {
        line.split(">")[0].split("=")[0].strip().lower().removesuffix("-python").replace("-", "_") for line in declared
    }
    own = {
        "apex_opt",
        "formulations",
        "benchmarks",
        "solve",
        "tests",
        *(path.stem for path in (ROOT / "tests").iterdir()),
    }
    for pattern in ("apex_opt/**/*.py", "formulations/**/*.py", "benchmarks/*.py", "tests/*.py"):
        for path in ROOT.glob(pattern):
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.level == 0:
                    modules = [node.module or ""]
                for module in modules:
                    top = module.split(".")[0]
                    known = top in sys.stdlib_module_names or top in own
                    known = known or (path.is_relative_to(ROOT / "apex_opt/profiles/collect") and top in measuring)
                    known = known or ("kernel" in str(path.relative_to(ROOT)) and top == "llvmlite")
                    assert known or top.lower() in names, f"{path.relative_to(ROOT)} imports {top}"
