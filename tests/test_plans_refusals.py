"""What engines can run: each rule lets through what keeps to it and names what does not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import SMALL, dense, latent, make_cluster, make_model, make_problem, random_trace, sparse

from apex_opt.cluster import load_cluster
from apex_opt.engines import ENGINES, SGLANG, TRTLLM, VLLM
from apex_opt.ir import load_model
from apex_opt.ir.scheme import Scheme
from apex_opt.plans.plan import parse_plan
from apex_opt.plans.refusals import refusals
from apex_opt.search import search
from formulations.plan_space import PlanSpace

if TYPE_CHECKING:
    from apex_opt.engines import EngineRules
    from apex_opt.ir import Model

DENSE = make_model((dense(hidden=2048, heads=16, kv=8, width=128, columns=8192), 4))
SPARSE = make_model((sparse(hidden=2048, heads=16, kv=8, width=128, columns=1536, experts=16, shared=1024), 4))
BLOCKS = Scheme(method="fp8", block=(128, 128))


def said(rules: EngineRules, model: Model, plan: str, **changes: Any) -> str:
    """All that the engine has against a plan."""
    cluster = make_cluster(1, capability=changes.pop("capability", 9.0))
    kind = changes.pop("link", "nvlink")
    cluster = replace(cluster, intra=replace(cluster.intra, kind=kind))
    return "; ".join(refusals(rules, model, cluster, parse_plan(plan, model), replace(SMALL, **changes)))


@pytest.mark.parametrize(
    ("rules", "model", "plan", "why"),
    [
        (VLLM, DENSE, "attn(tp4) ffn(dp2,tp2)", "no copies of the FFN"),
        (VLLM, DENSE, "attn(dp2,tp2) ffn(dp2,tp2)", ""),
        (VLLM, SPARSE, "attn(dp2,tp2) ffn(dp2,tp2)", "cuts the experts over all attention copies"),
        (SGLANG, SPARSE, "attn(dp2,tp2) ffn(dp2,tp2)", ""),
        (VLLM, DENSE, "attn(dp2,tp2) ffn(tp4)", "no attention copies before one dense FFN"),
        (VLLM, SPARSE, "attn(dp2,tp2) ffn(ep4)", ""),
        (VLLM, SPARSE, "attn(dp2,tp2) ffn(tp2,ep2)", "either by ep or by tp"),
        (SGLANG, replace(SPARSE, family="qwen3_moe"), "attn(dp2,tp2) ffn(tp2,ep2)", ""),
        (SGLANG, replace(SPARSE, family="mixtral"), "attn(dp2,tp2) ffn(tp2,ep2)", "no attention copies of mixtral"),
        (SGLANG, replace(DENSE, family="qwen3"), "attn(dp2,tp2) ffn(tp4)", ""),
        (TRTLLM, SPARSE, "attn(dp4) ffn(tp2,ep2)", ""),
        (TRTLLM, SPARSE, "attn(dp2,tp2) ffn(ep4)", "or has a copy on each"),
    ],
)
def test_cells_are_cut_beside_each_other_as_the_engine_can(
    rules: EngineRules, model: Model, plan: str, why: str
) -> None:
    found = said(rules, model, plan)
    assert bool(found) == bool(why)
    assert why in found


@pytest.mark.parametrize("method", ["ngram:2", "draft:llama-3.1-8b:2", "eagle:2", "mtp:2"])
def test_sglang_makes_drafts_of_some_kinds_over_attention_copies_that_share_an_ffn(method: str) -> None:
    model, known = replace(SPARSE, family="qwen3_moe"), method.startswith(("eagle", "mtp"))
    found = said(SGLANG, model, f"attn(dp4) ffn(ep4) spec={method}")
    assert found == "" if known else f"spec={method}: SGLang 0.5 makes no such drafts over attention copies" in found
    for plan in ("attn(tp4) ffn(ep4)", "attn(dp2,tp2) ffn(dp2,tp2)"):
        assert not said(SGLANG, model, f"{plan} spec={method}")
    for rules in (VLLM, TRTLLM):
        assert not said(rules, model, f"attn(dp4) ffn(ep4) spec={method}")


@pytest.mark.parametrize(
    ("rules", "plan", "capability", "why"),
    [
        (VLLM, "tp1 fp8", 8.0, ""),  # expanded to 16 bit
        (SGLANG, "tp1 fp8", 7.5, "SGLang 0.5 needs compute capability from 8.0 on"),
        (TRTLLM, "tp1 fp8", 8.0, "TensorRT-LLM 1 needs compute capability from 8.9 on"),
        (TRTLLM, "tp1 fp8", 8.9, ""),
        (TRTLLM, "tp1 nvfp4", 9.0, "from 10.0 on"),
        (VLLM, "tp1 nvfp4", 9.0, ""),
        (VLLM, "tp1 w8a8", 8.0, ""),
        (VLLM, "tp1 w8a8", 10.0, "from 7.5 to below 10.0, test-gpu has 10.0"),
        (TRTLLM, "tp1 w8a8", 9.0, "w8a8: TensorRT-LLM 1 has no such format"),
        (TRTLLM, "tp1 bf16 kv=fp8", 8.0, "a KV cache in fp8"),
        (VLLM, "tp1 bf16", 7.5, "bf16"),
    ],
)
def test_formats_run_on_the_gpus_that_the_engine_has_kernels_for(
    rules: EngineRules, plan: str, capability: float, why: str
) -> None:
    found = said(rules, DENSE, plan, capability=capability)
    assert bool(found) == bool(why)
    assert why in found


@pytest.mark.parametrize(("width", "why"), [(0, ""), (64, ""), (192, "take the field out of config.json")])
def test_vllm_refuses_glm_files_whose_head_dim_it_takes_for_another_one_as_recorded(width: int, why: str) -> None:
    # Verdicts on GLM-5.2 and 5.3, which state 192: no backend for a head of 704; without the field they are built.
    model = replace(load_model("glm-5"), stated_head_dim=width)
    found = said(VLLM, model, "attn(tp8) ffn(tp8)", capability=10.0, block_size=64)
    assert why in found and bool(found) == bool(why)
    assert not said(SGLANG, model, "attn(tp8) ffn(tp8)", capability=10.0, block_size=64)


@pytest.mark.parametrize("method", ["modelopt", "modelopt_mixed"])
def test_a_method_may_need_more_than_its_format_and_only_where_the_checkpoint_is_served_as_it_is(method: str) -> None:
    model = replace(DENSE, weight_format="fp8", scheme=Scheme(method=method))
    assert f"{method} checkpoints" in said(VLLM, model, "tp1", capability=8.0)
    assert not said(VLLM, model, "tp1", capability=8.9)
    assert not said(VLLM, model, "tp1 bf16", capability=8.0)


@pytest.mark.parametrize(
    ("name", "plan", "why"),
    [
        # 1,536 columns of an expert over 8 shards are 192 each, and a scale is for 128.
        ("qwen3-235b-a22b", "attn(tp8) ffn(tp8)", "leaves 192 of 1536 columns of an expert"),
        ("qwen3-235b-a22b", "attn(tp4) ffn(tp4)", ""),
        ("qwen3-235b-a22b", "attn(tp8) ffn(ep8)", ""),
        ("deepseek-v3", "attn(tp16) ffn(tp16)", ""),
        ("deepseek-v3", "attn(tp32) ffn(tp32)", "have 576 of 18432 columns"),
    ],
)
def test_shards_hold_whole_blocks_of_scales(name: str, plan: str, why: str) -> None:
    model = replace(load_model(name), weight_format="fp8", scheme=BLOCKS)
    found = said(VLLM, model, plan)
    assert bool(found) == bool(why)
    assert why in found
    assert not said(VLLM, replace(model, scheme=Scheme(method="fp8")), plan)


@pytest.mark.parametrize(
    ("columns", "group", "fitting"),
    [(29568, 128, {1}), (29696, 128, {1, 2, 4, 8}), (29568, 32, {1, 2, 4}), (29568, None, {1, 2, 4, 8})],
)
def test_shards_hold_whole_groups_of_scales(columns: int, group: int | None, fitting: set[int]) -> None:
    block = dense(hidden=8192, heads=64, kv=8, width=128, columns=columns)
    model = make_model((block, 2), weight_format="w4a16", scheme=Scheme(method="awq", group=group))
    assert {tp for tp in (1, 2, 4, 8) if not said(VLLM, model, f"tp{tp}")} == fitting


def test_groups_of_experts_may_be_halved_to_fit_a_shard() -> None:
    model = replace(SPARSE, weight_format="w4a16", scheme=Scheme(method="awq", group=128))
    assert not said(VLLM, model, "attn(tp8) ffn(tp8)")  # 192 columns: groups of 64
    narrow = make_model(
        (sparse(hidden=2048, heads=16, kv=8, width=128, columns=384, experts=16), 4), weight_format="w4a16"
    )
    assert "leaves 24 of 384" in said(VLLM, replace(narrow, scheme=model.scheme), "attn(tp16) ffn(tp16)")


def test_a_format_that_is_not_the_checkpoints_has_the_usual_groups() -> None:
    block = dense(hidden=2048, heads=16, kv=8, width=128, columns=8256)
    assert "129" not in said(VLLM, make_model((block, 2)), "tp2 w8a16g64")
    assert "4128 of 8256" in said(VLLM, make_model((block, 2)), "tp2 w8a16")
    assert not said(VLLM, make_model((block, 2)), "tp2 fp8")


def test_vllm_does_not_cut_models_into_stages_that_it_has_no_pipelines_for() -> None:
    for family in ("whisper", "gemma3n_text", "mamba2", "deepseek_v4"):  # the last two as recorded
        assert f"vLLM 0.20 does not cut {family} models into stages" in said(VLLM, replace(DENSE, family=family), "pp2")
        assert not said(VLLM, replace(DENSE, family=family), "tp2")
    assert not said(VLLM, DENSE, "pp2")


def test_vllm_refuses_stages_of_tied_ernie_and_groups_of_the_experts_of_dbrx_as_recorded() -> None:
    ernie = replace(SPARSE, family="ernie4_5_moe")
    assert "does not cut ernie4_5_moe models whose LM head is the embedding" in said(
        VLLM, replace(ernie, tied_embeddings=True), "pp2"
    )
    assert not said(VLLM, replace(ernie, tied_embeddings=False), "pp2")
    assert not said(VLLM, replace(ernie, tied_embeddings=True), "tp2")
    dbrx = replace(SPARSE, family="dbrx")
    assert "does not deal the experts of dbrx models over GPUs" in said(VLLM, dbrx, "attn(tp4) ffn(ep4)")
    assert not said(VLLM, dbrx, "attn(tp4) ffn(tp4)")


def test_heads_of_the_vocabulary_of_gpt_oss_and_of_image_towers_divide() -> None:
    assert "rows of the padded vocabulary" in said(VLLM, replace(DENSE, vocab=151_936), "attn(tp3) ffn(tp3)")
    assert "does not copy the 8 KV heads of gpt_oss" in said(VLLM, replace(DENSE, family="gpt_oss"), "tp16")
    assert "rows" not in said(VLLM, replace(DENSE, vocab=151_936), "tp16")
    assert "16 heads of the image tower" in said(VLLM, replace(DENSE, tower_heads=16), "tp32")
    assert not said(VLLM, replace(DENSE, tower_heads=16), "tp16")
    omni = replace(DENSE, family="qwen3_omni_moe_text", sound_heads=20)
    assert "attention tp8 does not divide the 20 heads of the sound tower" in said(VLLM, omni, "tp8")
    assert not said(VLLM, omni, "tp4") and not said(VLLM, replace(omni, sound_heads=0), "tp8")
    # Kimi-K3 came with a release that has its tower whole on every GPU then.
    assert not said(VLLM, replace(DENSE, tower_heads=12, family="kimi_linear"), "tp8")
    assert "12 heads of the image tower" in said(VLLM, replace(DENSE, tower_heads=12, family="kimi_k25"), "tp8")


@pytest.mark.parametrize(
    ("model", "plan", "sizes"),
    [
        (DENSE, "tp1", {1, 8, 16, 24, 64}),
        (DENSE, "tp1 kv=fp8", {16, 64}),
        (make_model((latent(dense(heads=16)), 2)), "tp1", {16, 64}),
        (make_model((dense(sinks=True), 2)), "tp1", {16, 64}),
    ],
)
def test_kv_blocks_are_of_sizes_that_the_kernels_take(model: Model, plan: str, sizes: set[int]) -> None:
    assert {size for size in (1, 8, 16, 24, 64) if not said(VLLM, model, plan, block_size=size)} == sizes
    assert {size for size in (1, 8, 16, 24, 64) if not said(TRTLLM, model, plan, block_size=size)} == {1, 8, 16, 64}


@pytest.mark.parametrize("engine", sorted(ENGINES))
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-30b-a3b"])
def test_the_best_of_all_plans_is_one_that_the_engine_runs_and_lifting_the_rules_loses_none(
    engine: str, name: str
) -> None:
    model, cluster = load_model(name), load_cluster("4xh100-sxm")
    asked = make_problem(model, cluster, random_trace(3, 12), settings=replace(SMALL, runnable=ENGINES[engine]))
    ruled, free = (search(q, PlanSpace(), top=1000) for q in (asked, replace(asked, settings=SMALL)))
    assert ruled.best is not None
    assert free.best is not None
    refused = [answer.ledger.parts[0].infeasible["engine"] for answer in (ruled, free)]
    assert refused[0] > 0 == refused[1]
    plans = {c.plan for c in ruled.candidates}
    assert all(not [*refusals(ENGINES[engine], model, cluster, plan, asked.settings)] for plan in plans)
    assert free.best.value <= ruled.best.value * (1 + 1e-9) or ENGINES[engine].dense_per_copy
    kept = {c.plan for c in free.candidates if not [*refusals(ENGINES[engine], model, cluster, c.plan, SMALL)]}
    assert plans <= kept


@pytest.mark.parametrize(
    ("rules", "form", "changes", "why"),
    [
        (VLLM, "bf16", {}, ""),
        (VLLM, "w4a16", {}, ""),
        (VLLM, "bf16", {"capability": 8.9}, "DeepEP's kernels need compute capability 9.0, test-gpu has 8.9"),
        (VLLM, "bf16", {"link": "pcie"}, "DeepEP's kernels need NVLink inside a node, test-gpu has pcie in 1x1"),
        (VLLM, "w8a16", {}, "sends to experts in bf16, fp16, fp8,"),
        (SGLANG, "fp8", {}, ""),
        (SGLANG, "w4a16", {}, "SGLang 0.5 sends to experts in bf16, fp8 there, not in w4a16"),
        (SGLANG, "nvfp4", {"capability": 10.0}, "not in nvfp4"),
    ],
)
def test_forwards_are_split_where_the_kernels_that_send_run(
    rules: EngineRules, form: str, changes: dict[str, Any], why: str
) -> None:
    model = replace(SPARSE, family="qwen3_moe")
    text = said(rules, model, f"attn(dp4) ffn(ep4) {form} overlap=two_batches", **changes)
    assert why in text and bool(text) == bool(why)
    assert "overlap" not in said(rules, model, f"attn(dp4) ffn(ep4) {form}", **changes)


def test_experts_of_some_checkpoints_have_no_kernels_that_forwards_are_split_with() -> None:
    for rules, method, form in ((VLLM, "awq", "w4a16"), (SGLANG, "compressed-tensors", "fp8")):
        model = replace(SPARSE, family="qwen3_moe", weight_format=form, scheme=Scheme(method=method))
        text = said(rules, model, f"attn(dp4) ffn(ep4) {form} overlap=two_batches")
        assert f"does not send to experts of {method} checkpoints" in text


def test_a_gpu_without_a_cuda_capability_is_asked_for_none() -> None:
    cluster = load_cluster("1xmi300x")
    assert cluster.gpu.capability is None
    model = load_model("llama-3.1-8b")
    assert not [*refusals(VLLM, model, cluster, parse_plan("tp1 fp8", model), SMALL)]
    assert make_cluster(1).gpu.capability is not None


def test_each_format_of_a_mixed_checkpoint_has_scales_of_its_own() -> None:
    block = dense(hidden=2048, heads=16, kv=8, width=128, columns=8256)
    mixed = make_model((replace(block, attention=replace(block.attention, quantised=2, output_quantised=2)), 4))
    channels = Scheme(method="compressed-tensors", further=(BLOCKS,))
    mixed = replace(mixed, weight_format="w4a16+fp8", scheme=channels)
    # The FFN has a scale for each channel; heads of 128 keep to the blocks of attention.
    assert said(VLLM, mixed, "tp4") == ""
    groups = replace(channels, group=128)
    assert "shards of the FFN have 2064 of 8256 columns each, no multiple of the 128" in said(
        VLLM, replace(mixed, scheme=groups), "tp4"
    )
    odd = dense(hidden=2048, heads=16, kv=8, width=96, columns=8192)
    odd = replace(odd, attention=replace(odd.attention, quantised=2, output_quantised=2))
    wide = replace(make_model((odd, 4)), weight_format="w4a16+fp8", scheme=groups)
    assert "outputs of keys a shard, no multiple of the 128" in said(VLLM, wide, "tp8")
