"""Transformer IR: counts of weights and tasks, and what the types refuse."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.ir import Attention, Block, DenseFfn, LatentAttention, Model, MoeFfn, Run

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
