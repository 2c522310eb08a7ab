"""Kernels that a shard of a cell runs, each with what its work and its time depend on.

Names are those that times are shown under. What a kernel counts as work is in `apex_opt.profiles.physics`, how long it
takes in `apex_opt.profiles.operations`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Product(NamedTuple):
    """out[m, n] = in[m, k] W[n, k]^T over m tokens, in the format that `quantised` numbers as `Matrix` does."""

    name: str
    n: int
    k: int
    quantised: int = 0
    shared: bool = False
    """Of the FFN beside experts, which is cut on its own; here and below."""


class Elementwise(NamedTuple):
    """A kernel that only reads and writes memory.

    Parameters
    ----------
    name : str
    row_bytes : float       read and written per token
    kind : str              "plain", "norm" or "activation"
    width : int             elements of a row, where they matter
    fused_as : str          operation that some engines fuse with the kernel before or after; "" where none does
    """

    name: str
    row_bytes: float
    kind: Literal["plain", "norm", "activation"] = "plain"
    width: int = 0
    fused_as: str = ""
    shared: bool = False


class Experts(NamedTuple):
    """Fused experts: `columns` of every expert of one of so many `groups`, in the format that `quantised` numbers.

    A token chooses `topk` of all `experts`, each of which has so many `matrices` of hidden by columns.
    """

    hidden: int
    columns: int
    experts: int
    groups: int
    topk: int
    matrices: int
    quantised: int = 0

    @property
    def name(self) -> str:
        """What its time is shown under."""
        return "experts"

    @property
    def shared(self) -> bool:
        """Of the FFN beside experts: never."""
        return False


class Attend(NamedTuple):
    """Causal attention of so many query heads and KV heads of one shard.

    Parameters
    ----------
    heads, kv_heads : int       query heads and heads of the cache
    width : int                 elements of a query or key head
    window : int or None        tokens a query sees at most, itself included; None is the whole context
    value_width : int or None   elements of a value head; None is `width`
    chunked : bool              the window is a chunk of positions instead, of which a query sees what precedes it, as
                                in Llama 4: the context is cut at its multiples
    topk : int or None          tokens a query sees at most, which an indexer (`Score`) chose from the whole context
    """

    heads: int
    kv_heads: int
    width: int
    window: int | None = None
    value_width: int | None = None
    chunked: bool = False
    topk: int | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the context beyond which a query sees no more, None where there is no such number."""
        return self.window if self.topk is None else min(self.topk, self.window or self.topk)


class AttendLatent(NamedTuple):
    """Causal attention over a latent cache: one vector of `rank` and a rotary key of `rope` that all heads share.

    Prompts compute with a key and a value of `key` and `value` elements per head: those that are expanded from the
    vector, or the vector itself (rank + rope and rank) where the kernel does not expand it, as sparse ones do not.

    Parameters
    ----------
    heads : int             query heads of the shard
    rank, rope : int        elements of the vector, which is key and value, and of the key beside it
    key, value : int        elements per head that prompts compute with
    window : int or None    tokens a query sees at most, itself included; None is the whole context
    topk : int or None      entries a query sees at most, which an indexer (`Score`) chose
    ratio : int             tokens of the context that one entry of the cache stands for, as in DeepSeek-V4
    token_bytes : float     of an entry in the cache; 0: rank + rope elements of its format
    """

    heads: int
    rank: int
    rope: int
    key: int
    value: int
    window: int | None = None
    topk: int | None = None
    ratio: int = 1
    token_bytes: float = 0.0

    @property
    def limit(self) -> int | None:
        """Tokens of the context beyond which a query sees no more, None where there is no such number."""
        return self.window if self.topk is None else min(self.topk * self.ratio, self.window or self.topk * self.ratio)


class AttendEncoder(NamedTuple):
    """Attention of an encoder: every token of an input sees all of them, and nothing is kept.

    Parameters
    ----------
    heads, kv_heads : int    query heads, and heads of keys and values
    width : int              elements of a head
    window : int or None     tokens of the input that see each other, as in the windows of vision towers; None is all
    """

    heads: int
    kv_heads: int
    width: int
    window: int | None = None


class AttendCross(NamedTuple):
    """Attention of every token over the tokens of an encoder, whose keys and values were computed once.

    Parameters
    ----------
    heads, kv_heads : int    query heads and heads of the cache
    width : int              elements of a head
    tokens : int             of the encoder, per sequence
    """

    heads: int
    kv_heads: int
    width: int
    tokens: int


class Score(NamedTuple):
    """An indexer's scores of all the context that a query may see, and the choice of the highest.

    Parameters
    ----------
    heads, width : int      heads of the indexer on this shard, and elements of each
    topk : int              entries chosen
    token_bytes : float     read of the indexer's cache per entry, such as 132: 128 in 8 bits and a scale
    ratio : int             tokens of the context that one entry stands for
    """

    heads: int
    width: int
    topk: int
    token_bytes: float
    ratio: int = 1

    @property
    def name(self) -> str:
        """What its time is shown under."""
        return "indexer"


class Recur(NamedTuple):
    """A recurrence over a state of `heads` matrices of `key` by `value` per sequence, of one shard.

    Prompts are computed `chunk` tokens at a time, with products within a chunk and the state handed on from one to the
    next; decoding sequences read and write their state once a step. Mamba1 steps through a prompt token by token.

    Parameters
    ----------
    kind : str               "gated_delta" (Qwen3-Next), "kda" (Kimi), "mamba2", "mamba1" or "lightning" (MiniMax)
    heads : int              matrices of the state: value heads; heads of Mamba2; channels of Mamba1
    key, value : int         rows and columns of each: key and value width; state size and head width of Mamba (1 of
                             Mamba1)
    key_heads : int          heads that queries and keys have: key heads; groups of B and C of Mamba
    state_bytes : float      of an element of the state
    chunk : int              tokens of a prompt computed at once
    """

    kind: Literal["gated_delta", "kda", "mamba2", "mamba1", "lightning"]
    heads: int
    key: int
    value: int
    key_heads: int
    state_bytes: float = 4.0
    chunk: int = 64

    @property
    def name(self) -> str:
        """What its time is shown under."""
        return "recurrence"


class Convolve(NamedTuple):
    """A causal convolution over the last `kernel` tokens of so many channels, which keeps kernel - 1 of them.

    Parameters
    ----------
    channels : int    of one shard
    kernel : int      tokens that an output depends on
    """

    channels: int
    kernel: int

    @property
    def name(self) -> str:
        """What its time is shown under."""
        return "convolution"


class HyperConnect(NamedTuple):
    """Residual streams mixed before a cell and after it, as in DeepSeek-V4: both together, whole on every shard.

    Parameters
    ----------
    hidden : int     elements of a stream
    streams : int    residual streams, of which a cell sees a weighted sum
    """

    hidden: int
    streams: int

    @property
    def name(self) -> str:
        """What its time is shown under."""
        return "hyper connections"

    @property
    def shared(self) -> bool:
        """Of the FFN beside experts: never."""
        return False


Linear = Product | Elementwise | Experts | HyperConnect
"""What grows with the tokens of a batch alone."""
Stateful = Recur | Convolve
"""What reads and writes a state of every sequence."""
Contextual = Attend | AttendLatent | AttendEncoder | AttendCross | Score
"""What grows with the context of a sequence."""
Op = Linear | Stateful | Contextual


def norm(hidden: int) -> Elementwise:
    """Residual addition and norm before a cell: both read and written in 16 bit."""
    return Elementwise("norm", 8.0 * hidden, "norm", hidden, "norm")
