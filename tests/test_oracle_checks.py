"""The oracle: every constraint family says yes, no, and where the line runs, with the numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from plan_cases import SMALL, dense, instance_at, latent, make_cluster, make_model, sparse

from apex_opt.engines import VLLM
from apex_opt.ir import load_model
from apex_opt.oracle.checks import FAMILIES, decode_bytes, violations
from apex_opt.oracle.instance import Instance
from apex_opt.plans.plan import parse_plan

if TYPE_CHECKING:
    from apex_opt.ir import Model

DENSE = make_model((dense(heads=12, kv=4, columns=1536), 12))
SPARSE = make_model((sparse(heads=12, kv=4, columns=768, experts=6, shared=1536), 12))
LATENT = make_model((latent(dense(heads=12, columns=1536)), 12))
FIRST = make_model((dense(heads=8, kv=4, columns=1536), 2), (sparse(heads=8, kv=4, columns=512, experts=8), 10))


def broken(model: Model, text: str, gpus: int = 8, **limits: Any) -> dict[str, str]:
    """Families a plan breaks, with their texts, where nothing but the named limits is tight."""
    plan = parse_plan(text, model)
    return {v.family: v.text for v in violations(instance_at(model, plan, gpus, **limits), plan)}


def test_a_plan_with_room_breaks_nothing() -> None:
    for model in (DENSE, SPARSE, LATENT, FIRST):
        for text in ("tp4", "dp2 tp2", "pp2 tp4", "attn(dp2,tp2) ffn(tp4)", "attn(dp4) ffn(dp4)"):
            assert broken(model, text) == {}


def test_a_plan_takes_no_more_gpus_than_are_offered() -> None:
    assert broken(DENSE, "dp2 tp4", gpus=8) == {}
    assert broken(DENSE, "dp2 tp4", gpus=7) == {"devices": "the plan takes 8 GPUs, 7 are offered"}


@pytest.mark.parametrize(
    ("model", "text", "said"),
    [
        (DENSE, "attn(tp5) ffn(dp5)", "attention tp5 does not divide 12 query heads"),
        (DENSE, "attn(tp3) ffn(dp3)", "tp3 neither divides nor is a multiple of 4 KV heads"),
        (DENSE, "attn(tp6) ffn(dp6)", "tp6 neither divides nor is a multiple of 4 KV heads"),
        (DENSE, "attn(tp12) ffn(tp12)", None),
        (DENSE, "attn(dp7) ffn(tp7)", "FFN tp7 does not divide 1536 columns"),
        (DENSE, "attn(dp6) ffn(tp6)", None),
        (DENSE, "attn(tp2) ffn(ep2)", "ep2 needs experts; the FFN is dense"),
        (LATENT, "attn(tp12) ffn(tp12)", None),
        (LATENT, "attn(tp6) ffn(tp6)", None),
        (LATENT, "attn(tp8) ffn(tp8)", "attention tp8 does not divide 12 query heads"),
        (SPARSE, "attn(tp4) ffn(ep4)", "ep4 does not divide 6 experts"),
        (SPARSE, "attn(dp5) ffn(tp5)", "FFN tp5 does not divide 768 columns of an expert"),
        (SPARSE, "attn(dp6) ffn(ep6)", None),
        (make_model((sparse(experts=6, shared=100), 4)), "attn(dp6) ffn(ep6)", "does not divide 100 shared columns"),
        (FIRST, "attn(dp2,tp4) ffn(tp2,ep4)", None),
        (
            make_model((dense(columns=1000), 1), (sparse(columns=512, experts=16), 1)),
            "attn(dp2,tp8) ffn(ep16)",
            "FFN tp1 ep16 does not divide 1000 columns",
        ),
    ],
)
def test_tasks_divide_over_shards_and_kv_heads_are_copied_whole(model: Model, text: str, said: str | None) -> None:
    found = broken(model, text, gpus=16)
    assert set(found) == ({"divisibility"} if said else set())
    assert said is None or said in found["divisibility"]


@pytest.mark.parametrize(
    ("weights", "flops", "allowed"),
    [
        ("bf16", ("bf16",), True),
        ("bf16", ("fp16",), False),
        ("fp16", ("bf16",), False),
        ("fp16", ("bf16", "fp16"), True),
        ("fp8", ("bf16",), True),  # expanded, for want of such arithmetic
        ("fp8", ("bf16", "fp8"), True),
        ("w4a16", ("fp16",), True),
        ("w8a16", ("bf16",), True),
        ("mxfp4", ("fp16",), True),
        ("nvfp4", ("bf16", "fp8", "fp4"), True),
    ],
)
def test_a_gpu_computes_in_the_formats_it_has_and_expands_weights_to_one_of_them(
    weights: str, flops: tuple[str, ...], allowed: bool
) -> None:
    found = broken(DENSE, f"tp4 {weights}", formats=((weights, "bf16"),), flops=flops)
    assert found == ({} if allowed else {"format": f"test-gpu does not compute in {weights}"})


def test_a_format_whose_arithmetic_has_another_name_says_which_it_needs() -> None:
    found = broken(DENSE, "tp4 w8a8", formats=(("w8a8", "bf16"),), flops=("bf16", "fp8"))
    assert found == {"format": "test-gpu does not compute in int8, which w8a8 needs"}


@pytest.mark.parametrize(
    ("layers", "text", "said"),
    [
        (4, "pp3", None),  # 3 stages x 2 layers = 3/2 x 4, on the line
        (5, "pp4", "the largest of 4 stages holds 2 of 5 layers, more than 3/2 of the mean"),
        (6, "pp4", None),
        (12, "pp2[9,3]", None),
        (12, "pp2[10,2]", "the largest of 2 stages holds 10 of 12 layers"),
    ],
)
def test_no_stage_holds_more_than_three_halves_of_the_mean(layers: int, text: str, said: str | None) -> None:
    found = broken(make_model((dense(), layers)), text)
    assert set(found) == ({"balance"} if said else set())
    assert said is None or said in found["balance"]


@pytest.mark.parametrize(
    ("text", "said"), [("pp2[6,4]", None), ("pp3", "a stage holds 3 layers, of which 2"), ("pp3[4,4,2]", None)]
)
def test_layers_that_are_one_lie_on_one_stage(text: str, said: str | None) -> None:
    found = broken(make_model((dense(), 10), together=2), text)
    assert set(found) == ({"balance"} if said else set())
    assert said is None or said in found["balance"]


@pytest.mark.parametrize("model", [DENSE, SPARSE, LATENT, FIRST])
@pytest.mark.parametrize("text", ["tp1", "tp4", "pp3 tp2", "attn(dp2,tp2) ffn(tp4)", "pp2[7,5] tp2 w4a16 kv=fp8"])
def test_memory_is_enough_to_the_byte(model: Model, text: str) -> None:
    formats = (("bf16", "bf16"), ("w4a16", "fp8"))
    assert broken(model, text, memory=0, formats=formats) == {}
    assert set(broken(model, text, memory=-1, formats=formats)) == {"memory"}


def test_a_memory_fault_tells_weights_workspace_and_cache() -> None:
    model = load_model("llama-3.1-70b")
    plan = parse_plan("tp1", model)
    instance = Instance(
        model=model,
        cluster=make_cluster(1),
        settings=SMALL,
        longest_tokens=1000,
        weight_formats=("bf16",),
        kv_formats=("bf16",),
        max_devices=1,
    )
    (fault,) = violations(instance, plan)
    assert "GB (weights 141.1, workspace" in fault.text
    assert "KV cache of the longest request 0.3) and may use 77.3" in fault.text


@pytest.mark.parametrize("model", [DENSE, SPARSE, LATENT, FIRST])
@pytest.mark.parametrize("text", ["tp1", "tp4", "pp3 tp2", "attn(dp4) ffn(dp4)"])
def test_weights_can_be_read_within_the_limit_to_the_nanosecond(model: Model, text: str) -> None:
    assert broken(model, text, tpot=0) == {}
    assert set(broken(model, text, tpot=-1)) == {"bandwidth"}


def test_a_bandwidth_fault_tells_bytes_time_and_limit() -> None:
    model = load_model("llama-3.1-70b")
    plan = parse_plan("tp2", model)
    instance = replace(
        instance_at(model, plan, 8), tpot_limit_ns=10_000_000, cluster=make_cluster(8, memory_bytes=1 << 45)
    )
    (fault,) = violations(instance, plan)
    assert fault.family == "bandwidth"
    # 70.55 G parameters less embedding and norms, halved over two GPUs, two bytes each.
    assert "passes through 69.50 GB of weights per GPU, at least 20.75 ms at 3.35 TB/s" in fault.text
    assert "TPOT limit is 10" in fault.text


def test_a_token_reads_its_own_experts_only_and_of_these_the_most_that_one_group_must_hold() -> None:
    block = sparse(hidden=512, columns=768, experts=8, chosen=3)
    model = make_model((block, 1))
    matrix = 3 * 512 * 768 * 2
    rest = decode_bytes(model, parse_plan("attn(tp1) ffn(tp1)", model)) - 3 * matrix
    for ep, held in ((2, 2), (4, 1), (8, 1)):
        plan = parse_plan(f"attn(dp{ep}) ffn(ep{ep})", model)
        assert decode_bytes(model, plan) - rest == held * matrix


def test_parts_left_in_16_bit_are_read_in_16_bit() -> None:
    block = sparse(experts=4, chosen=2, shared=256)
    kept = replace(block, ffn=replace(block.ffn, shared_quantised=0, shared_down_quantised=0))
    whole, partly = (decode_bytes(make_model((b, 3)), parse_plan("tp1 fp8", make_model((b, 3)))) for b in (block, kept))
    assert partly - whole == 3 * 3 * 512 * 256


def test_faults_come_in_the_order_in_which_plans_are_charged() -> None:
    model = make_model((dense(), 5))
    instance = replace(
        instance_at(
            model,
            parse_plan("tp1", model),
            12,
            memory=-(10**9),
            flops=("fp16",),
            settings=replace(SMALL, runnable=VLLM),
        ),
        tpot_limit_ns=1,
    )
    found = [v.family for v in violations(instance, parse_plan("dp3 pp4 attn(tp3) ffn(dp3)", model))]
    assert found == ["devices", *FAMILIES]
