"""apex_opt.simulator.warm: what is compiled is a closed list, each once, and can be compiled beforehand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from inspect import getsource
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import pytest
from hypothesis import Phase, find, settings
from simulator_cases import LOOPS, TRAFFIC, cases

from apex_opt.figures.stops import Stop
from apex_opt.simulator import kernel, warm
from apex_opt.units import DATA_ROOT

if TYPE_CHECKING:
    from pathlib import Path

ENTRIES = [entry for variant in warm.VARIANTS.values() for entry in variant.entries]


def test_every_entry_of_the_kernel_is_listed_once() -> None:
    modules = [import_module(f"{kernel.__name__}.{found.name}") for found in iter_modules(kernel.__path__)]
    entries = {name for module in modules for name in re.findall(r"@entry\ndef (\w+)", getsource(module))}
    assert sorted(entries) == sorted(entry.__name__ for entry in ENTRIES)


def test_whatever_is_run_nothing_is_compiled_for_other_types() -> None:
    for loop in LOOPS:
        for traffic in TRAFFIC:
            case = find(
                cases(loop, traffic),
                lambda _: True,
                settings=settings(max_examples=1, derandomize=True, database=None, phases=[Phase.generate]),
            )
            for limits in ([], [Stop(metric="whole", kind="sum", limit_ns=1)]):
                case.run(log=False, stops=limits)
                case.run(log=True, stops=limits)
    assert [len(getattr(entry, "signatures", [()])) for entry in ENTRIES] == [1] * len(ENTRIES)


@pytest.mark.slow
def test_what_is_missing_is_compiled_by_several_processes_and_then_taken_from_disk(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "from apex_opt.simulator.warm import warm_up; print(warm_up(3))"]
    environment = {**os.environ, "PYTHONPATH": str(DATA_ROOT), "NUMBA_CACHE_DIR": str(tmp_path)}
    environment["NUMBA_DISABLE_JIT"] = "0"
    for said in ("['steady', 'general', 'caching']\n", "[]\n"):
        ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, said, "")
