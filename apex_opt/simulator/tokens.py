"""What the tokens of a request are, as numbers that are equal where all before them is equal too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.simulator.content import number_pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from apex_opt.workload.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenContent:
    """Numbers of tokens.

    A prompt is cut into pieces of `piece_tokens` tokens; `pieces[starts[i]:starts[i + 1]]` number the pieces of request
    i so that two are equal exactly where everything up to their end is. Token t of the prompt has the number
    ``piece * piece_tokens + t % piece_tokens``, generated ones count on from ``own[i]``, the last one is ``last[i]``.

    Parameters
    ----------
    piece_tokens : int
    pieces : int64[total]
    starts, own, last : int64[requests + 1], int64[requests], int64[requests]
    """

    piece_tokens: int
    pieces: NDArray[np.int64]
    starts: NDArray[np.int64]
    own: NDArray[np.int64]
    last: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        trace: Trace,
        limits: Sequence[int] | NDArray[np.int64],
        number: Callable[[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int64], int]] = number_pieces,
    ) -> TokenContent:
        """Number the tokens of a trace; generated ones are nobody else's, nor are prompts of which nothing is said.

        Parameters
        ----------
        trace
        limits : sequence of int or int64[n]    tokens that each request generates
        number : callable                       numbers the pieces
        """
        n = len(trace)
        if trace.content is None or trace.content_starts is None:
            pieces, starts, known, per = np.arange(n), np.arange(n + 1), n, int(trace.prompt.max())
        else:
            pieces, known = number(trace.content_starts, trace.content)
            starts, per = trace.content_starts, trace.content_tokens
        ends = known * per + np.cumsum(np.asarray(limits, np.int64))
        return cls(
            piece_tokens=per, pieces=pieces, starts=starts, own=ends - np.asarray(limits, np.int64), last=ends - 1
        )

    def numbers(self, request: int, prompt: int, limit: int) -> list[int]:
        """The numbers of all tokens of a request.

        Parameters
        ----------
        request : int
        prompt : int     its tokens
        limit : int      tokens it generates
        """
        per, first, own = self.piece_tokens, int(self.starts[request]), int(self.own[request])
        mine = self.pieces[first : first + -(-prompt // per)].tolist()
        told = [mine[t // per] * per + t % per for t in range(prompt)]
        return [*told, *range(own, own + limit - 1), int(self.last[request])]
