"""Time to enumerate every feasible plan with CP-SAT, each checked by the oracle."""

from __future__ import annotations

from functools import partial

from benchmarks.problems import problem
from benchmarks.registry import Benchmark, best_of


def benchmarks() -> tuple[Benchmark, ...]:
    """Figures of this module."""
    return tuple(
        Benchmark(
            name=f"enumerate_{gpus}_gpus_s",
            unit="s",
            about=f"all feasible plans of mixtral-8x22b on {cluster}, bf16 and fp8: build, solve and check",
            measure=partial(enumerate_plans, cluster),
        )
        for gpus, cluster in ((8, "8xh100-sxm"), (32, "4x8xh100-sxm"))
    )


def enumerate_plans(cluster: str, quick: bool) -> float:
    """Best of three after a warm-up."""
    from formulations.plan_space import PlanSpace

    asked = problem("mixtral-8x22b", cluster, "chat", weights="bf16,fp8", gpus=4 if quick else None)
    instance = asked.instance()

    def run() -> None:
        assert PlanSpace().enumerate(instance).complete

    run()
    return best_of(1 if quick else 3, run)
