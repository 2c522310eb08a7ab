"""Lower bounds where prompts and answers are computed side by side on the same GPUs.

Why they are admissible. A batch takes at least as long as it would the whole GPU, times the pace of its phase while the
other has nothing to do: so does every request alone. A request that gives way is computed again as a prompt, whose end
yields a token: where that may happen a later token is taken to be computed at the quicker of the two paces.

The phases are two machines, so what all prompts take and what all answers take do not add up. But while both are at
work each is slower: with paces a of prompts and b of answers, in parts of what the whole GPU would take, a second
brings 1/a of the work of prompts and 1/b of that of answers, and one in which a phase is alone brings 1/a' or 1/b' of
its own. So with any weights u <= a' and v <= b' for which u/a + v/b <= 1 in every division, u times the work of prompts
and v times that of answers is no more than the time, whichever requests are the first to be done. A later token that
prompts bring instead is work of prompts: where that may happen v is no more than u.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self

from apex_opt.simulator.phases import SCALE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from apex_opt.simulator.phases import Multiplexing, Phases

    Ints = NDArray[np.int64]


class Side(NamedTuple):
    """How much slower than on the whole GPU everything is at least.

    Parameters
    ----------
    first, later : int     paces of prompts and of later tokens, in parts of `SCALE`
    weights : tuple of (float, float)    of the work of prompts and of answers, whose sum is no more than the time
    """

    first: int
    later: int
    weights: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, phases: Phases | Multiplexing, *, preempts: bool) -> Self:
        """Of the shares; `preempts` says whether requests may give way."""
        alone, together = phases.alone, phases.together
        a, b = (pace / SCALE for pace in alone)
        pairs = [(beside.prefill / SCALE, beside.decode / SCALE) for beside in together]
        # All that one phase may weigh, and what is left for the other.
        weights = [
            (min(a, min(p * (1 - b / d) for p, d in pairs)), b),
            (a, min(b, min(d * (1 - a / p) for p, d in pairs))),
        ]
        if preempts:
            equal = min(a, b, *(1 / (1 / p + 1 / d) for p, d in pairs))
            weights = [*((u, min(u, v)) for u, v in weights), (equal, equal)]
        later = min(alone) if preempts else alone.decode
        return cls(alone.prefill, later, tuple((max(u, 0.0), max(v, 0.0)) for u, v in weights))

    def firsts(self, times: Ints) -> Ints:
        """Least times of prompts, of those on the whole GPU."""
        return times * self.first // SCALE

    def laters(self, times: Ints) -> Ints:
        """Least times of later tokens, of those on the whole GPU."""
        return times * self.later // SCALE


WHOLE = Side(SCALE, SCALE, ((1.0, 1.0),))
"""Batches of both phases on the whole GPU, whose work adds up."""
