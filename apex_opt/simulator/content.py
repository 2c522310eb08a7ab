"""What the blocks of a request hold, as numbers that are equal where the content, prefix included, is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apex_opt.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from apex_opt.workload.trace import Trace


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockContent:
    """Keys of engine blocks.

    A prompt is cut into pieces of `piece_blocks` engine blocks each; `pieces[starts[i]:starts[i + 1]]` number the
    pieces of request i so that two are equal exactly where everything up to their end is. Full blocks of the prompt
    have key ``piece * piece_blocks + position``, later ones (with generated tokens, which are nobody else's) number
    on from ``own[i]``.

    Parameters
    ----------
    pieces : int64[total]
    starts, own : int64[requests + 1], int64[requests]
    shared_blocks : int64[requests]      full blocks of each prompt that have a piece
    piece_blocks, total : int            blocks in a piece; number of keys
    """

    pieces: NDArray[np.int64]
    starts: NDArray[np.int64]
    own: NDArray[np.int64]
    shared_blocks: NDArray[np.int64]
    piece_blocks: int
    total: int

    @classmethod
    def of(
        cls,
        trace: Trace,
        block_size: int,
        limits: Sequence[int] | NDArray[np.int64],
        number: Callable[[NDArray[np.int64], NDArray[np.int64]], tuple[NDArray[np.int64], int]] | None = None,
    ) -> BlockContent:
        """Number the content of a trace for an engine's block size; a trace without content shares nothing.

        `number` may be a faster `number_pieces`.

        Parameters
        ----------
        trace
        block_size : int                      tokens in a KV block
        limits : sequence of int or int64[n]    tokens that each request generates
        number : callable or None             numbers the pieces, where not in Python

        Raises
        ------
        UsageError    the trace's content pieces are not whole engine blocks
        """
        n = len(trace.prompt)
        blocks = (trace.prompt + np.asarray(limits, np.int64)) // block_size
        if trace.content is None or trace.content_starts is None:
            pieces, starts = np.zeros(0, np.int64), np.zeros(n + 1, np.int64)
            shared, per_piece, known = np.zeros(n, np.int64), 1, 0
        else:
            starts, shared = trace.content_starts, trace.prompt // block_size
            pieces, known = (number or number_pieces)(starts, trace.content)
            if block_size % trace.content_tokens == 0:
                # What a block holds, all before it included, is what its last piece holds.
                every = block_size // trace.content_tokens
                ends = [np.arange(start + every - 1, end, every) for start, end in itertools.pairwise(starts.tolist())]
                pieces, per_piece = pieces[np.concatenate(ends)], 1
                starts = np.concatenate(([0], np.cumsum([len(its) for its in ends])))
            elif trace.content_tokens % block_size:
                raise UsageError(
                    f"block_size {block_size} does not divide the {trace.content_tokens} tokens of a content id of "
                    f"trace {trace.name}, nor is it a multiple of them; choose a block size that does"
                )
            else:
                per_piece = trace.content_tokens // block_size
        later = blocks - shared
        own = known * per_piece + np.concatenate(([0], np.cumsum(later)))
        return cls(
            pieces=pieces,
            starts=starts,
            own=own[:-1],
            shared_blocks=shared,
            piece_blocks=per_piece,
            total=int(own[-1]),
        )

    def keys(self, request: int) -> list[int]:
        """Keys of all blocks a request can fill."""
        shared = int(self.shared_blocks[request])
        mine = self.pieces[self.starts[request] : self.starts[request + 1]].tolist()
        per = self.piece_blocks
        end = self.own[request + 1] if request + 1 < len(self.own) else self.total
        return [mine[j // per] * per + j % per for j in range(shared)] + list(range(int(self.own[request]), int(end)))


def number_pieces(starts: NDArray[np.int64], content: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Number content ids so that two are equal exactly where all before them are equal too, in order of appearance.

    Parameters
    ----------
    starts : int64[requests + 1]    where each request's ids begin
    content : int64[total]

    Returns
    -------
    int64[total], and how many numbers there are
    """
    numbers: dict[tuple[int, int], int] = {}
    pieces: list[int] = []
    ids = content.tolist()
    for start, end in itertools.pairwise(starts.tolist()):
        before = -1
        for piece in ids[start:end]:
            before = numbers.setdefault((before, piece), len(numbers))
            pieces.append(before)
    return np.array(pieces, np.int64), len(numbers)
