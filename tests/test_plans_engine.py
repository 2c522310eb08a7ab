"""Engine settings refuse what no engine would start with."""

from __future__ import annotations

from typing import Any

import pytest

from apex_opt.errors import UsageError
from apex_opt.ir import load_model
from apex_opt.plans.engine import EngineSettings, limited
from apex_opt.plans.plan import parse_plan

COUNTS = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [-1, 1.5, True, "8", None, 1 << 31, float("nan")])
def test_a_count_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        EngineSettings(**{name: value})


def test_a_count_of_more_digits_than_python_prints_is_refused_all_the_same() -> None:
    with pytest.raises(UsageError, match="block_size"):
        EngineSettings(block_size=10**6000)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan"), float("inf"), True, "0.9"])
def test_a_share_of_memory_is_above_nothing_and_at_most_all(share: Any) -> None:
    with pytest.raises(UsageError, match="gpu_memory_utilization"):
        EngineSettings(gpu_memory_utilization=share)


def test_least_and_largest_settings_are_accepted() -> None:
    EngineSettings(max_num_seqs=1, max_num_batched_tokens=1, max_model_len=2, block_size=1, gpu_memory_utilization=1)
    EngineSettings(max_model_len=(1 << 31) - 1)


def test_a_budget_below_the_running_sequences_is_refused() -> None:
    EngineSettings(max_num_seqs=256, max_num_batched_tokens=256)
    with pytest.raises(UsageError, match="max_num_batched_tokens 255 is below max_num_seqs 256"):
        EngineSettings(max_num_seqs=256, max_num_batched_tokens=255)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "tokens=100",
            "plan: tokens=100 is below max_num_seqs 1024: .*; name tokens=1024 or more, or seqs=100",
        ),
        ("seqs=9000", "plan: seqs=9000 is above max_num_batched_tokens 8192: .*; name tokens=9000 or more, or "),
        ("seqs=600 tokens=512", "plan: tokens=512 is below seqs=600: "),
        ("tokens=2048", "plan: tokens=2048 has no room for a prompt of up to 4096 tokens .*; name tokens=4096 or more"),
    ],
)
def test_limits_that_a_plan_names_are_refused_in_its_words(words: str, told: str) -> None:
    whole = words == "tokens=2048"
    settings = EngineSettings(chunked_prefill=not whole, max_model_len=4096)
    with pytest.raises(UsageError, match=told):
        limited(settings, parse_plan(f"attn(tp1) ffn(tp1) bf16 {words}", load_model("llama-3.1-8b")))


def test_a_prompt_that_may_not_be_split_must_fit_one_batch() -> None:
    EngineSettings(chunked_prefill=False, max_num_batched_tokens=4096, max_model_len=4096)
    with pytest.raises(UsageError, match="4095 must reach max_model_len 4096"):
        EngineSettings(chunked_prefill=False, max_num_batched_tokens=4095, max_model_len=4096)
