"""Ranks of a plan on GPUs: the ways to lay them out, and what an assignment amounts to."""

from apex_opt.placement.assignment import Assignment, layout_of, rank_order
from apex_opt.placement.domains import Room, groups, replicas_in, rooms
from apex_opt.placement.files import rankfile, read_assignment
from apex_opt.placement.layouts import Layouts
from apex_opt.placement.reasons import Lies, lies
from apex_opt.placement.shape import Shape, Way, fits, ways

__all__ = [
    "Assignment",
    "Layouts",
    "Lies",
    "Room",
    "Shape",
    "Way",
    "fits",
    "groups",
    "layout_of",
    "lies",
    "rank_order",
    "rankfile",
    "read_assignment",
    "replicas_in",
    "rooms",
    "ways",
]
