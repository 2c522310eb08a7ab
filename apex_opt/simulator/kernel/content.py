"""The content of prompts, numbered: `simulator.content.number_pieces`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from apex_opt.simulator.kernel.jit import inner
from apex_opt.simulator.kernel.state import NONE

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64


@inner
def number_pieces_nb(
    starts: I64, requests: int, content: I64, pieces: I64, previous: I64, slots: I64, size: int, found: I64
) -> None:
    """Number content ids so that two are equal exactly where all before them are equal too, in order of appearance.

    `slots` is an open-addressing table of positions in `content`, NONE where free, of a size that is a power of two
    above twice their number; `previous` is scratch; `found` gets how many numbers there are.
    """
    mask = size - 1
    count = 0
    for i in range(requests):
        before = NONE
        for place in range(starts[i], starts[i + 1]):
            h = ((before * 0x9E3779B1 + content[place]) * 0x85EBCA77) & 0x3FFFFFFFFFFFFFFF
            slot = (h ^ (h >> 29)) & mask
            while True:
                other = slots[slot]
                if other == NONE:
                    slots[slot] = place
                    previous[place] = before
                    pieces[place] = count
                    count += 1
                    break
                if content[other] == content[place] and previous[other] == before:
                    pieces[place] = pieces[other]
                    break
                slot = (slot + 1) & mask
            before = pieces[place]
    found[0] = count
