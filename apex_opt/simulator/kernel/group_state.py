"""Where everything of data-parallel ranks is: arrays beside those of `state.Run`, and the columns of their rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from apex_opt.simulator.kernel.state import I64


class Group(NamedTuple):
    """Memory of ranks behind one address: of each replica a row of `groups`, of each rank one of `members`."""

    told: I64
    groups: I64
    members: I64
    fronts: I64
    memory: I64  # queues, messages on their way, forwards and loads, where a row says so
    tables: I64  # `ranks.Padding`, then of each stage `ranks.SharedLaw`
    together: I64  # `outcome.SharedCounts`, of one pool after the other
    links: I64  # columns of the requests
    forwards: I64
    events: I64
    loads: I64


class Halves(NamedTuple):
    """What forwards in two halves take, and how many there were, of one pool after the other.

    Of each stage its layers, then the tables of `ranks.Halves`; of each pool two tables of forwards, those that only
    decode first. The laws of halves are those of as many stages more.
    """

    tables: I64
    counts: I64


# Columns of `Group.told`: rows of each log, their capacities as of `Run.control`; whether messages found no room.
(FORWARDS, EVENTS, LOADS, MOST_FORWARDS, MOST_EVENTS, MOST_LOADS, LOADS_WIDTH, CROWDED, TOLD_SIZE) = range(9)

# Columns of `Group.groups`: settings, where memory begins, then registers: of the group, and of its coordinator.
(
    FIRST_RANK,
    COUNT,
    IN_STEP,
    FRONT_ENDS,
    BALANCED,
    RETURNS_LATE,
    SYNC_NS,
    SEND_NS,
    CONTROL_NS,
    CLOSED,  # clients send a request with each answer
    MASK,  # of places for messages
    SLOT_MASK,  # of places for forwards
    FRONTS_AT,
    TABLES_AT,
    WIDE,  # entries of a table by a rank's padded tokens
    ALL,  # of one by those of all ranks
    PER,  # tokens to an entry of that
    TOGETHER_AT,
    OF_DRAFTS,  # entries of what all ranks take to make drafts, 0 where none are made
    FIRSTS_AT,
    HEARD_AT,
    NEWS_AT,
    STARTS_AT,
    SLOTS_AT,
    LIVE_AT,
    CLOCK,
    COMING,  # the request that arrives next
    LAST_COMING,
    WAITING_CLIENT,  # in a closed loop, the request that is sent with the next answer
    ARRIVED,
    GIVEN,  # requests sent so far, those that have yet to arrive among them
    ANSWERED,
    MESSAGES,
    VOTES,
    VOTED_ON,
    FIRSTS_IN,
    FIRSTS_OUT,
    HEARD_IN,
    HEARD_OUT,
    NEWS_IN,
    STARTS_IN,
    TOLD_DUE,  # when the coordinator acts next
    ASIDE,
    CHANGED,
    WAVE_RUNS,
    WAVE,
    NEWEST_WAVE,
    NEWEST_STEP,
    PUBLISHED_MS,
    ADP_BALANCE,  # of TensorRT-LLM: prompts wait until every rank has some, for so many turns, and for so many more
    ADP_TIMEOUT,
    ADP_BATCHING,
    WAITED_FOR_SOME,
    WAITED_ON,
    HALVES_AT,
    HALVES_COUNTED_AT,
    LEAST_DECODE,  # tokens of a rank that only decodes, and of another, from which on it wants a forward to be split
    LEAST_PROMPT,
    GROUP_SIZE,
) = range(59)

# Columns of `Group.members`.
(
    STATE,
    DUE,
    NUMBER,  # the forward that is waited for
    NEXT_PART,
    LANE,
    OWN_AT,
    FLYING_AT,  # numbers of the forwards of batches in flight; NONE of an empty one
    FLYING,
    FLYING_HEAD,
    UNHEARD,  # the next request to hear of
    HEARD,
    STARTS_OUT,
    RUNS_ON,  # in a wave
    OWN_WAVE,
    STEP,
    TOLD_RUNNING,
    TOLD_WAITING,
    EXECUTED,
    UNFINISHED,
    DUMMIES,
    HEARD_NS,
    ENDED_BEFORE,
    LANE_DONE,  # of the lane of the same number, forwards that are known
    DECODING,  # of TensorRT-LLM: who decodes, and prompts, in the batch that is being formed
    PROMPTS,
    MEMBER_SIZE,
) = range(26)
HEARS, TAKES, SLEEPS, RETURNS, VOTES_ON, GOES_ON = range(6)  # values of STATE: what it waits for

# Columns of `Group.fronts`; then loads, [waiting, running] of each rank.
(FRONT_DUE, NEWS_OUT, FIRST_AT, FIRST_FOR, KNOWN_WAVE, THINKS_RUNS, SCANS_FROM, FRONT_SIZE) = range(8)

# Columns of messages: first requests; from ranks to the coordinator; news, then loads; starts of waves.
FIRST_TIME, FIRST_RANK_, FIRST_WAVE, FIRST_MESSAGE = range(4)
(HEARD_TIME, KIND, OF_RANK, OF_WAVE, OF_STEP, ITS_WAITING, ITS_RUNNING, HEARD_MESSAGE) = range(8)
COUNTS, ENDS, WANTS = range(3)  # values of KIND
NEWS_TIME, WITH_LOADS, NEWS_WAVE, NEWS_RUNS, NEWS_MESSAGE = range(5)
START_TIME, START_WAVE, EXCLUDED, START_ORDER, START_MESSAGE = range(5)

# Columns of a forward, then of each stage the most of the ranks' own times, and with their own padding.
# SEQUENCES and MAKES tell of drafts, by how many sequences they are made and whether. Where forwards may be split the
# fewest tokens of a rank, whether any of them does not want it, and the most sequences; behind all stages, of each the
# most that ranks compute of two halves.
(PARTS, LATEST, LEAST_MODE, MOST_ROWS_, SUM_ROWS, MIXED, AGREED, END, SEQUENCES, MAKES) = range(10)
FEWEST, UNWILLING, MOST_SEQUENCES, SLOT_SIZE = range(10, 14)

# Columns of `Group.links`: the chain of requests of a replica, and of each when it was sent to a rank: the wave it is
# stamped with, its place among messages, the rank, and the replica, numbered from 1.
AFTER, STAMP, ORDER, SERVED_BY, SERVED_IN, LINKS_SIZE = range(6)

FORWARD_LANE, FORWARD_START, FORWARD_END, FORWARD_MODE, FORWARD_ROWS, FORWARD_SIZE = range(6)
EVENT_GROUP, EVENT_TIME, EVENT_WAVE, EVENT_EXCLUDED, EVENT_ENDS, EVENT_SIZE = range(6)
LOAD_GROUP, LOAD_TIME, LOAD_SIZE = range(3)
NS_PER_MS = 1_000_000
LEAST_WAIT_MS, CHANGED_MS, UNCHANGED_MS = 50, 100, 5000
VOTE = 32
