"""Batches recorded from one replica of vLLM whose layers keep different things, with drafts and without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from apex_opt.errors import UsageError
from apex_opt.plans.kv_groups import KvGroup, LayerKind, StateMode
from apex_opt.simulator.recorded import spec
from apex_opt.simulator.recorded.case import whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.simulator.api import Implementation


def replay_case(case: Mapping[str, Any], implementation: Implementation) -> dict[str, Any]:
    """What was recorded of a case, beside what it was recorded of."""
    rows = case["config"].get("groups")
    if not rows:
        raise UsageError("config: groups must list the groups of layers, got none")
    groups = tuple(_group(place, row) for place, row in enumerate(rows))
    return spec.replay_case(case, implementation, groups)


def _group(place: int, row: Mapping[str, Any]) -> KvGroup:
    """A group as the recording has it."""
    kind: Any = row.get("kind")
    mode: Any = row.get("mode", "none")
    if kind not in get_args(LayerKind) or mode not in get_args(StateMode):
        raise UsageError(
            f"group {place}: kind must be {', '.join(get_args(LayerKind))} and mode {', '.join(get_args(StateMode))}, "
            f"got {str(kind)[:60]} and {str(mode)[:60]}"
        )
    size, window = whole_numbers(f"group {place}: block_size, window", [row.get("block_size"), row.get("window", 0)], 2)
    if size == 0 or (kind in ("window", "chunk")) != (window > 0):
        raise UsageError(f"group {place}: block_size is from 1, and window from 1 for windows and chunks alone")
    return KvGroup(kind=kind, block_size=size, window=window, mode=mode)
