"""How one matrix of a checkpoint is stored, and the rules that say which matrices are stored so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apex_opt.ir.checks import count_fault, shown
from apex_opt.ir.formats import GROUP_WEIGHTS, SMALL_GROUPS, get_format

if TYPE_CHECKING:
    from fractions import Fraction

    from apex_opt.ir.fields import Fields
    from apex_opt.ir.modules import ModuleNames

NVFP4_GROUP: Final = 16
MX_GROUP: Final = 32

_SIDES: Final = re.compile(r"\d{1,9}x\d{1,9}")


@dataclass(frozen=True, slots=True)
class Held:
    """A key of `FORMATS`, and what shares a scale: see `Scheme`."""

    format: str
    group: int | None = None
    block: tuple[int, int] | None = None

    @property
    def bits(self) -> Fraction:
        """Bits per weight."""
        return get_format(self.format).weight_bits


@dataclass(frozen=True, slots=True)
class Rule:
    """Modules, None being all, and how they are stored, None being in 16 bit."""

    names: ModuleNames | None
    held: Held | None


Rules = tuple[Rule, ...]


def weight_only(section: Fields, bits_key: str, group_key: str) -> Held | None:
    """Integer weights behind 16-bit activations; faults are noted in the section.

    Parameters
    ----------
    section : Fields    of the quantisation
    bits_key : str      key of the bits per weight
    group_key : str     key of the weights that share a scale
    """
    bits = section.count(bits_key)
    if bits and bits not in (4, 8):
        section.fault(bits_key, f"{bits} is not supported; supported: 4 and 8")
        return None
    given = section.values.get(group_key)
    # -1 and null mean one scale per channel: a group longer than ours, so that counting ours errs upwards.
    group = None if given is None or given == -1 else section.count(group_key)
    least = min(SMALL_GROUPS)
    if group is not None and 0 < group < least:
        section.fault(group_key, f"{group} is not supported; supported: {least} and above, or -1")
    if not bits or group == 0:
        return None
    names = {length: f"w{bits}a16g{length}" for length in SMALL_GROUPS} | {GROUP_WEIGHTS: f"w{bits}a16"}
    fitting = [length for length in names if length <= (group or GROUP_WEIGHTS)]
    return Held(names[max(fitting, default=least)], group=group)


def block_sides(section: Fields, key: str) -> tuple[int, int] | None:
    """Outputs and inputs that share one scale, given as [128, 128] or "128x128"; None where absent."""
    given = section.values.get(key)
    if given is None:
        return None
    sides = [int(side) for side in given.split("x")] if isinstance(given, str) and _SIDES.fullmatch(given) else given
    if not isinstance(sides, list) or len(sides) != 2 or any(count_fault(key, side) for side in sides):
        section.fault(key, f"must be two whole numbers above 0, as [128, 128], not {shown(given)}")
        return None
    return sides[0], sides[1]
