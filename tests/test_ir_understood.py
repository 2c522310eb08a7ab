"""What a file states is read, changes nothing, or is refused by its name: newer kinds of layer are never guessed away.

`cases/classes.json` has the defaults of the configuration classes of `transformers` 5.24.0 for the families that are
read, and what those of 4.57.6 write into every file; what is null, false, zero or empty is left out.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import Model, model_from_config
from apex_opt.ir.families import FAMILIES
from apex_opt.ir.understood import IDLE

CASES = Path(__file__).parent / "cases"
CLASSES: dict[str, Any] = json.loads((CASES / "classes.json").read_text(encoding="utf-8"))
NEWER: dict[str, object] = {
    "attention_sink_size": 4,
    "layer_kinds": ["full", "folded"] * 16,
    "moe_latent_dim": 512,
    "num_hyper_connections": 4,
    "mtp_kind": "tree",
    "use_gated_thing": True,
    "expansion_ratio": 2.5,
    "ffn_type": "product-key",
    "kv_sharing_config": {"every": 2},
    "num_memory_tokens": 16,
}
"""Fields as those of families that are yet to come."""
NAMES = ("llama-3.1-8b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b")
OTHERS = ("kimi-k3", "nemotron-h-56b", "gemma-4-26b-a4b", "deepseek-v4-flash", "falcon-h1-7b", "whisper-large-v3")


def case(name: str) -> dict[str, Any]:
    """A published configuration of the tests, or of the registry."""
    files = (CASES / "models" / f"{name}.json", Path("apex_opt/ir/configs") / f"{name}.json")
    file = next(file for file in files if file.exists())
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def read(config: dict[str, Any]) -> Model:
    return model_from_config(config, "tiny", "tiny.json")


def changed(name: str, **fields: object) -> dict[str, Any]:
    """A published configuration whose decoder has these fields too."""
    config = case(name)
    return {**config, "text_config": config["text_config"] | fields} if "text_config" in config else config | fields


@pytest.mark.parametrize("field", NEWER)
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_a_field_that_no_reader_asks_for_is_refused_by_its_name(name: str, field: str) -> None:
    with pytest.raises(InputError, match=rf"{field} is not understood and may change what is counted \(it is "):
        read(changed(name, **{field: NEWER[field]}))


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", [], {}])
def test_what_says_that_there_is_none_changes_nothing(value: object) -> None:
    plain = read(case("llama-3.1-8b"))
    assert read(case("llama-3.1-8b") | dict.fromkeys(NEWER, value)) == plain


def test_all_fields_that_are_not_understood_are_named_at_once() -> None:
    with pytest.raises(InputError) as raised:
        read(case("llama-3.1-8b") | NEWER)
    assert str(raised.value).count("is not understood") == 5 and "and 5 more" in str(raised.value)


def test_a_fault_is_told_before_what_its_reader_did_not_come_to() -> None:
    with pytest.raises(InputError) as raised:
        read(case("deepseek-v3") | {"kv_lora_rank": None})
    assert "kv_lora_rank is missing" in str(raised.value) and "understood" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("mpt-7b", "attn_config", {"attn_type": "multihead_attention", "window": 8}, "attn_config.window is not"),
        ("dbrx", "ffn_config", {"moe_latent": 8}, "ffn_config.moe_latent is not"),
        ("kimi-k3", "linear_attn_config", {"state_rank": 8}, "linear_attn_config.state_rank is not"),
        ("llama-3.1-8b", "attention_bias_rank", 2, "attention_bias_rank is not"),
        ("llama-3.1-8b", "a\nb" * 100, 2, r"'a\\nb"),
    ],
)
def test_objects_that_are_read_are_read_field_by_field(name: str, field: str, value: Any, said: str) -> None:
    config = case(name)
    held = config.get("text_config", config).get(field)
    with pytest.raises(InputError, match=re.escape(said) if "\\" not in said else said):
        read(changed(name, **{field: {**held, **value} if isinstance(held, dict) else value}))


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias true is not supported in this family"),
        ("mistral", {"use_qk_norm": True}, "use_qk_norm true is not supported in this family"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts is not understood"),
        ("qwen2", {"attention_bias": False}, "attention_bias false is not supported in this family"),
        ("qwen3", {"use_qk_norm": False}, "use_qk_norm false is not supported in this family"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is not understood"),
        ("gemma3_text", {"use_bidirectional_attention": True, "sliding_window": 64}, "use_bidirectional_attention is"),
    ],
)
def test_what_a_family_has_always_or_never_is_not_told_otherwise(
    model_type: str, fields: dict[str, object], said: str
) -> None:
    config = case("llama-3.1-8b") | {"model_type": model_type, "architectures": [FAMILIES[model_type].architecture]}
    read(config | dict.fromkeys(fields) | ({"sliding_window": 64} if model_type != "stablelm" else {}))
    with pytest.raises(InputError, match=said):
        read(config | fields)


def test_a_window_of_a_family_without_any_is_refused_where_it_would_hide_tokens() -> None:
    # vLLM 0.20.2 starts Llama 3.1 8B with a window of 1,024 in 8.6 GiB of cache for 131,072 tokens, and not without.
    config = case("llama-3.1-8b")
    with pytest.raises(InputError, match="sliding_window 1024 is not supported in this family"):
        read(config | {"sliding_window": 1024})
    for harmless in ({"sliding_window": 131_072}, {"sliding_window": 1024, "use_sliding_window": False}):
        assert read(config | harmless) == read(config)


def test_a_decoder_of_paligemma_is_read_with_what_it_says_of_images() -> None:
    config = case("gemma-2b")
    assert read(config | {"num_image_tokens": 256, "use_bidirectional_attention": True}) == read(config)


@pytest.mark.parametrize("release", [key for key in CLASSES if key != "types"])
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_what_transformers_writes_into_every_file_changes_nothing(name: str, release: str) -> None:
    assert read(changed(name, **CLASSES[release])) == read(case(name))


@pytest.mark.parametrize("model_type", CLASSES["types"])
def test_the_classes_of_transformers_are_read_with_all_their_fields(model_type: str) -> None:
    """Fields of a class are read, change nothing, or are at the value that is read: no default is refused."""
    config = {**CLASSES["types"][model_type], "vocab_size": CLASSES["types"][model_type].get("vocab_size", 32_000)}
    assert read(config).layers > 0


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [("llama", "LlamaMoDForCausalLM"), ("deepseek_v3", "DeepseekV5ForCausalLM"), ("qwen3_moe", "Qwen5MoeForCausalLM")],
)
def test_a_class_that_is_not_known_is_refused_though_its_type_is(model_type: str, architecture: str) -> None:
    name = {"llama": "llama-3.1-8b", "deepseek_v3": "deepseek-v3", "qwen3_moe": "qwen3-30b-a3b"}[model_type]
    config = case(name)
    with pytest.raises(InputError, match=f"architectures '{architecture}' is not known, and engines go by it"):
        read(config | {"architectures": [architecture]})
    shouted = FAMILIES[model_type].architecture.replace("For", "_For").replace("Llama", "LLaMA")
    assert read(config | {"architectures": [shouted]}) == read(config)


def test_a_class_that_engines_run_as_that_of_the_family_is_read() -> None:
    config = case("chatglm3-6b")
    assert read(config | {"architectures": ["ChatGLMForConditionalGeneration"]}) == read(config)


def test_names_that_change_nothing_are_told_in_the_documents() -> None:
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
    for kind in IDLE:
        assert f"| {kind} |" in page
