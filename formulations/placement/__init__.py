"""Which GPU holds which rank, as a constraint program."""

from .moves import Moved, move
from .program import Placed, kept_groups, place, place_joint, place_plan

__all__ = ["Moved", "Placed", "kept_groups", "move", "place", "place_joint", "place_plan"]
