"""Runs recorded from data-parallel ranks of vLLM: behind one address, in lockstep or each on its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from apex_opt.errors import UnknownNameError, UsageError, join_faults
from apex_opt.simulator.api import run_deployment
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.pools import EnginePool
from apex_opt.simulator.ranks import EAGER, FULL, PIECEWISE, Padding, Ranks, SharedLaw
from apex_opt.simulator.recorded.case import SETTINGS, digest, times_us, vllm_settings, whole_numbers
from apex_opt.units import NS_PER_US
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from apex_opt.simulator.api import Implementation

_CHOICES: Final = {
    "model": ("moe", "dense"),
    "routing": ("balanced", "round_robin"),
    "graphs": ("none", "piecewise", "full", "full_decode_only", "full_and_piecewise"),
    "dummy_returns": ("start", "end"),
}
_NUMBERS: Final = ("ranks", "front_ends", "sync_us", "send_us", "control_us")


def replay_case(case: Mapping[str, Any], implementation: Implementation) -> dict[str, Any]:
    """What was recorded of a case, beside its `config` and `trace`."""
    config, rows = case["config"], case["trace"]
    needed = (*SETTINGS, *_CHOICES, *_NUMBERS, "num_gpu_blocks", "law_us", "graph_us", "capture_sizes")
    if missing := [key for key in needed if key not in config]:
        raise UsageError(f"config: missing {', '.join(missing)}")
    if short := [f"row {number}: {len(row)} entries" for number, row in enumerate(rows, 1) if len(row) < 3]:
        raise join_faults("a request has 3", short)
    requests = make_trace(
        name="replay",
        arrival_ns=[row[0] * NS_PER_US for row in rows],
        prompt=[row[1] for row in rows],
        output=[row[2] for row in rows],
        source="recorded batches",
    )
    order = np.argsort([row[0] for row in rows], kind="stable")  # as `make_trace` sorts
    outcome = run_deployment([_pool(config)], requests, log=True, implementation=implementation)
    (group,) = outcome.groups
    ids = order.tolist()
    rank = np.zeros(len(ids), np.int64)
    rank[order] = [group.rank[request] for request in range(len(ids))]
    told = [
        [start // NS_PER_US, end // NS_PER_US, [[ids[i], c, h] for i, c, h in chunks], sorted(ids[i] for i in lost)]
        for start, end, chunks, lost in outcome.steps or ()
    ]
    ends = np.cumsum(group.batches).tolist()
    steps = [told[end - count : end] for count, end in zip(group.batches, ends, strict=True)]
    forwards = [[[start // NS_PER_US, end // NS_PER_US, *how] for start, end, *how in one] for one in group.forwards]
    return {
        "rank": rank.tolist(),
        **times_us(outcome, ids),
        "preemptions": group.preemptions,
        "batches": group.batches,
        "dummies": group.dummies,
        "forwards": [len(one) for one in forwards],
        "forwards_sha256": digest(forwards),
        "publications": [[at // NS_PER_US, counts] for at, counts in group.publications],
        "waves_started": [[at // NS_PER_US, wave, excluded] for at, wave, excluded in group.waves_started],
        "waves_ended": [[at // NS_PER_US, wave] for at, wave in group.waves_ended],
        "batches_sha256": digest(steps),
        "steps": steps,
    }


def _pool(config: Mapping[str, Any]) -> EnginePool:
    """The ranks of a recorded case as one replica."""
    for name, known in _CHOICES.items():
        if config[name] not in known:
            raise UnknownNameError(name, str(config[name])[:60], known)
    count, fronts, sync, send, control = (whole_numbers(name, [config[name]], 1)[0] for name in _NUMBERS)
    (blocks,) = whole_numbers("num_gpu_blocks", [config["num_gpu_blocks"]], 1)
    base, token, context, every = (NS_PER_US * x for x in whole_numbers("law_us", config["law_us"], 4))
    graph_us = whole_numbers("graph_us", config["graph_us"], 3)
    settings = vllm_settings(config)
    seqs, tokens = settings.max_num_seqs, settings.max_num_batched_tokens
    sizes = sorted(whole_numbers("capture_sizes", config["capture_sizes"], len(config["capture_sizes"])))
    most = max([tokens, *sizes])  # a batch may be padded to more tokens than one can have
    lockstep = config["model"] == "moe" and count > 1
    together = every * np.arange((count if lockstep else 1) * most + 1, dtype=np.int64)
    shared = SharedLaw(
        padded_ns=base + token * np.arange(most + 1, dtype=np.int64),
        decode_ns=together,
        mixed_ns=together,
        eager_ns=np.zeros_like(together),
        graph_ns=NS_PER_US * np.array(graph_us, np.int64),
    )
    own = linear_law(base_ns=0, token_ns=0, context_ns=context, max_num_seqs=seqs, max_num_batched_tokens=tokens)
    ranks = Ranks(
        count=count,
        lockstep=lockstep,
        front_ends=fronts,
        balanced=config["routing"] == "balanced",
        dummy_returns=config["dummy_returns"],
        sync_ns=sync * NS_PER_US,
        send_ns=send * NS_PER_US,
        control_ns=control * NS_PER_US,
        padding=padding(config["graphs"], sizes, seqs, tokens),
        shared=(shared,),
    )
    return EnginePool(settings=settings, blocks=blocks - 1, laws=(own,), ranks=ranks)


def padding(graphs: str, sizes: list[int], seqs: int, tokens: int) -> Padding:
    """What a rank on its own runs its batches as.

    Parameters
    ----------
    graphs : str              kinds of graphs that were captured, as vLLM names them
    sizes : list of int       tokens of those, in rising order
    seqs, tokens : int        most of a batch
    """
    decode, mixed = np.arange(seqs + 1, dtype=np.int64), np.arange(tokens + 1, dtype=np.int64)
    if graphs == "none" or not sizes:
        return Padding(
            decode_mode=np.full_like(decode, EAGER), decode_rows=decode,
            mixed_mode=np.full_like(mixed, EAGER), mixed_rows=mixed,
        )  # fmt: skip
    captured = np.array(sizes, np.int64)

    def fitted(rows: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        place = np.searchsorted(captured, rows)
        return place < len(captured), captured[np.minimum(place, len(captured) - 1)]

    decodes = {"piecewise": PIECEWISE, "full": FULL}.get(graphs)
    others = {"full_decode_only": EAGER, "full_and_piecewise": PIECEWISE}.get(graphs, decodes)
    assert others is not None
    fits, padded = fitted(decode)
    if decodes is None:  # graphs of all of a decoding batch, for no more than can run at once
        decode_mode = np.where(fits & (padded <= seqs), FULL, np.where(fits, others, EAGER))
    else:
        decode_mode = np.where(fits, decodes, EAGER)
    decode_rows = np.where(decode_mode == EAGER, decode, padded)
    fits, padded = fitted(mixed)
    mixed_mode = np.where(fits, others, EAGER)
    return Padding(
        decode_mode=decode_mode, decode_rows=decode_rows,
        mixed_mode=mixed_mode, mixed_rows=np.where(mixed_mode == EAGER, mixed, padded),
    )  # fmt: skip
