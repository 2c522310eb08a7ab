"""Why a problem has no feasible plan, what would give it one, and why a plan loses to the best."""

from apex_opt.studies.explain.clashes import Clash
from apex_opt.studies.explain.comparison import Comparison, Term, compare, differences
from apex_opt.studies.explain.explanation import Diagnosed, Explanation, explain, explained
from apex_opt.studies.explain.relaxations import Relaxation, Tried

__all__ = [
    "Clash",
    "Comparison",
    "Diagnosed",
    "Explanation",
    "Relaxation",
    "Term",
    "Tried",
    "compare",
    "differences",
    "explain",
    "explained",
]
