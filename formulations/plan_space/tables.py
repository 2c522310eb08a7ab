"""Functions and conditions of a few variables, as tables of all their values."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ortools.sat.python import cp_model


def greatest(model: cp_model.CpModel, variable: cp_model.IntVar) -> int:
    """The greatest value of a variable's domain."""
    return int(max(model.proto.variables[variable.index].domain))


def tabulated(
    model: cp_model.CpModel, name: str, keys: list[cp_model.IntVar], rows: Iterable[tuple[int, ...]]
) -> cp_model.IntVar:
    """A variable that is a tabulated function of others; the last column is its value.

    Parameters
    ----------
    model : CpModel
    name : str    of the variable
    keys : list of IntVar    what it is a function of
    rows : of values of these, and of its own
    """
    table = list(rows)
    values = sorted({row[-1] for row in table})
    result = model.new_int_var(values[0], values[-1], name)
    model.add_allowed_assignments([*keys, result], table)
    return result


def holds(
    model: cp_model.CpModel, name: str, keys: list[cp_model.IntVar], rows: Iterable[tuple[int, ...]]
) -> cp_model.Constraint:
    """A tabulated condition: the last column says whether it holds. Unlike a table, a sum can be enforced anywhere.

    Parameters
    ----------
    model, name, keys, rows : as of `tabulated`
    """
    return model.add(tabulated(model, name, keys, rows) == 1)
