"""Shapes of operations, and how far one lies from another: which measured one stands for one that was not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Columns = dict[str, NDArray[Any]]

LATENT_RANK, LATENT_ROPE = 512, 64
LATENT_PAIR: Final = (192, 128)
"""Tables of latent attention are measured on the shapes of DeepSeek-V3: one cached vector of 512 + 64, and in prompts a
key of 192 and a value of 128 per head."""

# Factors on the logarithms of (n, k) and of (hidden, expert_ffn, experts, held, topk) in the distance between shapes.
GEMM_SCALE: Final = (1.0, 0.7)
MOE_SCALE: Final = (1.0, 1.0, 0.5, 1.0, 1.0)
# Distance between two attention shapes per factor of e: heads per KV head, KV heads, width of a head.
_ATTENTION_SCALE: Final = (1.0, 0.5, 4.0)

_LATENT: Final = {"kv_heads": np.array([1]), "head_dim": np.array([LATENT_RANK + LATENT_ROPE])}


ENCODER_SCALE: Final = (1.0, 2.0)
STATE_SCALE: Final = (1.0, 1.0, 1.0, 0.5)
"""Distance between two states per factor of e: matrices, rows, columns, heads of queries and keys."""
STATE_CHUNKS: Final = {"gated_delta": 64, "kda": 64, "mamba2": 128, "mamba1": 1, "lightning": 256}
"""Tokens of a prompt that the kernels in tables of states compute at once: of Mamba2 as Nemotron has it, of lightning
attention as MiniMax-Text-01 has it."""


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """Rows of an attention table by shape.

    `features` are log(heads / kv_heads), log(kv_heads), log(head_dim), scaled; `rows[i]` the rows of shape i.
    """

    shapes: NDArray[np.int64]
    features: Floats
    rows: tuple[NDArray[np.int64], ...]

    @classmethod
    def of(cls, table: Columns, chosen: NDArray[np.bool_]) -> Shapes:
        """Group the chosen rows."""
        index = np.flatnonzero(chosen)
        sizes = [table["heads"], *(table.get(name, size) for name, size in _LATENT.items())]
        keys = np.column_stack([np.broadcast_to(size, len(chosen))[index] for size in sizes]).astype(np.int64)
        shapes, owner = np.unique(keys, axis=0, return_inverse=True)
        owner = owner.reshape(-1)
        order = np.argsort(owner, kind="stable")
        parts = np.split(index[order], np.cumsum(np.bincount(owner, minlength=len(shapes)))[:-1])
        return cls(shapes, np.array([attention_feature(*map(int, shape)) for shape in shapes]), tuple(parts))

    def nearest(self, heads: int, kv_heads: int, head_dim: int) -> tuple[int, float]:
        """The nearest measured shape, and how far it is.

        Parameters
        ----------
        heads : int       query heads
        kv_heads : int    heads of the cache
        head_dim : int    elements of a head
        """
        distance = np.sqrt(((self.features - np.array(attention_feature(heads, kv_heads, head_dim))) ** 2).sum(axis=1))
        found = int(distance.argmin())
        return found, float(distance[found])


def attention_feature(heads: int, kv_heads: int, head_dim: int) -> tuple[float, ...]:
    """A shape of heads as the distance between shapes sees it.

    Parameters
    ----------
    heads : int       query heads
    kv_heads : int    heads of the cache
    head_dim : int    elements of a head
    """
    return _feature((heads / kv_heads, kv_heads, head_dim), _ATTENTION_SCALE)


def gemm_feature(n: int, k: int) -> tuple[float, ...]:
    """A weight shape as the surface knows it."""
    return _feature((n, k), GEMM_SCALE)


def moe_feature(hidden: int, expert_ffn: int, experts: int, held: int, topk: int) -> tuple[float, ...]:
    """A shape of experts as the surface knows it.

    Parameters
    ----------
    hidden : int        width of the residual stream
    expert_ffn : int    columns of an expert
    experts : int       of a layer
    held : int          experts that a GPU holds
    topk : int          experts of a token
    """
    return _feature((hidden, expert_ffn, experts, held, topk), MOE_SCALE)


def state_feature(heads: int, key: int, value: int, key_heads: int) -> tuple[float, ...]:
    """A shape of states as the surface knows it.

    Parameters
    ----------
    heads : int        matrices of the state, or channels of a convolution
    key : int          rows of each, or tokens that an output depends on
    value : int        columns of each
    key_heads : int    heads of queries and keys
    """
    return _feature((heads, key, value, key_heads), STATE_SCALE)


def encoder_feature(heads: int, width: int) -> tuple[float, ...]:
    """Heads of an encoder as the surface knows them."""
    return _feature((heads, width), ENCODER_SCALE)


def _feature(sizes: tuple[float, ...], scale: tuple[float, ...]) -> tuple[float, ...]:
    """Scaled logarithms of a shape."""
    return tuple((np.log(np.array(sizes, dtype=np.float64)) * np.array(scale)).tolist())
