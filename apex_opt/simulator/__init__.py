"""The exact batching simulator: `reference` specifies, `kernel` computes, `pack.py` is the door between."""

from apex_opt.simulator.api import Replay, check_fits, replay, run_deployment, simulate
from apex_opt.simulator.law import BatchLaw
from apex_opt.simulator.outcome import BatchCounts, Outcome, PoolOutcome, Routing
from apex_opt.simulator.pools import EnginePool

__all__ = [
    "BatchCounts",
    "BatchLaw",
    "EnginePool",
    "Outcome",
    "PoolOutcome",
    "Replay",
    "Routing",
    "check_fits",
    "replay",
    "run_deployment",
    "simulate",
]
