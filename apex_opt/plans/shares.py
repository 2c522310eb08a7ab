"""Shares of a GPU: both phases of requests side by side on the same GPUs, over one KV pool and one copy of the weights.

``80/100`` lets prompts have 80% of the multiprocessors of a GPU and answers all of them, as semi-PD does with two
processes: a part of a plan that is as large whether or not the other phase is at work. ``pdmux`` is SGLang's
multiplexing, which divides a GPU while both phases are at work and gives all of it to one that is alone, by divisions
of its own choice; ``pdmux:72/60`` gives it one division to keep to, in multiprocessors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from apex_opt.errors import UsageError
from apex_opt.ir.checks import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from apex_opt.cluster.types import Gpu

MULTIPLEXED: Final = "pdmux"
_MOST_UNITS: Final = 999
_TEXT: Final = re.compile(r"(?P<word>pdmux)?(?P<colon>:)?(?:(?P<prefill>\d{1,3})/(?P<decode>\d{1,3}))?", re.ASCII)
EXAMPLES: Final = f"80/100, {MULTIPLEXED}, {MULTIPLEXED}:72/60"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Shares:
    """What either phase has of each GPU of a plan.

    Parameters
    ----------
    prefill, decode : int    per cent of a GPU that prompts and answers may use at most; where they are multiplexed
                             multiprocessors that they have while both are at work, 0 where the engine chooses
    multiplexed : bool       whether SGLang's multiplexing divides the GPU

    Raises
    ------
    UsageError    a share that is not in its range
    """

    prefill: int
    decode: int
    multiplexed: bool = False

    def __post_init__(self) -> None:
        if self.multiplexed and not self.prefill and not self.decode:
            return
        most = _MOST_UNITS if self.multiplexed else 100
        unit = "multiprocessors" if self.multiplexed else "per cent of a GPU"
        for name, share in (("prefill", self.prefill), ("decode", self.decode)):
            if isinstance(share, bool) or not isinstance(share, int) or not 1 <= share <= most:
                raise UsageError(f"share: {shown(share)} {unit} for {name} is not a whole number from 1 to {most}")

    def __str__(self) -> str:
        division = f"{self.prefill}/{self.decode}"
        if not self.multiplexed:
            return division
        return f"{MULTIPLEXED}:{division}" if self.prefill else MULTIPLEXED


def parse_shares(text: str) -> Shares:
    """Read `Shares` as they are written.

    Raises
    ------
    UsageError    anything else
    """
    match = _TEXT.fullmatch(text.strip().lower())
    word, colon, given = (match is not None and match[name] is not None for name in ("word", "colon", "prefill"))
    # A colon stands between the word and a division, and nowhere else.
    if match is None or not (word or given) or colon != (word and given):
        raise UsageError(
            f"share: cannot read {shown(text)}; per cent from 1 to 100, or multiprocessors from 1 to {_MOST_UNITS} "
            f"behind {MULTIPLEXED}; examples: {EXAMPLES}"
        )
    prefill, decode = (int(match[name] or 0) for name in ("prefill", "decode"))
    if given and not prefill + decode:
        raise UsageError(f"share: {shown(text)} leaves either phase nothing; examples: {EXAMPLES}")
    return Shares(prefill=prefill, decode=decode, multiplexed=word)


DIVISIONS: Final = 6
"""Divisions that SGLang chooses from: its `sm_group_num` of 8 without those of one phase alone."""
LEAST_DECODE: Final = 16
"""Multiprocessors that each of them leaves to answers."""
_GRANULES: Final[Mapping[int, tuple[int, int]]] = MappingProxyType({7: (2, 2), 8: (4, 2), 9: (8, 8)})
"""Multiprocessors that a part has at least, and that it is a multiple of, by the first digit of the capability."""


def divisions(shares: Shares, gpu: Gpu) -> tuple[tuple[int, int], ...]:
    """Multiprocessors of prompts and of answers while both are at work, those of the fewest answers first.

    Those that SGLang chooses itself leave prompts half of a GPU at least.

    Parameters
    ----------
    shares : Shares    multiplexed
    gpu : Gpu

    Raises
    ------
    UsageError    as `division_fault` has it

    Source: `divide_sm` of `srt/multiplex/pdmux_context.py`, SGLang 0.5.23.
    """
    if fault := division_fault(shares, gpu):
        raise UsageError(f"share={shares}: {fault}")
    if shares.prefill:
        return ((shares.prefill, shares.decode),)
    every, total = _possible(gpu), int(gpu.multiprocessors or 0)
    step = max(1, len(every) // DIVISIONS)
    return tuple((part, total - part) for part in reversed(every[::step][:DIVISIONS]))


def division_fault(shares: Shares, gpu: Gpu) -> str | None:
    """Why a GPU cannot be multiplexed so; None where it can."""
    total, granule = gpu.multiprocessors, _GRANULES.get(int(gpu.capability or 0))
    if granule is None:
        return f"SGLang divides GPUs of compute capability 7 to 9, {gpu.name} has {gpu.capability or 'none'}"
    if total is None:
        return f"the multiprocessors of {gpu.name} are not stated; give gpu.multiprocessors"
    if not shares.prefill:
        return None if _possible(gpu) else f"the {total} multiprocessors of {gpu.name} leave no division"
    least, multiple = granule
    if shares.prefill + shares.decode != total:
        return f"{shares.prefill} and {shares.decode} are not the {total} multiprocessors of {gpu.name}"
    if shares.prefill % multiple or min(shares.prefill, shares.decode) < least:
        return f"parts of {gpu.name} have {least} multiprocessors at least, that of prompts a multiple of {multiple}"
    return None


def _possible(gpu: Gpu) -> list[int]:
    """Multiprocessors that prompts can have in a division of SGLang's own choice."""
    total, (least, multiple) = int(gpu.multiprocessors or 0), _GRANULES[int(gpu.capability or 0)]
    every = range(least, total - least + 1, multiple)
    return [part for part in every if 2 * part >= total and total - part >= LEAST_DECODE]
