"""What plans are judged by: figures of runs, goals on them, objectives, and bounds and early ends that follow."""

from apex_opt.figures.goals import Goal, Objective, load_latency, load_objective, load_objectives, parse_goals
from apex_opt.figures.registry import Figure

__all__ = [
    "Figure",
    "Goal",
    "Objective",
    "load_latency",
    "load_objective",
    "load_objectives",
    "parse_goals",
]
