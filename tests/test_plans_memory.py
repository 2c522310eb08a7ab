"""What a plan takes of a GPU's memory, against sums done by hand and against what vLLM measured."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace

import numpy as np
import pytest
from plan_cases import SMALL, dense, instance_at, latent, make_gpu, make_model, random_model, sparse

from apex_opt.cluster import load_cluster
from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import UsageError
from apex_opt.ir import Attention, Block, LatentAttention, Model, load_model
from apex_opt.oracle.space import space
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.memory import RUNTIME_BYTES, kv_blocks, stage_memory, stage_runs, workspace_bytes
from apex_opt.plans.plan import Plan, parse_plan

VLLM = EngineSettings(max_num_seqs=1024, max_num_batched_tokens=8192)
H200 = load_cluster("1xh200-sxm").gpu


def weights(model: Model, text: str) -> list[int]:
    return [stage.weights_bytes for stage in stage_memory(model, H200, parse_plan(text, model), VLLM)]


@pytest.mark.parametrize(("name", "measured"), [("llama-3.1-8b", 55_406), ("mixtral-8x7b", 18_522)])
def test_kv_blocks_on_one_h200_are_those_vllm_chose(name: str, measured: int) -> None:
    model = load_model(name)
    blocks = kv_blocks(stage_memory(model, H200, parse_plan("tp1", model), VLLM))
    assert abs(blocks / measured - 1) < 0.015


def test_weights_of_known_models_equal_sums_done_by_hand() -> None:
    # 8B: q and o 4096 x 4096, k and v 4096 x 1024, three FFN matrices 4096 x 14336, two norms; embedding and LM head.
    layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    matrix = 2 * 128256 * 4096
    assert weights(load_model("llama-3.1-8b"), "tp1") == [32 * layer + 2 * matrix + 2 * 4096]
    # 70B on 8: a KV head each, 8 query heads, 3584 columns.
    shard = 2 * (8192 * (1024 + 2 * 128) + 1024 * 8192 + 3 * 8192 * 3584 + 2 * 8192)
    part = 2 * 16032 * 8192
    model = load_model("llama-3.1-70b")
    assert weights(model, "tp8") == [80 * shard + 2 * part + 2 * 8192]
    assert weights(model, "pp2 tp8") == [40 * shard + part, 40 * shard + part + 2 * 8192]
    assert weights(model, "pp3[30,30,20] tp8") == [30 * shard + part, 30 * shard, 20 * shard + part + 2 * 8192]


def test_kv_cache_and_workspace_of_70b_on_eight_equal_sums_done_by_hand() -> None:
    model = load_model("llama-3.1-70b")
    (stage,) = stage_memory(model, make_gpu(), parse_plan("tp8", model), VLLM)
    assert stage.kv_block_bytes == 16 * 80 * 2 * 1 * 128 * 2
    # Two hidden states, then gate, up and activation of 3584 columns, for 8192 tokens; fp32 logits of 1024 sequences.
    assert stage.workspace_bytes == 2 * 8192 * (2 * 8192 + 3 * 3584) + 4 * 1024 * 128256
    assert stage.runtime_bytes == RUNTIME_BYTES
    assert stage.usable_bytes == int(80 * 2**30 * 0.9)
    left = stage.usable_bytes - stage.weights_bytes - stage.workspace_bytes - RUNTIME_BYTES
    assert stage.kv_blocks == left // stage.kv_block_bytes
    assert kv_blocks([stage]) == stage.kv_blocks - 1


def test_heads_are_copied_where_there_are_more_shards_than_kv_heads() -> None:
    model = load_model("qwen3-235b-a22b")  # 4 KV heads
    sizes = {
        tp: stage_memory(model, H200, parse_plan(f"tp{tp}", model), VLLM)[0].kv_block_bytes for tp in (1, 2, 4, 8, 16)
    }
    assert sizes[1] == 2 * sizes[2] == 4 * sizes[4]
    assert sizes[4] == sizes[8] == sizes[16]


@pytest.mark.parametrize("seed", range(30))
def test_shards_add_up_to_the_model_where_all_divides_and_never_to_less(seed: int) -> None:
    model = random_model(np.random.default_rng(seed))
    blocks = [run.block for run in model.runs]
    # What linear cells hold whole is for their own tests to say.
    counted = all(isinstance(block.attention, Attention | LatentAttention) for block in blocks)
    routers = sum(run.count * 2 * router(run.block) for run in model.runs)
    equal = 0
    for plan in space(instance_at(model, None, 8)):
        if plan.replicas > 1:
            continue
        held = sum(s.weights_bytes for s in stage_memory(model, make_gpu(), plan, SMALL)) * plan.stage_devices
        assert held >= model.weight_bytes("bf16")
        if (
            counted
            and plan.attention.dp == plan.ffn.dp == 1
            and model.vocab % plan.attention.tp == 0
            and all(divides(b, plan) for b in blocks)
        ):
            equal += 1
            # Norms, biases of whole rows, query and key norms and routers lie on every GPU; a tied matrix on both ends.
            copied = (
                sum(run.count * 2 * (run.block.own_parameters + small(run.block)) for run in model.runs)
                + 2 * model.hidden
                + routers
            )
            # The bias of a down projection goes with its expert, whole on each of its shards.
            biases = sum(run.count * 2 * down_biases(run.block) for run in model.runs) * (plan.ffn.tp - 1)
            tied = 2 * model.vocab * model.hidden if model.tied_embeddings and plan.stages > 1 else 0
            assert held == model.weight_bytes("bf16") + (plan.stage_devices - 1) * copied + biases + tied
    assert equal >= counted


def small(block: Block) -> int:
    """Weights of an attention cell that no shard divides."""
    attention = block.attention
    if not isinstance(attention, Attention):
        q_lora = attention.q_lora_rank or 0
        latent = attention.kv_lora_rank + attention.rope_head_dim
        return attention.hidden * (q_lora + latent) + q_lora + attention.kv_lora_rank
    norms = attention.qk_norm * (not attention.qk_norm_whole) * 2 * attention.head_dim
    return attention.output_bias * attention.hidden + norms


def router(block: Block) -> int:
    """Weights of the router, its bias, and what scales the shared FFN."""
    ffn = block.ffn
    return ffn.hidden * (ffn.experts + ffn.shared_gate) + ffn.router_bias * ffn.experts if block.is_moe else 0


def down_biases(block: Block) -> int:
    """Weights of the biases of all experts' down projections."""
    return block.ffn.experts * block.hidden * block.ffn.bias if block.is_moe else 0


def divides(block: Block, plan: Plan) -> bool:
    """Whether shards are equal and no KV head is copied."""
    attention, ffn, tp, ep = block.attention, block.ffn, plan.ffn.tp, plan.ffn.ep
    if attention.query_heads % plan.attention.tp:
        return False
    if isinstance(attention, Attention) and attention.kv_heads % plan.attention.tp:
        return False
    if block.is_moe:
        shared = ffn.shared_intermediate % (tp * ep) == 0
        return ffn.experts % ep == 0 and ffn.expert_intermediate % tp == 0 and shared
    return ffn.intermediate % (tp * ep) == 0


@pytest.mark.parametrize("name", ["llama-3.1-70b", "mixtral-8x22b", "qwen3-30b-a3b"])
def test_a_gpu_holds_less_the_more_shards_there_are(name: str) -> None:
    model = load_model(name)
    stages = [stage_memory(model, H200, parse_plan(f"tp{tp}", model), VLLM)[0] for tp in (1, 2, 4, 8, 16)]
    for one, other in itertools.pairwise(stages):
        assert one.weights_bytes > other.weights_bytes
        assert one.workspace_bytes >= other.workspace_bytes
        assert one.kv_block_bytes >= other.kv_block_bytes
        assert one.kv_blocks <= other.kv_blocks


def test_a_latent_cache_lies_whole_on_every_shard() -> None:
    model = load_model("deepseek-v3")
    for text in ("tp1", "tp8", "tp16", "attn(dp8,tp2) ffn(ep16)"):
        (stage,) = stage_memory(model, H200, parse_plan(text, model), VLLM)
        assert stage.kv_block_bytes == 16 * 61 * 576 * 2


def test_weights_of_deepseek_on_eight_equal_sums_done_by_hand() -> None:
    # Each GPU: both compressions whole, 16 of 128 heads, 32 of 256 experts, an eighth of the shared one and of the
    # dense layers' columns; norms, router and its correction in 16 bit.
    attention = 7168 * (1536 + 576) + 16 * (1536 * 192 + 512 * 256 + 128 * 7168)
    norms = 2 * (1536 + 512 + 2 * 7168)
    sparse_ffn = 32 * 3 * 7168 * 2048 + 3 * 7168 * 256 + 2 * (7168 * 256 + 256)
    dense_ffn = 3 * 7168 * 2304
    both_ends = 2 * 2 * (129280 // 8) * 7168 + 2 * 7168
    model = load_model("deepseek-v3")
    assert weights(model, "attn(tp8) ffn(ep8) fp8") == [
        61 * (attention + norms) + 58 * sparse_ffn + 3 * dense_ffn + both_ends
    ]


def test_the_workspace_of_latent_attention_holds_expanded_keys_and_values_of_the_heads_here() -> None:
    block = latent(dense(heads=8, columns=64), q_lora_rank=96)
    model = make_model((block, 1), vocab=10)
    plan = parse_plan("tp2", model)
    # Per head: query, key, key nope and value out of the latent vector; the latent vectors of query and of key.
    width = 4 * (48 + 48 + 32 + 24) + 96 + 64 + 16
    assert workspace_bytes(model, plan, SMALL, last=False) == 2 * 256 * (2 * 512 + width)


def test_what_the_checkpoint_leaves_out_stays_16_bit_in_every_plan() -> None:
    model = load_model("gpt-oss-120b")
    experts = 36 * 128 * 3 * 2880 * 2880
    full = weights(model, "tp1 bf16")[0]
    assert full == 2 * model.parameters
    for name, bits in (("mxfp4", 4.25), ("nvfp4", 4.5), ("fp8", 8)):
        assert weights(model, f"tp1 {name}")[0] == full - experts * (16 - bits) / 8


def test_copies_of_a_cell_hold_it_whole() -> None:
    model = load_model("mixtral-8x22b")
    whole, copies = weights(model, "tp1")[0], weights(model, "attn(dp8) ffn(dp8)")[0]
    assert whole == copies
    experts = weights(model, "attn(dp8) ffn(ep8)")[0]
    assert experts < weights(model, "attn(dp8) ffn(dp2,ep4)")[0] < whole
    assert weights(model, "ep8")[0] == weights(model, "tp8")[0]


def test_formats_shrink_the_matrices_of_the_blocks_and_nothing_else() -> None:
    model = load_model("llama-3.1-70b")
    kept = 2 * (2 * 128256 * 8192 + 8192 + 80 * 2 * 8192)
    full = weights(model, "tp1 bf16")[0] - kept
    assert weights(model, "tp1 fp8")[0] - kept == full // 2
    assert weights(model, "tp1 w8a16")[0] - kept == full // 2 + full // 128  # and a 16-bit scale per 128 weights
    assert weights(model, "tp1 w4a16")[0] - kept == full // 4 + full // 128
    assert weights(model, "tp1 fp16")[0] - kept == full


def test_an_fp8_cache_holds_twice_the_tokens_in_the_same_room() -> None:
    model = load_model("llama-3.1-8b")
    wide, narrow = (
        stage_memory(model, H200, parse_plan(f"tp1 bf16 kv={kv}", model), VLLM)[0] for kv in ("bf16", "fp8")
    )
    assert wide.kv_block_bytes == 2 * narrow.kv_block_bytes
    assert 0 <= narrow.kv_blocks - 2 * wide.kv_blocks <= 1


def test_a_tied_matrix_is_held_once_on_one_stage_and_twice_on_two() -> None:
    block = dense()
    tied, untied = (make_model((block, 4), vocab=32000, tied=flag) for flag in (True, False))
    matrix = 2 * 32000 * 512
    assert weights(untied, "tp1")[0] - weights(tied, "tp1")[0] == matrix
    assert weights(untied, "pp2 tp1") == weights(tied, "pp2 tp1")


def test_stages_take_their_layers_from_the_runs_in_order() -> None:
    first, rest = dense(), sparse()
    model = make_model((first, 3), (rest, 5))
    cut = stage_runs(model, (2, 3, 3))
    assert [[(run.block is first, run.count) for run in runs] for runs in cut] == [
        [(True, 2)],
        [(True, 1), (False, 2)],
        [(False, 3)],
    ]
    with pytest.raises(UsageError, match="7 layers; test-model has 8"):
        stage_runs(model, (4, 3))


def test_the_cache_is_what_the_fullest_stage_leaves_and_nothing_where_weights_do_not_fit() -> None:
    model = load_model("llama-3.1-70b")
    stages = stage_memory(model, H200, parse_plan("pp4[14,22,22,22] tp2", model), VLLM)
    assert kv_blocks(stages) == min(stage.kv_blocks for stage in stages) - 1
    tiny = dataclasses.replace(H200, memory_bytes=2**30)
    assert kv_blocks(stage_memory(model, tiny, parse_plan("tp8", model), VLLM)) == 0


def test_workspace_falls_with_copies_and_logits_count_on_the_last_stage_alone() -> None:
    model = load_model("llama-3.1-70b")
    one, two = parse_plan("tp8", model), parse_plan("attn(dp2,tp4) ffn(dp2,tp4)", model)
    assert workspace_bytes(model, one, VLLM, last=True) - workspace_bytes(model, one, VLLM, last=False) == (
        4 * 1024 * 128256
    )
    shared = replace(VLLM, scheduler=SglangScheduling())
    assert workspace_bytes(model, two, shared, last=False) < workspace_bytes(model, one, shared, last=False)


def test_ranks_hold_a_full_batch_each_as_each_has_limits_of_its_own() -> None:
    model = load_model("llama-3.1-70b")
    one, two = parse_plan("tp4", model), parse_plan("attn(dp2,tp4) ffn(dp2,tp4)", model)
    shared = replace(VLLM, scheduler=SglangScheduling())
    halved = replace(VLLM, max_num_seqs=512, max_num_batched_tokens=4096)

    def logits(plan: Plan, settings: EngineSettings) -> int:
        return workspace_bytes(model, plan, settings, last=True) - workspace_bytes(model, plan, settings, last=False)

    assert logits(two, VLLM) == 2 * logits(two, shared) == 2 * logits(one, halved)


def test_a_dense_ffn_beside_experts_is_cut_over_all_shards() -> None:
    model = make_model((dense(), 1), (sparse(), 1))
    assert weights(model, "attn(tp4) ffn(tp2,ep2)")[0] == weights(model, "tp4")[0]
