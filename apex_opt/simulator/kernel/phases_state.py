"""Memory of a replica whose phases share a GPU: its facts, loops, requests and tables; without the compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64

SCALE = 10_000  # equal to that of `simulator.phases`; `pack.phases` checks it

# Facts of a replica: settings, then what came of it.
(
    REQUESTS,
    BLOCKS,
    BLOCK_SIZE,
    SEATS,
    TOKENS,
    CHUNKED,
    PREEMPTIONS,
    MOST_BLOCKS,
    FREE,
    COME,  # arrivals so far
    HEAD,  # of these the first that waits
    BACK,  # waiting requests that had given way, the last of them first
    ENTERED,
    ANSWERED,
    FACTS_SIZE,
) = range(15)

# Registers of a loop: its paces, the batch under way, and what came of it.
(ALONE, BESIDE, ROWS, SINCE, LEFT, FACTOR, END, STARTED, BUSY, BATCHES, LOOP_SIZE) = range(11)

# Columns of requests.
(ARRIVAL, PROMPT, WANTED, FIRST, LAST, COMPUTED, HELD, GOT, GAPS_AT, COLUMNS) = range(10)

# Tables of the law and counts: those by sequences, then those by tokens.
(DECODE_NS, SEQUENCE_NS, ATTEND_NS, CONTEXT_RATE) = range(4)
(MIXED_NS, CHUNK_NS, PAIR_RATE, CHUNK_CONTEXT_RATE) = range(4)
(N_DECODE, N_DECODE_CONTEXT, N_SEQUENCES, N_ATTEND, N_ATTEND_CONTEXT) = range(5)
(N_MIXED, N_CHUNK, N_CHUNK_PAIRS, N_CHUNK_CONTEXT) = range(4)


class Replica(NamedTuple):
    """Memory of a replica."""

    facts: I64
    prompts: I64  # registers of either loop
    answers: I64
    requests: I64
    law: I64
    counts: I64
    back: I64  # lists of requests: who gave way and waits, who has entered, who is answered
    entered: I64
    answered: I64
    chunk: I64  # of each row of the batch of prompts under way
    gaps: I64
