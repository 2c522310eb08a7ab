"""How limits and values of figures are read and told, unit by unit."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

EXAMPLE: Final = "ttft_p95<=500ms,tpot_p95<=50ms,e2e<=10s@99%,throughput>=10"

NUMBER: Final = re.compile(r"[+-]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][+-]?\d{1,3})?", re.ASCII)

_MOST_DIGITS: Final = 10
"""Digits more than usual that a value is told with beside a limit, at most."""

_ONE: Final = Decimal(1)
_TIMES: Final = {
    "ns": Decimal("1e-9"),
    "us": Decimal("1e-6"),
    "ms": Decimal("1e-3"),
    "s": _ONE,
    "m": Decimal(60),
    "min": Decimal(60),
}
_ENERGIES: Final = {
    "mJ": Decimal("1e-3"),
    "J": _ONE,
    "kJ": Decimal(1000),
    "MJ": Decimal(10**6),
    "Wh": Decimal(3600),
    "kWh": Decimal(3_600_000),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A unit, how a limit in it is read, and how it is written.

    Parameters
    ----------
    name : str                  as documents have it
    form : str                  what a limit must be, in words
    endings : mapping           what may come after the number, and how many of the unit one of it is
    written : tuple of str      endings that limits are written with, the largest first; the last for all that is less
    folded : bool               whether capitals make no difference
    sign : str                  what may come before the number
    sample : str                a limit, to show how one is written
    example : bool              whether the usual example helps
    told : tuple of (scale, text)
        how a value is told: in so many of the unit, with a name of its own, the largest first; in the first that is no
        more than it, else in the last
    of_time : int or None       a value is multiplied by f**of_time where all takes f times as long, at the same power;
                                None: not known
    """

    name: str
    form: str
    endings: Mapping[str, Decimal] = field(default_factory=lambda: {"": _ONE})
    written: tuple[str, ...] = ("",)
    folded: bool = False
    sign: str = ""
    sample: str = "10"
    example: bool = False
    told: tuple[tuple[float, str], ...] = ((1.0, ""),)
    of_time: int | None = None

    def read(self, where: str, text: str) -> float:
        """A limit in the unit, from a number in this or one like it.

        Raises
        ------
        UsageError    form, number, unit
        """
        example = f"; e.g. {EXAMPLE}" if self.example else ""
        plain_text = text.lower() if self.folded else text.removeprefix(self.sign)
        ends = sorted(self.endings, key=len, reverse=True)
        ending = next((end for end in ends if plain_text.endswith(end)), None)
        number = plain_text if ending is None else plain_text[: len(plain_text) - len(ending)]
        if ending is None or NUMBER.fullmatch(number) is None:
            raise UsageError(f"{where}: the limit must be {self.form}, got {text!r:.40}{example}")
        value = float(Decimal(number) * self.endings[ending])
        if not 0 < value < math.inf:
            raise UsageError(f"{where}: the limit must be above 0 and finite, got {text!r:.40}{example}")
        return value

    def write(self, limit: float) -> str:
        """The shortest text that `read` gives the limit back from; shifting the decimal point of repr is exact."""
        exact = Decimal(repr(limit))
        *larger, least = self.written
        ending = next((end for end in larger if exact >= self.endings[end]), least)
        return f"{plain(exact / self.endings[ending])}{ending}"

    def tell(self, value: float, limit: float | None = None) -> str:
        """A value with its unit, in a sentence.

        Parameters
        ----------
        value : float
        limit : float or None    that it is told beside, with as many digits as it takes to be on the right side of it
        """
        scale, text = next((one for one in self.told if abs(value) >= one[0]), self.told[-1])
        number = value / scale
        least = 0 if abs(number) >= 9999.5 else 4

        def written(more: int) -> str:
            return f"{number:.{least + more}g}" if least else f"{number:,.{more}f}"

        return f"{beside(written, value, limit, scale)} {text or self.name}"


def beside(written: Callable[[int], str], value: float, limit: float | None, scale: float = 1.0) -> str:
    """A number with the fewest digits with which it is above, below or at a limit as its value is.

    Parameters
    ----------
    written : callable       the number with so many digits more than usual
    value : float
    limit : float or None    in the unit of the value
    scale : float            what the number is written in, in this unit
    """
    usual = written(0)
    if limit is None or not (math.isfinite(value) and math.isfinite(limit)):
        return usual
    exact = Decimal(repr(float(limit)))
    side = _side(Decimal(repr(float(value))), exact)
    told = (written(more) for more in range(_MOST_DIGITS))
    one = Decimal(repr(scale))
    return next((text for text in told if _side(Decimal(text.replace(",", "")) * one, exact) == side), usual)


def percent(share: float, limit: float | None = None, places: int = 1) -> str:
    """A share in percent.

    Parameters
    ----------
    share : float            from 0 to 1
    limit : float or None    beside which it is told, with as many digits as tell it from that
    places : int             digits behind the point, where these are enough
    """
    return f"{beside(lambda more: f'{100 * share:.{places + more}f}', share, limit, 0.01)}%"


def _side(value: Decimal, limit: Decimal) -> int:
    return (value > limit) - (value < limit)


DURATION: Final = Unit(
    name="s",
    form=f"a number and a unit ({', '.join(_TIMES)})",
    endings=_TIMES,
    written=("s", "ms", "us", "ns"),
    folded=True,
    sample="500ms",
    example=True,
    told=((1.0, "s"), (1e-3, "ms")),
    of_time=1,
)
LONG_DURATION: Final = replace(DURATION, told=((1.0, "s"),), sample="60s")
ENERGY: Final = Unit(
    name="J",
    form=f"a number and a unit ({', '.join(_ENERGIES)})",
    endings=_ENERGIES,
    written=("MJ", "kJ", "J", "mJ"),
    sample="200kJ",
    told=((1e3, "kJ"),),
    of_time=1,
)
ENERGY_PER_TOKEN: Final = Unit(
    name="J/token",
    form=f"a number and a unit ({', '.join(_ENERGIES)}), per output token",
    endings=_ENERGIES | {f"{unit}/token": joules for unit, joules in _ENERGIES.items()},
    written=("MJ", "kJ", "J", "mJ"),
    sample="2J",
    of_time=1,
)
RATE: Final = Unit(name="requests/s", form="a number, in requests per second", example=True, of_time=-1)
PRICE: Final = Unit(
    name="$/h",
    form="a number, in $ per hour such as 20$/h",
    endings=dict.fromkeys(("", "/h", "$", "$/h"), _ONE),
    written=("$/h",),
    sign="$",
    sample="20$/h",
    of_time=0,
)
PRICE_PER_MTOKEN: Final = Unit(
    name="$/Mtoken",
    form="a number, in $ per million output tokens such as 3$",
    endings=dict.fromkeys(("", "$", "$/mtoken", "$/Mtoken"), _ONE),
    written=("$",),
    sign="$",
    sample="3$",
    of_time=1,
)


def plain(value: Decimal) -> str:
    """Digits without trailing zeros; an exponent only where it is shorter."""
    fixed, short = f"{value.normalize():f}", f"{value.normalize():E}"
    return fixed if len(fixed) <= max(len(short), 12) else short
