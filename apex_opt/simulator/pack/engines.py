"""Which engine of the kernel a run needs, and what the kernel has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from apex_opt.engines.schedulers import SglangScheduling, TrtllmScheduling
from apex_opt.simulator.kernel import entries
from apex_opt.simulator.kernel import state as kn
from apex_opt.simulator.pack.router import ROUTERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.shares import Shares
    from apex_opt.simulator.pools import EnginePool, Share

RULES: Final = {
    "vllm": kn.VLLM,
    "sglang": kn.VLLM,
    "trtllm": kn.VLLM,  # of which its own engine asks nothing
    "orca": kn.ORCA,
    "static": kn.STATIC,
}
"""Whose rules a scheduler goes by."""


def needs_compiling(
    settings: EngineSettings,
    stages: int,
    *,
    ranks: bool = False,
    halves: bool = False,
    walked: bool = False,
    handed: bool = False,
    shares: Shares | None = None,
) -> bool:
    """Whether a run of this kind will compile its engine first: nothing on disk is of the source as it is.

    Parameters
    ----------
    settings : EngineSettings
    stages : int                 of the pipeline
    ranks : bool                 whether replicas have ranks
    halves : bool                whether these split forwards
    walked : bool                whether each batch is formed by the rules
    handed : bool                whether they are prefill or decode instances
    shares : Shares or None      what phases have of each GPU, where they share it
    """
    if shares is not None:
        return not (entries.MULTIPLEXING if shares.multiplexed else entries.PHASES).ready()
    if handed:
        if isinstance(settings.scheduler, SglangScheduling):
            return not entries.PUSHING[settings.prefix_caching].ready()
        apart = engine_of(settings, stages) == "steady"
        return not (entries.APART if apart else entries.DISAGGREGATED[False, settings.prefix_caching]).ready()
    engines = entries.HALVES if halves else entries.RANKS if ranks else entries.SERVE
    return not engines[engine_of(settings, stages, walked=walked or halves), settings.prefix_caching].ready()


def engine_of(settings: EngineSettings, stages: int, *, logged: bool = False, walked: bool = False) -> str:
    """The engine of the kernel that a run needs.

    Parameters
    ----------
    settings : EngineSettings
    stages : int      of the pipeline
    logged : bool     whether batches are told, with groups of layers the blocks of each
    walked : bool     whether each batch is formed by the rules, as what several take is not known beforehand
    """
    if isinstance(settings.scheduler, SglangScheduling):
        return "sglang" if settings.speculation is None else "sglang drafts"
    if settings.kv_groups and settings.speculation is None:
        counted = not logged and not settings.prefix_caching
        chunks = any(group.kind == "chunk" for group in settings.kv_groups)
        steady = counted and stages == 1 and settings.scheduler.prompt_threshold == 0 and not chunks
        return "steady groups" if steady else "general groups"
    if isinstance(settings.scheduler, TrtllmScheduling):
        return "trtllm"
    if settings.speculation is not None:
        return "speculative groups" if settings.kv_groups else "speculative"
    walks = stages > 1 or settings.scheduler.prompt_threshold > 0 or settings.prefix_caching or walked
    return "general" if walks or RULES[settings.scheduler.name] != kn.VLLM else "steady"


def routes(pools: Sequence[EnginePool], shares: Sequence[Share]) -> bool:
    """Whether the kernel has the routers of all shares before these replicas; the others are served by the reference.

    Where turns wait for requests, or are SGLang's, it is not known from the clock who takes one from a queue next; and
    what of a cache nobody holds is known of vLLM's blocks, of replicas that have as many.

    Parameters
    ----------
    pools, shares
    """
    beyond = {share.routing for share in shares if share.routed} - {"least_loaded"}
    return not beyond or (
        beyond <= ROUTERS.keys()
        and all(
            pool.ranks is None
            and not (isinstance(its := pool.settings.scheduler, TrtllmScheduling) and its.fetch_wait_ns > 0)
            and not (isinstance(its, SglangScheduling) and "pull" in beyond)
            and not ("llm_d_kv" in beyond and isinstance(its, SglangScheduling | TrtllmScheduling))
            and not ("llm_d_kv" in beyond and pool.blocks != pools[0].blocks)
            and (engine_of(pool.settings, len(pool.laws), walked=pool.walked), pool.settings.prefix_caching)
            in entries.ROUTE
            for pool in pools
        )
    )
