"""Deployments as constraint programs: which pools fit together, and the proof that nothing left can win."""

from .closing import beats
from .program import fitting

__all__ = ["beats", "fitting"]
