"""Whether the numbers of a description can be taken for real, and the words that refuse those that cannot."""

from __future__ import annotations

import json
from typing import Final

from apex_opt.errors import join_faults
from apex_opt.ir.formats import FORMATS

MAX_COUNT: Final = 2**31
"""Largest width, count or length taken for real; anything above is a fault of the input."""

_LARGEST: Final = 1e300


def shown(value: object) -> str:
    """A faulty value as an error message quotes it: short, on one line; what JSON has a word for, in that."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    try:
        return f"{value!r:.40}"
    except ValueError:
        # Python refuses to print integers of thousands of digits.
        return "a number of thousands of digits"


def is_number(value: object) -> bool:
    """Whether a value is a number that is finite and can be computed with."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def count_fault(name: str, value: object, minimum: int = 1, maximum: int = MAX_COUNT) -> str | None:
    """Why `value` is no whole number within the limits, in words that name it; None where it is one.

    Parameters
    ----------
    name : str        of the field
    value : object    that was given
    minimum : int     least that is allowed
    maximum : int     most that is allowed
    """
    if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
        return None
    return f"{name} must be a whole number from {minimum} to {maximum}, not {shown(value)}"


def check_counts(owner: str, minimum: int = 1, maximum: int = MAX_COUNT, **values: object) -> None:
    """Refuse the dimensions of one thing, all at once.

    Parameters
    ----------
    owner : str      opens the message
    minimum : int    least that is allowed
    maximum : int    most that is allowed
    """
    faults = [fault for name, value in values.items() if (fault := count_fault(name, value, minimum, maximum))]
    if faults:
        raise join_faults(owner, faults)


def check_flags(owner: str, **values: object) -> None:
    """Refuse switches that are not True or False."""
    faults = [
        f"{name} must be true or false, not {shown(value)}"
        for name, value in values.items()
        if not isinstance(value, bool)
    ]
    if faults:
        raise join_faults(owner, faults)


def check_forms(owner: str, **values: object) -> None:
    """Refuse numbers of a format that are none."""
    check_counts(
        owner,
        0,
        len(FORMATS),
        **{name: int(value) if value is True or value is False else value for name, value in values.items()},
    )
