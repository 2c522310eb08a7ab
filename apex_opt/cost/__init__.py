"""Time and energy of one batch on one stage of a plan."""

from apex_opt.cost.accounting import Usage, account, idle_w, limit_w
from apex_opt.cost.model import CostModel, PlanCost

__all__ = ["CostModel", "PlanCost", "Usage", "account", "idle_w", "limit_w"]
