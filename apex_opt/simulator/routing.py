"""What routers in front of replicas know beforehand: dealings that no load changes, and the numbers of their rules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np

from apex_opt.plans.routing import SEES_PREFIXES
from apex_opt.simulator.content import BlockContent, number_pieces

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from apex_opt.plans.routing import Routing
    from apex_opt.workload.trace import Trace

    I64 = NDArray[np.int64]
    Number = Callable[[I64, I64], tuple[I64, int]]

BEFOREHAND: Final[tuple[Routing, ...]] = ("round_robin", "vllm_dp", "session")
"""Whose dealings hang on the trace alone."""
BY_WAITING: Final[tuple[Routing, ...]] = ("llm_d", "llm_d_kv")
"""Who asks how many requests wait in an engine of vLLM."""

IMBALANCE: Final = 64
"""Requests by which loads have to differ, and (numerator, denominator) of their ratio, before `cache_aware` goes by
loads; and the share of a prompt that has to be known for it to go by prefixes."""
RATIO: Final = (3, 2)
KNOWN_SHARE: Final = (3, 10)
PREFIX_WEIGHT: Final = 3
"""Weights of the scorers of `llm_d`, as its guide has them."""
QUEUE_WEIGHT: Final = 2
FREE_WEIGHT: Final = 2
"""That of the scorer of free blocks, which `llm_d_kv` has as well."""

_NS_PER_MS: Final = 1_000_000
_LEAST_WAIT_MS, _UNCHANGED_MS = 50, 5000
_SEED: Final = 20


class RouterSettings(NamedTuple):
    """Numbers of `cache_aware` that its command line sets.

    Parameters
    ----------
    imbalance : int               requests
    ratio : tuple of int          numerator and denominator
    known_share : tuple of int    numerator and denominator
    """

    imbalance: int = IMBALANCE
    ratio: tuple[int, int] = RATIO
    known_share: tuple[int, int] = KNOWN_SHARE


def beforehand(routing: Routing, trace: Trace, rows: I64, replicas: int) -> I64 | None:
    """The place of each request of a share among its replicas; None: in turn, or as loads will be.

    Parameters
    ----------
    routing, trace
    rows : int64[m]    the requests, in order
    replicas : int
    """
    if routing == "vllm_dp":
        return begun_anew(trace.arrival_ns[rows], replicas)
    if routing == "session":
        return in_turn_by(sessions(trace)[rows], replicas)
    return None


def begun_anew(arrival_ns: I64, replicas: int) -> I64:
    """In turn, from the first replica on again with each publication of loads, which are zeros for dense models.

    The coordinator starts with the trace's clock. It publishes 50 ms later, then 5 s after the last time; the first
    request after a publication tells it of itself, which puts the next one off by 50 ms at least.

    Parameters
    ----------
    arrival_ns : int64[m]
    replicas : int

    Source: `DPLBAsyncMPClient` and `DPCoordinatorProc` of vLLM 0.20.2, in our own words; a recorded run settles it.
    """
    places = np.zeros(len(arrival_ns), np.int64)
    published_ms: int | None = None
    due, told, place = _LEAST_WAIT_MS * _NS_PER_MS, False, 0
    for row, at in enumerate(arrival_ns.tolist()):
        while due < at:
            # Between two requests there is nothing but publications: all but the last few can be leapt over.
            published_ms, told, place = due // _NS_PER_MS, False, 0
            due += _UNCHANGED_MS * _NS_PER_MS * max(1, (at - due) // (_UNCHANGED_MS * _NS_PER_MS) - 1)
        if not told:
            told, wait = True, _LEAST_WAIT_MS
            if published_ms is not None:
                wait = max(wait, _UNCHANGED_MS - (at // _NS_PER_MS - published_ms))
            due = at + wait * _NS_PER_MS
        places[row] = place % replicas
        place += 1
    return places


def in_turn_by(keys: I64, replicas: int) -> I64:
    """All requests of one key at one place, first ones of a key dealt in turn."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    order = np.empty(len(first), np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[which] % replicas


def sessions(trace: Trace) -> I64:
    """A number for the session of each request: where none is told, prompts that begin alike are of one."""
    if trace.session is not None:
        return trace.session
    if trace.content is not None and trace.content_starts is not None:
        return trace.content[trace.content_starts[:-1]]
    return np.arange(len(trace))


def pairs(requests: int, replicas: int) -> I64:
    """Two different replicas for each request, drawn with a fixed seed so that a run can be repeated.

    Returns
    -------
    int64[requests, 2]    the lower first
    """
    rng = np.random.default_rng(_SEED)
    first = rng.integers(0, replicas, requests)
    other = (first + rng.integers(1, replicas, requests)) % replicas
    return np.sort(np.stack([first, other], axis=1), axis=1)


class Prefixes(NamedTuple):
    """What a router knows of prompts, as numbered pieces: equal where all before them is equal too.

    Parameters
    ----------
    starts : int64[requests + 1]    where the pieces of each request begin
    pieces : int64[total]
    tokens : int                    in a piece
    known : int                     different pieces
    """

    starts: I64
    pieces: I64
    tokens: int
    known: int

    @classmethod
    def none(cls, requests: int, tokens: int) -> Self:
        """Of prompts that nothing is known of."""
        return cls(np.zeros(requests + 1, np.int64), np.zeros(0, np.int64), tokens, 0)

    def of(self, request: int, prompt: int, *, whole: bool) -> list[int]:
        """The pieces of a prompt.

        Parameters
        ----------
        request : int
        prompt : int     its tokens
        whole : bool     without a last piece that is cut short
        """
        mine: list[int] = self.pieces[self.starts[request] : self.starts[request + 1]].tolist()
        return mine[: prompt // self.tokens] if whole else mine


def prefixes(
    routing: Routing, trace: Trace, block_size: int, max_model_len: int, number: Number = number_pieces
) -> Prefixes:
    """What a router knows of the prompts of a trace: `cache_aware` of their texts, others of blocks of the engine.

    Parameters
    ----------
    routing, trace
    block_size, max_model_len : int    tokens
    number : callable                  numbers the pieces

    Raises
    ------
    UsageError    the trace's content pieces are not whole engine blocks
    """
    if trace.content is None or trace.content_starts is None or routing not in SEES_PREFIXES:
        return Prefixes.none(len(trace), block_size)
    if routing == "cache_aware":
        pieces, known = number(trace.content_starts, trace.content)
        return Prefixes(trace.content_starts, pieces, trace.content_tokens, known)
    blocks = BlockContent.of(trace, block_size, trace.generated(max_model_len), number)
    known = int(blocks.pieces.max()) + 1 if len(blocks.pieces) else 0
    return Prefixes(blocks.starts, blocks.pieces, block_size * blocks.piece_blocks, known)
