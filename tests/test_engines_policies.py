"""apex_opt.engines.policies: what is said of a policy is what its scheduler does, and all of them can be asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest
from simulator_cases import Case, linear, requests

from apex_opt.arguments import Ask
from apex_opt.engines.policies import POLICIES
from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.reference.schedulers import SCHEDULERS

ENGINE = EngineSettings(max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32, block_size=4)


def test_every_policy_has_its_scheduler_and_can_be_asked_for() -> None:
    assert list(SCHEDULERS) == list(POLICIES) == [policy.name for policy in POLICIES.values()]
    assert get_args(get_type_hints(Ask, include_extras=False)["policy"]) == tuple(POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_said_of_a_policy_is_what_its_scheduler_does(name: str) -> None:
    policy, settings = POLICIES[name], replace(ENGINE, policy=name)
    # Two requests that grow to 7 blocks each, of 8 there are.
    crowded = Case(
        settings=settings, blocks=8, laws=(linear(settings, 10),), trace=requests([(0, 12, 16), (0, 12, 16)])
    ).run("reference")
    assert (crowded.preemptions > 0) is policy.preempts
    # A prompt of 20 tokens where one of 20 has taken all but 12.
    split = Case(
        settings=settings, blocks=99, laws=(linear(settings, 10),), trace=requests([(0, 20, 2), (0, 20, 2)])
    ).run("reference")
    assert any(tokens == 12 for _, _, rows, _ in split.steps or () for _, tokens, _ in rows) is policy.splits_prompts
    assert (settings.depth(1), replace(settings, async_scheduling=False).depth(1)) == (1 + policy.forms_ahead, 1)
    if policy.finds_prefixes:
        replace(settings, prefix_caching=True)
    else:
        with pytest.raises(UsageError, match=f"prefix_caching goes with the policy vllm, not with {name}"):
            replace(settings, prefix_caching=True)
