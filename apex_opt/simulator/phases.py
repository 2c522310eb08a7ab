"""Two phases on one GPU: prompts and answers computed side by side, each with a share of it, over one KV pool.

What a share does, published for one model and taken for all: a batch of prompts takes as long as the whole GPU would,
divided by the share; of a batch of answers 62% of the time does so and the rest, which waits for memory, does not.
Shares that add up to more than the GPU are limits: while both phases are at work each has its part of their sum, which
is assumed.

Source: semi-PD (arXiv 2504.19867): the time of a single phase by its share, and the fit of the time per output token
of Llama3-8B on ShareGPT, 0.6284 / y + 0.3818.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from apex_opt.errors import UsageError

if TYPE_CHECKING:
    from apex_opt.simulator.outcome import Outcome, Step

SCALE: Final = 10_000
"""Factors of times are whole numbers of these parts."""
_BY_SHARE: Final = {"prefill": 100, "decode": 62}
"""Per cent of the time of a batch that goes by its share."""


class Phase(NamedTuple):
    """What batches of a phase take, in parts of `SCALE` of their time on the whole GPU.

    Parameters
    ----------
    alone : int       while the other phase has nothing to do
    together : int    while both are at work
    """

    alone: int
    together: int

    @classmethod
    def of(cls, scaling: int, share: int, total: int) -> Self:
        """By the share of the phase.

        Parameters
        ----------
        scaling : int    per cent of the time that goes by the share
        share : int      per cent of the GPU
        total : int      per cent of it that both phases have together
        """

        def factor(of: int, among: int) -> int:
            # scaling / share + 1 - scaling, of a share that is `of / among`; rounded up, against us.
            return -(-SCALE * (scaling * among + (100 - scaling) * of) // (100 * of))

        return cls(alone=factor(share, 100), together=factor(share, max(total, 100)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Shares of a GPU in per cent: most that prompts may use, and most that answers may.

    Raises
    ------
    UsageError    a share that is no whole number from 1 to 100
    """

    prefill_share: int
    decode_share: int

    def __post_init__(self) -> None:
        for name, share in (("prefill", self.prefill_share), ("decode", self.decode_share)):
            if isinstance(share, bool) or not isinstance(share, int) or not 1 <= share <= 100:
                raise UsageError(f"share: {share} per cent of a GPU for {name} is not a whole number from 1 to 100")

    @property
    def prefill(self) -> Phase:
        """Of batches of prompts."""
        return Phase.of(_BY_SHARE["prefill"], self.prefill_share, self.prefill_share + self.decode_share)

    @property
    def decode(self) -> Phase:
        """Of batches of answers."""
        return Phase.of(_BY_SHARE["decode"], self.decode_share, self.prefill_share + self.decode_share)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhasedOutcome:
    """A run of one replica that computes both phases side by side.

    Parameters
    ----------
    run : Outcome                          its `busy_ns` has a column for prompts and one for answers
    prompts, answers : list of Step        batches of either phase
    most_blocks : int                      most KV blocks in use at once
    held : int                             those in use at the end
    """

    run: Outcome
    prompts: list[Step]
    answers: list[Step]
    most_blocks: int
    held: int
