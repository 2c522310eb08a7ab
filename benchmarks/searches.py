"""Time from inputs to certificate, for the problems that APEX publishes its own times for, and for a large cluster.

APEX+ (arXiv 2411.17651) takes for the same problems, in CPU seconds: 220 for its 26 plans of Llama-3-70B on 8 H100
with its creation trace, 132 with its lmsys trace, 757 for its 103 plans of Mixtral-8x22B, and 298 on 4x8 GPUs for the
26 of 84 plans that do not stop it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.problems import generated_chat, problem
from benchmarks.registry import ROOT, Benchmark, best_of, one_core

if TYPE_CHECKING:
    from apex_opt.search import Part

_TRACES = ROOT.parent / "shared" / "traces" / "apex"
_ALIKE = {  # requests, mean prompt and mean answer
    "llama_creation_05": (512, 308, 1144),
    "llama_lmsys_05": (1024, 62, 162),
    "mistral_creation_05": (725, 356, 761),
}
_QUESTIONS = {
    "plan_70b_8xh100_creation_s": ("llama-3.1-70b", "8xh100-sxm", "llama_creation_05"),
    "plan_70b_8xh100_lmsys_s": ("llama-3.1-70b", "8xh100-sxm", "llama_lmsys_05"),
    "plan_8x22b_8xh100_creation_s": ("mixtral-8x22b", "8xh100-sxm", "mistral_creation_05"),
    "plan_70b_4x8xh100_creation_s": ("llama-3.1-70b", "4x8xh100-sxm", "llama_creation_05"),
}
_SERVINGS = {
    "plan_both_ways_8xh100_s": "8xh100-sxm",
    "plan_both_ways_8x8xh100_s": "8x8xh100-sxm",
    "plan_both_ways_8xh100_8xh200_s": "8xh100-sxm+8xh200-sxm",
}
"""Clusters on which pools that hand prompts over compete with pools that do both phases."""
_LARGE = ("llama-1t", "128x8xh200-sxm", "poisson:rate=20,n=2000,prompt=512,output=128")


def benchmarks() -> tuple[Benchmark, ...]:
    """Figures of this module."""
    found = [
        Benchmark(
            name=name,
            unit="s",
            about=f"{model} on {cluster}, {_said(trace)}: inputs to certificate, in-process, warm, on one core",
            measure=partial(warm, model, cluster, trace),
        )
        for name, (model, cluster, trace) in _QUESTIONS.items()
    ]
    found += [
        Benchmark(
            name=name,
            unit="s",
            about=f"llama-3.1-70b on {cluster}, chat, --serving aggregated,pools: inputs to certificate, on one core",
            measure=partial(both_ways, cluster),
        )
        for name, cluster in _SERVINGS.items()
    ]
    model, cluster, trace = _LARGE
    found.append(
        Benchmark(
            name="plan_1t_1024xh200_s",
            unit="s",
            about=f"{model} on {cluster}, {trace}: inputs to certificate, in-process, once, on one core",
            measure=large,
        )
    )
    return tuple(found)


def warm(model: str, cluster: str, trace: str, quick: bool) -> float:
    """Best of three after a warm-up; splits of pipelines are found anew each time."""
    from apex_opt.search import search
    from formulations.layers import split
    from formulations.plan_space import PlanSpace

    described = generated_chat(20) if quick else _trace(trace)

    def run() -> None:
        split.cache_clear()
        answer = search(problem(model, cluster, described), PlanSpace())
        assert answer.status == "optimal"

    with one_core():
        run()
        return best_of(1 if quick else 3, run)


def both_ways(cluster: str, quick: bool) -> float:
    """Once: what is kept of one run would serve another."""
    from apex_opt.search import search
    from formulations.plan_space import PlanSpace

    def run() -> None:
        question = ("llama-3.1-8b", "2xh100-sxm", generated_chat(20)) if quick else ("llama-3.1-70b", cluster, "chat")
        assert search(problem(*question, serving="aggregated,pools"), PlanSpace()).status == "optimal"

    with one_core():
        problem("llama-3.1-8b", "1xh100-sxm", "chat")  # loads what the first question of all would
        return best_of(1, run)


def large(quick: bool) -> float:
    """Once: what is kept of one run would serve another."""
    with one_core():
        model, cluster, trace = ("llama-3.1-8b", "2x8xh200-sxm", generated_chat(20)) if quick else _LARGE
        return best_of(1, lambda: part_of(model, cluster, trace))


def part_of(model: str, cluster: str, trace: str) -> Part:
    """How the plans of a problem were accounted for."""
    from apex_opt.search import search
    from formulations.plan_space import PlanSpace

    (part,) = search(problem(model, cluster, trace), PlanSpace()).ledger.parts
    return part


def _trace(name: str) -> str:
    path = _TRACES / f"{name}.jsonl"
    if path.is_file():
        return str(path)
    requests, prompt, answer = _ALIKE[name]
    lengths = f"prompt=lognormal(mean={prompt},sigma=0.8,max=2048),output=lognormal(mean={answer},sigma=0.8,max=2048)"
    return f"poisson:rate=0.5,n={requests},{lengths}"


def _said(name: str) -> str:
    path = _TRACES / f"{name}.jsonl"
    return f"APEX's {name}" if path.is_file() else f"requests like those of APEX's {name}"
