"""All that is ever compiled, and how to have it compiled beforehand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling, VllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.kv_groups import KvGroup
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator.api import run_deployment, run_disaggregated, run_phases
from apex_opt.simulator.handover import Handover
from apex_opt.simulator.kernel.entries import (
    NUMBER_PIECES,
    RANKS_CACHING,
    RANKS_GENERAL,
    RANKS_GENERAL_GROUPS,
    RANKS_SGLANG,
    RANKS_SGLANG_CACHING,
    RANKS_STEADY,
    RANKS_STEADY_GROUPS,
    RANKS_TRTLLM,
    ROUTE_CACHING,
    ROUTE_GENERAL,
    ROUTE_SPECULATIVE,
    ROUTE_SPECULATIVE_CACHING,
    ROUTE_STEADY,
    ROUTE_TRTLLM,
    SERVE_CACHING,
    SERVE_DISAGGREGATED,
    SERVE_DISAGGREGATED_CACHING,
    SERVE_GENERAL,
    SERVE_GENERAL_GROUPS,
    SERVE_GROUPED,
    SERVE_PHASES,
    SERVE_SGLANG,
    SERVE_SGLANG_CACHING,
    SERVE_SPECULATIVE,
    SERVE_SPECULATIVE_CACHING,
    SERVE_STEADY,
    SERVE_STEADY_GROUPS,
    SERVE_TRTLLM,
    Entry,
)
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.phases import Phases
from apex_opt.simulator.pools import EnginePool
from apex_opt.simulator.ranks import Ranks
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from apex_opt.plans.routing import Routing

_LIMITS: Final[dict[str, Any]] = {"max_num_seqs": 1, "max_num_batched_tokens": 4}
_THRESHOLD: Final = VllmScheduling(long_prefill_token_threshold=1)
_SLEEPY: Final = VllmScheduling(idle_sleep_us=1)
_DRAFT: Final = Speculation(method="ngram", draft_tokens=1, accepted=((0,),))

_GROUPS: Final = (KvGroup(kind="full", block_size=1),)


class Variant(NamedTuple):
    """A run that compiles something, and what that is; of ranks where there are any."""

    settings: EngineSettings
    entries: tuple[Entry, ...]
    disaggregated: bool = False  # prefill and decode instances
    shared: bool = False  # phases that share a GPU
    ranks: int = 0
    routing: Routing = "round_robin"


VARIANTS: Final = {
    "steady": Variant(EngineSettings(max_model_len=4, **_LIMITS), (SERVE_STEADY,)),
    "general": Variant(
        EngineSettings(max_model_len=4, scheduler=_THRESHOLD, **_LIMITS),
        (SERVE_GENERAL,),
    ),
    "caching": Variant(
        EngineSettings(max_model_len=4, prefix_caching=True, block_size=1, **_LIMITS),
        (SERVE_CACHING, NUMBER_PIECES),
    ),
    "speculative": Variant(EngineSettings(max_model_len=4, speculation=_DRAFT, **_LIMITS), (SERVE_SPECULATIVE,)),
    "speculative caching": Variant(
        EngineSettings(max_model_len=4, prefix_caching=True, block_size=1, speculation=_DRAFT, **_LIMITS),
        (SERVE_SPECULATIVE_CACHING,),
    ),
    "trtllm": Variant(
        EngineSettings(max_model_len=4, block_size=1, scheduler=TrtllmScheduling(), **_LIMITS), (SERVE_TRTLLM,)
    ),
    "speculative groups": Variant(
        EngineSettings(max_model_len=4, speculation=_DRAFT, kv_groups=_GROUPS, **_LIMITS), (SERVE_GROUPED,)
    ),
    "groups": Variant(EngineSettings(max_model_len=4, kv_groups=_GROUPS, **_LIMITS), (SERVE_STEADY_GROUPS,)),
    "general groups": Variant(
        EngineSettings(max_model_len=4, scheduler=_THRESHOLD, kv_groups=_GROUPS, **_LIMITS), (SERVE_GENERAL_GROUPS,)
    ),
    "groups of ranks": Variant(
        EngineSettings(max_model_len=4, kv_groups=_GROUPS, **_LIMITS), (RANKS_STEADY_GROUPS,), ranks=2
    ),
    "general groups of ranks": Variant(
        EngineSettings(max_model_len=4, scheduler=_THRESHOLD, kv_groups=_GROUPS, **_LIMITS),
        (RANKS_GENERAL_GROUPS,),
        ranks=2,
    ),
    "disaggregated": Variant(
        EngineSettings(max_model_len=4, scheduler=_SLEEPY, **_LIMITS), (SERVE_DISAGGREGATED,), disaggregated=True
    ),
    "disaggregated caching": Variant(
        EngineSettings(max_model_len=4, scheduler=_SLEEPY, prefix_caching=True, block_size=1, **_LIMITS),
        (SERVE_DISAGGREGATED_CACHING,),
        disaggregated=True,
    ),
    "phases": Variant(EngineSettings(max_model_len=4, **_LIMITS), (SERVE_PHASES,), shared=True),
    "ranks": Variant(EngineSettings(max_model_len=4, **_LIMITS), (RANKS_STEADY,), ranks=2),
    "general ranks": Variant(
        EngineSettings(max_model_len=4, scheduler=_THRESHOLD, **_LIMITS), (RANKS_GENERAL,), ranks=2
    ),
    "caching ranks": Variant(
        EngineSettings(max_model_len=4, prefix_caching=True, block_size=1, **_LIMITS), (RANKS_CACHING,), ranks=2
    ),
    "sglang": Variant(
        EngineSettings(max_model_len=4, block_size=1, scheduler=SglangScheduling(), **_LIMITS), (SERVE_SGLANG,)
    ),
    "sglang caching": Variant(
        EngineSettings(max_model_len=4, prefix_caching=True, block_size=1, scheduler=SglangScheduling(), **_LIMITS),
        (SERVE_SGLANG_CACHING,),
    ),
    "trtllm ranks": Variant(
        EngineSettings(max_model_len=4, block_size=1, scheduler=TrtllmScheduling(), **_LIMITS), (RANKS_TRTLLM,), ranks=2
    ),
    "sglang ranks": Variant(
        EngineSettings(max_model_len=4, block_size=1, scheduler=SglangScheduling(), **_LIMITS), (RANKS_SGLANG,), ranks=2
    ),
    "sglang caching ranks": Variant(
        EngineSettings(max_model_len=4, prefix_caching=True, block_size=1, scheduler=SglangScheduling(), **_LIMITS),
        (RANKS_SGLANG_CACHING,),
        ranks=2,
    ),
    "routed": Variant(EngineSettings(max_model_len=4, **_LIMITS), (ROUTE_STEADY,), routing="power_of_two"),
    "routed general": Variant(
        EngineSettings(max_model_len=4, scheduler=_THRESHOLD, **_LIMITS), (ROUTE_GENERAL,), routing="power_of_two"
    ),
    "routed caching": Variant(
        EngineSettings(max_model_len=4, prefix_caching=True, block_size=1, **_LIMITS),
        (ROUTE_CACHING,),
        routing="power_of_two",
    ),
    "routed trtllm": Variant(
        EngineSettings(max_model_len=4, block_size=1, scheduler=TrtllmScheduling(), **_LIMITS),
        (ROUTE_TRTLLM,),
        routing="power_of_two",
    ),
    "routed speculative": Variant(
        EngineSettings(max_model_len=4, speculation=_DRAFT, **_LIMITS), (ROUTE_SPECULATIVE,), routing="power_of_two"
    ),
    "routed speculative caching": Variant(
        EngineSettings(max_model_len=4, prefix_caching=True, block_size=1, speculation=_DRAFT, **_LIMITS),
        (ROUTE_SPECULATIVE_CACHING,),
        routing="power_of_two",
    ),
}
"""A run for each entry of the kernel."""


def warm_up(processes: int | None = None) -> list[str]:
    """Compile what has not been, in processes side by side, so that whoever comes next takes it from disk.

    Parameters
    ----------
    processes : int or None    that may run at once, this one included; None: one for each core

    Returns
    -------
    list of str    names of the variants that were missing
    """
    missing = [name for name, variant in VARIANTS.items() if not all(entry.ready() for entry in variant.entries)]
    hands = processes or os.cpu_count() or 1
    mine, *shares = [missing[hand::hands] for hand in range(hands)]
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    others = [
        subprocess.Popen(
            [sys.executable, "-c", f"from apex_opt.simulator.warm import run; run(*{share!r})"],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
        )
        for share in shares
        if share
    ]
    run(*mine)
    for other in others:
        other.wait()
    return missing


def run(*names: str) -> None:
    """Serve a request by each of these variants, which compiles what has not been."""
    trace = make_trace(name="warm-up", arrival_ns=[0], prompt=[1], output=[1], content=[[0]], content_tokens=1)
    for name in names:
        settings, _, disaggregated, shared, ranks, routing = VARIANTS[name]
        drafts = settings.speculation.draft_tokens if settings.speculation else 0
        law = linear_law(base_ns=1, token_ns=0, context_ns=0, draft_tokens=drafts, **_LIMITS)
        its = Ranks.bare(ranks, **_LIMITS) if ranks else None
        replicas = 1 if routing == "round_robin" else 2
        pool = EnginePool(settings=settings, blocks=4, laws=[law], ranks=its, replicas=replicas)
        if disaggregated:
            run_disaggregated(pool, pool, Handover(), trace)
        elif shared:
            run_phases(pool, Phases(prefill_share=50, decode_share=50), trace)
        else:
            run_deployment([pool], trace, routing=routing)
