"""What every device computes, and that collectives turn the layout of each cell into that of the next.

The collectives of a plan are carried out on a small picture of the devices: which tokens each holds, and the partial
sums of which devices went into them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from plan_cases import dense, make_cluster, sparse
from plan_cases import latent as latent_block

from apex_opt.cluster import load_cluster
from apex_opt.cost.cells import Operations
from apex_opt.cost.engine import load_engine
from apex_opt.cost.stage import StageCosts
from apex_opt.cost.tables import Parts, Tables
from apex_opt.cost.work import Work
from apex_opt.engines.rules import Held
from apex_opt.ir import LatentAttention, MoeFfn, Skipped, get_format, load_model
from apex_opt.ir.cells import Mamba2
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.layout import Layout, Tier
from apex_opt.plans.plan import Template
from apex_opt.profiles import load_collectives, load_profile
from apex_opt.profiles.physics import experts_work

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from apex_opt.cost.tables import Place
    from apex_opt.ir import Block
    from apex_opt.profiles import Profile

TOKENS = 840  # divisible by every degree up to 8
CLUSTER = make_cluster(8)
DENSE, SPARSE = dense(heads=24, kv=24, columns=1680), sparse(heads=24, kv=24, columns=1680, experts=840, chosen=6)


def tables() -> Tables:
    counts = np.arange(TOKENS + 1, dtype=np.int64)
    return Tables(tokens=counts, sequences=counts, padded=counts)


@cache
def operations() -> Operations:
    return Operations(tables(), load_profile(CLUSTER.gpu), load_collectives(CLUSTER))


def layout(devices: int, nodes: int = 1) -> Layout:
    """A stage in equal parts on so many nodes."""
    intra, inter = CLUSTER.intra, load_cluster("2x8xh100-sxm").inter
    assert inter is not None
    tiers = [Tier("node", devices // nodes, intra, False)] * (devices > nodes)
    tiers += [Tier("cluster", devices, inter, True)] * (nodes > 1)
    return Layout(stage_devices=devices, tiers=tuple(tiers))


def templates(devices: int, *, experts: bool) -> list[Template]:
    degrees = [n for n in range(1, devices + 1) if devices % n == 0]
    return [
        Template(dp=dp, tp=tp, ep=devices // (dp * tp))
        for dp, tp in itertools.product(degrees, degrees)
        if devices % (dp * tp) == 0 and (experts or dp * tp == devices)
    ]


def pairs(*, experts: bool) -> list[tuple[Template, Template]]:
    """Every way to cut attention and FFN over up to 8 devices."""
    return [
        (attention, ffn)
        for devices in range(1, 9)
        for attention in templates(devices, experts=False)
        for ffn in templates(devices, experts=experts)
    ]


# ---- arithmetic -------------------------------------------------------------------------------------------------


def flops(parts: Parts, names: Iterable[str], devices: int, copies: int, *, prompt: bool) -> float:
    """Arithmetic of all devices for TOKENS decoding sequences, or for a prompt of so many tokens."""
    total = 0.0
    for (operation, table), work in parts.items():
        if operation in names:
            if (not prompt and table == "decode_ns") or (prompt and table == "mixed_ns"):
                total += devices * float(work.flops[TOKENS])
            elif prompt and table == "chunk_ns":
                total += devices // copies * float(work.flops[TOKENS])
    return total


@pytest.mark.parametrize("prompt", [False, True])
def test_all_devices_together_do_the_arithmetic_of_the_model_however_it_is_cut(prompt: bool) -> None:
    cell, ffn, moe = DENSE.attention, DENSE.ffn, SPARSE.ffn
    for attention, cut in pairs(experts=True):
        parts = operations().attention(cell, attention, "bf16", "bf16")
        whole = 2 * TOKENS * cell.parameters
        if cell.query_heads % attention.tp == 0:
            done = flops(parts, ("qkv", "output"), attention.devices, attention.dp, prompt=prompt)
            assert done == pytest.approx(whole), attention
        if cut.ep == 1:
            parts = operations().ffn(ffn, attention, cut, "bf16")
            whole = 2 * TOKENS * ffn.parameters
            assert flops(parts, ("ffn up", "ffn down"), cut.devices, attention.dp, prompt=prompt) == pytest.approx(
                whole
            )
        parts = operations().ffn(moe, attention, cut, "bf16")
        whole = 2 * TOKENS * moe.experts_per_token * 3 * moe.hidden * moe.expert_intermediate
        assert flops(parts, ("experts",), cut.devices, attention.dp, prompt=prompt) == pytest.approx(whole)


def test_prompts_and_sequences_that_decode_beside_them_do_all_their_arithmetic() -> None:
    whole = 2 * TOKENS * DENSE.attention.parameters
    for attention in (Template(dp=2, tp=2), Template(dp=4), Template(tp=4)):
        parts = operations().attention(DENSE.attention, attention, "bf16", "bf16")
        chunk, beside, either = (
            sum(
                float(work.flops[TOKENS])
                for (op, table), work in parts.items()
                if op in ("qkv", "output") and table == t
            )
            for t in ("chunk_ns", "attend_ns", "mixed_ns")
        )
        if attention.dp == 1:
            assert (chunk, beside) == (0, 0)
            assert 4 * either == pytest.approx(whole)
        else:
            assert either == 0
            assert attention.tp * chunk == pytest.approx(whole)
            assert 4 * beside == pytest.approx(whole)


def test_reading_the_cache_is_shared_by_all_shards_and_copies() -> None:
    cell = DENSE.attention
    for attention in templates(8, experts=False):
        if cell.kv_heads % attention.tp:
            continue
        read = operations().attention(cell, attention, "bf16", "fp8")["decode attention", "context_rate"]
        # Keys and values of one token, a byte each.
        assert 8 * float(read.moved[TOKENS]) == pytest.approx(2 * cell.kv_heads * cell.head_dim)
        assert 8 * float(read.flops[TOKENS]) == pytest.approx(4 * cell.query_heads * cell.head_dim)


def test_prompts_are_charged_to_the_copy_that_owns_them_and_decoding_is_spread() -> None:
    alone, copies = (
        operations().attention(DENSE.attention, cut, "bf16", "bf16") for cut in (Template(), Template(dp=8))
    )
    assert np.allclose(copies["qkv", "chunk_ns"].seconds, alone["qkv", "mixed_ns"].seconds)
    assert copies["qkv", "decode_ns"].seconds[TOKENS] == alone["qkv", "decode_ns"].seconds[TOKENS // 8]
    assert ("qkv", "mixed_ns") not in copies


def test_an_ffn_copy_that_serves_several_attention_copies_may_get_a_whole_prompt() -> None:
    crowded = operations().ffn(DENSE.ffn, Template(dp=4), Template(dp=2, tp=2), "bf16")["ffn up", "mixed_ns"]
    one = operations().ffn(DENSE.ffn, Template(tp=2), Template(tp=2), "bf16")["ffn up", "mixed_ns"]
    assert np.array_equal(crowded.seconds, one.seconds)
    assert crowded.flops[TOKENS] == one.flops[TOKENS] / 2


@pytest.mark.parametrize("chosen", [1, 2, 3, 6])
@pytest.mark.parametrize("experts", [8, 12, 24])
def test_the_fullest_group_is_never_faster_than_an_even_share_and_reads_what_one_token_must(
    experts: int, chosen: int
) -> None:
    ffn = sparse(hidden=2048, columns=1536, experts=experts, chosen=chosen).ffn
    weight_s = 3 * 2048 * 1536 * 2 / CLUSTER.gpu.memory_bytes_per_s
    for ep in (1, 2, 4, 8):
        if experts % ep:
            continue
        shards, even = Template(dp=1, ep=ep), Template(dp=ep)
        parts = operations().ffn(ffn, Template(dp=ep), shards, "bf16")["experts", "mixed_ns"]
        assert parts.seconds[1] >= -(-chosen // ep) * weight_s
        assert (np.diff(parts.seconds[1:]) > -0.15 * parts.seconds[1:-1]).all()
        assert parts.seconds[0] == 0
        # Replicated experts see an even share of the tokens; groups of experts see their share of the assignments.
        shared = operations().ffn(ffn, Template(dp=1, tp=ep), even, "bf16")["experts", "mixed_ns"]
        assert parts.flops[TOKENS] == pytest.approx(shared.flops[TOKENS])


def test_whole_shared_experts_do_the_work_of_a_part_of_the_tokens_and_read_all_their_weights() -> None:
    cell = sparse(hidden=1024, columns=1680, experts=840, chosen=6, shared=840).ffn
    attention, ffn = Template(dp=2, tp=4), Template(ep=8)
    cut, whole = (
        Operations(
            tables(),
            load_profile(CLUSTER.gpu),
            load_collectives(CLUSTER),
            held=Held(dense_per_copy=True, whole_shared=spread),
        ).ffn(cell, attention, ffn, "bf16")["ffn up", "decode_ns"]
        for spread in (False, True)
    )
    weights = 2 * 2 * 1024 * 840  # gate and up, in 16 bit
    assert whole.flops[TOKENS] == cut.flops[TOKENS]
    assert whole.moved[TOKENS] - 2 * (TOKENS / 8) * (1024 + 2 * 840) == weights
    assert cut.moved[TOKENS] - 2 * (TOKENS / 2) * (1024 + 2 * 840 / 4) == weights / 4


def experts_of(gpu: str, routing: str) -> tuple[Profile, Work]:
    """The experts of Mixtral 8x7B, all on one GPU."""
    found = load_profile(load_cluster(gpu).gpu)
    moe = sparse(hidden=4096, columns=14336, experts=8, chosen=2).ffn
    parts = Operations(tables(), found, load_collectives(CLUSTER), routing).ffn(moe, Template(), Template(), "bf16")
    return found, parts["experts", "mixed_ns"]


def test_experts_of_one_group_take_what_was_measured_at_that_many_tokens() -> None:
    found, work = experts_of("h200-sxm", "uniform")
    rows = found.own("moe")[0].table("moe")
    shape = {"hidden": 4096, "expert_ffn": 14336, "experts": 8, "held": 8, "topk": 2, "dtype": "bf16"}
    chosen = np.all([rows[name] == value for name, value in shape.items()], axis=0) & (rows["tokens"] <= TOKENS)
    assert chosen.sum() >= 8
    for tokens, time_us in zip(rows["tokens"][chosen], rows["time_us"][chosen], strict=True):
        # A table may take a larger batch for the faster one.
        assert 0.9 * time_us < work.seconds[int(tokens)] * 1e6 <= time_us * 1.001


@pytest.mark.parametrize("gpu", ["h200-sxm", "h100-sxm", "b200-sxm"])
def test_experts_take_the_table_of_their_routing_at_all_tokens_and_do_the_work_of_an_even_share(gpu: str) -> None:
    found, uniform = experts_of(gpu, "uniform")
    _, skewed = experts_of(gpu, "skewed")
    for routing, work in (("uniform", uniform), ("skewed", skewed)):
        asked = found.moe_time_s("bf16", np.arange(1.0, TOKENS + 1), 4096, 14336, 8, 8, 2, routing)
        assert np.array_equal(work.seconds[1:], np.minimum.accumulate(asked[::-1])[::-1])
        assert (work.seconds[1:] > 0.7 * asked).all()
    assert np.array_equal(uniform.flops, skewed.flops)
    assert np.array_equal(uniform.moved, skewed.moved)


@pytest.mark.parametrize(("gpu", "slow"), [("b200-sxm", True), ("gb300", True), ("h200-sxm", False)])
def test_experts_in_fp8_of_a_release_older_than_the_tables_are_as_slow_as_it_is_on_blackwell(
    gpu: str, slow: bool
) -> None:
    model, cluster = load_model("deepseek-v3"), load_cluster(gpu)
    moe = model.blocks[-1].ffn
    settings = EngineSettings(max_num_batched_tokens=TOKENS, max_num_seqs=8)
    now, then = (
        StageCosts(model, cluster, settings, load_engine(engine)).operations for engine in ("trtllm", "trtllm-1.1")
    )
    whole, own = Template(tp=8), Template(ep=8)
    for form in ("fp8", "bf16"):
        before, after = (made.ffn(moe, whole, own, form)["experts", "mixed_ns"].seconds for made in (now, then))
        if not slow or form == "bf16":
            assert np.array_equal(before, after)
            continue
        flops = 2 * 3 * 7168 * 2048 * 8 / 8  # of a token's eight experts on eight GPUs, if these are dealt evenly
        assert after[TOKENS] >= TOKENS * flops / 200e12
        assert after[TOKENS] > before[TOKENS]
        # Of few tokens reading the weights takes longest, however they are multiplied.
        assert np.array_equal(before[:4], after[:4])


@pytest.mark.parametrize("gpu", ["h200-sxm", "b200-sxm", "l40s"])
def test_no_kernel_is_charged_for_traffic_or_arithmetic_that_its_time_has_no_room_for(gpu: str) -> None:
    found = load_profile(load_cluster(gpu).gpu)
    costs, one = Operations(tables(), found, load_collectives(CLUSTER)), Template()
    for block in (DENSE, sparse(hidden=4096, columns=14336, experts=8, chosen=2, shared=1024), latent_block(DENSE)):
        parts = costs.attention(block.attention, one, "bf16", "bf16") | costs.ffn(block.ffn, one, one, "bf16")
        for key, work in parts.items():
            least = work.moved / found.gpu.memory_bytes_per_s, work.flops / found.gpu.peak_flops_per_s("bf16")
            assert (work.seconds[1:] >= np.maximum(*least)[1:] * (1 - 1e-9)).all(), key


def test_energy_counts_the_work_of_experts_that_their_time_does() -> None:
    _, work = experts_of("h200-sxm", "uniform")
    flops, moved = experts_work(np.arange(TOKENS + 1.0), 4096, 14336, 8, 8, 2, weight_bytes=2.0)
    assert np.array_equal(work.flops, flops)
    assert np.array_equal(work.moved, moved)
    # By hand: all weights, and per assignment 16-bit activations in and out, between the products and through them.
    assert moved[TOKENS] == pytest.approx(8 * 3 * 4096 * 14336 * 2 + 2 * TOKENS * 2 * (2 * 4096 + 3 * 14336))


def test_experts_that_do_not_divide_leave_the_fullest_group_one_more() -> None:
    moe = sparse(hidden=1024, columns=512, experts=10, chosen=2).ffn
    cut, whole = (
        operations().ffn(moe, Template(), ffn, "bf16")["experts", "mixed_ns"] for ffn in (Template(ep=4), Template())
    )
    assert cut.flops[TOKENS] == pytest.approx(whole.flops[TOKENS] * 3 / 10)


def test_attention_within_a_window_is_charged_what_it_sees_apart_from_that_over_all_the_context() -> None:
    cell = dense(heads=24, kv=24, columns=1680, window=128).attention
    full, short, long = (
        operations().attention(block, Template(dp=2), "bf16", "bf16")
        for block in (DENSE.attention, cell, replace(cell, window=100_000))
    )
    for tables in (("context_rate", "seen_rate"), ("pair_rate", "seen_pair_rate")):
        name = "decode attention" if tables[0] == "context_rate" else "prefill attention"
        each, within, beyond = full[name, tables[0]], short[name, f"{tables[1]}/128"], long[name, f"{tables[1]}/100000"]
        assert (name, tables[0]) not in short
        # A token or a pair is the same work, and no faster than the accelerator.
        assert np.array_equal(within.flops, each.flops)
        assert np.array_equal(within.moved, each.moved)
        peak_s = max(within.flops[1] / 989e12, within.moved[1] / CLUSTER.gpu.memory_bytes_per_s)
        assert (within.seconds[1:] >= 0.999 * peak_s).all()
        # No table has such a window: then those of the whole context serve.
        assert np.array_equal(beyond.seconds, each.seconds)


LATENT = LatentAttention(
    hidden=7168,
    query_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    nope_head_dim=128,
    rope_head_dim=64,
    v_head_dim=128,
)
"""Attention of DeepSeek-V3."""


def test_latent_attention_does_the_arithmetic_of_its_projections_and_reads_its_cache() -> None:
    down, up = 7168 * (1536 + 512 + 64), 1536 * 128 * (128 + 64)
    expand, output = 512 * 128 * (128 + 128), 128 * 128 * 7168
    assert LATENT.parameters == down + up + expand + output + 1536 + 512
    parts = operations().attention(LATENT, Template(), "bf16", "fp8")
    for name, weights in (("qkv", down + up), ("latent", expand), ("output", output)):
        work = parts[name, "mixed_ns"]
        assert work.flops[TOKENS] == pytest.approx(2 * TOKENS * weights)
        # One token: the weights, and next to nothing beside them.
        assert 2 * weights < work.moved[1] < 2 * weights + 1e6
        assert work.seconds[1] >= 2 * weights / CLUSTER.gpu.memory_bytes_per_s
    read, pair = parts["decode attention", "context_rate"], parts["prefill attention", "pair_rate"]
    assert read.moved[1] == 512 + 64
    assert read.flops[1] == 2 * 128 * (512 + 64 + 512)
    assert pair.flops[1] == 2 * 128 * (128 + 64 + 128)
    assert read.seconds[TOKENS] >= max(576 / 3.35e12, read.flops[1] / 989e12)
    assert (pair.seconds[1:] >= pair.flops[1] / 989e12).all()
    written = parts["kv write", "mixed_ns"].moved[TOKENS]
    assert written == TOKENS * 576 * (2 + 1)  # read in 16 bit, written in 8


def test_shards_of_latent_attention_cut_its_heads_and_copy_its_vectors() -> None:
    whole = operations().attention(LATENT, Template(), "bf16", "bf16")
    down, up = 7168 * (1536 + 512 + 64), 1536 * 128 * (128 + 64)
    for tp in (2, 8):
        cut = operations().attention(LATENT, Template(tp=tp), "bf16", "bf16")
        for name in ("latent", "output"):
            assert cut[name, "mixed_ns"].flops[TOKENS] == pytest.approx(whole[name, "mixed_ns"].flops[TOKENS] / tp)
        assert cut["qkv", "mixed_ns"].flops[TOKENS] == pytest.approx(2 * TOKENS * (down + up / tp))
        reads = [parts["decode attention", "context_rate"] for parts in (cut, whole)]
        assert reads[0].moved[1] == reads[1].moved[1]
        assert reads[0].flops[1] == pytest.approx(reads[1].flops[1] / tp)
        pairs = [parts["prefill attention", "pair_rate"] for parts in (cut, whole)]
        assert pairs[0].flops[1] == pytest.approx(pairs[1].flops[1] / tp)
    copied = operations().attention(LATENT, Template(dp=4), "bf16", "bf16")
    assert copied["decode attention", "context_rate"].moved[1] == (512 + 64) * 2 / 4
    assert copied["qkv", "chunk_ns"].flops[TOKENS] == whole["qkv", "mixed_ns"].flops[TOKENS]
    assert ("qkv", "mixed_ns") not in copied


def test_queries_that_are_not_compressed_are_projected_at_once() -> None:
    direct = operations().attention(replace(LATENT, q_lora_rank=None), Template(tp=2), "bf16", "bf16")
    assert direct["qkv", "mixed_ns"].flops[TOKENS] == 2 * TOKENS * 7168 * (64 * 192 + 576)


@pytest.mark.parametrize("weights", ["fp8", "w4a16", "mxfp4"])
def test_parts_that_the_checkpoint_leaves_in_16_bit_are_read_and_computed_so(weights: str) -> None:
    stored = float(get_format(weights).weight_bits / 8)

    def read(parts: Parts, operation: str) -> float:
        """Bytes per weight that one token reads, activations left out: these are the same in both."""
        return float(parts[operation, "mixed_ns"].moved[1])

    cell, moe = DENSE.attention, SPARSE.ffn
    narrow, wide = (
        operations().attention(replace(cell, quantised=flag, output_quantised=flag), Template(), weights, "bf16")
        for flag in (1, 0)
    )
    half = operations().attention(cell, Template(), "bf16", "bf16")
    for operation in ("qkv", "output"):
        assert np.array_equal(wide[operation, "mixed_ns"].seconds, half[operation, "mixed_ns"].seconds)
        assert np.array_equal(wide[operation, "mixed_ns"].joules, half[operation, "mixed_ns"].joules)
        count = 4 * cell.hidden * cell.query_heads * cell.head_dim * (0.75 if operation == "qkv" else 0.25)
        assert read(wide, operation) - read(narrow, operation) == pytest.approx((2 - stored) * count, rel=0.01)
    latent = [
        operations().attention(replace(LATENT, quantised=a, output_quantised=b), Template(), weights, "bf16")
        for a, b in ((True, True), (False, True), (True, False))
    ]
    assert read(latent[1], "qkv") > read(latent[0], "qkv") == read(latent[2], "qkv")
    assert read(latent[2], "output") > read(latent[0], "output") == read(latent[1], "output")
    assert isinstance(moe, MoeFfn)
    shared = replace(moe, shared_intermediate=1680)
    both, routed, beside = (
        operations().ffn(replace(shared, quantised=a, shared_quantised=b), Template(), Template(), weights)
        for a, b in ((True, True), (False, True), (True, False))
    )
    assert read(routed, "experts") > read(both, "experts") == read(beside, "experts")
    assert read(beside, "ffn up") > read(both, "ffn up") == read(routed, "ffn up")
    assert read(routed, "router") == read(both, "router")
    plain = [
        operations().ffn(replace(DENSE.ffn, down_quantised=a), Template(), Template(), weights) for a in (True, False)
    ]
    assert read(plain[1], "ffn down") > read(plain[0], "ffn down")
    assert read(plain[1], "ffn up") == read(plain[0], "ffn up")


def test_matrices_of_a_mixed_checkpoint_are_computed_each_in_its_own_format() -> None:
    cell = replace(DENSE.ffn, quantised=2)
    mixed, second, first = (
        operations().ffn(cell, Template(), Template(), name) for name in ("w4a16+fp8", "fp8", "w4a16")
    )
    for operation, whole in (("ffn up", second), ("ffn down", first)):
        for part in ("seconds", "joules", "moved"):
            own, expected = (getattr(parts[operation, "mixed_ns"], part) for parts in (mixed, whole))
            assert np.array_equal(own, expected)
    attention = replace(DENSE.attention, output_quantised=2)
    mixed, second = (operations().attention(attention, Template(), name, "bf16") for name in ("w4a16+fp8", "fp8"))
    assert np.array_equal(mixed["output", "mixed_ns"].seconds, second["output", "mixed_ns"].seconds)
    assert not np.array_equal(mixed["qkv", "mixed_ns"].seconds, second["qkv", "mixed_ns"].seconds)


def test_fused_operations_lose_their_launch_and_keep_their_traffic() -> None:
    cell = dense(heads=24, kv=24, columns=1680, qk_norm=True).attention
    names = ("rotary", "kv write", "qk norm", "activation")
    fused = Operations(tables(), load_profile(CLUSTER.gpu), load_collectives(CLUSTER), fused=names)
    launch_s = float(operations().profile.memory_time_s(np.array([1.0]))[0])
    for parts, others in (
        (operations().attention(cell, Template(), "bf16", "bf16"), fused.attention(cell, Template(), "bf16", "bf16")),
        (
            operations().ffn(DENSE.ffn, Template(), Template(), "bf16"),
            fused.ffn(DENSE.ffn, Template(), Template(), "bf16"),
        ),
    ):
        for key, work in parts.items():
            assert np.array_equal(work.flops, others[key].flops)
            assert np.array_equal(work.moved, others[key].moved)
            saved = work.seconds - others[key].seconds
            if key[0] in ("rotary", "kv write"):
                assert np.allclose(saved[1:], launch_s)
            elif key[0] in ("norm", "activation"):
                assert np.ptp(saved[1:]) < 1e-12
                assert (saved[1] > 0) == (key[0] == "activation" or "decode attention" in {op for op, _ in parts})
            else:
                assert not saved.any()


def test_kernels_of_a_layer_are_those_of_its_cells_less_the_fused_and_its_collectives() -> None:
    one, eight, copies = Template(), Template(tp=8), Template(dp=8)
    count = {
        "dense": operations().kernels(DENSE, one, one),
        "dense tp8": operations().kernels(DENSE, eight, eight),
        "dense dp8": operations().kernels(DENSE, copies, copies),
        "sparse dp8 ep8": operations().kernels(SPARSE, copies, Template(ep=8)),
        "sparse": operations().kernels(SPARSE, one, one),
    }
    assert count["dense"].tolist() == [11, 11]
    assert (count["dense tp8"] - count["dense"]).tolist() == [2, 2]
    assert (count["dense dp8"] - count["dense"]).tolist() == [0, 0]
    assert (count["sparse dp8 ep8"] - count["sparse"]).tolist() == [2, 2]
    assert (count["sparse"] > count["dense"]).all()
    fused = Operations(
        tables(), load_profile(CLUSTER.gpu), load_collectives(CLUSTER), fused=("rotary", "kv write", "quantise")
    )
    assert (count["dense"] - fused.kernels(DENSE, one, one)).tolist() == [2, 2]
    shared = replace(SPARSE, ffn=replace(SPARSE.ffn, shared_intermediate=1680))
    assert (operations().kernels(shared, one, one) - count["sparse"]).tolist() == [4, 4]
    latent = operations().kernels(latent_block(DENSE), one, one)
    assert (latent > count["dense"]).all()
    assert latent[1] > latent[0]
    # Norms beside those of the cells are launched too, and one that both cells share only once.
    assert (operations().kernels(replace(DENSE, norms=4), one, one) - count["dense"]).tolist() == [2, 2]
    assert (operations().kernels(replace(DENSE, norms=1, parallel=True), one, one) - count["dense"]).tolist() == [
        -1,
        -1,
    ]
    # Nothing is fused where there is nothing to fuse.
    mamba = replace(DENSE, attention=Mamba2(hidden=DENSE.hidden, heads=8, head_dim=64, groups=1, state=16, kernel=4))
    alone = replace(DENSE, attention=Skipped(hidden=DENSE.hidden))
    for block in (mamba, alone):
        assert fused.kernels(block, one, one).tolist() == operations().kernels(block, one, one).tolist()
    assert operations().kernels(alone, one, one).tolist() == list(DENSE.ffn.launches)


def test_cells_that_are_not_there_exchange_nothing_and_one_sum_is_exchanged_once() -> None:
    gone, both = Skipped(hidden=DENSE.hidden), Template(tp=8)
    for block, sums in (
        (DENSE, 2),
        (replace(DENSE, attention=gone), 1),
        (replace(DENSE, ffn=gone), 1),
        (replace(DENSE, parallel=True), 2),
        (replace(DENSE, parallel=True, one_sum=True), 1),
    ):
        assert len(operations().exchanges(block, both, both)) == sums
    # Where the copies differ, the FFN's sum is over others than attention's.
    split = replace(DENSE, parallel=True, one_sum=True)
    assert len(operations().exchanges(split, Template(dp=2, tp=4), Template(tp=8))) == len(
        operations().exchanges(DENSE, Template(dp=2, tp=4), Template(tp=8))
    )


def test_what_lies_outside_the_cells_is_timed_once() -> None:
    one = Template()
    read = operations().beside(replace(DENSE, norms=4), one)["norm", "decode_ns"]
    assert float(read.moved[1]) == 2 * 4 * DENSE.hidden
    whole, shared = (operations().ffn(DENSE.ffn, one, one, "bf16", shares) for shares in (False, True))
    assert {name for name, _ in whole} - {name for name, _ in shared} == {"norm"}


# ---- collectives ------------------------------------------------------------------------------------------------


@dataclass
class Recorded(Operations):
    """Operations that note their collectives: name, ranks, stride, nodes and bytes for TOKENS tokens."""

    calls: list[tuple[str, int, int, int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(tables(), load_profile(CLUSTER.gpu), load_collectives(CLUSTER))

    def _collective(
        self, place: Place, time_s: Callable[..., Any], token_bytes: float, ranks: int, stride: int, layout: Layout
    ) -> Parts:
        sizes, nothing = self.tables.tokens * token_bytes, self.tables.tokens * 0.0
        work = Work(seconds=sizes, flops=nothing, moved=nothing, joules=nothing)
        nodes = layout.spread(ranks, stride).nodes
        size = place(operation="communication", work=work)["communication", "decode_ns"].seconds[TOKENS]
        self.calls.append((time_s.__name__, ranks, stride, nodes, float(size)))
        return {}


def calls(block: Block, attention: Template, ffn: Template, where: Layout | None = None) -> list[tuple[Any, ...]]:
    recorder = Recorded()
    recorder.reshards(block, attention, ffn, where or layout(attention.devices))
    return recorder.calls


class Picture:
    """Devices of a stage, the tokens each holds, and the devices whose partial sums are in them."""

    def __init__(self, devices: int) -> None:
        self.held: list[dict[int, frozenset[int]]] = [{} for _ in range(devices)]

    def groups(self, ranks: int, stride: int) -> list[list[int]]:
        span = ranks * stride
        assert len(self.held) % span == 0, "groups must tile the stage"
        return [
            [start + offset + k * stride for k in range(ranks)]
            for start in range(0, len(self.held), span)
            for offset in range(stride)
        ]

    def largest(self, group: Sequence[int]) -> int:
        return max(len(self.held[d]) for d in group)

    def reduce(self, group: Sequence[int]) -> dict[int, frozenset[int]]:
        tokens = set(self.held[group[0]])
        assert all(set(self.held[d]) == tokens for d in group), "a reduction needs the same tokens everywhere"
        return {t: frozenset().union(*(self.held[d][t] for d in group)) for t in tokens}

    def all_reduce_s(self, ranks: int, stride: int) -> int:
        for group in self.groups(ranks, stride):
            total = self.reduce(group)
            for device in group:
                self.held[device] = dict(total)
        return max(map(len, self.held))

    def all_gather_s(self, ranks: int, stride: int) -> int:
        for group in self.groups(ranks, stride):
            union: dict[int, frozenset[int]] = {}
            for device in group:
                for token, parts in self.held[device].items():
                    assert union.setdefault(token, parts) == parts, "gathered tokens must agree"
            for device in group:
                self.held[device] = dict(union)
        return max(map(len, self.held))

    def reduce_scatter_s(self, ranks: int, stride: int) -> int:
        size = max(map(len, self.held))
        for group in self.groups(ranks, stride):
            total = sorted(self.reduce(group).items())
            share = len(total) // ranks
            for place, device in enumerate(group):
                self.held[device] = dict(total[place * share : (place + 1) * share])
        return size

    def slice(self, copies: Sequence[Sequence[int]], tokens: int) -> None:
        """Every copy keeps its even share of the batch, for free: it must hold that already."""
        share = tokens // len(copies)
        for place, copy in enumerate(copies):
            mine = range(place * share, (place + 1) * share)
            for device in copy:
                assert set(mine) <= set(self.held[device]), "a copy lacks tokens it must compute"
                self.held[device] = {t: self.held[device][t] for t in mine}

    def compute(self, copies: Sequence[Sequence[int]]) -> None:
        """Every device turns what it holds into its partial sum, from inputs that must be summed up."""
        for copy in copies:
            for device in copy:
                self.held[device] = dict.fromkeys(self.held[device], frozenset({device}))

    def summed(self, copies: Sequence[Sequence[int]]) -> bool:
        return all(set(parts) == set(copy) for copy in copies for d in copy for parts in self.held[d].values())


def copies_of(devices: int, dp: int) -> list[list[int]]:
    size = devices // dp
    return [list(range(i * size, (i + 1) * size)) for i in range(dp)]


def carry_out(attention: Template, ffn: Template, found: list[tuple[Any, ...]], hidden: float) -> None:
    """Run the collectives on a picture and check every state in between, and the sizes."""
    devices = attention.devices
    heads, columns = copies_of(devices, attention.dp), copies_of(devices, ffn.dp)
    picture = Picture(devices)
    tokens = 840
    for place, copy in enumerate(heads):
        mine = range(place * tokens // attention.dp, (place + 1) * tokens // attention.dp)
        for device in copy:
            picture.held[device] = dict.fromkeys(mine, frozenset({device}))
    rest = list(found)

    def step(*names: str) -> str | None:
        if not rest or rest[0][0] not in names:
            return None
        name, ranks, stride, _, size = rest.pop(0)
        moved = getattr(picture, name)(ranks, stride)
        assert size == pytest.approx(hidden * moved), (name, ranks, stride)
        return str(name)

    if attention.tp > 1:
        assert step("all_reduce_s")
    assert picture.summed(heads)
    if ffn.dp % attention.dp:
        assert step("all_gather_s")
    picture.slice(columns, tokens)
    picture.compute(columns)
    if ffn.tp * ffn.ep > 1:
        assert step("all_reduce_s", "reduce_scatter_s")
    assert picture.summed(columns)
    step("all_gather_s")
    assert not rest
    # Back to attention: every copy holds its own tokens, on every one of its devices.
    if ffn.dp % attention.dp and attention.dp % ffn.dp == 0:
        # A scatter deals the tokens out in order, so the copies of attention find their own.
        assert all(len(picture.held[d]) == tokens // attention.dp for d in range(devices))
    picture.slice(heads, tokens)


def test_reductions_gathers_and_scatters_bring_every_token_where_the_next_cell_needs_it() -> None:
    for attention, ffn in pairs(experts=False):
        carry_out(attention, ffn, calls(DENSE, attention, ffn), 2.0 * DENSE.hidden)


def test_experts_in_groups_without_attention_copies_are_reduced_like_shards() -> None:
    for attention, ffn in pairs(experts=True):
        if ffn.ep > 1 and (attention.dp <= ffn.dp or attention.dp % ffn.dp):
            carry_out(attention, ffn, calls(SPARSE, attention, ffn), 2.0 * SPARSE.hidden)


def test_experts_behind_attention_copies_are_reached_by_all_to_all_and_the_tokens_come_back() -> None:
    hidden, chosen = 2.0 * SPARSE.hidden, SPARSE.ffn.experts_per_token
    seen = 0
    for attention, ffn in pairs(experts=True):
        if ffn.ep == 1 or attention.dp % ffn.dp or attention.dp == ffn.dp:
            continue
        seen += 1
        devices = attention.devices
        found = calls(SPARSE, attention, ffn)
        expected = [("all_reduce_s", attention.tp, 1, hidden * TOKENS / attention.dp)]
        # A device sends its share of the tokens, once per chosen expert; a group of experts then gathers what came.
        exchange = ("all_to_all_s", ffn.ep, ffn.tp, hidden * chosen * TOKENS / devices)
        arrived = hidden * chosen * TOKENS / (ffn.dp * ffn.ep)
        expected += [exchange, ("all_gather_s", ffn.tp, 1, arrived), ("reduce_scatter_s", ffn.tp, 1, arrived), exchange]
        expected += [("all_gather_s", attention.tp, 1, hidden * TOKENS / attention.dp)]
        expected = [call for call in expected if call[1] > 1]
        assert [(name, ranks, stride) for name, ranks, stride, _, _ in found] == [call[:3] for call in expected]
        assert [call[4] for call in found] == pytest.approx([call[3] for call in expected])
        # What all devices send is what all tokens are chosen for, and what all groups gather is what was sent.
        assert devices * exchange[3] == pytest.approx(hidden * chosen * TOKENS)
        assert ffn.dp * ffn.ep * arrived == pytest.approx(hidden * chosen * TOKENS)
    assert seen > 10


@pytest.mark.parametrize(
    ("attention", "ffn", "meant"),
    [
        ("tp1", "tp1", []),
        ("dp8", "dp8", []),
        ("tp8", "tp8", [("all_reduce_s", 8, 1), ("all_reduce_s", 8, 1)]),
        ("tp8", "ep8", [("all_reduce_s", 8, 1), ("all_reduce_s", 8, 1)]),
        ("dp2,tp4", "dp2,tp4", [("all_reduce_s", 4, 1), ("all_reduce_s", 4, 1)]),
        ("dp8", "tp8", [("all_gather_s", 8, 1), ("reduce_scatter_s", 8, 1)]),
        ("dp8", "ep8", [("all_to_all_s", 8, 1), ("all_to_all_s", 8, 1)]),
        ("tp8", "dp8", [("all_reduce_s", 8, 1), ("all_gather_s", 8, 1)]),
        ("tp8", "dp2,tp4", [("all_reduce_s", 8, 1), ("all_reduce_s", 4, 1), ("all_gather_s", 2, 4)]),
        (
            "dp2,tp4",
            "tp8",
            [("all_reduce_s", 4, 1), ("all_gather_s", 2, 4), ("reduce_scatter_s", 8, 1), ("all_gather_s", 4, 1)],
        ),
    ],
)
def test_known_cuts_use_the_collectives_that_engines_use(
    attention: str, ffn: str, meant: list[tuple[str, int, int]]
) -> None:
    cuts = [Template(**{part[:2]: int(part[2:]) for part in text.split(",")}) for text in (attention, ffn)]
    assert [call[:3] for call in calls(SPARSE, cuts[0], cuts[1])] == meant


def test_norms_over_the_whole_width_of_queries_and_keys_sum_their_squares_over_the_shards() -> None:
    whole = replace(DENSE, attention=replace(DENSE.attention, qk_norm=True, qk_norm_whole=True))
    assert calls(whole, Template(tp=8), Template(tp=8))[0] == ("all_reduce_s", 8, 1, 1, 8.0 * TOKENS)
    assert len(calls(whole, Template(tp=8), Template(tp=8))) == 1 + len(calls(DENSE, Template(tp=8), Template(tp=8)))
    assert calls(whole, Template(dp=8), Template(dp=8)) == []


def test_attention_copies_without_shards_reduce_nothing_after_attention() -> None:
    for attention, ffn in pairs(experts=True):
        if attention.tp == 1 and attention.dp > 1:
            found = calls(SPARSE, attention, ffn)
            assert not found or found[0][0] != "all_reduce_s" or attention.dp <= ffn.dp


def test_a_group_that_is_spread_over_nodes_crosses_them_though_it_has_few_ranks() -> None:
    found = calls(DENSE, Template(dp=2, tp=8), Template(tp=16), layout(16, nodes=2))
    assert [(name, ranks, nodes) for name, ranks, _, nodes, _ in found] == [
        ("all_reduce_s", 8, 1),
        ("all_gather_s", 2, 2),
        ("reduce_scatter_s", 16, 2),
        ("all_gather_s", 8, 1),
    ]


def test_communication_is_never_negative_and_grows_with_the_tokens() -> None:
    for attention, ffn in pairs(experts=True):
        for block in (DENSE, SPARSE):
            if block is DENSE and ffn.ep > 1:
                continue
            for (operation, _), work in operations().reshards(block, attention, ffn, layout(attention.devices)).items():
                assert operation == "communication"
                assert (work.seconds >= 0).all()
                assert np.isfinite(work.seconds).all()
                assert (work.flops == 0).all()
                # The engine's kernel gives way to the library at 8 MiB, where it is the slower of the two.
                assert (np.diff(work.seconds[1:]) >= -1e-9).all()
                assert work.seconds[0] == 0


def test_the_head_computes_logits_of_the_sampled_rows_and_gathers_them() -> None:
    from plan_cases import make_model

    model = make_model((DENSE, 2), vocab=24_000)
    whole = 2 * TOKENS * 24_000 * DENSE.hidden
    for attention in templates(8, experts=False):
        parts = operations().head(model, attention, layout(8))
        assert 8 * float(parts["lm head", "decode_ns"].flops[TOKENS]) == pytest.approx(whole)
        assert ("communication" in {op for op, _ in parts}) == (attention.tp > 1)
        assert {table for _, table in parts} == {"decode_ns", "sequence_ns"}


def test_the_embedding_is_summed_over_its_shards() -> None:
    from plan_cases import make_model

    model = make_model((DENSE, 2))
    for attention in templates(8, experts=False):
        parts = operations().embedding(model, attention, layout(8))
        assert ("communication" in {op for op, _ in parts}) == (attention.tp > 1)


def test_stages_hand_on_hidden_state_and_residual_a_shard_each() -> None:
    from plan_cases import make_model

    model = make_model((DENSE, 2))
    link = CLUSTER.intra
    one, eight = (
        operations().transfer(model, Template(tp=n), Layout(stage_devices=n, tiers=(Tier("node", 2 * n, link, False),)))
        for n in (1, 8)
    )
    assert one[0] == eight[0] == 0
    assert (one[TOKENS] - link.latency_s) == pytest.approx(8 * (eight[TOKENS] - link.latency_s))
    assert one[TOKENS] - link.latency_s >= TOKENS * 4 * DENSE.hidden / link.bytes_per_s
