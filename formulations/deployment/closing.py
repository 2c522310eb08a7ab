"""The closing proof: no plan that was not simulated can be better than the best found, as a constraint program.

It holds where a bound is one number for a plan and a number of replicas: of a pool alone, whether on one type of GPU or
with stages on two. The bounds are taken anew; what the search kept of its own course has no part in it, but for what it
says it has simulated. Costs enter by their order alone: it is exact, and keeps the domains as small as the table.

Sets and parameters
    b_ck    place of the least cost of cut c with k replicas among all costs
    S       pairs (c, k) that were simulated
    B       place of the cost of the best found

Variables
    c, k    a cut and its number of replicas
    b       the place of their bound

Constraints
    E1  b = b_ck
    E2  (c, k) not in S
    E3  b < B
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ortools.sat.python import cp_model

from apex_opt.errors import FormulationError

from ..solver import new_solver

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence


def beats(
    rows: Sequence[tuple[int, int, float]], simulated: Collection[tuple[int, int]], cost: float
) -> tuple[int, int] | None:
    """A plan that was not simulated and could be better than the best found; None where there is none.

    Parameters
    ----------
    rows : of every feasible plan its cut by its place, its replicas, and what it costs at least; infinite where a goal
        is out of reach
    simulated : (cut, replicas) of those that were simulated
    cost : float    of the best found, signed such that less is better

    Raises
    ------
    FormulationError    the solver does not decide
    """
    within = [row for row in rows if row[2] < math.inf]
    place = {value: place for place, value in enumerate(sorted({cost, *(bound for _, _, bound in within)}))}
    table = [(cut, replicas, place[bound]) for cut, replicas, bound in within]
    if not table:
        return None
    model = cp_model.CpModel()
    cut = model.new_int_var(0, max(c for c, _, _ in table), "cut")
    replicas = model.new_int_var(1, max(k for _, k, _ in table), "replicas")
    bound = model.new_int_var(0, len(place) - 1, "bound")
    model.add_allowed_assignments([cut, replicas, bound], table)
    if simulated:
        model.add_forbidden_assignments([cut, replicas], sorted(simulated))
    model.add(bound < place[cost])
    solver = new_solver()
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return None
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise FormulationError(f"closing proof: the solver ends as {solver.status_name(status)}")
    return solver.value(cut), solver.value(replicas)
