"""Prefill and decode pools for the tests of searches and bounds: every pair by plain Python, and random questions."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from plan_cases import (
    ENGINES,
    SMALL,
    beside,
    feasible_plans,
    make_cluster,
    make_problem,
    memory_need,
    random_goal,
    random_model,
)
from search_cases import GPUS, on_every_figure

from apex_opt.cluster.types import Link
from apex_opt.engines.handover import HandoverTimes
from apex_opt.engines.schedulers import SglangScheduling, VllmScheduling
from apex_opt.figures import parse_goals
from apex_opt.ir import LatentAttention
from apex_opt.plans.deployment import Deployment, Pool
from apex_opt.plans.memory import stage_memory
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.routing import ROUTINGS
from apex_opt.search import Scorer
from apex_opt.serving import kept_apart
from apex_opt.workload import make_trace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from apex_opt.ir import Model
    from apex_opt.plans.plan import Plan
    from apex_opt.search import Offer, Problem
    from apex_opt.workload import Trace

SLEEPY = replace(SMALL, scheduler=VllmScheduling(idle_sleep_us=1000))
PUSHING = replace(SMALL, scheduler=SglangScheduling(), block_size=1)


def plans_of(problem: Problem, role: str, place: int) -> list[Plan]:
    """Plans of a pool by plain Python, which the connector takes."""
    side = problem.side(role, place)  # type: ignore[arg-type]
    return [plan for plan in feasible_plans(side) if plan.stages == 1 and plan.attention.dp == 1]


def pairs_of(problem: Problem) -> Iterator[Deployment]:
    """Every pair of pools that fits, where all GPUs of a type are in one node."""
    names = problem.types if problem.mixed else (None,)
    free = [offer.free for offer in problem.offers]
    # A latent cache is whole on every rank.
    cells = [block.attention for block in problem.model.blocks if not isinstance(block.attention, LatentAttention)]
    heads = [cell.kv_heads for cell in cells]
    for one, other in product(range(len(names)), repeat=2):
        for first, second in product(plans_of(problem, "prefill", one), plans_of(problem, "decode", other)):
            tp, of = first.attention.tp, second.attention.tp
            good = of % tp == 0 or (tp % of == 0 and (not heads or tp <= min(heads)))
            taken = first.devices + second.devices
            room = taken <= min(problem.max_devices, free[one] if one == other else taken)
            alike = (first.weight_format, first.kv_format) == (second.weight_format, second.kv_format)
            if good and room and alike:
                pools = (
                    Pool(plan=first, gpu=names[one], role="prefill"),
                    Pool(plan=second, gpu=names[other], role="decode"),
                )
                yield Deployment(pools=pools)


def _model(rng: np.random.Generator) -> Model:
    """A model of any kind of which all that is kept of a request can be handed over."""
    while kept_apart(model := random_model(rng)) is not None:
        pass
    return model


def _trace(rng: np.random.Generator, longest: int) -> Trace:
    """Requests that come on their own, from clients or as turns of sessions, whose prompts may begin alike."""
    requests, kind = int(rng.integers(5, 40)), str(rng.choice(["open", "open", "closed", "turns"]))
    most = int(rng.choice([40, 300, longest // 2]))
    prompt, output = rng.integers(1, most, requests), rng.integers(1, int(rng.choice([2, 10, 80])) + 1, requests)
    fields: dict[str, Any] = {}
    if rng.random() < 0.5:
        pieces = rng.integers(0, int(rng.choice([1, 2, 50])), (requests, -(-longest // 16)))
        fields = {"content": [row[: -(-p // 16)] for row, p in zip(pieces, prompt, strict=True)], "content_tokens": 16}
    if kind == "closed":
        fields |= {"concurrency": int(rng.integers(1, 12)), "pause_ns": int(rng.choice([0, 10**6]))}
    if kind == "turns" or rng.random() < 0.2:
        fields["session"] = session = rng.integers(0, max(2, requests // 3), requests)
    arrival = np.cumsum(rng.exponential(float(rng.choice([1e4, 1e6, 2e7, 2e8])), requests).astype(np.int64))
    if kind == "turns":
        fields["delay_ns"] = delay = rng.choice([-1, 0, 10**6], requests)
        last: dict[int, int] = {}
        for row, number in enumerate(session.tolist()):
            if number not in last:
                delay[row] = -1
            elif delay[row] >= 0:
                arrival[row] = arrival[last[number]] + delay[row]
            last[number] = row
    return make_trace(name="random", arrival_ns=arrival, prompt=prompt, output=output, **fields)


def random_question(seed: int) -> Problem:
    """A question of pools of any kind, with every figure among its objectives.

    Memory holds little more than the largest request or some of them; links may be so slow that all waits for them.
    """
    rng = np.random.default_rng(seed)
    pushed = bool(rng.random() < 0.3)
    base = PUSHING if pushed else replace(SLEEPY, block_size=int(rng.choice([1, 16, 16, 64])))
    split = pushed or bool(rng.random() < 0.8)
    settings = replace(
        base,
        max_num_seqs=int(rng.choice([1, 3, 16])),
        max_num_batched_tokens=int(rng.choice([32, 256, 2048])) if split else 2048,
        prefix_caching=bool(rng.random() < 0.4),
        async_scheduling=bool(rng.random() < 0.6),
        chunked_prefill=split,
    )
    model, trace = _model(rng), _trace(rng, settings.max_model_len)
    names = [name for name in ROUTINGS if name != "vllm_dp" and not (pushed and name == "pull")]
    if pushed and trace.delay_ns is not None:
        names = ["round_robin", "session"]  # others are simulated in plain Python, once for each turn
    sides = tuple(tuple(rng.choice(names, int(rng.choice([1, 1, 2])), replace=False).tolist()) for _ in range(2))
    times = HandoverTimes(
        proxy_us=float(rng.choice([0, 300, 20_000])),
        notice_us=float(rng.choice([0, 20, 5000])),
        post_us=float(rng.choice([0, 50])),
        descriptor_us=float(rng.choice([0, 1.5, 30])),
        rate_share=float(rng.choice([1.0, 0.3, 0.01])),
    )
    formats = (("bf16", "bf16"), ("fp8", "fp8"), ("w4a16", "bf16"))[: int(rng.integers(1, 4))]
    changes: dict[str, Any] = {
        "settings": settings,
        "serving": ("pools",),
        "sides": sides,
        "handover": times,
        "overhead": ENGINES[rng.integers(len(ENGINES))],
        "weight_formats": tuple(weights for weights, _ in formats),
        "kv_formats": tuple(kept for _, kept in formats),
        "clocks": (None, 1200) if rng.random() < 0.2 else (None,),
    }
    problem = make_problem(model, make_cluster(int(rng.integers(2, 6)), price_per_h=2.5), trace, **changes)
    if rng.random() < 0.3:
        slow = make_cluster(int(rng.integers(1, 4)), **GPUS["slow"] | {"name": "slow"})
        between = Link(bytes_per_s=float(rng.choice([1e8, 5e10])), latency_s=5e-6, kind="infiniband")
        problem = beside(problem, slow, between=between)
    problem = replace(problem, request_slos=parse_goals("ttft<=50ms@1%"), offers=tuple(_smaller(problem, rng)))
    return on_every_figure(problem)


def _smaller(problem: Problem, rng: np.random.Generator) -> Iterator[Offer]:
    """Its offers with memory for the weights of a whole model beside the largest request, or some of them."""
    share = float(rng.choice([1.0, 1.2, 3.0, 20.0]))
    for place, offer in enumerate(problem.offers):
        gpu, side = offer.cluster.gpu, problem.side("decode", place)
        plan = parse_plan(f"tp1 {offer.weight_formats[0]}", problem.model)
        (stage,) = stage_memory(problem.model, gpu, plan, side.settings)
        need = memory_need(stage, int(side.instance().blocks_needed(plan) * share) + 1)
        memory = min(gpu.memory_bytes, int(need / 0.9) + 1000)
        yield replace(offer, cluster=replace(offer.cluster, gpu=replace(gpu, memory_bytes=memory)))


def with_goal(problem: Problem, pair: Deployment, rng: np.random.Generator) -> Problem:
    """The same with a goal about what a pair reaches."""
    metrics = Scorer(problem, gaps=True).simulate(pair).metrics
    return replace(problem, slos=parse_goals(random_goal(rng, metrics, float(rng.choice([0.8, 1.0000001, 1.5])))))
