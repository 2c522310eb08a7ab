"""Dense families of today and of types that transformers no longer carries."""

import json
from pathlib import Path
from typing import Any

import pytest

from apex_opt.ir import Model, model_from_config

MODELS = Path(__file__).parent / "cases" / "models"


def read(name: str, **changes: Any) -> Model:
    merged = json.loads((MODELS / f"{name}.json").read_text()) | changes
    return model_from_config({key: value for key, value in merged.items() if value is not None}, name, name)


@pytest.mark.parametrize(("name", "norms"), [("glm-4-9b-0414", 4), ("glm-4-9b-chat-hf", 2), ("olmo-7b", 0)])
def test_layers_have_as_many_norms_as_their_family(name: str, norms: int) -> None:
    assert read(name).runs[0].block.norm_count == norms


def test_qwen_states_the_width_of_gate_and_up_projection_together() -> None:
    assert read("qwen-7b").runs[0].block.ffn.intermediate == 22016 // 2


def test_chatglm_shares_keys_where_it_says_so() -> None:
    assert read("chatglm3-6b").runs[0].block.attention.kv_heads == 2
    assert read("chatglm3-6b", multi_query_attention=False).runs[0].block.attention.kv_heads == 32


@pytest.mark.parametrize("name", ["qwen-7b", "chatglm3-6b", "glm-4-9b-0414"])
def test_biases_of_queries_keys_and_values_alone(name: str) -> None:
    attention = read(name).runs[0].block.attention
    assert (attention.qkv_bias, attention.output_bias) == (True, False)


def test_internlm_has_biases_in_attention_where_its_file_says_so() -> None:
    biased, plain = read("internlm-7b"), read("internlm-7b", bias=False)
    assert biased.parameters - plain.parameters == 32 * 4 * 4096
    assert biased.parameters == 7_321_948_160
    assert read("xverse-7b").runs[0].block.attention == plain.runs[0].block.attention


def test_seed_oss_tells_the_bias_of_the_output_apart() -> None:
    attention = read("seed-oss-36b").runs[0].block.attention
    assert (attention.qkv_bias, attention.output_bias) == (True, False)
    attention = read("seed-oss-36b", attention_out_bias=True).runs[0].block.attention
    assert attention.output_bias


def test_heads_of_gemma_are_as_wide_as_its_class_says() -> None:
    assert read("gemma-7b", head_dim=None).parameters == read("gemma-7b").parameters


@pytest.mark.parametrize("name", ["gemma-2b", "smollm3-3b", "ernie-4.5-0.3b", "phi-3-small-8k"])
def test_heads_are_tied_where_the_family_ties_them(name: str) -> None:
    assert read(name, tie_word_embeddings=None).tied_embeddings


def test_a_text_config_of_ministral_3_is_read_within_its_wrapper() -> None:
    model = read("ministral-3-8b")
    assert model.parameters == pytest.approx(8.49e9, rel=0.001)
    assert model.max_position == 262144
