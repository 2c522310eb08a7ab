"""Work of a kernel, FLOP and bytes: counted here, once, for its time and for its energy.

The laws that tables are turned into, the times read off them and the energies of a run all count by these functions,
whatever the operation: a figure that is off is off for all of them, and fitted coefficients stay right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import numpy as np

from apex_opt.ir.formats import get_format

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Size = NDArray[Any] | float

_Number = TypeVar("_Number", float, "NDArray[np.float64]")

INPUT_BYTES: Final = {"bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "fp4": 0.5625, "int8": 1.0}
"""Size of one activation of a format that is computed in; fp4 has a scale of one byte per 16."""

# Table formats that are no plan formats, and the plan format that stands for their arithmetic and sizes.
_TABLE_FORMATS: Final = {"fp8_block": "fp8", "mxfp4_fp8": "mxfp4"}

_HALF_BYTES: Final = 2
_SCORE_BYTES: Final = 4
_GATE_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """What a number format computes in, and the bytes of one activation and of one stored weight."""

    peak: str
    input_bytes: float
    weight_bytes: float

    @classmethod
    def of(cls, name: str) -> Arithmetic:
        """Of a plan's or a table's format."""
        chosen = get_format(_TABLE_FORMATS.get(name, name))
        return cls(chosen.activation, INPUT_BYTES[chosen.activation], float(chosen.weight_bits / 8))


def gemm_work(m: Size, n: Size, k: Size, input_bytes: Size, weight_bytes: Size) -> tuple[Floats, Floats]:
    """FLOP and bytes of out[m,n] = in[m,k] W[n,k]^T with 16-bit output; element sizes in bytes. None without rows.

    Parameters
    ----------
    m : Size               rows
    n : Size               outputs
    k : Size               inputs of each output
    input_bytes : Size     bytes of an input
    weight_bytes : Size    bytes of a weight
    """
    weights = np.asarray(n, dtype=np.float64) * k
    moved = weights * weight_bytes + m * (np.asarray(k) * input_bytes + np.asarray(n) * _HALF_BYTES)
    return 2 * weights * m, np.where(np.asarray(m) > 0, moved, 0.0)


def experts_work(
    tokens: Size,
    hidden: Size,
    expert_ffn: Size,
    experts: Size,
    held: Size,
    topk: Size,
    *,
    weight_bytes: Size,
    matrices: int = 3,
    balanced: bool | NDArray[np.bool_] = False,
) -> tuple[Floats, Floats]:
    """FLOP and bytes of (gate and) up and down projections over the tokens routed to the `held` of `experts` experts.

    Parameters
    ----------
    tokens : float64[...]               routed over all experts
    hidden, expert_ffn : float64[...]   width of the model, and of one expert on this rank
    experts, held, topk : float64[...]  experts of the layer, those on this rank, experts per token
    weight_bytes : float64[...]         of one weight as it is stored
    matrices : int                      of an expert: 3 with a gate, else 2
    balanced : bool[...]                assignments are dealt to the experts in turn, not at random

    Returns
    -------
    flops, moved : float64[...]

    Notes
    -----
    The weights of the held experts that are touched are read once: held (1 - (1 - topk/experts)^tokens) are expected
    under uniform routing, as many as there are assignments where these are `balanced`. 16-bit activations pass in and
    out of the products and through the activation.
    """
    size = np.asarray(hidden, dtype=np.float64) * expert_ffn
    share = np.asarray(topk, dtype=np.float64) / experts
    routed = np.asarray(tokens, dtype=np.float64) * share * held
    touched = held * (1 - (1 - np.minimum(share, 1.0)) ** tokens)
    touched = np.where(balanced, np.minimum(routed, held), touched)
    activations = _HALF_BYTES * routed * (2 * np.asarray(hidden) + matrices * np.asarray(expert_ffn))
    return 2 * matrices * size * routed, matrices * size * weight_bytes * touched + activations


def context_work(
    heads: _Number, kv_heads: _Number, head_dim: _Number, element_bytes: _Number, value_dim: _Number | None = None
) -> tuple[_Number, _Number]:
    """FLOP and bytes of one decoding sequence per token of its context.

    Parameters
    ----------
    heads : number            query heads
    kv_heads : number         heads of the cache
    head_dim : number         elements of a query or key head
    element_bytes : number    bytes of an element of the cache
    value_dim : number        elements of a value head; None is `head_dim`
    """
    both = head_dim + (head_dim if value_dim is None else value_dim)
    return 2.0 * heads * both, kv_heads * both * element_bytes


def latent_work(heads: float, rank: float, rope: float, element_bytes: float) -> tuple[float, float]:
    """The same over a latent cache, of which all heads read one vector per token.

    Parameters
    ----------
    heads : float            query heads
    rank : float             elements of the latent vector
    rope : float             elements with positions
    element_bytes : float    bytes of an element of the cache
    """
    return 2.0 * heads * (2 * rank + rope), (rank + rope) * element_bytes


def pair_flops(heads: _Number, key_dim: _Number, value_dim: _Number) -> _Number:
    """FLOP of one query and one key of a prompt.

    Its traffic is not counted: it hides behind the arithmetic, and the energies of serving runs are no better told with
    it (`docs/cost-model.md`).

    Parameters
    ----------
    heads : number        query heads
    key_dim : number      elements of a key
    value_dim : number    elements of a value
    """
    return 2.0 * heads * (key_dim + value_dim)


def seen_tokens(tokens: Floats, window: Size) -> Floats:
    """Tokens that a query sees of those there are; a window of 0 is none."""
    return np.where(np.asarray(window) > 0, np.minimum(tokens, window), tokens)


def causal_pairs(length: NDArray[Any], seen: NDArray[Any]) -> Floats:
    """Query-key pairs of a prompt under the causal mask whose last query sees so many tokens, itself included."""
    return np.asarray(length * seen - seen * (seen - 1) / 2)


def sparse_work(op: str, width: Size) -> tuple[Floats, Floats]:
    """FLOP and bytes per query and entry of the kernels of sparse attention.

    An indexer's score is written in 32 bits, and read by the choice. An entry that is scored is read once for many
    queries of a prompt, and is not counted; nor is what attention to the chosen reads, as in `pair_flops`.

    Parameters
    ----------
    op : str          of `SPARSE_OPS`
    width : number    elements of all heads that are multiplied
    """
    every = np.asarray(width, dtype=np.float64)
    flops = np.zeros_like(every) if op == "choice" else 2 * every
    return flops, np.zeros_like(every) if op == "attention" else np.full_like(every, _SCORE_BYTES)


class StateWork(NamedTuple):
    """Work of an operation that keeps a state, on one shard.

    Parameters
    ----------
    step_flops : number      FLOP of a token that is computed by itself
    token_flops : number     FLOP per token of a prompt
    token_bytes : number     read and written per token beside the state
    state_bytes : number     of the state of a sequence: read once and written once by a step or by a chunk of a prompt
    """

    step_flops: Any
    token_flops: Any
    token_bytes: Any
    state_bytes: Any

    def of_step(self, sequences: Size, queries: int = 1) -> tuple[Floats, Floats]:
        """FLOP and bytes of a step of so many sequences, each with so many tokens after which the state is kept."""
        each = self.state_bytes * (1 + queries) + self.token_bytes * queries
        return np.asarray(sequences * self.step_flops * queries), np.asarray(sequences * each)

    def of_prompt(self, tokens: Size) -> tuple[Floats, Floats]:
        """FLOP and bytes of so many tokens of one prompt."""
        moved = np.where(np.asarray(tokens) > 0, 2 * self.state_bytes + self.token_bytes * tokens, 0.0)
        return np.asarray(self.token_flops * tokens), moved


def recurrence_work(
    kind: str, heads: Size, key: Size, value: Size, key_heads: Size, state_bytes: Size, chunk: Size = 64
) -> StateWork:
    """Work of a recurrence over `heads` matrices of `key` by `value`.

    A step lets the state decay (1 FLOP per element), adds an outer product and reads it out (2 each); delta rules first
    take back what the state holds under the key (2 more). Within a chunk of a prompt queries meet keys, and what comes
    of it meets values; delta rules solve for what to write, which takes products of keys with keys and of the solution
    with keys and values; the state is added to and read out once per token, and delta rules take back once. Mamba1
    steps through a prompt. Queries, keys, values and what comes out are 16 bit, gates 32: one per head, of KDA one per
    element of the keys of all heads.

    Parameters
    ----------
    kind : str              of `Recur`
    heads : number          matrices of the state
    key, value : number     their rows and columns
    key_heads : number      heads of queries and keys
    state_bytes : number    of an element
    chunk : number          tokens of a prompt computed at once

    Source
    ------
    Dao and Gu, "Transformers are SSMs", 2024, section 6; Yang et al., "Parallelizing linear transformers with the delta
    rule", 2024, section 3.
    """
    matrices = np.asarray(heads, dtype=np.float64)
    size = matrices * key * value
    delta = kind in ("gated_delta", "kda")
    gates = matrices * key if kind == "kda" else matrices
    token_bytes = _HALF_BYTES * (2 * np.asarray(key_heads) * key + 2 * matrices * value) + _GATE_BYTES * gates
    step_flops = (7.0 if delta else 5.0) * size
    within = 3 * np.asarray(key) + 2 * np.asarray(value) if delta else np.asarray(key) + np.asarray(value)
    token_flops = 2.0 * matrices * chunk * within + (6.0 if delta else 4.0) * size
    if kind == "mamba1":
        token_flops = step_flops
    return StateWork(step_flops, token_flops, token_bytes, size * state_bytes)


def convolution_work(channels: Size, kernel: Size) -> StateWork:
    """Work of a causal convolution over so many channels and tokens, in 16 bits."""
    flops = 2.0 * np.asarray(kernel) * channels
    return StateWork(
        flops, flops, 2.0 * _HALF_BYTES * np.asarray(channels), _HALF_BYTES * (np.asarray(kernel) - 1) * channels
    )


def encoder_work(
    heads: Size, kv_heads: Size, width: Size, tokens: Size, window: Size | None = None
) -> tuple[Floats, Floats]:
    """FLOP and bytes of attention of an input whose tokens all see each other, or those of their window.

    Parameters
    ----------
    heads, kv_heads : number    query heads, and heads of keys and values
    width : number              elements of a head
    tokens : float64[...]       of the input
    window : number or None     tokens that see each other
    """
    length = np.asarray(tokens, dtype=np.float64)
    pairs = length * (length if window is None else np.minimum(length, window))
    moved = 2.0 * _HALF_BYTES * length * (np.asarray(heads) + np.asarray(kv_heads)) * width
    return 4.0 * np.asarray(heads) * width * pairs, np.asarray(moved)


def hyper_work(tokens: Size, hidden: float, streams: float) -> tuple[Floats, Floats]:
    """FLOP and bytes of mixing residual streams around one cell.

    All streams give the weights by which they are summed, added to and mixed, as a product with (2 + streams) x streams
    columns; they are read before the cell, read again and written after it, in 16 bits.

    Parameters
    ----------
    tokens : float64[...]
    hidden : float     elements of a stream
    streams : float    how many
    """
    rows, width = np.asarray(tokens, dtype=np.float64), hidden * streams
    products = 2.0 * width * (2 + streams) * streams
    sums = 2.0 * width * (2 + streams)
    return rows * (products + sums), rows * _HALF_BYTES * (3 * width + 2 * hidden)
