"""Batches recorded from one replica of vLLM: one scheduler over one stage or a pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.errors import UsageError, join_faults
from apex_opt.simulator.api import simulate
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.recorded.case import SETTINGS, digest, times_us, vllm_settings, whole_numbers
from apex_opt.units import NS_PER_US
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.simulator.api import Implementation


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A replayed trace in the format of the recorded batches: lists, microseconds, requests by their index."""

    steps: list[list[Any]]
    first_token_us: list[int]
    finish_us: list[int]
    preemptions: int


def replay(config: dict[str, Any], trace: list[Any], implementation: Implementation = "kernel") -> Replay:
    """Replay a recorded case: engine settings and law as a mapping, requests as rows.

    Parameters
    ----------
    config : mapping with `max_num_seqs`, `max_num_batched_tokens`, `max_model_len`, `chunked_prefill`,
        `long_prefill_token_threshold`, `block_size`, `num_gpu_blocks` (one of them is never handed out),
        `async_scheduling`, `stages`, `stage_weight`, and `law_us = [a, b, c]`: a batch takes
        ``weight * (a + b * tokens + c * context)`` µs on a stage
    trace : rows `[arrival_us, prompt_tokens, output_tokens]`; with `prefix_caching` also the content ids of the
        prompt, one per `hash_block_tokens` tokens
    implementation : "kernel" or "reference"

    Raises
    ------
    UsageError, CapacityError, InputError    settings or requests that no engine accepts
    """
    caching = bool(config.get("prefix_caching", False))
    needed = (*SETTINGS, "num_gpu_blocks", "law_us", *(("hash_block_tokens",) if caching else ()))
    missing = [key for key in needed if key not in config]
    if missing:
        raise UsageError(f"config: missing {', '.join(missing)}")
    short = [f"row {number}: {len(row)} entries" for number, row in enumerate(trace, 1) if len(row) < 3 + caching]
    if short:
        raise join_faults(f"a request has {3 + caching}, with its content ids" if caching else "a request has 3", short)
    settings = vllm_settings(config, prefix_caching=caching)
    (stages,) = whole_numbers("stages", [config.get("stages", 1)], 1)
    weights = config.get("stage_weight", [1] * stages)
    if len(weights) != stages:
        raise UsageError(f"config: {len(weights)} stage weights for {stages} stages")
    weights = whole_numbers("stage_weight", weights, stages)
    (pool,) = whole_numbers("num_gpu_blocks", [config["num_gpu_blocks"]], 1)
    base, token, context = (NS_PER_US * x for x in whole_numbers("law_us", config["law_us"], 3))
    law = linear_law(
        base_ns=base,
        token_ns=token,
        context_ns=context,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
    )
    requests = make_trace(
        name="replay",
        # Multiplied as Python integers: what leaves 63 bits is refused rather than wrapped.
        arrival_ns=[row[0] * NS_PER_US if isinstance(row[0], int) else row[0] for row in trace],
        prompt=[row[1] for row in trace],
        output=[row[2] for row in trace],
        content=[row[3] for row in trace] if caching else None,
        content_tokens=config["hash_block_tokens"] if caching else 0,
        source="recorded batches",
    )
    order = np.argsort([row[0] for row in trace], kind="stable")  # as `make_trace` sorts
    outcome = simulate(
        settings,
        pool - 1,
        [law.scaled(weight) for weight in weights],
        requests,
        log=True,
        implementation=implementation,
    )
    ids = order.tolist()
    steps = [
        [start // NS_PER_US, end // NS_PER_US, [[ids[i], c, h] for i, c, h in rows], sorted(ids[i] for i in lost)]
        for start, end, rows, lost in outcome.steps or ()
    ]
    return Replay(steps=steps, **times_us(outcome, ids), preemptions=outcome.preemptions)


def replay_case(case: Mapping[str, Any], implementation: Implementation) -> dict[str, Any]:
    """What was recorded of a case, beside its `config` and `trace`."""
    found = replay(case["config"], case["trace"], implementation)
    return {
        "steps": found.steps,
        "first_token_us": found.first_token_us,
        "finish_us": found.finish_us,
        "preemptions": found.preemptions,
        "batches": len(found.steps),
        "batches_sha256": digest(found.steps),
    }
