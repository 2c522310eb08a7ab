"""Which pools fit side by side, as a constraint program.

Sets and parameters
    P       types of GPU, each with one pool
    O_p     sizes that a pool on type p can have: GPUs of a plan with all of its replicas
    m_po    plans of that size
    N       GPUs that a deployment may take in all

Variables
    s_p     GPUs of the pool on type p, one of O_p

Constraints
    J1  sum_p s_p <= N

Plans of a size are alike to these constraints, so every solution stands for the product of their numbers. That a pool
finds room on its own type is part of its own program (`formulations.plan_space`, C1).
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError

from ..solver import new_solver

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Sizes(cp_model.CpSolverSolutionCallback):
    """Adds up the deployments that every solution stands for."""

    def __init__(self, sizes: Sequence[cp_model.IntVar], plans: Sequence[Counter[int]]) -> None:
        super().__init__()
        self.deployments = 0
        self._sizes, self._plans = sizes, plans

    def on_solution_callback(self) -> None:
        pairs = zip(self._sizes, self._plans, strict=True)
        self.deployments += prod(plans[self.value(size)] for size, plans in pairs)


def fitting(devices: Sequence[Sequence[int]], most_devices: int) -> int:
    """Deployments of one plan of each pool that fit together.

    Parameters
    ----------
    devices : of each pool, GPUs of each of its plans
    most_devices : int    GPUs that a deployment may take in all

    Raises
    ------
    FormulationError    the solver does not decide
    """
    plans = [Counter(sizes) for sizes in devices]
    if not all(plans):
        return 0
    model = cp_model.CpModel()
    sizes = [
        model.new_int_var_from_domain(cp_model.Domain.from_values(sorted(counts)), f"gpus of pool {place}")
        for place, counts in enumerate(plans)
    ]
    model.add(cp_model.LinearExpr.sum(sizes) <= most_devices)
    solver, found = new_solver(), _Sizes(sizes, plans)
    solver.parameters.enumerate_all_solutions = True
    status = solver.solve(model, found)
    if status not in (cp_model.OPTIMAL, cp_model.INFEASIBLE):
        raise FormulationError(f"deployment: the solver ends as {solver.status_name(status)}")
    return found.deployments
