"""apex_opt.engines.schedulers: what is said of a scheduler is what it does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from simulator_cases import Case, linear, requests

from apex_opt.engines.schedulers import SCHEDULINGS, SglangScheduling, VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings

ENGINE = EngineSettings(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32, block_size=4)


def test_every_scheduler_goes_by_its_own_name() -> None:
    assert list(SCHEDULINGS) == [kind.name for kind in SCHEDULINGS.values()]


@pytest.mark.parametrize("name", SCHEDULINGS)
def test_what_is_said_of_a_scheduler_is_what_it_does(name: str) -> None:
    kind = SCHEDULINGS[name]
    settings = replace(ENGINE, scheduler=kind())
    # Two requests that grow to 7 blocks each, of 8 there are; SGLang admits the second by what the first may generate.
    blocks, later = 8, 0
    if kind is SglangScheduling:
        settings, blocks, later = replace(ENGINE, scheduler=SglangScheduling(schedule_conservativeness=0.01)), 13, 5
    crowded = Case(
        settings=settings, blocks=blocks, laws=(linear(settings, 10),), trace=requests([(0, 12, 16), (later, 12, 16)])
    ).run("reference")
    assert (crowded.preemptions > 0) is kind.preempts
    # A prompt of 20 tokens where one of 20 has taken all but 12.
    split = Case(
        settings=settings, blocks=99, laws=(linear(settings, 10),), trace=requests([(0, 20, 2), (0, 20, 2)])
    ).run("reference")
    assert any(tokens == 12 for _, _, rows, _ in split.steps or () for _, tokens, _ in rows) is kind.splits_prompts
    assert (settings.depth(1), replace(settings, async_scheduling=False).depth(1)) == (1 + kind.forms_ahead, 1)
    if kind.finds_prefixes:
        replace(settings, prefix_caching=True)
    else:
        with pytest.raises(UsageError, match=f"prefix_caching goes with the engines .*vllm.*, not with {name}"):
            replace(settings, prefix_caching=True)


@pytest.mark.parametrize("value", [-1, 1.5, True, "8", None, 1 << 31, float("nan")])
def test_a_threshold_out_of_range_is_named(value: Any) -> None:
    with pytest.raises(UsageError, match="long_prefill_token_threshold"):
        VllmScheduling(long_prefill_token_threshold=value)
