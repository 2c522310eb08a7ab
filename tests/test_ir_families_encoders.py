"""Encoder-decoders and encoders: what they are made of and what a request keeps."""

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


def test_whisper_keeps_its_own_tokens_and_all_of_the_encoders() -> None:
    model = read("whisper-large-v3")
    (run,) = model.runs
    own, cross = run.block.attention.cache()
    assert own.elements == cross.elements == 2 * 1280
    assert (own.fixed_tokens, cross.fixed_tokens) == (0, 1500)
    assert model.kv_bytes_per_token(2) == 32 * 2 * 1280 * 2
    assert model.max_position == 448
    assert model.tower is not None
    assert (model.tower.tokens, model.tower.input_s, model.tower.layers) == (1500, 30.0, 32)


def test_t5_keeps_the_tokens_of_its_prompt_once() -> None:
    model = read("flan-t5-xxl")
    assert len(model.runs[0].block.attention.cache()) == 1
    assert model.tower is not None and model.tower.tokens == 0
    assert not model.tied_embeddings and read("t5-large").tied_embeddings


def test_decoders_of_t5_may_be_deeper_or_not_than_the_encoder() -> None:
    model = read("t5-large", num_decoder_layers=12)
    assert (model.layers, model.tower.layers if model.tower else 0) == (12, 24)


@pytest.mark.parametrize("name", ["bert-large-uncased", "clip-vit-large-patch14"])
def test_encoders_answer_with_a_vector_and_keep_nothing(name: str) -> None:
    model = read(name)
    assert model.pools
    assert model.kv_bytes_per_token(2) == 0


def test_an_encoder_that_is_not_stated_is_refused_by_its_field() -> None:
    with pytest.raises(InputError, match="encoder_layers is missing"):
        read("whisper-large-v3", encoder_layers=None)


@pytest.mark.parametrize(
    ("name", "longest"), [("xlm-roberta-large", 512), ("roberta-large", 512), ("bert-large-uncased", 512)]
)
def test_positions_of_roberta_are_counted_from_behind_the_padding(name: str, longest: int) -> None:
    assert read(name).max_position == longest


def test_distilbert_has_neither_kinds_of_tokens_nor_a_pooler() -> None:
    model = read("distilbert-base")
    assert not model.after
    assert [matrix.name for matrix in model.before] == ["positions", "embedding norm"]


def test_bart_has_norms_and_positions_on_both_sides() -> None:
    model = read("bart-large-cnn")
    assert model.tower is not None
    assert model.before == model.tower.beside
    assert model.before[0].rows == 1026
    assert model.max_position == 1024


def test_modernbert_sees_all_in_every_third_layer() -> None:
    model = read("modernbert-large")
    windows = [run.block.attention.window for run in model.runs for _ in range(run.count)]
    assert windows == [None if layer % 3 == 0 else 128 for layer in range(28)]
    first, *others = [run.block.norm_count for run in model.runs for _ in range(run.count)]
    assert (first, set(others)) == (1, {2})  # the embedding has a norm behind it already
    listed = ["full_attention"] * 28
    assert len(read("modernbert-large", layer_types=listed).runs) == 2


def test_umt5_has_positions_in_every_layer() -> None:
    model, t5 = read("umt5-xxl"), read("umt5-xxl", model_type="t5", architectures=None)
    assert model.tower is not None and t5.tower is not None
    assert model.parameters - t5.parameters == (23 + 23) * 32 * 64


def test_m2m_100_computes_its_positions() -> None:
    bart, m2m = (read("mbart-large-50", model_type=kind, architectures=None) for kind in ("mbart", "m2m_100"))
    assert bart.parameters - m2m.parameters == 2 * (1026 + 2) * 1024


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"activation_function": "gelu"}, "activation_function 'gelu' is not supported; supported: swiglu, silu"),
        ({"num_experts": 8}, "num_experts 8 is not supported"),
        ({"qkv_proj_bias": True}, "qkv_proj_bias true is not supported"),
        ({"n_inner": None}, "n_inner is missing"),
    ],
)
def test_variants_of_nomics_encoder_are_refused_by_name(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        read("nomic-embed-text-v1.5", **changes)
