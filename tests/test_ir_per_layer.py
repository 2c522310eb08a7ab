"""Fields that a file states layer by layer: every layer is as if the whole file stated them."""

from __future__ import annotations

from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import Attention, DenseFfn, Model, model_from_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
GEMMA4: dict[str, Any] = LLAMA | {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "head_dim": 16,
    "sliding_window": 32,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
}
STEP: dict[str, Any] = LLAMA | {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "head_dim": 16,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"] * 6,
    "mlp_layer_types": ["dense"] * 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "share_expert_dim": 24,
}


def read(config: dict[str, Any], **changes: Any) -> Model:
    return model_from_config(config | changes, "tiny", "tiny.json")


def layers(model: Model) -> list[Any]:
    return [run.block for run in model.runs for _ in range(run.count)]


def test_layers_take_their_own_fields_and_the_file_s_others() -> None:
    found = layers(read(LLAMA, per_layer_config={"3": {"intermediate_size": 32}, "11": {"num_key_value_heads": 8}}))
    plain = layers(read(LLAMA))
    assert found[3].ffn == DenseFfn(hidden=64, intermediate=32)
    assert found[3].attention == plain[3].attention
    assert found[11].attention == Attention(hidden=64, query_heads=8, kv_heads=8, head_dim=8)
    assert [layer for layer in range(12) if found[layer] != plain[layer]] == [3, 11]


def test_heads_told_for_every_layer_are_those_told_by_kind() -> None:
    by_kind = read(GEMMA4, global_head_dim=32, num_global_key_value_heads=4)
    own = {f"{layer:02d}": {"head_dim": 32, "num_key_value_heads": 4} for layer in (5, 11)}
    assert read(GEMMA4, per_layer_config=own).runs == by_kind.runs
    local = read(STEP, num_sliding_attention_heads=12)
    own = {str(layer): {"num_attention_heads": 12} for layer in range(0, 12, 2)}
    assert read(STEP, per_layer_config=own).runs == local.runs


def test_fields_that_change_nothing_that_is_counted_may_differ() -> None:
    own = {"2": {"rope_theta": 10_000, "skip": []}}
    assert read(LLAMA, per_layer_config=own).runs == read(LLAMA).runs


@pytest.mark.parametrize(
    ("own", "text"),
    [
        ([], "per_layer_config must be an object"),
        ({"12": {"head_dim": 4}}, "per_layer_config.12 must be an object for one of layers 0 to 11"),
        ({"one": {"head_dim": 4}}, "per_layer_config.one must be an object for one of layers 0 to 11"),
        ({"1": 4}, "per_layer_config.1 must be an object for one of layers 0 to 11, not 4"),
        ({"1": {"skip": ["mlp"]}}, "per_layer_config.1 has 'skip', which is not read layer by layer"),
        ({"1": {"hidden_size": 32}}, "per_layer_config.1 has 'hidden_size', which is not read"),
        ({"1": {"intermediate_size": "many"}}, "intermediate_size must be a whole number from 1"),
    ],
)
def test_what_is_not_read_layer_by_layer_is_refused_by_name(own: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        read(LLAMA, per_layer_config=own)
