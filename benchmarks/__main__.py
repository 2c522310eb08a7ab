"""Command line of the benchmarks: `python -m benchmarks [NAME ...] [--json] [--list] [--quick]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apex_opt.errors import ApexError, UnknownNameError
from benchmarks import enumeration, placement, plan, searches, simulator, startup, traces

if TYPE_CHECKING:
    from benchmarks.registry import Benchmark

FLAGS = ("--json", "--list", "--quick", "--help", "-h")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for, not yet run: fire looks at all words before anything is measured."""

    names: tuple[str, ...]
    json: bool
    list: bool
    quick: bool


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark by name, in the order in which they run: one module per group."""
    modules = (plan, searches, placement, simulator, enumeration, traces, startup)
    return {one.name: one for module in modules for one in module.benchmarks()}


def request(*names: str, json: bool = False, list: bool = False, quick: bool = False) -> Request:
    """Measure the speed of apex_opt and print one line per figure: name, value, unit.

    Args:
        names: Figures to measure; all where none is named.
        json: Print one JSON object per line instead.
        list: Print the names and what they measure, and measure nothing.
        quick: Run everything once in a reduced size, to see that it runs; the figures then mean nothing.
    """
    # fire turns a word like 1.10 into a number; no figure is called that, so its text will do.
    return Request(tuple(str(name) for name in names), json, list, quick)


def main(words: list[str]) -> int:
    """Run the benchmarks asked for; return 0, or 2 for a word that is not known."""
    import fire

    try:
        for word in words:
            if word.startswith("-") and word not in FLAGS:
                raise UnknownNameError("option", word[:60], FLAGS)
        # Names first: fire would take a name after a flag for its value.
        ordered = sorted(words, key=lambda word: word.startswith("-"))
        asked = fire.Fire(request, command=ordered, name="benchmarks", serialize=lambda _: None)
        return _run(asked) if isinstance(asked, Request) else 0
    except ApexError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(asked: Request) -> int:
    known = benchmarks()
    for name in asked.names:
        if name not in known:
            raise UnknownNameError("benchmark", name[:60], known)
    chosen = [known[name] for name in asked.names or known]
    for benchmark in chosen:
        if asked.list:
            print(f"{benchmark.name}  {benchmark.unit}  {benchmark.about}")
            continue
        print(_line(benchmark.name, benchmark.measure(asked.quick), benchmark.unit, asked.json), flush=True)
    return 0


def _line(name: str, value: float, unit: str, as_json: bool) -> str:
    if as_json:
        import json

        return json.dumps({"name": name, "value": value, "unit": unit})
    return f"{name} {value:.6g} {unit}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
