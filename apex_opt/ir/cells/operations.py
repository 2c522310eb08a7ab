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
    """Attention of so many query heads and KV heads over the context, or over a window of it."""

    heads: int
    kv_heads: int
    width: int
    window: int | None = None


class AttendLatent(NamedTuple):
    """Attention over a latent cache: a vector of `rank` and a rotary key of `rope` that all heads share.

    Prompts expand it to a key and a value of `key` and `value` elements per head.
    """

    heads: int
    rank: int
    rope: int
    key: int
    value: int


Linear = Product | Elementwise | Experts
"""What grows with the tokens of a batch alone."""
Op = Linear | Attend | AttendLatent


def norm(hidden: int) -> Elementwise:
    """Residual addition and norm before a cell: both read and written in 16 bit."""
    return Elementwise("norm", 8.0 * hidden, "norm", hidden, "norm")
