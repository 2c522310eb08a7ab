"""All that is ever compiled, and how to have it compiled beforehand."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from apex_opt.engines.overlap import DUAL_BATCH
from apex_opt.engines.schedulers import RESERVED, SglangScheduling, TrtllmScheduling, VllmScheduling
from apex_opt.plans.engine import EngineSettings
from apex_opt.plans.kv_groups import KvGroup
from apex_opt.plans.speculation import Speculation
from apex_opt.simulator.api import run_deployment, run_disaggregated, run_phases
from apex_opt.simulator.handover import Handover
from apex_opt.simulator.kernel.entries import (
    APART,
    DISAGGREGATED,
    HALVES,
    MULTIPLEXING,
    NUMBER_PIECES,
    PHASES,
    PUSHING,
    RANKS,
    ROUTE,
    SERVE,
    Entry,
)
from apex_opt.simulator.law import linear_law
from apex_opt.simulator.phases import Multiplexing, Phases
from apex_opt.simulator.pools import EnginePool
from apex_opt.simulator.ranks import Halves, Ranks
from apex_opt.workload.trace import make_trace

if TYPE_CHECKING:
    from apex_opt.plans.routing import Routing

_LIMITS: Final[dict[str, Any]] = {"max_num_seqs": 1, "max_num_batched_tokens": 4}
_BLOCKS: Final = RESERVED + 4  # as an instance that answers keeps so much room
_DRAFTS: Final = Speculation(method="ngram", draft_tokens=1, accepted=((0,),))
_THRESHOLD: Final = VllmScheduling(long_prefill_token_threshold=1)
_GROUPS: Final = (KvGroup(kind="full", block_size=1),)
_ENGINES: Final[dict[str, dict[str, Any]]] = {
    "steady": {},
    "general": {"scheduler": _THRESHOLD},
    "speculative": {"speculation": _DRAFTS},
    "trtllm": {"scheduler": TrtllmScheduling(), "block_size": 1},
    "sglang": {"scheduler": SglangScheduling(), "block_size": 1},
    "sglang drafts": {"scheduler": SglangScheduling(), "block_size": 1, "speculation": _DRAFTS},
    "steady groups": {"kv_groups": _GROUPS},
    "general groups": {"kv_groups": _GROUPS, "scheduler": _THRESHOLD},
    "speculative groups": {"kv_groups": _GROUPS, "speculation": _DRAFTS},
}
"""Settings that each engine of the kernel is needed for."""

_FAMILIES: Final = (
    *("groups", "steady", "speculative", "general", "disaggregated", "apart", "phases", "trtllm", "sglang"),
)


class Variant(NamedTuple):
    """A run that compiles something, and what that is; of ranks where there are any."""

    settings: EngineSettings
    entries: tuple[Entry, ...]
    disaggregated: bool = False  # prefill and decode instances
    shared: bool = False  # phases that share a GPU
    ranks: int = 0
    halves: bool = False  # ranks split forwards
    routing: Routing = "round_robin"


def _variants() -> dict[str, Variant]:
    """A run for each entry of the kernel, by a name; the first are those most often needed."""

    def settings(caching: bool, **own: Any) -> EngineSettings:
        its = {"block_size": 1, "prefix_caching": True} if caching else {}
        return EngineSettings(max_model_len=4, **_LIMITS, **{**own, **its})

    found = {}
    for where, entries, others in (
        ("", SERVE, {}),
        ("ranks", RANKS, {"ranks": 2}),
        ("halves", HALVES, {"ranks": 2, "halves": True}),
        ("routed", ROUTE, {"routing": "power_of_two"}),
    ):
        for (engine, caching), entry in entries.items():
            if "groups" in engine and caching:
                continue  # the entry is that of the engine without
            name = " ".join(filter(None, [where, engine, "caching" * caching]))
            found[name] = Variant(settings(caching, **_ENGINES[engine]), (entry,), **others)
    found["general caching"] = found["general caching"]._replace(entries=(SERVE["general", True], NUMBER_PIECES))
    sleepy = {"scheduler": VllmScheduling(idle_sleep_us=1)}
    for (routed, caching), entry in DISAGGREGATED.items():
        name = "routed " * routed + "disaggregated" + " caching" * caching
        router: Routing = "least_loaded" if routed else "round_robin"
        found[name] = Variant(settings(caching, **sleepy), (entry,), disaggregated=True, routing=router)
    # Instances that the steady engine runs are run apart.
    walking = VllmScheduling(idle_sleep_us=1, long_prefill_token_threshold=1)
    together = found["disaggregated"]
    found["disaggregated"] = together._replace(settings=settings(caching=False, scheduler=walking))
    found["apart"] = together._replace(entries=(APART,))
    for caching, entry in PUSHING.items():
        name = "sglang pushing" + " caching" * caching
        found[name] = Variant(settings(caching, **_ENGINES["sglang"]), (entry,), disaggregated=True)
    whole = settings(caching=False, **_ENGINES["sglang"], chunked_prefill=False)
    found["sglang multiplexing"] = Variant(whole, (MULTIPLEXING,), shared=True)
    return {**found, "phases": Variant(settings(caching=False), (PHASES,), shared=True)}


VARIANTS: Final = _variants()
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
    # What is of one engine shares functions, which a process looks at once.
    alike = sorted(missing, key=family)
    mine, *shares = [alike[len(alike) * hand // hands : len(alike) * (hand + 1) // hands] for hand in range(hands)]
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


def family(name: str) -> int:
    """The place of a variant's engine among those that share functions."""
    return next(place for place, engine in enumerate(_FAMILIES) if engine in name)


def run(*names: str) -> None:
    """Serve a request by each of these variants, which compiles what has not been."""
    trace = make_trace(name="warm-up", arrival_ns=[0], prompt=[1], output=[1], content=[[0]], content_tokens=1)
    for name in names:
        settings, _, disaggregated, shared, ranks, halves, routing = VARIANTS[name]
        drafts = settings.speculation.draft_tokens if settings.speculation else 0
        law = linear_law(base_ns=1, token_ns=0, context_ns=0, draft_tokens=drafts, **_LIMITS)
        its = Ranks.bare(ranks, **_LIMITS, drafting=drafts > 0) if ranks else None
        if its is not None and halves:
            its = replace(
                its, splitting=DUAL_BATCH, shared=(replace(its.shared[0], halves=Halves.bare(law, its.shared[0])),)
            )
        replicas = 1 if routing == "round_robin" else 2
        pool = EnginePool(settings=settings, blocks=_BLOCKS, laws=[law], ranks=its, replicas=replicas)
        if disaggregated:
            run_disaggregated(pool, pool, Handover(), trace, routing=(routing, routing))
        elif shared:
            sglang = isinstance(settings.scheduler, SglangScheduling)
            divided = Multiplexing(divisions=((1, 1),), layers=1)
            run_phases(pool, divided if sglang else Phases(prefill_share=50, decode_share=50), trace)
        else:
            run_deployment([pool], trace, routing=routing)
