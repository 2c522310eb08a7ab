"""Mixtures of experts with names of fields of their own."""

import json
from pathlib import Path
from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import Model, model_from_config

MODELS = Path(__file__).parent / "cases" / "models"


def read(name: str, **changes: Any) -> Model:
    merged = json.loads((MODELS / f"{name}.json").read_text()) | changes
    return model_from_config({key: value for key, value in merged.items() if value is not None}, name, name)


def sparse(model: Model) -> list[bool]:
    return [run.block.is_moe for run in model.runs for _ in range(run.count)]


def test_dbrx_needs_the_objects_its_fields_lie_in() -> None:
    with pytest.raises(InputError, match=r"ffn_config is missing"):
        read("dbrx", ffn_config=None)
    with pytest.raises(InputError, match=r"attn_config\.kv_n_heads is missing"):
        read("dbrx", attn_config={})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [False] + [True] * 27),
        ({"moe_layer_start_index": 3, "moe_layer_end_index": 20}, [False] * 3 + [True] * 18 + [False] * 7),
        ({"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 2}, [False, True] * 14),
    ],
)
def test_ernie_tells_which_layers_have_experts(changes: dict[str, int], expected: list[bool]) -> None:
    assert sparse(read("ernie-4.5-21b-a3b", **changes)) == expected


def test_lists_of_hunyuan_may_hold_one_value_alone() -> None:
    with pytest.raises(InputError, match="moe_topk has entries that differ"):
        read("hunyuan-a13b", moe_topk=[8] * 31 + [4])
    assert read("hunyuan-a13b", moe_topk=8).parameters == read("hunyuan-a13b").parameters
    with pytest.raises(InputError, match="use_cla true is not supported"):
        read("hunyuan-a13b", use_cla=True)


def test_hunyuan_without_mixed_layers_has_no_shared_expert() -> None:
    model = read("hunyuan-a13b", use_mixed_mlp_moe=False)
    assert read("hunyuan-a13b").parameters - model.parameters == 32 * 3 * 4096 * 3072


def test_the_router_of_ling_has_a_bias_where_the_file_says_so() -> None:
    plain = read("ling-mini-2.0", moe_router_enable_expert_bias=False)
    assert read("ling-mini-2.0").parameters - plain.parameters == 19 * 256


def test_the_kinds_of_layers_may_be_listed() -> None:
    kinds = ["sparse"] * 2 + ["dense"] * 45
    assert sparse(read("glm-4.7-flash", mlp_layer_types=kinds)) == [True] * 2 + [False] * 45
    with pytest.raises(InputError, match="mlp_layer_types may hold dense and sparse, not 'mixed'"):
        read("glm-4.7-flash", mlp_layer_types=["mixed"] * 47)


def test_a_norm_of_minimax_that_is_not_over_all_heads_is_refused() -> None:
    config = json.loads((MODELS.parents[2] / "apex_opt" / "ir" / "configs" / "minimax-m2.5.json").read_text())
    with pytest.raises(InputError, match=r"qk_norm_type 'per_head' is not supported; supported: per_layer"):
        model_from_config(config | {"qk_norm_type": "per_head"}, "minimax", "minimax")


def test_a_layer_of_longcat_is_two_with_experts_in_the_second() -> None:
    model = read("longcat-flash")
    first, second = model.blocks
    assert [run.count for run in model.runs] == [1] * 56
    assert not first.ffn.experts and second.ffn.experts == 512
    assert second.ffn.experts_per_token == 8  # of 12 chosen among 768, of which 256 only hand on what they get
    assert second.ffn.shared_intermediate == 12288
    assert model.kv_bytes_per_token(2) == 56 * 576 * 2


def test_experts_that_do_something_else_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="zero_expert_type may be identity, not 'drop'"):
        read("longcat-flash", zero_expert_type="drop")
