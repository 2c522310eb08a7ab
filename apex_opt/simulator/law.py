"""The time of one batch on one stage, as integer tables.

The shape of the law follows from what the kernels do: everything that is linear in the weights depends on the number
of tokens alone, decode attention on the number of decoding sequences and the context they read, prefill attention
on each chunk and its context. Every term is therefore a table over a small integer, times at most one running sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from apex_opt.errors import CapacityError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def no_table() -> NDArray[np.int64]:
    """A table that is not used."""
    return np.zeros(0, np.int64)


def no_tables() -> NDArray[np.int64]:
    """Tables of no window."""
    return np.zeros((0, 0), np.int64)


class Window(NamedTuple):
    """How much of the context a query sees where that is not all of it.

    Parameters
    ----------
    tokens : int      most that a query sees, itself included: the last ones, or as many that an indexer chose
    chunked : bool    it sees those from the last multiple of `tokens` on instead, as in Llama 4
    """

    tokens: int
    chunked: bool = False

    @classmethod
    def of(cls, stamp: int) -> Window:
        """The window of a stamp."""
        return cls(abs(stamp), stamp < 0)

    @property
    def stamp(self) -> int:
        """As the kernel has it: below zero where chunked."""
        return -self.tokens if self.chunked else self.tokens

    def seen(self, held: NDArray[np.int64]) -> NDArray[np.int64]:
        """What the last of so many tokens sees."""
        return self.all_pairs(held) - self.all_pairs(held - 1)

    def all_pairs(self, length: NDArray[np.int64]) -> NDArray[np.int64]:
        """Query-key pairs of the first tokens of a sequence, so many each."""
        if self.chunked:
            chunks, rest = length // self.tokens, length % self.tokens
            return np.asarray(chunks * (self.tokens * (self.tokens + 1) // 2) + rest * (rest + 1) // 2)
        rising = np.minimum(length, self.tokens)
        return np.asarray(rising * (rising + 1) // 2 + (length - rising) * self.tokens)

    def pairs(self, c: int, held: int) -> int:
        """Query-key pairs of a chunk of `c` tokens after which a sequence holds so many."""
        first, last = self.all_pairs(np.array([held - c, held], np.int64))
        return int(last - first)


LARGEST: Final = 1 << 58
"""Nanoseconds (nine years) that one batch may take on a stage: sums of two such stay far within 63 bits."""

RATE_BITS: Final = 20
"""Rates are integers in 2**-20 ns, so that fractions of a nanosecond per token are kept."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchLaw:
    """Nanoseconds of one batch on one stage.

    A batch of `t` tokens in `n` sequences, `d` of them with a single token (decoding) and `context` the tokens these
    `d` hold once the batch is done, takes

    - if `d == n`: ``decode_ns[n] + (context_rate[n] * context >> 20)``
    - else: ``mixed_ns[t] + sequence_ns[n] + attend_ns[d] + (context_rate[d] * context >> 20)`` plus, for every
      sequence with a chunk of `c > 1` tokens that holds `h` tokens once the batch is done,
      ``chunk_ns[c] + (pair_rate[c] * (c*h - c*(c-1)/2) + chunk_context_rate[c] * h >> 20)``

    where ``c*h - c*(c-1)/2`` counts the query-key pairs of causal attention. Where attention has several copies, a
    sequence belongs to one and prompts are computed side by side: the sum over chunks is divided, rounding down, by
    the smaller of `copies` and the number of chunks. `transfer_ns[t]` is what the activations
    then need to reach the next stage; it delays the batch without occupying either stage.

    Layers whose queries see no more than a window of so many tokens are charged apart: `windows` lists these, and with
    ``seen = min(context, d * tokens)`` the decoding sequences take ``seen_rate[w, d] * seen`` more, added before
    the shift, and a chunk ``seen_pair_rate[w, c]`` per pair within the window. The window of one sequence may be full
    while that of another is not: what all see is then no more than `seen`, which is what they are charged, and each
    sees what it is charged where all are shorter than the window or none is. Of chunked windows a decoding sequence is
    charged the whole chunk, of which it sees half on average.

    Where drafts are verified a row of up to ``1 + draft_tokens`` tokens is a decoding one, whose context is read once
    for all of them: `d` and `context` are of such rows, chunks are longer, and a batch of decoding rows alone takes
    ``verify_ns[t]`` more. A batch in which a row yields then makes drafts, which takes
    ``draft_ns[n] + (draft_rate[n] * held >> 20)`` more, where its sequences hold so much once it is done.

    Where the loop of an engine launches a batch itself it sees nothing else for `launch_ns`, if the batch has a prompt
    and more than `captured_tokens` tokens: whatever has ended by then is taken in later.

    Parameters
    ----------
    decode_ns, sequence_ns, attend_ns, context_rate : int64[max_num_seqs + 1]
    mixed_ns, chunk_ns, pair_rate, chunk_context_rate, transfer_ns : int64[max_num_batched_tokens + 1]
        times in ns, rates in 2**-20 ns; all >= 0
    copies : int
        attention copies of the stage, >= 1
    draft_tokens : int
        drafts that may follow a token; 0: none are made
    launch_ns, captured_tokens : int
        what the host takes to launch a batch with a prompt, and up to how many tokens it takes nothing; >= 0
    draft_ns, draft_rate, verify_ns : int64[max_num_seqs + 1] two times, int64[max_num_batched_tokens + 1]
        empty where none are made
    windows : tuple of Window
        in increasing order, the same for all stages of a pool
    seen_rate, seen_pair_rate : int64[windows, max_num_seqs + 1], int64[windows, max_num_batched_tokens + 1]
        rates in 2**-20 ns
    resources : tuple of BatchLaw
        where what asks for different resources runs at one time, what is asked of each: a batch takes as long as the
        busiest of them, but no longer than one operation after the other; empty where nothing runs at one time
    """

    decode_ns: NDArray[np.int64]
    sequence_ns: NDArray[np.int64]
    attend_ns: NDArray[np.int64]
    context_rate: NDArray[np.int64]
    mixed_ns: NDArray[np.int64]
    chunk_ns: NDArray[np.int64]
    pair_rate: NDArray[np.int64]
    chunk_context_rate: NDArray[np.int64]
    transfer_ns: NDArray[np.int64]
    copies: int = 1
    draft_tokens: int = 0
    launch_ns: int = 0
    captured_tokens: int = 0
    verify_ns: NDArray[np.int64] = field(default_factory=no_table)
    draft_ns: NDArray[np.int64] = field(default_factory=no_table)
    draft_rate: NDArray[np.int64] = field(default_factory=no_table)
    windows: tuple[Window, ...] = ()
    seen_rate: NDArray[np.int64] = field(default_factory=no_tables)
    seen_pair_rate: NDArray[np.int64] = field(default_factory=no_tables)
    resources: tuple[BatchLaw, ...] = ()

    def scaled(self, factor: int) -> BatchLaw:
        """The law with every time and rate multiplied by an integer."""
        scaled = {name: getattr(self, name) * factor for name in ("launch_ns", *TABLES, *OF_WINDOWS)}
        return replace(self, **scaled, resources=tuple(law.scaled(factor) for law in self.resources))

    def launching_ns(self, chunks: Sequence[tuple[int, int]]) -> int:
        """How long the host launches a batch of (tokens, tokens held once it is done) per sequence."""
        prompts = any(c > 1 + self.draft_tokens for c, _ in chunks)
        return self.launch_ns if prompts and sum(c for c, _ in chunks) > self.captured_tokens else 0

    def batch_ns(self, chunks: Sequence[tuple[int, int]], *, yields: bool = True) -> int:
        """Time of a batch given as (tokens, tokens held once it is done) per sequence, and whether a row yields."""
        whole = self._one_by_one_ns(chunks, yields=yields)
        if not self.resources:
            return whole
        return min(whole, max(law.batch_ns(chunks, yields=yields) for law in self.resources))

    def _one_by_one_ns(self, chunks: Sequence[tuple[int, int]], *, yields: bool) -> int:
        """The same by the law's own tables, one operation after the other."""
        tokens = sum(c for c, _ in chunks)
        decoding = [held for c, held in chunks if c <= 1 + self.draft_tokens]
        d, n = len(decoding), len(chunks)
        read = int(self.context_rate[d]) * sum(decoding)
        for window, rates in zip(self.windows, self.seen_rate, strict=True):
            read += int(rates[d]) * min(sum(decoding), d * window.tokens)
        total = read >> RATE_BITS
        if self.draft_tokens and yields:
            total += int(self.draft_ns[n]) + (int(self.draft_rate[n]) * sum(held for _, held in chunks) >> RATE_BITS)
        if d == n:
            return total + int(self.decode_ns[n]) + (int(self.verify_ns[tokens]) if self.draft_tokens else 0)
        total += int(self.mixed_ns[tokens]) + int(self.sequence_ns[n]) + int(self.attend_ns[d])
        prompts = 0
        for c, held in chunks:
            if c > 1 + self.draft_tokens:
                pairs = c * held - c * (c - 1) // 2
                rates = int(self.pair_rate[c]) * pairs + int(self.chunk_context_rate[c]) * held
                for window, seen in zip(self.windows, self.seen_pair_rate, strict=True):
                    rates += int(seen[c]) * window.pairs(c, held)
                prompts += int(self.chunk_ns[c]) + (rates >> RATE_BITS)
        return total + prompts // min(self.copies, n - d)


OF_WINDOWS: Final = ("seen_rate", "seen_pair_rate")
"""Names of the tables of a law that have a row for each window."""
TABLES: Final = tuple(
    f.name
    for f in fields(BatchLaw)
    if f.name not in ("copies", "draft_tokens", "launch_ns", "captured_tokens", "windows", "resources", *OF_WINDOWS)
)
"""Names of its other tables, those of drafts last."""

_BY_TOKENS: Final = frozenset(
    ("mixed_ns", "chunk_ns", "pair_rate", "chunk_context_rate", "transfer_ns", "verify_ns", "seen_pair_rate")
)
_OF_DRAFTS: Final = {"verify_ns", "draft_ns", "draft_rate"}


_OF_A_BATCH: Final = ("decode_ns", "mixed_ns", "sequence_ns", "attend_ns", "transfer_ns", "verify_ns", "draft_ns")


def check_laws(
    laws: Sequence[BatchLaw],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    longest: int,
    held: int,
    draft_tokens: int = 0,
) -> None:
    """Refuse laws that do not fit the engine, or whose sums could leave 63 bits.

    Parameters
    ----------
    laws : BatchLaw of each stage
    max_num_seqs, max_num_batched_tokens : the engine's limits, which the tables must reach
    longest, held : int    tokens of the longest request; of all sequences that can run at once
    draft_tokens : int     drafts that the engine asks for

    Raises
    ------
    UsageError    no stage; a table too short; negative entries; less than one attention copy; entries too large
    """
    if not laws:
        raise UsageError("a plan needs a batch law for each of its stages, got none")
    first = {id(law): stage for stage, law in reversed(list(enumerate(laws)))}  # stages alike share their law
    for stage in sorted(first.values()):
        law = laws[stage]
        if law.draft_tokens != draft_tokens:
            raise UsageError(f"stage {stage}: the law is of {law.draft_tokens} drafts, the engine makes {draft_tokens}")
        if law.windows != laws[0].windows:
            raise UsageError(f"stage {stage}: the law has the windows {law.windows}, that of stage 0 {laws[0].windows}")
        if any(window.tokens < 1 for window in law.windows):
            raise UsageError(f"stage {stage}: a window must have a token at least, got {law.windows}")
        for name in (*TABLES, *OF_WINDOWS):
            if name in _OF_DRAFTS and not draft_tokens:
                continue
            table = np.asarray(getattr(law, name))
            limit = max_num_batched_tokens if name in _BY_TOKENS else max_num_seqs
            wanted = (len(law.windows), limit + 1) if name in OF_WINDOWS else (limit + 1,)
            if table.shape != wanted and (law.windows or name not in OF_WINDOWS):
                raise UsageError(
                    f"stage {stage}: {name} has {table.shape[-1]} entries, the engine's limits need {limit + 1}"
                )
            if int(table.min(initial=0)) < 0:
                raise UsageError(f"stage {stage}: {name} must not be negative, it holds {int(table.min())}")
        if min(law.launch_ns, law.captured_tokens) < 0 or law.launch_ns > LARGEST:
            raise UsageError(
                f"stage {stage}: launch_ns {law.launch_ns} or captured_tokens {law.captured_tokens} is out of range"
            )
        if law.copies < 1:
            raise UsageError(f"stage {stage}: a batch law needs at least one attention copy, not {law.copies}")
        most = {name: int(np.max(getattr(law, name), initial=0)) for name in TABLES}
        seen, seen_pair = (int(np.sum(np.max(getattr(law, name), axis=1, initial=0))) for name in OF_WINDOWS)
        pair = most["pair_rate"] + seen_pair
        worst = {
            "decode attention": (most["context_rate"] + seen + most["draft_rate"]) * held,
            "prefill attention": (pair * max_num_batched_tokens + most["chunk_context_rate"]) * longest,
            "a batch": sum(most[name] for name in _OF_A_BATCH)
            + most["chunk_ns"] * min(max_num_batched_tokens, max_num_seqs),
        }
        for name, value in worst.items():
            if value >= (LARGEST if name == "a batch" else LARGEST << 4):
                raise UsageError(
                    f"stage {stage}: {name} of this plan and trace would overflow 63 bits; use a shorter trace or "
                    "smaller times"
                )


def clock_overflow() -> UsageError:
    """The error for a run that does not end within the simulated clock."""
    return UsageError(
        "the simulated clock passes 2**62 ns (146 years) before the last request ends; use a shorter trace"
    )


def never_admitted() -> CapacityError:
    """The error for a run in which somebody waits for ever."""
    return CapacityError(
        "a request waits for ever: SGLang admits it only where its prompt and all it says it may generate fit; "
        "lower max_new_tokens, or use more or larger GPUs or a smaller KV format"
    )


def linear_law(
    *,
    base_ns: int,
    token_ns: int,
    context_ns: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    draft_tokens: int = 0,
    draft_ns: int = 0,
) -> BatchLaw:
    """The law ``base + token * tokens + context * (tokens held by all sequences)``, as the recorded batches use it.

    All arguments in whole nanoseconds (per token for the second and third). Where drafts are made ``draft`` for each
    that may follow a token is added in batches with a row that yields.

    Parameters
    ----------
    base_ns : int                   time of every batch
    token_ns : int                  time of every token in it
    context_ns : int                time of every token in their contexts
    max_num_seqs : int              sequences of a batch
    max_num_batched_tokens : int    tokens of a batch
    draft_tokens : int              drafts that may follow a token
    draft_ns : int                  time of making one for every sequence
    """
    sequences = np.arange(max_num_seqs + 1, dtype=np.int64)
    tokens = np.arange(max_num_batched_tokens + 1, dtype=np.int64)
    rate = context_ns << RATE_BITS
    law = BatchLaw(
        decode_ns=np.full_like(sequences, base_ns) if draft_tokens else base_ns + token_ns * sequences,
        sequence_ns=np.zeros_like(sequences),
        attend_ns=np.zeros_like(sequences),
        context_rate=np.full_like(sequences, rate),
        mixed_ns=base_ns + token_ns * tokens,
        chunk_ns=np.zeros_like(tokens),
        pair_rate=np.zeros_like(tokens),
        chunk_context_rate=np.full_like(tokens, rate),
        transfer_ns=np.zeros_like(tokens),
    )
    if not draft_tokens:
        return law
    return replace(
        law,
        draft_tokens=draft_tokens,
        verify_ns=token_ns * tokens,
        draft_ns=np.full_like(sequences, draft_ns * draft_tokens),
        draft_rate=np.zeros_like(sequences),
    )
