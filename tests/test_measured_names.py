"""Names of models in measurements: found under the spellings in use, and nothing else taken for them."""

from __future__ import annotations

import pytest

from apex_opt.errors import UnknownNameError
from apex_opt.ir import list_models
from apex_opt.measured.names import find_model, plain_name


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
        ("nvidia/Llama-3.1-70B-Instruct-FP8", "llama-3.1-70b"),
        ("alpindale/Mistral-Large-Instruct-2407-FP8", "mistral-large"),
        ("mistralai/Mixtral-8x22B-Instruct-v0.1", "mixtral-8x22b"),
        ("deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        ("models/llama-3.1-8b/", "llama-3.1-8b"),
        ("nvidia/DeepSeek-V3.1-NVFP4", "deepseek-v3.1"),
    ],
)
def test_a_plain_name_keeps_what_tells_models_apart(text: str, plain: str) -> None:
    assert plain_name(text) == plain


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("meta-llama/Llama-3.1-70B", "llama-3.1-70b"),
        ("Meta-Llama-3.1-70B", "llama-3.1-70b"),
        ("RedHatAI/Qwen3-32B-FP8", "qwen3-32b"),
        ("alpindale/Mistral-Large-Instruct-2407-FP8", "mistral-large-123b"),
        ("Mixtral-8x22B-Instruct-v0.1", "mixtral-8x22b"),
        ("models/mixtral-8x7b", "mixtral-8x7b"),
    ],
)
def test_a_model_is_found_under_the_spellings_in_use(text: str, name: str) -> None:
    assert find_model(text).name == name


def test_every_model_of_the_registry_is_found_by_its_plain_name() -> None:
    for model in list_models():
        found = find_model(f"someone/{model.name.upper()}-Instruct-FP8")
        assert (found.hidden, found.layers, found.parameters) == (model.hidden, model.layers, model.parameters)


@pytest.mark.parametrize("text", ["zhipuai/GLM-99", "", "llama", "Qwen/Qwen99-397B-A17B-Instruct-FP8"])
def test_another_model_is_not_taken_for_one_of_ours(text: str) -> None:
    with pytest.raises(UnknownNameError):
        find_model(text)
