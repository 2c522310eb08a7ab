"""The memory of a router in the kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from apex_opt.simulator.kernel import router_state as rt
from apex_opt.simulator.kernel.state import NONE
from apex_opt.simulator.routing import FREE_WEIGHT, PREFIX_WEIGHT, QUEUE_WEIGHT, RouterSettings, pairs, prefixes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from apex_opt.plans.engine import EngineSettings
    from apex_opt.plans.routing import Routing
    from apex_opt.simulator.pools import Share
    from apex_opt.simulator.routing import Number
    from apex_opt.workload.trace import Trace

ROUTERS: Final[dict[Routing, int]] = {
    "power_of_two": rt.POWER_OF_TWO,
    "cache_aware": rt.CACHE_AWARE,
    "dynamo": rt.DYNAMO,
    "llm_d": rt.LLM_D,
    "llm_d_kv": rt.LLM_D,
    "pull": rt.PULL,
}
"""Those that replicas advance together for, by what the kernel calls them."""


def router_memory(
    share: Share, settings: EngineSettings, trace: Trace, number: Number, *, blocks: int, computes: bool = True
) -> NDArray[np.int64]:
    """Registers of a router that has sent nothing, with the parts that they lead to.

    Parameters
    ----------
    share : Share              what it routes, or deals as is known beforehand
    settings : EngineSettings
    trace : Trace
    number : callable          numbers pieces of contents
    blocks : int               KV blocks of each replica
    computes : bool            whether the replicas compute prompts, rather than get them from others

    Raises
    ------
    UsageError    the trace's content pieces are not whole engine blocks
    """
    dealt = rt.IN_TURN if share.places is None else rt.DEALT
    rule = {**ROUTERS, "least_loaded": rt.LEAST_LOADED}[share.routing] if share.routed else dealt
    known = prefixes(share.routing, trace, settings.block_size, settings.max_model_len, number)
    own, count = RouterSettings(), share.last - share.first
    registers = np.zeros(rt.ROUTER_SIZE, np.int64)
    for place, value in {
        rt.RULE: rule,
        rt.COMPUTES: computes,
        rt.TOKENS: known.tokens,
        rt.BLOCK: settings.block_size,
        rt.CACHES: settings.prefix_caching,
        rt.KNOWN: known.known,
        rt.IMBALANCE: own.imbalance,
        rt.OVER: own.ratio[0],
        rt.UNDER_RATIO: own.ratio[1],
        rt.PART: own.known_share[0],
        rt.WHOLE: own.known_share[1],
        rt.PREFIX_WEIGHT: PREFIX_WEIGHT,
        rt.QUEUE_WEIGHT: QUEUE_WEIGHT,
        rt.FREE_WEIGHT: FREE_WEIGHT if share.routing == "llm_d_kv" else 0,
        rt.POOL: blocks,
        rt.FIRST_WAITS: NONE,
        rt.LAST_WAITS: NONE,
    }.items():
        registers[place] = value
    replicas = np.zeros((count, rt.ROUTED_SIZE), np.int64)
    replicas[:, rt.ACTIVE] = NONE
    drawn = np.zeros(0, np.int64) if share.places is None else share.places
    if share.routing == "power_of_two":
        drawn = pairs(len(share.rows), count)
    by_piece = {"cache_aware": known.known, "dynamo": known.known * count * rt.HELD_SIZE}
    by_piece["llm_d"] = by_piece["llm_d_kv"] = by_piece["dynamo"]
    parts = {
        rt.STARTS_AT: known.starts,
        rt.PIECES_AT: known.pieces,
        rt.PAIRS_AT: drawn,
        rt.HELD_AT: np.zeros(by_piece.get(share.routing, 0), np.int64),
        rt.REPLICAS_AT: replicas,
        rt.REQUESTS_AT: np.zeros(len(trace) * rt.ASKED_SIZE if share.routing == "dynamo" else 0, np.int64),
    }
    end = len(registers)
    for place, part in parts.items():
        registers[place] = end
        end += part.size
    return np.concatenate([registers, *(part.reshape(-1) for part in parts.values())]).astype(np.int64)
