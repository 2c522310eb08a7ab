"""Reading of one JSON object field by field, with every fault noted rather than raised."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from apex_opt.ir.checks import MAX_COUNT, count_fault, shown

if TYPE_CHECKING:
    from collections.abc import Mapping


MISSING: Final = "is missing"
"""What the fault of a number that is not stated ends in."""
_LONGEST_NAME: Final = 100
"""Characters of a field's name that a message quotes as it is."""


def printed(key: str) -> str:
    """The name of a field on one line, whatever the file calls it."""
    return key if key.isprintable() and len(key) <= _LONGEST_NAME else shown(key)


@dataclass(slots=True)
class Fields:
    """One JSON object and the faults found in it so far; a faulty number reads as 0 so that reading can go on.

    Parameters
    ----------
    values : mapping        what the object holds
    prefix : str            of names in messages
    faults : list of str    found so far, in this object and in those around it
    own_names : mapping     what the file calls a field, by the name that it is asked for
    asked : set of str      names, with their prefix, of the fields that were asked for
    """

    values: Mapping[str, Any]
    prefix: str = ""
    faults: list[str] = field(default_factory=list)
    own_names: Mapping[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """What the object holds for a field, unchecked."""
        self.asked.update((self.name(key), self.prefix + key))
        return self.values.get(key, default)

    def idle(self, *keys: str) -> None:
        """Tell that fields change nothing of what is counted here, whatever they hold."""
        for key in keys:
            self.get(key)

    def states(self, key: str) -> bool:
        """Whether the object has a field, be it null."""
        self.get(key)
        return key in self.values

    def spelled(self, own_names: Mapping[str, str]) -> Fields:
        """The same fields by their usual names, of which the file has other ones for some."""
        usual = {name: self.values[own] for name, own in own_names.items() if own in self.values}
        called = {
            name: self.own_names.get(own, own)
            for name, own in own_names.items()
            if name in usual or name not in self.values
        }
        return replace(self, values={**self.values, **usual}, own_names={**self.own_names, **called})

    def replaced(self, values: Mapping[str, Any]) -> Fields:
        """The same fields with these in place of what the file says."""
        return replace(self, values={**self.values, **values})

    def filled(self, values: Mapping[str, Any]) -> Fields:
        """The same fields with these in place of those that the file leaves out."""
        return self.replaced({key: value for key, value in values.items() if self.values.get(key) is None})

    def alike(self, keys: tuple[str, ...]) -> Fields:
        """The same fields, of which the first of these that the file has stands for those that it leaves out."""
        own = next((key for key in keys if self.values.get(key) is not None), None)
        if own is None:
            return self
        left_out = [key for key in keys if self.values.get(key) is None]
        same = {key: self.values[own] for key in left_out}
        return replace(
            self, values={**self.values, **same}, own_names={**self.own_names, **dict.fromkeys(left_out, own)}
        )

    def name(self, key: str) -> str:
        """Where a field stands."""
        return self.prefix + printed(self.own_names.get(key, key))

    def fault(self, key: str, text: str) -> None:
        """Note what is wrong with a field; one that is told to be something else than it must be is not missing."""
        name = self.name(key)
        if text.startswith(MISSING) and any(fault.startswith(f"{name} must be ") for fault in self.faults):
            return
        self.faults.append(f"{name} {text}")

    def count(self, key: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
        """A whole number, checked; a fault is noted and 0 given where it is none.

        Parameters
        ----------
        key : str                of the section
        default : int or None    the value where it is left out
        minimum : int            least that is allowed
        maximum : int            most that is allowed
        """
        value = self.get(key)
        if value is None:
            if default is None:
                self.fault(key, MISSING)
                return 0
            return default
        if fault := count_fault(self.name(key), value, minimum, maximum):
            self.faults.append(fault)
            return 0
        return int(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(key, f"must be true or false, not {shown(value)}")
            return default
        return value

    def text(self, key: str) -> str:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            self.fault(key, f"must be text, not {shown(value)}")
            return ""
        return value or ""

    def section(self, key: str) -> Fields | None:
        """An object inside this one, sharing its list of faults; None where absent or no object."""
        value = self.get(key)
        if isinstance(value, dict):
            return Fields(value, f"{self.name(key)}.", self.faults, asked=self.asked)
        if value is not None:
            self.fault(key, f"must be an object, not {shown(value)}")
        return None

    def rows(self, key: str) -> list[Any] | None:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            self.fault(key, f"must be a list, not {shown(value)}")
            return None
        return value

    def names(self, key: str) -> list[str]:
        """The texts of a list; empty where absent."""
        rows = self.rows(key) or []
        odd = [row for row in rows if not isinstance(row, str)]
        if odd:
            self.fault(key, f"must hold names, not {shown(odd[0])}")
            return []
        return rows
