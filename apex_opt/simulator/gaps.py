"""Times between the tokens of requests, out of a log of batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def gaps_ns(request: NDArray[np.int64], token_ns: NDArray[np.int64], generated: NDArray[np.int64]) -> NDArray[np.int64]:
    """Times between consecutive tokens of the same request.

    Parameters
    ----------
    request, token_ns : int64[tokens]    whose token, and when it came; those of one request in order
    generated : int64[requests]          tokens of each; what a batch yields beyond them is nobody's

    Returns
    -------
    int64[sum(generated - 1)]    the gaps of the first request in order, then those of the second, ...
    """
    order = np.argsort(request, kind="stable")
    request, token_ns = request[order], token_ns[order]
    first = np.concatenate(([0], np.cumsum(np.bincount(request, minlength=len(generated)))))[:-1]
    kept = np.arange(len(request)) - first[request] < generated[request]
    request, token_ns = request[kept], token_ns[kept]
    return np.asarray(np.diff(token_ns)[request[1:] == request[:-1]])
