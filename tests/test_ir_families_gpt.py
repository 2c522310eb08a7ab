"""Families from before Llama: norms, biases, positions and keys that heads share."""

import json
from pathlib import Path
from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import Model, load_model, model_from_config

MODELS = Path(__file__).parent / "cases" / "models"


def config(name: str, **changes: Any) -> dict[str, Any]:
    """A published configuration, with fields changed, or left out where None."""
    merged = json.loads((MODELS / f"{name}.json").read_text()) | changes
    return {key: value for key, value in merged.items() if value is not None}


def read(name: str, **changes: Any) -> Model:
    return model_from_config(config(name, **changes), name, name)


@pytest.mark.parametrize(
    ("name", "norms", "parallel"),
    [
        ("gpt2", 2, False),
        ("gpt-j-6b", 1, True),
        ("gpt-neox-20b", 2, True),
        ("falcon-7b", 1, True),
        ("falcon-40b", 2, True),
        ("falcon-11b", 1, True),
        ("falcon-rw-7b", 2, False),
        ("phi-2", 1, True),
        ("bloom", 2, False),
    ],
)
def test_blocks_have_the_norms_of_their_family_side_by_side_or_in_turn(name: str, norms: int, parallel: bool) -> None:
    (run,) = read(name).runs
    assert (run.block.norm_count, run.block.parallel) == (norms, parallel)
    assert run.block.norm_bias


def test_gpt_neox_may_have_its_cells_in_turn() -> None:
    assert not read("gpt-neox-20b", use_parallel_residual=False).runs[0].block.parallel


@pytest.mark.parametrize(
    ("name", "kv_heads"),
    [("starcoder", 1), ("falcon-7b", 1), ("falcon-40b", 8), ("falcon-rw-7b", 64), ("gpt2-xl", 25), ("mpt-7b", 32)],
)
def test_heads_share_keys_as_the_family_says(name: str, kv_heads: int) -> None:
    assert read(name).runs[0].block.attention.kv_heads == kv_heads


@pytest.mark.parametrize(("kind", "kv_heads"), [("multiquery_attention", 1), ("grouped_query_attention", 4)])
def test_mpt_tells_which_heads_share_keys(kind: str, kv_heads: int) -> None:
    attention = {"attn_type": kind, "kv_n_heads": 4, "alibi": True}
    assert read("mpt-7b", attn_config=attention).runs[0].block.attention.kv_heads == kv_heads


def test_an_unknown_kind_of_attention_is_refused_by_its_field() -> None:
    with pytest.raises(InputError, match=r"attn_config\.attn_type may be multihead_attention.*not 'linear'"):
        read("mpt-7b", attn_config={"attn_type": "linear"})


def test_positions_that_are_learned_are_weights_and_others_are_not() -> None:
    rows = {name: [m for m in read(name).before if m.name == "positions"] for name in ("gpt2", "opt-13b", "bloom")}
    assert [m.rows for m in rows["gpt2"]] == [1024]
    assert [m.rows for m in rows["opt-13b"]] == [2050]
    assert not rows["bloom"]
    turned = {"attn_type": "multihead_attention", "alibi": False}
    assert read("mpt-7b", attn_config=turned).parameters - read("mpt-7b").parameters == 2048 * 4096


def test_biases_follow_the_fields_of_the_family() -> None:
    plain, biased = read("falcon-7b"), read("falcon-7b", bias=True)
    hidden, heads = 4544, 4544 + 2 * 64
    assert biased.parameters - plain.parameters == 32 * (heads + hidden + 4 * hidden + hidden)
    assert read("starcoder2-3b", use_bias=False).parameters < read("starcoder2-3b").parameters
    assert read("starcoder2-3b", use_bias=None).parameters == read("starcoder2-3b").parameters


def test_a_context_that_no_file_tells_is_the_one_engines_take() -> None:
    assert read("falcon-40b").max_position == 2048
    assert read("falcon-11b").max_position == 8192
    assert read("bloom", seq_length=None).max_position == 2048


def test_a_projected_embedding_is_refused_by_its_field() -> None:
    with pytest.raises(InputError, match="word_embed_proj_dim 512 is not hidden_size 5120"):
        read("opt-13b", word_embed_proj_dim=512)


@pytest.mark.parametrize(
    ("name", "field"),
    [("gpt2", "n_embd"), ("bloom", "n_embed"), ("mpt-7b", "d_model"), ("opt-13b", "ffn_dim"), ("gpt-j-6b", "n_layer")],
)
def test_what_is_missing_is_named_as_the_family_names_it(name: str, field: str) -> None:
    with pytest.raises(InputError, match=f"{field} is missing"):
        read(name, **{field: None})


def test_the_files_are_read_from_disk_too() -> None:
    assert load_model(str(MODELS / "gpt2.json")).family == "gpt2"


@pytest.mark.parametrize(
    ("name", "turned"),
    [
        ("gpt2", False),
        ("opt-13b", False),
        ("bloom", False),
        ("mpt-7b", False),
        ("falcon-rw-7b", False),
        ("falcon-7b", True),
        ("gpt-j-6b", True),
        ("gpt-neox-20b", True),
        ("phi-2", True),
        ("starcoder2-3b", True),
    ],
)
def test_queries_are_turned_where_positions_are_neither_learned_nor_slopes(name: str, turned: bool) -> None:
    assert bool(read(name).runs[0].block.attention.rotary_dim) == turned


@pytest.mark.parametrize(("field", "value"), [("attn_type", ["multihead_attention"]), ("qk_ln", -1), ("alibi", "no")])
def test_mpt_refuses_fields_of_attention_that_are_of_no_kind_it_knows(field: str, value: object) -> None:
    with pytest.raises(InputError, match=rf"attn_config\.{field} "):
        read("mpt-7b", attn_config={field: value})
