"""Why a question has no feasible plan, what would give it one, and why a plan loses to the best."""

from apex_opt.search.explain.clashes import Clash
from apex_opt.search.explain.comparison import Comparison, Term, compare, differences
from apex_opt.search.explain.explanation import Explanation, explain, explained
from apex_opt.search.explain.relaxations import Relaxation, Tried

__all__ = [
    "Clash",
    "Comparison",
    "Explanation",
    "Relaxation",
    "Term",
    "Tried",
    "compare",
    "differences",
    "explain",
    "explained",
]
