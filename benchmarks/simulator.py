"""Speed of the exact batching simulator on costs of real plans."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling, VllmScheduling
from apex_opt.plans.speculation import Speculation
from benchmarks.problems import generated_chat, problem
from benchmarks.registry import Benchmark, best_of, one_core
from benchmarks.traces import AZURE_CONVERSATION, MOONCAKE_CONVERSATION, conversation, shared_beginnings

if TYPE_CHECKING:
    from apex_opt.workload import Trace

MODEL = "llama-3.1-8b"
WINDOWED = "gpt-oss-20b"
MIXTURE = "qwen3-30b-a3b"

# Engine loop: plan, and the engine settings that differ from the default.
EAGLE = Speculation(method="eagle", draft_tokens=3, accepted=((2, 3, 2, 1, 0, 0, 1, 0, 3, 2, 1, 0),))
LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "sync": ("dp2 tp1", {"async_scheduling": False}),
    "async": ("dp2 tp1", {}),
    "pipeline_2": ("dp2 pp2 tp1", {}),
    "trtllm": ("dp2 tp1", {"scheduler": TrtllmScheduling(), "block_size": 32}),
    "sglang": ("dp2 tp1", {"scheduler": SglangScheduling(), "block_size": 1}),
    "threshold": ("dp2 tp1", {"scheduler": VllmScheduling(long_prefill_token_threshold=512)}),
    "speculation": ("dp2 tp1 spec=eagle:3", {"drafting": (EAGLE,)}),
    "sglang_speculation": (
        "dp2 tp1 spec=eagle:3",
        {"scheduler": SglangScheduling(), "block_size": 1, "drafting": (EAGLE,)},
    ),
}

PREFIX_CACHING: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix_caching": ("dp2 tp1", {"prefix_caching": True}),
    "mooncake": ("dp4 tp1", {"prefix_caching": True}),
}
CONVERSATIONS = "poisson:rate=10,n=20000,prompt=lognormal(mean=1155,sigma=0.8,max=8000),output=211,prefix=(512,50)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Best of several runs of one trace."""

    seconds: float
    requests: int
    batches: int


def benchmarks() -> tuple[Benchmark, ...]:
    """Figures of this module."""
    trace = "azure_conv" if AZURE_CONVERSATION.is_file() else "azure_conv_lookalike"
    title = "the Azure conversation trace" if AZURE_CONVERSATION.is_file() else "a trace like Azure's conversations"
    found = [
        Benchmark(
            name="simulate_20000_requests_s",
            unit="s",
            about="scoring llama-3.1-70b at tp8 on 20,000 generated chat requests: batches, latencies and energy, warm",
            measure=score_20000,
        )
    ]
    for loop, (plan, _) in LOOPS.items():
        for unit in ("batches", "requests"):
            found.append(
                Benchmark(
                    name=f"simulate_{loop}_{trace}_{unit}_per_s",
                    unit=f"{unit}/s",
                    about=f"{title} on {MODEL}, {plan}, full cost of the plan, warm, on one core",
                    measure=partial(rate, loop, unit),
                )
            )
    found.append(
        Benchmark(
            name="simulate_prefix_caching_batches_per_s",
            unit="batches/s",
            about=f"20,000 generated requests of 50 shared beginnings on {MODEL}, dp2 tp1, warm, on one core",
            measure=partial(rate, "prefix_caching", "batches"),
        )
    )
    for way, together in (("in two passes", False), ("that act together", True)):
        found.append(
            Benchmark(
                name=f"simulate_disaggregated{'_together' * together}_batches_per_s",
                unit="batches/s",
                about=f"{title} on {MODEL}, a prefill and a decode instance of tp1 each, {way}, warm, on one core",
                measure=partial(disaggregated, together),
            )
        )
    found.append(
        Benchmark(
            name="simulate_pushing_batches_per_s",
            unit="batches/s",
            about=f"{title} on {MODEL}, a prefill and a decode instance of SGLang of tp1 each, warm, on one core",
            measure=partial(disaggregated, False, scheduler=SglangScheduling(), block_size=1),
        )
    )
    found.append(
        Benchmark(
            name="simulate_groups_batches_per_s",
            unit="batches/s",
            about=f"{title} on {WINDOWED}, tp1: blocks shared by layers with windows and without, warm, on one core",
            measure=groups,
        )
    )
    found.append(
        Benchmark(
            name="simulate_ranks_batches_per_s",
            unit="batches/s",
            about=f"{title} on {MIXTURE}, attn(dp8) ffn(ep8), eight ranks in "
            "lockstep: batches of all ranks, dummies among them, full cost of the plan, warm, on one core",
            measure=ranks,
        )
    )
    at_hand = MOONCAKE_CONVERSATION.is_file()
    title = "Mooncake's conversation trace" if at_hand else "a trace of Mooncake's lengths with 50 shared beginnings"
    found.append(
        Benchmark(
            name=f"simulate_{'mooncake' if at_hand else 'mooncake_lookalike'}_s",
            unit="s",
            about=f"{title}: 12,031 requests with prefix caching on {MODEL}, dp4 tp1, warm, on one core",
            measure=partial(seconds, "mooncake"),
        )
    )
    return tuple(found)


def score_20000(quick: bool) -> float:
    """Best of five after a warm-up."""
    from apex_opt.plans.deployment import Deployment
    from apex_opt.plans.plan import parse_plan
    from apex_opt.search import Scorer

    asked = problem("llama-3.1-70b", "8xh100-sxm", generated_chat(50 if quick else 20_000))
    scorer, deployment = Scorer(asked), Deployment.of(parse_plan("tp8", asked.model))
    with one_core():
        scorer.simulate(deployment)
        return best_of(1 if quick else 5, lambda: scorer.simulate(deployment))


def disaggregated(together: bool, quick: bool, **changes: Any) -> float:
    """Batches of both instances simulated per second, best of five after a warm-up.

    A limit of a prompt's tokens in a batch that is that of all tokens changes nothing but that they act together.
    """
    from apex_opt.plans.plan import parse_plan
    from apex_opt.search.facts import Facts
    from apex_opt.simulator import EnginePool, Handover, run_disaggregated

    asked, trace = problem(MODEL, "4xh200-sxm", "chat"), conversation(quick)
    facts, plan = Facts(asked), parse_plan("tp1", asked.model)
    settings = asked.settings_for(plan)
    most = settings.max_num_batched_tokens if together else 0
    changes = {"scheduler": VllmScheduling(idle_sleep_us=1000, long_prefill_token_threshold=most), **changes}
    blocks = facts.blocks(plan) * settings.block_size
    settings = replace(settings, **changes)
    pool = EnginePool(settings=settings, blocks=blocks // settings.block_size, laws=facts.plan_cost(plan).laws)
    block_ns = 2500 * settings.block_size
    handover = Handover(proxy_ns=500_000, read_ns=300_000, block_ns=block_ns, notice_ns=50_000, in_turn=True)

    def run() -> int:
        return run_disaggregated(pool, pool, handover, trace).batches

    with one_core():
        return run() / best_of(1 if quick else 5, run)


def groups(quick: bool) -> float:
    """Batches per second over groups of layers, best of five after a warm-up."""
    from apex_opt.plans.plan import parse_plan
    from apex_opt.search.facts import Facts
    from apex_opt.simulator import EnginePool, run_deployment

    asked, trace = problem(WINDOWED, "1xh200-sxm", "chat"), conversation(quick)
    facts, plan = Facts(asked), parse_plan("tp1", asked.model)
    cost = facts.plan_cost(plan)
    pool = EnginePool(settings=asked.settings_for(plan), blocks=facts.own_blocks(plan), laws=cost.laws)

    def run() -> int:
        return run_deployment([pool], trace).batches

    with one_core():
        return run() / best_of(1 if quick else 5, run)


def ranks(quick: bool) -> float:
    """Parts of forwards that ranks in lockstep run per second, best of five after a warm-up."""
    from apex_opt.plans.plan import parse_plan
    from apex_opt.search.facts import Facts
    from apex_opt.simulator import EnginePool, run_deployment

    asked, trace = problem(MIXTURE, "8xh200-sxm", "chat"), conversation(quick)
    facts, plan = Facts(asked), parse_plan("attn(dp8) ffn(ep8)", asked.model)
    cost = facts.plan_cost(plan)
    pool = EnginePool(
        settings=asked.settings_for(plan), blocks=facts.own_blocks(plan), laws=cost.laws, ranks=cost.ranks
    )

    def run() -> int:
        outcome = run_deployment([pool], trace)
        shared = outcome.pools[0].shared
        assert shared is not None
        return outcome.batches + shared.dummies

    with one_core():
        return run() / best_of(1 if quick else 5, run)


def rate(loop: str, unit: str, quick: bool) -> float:
    """Batches or requests simulated per second."""
    speed = _speed(loop, quick)
    return (speed.batches if unit == "batches" else speed.requests) / speed.seconds


def seconds(loop: str, quick: bool) -> float:
    """How long the whole trace takes."""
    return _speed(loop, quick).seconds


@cache
def _speed(loop: str, quick: bool) -> Speed:
    """One engine loop, best of five after a warm-up."""
    from apex_opt.plans.plan import parse_plan
    from apex_opt.search.facts import Facts
    from apex_opt.simulator import simulate
    from apex_opt.workload import load_trace

    if loop in PREFIX_CACHING:
        text, changes = PREFIX_CACHING[loop]
        mooncake = loop == "mooncake"
        trace: Trace = shared_beginnings(quick) if mooncake else load_trace(CONVERSATIONS).head(50 if quick else 20_000)
    else:
        text, changes = LOOPS[loop]
        trace = conversation(quick)
    asked = problem(MODEL, "4xh200-sxm", "chat")
    asked = replace(asked, settings=replace(asked.settings, **changes))
    facts, plan = Facts(asked), parse_plan(text, asked.model)
    settings, laws, blocks = asked.settings_for(plan), facts.plan_cost(plan).laws, facts.blocks(plan)

    def run() -> int:
        return simulate(settings, blocks, laws, trace, replicas=plan.replicas).batches

    with one_core():
        batches = run()
        return Speed(seconds=best_of(1 if quick else 5, run), requests=len(trace), batches=batches)
