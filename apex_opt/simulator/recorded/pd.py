"""Runs recorded from prefill and decode instances of vLLM with the NIXL connector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import UnknownNameError, UsageError, join_faults
from apex_opt.simulator.api import run_disaggregated
from apex_opt.simulator.handover import Handover
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.pools import EnginePool
from apex_opt.simulator.recorded.case import SETTINGS, digest, vllm_settings, whole_numbers
from apex_opt.units import NS_PER_US, ceil_div
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.simulator.api import Implementation
    from apex_opt.simulator.outcome import DisaggregatedOutcome
    from apex_opt.workload.trace import Trace

_SIDES: Final = ("prefill", "decode")
_LINKS: Final = ("none", "fifo")
_NEEDED: Final = (*_SIDES, "instances", "proxy_us", "read_us", "notice_us", "link")
_OF_A_SIDE: Final = (*SETTINGS, "num_gpu_blocks", "law_us")


def replay_case(case: Mapping[str, Any], implementation: Implementation) -> dict[str, Any]:
    """What was recorded of a case, beside its `config` and `trace`."""
    config, rows = case["config"], case["trace"]
    missing = [key for key in _NEEDED if key not in config]
    missing += [f"{side}.{key}" for side in _SIDES for key in _OF_A_SIDE if key not in config.get(side, _OF_A_SIDE)]
    if missing:
        raise UsageError(f"config: missing {', '.join(missing)}")
    if short := [f"row {number}: {len(row)} entries" for number, row in enumerate(rows, 1) if len(row) < 3]:
        raise join_faults("a request has 3", short)
    replicas = whole_numbers("instances", config["instances"], 2)
    prefill, decode = (_pool(config, side, count) for side, count in zip(_SIDES, replicas, strict=True))
    outcome = run_disaggregated(
        prefill, decode, _handover(config), _trace(rows, prefill), log=True, implementation=implementation
    )
    names = [f"{side}{index}" for side, count in zip("PD", replicas, strict=True) for index in range(count)]
    order = np.argsort([row[0] for row in rows], kind="stable")  # as `make_trace` sorts
    return _told(outcome, names, order.tolist())


def _pool(case: Mapping[str, Any], side: str, replicas: int) -> EnginePool:
    """The instances of one kind."""
    config = {**case[side], "idle_poll_us": case.get("idle_poll_us", 0)}
    caching = bool(config.get("prefix_caching", False))
    settings = vllm_settings(config, prefix_caching=caching, sleep="idle_poll_us")
    (blocks,) = whole_numbers("num_gpu_blocks", [config["num_gpu_blocks"]], 1)
    base, token, context = (NS_PER_US * x for x in whole_numbers("law_us", config["law_us"], 3))
    law = linear_law(
        base_ns=base,
        token_ns=token,
        context_ns=context,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    return EnginePool(settings=settings, blocks=blocks - 1, laws=(law,), replicas=replicas)


def _handover(config: Mapping[str, Any]) -> Handover:
    """The proxy and the links."""
    if config["link"] not in _LINKS:
        raise UnknownNameError("config: link", str(config["link"])[:60], _LINKS)
    (proxy,), (notice,) = (whole_numbers(name, [config[name]], 1) for name in ("proxy_us", "notice_us"))
    read, block = whole_numbers("read_us", config["read_us"], 2)
    return Handover(
        proxy_ns=proxy * NS_PER_US,
        read_ns=read * NS_PER_US,
        block_ns=block * NS_PER_US,
        notice_ns=notice * NS_PER_US,
        in_turn=config["link"] == "fifo",
    )


def _trace(rows: Sequence[Any], pool: EnginePool) -> Trace:
    """The requests; with prefix caching also what their prompts say, block by block."""
    size, content = pool.settings.block_size, None
    if pool.settings.prefix_caching:
        # Whole blocks of what all share are alike, and all others are their request's own.
        common = [row[3] // size if len(row) > 3 else 0 for row in rows]
        own = max(common)
        content = []
        for row, shared in zip(rows, common, strict=True):
            count = max(0, ceil_div(row[1], size) - shared)
            content.append([*range(shared), *range(own, own + count)])
            own += count
    return make_trace(
        name="replay",
        arrival_ns=[row[0] * NS_PER_US for row in rows],
        prompt=[row[1] for row in rows],
        output=[row[2] for row in rows],
        content=content,
        content_tokens=0 if content is None else size,
        source="recorded batches",
    )


def _told(outcome: DisaggregatedOutcome, names: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
    """A run in the words of the recordings: microseconds, and requests by their ids."""
    told = [
        [start // NS_PER_US, end // NS_PER_US, [[ids[i], c, h] for i, c, h in rows], sorted(ids[i] for i in lost)]
        for start, end, rows, lost in outcome.steps or ()
    ]
    counts = outcome.steps_per_replica or []
    ends = np.cumsum(counts).tolist()
    steps = {name: told[end - count : end] for name, count, end in zip(names, counts, ends, strict=True)}
    place = np.argsort(ids)  # where a request of the recording is in the run
    us = {
        name: (getattr(outcome, f"{name}_ns")[place] // NS_PER_US).tolist()
        for name in ("first_token", "finish", "prefilled", "forwarded", "read")
    }
    requests = [
        dict(zip(("prefill", "decode", "prefilled", "forwarded", "read"), row, strict=True))
        for row in zip(
            outcome.prefill[place].tolist(),
            outcome.decode[place].tolist(),
            us["prefilled"],
            us["forwarded"],
            [[*times, blocks] for times, blocks in zip(us["read"], outcome.read_blocks[place].tolist(), strict=True)],
            strict=True,
        )
    ]
    return {
        "first_token_us": us["first_token"],
        "finish_us": us["finish"],
        "requests": requests,
        "preemptions": dict(zip(names, outcome.preemptions_of.tolist(), strict=True)),
        "batches": dict(zip(names, counts, strict=True)),
        "batches_sha256": digest(steps),
        "steps": steps,
    }
