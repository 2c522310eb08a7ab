"""Towers that read images: their weights, and when they are told of."""

import json
from pathlib import Path
from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import Model, model_from_config

MODELS = Path(__file__).parent / "cases" / "models"


def read(name: str, **vision: Any) -> Model:
    config = json.loads((MODELS / f"{name}.json").read_text())
    tower = {key: value for key, value in (config["vision_config"] | vision).items() if value is not None}
    return model_from_config(config | {"vision_config": tower}, name, name)


def test_a_tower_that_is_not_stated_in_full_is_not_guessed() -> None:
    assert read("llava-1.5-7b-hf", hidden_size=None).tower is None
    assert read("qwen2.5-vl-7b", window_size=None).tower is None
    assert read("llava-1.5-7b-hf", model_type="newer_vision_model").tower is None


def test_the_decoder_is_counted_without_its_tower() -> None:
    whole, bare = read("llava-1.5-7b-hf"), read("llava-1.5-7b-hf", hidden_size=None)
    assert whole.parameters == bare.parameters


def test_clip_computes_a_square_of_patches_and_a_class() -> None:
    tower = read("llava-1.5-7b-hf").tower
    assert tower is not None
    assert (tower.tokens, tower.merged, tower.layers, tower.heads) == (24 * 24 + 1, 1, 24, 16)


def test_qwen_merges_patches_and_looks_at_windows_in_most_layers() -> None:
    tower = read("qwen2.5-vl-7b").tower
    assert tower is not None
    assert tower.merged == 4
    windows = [run.block.attention.window for run in tower.runs for _ in range(run.count)]
    assert [layer for layer, window in enumerate(windows) if window is None] == [7, 15, 23, 31]
    assert {window for window in windows if window} == {64}


@pytest.mark.parametrize("name", ["llava-1.5-7b-hf", "ministral-3-8b"])
def test_nothing_of_an_image_is_kept_by_its_tower(name: str) -> None:
    tower = read(name).tower
    assert tower is not None
    assert all(not run.block.attention.cache() for run in tower.runs)


QWEN3 = {
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "model_type": "qwen3_vl",
    "num_heads": 16,
    "num_position_embeddings": 2304,
    "out_hidden_size": 2048,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@pytest.mark.parametrize("deep", [[5, 11, 17], [5], []])
def test_qwen3_has_mergers_behind_the_layers_that_it_names(deep: list[int]) -> None:
    """Qwen3-VL-2B has 2,127,532,032 parameters, of which the decoder, Qwen3-1.7B, has 1,720,574,976."""
    config = json.loads((MODELS / "qwen3-vl-2b.json").read_text())
    model = model_from_config(config | {"vision_config": QWEN3 | {"deepstack_visual_indexes": deep}}, "tiny", "tiny")
    assert model.tower is not None
    merger = 2 * 4096 + 4096 * 4097 + 2048 * 4097
    assert model.tower.parameters == 406_957_056 - (3 - len(deep)) * merger


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llava-1.5-7b-hf", "num_attention_heads", 7),
        ("llava-1.5-7b-hf", "image_size", 3),
        ("llava-1.5-7b-hf", "hidden_size", "x"),
        ("llava-1.5-7b-hf", "model_type", ["clip_vision_model"]),
        ("qwen2-vl-7b", "depth", -1),
        ("qwen2.5-vl-7b", "patch_size", float("nan")),
    ],
)
def test_sizes_of_a_tower_that_cannot_be_are_refused_by_name(name: str, field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"^{name}: vision_config\.{field} "):
        read(name, **{field: value})


def test_a_tower_that_is_no_object_is_refused() -> None:
    config = json.loads((MODELS / "llava-1.5-7b-hf.json").read_text())
    with pytest.raises(InputError, match="vision_config must be an object"):
        model_from_config(config | {"vision_config": "x"}, "llava", "llava")
