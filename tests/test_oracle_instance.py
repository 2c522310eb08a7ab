"""A planning problem refuses what cannot be planned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from plan_cases import dense, instance_at, make_model

from apex_opt.errors import UsageError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_formats": ()}, "needs weight formats"),
        ({"kv_formats": ("bf16", "fp8")}, "needs weight formats"),
        ({"weight_formats": ("int3",)}, "unknown weight format 'int3'; known: bf16"),
        ({"kv_formats": ("int4",)}, "unknown KV format 'int4'"),
        ({"max_devices": 0}, "0 is not between 1 and the 8 GPUs"),
        ({"max_devices": 9}, "9 is not between 1 and the 8 GPUs"),
    ],
)
def test_an_instance_refuses_what_it_cannot_plan(change: dict[str, Any], said: str) -> None:
    good = instance_at(make_model((dense(heads=12, kv=4, columns=1536), 12)), None, 8)
    with pytest.raises(UsageError, match=said):
        replace(good, **change)
