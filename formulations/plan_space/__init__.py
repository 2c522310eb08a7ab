"""The plan space: every feasible way to cut a model over a cluster."""

from .program import Enumeration, PlanSpace

__all__ = ["Enumeration", "PlanSpace"]
