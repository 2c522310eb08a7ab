"""Transformer IR: counts of weights and tasks, and what the types refuse."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.ir import Attention, Block, Cell, DenseFfn, LatentAttention, Model, MoeFfn, Run

ATTENTION = Attention(hidden=10, query_heads=6, kv_heads=2, head_dim=4)
LATENT = LatentAttention(
    hidden=10, query_heads=6, q_lora_rank=5, kv_lora_rank=3, nope_head_dim=4, rope_head_dim=2, v_head_dim=7
)
DENSE = DenseFfn(hidden=10, intermediate=7)
MOE = MoeFfn(hidden=10, expert_intermediate=3, experts=5, experts_per_token=2)


def model(**changes: Any) -> Model:
    given: dict[str, Any] = {
        "name": "tiny",
        "hidden": 10,
        "vocab": 11,
        "tied_embeddings": False,
        "max_position": 100,
        "runs": (
            Run(block=Block(attention=ATTENTION, ffn=DENSE), count=2),
            Run(block=Block(attention=ATTENTION, ffn=MOE), count=3),
        ),
        "dtype": "bf16",
        "weight_format": "bf16",
        "kv_format": None,
        "source": "test",
    }
    return Model(**(given | changes))


def covered(cell: Cell) -> int:
    """Weights that a number format may quantise."""
    return sum(weights for quantised, weights in cell.matrices if quantised)


def test_attention_is_sized_by_its_heads_not_by_hidden() -> None:
    assert (ATTENTION.query_dim, ATTENTION.kv_dim) == (24, 8)
    assert (ATTENTION.group_size, ATTENTION.tasks) == (3, 2)
    assert ATTENTION.parameters == 10 * 24 + 2 * 10 * 8 + 24 * 10
    assert ATTENTION.kv_elements_per_token == 16


def test_attention_counts_each_optional_part() -> None:
    base = ATTENTION.parameters
    assert replace(ATTENTION, qkv_bias=True).parameters == base + 24 + 8 + 8
    assert replace(ATTENTION, output_bias=True).parameters == base + 10
    assert replace(ATTENTION, qk_norm=True).parameters == base + 2 * 4
    assert replace(ATTENTION, qk_norm=True, qk_norm_whole=True).parameters == base + 24 + 8
    assert replace(ATTENTION, sinks=True).parameters == base + 6
    assert covered(replace(ATTENTION, window=5, qkv_bias=True, qk_norm=True, sinks=True)) == base


def test_latent_attention_is_the_sum_of_its_checkpoint_tensors() -> None:
    q_a, q_b, kv_a, kv_b, output = 10 * 5, 5 * 6 * (4 + 2), 10 * (3 + 2), 3 * 6 * (4 + 7), 6 * 7 * 10
    norms = 5 + 3
    assert covered(LATENT) == q_a + q_b + kv_a + kv_b + output
    assert LATENT.parameters == LATENT.active_parameters == covered(LATENT) + norms
    direct = replace(LATENT, q_lora_rank=None)
    assert direct.parameters == 10 * 6 * (4 + 2) + kv_a + kv_b + output + 3


def test_latent_attention_caches_one_vector_that_all_heads_share() -> None:
    assert LATENT.kv_elements_per_token == LATENT.latent_dim == 3 + 2
    assert (LATENT.tasks, LATENT.kv_heads, LATENT.qk_head_dim, LATENT.window) == (6, 1, 6, None)


def test_what_a_checkpoint_leaves_out_is_counted_but_not_quantised() -> None:
    for cell in (ATTENTION, LATENT, DENSE, MOE):
        assert replace(cell, quantised=0).parameters == cell.parameters
        assert replace(cell, quantised=0).active_parameters == cell.active_parameters
    assert covered(replace(ATTENTION, quantised=0)) == 24 * 10
    assert covered(replace(ATTENTION, output_quantised=0)) == 10 * (24 + 8 + 8)
    assert covered(replace(DENSE, quantised=0)) == 70
    assert covered(replace(DENSE, down_quantised=0)) == 2 * 70
    output = 6 * 7 * 10
    assert covered(replace(LATENT, quantised=0)) == output
    assert covered(replace(LATENT, output_quantised=0)) == covered(LATENT) - output
    shared = replace(MOE, shared_intermediate=4)
    assert covered(replace(shared, quantised=0)) == 3 * 10 * 4
    assert covered(replace(shared, shared_quantised=0)) == covered(MOE) + 10 * 4
    assert covered(replace(shared, shared_down_quantised=0)) == covered(MOE) + 2 * 10 * 4


def test_a_matrix_in_another_format_of_a_mixed_checkpoint_is_stored_in_that() -> None:
    block = Block(attention=replace(ATTENTION, quantised=2, output_quantised=0), ffn=replace(DENSE, down_quantised=2))
    qkv, output, up, down = 10 * (24 + 8 + 8), 24 * 10, 2 * 70, 70
    rest = 2 * (output + block.norm_parameters)
    assert block.weight_bytes("nvfp4+fp8") == rest + qkv + down + -(-up * 9 // 16)
    assert block.weight_bytes("fp8+bf16") == rest + 2 * (qkv + down) + up
    # A plan in one format has every matrix in that, but for those that no format covers.
    assert block.weight_bytes("fp8") == rest + qkv + up + down


def test_a_part_left_out_stays_16_bit_in_every_format() -> None:
    block = Block(attention=replace(ATTENTION, quantised=0, output_quantised=0), ffn=DENSE)
    kept = ATTENTION.parameters + block.norm_parameters
    for name, ffn_bytes in (("bf16", 2 * 210), ("fp8", 210), ("nvfp4", 119), ("mxfp4", 112)):
        assert block.weight_bytes(name) == 2 * kept + ffn_bytes


def test_dense_ffn_counts_gate_and_biases() -> None:
    assert DENSE.parameters == 3 * 70
    assert DENSE.tasks == 7
    assert replace(DENSE, gated=False).parameters == 2 * 70
    assert replace(DENSE, bias=True).parameters == 3 * 70 + 7 + 7 + 10
    assert replace(DENSE, gated=False, bias=True).parameters == 2 * 70 + 7 + 10


def test_moe_ffn_counts_all_experts_but_activates_a_few() -> None:
    assert MOE.tasks == 5
    assert MOE.expert_parameters == 90
    assert MOE.router_parameters == 50
    assert MOE.parameters == 5 * 90 + 50
    assert MOE.active_parameters == 2 * 90 + 50
    assert covered(MOE) == 5 * 90


def test_moe_counts_the_biases_of_experts_and_router() -> None:
    assert replace(MOE, bias=True).parameters == MOE.parameters + 5 * (3 + 3 + 10)
    assert replace(MOE, bias=True).active_parameters == MOE.active_parameters + 2 * (3 + 3 + 10)
    assert replace(MOE, router_bias=True).router_parameters == 50 + 5
    assert covered(replace(MOE, bias=True, router_bias=True)) == covered(MOE)


def test_moe_shared_expert_is_always_active() -> None:
    shared = replace(MOE, shared_intermediate=4, shared_gate=True)
    assert shared.parameters == MOE.parameters + 3 * 10 * 4 + 10
    assert shared.active_parameters == MOE.active_parameters + 3 * 10 * 4 + 10


def test_block_adds_its_cells_and_two_norms() -> None:
    block = Block(attention=ATTENTION, ffn=MOE)
    assert block.cells == (ATTENTION, MOE)
    assert block.norm_parameters == 20
    assert block.parameters == ATTENTION.parameters + MOE.parameters + 20
    assert block.active_parameters == ATTENTION.parameters + MOE.active_parameters + 20
    assert block.is_moe
    assert not Block(attention=ATTENTION, ffn=DENSE).is_moe


def test_model_adds_runs_embedding_head_and_final_norm() -> None:
    tiny = model()
    dense, moe = (run.block for run in tiny.runs)
    assert tiny.layers == 5
    assert tiny.is_moe
    assert tiny.parameters == 110 + 2 * dense.parameters + 3 * moe.parameters + 10 + 110
    assert tiny.active_parameters == 110 + 2 * dense.active_parameters + 3 * moe.active_parameters + 10 + 110
    assert tiny.kv_bytes_per_token(2) == 5 * 16 * 2


def test_tied_head_adds_nothing_but_is_still_multiplied_with() -> None:
    tied = model(tied_embeddings=True)
    assert tied.lm_head_parameters == 0
    assert tied.lm_head_matrix_parameters == 110
    assert tied.parameters == model().parameters - 110


def test_only_block_matrices_shrink_with_the_weight_format() -> None:
    tiny = model(weight_format="fp8")
    assert model().weight_bytes() == 2 * tiny.parameters
    assert tiny.weight_bytes() == 2 * tiny.parameters - tiny.matrix_parameters
    assert tiny.weight_bytes("BF16") == 2 * tiny.parameters
    with pytest.raises(UnknownNameError, match="unknown number format 'fp7'"):
        tiny.weight_bytes("fp7")


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"hidden": 0}, "hidden must be a whole number from 1 to 2147483648, not 0"),
        ({"hidden": -3}, "not -3"),
        ({"query_heads": True}, "query_heads must be a whole number .* not True"),
        ({"head_dim": 4.0}, "head_dim must be a whole number .* not 4.0"),
        ({"head_dim": float("nan")}, "head_dim must be a whole number .* not nan"),
        ({"kv_heads": 4}, "query_heads 6 is not a multiple of kv_heads 4"),
        ({"window": 0}, "window must be a whole number from 1"),
        ({"hidden": 10**6000}, "not a number of thousands of digits"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false, not 1"),
        ({"hidden": 0, "head_dim": -1}, "hidden must .*; head_dim must"),
    ],
)
def test_attention_refuses(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(ATTENTION, **bad)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"q_lora_rank": 0}, "latent attention: q_lora_rank must be a whole number from 1"),
        ({"kv_lora_rank": None}, "kv_lora_rank must be a whole number from 1 to 2147483648, not None"),
        ({"rope_head_dim": 0, "v_head_dim": -1}, "rope_head_dim must .*; v_head_dim must"),
        ({"output_quantised": -1}, "output_quantised must be a whole number from 0 to 12, not -1"),
    ],
)
def test_latent_attention_refuses(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        replace(LATENT, **bad)


def test_norms_over_all_heads_need_norms() -> None:
    with pytest.raises(InputError, match="qk_norm_whole needs qk_norm"):
        replace(ATTENTION, qk_norm_whole=True)


def test_ffns_refuse_what_they_cannot_be() -> None:
    with pytest.raises(InputError, match="intermediate must be a whole number"):
        replace(DENSE, intermediate=2**31 + 1)
    with pytest.raises(InputError, match="gated must be true or false"):
        replace(DENSE, gated=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="experts_per_token 6 is above experts 5"):
        replace(MOE, experts_per_token=6)
    with pytest.raises(InputError, match="shared_intermediate must be a whole number from 0"):
        replace(MOE, shared_intermediate=-1)
    with pytest.raises(InputError, match="shared_gate needs a shared_intermediate"):
        replace(MOE, shared_gate=True)


def test_block_and_run_refuse_what_does_not_fit() -> None:
    for attention in (ATTENTION, LATENT):
        with pytest.raises(InputError, match="attention has hidden 10 but the FFN 12"):
            Block(attention=attention, ffn=replace(DENSE, hidden=12))
    with pytest.raises(InputError, match="count must be a whole number from 1 to 100000, not 0"):
        Run(block=Block(attention=ATTENTION, ffn=DENSE), count=0)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"runs": ()}, "runs is empty"),
        ({"hidden": 12}, r"runs\[0\] has hidden 10, not the model's 12"),
        ({"runs": (Run(block=Block(attention=ATTENTION, ffn=DENSE), count=1),) * 2}, r"runs\[1\] repeats"),
        ({"dtype": "fp8"}, "dtype must be one of bf16, fp16"),
        ({"weight_format": "int3"}, "weight_format must be one of bf16"),
        ({"kv_format": "int8"}, "kv_format must be one of bf16"),
        ({"vocab": 0}, "vocab must be a whole number"),
        ({"tied_embeddings": "no"}, "tied_embeddings must be true or false"),
    ],
)
def test_model_refuses(bad: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        model(**bad)


def test_types_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ATTENTION.hidden = 3  # type: ignore[misc]
