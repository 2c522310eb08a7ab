"""Deployments as constraint programs: which pools fit together, and the proof that nothing left can win."""

from formulations.deployment.closing import beats
from formulations.deployment.program import fitting

__all__ = ["beats", "fitting"]
