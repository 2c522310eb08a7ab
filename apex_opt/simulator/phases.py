"""Two phases on one GPU: prompts and answers computed side by side, each with a share of it, over one KV pool.

What a share does, published for one model and taken for all: a batch of prompts takes as long as the whole GPU would,
divided by the share; of a batch of answers 62% of the time does so and the rest, which waits for memory, does not.
Shares that add up to more than the GPU are limits: while both phases are at work each has its part of their sum, which
is assumed.

Source: semi-PD (arXiv 2504.19867): the time of a single phase by its share, and the fit of the time per output token
of Llama3-8B on ShareGPT, 0.6284 / y + 0.3818.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from apex_opt.errors import UsageError
from apex_opt.simulator.outcome import Outcome

if TYPE_CHECKING:
    from apex_opt.simulator.outcome import Step

SCALE: Final = 10_000
"""Factors of times are whole numbers of these parts."""
_BY_SHARE: Final = {"prefill": 100, "decode": 62}
"""Per cent of the time of a batch that goes by its share."""
SLICED_TOKENS: Final = 65_536
"""Tokens times layers of a slice of a prefill batch; `split_forward_token_budget` of SGLang 0.5.23."""
DECODE_DIVISOR: Final = 36
"""Requests being answered from which on they have the largest of the divisions; `decode_bs_divisor` of SGLang."""
LAW: Final = "published: semi-PD (arXiv 2504.19867), one model: prompts take 1/share, answers 0.62/share + 0.38"
"""What the times of shares are from."""


class Paces(NamedTuple):
    """What batches of either phase take, in parts of `SCALE` of their time on the whole GPU."""

    prefill: int
    decode: int


def _factor(phase: str, part: int, total: int) -> int:
    """Of a phase that has so large a part of a GPU; rounded up, against us."""
    scaling = _BY_SHARE[phase]
    return -(-SCALE * (scaling * total + (100 - scaling) * part) // (100 * part))


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
    def alone(self) -> Paces:
        """While the other phase has nothing to do."""
        return Paces(_factor("prefill", self.prefill_share, 100), _factor("decode", self.decode_share, 100))

    @property
    def together(self) -> tuple[Paces, ...]:
        """While both are at work."""
        total = max(self.prefill_share + self.decode_share, 100)
        return (Paces(_factor("prefill", self.prefill_share, total), _factor("decode", self.decode_share, total)),)


def _check_whole(name: str, value: object, most: int) -> None:
    """Refuse what is no whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UsageError(f"dynamic shares: {name} {value} is not a whole number from 1 to {most}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicPhases:
    """Shares that follow the load, by the rule of semi-PD's paper; simulated by the reference, and no choice of a plan.

    Parameters
    ----------
    start : Phases             the shares at first
    ttft_ns, tpot_ns : int     goals of the time to the first token and between later ones
    percentile : float         of the requests and tokens of a window that is held against them
    window_ns : int            from one look to the next
    step : int                 per cent of the GPU by which a share is raised at a time
    most_steps : int           steps after one window at most

    Raises
    ------
    UsageError    a number that is not in its range
    """

    start: Phases
    ttft_ns: int
    tpot_ns: int
    percentile: float = 90.0
    window_ns: int = 5_000_000_000
    step: int = 10
    most_steps: int = 3

    def __post_init__(self) -> None:
        for name, most in (("ttft_ns", 1 << 62), ("tpot_ns", 1 << 62), ("window_ns", 1 << 62), ("step", 50)):
            _check_whole(name, getattr(self, name), most)
        _check_whole("most_steps", self.most_steps, 100)
        if not 0 < self.percentile <= 100:
            raise UsageError(f"dynamic shares: percentile {self.percentile} is not above 0 and at most 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiplexing:
    """SGLang's multiplexing: a GPU is divided while both phases are at work, and whole for one that is alone.

    Parameters
    ----------
    divisions : tuple of (int, int)    multiprocessors of prompts and of answers, those of the fewest answers first
    layers : int                       of the model, in slices of which a batch of prompts is computed
    """

    divisions: tuple[tuple[int, int], ...]
    layers: int

    @property
    def alone(self) -> Paces:
        """While the other phase has nothing to do."""
        return Paces(SCALE, SCALE)

    @property
    def together(self) -> tuple[Paces, ...]:
        """While both are at work, of each division."""
        return tuple(Paces(_factor("prefill", p, p + d), _factor("decode", d, p + d)) for p, d in self.divisions)

    def division(self, decoding: int) -> int:
        """Which of the divisions there is while so many requests are answered.

        Source: `adjust_stream_groups` of SGLang 0.5.23, whose groups are counted from 1.
        """
        groups = len(self.divisions)
        return max(1, min(groups, decoding * groups // DECODE_DIVISOR)) - 1

    def slice_layers(self, tokens: int) -> int:
        """Layers of a slice of a batch of so many prompt tokens."""
        return max(1, SLICED_TOKENS // tokens)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhasedOutcome(Outcome):
    """A run of replicas that compute both phases side by side; `busy_ns` has a column for prompts and one for answers.

    Parameters
    ----------
    prompts, answers : list of Step    batches of either phase, replica by replica; none where batches are not told
    most_blocks : int                  most KV blocks of a replica in use at once
    held : int                         those in use at the end
    switches : list of (replica, time, share of prompts, share of answers)    where shares follow the load
    """

    prompts: list[Step]
    answers: list[Step]
    most_blocks: int
    held: int
    switches: list[tuple[int, int, int, int]] = field(default_factory=list)
