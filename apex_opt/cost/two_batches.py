"""Two batches in place of one: what vLLM's dual batch overlap does to the forwards of ranks whose experts lie apart.

A forward is split into two halves of the tokens, and while one computes the other sends its tokens to their experts or
back. Layer by layer that takes as long as the busier of computing and sending both halves; the first half has nothing
to hide behind. A half costs what a batch of half the tokens costs, so that weights are read twice, and some
multiprocessors send instead of computing.

A forward is split where every rank votes for it: 32 tokens or more where it only decodes, 512 otherwise, and a second
half that is empty on no rank once all are padded to the largest. The engine votes by tokens, not by what is gained.

Source of the vote and of the multiprocessors: vLLM 0.20.2, `v1/worker/{ubatch_utils,dp_utils}.py`,
`config/parallel.py`, `VLLM_DBO_COMM_SMS`. The times are derived from the tables of the plan. Assumed: that ranks have
even shares, that all layers are split, and that a batch computes as much slower as it has fewer multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from apex_opt.cost.model import PlanCost
    from apex_opt.plans.plan import Plan
    from apex_opt.simulator.outcome import BatchCounts, SharedCounts

DECODE_TOKENS: Final = 32
"""Tokens of a rank that only decodes from which on it votes for two halves: `dbo_decode_token_threshold`."""
PROMPT_TOKENS: Final = 512
"""The same of another rank: `dbo_prefill_token_threshold`."""
SENDING: Final = 20
"""Multiprocessors that send: `VLLM_DBO_COMM_SMS`."""
_USUAL_MULTIPROCESSORS: Final = 132
_PLACE: Final = {"communication": 1, "engine": 2}
"""Operations that do not compute, by their place in `Forward`."""
_OF_ONE_PROMPT: Final = {"sequence_ns": 1, "attend_ns": 0}
"""Entries of tables that do not go by tokens, of a batch of one prompt and nothing else."""


def splits(tokens: Sequence[int], padded: Sequence[int], decoding: Sequence[bool]) -> bool:
    """Whether ranks split a forward into two halves: all or none do.

    Parameters
    ----------
    tokens : of each rank
    padded : the same with padding to captured sizes
    decoding : whether each sequence of a rank has one token
    """
    wanted = all(
        count >= (DECODE_TOKENS if alone else PROMPT_TOKENS) for count, alone in zip(tokens, decoding, strict=True)
    )
    return wanted and max(padded) // 2 < min(tokens)


class Forward(NamedTuple):
    """Seconds that a forward computes, sends, and that the host adds."""

    compute_s: float
    network_s: float
    host_s: float

    @property
    def whole_s(self) -> float:
        """Of a forward that is not split."""
        return sum(self)


def halves_s(half: Forward, host_s: float, layers: int, slower: float = 1.0) -> float:
    """Seconds of a forward in two halves.

    Parameters
    ----------
    half : Forward     a half, computed on whole GPUs
    host_s : float     that the host adds to the forward
    layers : int
    slower : float     how much slower it computes while others of its multiprocessors send
    """
    computes, sends = half.compute_s * slower, half.network_s
    return 2 * max(computes, sends) + min(computes, sends) / layers + host_s


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoBatches:
    """The forwards of one kind of a run, whole and as they would be with two batches in place of one.

    Parameters
    ----------
    kind : str             "answers" alone, or "prompts", with or without answers
    forwards, split : int  how many there were, and how many of them ranks would split
    whole_s, two_s : float mean time of these, as it is and with those that are split
    """

    kind: str
    forwards: int
    split: int
    whole_s: float
    two_s: float

    @property
    def gain(self) -> float:
        """Share of their time that this saves; below zero where it takes longer."""
        return 1 - self.two_s / self.whole_s if self.whole_s else 0.0


def two_batches(
    plan: Plan, cost: PlanCost, counted: BatchCounts, shared: SharedCounts, multiprocessors: int | None
) -> tuple[TwoBatches, ...]:
    """What two batches in place of one would do to the forwards of a run, by kind.

    Parameters
    ----------
    plan, cost
    counted : BatchCounts     batches of its ranks
    shared : SharedCounts     forwards of all of them
    multiprocessors : int or None    of its GPUs; None takes those of a Hopper
    """
    total = multiprocessors or _USUAL_MULTIPROCESSORS
    slower, layers, found = total / (total - SENDING), sum(plan.layers), []
    decoded = int(counted.decode @ np.arange(len(counted.decode)))
    context = int(counted.decode_context.sum()) / max(decoded, 1)
    eager = float(shared.eager.sum()) / max(float(shared.mixed.sum()), 1.0)
    for kind, table in (("answers", shared.decode), ("prompts", shared.mixed)):
        decoding, forwards, split, whole, two = kind == "answers", int(table.sum()), 0, 0.0, 0.0
        for tokens in np.flatnonzero(table).tolist():
            count, made = int(table[tokens]), forward(cost, tokens, context if decoding else None, eager)
            whole += count * made.whole_s
            if not splits((tokens,), (tokens,), (decoding,)):
                two += count * made.whole_s
                continue
            split += count
            half = forward(cost, -(-tokens // 2), context if decoding else None)
            two += count * halves_s(half, made.host_s, layers, slower)
        if forwards:
            found.append(
                TwoBatches(kind=kind, forwards=forwards, split=split, whole_s=whole / forwards, two_s=two / forwards)
            )
    return tuple(found)


def forward(cost: PlanCost, tokens: int, context: float | None, eager: float = 0.0) -> Forward:
    """What a forward takes on all stages, where each rank has so many tokens.

    Parameters
    ----------
    cost : PlanCost          of a plan whose ranks run in step
    tokens : int
    context : float or None  tokens that each sequence holds where all decode; None: the tokens are one prompt
    eager : float            share of such forwards with prompts whose kernels the host launches one by one
    """
    of_answers = {"decode_ns": 1.0, "context_rate": tokens * (context or 0.0), "together decode": 1.0}
    of_prompts = {"mixed_ns": 1.0, "chunk_ns": 1.0, "together mixed": 1.0, "together eager": eager}
    of_prompts |= {"pair_rate": tokens * (tokens + 1) / 2, "chunk_context_rate": float(tokens)}
    of_prompts |= dict.fromkeys(_OF_ONE_PROMPT, 1.0)
    used = of_prompts if context is None else of_answers
    seconds = [0.0, 0.0, 0.0]
    for stage in cost.pieces:
        for times, piece in stage:
            for (operation, table), work in piece.parts.items():
                entry = _OF_ONE_PROMPT.get(table, tokens)
                if (often := used.get(table, 0.0)) and entry < len(work.seconds):
                    seconds[_PLACE.get(operation, 0)] += times * often * float(work.seconds[entry])
    return Forward(*seconds)
