"""The brute force: every plan there is, once."""

from __future__ import annotations

import pytest
from plan_cases import random_instance

from apex_opt.oracle.space import space


@pytest.mark.parametrize("seed", range(10))
def test_the_space_lists_every_plan_once_within_the_gpus_and_layers(seed: int) -> None:
    instance = random_instance(seed)
    plans = list(space(instance))
    assert len(set(plans)) == len(plans)
    for plan in plans:
        assert plan.devices <= instance.max_devices
        assert sum(plan.layers) == instance.model.layers
        assert plan.ffn.ep == 1 or instance.model.is_moe
