"""What recorded cases of every kind share: how their entries are read, and the hash they are compared by."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.engines.schedulers import VllmScheduling
from apex_opt.errors import UsageError
from apex_opt.plans.engine import EngineSettings
from apex_opt.units import NS_PER_US

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.simulator.outcome import Outcome

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

_FORMS: Final[dict[str, tuple[Any, ...]]] = {
    "true or false": (
        bool,
        *("async_scheduling", "chunked_prefill", "ignore_eos", "mixed_chunk", "overlap", "prefix_caching"),
        *("radix_cache", "hybrid"),
    ),
    "a whole number": (
        int,
        *("block_size", "chunked_prefill_size", "control_us", "draft_tokens", "front_ends", "idle_poll_us"),
        *("idle_sleep_us", "long_prefill_token_threshold", "max_model_len", "max_num_batched_tokens", "max_num_seqs"),
        *("max_prefill_tokens", "max_running_requests", "notice_us", "num_gpu_blocks", "num_pages", "page_size"),
        *("proxy_us", "ranks", "send_us", "shared_groups", "shared_prefix", "stages", "sync_us", "window"),
    ),
    "a word": (
        str,
        *("draft_kind", "dummy_returns", "graphs", "kind", "link", "mode", "model", "routing", "schedule_policy"),
    ),
    "a list": (list, "capture_sizes", "graph_us", "groups", "instances", "law_us", "layers", "read_us", "stage_weight"),
    "a mapping": (dict, "config", "decode", "prefill"),
}
_FORM_OF: Final[dict[str, tuple[str, type]]] = {
    name: (form, kind) for form, (kind, *names) in _FORMS.items() for name in names
}
_LARGEST: Final = 1 << 62


def check_forms(case: Mapping[str, Any]) -> None:
    """Refuse a case whose entries are not of the form that recordings have, as a stranger may have written it.

    Raises
    ------
    UsageError    the first entry of another form, by its name
    """
    _check_entries(case, "")
    if "trace" in case:
        _check_rows("trace", case["trace"], content=True)
    for name in ("accept", "proposed"):
        if case.get(name) is not None:
            _check_rows(name, case[name])


def _check_entries(entries: Mapping[str, Any], where: str) -> None:
    """Those of a mapping, and of the mappings in it."""
    for name, value in entries.items():
        if name not in _FORM_OF:
            continue
        form, kind = _FORM_OF[name]
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits:
            raise UsageError(f"case: {where}{name} must be {form}, got {str(value)[:60]!r}")
        if kind is int and abs(value) >= _LARGEST:
            raise UsageError(f"case: {where}{name} must be below 2**62, got {str(value)[:60]}")
        if kind is dict:
            _check_entries(value, f"{where}{name}.")
        for place, row in enumerate(value if name in ("groups", "layers") else ()):
            if not isinstance(row, dict):
                raise UsageError(f"case: {where}{name}: entry {place} must be a mapping, got {str(row)[:60]!r}")


def _check_rows(name: str, rows: Any, content: bool = False) -> None:
    """Lists of whole numbers from 0, one for each request; a fourth entry may be a list itself, of content ids."""
    if not isinstance(rows, list):
        raise UsageError(f"case: {name} must be a list with a row for each request, got {str(rows)[:60]!r}")
    for place, row in enumerate(rows):
        numbers = row if isinstance(row, list) else [None]
        if content and len(numbers) == 4 and isinstance(numbers[3], list):
            numbers = [*numbers[:3], *numbers[3]]
        if not numbers or not all(
            isinstance(x, int) and not isinstance(x, bool) and 0 <= x < _LARGEST for x in numbers
        ):
            raise UsageError(
                f"case: {name}: row {place} must be a list of whole numbers from 0, below 2**62, got {str(row)[:60]!r}"
            )


def vllm_settings(config: Mapping[str, Any], *, sleep: str = "idle_sleep_us", **more: Any) -> EngineSettings:
    """The settings in a config of vLLM.

    Parameters
    ----------
    config : with `SETTINGS`
    sleep : str    the entry that tells how long the engine sleeps after a turn that scheduled nothing; absent: not
    more : of `EngineSettings`
    """
    *common, own = SETTINGS
    (sleep_us,) = whole_numbers(sleep, [config.get(sleep, 0)], 1)
    scheduler = VllmScheduling(**{own: config[own]}, idle_sleep_us=sleep_us)
    return EngineSettings(**{key: config[key] for key in common}, scheduler=scheduler, **more)


def digest(found: Any) -> str:
    """The hash by which what was recorded is compared: SHA-256 of their JSON without spaces."""
    return hashlib.sha256(json.dumps(found, separators=(",", ":")).encode()).hexdigest()


def times_us(outcome: Outcome, order: Sequence[int]) -> dict[str, list[int]]:
    """When each request got its first token and its last, by their index in the recording, which arrive in an order."""
    places = np.argsort(order)
    return {
        "first_token_us": (outcome.first_token_ns // NS_PER_US)[places].tolist(),
        "finish_us": (outcome.finish_ns // NS_PER_US)[places].tolist(),
    }


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
