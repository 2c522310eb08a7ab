"""The exception tree. Every message names the thing, the value, the limit and the way out.

`exit_code` is what the command line returns: 2 for a fault in what was asked, 1 for a fault of ours.
An infeasible problem is an answer, not an exception.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class ApexError(Exception):
    """Root of all errors raised on purpose; printed as one line, without a traceback."""

    exit_code = 2


class UsageError(ApexError, ValueError):
    """A command-line value of the wrong type, form or range."""


class InputError(ApexError, ValueError):
    """A file or a description (model, cluster, trace, profile) that cannot be used as it is."""


class UnknownNameError(ApexError, LookupError):
    """A name that is not in a registry or catalogue.

    Parameters
    ----------
    kind, name : str           what it was to name, and what was given
    known : names that there are
    hint : str                 told after them
    alike : bool               whether names that look alike are offered in place of all
    every : bool               whether all are told beside those that look alike
    """

    def __init__(
        self, kind: str, name: str, known: Iterable[str], hint: str = "", *, alike: bool = True, every: bool = False
    ) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) if alike else []
        offers = [f"did you mean {' or '.join(near)}?"] if near else []
        offers += [f"known: {', '.join(names)}"] if every or not near else []
        offer = " ".join(offers)
        super().__init__(f"unknown {kind} {name!r}; {offer}{'; ' + hint if hint else ''}")


class CapacityError(ApexError, ValueError):
    """A request that no KV cache of the plan can hold."""


class UndecidedError(ApexError):
    """A program that the time it was given does not suffice for."""


class FormulationError(ApexError, AssertionError):
    """A program produced a plan that the independent checker refuses: a fault of ours."""

    exit_code = 1


def join_faults(source: str, faults: Sequence[str], shown: int = 5) -> InputError:
    """All faults of one input as one error: the first few with their positions, then a count.

    Parameters
    ----------
    source : str                where it comes from
    faults : sequence of str    what was found wrong so far
    shown : int                 most that are told
    """
    more = f"; and {len(faults) - shown} more" if len(faults) > shown else ""
    return InputError(f"{source}: {'; '.join(faults[:shown])}{more}")


def shown(value: object, most: int = 60) -> str:
    """`repr` cut for one line of a message; Python refuses to write an int of thousands of digits."""
    try:
        text = repr(value)
    except ValueError:
        return "an int of thousands of digits"
    return text if len(text) <= most else text[: most - 3] + "..."
