"""Batches recorded from one replica of vLLM that verifies drafts."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import UnknownNameError, UsageError, join_faults
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator.api import run_deployment
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.pools import EnginePool
from apex_opt.simulator.recorded.case import SETTINGS, digest, times_us, vllm_settings, whole_numbers
from apex_opt.units import NS_PER_US
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from apex_opt.plans.kv_groups import KvGroup
    from apex_opt.simulator.api import Implementation
    from apex_opt.workload.trace import Trace

_METHODS: Final = {"eagle": "eagle", "draft_model": "draft", "ngram": "ngram"}


def replay_case(
    case: Mapping[str, Any], implementation: Implementation, groups: tuple[KvGroup, ...] = ()
) -> dict[str, Any]:
    """What was recorded of a case, beside what it was recorded of.

    Parameters
    ----------
    case, implementation    as of `recorded.replay_case`
    groups : tuple of KvGroup    of layers that share the blocks; none: all layers keep all tokens
    """
    config, rows = case["config"], case["trace"]
    needed = (*SETTINGS, "prefix_caching", "num_gpu_blocks", "law_us", "draft_tokens", "draft_kind")
    if missing := [key for key in needed if key not in config]:
        raise UsageError(f"config: missing {', '.join(missing)}")
    if short := [f"row {number}: {len(row)} entries" for number, row in enumerate(rows, 1) if len(row) != 5]:
        raise join_faults("a request has 5", short)
    if config["draft_kind"] not in _METHODS:
        raise UnknownNameError("kind of drafts", str(config["draft_kind"])[:60], _METHODS)
    if not groups and config["draft_tokens"] == 0:
        raise UsageError("config: draft_tokens is 0; a case of kind spec makes 1 to 8, without drafts it is plain")
    if config["draft_tokens"] and case["accept"] is None:
        raise UsageError("case: accept is missing, a list of accepted drafts for each request")
    order = np.argsort([row[0] for row in rows], kind="stable").tolist()  # as `make_trace` sorts
    settings = vllm_settings(
        config,
        prefix_caching=config["prefix_caching"],
        speculation=Speculation(
            method=_METHODS[config["draft_kind"]],
            draft_tokens=config["draft_tokens"],
            accepted=_counts("accept", case["accept"], order),
            proposed=_counts("proposed", case["proposed"], order) if case["proposed"] is not None else (),
        )
        if config["draft_tokens"]
        else None,
    )
    base, token, context, draft = (NS_PER_US * x for x in whole_numbers("law_us", config["law_us"], 4))
    law = linear_law(
        base_ns=base,
        token_ns=token,
        context_ns=context,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        draft_tokens=config["draft_tokens"],
        draft_ns=draft,
    )
    (blocks,) = whole_numbers("num_gpu_blocks", [config["num_gpu_blocks"]], 1)
    trace = _trace(rows, gcd(*(group.block_size for group in groups)) if groups else settings.block_size)
    pool = EnginePool(settings=replace(settings, kv_groups=groups), blocks=blocks - 1, laws=[law])
    outcome = run_deployment([pool], trace, log=True, implementation=implementation)
    steps: list[list[Any]] = [
        [
            start // NS_PER_US,
            end // NS_PER_US,
            [[order[i], c, held] for i, c, held in scheduled],
            sorted(map(order.__getitem__, lost)),
        ]
        for start, end, scheduled, lost in outcome.steps or ()
    ]
    for number, (step, (free, verified)) in enumerate(zip(steps, outcome.drafted or (), strict=True)):
        step += [free, list(outcome.used[number]) if outcome.used else [blocks - 1 - free]]
        for row, of_drafts in zip(step[2], verified, strict=True):
            row += of_drafts
    return {
        "steps": steps,
        **times_us(outcome, order),
        "preemptions": outcome.preemptions,
        "batches": len(steps),
        "batches_sha256": digest(steps),
        "drafts": sum(row[3] for step in steps for row in step[2]),
        "accepted": sum(max(0, row[4] - 1) for step in steps for row in step[2]),
    }


def _counts(name: str, lists: Sequence[Sequence[int]], order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The lists of the requests, in the order in which these arrive."""
    if len(lists) != len(order):
        raise UsageError(f"{name}: {len(lists)} lists for {len(order)} requests")
    return tuple(tuple(lists[i]) for i in order)


def _trace(rows: Sequence[Sequence[int]], block_size: int) -> Trace:
    """The requests: what is wholly in the shared part of a family is equal, block by block."""
    families = 1 + max((row[3] for row in rows), default=0)
    content = [
        [family] * (own := min(shared, prompt) // block_size) + [families + i] * (-(-prompt // block_size) - own)
        for i, (_, prompt, _, family, shared) in enumerate(rows)
    ]
    return make_trace(
        name="replay",
        arrival_ns=[row[0] * NS_PER_US for row in rows],
        prompt=[row[1] for row in rows],
        output=[row[2] for row in rows],
        content=content,
        content_tokens=block_size,
        source="recorded batches",
    )
