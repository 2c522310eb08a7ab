"""Which GPU holds which rank, as a constraint program."""

from formulations.placement.program import Placed, kept_groups, place, place_plan

__all__ = ["Placed", "kept_groups", "place", "place_plan"]
