"""Every public function with three parameters or more says what they are."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
FEWEST = 3
ALIKE = (["model", "instance", "v"],)
"""Parameters of functions that are all called alike: the constraint families (`constraints.Family`)."""


def functions(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, bool, list[str], str]]:
    """Name, whether it is a method, parameters and docstring of the public functions of a module or a class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node.body, f"{inside}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            named = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            every = (*named, *filter(None, (node.args.vararg, node.args.kwarg)))
            names = [each.arg for each in every if each.arg not in ("self", "cls")]
            yield inside + node.name, bool(inside), names, ast.get_docstring(node) or ""


def public() -> list[tuple[str, bool, list[str], str]]:
    """Those of all rooms but the compiled functions, whose arguments `simulator/kernel/state.py` names."""
    found = []
    for room in ("apex_opt", "formulations"):
        for path in sorted((ROOT / room).rglob("*.py")):
            if "kernel" not in path.parts:
                module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                body = ast.parse(path.read_text(encoding="utf-8")).body
                found += [(f"{module}.{name}", *rest) for name, *rest in functions(body)]
    return found


def test_functions_of_three_parameters_or_more_have_a_section_for_them() -> None:
    every = public()
    told = {(name.rpartition(".")[2], *names) for name, _, names, text in every if "Parameters\n-----" in text}
    silent = [
        name
        for name, method, names, text in every
        if len(names) >= FEWEST
        and names not in ALIKE
        and "Parameters\n-----" not in text
        # A method says it once, where it is declared first; others fill it in.
        and not (method and (name.rpartition(".")[2], *names) in told)
    ]
    assert len(every) > 1000
    assert silent == []


def test_what_a_section_names_is_a_parameter() -> None:
    for name, _, names, text in public():
        if len(names) >= FEWEST and "Parameters\n-----" in text:
            section = text.split("Parameters\n")[1].split("\n", 1)[1].split("\n\n")[0]
            lines = [line.partition(" : ")[0] for line in section.splitlines() if " : " in line and line[0] != " "]
            said = {one.strip() for line in lines for one in line.split(",")}
            assert said <= set(names), (name, said - set(names))
