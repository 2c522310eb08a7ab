"""What there is beside a replica of SGLang that computes prompts and answers side by side; without the compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64

# Equal to those of `simulator.phases`; `pack.multiplexing` checks it.
SCALE = 10_000
SLICED_TOKENS = 65_536
DIVISOR = 36

# Facts: KV blocks, divisions and layers;  whether the GPU is to be divided anew, and whether the turn before
# found nobody to run; the batch of prompts under way, its time on the whole GPU, the layers of a slice of it and those
# that were started, and when all slices that were started are done; the paces; and what came of the replica.
(
    BLOCKS,
    DIVISIONS,
    LAYERS,
    CHANGED,
    AGAIN,
    UNDER_WAY,
    WHOLE_NS,
    SLICE,
    SLICED,
    STREAM_NS,
    PREFILL_PACE,
    DECODE_PACE,
    BUSY_NS,
    MOST_BLOCKS,
    FACTS_SIZE,
) = range(15)

# Columns of `Multiplexed.tokens`: when each request got its last token, and where its gaps begin.
LAST_NS, GAPS_AT, TOKENS_SIZE = range(3)


class Multiplexed(NamedTuple):
    """Memory of a replica beside that of `Run` and `Sglang`."""

    facts: I64
    paces: I64  # of prompts and of answers, of each division
    tokens: I64  # columns, of each request
    gaps: I64
