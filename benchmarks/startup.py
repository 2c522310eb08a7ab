"""What a person waits for before any work: start of the process and compilation of the kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from benchmarks.registry import ROOT, Benchmark, BenchmarkError, best_of

# One request through each engine: synchronous, asynchronous, and a pipeline of two stages.
_COMPILE = """
import time
import numba
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator import simulate
from apex_opt.simulator.law import linear_law
from apex_opt.workload import load_trace
trace = load_trace("static:n=2,prompt=32,output=4")
limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
law = linear_law(base_ns=1000, token_ns=10, context_ns=0, **limits)
started = time.perf_counter()
for overlapped, stages in ((False, 1), (True, 1), (False, 2)):
    settings = EngineSettings(async_scheduling=overlapped, max_model_len=64, **limits)
    simulate(settings, 100, [law] * stages, trace)
print(time.perf_counter() - started)
"""


def benchmarks() -> tuple[Benchmark, ...]:
    """Figures of this module."""
    return (
        Benchmark(name="help_s", unit="s", about="the whole of `solve.py --help`", measure=show_help),
        Benchmark(
            name="kernel_compile_s",
            unit="s",
            about="compiling the simulator for all engines, imports left out, with an empty cache",
            measure=kernel_compile,
        ),
    )


def show_help(quick: bool) -> float:
    """Best of five."""
    return best_of(1 if quick else 5, lambda: solve_process(["--help"]))


def kernel_compile(_: bool) -> float:
    """Once, with nothing compiled."""
    return float(_process([sys.executable, "-c", _COMPILE], empty_cache=True))


def solve_process(words: list[str], *, empty_cache: bool = False) -> str:
    """Run `solve.py` with this interpreter, and return what it printed."""
    return _process([sys.executable, str(ROOT / "solve.py"), *words], empty_cache=empty_cache)


def _process(command: list[str], *, empty_cache: bool) -> str:
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, **({"NUMBA_CACHE_DIR": cache} if empty_cache else {})}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise BenchmarkError(f"{' '.join(command[1:3])[:80]!r} exited with {done.returncode}: {last}")
    return done.stdout
