"""What functions of the kernel take: arrays and integers, most of them as fields of named tuples.

Python hands a field over as one value after the other, as machine code has no other way to be called.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

_KINDS: Final = {"int": int, "I64": np.int64, "I32": np.int32, "F64": np.float64}
"""Kinds of fields, by what their annotations say."""


def kinds(takes: Any) -> Iterator[Any]:
    """`int`, or the type of an array's entries, of all values of something that a function takes.

    Parameters
    ----------
    takes : `int`, the type of an array's entries, a named tuple, None for nothing, or a tuple of such
    """
    if isinstance(takes, tuple):
        for part in takes:
            yield from kinds(part)
    elif hasattr(takes, "_fields"):
        yield from (_KINDS[said.__forward_arg__] for said in takes.__annotations__.values())
    elif takes is not None:
        yield takes


def leaves(given: Any) -> Iterator[Any]:
    """All values of something that a function is given, in the order of `kinds`."""
    if isinstance(given, tuple):
        for part in given:
            yield from leaves(part)
    elif given is not None:
        yield given


def names(takes: Any) -> Iterator[str]:
    """Of all named tuples that a function takes, in lower case."""
    if isinstance(takes, tuple):
        for part in takes:
            yield from names(part)
    elif hasattr(takes, "_fields"):
        yield takes.__name__.lower()


def spread(function: Any, name: str, takes: tuple[Any, ...]) -> Any:
    """A function of that name which takes all values one by one, and hands them on as `function` takes them."""
    number = count()
    records: dict[str, Any] = {}

    def value(part: Any) -> str:
        if isinstance(part, tuple):
            return f"({''.join(f'{value(its)}, ' for its in part)})"
        if hasattr(part, "_fields"):
            records[part.__name__] = part
            return f"{part.__name__}({', '.join(f'v{next(number)}' for _ in part._fields)})"
        return "None" if part is None else f"v{next(number)}"

    handed = ", ".join(map(value, takes))
    values = ", ".join(f"v{place}" for place in range(next(number)))
    space = {"function": function, **records}
    # The compiler knows no function of as many arguments as there happen to be whose kinds differ.
    exec(f"def {name}({values}):\n    function({handed})\n", space)
    return space[name]
