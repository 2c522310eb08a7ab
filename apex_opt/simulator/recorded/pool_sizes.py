"""How vLLM puts layers of several kinds into groups, and how many blocks their pool has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from apex_opt.errors import InputError, UsageError
from apex_opt.plans.kv_groups import KvLayer, share_pool
from apex_opt.simulator.recorded.case import whole_numbers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.simulator.api import Implementation


def replay_case(case: Mapping[str, Any], implementation: Implementation) -> dict[str, Any]:
    """Groups, tokens of their blocks and blocks of the pool; of each none where the engine refuses the layers.

    Both implementations ask the same rules, as the kernel takes no part in them.
    """
    (available,) = whole_numbers("available_bytes", [case["available_bytes"]], 1)
    layers = [_layer(place, row) for place, row in enumerate(case["layers"])]
    try:
        found = share_pool(layers, available, hybrid=bool(case["hybrid"]))
    except InputError:
        return {"groups": None, "block_size": None, "num_blocks": None}
    return {
        "groups": [list(group) for group in found.groups],
        "block_size": list(found.block_size),
        "num_blocks": found.blocks,
    }


def _layer(place: int, row: Mapping[str, Any]) -> KvLayer:
    """A layer as the recording has it."""
    if row.get("kind") not in ("full", "window", "state"):
        raise UsageError(f"layer {place}: kind must be full, window or state, got {str(row.get('kind'))[:60]}")
    state = row["kind"] == "state"
    keys = ("block_size", "page_bytes" if state else "token_bytes", *(("window",) if row["kind"] == "window" else ()))
    block, size, *window = whole_numbers(f"layer {place}: {', '.join(keys)}", [row.get(key) for key in keys], len(keys))
    if 0 in (block, size):
        raise UsageError(f"layer {place}: {keys[0]} and {keys[1]} must be from 1")
    return KvLayer(kind=row["kind"], block_size=block, page_bytes=size if state else block * size, window=sum(window))
