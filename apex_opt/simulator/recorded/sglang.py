"""Batches recorded from SGLang's scheduler: one stage, with a clock of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.engines.schedulers import SglangScheduling
from apex_opt.errors import UsageError, join_faults
from apex_opt.plans.engine import EngineSettings
from apex_opt.simulator.api import simulate
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.recorded.case import digest, times_us, whole_numbers
from apex_opt.simulator.tokens import TokenContent
from apex_opt.units import NS_PER_US
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.simulator.api import Implementation

_OWN: Final = ("max_prefill_tokens", "schedule_policy", "schedule_conservativeness", "mixed_chunk", "ignore_eos")
_NEEDED: Final = (
    *_OWN,
    "page_size",
    "num_pages",
    "max_running_requests",
    "chunked_prefill_size",
    "max_model_len",
    "overlap",
    "radix_cache",
    "shared_prefix",
    "shared_groups",
    "law_us",
)


def replay_case(case: Mapping[str, Any], implementation: Implementation) -> dict[str, Any]:
    """What was recorded of a case, beside its `config` and `trace`.

    Parameters
    ----------
    case : mapping with `config`, settings by the names that SGLang gives them, and `trace`, rows `[arrival_us,
        prompt_tokens, output_tokens, max_new_tokens]`
    implementation : "kernel" or "reference"

    Raises
    ------
    UsageError, CapacityError, InputError    settings or requests that no engine accepts
    """
    config, rows = case["config"], case["trace"]
    if missing := [key for key in _NEEDED if key not in config]:
        raise UsageError(f"config: missing {', '.join(missing)}")
    if short := [f"row {number}: {len(row)} entries" for number, row in enumerate(rows, 1) if len(row) < 4]:
        raise join_faults("a request has 4", short)
    requests = make_trace(
        name="replay",
        # Multiplied as Python integers: what leaves 63 bits is refused rather than wrapped.
        arrival_ns=[row[0] * NS_PER_US for row in rows],
        prompt=[row[1] for row in rows],
        output=[row[2] for row in rows],
        max_new_tokens=[row[3] for row in rows],
        source="recorded batches",
    )
    order = np.argsort([row[0] for row in rows], kind="stable").tolist()  # as `make_trace` sorts
    settings = _settings(config, requests.longest)
    base, token, context = (NS_PER_US * x for x in whole_numbers("law_us", config["law_us"], 3))
    limits = {"max_num_seqs": settings.max_num_seqs, "max_num_batched_tokens": settings.max_num_batched_tokens}
    law = linear_law(base_ns=base, token_ns=token, context_ns=context, **limits)
    (pages,) = whole_numbers("num_pages", [config["num_pages"]], 1)
    content = _content(config, [rows[i] for i in order], order)
    outcome = simulate(settings, pages, [law], requests, log=True, content=content, implementation=implementation)
    steps = [
        [start // NS_PER_US, end // NS_PER_US, [[order[i], c, h] for i, c, h in batch], sorted(order[i] for i in lost)]
        for start, end, batch, lost in outcome.steps or ()
    ]
    return {
        "steps": steps,
        **times_us(outcome, order),
        "preemptions": outcome.preemptions,
        "batches": len(steps),
        "batches_sha256": digest(steps),
    }


def _settings(config: Mapping[str, Any], longest: int) -> EngineSettings:
    """The engine's settings; without chunks a prompt is added whole as long as any of the limit of prompts is left."""
    own = SglangScheduling(**{key: config[key] for key in _OWN})
    chunk, most = config["chunked_prefill_size"], own.max_prefill_tokens + max(longest, config["max_model_len"])
    return EngineSettings(
        max_num_seqs=config["max_running_requests"],
        max_num_batched_tokens=chunk if chunk > 0 else most,
        max_model_len=config["max_model_len"],
        chunked_prefill=chunk > 0,
        block_size=config["page_size"],
        prefix_caching=config["radix_cache"],
        async_scheduling=config["overlap"],
        scheduler=own,
    )


def _content(config: Mapping[str, Any], rows: list[list[int]], ids: list[int]) -> TokenContent:
    """The tokens of the recorded requests.

    The first `shared_prefix` are the same for all with the same id modulo `shared_groups`; the others of the prompt are
    nobody else's. Generated tokens are all the same one but for the last, which ends an answer: where prompts are the
    same, so are the answers as far as they go.

    Parameters
    ----------
    config : mapping
    rows : list of rows of the trace, in order of arrival
    ids : list of int    that they were recorded with
    """
    shared, groups = whole_numbers("shared", [config["shared_prefix"], config["shared_groups"]], 2)
    if groups == 0:
        raise UsageError("config: shared_groups must be from 1, got 0")
    count = groups * shared  # the numbers of shared tokens; pieces are single tokens
    pieces: list[int] = []
    starts, own, last = [0], [], []
    alike: dict[tuple[int, ...], int] = {}

    def numbered(what: tuple[int, ...], tokens: int) -> int:
        """The first of so many numbers for what is told by some integers, the same wherever it is."""
        nonlocal count
        if what not in alike:
            alike[what] = count
            count += tokens
        return alike[what]

    longest = max(row[2] for row in rows)
    for i, (_, prompt, output, _) in zip(ids, rows, strict=True):
        common = min(prompt, shared)
        whose = (i % groups, prompt) if common == prompt else (i,)
        mine = numbered((i, 0, 0), prompt - common)
        pieces += [i % groups * shared + t for t in range(common)] + list(range(mine, mine + prompt - common))
        starts.append(len(pieces))
        own.append(numbered((*whose, -1), longest))
        last.append(own[-1] + output - 1 if config["ignore_eos"] else numbered((*whose, -2, output), 1))
    return TokenContent(
        piece_tokens=1,
        pieces=np.array(pieces, np.int64),
        starts=np.array(starts, np.int64),
        own=np.array(own, np.int64),
        last=np.array(last, np.int64),
    )
