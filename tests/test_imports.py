"""Who may import whom, read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Every unit may import those of earlier rows. The simulator owns the batch law, which the cost model fills: it stands
# below the cost model and knows nothing of models, GPUs or profiles.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("apex_opt.units", "apex_opt.errors", "apex_opt.schema"),
    ("apex_opt.files", "apex_opt.figures"),
    ("apex_opt.outputs", "apex_opt.process"),
    ("apex_opt.ir", "apex_opt.workload", "apex_opt.cluster"),
    ("apex_opt.engines",),
    ("apex_opt.plans",),
    ("apex_opt.oracle", "apex_opt.simulator", "apex_opt.profiles", "apex_opt.placement"),
    ("apex_opt.cost",),
    ("apex_opt.search", "apex_opt.measured"),
    ("apex_opt.studies", "apex_opt.launch"),
    ("apex_opt.gate",),
    ("apex_opt.arguments", "apex_opt.shown"),
    ("apex_opt.sharing",),
    ("apex_opt.serving",),
    ("apex_opt.overlapping", "apex_opt.offering", "apex_opt.drafting"),
    ("apex_opt.batching",),
    ("apex_opt.resolve",),
    ("apex_opt.planned",),
    ("apex_opt.report",),
    ("apex_opt.commands",),
    ("apex_opt.grids",),
    ("apex_opt.api",),
    ("apex_opt.usage", "apex_opt.described"),
    ("apex_opt.cli",),
    ("apex_opt.__main__",),
)
LEVEL = {unit: level for level, row in enumerate(LAYERS) for unit in row}


def unit_of(module: str) -> str:
    """The package or top-level module that a module belongs to."""
    return ".".join(module.split(".")[:2])


def files(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def nodes(path: Path) -> list[ast.AST]:
    """All of the syntax of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@cache
def imports(path: Path) -> set[str]:
    """Modules a file imports anywhere, inside functions and for annotations alone too."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # Only programs import each other so, as they lie in the package once they are installed.
                assert path.is_relative_to(ROOT / "formulations"), f"{path}: imports are absolute"
                room = ".".join(path.relative_to(ROOT).parts[: -node.level])
                base = f"{room}.{base}".rstrip(".")
            elif path.is_relative_to(ROOT / "formulations"):
                assert base.split(".")[0] != "formulations", f"{path}: imports of programs are relative"
            # `from package import module` names a module where there is one.
            found |= {f"{base}.{n.name}" if _is_module(f"{base}.{n.name}") else base for n in node.names}
    return found


def _is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def ours(path: Path, package: str) -> set[str]:
    return {name for name in imports(path) if name == package or name.startswith(f"{package}.")}


def test_every_part_of_the_package_has_its_layer() -> None:
    found = {unit_of(module_of(path)) for path in files("apex_opt")} - {"apex_opt"}
    assert found == set(LEVEL)


def test_a_module_imports_only_from_the_layers_below_its_own() -> None:
    for path in files("apex_opt"):
        mine = unit_of(module_of(path))
        for name in ours(path, "apex_opt"):
            other = unit_of(name)
            if mine == "apex_opt":
                assert other in ("apex_opt.api", "apex_opt.commands", "apex_opt.errors"), (
                    f"the package itself imports {name}"
                )
            elif other != mine and other != "apex_opt":
                assert LEVEL[other] < LEVEL[mine], f"{module_of(path)} imports {name}"


def test_modules_do_not_import_each_other_in_a_circle_not_for_types_either() -> None:
    graph = {module_of(path): ours(path, "apex_opt") for path in files("apex_opt")}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module in done:
            return
        for other in graph.get(module, ()):
            # A package's front names its own modules.
            if not module.startswith(f"{other}."):
                visit(other, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_the_command_line_alone_knows_fire_and_nothing_in_the_package_imports_programs_by_name() -> None:
    for path in files("apex_opt"):
        known = {"fire"} if module_of(path) == "apex_opt.cli" else set()
        assert {name.split(".")[0] for name in imports(path)} & {"formulations", "solve", "ortools", "fire"} == known, (
            path
        )


def test_the_composition_root_alone_finds_the_programs() -> None:
    calls = {path for path in files("apex_opt") if "formulation(" in path.read_text(encoding="utf-8")}
    assert {unit_of(module_of(path)) for path in calls} == {"apex_opt.api"}


def test_programs_see_the_domain_and_the_oracle_and_nothing_above() -> None:
    for path in files("formulations"):
        allowed = {unit for unit, level in LEVEL.items() if level <= LEVEL["apex_opt.oracle"]} | {"apex_opt.cost"}
        assert {unit_of(name) for name in ours(path, "apex_opt")} <= allowed - {"apex_opt.simulator"}, path
        assert not ours(path, "solve"), path


def test_compilers_and_solvers_are_imported_where_they_are_used() -> None:
    for path in [*files("apex_opt"), *files("formulations")]:
        owners = {
            "numba": "apex_opt.simulator.kernel",
            "ortools": "formulations",
            "pyarrow": ("apex_opt.profiles.sources.", "apex_opt.grids.store"),
            "ray": "apex_opt.grids.workers",
            **dict.fromkeys(("torch", "vllm", "pynvml"), "apex_opt.profiles.collect.torch_"),
        }
        for name in imports(path):
            owner = owners.get(name.split(".")[0])
            assert owner is None or module_of(path).startswith(owner), f"{module_of(path)} imports {name}"


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded once a statement has run in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    ["import solve", "import apex_opt; apex_opt.plan", "from apex_opt import ir, cluster, workload, plans, errors"],
)
def test_the_command_line_starts_without_compiler_solver_and_tables(statement: str) -> None:
    assert not loaded_by(statement) & {"numba", "ortools", "pandas", "rich", "networkx", "vl_convert"}


def test_costing_and_searching_do_not_load_the_compiler_before_they_simulate() -> None:
    statement = "import apex_opt.search, apex_opt.oracle.space, apex_opt.measured"
    assert not loaded_by(statement) & {"numba", "ortools", "pandas", "rich", "vl_convert"}


def test_the_doors_to_compiled_code_do_not_load_the_compiler() -> None:
    doors = [f"apex_opt.simulator.pack.{path.stem}" for path in (ROOT / "apex_opt/simulator/pack").glob("[a-z]*.py")]
    assert len(doors) >= 6
    assert "numba" not in loaded_by(f"import {', '.join(doors)}")


def test_what_reads_measurements_knows_nothing_of_the_search() -> None:
    for path in files("apex_opt/measured"):
        assert not ours(path, "apex_opt.search"), path


def test_the_plot_alone_imports_the_plotting_library() -> None:
    for path in [*files("apex_opt"), *files("formulations"), ROOT / "solve.py"]:
        assert path.name == "picture.py" or not any(name.split(".")[0] == "vl_convert" for name in imports(path)), path


def test_reading_and_making_profiles_loads_no_package_that_only_some_of_them_need() -> None:
    statement = (
        "import apex_opt.profiles.importers, apex_opt.profiles.collect.torch_machine, apex_opt.profiles.inventory"
    )
    loaded = loaded_by(f"{statement}, apex_opt.profiles.distill.command")
    assert not loaded & {"torch", "vllm", "pynvml", "pyarrow", "pandas", "rich", "numba", "ortools"}


# What opens a file by itself; files of ours that others wrote, or that lie in a folder just made, are no input.
OWN_FILES = {
    "apex_opt.files": "the way in",
    "apex_opt.outputs": "the way out",
    "apex_opt.process": "the null device",
    "apex_opt.report.layout": "the terminal",
    "apex_opt.profiles.folder": "a folder just made",
    "apex_opt.launch.saved": "a folder just made",
    "apex_opt.profiles.tables": "a table of a folder just made",
    "apex_opt.profiles.collect.torch_group": "a temporary folder",
}
OPENING = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "savez",
    "savez_compressed",
    "load",
    "fromfile",
}


def test_files_are_read_and_written_through_one_door() -> None:
    for path in [*files("apex_opt"), *files("formulations"), ROOT / "solve.py"]:
        if module_of(path) in OWN_FILES:
            continue
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr == "expanduser":
                raise AssertionError(f"{path}:{node.lineno}: paths are expanded by apex_opt.files.expanded")
            if not isinstance(node, ast.Call):
                continue
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr in OPENING:
                assert isinstance(called.value, ast.Name), f"{path}:{node.lineno}: opens a file by itself"
                assert called.value.id == "files", f"{path}:{node.lineno}: opens a file by itself"
            assert not (isinstance(called, ast.Name) and called.id == "open"), (
                f"{path}:{node.lineno}: opens a file by itself"
            )
