"""Where everything is: the flat arrays of a run, and the columns of their rows, each named once."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    I64 = NDArray[np.int64]
    I32 = NDArray[np.int32]

NEVER = 1 << 62
NONE = -1
EVICTED = -2
RATE_BITS = 20  # equals law.RATE_BITS; `pack.memory` checks it

VLLM, ORCA, STATIC = range(3)  # whose rules a scheduler goes by
ERROR_STUCK = 1  # a turn with work that scheduled nothing: a request larger than the pool slipped through


class Run(NamedTuple):
    """All memory of a run; in compiled code each array is the address of its first entry (`jit.at`).

    A request is known by its place in the trace. `requests` and `floors` hold a column after the other, each with an
    entry for every request; `replicas`, `stages`, `stops` and the log hold rows, whose columns are named below.
    """

    control: I64
    requests: I64
    replicas: I64
    stages: I64
    laws: I64  # see `batch.batch_ns`
    counts: I64  # `outcome.BatchCounts`, of one pool of replicas after the other
    scratch: I64  # where a replica's row says so; replicas that run in turn share theirs
    stops: I64
    floors: I64
    steps: I64
    rows: I64
    lost: I64  # preempted requests, in the order of the log


class Cache(NamedTuple):
    """`reference.blocks.PrefixCachingManager`: lists of blocks as links in columns."""

    piece_blocks: int  # `content.BlockContent`
    pieces: I64
    starts: I64
    own: I64
    shared: I64
    registered: I64  # of each request, blocks whose content can be found
    slot: I64  # of each request, where its blocks stand in `table`
    slots: I64  # slots of `table` not in use, a stack
    memo: I64  # what was found last, so that a request that waits in front is not looked up again
    table: I32  # of each slot, the blocks of a request; half the bytes, as these are large and read all over
    block: I32  # what is known of each block, side by side as it is used together
    holder: I32  # of each content, the oldest block


class Routers(NamedTuple):
    """The memory of the routers before prefill and decode instances, as `router_state` has it."""

    prefill: I64
    decode: I64


class Links(NamedTuple):
    """What there is beside a `Run` where prompts are handed over.

    The first half of the requests are prompts, the second their answers; the first replicas compute prompts.
    """

    facts: I64
    instances: I64  # a row for each replica
    ends: I64  # columns, of each prompt and each answer
    passages: I64  # columns, of each prompt


# Columns of `Run.control`: requests, limits to stop at, the first arrival, whether a limit is passed; whether batches
# are logged, how many rows there are of each kind, which run on past the capacity, so that a second run can be given
# enough, and the capacities.
(SIZE, STOPS, ORIGIN, PASSED, LOGGED, STEPS, ROWS, LOST, MOST_STEPS, MOST_ROWS, MOST_LOST) = range(11)
# From an answer to the next request of the same client; where prompts are handed over, how many requests are prompts,
# which the same number of answers come after.
PAUSE_NS, HANDED, CONTROL_SIZE = range(11, 14)

# Columns of `Run.requests`. FOLLOWING chains the requests of one replica, UNDER those preempted, a stack.
(ARRIVAL, PROMPT, OUTPUT, LIMIT, FOLLOWING, FIRST, FINISH, GENERATED, UNDER, COMMON_SIZE) = range(10)
# Of the steady engine: a decoding sequence has GENERATED tokens before batch JOINED, and OFFSET + k computed once batch
# k is done; sequences in running order, and those whose last batch shares a slot of the ring; over groups of layers
# JOINED_BLOCKS when it began to decode.
(JOINED, OFFSET, RUN_BEFORE, RUN_AFTER, SLOT_BEFORE, SLOT_AFTER, JOINED_BLOCKS, STEADY_REQUEST_SIZE) = range(
    COMMON_SIZE, COMMON_SIZE + 8
)
# Of the general engine.
(COMPUTED, IN_FLIGHT, BLOCKS, PLACE, DUE_NEXT, GENERAL_REQUEST_SIZE) = range(COMMON_SIZE, COMMON_SIZE + 6)
WAITS, RUNS, DONE = range(3)  # values of PLACE
# Of the speculative engine, after those of the general one: drafts to be scheduled next.
(PROPOSED, SPECULATIVE_REQUEST_SIZE) = range(GENERAL_REQUEST_SIZE, GENERAL_REQUEST_SIZE + 2)
# Of TensorRT-LLM, after those of the general engine: tokens it says it may generate, blocks for all of them, tokens
# that it computes before it decodes, in how many batches on their way it is, whether it has ever
# begun, and how many of the batches on their way have a chunk of its prompt.
(STATED, ROOM, OWED, FLYING, ADMITTED, COMING_CHUNKS, TRTLLM_REQUEST_SIZE) = range(
    GENERAL_REQUEST_SIZE, GENERAL_REQUEST_SIZE + 7
)
NO_EVICT, UTILISE, ONE_BATCH = range(3)  # values of CAPACITY
FIRST_COME, EQUALLY, FORCED = range(3)  # values of CHUNKING
# Of a prompt that may be computed in a batch: the request, the tokens it gets, and those neither computed nor cached.
ASKS, GETS, LEFT, ASKING_SIZE = range(4)

# Columns of `Run.replicas`: settings, the first of its stages, and where its counts, its scratch memory and, with
# prefix caching, its parts of `Cache` begin. Replicas that run in turn share these parts.
(
    MAX_SEQS,
    MAX_TOKENS,
    MAX_LENGTH,
    CHUNKED,
    THRESHOLD,
    BLOCK_SIZE,
    ASYNCHRONOUS,
    POLICY,
    DEPTH,
    STAGES,
    FIRST_STAGE,
    COUNTS_AT,
    RING_AT,
    RING_SIZE,
    RESIDUE_AT,
    ENTERING_AT,
    RUNNING_AT,
    QUEUE_AT,
    MICRO_AT,
    MICRO_WIDTH,
    MEMO_AT,
    SLOTS_AT,  # moves past the slots of those that hold blocks and do not run
    SLOTS,
    TABLE_AT,
    TABLE_WIDTH,
    BLOCK_AT,
    POOL_BLOCKS,
    HOLDER_AT,
    CONTENTS,  # of groups of layers; of TensorRT-LLM, after which it is told who comes to be cached
    DRAFTS,  # that may follow a token
    LOOKAHEAD,  # tokens beyond those of a row whose blocks it needs
    RECOMPUTES,  # whether the last block that is found is computed again
    ACCEPTED_AT,  # counts of accepted drafts in `Run.scratch`, by tokens generated, in one or more lists
    PROPOSED_AT,  # those of proposed ones
    LISTS,
    LIST_SIZE,
    WINDOWS,  # how many the laws have, and where these begin in a law and in the counts
    WINDOWS_OF_LAW,
    WINDOWS_OF_COUNTS,
    RESOURCES,  # how many work at one time, whose laws follow that of the only stage
    SLEEP_NS,  # after a turn that scheduled nothing while requests are unfinished
    LAUNCH_NS,  # how long the loop launches a batch with a prompt, and up to how many tokens it takes no time
    LAUNCHED_FREE,
    WINDOW_PAIRS,  # what the pairs of a chunk take, in memory: as a register of a loop it would be compiled as vectors
    # Registers of both engines, then those of a batch that is being formed, then of one engine.
    NOW,
    BATCHES,
    FREE,
    STACK,
    HEAD,
    TAIL,
    BACKLOG,
    PREEMPTIONS,
    SENT,
    ENDED,
    LAST_ENDED,  # those that were answered last, and when
    LAST_ENDED_NS,
    CACHED,
    ERROR,
    BATCH_ROWS,
    BATCH_TOKENS,
    BATCH_BUDGET,
    BATCH_DECODES,  # rows of one token: decoding, or a prompt's chunk of one, which the hardware cannot tell apart
    BATCH_READ,  # the context they hold
    BATCH_CHUNKS_NS,
    BATCH_LOST,
    BATCH_COMING,
    BATCH_HELD,  # what all of its sequences hold
    BATCH_MADE,  # whether it makes drafts
    DECODING,
    CONTEXT,
    FIRST_RUN,
    LAST_RUN,
    SEATED,
    PARTIAL,
    PARTIAL_DONE,
    FLIGHT,
    FLIGHT_END,
    SIDE,
    ENTERED,
    HOLLOW,
    PHASE,  # residue class of contexts that needs a block in the next batch
    LUMP,  # over groups of layers: blocks that windows give back at the first token after a chunk
    PARTIAL_BEFORE,  # tokens computed before the last chunk of the prompt that is in part
    WANTED,  # free blocks that somebody waits for in a stretch
    RUNNING,
    QUEUE_HEAD,
    QUEUED,
    UNREPORTED,
    COMPLETE,
    STALE,  # batches in flight that may hold sequences preempted since
    HOLDS,  # whether blocks of an answered request are held until they are read
    # Of TensorRT-LLM: settings, scratch memory, and registers.
    CAPACITY,
    CHUNKING,
    FETCH_WAIT_NS,  # up to which a turn waits for new requests
    FETCHED,  # those that the last turn took in and that are not active, where turns wait for new ones
    WAIT_ITERS,
    WAIT_TOKENS,
    CHOSEN_AT,
    PROMPTS_AT,
    SNAPSHOTS,  # tokens after which states are kept; 0: never
    SLOTS_USED,  # of those of `Cache.table`
    WAITED,  # turns in which prompts were held back
    CHOSEN,
    QUIET,  # whether the last batch was of all that decode, and nothing has changed since
    REPLICA_SIZE,
) = range(105)

# Of a micro-batch, see `rotation`: its sequences, the context they hold, and that of all batches in the stretch; how
# often it was formed and taken in, how often it can be taken in before somebody gets its first or last token, FORMED
# modulo the size of a block, when it ends, and up to which context the times of its stages hold. Then, by PHASE, those
# who need a block: with prefix caching the first of them, chained by DUE_NEXT, else their number. Then for each stage
# what its time is made of.
(
    MICRO_ROWS,
    MICRO_CONTEXT,
    MICRO_READ,
    MICRO_FORMED,
    MICRO_TAKEN,
    MICRO_LEFT,
    MICRO_PHASE,
    MICRO_END,
    MICRO_UNTIL,
    MICRO_DUE,
) = range(10)
PACE_NS, PACE_RATE, PACE_FULL, PACE_TRANSFER_NS, PACE_SIZE = range(5)

STAGE_FREE, STAGE_BUSY, STAGE_LAW, STAGE_SIZE = range(4)
# Tables of a law: the first by sequences, the others by tokens; then the copies of attention, and where drafts are made
# `verify_ns` by tokens and `draft_ns` and `draft_rate` by sequences; then `Window.stamp` of each window, `seen_rate` of
# each by sequences and `seen_pair_rate` of each by tokens.
(DECODE_NS, SEQUENCE_NS, ATTEND_NS, CONTEXT_RATE, MIXED_NS, CHUNK_NS, PAIR_RATE, CHUNK_CONTEXT_RATE, TRANSFER_NS) = (
    range(9)
)
# Tables of counts: the first by sequences, the others by tokens; and where drafts are made `verify` by tokens, and
# `draft` and `draft_context` by sequences; then `seen_context` of each window by sequences, `seen_pairs` by tokens.
(
    N_DECODE,
    N_DECODE_CONTEXT,
    N_SEQUENCES,
    N_ATTEND,
    N_ATTEND_CONTEXT,
    N_MIXED,
    N_CHUNK,
    N_CHUNK_PAIRS,
    N_CHUNK_CONTEXT,
) = range(9)

# Columns of `Run.stops`, a `stop.Stop` in each row. With ADDS, latencies beyond the floors add up in USED; else USED
# counts those above the limit.
STOP_METRIC, STOP_ADDS, STOP_LIMIT, STOP_MOST, STOP_USED, STOP_SIZE = range(6)
TTFT, TPOT, E2E, MAKESPAN = range(4)

# Columns of the log. REQUEST: 256 * request + 16 * drafts + tokens that the row brings, some of which may be surplus.
STEP_REPLICA, STEP_START, STEP_END, STEP_ROWS, STEP_LOST, STEP_FREE, STEP_SIZE = range(7)
ROW_REQUEST, ROW_TOKENS, ROW_COMPUTED, ROW_SIZE = range(4)

# Columns of `Cache.block`. Block 0 is none: free blocks stand in a circle from its BEHIND to its AHEAD, which is minus
# the number of its users for a block in use. MARK is the stamp of those found for the request in `memo`. CONTENT 0 is
# none, so all begins as 0; it is negative where other blocks have held it too. These stand in a line from the oldest,
# which `Cache.holder` tells, by NEWER, in a second table behind the first; OLDER of the oldest is the newest.
CONTENT, BEHIND, AHEAD, MARK, BLOCK_WIDTH = range(5)
OLDER, NEWER, LINE_WIDTH = range(3)
# Of TensorRT-LLM after the first three: the block above it in the tree, how often that one had been put there by then,
# and how often this one has been.
ABOVE, ABOVE_PUT, PUT, REUSED_WIDTH = range(3, 7)
NOTHING = 0
MEMO_REQUEST, MEMO_FOUND, MEMO_UNUSED, MEMO_STAMP, MEMO_LAID, MEMO_WIDTH = range(6)

# `Links.facts`: prompts; instances that compute them, and that answer them; times of a hand-over; whether reads from an
# instance follow each other; prompts that have been handed over; those that it is known of when they come, and from an
# answer to the next request of the same client; of SGLang tokens to come that room is kept for, and up to how many
# seats of a decode instance three requests may have blocks for each.
(
    REQUESTS,
    PREFILLS,
    DECODES,
    PROXY_NS,
    READ_NS,
    BLOCK_NS,
    NOTICE_NS,
    IN_TURN,
    FORWARDED,
    KNOWN_TO_COME,
    CLIENT_NS,
    RESERVED,
    FEW_SEATS,
    FACTS_SIZE,
) = range(14)

# Columns of `Links.instances`: when it acts next; whether it awaits its oldest batch, and whether its turn executed
# something; until when requests have been received; when its link is free; its line of ends of reads, how many of
# them can be admitted, when the next can be seen, and how many were seen with each batch in flight; of SGLang the first
# request that has come since the last turn, and those whose prompts have come and that wait for seats.
(
    DUE,
    AWAITS,
    EXECUTED,
    RECEIVED,
    LINK_FREE,
    FIRST_END,
    LAST_END,
    ENDS,
    READY,
    SOONEST,
    SEEN_IN,
    FRESH,
    FIRST_WAITING,
    LAST_WAITING,
    WAITING_SEATS,
    INSTANCE_SIZE,
) = (*range(11), *range(12, 17))

# Columns of `Links.ends`: when the workers can see it; the batch they saw it with, or NONE or HEARD; the next in line.
END_AT, SEEN, NEXT_END, END_SIZE = range(4)
HEARD = -2

# Columns of `Links.passages`: the instances, the read and when it was ordered, and when the request came to a router.
PREFILL_OF, DECODE_OF, READ_START, READ_END, READ_BLOCKS, ORDERED, CAME, PASSAGE_SIZE = range(8)
WAITS_AT_ROUTER = -2
