"""Models, clusters and problems for the tests of plans, formulations, costs and searches."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.cluster import load_cluster
from apex_opt.cluster.types import Cluster, Gpu, Link
from apex_opt.cost import CostModel
from apex_opt.cost.engine import EngineOverhead
from apex_opt.engines import EngineRules, Held
from apex_opt.engines.schedulers import OrcaScheduling
from apex_opt.figures import load_objective, parse_goals
from apex_opt.figures.registry import names, per_run
from apex_opt.ir import FORMATS, KV_BYTES, Attention, Block, DenseFfn, LatentAttention, Model, MoeFfn, Run
from apex_opt.ir.cells import WHOLE, Cut, Kept, State
from apex_opt.ir.cells.gated_delta import GatedDelta, KimiDelta
from apex_opt.ir.cells.mamba import Mamba2
from apex_opt.ir.scheme import Scheme
from apex_opt.oracle.checks import FAMILIES, decode_bytes, violations
from apex_opt.oracle.instance import Instance
from apex_opt.oracle.space import space
from apex_opt.plans.deployment import Deployment, Pool
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.memory import settings_of, stage_memory
from apex_opt.search import Offer, Problem, Scorer
from apex_opt.search.dealing import dealt
from apex_opt.search.shapes.pipeline import Splits, joined, pipelines
from apex_opt.units import GIB, ceil_div
from apex_opt.workload import Trace, make_trace
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from apex_opt.cost import PlanCost
    from apex_opt.figures.metrics import Metrics
    from apex_opt.plans.memory import StageMemory
    from apex_opt.plans.plan import Plan
    from apex_opt.search import Scored

NAMES = names()
FIGURES = {one.name: one.unit.name for one in per_run()}
AT_LEAST = tuple(one.name for one in per_run() if one.maximise)


class SharingScheduling(OrcaScheduling):
    """Of an engine whose attention copies share one scheduler and its limits, as they do where no ranks are known."""

    whole_length = False


SMALL = EngineSettings(max_num_seqs=16, max_num_batched_tokens=256, max_model_len=2048)
OVERHEAD = EngineOverhead(
    name="test",
    step_s=250e-6,
    blocking_step_s=1500e-6,
    sequence_s=1.5e-6,
    mixed_step_s=500e-6,
    request_s=4e-3,
    client_s=0.0,
    client_token_s=0.0,
    captured_sizes=(1, 2, 4, 8, 16),
    gap_s=0.0,
    launch_s=0.0,
    captured_tokens=0,
    fused=(),
    kernels="vllm",
    source="for tests",
)
LAUNCHING = replace(OVERHEAD, gap_s=1e-6, launch_s=20e-6, captured_tokens=64, fused=("rotary", "kv write"))
"""An engine whose batches with prompts wait for their launches, and leaves gaps between kernels."""
EAGER = replace(LAUNCHING, captured_sizes=(), captured_tokens=0)
"""An engine that launches every kernel of every batch."""
ENGINES = (OVERHEAD, LAUNCHING, EAGER)


def make_gpu(**changes: Any) -> Gpu:
    """An accelerator like an H100, with some figures exchanged."""
    figures: dict[str, Any] = {
        "name": "test-gpu",
        "memory_bytes": 80 * GIB,
        "memory_bytes_per_s": 3.35e12,
        "flops_per_s": (("bf16", 989e12), ("fp16", 989e12), ("fp8", 1979e12)),
        "tdp_w": 700.0,
        "clock_mhz": 1980.0,
        "idle_w": 125.0,
        "price_per_h": 2.5,
    }
    return Gpu(**(figures | changes))


def make_cluster(gpus: int, nodes: int = 1, **changes: Any) -> Cluster:
    """Nodes of GPUs over NVLink, with InfiniBand between them."""
    return Cluster(
        name=f"{nodes}x{gpus}",
        gpu=make_gpu(**changes),
        nodes=nodes,
        gpus_per_node=gpus,
        intra=Link(bytes_per_s=450e9, latency_s=1e-6, kind="nvlink"),
        inter=Link(bytes_per_s=50e9, latency_s=5e-6, kind="infiniband"),
    )


def make_model(*runs: tuple[Block, int], vocab: int = 32000, tied: bool = False, **changes: Any) -> Model:
    """A model out of blocks and how often each follows."""
    figures: dict[str, Any] = {
        "name": "test-model",
        "hidden": runs[0][0].hidden,
        "vocab": vocab,
        "tied_embeddings": tied,
        "max_position": 131072,
        "runs": tuple(Run(block=block, count=count) for block, count in runs),
        "dtype": "bf16",
        "weight_format": "bf16",
        "kv_format": None,
        "source": "for tests",
    }
    return Model(**(figures | changes))


def dense(
    hidden: int = 512, heads: int = 8, kv: int = 4, columns: int = 1536, width: int = 64, **attention: Any
) -> Block:
    """A block with a dense FFN."""
    return Block(
        attention=Attention(hidden=hidden, query_heads=heads, kv_heads=kv, head_dim=width, **attention),
        ffn=DenseFfn(hidden=hidden, intermediate=columns),
    )


def sparse(
    hidden: int = 512,
    heads: int = 8,
    kv: int = 4,
    columns: int = 768,
    experts: int = 8,
    chosen: int = 2,
    shared: int = 0,
    width: int = 64,
    **attention: Any,
) -> Block:
    """A block with experts."""
    return Block(
        attention=Attention(hidden=hidden, query_heads=heads, kv_heads=kv, head_dim=width, **attention),
        ffn=MoeFfn(
            hidden=hidden,
            expert_intermediate=columns,
            experts=experts,
            experts_per_token=chosen,
            shared_intermediate=shared,
        ),
    )


def latent(block: Block, **changes: Any) -> Block:
    """A block with latent attention of as many query heads in place of its own."""
    cell = block.attention
    figures: dict[str, Any] = {
        "hidden": cell.hidden,
        "query_heads": cell.query_heads,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "nope_head_dim": 32,
        "rope_head_dim": 16,
        "v_head_dim": 24,
    }
    return replace(block, attention=LatentAttention(**(figures | changes)))


def partly(rng: np.random.Generator, block: Block) -> Block:
    """A block of which the checkpoint leaves some matrices in 16 bit, or none, and holds some in a second format."""

    def chosen(cell: Any) -> Any:
        return replace(cell, **{name: int(rng.choice([0, 1, 1, 2])) for name in cell.forms})

    return Block(attention=chosen(block.attention), ffn=chosen(block.ffn))


def random_model(rng: np.random.Generator) -> Model:
    """Dense, sparse, dense layers before sparse ones, or layers with different attention; tied or not.

    Attention may be latent, windows may alternate, and parts may be left in 16 bit.
    """

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    heads, kv = pick((4, 2), (6, 2), (8, 1), (8, 4), (8, 8), (12, 4), (24, 8))
    shape = {"hidden": pick(256, 512, 1024), "heads": heads, "kv": kv}
    extra = {"qkv_bias": pick(True, False), "output_bias": pick(True, False), "qk_norm": pick(True, False)}
    extra |= {"qk_norm_whole": extra["qk_norm"] and pick(True, False), "sinks": pick(True, False)}
    plain = dense(**shape, **extra, columns=pick(512, 1000, 1536, 4096))
    experts = pick(2, 4, 6, 8)
    mixed = sparse(
        **shape, **extra, columns=pick(256, 384, 1024), experts=experts, chosen=pick(1, 2), shared=pick(0, 0, 512, 768)
    )
    mixed = replace(mixed, ffn=replace(mixed.ffn, bias=pick(True, False), router_bias=pick(True, False)))
    other = dense(**(shape | {"kv": 2}), columns=2048)
    if pick(True, False):
        ranks = {"q_lora_rank": pick(None, 96, 130), "kv_lora_rank": pick(32, 100)}
        plain, mixed = latent(plain, **ranks), latent(mixed, **ranks)
    plain, mixed, other = (partly(rng, block) for block in (plain, mixed, other))
    slid = replace(other, attention=replace(other.attention, window=128))
    few, many = int(rng.integers(1, 5)), int(rng.integers(1, 12))
    kind = pick("dense", "sparse", "dense first", "hybrid", "alternating")
    runs: dict[str, list[tuple[Block, int]]] = {
        "dense": [(plain, many)],
        "sparse": [(mixed, many)],
        "dense first": [(plain, few), (mixed, many)],
        "hybrid": [(plain, few), (other, 1), (plain, many), (mixed, few)],
        "alternating": [(mixed, 1), *[(slid, 1), (other, 1)] * few, (plain, 1)],
    }
    own = np.random.default_rng(int(rng.bit_generator.state["state"]["state"]) % 2**32)
    if own.random() < 0.3:  # layers of the model's first kind, of which some see a window
        base = runs[kind][0][0]
        some = [with_window(base, int(own.choice([40, 128, 1000]))) for _ in range(2)]
        if own.random() < 0.4:
            some[0] = keeping(base, state_bytes=int(own.integers(1, 400_000)), draft_bytes=int(own.integers(0, 9000)))
            if (attention := (None, *linear(own, base.attention.hidden))[own.integers(4)]) is not None:
                some[0] = replace(base, attention=attention)
        elif own.random() < 0.2:
            some[1] = keeping(base, chunk=64)
        order = [[base, some[0], base, some[1]], [some[0], some[0], base], some[:1], some][own.integers(4)]
        runs[kind] = [(block, int(own.integers(1, 4))) for block in order * int(own.integers(1, 3))]
    return make_model(*merged(runs[kind]), vocab=pick(1000, 32000, 128257), tied=pick(True, False))


def with_window(block: Block, window: int | None) -> Block:
    """A block whose attention sees a window, where it is of a kind that can."""
    return replace(block, attention=block.attention.with_window(window))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stateful(Attention):
    """Attention as far as it computes, which keeps a state for each sequence instead, or chunks of its tokens."""

    state_bytes: int = 0
    draft_bytes: int = 0
    chunk: int = 0

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept | State, ...]:
        """What is kept."""
        if self.chunk:
            kept = Attention.cache(self, cut)[0]
            assert isinstance(kept, Kept)
            return (kept._replace(window=self.chunk, chunked=True),)
        return (State(ceil_div(self.state_bytes, cut.heads), ceil_div(self.draft_bytes, cut.heads)),)


def keeping(block: Block, **kept: int) -> Block:
    """A block that keeps what `Stateful` does, where it has grouped-query attention."""
    cell = block.attention
    if not isinstance(cell, Attention):
        return block
    own = {entry.name: getattr(cell, entry.name) for entry in fields(cell)}
    return replace(block, attention=Stateful(**own | kept))


def linear(rng: np.random.Generator, hidden: int) -> tuple[GatedDelta, KimiDelta, Mamba2]:
    """Cells of the hybrid models that are served, each of which keeps a state of every sequence."""
    few, many, wide = (int(rng.choice(values)) for values in ((1, 2, 4, 8), (8, 16), (2, 4)))
    return (
        GatedDelta(hidden=hidden, key_heads=few, value_heads=8, key_dim=32, value_dim=16, kernel=4, state_bytes=wide),
        KimiDelta(hidden=hidden, heads=many, head_dim=32, kernel=4),
        Mamba2(hidden=hidden, heads=many, head_dim=32, groups=few, state=16, kernel=4),
    )


def merged(runs: Sequence[tuple[Block, int]]) -> list[tuple[Block, int]]:
    """Runs with equal neighbours put together."""
    found: list[tuple[Block, int]] = []
    for block, count in runs:
        if found and found[-1][0] == block:
            found[-1] = block, found[-1][1] + count
        else:
            found.append((block, count))
    return found


def random_rules(rng: np.random.Generator) -> EngineRules:
    """An engine with rules of every kind, each of which some plans keep to and some break."""

    def often(share: float = 0.5) -> bool:
        return bool(rng.random() < share)

    def pick(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    # Rules that came later draw on their own, so that the others stay as they were.
    own = np.random.default_rng(int(rng.bit_generator.state["state"]["state"]) % 2**32)

    def seldom(share: float = 0.5) -> bool:
        return bool(own.random() < share)

    ranges = {name: pick((8.0, inf), (7.0, 9.5), (9.5, inf)) if often(0.2) else (0.0, inf) for name in FORMATS}
    for name in [name for name in ranges if often(0.05)]:
        del ranges[name]
    padded = {"mxfp4": ((0.0, 9.5, 96, 40), (9.5, inf, 256, 128)), "fp8": ((8.0, inf, 1, 64),)}
    rules = EngineRules(
        name="test",
        release="Test 1",
        cuda_only=seldom(),
        ffn_copies=often(),
        dense_attention_copies=often(),
        moe_copies=often(),
        one_gpu_copies=often(0.3),
        copied_attention=pick(None, None, frozenset({"odd"}), frozenset()),
        experts_by_both=often(),
        dense_per_copy=often(),
        whole_shared=frozenset({"odd"}) if seldom() else frozenset(),
        formats=ranges,
        attention={"fp8": (9.5, inf)} if often(0.1) else {},
        methods={"gptq": (9.5, inf)} if often(0.2) else {},
        whole_scales=often(0.7),
        least_group=pick(0, 16, 32),
        padded_experts=padded if often() else {},
        vocab_multiple=pick(1, 1, 64),
        vocab_on_every_stage=frozenset({"odd"}) if often() else frozenset(),
        whole_kv_heads=frozenset({"odd"}) if often() else frozenset(),
        tower_shards=often(),
        whole_towers=frozenset({"odd"}) if often(0.3) else frozenset(),
        block_multiples={"latent": 16, "sinks": 16, "fp8": 16} if often(0.3) else {},
        block_powers=often(0.1),
        rotary_table=often(),
        sources={},
    )
    # Without a draw of its own, which would make another problem of every seed.
    odd = rules.whole_kv_heads
    whole = {"whole_models": rules.whole_towers, "whole_when_tied": odd, "whole_experts": odd, "no_half": odd}
    whole |= {"sound_shards": rules.whole_towers, "whole_vocabulary": odd}
    whole |= {"misread_heads": odd if rules.block_powers else frozenset()}
    attention = {**rules.attention, "latent": (9.5, inf)} if rules.block_powers else rules.attention
    room = {"gate_room": rules.rotary_table, "made_on_load": frozenset({"fp8", "w8a8", "mxfp8"})}
    return replace(rules, embedding_on_every_stage=odd, attention=attention, **whole, **room)


def ungated(model: Model) -> Model:
    """The model, whose experts have no gates."""

    def block(one: Block) -> Block:
        return replace(one, ffn=replace(one.ffn, gated=False)) if isinstance(one.ffn, MoeFfn) else one

    return replace(model, runs=tuple(replace(run, block=block(run.block)) for run in model.runs))


def published(rng: np.random.Generator, model: Model, formats: Sequence[str]) -> Model:
    """A model as an engine may know it: its family, its image tower, and how its checkpoint is quantised."""
    blocks = Scheme(method="fp8", block=(128, 64))
    schemes = (None, Scheme(method="gptq", group=128, further=(blocks,)), blocks, Scheme(method="fp8"))
    towers = (None, None, 8, 6)
    return replace(
        model,
        family=str(rng.choice(["", "odd"])),
        tower_heads=(heads := towers[rng.integers(len(towers))]),
        stated_head_dim=(heads or 0) * 24,
        sound_heads=heads or 0,
        weight_format=str(rng.choice(list(formats))),
        scheme=schemes[rng.integers(len(schemes))],
    )


def memory_need(stage: StageMemory, blocks: int) -> int:
    """Bytes a GPU of the stage must offer for so many blocks that sequences can use."""
    return stage.beside_bytes + (blocks + 1) * stage.kv_block_bytes


def instance_at(
    model: Model,
    plan: Plan | None,
    gpus: int,
    *,
    longest: int = 500,
    memory: int | None = None,
    tpot: int | None = None,
    formats: Sequence[tuple[str, str]] = (("bf16", "bf16"),),
    settings: EngineSettings = SMALL,
    flops: Sequence[str] = ("bf16", "fp16", "fp8"),
    cuda: bool = True,
) -> Instance:
    """A problem whose memory and time limits are set on a plan: `memory` and `tpot` bytes above its exact need.

    Half of the memory may be used and a GPU reads a byte a nanosecond, so both limits are exact. Without them there
    is room for everything.
    """
    settings = replace(settings, gpu_memory_utilization=0.5)
    offered = 1 << 45
    assert plan is not None or (memory is None and tpot is None)
    held = Held.of(settings.runnable, model, make_gpu(cuda=cuda))
    if plan is not None and memory is not None:
        stages = stage_memory(model, make_gpu(cuda=cuda), plan, settings)
        blocks = int(settings_of(model, settings, plan).most_blocks(np.array(longest)))
        offered = 2 * (max(memory_need(stage, blocks) for stage in stages) + memory)
    figures: dict[str, Any] = {"memory_bytes": offered, "memory_bytes_per_s": 1e9, "cuda": cuda}
    figures["flops_per_s"] = tuple((f, 1e15) for f in flops)
    return Instance(
        model=model,
        cluster=make_cluster(gpus, **figures),
        settings=settings,
        longest_tokens=longest,
        tpot_limit_ns=None if plan is None or tpot is None else decode_bytes(model, plan, held) + tpot,
        weight_formats=tuple(weights for weights, _ in formats),
        kv_formats=tuple(kv for _, kv in formats),
        max_devices=gpus,
    )


def random_instance(seed: int) -> Instance:
    """A small problem whose memory and time limits cut through the space of plans."""
    rng = np.random.default_rng(seed)
    model, gpus = random_model(rng), int(rng.choice([1, 2, 3, 4, 5, 6, 7, 8, 8, 8]))
    pairs = [(w, k) for w in (*FORMATS, "w4a16+w8a16g32", "w4a16+fp8") for k in KV_BYTES]
    rng.shuffle(pairs)
    formats = [(str(w), str(k)) for w, k in pairs[: rng.integers(1, 4)]]
    flops = [("bf16", "fp16", "fp8", "fp4", "int8"), ("bf16",), ("fp16",), ("bf16", "fp8")][rng.integers(4)]
    settings = replace(
        SMALL,
        max_num_seqs=int(rng.choice([1, 7, 64])),
        max_num_batched_tokens=int(rng.choice([64, 300, 8192])),
        block_size=int(rng.choice([1, 16, 48])),
    )
    kwargs: dict[str, Any] = {"formats": formats, "settings": settings, "flops": flops}
    kwargs["longest"] = int(rng.choice([1, 500, 20_000]))
    other = np.random.default_rng(seed + 3000)
    kwargs["cuda"] = bool(np.random.default_rng(seed + 5000).random() < 0.8)
    if other.random() < 0.6:
        model = published(other, model, [weights for weights, _ in formats])
        kwargs["settings"] = settings = replace(settings, runnable=random_rules(other))
    if model.layers % 2 == 0 and np.random.default_rng(seed + 7000).random() < 0.2:
        model = replace(model, together=2)
    if np.random.default_rng(seed + 9000).random() < 0.3:
        model = ungated(model)
    plans = list(space(instance_at(model, None, gpus, **kwargs)))
    limits: tuple[tuple[int | None, int | None], ...] = ((None, None), (7, 300), (1, None), (None, 9000))
    chosen = tuple(limits[i] for i in rng.permutation(4)[: rng.choice([1, 1, 2])])
    slack = int(rng.choice([-1, 0, 1, 10**6]))
    memory, tpot = (
        (slack if rng.random() < 0.8 else None),
        (int(rng.choice([-1, 0, 1])) if rng.random() < 0.6 else None),
    )
    tight = instance_at(model, plans[rng.integers(len(plans))], gpus, memory=memory, **kwargs)
    timed = instance_at(model, plans[rng.integers(len(plans))], gpus, tpot=tpot, **kwargs)
    offered = max(1, gpus - int(rng.choice([0, 0, 0, 1, 2])))
    return replace(
        tight,
        tpot_limit_ns=timed.tpot_limit_ns,
        max_devices=offered,
        batch_limits=tuple(pair for pair in chosen if _fits(settings, pair)) or ((None, None),),
    )


def _fits(settings: EngineSettings, limits: tuple[int | None, int | None]) -> bool:
    """Whether limits of a batch go together."""
    return (limits[0] or settings.max_num_seqs) <= (limits[1] or settings.max_num_batched_tokens)


def make_problem(
    model: Model, cluster: Cluster | str | Sequence[Cluster], trace: Trace, slo: str = "", **changes: Any
) -> Problem:
    """A problem with small engines on a cluster, or on several with a type of GPU each."""
    some = [cluster] if isinstance(cluster, Cluster | str) else cluster
    clusters = [load_cluster(one) if isinstance(one, str) else one for one in some]
    offered: dict[str, Any] = {"weight_formats": ("bf16",), "kv_formats": ("bf16",)}
    offered |= {name: changes.pop(name) for name in ("weight_formats", "kv_formats", "clocks") if name in changes}
    fields: dict[str, Any] = {
        "objective": load_objective(changes.pop("objective", "e2e_mean")),
        "settings": SMALL,
        "overhead": OVERHEAD,
        "slos": parse_goals(slo) if slo else (),
        "offers": tuple(Offer(cluster=cluster, **offered) for cluster in clusters),
        "max_devices": sum(cluster.size for cluster in clusters),
    }
    return Problem(model=model, trace=trace, **(fields | changes))


def beside(problem: Problem, *clusters: Cluster, **changes: Any) -> Problem:
    """A problem of one type of GPU with further types beside it, offered with the same formats and clocks."""
    offers = (*problem.offers, *(replace(problem.offer, cluster=cluster) for cluster in clusters))
    devices = sum(offer.free for offer in offers)
    return replace(problem, offers=offers, **({"max_devices": devices} | changes))


def on(problem: Problem, cluster: Cluster) -> Problem:
    """The problem on all of other GPUs."""
    return replace(problem.offering(cluster=cluster), max_devices=cluster.size)


def tight(problem: Problem, share: float) -> Problem:
    """The problem with less memory, so that sequences wait for blocks or give way."""
    gpu = problem.cluster.gpu
    gpu = replace(gpu, memory_bytes=int(gpu.memory_bytes * share))
    return problem.offering(cluster=replace(problem.cluster, gpu=gpu))


def simulated(scorer: Scorer, plan: Plan) -> Scored:
    """A plan on the only type of GPU, simulated to its end."""
    return scorer.simulate(Deployment.of(plan))


def bounded(scorer: Scorer, plan: Plan) -> tuple[tuple[float, ...], bool]:
    """What a plan on the only type of GPU cannot cost less than, and whether it can still meet the goals."""
    return scorer.bounds(Deployment.of(plan))


def feasible_plans(problem: Problem) -> list[Plan]:
    """Every plan of the only type of GPU that plain Python finds nothing wrong with."""
    instance = problem.instance()
    plans = (plan for plan in space(instance) if not violations(instance, plan))
    clocks = problem.offer.clocks
    return [plan if clock is None else replace(plan, clock_mhz=clock) for plan in plans for clock in clocks]


def random_trace(seed: int, requests: int = 30, *, closed: bool = False) -> Trace:
    """Requests of a few hundred tokens, arriving in bursts or from a few clients."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(float(rng.choice([1e5, 3e6, 5e7])), requests).astype(np.int64)
    return make_trace(
        name="test",
        arrival_ns=np.cumsum(gaps),
        prompt=rng.integers(1, 700, requests),
        output=rng.integers(1, 40, requests),
        concurrency=int(rng.integers(1, 8)) if closed else None,
    )


def random_problem(seed: int) -> Problem:
    """A small problem; memory is tight for some plans, and goals are out of reach for some or all."""
    rng = np.random.default_rng(seed + 1000)
    model = random_model(rng)
    gpus = int(rng.choice([1, 2, 3, 4, 4]))
    nodes = 2 if gpus == 4 and rng.random() < 0.3 else 1
    pairs = [("bf16", "bf16"), ("fp8", "fp8"), ("w4a16", "bf16")]
    rng.shuffle(pairs)
    kept = pairs[: rng.integers(1, 3)]
    trace = random_trace(seed, 25, closed=rng.random() < 0.3)
    other = np.random.default_rng(seed + 2000)
    names = [str(name) for name in rng.choice(NAMES, size=3, replace=False)]
    own = np.random.default_rng(seed + 4000)
    rules = None
    if own.random() < 0.2:
        model, rules = published(own, model, [weights for weights, _ in kept]), random_rules(own)
    problem = make_problem(
        model,
        make_cluster(gpus // nodes, nodes),
        trace,
        "ttft<=50ms@1%",
        objective=names[0],
        then=tuple(load_objective(name) for name in names[1 : int(other.choice([1, 1, 2, 3]))]),
        routing="least_loaded" if rng.random() < 0.3 else "round_robin",
        settings=replace(SMALL, async_scheduling=bool(rng.random() < 0.7), runnable=rules),
        weight_formats=tuple(str(w) for w, _ in kept),
        kv_formats=tuple(str(k) for _, k in kept),
        overhead=ENGINES[other.integers(len(ENGINES))],
        expert_routing=str(other.choice(["uniform", "skewed"])),
    )
    plans = list(space(problem.instance()))
    if rng.random() < 0.6:
        # Enough memory for one plan, whichever it is, and a handful of blocks to spare.
        plan = plans[rng.integers(len(plans))]
        blocks = problem.instance().blocks_needed(plan) + int(rng.integers(0, 50))
        need = max(memory_need(stage, blocks) for stage in stage_memory(model, make_gpu(), plan, problem.settings))
        cluster = make_cluster(gpus // nodes, nodes, memory_bytes=int(need / 0.9) + 1000)
        problem = problem.offering(cluster=cluster)
    if rng.random() < 0.7:
        feasible = [p for p in plans if not violations(problem.instance(), p)]
        if feasible:
            metrics = simulated(Scorer(problem, gaps=True), feasible[rng.integers(len(feasible))]).metrics
            factor = float(rng.choice([0.02, 0.8, 1.0000001, 1.5]))
            ttft, tpot = metrics.latency_s["ttft"]["p95"] * factor, metrics.latency_s["tpot"]["max"] * factor
            goals = [f"ttft_p95<={ttft:.12f}s", f"tpot_max<={tpot:.12f}s", f"tpot<={tpot:.12f}s@80%"]
            goals = goals[int(rng.integers(3)) :]
            if other.random() < 0.6:
                goals.append(random_goal(other, metrics, factor))
            problem = replace(problem, slos=parse_goals(",".join(goals)))
    return problem


OTHERS: tuple[dict[str, Any], ...] = (
    {"name": "slow", "memory_bytes_per_s": 1.5e12, "flops_per_s": (("bf16", 300e12),), "price_per_h": 1.1},
    {"name": "frugal", "tdp_w": 300.0, "idle_w": 20.0, "memory_bytes_per_s": 2e12, "price_per_h": 0.9},
    {"name": "fast", "memory_bytes_per_s": 8e12, "flops_per_s": (("bf16", 2000e12),), "price_per_h": 6.0},
)


def random_mixed(seed: int) -> Problem:
    """A small problem on one GPU or two of each of two types; pipelines span them in every other one."""
    problem = random_problem(seed)
    memory = problem.cluster.gpu.memory_bytes
    one = make_cluster(1 + seed % 2, memory_bytes=memory)
    gpus = int(np.random.default_rng(seed).choice([1, 2]))
    other = make_cluster(gpus, **{"memory_bytes": memory, **OTHERS[seed % len(OTHERS)]})
    between = make_cluster(1, 2).inter if seed % 4 < 2 else None
    first, second = (one, other) if seed % 2 else (other, one)
    found = beside(on(problem, first), second, between=between)
    return replace(found, max_devices=2) if seed % 5 == 4 else found


def every_deployment(scorer: Scorer) -> list[Deployment]:
    """All that can run: every plan of each type alone, every mix of them that is dealt to, every pipeline over two."""
    problem, pools = scorer.problem, []
    for place, name in enumerate(problem.types):
        alone = problem.alone(place)
        plans = [plan for plan in space(alone.instance()) if not violations(alone.instance(), plan)]
        gpu = name if problem.mixed else None
        clocked = [replace(plan, clock_mhz=clock) for clock in alone.offer.clocks for plan in plans]
        pools.append([Pool(plan=plan, gpu=gpu) for plan in clocked])
    found = [Deployment(pools=(pool,)) for own in pools for pool in own]
    for size in range(2, len(pools) + 1):
        for chosen in combinations(pools, size):
            for some in product(*chosen):
                weights = [scorer.weight(pool, scorer.facts_of(pool)) for pool in some]
                owners = set(dealt(np.array([weights]), len(problem.trace))[0].tolist())
                enough = (problem.trace.concurrency or size) >= size and len(owners) == size
                if enough and sum(pool.plan.devices for pool in some) <= problem.max_devices:
                    found.append(Deployment(pools=some))
    for one, other in combinations(range(len(pools)), 2):
        if (both := joined(problem, one, other)) is not None:
            splits = Splits(scorer.facts(*both.types), PlanSpace())
            cuts = [cut.times(count) for cut, counts in pipelines(both) for count in counts]
            found += [Deployment.of(plan) for plan in map(splits, cuts) if plan is not None]
    return found


def double_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every time of every plan, what its ranks share and requests outside the engine included, be twice as long."""
    plan_cost, request_ns = CostModel.plan_cost, CostModel.request_ns.fget

    def slower(self: CostModel, plan: Plan) -> PlanCost:
        cost = plan_cost(self, plan)
        return replace(
            cost,
            laws=tuple(law.scaled(2) for law in cost.laws),
            request_ns=2 * cost.request_ns,
            ranks=None if cost.ranks is None else cost.ranks.scaled(2),
        )

    monkeypatch.setattr(CostModel, "plan_cost", slower)
    monkeypatch.setattr(CostModel, "request_ns", property(lambda self: 2 * request_ns(self)))


def random_goal(rng: np.random.Generator, metrics: Metrics, factor: float) -> str:
    """A goal on a figure of a run, or on times between tokens, so many times off what the run reaches."""
    itl = metrics.latency_s["itl"]["p90"] * factor
    units = {"s": "s", "J": "J", "J/token": "J", "requests/s": "", "$/h": "$/h", "$/Mtoken": "$"}
    values = {name: metrics.value(name) for name in FIGURES}
    signs = {name: ">=" if name in AT_LEAST else "<=" for name in FIGURES}
    limits = {name: max(value / factor if name in AT_LEAST else value * factor, 1e-9) for name, value in values.items()}
    goals = [f"{name}{signs[name]}{limits[name]:.12f}{units[unit]}" for name, unit in FIGURES.items()]
    return str(rng.choice([*goals, f"itl_p90<={itl:.12f}s", f"itl<={itl:.12f}s@90%"]))


@dataclass(frozen=True)
class Short:
    """A formulation that lists only the first plans."""

    plans: tuple[Plan, ...] = ()
    movable: tuple[Plan, ...] = ()
    complete: bool = False

    def count(self, instance: Instance, families: Sequence[str]) -> int:
        return PlanSpace().count(instance, families)

    def enumerate(self, instance: Instance, families: Sequence[str] = FAMILIES) -> Short:
        return Short(plans=PlanSpace().enumerate(instance, families).plans[:3])

    def moved(self, instance: Instance, plan: Plan) -> Plan | None:
        return PlanSpace().moved(instance, plan)
