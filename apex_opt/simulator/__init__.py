"""The exact batching simulator: `reference` specifies, `kernel` computes, `pack` is the door between.

`recorded` serves what was recorded from engines.
"""

from apex_opt.simulator.api import run_deployment, run_disaggregated, run_phases, simulate
from apex_opt.simulator.checks import check_fits
from apex_opt.simulator.handover import Handover
from apex_opt.simulator.law import BatchLaw
from apex_opt.simulator.outcome import BatchCounts, DisaggregatedOutcome, Outcome, PoolOutcome
from apex_opt.simulator.pools import EnginePool
from apex_opt.simulator.recorded import replay_case
from apex_opt.simulator.recorded.plain import Replay, replay

__all__ = [
    "BatchCounts",
    "BatchLaw",
    "DisaggregatedOutcome",
    "EnginePool",
    "Handover",
    "Outcome",
    "PoolOutcome",
    "Replay",
    "check_fits",
    "replay",
    "replay_case",
    "run_deployment",
    "run_disaggregated",
    "run_phases",
    "simulate",
]
