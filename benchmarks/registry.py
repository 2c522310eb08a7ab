"""What a benchmark is, and how it is timed."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from apex_opt.errors import ApexError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).resolve().parent.parent


class BenchmarkError(ApexError, RuntimeError):
    """A benchmark whose work failed: a fault of ours."""

    exit_code = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One figure.

    Parameters
    ----------
    name, unit : str       stable, snake_case; the name ends in its unit
    about : str            one line: what is timed
    measure : callable     takes whether to run in a reduced size, where the figure means nothing, and returns it
    """

    name: str
    unit: str
    about: str
    measure: Callable[[bool], float]


def best_of(repetitions: int, action: Callable[[], object]) -> float:
    """Least seconds of several runs."""
    best = float("inf")
    for _ in range(repetitions):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this thread, and those it starts, on a single core where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
