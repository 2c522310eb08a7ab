"""What recorded cases of every kind share: how their entries are read, and the hash they are compared by."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SETTINGS: Final = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "chunked_prefill",
    "block_size",
    "async_scheduling",
    "long_prefill_token_threshold",
)
"""Entries of a config of vLLM that are settings of the engine by the same name, the last one of its scheduler alone."""


def vllm_settings(config: Mapping[str, Any], *, idle_sleep_us: int = 0, **more: Any) -> EngineSettings:
    """The settings in a config of vLLM.

    Parameters
    ----------
    config : with `SETTINGS`
    idle_sleep_us : int    of `VllmScheduling`
    more : of `EngineSettings`
    """
    *common, own = SETTINGS
    scheduler = VllmScheduling(**{own: config[own]}, idle_sleep_us=idle_sleep_us)
    return EngineSettings(**{key: config[key] for key in common}, scheduler=scheduler, **more)


def digest(found: Any) -> str:
    """The hash by which what was recorded is compared: SHA-256 of their JSON without spaces."""
    return hashlib.sha256(json.dumps(found, separators=(",", ":")).encode()).hexdigest()


def whole_numbers(name: str, values: Sequence[Any], count: int) -> list[int]:
    """So many whole numbers from 0, as they stand in the config of a recorded case.

    Parameters
    ----------
    name : str        of the entry
    values : what stands there
    count : int       how many there must be

    Raises
    ------
    UsageError
    """
    given: list[Any] = list(values) if isinstance(values, list | tuple) else [values]
    good = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 1 << 40 for x in given)
    if len(given) != count or not good:
        raise UsageError(f"config: {name} must be {count} whole number(s) from 0 to 2**40, got {str(values)[:60]}")
    return given
