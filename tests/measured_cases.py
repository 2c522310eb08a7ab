"""Measured runs made by the simulator: what a comparison must find no error in."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from apex_opt.simulator import simulate
from apex_opt.units import NS_PER_S

if TYPE_CHECKING:
    from pathlib import Path

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.simulator import Outcome
    from apex_opt.simulator.law import BatchLaw
    from apex_opt.workload.trace import Trace

BLOCKS = 50_000


def recorded(settings: EngineSettings, law: BatchLaw, trace: Trace, blocks: int = BLOCKS) -> dict[str, Any]:
    """A run as vLLM's log and clients would tell of it, had its steps taken what the law says."""
    outcome = simulate(settings, blocks, [law], trace, log=True)
    arrived = np.maximum.accumulate(np.array([start for start, _, _, _ in outcome.steps or ()]))
    assert len(arrived) == outcome.batches
    return {
        "summary": {"energy_J": 100.0},
        "requests": _requests(outcome, trace),
        "iterations": _iterations(outcome, trace, blocks, settings),
    }


def _requests(outcome: Outcome, trace: Trace) -> list[list[float]]:
    columns = (outcome.arrival_ns, outcome.first_token_ns, outcome.finish_ns)
    times = np.stack([column / NS_PER_S for column in columns], axis=1)
    counts = np.stack([trace.prompt, trace.output], axis=1)
    return [[*map(float, t), *map(int, c)] for t, c in zip(times, counts, strict=True)]


def _iterations(outcome: Outcome, trace: Trace, blocks: int, settings: EngineSettings) -> list[list[float]]:
    rows = []
    held: dict[int, int] = {}
    for _, end, chunks, preempted in outcome.steps or ():
        generated = prompts = 0
        for i in preempted:
            held.pop(i, None)
        for i, count, computed in chunks:
            held[i] = -(-computed // settings.block_size)
            if computed >= trace.prompt[i]:
                generated += 1
            if computed - count < trace.prompt[i] <= computed:
                prompts += int(trace.prompt[i])
        for i in [i for i in held if outcome.finish_ns[i] <= end]:
            del held[i]
        used = sum(held.values()) / blocks
        rows.append([end / NS_PER_S, len(held), 0, prompts, generated, len(preempted), used])
    return rows


def engine(settings: EngineSettings, **changes: Any) -> dict[str, Any]:
    """The block of a file that tells how its engine was started."""
    return {
        "model": "models/llama-3.1-8b",
        "quantization": None,
        "num_gpu_blocks": BLOCKS + 1,
        "block_size": settings.block_size,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "chunked": settings.chunked_prefill,
        "async_scheduling": settings.async_scheduling,
        "max_model_len": settings.max_model_len,
        "kv_dtype": "auto",
        **changes,
    }


def write_runs(path: Path, runs: dict[str, Any], block: dict[str, Any]) -> Path:
    """A file of runs."""
    content = json.dumps({"engine": block, "runs": runs}).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path
