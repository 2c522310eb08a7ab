"""The exact batching simulator: `reference.py` specifies, `kernel.py` computes, `pack.py` is the door between."""

from apex_opt.simulator.api import Replay, check_fits, replay, simulate
from apex_opt.simulator.law import BatchLaw
from apex_opt.simulator.outcome import BatchCounts, Outcome, Routing

__all__ = ["BatchCounts", "BatchLaw", "Outcome", "Replay", "Routing", "check_fits", "replay", "simulate"]
