"""What no run of a plan or a deployment can beat."""

from apex_opt.search.bounds.isolated import StageFloor, isolated, may_preempt, minds_preemption

__all__ = ["StageFloor", "isolated", "may_preempt", "minds_preemption"]
