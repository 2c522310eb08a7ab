"""The law of a plan: sane against the datasheet, complete, and the exact sum of its operations."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest
from plan_cases import (
    OVERHEAD,
    SMALL,
    SharingScheduling,
    dense,
    instance_at,
    make_cluster,
    make_model,
    random_model,
    sparse,
)

from apex_opt.cluster import load_cluster
from apex_opt.cost import CostModel
from apex_opt.cost.engine import load_engine
from apex_opt.errors import CapacityError
from apex_opt.ir import FORMATS, MoeFfn, load_model
from apex_opt.oracle.checks import decode_bytes, violations
from apex_opt.oracle.space import space
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.memory import attention_shard_bytes, ffn_cut, ffn_token_bytes
from apex_opt.plans.plan import parse_plan
from apex_opt.profiles.power import SHORT_DRAW
from apex_opt.search.bounds import StageFloor
from apex_opt.simulator.law import RATE_BITS, TABLES

if TYPE_CHECKING:
    from apex_opt.cluster.types import Cluster
    from apex_opt.cost import PlanCost

# Attention copies share a scheduler here; those with one each are in test_cost_ranks.py.
SETTINGS = EngineSettings(max_num_seqs=256, max_num_batched_tokens=2048, scheduler=SharingScheduling())
PLANS = {
    "llama-3.1-70b": (
        "tp8",
        "dp2 tp4",
        "pp2 tp4",
        "pp4 attn(tp2) ffn(tp2)",
        "attn(dp2,tp4) ffn(tp8)",
        "attn(dp8) ffn(tp8)",
        "attn(dp4,tp2) ffn(dp2,tp4)",
        "attn(tp8) ffn(dp2,tp4)",
    ),
    "mixtral-8x22b": ("tp8", "ep8", "attn(dp8) ffn(ep8)", "attn(dp4,tp2) ffn(tp2,ep4)", "pp2 attn(dp2,tp2) ffn(ep4)"),
    "qwen3-235b-a22b": ("tp8", "ep8", "attn(dp8) ffn(ep8)", "attn(dp2,tp4) ffn(dp2,ep4)"),
}
CASES = [(model, plan) for model, plans in PLANS.items() for plan in plans]


@cache
def costs(model: str, cluster: str = "8xh100-sxm") -> CostModel:
    return CostModel(load_model(model), load_cluster(cluster), SETTINGS, load_engine("vllm"))


def cost_of(model: str, plan: str, cluster: str = "8xh100-sxm") -> PlanCost:
    return costs(model, cluster).plan_cost(parse_plan(plan, load_model(model)))


def decode_s(model: str, plan: str, sequences: int, cluster: str = "8xh100-sxm") -> float:
    """Seconds of a decode batch with no context, through all stages."""
    return sum(int(law.decode_ns[sequences]) for law in cost_of(model, plan, cluster).laws) / 1e9


@pytest.mark.parametrize(("model", "plan"), CASES)
def test_every_table_of_a_law_is_whole_not_negative_and_nothing_for_nothing(model: str, plan: str) -> None:
    cost = cost_of(model, plan)
    assert len(cost.laws) == len(cost.parts) == parse_plan(plan, load_model(model)).stages
    for law in cost.laws:
        for name in TABLES[:9]:
            table = getattr(law, name)
            by_sequences = name in ("decode_ns", "sequence_ns", "attend_ns", "context_rate")
            assert table.dtype == np.int64
            assert len(table) == (257 if by_sequences else 2049)
            assert (table >= 0).all()
            assert (table < 1 << 55).all()
        for name in ("mixed_ns", "sequence_ns", "chunk_ns"):
            assert getattr(law, name)[0] == 0
        assert (law.decode_ns[1:] > 0).all()
        assert (law.context_rate[1:] > 0).all()
        assert (law.pair_rate[1:] > 0).all()
        assert law.copies == parse_plan(plan, load_model(model)).attention.dp


@pytest.mark.parametrize(("model", "plan"), CASES)
def test_tables_are_the_sums_of_the_operations_and_every_operation_takes_time_and_energy_within_the_limit(
    model: str, plan: str
) -> None:
    cost, power = cost_of(model, plan), costs(model).of(parse_plan(plan, load_model(model))).profile.power
    for law, parts in zip(cost.laws, cost.parts, strict=True):
        sums = {name: np.zeros(len(getattr(law, name))) for name in TABLES[:9]}
        for (operation, table), work in parts.items():
            sums[table] += work.seconds
            for values in (work.seconds, work.flops, work.moved, work.joules):
                assert values.shape == sums[table].shape
                assert np.isfinite(values).all(), (operation, table)
                assert (values >= 0).all(), (operation, table)
            assert (work.joules <= power.limit_w * work.seconds * 1.001 + 1e-15).all(), (operation, table)
        for name, seconds in sums.items():
            if name == "transfer_ns":
                continue
            scale = 1e9 * (1 << RATE_BITS if name.endswith("_rate") else 1)
            assert np.array_equal(getattr(law, name), np.rint(seconds * scale).astype(np.int64)), name


def test_every_operation_of_a_dense_model_is_there_and_collectives_only_where_there_are_groups() -> None:
    names = {"norm", "qkv", "rotary", "kv write", "decode attention", "prefill attention", "output"}
    names |= {"ffn up", "activation", "ffn down", "embedding", "lm head", "sampler", "engine"}
    found = {plan: {op for op, _ in cost_of("llama-3.1-70b", plan).parts[0]} for plan in ("tp1", "tp2", "tp8")}
    assert found["tp1"] == names
    assert found["tp8"] == found["tp2"] == names | {"communication"}
    alone = {op for op, _ in cost_of("llama-3.1-70b", "attn(dp8) ffn(dp8)").parts[0]}
    assert alone == names
    first, middle, last = ({op for op, _ in parts} for parts in cost_of("llama-3.1-70b", "pp3[30,25,25] tp2").parts)
    blocks = names - {"embedding", "lm head", "sampler"} | {"communication"}
    assert first == blocks | {"embedding"}
    assert middle == blocks
    assert last == blocks | {"lm head", "sampler"}


def test_a_model_with_experts_has_a_router_experts_and_a_shared_ffn() -> None:
    names = {op for op, _ in cost_of("mixtral-8x22b", "tp8").parts[0]}
    assert {"router", "experts"} <= names
    assert not {"ffn up", "ffn down", "activation"} & names
    model = make_model((dense(), 1), (sparse(shared=768), 2))
    mixed = CostModel(model, make_cluster(1), SETTINGS, OVERHEAD).plan_cost(parse_plan("tp1", model))
    assert {"router", "experts", "ffn up", "ffn down", "activation"} <= {op for op, _ in mixed.parts[0]}


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_decoding_8b_on_an_h200_never_beats_reading_its_weights_and_comes_within_twice_of_it(n: int) -> None:
    model = load_model("llama-3.1-8b")
    least = decode_bytes(model, parse_plan("tp1", model)) / 4.8e12
    took = decode_s("llama-3.1-8b", "tp1", n, "1xh200-sxm")
    assert least < took < 2 * least + 50e-6 * n


def test_context_costs_what_reading_its_keys_and_values_costs() -> None:
    law = cost_of("llama-3.1-8b", "tp1", "1xh200-sxm").laws[0]
    per_token = law.context_rate / 2**RATE_BITS / 1e9
    least = 32 * 2 * 8 * 128 * 2 / 4.8e12
    assert (per_token[1:] >= least).all()
    assert (per_token[32:] <= 1.3 * least).all()
    # Measured kernels read a cache of half the bytes in more than half the time.
    narrow = cost_of("llama-3.1-8b", "tp1 bf16 kv=fp8", "1xh200-sxm").laws[0].context_rate
    assert (narrow[1:] / 2**RATE_BITS / 1e9 >= least / 2).all()
    assert (narrow[1:] <= 0.8 * law.context_rate[1:]).all()
    shared = cost_of("llama-3.1-70b", "attn(dp8) ffn(tp8)").laws[0].context_rate
    whole = cost_of("llama-3.1-70b", "tp1").laws[0].context_rate
    assert shared[256] == pytest.approx(whole[32] / 8, rel=0.01)


def test_prompts_cost_at_least_their_arithmetic() -> None:
    model = load_model("llama-3.1-8b")
    law = cost_of("llama-3.1-8b", "tp1", "1xh200-sxm").laws[0]
    matrices = sum(run.count * run.block.matrix_parameters for run in model.runs)
    for tokens in (512, 1024, 2048):
        pairs = tokens * (tokens + 1) // 2
        least = (2 * matrices * tokens + 32 * 4 * 4096 * pairs) / 989e12
        took = law.batch_ns([(tokens, tokens)]) / 1e9
        assert least < took < 3 * least


@pytest.mark.parametrize("cluster", ["8xh100-sxm", "8xh200-sxm", "8xa100-sxm", "8xb200-sxm"])
def test_more_gpus_make_a_single_sequence_faster(cluster: str) -> None:
    times = [decode_s("llama-3.1-70b", f"tp{tp}", 1, cluster) for tp in (1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    # But never in proportion: the collectives are paid.
    assert times[-1] > times[0] / 8


@pytest.mark.parametrize(("model", "plan"), CASES)
def test_more_work_is_never_much_cheaper(model: str, plan: str) -> None:
    for law in cost_of(model, plan).laws:
        for name in ("decode_ns", "sequence_ns", "attend_ns", "transfer_ns"):
            table = getattr(law, name)[1:]
            assert (table >= 0.75 * np.maximum.accumulate(table)).all(), name
        # One prompt; one for every copy; one beside sequences that decode.
        for prompts, decoding in ((1, 0), (law.copies, 0), (1, 64)):
            beside = [(1, 300)] * decoding
            lengths = range(2, (2048 - decoding) // prompts + 1)
            took = np.array([law.batch_ns([(n, n)] * prompts + beside) for n in lengths])
            assert (took >= 0.75 * np.maximum.accumulate(took)).all(), (prompts, decoding)


@pytest.mark.parametrize(
    ("model", "plan"), [("llama-3.1-8b", "tp1"), ("llama-3.1-70b", "tp4"), ("llama-3.1-70b", "tp8")]
)
def test_smaller_numbers_are_faster_on_an_h100(model: str, plan: str) -> None:
    wide, narrow, stored = (cost_of(model, f"{plan} {name}").laws[0] for name in ("bf16", "fp8", "w4a16"))
    for n in (1, 16, 64, 256):
        assert narrow.decode_ns[n] < wide.decode_ns[n]
    for tokens in (512, 2048):
        assert narrow.mixed_ns[tokens] < wide.mixed_ns[tokens]
    assert stored.decode_ns[1] < narrow.decode_ns[1] * 1.05
    assert stored.mixed_ns[2048] == pytest.approx(wide.mixed_ns[2048], rel=0.1)  # arithmetic stays in 16 bit


@pytest.mark.parametrize(
    ("model", "whole", "split"),
    [("llama-3.1-70b", "tp4", "pp2 tp4"), ("mixtral-8x22b", "ep4", "pp4[10,16,20,10] ep4")],
)
def test_stages_add_up_to_one_stage_with_embedding_and_head_once(model: str, whole: str, split: str) -> None:
    # Gaps between kernels are those of the layers; the wait for launches would not add up.
    engine = replace(load_engine("vllm"), launch_s=0.0)
    shape = load_model(model)
    found = CostModel(shape, load_cluster("2x8xh100-sxm"), SETTINGS, engine)
    one = found.plan_cost(parse_plan(whole, shape)).laws[0]
    stages = found.plan_cost(parse_plan(split, shape)).laws
    step_ns = round(engine.step_s * 1e9)
    mixed_ns = step_ns + round(engine.mixed_step_s * 1e9)
    again = {"decode_ns": step_ns, "mixed_ns": mixed_ns}  # every stage has the engine's own time
    sequence_ns = engine.sequence_s * 1e9
    for name in TABLES[:9]:
        if name == "transfer_ns":
            continue
        total = sum(getattr(law, name) for law in stages)
        table = getattr(one, name)
        per_stage = np.full(len(table), again.get(name, 0), np.float64)
        if name in ("decode_ns", "sequence_ns"):
            per_stage += sequence_ns * np.arange(len(table))
        rest = (len(stages) - 1) * per_stage
        assert np.abs(total - table - rest)[1:].max() <= len(stages), name
    assert (stages[-1].transfer_ns == 0).all()
    for law in stages[:-1]:
        assert (law.transfer_ns[1:] > 0).all()


@pytest.mark.parametrize(
    ("name", "cluster", "formats"),
    [
        ("llama-3.1-70b", "8xh200-sxm", ("bf16", "w4a16")),
        ("llama-3.1-70b", "8xa100-sxm", ("bf16",)),
        ("mixtral-8x22b", "8xh100-sxm", ("bf16",)),
        ("mixtral-8x7b", "8xa100-sxm", ("bf16",)),
        ("qwen3-30b-a3b", "8xh100-sxm", ("bf16",)),
        ("qwen3-235b-a22b", "8xh200-sxm", ("bf16", "w4a16")),
        ("deepseek-r1", "8xh200-sxm", ("fp8", "w4a16g32")),
        ("deepseek-r1", "8xb200-sxm", ("nvfp4",)),
        ("gpt-oss-120b", "8xh200-sxm", ("mxfp4",)),
        ("gpt-oss-120b", "8xb200-sxm", ("mxfp4", "nvfp4")),
        ("minimax-m2.5", "8xb300-sxm", ("fp8", "nvfp4")),
        ("kimi-k2.5", "8xh200-sxm", ("w4a16g32",)),
    ],
)
def test_no_plan_decodes_faster_than_the_bandwidth_family_says_it_can(
    name: str, cluster: str, formats: tuple[str, ...]
) -> None:
    model, found = load_model(name), load_cluster(cluster)
    settings = EngineSettings(max_num_seqs=32, max_num_batched_tokens=256)
    for weights in formats:
        instance = replace(instance_at(model, None, 8, settings=settings, formats=((weights, "bf16"),)), cluster=found)
        engine = replace(
            OVERHEAD, step_s=0.0, sequence_s=0.0, mixed_step_s=0.0, fused=("rotary", "kv write", "norm", "activation")
        )
        model_costs = CostModel(model, found, settings, engine)
        checked = 0
        for plan in space(instance):
            families = {v.family for v in violations(instance, plan)}
            if plan.replicas == 1 and not families - {"memory"}:
                cost = model_costs.plan_cost(plan)
                floor = sum(floor.batch_ns for floor in StageFloor.of_pool(cost.laws, cost.ranks))
                assert floor >= decode_bytes(model, plan) / found.gpu.memory_bytes_per_s * 1e9, plan
                checked += 1
        assert checked > 20


@pytest.mark.parametrize("seed", [0, *range(2, 13)])
def test_no_random_model_decodes_faster_than_a_slow_memory_reads_what_a_token_needs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = random_model(rng)
    peaks = tuple((dtype, 1e15) for dtype in ("bf16", "fp16", "fp8", "fp4"))
    cluster = make_cluster(4, memory_bytes_per_s=1e10, flops_per_s=peaks)
    formats = [(str(name), "fp8") for name in rng.permutation(list(FORMATS))[:3]]
    settings = EngineSettings(max_num_seqs=8, max_num_batched_tokens=64)
    instance = replace(instance_at(model, None, 4, settings=settings, formats=formats), cluster=cluster)
    engine = replace(OVERHEAD, step_s=0.0, sequence_s=0.0, mixed_step_s=0.0, fused=("rotary", "kv write", "qk norm"))
    found = CostModel(model, cluster, settings, engine, ("uniform", "skewed")[seed % 2])
    checked = 0
    for plan in space(instance):
        if plan.replicas == 1 and not {v.family for v in violations(instance, plan)} - {"memory"}:
            cost = found.plan_cost(plan)
            floor = sum(floor.batch_ns for floor in StageFloor.of_pool(cost.laws, cost.ranks))
            assert floor >= decode_bytes(model, plan) / 1e10 * 1e9, plan
            checked += 1
    assert checked > 5


def test_blocks_that_differ_only_in_what_is_chosen_are_not_mixed_up() -> None:
    few, many = sparse(hidden=1024, experts=16, chosen=1), sparse(hidden=1024, experts=16, chosen=8)
    cluster = make_cluster(4)

    def communication(*blocks: tuple[object, int]) -> np.ndarray:
        model = make_model(*blocks)  # type: ignore[arg-type]
        parts = CostModel(model, cluster, SETTINGS, OVERHEAD).plan_cost(parse_plan("attn(dp4) ffn(ep4)", model)).parts
        return parts[0]["communication", "decode_ns"].seconds

    both = communication((few, 1), (many, 1))
    assert np.allclose(both, communication((few, 1)) + communication((many, 1)))
    assert communication((many, 1))[256] > communication((few, 1))[256]


def test_groups_that_cross_nodes_take_longer_to_communicate() -> None:
    near = cost_of("llama-3.1-70b", "tp8", "2x8xh100-sxm").parts[0]["communication", "mixed_ns"].seconds
    far = cost_of("llama-3.1-70b", "tp16", "2x8xh100-sxm").parts[0]["communication", "mixed_ns"].seconds
    assert (far[1:] > 1.2 * near[1:]).all()
    gather = cost_of("llama-3.1-70b", "attn(dp2,tp8) ffn(tp16)", "2x8xh100-sxm").parts[0]
    assert gather["communication", "mixed_ns"].seconds[2048] > near[2048]


def test_a_pipeline_within_a_node_hands_on_over_its_links() -> None:
    inside = cost_of("llama-3.1-70b", "pp3 tp2").laws[0].transfer_ns[2048]
    across = cost_of("llama-3.1-70b", "pp2 tp8", "2x8xh100-sxm").laws[0].transfer_ns[2048]
    bytes_each = 2048 * 4 * 8192 / 2
    assert bytes_each / 450e9 * 1e9 < inside < 2 * bytes_each / 450e9 * 1e9 + 5_000
    assert across > 2048 * 4 * 8192 / 8 / 50e9 * 1e9


def test_plans_that_share_a_stage_share_its_law_and_old_ones_are_given_up() -> None:
    model = load_model("llama-3.1-8b")
    found = CostModel(model, load_cluster("8xh100-sxm"), SETTINGS, OVERHEAD)
    one = found.plan_cost(parse_plan("tp2", model))
    assert found.plan_cost(parse_plan("dp4 tp2", model)).laws[0] is one.laws[0]
    four = found.plan_cost(parse_plan("pp4 tp1", model)).laws
    assert four[1] is four[2]
    for first in range(1, 31):
        found.plan_cost(parse_plan(f"pp3[{first},1,{31 - first}] tp1", model))
    again = found.plan_cost(parse_plan("tp2", model))
    assert np.array_equal(again.laws[0].decode_ns, one.laws[0].decode_ns)


def test_sources_are_told_for_every_kind_of_figure() -> None:
    model = load_model("mixtral-8x22b")
    found = CostModel(model, load_cluster("2x8xh100-sxm"), SETTINGS, load_engine("vllm"))
    assert set(found.provenance) == {"power", "engine (vllm)"}
    found.plan_cost(parse_plan("tp1", model))
    alone = {"gemm bf16", "moe bf16", "memory", "attention decode", "attention prefill", "power", "engine (vllm)"}
    assert set(found.provenance) == alone
    found.plan_cost(parse_plan("pp2 tp8 fp8", model))
    near = {"all_reduce/intra", "all_gather/intra", "point_to_point/inter"}
    assert set(found.provenance) == alone | near | {"gemm fp8", "moe fp8"}
    found.plan_cost(parse_plan("pp3 attn(dp2) ffn(ep2)", model))
    assert set(found.provenance) == alone | near | {"gemm fp8", "moe fp8", "all_to_all/intra", "point_to_point/intra"}
    found.plan_cost(parse_plan("tp16", model))
    assert {"all_reduce/inter", "all_gather/inter"} <= set(found.provenance)
    assert all(
        text.startswith(("measured", "derived", "published", "assumed", "fitted")) for text in found.provenance.values()
    )


HUGE = {
    "deepseek-r1": ("fp8", ("tp8", "ep8", "attn(dp8) ffn(ep8)")),
    "gpt-oss-120b": ("mxfp4", ("tp1", "tp4", "attn(dp4) ffn(ep4)")),
    "minimax-m2.5": ("fp8", ("tp4", "attn(dp8) ffn(ep8)")),
    "kimi-k2": ("fp8", ("tp8", "attn(dp8) ffn(ep8)")),
}


def read_bytes(name: str, plan: str, weights: str, sequences: int) -> float:
    """Bytes of weights that a GPU reads at least to decode so many sequences: of the experts those that are touched."""
    model = load_model(name)
    cut = parse_plan(f"{plan} {weights}", model)
    total = 2.0 * model.vocab * model.hidden / cut.attention.tp
    for run in model.runs:
        total += run.count * attention_shard_bytes(run.block.attention, cut.attention.tp, weights)
        cell = run.block.ffn
        cut_ffn = ffn_cut(cell, cut.attention, cut.ffn, weights)
        share = 1.0
        if isinstance(cell, MoeFfn):
            share = 1 - (1 - cell.experts_per_token / cell.experts) ** sequences
            cell = replace(cell, experts_per_token=cell.experts, shared_intermediate=0)
        total += run.count * ffn_token_bytes(cell, cut_ffn, weights) * share
    return total


@pytest.mark.parametrize("cluster", ["8xh200-sxm", "8xb200-sxm"])
@pytest.mark.parametrize("name", HUGE)
@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_the_largest_models_decode_within_reach_of_reading_their_weights(name: str, cluster: str, engine: str) -> None:
    weights, plans = HUGE[name]
    model, found = load_model(name), load_cluster(cluster)
    costed = CostModel(model, found, SETTINGS, load_engine(engine))
    for plan in plans:
        laws = costed.plan_cost(parse_plan(f"{plan} {weights}", model)).laws
        for sequences in (1, 256):
            least = read_bytes(name, plan, weights, sequences) / found.gpu.memory_bytes_per_s
            took = sum(int(law.decode_ns[sequences]) for law in laws) / 1e9
            # Of few bytes most of the time is that of starting kernels.
            assert least < took < 10 * least + (100e-6 * model.layers if sequences == 1 else 0.0), (plan, sequences)


def test_a_narrower_format_of_the_same_model_decodes_faster_on_blackwell() -> None:
    model, found = load_model("deepseek-r1"), load_cluster("8xb200-sxm")
    for engine in ("vllm", "sglang", "trtllm"):
        costed = CostModel(model, found, SETTINGS, load_engine(engine))
        wide, narrow = (costed.plan_cost(parse_plan(f"tp8 {name} kv=fp8", model)).laws[0] for name in ("fp8", "nvfp4"))
        for sequences in (1, 16, 64, 256):
            assert narrow.decode_ns[sequences] < wide.decode_ns[sequences], (engine, sequences)


def test_energy_of_narrow_arithmetic_is_that_of_its_own_type_and_within_what_a_kernel_draws() -> None:
    model, found = load_model("deepseek-r1"), load_cluster("8xb200-sxm")
    costed = CostModel(model, found, SETTINGS, load_engine("trtllm"))
    power = costed.of(parse_plan("ep8", model)).profile.power
    most_w = SHORT_DRAW * power.limit_w - power.idle_w
    for weights, dtype in (("fp8", "fp8"), ("nvfp4", "fp4")):
        parts = costed.plan_cost(parse_plan(f"ep8 {weights} kv=fp8", model)).parts[0]
        for key, work in parts.items():
            assert (work.joules >= 0).all(), key
            assert (work.joules <= most_w * work.seconds * 1.001 + 1e-12).all(), key
        work = parts["experts", "mixed_ns"]
        free = (
            power.active_w * work.seconds + power.joule_per_flop[dtype] * work.flops + power.joule_per_byte * work.moved
        )
        assert np.allclose(work.joules, np.minimum(free, most_w * work.seconds), rtol=1e-6)


def test_time_outside_the_engine_is_passed_on() -> None:
    model = make_model((dense(), 2))
    found = CostModel(model, make_cluster(1), SETTINGS, replace(OVERHEAD, request_s=0.0123))
    assert found.plan_cost(parse_plan("tp1", model)).request_ns == 12_300_000


# ---- stages on several types of GPU -----------------------------------------------------------------------------


def across(first: Cluster, *others: Cluster) -> CostModel:
    """Costs of plans whose stages may be on the GPUs of several clusters."""
    model, between = make_model((dense(), 8)), make_cluster(1, 2).inter
    return CostModel(model, first, SMALL, OVERHEAD, beside=[(other, None) for other in others], between=between)


def test_stages_on_two_types_that_are_alike_cost_what_they_do_on_two_nodes_of_one() -> None:
    joint = across(make_cluster(4), make_cluster(4, name="twin"))
    plain = CostModel(joint.model, make_cluster(4, 2), SMALL, OVERHEAD)
    text = "pp2 attn(tp4) ffn(tp4) bf16"
    apart, together = (parse_plan(text + where, joint.model) for where in (" on=test-gpu:1+twin:1", ""))
    for one, other in zip(joint.plan_cost(apart).laws, plain.plan_cost(together).laws, strict=True):
        for name in TABLES[:9]:
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
    mine, its = joint.least(apart), plain.least(together)
    assert mine == its
    assert np.array_equal(mine.decode_by, its.decode_by) and np.array_equal(mine.mixed_by, its.mixed_by)
    assert [(stages.cluster.gpu.name, gpus) for stages, gpus in joint.on(apart)] == [("test-gpu", 4), ("twin", 4)]


def test_every_stage_takes_the_time_of_its_own_gpu_at_the_clock_and_within_the_limits_of_the_plan() -> None:
    fast, slow = make_cluster(4), make_cluster(4, name="slow", memory_bytes_per_s=1.2e12, clock_mhz=1980.0)
    joint = across(fast, slow)
    text = "pp2 attn(tp4) ffn(tp4) bf16"
    for more in ("", " seqs=8 tokens=128", " clock=1200"):
        apart, alone = (parse_plan(text + more + where, joint.model) for where in (" on=test-gpu:1+slow:1", ""))
        first, last = joint.plan_cost(apart).laws
        models = [CostModel(joint.model, replace(type_, nodes=2), SMALL, OVERHEAD) for type_ in (fast, slow)]
        laws = [model.plan_cost(alone).laws for model in models]
        assert np.array_equal(first.decode_ns, laws[0][0].decode_ns)
        assert np.array_equal(last.decode_ns, laws[1][1].decode_ns)
        assert (laws[0][1].decode_ns[1:] < last.decode_ns[1:]).all()
        # At least what either type takes: no more than the faster takes for all.
        assert joint.least(apart).decode <= min(model.least(alone).decode for model in models)


def test_figures_of_several_types_are_told_by_type_and_layouts_of_each_on_its_own_gpus() -> None:
    joint = across(make_cluster(4), make_cluster(2, name="twin"))
    plan = parse_plan("pp3[4,2,2] attn(tp2) ffn(tp2) bf16 on=test-gpu:2+twin:1", joint.model)
    joint.plan_cost(plan)
    assert set(joint.provenance_by_gpu) == {"test-gpu", "twin"}
    assert {name.rpartition(", ")[2] for name in joint.provenance} == {"test-gpu", "twin"}
    assert [layout.stage_devices for layout in joint.layouts_of(plan)] == [2, 2]
    with pytest.raises(CapacityError, match="takes 4 GPUs, 2 of"):
        joint.layouts_of(parse_plan("pp3[4,2,2] attn(tp2) ffn(tp2) bf16 on=test-gpu:1+twin:2", joint.model))


def test_what_layers_take_at_least_is_kept_for_stages_that_lie_alike_and_is_what_it_is_for_each_alone() -> None:
    """Also where stages are in nodes of their own, and where layers of several kinds alternate."""
    name, cluster = "qwen3-next-80b-a3b", "4x8xh100-sxm"
    kept = costs(name, cluster)
    for text in ("attn(tp8) ffn(tp8)", "attn(dp4,tp2) ffn(ep8)", "attn(tp16) ffn(tp16)"):
        least = []
        for stages in (1, 2):
            plan = parse_plan(f"pp{stages} {text} bf16" if stages > 1 else f"{text} bf16", kept.model)
            least.append(kept.least(plan))
            assert least[-1] == costs(name, cluster).least(plan)
        assert least[1].decode_share >= least[0].decode_share * (1 - 1e-12)
        assert least[1].pair == least[0].pair
