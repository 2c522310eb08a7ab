"""The solver as every program here uses it."""

from __future__ import annotations

from ortools.sat.python import cp_model


def new_solver(time_limit_s: float | None = None) -> cp_model.CpSolver:
    """One worker and a fixed seed, so that equal problems get equal answers; signals are left to the program.

    Parameters
    ----------
    time_limit_s : float or None        seconds after which it stops; None never

    Source
    ------
    By default CP-SAT takes the interrupt for itself, ends its search by it, and leaves Python without a handler.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.catch_sigint_signal = False
    if time_limit_s is not None:
        solver.parameters.max_time_in_seconds = time_limit_s
    return solver
