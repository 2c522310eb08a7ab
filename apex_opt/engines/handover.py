"""What it takes to hand a prompt from one pool of instances to another."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from typing import Final

from apex_opt.errors import UsageError
from apex_opt.units import NS_PER_US

_MOST_US: Final = 10_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoverTimes:
    """Times of a hand-over in microseconds, whatever the pools and the links between them are.

    Parameters
    ----------
    proxy_us : float        from the answer of the prefill instance to the decode instance
    notice_us : float       from the end of a read until the prefill instance can hear of it
    post_us : float         of a read
    descriptor_us : float   of a piece of memory in it: of each block and layer one, or two where keys and values are
                            kept apart
    rate_share : float      share of the rate of a link that reads reach, above 0 and at most 1

    Raises
    ------
    UsageError    a time below 0 or above 10 s; a share that is none
    """

    proxy_us: float
    notice_us: float
    post_us: float
    descriptor_us: float
    rate_share: float

    @property
    def proxy_ns(self) -> int:
        """`proxy_us` in nanoseconds."""
        return round(self.proxy_us * NS_PER_US)

    def __post_init__(self) -> None:
        for name in (known.name for known in fields(self)):
            value = getattr(self, name)
            if name == "rate_share":
                if not 0 < value <= 1:
                    raise UsageError(f"--handover: rate_share {value:g} is not above 0 and at most 1")
            elif not isfinite(value) or not 0 <= value <= _MOST_US:
                raise UsageError(f"--handover: {name} {value:g} is not between 0 and {_MOST_US:,} us")
