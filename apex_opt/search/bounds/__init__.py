"""What no run of a plan or a deployment can beat."""

from apex_opt.search.bounds.isolated import StageFloor, fewest_to_fill, isolated, may_preempt, minds_preemption

__all__ = ["StageFloor", "fewest_to_fill", "isolated", "may_preempt", "minds_preemption"]
