"""The longest context, as vLLM derives it."""

import csv
from pathlib import Path
from typing import Any

import pytest

from apex_opt.errors import InputError
from apex_opt.ir import load_model, read_config
from apex_opt.ir.context import context_limit
from apex_opt.ir.fields import Fields


def limit(length: int, **fields: Any) -> int:
    found = Fields({"max_position_embeddings": length, **fields})
    derived = context_limit(found)
    assert not found.faults
    return derived


@pytest.mark.parametrize(
    ("length", "scaling", "expected"),
    [
        (32768, None, 32768),
        # Qwen2.5 by its card: scaled, though the file keeps the length it was trained on.
        (32768, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072),
        (32768, {"rope_type": "yarn", "factor": 4.0}, 131072),
        # DeepSeek-V3 and gpt-oss state the scaled length, and are not scaled once more.
        (163840, {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}, 163840),
        (131072, {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        (4096, {"type": "linear", "factor": 4.0}, 16384),
        (4096, {"type": "dynamic", "factor": 2.0}, 8192),
        (131072, {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072),
        (131072, {"type": "longrope", "factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        (131072, {"type": "su", "short_factor": [1.0]}, 131072),
        (32768, {"type": "mrope", "mrope_section": [16, 24, 24]}, 32768),
        (8192, {"rope_type": "default", "rope_theta": 10000.0}, 8192),
        (2048, {"type": "linear", "factor": 1.5}, 3072),
        (4096, {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {}}, 8192),
    ],
)
def test_scaling_extends_the_limit_unless_the_file_states_the_scaled_one(
    length: int, scaling: dict[str, Any] | None, expected: int
) -> None:
    assert limit(length, rope_scaling=scaling) == expected
    assert limit(length, rope_parameters=scaling) == expected
    assert limit(length, rope_scaling=scaling, rope_parameters={"rope_type": "linear", "factor": 3}) in (
        expected,
        3 * length,
    )


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("llama-3.1-8b", 131072),
        ("llama-3.1-70b", 131072),
        ("mixtral-8x7b", 32768),
        ("qwen3-8b", 40960),
        ("qwen3-30b-a3b", 40960),
        ("deepseek-v3", 163840),
        ("kimi-k2", 131072),
        ("gpt-oss-20b", 131072),
    ],
)
def test_known_models_have_the_length_that_vllm_was_recorded_to_derive(name: str, length: int) -> None:
    assert load_model(name).max_position == length


def test_the_least_of_several_lengths_holds() -> None:
    assert limit(4096, max_sequence_length=2048) == 2048
    assert limit(4096, max_sequence_length=16384, rope_scaling={"type": "linear", "factor": 4.0}) == 16384


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "max_position_embeddings is missing"),
        ({"max_position_embeddings": 8, "rope_scaling": []}, None),
        ({"max_position_embeddings": 8, "rope_scaling": "yarn"}, "rope_scaling must be an object"),
        ({"max_position_embeddings": 8, "rope_scaling": {"factor": "4"}}, "factor must be a number above 0, not '4'"),
        ({"max_position_embeddings": 8, "rope_scaling": {"factor": -1}}, "factor must be a number above 0, not -1"),
        ({"max_position_embeddings": 8, "rope_scaling": {"factor": True}}, "factor must be a number above 0"),
        ({"max_position_embeddings": 8, "rope_scaling": {"factor": float("nan")}}, "not nan"),
        ({"max_position_embeddings": 8, "rope_scaling": {"factor": 10**400}}, "factor must be a number above 0"),
        (
            {"max_position_embeddings": 2**30, "rope_scaling": {"factor": 2**30}},
            "makes a context of 115292150460",
        ),
        *(
            (
                {
                    "max_position_embeddings": 8,
                    "model_type": kind,
                    "rope_scaling": {"type": "linear", "factor": factor},
                },
                "rope_scaling.factor must be a number above 0",
            )
            for kind in ("llama", "gemma3_text")
            for factor in (float("nan"), float("inf"), -1, 10**400)
        ),
        ({"max_position_embeddings": 8, "rope_scaling": {"factor": 0.01}}, "makes a context of 0 tokens"),
        (
            {"max_position_embeddings": 8, "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 0}},
            "rope_scaling.original_max_position_embeddings must be a whole number from 1",
        ),
    ],
)
def test_lengths_that_are_none_are_refused(fields: dict[str, Any], text: str | None) -> None:
    found = Fields(fields)
    context_limit(found)
    assert [text in fault for fault in found.faults] == [True] if text else not found.faults


@pytest.mark.data
def test_lengths_that_vllm_derived_by_itself_are_those_derived_here(shared: Path) -> None:
    with (shared / "startable" / "startable_dev.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if "--max-model-len" not in row["arguments"]]
    derived = {row["config"]: int(row["max_model_len"]) for row in rows if row["max_model_len"]}
    found = {}
    for config in derived:
        try:
            found[config] = read_config(shared / "cases" / "configs" / config).max_position
        except InputError:
            continue  # Registered by another name, or of a family that is not described.
    assert len(found) >= 4
    assert found == {config: derived[config] for config in found}


@pytest.mark.parametrize("kind", [5, [], {"yarn": 1}])
def test_a_kind_of_scaling_that_is_no_text_is_refused(kind: object) -> None:
    for key in ("rope_scaling", "rope_parameters"):
        found = Fields({"max_position_embeddings": 4096, key: {"rope_type": kind, "factor": 4.0}})
        assert context_limit(found) == 0
        (fault,) = found.faults
        assert fault.startswith(f"{key}.rope_type must be text")


def test_a_factor_of_an_unknown_kind_of_scaling_is_refused_by_the_kind() -> None:
    found = Fields({"max_position_embeddings": 4096, "rope_scaling": {"rope_type": "spiral", "factor": 4.0}})
    assert context_limit(found) == 0
    (fault,) = found.faults
    assert fault.startswith("rope_scaling.rope_type may be default, linear")
    assert fault.endswith("not 'spiral'")


@pytest.mark.parametrize("called", ["type", "rope_type"])
def test_a_kind_of_scaling_is_refused_by_the_name_that_the_file_gives_it(called: str) -> None:
    found = Fields({"max_position_embeddings": 4096, "rope_scaling": {called: "spiral", "factor": 2.0}})
    context_limit(found)
    assert found.faults[0].startswith(f"rope_scaling.{called} may be ")
