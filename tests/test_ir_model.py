"""Transformer IR: counts of weights and tasks, and what the types refuse."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from apex_opt.errors import InputError, UnknownNameError
from apex_opt.ir import Attention, Block, DenseFfn, LatentAttention, Model, MoeFfn, Run, Skipped
from apex_opt.ir.cells import Kept, Matrix, State

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
    rest = 2 * (output + block.own_parameters)
    assert block.weight_bytes("nvfp4+fp8") == rest + qkv + down + -(-up * 9 // 16)
    assert block.weight_bytes("fp8+bf16") == rest + 2 * (qkv + down) + up
    # A plan in one format has every matrix in that, but for those that no format covers.
    assert block.weight_bytes("fp8") == rest + qkv + up + down


def test_a_part_left_out_stays_16_bit_in_every_format() -> None:
    block = Block(attention=replace(ATTENTION, quantised=0, output_quantised=0), ffn=DENSE)
    kept = ATTENTION.parameters + block.own_parameters
    for name, ffn_bytes in (("bf16", 2 * 210), ("fp8", 210), ("nvfp4", 119), ("mxfp4", 112)):
        assert block.weight_bytes(name) == 2 * kept + ffn_bytes


def test_block_adds_its_cells_and_two_norms() -> None:
    block = Block(attention=ATTENTION, ffn=MOE)
    assert block.cells == (ATTENTION, MOE)
    assert block.own_parameters == 20
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
    with pytest.raises(InputError, match="count must be a whole number from 1 to 4096, not 0"):
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


def test_a_layer_that_lacks_a_cell_has_nothing_in_its_place() -> None:
    gone = Skipped(hidden=10)
    mixing, feeding = Block(attention=ATTENTION, ffn=gone), Block(attention=gone, ffn=MOE)
    assert (mixing.parameters, mixing.active_parameters) == (ATTENTION.parameters + 10,) * 2
    assert (feeding.parameters, feeding.active_parameters) == (MOE.parameters + 10, MOE.active_parameters + 10)
    assert (mixing.is_moe, feeding.is_moe) == (False, True)
    apart = model(runs=(Run(block=mixing, count=2), Run(block=feeding, count=2)))
    assert apart.kv_bytes_per_token(2) == 2 * 16 * 2
    with pytest.raises(InputError, match="attention has hidden 10 but the FFN 12"):
        Block(attention=ATTENTION, ffn=Skipped(hidden=12))


def test_a_layer_tells_of_its_norms_and_what_else_it_has() -> None:
    plain = Block(attention=ATTENTION, ffn=DENSE)
    assert replace(plain, norms=4).parameters == plain.parameters + 20
    assert [op.row_bytes for op in replace(plain, norms=4).own_operations] == [40.0, 40.0]
    assert replace(plain, norm_bias=True).parameters == plain.parameters + 20
    assert replace(plain, norms=0).parameters == plain.parameters - 20
    assert plain.own_operations == replace(plain, norms=1).own_operations == ()
    assert replace(plain, beside=(Matrix("gate", 3, 10),)).weight_bytes("fp8") == plain.weight_bytes("fp8") + 2 * 30
    shared = replace(plain, parallel=True, norms=1)
    assert (plain.shares_norm, shared.shares_norm, replace(plain, parallel=True).shares_norm) == (False, True, False)
    with pytest.raises(InputError, match="one_sum needs parallel"):
        replace(plain, one_sum=True)


def test_a_model_has_weights_before_and_after_its_layers() -> None:
    tiny = model(before=(Matrix("positions", 100, 10),), after=(Matrix("head bias", 11, 1),))
    assert tiny.parameters == model().parameters + 1000 + 11
    assert tiny.active_parameters == model().active_parameters + 1000 + 11
    assert (tiny.before_parameters, tiny.after_parameters) == (1000, 10 + 11)
    assert tiny.weight_bytes() == model().weight_bytes() + 2 * 1011
    biased = Block(attention=ATTENTION, ffn=DENSE, norm_bias=True)
    assert model(runs=(Run(block=biased, count=1),)).after_parameters == 20


def test_what_is_kept_by_sequence_is_not_counted_by_token() -> None:
    kept, state = Kept(16, None, other_bytes=3), State(100, draft_size=7)
    assert (kept.token_bytes(2), kept.sequence_bytes(5)) == (35, 0)
    assert (state.token_bytes(2), state.sequence_bytes(), state.sequence_bytes(2)) == (0, 100, 114)
