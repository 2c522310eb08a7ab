"""Constraint programs (OR-Tools CP-SAT), one folder each: `program.py` states the maths and builds the model."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Pandas(ModuleType):
    """Pandas as OR-Tools sees it: loaded once it is used.

    OR-Tools takes it for series of variables alone, which no program here has, and it takes longer to load than all
    the rest. Its annotations name two classes, for which any stand in while OR-Tools is loaded.
    """

    Index = Series = object

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or sys.modules.get("pandas") is self:
            return super().__getattribute__(name)
        import pandas

        return getattr(pandas, name)


if "pandas" not in sys.modules:
    sys.modules["pandas"] = _Pandas("pandas")
    try:
        from ortools.sat.python import cp_model  # noqa: F401
    finally:
        del sys.modules["pandas"]
