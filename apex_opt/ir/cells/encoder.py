"""Attention of encoders, and of decoders that look at what an encoder made of a request's input."""

from __future__ import annotations

from dataclasses import dataclass

from apex_opt.ir.cells.attention import Attention
from apex_opt.ir.cells.base import WHOLE, Cut, Kept, Matrix
from apex_opt.ir.cells.operations import Attend, AttendCross, AttendEncoder, Elementwise, Op, Product
from apex_opt.ir.checks import check_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderAttention(Attention):
    """Attention of which every token sees the whole input, or its window of it; nothing is kept afterwards."""

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept, ...]:
        """Nothing."""
        return ()

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Those of attention, without a write to the cache."""
        found: list[Op] = []
        for op in Attention.operations(self, cut, kv_bytes):
            if isinstance(op, Attend):
                found.append(AttendEncoder(op.heads, op.kv_heads, op.width, op.window))
            elif not isinstance(op, Elementwise) or op.name != "kv write":
                found.append(op)
        return tuple(found)

    @property
    def launches(self) -> tuple[int, int]:
        """Norm, QKV, attention, output."""
        return 4, 4

    @property
    def kind(self) -> str:
        """Attention of an encoder."""
        return "encoder attention"

    @property
    def traits(self) -> frozenset[str]:
        """What rules of engines ask of."""
        return frozenset({"encoder"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossedAttention(Attention):
    """Self-attention, then attention to the encoder's tokens, whose keys and values are computed once per request.

    Parameters
    ----------
    source_tokens : int or None    of the encoder, per request; None: those of its prompt
    """

    source_tokens: int | None = None

    def __post_init__(self) -> None:
        Attention.__post_init__(self)
        check_counts("cross attention", source_tokens=1 if self.source_tokens is None else self.source_tokens)

    def matrices(self, cut: Cut = WHOLE) -> tuple[Matrix, ...]:
        """Weights of one shard: the same for either attention."""
        own = Attention.matrices(self, cut)
        return *own, *(matrix._replace(name=f"cross {matrix.name}") for matrix in own)

    def cache(self, cut: Cut = WHOLE) -> tuple[Kept, ...]:
        """Keys and values of the tokens so far, and of all tokens of the encoder; of a prompt either or."""
        found = Attention.cache(self, cut)
        if self.source_tokens is None:
            return found
        return *found, *(kept._replace(fixed_tokens=self.source_tokens) for kept in found)

    def operations(self, cut: Cut, kv_bytes: int) -> tuple[Op, ...]:
        """Self-attention, then query, attention to the encoder's tokens, output projection.

        Where the encoder reads the prompt, its tokens and those generated are one context, of which each is seen once.
        """
        own = Attention.operations(self, cut, kv_bytes)
        (op,) = (op for op in own if isinstance(op, Attend))
        width = op.heads * op.width
        cross = (
            () if self.source_tokens is None else (AttendCross(op.heads, op.kv_heads, op.width, self.source_tokens),)
        )
        return (
            *own,
            Product("cross query", width, self.hidden, quantised=self.quantised),
            *cross,
            Product("cross output", self.hidden, width, quantised=self.output_quantised),
        )

    def source_operations(self, cut: Cut) -> tuple[Product, ...]:
        """Keys and values of the encoder's tokens, over these."""
        key = self._widths(cut)[1]
        return (Product("cross keys", 2 * key, self.hidden, quantised=self.quantised),)

    @property
    def launches(self) -> tuple[int, int]:
        """Those of both."""
        return 11, 11

    @property
    def kind(self) -> str:
        """Both."""
        return "attention with cross attention"

    @property
    def sums(self) -> int:
        """Times that the shards of a copy add up what they hold."""
        return 2
