"""The search: which deployment is best, and the proof that nothing in the space is better."""

from apex_opt.search.answer import Answer, PoolUse, Scored
from apex_opt.search.ledger import Ledger, Part
from apex_opt.search.problem import Offer, Problem
from apex_opt.search.scorer import Scorer
from apex_opt.search.search import judge, search

__all__ = ["Answer", "Ledger", "Offer", "Part", "PoolUse", "Problem", "Scored", "Scorer", "judge", "search"]
