"""Time to the best plan and its certificate: llama-3.1-70b on 8xh100-sxm with a thousand chat requests."""

from __future__ import annotations

from benchmarks.problems import generated_chat, problem
from benchmarks.registry import Benchmark, best_of, one_core
from benchmarks.startup import solve_process

MODEL, CLUSTER = "llama-3.1-70b", "8xh100-sxm"


def benchmarks() -> tuple[Benchmark, ...]:
    """Figures of this module."""
    what = f"{MODEL} on {CLUSTER}, 1,000 chat requests"
    return (
        Benchmark(
            name="plan_70b_8xh100_chat_warm_s",
            unit="s",
            about=f"{what}: reading all inputs, search and certificate, in-process, warm, on one core",
            measure=warm,
        ),
        Benchmark(
            name="plan_70b_8xh100_chat_process_s",
            unit="s",
            about=f"{what}: the whole of `solve.py plan` once the kernel is compiled",
            measure=process,
        ),
        Benchmark(
            name="plan_first_process_s",
            unit="s",
            about=f"{what}: the whole of `solve.py plan` the very first time, kernel compilation included",
            measure=first_process,
        ),
    )


def warm(quick: bool) -> float:
    """Best of three after a warm-up."""
    from apex_opt.search import search
    from formulations.plan_space import PlanSpace

    trace = generated_chat(20) if quick else "chat"

    def run() -> None:
        answer = search(problem(MODEL, CLUSTER, trace), PlanSpace())
        assert answer.status == "optimal"

    with one_core():
        run()
        return best_of(1 if quick else 3, run)


def process(quick: bool) -> float:
    """Best of three after a warm-up."""
    words = _words(quick)
    solve_process(words)
    return best_of(1 if quick else 3, lambda: solve_process(words))


def first_process(quick: bool) -> float:
    """Once, with nothing compiled."""
    return best_of(1, lambda: solve_process(_words(quick), empty_cache=True))


def _words(quick: bool) -> list[str]:
    return ["plan", *([f"--trace={generated_chat(20)}"] if quick else [])]
