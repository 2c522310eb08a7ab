"""The search: which plan is best, and the proof that nothing in the space is better."""

from apex_opt.search.objective import Objective, load_objective
from apex_opt.search.search import Answer, Candidate, Certificate, Evaluator, Question, judge, judged, search

__all__ = [
    "Answer",
    "Candidate",
    "Certificate",
    "Evaluator",
    "Objective",
    "Question",
    "judge",
    "judged",
    "load_objective",
    "search",
]
