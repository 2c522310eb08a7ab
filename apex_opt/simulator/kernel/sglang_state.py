"""Where everything is of the engine of SGLang: its registers, and the columns of what it keeps, each named once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from apex_opt.simulator.kernel.state import COMMON_SIZE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from apex_opt.simulator.kernel.state import I64, Run

    F64 = NDArray[np.float64]

# Equal to those of `reference.sglang`; `pack.sglang` checks it.
CLIP = 4096
AHEAD = 20
SORTED_UP_TO = 128
REFRESHED_EVERY = 32
ALIKE = 32

ERROR_NODES = 2  # the tree needs more nodes


class Sglang(NamedTuple):
    """What the engine keeps beside `Run`."""

    registers: I64  # of each replica, then of each of its slots
    ratio: F64  # of each replica


class Tree(NamedTuple):
    """`reference.tree.PrefixTree` over `tokens.TokenContent`."""

    piece_tokens: int
    pieces: I64
    starts: I64
    own: I64
    last: I64
    nodes: I64
    slots: I64  # nodes by the content of their first page, in an open-addressing table
    heap: I64  # leaves that nobody uses, by when they were used, as far as that was known when they came in


class Engine(NamedTuple):
    """A replica, as most functions need it."""

    run: Run
    r: I64  # its row of `Run.replicas`
    g: I64  # its registers
    ratio: F64


# Columns of `Run.requests` after those all engines have. A sequence on a running list has OFFSET + S_STEPS tokens, one
# on its way included; who is not has COMPUTED and PAGES. GENERATED is of before its last prompt.
(STATED, OFFSET, COMPUTED, PAGES, HELD, NODE, PLACE, ADMITTED, COMING, SGLANG_REQUEST_SIZE) = range(
    COMMON_SIZE, COMMON_SIZE + 10
)
WAITS, CHUNKS, RUNS, LEAVES, DONE = range(5)  # values of PLACE; who leaves has its last token on the way

# Registers of a replica: settings, where its scratch memory begins, and what changes.
(
    G_SLOTS,
    G_MOST_RUNNING,
    G_MAX_PREFILL,
    G_LPM,
    G_MIXES,
    G_IGNORE_EOS,
    G_WAIT_AT,
    G_WAIT_MASK,
    G_FLIGHT_AT,
    G_FLIGHT_SIZE,
    G_SORT_AT,
    G_NODE_AT,
    G_MOST_NODES,
    G_HASH_AT,
    G_HASH_MASK,
    G_HEAP_AT,
    G_SLOT_AT,
    G_WAIT_HEAD,
    G_WAIT_TAIL,
    G_CHUNKED,
    G_SEATS,
    G_PASSES,
    G_TURNS,
    G_BEGUN,
    G_IDLE,
    G_NODES,  # handed out so far
    G_FREE_NODE,  # first of those given back, chained by N_PARENT
    G_SPARE_NODES,
    G_NODES_A_TURN,
    G_CLOCK,
    G_EVICTABLE,
    G_HEAP,
    G_BEYOND,  # tokens after a page without which its content is not known
    G_EVERY,  # turns between two looks for new requests
    G_PASSED,  # turns since the last look; G_EVERY after one with prompts
    # Budgets of a batch of prompts that is being formed.
    P_ROWS,
    P_SEATED,
    P_CHUNK,
    P_INPUTS,
    P_NOW,
    P_CUT,
    P_FUTURES,
    P_TOKENS,
    G_SIZE,
) = range(44)

# Registers of a slot: where its running list and residues begin. S_LAST tells of its last batch.
(
    S_RUNNING_AT,
    S_RESIDUE_AT,
    S_RUNNING,
    S_STEPS,
    S_NEXT_END,
    S_CONTEXT,
    S_FULL,
    S_CHUNKED,
    S_LAST,
    S_LEFT,  # so many are done and still on its running list
    S_DUE,  # somebody on it may have its last token on the way
    S_COMING,  # those from this place on have a token on the way
    S_CAME,  # but not those from this place on
    S_SIZE,
) = range(14)
NOTHING, PROMPTS, MIXED = range(3)  # values of S_LAST

# A batch in flight: these, then its rows of prompts as 2 * request + yields, then who gets its last token by its step;
# with drafts all of its step instead, as 16 * request + tokens that come, and where they stand in the log.
(F_END, F_ROWS, F_PROMPTS, F_ENDERS, F_STEP, F_LOGGED, F_SIZE) = range(7)

# Ratios: the present one, that at the start, the least, and by how much it falls in a step; then what is taken of the
# room by the batch of prompts that is being formed.
R_RATIO, R_START, R_LEAST, R_DECAY, R_TAKEN, R_SIZE = range(6)

# Columns of `Tree.nodes`: a node has pages N_FROM to N_TO - 1 of request N_OWNER.
(N_OWNER, N_FROM, N_TO, N_PARENT, N_CHILDREN, N_USERS, N_USED, N_QUEUED, N_SIZE) = range(9)
ROOT = 0
