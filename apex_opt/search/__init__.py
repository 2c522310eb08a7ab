"""The search: which plan is best, and the proof that nothing in the space is better."""

from apex_opt.search.answer import Answer, Candidate, Certificate
from apex_opt.search.check import Check, check
from apex_opt.search.evaluator import Evaluator
from apex_opt.search.pareto import Front, pareto
from apex_opt.search.question import Question
from apex_opt.search.search import judge, search

__all__ = [
    "Answer",
    "Candidate",
    "Certificate",
    "Check",
    "Evaluator",
    "Front",
    "Question",
    "check",
    "judge",
    "pareto",
    "search",
]
