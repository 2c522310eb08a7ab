"""What all programs share: OR-Tools is loaded without pandas, and works with it all the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_pandas_is_loaded_only_once_it_is_used() -> None:
    code = """
        import sys
        from formulations.plan_space import PlanSpace
        assert "pandas" not in sys.modules
        from ortools.sat.python import cp_model
        import pandas
        model = cp_model.CpModel()
        some = model.new_int_var_series("x", pandas.Index([1, 2, 3]), 0, 5)
        model.add(some.sum() == 15)
        solver = cp_model.CpSolver()
        solver.solve(model)
        assert isinstance(some, pandas.Series)
        assert list(solver.values(some)) == [5, 5, 5]
        """
    lines = "\n".join(line.strip() for line in code.splitlines())
    ran = subprocess.run([sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_pandas_that_is_loaded_already_is_the_one_that_is_used() -> None:
    code = "import pandas; import formulations; from ortools.sat.python import cp_model; assert cp_model.pd is pandas"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
